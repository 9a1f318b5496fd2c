"""Two classifiers that tell what images are worth: a small CNN from scratch, and a probe of frozen features.

Notable choices:

* Both are trained in stages, each on a mixture of parts with fixed shares of every batch (or of the loss), so that
  twenty synthetic images for each real one do not drown the real ones.
* The CNN takes the same number of optimizer steps whatever it is trained on: a gain is not one of longer training.
  AdamW, one cosine per stage, label smoothing, random crops, flips and weak colour jitter, last weights. Batch
  statistics are taken anew from the real images of the last stage: those of a mixture belong to neither kind.
* The probe is a multinomial logistic regression on standardised features. Pre-training is its prior: the second stage
  is pulled to the solution of the first as the first is pulled to zero (Chelba & Acero 2004).
* What is drawn at random depends on the seed alone.

    cnn = CnnClassifier(steps=200)
    part = Part(cnn.inputs(images), labels)      # labels: index of each image's class
    cnn.fit_predict([[part]], cnn.inputs(test), number_of_classes=3, seed=0)      # probabilities (N, 3)
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..data.preprocessing import Preprocessor
from .agreement import REGULARISATION

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..data.loading import ImageDataset
    from .features import FeatureExtractor

# A ResNet-10 at 3/8 of its width.
CNN = "resnet10t"
CNN_OPTIONS: Mapping[str, Any] = {"channels": (24, 48, 96, 192), "stem_width": 16}
PROBE_STEPS = 200  # of L-BFGS at most


@dataclass(frozen=True)
class Part:
    """Images of one kind, real or synthetic.

    Attributes:
        inputs: What the classifier's `inputs` returns, one row per image.
        labels: Index of each image's class, (N,).
        share: Of each batch, or of the loss; the shares of a stage sum to 1.
    """

    inputs: Tensor
    labels: Tensor
    share: float = 1.0


@dataclass(frozen=True)
class CnnClassifier:
    """A timm model, trained from scratch.

    Attributes:
        model: Name in timm; the default one is narrowed by `CNN_OPTIONS`.
        resolution: Side of the images in pixels.
        steps: Optimizer steps, shared equally by the stages.
        batch_size: Images per step.
        learning_rate: Highest one of the cosine.
        weight_decay: Of AdamW.
        label_smoothing: Share of a label that goes to all classes.
        horizontal_flip: Mirror half of the images; must be off where a body side is stated.
        balanced: Draw every class equally often, with replacement; otherwise images come in passes.
        device: Where it is trained.
    """

    name: ClassVar[str] = "cnn"
    model: str = CNN
    resolution: int = 64
    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    horizontal_flip: bool = True
    balanced: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse a wrong setting before any image is read."""
        for name in ("resolution", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the cnn must be at least 1, not {getattr(self, name)}")
        timm = _timm()
        if not timm.is_model(self.model):
            near = ", ".join(timm.list_models(f"*{self.model.split('_')[0]}*")[:5]) or "resnet10t, lcnet_050"
            raise ValueError(f"unknown timm model {self.model!r}; timm.list_models() lists the valid names, as {near}")

    def describe(self) -> dict[str, Any]:
        """Everything that decides its predictions, for reports and for the names of finished cells."""
        names = ("model", "resolution", "steps", "batch_size", "learning_rate", "weight_decay", "label_smoothing")
        described = {"classifier": self.name, **{name: getattr(self, name) for name in (*names, "horizontal_flip")}}
        return described | ({"balanced": True} if self.balanced else {})

    def inputs(self, images: "ImageDataset") -> Tensor:
        """Pixels (N, 3, resolution, resolution), uint8."""
        return self.inputs_of(images.image(index) for index in range(len(images)))

    def inputs_of(self, images: Iterable["Image"]) -> Tensor:
        """Pixels (N, 3, resolution, resolution), uint8, of at least one picture."""
        crop = Preprocessor(self.resolution).crop_image
        return torch.from_numpy(np.stack([np.asarray(crop(image)) for image in images])).permute(0, 3, 1, 2)

    def fit_predict(
        self, stages: Sequence[Sequence[Part]], inputs: Tensor, number_of_classes: int, seed: int
    ) -> np.ndarray:
        """Probabilities (N, K) of `inputs`, by a classifier trained on the stages; see `fit`."""
        return self.predict(self.fit(stages, number_of_classes, seed), inputs)

    def fit(self, stages: Sequence[Sequence[Part]], number_of_classes: int, seed: int) -> torch.nn.Module:
        """Train on each stage in turn.

        Args:
            stages: Parts that are mixed, stage by stage; the first part of the last one gives the batch statistics.
            number_of_classes: Outputs of the network.
            seed: Of weights, order and augmentation.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.build(number_of_classes).train()
            for number, stage in enumerate(stages):
                steps = self.steps * (number + 1) // len(stages) - self.steps * number // len(stages)
                self._train(network, stage, steps, torch.Generator().manual_seed(1_000_003 * seed + number))
            reference = stages[-1][0].inputs
            # a batch of one has no statistics where the network ends in a single pixel
            batches = [self.pixels(part) for part in reference.split(64) if len(part) > 1 or len(reference) == 1]
            torch.optim.swa_utils.update_bn(batches, network)
        return network.eval()

    def build(self, number_of_classes: int) -> torch.nn.Module:
        """The network with random weights."""
        options = CNN_OPTIONS if self.model == CNN else {}
        network = _timm().create_model(self.model, pretrained=False, num_classes=number_of_classes, **options)
        return network.to(self.device, memory_format=torch.channels_last)

    @torch.no_grad()
    def predict(self, network: torch.nn.Module, inputs: Tensor) -> np.ndarray:
        """Probabilities (N, K) of what `inputs` returned."""
        logits = [network(self.pixels(inputs[i : i + 64])).float() for i in range(0, len(inputs), 64)]
        return torch.cat(logits).softmax(1).cpu().numpy()

    def _train(self, network: torch.nn.Module, stage: Sequence[Part], steps: int, rng: torch.Generator) -> None:
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        warmup = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
        )
        sizes = _batch_sizes([part.share for part in stage], self.batch_size)
        order_of = _balanced_order if self.balanced else _endless_order
        orders = [order_of(part.labels, size * steps, rng) for part, size in zip(stage, sizes, strict=True)]
        for step in range(steps):
            rows = [order[step * size : (step + 1) * size] for order, size in zip(orders, sizes, strict=True)]
            pixels = torch.cat([part.inputs[own] for part, own in zip(stage, rows, strict=True)])
            labels = torch.cat([part.labels[own] for part, own in zip(stage, rows, strict=True)]).to(self.device)
            logits = network(augment(self.pixels(pixels), rng, self.horizontal_flip))
            loss = functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def pixels(self, inputs: Tensor) -> Tensor:
        """Bytes as numbers in [-1, 1] on the device."""
        return inputs.to(self.device, memory_format=torch.channels_last).float().div_(127.5).sub_(1.0)


@dataclass(frozen=True)
class ProbeClassifier:
    """Multinomial logistic regression on the features of a frozen extractor.

    Attributes:
        extractor: See `load_extractor`.
        cache_dir: Keeps features between runs; None keeps nothing.
        regularisation: Inverse strength, as C of scikit-learn.
        progress: Show a bar while features are taken.
    """

    name: ClassVar[str] = "probe"
    extractor: "FeatureExtractor"
    cache_dir: str | Path | None = None
    regularisation: float = REGULARISATION
    progress: bool = field(default=False, compare=False)

    def describe(self) -> dict[str, Any]:
        """Everything that decides its predictions; weights by their hash, since a file may move."""
        return {
            "classifier": self.name,
            "extractor": self.extractor.spec.partition("@")[0],
            "extractor_key": self.extractor.key,
            "regularisation": self.regularisation,
        }

    def inputs(self, images: "ImageDataset") -> Tensor:
        """Features (N, D)."""
        from .features import extract_features

        return torch.from_numpy(extract_features(self.extractor, images, self.cache_dir, progress=self.progress))

    def fit_predict(
        self, stages: Sequence[Sequence[Part]], inputs: Tensor, number_of_classes: int, seed: int
    ) -> np.ndarray:
        """Probabilities (N, K) of `inputs`, by a classifier trained on the stages; see `fit`."""
        return self.predict(self.fit(stages, number_of_classes, seed), inputs)

    def fit(self, stages: Sequence[Sequence[Part]], number_of_classes: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Mean and deviation (D,) of the first part of the last stage, weights (K, D), bias (K,).

        Minimises `C sum_i w_i loss_i + |W - W0|^2 / 2`, where W0 is the solution of the stage before, or zero. The
        weights of a part sum to its share of the stage's images; within it, every class weighs the same.
        """
        reference = stages[-1][0].inputs.double()
        mean, deviation = reference.mean(0), reference.std(0, correction=0)
        deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        weight = torch.zeros(number_of_classes, reference.shape[1], dtype=torch.float64)
        bias = torch.zeros(number_of_classes, dtype=torch.float64)
        for stage in stages:
            features = torch.cat([(part.inputs.double() - mean) / deviation for part in stage])
            labels = torch.cat([part.labels for part in stage])
            weights = torch.cat([_balanced_weights(part.labels) * part.share for part in stage]) * len(labels)
            weight, bias = self._fit(features, labels, weights, weight, bias)
        return mean, deviation, weight, bias

    def predict(self, fitted: tuple[Tensor, ...], inputs: Tensor) -> np.ndarray:
        """Probabilities (N, K) of what `inputs` returned."""
        mean, deviation, weight, bias = fitted
        return (((inputs.double() - mean) / deviation) @ weight.T + bias).softmax(1).numpy()

    def _fit(
        self, features: Tensor, labels: Tensor, weights: Tensor, start: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        weight, bias = start.clone().requires_grad_(), bias.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=PROBE_STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = functional.cross_entropy(features @ weight.T + bias, labels, reduction="none")
            total = self.regularisation * (weights * losses).sum() + 0.5 * (weight - start).square().sum()
            total.backward()
            return total

        optimizer.step(closure)
        return weight.detach(), bias.detach()


Classifier = CnnClassifier | ProbeClassifier


def augment(images: Tensor, rng: torch.Generator, horizontal_flip: bool = True) -> Tensor:
    """Random crops (77–100 % of the side), flips, and weak changes of brightness, contrast and colour.

    Every image has its own; one resampling for all of them takes a fraction of the time of a transform per image.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        rng: On the CPU.
        horizontal_flip: Mirror half of the images.
    """
    number = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(number, generator=rng) * (high - low) + low

    scale = uniform(0.77, 1.0)
    shift = [uniform(-1.0, 1.0) * (1 - scale) for _ in range(2)]  # the crop stays inside the image
    mirror = torch.where(uniform(0.0, 1.0) < 0.5, -1.0, 1.0) if horizontal_flip else torch.ones(number)
    zero = torch.zeros(number)
    places = torch.stack([scale * mirror, zero, shift[0], zero, scale, shift[1]], 1).view(number, 2, 3)
    grid = functional.affine_grid(places.to(images.device), list(images.shape), align_corners=False)
    images = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    brightness, contrast, saturation = (uniform(-0.1, 0.1), uniform(0.85, 1.15), uniform(0.85, 1.15))
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * saturation.to(images.device).view(-1, 1, 1, 1)
    centre = images.mean((1, 2, 3), keepdim=True)
    images = centre + (images - centre) * contrast.to(images.device).view(-1, 1, 1, 1)
    return images + brightness.to(images.device).view(-1, 1, 1, 1)


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError("the cnn classifier needs timm: pip install medisyn[eval]") from error
    return timm


def _batch_sizes(shares: Sequence[float], batch_size: int) -> list[int]:
    """Whole images of each part that sum to the batch."""
    ends = np.rint(np.cumsum(shares) * batch_size).astype(int)
    return np.diff(ends, prepend=0).tolist()


def _endless_order(labels: Tensor, wanted: int, rng: torch.Generator) -> Tensor:
    """`wanted` rows: one shuffled pass after the other."""
    passes = [torch.randperm(len(labels), generator=rng) for _ in range(math.ceil(wanted / len(labels)))]
    return torch.cat(passes)[:wanted]


def _balanced_order(labels: Tensor, wanted: int, rng: torch.Generator) -> Tensor:
    """`wanted` rows, drawn with replacement so that every class is expected equally often."""
    return torch.multinomial(_balanced_weights(labels), wanted, replacement=True, generator=rng)


def _balanced_weights(labels: Tensor) -> Tensor:
    """Weights that sum to 1, and to the same for every class that occurs."""
    counts = torch.bincount(labels).double()
    return 1 / (counts[labels] * (counts > 0).sum())
