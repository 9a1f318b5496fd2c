"""What a frozen encoder says about each image or caption, computed once and read from disk.

- Keyed by content: a row belongs to pixels (or to a caption's text), so identical images share one, the order of the
  data does not matter, and a part of a dataset reads the cache of the whole.
- A folder is bound to a key: encoder weights, precision, preprocessing, flips, content; any other is refused.
- Resumable after a kill at any moment, and safe under `accelerate launch`; memory-mapped float16 (see `storage`).
- Moments are stored, never samples: mean and log-variance, or the latent itself of a deterministic autoencoder.

    cache = build_latent_cache(pipe, images, Preprocessor(128), "latents/", batch_size=32, flips=True)
    latents = pipe.scale_latents(cache.moments([0, 1, 2], flip=[True, False, False])["mean"])
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from PIL import Image, ImageOps

from .preprocessing import PIXELS_VERSION, Preprocessor
from .storage import ArrayCache, digest, fill, write_atomically

if TYPE_CHECKING:
    from ..pipelines.medisyn_pipeline import MediSynPipeline
    from .loading import ImageDataset


# parts of an autoencoder that latents do not depend on: with a decoder tuned anew they stay
DECODING = ("decoder.", "post_quant_conv.")


class LatentCache(ArrayCache):
    """Latent moments of images, unscaled (see `MediSynPipeline.scale_latents`)."""

    def moments(self, index: int | Sequence[int], flip: bool | Sequence[bool] = False) -> dict[str, torch.Tensor]:
        """Float32 (C, h, w) or (B, C, h, w): "mean" and, unless the autoencoder is deterministic, "logvar".

        Args:
            index: one item or several.
            flip: for all or for each, whether the moments are those of the mirrored image.

        Raises:
            ValueError: flipped views were not built, or an image cannot be read.
        """
        names = [name for name in ("mean", "logvar") if name in self._arrays]
        return {name: self.read(name, index, flip) for name in names}


class EmbeddingCache(ArrayCache):
    """Condition embeddings of images or captions."""

    def embeddings(self, index: int | Sequence[int], flip: bool | Sequence[bool] = False) -> torch.Tensor:
        """Float32 (T, width) of one item, or (B, T, width) of several; `flip` as in `LatentCache.moments`."""
        return self.read("embeds", index, flip)


def build_latent_cache(
    pipe: "MediSynPipeline",
    dataset: "ImageDataset",
    preprocessor: Preprocessor,
    folder: str | Path,
    batch_size: int = 32,
    flips: bool = False,
    bf16: bool = False,
) -> LatentCache:
    """Encode what is not encoded yet and open the cache.

    Args:
        pipe: its `encode_latents` is used, on the device where the pipeline is.
        dataset: images; unreadable ones have no row if the dataset skips them.
        preprocessor: must be deterministic (`crop` is not "random"); its `horizontal_flip` is ignored.
        folder: is created; one folder for one key.
        batch_size: images per forward pass.
        flips: encode the mirrored image as a second view.
        bf16: encode under bfloat16 autocast.

    Raises:
        ValueError: a folder with another key, a random crop, no readable image, or values that are not finite.
    """
    if preprocessor.crop == "random":
        raise ValueError("latents of random crops cannot be cached; valid crops: center, pad")

    def load(index: int) -> list[torch.Tensor]:
        image = _readable(dataset, index)
        return [preprocessor(image, flip=flip) for flip in ((False, True) if flips else (False,))]

    def encode(views: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=bf16):
            return pipe.encode_latents(torch.stack(list(views)).to(pipe.device))

    key = {
        "kind": "latents",
        "encoder": module_hash(pipe.vae, without=DECODING),
        "preprocessing": preprocessor.key(),
        "flips": flips,
        "bf16": bf16,
    }
    contents = _image_contents(dataset, Path(folder))
    fill(Path(folder), key, contents, load, encode, batch_size, "encoding latents")
    return LatentCache(folder, contents)


def build_image_embedding_cache(
    pipe: "MediSynPipeline",
    dataset: "ImageDataset",
    folder: str | Path,
    batch_size: int = 32,
    flips: bool = False,
    bf16: bool = False,
) -> EmbeddingCache:
    """Embed each image by `pipe.encode_image`; arguments and errors as in `build_latent_cache`."""

    def load(index: int) -> list[Image.Image]:
        image = _readable(dataset, index)
        return [image, ImageOps.mirror(image)] if flips else [image]

    key = {
        "kind": "image embeddings",
        "encoder": module_hash(pipe.image_encoder),
        "preprocessing": f"{PIXELS_VERSION} {digest(pipe.feature_extractor.to_json_string().encode())}",
        "tokens": pipe.config.image_tokens,
        "flips": flips,
        "bf16": bf16,
    }
    contents = _image_contents(dataset, Path(folder))

    def encode(images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=bf16):
            return {"embeds": pipe.encode_image(list(images))}

    fill(Path(folder), key, contents, load, encode, batch_size, "embedding images")
    return EmbeddingCache(folder, contents)


def build_caption_embedding_cache(
    pipe: "MediSynPipeline",
    captions: Sequence[str | None],
    folder: str | Path,
    batch_size: int = 64,
    bf16: bool = False,
) -> EmbeddingCache:
    """Embed each different caption by `pipe.encode_prompt`; None counts as the empty caption."""
    texts = [caption or "" for caption in captions]
    vocabulary = json.dumps(sorted(pipe.tokenizer.get_vocab().items())).encode()
    key = {
        "kind": "caption embeddings",
        "encoder": module_hash(pipe.text_encoder),
        "preprocessing": f"{digest(vocabulary)} to {pipe.text_window} tokens",
        "flips": False,
        "bf16": bf16,
    }
    contents = [digest(text.encode()) for text in texts]

    def load(index: int) -> list[str]:
        return [texts[index]]

    def encode(prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=bf16):
            return {"embeds": pipe.encode_prompt(list(prompts))}

    fill(Path(folder), key, contents, load, encode, batch_size, "embedding captions")
    return EmbeddingCache(folder, contents)


def module_hash(module: torch.nn.Module, without: tuple[str, ...] = ()) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a module's class, parameter names, types and values.

    Args:
        module: any.
        without: beginnings of the names of parameters that do not count.
    """
    hasher = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(without):
            continue
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()[:16]


