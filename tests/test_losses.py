"""Losses against their formulas."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from PIL import Image

from medisyn.losses import (
    clip_where_reference_is,
    colour_difference,
    diffusion_target,
    discriminator_hinge_loss,
    kl_to_standard_normal,
    min_snr_weights,
    peak_signal_to_noise_ratio,
)
from medisyn.perceptual import structure_difference


def noised(prediction_type):
    torch.manual_seed(0)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)
    clean, noise = torch.randn(2, 4, 8, 8, generator=None), torch.randn(2, 4, 8, 8)
    timesteps = torch.tensor([100, 700])
    return scheduler, clean, noise, timesteps


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_of_the_target_recovers_the_clean_sample(prediction_type):
    scheduler, clean, noise, timesteps = noised(prediction_type)
    target = diffusion_target(scheduler, prediction_type, clean, noise, timesteps)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    scheduler.config.clip_sample = False
    for i, step in enumerate(timesteps.tolist()):
        alpha = scheduler.alphas_cumprod[step].sqrt()
        sigma = (1 - scheduler.alphas_cumprod[step]).sqrt()
        recovered = {
            "epsilon": (noisy[i] - sigma * target[i]) / alpha,
            "v_prediction": alpha * noisy[i] - sigma * target[i],
            "sample": target[i],
        }[prediction_type]
        assert torch.allclose(recovered, clean[i], atol=1e-4)


def test_an_unknown_prediction_type_lists_the_valid_ones():
    scheduler, clean, noise, timesteps = noised("epsilon")
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample"):
        diffusion_target(scheduler, "flow", clean, noise, timesteps)


def test_min_snr_weights_are_the_same_loss_on_the_clean_sample_for_every_prediction_type():
    # |eps - eps'|^2 = SNR |x - x'|^2 and |v - v'|^2 = (SNR + 1) |x - x'|^2: the weights undo these factors
    snr = torch.tensor([0.01, 1.0, 5.0, 40.0])
    expected = torch.tensor([0.01, 1.0, 5.0, 5.0])
    assert torch.allclose(min_snr_weights(snr, 5.0, "epsilon") * snr, expected)
    assert torch.allclose(min_snr_weights(snr, 5.0, "v_prediction") * (snr + 1), expected)
    assert torch.allclose(min_snr_weights(snr, 5.0, "sample"), expected)
    assert torch.equal(min_snr_weights(snr, 0.0, "epsilon"), torch.ones(4))


def test_min_snr_weights_are_finite_at_a_zero_terminal_snr():
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True)
    snr = compute_snr(scheduler, torch.tensor([0, 500, 999]))
    for prediction_type in ("v_prediction", "sample"):
        assert torch.isfinite(min_snr_weights(snr, 5.0, prediction_type)).all()


def test_kl_is_that_of_torch_distributions():
    torch.manual_seed(0)
    mean, logvar = torch.randn(3, 4), torch.randn(3, 4)
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    assert torch.allclose(kl_to_standard_normal(mean, logvar), expected)


def test_hinge_loss_is_zero_only_beyond_the_margins():
    assert discriminator_hinge_loss(torch.tensor([1.5]), torch.tensor([-1.5])) == 0
    assert discriminator_hinge_loss(torch.tensor([0.0]), torch.tensor([0.0])) == 1


def test_psnr_of_a_known_error():
    references = torch.zeros(2, 3, 8, 8)
    images = torch.stack([torch.full((3, 8, 8), 0.02), torch.full((3, 8, 8), 0.2)])
    assert torch.allclose(peak_signal_to_noise_ratio(images, references), torch.tensor([40.0, 20.0]), atol=1e-4)


def test_values_beyond_the_range_cost_nothing_where_the_reference_is_at_its_end():
    references = torch.tensor([-1.0, -1.0, 1.0, 1.0, 0.0, 0.0])
    images = torch.tensor([-1.3, -0.7, 1.2, 0.9, -1.3, 1.2], requires_grad=True)
    clipped = clip_where_reference_is(images, references)
    assert clipped.tolist() == pytest.approx([-1.0, -0.7, 1.0, 0.9, -1.3, 1.2])
    (clipped - references).abs().sum().backward()
    assert images.grad.tolist() == [0.0, 1.0, 0.0, -1.0, -1.0, 1.0]


def test_colour_difference_is_that_of_pillows_chroma_and_blind_to_brightness():
    rng = np.random.default_rng(0)
    pixels = [rng.integers(40, 200, (16, 16, 3), dtype=np.uint8) for _ in range(2)]
    a, b = (torch.from_numpy(part).permute(2, 0, 1)[None] / 1.0 for part in pixels)
    chroma = [np.asarray(Image.fromarray(part).convert("YCbCr"), dtype=np.float32)[..., 1:] for part in pixels]
    assert colour_difference(a, b).item() == pytest.approx(np.abs(chroma[0] - chroma[1]).mean(), abs=0.5)
    assert colour_difference(a + 20, a).item() == pytest.approx(0.0, abs=1e-4)


def test_faint_noise_on_a_flat_region_is_a_great_difference_of_structure_and_a_small_one_of_values():
    torch.manual_seed(0)
    flat = torch.zeros(1, 3, 32, 32)
    noisy = flat + 2 / 127.5 * torch.randn(1, 1, 32, 32)
    brighter = flat + 8 / 127.5
    assert structure_difference(flat, flat).item() == pytest.approx(0.0, abs=1e-4)
    assert structure_difference(brighter, flat).item() < 0.01 < 0.2 < structure_difference(noisy, flat).item()
    textured = torch.rand(1, 1, 32, 32).expand(1, 3, 32, 32) * 2 - 1
    assert structure_difference(textured + noisy, textured).item() < 0.01
    with torch.autocast("cpu", torch.bfloat16):  # as in a mixed-precision run
        assert structure_difference(textured + noisy, textured).item() < 0.01
    half = structure_difference(noisy.half().requires_grad_(), flat.half())
    assert half.dtype == torch.float32 and half.requires_grad and half.item() > 0.2
