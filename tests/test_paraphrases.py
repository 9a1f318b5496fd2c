"""Other wordings of captions: what they may say and what not."""

from random import Random

import pytest

from medisyn import paraphrases, prompts
from medisyn.paraphrases import paraphrase, perhaps_paraphrase


def test_every_modality_and_finding_has_names():
    assert list(paraphrases.MODALITY_NAMES) == [entry.name for entry in prompts.MODALITIES]
    for entry in prompts.MODALITIES:
        assert list(paraphrases.FINDING_NAMES[entry.name]) == list(entry.findings)


def test_a_wording_depends_on_its_generator_alone_and_wordings_differ():
    text = "brain MRI slice showing a glioma"
    assert paraphrase(text, Random(3)) == paraphrase(text, Random(3))
    said = {paraphrase(text, Random(seed)) for seed in range(200)}
    assert {"glioma, head MRI", "MRI", "glioma"} <= said


@pytest.mark.parametrize("text", ["", "knee X-ray, grade 4", "brain MRI", "no caption of the vocabulary"])
def test_other_texts_stay(text):
    assert paraphrase(text, Random(0)) == text


def test_nothing_is_said_that_the_caption_does_not_say():
    sided = "color fundus photograph of the left eye with cataract"
    said = [paraphrase(sided, Random(seed)) for seed in range(300)]
    assert any("left" in text or "OS" in text for text in said)
    assert not any("right" in text or "OD" in text for text in said)
    plain = [paraphrase("color fundus photograph of the eye with cataract", Random(seed)) for seed in range(300)]
    assert not any(side in text for text in plain for side in ("left", "right", "OS", "OD"))
    person = "dermoscopy image of melanoma on the back of a 50-year-old woman"
    said = [paraphrase(person, Random(seed)) for seed in range(300)]
    assert any("back" in text and "50" in text for text in said)
    words = {word for text in said for word in text.replace("woman", "").split(" ")}
    assert "man" not in words and not {word for word in words if word.isdigit() and word != "50"}


def test_a_finding_of_several_modalities_never_stands_alone():
    for entry, finding in (("chest X-ray", "normal"), ("ultrasound", "benign"), ("CT", "normal")):
        text = prompts.caption(entry, finding)
        said = {paraphrase(text, Random(seed)) for seed in range(500)}
        assert not said & {"normal", "benign"}


def test_known_phrases_hold_every_word_of_every_wording():
    known = set(" ".join(paraphrases.known_phrases()).lower().replace(",", " ").split())
    known |= set(" ".join(prompts.vocabulary()).lower().split())
    for text in [*prompts.all_captions(), "dermoscopy image of melanoma on the back of a 50-year-old woman"]:
        for seed in range(50):
            words = paraphrase(text, Random(seed)).lower().replace(",", " ").split()
            assert {word for word in words if not word[0].isdigit()} <= known


def test_a_share_of_the_captions_is_said_in_other_words_by_the_seed():
    glioma = "brain MRI slice showing a glioma"
    worded = [perhaps_paraphrase(glioma, 0.5, Random(seed)) for seed in range(200)]
    assert worded == [perhaps_paraphrase(glioma, 0.5, Random(seed)) for seed in range(200)]
    assert 70 < worded.count(glioma) < 130 and len(set(worded)) > 10
    assert perhaps_paraphrase(None, 1.0, Random(0)) is None
    assert perhaps_paraphrase("bright square", 1.0, Random(1)) == "bright square"
