"""Judging an adapter for a new specialty: several sources, grades, the same requests with and without it, leakage."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from medisyn.adapter_folder import make_manifest
from medisyn.adapter_training import prepare_adapter, save_adapter
from medisyn.backbone import load_pipeline, model_hash
from medisyn.config import LoraConfig
from medisyn.data.loading import load_images
from medisyn.evaluation import format_table
from medisyn.generation.provenance import read_provenance
from medisyn.lora import load_adapter
from medisyn.training_record import write_training_record
from tests.components import tiny_pipeline as build_tiny_pipeline
from tests.evaluation import COLOURS, KNEES, evaluation_data, run, write_images


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return evaluation_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A model's folder and a LoRA for it that changes every image, with the record of its training images."""
    folder = tmp_path_factory.mktemp("adapted")
    build_tiny_pipeline().save_pretrained(folder / "model")
    pipe = load_pipeline(folder / "model")
    base = model_hash(pipe)
    prepare_adapter(pipe, "lora", LoraConfig(rank=2))
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.5)
    manifest = make_manifest("knees", "lora", "model", base, pipe.kinds, rank=2, alpha=2, target_modules=["to_q"])
    save_adapter(pipe, folder / "knees", manifest)
    return folder


def test_a_new_specialty_is_told_apart_from_all_others(data, tmp_path, capsys):
    # Knees, as an adapter would make them: two in three right, the others like something the base knows.
    folder = tmp_path / "images"
    write_images(folder, 10, 8, pairs=tuple(KNEES), columns=("modality", "finding"))
    for index in range(0, 40, 3):
        name = sorted(path.name for path in folder.glob("*.png"))[index]
        Image.new("RGB", (32, 32), COLOURS["CT", "nodule"]).save(folder / name)
    sources = [data["train"], data["knees_train"]]
    report = run(data, str(folder), tmp_path / "out", "knees", train=sources, ordinal="finding")
    assert report["sources"]["train"] == sources and report["images"]["train"] == 90 + 80
    modality = report["agreement"]["modality"]
    assert modality["real"]["accuracy"] == 1 and modality["chance"] == pytest.approx(1 / 3)
    assert modality["synthetic"]["accuracy"] == pytest.approx(26 / 40)
    assert modality["synthetic"]["confusion_matrix"]["classes"] == ["CT", "knee"]
    finding = report["agreement"]["finding"]
    assert finding["chance"] == pytest.approx(1 / 4)  # of the four grades: nothing else is asked for
    real, synthetic = (finding[name]["ordinal"]["knee"] for name in ("real", "synthetic"))
    assert real["grades"] == [f"grade {grade}" for grade in range(4)]
    assert real["quadratic_weighted_kappa"] > 0.9 and real["images"] == 48
    assert 0 < synthetic["quadratic_weighted_kappa"] < 0.9
    assert f"{synthetic['quadratic_weighted_kappa']:.3f} [" in capsys.readouterr().out
    assert "Agreement of grades" in (tmp_path / "out" / "report.md").read_text()
    # An order that is not in the values has to be given.
    given = run(
        data, str(folder), tmp_path / "out", "knees", train=sources, ordinal="finding=grade 3,grade 2,grade 0,grade 1"
    )
    assert given["agreement"]["finding"]["real"]["ordinal"]["knee"]["grades"][0] == "grade 3"


