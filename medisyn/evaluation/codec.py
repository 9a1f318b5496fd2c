"""The last step that two sets of images have in common: a lossy codec.

Real images often come from JPEG or WebP files and drawn ones do not, and features see the difference (Parmar et al.
2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", for JPEG). Passed through one codec, both have
its traces.

    codec = Codec.parse("webp:90")
    codec(image)
"""

import io
from dataclasses import dataclass

from PIL import Image

from medisyn.prompts import choose

FORMATS = {"jpeg": "JPEG", "webp": "WEBP"}


@dataclass(frozen=True)
class Codec:
    """Writes and reads an image.

    Attributes:
        name: One of `FORMATS`.
        quality: 1 to 100.
    """

    name: str
    quality: int

    @classmethod
    def parse(cls, text: str) -> "Codec":
        """Of "webp:90" or "jpeg:75".

        Raises:
            ValueError: Another format, or no quality from 1 to 100.
        """
        name, _, quality = text.partition(":")
        choose("codec", name, FORMATS)
        if not quality.isdecimal() or not 1 <= int(quality) <= 100:
            raise ValueError(f"a codec is FORMAT:QUALITY, from 1 to 100, such as {name}:90, not {text!r}")
        return cls(name, int(quality))

    def __call__(self, image: Image.Image) -> Image.Image:
        """The RGB image as it comes back."""
        file = io.BytesIO()
        image.save(file, FORMATS[self.name], quality=self.quality)
        return Image.open(file).convert("RGB")

    def __str__(self) -> str:
        """As it was parsed."""
        return f"{self.name}:{self.quality}"
