"""Losses against their formulas."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from medisyn.losses import (
    diffusion_target,
    discriminator_hinge_loss,
    kl_to_standard_normal,
    min_snr_weights,
    peak_signal_to_noise_ratio,
)


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
