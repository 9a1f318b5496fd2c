"""Strategies: how synthetic images are made of real ones, and which label they then carry.

| strategy | condition | label rule |
|---|---|---|
| `reconstruction` | the embedding of one image, with new noise | inherited |
| `interpolation` | between two images of a class, or of any (`across=true`); `method=slerp` or `lerp` | mixed |
| `mixture` | Dirichlet mixture of an image and its nearest neighbours in its class | majority |
| `perturbation` | one embedding with Gaussian noise of the covariance within classes | inherited |
| `sdedit` | noise is added to the image itself and taken away again; any model | inherited |
| `prior` | drawn from a learned distribution of the embeddings of a class; no real image | requested |

- Inherited: the label of the only parent. Majority: the one with the largest total weight, here that of all parents.
  Mixed: every parent's label counts with its weight (`parent_labels`, `parent_weights`), and the column itself has the
  heaviest one; of equal ones the first. Requested: the class that was asked of the prior.
- What a strategy draws comes from the random numbers that it is given, those of the image's seed.

    strategy = parse_strategy("mixture:neighbours=5,concentration=1")  # for `manifold_requests.like_requests`
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args, get_type_hints

import numpy as np

from ..prompts import choose

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.loading import ImageDataset

LabelRule: TypeAlias = Literal["inherited", "mixed", "majority", "requested"]
NEEDS_TWO = "needs two or more images"


# ---- what there is to work with -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parents:
    """Real images with their labels and embeddings.

    Attributes:
        images: The images.
        hashes: Their content hashes.
        labels: Their labels; None for all where there are none.
        embeddings: (N, T, width); None for a model without an image condition.
    """

    images: "ImageDataset"
    hashes: list[str]
    labels: list[str | None]
    embeddings: "Tensor | None" = None

    def __len__(self) -> int:
        return len(self.hashes)

    def classmates(self, row: int) -> list[int]:
        """All other rows with the label of `row`."""
        return [other for other in self._members[self.labels[row]] if other != row]

    @cached_property
    def _members(self) -> dict[str | None, list[int]]:
        members: dict[str | None, list[int]] = {}
        for row, label in enumerate(self.labels):
            members.setdefault(label, []).append(row)
        return members

    @cached_property
    def vectors(self) -> "Tensor":
        """(N, width) of global tokens. Raises ValueError for patch tokens."""
        if self.embeddings.shape[1] != 1:
            raise ValueError(
                "this model takes patch tokens; mixture, perturbation and prior need one global token per image. "
                "Valid here: reconstruction, interpolation, sdedit"
            )
        return self.embeddings[:, 0]

    @cached_property
    def root(self) -> "Tensor":
        """The root of the covariance within classes, (width, width)."""
        from .embedding_space import covariance_root, within_class_covariance

        return covariance_root(within_class_covariance(self.vectors, self.labels))

    def of_class(self, row: int) -> str:
        """Words for messages: `the class 'normal' has 4 images`."""
        label, count = self.labels[row], len(self._members[self.labels[row]])
        whose = "there are" if label is None else f"the class {label!r} has"
        return f"{whose} {count} image{'s' * (count != 1)}"


@dataclass(frozen=True)
class Place:
    """What one image is made of: rows of the parents with their weights, and the condition (T, width)."""

    rows: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    embedding: "Tensor | None" = None


# ---- the strategies -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strategy:
    """Base: options are the fields of the subclass, `place` uses them."""

    name: ClassVar[str]
    label_rule: ClassVar[LabelRule] = "inherited"

    def place(self, parents: Parents, row: int, rng: np.random.Generator) -> Place:
        """What the image with the parent `row` and the random numbers `rng` is made of."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The options by name."""
        return dataclasses.asdict(self)

    def arguments(self) -> dict[str, Any]:
        """What `synthesize` has to be given."""
        return {}

    def __str__(self) -> str:
        options = ",".join(f"{name}={_written(value)}" for name, value in self.options().items() if value is not None)
        return f"{self.name}:{options}" if options else self.name

    def _require(self, condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"strategy {self.name}: {what}")


