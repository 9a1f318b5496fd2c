"""Requests for images that are made of real ones by a strategy, with their parents and their label.

- Parents are named by the hash of their pixels, the one in `training_images.json` (`medisyn.training_record`).
- What a strategy draws comes from the seed of the image alone. Which parent it has comes from its index and the first
  seed: parents are taken in turn, in proportion to their classes, so more images of the same request extend it.
- Where numbers of each class are wanted, the draws are the same, and one of a class that is complete is left out.
- The embedding is one condition; a prompt or labels of the template go beside it.

    strategy = parse_strategy("mixture:neighbours=5,concentration=1")
    requests = like_requests(pipe, strategy, load_images("train-*.parquet"), 1000, label_column="finding")
    synthesize(pipe, requests, "outputs/mixture", **strategy.arguments())
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..prompts import choose
from .requests import RESERVED, Origin, Request, make_requests
from .strategies import Parents, Prior, SDEdit, Strategy, parse_strategy

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.loading import ImageDataset
    from ..pipelines.medisyn_pipeline import MediSynPipeline
    from .embedding_prior import EmbeddingPrior

logger = logging.getLogger(__name__)

MOST_DRAWS = 100  # for each image that is wanted of a class, or for each parent, whichever are more
_STREAM = 0x11CE  # keeps the draws of a strategy apart from the noise of the image, which has the same seed


def like_requests(
    pipe: "MediSynPipeline",
    strategy: Strategy | str,
    images: "ImageDataset | None",
    num_images: int | Mapping[str, int] = 1,
    seed: int = 0,
    *,
    label_column: str | None = None,
    template: Request | None = None,
    prior: "EmbeddingPrior | None" = None,
    cache_dir: str | Path | None = None,
) -> list[Request]:
    """Requests for images that are made of real ones.

    The metadata of each image gets `strategy`, `label_rule`, `parents` (content hashes), `parent_weights` and, with a
    `label_column`, `parent_labels` and that column.

    Args:
        pipe: The model that shall make them.
        strategy: One of `STRATEGIES`, or what `parse_strategy` reads.
        images: The parents; None for `prior` alone.
        num_images: How many; or how many of each class, which needs a `label_column`.
        seed: Of the first draw; draw i has `seed + i`.
        label_column: Column with the class of each parent. Images without a value are left out.
        template: Other conditions, such as a prompt.
        prior: The learned distribution for `prior`.
        cache_dir: Where embeddings are kept (`medisyn.data.cache`); None: they are computed anew.

    Raises:
        ValueError: A model without an image condition (`sdedit` needs none), a column that is reserved or does not
            exist, too few images for the strategy, a wanted class that there is none of, or a prior for another
            encoder.
    """
    strategy = parse_strategy(strategy) if isinstance(strategy, str) else strategy
    check_condition(pipe, strategy)
    if label_column in RESERVED:
        raise ValueError(f"the label column cannot be called {label_column!r}: the run writes a column of this name")
    wanted = num_images if isinstance(num_images, Mapping) else None
    number = sum(num_images.values()) if isinstance(num_images, Mapping) else num_images
    bare = make_requests([template or Request()], number, seed)
    if isinstance(strategy, Prior):
        return _from_prior(pipe, strategy, prior, bare, seed, label_column, wanted)
    if prior is not None or images is None or not len(images):
        raise ValueError(f"strategy {strategy.name} needs real images" + (", and takes no prior" if prior else ""))
    parents = make_parents(pipe, images, label_column, cache_dir)
    drawn = _from_parents(strategy, parents, bare[0], label_column)
    if wanted is None:
        return list(islice(drawn, number))
    if label_column is None:
        raise ValueError("numbers of each class need a label_column")
    for name in wanted:
        choose("class of the real images", name, sorted(set(map(str, parents.labels))))
    left, requests = Counter(wanted), []
    for request in islice(drawn, MOST_DRAWS * max(number, len(parents))):
        label = request.columns[label_column]
        if left[label] > 0:
            left[label] -= 1
            requests.append(request)
        if len(requests) == number:
            return requests
    lacking = next(name for name, count in left.items() if count > 0)
    raise ValueError(f"strategy {strategy} gives no {wanted[lacking]} images of class {lacking!r} from these parents")


def _from_parents(strategy: Strategy, parents: Parents, first: Request, label_column: str | None) -> Iterator[Request]:
    """Requests without end; of the parents, one after the other, with the seeds from that of `first` on."""
    from ..evaluation.sampling import draw_rows

    for index, row in enumerate(cycle(draw_rows(parents.labels, len(parents), first.seed))):
        seed = first.seed + index
        place = strategy.place(parents, row, np.random.default_rng((seed, _STREAM)))
        labels = tuple(parents.labels[each] for each in place.rows)
        label = heaviest(labels, place.weights)
        origin = Origin(
            str(strategy),
            strategy.label_rule,
            tuple(parents.hashes[each] for each in place.rows),
            place.weights,
            labels,
            strategy.name if label is None else f"{strategy.name}: {label}",
            place.embedding,
            (parents.images, row) if isinstance(strategy, SDEdit) else None,
        )
        columns = dict(first.columns) | ({} if label_column is None else {label_column: label})
        yield dataclasses.replace(first, seed=seed, origin=origin, columns=columns)


def check_condition(pipe: "MediSynPipeline", strategy: Strategy) -> None:
    """Refuse a strategy on embeddings for a model without an image condition."""
    if isinstance(strategy, SDEdit):
        return
    if "image" not in pipe.kinds:
        has = f"it has: {', '.join(pipe.kinds)}" if pipe.kinds else "it is unconditional"
        raise ValueError(
            f"strategy {strategy.name} needs image embeddings, and this model has no image condition; {has}. "
            "Valid here: sdedit, which needs none"
        )
    if pipe.image_encoder is None and not isinstance(strategy, Prior):
        raise ValueError(f"strategy {strategy.name}: this pipeline was saved without its image encoder; load it too")


def make_parents(
    pipe: "MediSynPipeline", images: "ImageDataset", label_column: str | None, cache_dir: str | Path | None = None
) -> Parents:
    """The readable, labelled images among `images`, with their embeddings where the model takes such."""
    labels: list[str | None] = [None] * len(images)
    if label_column is not None:
        labels = [None if value in (None, "") else str(value) for value in images.column(label_column)]
        kept = [row for row, label in enumerate(labels) if label is not None]
        if not kept:
            raise ValueError(f"no image has a value in the column {label_column!r}")
        if len(kept) < len(images):
            logger.warning(
                "%d of %d images have no %s and are left out", len(images) - len(kept), len(images), label_column
            )
            images, labels = images.select(kept), [labels[row] for row in kept]
    hashes = images.hashes()
    if None in hashes:
        raise ValueError(f"image {hashes.index(None)} cannot be read; leave such images out with drop_unreadable()")
    embeddings = embed_images(pipe, images, cache_dir) if "image" in pipe.kinds and pipe.image_encoder else None
    return Parents(images, hashes, labels, embeddings)


def embed_images(
    pipe: "MediSynPipeline", images: "ImageDataset", cache_dir: str | Path | None = None, batch_size: int = 32
) -> "Tensor":
    """Image tokens (N, T, width) of all images, float32, by the pipeline's `encode_image` or from their cache."""
    import torch

    if cache_dir is not None:
        from ..data.cache import build_image_embedding_cache

        cache = build_image_embedding_cache(pipe, images, cache_dir, batch_size=batch_size)
        return cache.embeddings(range(len(images)))
    with torch.no_grad():
        batches = [
            pipe.encode_image([images.image(row) for row in range(start, min(start + batch_size, len(images)))])
            for start in range(0, len(images), batch_size)
        ]
    return torch.cat(batches).float().cpu()


