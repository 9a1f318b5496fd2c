"""The web demo without its page: label controls, images with and without an adapter, and the refusals of the command.

The page itself is driven by `tests/test_demo_browser.py`.

    python -m pytest tests/test_demo.py
"""

import json
import socket
import sys
from dataclasses import replace

import pytest
import torch
import typer
from PIL import Image, ImageChops
from typer.testing import CliRunner

from medisyn import adapter_training, extension
from medisyn.adapter_folder import make_manifest
from medisyn.backbone import model_hash
from medisyn.commands import demo as command
from medisyn.console import OneLineErrors
from medisyn.demo import MOST_IMAGES, Form, Studio, chosen_labels, label_groups
from medisyn.generation.provenance import read_provenance
from medisyn.generation.requests import Request
from medisyn.generation.synthesize import synthesize
from tests.components import LABEL_SCHEMA, tiny_pipeline

FORM = Form(prompt="retina", labels={"gc": "1"}, seed=5, num_images=2, steps=2)


def same_pixels(first, second):
    with Image.open(first) as one, Image.open(second) as other:
        return ImageChops.difference(one, other).getbbox() is None


def write_adapter(folder, kinds=("text", "labels")):
    """An adapter with visible effect that brings a label field and a caption."""
    pipe = tiny_pipeline(kinds)
    base = model_hash(pipe)
    adapter_training.prepare_adapter(pipe, "lora")
    extension.extend_labels(pipe, {"grade": {"type": "ordinal", "values": ["0", "1", "2"], "display": "Knee grade"}})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        for parameter in extension.extension_parameters(pipe).values():
            torch.nn.init.normal_(parameter)
    added = extension.added(pipe)
    adapter_training.save_adapter(
        pipe,
        folder,
        make_manifest(
            folder.name, "lora", "tiny", base, pipe.kinds, label_schema=added["label_schema"], captions=["knee X-ray"]
        ),
    )
    return str(folder)


@pytest.fixture
def studio(tmp_path):
    return Studio(tiny_pipeline(("text", "labels")), "tiny", {}, tmp_path / "images")


@pytest.fixture
def studio_with_adapter(tmp_path):
    adapters = {write_adapter(tmp_path / "knee"): 0.5}
    return Studio(tiny_pipeline(("text", "labels")), "tiny", adapters, tmp_path / "images of both")


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_every_field_of_a_schema_is_a_control_under_its_display_name():
    groups = label_groups(LABEL_SCHEMA)
    assert [(group.title, [control.title for control in group.controls]) for group in groups] == [
        ("Findings", ["Glaucoma"]),
        ("Grades", ["Diabetic retinopathy grade"]),
        ("Properties", ["Eye side"]),
    ]
    binary, ordinal, categorical = (group.controls[0] for group in groups)
    assert binary.choices == (("unknown", "unknown"), ("no", "0"), ("yes", "1"))
    assert [value for _, value in ordinal.choices] == ["unknown", "0", "1", "2", "3", "4"]
    assert [value for _, value in categorical.choices] == ["unknown", "right", "left"]
    assert label_groups(None) == []


def test_unknown_labels_and_those_of_another_adapter_are_not_given():
    groups = [*label_groups(LABEL_SCHEMA), *label_groups(LABEL_SCHEMA, "knee"), *label_groups(LABEL_SCHEMA, "breast")]
    values = ["1", "unknown", "left"] + ["3", "unknown", None] + ["4", "unknown", "unknown"]
    assert chosen_labels(groups, values, None) == {"gc": "1", "eye_side": "left"}
    assert chosen_labels(groups, values, "knee") == {"gc": "1", "eye_side": "left", "dr_grade": "3"}


# ---- images ---------------------------------------------------------------------------------------------------------


def test_images_are_those_of_the_command_line_and_carry_their_record(studio, tmp_path):
    result = studio.generate(FORM)
    requests = [Request(prompt="retina", labels={"gc": "1"}, seed=seed) for seed in (5, 6)]
    pipe = tiny_pipeline(("text", "labels"))
    expected = synthesize(pipe, requests, tmp_path / "expected", num_inference_steps=2, model="tiny")
    assert [file.read_bytes() for file in result.files] == [file.read_bytes() for file in expected]
    assert result.records == [read_provenance(file) for file in expected]
    assert (result.records[1]["seed"], result.records[1]["labels"], result.without) == (6, {"gc": "1"}, [])


def test_a_form_can_have_everything_that_a_model_takes(tmp_path):
    Image.linear_gradient("L").save(tmp_path / "image.png")
    studio = Studio(tiny_pipeline(("text", "image", "labels")), "tiny", {}, tmp_path / "images")
    file = tmp_path / "image.png"
    form = replace(FORM, negative_prompt="blur", like=file, init_image=file, strength=0.5, guidance=2.0)
    record = studio.generate(form).records[0]
    assert (record["negative_prompt"], record["strength"], record["guidance_scale"]) == ("blur", 0.5, 2.0)
    assert record["like"].startswith("image.png sha256:") and record["init_image"] == record["like"]


def test_each_step_reports_the_part_that_is_done(studio):
    parts = []
    studio.generate(replace(FORM, num_images=9, steps=3), parts.append)  # two batches
    assert len(parts) == 6 and parts == sorted(parts) and parts[-1] == 1.0


def test_a_prompt_that_is_too_long_is_said_once(studio):
    notes = studio.generate(replace(FORM, prompt="a retina of a very long description")).notes
    assert len(notes) == 1 and "window" in notes[0]


