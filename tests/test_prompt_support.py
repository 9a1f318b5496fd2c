"""Prompts that ask for what a model was not trained on: the warning and what it names.

python -m pytest tests/test_prompt_support.py
"""

import logging
from random import Random

import pytest
from typer.testing import CliRunner

from medisyn.cli import app
from medisyn.demo import Form, Studio
from medisyn.generation.requests import make_requests
from medisyn.generation.synthesize import synthesize
from medisyn.paraphrases import known_phrases, paraphrase
from medisyn.pipelines.medisyn_pipeline import words_of
from medisyn.prompt_support import prompt_warning
from medisyn.prompts import all_captions, vocabulary
from tests.components import tiny_pipeline

VOCABULARY = words_of([*vocabulary(), *known_phrases()])
MRI = "brain MRI: no tumor, glioma, meningioma, pituitary tumor"


def pipeline(known_words=VOCABULARY):
    pipe = tiny_pipeline()
    pipe.register_to_config(known_words=sorted(known_words))
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def test_no_caption_and_no_other_wording_of_one_is_warned_of(pipe):
    sided = "color fundus photograph of the left eye with cataract"
    person = "dermoscopy image of melanoma on the back of a 50-year-old woman"
    for text in [*all_captions(), sided, person]:
        for wording in {text, *(paraphrase(text, Random(seed)) for seed in range(40))}:
            assert prompt_warning(pipe, wording) is None


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("brain MRI showing melanoma", ["'melanoma'", MRI]),
        ("A SKIN LESION, GLIOMA", ["'glioma'", "dermoscopy: melanocytic nevus, melanoma"]),
        ("chest X-ray with COVID-19 pneumonia", ["'covid-19 pneumonia'", "normal, bacterial pneumonia, viral"]),
        ("head MRI, pneumonia", ["'pneumonia'", MRI]),
        ("CT of lung adenocarcinoma", ["'lung adenocarcinoma'", "benign nodule, malignant nodule"]),
        ("PET scan of the liver", ["none of the modalities", "chest CT", "brain MRI", "blood smear"]),
        ("mammogram", ["none of the modalities", "breast ultrasound"]),
    ],
)
def test_what_the_model_does_not_know_is_named_with_what_it_knows(pipe, prompt, named):
    warning = prompt_warning(pipe, prompt)
    assert "\n" not in warning and all(part.lower() in warning.lower() for part in named)


@pytest.mark.parametrize("prompt", ["melanoma", "left eye", "MRI", "abnormal CT", "MRI with glioma beside a melanoma"])
def test_what_may_be_meant_is_left_alone(pipe, prompt):
    assert prompt_warning(pipe, prompt) is None


def test_models_of_other_captions_are_left_alone():
    for other in (tiny_pipeline(), pipeline(["brain", "mri", "melanoma", "stroke"])):
        assert prompt_warning(other, "brain MRI showing melanoma") is None
    few = pipeline(words_of(all_captions()[:3]))  # of chest X-rays
    assert prompt_warning(few, "brain MRI showing melanoma").endswith("trained on: Chest X-ray")


def test_unknown_words_are_named_once_with_near_ones_or_with_what_else_there_is(caplog):
    pipe = pipeline()
    pipe.warn_of_unknown_words(["gliom in the knee", None])
    (message,) = caplog.messages
    assert "'gliom' (near: glioma" in message and "'knee';" in message and "histopathology" in message
    pipe.warn_of_unknown_words("knee")
    pipe("gliom", num_inference_steps=1)
    assert len(caplog.messages) == 1
    pipe.warn_of_unknown_words("melanom")
    assert "'melanom' (near: melanoma" in caplog.messages[1] and "among others" not in caplog.messages[1]
    pipe.warn_of_unknown_words(" ".join("zq" + 2 * letter for letter in "abcdefghijkl"))
    assert "'zqjj', and 2 more;" in caplog.messages[2]


def test_each_warning_comes_once_in_a_run(caplog, tmp_path):
    prompts = ["brain MRI, melanoma", "brain MRI with melanoma", "brain MRI", "brain MRI, polyp"]
    synthesize(pipeline(), make_requests(prompts, 2), tmp_path, num_inference_steps=1, batch_size=2)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.split("'")[1] for text in said if "was not trained on" in text] == ["melanoma", "polyp"]


def test_the_command_and_the_demo_say_it(tmp_path):
    pipeline().save_pretrained(tmp_path / "model")
    arguments = ["generate", "knee MRI, polyp", "--model", tmp_path / "model", "--out", tmp_path / "out", "--steps", 1]
    result = CliRunner().invoke(app, [str(part) for part in arguments])
    assert result.exit_code == 0
    words, finding = result.stderr.splitlines()
    assert words.startswith("warning: ") and "'knee'" in words and "'polyp'" in finding and MRI[1:] in finding
    studio = Studio(pipeline(), "tiny", {}, tmp_path / "images")
    assert studio.generate(Form(prompt="knee MRI, polyp", steps=1, num_images=1)).notes == [
        line.removeprefix("warning: ") for line in (words, finding)
    ]
