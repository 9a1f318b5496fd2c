"""Noise on image embeddings with a level that the UNet knows, and the warning about patch tokens.

python -m pytest tests/test_embedding_noise.py
"""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, StableUnCLIPImg2ImgPipeline
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from typer.testing import CliRunner

from medisyn.backbone import model_hash
from medisyn.cli import app
from medisyn.conditions.image import NOISE_CHANNELS, ImageCondition, fit_noise, noise_embeds
from medisyn.config import ImageConditionConfig, parse_config
from medisyn.data.cache import module_hash
from medisyn.data.loading import load_images
from medisyn.generation.embedding_prior import fit_prior
from medisyn.generation.manifold_requests import like_requests
from medisyn.generation.provenance import read_provenance
from medisyn.generation.synthesize import synthesize
from medisyn.loading import load_pipeline
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from medisyn.tasks.diffusion import DiffusionTask
from medisyn.trainer import Trainer
from medisyn.wiring import adapt_unet
from tests.components import IMAGE_WIDTH, tiny_image_encoder, tiny_pipeline
from tests.training import diffusion_config, write_base, write_images

needs_pipeline = pytest.mark.skipif(
    not hasattr(MediSynPipeline, "noise_image_embeds"), reason="the pipeline has no noise_image_embeds"
)
MEAN = [0.1 * i for i in range(IMAGE_WIDTH)]
STD = [1 + 0.05 * i for i in range(IMAGE_WIDTH)]


@pytest.fixture
def noisy():
    """A pipeline whose UNet takes image tokens with a noise level."""
    pipe = tiny_pipeline(("text",))
    text = ImageCondition(*tiny_image_encoder(), noise=0.5, statistics={"mean": MEAN, "std": STD})
    adapt_unet(pipe, [text])
    with torch.no_grad():  # as after training: the new weights are zeros or random and small
        for parameter in pipe.unet.encoder_hid_proj.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    return pipe


# ---- the configuration ----------------------------------------------------------------------------------------------


def test_patch_tokens_come_with_a_warning_that_they_copy(tmp_path, caplog):
    encoder, processor = tiny_image_encoder()
    encoder.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="medisyn"):
        ImageCondition.from_config(ImageConditionConfig(encoder=str(tmp_path)), [])
        assert not caplog.records
        condition = ImageCondition.from_config(ImageConditionConfig(encoder=str(tmp_path), tokens="patch"), [])
    assert condition.tokens == "patch"
    (record,) = caplog.records
    assert "learns to copy its input" in record.getMessage()


def test_noise_belongs_to_a_new_condition(tmp_path):
    base = tiny_pipeline(("image",))
    with pytest.raises(ValueError, match="image.noise=0.5: the image condition of this base has 0.0"):
        ImageCondition.from_config(ImageConditionConfig(noise=0.5), [], base)
    with pytest.raises(ValueError, match="0..1, got 2"):
        ImageCondition(*tiny_image_encoder(), noise=2)
    tree = {"output_dir": "x", "data": {"source": "x"}, "task": {"type": "diffusion", "preset": None, "base": "x"}}
    tree["task"]["conditions"] = [{"type": "image", "noise": 1.5}]
    with pytest.raises(ValueError, match="noise"):
        parse_config(tree)


def test_without_noise_nothing_changes(tmp_path):
    pipe = tiny_pipeline(("image",))
    condition = ImageCondition.from_pipeline(pipe)
    assert condition.noise == 0 and condition.token_width() == IMAGE_WIDTH
    assert "image_noise" not in condition.components()
    embeds = {"image": torch.randn(2, 1, IMAGE_WIDTH)}
    assert noise_embeds(pipe, embeds, torch.tensor([1, 2]))["image"] is embeds["image"]


# ---- the formula ----------------------------------------------------------------------------------------------------


