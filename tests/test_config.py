"""Configurations: strict keys, readable errors, overrides, and a round trip through YAML."""

import dataclasses

import pytest
import yaml

from medisyn.config import (
    DiffusionTaskConfig,
    TrainConfig,
    config_to_dict,
    load_config,
    parse_config,
    save_config,
)

MINIMAL = {"output_dir": "run", "data": {"source": "images"}, "task": {"type": "autoencoder"}}
DIFFUSION = {"output_dir": "run", "data": {"source": "images"}, "task": {"type": "diffusion", "vae": "vae"}}


def write(folder, tree):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_defaults_are_spelled_out_and_survive_a_round_trip(tmp_path):
    config = parse_config(MINIMAL)
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    tree = config_to_dict(config)
    assert set(tree) == {field.name for field in dataclasses.fields(TrainConfig)}
    assert tree["data"]["resolution"] == 128


def test_overrides_reach_nested_values_and_read_numbers_as_numbers(tmp_path):
    overrides = ["train.steps=7", "optim.learning_rate=1e-4", "data.filter={modality: [CT]}", "task.preset=small"]
    config = load_config(write(tmp_path, MINIMAL), overrides)
    assert config.train.steps == 7
    assert config.optim.learning_rate == 1e-4
    assert config.data.filter == {"modality": ("CT",)}
    assert config.task.preset == "small"


def test_no_is_a_word_where_a_precision_is_meant_and_false_elsewhere(tmp_path):
    tree = MINIMAL | {"train": {"mixed_precision": "bf16"}}
    overrides = ["train.mixed_precision=no", "data.horizontal_flip=no"]
    config = load_config(write(tmp_path, tree), overrides)
    assert config.train.mixed_precision == "no" and config.data.horizontal_flip is False
    with pytest.raises(ValueError, match="train.tracker"):
        load_config(write(tmp_path, tree), ["train.tracker=no"])
    with pytest.raises(ValueError, match="train.mixed_precision"):
        load_config(write(tmp_path, tree), ["train.mixed_precision=false"])


def test_the_type_selects_the_task_and_the_conditions():
    tree = DIFFUSION | {
        "task": {
            "type": "diffusion",
            "vae": "vae",
            "conditions": [{"type": "text"}, {"type": "labels", "schema": "odir8"}],
        }
    }
    task = parse_config(tree).task
    assert isinstance(task, DiffusionTaskConfig)
    assert [condition.type for condition in task.conditions] == ["text", "labels"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sed": 1}, "unknown key sed"),
        ({"data": {"sourc": "x", "source": "y"}}, "did you mean source"),
        ({"data": {}}, "data.source is missing"),
        ({"train": {"steps": 0}}, "train.steps"),
        ({"train": {"steps": "many"}}, "train.steps"),
        ({"train": {"mixed_precision": "fp8"}}, "train.mixed_precision"),
        ({"train": {"batch_size": 7, "accumulation": 2}}, "does not divide"),
        ({"train": {"validate_every": 5}}, "no `validation:` data"),
        ({"optim": {"learning_rate": -1}}, "optim.learning_rate"),
        ({"task": {"type": "autoencodr"}}, "autoencodr"),
        ({"task": {"type": "autoencoder", "preset": None}}, "preset"),
        ({"task": {"type": "autoencoder", "base": "x"}}, "preset"),
        ({"task": {"type": "diffusion"}}, "needs an autoencoder"),
        ({"task": {"type": "diffusion", "preset": None, "base": "x", "vae": "y"}}, "task.vae belongs to a new model"),
        ({"task": {"type": "autoencoder", "preset": None, "base": "x", "pca_images": 9}}, "overwrite the encoder"),
        ({"validation_fraction": 0.2, "validation": {"source": "x"}}, "no `validation:` data beside it"),
        ({"validation": {"source": "x", "resolution": 64}}, "validation.resolution=64"),
        ({"task": {"type": "diffusion", "vae": "v", "conditions": [{"type": "sound"}]}}, "sound"),
        ({"task": {"type": "diffusion", "vae": "v", "conditions": [{"type": "text"}] * 2}}, "twice"),
        (
            {"task": {"type": "diffusion", "vae": "v", "zero_terminal_snr": True, "prediction_type": "epsilon"}},
            "zero_terminal_snr",
        ),
        ({"task": {"type": "diffusion", "vae": "v"}, "data": {"source": "x", "crop": "random"}}, "cached latents"),
        ({"task": {"type": "guided"}}, "base is missing"),
        ({"task": {"type": "dino"}, "data": {"source": "x", "flip_only": {"kind": ["CT"]}}}, "data.flip_only"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(changes, message):
    with pytest.raises(ValueError) as caught:
        parse_config(MINIMAL | changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_reach_an_item_of_a_list_by_its_place_and_what_is_null(tmp_path):
    task = {"type": "diffusion", "base": "model", "preset": None, "method": "lora", "lora": None}
    task |= {"conditions": [{"type": "text"}, {"type": "labels", "schema": "odir8"}]}
    overrides = ["task.conditions.0.dropout=0.3", "task.conditions.1.schema=ichallenge", "task.lora.rank=2"]
    config = load_config(write(tmp_path, DIFFUSION | {"task": task}), overrides)
    assert config.task.conditions[0].dropout == 0.3
    assert config.task.conditions[1].schema == "ichallenge"
    assert config.task.lora.rank == 2


@pytest.mark.parametrize(
    "override",
    ["train.steps", "=3", "data.source.name=3", "train.steps=[1", "data.balance_columns.0=a", "data.source.0.a=b"],
)
def test_a_malformed_override_is_named(tmp_path, override):
    with pytest.raises(ValueError, match="override"):
        load_config(write(tmp_path, MINIMAL), [override])


def test_a_missing_file_and_a_file_that_is_no_mapping(tmp_path):
    with pytest.raises(FileNotFoundError, match="no configuration file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="no mapping"):
        load_config(write(tmp_path, ["a", "b"]))
    (tmp_path / "config.yaml").write_text("a: [1, 2")
    with pytest.raises(ValueError, match="not YAML"):
        load_config(tmp_path / "config.yaml")
