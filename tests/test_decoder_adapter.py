"""LoRA of the decoder: trained, saved, loaded, mixed, fused and removed; class consistency of the decoder."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from medisyn.adapter_folder import DECODER_WEIGHTS, LORA_WEIGHTS
from medisyn.guidance import attach_classifier
from medisyn.loading import load_pipeline
from medisyn.lora import fuse_adapters, load_adapter, loaded_adapters, set_adapters, unload_adapters
from medisyn.pipelines.medisyn_latent_classifier import MediSynLatentClassifier
from medisyn.trainer import Trainer
from medisyn.training_record import read_training_record
from tests.training import autoencoder_config, diffusion_config, write_base, write_images

DECODER = {"train_encoder": False, "lora": {"rank": 2, "alpha": 6.0}}


@pytest.fixture(scope="module", params=["dc", "kl"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"decoder_{request.param}")
    write_images(folder / "images")
    write_base(folder / "base", vae=request.param)
    Trainer(autoencoder_config(folder, "decoder", task=DECODER, optim={"learning_rate": 0.05})).fit()
    return folder


def decode(pipe):
    latents = torch.randn(2, pipe.vae.config.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe.vae.decode(latents).sample


def test_a_trained_decoder_is_an_adapter_that_mixes_and_leaves_no_trace(folder):
    pipe = load_pipeline(folder / "base")
    before = decode(pipe)
    encoder = {name: value.clone() for name, value in pipe.vae.encoder.state_dict().items()}
    name = load_adapter(pipe, folder / "decoder")
    whole = decode(pipe)
    assert (whole - before).abs().max() > 1e-3
    set_adapters(pipe, name, 0.5)
    half = decode(pipe)
    assert 0 < (half - before).abs().mean() < (whole - before).abs().mean()
    set_adapters(pipe, name, 0.0)
    assert torch.equal(decode(pipe), before)
    set_adapters(pipe, name, 1.0)
    assert torch.equal(decode(pipe), whole)
    assert not any(value.requires_grad for key, value in pipe.vae.named_parameters() if ".lora_" in key)
    unload_adapters(pipe)
    assert torch.equal(decode(pipe), before)
    assert all(torch.equal(value, encoder[key]) for key, value in pipe.vae.encoder.state_dict().items())
    assert not any("lora" in key for key in pipe.vae.state_dict())


def test_two_decoders_mix_and_either_can_be_fused(folder):
    pipe = load_pipeline(folder / "base")
    before = decode(pipe)
    load_adapter(pipe, folder / "decoder", adapter_name="first")
    one = decode(pipe)
    load_adapter(pipe, folder / "decoder", adapter_name="second")
    set_adapters(pipe, ["first", "second"], [0.5, 0.5])
    torch.testing.assert_close(decode(pipe), one, atol=1e-5, rtol=1e-4)
    fuse_adapters(pipe)
    assert not any("lora" in key for key in pipe.vae.state_dict())
    torch.testing.assert_close(decode(pipe), one, atol=1e-4, rtol=1e-3)
    assert (decode(pipe) - before).abs().max() > 1e-3


def test_the_comparison_of_ways_times_a_fused_decoder(folder, monkeypatch):
    """A run's own pipeline has no adapter layers, so an adapter on its teacher is not timed with them either."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts" / "unconditional_to_conditional"))
    module = importlib.import_module("compare")
    pipe = load_pipeline(folder / "base", adapter=folder / "decoder")
    attach_classifier(pipe, MediSynLatentClassifier.from_unet(pipe.unet, pipe.scheduler, ("bright", "dark")))
    pipe.set_progress_bar_config(disable=True)
    tuned = decode(pipe)
    way = module.Way("tuned decoder", "run", classifier_guidance_scale=1.0)
    assert module.seconds_per_image(pipe, way, "dark", "finding", steps=1, batch_size=1, clock="cpu") > 0
    assert not any("lora" in key for key in pipe.vae.state_dict())
    torch.testing.assert_close(decode(pipe), tuned, atol=1e-4, rtol=1e-3)


def test_alpha_survives_and_the_record_of_training_images_goes_along(folder):
    adapter = folder / "decoder" / "adapter"
    manifest = json.loads((adapter / "adapter.json").read_text())
    assert (manifest["rank"], manifest["alpha"]) == (2, 6.0)
    pipe = load_pipeline(folder / "base", adapter=adapter)
    layer = next(layer for layer in pipe.vae.decoder.modules() if hasattr(layer, "scaling"))
    assert set(layer.scaling.values()) == {3.0}
    assert len(read_training_record(adapter)["hashes"]) == 24


def test_a_lora_takes_a_decoder_along(folder):
    lora = {"rank": 2, "decoder": str(folder / "decoder")}
    config = diffusion_config(folder, "both", task={"method": "lora", "lora": lora}, train={"steps": 2})
    Trainer(config).fit()
    adapter = folder / "both" / "adapter"
    assert (adapter / LORA_WEIGHTS).is_file() and (adapter / DECODER_WEIGHTS).is_file()
    pipe = load_pipeline(folder / "base", adapter=adapter)
    alone = load_pipeline(folder / "base", adapter=folder / "decoder")
    assert torch.equal(decode(pipe), decode(alone))
    assert [each.method for each in loaded_adapters(pipe).values()] == ["lora"]
    before = decode(load_pipeline(folder / "base"))
    unload_adapters(pipe)
    assert torch.equal(decode(pipe), before)


