"""Perceptual distances for training an autoencoder, and the features that they compare.

- `ShiftTolerantLPIPS`: the AlexNet variant of ST-LPIPS (Ghildyal & Liu, ECCV 2022, arXiv 2207.13686), written against
  its published weights: stride-1 first convolution, and a 3x3 binomial blur with stride 2 wherever AlexNet drops
  resolution.
- `build_perceptual("lpips")`: torchmetrics' LPIPS (extra `eval`), whose backbone torchvision downloads.

- `structure_difference`: the structure term of SSIM, which sees texture of the least contrast.

    distance = build_perceptual("st-lpips", "stlpips_alex.pth")(images, references)  # scalar
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (convolution, its key in the weights, kernel padding); a blur follows the first convolution and precedes the next two
_STAGES = (
    ("net.slice1.0", 2),
    ("net.slice2.5", 2),
    ("net.slice3.9", 1),
    ("net.slice4.11", 1),
    ("net.slice5.13", 1),
)


class ShiftTolerantLPIPS(nn.Module):
    """ST-LPIPS distance; frozen. Images are (B, 3, H, W) in [-1, 1], H and W at least 32; the result is a mean over B.

    Raises:
        FileNotFoundError: no weights file.
        ValueError: the file holds other weights.
    """

    shift: Tensor
    scale: Tensor
    blur: Tensor

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        if not Path(weights).is_file():
            raise FileNotFoundError(f"no ST-LPIPS weights at {weights}")
        state = torch.load(weights, map_location="cpu", weights_only=True)
        try:
            self.convolutions = nn.ParameterList()
            for key, _ in _STAGES:
                self.convolutions.append(state[f"{key}.weight"])
                self.convolutions.append(state[f"{key}.bias"])
            self.heads = nn.ParameterList([state[f"lin{i}.model.1.weight"] for i in range(len(_STAGES))])
            self.register_buffer("shift", state["scaling_layer.shift"])
            self.register_buffer("scale", state["scaling_layer.scale"])
        except KeyError as error:
            raise ValueError(f"{weights} holds no AlexNet ST-LPIPS weights: {error} is missing") from None
        binomial = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("blur", (torch.outer(binomial, binomial) / 16.0)[None, None])
        self.requires_grad_(False)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Mean distance of the pairs, a scalar."""
        distance = images.new_zeros(())
        pairs = zip(self.features(images), self.features(references), self.heads, strict=True)
        for features, reference_features, head in pairs:
            difference = (F.normalize(features, dim=1) - F.normalize(reference_features, dim=1)).square()
            distance = distance + F.conv2d(difference, head).mean()
        return distance

    def features(self, images: Tensor) -> list[Tensor]:
        """What the five layers see in images (B, 3, H, W) in [-1, 1]: (B, C, h, w) each, from fine to coarse."""
        hidden = (images - self.shift) / self.scale
        features = []
        for stage, (_, padding) in enumerate(_STAGES):
            if stage in (1, 2):
                hidden = self._blur_downsample(F.max_pool2d(hidden, kernel_size=3, stride=1))
            weight, bias = self.convolutions[2 * stage], self.convolutions[2 * stage + 1]
            hidden = F.conv2d(hidden, weight, bias, padding=padding)
            hidden = F.relu(self._blur_downsample(hidden) if stage == 0 else hidden)
            features.append(hidden)
        return features

    def _blur_downsample(self, hidden: Tensor) -> Tensor:
        channels = hidden.shape[1]
        padded = F.pad(hidden, (2, 2, 2, 2), mode="reflect")
        return F.conv2d(padded, self.blur.expand(channels, 1, 3, 3), stride=2, groups=channels)


class _MeanLPIPS(nn.Module):
    """The network inside torchmetrics' metric, which itself refuses the values beyond [-1, 1] of a reconstruction."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Mean distance of the pairs, a scalar."""
        return self.network(images, references).mean()


def structure_difference(images: Tensor, references: Tensor) -> Tensor:
    """1 - mean of SSIM's contrast-structure term on the luma, a scalar in [0, 2] (Wang et al. 2004, eq. 9 and 10).

    The constant K2 is 0.005 in place of 0.03: a flat region with faint noise then differs from a flat one without,
    which neither L1 nor LPIPS tells apart and which feature extractors do.

    Args:
        images: (B, 3, H, W) in [-1, 1], H and W at least 11.
        references: of the same shape.

    Raises:
        ImportError: no torchmetrics (extra `eval`).
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        raise ImportError("task.structure_weight needs torchmetrics: pip install medisyn[eval]") from None
    with torch.autocast(images.device.type, enabled=False):  # a variance is a small difference of large numbers
        weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]
        luma, reference = ((part.float() * weights).sum(dim=1, keepdim=True) for part in (images, references))
        _, structure = structural_similarity_index_measure(
            luma, reference, data_range=2.0, k2=0.005, return_contrast_sensitivity=True
        )
    return 1.0 - structure.mean()


def build_perceptual(name: str, weights: str | None = None) -> nn.Module | None:
    """The perceptual distance called `name` (`none`, `st-lpips`, `lpips`), frozen and in evaluation mode.

    Raises:
        ValueError: unknown name, or `st-lpips` without a weights file.
        ImportError: `lpips` without the extra `eval`.
    """
    if name == "none":
        return None
    if name == "st-lpips":
        if weights is None:
            raise ValueError(
                "perceptual: st-lpips needs perceptual_weights (the file of stlpips-pytorch's AlexNet variant)"
            )
        return ShiftTolerantLPIPS(weights).eval()
    if name == "lpips":
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
        except ImportError:
            raise ImportError("perceptual: lpips needs torchmetrics: pip install medisyn[eval]") from None
        return _MeanLPIPS(LearnedPerceptualImagePatchSimilarity(net_type="alex").net).eval().requires_grad_(False)
    raise ValueError(f"unknown perceptual distance {name!r}; valid: none, st-lpips, lpips")
