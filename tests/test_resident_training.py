"""The diffusion stage that holds everything on its device, on a CPU: views, training in 8 bits, export and resuming.

python -m pytest tests/test_resident_training.py
"""

import importlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

from medisyn import load_pipeline
from medisyn.eight_bits import EIGHT_BITS, is_eight_bit, rounded, to_eight_bits
from tests.components import tiny_image_encoder, tiny_pipeline
from tests.training import GPU, diffusion_config, to_fake_gpu, write_base, write_images

SCRIPTS = Path(__file__).parent.parent / "scripts"
KINDS = ("text", "image", "labels")


@pytest.fixture
def resident(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("embedded_default.resident")
    monkeypatch.setattr(module, "REFRESH_EVERY", 2)
    monkeypatch.setattr(module, "is_eight_bit", lambda name, weight: weight.ndim > 1 and "resnets" in name)
    return module


@pytest.fixture
def config(tmp_path):
    write_images(tmp_path / "images")
    write_base(tmp_path / "base", kinds=("text", "labels"))
    for part in tiny_image_encoder():
        part.save_pretrained(tmp_path / "encoder")
    image = {"type": "image", "encoder": str(tmp_path / "encoder"), "noise": 0.3}

    def configure(data=None, task=None, train=None, **changes):
        data = {"horizontal_flip": True, "label_columns": {"gc": "gc"}} | (data or {})
        conditions = [{"type": "text", "train_encoder": True}, image, {"type": "labels"}]
        task = {"conditions": conditions} | (task or {})
        train = {"validation_images": 4, "ema_decay": 0.5, "mixed_precision": "bf16"} | (train or {})
        return diffusion_config(tmp_path, data=data, task=task, train=train, validation_fraction=0.25, **changes)

    return configure


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_large_matrices_are_stored_in_8_bits_and_read_into_any_precision(tmp_path, monkeypatch):
    monkeypatch.setattr("medisyn.eight_bits.SMALLEST", 64)
    unet = tiny_pipeline(kinds=KINDS).unet
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    to_eight_bits(unet).save_pretrained(tmp_path)
    stored = unet.state_dict()
    narrow = {name for name, weight in stored.items() if weight.dtype == EIGHT_BITS}
    assert narrow == {name for name, weight in before.items() if is_eight_bit(name, weight)} and narrow
    assert {weight.dtype for name, weight in stored.items() if name not in narrow} == {torch.float16}
    assert not any(name.startswith(("conv_in", "conv_out", "time_embedding")) for name in narrow)
    for dtype in (torch.float32, torch.float16):
        read = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=dtype).state_dict()
        assert {weight.dtype for weight in read.values()} == {dtype}
        assert all(torch.equal(read[name].float(), rounded(before[name])) for name in narrow)


def test_views_are_the_image_its_mirror_image_and_others(resident, config):
    data = resident.ResidentTraining(config()).data
    assert data.latents.shape[:2] == (len(data), resident.VIEWS)
    flipped = data.pixels.flip(3)
    for view, pixels in ((0, data.pixels), (1, flipped)):
        expected = data._encode(pixels)
        assert (data.latents[:, view].float() - expected).abs().max() < 0.02
    assert data.mirrored[:, 0].sum() == 0 and data.mirrored[:, 1].all()
    drawn = data.latents[:, 2:].float() - data.latents[:, :1].float()
    assert (drawn.flatten(2).norm(dim=2) > 0.1).float().mean() > 0.5


def test_an_image_that_must_not_be_mirrored_never_is(resident, config):
    data = resident.ResidentTraining(config(data={"horizontal_flip": False})).data
    assert data.mirrored.sum() == 0 and torch.equal(data.latents[:, 0], data.latents[:, 1])


def test_a_run_exports_the_pipeline_that_8_bits_hold(resident, config):
    folder = resident.ResidentTraining(config(train={"steps": 8})).fit()
    pipe = load_pipeline(folder / "pipeline")
    changed = 0
    for name, weight in pipe.unet.named_parameters():
        if resident.is_eight_bit(name, weight):
            assert torch.equal(weight, rounded(weight))
            changed += 1
    assert changed
    image = pipe("bright square", num_inference_steps=2).images[0]
    assert image.size == (32, 32)
    log = read_log(folder)
    assert sum("loss" in line for line in log) == 8 and "validation/error" in log[-1]