@needs_pipeline
@pytest.mark.parametrize("level", [0.1, 0.5])
def test_noise_is_that_of_stable_unclip(noisy, level):
    embeds, noise = (torch.randn(3, 1, IMAGE_WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(2))
    normalizer = StableUnCLIPImageNormalizer(IMAGE_WIDTH)
    normalizer.mean.data, normalizer.std.data = torch.tensor([MEAN]), torch.tensor([STD])
    theirs = SimpleNamespace(
        image_normalizer=normalizer, image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    )
    step = round(level * 999)
    expected = StableUnCLIPImg2ImgPipeline.noise_image_embeddings(theirs, embeds[:, 0], step, noise[:, 0])
    found = noisy.noise_image_embeds(embeds, level, noise)
    assert found.shape == (3, 1, IMAGE_WIDTH + NOISE_CHANNELS)
    torch.testing.assert_close(found[:, 0, :IMAGE_WIDTH], expected[:, :IMAGE_WIDTH])
    channels = get_timestep_embedding(
        torch.tensor([step] * 3), NOISE_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    torch.testing.assert_close(found[:, 0, IMAGE_WIDTH:], channels)


@needs_pipeline
def test_level_zero_keeps_the_features_and_nulls_stay_zeros(noisy):
    embeds = torch.randn(2, 1, IMAGE_WIDTH)
    embeds[1] = 0
    found = noisy.noise_image_embeds(embeds, 0.0, torch.randn(2, 1, IMAGE_WIDTH))
    assert torch.equal(found[..., :IMAGE_WIDTH], embeds) and found[0, 0, IMAGE_WIDTH:].abs().sum() > 0
    assert not noisy.noise_image_embeds(embeds, 0.5, torch.randn(2, 1, IMAGE_WIDTH))[1].any()
    assert torch.equal(noisy.noise_image_embeds(found, 0.3), found)  # has its level already
    assert noisy.null_embeds("image").shape[-1] == IMAGE_WIDTH + NOISE_CHANNELS


@needs_pipeline
def test_noise_of_an_item_depends_on_its_seed_alone(noisy):
    embeds = torch.randn(4, 1, IMAGE_WIDTH)
    seeds = torch.tensor([5, 6, 7, 8])
    together = noise_embeds(noisy, {"image": embeds}, seeds)["image"]
    alone = noise_embeds(noisy, {"image": embeds[2:3]}, seeds[2:3])["image"]
    assert torch.equal(together[2:3], alone)
    levels = {tuple(level) for level in together[:, 0, IMAGE_WIDTH:].tolist()}
    assert len(levels) == 4


# ---- sampling and training ------------------------------------------------------------------------------------------


@needs_pipeline
def test_sampling_takes_a_level_up_to_the_trained_one(noisy, tmp_path):
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def draw(**options):
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return noisy(
            image=image, num_images_per_prompt=2, generator=seeds, num_inference_steps=2, output_type="pt", **options
        ).images

    exact, moved = draw(), draw(image_noise_level=0.5)
    assert not torch.allclose(exact, moved, atol=1e-3)
    alone = noisy(
        image=image,
        generator=torch.Generator().manual_seed(2),
        num_inference_steps=2,
        output_type="pt",
        image_noise_level=0.5,
    ).images
    torch.testing.assert_close(moved[1:], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(draw(), exact)
    with pytest.raises(ValueError, match="0..0.5 for this model, not 0.9"):
        draw(image_noise_level=0.9)
    requests = like_requests(noisy, "reconstruction", load_images(str(write_images(tmp_path / "images", 3))), 2)
    (file, _) = synthesize(noisy, requests, tmp_path / "out", image_noise_level=0.25, num_inference_steps=2)
    assert read_provenance(file)["image_noise_level"] == 0.25
    with pytest.raises(ValueError, match="0..0.0 for this model"):
        tiny_pipeline(("image",))(image=image, image_noise_level=0.1)


@needs_pipeline
def test_a_learned_prior_fits_a_model_with_noise(noisy, tmp_path):
    vectors = torch.randn(40, IMAGE_WIDTH, generator=torch.Generator().manual_seed(0))
    fit_prior(vectors, ["even", "odd"] * 20, module_hash(noisy.image_encoder), "kind", components=(1,)).save(
        tmp_path / "prior"
    )
    noisy.save_pretrained(tmp_path / "model")
    arguments = ["generate", "--model", tmp_path / "model", "--prior", tmp_path / "prior", "--num-images", 3]
    arguments += ["--steps", 2, "--device", "cpu", "--out", tmp_path / "out"]
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert (done.exit_code, done.stderr) == (0, "")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and {line["kind"] for line in lines} == {"even", "odd"}
    assert all((tmp_path / "out" / line["file_name"]).is_file() for line in lines)

    noisy.register_modules(image_encoder=None)  # then the wiring alone tells the width
    wide = fit_prior(torch.randn(40, IMAGE_WIDTH + NOISE_CHANNELS), ["a", "b"] * 20, "e", components=(1,))
    with pytest.raises(ValueError, match=f"width {IMAGE_WIDTH + NOISE_CHANNELS}; this model takes {IMAGE_WIDTH}$"):
        wide.check_encoder(noisy)


@needs_pipeline
def test_training_fits_the_statistics_and_saves_them(tmp_path):
    write_images(tmp_path / "images")
    write_base(tmp_path / "base", kinds=("text",))
    encoder, processor = tiny_image_encoder()
    encoder.save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    condition = {"type": "image", "encoder": str(tmp_path / "encoder"), "noise": 0.5, "dropout": 0.2}
    config = diffusion_config(tmp_path, task={"conditions": [condition]}, train={"steps": 2})
    run = Trainer(config).fit()
    pipe = load_pipeline(run)
    settings = pipe.config.image_noise
    images = load_images(str(tmp_path / "images"))
    with torch.no_grad():
        embeds = pipe.encode_image([images.image(row) for row in range(len(images))])[:, 0]
    torch.testing.assert_close(torch.tensor(settings["mean"]), embeds.mean(0), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(torch.tensor(settings["std"]), embeds.std(0, correction=0), rtol=1e-2, atol=1e-2)
    again = ImageCondition.from_pipeline(pipe)
    assert again.noise == 0.5 and again.token_width() == IMAGE_WIDTH + NOISE_CHANNELS
    assert list(again.statistics["mean"]) == list(settings["mean"])

    # a run that starts from it keeps them, whatever its own images are, and shows the UNet noise
    second = {"preset": None, "base": str(run), "conditions": []}
    task = DiffusionTask(diffusion_config(tmp_path, run="second", task=second))
    assert task.pipe.config.image_noise == settings
    batch = task.collate([task.data.moments(row) | {"row": row, "flip": False} for row in range(4)])
    batch |= {"seed": torch.arange(4)}
    loss = task(batch, 0)["loss"]
    task.pipe.register_to_config(image_noise=dict(settings) | {"level": 0.0})
    assert loss != task(batch, 0)["loss"]
    before = model_hash(task.pipe)
    task.pipe.register_to_config(image_noise=dict(settings))
    fit_noise(task.pipe, task.data)
    assert model_hash(task.pipe) != before and task.pipe.config.image_noise == settings