def test_wrong_sources_and_ordinal_columns_are_named(data, tmp_path):
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            run(data, data["synthetic"], tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refused("the ordinal column 'grade' is not among those to report on: modality, finding", ordinal="grade")
    refused("ordinal column 'finding' needs training images", ordinal="finding")
    refused("'finding' are no grades.*nodule, normal", ordinal="finding", train=data["train"])
    refused("unlabelled' has no column 'modality', but '.*train' has", train=[data["train"], data["unlabelled"]])
    refused("list of sources is empty", train=[])
    refused("adapter, label_columns and conditions are for a model", adapter="knees")


def test_an_adapter_is_judged_on_the_same_captions_and_seeds_as_its_base(data, adapted, tmp_path):
    options = {"num_images": 6, "num_inference_steps": 1, "train": [data["train"], data["knees_train"]]}
    model, adapter = str(adapted / "model"), str(adapted / "knees")
    before = run(data, model, tmp_path / "before", "knees", **options)
    after = run(data, model, tmp_path / "after", "knees", adapter=adapter, **options)
    half = run(data, model, tmp_path / "half", "knees", adapter={adapter: 0.5}, **options)
    assert "adapters" not in before["subject"] and "adapters" not in before["overlap"]
    assert after["subject"]["adapters"] == {"knees": 1.0} and half["subject"]["adapters"] == {"knees": 0.5}
    assert before["subject"]["model_hash"] == after["subject"]["model_hash"] == half["subject"]["model_hash"]
    hashes = {report["subject"].get("adapter_hash") for report in (before, after, half)}
    assert len(hashes) == 3 and after["subject"]["adapter_hash"]
    assert "with knees (weight 1)" in format_table(after)
    made = [load_images(str(tmp_path / name / "images"), caption_column=None) for name in ("before", "after")]
    for column in ("prompt", "seed", "modality", "finding"):
        assert made[0].column(column) == made[1].column(column)
    assert set(made[0].hashes()).isdisjoint(made[1].hashes())
    found = read_provenance(tmp_path / "half" / "images" / "000000.png")
    assert found["adapter"] == "knees=0.5" and found["adapter_hash"] == half["subject"]["adapter_hash"]
    assert found["model_hash"] == before["subject"]["model_hash"]
    pipe = load_pipeline(model)
    with pytest.raises(ValueError, match="medisyn.lora.load_adapter"):
        run(data, pipe, tmp_path / "out", "knees", adapter=adapter, **options)
    load_adapter(pipe, adapter)
    loaded = run(data, pipe, tmp_path / "out", "knees", **options)
    assert loaded["subject"]["adapter_hash"] == after["subject"]["adapter_hash"]
    assert loaded["overlap"]["adapters"] == {"knees": None}
    assert any("not checked against the adapter 'knees'" in note for note in loaded["notes"])


def test_images_that_the_adapter_was_trained_on_are_refused_or_left_out(data, adapted, tmp_path):
    hashes = load_images(data["real"], caption_column=None).hashes()
    model, adapter = str(adapted / "model"), tmp_path / "knees"
    shutil.copytree(adapted / "knees", adapter)
    options = {"num_images": 4, "num_inference_steps": 1}
    write_training_record(adapter, {"hashes": hashes[:30]})
    with pytest.raises(ValueError, match="30 of 168 real images are among the training images of the adapter 'knees'"):
        run(data, model, tmp_path / "out", adapter=str(adapter), **options)
    write_training_record(adapter, {"hashes": hashes[:2]})
    report = run(data, model, tmp_path / "out", adapter=str(adapter), **options)
    assert report["overlap"] == {"model": None, "train": None, "adapters": {"knees": 2}, "left_out": 2}
    assert report["images"]["real"] == 166
    # What is left out does not change what is asked for.
    run(data, model, tmp_path / "base", **options)
    made = [load_images(str(tmp_path / name / "images"), caption_column=None) for name in ("out", "base")]
    assert made[0].column("prompt") == made[1].column("prompt")


def test_labels_that_the_schema_cannot_read_come_from_a_column(data, tmp_path, tiny_pipeline):
    pipe = tiny_pipeline(kinds=("text", "labels"))
    grades = tmp_path / "graded"
    write_images(grades, 4, 9, pairs=tuple(KNEES))
    lines = [json.loads(line) for line in (grades / "metadata.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(line | {"extra": {"grade": int(line["finding"][-1])}}) + "\n" for line in lines)
    (grades / "metadata.jsonl").write_text(text)
    options = {"num_images": 8, "num_inference_steps": 1, "per": ["modality", "extra.grade"]}
    columns = {"dr_grade": "extra.grade"}
    run(data | {"graded": str(grades)}, pipe, tmp_path / "out", "graded", label_columns=columns, **options)
    made = load_images(str(tmp_path / "out" / "images"), caption_column=None)
    assert [int(value) for value in made.column("labels.dr_grade")] == made.column("extra.grade")
    with pytest.raises(ValueError, match="'severity' is not in the schema"):
        run(data, pipe, tmp_path / "out", label_columns={"severity": "finding"}, **options)
    with pytest.raises(ValueError, match="for a model that takes labels"):
        run(data, tiny_pipeline(), tmp_path / "out", label_columns={"dr_grade": "finding"}, **options)


def test_one_condition_alone_is_measured_on_the_images_that_have_it(data, tmp_path, tiny_pipeline):
    graded = tmp_path / "graded"
    write_images(graded, 4, 9, pairs=tuple(KNEES))
    lines = [json.loads(line) for line in (graded / "metadata.jsonl").read_text().splitlines()]
    grades = [int(line["finding"][-1]) or None for line in lines]  # grade 0 is not stated
    text = "".join(json.dumps(line | {"grade": grade}) + "\n" for line, grade in zip(lines, grades, strict=True))
    (graded / "metadata.jsonl").write_text(text)
    options = {"num_images": 6, "num_inference_steps": 1, "per": ["modality", "grade"]}
    options |= {"label_columns": {"dr_grade": "grade"}, "conditions": ["labels"]}
    pipe = tiny_pipeline(kinds=("text", "labels"))
    report = run(data | {"graded": str(graded)}, pipe, tmp_path / "out", "graded", **options)
    made = load_images(str(tmp_path / "out" / "images"), caption_column=None)
    assert "prompt" not in made.column_names and None not in made.column("labels.dr_grade")
    assert report["subject"]["conditions"] == ["labels"]
    assert report["images"]["real"] == sum(grade is not None for grade in grades)
    with pytest.raises(ValueError, match="condition of this model 'image'"):
        run(data, pipe, tmp_path / "no", **options | {"label_columns": None, "conditions": ["image"]})
    with pytest.raises(ValueError, match="no image of .* has these conditions: labels"):
        run(data, pipe, tmp_path / "no", **options | {"label_columns": None, "per": ["modality"]})


def test_features_of_a_source_serve_every_set_that_it_is_part_of(data, tmp_path):
    cache = {"cache_dir": tmp_path / "cache", "train": data["train"]}

    def computed():
        return sum(len(np.load(path)["hashes"]) for path in (tmp_path / "cache").rglob("*.npz"))

    run(data, data["synthetic"], tmp_path / "out", **cache)
    assert computed() == 168 + 90 + 90
    run(data, data["synthetic"], tmp_path / "out", **cache | {"train": [data["knees_train"], data["train"]]})
    assert computed() == 168 + 90 + 90 + 80