def heaviest(labels: Sequence[str | None], weights: Sequence[float]) -> str | None:
    """The label with the largest total weight; of equal ones the first."""
    total: dict[str | None, float] = {}
    for label, weight in zip(labels, weights, strict=True):
        total[label] = total.get(label, 0.0) + weight
    return max(total, key=lambda label: total[label])


def _from_prior(
    pipe: "MediSynPipeline",
    strategy: Prior,
    prior: "EmbeddingPrior | None",
    bare: Sequence[Request],
    seed: int,
    label_column: str | None,
    wanted: Mapping[str, int] | None,
) -> list[Request]:
    from ..evaluation.sampling import draw_rows

    if prior is None:
        raise ValueError("strategy prior needs a learned prior: the folder that scripts/embedding_prior.py wrote")
    prior.check_encoder(pipe)
    if strategy.label is not None:
        choose("class of the prior", strategy.label, prior.classes)
    known = {name: n for name, n in prior.counts.items() if strategy.label in (None, name)}
    for name in wanted or ():
        choose("class of the prior", name, known)
    classes = [name for name, count in (wanted or known).items() for _ in range(count)]
    requests = []
    for request, row in zip(bare, draw_rows(classes, len(bare), seed), strict=True):
        embedding = prior.sample(classes[row], np.random.default_rng((request.seed, _STREAM)))[None]
        origin = Origin(
            f"{strategy}{',' if strategy.label else ':'}prior={prior.hash}",
            strategy.label_rule,
            title=f"prior: {classes[row]}",
            embedding=embedding,
        )
        columns = dict(request.columns) | {label_column or prior.label_column: classes[row]}
        requests.append(dataclasses.replace(request, origin=origin, columns=columns))
    return requests
