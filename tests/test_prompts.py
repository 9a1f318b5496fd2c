"""The vocabulary of prompts: captions, demonstrations, and what is refused."""

import json
import subprocess
import sys

import pytest

from medisyn import prompts


def test_there_is_one_demonstration_for_each_of_the_nine_modalities():
    demo = prompts.demo_prompts()
    assert len(demo) == len({name for name, _ in demo}) == len({prompt for _, prompt in demo}) == 9
    assert [name for name, _ in demo] == [entry.display for entry in prompts.MODALITIES]
    assert demo == prompts.demo_prompts()


@pytest.mark.parametrize(
    ("arguments", "details", "expected"),
    [
        (("MRI", "no tumor"), {}, "brain MRI slice with no tumor"),
        (("CT", "no COVID-19"), {}, "axial chest CT slice without COVID-19"),
        (("blood smear microscopy", "eosinophil"), {}, "blood smear microscopy image showing an eosinophil"),
        (("fundus photography", "normal"), {}, "color fundus photograph of the eye with no abnormality"),
        (
            ("fundus photography", "glaucoma"),
            {"laterality": "left"},
            "color fundus photograph of the left eye with glaucoma",
        ),
        (
            ("dermoscopy", "melanoma"),
            {"localization": "back", "age": 50, "sex": "female"},
            "dermoscopy image of melanoma on the back of a 50-year-old woman",
        ),
        (("dermoscopy", "melanoma"), {"age": 75, "sex": "male"}, "dermoscopy image of melanoma of a 75-year-old man"),
        (("dermoscopy", "melanoma"), {"sex": "male"}, "dermoscopy image of melanoma"),
    ],
)
def test_caption(arguments, details, expected):
    assert prompts.caption(*arguments, **details) == expected


@pytest.mark.parametrize(
    ("arguments", "details", "named"),
    [
        (("MR", "glioma"), {}, ["'MR'", "Did you mean 'MRI'?", "chest X-ray"]),
        (("MRI", "gliome"), {}, ["'gliome'", "Did you mean 'glioma'?", "pituitary tumor"]),
        (("fundus photography", "glaucoma"), {"laterality": "lft"}, ["'lft'", "left", "right"]),
        (("dermoscopy", "melanoma"), {"localization": "knee"}, ["'knee'", "lower extremity"]),
        (("dermoscopy", "melanoma"), {"age": 50, "sex": "x"}, ["'x'", "male", "female"]),
        (("dermoscopy", "melanoma"), {"age": 0, "sex": "male"}, ["0"]),
        (("MRI", "glioma"), {"laterality": "left"}, ["MRI", "laterality", "'left'"]),
    ],
)
def test_a_caption_outside_the_vocabulary_is_refused_in_one_line(arguments, details, named):
    with pytest.raises(ValueError) as error:
        prompts.caption(*arguments, **details)
    assert all(part in str(error.value) for part in named)
    assert "\n" not in str(error.value)


def test_the_vocabulary_holds_every_word_of_every_caption():
    words = {word for phrase in prompts.vocabulary() for word in phrase.split()}
    for text in [*prompts.all_captions(), *(prompt for _, prompt in prompts.demo_prompts())]:
        assert {word for word in text.split() if "-year-old" not in word} - {"on", "the", "of", "a"} <= words
    assert len(prompts.vocabulary()) == len(set(prompts.vocabulary()))


def test_importing_the_vocabulary_does_not_import_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, medisyn.prompts; assert 'torch' not in sys.modules"], check=True
    )


def test_the_sentences_are_those_of_the_corpus(shared_folder):
    pandas = pytest.importorskip("pandas")
    from pathlib import Path

    columns = ["caption", "modality", "finding", "extra"]
    files = sorted(Path(shared_folder, "corpus").glob("*.parquet"))
    rows = pandas.concat([pandas.read_parquet(file, columns=columns) for file in files]).drop_duplicates("caption")
    for row in rows.itertuples():
        extra = {name: value for name, value in json.loads(row.extra).items() if value not in ("", "unknown", "0")}
        if not {"age", "sex"} <= extra.keys():
            extra = {name: value for name, value in extra.items() if name not in ("age", "sex")}
        if "age" in extra:
            extra["age"] = int(extra["age"])
        assert prompts.caption(row.modality, row.finding, **extra) == row.caption


@pytest.mark.parametrize(
    "described",
    [
        prompts.Description("MRI", "no tumor"),
        prompts.Description("fundus photography", "normal", laterality="right"),
        prompts.Description("dermoscopy", "melanoma", localization="lower extremity", age=50, sex="female"),
        prompts.Description("dermoscopy", "vascular lesion", age=7, sex="male"),
    ],
)
def test_a_caption_is_read_back(described):
    modality, finding, *details = described
    names = ("laterality", "localization", "age", "sex")
    assert (
        prompts.parse_caption(prompts.caption(modality, finding, **dict(zip(names, details, strict=True))))
        == described
    )


def test_every_caption_is_read_back_and_nothing_else():
    assert all(prompts.parse_caption(caption) is not None for caption in prompts.all_captions())
    for text in ("", "brain MRI", "brain MRI slice showing a cataract", "a brain MRI slice showing a glioma", "CXR"):
        assert prompts.parse_caption(text) is None
