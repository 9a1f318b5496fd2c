"""Feature matching: the last steps of sampling move the mean features of drawn images to those of real ones.

python -m pytest tests/test_feature_matching.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from medisyn.config import load_config
from medisyn.feature_statistics import LEAST_DEVIATION, ClassMeans, open_pooled_features
from medisyn.loading import load_pipeline
from medisyn.tasks import create_task
from medisyn.tasks.base import seeded_normal
from medisyn.tasks.feature_matching import _START, FAINT, FeatureMatchingTask, visible_lattice
from medisyn.trainer import Trainer
from tests.training import diffusion_config, write_base, write_images

RECIPE = Path(__file__).resolve().parent.parent / "scripts" / "embedded_default" / "matching.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matching")
    write_images(folder / "images")
    write_base(folder / "base", kinds=("text", "labels"))
    torch.manual_seed(0)
    torch.save(timm.create_model("test_efficientnet").state_dict(), folder / "network.pth")
    return folder


@pytest.fixture(scope="module")
def network(folder):
    return open_pooled_features(spec(folder))


def spec(folder):
    return f"timm:test_efficientnet@{folder / 'network.pth'}?size=32"


def config_of(folder, run="run", task=None, **changes):
    given = {"type": "feature_matching", "extractors": [spec(folder)], "class_columns": ["kind"]}
    given |= {"num_inference_steps": 3, "draws": 4, "real_images": 8, "horizon": 4}
    return diffusion_config(folder, run, task=given | (task or {}), **changes)


def batch_of(task, rows):
    return task.collate([task.sample(row, np.random.default_rng(0)) for row in rows]) | {"seed": torch.tensor(rows)}


def test_features_are_the_networks_own_after_its_stages_and_pass_gradients(folder, network):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    images.requires_grad_(True)
    features = network(images)
    plain = timm.create_model("test_efficientnet", num_classes=0).eval()
    state = torch.load(folder / "network.pth", weights_only=True)
    plain.load_state_dict({name: value for name, value in state.items() if not name.startswith("classifier")})
    assert features.shape == (2, len(network.weights))
    assert network.weights.sum() == pytest.approx(1.0, abs=1e-5)
    own = plain(((images + 1) / 2 - network.shift) / network.scale)
    assert torch.allclose(features[:, -own.shape[1] :], own, atol=1e-5)
    (gradient,) = torch.autograd.grad(features.sum(), images)
    assert gradient.abs().sum() > 0 and not any(p.requires_grad for p in network.parameters())


def alexnet(folder):
    """A file as that of ST-LPIPS, narrow and random; one feature of its last layer is dead."""
    generator, state, before = torch.Generator().manual_seed(0), {}, 3
    layers = (("slice1.0", 8, 11), ("slice2.5", 6, 5), ("slice3.9", 6, 3), ("slice4.11", 4, 3), ("slice5.13", 4, 3))
    for number, (name, width, side) in enumerate(layers):
        weight = torch.randn(width, before, side, side, generator=generator) / (before**0.5 * side)
        state |= {f"net.{name}.weight": weight, f"net.{name}.bias": torch.zeros(width)}
        state[f"lin{number}.model.1.weight"] = torch.ones(1, width, 1, 1)
        before = width
    state["net.slice5.13.bias"][0] = -100.0
    state |= {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    torch.save(state, folder / "alexnet.pth")
    return f"st-lpips:{folder / 'alexnet.pth'}"


def test_layers_of_a_perceptual_network_count_alike_and_each_has_a_least_deviation(folder):
    network = open_pooled_features(alexnet(folder))
    assert network.layers == [8, 6, 6, 4, 4]
    shares = [part.sum().item() for part in network.weights.split(network.layers)]
    assert shares == pytest.approx([0.2] * 5)
    images = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = network(images.requires_grad_(True))
    first = network.network.features(images)[0].mean(dim=(2, 3))
    assert torch.allclose(features[:, :8], first)
    (gradient,) = torch.autograd.grad(features.sum(), images)
    assert gradient.abs().sum() > 0
    means = ClassMeans(network, 1, horizon=1)
    means.fit([images.detach()], torch.Generator().manual_seed(0))
    last = means.deviation.split(network.layers)[-1]
    assert 0 < last[0] == last.min() <= LEAST_DEVIATION * last.mean()
    assert last[0] < LEAST_DEVIATION * means.deviation[:8].min()  # each layer has a least one of its own


def test_jitter_depends_on_the_generator_alone(network):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    first, again, other = (network(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_the_gradient_leads_to_the_real_mean(network):
    """Images that follow the loss come nearer to the mean of the real ones of their class, not of the others."""
    generator = torch.Generator().manual_seed(0)
    real = [torch.rand(8, 3, 32, 32, generator=generator) * 0.5 + shift for shift in (-1.0, 0.5)]
    means = ClassMeans(network, 2, horizon=8)
    means.fit(real, generator)
    classes = torch.tensor([0] * 4 + [1] * 4)
    images = torch.zeros(8, 3, 32, 32, requires_grad=True)
    optimizer = torch.optim.Adam([images], lr=0.03)
    shifts = []
    for _ in range(40):
        features = network(images)
        means.add(features.detach(), classes)
        shifts.append(means.squared_shift().item())
        optimizer.zero_grad()
        means.loss(features, classes).backward()
        optimizer.step()
    assert shifts[-1] < 0.5 * shifts[1]


def test_running_means_start_exact_and_forget(network):
    means = ClassMeans(network, 1, horizon=2)
    width = len(network.weights)
    for value in (1.0, 3.0, 6.0):
        means.add(torch.full((1, width), value), torch.tensor([0]))
        if value == 3.0:
            assert torch.allclose(means.drawn, torch.full((1, width), 2.0))
    assert torch.allclose(means.drawn, torch.full((1, width), 4.0))  # 2 + (6 - 2) / 2


def test_a_class_counts_less_while_few_of_it_are_drawn(network):
    means = ClassMeans(network, 1, horizon=4)
    features = torch.ones(1, len(network.weights))
    means.add(features, torch.tensor([0]))
    early = means.loss(features, torch.tensor([0]))
    for _ in range(3):
        means.add(features, torch.tensor([0]))
    assert means.loss(features, torch.tensor([0])).item() == pytest.approx(4 * early.item(), rel=1e-5)


def test_a_class_of_few_real_images_is_not_matched(network):
    means = ClassMeans(network, 2, horizon=1)
    means.fit([torch.rand(8, 3, 32, 32), torch.rand(7, 3, 32, 32)], torch.Generator().manual_seed(0))
    features = torch.rand(2, len(network.weights))
    means.add(features, torch.tensor([0, 1]))
    assert means.loss(features[1:], torch.tensor([1])) == 0 != means.loss(features[:1], torch.tensor([0]))
    alone = (((means.drawn - means.real) / means.deviation).square() * network.weights).sum(dim=1)[0]
    assert means.squared_shift() == pytest.approx(alone.item(), rel=1e-5)


def test_a_size_that_a_network_cannot_take_is_refused(folder):
    with pytest.raises(ValueError, match=r"size=16' does not take images of 0, 16, 32 pixels"):
        open_pooled_features(f"timm:test_efficientnet@{folder / 'network.pth'}?size=16")


def test_images_are_drawn_as_the_pipeline_draws_them(folder):
    task = create_task(config_of(folder))
    assert isinstance(task, FeatureMatchingTask)
    rows, seeds = torch.tensor([0, 1]), torch.tensor([5, 6])
    with torch.no_grad():
        images, before = task._draw(rows, seeds)
    pipe = load_pipeline(folder / "base")
    noise = seeded_normal(seeds, (4, *(pipe.unet.config.sample_size,) * 2), _START)
    captions = [task.images.captions[row] for row in (0, 1)]
    drawn = pipe(captions, latents=noise, num_inference_steps=3, output_type="pt").images * 2 - 1
    assert torch.allclose(images, drawn, atol=1e-4)
    assert torch.allclose(before, drawn, atol=1e-4)


def test_a_lattice_counts_where_it_is_seen():
    """The same dots in one window of sixteen: on flat ground, or in texture that hides them; noise hardly counts."""
    generator = torch.Generator().manual_seed(0)
    block = 0.02 * torch.randn(1, 3, 8, 8, generator=generator)
    dots = torch.zeros(1, 3, 128, 128)
    dots[..., :32, 32:64] = block.repeat(1, 1, 4, 4)
    flat = torch.tensor([0.8, 0.4, -0.5])[:, None, None].expand(1, 3, 128, 128)  # a colour is no texture
    texture = 0.3 * torch.randn(flat.shape, generator=generator)
    seen, hidden = (visible_lattice(dots, ground, 8) for ground in (flat, texture))
    assert seen == pytest.approx(block.square().mean().item() / FAINT**2 / 16, rel=1e-4)
    assert 0 < hidden < 0.02 * seen
    corner = torch.zeros(1, 3, 80, 80)  # ten blocks: the last two are a window of their own
    corner[..., 64:, 64:] = block.repeat(1, 1, 2, 2)
    assert visible_lattice(corner, flat[..., :80, :80], 8) == pytest.approx(seen.item() * 16 / 9, rel=1e-4)
    noise = dots.std() * torch.randn(flat.shape, generator=generator)
    assert visible_lattice(noise, flat, 8) == pytest.approx(noise.square().mean().item() / FAINT**2 / 16, rel=0.1)
    assert visible_lattice(noise[..., :16, :16], flat[..., :16, :16], 8) > 0  # fewer blocks than a window


def test_a_first_step_changes_no_content_and_gives_gradients_to_the_unet_alone(folder):
    task = create_task(
        config_of(folder, task={"denoising_weight": 0.0, "content_weight": 0.0, "visible_lattice_weight": 0.0})
    )
    for _ in range(2):
        losses = task(batch_of(task, [0, 1, 2, 3]), 0)
    assert losses["change"] < 1e-8 and losses["shift"] > 0
    losses["loss"].backward()
    with_gradient = {name for name, p in task.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient and all(name.startswith("unet.") for name in with_gradient)


def test_the_content_of_what_is_drawn_is_held(folder):
    """With all weight on the content the base's own drawings stay; the features alone lead away from them."""
    changes = {}
    for weight in (0.0, 1000.0):
        off = {"denoising_weight": 0.0, "visible_lattice_weight": 0.0}
        task = create_task(config_of(folder, task={"content_weight": weight, "horizon": 1} | off))
        optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=2e-3)
        for step in range(12):
            optimizer.zero_grad()
            losses = task(batch_of(task, [0, 1, 2, 3]), step)
            losses["loss"].backward()
            optimizer.step()
        changes[weight] = losses["change"].item()
    assert changes[1000.0] < 0.5 * changes[0.0]


