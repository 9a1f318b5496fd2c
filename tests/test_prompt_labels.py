"""Labels that a prompt states in words reach the model where no labels are given."""

import numpy as np
import pytest
import torch

import medisyn
from medisyn.conditions import LabelsCondition, get_schema
from medisyn.generation.provenance import read_provenance
from medisyn.generation.requests import Request
from medisyn.generation.synthesize import synthesize
from medisyn.prompts import caption, parse_caption
from tests.components import tiny_pipeline

RULES = get_schema("corpus_fundus").rules["prompts"]


@pytest.fixture(scope="module")
def default():
    return medisyn.load_pipeline()


def test_every_caption_of_the_fundus_data_states_the_labels_of_its_row(default):
    """The rules for words agree with the rules for the columns of a data set."""
    rows = get_schema("corpus_fundus").rows
    for finding in ("normal", "cataract", "diabetic retinopathy", "glaucoma"):
        for side in ("left", "right"):
            text = caption("fundus photography", finding, laterality=side)
            row = {"modality": "fundus photography", "finding": finding, "extra": {"laterality": side}}
            assert parse_caption(text).finding == finding
            assert default.labels_of_prompt(text) == [rows.read(row)]


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        ("Retina photo, GLAUCOMA, OS", {"normal": "0", "gc": "1", "eye_side": "left"}),
        ("fundus, DR and cataract", {"normal": "0", "dr": "1", "cataract": "1"}),
        ("a healthy eye", {"normal": "1", "cataract": "0", "dr": "0", "gc": "0"}),
        ("fundus photo without glaucoma", {}),
        ("normal chest X-ray", {}),
        ("glaucomatosis", {}),
        (None, {}),
    ],
)
def test_words_in_any_case_and_order_count_and_parts_of_words_do_not(default, prompt, labels):
    assert default.labels_of_prompt([prompt, "cataract"])[0] == labels
    assert default.labels_of_prompt([prompt]) == ([labels] if labels else None)


def test_stated_labels_are_given_to_the_model_unless_the_caller_says_otherwise():
    pipe = tiny_pipeline(("text", "labels"))
    (field, *_) = pipe.label_schema["fields"]
    pipe.register_to_config(prompt_labels=[{"all": [["polyp"]], "labels": {field: "1", "foreign": "1"}}])
    options = {"num_inference_steps": 2, "output_type": "np"}

    def draw(prompt, **more):
        return pipe(prompt, generator=[torch.Generator().manual_seed(0)], **options, **more).images

    stated = draw("a polyp")
    np.testing.assert_array_equal(stated, draw("a polyp", labels={field: 1}))
    assert not np.array_equal(stated, draw("a polyp", labels={}))
    np.testing.assert_array_equal(draw("a colon"), draw("a colon", labels={}))


@pytest.mark.parametrize("prompt", [123, ["a polyp", 1], {"a": 1}])
def test_what_is_no_text_is_refused_before_labels_are_read_from_it(default, prompt):
    with pytest.raises(ValueError, match="prompt must be a string or a list of strings"):
        default(prompt, num_inference_steps=1)


def test_images_record_the_labels_that_their_prompt_stated(tmp_path):
    pipe = tiny_pipeline(("text", "labels"))
    (field, *_) = pipe.label_schema["fields"]
    pipe.register_to_config(prompt_labels=[{"all": [["polyp"]], "labels": {field: "1"}}])
    first, second = synthesize(pipe, [Request("a polyp"), Request("a colon")], tmp_path, num_inference_steps=1)
    assert read_provenance(first)["labels"] == {field: "1"}
    assert "labels" not in read_provenance(second)


def test_a_model_that_is_trained_with_the_schema_gets_its_rules():
    assert LabelsCondition(get_schema("corpus_fundus")).components()["prompt_labels"] == RULES
    assert "prompt_labels" not in LabelsCondition(get_schema("synfundus")).components()