@pytest.mark.parametrize(
    ("form", "named"),
    [
        (Form(prompt="  ", steps=2), ["nothing to generate from", "text, labels"]),
        (replace(FORM, num_images=MOST_IMAGES + 1), [f"1..{MOST_IMAGES}"]),
        (replace(FORM, labels={"gc": "2"}), ["gc", "0, 1"]),
        (replace(FORM, adapter="knee"), ["'knee'", "none"]),
        (replace(FORM, seed=-1), ["seed", "-1"]),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(studio, form, named):
    with pytest.raises(ValueError) as error:
        studio.generate(form)
    assert all(part in str(error.value) for part in named) and "\n" not in str(error.value)
    assert len(studio.generate(FORM).files) == 2  # it goes on working


# ---- adapters -------------------------------------------------------------------------------------------------------


def test_an_adapter_shows_its_labels_captions_and_weight(studio_with_adapter):
    (group,) = [group for group in studio_with_adapter.groups if group.adapter]
    assert (group.adapter, group.title) == ("knee", "Labels of knee")
    assert [(control.code, control.title) for control in group.controls] == [("grade", "Knee grade")]
    ability = studio_with_adapter.abilities["knee"]
    assert (ability.examples, ability.weight) == ((("knee X-ray", "knee X-ray"),), 0.5)
    assert ability.guidance is None
    assert set(studio_with_adapter.abilities[None].schema["fields"]) == set(LABEL_SCHEMA["fields"])


def test_an_adapter_that_has_learnt_guidance_begins_without_it(tmp_path):
    folder = write_adapter(tmp_path / "quick")
    manifest = json.loads((tmp_path / "quick" / "adapter.json").read_text())
    (tmp_path / "quick" / "adapter.json").write_text(json.dumps(manifest | {"built_in_guidance": 4.0}))
    studio = Studio(tiny_pipeline(("text", "labels")), "tiny", {folder: 1.0}, tmp_path / "images")
    assert studio.abilities["quick"].guidance == 1.0 and studio.abilities[None].guidance is None
    made = studio.generate(replace(FORM, adapter="quick", compare=True, guidance=1.0))
    assert made.records[0]["guidance_scale"] == 1.0
    assert read_provenance(made.without[0])["guidance_scale"] == studio.default("guidance_scale") > 1


def test_with_and_without_an_adapter_are_the_same_seeds(studio, studio_with_adapter):
    plain = studio.generate(FORM)
    form = replace(FORM, labels={"gc": "1", "grade": "2"}, adapter="knee", weight=1.5, compare=True)
    result = studio_with_adapter.generate(form)
    for number in range(2):
        assert same_pixels(result.without[number], plain.files[number])  # the base as if there had been no adapter
        assert not same_pixels(result.files[number], plain.files[number])
    assert result.records[0]["adapter"] == "knee=1.5" and result.records[0]["adapter_hash"]
    assert result.records[0]["labels"] == {"gc": "1", "grade": "2"}
    without = read_provenance(result.without[0])
    assert without["seed"] == 5 and not {"adapter", "adapter_hash"} & without.keys()


def test_the_weight_of_an_adapter_counts_and_it_can_be_left_out_again(studio, studio_with_adapter):
    one, two, again = (
        studio_with_adapter.generate(replace(FORM, adapter="knee", weight=weight)).files[0] for weight in (1, 2, 1)
    )
    assert same_pixels(one, again) and not same_pixels(one, two)
    assert same_pixels(studio_with_adapter.generate(FORM).files[0], studio.generate(FORM).files[0])


def test_without_anything_that_the_base_knows_there_is_no_comparison(studio_with_adapter):
    form = Form(labels={"grade": "2"}, adapter="knee", compare=True, num_images=1, steps=2)
    result = studio_with_adapter.generate(form)
    assert len(result.files) == 1 and result.without == []
    assert ["nothing to compare with" in note for note in result.notes] == [True]


def test_a_wrong_adapter_is_an_error_at_the_start(tmp_path):
    adapter = write_adapter(tmp_path / "knee")
    with pytest.raises(ValueError, match="hash"):
        Studio(tiny_pipeline(("text", "labels"), seed=1), "tiny", {adapter: 1.0}, tmp_path / "images")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Studio(tiny_pipeline(("text", "labels")), "tiny", {str(tmp_path / "nowhere"): 1.0}, tmp_path / "images")


def test_two_adapters_of_one_name_are_refused(tmp_path):
    adapters = {write_adapter(tmp_path / part / "knee"): 1.0 for part in ("a", "b")}
    with pytest.raises(ValueError, match="two adapters are named 'knee'"):
        Studio(tiny_pipeline(("text", "labels")), "tiny", adapters, tmp_path / "images")


# ---- the command ----------------------------------------------------------------------------------------------------


def run_command(*arguments):
    app = typer.Typer(cls=OneLineErrors)
    app.callback()(lambda: None)
    command.register(app)
    return CliRunner().invoke(app, ["demo", *arguments])


def test_without_gradio_the_command_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    result = run_command()
    assert (result.exit_code, result.stderr) == (2, "error: the web demo needs Gradio: pip install medisyn[demo]\n")


def test_wrong_arguments_are_refused_before_anything_is_loaded():
    for arguments, named in ((["--adapter", " "], "adapter"), (["--model", ""], "model"), (["--port", "0"], "port")):
        result = run_command(*arguments)
        assert result.exit_code == 2 and named in result.stderr


def test_a_port_in_use_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1:{port}.*another"):
            command._check_free("127.0.0.1", port)
