"""The candidates of an augmentation: how many of each class, what the model is asked for, and of which real images.

- Without a strategy a class is asked for alone. With one, candidates are made of real images of the class
  (`medisyn.generation.strategies`), the class being asked for beside it: `sdedit` needs no image condition.
- Parents are the labelled images. Those whose class a latent classifier's run has guessed (`task.pseudo_labels`) can
  be parents too: the class is the guess, and their own label is not read.

    strategy = check_strategy(pipe, "sdedit:strength=0.6")
    requests = candidate_requests(pipe, templates, {"benign": 100, "malignant": 100}, "finding", 0, strategy, small)
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.loading import ImageDataset
from .data.storage import digest
from .evaluation.utility_inputs import LabelledImages, with_labels
from .generation.class_requests import spread_requests
from .generation.manifold_requests import check_condition, like_requests
from .generation.requests import Request
from .generation.strategies import Prior, Strategy, parse_strategy
from .tasks.pseudo_labels import read_pseudo_labels

if TYPE_CHECKING:
    from .pipelines.medisyn_pipeline import MediSynPipeline


def candidate_counts(small: LabelledImages, classes: Sequence[str], ratio: float, balanced: bool) -> dict[str, int]:
    """Candidates of each class for `ratio` of them for each labelled image; at least one."""
    own = small.counts()
    if balanced:
        return {label: max(1, round(ratio * len(small) / len(classes))) for label in classes}
    return {label: max(1, round(ratio * own[label])) for label in classes}


def captions_by_class(small: LabelledImages) -> dict[str, list[str | None]]:
    """Captions of the labelled images; none where there is no such column."""
    captions: dict[str, list[str | None]] = {}
    if "caption" in small.images.column_names:
        for text, label in zip(small.images.column("caption"), small.labels, strict=True):
            captions.setdefault(label, []).append(text)
    return captions


def check_strategy(pipe: "MediSynPipeline", text: str) -> Strategy:
    """The strategy, if candidates of a class can be made by it with this model; otherwise a ValueError."""
    strategy = parse_strategy(text)
    if isinstance(strategy, Prior):
        raise ValueError("the strategy prior has no real images: candidates without a strategy have none either")
    if getattr(strategy, "across", False):
        raise ValueError(f"strategy {text}: candidates are made of images of one class")
    check_condition(pipe, strategy)
    return strategy


def guessed_images(
    run: str, images: ImageDataset, small: LabelledImages, classes: Sequence[str], origin: Mapping[str, Any]
) -> LabelledImages:
    """The images without a known label whose class a run has guessed, with the guesses as their classes.

    Args:
        run: Of the task latent_classifier, with pseudo-labels.
        images: All that there are; their class is not read, nor need they have one.
        small: Those whose label is known.
        classes: That there may be.
        origin: What the guesses must come from, see `read_pseudo_labels`.

    Raises:
        FileNotFoundError: The run keeps no guesses.
        ValueError: They come from other labels, are of other classes, or none of the images is among them.
    """
    guesses = read_pseudo_labels(run, origin)
    if foreign := sorted(set(guesses.values()) - set(classes)):
        raise ValueError(f"{run} has guessed the class {foreign[0]!r}, which is none of: {', '.join(classes)}")
    found = relabelled(images, guesses, small.group_column, small.hashes)
    if not len(found):
        raise ValueError(f"none of the images without a label is among the {len(guesses)} that {run} has guessed")
    return found


def relabelled(
    images: ImageDataset, labels: Mapping[str, str], group_column: str | None, without: Sequence[str] = ()
) -> LabelledImages:
    """The images whose content hash has a class in `labels`, with that class; but for the hashes of `without`."""
    apart, hashes = set(without), images.hashes()
    rows = [row for row, content in enumerate(hashes) if content in labels and content not in apart]
    return with_labels(images.select(rows), [labels[str(hashes[row])] for row in rows], group_column)


def candidate_requests(
    pipe: "MediSynPipeline",
    templates: Mapping[str, Request],
    counts: Mapping[str, int],
    label_column: str,
    seed: int = 0,
    strategy: Strategy | None = None,
    parents: LabelledImages | None = None,
    cache_dir: Path | None = None,
) -> list[Request]:
    """`counts` requests of each class, class by class, each with its class in the metadata and its own seed.

    Args:
        pipe: The model.
        templates: What it is asked for, by class.
        counts: How many of each class.
        label_column: The column of the metadata.
        seed: Of the first one.
        strategy: How they are made of real images; None: of none.
        parents: Real images with their classes, for the strategy.
        cache_dir: Keeps the embeddings of parents, in a folder for each class; None: they are computed anew.

    Raises:
        ValueError: A class has too few parents for the strategy.
    """
    if strategy is None or parents is None:
        return spread_requests(templates, counts, label_column, seed)
    requests: list[Request] = []
    for label, template in templates.items():
        own = parents.select([row for row, name in enumerate(parents.labels) if name == label])
        folder = None if cache_dir is None else cache_dir / f"parents_{digest(','.join(own.hashes).encode())[:12]}"
        named = replace(template, columns={label_column: label})
        first = seed + len(requests)
        requests += like_requests(pipe, strategy, own.images, counts[label], first, template=named, cache_dir=folder)
    return requests
