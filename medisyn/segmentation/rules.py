"""Which unnamed segments are the structure: rules that read the image and never a mask.

- A rule says in words what sets the structure apart (dark, enclosed, off the midline), measures exactly that, and
  compares with fixed numbers: set by reasoning, then looked at on the first 20 images of each data set (for polyps,
  one of five weightings). `scripts/segmentation.py` reports the images after those beside all.
- Segments with the same numbers in several images (`clusters`) are described over all of them together and named once;
  of DiffSeg, each image has segments of its own.
- The counterpart that looks at the mask, the best match, is in `medisyn.evaluation.segmentation` and called so.

    names = choose("lungs", describe(segments, pixels))        # [1, 3, 5]
    mask = torch.isin(segments, torch.tensor(names))
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medisyn.prompts import caption

RING = 0.06  # of the side: what counts as the border of an image
STRIP = 0.10  # of the width: what counts as the midline
SMALLEST = 0.01  # share of the image under which a segment is noise
BLACK = -0.9  # pixels darker than that, in [-1, 1], are outside of the body or the scope


@dataclass(frozen=True)
class Segment:
    """What a rule knows of a segment; over all images that share its number.

    Attributes:
        number: Its number.
        share: Of the pixels, 0..1.
        border: How much more often than elsewhere its pixels lie on the border of the image: 1 as often, 0 never.
        midline: The same of the vertical strip in the middle.
        brightness: Its mean, less the mean of all pixels that are not black, in standard deviations of those.
        redness: The same of red minus the mean of green and blue.
        distance: Mean distance of its pixels from the middle of the image; the corner has 1.
        paired: Overlap (Dice) with its mirror image about the vertical midline.
    """

    number: int
    share: float
    border: float
    midline: float
    brightness: float
    redness: float
    distance: float
    paired: float


def describe(segments: Tensor, pixels: Tensor) -> list[Segment]:
    """Describe every segment that occurs.

    Args:
        segments: (B, H, W) int64; equal numbers mean equal parts.
        pixels: (B, 3, H, W) in [-1, 1].

    Raises:
        ValueError: The two differ in size.
    """
    if segments.shape != pixels[:, 0].shape:
        raise ValueError(f"segments {tuple(segments.shape)} do not fit images {tuple(pixels.shape)}")
    height, width = segments.shape[-2:]
    rows = ((torch.arange(height) + 0.5) / height * 2 - 1)[:, None].expand(height, width)
    columns = ((torch.arange(width) + 0.5) / width * 2 - 1)[None].expand(height, width)
    ring = torch.maximum(rows.abs(), columns.abs()) > 1 - 2 * RING
    strip = columns.abs() < STRIP
    distance = (rows**2 + columns**2).sqrt() / 2**0.5
    grey, red = pixels.mean(dim=1), pixels[:, 0] - pixels[:, 1:].mean(dim=1)
    body = grey > BLACK
    scaled = [(values - values[body].mean()) / values[body].std().clamp(min=1e-6) for values in (grey, red)]
    described = []
    for number in segments.unique().tolist():
        inside = segments == number
        count = inside.sum()
        mirrored = inside & inside.flip(-1)
        described.append(
            Segment(
                number=number,
                share=float(inside.float().mean()),
                border=float((inside & ring).sum() / count / ring.float().mean()),
                midline=float((inside & strip).sum() / count / strip.float().mean()),
                brightness=float(scaled[0][inside].mean()),
                redness=float(scaled[1][inside].mean()),
                distance=float(distance.expand_as(inside)[inside].mean()),
                paired=float(mirrored.sum() / count),
            )
        )
    return described


def _lungs(segments: Sequence[Segment]) -> list[int]:
    return [one.number for one in segments if one.brightness < 0.1 and one.border < 0.7 and one.midline < 0.7]


def _polyp(segments: Sequence[Segment]) -> list[int]:
    candidates = [one for one in segments if one.border < 0.7 and one.share < 0.4]
    return [max(candidates, key=lambda one: one.redness - 4 * one.distance).number] if candidates else []


@dataclass(frozen=True)
class Rule:
    """A rule, and how a model is best asked for what it names.

    Attributes:
        words: What the rule says.
        names: Segments -> the numbers of those that are the structure.
        prompt: What the images show: a caption of `medisyn.prompts`.
        references: See `segmenter.Settings`; 0 where what the embedded default draws is too unlike the images.
    """

    words: str
    names: Callable[[Sequence[Segment]], list[int]]
    prompt: str
    references: int


# Spine and mediastinum lie on the midline and are bright, shoulders and abdomen reach the border, and what is outside
# of the body is all border. The lung behind the heart is not dark: a segment by meaning holds it with the inner lungs.
# A polyp bulges from the wall into the light: redder than lumen and glare, and the camera is turned to it.
RULES: dict[str, Rule] = {
    "lungs": Rule(
        "every segment that is dark for a body, away from the border of the image, and beside the midline",
        _lungs,
        prompt=caption("chest X-ray", "normal"),
        references=32,
    ),
    "polyp": Rule(
        "of the segments away from the border, below 40 % of the image, the one that is most red for its distance "
        "from the middle",
        _polyp,
        prompt=caption("endoscopy", "polyp"),
        references=0,
    ),
}


def get_rule(name: str) -> Rule:
    """A rule by name. Raises ValueError listing them."""
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}; valid: {', '.join(RULES)}")
    return RULES[name]


def name_segments(segments: Tensor, pixels: Tensor, rule: str, together: bool) -> Tensor:
    """Masks (B, H, W) bool of the segments that a rule takes for the structure; empty where it finds none.

    Args:
        segments: (B, H, W) int64.
        pixels: (B, 3, H, W) in [-1, 1].
        rule: One of `RULES`.
        together: Whether equal numbers mean equal parts in all images; otherwise each image is looked at by itself.
    """
    if not together:
        parts = zip(segments.split(1), pixels.split(1), strict=True)
        return torch.cat([name_segments(one, image, rule, True) for one, image in parts])
    return torch.isin(segments, torch.tensor(choose(rule, describe(segments, pixels)), dtype=torch.int64))


def choose(rule: str, segments: Sequence[Segment]) -> list[int]:
    """Numbers of the segments that a rule takes for the structure, perhaps none; small ones never count.

    Raises:
        ValueError: No such rule; the message lists them.
    """
    return get_rule(rule).names([one for one in segments if one.share >= SMALLEST])
