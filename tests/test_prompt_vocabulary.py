"""Prompts in everyday words, prompts for what a model was not trained on, and what it then says.

python -m pytest tests/test_prompt_vocabulary.py
"""

import logging
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import medisyn
from medisyn.cli import app
from medisyn.demo import Form, Studio
from medisyn.generation.requests import Request, make_requests
from medisyn.generation.synthesize import synthesize
from medisyn.lora import fuse_adapters
from medisyn.paraphrases import paraphrase
from medisyn.pipelines.medisyn_pipeline import combination_warning, plain_spelling
from medisyn.prompt_vocabulary import prompt_vocabulary, record_vocabulary
from medisyn.prompts import SEXES, SKIN_SITES, all_captions
from tests.components import tiny_pipeline

MRI = "Brain MRI: no tumor, glioma, meningioma, pituitary tumor"
SIDED = [f"color fundus photograph of the {side} eye with cataract" for side in ("left", "right")]
PERSONS = [f"dermoscopy image of melanoma on the back of a 50-year-old {person}" for person in SEXES.values()]
CAPTIONS = [*all_captions(), *SIDED, *PERSONS, *(f"dermoscopy image of melanoma on the {site}" for site in SKIN_SITES)]


def pipeline(captions=CAPTIONS, **options):
    pipe = tiny_pipeline(**options)
    record_vocabulary(pipe, captions, paraphrased=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


@pytest.fixture(scope="module")
def default():
    return medisyn.load_pipeline()


def warnings(pipe, prompt, **options):
    return pipe.prompt_warnings(prompt, again=True, **options)


def test_the_embedded_model_carries_what_its_training_would_record(default):
    """Its JSON is that of the captions of the corpus."""
    assert default.config.prompt_vocabulary == prompt_vocabulary(CAPTIONS)
    names = [entry["name"] for entry in default.config.prompt_vocabulary["modalities"]]
    assert len(names) == 9 and "Histopathology (lung)" in names


def test_no_caption_and_no_other_wording_of_one_is_warned_of_or_changed(default):
    for text in CAPTIONS:
        for wording in {text, *(paraphrase(text, Random(seed)) for seed in range(40))}:
            assert not warnings(default, wording), wording
            assert default.known_spelling(wording)[0].lower() == wording.lower()


@pytest.mark.parametrize(
    ("prompt", "words", "known"),
    [
        ("CT of the abdomen", "'abdomen'", "Chest CT: normal, benign nodule"),
        ("breast MRI", "'breast'", MRI),
        ("chest ultrasound", "'chest'", "Breast ultrasound: normal, benign, malignant"),
        ("X-ray of the foot", "'foot'", "Chest X-ray: normal"),
        ("breast histopathology", "'breast'", "Histopathology (lung): benign tissue"),
        ("brain MRI showing melanoma", "'melanoma'", MRI),
        ("chest X-ray with COVID-19 pneumonia", "'covid'", "normal, bacterial pneumonia, viral pneumonia"),
        ("CT of lung adenocarcinoma", "'adenocarcinoma'", "benign nodule, malignant nodule"),
        ("normal colonoscopy", "'normal'", "Colonoscopy: polyp"),
        ("CXR of a man", "'man'", "Chest X-ray: normal"),
        ("A SKIN LESION, GLIOMA", "'skin' with 'lesion' with 'glioma'", "Dermoscopy (skin): melanocytic nevus"),
        ("CT, MRI", "'ct' with 'mri'", MRI),
    ],
)
def test_words_that_no_caption_had_together_are_named_with_what_there_is(default, prompt, words, known):
    (message,) = warnings(default, prompt)
    assert message.startswith(f"this model was not trained on {words}") and known in message and "\n" not in message


@pytest.mark.parametrize("prompt", ["OCT of the retina", "PET scan of the liver", "mammography", "gliom"])
def test_without_a_known_modality_all_of_them_are_listed_before_words_of_a_near_spelling(default, prompt):
    (message,) = warnings(default, prompt)
    assert "none of the modalities that this model was trained on (Chest X-ray, Chest CT, Brain MRI" in message
    assert message.partition("(near: ")[2] == ("glioma)" if prompt == "gliom" else "")


def test_an_unknown_word_beside_a_known_modality_is_answered_with_what_that_has(default):
    assert warnings(default, "knee MRI") == [
        f"no caption that this model was trained on has the words: 'knee'; it knows {MRI}"
    ]


def test_function_words_are_not_warned_of_and_negations_are(default):
    for prompt in ("a brain MRI and a glioma in it", "melanoma from the back of a hand", "an MRI which has a glioma"):
        assert not warnings(default, prompt)
    assert "not say which modality" in warnings(default, "pneumonia in the lungs")[0]
    assert set(default.unknown_words("not a melanoma, never")) == {"not", "never"}
    assert default.known_spelling("H and E and polyps") == ["H&E and polyp"]


def test_short_words_have_near_ones_of_the_same_letters_only(default):
    near = default.unknown_words("oct pet tc mir gliom")
    assert near == {"oct": [], "pet": [], "tc": ["ct"], "mir": ["mri"], "gliom": ["glioma"]}


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("normal", "Chest X-ray, Chest CT, Brain MRI, Breast ultrasound, Fundus photograph (retina), Histo"),
        ("benign", "Chest CT, Breast ultrasound, Dermoscopy (skin), Histopathology (lung)"),
        ("pneumonia", "Chest X-ray, Chest CT"),
        ("left", "Fundus photograph (retina)"),
        ("F 45", "Dermoscopy (skin)"),
        ("an image", "Chest X-ray, Chest CT, Brain MRI"),
    ],
)
def test_a_prompt_that_leaves_the_modality_open_is_said_to(default, prompt, names):
    (message,) = warnings(default, prompt)
    assert "the model will choose; to choose yourself, add: " + names in message
    assert not warnings(default, prompt, alone=False)


