"""Training images in the memory of a GPU, in many views.

- More views than the mirror image: quarter turns where there is no upper side, and shifts of a few pixels, which fall
  on other places of the autoencoder's blocks.
- Latents of the views are kept, and some of them are made anew from the pixels now and then.

    images = ResidentImages(pipe, dataset, config, paraphrase=0.4)
    rows = images.draw_rows(1024)
    images.latents[rows, 0]
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor

from medisyn.config import DataConfig
from medisyn.data.loading import ImageDataset
from medisyn.data.preprocessing import Preprocessor
from medisyn.paraphrases import perhaps_paraphrase
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline

NO_UPPER_SIDE = {"histopathology", "blood smear microscopy", "dermoscopy"}
VIEWS = 8  # of an image; the first two are the image and its mirror image
WORDINGS = 8  # of a caption; the first one is the caption
SHIFT = 3  # pixels at most
CHUNK = 512  # images


class ResidentImages:
    """Training images in the memory of the pipeline's device, with many views; a `CachedImages` without `moments`.

    Attributes:
        latents: Scaled, float16 (N, VIEWS, C, h, w).
        mirrored: Whether a view is a mirror image, (N, VIEWS) of 0 and 1.
        tokens: Of the wordings of each caption, (N, WORDINGS, window).
    """

    def __init__(self, pipe: MediSynPipeline, images: ImageDataset, data: DataConfig, paraphrase: float) -> None:
        self.pipe, self.images, self.device = pipe, images, pipe.device
        preprocessor = Preprocessor.from_config(data)
        with ThreadPoolExecutor() as pool:
            rows = pool.map(lambda row: (preprocessor(images.image(row)) + 1) * 127.5, range(len(images)))
            self.pixels = torch.stack([pixels.round().byte() for pixels in rows]).to(self.device)
        self.may_flip = torch.from_numpy(images.may_flip() & data.horizontal_flip).to(self.device)
        modalities = images.column("modality") if "modality" in images.column_names else [None] * len(images)
        turns = [modality in NO_UPPER_SIDE for modality in modalities]
        self.may_turn = torch.tensor(turns, device=self.device)
        weights = torch.as_tensor(images.sampling_weights())
        self._cumulative = weights.cumsum(0).float().to(self.device)
        self._embeds = self._embed_images() if "image" in pipe.kinds else None
        rng = Random(0)
        shares = [0.0] + [paraphrase] * (WORDINGS - 1)
        texts = [perhaps_paraphrase(caption, share, rng) for caption in images.captions for share in shares]
        self.tokens = self.tokenize(texts).view(len(images), WORDINGS, -1)
        shape = self._encode(self.pixels[:1]).shape[1:]
        self.latents = torch.empty(len(images), VIEWS, *shape, dtype=torch.float16, device=self.device)
        self.mirrored = torch.zeros(len(images), VIEWS, dtype=torch.long, device=self.device)
        for view in range(VIEWS):
            for part in torch.arange(len(images), device=self.device).split(CHUNK):
                self.draw_views(part, torch.full_like(part, view))

    def __len__(self) -> int:
        return len(self.images)

    def embeddings(self, kind: str, rows: Sequence[int], flips: Any = False) -> Tensor | None:
        """As those of `CachedImages`, without mirror images."""
        return self._embeds[list(rows), 0] if kind == "image" and self._embeds is not None else None

    def image_embeds(self, rows: Tensor, views: Tensor) -> Tensor:
        """Embeddings of these views, (B, T, width), those of turned or shifted images without that."""
        return self._embeds[rows, self.mirrored[rows, views]]

    def examples(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """As those of `CachedImages`."""
        return [{"caption": self.images.captions[row], "labels": self.images.labels[row]} for row in rows]

    def draw_rows(self, count: int) -> Tensor:
        """Rows by their sampling weights, (count,)."""
        drawn = torch.searchsorted(self._cumulative, torch.rand(count, device=self.device))
        return drawn.clamp(max=len(self) - 1)

    def tokenize(self, texts: Sequence[str | None]) -> Tensor:
        """Token numbers, (len(texts), window)."""
        options = {"padding": "max_length", "max_length": self.pipe.text_window, "truncation": True}
        tokens = self.pipe.tokenizer([text or "" for text in texts], **options, return_tensors="pt")
        return tokens.input_ids.to(self.device)

    @torch.no_grad()
    def draw_views(self, rows: Tensor, views: Tensor) -> None:
        """Encode these views (B,) of these rows (B,) anew: 0 is the image, 1 its mirror image, others are drawn."""
        pixels, drawn = self.pixels[rows], views > 1

        def chosen() -> Tensor:
            return torch.rand(len(rows), device=self.device) < 0.5

        def apply(where: Tensor, changed: Tensor) -> Tensor:
            return torch.where(where.view(-1, 1, 1, 1), changed, pixels)

        flip = self.may_flip[rows] & ((views == 1) | (drawn & chosen()))
        pixels = apply(flip, pixels.flip(3))
        for turns in (2, 1):  # quarter turns
            pixels = apply(self.may_turn[rows] & drawn & chosen(), pixels.rot90(turns, (2, 3)))
        size, shifted = pixels.shape[-1], (drawn & chosen())[:, None]
        shift = torch.randint(-SHIFT, SHIFT + 1, (len(rows), 2), device=self.device) * shifted
        place = torch.arange(size, device=self.device)
        places = [(place + shift[:, axis, None]).abs() for axis in (0, 1)]
        down, across = (torch.where(where >= size, 2 * (size - 1) - where, where) for where in places)
        item = torch.arange(len(rows), device=self.device)[:, None, None]
        pixels = pixels.permute(0, 2, 3, 1)[item, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)
        self.latents[rows, views] = self._encode(pixels).half()
        self.mirrored[rows, views] = flip.long()

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            images = pixels.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
            return self.pipe.scale_latents(self.pipe.encode_latents(images)["mean"].float())

    @torch.no_grad()
    def _embed_images(self) -> Tensor:
        """Of the images and their mirror images, (N, 2, T, width)."""

        def read(rows: range) -> list[Any]:
            plain = [self.images.image(row) for row in rows]
            views = (plain, [ImageOps.mirror(image) for image in plain])
            return [self.pipe.feature_extractor(view, return_tensors="pt").pixel_values for view in views]

        chunks = [range(start, min(start + CHUNK, len(self))) for start in range(0, len(self), CHUNK)]
        encoder, found = self.pipe.image_encoder, []
        with ThreadPoolExecutor() as pool:
            for views in pool.map(read, chunks):
                outputs = [encoder(view.to(encoder.device, encoder.dtype)) for view in views]
                found.append(torch.stack([output.pooler_output[:, None].float() for output in outputs], dim=1))
        return torch.cat(found)
