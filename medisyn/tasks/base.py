"""What the loop asks of an objective: samples in, a loss out, and a model to export.

- A task is an `nn.Module` whose registered submodules are exactly what is trained; frozen parts are kept outside the
  registry.
- All randomness of an item comes from its seed, a function of (run seed, step, position in the global batch); so the
  loss of an item does not depend on batch size, number of processes or a resume.
"""

import hashlib
import struct
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from medisyn.config import OptimConfig, TrainConfig
from medisyn.data.loading import ImageDataset, load_readable
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline


def item_seed(seed: int, step: int, position: int) -> int:
    """A 63-bit seed for the item at `position` of the global batch of `step`."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, step, position), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_normal(seeds: Tensor, shape: Sequence[int], stream: int = 0) -> Tensor:
    """Standard normal noise, (len(seeds), *shape): row i depends on seeds[i] and `stream` only."""
    return torch.stack([torch.randn(*shape, generator=_generator(seed, stream)) for seed in seeds.tolist()])


def seeded_uniform(seeds: Tensor, count: int, stream: int = 0) -> Tensor:
    """Uniforms in [0, 1), (len(seeds), count): row i depends on seeds[i] and `stream` only."""
    return torch.stack([torch.rand(count, generator=_generator(seed, stream)) for seed in seeds.tolist()])


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed + stream * 0x9E3779B97F4A7C15) % (1 << 63))


POSTERIOR = 0  # stream of the draw from an autoencoder's posterior


def within(timesteps: Tensor, interval: tuple[float, float], count: int) -> Tensor:
    """Whether timesteps (B,) lie in an interval of fractions of all `count` of them; bool (B,)."""
    low, high = (bound * count for bound in interval)
    return (timesteps >= low) & (timesteps <= high)


def draw_latents(pipe: MediSynPipeline, batch: Mapping[str, Tensor]) -> Tensor:
    """Latents on the UNet's scale, float32 (B, C, h, w): of an autoencoder with a posterior, one draw for each item.

    Args:
        pipe: Whose autoencoder made the moments.
        batch: "mean" and perhaps "logvar" (B, C, h, w), as `LatentCache.moments` gives them, and "seed" (B,).
    """
    latents = batch["mean"].float().to(pipe.device)
    if "logvar" in batch:
        noise = seeded_normal(batch["seed"], latents.shape[1:], POSTERIOR).to(latents.device)
        latents = latents + torch.exp(0.5 * batch["logvar"].float().to(latents.device)) * noise
    return pipe.scale_latents(latents)


class TrainingTask(nn.Module):
    """Base of all objectives. `forward(batch, step)` returns {"loss": scalar, metric: scalar, ...}."""

    config: TrainConfig
    row_weights: np.ndarray | None = None  # sampling weight of each training row; None: every row once per epoch

    @abstractmethod
    def __len__(self) -> int:
        """Number of training rows."""

    @abstractmethod
    def sample(self, row: int, rng: np.random.Generator) -> dict[str, Any]:
        """One training item; `rng` is the item's own."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of items."""
        return default_collate(samples)

    def parameter_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """Parameter groups for AdamW: no weight decay on biases and normalisation (tensors of one dimension)."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": optim.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def averaged_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of which an exponential moving average is kept; the averaged ones are exported."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def validate(self, count: int) -> Mapping[str, float]:
        """Metrics on (at most) `count` validation images, at fixed noise."""
        return {}

    def preview(self) -> Image.Image | None:
        """A grid at fixed seeds, or None."""
        return None

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the trained model as stock components."""


def load_splits(config: TrainConfig) -> tuple[ImageDataset, ImageDataset | None]:
    """Training and validation images: two data sets, or one with `validation_fraction` of the groups held out.

    Without `data.group_column` each image is a group of its own, with a warning.
    """
    images = load_readable(config.data)
    if config.validation_fraction:
        return images.split_by_group(config.validation_fraction, by_image=True)
    return images, None if config.validation is None else load_readable(config.validation)


def image_record(images: ImageDataset) -> dict[str, Any]:
    """The training record of a data set: hashes of its readable images, and its sources with their licences."""
    return {"hashes": sorted({found for found in images.hashes() if found}), "datasets": images.provenance()}


def image_grid(images: Tensor, columns: int) -> Image.Image:
    """Images (N, 3, H, W) in [-1, 1] as one picture with `columns` per row."""
    from torchvision.utils import make_grid

    grid = make_grid(images.float().clamp(-1, 1).add(1).div(2), nrow=columns, padding=2)
    return Image.fromarray(grid.mul(255).round().byte().permute(1, 2, 0).cpu().numpy())
