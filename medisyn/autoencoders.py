"""Starting and finishing an autoencoder: the best linear code as initial weights, and the scale of its latents.

- `initialize_from_pca` starts an `AutoencoderDC` (DC-AE, Chen et al. 2024, arXiv 2410.10733) at the principal
  components of its patches. Its residual blocks begin as identities, so the untrained encoder is linear and its code
  is as good as a linear one can be.
- `fit_latent_scale` makes the latents' second moment one. Diffusion needs that, and a wrong scale is a classic silent
  mistake.

    initialize_from_pca(vae, images)            # images (N, 3, H, W) in [-1, 1]
    report = fit_latent_scale(vae, images)      # {"before": 1.83, "scaling_factor": 1.0, ...}
"""

import math
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, ResBlock
from torch import Tensor, nn

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderDC


@torch.no_grad()
def initialize_from_pca(vae: AutoencoderDC, images: Tensor) -> None:
    """Set the encoder to the PCA code of its patches; decoder residual branches start at a tenth of their size.

    The down convolutions but the last pass the pixels through (centre tap), the last one keeps the principal
    components of what it gets, and `conv_out` is the least-squares map from its features to the PCA of whole patches,
    each component scaled by the fourth root of its share of the variance (so that strong components stay stronger,
    but not by orders of magnitude).

    Args:
        vae: with ResBlocks only, no layers in the first stage and `encoder_out_shortcut=False`.
        images: (N, 3, H, W) in [-1, 1]; some thousands are enough.

    Raises:
        ValueError: another architecture.
    """
    if not isinstance(vae, AutoencoderDC):
        raise ValueError(f"the PCA start (pca_images) needs an AutoencoderDC, not a {type(vae).__name__}")
    config = vae.config
    blocks = [module for module in vae.encoder.modules() if isinstance(module, DCDownBlock2d)]
    if config.encoder_layers_per_block[0] != 0 or config.encoder_out_shortcut or not all(b.downsample for b in blocks):
        raise ValueError(
            "the PCA start needs an AutoencoderDC with encoder_layers_per_block[0]=0, encoder_out_shortcut=False "
            "and pixel_unshuffle downsampling"
        )
    for module in vae.encoder.modules():
        if isinstance(module, ResBlock):
            module.norm.weight.zero_()
            module.norm.bias.zero_()
    for module in vae.decoder.modules():
        if isinstance(module, ResBlock):
            module.norm.weight.fill_(0.1)

    # Each down block adds averages of its input's channels to the first outputs; the code is routed past them.
    features, informative, occupied = images, list(range(config.in_channels)), config.in_channels
    for block, next_block in zip(blocks, [*blocks[1:], None], strict=True):
        averaged = math.ceil(occupied * 4 / block.group_size / 4) if block.shortcut else 0
        if next_block is None:
            free = block.conv.out_channels - averaged
            _set_rows(block.conv, averaged, _principal_components(features, free)[0])
            break
        _set_rows(block.conv, averaged, torch.eye(block.conv.in_channels)[informative])
        features = block(features)
        occupied = (averaged + len(informative)) * 4
        informative = list(range(averaged * 4, occupied))

    patch = 2 ** len(blocks)
    patches = nn.functional.pixel_unshuffle(images, patch)
    components, variances = _principal_components(patches, config.latent_channels)
    scale = (variances / variances[0]).pow(0.25) / variances.sqrt()
    code = torch.einsum("kc,nchw->nkhw", components * scale[:, None], patches - patches.mean((0, 2, 3), keepdim=True))
    inputs = _vectors(blocks[-1](features))
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
    solution = torch.linalg.lstsq(inputs, _vectors(code)).solution  # (features + 1, latent channels)
    vae.encoder.conv_out.weight.zero_()
    vae.encoder.conv_out.weight[:, :, 1, 1] = solution[:-1].T
    vae.encoder.conv_out.bias.copy_(solution[-1])


@torch.no_grad()
def fit_latent_scale(vae: Autoencoder, latents: Tensor) -> dict[str, Any]:
    """Bring the latents' second moment to one and write how into the configuration.

    `AutoencoderKL`: `scaling_factor` of the configuration becomes 1 / standard deviation (Rombach et al. 2022,
    app. G). `AutoencoderDC`: each channel's root mean square is folded into the weights around the latent, and
    `scaling_factor` is 1; with channel-averaging shortcuts around the latent only the common factor can be written.

    Args:
        vae: changed in place.
        latents: unscaled means of its code, (N, C, h, w).

    Returns:
        `channel_rms_before` (list) and `scaling_factor`.
    """
    channel_rms = latents.square().mean((0, 2, 3)).sqrt()
    report: dict[str, Any] = {"channel_rms_before": [round(value, 4) for value in channel_rms.tolist()]}
    if isinstance(vae, AutoencoderKL):
        scale = 1.0 / latents.std().item()
        vae.register_to_config(scaling_factor=scale)
        return report | {"scaling_factor": scale}
    if vae.config.encoder_out_shortcut or vae.config.decoder_in_shortcut:
        scale = 1.0 / latents.square().mean().sqrt().item()
        vae.register_to_config(scaling_factor=scale)
        return report | {"scaling_factor": scale}
    vae.encoder.conv_out.weight.div_(channel_rms[:, None, None, None])
    vae.encoder.conv_out.bias.div_(channel_rms)
    vae.decoder.conv_in.weight.mul_(channel_rms[None, :, None, None])
    vae.register_to_config(scaling_factor=1.0)
    return report | {"scaling_factor": 1.0}


def _set_rows(convolution: nn.Conv2d, first: int, rows: Tensor) -> None:
    """Outputs from `first` on are linear maps `rows` (n, in channels) of the centre pixel; all others are zero."""
    convolution.weight.zero_()
    convolution.bias.zero_()
    convolution.weight[first : first + len(rows), :, 1, 1] = rows


def _vectors(features: Tensor, most: int = 100_000) -> Tensor:
    """(N, C, h, w) as (about `most` or all of N h w, C), evenly thinned."""
    vectors = features.movedim(1, -1).flatten(0, 2)
    return vectors[:: max(1, len(vectors) // most)]


def _principal_components(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Principal directions (count, C), strongest first, and their variances, of (N, C, h, w) over N, h, w."""
    vectors = _vectors(features).double()
    values, directions = torch.linalg.eigh(torch.cov(vectors.T))
    order = values.argsort(descending=True)[:count]
    return directions[:, order].T.float(), values[order].clamp(min=1e-8).float()
