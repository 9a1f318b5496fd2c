"""`medisyn generate --like ... --strategy ...`: real images as material, see `medisyn.generation.strategies`.

- One `--like` without a strategy is its reconstruction, several are interpolated.
- Everything that needs no model is checked before one is loaded.

    medisyn generate --like a.png --like b.png --strategy interpolation:method=slerp --num-images 8
    medisyn generate --like-data "train-*.parquet" --label-column finding --strategy mixture --num-images 1000
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .arguments import check_names

if TYPE_CHECKING:
    from ..data.loading import ImageDataset
    from ..generation.embedding_prior import EmbeddingPrior
    from ..generation.requests import Request
    from ..generation.strategies import Strategy
    from ..pipelines.medisyn_pipeline import MediSynPipeline

LikeOption = Annotated[
    list[str] | None, typer.Option(metavar="IMAGE", help="Image whose embedding conditions; may be repeated.")
]
StrategyOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:OPTION=VALUE,...]",
        help="How images follow from --like or --like-data: reconstruction, interpolation, mixture, perturbation, "
        "sdedit, prior.",
    ),
]
LikeDataOption = Annotated[
    list[str] | None, typer.Option(metavar="DATA", help="Images that the new ones are made of; may be repeated.")
]
LabelColumnOption = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="Column of --like-data with the class that is passed on.")
]
PriorOption = Annotated[
    str | None, typer.Option(metavar="DIR", help="Learned prior, by scripts/embedding_prior.py; needs no real image.")
]
CacheOption = Annotated[str | None, typer.Option(metavar="DIR", help="Keeps the embeddings of --like-data.")]

ImageNoiseOption = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Noise on image embeddings, for models trained with it.")
]


@dataclass(frozen=True)
class Manifold:
    """The strategy and what it works with."""

    strategy: "Strategy"
    images: "ImageDataset | None"
    prior: "EmbeddingPrior | None"
    label_column: str | None
    cache: str | None

    def requests(
        self, pipe: "MediSynPipeline", templates: Sequence["Request"], num_images: int, seed: int
    ) -> list["Request"]:
        """`num_images` requests for each template."""
        from ..generation.manifold_requests import like_requests

        found = []
        for place, template in enumerate(templates):
            found += like_requests(
                pipe,
                self.strategy,
                self.images,
                num_images,
                seed + place * num_images,
                label_column=self.label_column,
                template=template,
                prior=self.prior,
                cache_dir=self.cache,
            )
        return found


def find_manifold(
    like: Sequence[str] | None,
    strategy: str | None,
    like_data: Sequence[str] | None,
    label_column: str | None,
    prior: str | None,
    cache: str | None,
    strength: float | None = None,
    init_image: str | None = None,
) -> Manifold | None:
    """What the options ask for; None where they ask for nothing of the kind.

    Raises:
        ValueError, FileNotFoundError: Whatever is wrong with them, in one line.
    """
    from ..generation.strategies import STRATEGIES, Interpolation, Prior, Reconstruction, SDEdit, parse_strategy

    check_names(strategy=strategy, label_column=label_column, prior=prior, cache=cache)
    for name in like or ():
        check_names(like=name)
    for name in like_data or ():
        check_names(like_data=name)
    given = [name for name, value in (("--like", like), ("--like-data", like_data), ("--prior", prior)) if value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given; images are made of one of them")
    chosen = None if strategy is None else parse_strategy(strategy)
    if not given:
        for name, value in (("--strategy", strategy), ("--label-column", label_column), ("--cache", cache)):
            if value is not None:
                raise ValueError(f"{name} needs --like, --like-data or --prior")
        return None
    if like and label_column is not None:
        raise ValueError("--label-column is of --like-data, not of --like")
    if prior and chosen is None:
        chosen = Prior()
    if like and chosen is None:
        chosen = Reconstruction() if len(like) == 1 else Interpolation()
    if chosen is None:
        raise ValueError(f"--like-data needs a --strategy: {', '.join(STRATEGIES)}")
    if isinstance(chosen, Prior) != bool(prior):
        raise ValueError(
            f"strategy {chosen.name} needs {'--prior' if isinstance(chosen, Prior) else '--like or --like-data'}"
        )
    if isinstance(chosen, SDEdit):
        if init_image is not None:
            raise ValueError("strategy sdedit starts from --like or --like-data: leave out --init-image")
        chosen = chosen if strength is None else dataclasses.replace(chosen, strength=strength)

    learned = None
    if prior:
        from ..generation.embedding_prior import load_prior

        learned = load_prior(prior)
    images = None if prior else _open(like or (), like_data or (), label_column)
    return Manifold(chosen, images, learned, label_column, cache)


def _open(like: Sequence[str], like_data: Sequence[str], label_column: str | None) -> "ImageDataset":
    """The real images, with the column that is needed."""
    from ..config import DataConfig
    from ..generation.requests import read_image

    for name in like:
        read_image(Path(name))  # says what is wrong with a file
    if like_data:
        from ..evaluation.inputs import open_images

        images = open_images(list(like_data), () if label_column is None else (label_column,))
        if label_column is not None:
            images.column(label_column)
        return images
    import datasets

    from ..data.loading import ImageDataset

    # files that were named one by one are images whatever their names end in
    table = datasets.Dataset.from_dict({"image": list(like)}).cast_column("image", datasets.Image(decode=False))
    return ImageDataset(table, DataConfig(source=tuple(like), caption_column=None))
