"""Segments from feature maps: k-means, fitted once on drawn or given images, which then numbers every image alike.

- Features are centred by their mean first: what all places share is most of a diffusion feature's length.
- Because the clusters are shared, segment 3 is the same part of the body in every image, and a rule can name it once.
- Distances, not labels, are brought to the size of the image, guided by its pixels (He et al. 2013, "Guided image
  filtering"), so that the outline follows edges that lie between the places of a coarse map.

    clusters = fit_clusters(unet_features(pipe, drawn, probe, "up_blocks.1"), number=6)
    segments = assign(clusters, unet_features(pipe, latents, probe, "up_blocks.1"), pixels)   # (B, H, W), 0..5
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

STARTS = 4  # of k-means, of which the best is kept
MOST_PLACES = 40_000  # that k-means looks at; more cost minutes and change nothing


@dataclass(frozen=True)
class Clusters:
    """Parts of an image as points among features.

    Attributes:
        mean: (C,), subtracted from features.
        centres: (K, C), on the scale of centred features.
    """

    mean: Tensor
    centres: Tensor

    def distances(self, features: Tensor) -> Tensor:
        """Squared distance of every place of (B, C, h, w) to every centre, (B, K, h, w)."""
        centred = (features - self.mean[:, None, None]).flatten(2).transpose(1, 2)  # (B, hw, C)
        squared = torch.cdist(centred, self.centres.expand(len(centred), -1, -1)) ** 2
        return squared.transpose(1, 2).unflatten(2, features.shape[-2:])


def fit_clusters(features: Tensor, number: int, seed: int = 0) -> Clusters:
    """Lloyd's k-means (scikit-learn's) of all places of all images.

    Args:
        features: (B, C, h, w).
        number: Of clusters, at least 2.
        seed: Of the starts and of the choice of places.

    Raises:
        ValueError: Fewer than two clusters, or fewer places than clusters.
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("clustering needs scikit-learn; install medisyn[eval]") from error
    places = features.permute(0, 2, 3, 1).flatten(0, 2)
    if not 2 <= number <= len(places):
        raise ValueError(f"the number of segments must be in 2..{len(places)}, not {number}")
    mean = places.mean(dim=0)
    if len(places) > MOST_PLACES:
        places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:MOST_PLACES]]
    fitted = KMeans(number, n_init=STARTS, random_state=seed).fit((places - mean).numpy())
    return Clusters(mean, torch.from_numpy(fitted.cluster_centers_).float())


def assign(clusters: Clusters, features: Tensor, pixels: Tensor, refine: bool = True) -> Tensor:
    """Segments (B, H, W) int64: at each pixel the cluster that is nearest after resizing the distances.

    Args:
        clusters: See `fit_clusters`.
        features: (B, C, h, w).
        pixels: (B, 3, H, W) in [-1, 1], the images; they guide the outline.
        refine: Whether they do; otherwise distances are resized bilinearly.
    """
    distances = interpolate(clusters.distances(features), size=pixels.shape[-2:], mode="bilinear", align_corners=False)
    if refine:
        radius = max(1, pixels.shape[-1] // (2 * features.shape[-1]))  # half a place of the map
        distances = guided_filter(pixels.mean(dim=1, keepdim=True), distances, radius)
    return distances.argmin(dim=1)


def guided_filter(guide: Tensor, values: Tensor, radius: int, smoothness: float = 1e-2) -> Tensor:
    """Values that follow the edges of a guide: locally a linear function of it (He et al. 2013, equations 5, 6 and 8).

    Args:
        guide: (B, 1, H, W) in [-1, 1].
        values: (B, K, H, W).
        radius: Half side of the window in pixels.
        smoothness: The paper's epsilon: edges whose variance is far below it are not followed; above 0.

    Raises:
        ValueError: Not positive, or a window larger than the image.
    """
    if radius < 1 or not smoothness > 0:
        raise ValueError(f"radius and smoothness must be positive, not {radius} and {smoothness}")
    if radius >= min(guide.shape[-2:]):
        raise ValueError(f"a radius of {radius} pixels does not fit an image of {tuple(guide.shape[-2:])}")

    def mean(part: Tensor) -> Tensor:
        return avg_pool2d(pad(part, (radius,) * 4, mode="replicate"), 2 * radius + 1, stride=1)

    mean_guide, mean_values = mean(guide), mean(values)
    covariance = mean(guide * values) - mean_guide * mean_values
    slope = covariance / (mean(guide * guide) - mean_guide**2 + smoothness)
    offset = mean_values - slope * mean_guide
    return mean(slope) * guide + mean(offset)