def test_empty_labels_say_no_more_than_the_prompt(default, monkeypatch):
    lines = []
    monkeypatch.setattr("medisyn.pipelines.medisyn_pipeline.logger.warning", lines.append)
    for labels, count in (({}, 1), ({"gc": 1}, 0)):
        default._warned_of.clear()
        lines.clear()
        default("normal", labels=labels, num_inference_steps=1)
        assert sum("the model will choose" in line for line in lines) == count


def test_the_line_on_an_open_prompt_agrees_with_the_number_of_its_words(default):
    assert warnings(default, "normal chest")[0].startswith("'normal' and 'chest' do not say which modality is meant")
    assert warnings(default, "normal")[0].startswith("'normal' does not say")


@pytest.mark.parametrize(
    "prompt", ["melanoma", "left eye", "MRI", "brain", "nevus on the chest", "malignant", "", None]
)
def test_what_says_enough_is_left_alone(default, prompt):
    assert not warnings(default, [prompt])


@pytest.mark.parametrize(
    ("prompt", "understood"),
    [
        ("xray", "X-ray"),
        ("chest x-rays", "chest X-ray"),
        ("chest x ray", "chest X-ray"),
        ("nevi and Moles", "nevus and mole"),
        ("naevus", "nevus"),
        ("colour photos of fundi", "color photo of fundus"),
        ("pituitary tumours", "pituitary tumor"),
        ("actinic keratoses", "actinic keratosis"),
        ("cxr's, CTs, MRIs", "cxr, ct, MRI"),
        ("H and E, H & E", "H&E, H&E"),
        ("melanoma, 60M", "melanoma, 60-year-old man"),
        ("60 y.o. man", "60-year-old man"),
        ("60yo male", "60-year-old man"),
        ("60 y/o F", "60-year-old woman"),
        ("F 45", "45-year-old woman"),
        ("male, 60-year-old", "60-year-old man"),
        ("60 years old woman", "60 year old woman"),
        ("5yo", "5-year-old"),
        ("covid19, male", "COVID-19, man"),
    ],
)
def test_everyday_spellings_are_read_as_known_words(default, prompt, understood):
    assert default.known_spelling([prompt, None]) == [understood, ""]
    assert not default.unknown_words(prompt)


