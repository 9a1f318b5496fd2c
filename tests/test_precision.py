"""`train.mixed_precision: auto`: it is measured once, written down, and kept by a resumed run."""

import pytest

from medisyn import loading, precision
from medisyn.config import load_config
from medisyn.precision import fastest_precision, settle_precision
from medisyn.trainer import Trainer
from tests.training import autoencoder_config, diffusion_config, write_base, write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    write_images(folder / "images")
    write_base(folder / "base")
    return folder


@pytest.mark.parametrize("task", [{}, {"lora": {"rank": 2}}, {"method": "norm"}])
def test_models_and_adapters_can_be_measured(folder, task):
    assert fastest_precision(diffusion_config(folder, task=task)) in ("no", "bf16")


def test_autoencoders_can_be_measured(folder):
    assert fastest_precision(autoencoder_config(folder)) in ("no", "bf16")


def test_the_autoencoder_of_the_embedded_default_can_be_measured(folder, tmp_path, monkeypatch):
    write_base(tmp_path / "pretrained")
    monkeypatch.setattr(loading.resources, "files", lambda package: tmp_path)
    assert fastest_precision(autoencoder_config(folder, task={"base": "default"})) in ("no", "bf16")


def test_the_answer_is_part_of_the_run(folder, monkeypatch):
    config = diffusion_config(folder, "auto", train={"mixed_precision": "auto", "steps": 1})
    monkeypatch.setattr(precision, "fastest_precision", lambda _: "no")
    assert Trainer(config).config.train.mixed_precision == "no"
    assert load_config(folder / "auto" / "config.yaml").train.mixed_precision == "no"
    monkeypatch.setattr(precision, "fastest_precision", lambda _: "bf16")
    assert settle_precision(config, folder / "auto" / "config.yaml").train.mixed_precision == "no"


def test_a_named_format_is_not_measured(folder, monkeypatch):
    monkeypatch.setattr(precision, "fastest_precision", lambda _: pytest.fail("measured"))
    config = diffusion_config(folder, "named")
    assert settle_precision(config, folder / "named" / "config.yaml") is config
    assert not (folder / "named").exists()


def test_a_notebook_may_train_a_second_run_in_another_precision(folder):
    for name in ("no", "bf16", "no"):
        own = {"task": {"cache_dir": None}, "train": {"mixed_precision": name, "steps": 1}}
        run = Trainer(diffusion_config(folder, f"after_{name}", **own))
        assert run.accelerator.mixed_precision == name
        assert (run.fit() / "pipeline").is_dir()
