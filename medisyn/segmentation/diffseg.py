"""DiffSeg: segments from self-attention maps, without names and without training (Tian et al. 2024, arXiv 2308.12469).

- Aggregation over resolutions (section 3.2): keys are resized bilinearly to the finest grid and each map is brought
  back to sum 1, queries are repeated, and layers are weighted by their resolution, so that the result is again one
  distribution over places for each place.
- Iterative merging (section 3.3): anchors on a grid collect all maps that are nearer than a threshold by the symmetric
  Kullback-Leibler divergence; then proposals are merged greedily with each other.
- Each place belongs to the proposal with the largest value there (section 3.4).

    with record_attention(pipe.unet, (64, 64), kinds=("self",)) as maps: ...
    segments = diffseg([(one.size, one.weights[0]) for one in maps], size=(512, 512))   # (512, 512), 0..k-1
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

TINY = 1e-10  # under the logarithm: attention of half-precision models can be 0


def aggregate_attention(maps: Sequence[tuple[tuple[int, int], Tensor]]) -> Tensor:
    """One distribution over places for each place of the finest grid.

    Args:
        maps: (height, width) and weights (height x width, height x width) of each layer, rows summing to 1.

    Returns:
        (H, W, H, W) float32: query row and column, key row and column; sums to 1 over the last two. Layers have
        weights in proportion to the side of their grid (equation 3 of the paper).

    Raises:
        ValueError: No maps, or maps that do not fit their grid.
    """
    if not maps:
        raise ValueError("there are no self-attention maps to aggregate")
    height, width = max((size for size, _ in maps), key=lambda size: size[0] * size[1])
    total = torch.zeros(height, width, height, width)
    shares = torch.tensor([float(size[0] * size[1]) ** 0.5 for size, _ in maps])
    for (size, weights), share in zip(maps, shares / shares.sum(), strict=True):
        places = size[0] * size[1]
        if tuple(weights.shape) != (places, places):
            raise ValueError(f"attention weights {tuple(weights.shape)} do not fit a grid of {size[0]} x {size[1]}")
        keys = weights.float().cpu().reshape(places, 1, *size)
        keys = interpolate(keys, size=(height, width), mode="bilinear", align_corners=False)
        keys = keys / keys.sum(dim=(2, 3), keepdim=True)
        rows = torch.arange(height) * size[0] // height
        columns = torch.arange(width) * size[1] // width
        queries = keys.reshape(*size, height, width)[rows][:, columns]
        total += share * queries
    return total / total.sum(dim=(2, 3), keepdim=True)


def symmetric_divergence(first: Tensor, second: Tensor) -> Tensor:
    """(KL(p | q) + KL(q | p)) / 2 of each row of `first` (A, N) and of `second` (B, N), as (A, B); equation 4."""
    log_first, log_second = (values.clamp(min=TINY).log() for values in (first, second))
    own = (first * log_first).sum(dim=1)[:, None] + (second * log_second).sum(dim=1)[None]
    return ((own - first @ log_second.T - log_first @ second.T) / 2).clamp(min=0)


def merge_attention(attention: Tensor, threshold: float, anchors: int, iterations: int) -> Tensor:
    """Proposals (K, H, W), each a distribution over places: the maps of `attention`, merged where they are alike.

    Args:
        attention: (H, W, H, W), see `aggregate_attention`.
        threshold: Largest divergence of what is merged; above 0.
        anchors: Side of the grid of anchors; at most min(H, W) are used.
        iterations: Merging rounds, the first of which collects maps around anchors.
    """
    height, width = attention.shape[:2]
    maps = attention.reshape(height * width, -1)
    rows, columns = (((torch.arange(min(anchors, n)) + 0.5) * n / min(anchors, n)).long() for n in (height, width))
    places = (rows[:, None] * width + columns).flatten()
    near = (symmetric_divergence(maps[places], maps) < threshold).float()
    near[torch.arange(len(places)), places] = 1.0  # rounding must not part an anchor from itself
    proposals = near @ maps / near.sum(dim=1, keepdim=True)
    for _ in range(iterations - 1):
        close = symmetric_divergence(proposals, proposals) < threshold
        close.fill_diagonal_(True)
        matched = torch.zeros(len(proposals), dtype=torch.bool)
        merged = []
        for index in range(len(proposals)):
            if not matched[index]:
                matched |= close[index]
                merged.append(proposals[close[index]].mean(dim=0))
        proposals = torch.stack(merged)
    return proposals.reshape(-1, height, width)


def diffseg(
    maps: Sequence[tuple[tuple[int, int], Tensor]],
    size: tuple[int, int],
    threshold: float = 0.9,
    anchors: int = 16,
    iterations: int = 3,
) -> Tensor:
    """Segments of one image as numbers (height, width) int64 in 0..k-1, without gaps.

    Args:
        maps: See `aggregate_attention`.
        size: (height, width) of the result in pixels; proposals are resized bilinearly.
        threshold: Divergence below which maps belong together (the paper: 0.4 to 1.1); higher gives fewer segments.
        anchors: Side of the grid of anchors (the paper: 16).
        iterations: Merging rounds (the paper: 3).

    Raises:
        ValueError: No maps, or an argument that is not positive.
    """
    for name, value in (("threshold", threshold), ("anchors", anchors), ("iterations", iterations)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, not {value}")
    proposals = merge_attention(aggregate_attention(maps), threshold, anchors, iterations)
    values = interpolate(proposals[None], size=size, mode="bilinear", align_corners=False)[0]
    return torch.unique(values.argmax(dim=0), return_inverse=True)[1]