def test_four_steps_are_two_and_two_more(folder):
    once = Trainer(config_of(folder, "once")).fit()
    Trainer(config_of(folder, "twice", train={"steps": 2})).fit()
    twice = Trainer(config_of(folder, "twice")).fit()
    found = [load_file(run / "checkpoints" / "step_00000004" / "model.safetensors") for run in (once, twice)]
    assert found[0].keys() == found[1].keys() and any("drawn" in name for name in found[0])
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_the_recipe_runs_and_ends_in_a_pipeline(folder):
    write_base(folder / "default", kinds=("text", "image", "labels"))
    data = {name: str(folder / "images") for name in ("data", "validation")}
    changes = [f"{name}.source={source}" for name, source in data.items()]
    changes += [f"{name}.{key}" for name in data for key in ("label_schema=null", "resolution=32")]
    changes += ["data.group_column=patient", "data.dataset_column=null", "data.balance_columns=[kind]"]
    changes += [f"task.base={folder / 'default'}", f"output_dir={folder / 'recipe'}", "train.steps=1"]
    changes += [f"task.extractors={json.dumps([spec(folder), alexnet(folder)])}", "task.class_columns=[kind]"]
    changes += ["train.batch_size=4", "train.ema_decay=0", "optim.warmup_steps=0", "optim.learning_rate=0.01"]
    run = Trainer(load_config(RECIPE, changes)).fit()
    before, after = (load_pipeline(name) for name in (folder / "default", run / "pipeline"))
    assert after.kinds == before.kinds
    learnt = load_file(run / "checkpoints" / "step_00000001" / "model.safetensors")
    weights = after.unet.state_dict()
    changes = {name: learnt[f"unet.{name}"] - value for name, value in before.unet.state_dict().items()}
    assert max(change.abs().max() for change in changes.values()) > 1e-3
    for name, value in before.unet.state_dict().items():
        assert torch.allclose(weights[name] - value, 1.1 * changes[name], atol=1e-5)
    vae = before.vae.state_dict()
    assert all(torch.equal(value, vae[name]) for name, value in after.vae.state_dict().items())


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"extractors": []}, "names no network"),
        ({"lora": {"rank": 2}}, "trains all weights: task.method=lora does not go"),
        ({"base": None, "preset": "mini", "vae": "x"}, "set task.base"),
        ({"prior": {"num_images": 2}}, "images of a prior have no class"),
        ({"conditions": [{"type": "text", "train_encoder": True}]}, "trains the UNet alone"),
        ({"conditions": [{"type": "text"}]}, "labels is no condition of"),
        ({"gradient_steps": 4}, "task.gradient_steps=4 is more than task.num_inference_steps=3"),
        ({"real_images": 4}, "no class has 8 real images"),
        ({"guidance_interval": (0.9, 0.1)}, "with low <= high"),
        ({"drawn_with": ["image"]}, "image is no condition of"),
        ({"class_columns": ["colour"]}, "colour"),
        ({"extractors": ["model"]}, "are those of timm"),
    ],
)
def test_what_cannot_be_matched_is_refused(folder, task, message):
    with pytest.raises(ValueError, match=message):
        create_task(config_of(folder, "wrong", task))
