"""What pre-trained networks see in a kind of image on average, and how far drawn images are from it.

- `PooledFeatures` are those of a frozen network that passes gradients on to the image: of every layer the mean over
  places. Networks of several families are fooled less easily than one.
- Matching means alone says nothing of single images; kinds of image have means of their own, so it is done for each.
- The difference is in deviations of the real images, so that no feature counts for its scale.

    network = open_pooled_features("timm:tf_efficientnet_lite1@efficientnet_lite1.pth?size=208")
    features = network(images)  # (B, D), of images (B, 3, H, W) in [-1, 1]
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medisyn.evaluation.features import load_timm
from medisyn.perceptual import ShiftTolerantLPIPS

LEAST_DEVIATION = 0.3  # of a feature, as a share of its layer's mean one: what hardly varies must not count most
STAGES_SHARE = 1 / 3  # of the weight of all features of a timm network, beside the pooled ones of the last layer
SHIFT = 8  # pixels by which an image may be moved
SIZES = (-16, 0, 16)  # pixels added to the network's input size
LEAST_IMAGES = 8  # real images that say something of a class: of fewer the mean is that of single images


class PooledFeatures(nn.Module):
    """A frozen network as a function of images: what each of its layers sees, pooled over places.

    Attributes:
        layers: how many features each layer has.
        weights: (D,), of each feature in a mean over all; sums to 1.
    """

    layers: list[int]
    weights: Tensor

    def _count(self, layers: list[Tensor], shares: list[float]) -> None:
        """Take the features of a trial, (B, D) of each layer, and the share of the weight that each layer has."""
        self.layers = [features.shape[1] for features in layers]
        weights = [torch.full((count,), share / count) for count, share in zip(self.layers, shares, strict=True)]
        self.register_buffer("weights", torch.cat(weights), persistent=False)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Features (B, D) float32 of images (B, 3, H, W) in [-1, 1].

        With a generator all of them are moved by up to `SHIFT` pixels and perhaps mirrored, and resized a little more
        or less where they are resized at all: a pattern that fools the network at one place of its strides does not
        at another.
        """
        change = 0
        if generator is not None:
            across, down, step, mirrored = (
                int(torch.randint(count, (), generator=generator)) for count in (2 * SHIFT + 1, 2 * SHIFT + 1, 3, 2)
            )
            padded = F.pad(images, (SHIFT,) * 4, mode="reflect")
            images = padded[..., down : down + images.shape[-2], across : across + images.shape[-1]]
            images = images.flip(-1) if mirrored else images
            change = SIZES[step]
        return torch.cat(self._pooled(images.float(), change), dim=1)

    def _pooled(self, images: Tensor, change: int) -> list[Tensor]:
        raise NotImplementedError


