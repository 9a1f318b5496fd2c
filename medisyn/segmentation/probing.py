"""What a UNet makes of real images: encode, add the noise of one timestep, run the UNet once, look inside.

- The noise depends on the seed and the draw alone and is the same for all images, so what is read of an image does not
  depend on its place in a batch. Draws are averaged where a method says so.
- Noise is added as in training (`DDPMScheduler`), whatever sampler the pipeline carries.
- Conditions go through the pipeline's own `encode_prompt` and `unet_conditions`; without a prompt they are null.

    probe = Probe(timestep=300, prompt="frontal chest X-ray of a child with clear lungs")
    features = unet_features(pipe, encode_images(pipe, images), probe, "up_blocks.1")   # (B, C, h, w)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor

from medisyn.data.preprocessing import Preprocessor
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline

BATCH = 32  # images that pass the UNet at once


@dataclass(frozen=True)
class Probe:
    """How the UNet is asked about an image.

    Attributes:
        timestep: Whose noise is added, 0 <= timestep < training timesteps.
        prompt: Text condition; None: null.
        seed: Of the noise.
        draws: How many noises are averaged over.
    """

    timestep: int = 300
    prompt: str | None = None
    seed: int = 0
    draws: int = 2

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, not {self.draws}")


def image_tensor(pipe: MediSynPipeline, images: Sequence[Image.Image]) -> Tensor:
    """Images as (B, 3, S, S) in [-1, 1]: the middle square at the side S in pixels that the model works at."""
    size = pipe.unet.config.sample_size or 64
    side = (size if isinstance(size, int) else min(size)) * pipe.vae_scale_factor
    return torch.stack([Preprocessor(side)(image) for image in images])


@torch.no_grad()
def encode_images(pipe: MediSynPipeline, images: Sequence[Image.Image]) -> Tensor:
    """Latents (B, C, h, w) on the UNet's scale: the mean of the autoencoder's posterior.

    Raises:
        ValueError: No images.
    """
    if not images:
        raise ValueError("there are no images to segment")
    parts = image_tensor(pipe, images).split(BATCH)
    return torch.cat([pipe.scale_latents(pipe.encode_latents(part)["mean"]) for part in parts])


@torch.no_grad()
def run_unet(pipe: MediSynPipeline, latents: Tensor, probe: Probe) -> Iterator[tuple[slice, int]]:
    """Run the UNet on noised latents, batch by batch and draw by draw, and say after each run what it was.

    Args:
        pipe: Whose UNet runs; hooks or processors on it see every run.
        latents: (B, C, h, w), see `encode_images`.
        probe: Timestep, condition, noise.

    Yields:
        The slice of images of the run, and the number of its draw.

    Raises:
        ValueError: A timestep that the model was not trained on, or a prompt for a model without text condition.
    """
    noising = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    last = noising.config.num_train_timesteps - 1
    if not 0 <= probe.timestep <= last:
        raise ValueError(f"timestep must be in 0..{last}, not {probe.timestep}")
    if probe.prompt is not None and "text" not in pipe.kinds:
        raise ValueError(f"prompt: this model has no text condition; it has: {', '.join(pipe.kinds) or 'none'}")
    tokens = None if probe.prompt is None else pipe.encode_prompt(pipe.known_spelling(probe.prompt))
    timestep = torch.tensor([probe.timestep], device=pipe.unet.device)
    for start in range(0, len(latents), BATCH):
        part = latents[start : start + BATCH].to(pipe.unet.device)
        given = {} if tokens is None else {"prompt_embeds": tokens.expand(len(part), -1, -1)}
        conditions = pipe.unet_conditions(**given, batch_size=len(part))
        for draw in range(probe.draws):
            generator = torch.Generator().manual_seed(probe.seed + draw)
            noise = torch.randn(part.shape[1:], generator=generator).to(part).expand_as(part)
            noised = noising.add_noise(part, noise, timestep).to(pipe.unet.dtype)
            pipe.unet(noised, timestep.expand(len(part)), **conditions)
            yield slice(start, start + len(part)), draw


def feature_layers(unet: Any) -> list[str]:
    """Names of the blocks and residual blocks whose output is a feature map, from the input to the output."""
    names = [f"down_blocks.{index}" for index, _ in enumerate(unet.down_blocks)]
    names += ["mid_block"] if getattr(unet, "mid_block", None) is not None else []
    for index, block in enumerate(unet.up_blocks):
        names += [f"up_blocks.{index}.resnets.{inner}" for inner, _ in enumerate(getattr(block, "resnets", ()))]
        names.append(f"up_blocks.{index}")
    return names


@torch.no_grad()
def unet_features(pipe: MediSynPipeline, latents: Tensor, probe: Probe, layer: str) -> Tensor:
    """The output of one layer, averaged over draws of the noise: (B, C, h, w) float32 on the CPU.

    Baranchuk et al. 2022 (arXiv 2112.03126) and DIFT (Tang et al. 2023, arXiv 2306.03881): decoder features of a
    diffusion model, at a moderate timestep, say what is where.

    Raises:
        ValueError: The UNet has no such layer; the message lists the layers.
    """
    with record_layer(pipe.unet, layer) as outputs:
        total: Tensor | None = None
        for images, _ in run_unet(pipe, latents, probe):
            output = outputs.pop().float().cpu() / probe.draws
            total = output.new_zeros(len(latents), *output.shape[1:]) if total is None else total
            total[images] += output
    return total


@contextmanager
def record_layer(unet: Any, layer: str) -> Iterator[list[Tensor]]:
    """Collect the outputs of a layer (the first one, of a block that has several) while the context lasts."""
    modules = dict(unet.named_modules())
    if layer not in feature_layers(unet):
        raise ValueError(f"this UNet has no layer {layer!r}; its layers are: {', '.join(feature_layers(unet))}")
    outputs: list[Tensor] = []
    handle = modules[layer].register_forward_hook(
        lambda _module, _inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        yield outputs
    finally:
        handle.remove()
