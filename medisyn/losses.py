"""Losses as pure functions on tensors, each with its paper and equation.

- Nothing here knows a model, a configuration or a batch layout; every function takes and returns tensors.
- Signal-to-noise ratios, velocities and noising come from diffusers' schedulers and `training_utils`.

    weights = min_snr_weights(snr, gamma=5.0, prediction_type="v_prediction")  # (B,)
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def diffusion_target(scheduler, prediction_type: str, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet is asked to predict: the noise, the velocity or the clean sample.

    Args:
        scheduler: a diffusers scheduler with `get_velocity` (DDPM, DDIM).
        prediction_type: `epsilon` (Ho et al. 2020, eq. 14), `v_prediction` (Salimans & Ho 2022, app. D) or `sample`.
        clean: scaled latents, (B, C, H, W).
        noise: standard normal, same shape.
        timesteps: integers in [0, num_train_timesteps), (B,).

    Raises:
        ValueError: unknown prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    if prediction_type == "sample":
        return clean
    raise ValueError(f"unknown prediction type {prediction_type!r}; valid: epsilon, v_prediction, sample")


def min_snr_weights(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-gamma loss weights (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    min(SNR, gamma) weighs the error of the clean sample; divided by SNR for a noise target, by SNR + 1 for a velocity.

    Args:
        snr: signal-to-noise ratio alpha_bar / (1 - alpha_bar), (B,), >= 0 (0 at a zero terminal SNR).
        gamma: cap, > 0; 0 means no weighting.
        prediction_type: `epsilon`, `v_prediction` or `sample`.
    """
    if gamma == 0:
        return torch.ones_like(snr)
    capped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return capped / snr.clamp(min=1e-8)
    if prediction_type == "v_prediction":
        return capped / (snr + 1)
    return capped


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """Kullback-Leibler divergence of N(mean, exp(logvar)) from N(0, 1), mean per element (Kingma & Welling 2014)."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def discriminator_hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of a discriminator (Lim & Ye 2017, eq. 3); logits of any shape."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def clip_where_reference_is(images: Tensor, references: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """The images, with values beyond the range replaced by its end where the reference lies there.

    Pixels are clipped in the end: an autoencoder that must not go below a black background can hardly reach it. No
    gradient flows where a value is replaced. Any shape.
    """
    beyond = ((references <= low) & (images < low)) | ((references >= high) & (images > high))
    return torch.where(beyond, references, images)


def colour_difference(images: Tensor, references: Tensor) -> Tensor:
    """Mean absolute error of Cb and Cr (ITU-R BT.601, full range), a scalar; (B, 3, H, W) of any one scale."""
    matrix = images.new_tensor([[-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    return torch.einsum("kc,bchw->bkhw", matrix, images - references).abs().mean()


def peak_signal_to_noise_ratio(images: Tensor, references: Tensor) -> Tensor:
    """PSNR in dB per image for images in [-1, 1] (data range 2), (B, ...) -> (B,)."""
    error = (images - references).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(4.0 / error.clamp(min=1e-10))