def test_a_base_that_carries_a_classifier_takes_the_decoder_too(folder, tmp_path):
    pipe = load_pipeline(folder / "base")
    attach_classifier(pipe, MediSynLatentClassifier.from_unet(pipe.unet, pipe.scheduler, ("bright", "dark")))
    pipe.save_pretrained(tmp_path / "base")
    write_images(tmp_path / "images")
    lora = {"rank": 2, "decoder": str(folder / "decoder")}
    config = diffusion_config(tmp_path, task={"method": "lora", "lora": lora}, train={"steps": 1})
    assert (Trainer(config).fit() / "adapter" / DECODER_WEIGHTS).is_file()


def test_a_decoder_of_another_base_is_refused_with_both_hashes(folder, tmp_path):
    other = load_pipeline(folder / "base")
    other.vae.decoder.conv_in.bias.data += 0.1
    other.save_pretrained(tmp_path / "base")
    write_images(tmp_path / "images")
    lora = {"rank": 2, "decoder": str(folder / "decoder")}
    config = diffusion_config(tmp_path, task={"method": "lora", "lora": lora})
    with pytest.raises(ValueError, match=r"adapted on a base with the hash \w{12}; this base has the hash \w{12}"):
        Trainer(config)
    with pytest.raises(ValueError, match="was trained on base with the hash"):
        load_pipeline(tmp_path / "base", adapter=folder / "decoder")


def test_a_lora_without_a_decoder_cannot_give_one(folder, tmp_path):
    lora = {"rank": 2, "decoder": str(tmp_path / "nothing")}
    with pytest.raises(FileNotFoundError, match="nothing"):
        Trainer(diffusion_config(folder, "missing", task={"method": "lora", "lora": lora}))


def test_the_decoder_resumes_bit_for_bit(folder):
    whole = autoencoder_config(folder, "whole", task=DECODER)
    Trainer(whole).fit()
    part = autoencoder_config(folder, "part", task=DECODER, train={"steps": 2, "checkpoint_every": 2})
    Trainer(part).fit()
    Trainer(autoencoder_config(folder, "part", task=DECODER)).fit()
    files = [folder / run / "adapter" / DECODER_WEIGHTS for run in ("whole", "part")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_encoder_cannot_be_adapted():
    with pytest.raises(ValueError, match="task.train_encoder=false"):
        autoencoder_config(Path("nowhere"), task={"lora": {"rank": 2}})


# ---- class consistency ----


def consistency(**options):
    return {"train_encoder": False, "class_weight": 0.5, "class_column": "caption"} | options


def test_class_consistency_sends_the_class_into_the_decoder(folder):
    config = autoencoder_config(
        folder,
        "consistent",
        task=consistency(),
        data={"caption_column": "caption"},
        validation={"source": str(folder / "images"), "resolution": 32, "caption_column": None},
        train={"steps": 4, "validate_every": 4},
        optim={"learning_rate": 1e-4},
    )
    Trainer(config).fit()
    lines = [json.loads(line) for line in (folder / "consistent" / "log.jsonl").read_text().splitlines()]
    assert {"consistency", "classifier", "classifier_accuracy"} <= set().union(*lines)
    change = next(line["validation/psnr_change"] for line in lines if "validation/psnr_change" in line)
    assert abs(change) < 1.0


def test_an_adapter_says_what_class_consistency_cost_the_reconstruction(folder):
    """As the last validation measured it; a decoder that was tuned without a class has nothing to say."""
    config = autoencoder_config(
        folder,
        "costly",
        task=consistency(lora={"rank": 2}),
        data={"caption_column": "caption"},
        validation={"source": str(folder / "images"), "resolution": 32, "caption_column": None},
        train={"validate_every": 4, "validation_images": 20},
        optim={"learning_rate": 0.05},
    )
    adapter = Trainer(config).fit() / "adapter"
    (metric,) = json.loads((adapter / "adapter.json").read_text())["metrics"]
    last = json.loads((folder / "costly" / "log.jsonl").read_text().splitlines()[-1])
    assert (metric["name"], metric["subset"], metric["images"]) == ("psnr_change", "validation", 20)
    assert metric["value"] == pytest.approx(last["validation/psnr_change"], rel=1e-4)
    assert abs(metric["value"]) > 1e-3
    assert json.loads((folder / "decoder" / "adapter" / "adapter.json").read_text())["metrics"] == []
    without = autoencoder_config(folder, "blind", task=consistency(lora={"rank": 2}))
    with pytest.raises(ValueError, match="task.class_weight may cost reconstruction, which needs `validation:` data"):
        Trainer(without)


def test_the_gradient_of_the_consistency_goes_to_the_decoder_alone():
    from medisyn.tasks.judges import ClassConsistency

    torch.manual_seed(0)
    judge, classes = ClassConsistency(3, channels=8), torch.tensor([0, 1, 2, 0])
    images = torch.randn(4, 3, 32, 32)
    reconstruction = images.clone().requires_grad_(True)
    losses = judge(images, reconstruction, classes)
    losses["consistency"].backward()
    assert reconstruction.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in judge.parameters())
    losses["classifier"].backward()
    assert all(parameter.grad is not None for parameter in judge.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_column": "license"}, "at least two classes"),
        ({"class_column": "nothing"}, "nothing"),
        ({"label_fraction": 0.05, "class_column": "file"}, "file"),
    ],
)
def test_wrong_classes_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(autoencoder_config(folder, "wrong", task=consistency(**options)))
