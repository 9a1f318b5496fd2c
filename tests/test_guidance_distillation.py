"""Guidance distillation: a LoRA that draws in one pass what its base draws with classifier-free guidance.

python -m pytest tests/test_guidance_distillation.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from medisyn.adapter_folder import read_manifest
from medisyn.config import GuidanceDistillationTaskConfig, load_config
from medisyn.loading import load_pipeline
from medisyn.tasks import create_task
from medisyn.tasks.base import seeded_normal
from medisyn.tasks.diffusion import DiffusionTask
from medisyn.tasks.guidance_distillation import GuidanceDistillationTask
from medisyn.trainer import Trainer
from tests.training import diffusion_config, write_base, write_images

CAPTION = "bright square"
RECIPE = Path(__file__).resolve().parent.parent / "scripts" / "few_step" / "lora.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation")
    write_images(folder / "images")
    write_base(folder / "base", kinds=("text", "labels"))
    return folder


def config_of(folder, run="run", task=None, **changes):
    given = {"type": "guidance_distillation", "lora": {"rank": 4, "target_modules": ["to_q", "to_k", "to_v", "conv1"]}}
    return diffusion_config(folder, run, task=given | (task or {}), **changes)


def batch_of(task, rows):
    return task.collate([task.sample(row, np.random.default_rng(0)) for row in rows]) | {"seed": torch.tensor(rows)}


def test_the_teacher_is_what_the_sampler_does_with_guidance(folder):
    """Its prediction is e_null + scale (e_text - e_null), by the pipeline's own null, within the interval alone."""
    task = create_task(config_of(folder, task={"guidance_scale": 5.0, "guidance_interval": (0.0, 0.9)}))
    assert isinstance(task, GuidanceDistillationTask)
    base = load_pipeline(folder / "base")
    latents, noise = (seeded_normal(torch.arange(2), (4, 8, 8), stream) for stream in (7, 8))
    timesteps = torch.tensor([500, 950])
    noised = task.noising.add_noise(latents, noise, timesteps)
    embeds = task._embeds(task.data, [0, 1])
    found = task._target(latents, noise, timesteps, task._unet_conditions(embeds))
    with torch.no_grad():
        own = base.unet_conditions(**{c.embeds_name: embeds[c.kind] for c in task.conditions}, batch_size=2)
        nulls = base.unet_conditions(
            **{c.embeds_name: base.null_embeds(c.kind, 2) for c in task.conditions}, batch_size=2
        )
        conditional, null = (base.unet(noised, timesteps, **each).sample for each in (own, nulls))
    assert torch.allclose(found[0], (null + 5 * (conditional - null))[0], atol=1e-4)
    assert torch.allclose(found[1], conditional[1], atol=1e-5)
    assert not torch.allclose(conditional[0], null[0], atol=1e-4)


def test_the_teacher_stays_as_it_was_and_the_lora_alone_is_trained(folder):
    task = create_task(config_of(folder, optim={"learning_rate": 0.05}))
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    batch = batch_of(task, [0, 1, 2])
    embeds = task._embeds(task.data, batch["row"].tolist())
    latents, noise = (seeded_normal(torch.arange(3), (4, 8, 8), stream) for stream in (7, 8))
    given = (latents, noise, torch.tensor([100, 500, 900]), task._unet_conditions(embeds))
    before = task._target(*given)
    first = task(batch, 0)["loss"]
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        task(batch, 0)["loss"].backward()
        optimizer.step()
    assert task(batch, 0)["loss"] < 0.9 * first
    assert torch.equal(task._target(*given), before)


def test_without_conditions_the_null_is_taught_as_it_is(folder):
    """Where all conditions are dropped, student and teacher agree from the start; where they are not, they differ."""
    losses = {}
    for dropout in (0.0, 1.0):
        task = create_task(config_of(folder, task={"joint_dropout": dropout, "guidance_scale": 6.0}))
        losses[dropout] = task(batch_of(task, [0, 1, 2]), 0)["error"].item()
    assert losses[1.0] < 1e-8 < 1e-4 < losses[0.0]


def test_the_adapter_says_what_it_has_built_in(folder, caplog):
    run = Trainer(config_of(folder, "saved", {"guidance_scale": 3.0}, train={"preview_every": 4})).fit()
    assert read_manifest(run / "adapter")["built_in_guidance"] == 3.0
    assert list((run / "previews").glob("*.png"))
    pipe = load_pipeline(folder / "base", adapter=run / "adapter")
    assert "has guidance 3 built in: sample with guidance_scale=1" in caplog.text
    image = pipe(CAPTION, guidance_scale=1.0, num_inference_steps=2, output_type="np").images[0]
    assert np.isfinite(image).all()


def test_an_ordinary_adapter_says_nothing_of_it(folder):
    run = Trainer(diffusion_config(folder, "ordinary", task={"lora": {"rank": 2}})).fit()
    assert "built_in_guidance" not in read_manifest(run / "adapter")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"lora": None, "method": "full"}, "guidance is built into a LoRA of the UNet"),
        ({"lora": None, "method": "norm"}, "guidance is built into a LoRA of the UNet"),
        ({"lora": {"text_encoder": True}}, "without text_encoder"),
        ({"conditions": [{"type": "text", "new_words": ["x"]}]}, "the base's own conditions alone: text has new ones"),
        ({"base": None, "preset": "mini", "vae": "x"}, "needs a trained model"),
        ({"guidance_scale": 0.0}, "greater than 0"),
        ({"guidance_interval": (0.9, 0.1)}, "with low <= high"),
    ],
)
def test_what_cannot_be_distilled_is_refused(folder, task, message):
    with pytest.raises(ValueError, match=message):
        config_of(folder, "wrong", task)


def test_a_base_without_conditions_has_nothing_to_be_guided_to(folder):
    write_base(folder / "unconditional", kinds=())
    with pytest.raises(ValueError, match="takes no condition"):
        create_task(config_of(folder, "wrong", {"base": str(folder / "unconditional")}))


def test_an_adapter_at_weight_zero_has_nothing_built_in(folder, caplog):
    run = Trainer(config_of(folder, "weightless", train={"steps": 1})).fit()
    load_pipeline(folder / "base", adapter={str(run / "adapter"): 0.0})
    assert "built in" not in caplog.text


def test_the_recipe_runs(folder):
    write_base(folder / "default", kinds=("text", "image", "labels"))
    data = {name: str(folder / "images") for name in ("data", "validation")}
    changes = [f"{name}.source={source}" for name, source in data.items()]
    changes += [f"{name}.{key}" for name in data for key in ("label_schema=null", "resolution=32")]
    changes += ["data.group_column=patient", "data.dataset_column=null", "data.balance_columns=[kind]"]
    changes += [f"task.base={folder / 'default'}", f"output_dir={folder / 'few-step'}", "train.steps=1"]
    run = Trainer(load_config(RECIPE, changes)).fit()
    manifest = read_manifest(run / "adapter")
    assert (manifest["built_in_guidance"], manifest["rank"]) == (4.0, 32)
    assert manifest["conditions"] == ["text", "image", "labels"]


def test_another_task_is_refused(folder):
    with pytest.raises(ValueError, match="given to the guidance distillation task"):
        GuidanceDistillationTask(diffusion_config(folder))
    assert issubclass(GuidanceDistillationTask, DiffusionTask) and GuidanceDistillationTaskConfig.__doc__
