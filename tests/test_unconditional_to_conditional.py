"""The recipes from an unconditional model to a conditional one, and the page that compares them."""

import importlib
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from medisyn.adapter_folder import make_manifest
from medisyn.adapter_training import TRAINED, prepare_adapter, save_adapter
from medisyn.backbone import add_condition, load_pipeline, model_hash
from medisyn.cli import app
from medisyn.conditions import LabelsCondition, get_schema
from medisyn.config import load_config
from medisyn.config_parts import DecoderLoraConfig
from medisyn.data.loading import load_images
from medisyn.decoder_adapter import add_decoder_lora
from medisyn.extension import added, extend_labels, extension_parameters
from medisyn.guidance import attach_classifier
from medisyn.loading import load_autoencoder
from medisyn.pipelines.medisyn_latent_classifier import MediSynLatentClassifier, latent_fingerprint
from medisyn.tasks.labelled_rows import UNLABELLED, labelled_rows
from tests.components import tiny_pipeline
from tests.evaluation import evaluation_data, write_images

SCRIPTS = Path(__file__).parent.parent / "scripts" / "unconditional_to_conditional"
CLASSES = ("nodule", "normal")
PAIRS = (("CT", "normal"), ("CT", "nodule"))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Real images, a tiny extractor, a teacher, a model with labels, and an adapter that gives the teacher labels."""
    folder = tmp_path_factory.mktemp("comparison")
    (folder / "evaluation").mkdir()
    extractor = evaluation_data(folder / "evaluation")["extractor"]
    (folder / "extractor.txt").write_text(extractor)
    write_images(folder / "train", 52, 1, PAIRS)
    write_images(folder / "validation", 8, 2, PAIRS)
    schema = {"name": "finding", "fields": {"finding": {"type": "categorical", "values": list(CLASSES)}}}
    (folder / "labels.json").write_text(json.dumps(schema))
    teacher = tiny_pipeline(kinds=())
    teacher.save_pretrained(folder / "teacher")
    base_hash = model_hash(teacher)
    extend_labels(teacher, schema["fields"], TRAINED, schema_name="finding")
    prepare_adapter(teacher, "lora")
    torch.nn.init.normal_(extension_parameters(teacher, TRAINED)["label_embedding"])
    manifest = make_manifest("lora", "lora", "teacher", base_hash, ("labels",), rank=16, **added(teacher, TRAINED))
    save_adapter(teacher, folder / "lora" / "adapter", manifest)
    tuned = load_pipeline(folder / "teacher")
    add_decoder_lora(tuned.vae, DecoderLoraConfig(rank=2))
    for name, weight in tuned.vae.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(weight)
    manifest = make_manifest("decoder", "lora", "teacher", base_hash, (), rank=2)
    save_adapter(tuned, folder / "decoder" / "adapter", manifest)
    student = tiny_pipeline(kinds=())
    add_condition(student, LabelsCondition(get_schema(str(folder / "labels.json"))))
    torch.nn.init.normal_(student.unet.class_embedding.weight)
    student.save_pretrained(folder / "student" / "pipeline")
    return folder


def compare(script, folder, out, **options):
    data = {"train": str(folder / "train"), "validation": str(folder / "validation")}
    sizes = {"images_per_class": 25, "steps": 2, "batch_size": 25}
    extractor = (folder / "extractor.txt").read_text()
    script("compare").compare(folder / out, **data, extractor=extractor, **sizes, **options)
    return json.loads((folder / out / "comparison.json").read_text())


def test_models_with_labels_and_adapters_are_compared_on_one_page(script, folder):
    models = [f"student={folder / 'student'}", f"LoRA, guidance 2={folder / 'lora'}@2"]
    found = compare(
        script, folder, "labels", model=models, teacher=str(folder / "teacher"), labelled=str(folder / "train")
    )
    assert found["classes"] == list(CLASSES) and set(found["ways"]) == {"student", "LoRA, guidance 2"}
    for way in found["ways"].values():
        assert set(way["frechet_distance"]) == set(way["agreement_per_class"]) == set(CLASSES)
        assert 0 <= way["agreement"] <= 1 and way["seconds_per_image"] > 0 and 0 <= way["diversity"] <= 2
    assert found["real"]["agreement"] > 0.9  # bright and dark images are easily told apart
    page = (folder / "labels" / "comparison.md").read_text()
    assert all(f"| {name} |" in page for name in ("real images", "student", "LoRA, guidance 2"))
    assert Image.open(folder / "labels" / "comparison.png").width > 8 * 32
    drawn = load_images(str(folder / "labels" / "images" / "student"), caption_column=None)
    assert drawn.column("finding") == ["nodule"] * 25 + ["normal"] * 25
    first = folder / "labels" / "images" / "student" / "00000_nodule.png"
    before = first.stat().st_mtime_ns
    options = {"cnn": "test_resnet", "cnn_steps": 40, "cnn_resolution": 32}
    again = compare(script, folder, "labels", model=models, teacher=str(folder / "teacher"), **options)
    assert first.stat().st_mtime_ns == before  # what is drawn stays
    # the second judge tells real images apart as well, and has numbers of its own beside the first one's
    judged = again["judge"]
    assert judged["classifier"]["model"] == "test_resnet" and judged["real"]["agreement"] > 0.9
    for name, way in judged["ways"].items():
        assert 0 <= way["agreement"] <= 1 and set(way["frechet_distance"]) == set(CLASSES)
        assert again["ways"][name]["agreement"] == found["ways"][name]["agreement"]
    text = (folder / "labels" / "comparison.md").read_text()
    assert "By test_resnet, 40 steps" in text and text.count("| LoRA, guidance 2 |") == 3


def test_a_student_is_compared_with_a_tuned_decoder_as_well(script, folder):
    runs = {"student": folder / "lora", "tuned decoder": f"{folder / 'lora'}+{folder / 'decoder'}"}
    models = [f"{name}={run}" for name, run in runs.items()]
    found = compare(script, folder, "decoder", model=models, teacher=str(folder / "teacher"))
    assert set(found["ways"]) == set(runs)
    one, other = (
        np.asarray(load_images(str(folder / "decoder" / "images" / name), caption_column=None).image(0))
        for name in ("student", "tuned_decoder")
    )
    assert not np.array_equal(one, other)


def test_guidance_at_sampling_time_is_compared_at_several_scales(script, folder):
    pipe = load_pipeline(folder / "teacher")
    classifier = MediSynLatentClassifier.from_unet(
        pipe.unet, pipe.scheduler, CLASSES, latent_fingerprint=latent_fingerprint(pipe)
    )
    torch.nn.init.normal_(classifier.head[-1].weight)
    attach_classifier(pipe, classifier).save_pretrained(folder / "classifier" / "pipeline")
    found = compare(script, folder, "guidance", classifier=str(folder / "classifier"), scale=[0.0, 4.0])
    assert set(found["ways"]) == {"classifier guidance 0", "classifier guidance 4"}
    same, moved = (
        np.stack([np.asarray(load_images(str(place), caption_column=None).image(row)) for row in range(3)])
        for place in sorted((folder / "guidance" / "images").iterdir())
    )
    assert not np.array_equal(same, moved)


def test_what_cannot_be_compared(script, folder):
    module = script("compare")
    with pytest.raises(typer.BadParameter, match="nothing to compare"):
        compare(script, folder, "none")
    with pytest.raises(typer.BadParameter, match="--classifier and --scale belong together"):
        compare(script, folder, "none", scale=[1.0])
    with pytest.raises(typer.BadParameter, match="name the model under it by --teacher"):
        compare(script, folder, "none", model=[f"LoRA={folder / 'lora'}"])
    for text in ("student", "=runs/a", "student=runs/a@much"):
        with pytest.raises(typer.BadParameter, match="--model"):
            module.parse_model(text)
    assert module.parse_model("a b=owner/name@1.5") == module.Way("a b", "owner/name", 1.5)


def test_diversity_is_the_mean_cosine_distance_within_a_class(script):
    features = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [3.0, 0.0]])
    assert script("comparison_measures").diversity(features, ["a", "a", "b", "b"]) == pytest.approx(0.5)


def test_the_subset_holds_the_images_whose_labels_a_task_reads(script, folder, tmp_path):
    module = script("labelled_subset")
    options = {"where": ["modality=CT"], "label_fraction": 0.1, "label_seed": 3}
    module.labelled_subset(str(folder / "train"), tmp_path / "few", **options)
    images = load_images(str(folder / "train"), caption_column=None, group_column="group_id")
    rows = np.flatnonzero(labelled_rows(images, CLASSES, "finding", 0.1, 3) != UNLABELLED)
    few = load_images(str(tmp_path / "few" / "train.parquet"), caption_column=None)
    assert few.hashes() == images.select(rows).hashes() and 0 < len(few) < 20
    assert get_schema(str(tmp_path / "few" / "labels.json")).field("finding").values == CLASSES
    with pytest.raises(typer.BadParameter, match="not of the form COLUMN=VALUE"):
        module.parse_where(["modality"])


@pytest.mark.parametrize("recipe", sorted(SCRIPTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_names_its_command(recipe):
    config = load_config(recipe)
    assert f"medisyn train scripts/unconditional_to_conditional/{recipe.name}" in recipe.read_text()
    assert config.data.resolution == 128
    if config.task.type in ("latent_classifier", "guided"):  # no label is read that the other does not read
        tasks = (config.task, load_config(SCRIPTS / "classifier.yaml").task)
        assert {(task.label_fraction, task.label_seed, task.class_column) for task in tasks} == {(0.05, 0, "finding")}


@pytest.mark.parametrize("start", ["the embedded default", "at random"])
def test_a_folder_of_images_is_enough_anywhere(start, tmp_path, monkeypatch):
    """No column, and nothing of the repository in the working directory; the result can teach."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "deeper").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.png", "deeper/c.png")):
        Image.new("RGB", (40, 40), (60 * index, 90, 30)).save(tmp_path / "mine" / name)
    overrides = ["data.source=mine", "data.resolution=32", "train.steps=1", "train.batch_size=2"]
    overrides += ["train.preview_every=0", "train.mixed_precision=no"]
    if start == "at random":  # the line of the recipe's comments
        recipe = (SCRIPTS / "pretrain_folder.yaml").read_text()
        line = next(line for line in recipe.splitlines() if "task.preset=mini" in line)
        overrides += shlex.split(line.partition("alone:")[2])
    done = CliRunner().invoke(app, ["train", str(SCRIPTS / "pretrain_folder.yaml"), *overrides])
    assert done.exit_code == 0, done.output
    pipe = load_pipeline("runs/unconditional_folder")
    assert pipe.kinds == (("text",) if start == "the embedded default" else ())
    ours, default = pipe.vae.state_dict(), load_autoencoder("default").state_dict()
    assert all(torch.equal(ours[name], default[name]) for name in default)