@pytest.mark.parametrize("prompt", ["X-ray M, 3 views", "man, 2 cm", "CT 100 m"])
def test_numbers_that_are_no_age_stay(default, prompt):
    assert default.known_spelling(prompt) == [prompt]


@pytest.mark.parametrize("prompt", ["colonoscopy, no polyp", "CT, no finding", "CXR, negative"])
def test_words_that_deny_a_finding_are_no_finding_of_another_modality(default, prompt):
    assert not [line for line in warnings(default, prompt) if line.startswith("this model was not trained on 'no'")]
    assert not [line for line in warnings(default, prompt) if "'finding'" in line or "'negative'" in line]


def test_images_of_an_everyday_spelling_are_those_of_the_known_one(pipe):
    def draw(*texts):
        options = {"num_inference_steps": 1, "output_type": "np", "negative_prompt": texts[1]}
        return pipe(texts[0], generator=torch.Generator().manual_seed(0), **options).images

    plain = draw("nevus", "polyp")
    np.testing.assert_array_equal(plain, draw("nevi", "polyps"))
    assert not np.array_equal(plain, draw("nevos", "polyp"))


def test_labels_are_read_in_everyday_spellings_too(default):
    assert default.labels_of_prompt("glaucomas") == default.labels_of_prompt("glaucoma")


def test_a_known_word_is_never_changed_and_of_two_candidates_none_is_taken():
    pipe = tiny_pipeline()
    text = "Tumours of four colours, xray, 60M, Crohn's nevi, lung"
    assert pipe.known_spelling(text) == [text]  # it does not say what it knows
    pipe.register_to_config(known_words=["tumours", "tumor", "colour", "color", "nevi", "lungs", "for"])
    assert pipe.known_spelling(text) == ["Tumours of four colours, xray, 60M, Crohn's nevi, lungs"]
    assert plain_spelling("four") == "four" and plain_spelling("keratosis") == "keratosis"


def test_models_of_other_captions_record_no_vocabulary_and_are_left_alone():
    other = pipeline(["knee MRI, grade 3", "brain MRI slice showing a glioma"])
    assert other.config.get("prompt_vocabulary") is None and "knee" in other.config.known_words
    assert not warnings(other, ["knee MRI with melanoma", "60M 3 x ray", "normal"])
    assert prompt_vocabulary([None, ""]) is None
    few = pipeline(all_captions()[:3])  # of chest X-rays
    assert "was trained on (Chest X-ray), and" in warnings(few, "knee")[0]
    record_vocabulary(few, ["knee MRI"])  # trained on with other captions
    assert few.config.prompt_vocabulary["modalities"] == [] and {"knee", "cxr"} <= set(few.config.known_words)
    assert few.known_spelling("x ray")[0] == "X-ray" and not warnings(few, "knee MRI, x ray")


def test_training_goes_on_from_a_base_with_the_modalities_and_findings_that_it_had():
    few = pipeline(all_captions()[:2])  # two findings of chest X-rays
    record_vocabulary(few, all_captions()[1:4])  # the second, the third, and the first of CT
    assert few.config.prompt_vocabulary == prompt_vocabulary(all_captions()[:4])
    assert not warnings(few, "chest X-ray, normal")


def test_findings_that_no_caption_had_are_not_in_the_vocabulary():
    (mri,) = prompt_vocabulary(["brain MRI slice showing a glioma"])["modalities"]
    assert mri["findings"] == [["glioma"]] and "'tumor'" not in str(mri)
    assert combination_warning("MRI", [mri]) is None


def test_what_an_adapter_was_taught_is_left_alone():
    default = medisyn.load_pipeline(adapter=Path(__file__).parent.parent / "adapters" / "mammography")
    for prompt in ("mammogram showing a malignant lesion", "breast mammogram with a nodule", "lesion"):
        assert not warnings(default, prompt)
    assert warnings(default, "breast MRI")
    default.disable_lora()
    assert "does not say which modality" in warnings(default, "lesion")[0]


