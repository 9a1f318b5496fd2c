"""Strategies of the embedding manifold as makers of pools: synthetic images from the very images that a fold has.

- The images of a fold are the only parents, so a measurement of utility with 50 real images uses 50 and no more.
- A pool is a folder of `medisyn generate`: it continues where it stopped, and each image names its parents.

    make = strategy_maker(pipe, "mixture:neighbours=5", "finding")
    measure_utility("train.parquet", test="validation.parquet", strategies={"mixture": make})
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .utility_cells import Maker
from .utility_inputs import LabelledImages, open_labelled

if TYPE_CHECKING:
    from ..generation.embedding_prior import EmbeddingPrior
    from ..pipelines.medisyn_pipeline import MediSynPipeline


def strategy_maker(
    pipe: "MediSynPipeline",
    strategy: str,
    label_column: str,
    *,
    prior: "EmbeddingPrior | None" = None,
    model: str = "",
    cache_dir: str | Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> Maker:
    """A maker of pools for `measure_utility`.

    Args:
        pipe: The model that makes the images.
        strategy: What `medisyn.generation.strategies.parse_strategy` reads.
        label_column: Column of the class of real and of synthetic images.
        prior: The learned distribution for the strategy `prior`. It must not have learnt from test images.
        model: The model's name, for the record of each image.
        cache_dir: Keeps the embeddings of real images, in a folder for each set of them.
        progress: Show a bar.
        settings: Further arguments of `synthesize`, such as `num_inference_steps`.

    Raises:
        ValueError: An unknown strategy, one that this model cannot follow, or no learned prior of its embeddings.
    """
    from ..generation.manifold_requests import check_condition, like_requests
    from ..generation.strategies import Prior, parse_strategy
    from ..generation.synthesize import synthesize

    parsed = parse_strategy(strategy)
    check_condition(pipe, parsed)
    if isinstance(parsed, Prior):
        if prior is None:
            raise ValueError("strategy prior needs a learned prior: the folder that scripts/embedding_prior.py wrote")
        prior.check_encoder(pipe)

    def make(real: LabelledImages, wanted: Mapping[str, int], folder: Path, seed: int) -> LabelledImages:
        images = None if parsed.name == "prior" else real.images
        cache = None if images is None or cache_dir is None else Path(cache_dir) / f"embeddings_{_digest(real.hashes)}"
        requests = like_requests(
            pipe, parsed, images, wanted, seed, label_column=label_column, prior=prior, cache_dir=cache
        )
        synthesize(pipe, requests, folder, model=model, progress=progress, **parsed.arguments(), **settings)
        return open_labelled(str(folder), label_column, classes=tuple(wanted))

    return make


def _digest(hashes: Sequence[str]) -> str:
    """Names the images of a fold: each fold has others, and a cache of embeddings is of one set of images."""
    return hashlib.blake2b(",".join(hashes).encode(), digest_size=6).hexdigest()
