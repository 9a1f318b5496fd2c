"""From an image file's pixels to the tensor a model sees.

- `to_rgb` says once what every pixel format means, so that training, caching, hashing and evaluation agree.
- `Preprocessor` resizes with antialiasing and crops; without a random generator it is deterministic (centre crop, no
  flip), with one it depends on that generator alone.
- `Preprocessor.key()` names everything that changes the deterministic tensor; it is part of every cache key.

    tensor = Preprocessor(128)(Image.open("chest.png"))
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from ..config import DataConfig

CROPS = ("center", "random", "pad")
PIXELS_VERSION = "v1"  # of the rules in `to_rgb`; part of every key that depends on decoded pixels
_ORIENTATION = 0x0112  # EXIF tag


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, upright.

    - EXIF orientation is applied. Of an animation or a multi-page file the current (first) frame is taken.
    - Transparency (RGBA, LA, palettes with a transparent entry) is laid over black, the background of most modalities.
    - Integers of more than 8 bits keep their absolute scale: 0 becomes 0, and the white point is 255, 4095 or 65535,
      the smallest of the usual detector depths (8, 12, 16 bit) that holds the image's maximum. Integers outside
      0..65535 have no such depth and are stretched from minimum to maximum.
    - Floats within [0, 1] are multiplied by 255; other floats are stretched from minimum to maximum; values that are
      not finite count as the minimum.
    - Grayscale, 1-bit, CMYK, YCbCr, Lab and HSV are converted by Pillow.
    """
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image).convert("RGB")
    return image.convert("RGB")


def _to_uint8(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        values = values.astype(np.float64)
        finite = np.isfinite(values)
        values = np.where(finite, values, values[finite].min() if finite.any() else 0.0)
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f" and 0 <= low and high <= 1:
        low, high = 0.0, 1.0
    elif values.dtype.kind != "f" and 0 <= low and high <= 65535:
        low, high = 0.0, float(next(white for white in (255, 4095, 65535) if high <= white))
    scaled = (values.astype(np.float64) - low) * 255.0 / max(high - low, 1e-12)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Preprocessor:
    """Resize and crop an image to a square tensor.

    Attributes:
        resolution: the size, in pixels, to which the shorter side (`center`, `random`) or the longer side (`pad`) is
            resized, by bicubic interpolation with antialiasing.
        crop: `center`: the middle square; `random`: a square at a random place; `pad`: the whole image on black.
        horizontal_flip: mirror half of the images (only when called with a generator).
        random_crop_size: side of the random square, in pixels, at most `resolution`; None: `resolution`.
    """

    resolution: int
    crop: Literal["center", "random", "pad"] = "center"
    horizontal_flip: bool = False
    random_crop_size: int | None = None

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"unknown crop {self.crop!r}; valid: {', '.join(CROPS)}")
        if self.resolution < 1:
            raise ValueError(f"resolution must be at least 1 pixel, not {self.resolution}")
        if self.random_crop_size is not None and self.crop != "random":
            raise ValueError(f"random_crop_size={self.random_crop_size} needs crop='random', not {self.crop!r}")
        if self.random_crop_size is not None and self.random_crop_size > self.resolution:
            raise ValueError(f"random_crop_size={self.random_crop_size} exceeds the resolution {self.resolution}")

    @classmethod
    def from_config(cls, config: DataConfig) -> "Preprocessor":
        """The preprocessing that a data configuration asks for."""
        return cls(config.resolution, config.crop, config.horizontal_flip, config.random_crop_size)

    @property
    def size(self) -> int:
        """Side of the tensor, in pixels."""
        return self.random_crop_size or self.resolution

    def key(self) -> str:
        """What the deterministic tensor depends on, as a string that stays the same between versions and machines."""
        return f"{PIXELS_VERSION} {self.crop} {self.resolution} to {self.size} bicubic"

    def crop_image(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
        """The resized and cropped image, RGB, `size` × `size`; `rng` places the random crop, None the centre one."""
        image = to_rgb(image)
        width, height = image.size
        if self.crop == "pad":
            scale = self.resolution / max(width, height)
        else:
            scale = self.resolution / min(width, height)
        # An extreme strip must not lose its short side, and rounding must not lose a pixel of the crop.
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
        if target != image.size:
            image = image.resize(target, Image.Resampling.BICUBIC)
        if image.size == (self.size, self.size):
            return image
        if self.crop == "pad":
            canvas = Image.new("RGB", (self.size, self.size))
            canvas.paste(image, ((self.size - image.width) // 2, (self.size - image.height) // 2))
            return canvas
        room = (image.width - self.size, image.height - self.size)
        if self.crop == "random" and rng is not None:
            left, top = int(rng.integers(room[0] + 1)), int(rng.integers(room[1] + 1))
        else:
            left, top = room[0] // 2, room[1] // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def __call__(
        self, image: Image.Image, rng: np.random.Generator | None = None, flip: bool | None = None
    ) -> torch.Tensor:
        """Tensor (3, size, size), float32 in [-1, 1].

        Args:
            image: of any mode, see `to_rgb`.
            rng: draws the random crop and the flip; None: the centre crop and no flip.
            flip: mirror or not, whatever `horizontal_flip` and `rng` say (an eye of stated side is never mirrored).
        """
        pixels = np.array(self.crop_image(image, rng))
        if flip is None:
            flip = self.horizontal_flip and rng is not None and bool(rng.random() < 0.5)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        tensor = tensor.div_(127.5).sub_(1.0)
        return tensor.flip(-1) if flip else tensor