@dataclass(frozen=True)
class Reconstruction(Strategy):
    """Variations of one image (DiNO-Diffusion, arXiv 2407.11594)."""

    name: ClassVar[str] = "reconstruction"

    def place(self, parents: Parents, row: int, rng: np.random.Generator) -> Place:
        """The parent's own embedding."""
        return Place((row,), (1.0,), parents.embeddings[row])


@dataclass(frozen=True)
class Interpolation(Strategy):
    """Between two images (DiNO-Diffusion, arXiv 2407.11594).

    Attributes:
        method: See `embedding_space`.
        weight: Share of the second image, in [0, 1]; None: drawn anew for each image, uniformly.
        across: Between images of any classes; otherwise of one class.
    """

    method: Literal["slerp", "lerp"] = "slerp"
    weight: float | None = None
    across: bool = False

    name: ClassVar[str] = "interpolation"
    label_rule: ClassVar[LabelRule] = "mixed"

    def __post_init__(self) -> None:
        """Refuses values outside the documented ones."""
        choose("method of interpolation", self.method, ("slerp", "lerp"))
        self._require(self.weight is None or 0 <= self.weight <= 1, f"weight must be in 0..1, not {self.weight}")

    def place(self, parents: Parents, row: int, rng: np.random.Generator) -> Place:
        """Between the parent and a partner; two images alone keep their order."""
        from . import embedding_space

        partners = [other for other in range(len(parents)) if other != row] if self.across else parents.classmates(row)
        self._require(len(parents) > 1, NEEDS_TWO)
        self._require(bool(partners), f"{parents.of_class(row)}; it needs two or more, or across=true")
        weight = float(rng.random()) if self.weight is None else self.weight
        rows = (row, partners[int(rng.integers(len(partners)))])
        rows = (0, 1) if len(parents) == 2 else rows
        between = {"slerp": embedding_space.slerp, "lerp": embedding_space.lerp}[self.method]
        embedding = between(parents.embeddings[rows[0]], parents.embeddings[rows[1]], weight)
        return Place(rows, (1 - weight, weight), embedding)


@dataclass(frozen=True)
class Mixture(Strategy):
    """Among nearest neighbours: a point of the convex hull of an image and its neighbours in its class.

    Attributes:
        neighbours: How many beside the image itself.
        concentration: Of the symmetric Dirichlet distribution of the weights; below 1 near single parents, above 1
            near their mean.
    """

    neighbours: int = 5
    concentration: float = 1.0

    name: ClassVar[str] = "mixture"
    label_rule: ClassVar[LabelRule] = "majority"

    def __post_init__(self) -> None:
        """Refuses values outside the documented ones."""
        self._require(self.neighbours >= 1, f"neighbours must be at least 1, not {self.neighbours}")
        valid = math.isfinite(self.concentration) and self.concentration > 0
        self._require(valid, f"concentration must be above 0, not {self.concentration}")

    def place(self, parents: Parents, row: int, rng: np.random.Generator) -> Place:
        """Weights are a draw from Dir(concentration, ..., concentration)."""
        from .embedding_space import mix, nearest_neighbours

        self._require(len(parents) > 1, NEEDS_TWO)
        classmates = parents.classmates(row)
        ways = [f"set neighbours to {len(classmates)} or less"] if classmates else []
        ways += [] if parents.labels[row] is None else ["leave out the class"]
        self._require(
            len(classmates) >= self.neighbours,
            f"{parents.of_class(row)}, which leaves no {self.neighbours} neighbours; {', or '.join(ways)}",
        )
        rows = [row, *nearest_neighbours(parents.vectors, row, classmates, self.neighbours)]
        weights = rng.dirichlet([self.concentration] * len(rows)).tolist()
        return Place(tuple(rows), tuple(weights), mix(parents.embeddings[rows], weights))