def test_what_a_fused_adapter_was_taught_is_the_model_s_own():
    model = medisyn.load_pipeline(adapter=Path(__file__).parent.parent / "adapters" / "mammography")
    fuse_adapters(model)
    assert not warnings(model, ["mammogram showing a malignant lesion", "brain MRI slice showing a glioma"])
    assert "'knee'" in warnings(model, "knee")[0]
    assert model.known_spelling("x ray, mammograms")[0] == "X-ray, mammogram"


def test_a_function_word_of_an_adapter_does_not_hide_what_was_never_together(monkeypatch):
    pipe = pipeline()
    monkeypatch.setattr(pipe, "_adapter_words", lambda: [{"mammogram", "in", "grey"}])
    assert "'breast'" in warnings(pipe, "breast in an MRI")[0]
    assert not warnings(pipe, "mammogram of the grey")


def test_unknown_words_are_named_once_and_at_most_ten(caplog):
    pipe = tiny_pipeline()
    pipe.register_to_config(known_words=["glioma", "histopathology"])
    (message,) = pipe.prompt_warnings(["gliom knee", None])
    assert "'gliom' (near: glioma" in message and "'knee'; it knows, among others: histopathology" in message
    assert not pipe.prompt_warnings("knee")
    pipe("gliom", num_inference_steps=1)
    assert not caplog.messages
    (message,) = pipe.prompt_warnings(" ".join("zq" + 2 * letter for letter in "abcdefghijkl"))
    assert "'zqjj', and 2 more;" in message


def test_the_pipeline_says_in_a_call_what_synthesize_says_once_in_a_run(pipe, caplog, tmp_path):
    prompts = ["brain MRI, melanoma", "brain MRI with melanoma", "brain MRI", "brain MRI, polyp", "normal"]
    pipe.prompt_warnings([], again=True)
    for prompt in prompts:
        pipe(prompt, num_inference_steps=1)
    called = [text for text in caplog.messages if "window" not in text]
    for run in ("first", "second"):
        caplog.clear()
        synthesize(pipe, make_requests(prompts, 2), tmp_path / run, num_inference_steps=1, batch_size=2)
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        said = [text for text in said if "window" not in text]
        assert said == called and [text.split("'")[1] for text in said] == ["melanoma", "polyp", "normal"]


def test_an_open_prompt_is_fine_where_something_else_says_what_to_make(caplog, tmp_path):
    pipe = pipeline(kinds=("text", "labels"))
    pipe("normal", labels={"gc": 1}, num_inference_steps=1)
    synthesize(pipe, [Request("normal", labels={"gc": "1"})], tmp_path / "labels", num_inference_steps=1)
    image = tmp_path / "labels" / "grid.png"
    synthesize(pipe, [Request("normal", init_image=image)], tmp_path / "image", num_inference_steps=2)
    assert not caplog.messages
    pipe("normal", num_inference_steps=1)
    assert "does not say which modality" in caplog.messages[0]


def test_the_command_and_the_demo_say_it(tmp_path):
    pipeline().save_pretrained(tmp_path / "model")
    arguments = ["generate", "knee MRI, polyp", "--model", tmp_path / "model", "--out", tmp_path / "out", "--steps", 1]
    result = CliRunner().invoke(app, [str(part) for part in arguments])
    assert result.exit_code == 0
    words, finding = result.stderr.splitlines()
    assert words.startswith("warning: ") and "'knee'" in words and "'polyp'" in finding and MRI in finding
    studio, said = Studio(pipeline(), "tiny", {}, tmp_path / "images"), [words, finding]
    for _ in range(2):
        notes = studio.generate(Form(prompt="knee MRI, polyp", steps=1, num_images=1)).notes
        assert notes == [line.removeprefix("warning: ") for line in said]