def test_training_lowers_the_error(resident, config):
    folder = resident.ResidentTraining(
        config(train={"steps": 120, "batch_size": 16, "log_every": 20}, optim={"learning_rate": 3e-3})
    ).fit()
    losses = [line["loss"] for line in read_log(folder) if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_that_was_cut_off_goes_on(resident, config, monkeypatch):
    training = resident.ResidentTraining(config(train={"steps": 8}))
    original, calls = training._loss, []

    def cut_off(count):
        calls.append(count)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return original(count)

    monkeypatch.setattr(training, "_loss", cut_off)
    with pytest.raises(KeyboardInterrupt):
        training.fit()
    saved = max(int(folder.name.removeprefix("step_")) for folder in (training.folder / "checkpoints").iterdir())
    again = resident.ResidentTraining(config(train={"steps": 8}))
    again.fit()
    steps = [line["step"] for line in read_log(training.folder) if "loss" in line]
    assert 0 < saved < 6 and steps[-(8 - saved) :] == list(range(saved + 1, 9))


def test_a_finished_run_is_exported_again_without_training(resident, config, monkeypatch):
    first = resident.ResidentTraining(config(train={"steps": 4}))
    first.fit()
    again = resident.ResidentTraining(config(train={"steps": 4}))
    monkeypatch.setattr(again, "_loss", None)
    before = load_pipeline(first.folder / "pipeline").unet.state_dict()
    after = load_pipeline(again.fit() / "pipeline").unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_configuration_in_the_same_folder_is_refused(resident, config):
    resident.ResidentTraining(config(train={"steps": 2})).fit()
    with pytest.raises(ValueError, match=r"another configuration: optim\.learning_rate"):
        resident.ResidentTraining(config(train={"steps": 2}, optim={"learning_rate": 0.5}))


@pytest.mark.parametrize(
    "changes", [{"train": {"mixed_precision": "no"}}, {"train": {"accumulation": 2}}, {"task": {"min_snr_gamma": 5}}]
)
def test_what_is_not_done_here_is_refused(resident, config, changes):
    with pytest.raises(ValueError, match="valid: "):
        resident.ResidentTraining(config(**changes))


def test_noise_on_embeddings_is_that_of_the_pipeline(resident, config):
    training = resident.ResidentTraining(config())
    embeds = torch.randn(8, *training.data.image_embeds(torch.tensor([0]), torch.tensor([0])).shape[1:])
    levels, noise = torch.linspace(0, 1, 8), torch.randn_like(embeds)
    expected = training.pipe.noise_image_embeds(embeds, levels, noise)
    assert torch.allclose(training.noise(embeds, levels, noise), expected, atol=1e-5)


def test_no_timestep_is_past_the_last_one(resident, config, monkeypatch):
    """Where a uniform number rounds up to a whole one in float32."""
    training = resident.ResidentTraining(config())
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.full(shape, 1 - 2**-24))
    assert training._loss(4).isfinite()


def test_a_time_limit_ends_the_run(resident, config):
    folder = resident.ResidentTraining(config(train={"steps": 100_000}), minutes=0.02).fit()
    assert read_log(folder)[-1]["step"] < 10_000 and (folder / "pipeline" / "unet").is_dir()


def test_a_loss_that_is_not_finite_is_an_error(resident, config):
    training = resident.ResidentTraining(config())
    training.weights[0].fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="learning_rate"):
        training.fit()


def test_a_step_runs_on_one_device(resident, config):
    """With fake tensors on a GPU; the pass back needs a real one."""
    training = resident.ResidentTraining(config())
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    to_fake_gpu(mode, training.task, training.pipe)
    with mode:
        for owner in (training, training.data, training.noise):
            for name, value in vars(owner).items():
                if isinstance(value, torch.Tensor):
                    setattr(owner, name, torch.empty(value.shape, dtype=value.dtype, device=GPU))
        training.device = training.data.device = GPU
        training.matrices = [weight.data for weight in training.pipe.unet.parameters() if weight.ndim > 1]
        training.task.noising.alphas_cumprod = torch.ones(1000)  # on the CPU, as it is before the first step
        rows = torch.arange(4, device=GPU)
        training.data.draw_views(rows, rows + 2)
        with training._in_eight_bits(True):
            assert training._loss(4).device == GPU
