"""Training images with what is computed from them once, alone or mixed with images that keep a model's memory.

- Rows of a mixture are those of its parts, one after the other; which share of a batch comes from which part is a
  matter of sampling weights.
- A model's own drawings serve as its memory where its training images are not at hand (the class-specific prior
  preservation of DreamBooth, Ruiz et al. 2023, section 3.2, for every kind of image that the base knows).

    data = MixedImages([new, prior])
    data.moments(row)["mean"], data.embeddings("text", rows)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from medisyn.config import DataConfig, PriorConfig
from medisyn.data.cache import EmbeddingCache, LatentCache
from medisyn.data.loading import ImageDataset
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from medisyn.prompts import all_captions

Flips: TypeAlias = Sequence[bool] | np.ndarray | bool  # one for each row, or one for all

PRIOR_SEED = 1_000_000  # of the first image that a base draws


@dataclass(frozen=True)
class CachedImages:
    """Images with latent moments, and with embeddings by kind of condition where they are cached."""

    images: ImageDataset
    latents: LatentCache
    embeds: Mapping[str, EmbeddingCache]

    def __len__(self) -> int:
        return len(self.images)

    def moments(self, row: int, flip: bool = False) -> dict[str, Tensor]:
        """As `LatentCache.moments`."""
        return self.latents.moments(row, flip=flip)

    def embeddings(self, kind: str, rows: Sequence[int], flips: Flips = False) -> Tensor | None:
        """Embeddings of these rows, (B, T, width); None where this kind is not cached."""
        cache = self.embeds.get(kind)
        return None if cache is None else cache.embeddings(rows, cache.key["flips"] & np.asarray(flips))

    def examples(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Caption and labels of these rows."""
        return [{"caption": self.images.captions[row], "labels": self.images.labels[row]} for row in rows]


@dataclass(frozen=True)
class MixedImages:
    """Several `CachedImages` as one, with the same methods."""

    parts: Sequence[CachedImages]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def moments(self, row: int, flip: bool = False) -> dict[str, Tensor]:
        """As `CachedImages.moments`."""
        part, row = self._locate(row)
        return self.parts[part].moments(row, flip)

    def embeddings(self, kind: str, rows: Sequence[int], flips: Flips = False) -> Tensor | None:
        """As `CachedImages.embeddings`."""
        flags = np.broadcast_to(flips, len(rows))
        found = []
        for part, places in self._runs(rows):
            embeds = self.parts[part].embeddings(kind, [row for _, row in places], flags[[i for i, _ in places]])
            if embeds is None:
                return None
            found.append(embeds)
        return torch.cat(found)

    def examples(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """As `CachedImages.examples`."""
        located = [self._locate(row) for row in rows]
        return [self.parts[part].examples([row])[0] for part, row in located]

    def _locate(self, row: int) -> tuple[int, int]:
        for number, part in enumerate(self.parts):
            if row < len(part):
                return number, row
            row -= len(part)
        raise IndexError(f"row is past the end of {len(self)} images")

    def _runs(self, rows: Sequence[int]) -> list[tuple[int, list[tuple[int, int]]]]:
        """Neighbouring rows of one part together: (part, [(position in `rows`, row in the part), ...])."""
        located = [(i, *self._locate(row)) for i, row in enumerate(rows)]
        runs = groupby(located, key=lambda each: each[1])
        return [(part, [(i, row) for i, _, row in members]) for part, members in runs]


def mixing_weights(weights: Sequence[np.ndarray], fraction: float) -> np.ndarray:
    """Sampling weights of a mixture of two: `fraction` of the draws go to the second; sums to 1."""
    own, prior = (each / each.sum() for each in weights)
    return np.concatenate([(1 - fraction) * own, fraction * prior])


def prior_data(pipe: MediSynPipeline, prior: PriorConfig, data: DataConfig, folder: Path, base: str) -> DataConfig:
    """Where the images of the base's own kind are: the configured source, or what the base draws into `folder`.

    Args:
        pipe: The base, before an adapter is put into it.
        prior: What is asked for.
        data: Of the training images, for resolution and crop.
        folder: For the drawn images; what is there already is not drawn again.
        base: The base's name, for the record in the images.
    """
    shape: dict[str, Any] = {"resolution": data.resolution, "crop": data.crop}
    if prior.source is not None:
        return DataConfig(source=prior.source, caption_column=prior.caption_column, **shape)
    from medisyn.generation.synthesize import Request, make_requests, synthesize

    texts = prior.prompts or all_captions()
    templates = [Request(prompt=text) for text in texts] if "text" in pipe.kinds else [Request()]
    # spread evenly: none of the texts is left out where their number does not divide that of the images
    spread = [templates[place * len(templates) // prior.num_images] for place in range(prior.num_images)]
    requests = make_requests(spread, seed=PRIOR_SEED)
    pipe.set_progress_bar_config(disable=True)
    synthesize(pipe, requests, folder, batch_size=16, model=base, progress=True)
    return DataConfig(source=str(folder), caption_column="caption" if "text" in pipe.kinds else None, **shape)
