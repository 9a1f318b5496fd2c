"""Autoencoder training: the PCA start, the latent scale, every loss, and export as a stock component."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch.nn.functional import pixel_unshuffle

from medisyn import loading
from medisyn.autoencoders import fit_latent_scale, initialize_from_pca
from medisyn.backbone import create_autoencoder, load_autoencoder
from medisyn.perceptual import ShiftTolerantLPIPS, _MeanLPIPS, build_perceptual
from medisyn.tasks.autoencoder import AutoencoderTask
from medisyn.tasks.judges import adversarial_losses
from medisyn.trainer import Trainer
from medisyn.training_record import read_training_record, write_training_record
from tests.components import tiny_vae
from tests.training import autoencoder_config, write_base, write_images


@pytest.fixture(scope="module", params=["dc", "kl"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"autoencoder_{request.param}")
    write_images(folder / "images")
    write_base(folder / "base", vae=request.param)
    return folder


def smooth_images(count: int) -> torch.Tensor:
    """Low-frequency colour images, (count, 3, 32, 32) in [-1, 1]: a linear code can hold most of them."""
    torch.manual_seed(0)
    return torch.nn.functional.interpolate(torch.rand(count, 3, 5, 5) * 2 - 1, size=32, mode="bilinear")


def test_the_pca_start_gives_the_best_linear_code():
    images = smooth_images(48)
    vae = create_autoencoder("mini")
    initialize_from_pca(vae, images)
    with torch.no_grad():
        code = vae.encode(images).latent.movedim(1, -1).flatten(0, 2)
    patches = pixel_unshuffle(images, 8).movedim(1, -1).flatten(0, 2)

    def unexplained(features):
        inputs = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
        return (inputs @ torch.linalg.lstsq(inputs, patches).solution - patches).square().mean()

    best = torch.pca_lowrank(patches, q=16, center=True)
    principal = (patches - patches.mean(0)) @ best[2]
    torch.manual_seed(1)
    untrained = create_autoencoder("mini").encode(images).latent.detach().movedim(1, -1).flatten(0, 2)
    assert unexplained(code) < 1.3 * unexplained(principal) + 1e-5
    assert unexplained(code) < 0.5 * unexplained(untrained)


def test_the_pca_start_refuses_other_architectures():
    with pytest.raises(ValueError, match="encoder_out_shortcut=False"):
        initialize_from_pca(
            AutoencoderDC(
                latent_channels=4,
                encoder_block_out_channels=(8, 8),
                decoder_block_out_channels=(8, 8),
                encoder_block_types="ResBlock",
                decoder_block_types="ResBlock",
                encoder_layers_per_block=(1, 1),
                decoder_layers_per_block=(1, 1),
                encoder_qkv_multiscales=((), ()),
                decoder_qkv_multiscales=((), ()),
            ),
            torch.zeros(2, 3, 8, 8),
        )


def test_the_pca_start_names_an_autoencoder_that_it_cannot_start():
    with pytest.raises(ValueError, match="AutoencoderDC, not a AutoencoderKL"):
        initialize_from_pca(tiny_vae("kl"), torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("count", [3, 8, 24])
def test_the_preview_takes_any_number_of_images(folder, tmp_path, count):
    images = write_images(tmp_path / "images", count)
    task = AutoencoderTask(autoencoder_config(folder, data={"source": str(images)}))
    assert task.preview().width > 32


def test_unreadable_images_are_skipped_in_training_and_validation_where_configured(folder, tmp_path):
    images = write_images(tmp_path / "images")
    (images / "03.png").write_bytes(b"not an image")
    data = {"source": str(images), "on_error": "skip", "caption_column": None, "resolution": 32}
    train = {"steps": 6, "validate_every": 6, "checkpoint_every": 6}
    run = Trainer(autoencoder_config(folder, "skips", data=data, validation=data, train=train)).fit()
    assert "validation/psnr" in (run / "log.jsonl").read_text()


def test_the_torchmetrics_distance_takes_values_beyond_the_range():
    lpip = pytest.importorskip("torchmetrics.functional.image.lpips")
    network = lpip._LPIPS(pretrained=False, net="alex", pnet_rand=True)
    images = smooth_images(2)
    assert torch.isfinite(_MeanLPIPS(network.eval())(images * 1.5, images))


def test_the_scale_of_deterministic_latents_is_folded_into_the_weights_exactly():
    vae, images = tiny_vae("dc"), smooth_images(8)
    with torch.no_grad():
        latents = vae.encode(images).latent
        before = vae.decode(latents).sample
        report = fit_latent_scale(vae, latents)
        scaled = vae.encode(images).latent
        assert torch.allclose(vae.decode(scaled).sample, before, atol=1e-4)
    assert torch.allclose(scaled.square().mean((0, 2, 3)), torch.ones(4), atol=1e-3)
    assert vae.config.scaling_factor == 1.0 and len(report["channel_rms_before"]) == 4


def test_the_scale_of_a_kl_autoencoder_is_written_to_its_configuration(tmp_path):
    vae = tiny_vae("kl")
    latents = 3.0 * torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    fit_latent_scale(vae, latents)
    vae.save_pretrained(tmp_path)
    assert AutoencoderKL.from_pretrained(tmp_path).config.scaling_factor == pytest.approx(1 / 3, rel=0.05)


def test_a_run_exports_a_stock_autoencoder_with_a_fitted_scale(folder):
    run = Trainer(autoencoder_config(folder)).fit()
    vae = load_autoencoder(run)
    report = json.loads((run / "latent_scale.json").read_text())
    assert report["scaling_factor"] == pytest.approx(vae.config.scaling_factor)
    assert len(read_training_record(run / "vae")["hashes"]) == 24


def test_the_autoencoder_of_the_embedded_default_is_trained_further(folder, tmp_path, monkeypatch):
    write_base(tmp_path / "pretrained")
    write_training_record(tmp_path / "pretrained", {"hashes": ["0" * 16], "datasets": []})
    monkeypatch.setattr(loading.resources, "files", lambda package: tmp_path)
    config = autoencoder_config(folder, "further", task={"base": "default"}, train={"steps": 1})
    hashes = read_training_record(Trainer(config).fit() / "vae")["hashes"]
    assert len(hashes) == 25 and "0" * 16 in hashes


def test_images_of_a_stated_side_or_kind_are_not_mirrored(folder, tmp_path):
    images = write_images(tmp_path / "images", 6)
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"laterality": "left" if place == 4 else None}) for place, row in enumerate(rows)]
    (images / "metadata.jsonl").write_text("\n".join(lines))
    data = {"source": str(images), "horizontal_flip": True, "flip_only": {"kind": ["1"]}}
    task = AutoencoderTask(autoencoder_config(folder, data=data))

    def versions(row):
        return {task.sample(row, np.random.default_rng(seed))["images"].numpy().tobytes() for seed in range(20)}

    assert [len(versions(row)) for row in range(6)] == [1, 2, 1, 1, 1, 1]


def test_training_lowers_the_reconstruction_error(folder):
    changes = {"train": {"steps": 30, "ema_decay": 0.0, "checkpoint_every": 30}, "optim": {"learning_rate": 3e-3}}
    trainer = Trainer(autoencoder_config(folder, "learns", **changes))
    trainer.fit()
    losses = [json.loads(line)["l1"] for line in (folder / "learns" / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_every_loss_is_reported_and_random_crops_are_trained_on(folder):
    config = autoencoder_config(
        folder,
        "adversarial",
        task={"adversarial_weight": 0.1, "adversarial_start": 1, "colour_weight": 1.0, "structure_weight": 0.5},
        data={"crop": "random", "random_crop_size": 16},
        train={"validate_every": 4, "preview_every": 4},
        validation={"source": str(folder / "images"), "resolution": 32, "caption_column": None},
    )
    run = Trainer(config).fit()
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    logged = {name for line in lines for name in line}
    assert {"loss", "l1", "l2", "colour", "structure", "generator", "discriminator", "validation/psnr"} <= logged
    assert ("kl" in logged) == isinstance(load_autoencoder(run), AutoencoderKL)


def test_the_discriminator_and_the_autoencoder_do_not_train_each_other(folder):
    config = autoencoder_config(
        folder, "players", task={"adversarial_weight": 1.0, "l1_weight": 0.0, "kl_weight": 0.0}
    )
    task = AutoencoderTask(config)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    losses = adversarial_losses(task.discriminator, images, task.vae(images).sample)
    losses["discriminator"].backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in task.vae.parameters())
    task.zero_grad()
    losses["generator"].backward()
    assert all(parameter.grad is None for parameter in task.discriminator.parameters())
    assert any(parameter.grad is not None for parameter in task.vae.parameters())


def test_the_perceptual_distance_of_the_published_weights(shared_folder):
    distance = build_perceptual("st-lpips", f"{shared_folder}/weights/stlpips_alex.pth")
    images = smooth_images(4)
    assert distance(images, images) == 0
    near = distance(images, (images + 0.02).clamp(-1, 1))
    assert 0 < near < distance(images, images.flip(0))
    shifted = distance(images[..., 1:], images[..., :-1])  # what the network was made for
    assert shifted < distance(
        images, images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    )


def test_perceptual_distances_say_what_they_need(tmp_path):
    with pytest.raises(ValueError, match="perceptual_weights"):
        build_perceptual("st-lpips")
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        ShiftTolerantLPIPS(tmp_path / "absent.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is missing"):
        ShiftTolerantLPIPS(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="none, st-lpips, lpips"):
        build_perceptual("vgg")