class TimmFeatures(PooledFeatures):
    """Features of a timm network: of every stage, and its own pooled ones after them.

    Args:
        spec: `MODEL@WEIGHTS_FILE[?size=..&mean=..&std=..]`, as for evaluation.

    Raises:
        ValueError: weights that do not fit, or a size that the network cannot take.
        FileNotFoundError: the weights file is missing.
    """

    network: Any  # with `forward_intermediates`
    shift: Tensor
    scale: Tensor

    def __init__(self, spec: str) -> None:
        super().__init__()
        network, options, _ = load_timm(spec)
        self.network = network.eval().requires_grad_(False)
        self.size = options["size"]
        self.register_buffer("shift", torch.tensor(options["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(options["std"]).view(-1, 1, 1), persistent=False)
        try:
            for change in SIZES:
                layers = self._pooled(torch.zeros(1, 3, self.size + change, self.size + change), change)
        except (AssertionError, RuntimeError) as error:
            sizes = ", ".join(str(self.size + change) for change in SIZES)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"extractor 'timm:{spec}' does not take images of {sizes} pixels: {reason}") from error
        stages = [features.shape[1] for features in layers[:-1]]
        self._count(layers, [STAGES_SHARE * count / sum(stages) for count in stages] + [1 - STAGES_SHARE])

    def _pooled(self, images: Tensor, change: int) -> list[Tensor]:
        size = self.size + change
        antialias = images.shape[-1] > size
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=antialias)
        pixels = ((images + 1) / 2 - self.shift) / self.scale
        last, maps = self.network.forward_intermediates(pixels.contiguous(memory_format=torch.channels_last))
        stages = [features.float().mean(dim=(2, 3)) for features in maps]
        return [*stages, self.network.forward_head(last, pre_logits=True).float()]


class PerceptualFeatures(PooledFeatures):
    """Features of the five layers of ST-LPIPS' AlexNet, which sees images of 32 pixels and more at their own size.

    All layers count alike.

    Args:
        weights: file.

    Raises:
        ValueError: the file lacks weights.
        FileNotFoundError: no such file.
    """

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.network = ShiftTolerantLPIPS(weights)
        layers = self._pooled(torch.zeros(1, 3, 64, 64), 0)
        self._count(layers, [1 / len(layers)] * len(layers))

    def _pooled(self, images: Tensor, change: int) -> list[Tensor]:
        return [features.float().mean(dim=(2, 3)) for features in self.network.features(images)]


def open_pooled_features(spec: str) -> PooledFeatures:
    """Features of `timm:MODEL@WEIGHTS_FILE[?size=..&mean=..&std=..]` or `st-lpips:WEIGHTS_FILE`.

    Raises:
        ValueError: another kind of extractor, or what `TimmFeatures` and `PerceptualFeatures` refuse.
        FileNotFoundError: the weights file is missing.
    """
    kind, _, rest = spec.partition(":")
    if kind not in _KINDS or not rest:
        raise ValueError(
            f"extractor {spec!r}: features to match are those of timm:MODEL@WEIGHTS_FILE or st-lpips:WEIGHTS_FILE"
        )
    return _KINDS[kind](rest)


_KINDS = {"timm": TimmFeatures, "st-lpips": PerceptualFeatures}


class ClassMeans(nn.Module):
    """Mean features of each class: of real images once, of drawn images as a running mean.

    Args:
        network: whose features.
        classes: how many there are.
        horizon: how many drawn images of a class its running mean goes back.
    """

    real: Tensor
    deviation: Tensor
    drawn: Tensor
    seen: Tensor
    matched: Tensor

    def __init__(self, network: PooledFeatures, classes: int, horizon: int) -> None:
        super().__init__()
        self._network = (network,)  # a tuple: not registered, hence not saved
        self.horizon = horizon
        width = len(network.weights)
        self.register_buffer("real", torch.zeros(classes, width))
        self.register_buffer("deviation", torch.ones(width))
        self.register_buffer("drawn", torch.zeros(classes, width))  # in the checkpoint, as the other ones
        self.register_buffer("seen", torch.zeros(classes))
        self.register_buffer("matched", torch.zeros(classes))  # 1: a class with enough real images

    @torch.no_grad()
    def fit(self, images: Iterable[Tensor], generator: torch.Generator) -> None:
        """Take the real images of each class, one batch (B, 3, H, W) in [-1, 1] for each of them.

        A class of fewer than `LEAST_IMAGES` is not matched.

        Raises:
            ValueError: no class has so many.
        """
        (network,) = self._network
        variances = []
        for index, batch in enumerate(images):
            if len(batch) < LEAST_IMAGES:
                continue
            self.matched[index] = 1
            batch = batch.to(self.real.device)
            features = torch.cat([network(part, generator) for part in batch.split(10)])
            self.real[index] = features.mean(dim=0)
            variances.append(features.var(dim=0, correction=0))
        if not variances:
            raise ValueError(f"no class has {LEAST_IMAGES} real images whose features could be matched")
        deviation = torch.stack(variances).mean(dim=0).sqrt()
        layers = [
            part.clamp(min=max(LEAST_DEVIATION * part.mean().item(), 1e-6)) for part in deviation.split(network.layers)
        ]
        self.deviation.copy_(torch.cat(layers))

    @torch.no_grad()
    def add(self, features: Tensor, classes: Tensor) -> None:
        """Take drawn images, features (B, D) of classes (B,), into the running means."""
        for vector, index in zip(features.float(), classes.tolist(), strict=True):
            self.seen[index] += 1
            self.drawn[index] += (vector - self.drawn[index]) / self.seen[index].clamp(max=self.horizon)

    def loss(self, features: Tensor, classes: Tensor) -> Tensor:
        """A scalar with the gradient of half of the squared shift of these classes' means, were they all of them.

        A class counts the less, the fewer images of it were drawn yet.
        """
        (network,) = self._network
        known = self.matched * (self.seen / self.horizon).clamp(max=1.0)
        shift = known[:, None] * (self.drawn - self.real) / self.deviation
        return (shift[classes] * (features / self.deviation) * network.weights).sum(dim=1).mean()

    def squared_shift(self) -> Tensor:
        """Mean over the classes seen and matched of the squared shift, in squared deviations; a scalar."""
        (network,) = self._network
        shifts = (((self.drawn - self.real) / self.deviation).square() * network.weights).sum(dim=1)
        counted = (self.seen > 0) & (self.matched > 0)
        return shifts[counted].mean() if counted.any() else shifts.new_zeros(())
