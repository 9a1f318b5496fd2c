"""How well segments fit masks: Dice and IoU with intervals, the baselines, and the scan that finds model and timestep.

- Two numbers that must not be mixed up: the *rule* names the structure without a mask and is the honest one; the *best
  match* picks the segments by the mask and is an upper bound of every rule.
- Baselines are the same clusters, outlines and rules on other features: the pixels, or those of an encoder. So a gain
  is one of the features.
- The best checkpoint for segmentation comes early in training (DiNO-Diffusion, arXiv 2407.11594), so `scan` takes
  several models and several timesteps. Choose on one part of the images and report on another.

    data = open_masks("segmentation/cxr_lungs/validation-*.parquet")
    score(segmenter.masks(data.images, "lungs"), data.masks)["dice"]    # {"mean": .., "interval": [.., ..]}
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.loading import ImageDataset, load_images
from ..data.preprocessing import Preprocessor
from ..segmentation.clusters import assign, fit_clusters
from ..segmentation.probing import encode_images, image_tensor
from ..segmentation.rules import name_segments
from ..segmentation.segmenter import Segmenter, Settings

if TYPE_CHECKING:
    from ..pipelines.medisyn_pipeline import MediSynPipeline
    from .features import FeatureExtractor

RESAMPLES = 2000
BASELINES = ("pixels", "encoder")


@dataclass(frozen=True)
class MaskedImages:
    """Images with the masks of one structure.

    Attributes:
        images: RGB, of any size.
        masks: (B, S, S) bool, resized and cropped as the images are, and cut at half.
        dataset: What they were read from.
    """

    images: list[Image.Image]
    masks: Tensor
    dataset: ImageDataset


def open_masks(source: str, size: int, mask_column: str = "mask") -> MaskedImages:
    """Read a table with an image and a mask column.

    Args:
        source: See `medisyn.data.loading.load_images`.
        size: Side S of the masks in pixels, that of the segmenter's masks.
        mask_column: Grey images of the images' sizes; above 127 is the structure.

    Raises:
        FileNotFoundError: There is no such source.
        ValueError: No mask column, or an image and its mask differ in size.
    """
    dataset = load_images(source, caption_column=None)
    if mask_column not in dataset.column_names:
        raise ValueError(f"no column {mask_column!r} in {source!r}; columns: {', '.join(dataset.column_names)}")
    shapes = load_images(source, caption_column=None, image_column=mask_column)
    images, masks = [], []
    for index in range(len(dataset)):
        image, mask = dataset.image(index), shapes.image(index)
        if image.size != mask.size:
            raise ValueError(f"row {index} of {source!r}: the mask is {mask.size}, its image {image.size} pixels")
        images.append(image)
        masks.append(Preprocessor(size)(mask).mean(dim=0) > 0)
    return MaskedImages(images, torch.stack(masks), dataset)


# --- measures --------------------------------------------------------------------------------------------------------


def dice(predicted: Tensor, masks: Tensor) -> Tensor:
    """2 |A and B| / (|A| + |B|) of each image, (B,) float64; two empty masks agree (1). Both are (B, H, W) bool."""
    both, total = _overlap(predicted, masks)
    return torch.where(total > 0, 2 * both / total.clamp(min=1), 1.0)


def intersection_over_union(predicted: Tensor, masks: Tensor) -> Tensor:
    """|A and B| / |A or B| of each image, (B,) float64; two empty masks agree (1). Both are (B, H, W) bool."""
    both, total = _overlap(predicted, masks)
    return torch.where(total > 0, both / (total - both).clamp(min=1), 1.0)


def _overlap(predicted: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    if predicted.shape != masks.shape or predicted.dtype != torch.bool or masks.dtype != torch.bool:
        raise ValueError(
            f"masks must be boolean and of one shape, not {tuple(predicted.shape)} {predicted.dtype} and "
            f"{tuple(masks.shape)} {masks.dtype}"
        )
    both = (predicted & masks).sum(dim=(1, 2)).double()
    return both, predicted.sum(dim=(1, 2)).double() + masks.sum(dim=(1, 2)).double()


def best_match(segments: Tensor, masks: Tensor) -> Tensor:
    """The union of segments of each image with the highest Dice, (B, H, W) bool: an upper bound, by the mask.

    Dice is a ratio of sums over segments, so the best union takes segments by falling precision, up to some point.
    """
    best = torch.zeros_like(masks)
    for index, (one, mask) in enumerate(zip(segments, masks, strict=True)):
        total = torch.bincount(one.flatten()).double()
        hit = torch.bincount(one.flatten(), weights=mask.flatten().double())
        order = torch.argsort(hit / total.clamp(min=1), descending=True)
        scores = 2 * hit[order].cumsum(0) / (total[order].cumsum(0) + mask.sum())
        best[index] = torch.isin(one, order[: int(scores.argmax()) + 1])
    return best


def score(predicted: Tensor, masks: Tensor, against: Mapping[str, Tensor] | None = None, seed: int = 0) -> dict:
    """Dice and IoU over images with 95 % percentile intervals over draws of images with replacement.

    Args:
        predicted: (B, H, W) bool.
        masks: (B, H, W) bool.
        against: Name -> other predictions, (B, H, W) bool; the difference in Dice is taken in the same draws.
        seed: Of the draws.

    Returns:
        `images`, `empty` (predictions without a pixel), `dice` and `iou` (each `mean` and `interval`), and
        `dice_gain`: name -> `mean` and `interval`.
    """
    own = dice(predicted, masks).numpy()
    scores: dict[str, Any] = {
        "images": len(masks),
        "empty": int((~predicted.any(dim=2).any(dim=1)).sum()),
        "dice": _mean(own, seed),
        "iou": _mean(intersection_over_union(predicted, masks).numpy(), seed),
    }
    if against:
        scores["dice_gain"] = {name: _mean(own - dice(other, masks).numpy(), seed) for name, other in against.items()}
    return scores


def _mean(values: np.ndarray, seed: int) -> dict:
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), (2.5, 97.5))
    return {"mean": float(values.mean()), "interval": [float(low), float(high)]}


# --- baselines -------------------------------------------------------------------------------------------------------


def baseline_segments(
    kind: str,
    pipe: "MediSynPipeline",
    images: Sequence[Image.Image],
    number: int,
    seed: int = 0,
    together: bool = True,
    extractor: "FeatureExtractor | None" = None,
) -> Tensor:
    """Segments (B, S, S) int64 by k-means on what is there without the diffusion model.

    Args:
        kind: "pixels": the colours; "encoder": the patch tokens of the model's image encoder, the feature map of
            `extractor` where one is given, and else the autoencoder's latents.
        pipe: Gives the size, the autoencoder and the image encoder.
        images: RGB.
        number: Of segments.
        seed: Of k-means.
        together: Cluster all images together, or each by itself.
        extractor: A timm network of `load_extractor`; its deepest map of at least 8 x 8 places is used.

    Raises:
        ValueError: Another kind; the message lists them.
    """
    pixels = image_tensor(pipe, images)
    if kind == "pixels":
        features = pixels
    elif kind == "encoder":
        features = _encoder_features(pipe, images, pixels, extractor)
    else:
        raise ValueError(f"unknown baseline {kind!r}; valid: {', '.join(BASELINES)}")
    refine = kind != "pixels"  # colours have the outlines of the image already
    if together:
        return assign(fit_clusters(features, number, seed), features, pixels, refine)
    parts = zip(features.split(1), pixels.split(1), strict=True)
    return torch.cat([assign(fit_clusters(one, number, seed), one, image, refine) for one, image in parts])


@torch.no_grad()
def _encoder_features(pipe, images: Sequence[Image.Image], pixels: Tensor, extractor) -> Tensor:
    if extractor is not None:
        batch = torch.stack([extractor.transform(image) for image in images]).to(extractor.device)
        maps = [extractor.network.forward_intermediates(part, intermediates_only=True) for part in batch.split(16)]
        deepest = max(index for index, one in enumerate(maps[0]) if min(one.shape[-2:]) >= 8)
        return torch.cat([part[deepest].float().cpu() for part in maps])
    if getattr(pipe, "image_encoder", None) is None:
        return encode_images(pipe, images).float().cpu()
    inputs = pipe.feature_extractor(list(images), return_tensors="pt").pixel_values
    encoder = pipe.image_encoder
    tokens = encoder(inputs.to(encoder.device, encoder.dtype)).last_hidden_state.float().cpu()
    tokens = tokens[:, 1 + getattr(encoder.config, "num_register_tokens", 0) :]
    rows, columns = (side // encoder.config.patch_size for side in inputs.shape[-2:])
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))


def evaluate_segmentation(
    pipe: "MediSynPipeline",
    data: MaskedImages,
    settings: Settings,
    rule: str,
    extractor: "FeatureExtractor | None" = None,
    development: int = 0,
) -> tuple[dict, dict[str, Tensor]]:
    """One model on one structure: rule and best match, of the model and of the baselines.

    Args:
        pipe: The model.
        data: Images and masks.
        settings: How it segments; the baselines have as many segments.
        rule: See `medisyn.segmentation.rules`.
        extractor: See `baseline_segments`.
        development: The first images, on which choices were made; the rest is reported as `held_out` too.

    Returns:
        A report and the masks of the rule by method: "model", each of `BASELINES` clustered over all images together,
        and "pixels_alone" and "encoder_alone", where each image is clustered and named by itself. The report has
        `settings`, `rule`, and for `all` (and `held_out`) by method `rule` and `best_match` as `score` returns them;
        the model's rule with its gain over that of each baseline.
    """
    pixels = image_tensor(pipe, data.images)
    segmenter = Segmenter(pipe, settings)
    segments = {"model": segmenter.segments(data.images)}
    ruled = {"model": segmenter.name(segments["model"], pixels, rule)}
    for kind, together in itertools.product(BASELINES, (True, False)):
        name = kind if together else f"{kind}_alone"
        options = (settings.segments, settings.seed, together, extractor)
        segments[name] = baseline_segments(kind, pipe, data.images, *options)
        ruled[name] = name_segments(segments[name], pixels, rule, together)
    report: dict[str, Any] = {"settings": vars(settings) | {"layer": segmenter.layer}, "rule": rule}
    for part, start in {"all": 0, "held_out": development}.items():
        if part == "held_out" and not 0 < start < len(data.masks):
            continue
        masks = data.masks[start:]
        others = {name: found[start:] for name, found in ruled.items() if name != "model"}
        report[part] = {
            name: {
                "rule": score(ruled[name][start:], masks, others if name == "model" else None),
                "best_match": score(best_match(segments[name][start:], masks), masks),
            }
            for name in segments
        }
    return report, ruled


def scan(
    models: Sequence[str | None],
    data: MaskedImages,
    settings: Settings,
    rule: str,
    timesteps: Sequence[int],
    load: "Callable[[str | None], MediSynPipeline]",
    layers: Sequence[str | None] = (None,),
) -> list[dict]:
    """Every model (checkpoint) at every timestep and layer, best mean Dice of the rule first.

    Args:
        models: Folders of pipelines such as those that a run's checkpoints were exported to; None: the default.
        data: Images to choose on; report on others.
        settings: All else.
        rule: See `medisyn.segmentation.rules`.
        timesteps: To try.
        load: Name -> pipeline; one model is in memory at a time.
        layers: To try; None: `default_layer`.

    Returns:
        Rows of `model`, `timestep`, `layer`, `rule` and `best_match` (see `score`).
    """
    rows = []
    for model in models:
        pipe = load(model)
        pixels = image_tensor(pipe, data.images)
        for layer in layers:
            for timestep in timesteps:
                segmenter = Segmenter(pipe, replace(settings, timestep=timestep, layer=layer))
                segments = segmenter.segments(data.images)
                ruled = segmenter.name(segments, pixels, rule)
                rows.append(
                    {
                        "model": model,
                        "timestep": timestep,
                        "layer": segmenter.layer,
                        "rule": score(ruled, data.masks),
                        "best_match": score(best_match(segments, data.masks), data.masks),
                    }
                )
    return sorted(rows, key=lambda row: -row["rule"]["dice"]["mean"])