def stored_hashes(dataset: "ImageDataset", file: str | Path) -> list[str | None]:
    """`dataset.hashes()`, but images whose encoded bytes are known from an earlier call are not decoded again.

    Args:
        dataset: images.
        file: JSON file of the known hashes; created or extended.
    """
    file = Path(file)
    known: dict[str, str] = {}
    if file.is_file():
        remembered = json.loads(file.read_text("utf-8"))
        known = remembered["hashes"] if remembered["pixels"] == PIXELS_VERSION else {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        encoded = list(pool.map(dataset.file_hash, range(len(dataset)), chunksize=64))
    for index, name in enumerate(encoded):
        if name in known:
            dataset.remember_hash(index, known[name])
    found = dataset.hashes()
    new = {name: content for name, content in zip(encoded, found, strict=True) if name and content}
    if not new.keys() <= known.keys():
        content = json.dumps({"pixels": PIXELS_VERSION, "hashes": known | new})
        write_atomically(file, content.encode())
    return found


def _readable(dataset: "ImageDataset", index: int) -> Image.Image:
    image = dataset.image(index)
    if image is None:  # it had a hash, so it was readable when the build began
        raise ValueError(f"{dataset.skipped[int(dataset.rows[index])]}; it could be read earlier")
    return image


def _image_contents(dataset: "ImageDataset", folder: Path) -> list[str | None]:
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        return stored_hashes(dataset, folder / "hashes.json")