@dataclass(frozen=True)
class Perturbation(Strategy):
    """Around one image: Gaussian noise whose covariance is that of the parents within their classes.

    Attributes:
        scale: Of the noise; at 1 as far from the image as classmates are from their mean, on average.
    """

    scale: float = 0.5

    name: ClassVar[str] = "perturbation"

    def __post_init__(self) -> None:
        """Refuses values outside the documented ones."""
        valid = math.isfinite(self.scale) and self.scale >= 0
        self._require(valid, f"scale must be at least 0, not {self.scale}")

    def place(self, parents: Parents, row: int, rng: np.random.Generator) -> Place:
        """The parent's embedding with noise."""
        import torch

        from .embedding_space import perturb

        noise = torch.from_numpy(rng.standard_normal(parents.vectors.shape[1]))
        return Place((row,), (1.0,), perturb(parents.embeddings[row], parents.root, noise, self.scale))


@dataclass(frozen=True)
class SDEdit(Strategy):
    """From the real image itself (Meng et al. 2022): noise is added to its latent, and sampling goes on from there.

    A model with an image condition is also given the image's embedding. Needs no image condition.

    Attributes:
        strength: How far to go back in the noise schedule, above 0 and at most 1, where nothing of the image is left.
    """

    strength: float = 0.6

    name: ClassVar[str] = "sdedit"

    def __post_init__(self) -> None:
        """Refuses values outside the documented ones."""
        self._require(0 < self.strength <= 1, f"strength must be above 0 and at most 1, not {self.strength}")

    def place(self, parents: Parents, row: int, rng: np.random.Generator) -> Place:
        """The parent itself."""
        return Place((row,), (1.0,), None if parents.embeddings is None else parents.embeddings[row])

    def arguments(self) -> dict[str, Any]:
        """The strength."""
        return {"strength": self.strength}


@dataclass(frozen=True)
class Prior(Strategy):
    """Without a real image: embeddings drawn from a learned distribution, see `embedding_prior`.

    Attributes:
        label: The only class to draw; None: all, as often as they are in the data that the prior was fitted to.
    """

    label: str | None = None

    name: ClassVar[str] = "prior"
    label_rule: ClassVar[LabelRule] = "requested"


STRATEGIES: dict[str, type[Strategy]] = {
    each.name: each for each in (Reconstruction, Interpolation, Mixture, Perturbation, SDEdit, Prior)
}


def parse_strategy(text: str) -> Strategy:
    """Read `"mixture:neighbours=5,concentration=0.5"`; options that are left out have their defaults.

    Raises:
        ValueError: An unknown strategy or option, or a value of another kind; lists the valid ones.
    """
    name, colon, rest = text.partition(":")
    strategy = STRATEGIES[choose("strategy", name.strip(), STRATEGIES)]
    kinds = get_type_hints(strategy)
    valid = [field.name for field in dataclasses.fields(strategy)]
    options: dict[str, Any] = {}
    for item in rest.split(",") if colon else ():
        option, equals, value = (part.strip() for part in item.partition("="))
        if option not in valid or option in options or not equals:
            takes = (
                f"takes each of these once: {', '.join(f'{each}=...' for each in valid)}" if valid else "takes none"
            )
            raise ValueError(f"option {item.strip()!r} of strategy {name!r}: it {takes}")
        options[option] = _read(value, kinds[option], f"{option} of strategy {name!r}")
    return strategy(**options)


def _read(text: str, kind: Any, what: str) -> Any:
    """A value of the kind of an option's annotation."""
    choices = get_args(kind)
    if kind is bool:
        return {"true": True, "false": False}[choose(what, text.lower(), ("true", "false"))]
    if str in (kind, *choices) or (choices and all(isinstance(choice, str) for choice in choices)):
        return text  # checked by the strategy itself
    number = int if kind is int else float
    try:
        return number(text)
    except ValueError:
        raise ValueError(f"{what} must be a {'whole ' if number is int else ''}number, not {text!r}") from None


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
