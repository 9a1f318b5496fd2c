"""Variations of real images: do they stay in the class of their parent, and are they no copies of it?

- A copy is as near to its parent as the parent's own JPEG re-compression; what has nothing of its parent is as near as
  a stranger, an image of the same class from another patient. A variation should lie between the two.
- Parents are taken from one half of the real images, and Fréchet distances are those to the other half. The halves
  share no patient, so no variation is near the reference because its own parent is in it.
- All images are compared at the size of the synthetic ones; re-compression is done at that size, where it costs most.
- Similarity is best measured by another encoder than the one that conditions the model.

    report = evaluate_variations(pipe, real, train, load_extractor("dinov2:facebook/dinov2-small"), Path("out"))
    report["similarity"]["variation"]   # {"images": .., "median": .., "median_interval": [.., ..]}
"""

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from ..backbone import model_hash
from ..data.loading import ImageDataset
from ..generation.manifold_requests import check_condition, like_requests
from ..generation.provenance import atomic_file
from ..generation.requests import Request, make_requests, read_image
from ..generation.strategies import STRATEGIES, parse_strategy
from ..generation.synthesize import synthesize
from .agreement import LabelledFeatures, fit_classifier, label_agreement
from .codec import Codec
from .features import FeatureExtractor, extract_features
from .fidelity import fidelity, split_halves
from .inputs import groups_of, nested_values, source_names, without_overlap
from .judge import train_judge
from .sampling import adapter_names, draw_rows, model_name
from .scores import score_values
from .utility_classifier import CnnClassifier
from .variations_report import format_variations

if TYPE_CHECKING:
    from ..loading import Adapters
    from ..pipelines.medisyn_pipeline import MediSynPipeline

Made = tuple[np.ndarray, list[int]]  # features of images, and the row of the parent of each

QUALITIES = (50, 75)  # of JPEG
SHARE_OF_REAL = 0.85  # of the agreement of the parents, which that of their variations should reach
BATCH = 32  # images whose features are taken at once


def evaluate_variations(
    pipe: "MediSynPipeline",
    real: ImageDataset,
    train: ImageDataset,
    extractor: FeatureExtractor,
    out: Path,
    columns: Sequence[str] = ("modality", "finding"),
    strategy: str = "reconstruction",
    number: int = 200,
    seed: int = 0,
    adapter: "Adapters | None" = None,
    group_column: str = "group_id",
    cnn: CnnClassifier | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    **arguments: Any,
) -> dict:
    """Make one variation of each of `number` real images and compare; write `report.json` and `report.md` to `out`.

    A model that takes text also makes an image from each parent's caption, where there is one, for comparison.

    Args:
        pipe: A model with an image condition (`sdedit` needs none).
        real: Validation images; those that the model has seen are left out.
        train: Training images, for the classifier.
        extractor: Its resolution is set to that of the images made.
        out: The images go to `variations/` and `prompted/` inside; a run that was stopped goes on.
        columns: Classes; each column nests in those before it, and the last tells who is a stranger.
        strategy: One that has a single parent, with its options, see `medisyn.generation.strategies`.
        number: Of parents, in proportion to their classes, none twice.
        seed: Image i is made with `seed + i`; also seeds the halves, the draws and the bootstrap.
        adapter: What `pipe` was loaded with, for the guard against leakage.
        group_column: Patient, for halves, strangers and intervals; used where there is one.
        cnn: A second judge of the classes, which learns them from `train` (`medisyn.evaluation.judge`); its resolution
            is at most that of the images.
        cache_dir: Keeps features of real images.
        progress: Show bars.
        arguments: Of `synthesize`, such as `num_inference_steps`.

    Returns:
        The report: `agreement` (column to what `label_agreement` returns and `ratio` to the parents), with `cnn` also
        `judge` (`classifier`, and `agreement` of the same form), `similarity` (see `compare_with_parents`), `fidelity`
        (see the function) and `checks` (name to boolean).

    Raises:
        ValueError: A strategy without a single parent, a model without an image condition, no such column, no two
            classes to tell apart, too few parents, or real images that the model was trained on.
        FileExistsError: `out` has the images of another request.
    """
    chosen = parse_strategy(strategy)
    if chosen.label_rule != "inherited":
        valid = ", ".join(name for name, each in STRATEGIES.items() if each.label_rule == "inherited")
        raise ValueError(f"a variation has one parent, which strategy {chosen.name!r} does not give; valid: {valid}")
    check_condition(pipe, chosen)
    _check_classes(nested_values(train, columns), columns)
    real, overlap = without_overlap(pipe, real, train, adapter=adapter)
    classes, groups = nested_values(real, columns)[columns[-1]], groups_of(real, group_column)
    _, half = split_halves(groups or range(len(real)), classes, seed)
    known = [int(row) for row in half if classes[row] is not None]
    if not 1 <= number <= len(known):
        raise ValueError(f"{number} parents, but half of the real images is {len(known)}; valid: 1 to {len(known)}")
    parents = [known[place] for place in draw_rows([classes[row] for row in known], number, seed)]

    shared: dict[str, Any] = {"model": model_name(pipe), "progress": progress} | arguments
    requests, rows = _variations(pipe, strategy, real, parents, columns, seed)
    files = {"variations": synthesize(pipe, requests, out / "variations", **chosen.arguments(), **shared)}
    rows_of = {"variations": rows}
    requests, rows = _prompted(pipe, real, rows, columns, seed)
    if requests:
        files["prompted"] = synthesize(pipe, requests, out / "prompted", **shared)
        rows_of["prompted"] = rows
    size = extractor.resolution = min(read_image(files["variations"][0]).size)
    real_features = extract_features(extractor, real, cache_dir, progress=progress)
    train_features = extract_features(extractor, train, cache_dir, progress=progress)
    made: dict[str, Made] = {"parents": (real_features[parents], parents)}
    for name, own in files.items():
        made[name] = (_features(extractor, map(read_image, own)), rows_of[name])

    variations, rows = made["variations"]
    compared = {"variation": variations}
    for quality in QUALITIES:
        copies = (recompressed(real.image(row), size, quality) for row in rows)
        compared[f"jpeg_{quality}"] = _features(extractor, copies)
    others = strangers(classes, groups, rows, seed)
    nobody = np.full(real_features.shape[1], np.nan, dtype=np.float32)
    compared["stranger"] = np.stack([nobody if other is None else real_features[other] for other in others])
    patients = None if groups is None else [groups[row] for row in rows]
    report: dict[str, Any] = {
        "model": {"name": model_name(pipe), "hash": model_hash(pipe), "adapters": adapter_names(pipe)},
        "strategy": str(chosen),
        "settings": {name: value for name, value in arguments.items() if value is not None} | {"seed": seed},
        "sources": {"real": source_names(real), "train": source_names(train)},
        "images": {"real": len(real), "train": len(train)} | {name: len(own) for name, (_, own) in made.items()},
        "extractor": {"spec": extractor.spec, "weights_sha256": extractor.weights_sha256, "resolution": size},
        "overlap": overlap,
        "agreement": _agreement(columns, train, train_features, real, groups, made, seed),
        "similarity": compare_with_parents(real_features[rows], compared, patients, seed),
        "fidelity": {name: fidelity(real_features, made[name][0], groups, classes, seed) for name in files},
    }
    if cnn is not None:
        judge = train_judge(replace(cnn, resolution=min(cnn.resolution, size)), train, columns, seed, cache_dir)
        cnn = judge.cnn
        made = {"parents": (cnn.inputs_of(real.image(row) for row in parents).numpy(), parents)}
        made |= {name: (cnn.inputs_of(map(read_image, own)).numpy(), rows_of[name]) for name, own in files.items()}
        found = _agreement(columns, train, np.empty((len(train), 0)), real, groups, made, seed, judge.restrict)
        report["judge"] = {"classifier": judge.describe(), "agreement": found}
    report["checks"] = _checks(report)
    for name, text in (("report.json", json.dumps(report, indent=2) + "\n"), ("report.md", format_variations(report))):
        with atomic_file(out / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return report


def _check_classes(values: Mapping[str, Sequence[str | None]], columns: Sequence[str]) -> None:
    """Raise ValueError if the training images have nowhere two classes of the last column."""
    outer = values[columns[-2]] if len(columns) > 1 else [""] * len(values[columns[-1]])
    known = {(above, value) for above, value in zip(outer, values[columns[-1]], strict=True) if value is not None}
    if len(known) <= len({above for above, _ in known}):
        raise ValueError(f"the training images have no two classes of {columns[-1]} to tell apart")


# --- measures --------------------------------------------------------------------------------------------------------


def recompressed(image: Image.Image, size: int, quality: int) -> Image.Image:
    """An RGB image, cut to a square of `size` pixels, after JPEG of a quality from 1 to 95."""
    return Codec("jpeg", quality)(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def strangers(
    classes: Sequence[str | None], groups: Sequence[Hashable] | None, rows: Sequence[int], seed: int = 0
) -> list[int | None]:
    """For each of `rows` a random other row of the same class and another group; None where there is none."""
    groups = range(len(classes)) if groups is None else groups
    rng = np.random.default_rng(seed)
    found: list[int | None] = []
    for row in rows:
        others = [i for i, name in enumerate(classes) if name == classes[row] and groups[i] != groups[row]]
        found.append(others[int(rng.integers(len(others)))] if others else None)
    return found


def compare_with_parents(
    parents: np.ndarray,
    compared: Mapping[str, np.ndarray],
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, dict]:
    """Cosine similarity of images to their parents.

    Args:
        parents: Features (N, D).
        compared: Name to features (N, D) of what is compared with each parent; rows of NaN where there is nothing.
        groups: Patient of each parent, drawn together in the bootstrap.
        seed: Of the bootstrap.

    Returns:
        Per name what `score_values` returns, and `share_above` (name to the share of parents to which the others of
        that name are less similar); or `{"omitted": reason}`.
    """

    def unit(features: np.ndarray) -> np.ndarray:
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    similarity = {name: (unit(parents) * unit(features)).sum(axis=1) for name, features in compared.items()}
    result: dict[str, dict] = {}
    for name, values in similarity.items():
        there = np.flatnonzero(~np.isnan(values)).tolist()
        if not len(there):
            result[name] = {"omitted": "no parent has one"}
            continue
        result[name] = score_values(values[there], groups and [groups[row] for row in there], seed=seed)
        pairs = {other: ~np.isnan(values + theirs) for other, theirs in similarity.items() if other != name}
        result[name]["share_above"] = {
            other: float((values > similarity[other])[both].mean()) for other, both in pairs.items() if both.any()
        }
    return result


def _features(extractor: FeatureExtractor, images: Iterable[Image.Image]) -> np.ndarray:
    left = iter(images)
    parts: list[np.ndarray] = []
    while batch := list(islice(left, BATCH)):
        parts.append(extractor(batch).numpy())
    return np.concatenate(parts)


def _agreement(
    columns: Sequence[str],
    train: ImageDataset,
    train_features: np.ndarray,
    real: ImageDataset,
    groups: Sequence[Hashable] | None,
    made: Mapping[str, Made],
    seed: int,
    fit: Callable = fit_classifier,
) -> dict[str, dict]:
    """Per column `label_agreement` of images with the classes of their parents, and its `ratio` to the parents'."""
    result: dict[str, dict] = {}
    for depth in range(1, len(columns) + 1):
        nested = columns[:depth]
        training = _labelled(train, (train_features, list(range(len(train)))), nested)
        evaluated = {name: _labelled(real, each, nested, groups) for name, each in made.items()}
        result[nested[-1]] = scores = label_agreement(training, evaluated, seed, fit=fit)
        best = scores.get("parents", {}).get("accuracy")
        if best:
            others = {name: scores[name].get("accuracy") for name in made if name != "parents"}
            scores["ratio"] = {name: value / best for name, value in others.items() if value is not None}
    return result


def _labelled(
    images: ImageDataset, made: Made, columns: Sequence[str], groups: Sequence[Hashable] | None = None
) -> LabelledFeatures:
    """Features with the last of `columns`, nested in those before it, and the groups of their rows of `images`."""
    features, rows = made
    labels = nested_values(images, columns[-1:])[columns[-1]]
    outer = nested_values(images, columns[:-1])[columns[-2]] if len(columns) > 1 else None

    def of(values: Sequence | None) -> list | None:
        return None if values is None else [values[row] for row in rows]

    return LabelledFeatures(features, of(labels), of(outer), of(groups))


def _checks(report: Mapping) -> dict[str, bool]:
    """What variations should be, as far as it could be measured."""
    checks = {}
    judges = {"": report["agreement"], ", by a CNN": report.get("judge", {}).get("agreement", {})}
    for (judge, columns), column in ((each, column) for each in judges.items() for column in each[1]):
        if "variations" in (ratio := columns[column].get("ratio", {})):
            name = f"agreement on {column} is at least {SHARE_OF_REAL} of the parents'{judge}"
            checks[name] = ratio["variations"] >= SHARE_OF_REAL
    median = {name: scores.get("median") for name, scores in report["similarity"].items()}
    copies = [median[f"jpeg_{quality}"] for quality in QUALITIES]
    checks["less like the parent than its JPEG re-compression"] = median["variation"] < min(copies)
    if median["stranger"] is not None:
        checks["more like the parent than a stranger of the class"] = median["variation"] > median["stranger"]
    return checks


# --- images ----------------------------------------------------------------------------------------------------------


def _variations(
    pipe: "MediSynPipeline",
    strategy: str,
    real: ImageDataset,
    parents: Sequence[int],
    columns: Sequence[str],
    seed: int,
) -> tuple[list[Request], list[int]]:
    """Requests for one variation of each parent, and the row of each one's parent."""
    chosen = real.select(parents)
    row_of = dict(zip(chosen.hashes(), parents, strict=True))
    requests = like_requests(pipe, strategy, chosen, len(parents), seed, label_column=columns[-1])
    rows = [row_of[request.origin.parents[0]] for request in requests]
    return [
        replace(request, columns=_values(real, columns, row)) for request, row in zip(requests, rows, strict=True)
    ], rows


def _prompted(
    pipe: "MediSynPipeline", real: ImageDataset, rows: Sequence[int], columns: Sequence[str], seed: int
) -> tuple[list[Request], list[int]]:
    """Requests for one image from the caption of each row that has one, for a model that takes text."""
    if "text" not in pipe.kinds or "caption" not in real.column_names:
        return [], []
    captions = real.column("caption")
    rows = [row for row in rows if captions[row]]
    requests = [Request(prompt=captions[row], columns=_values(real, columns, row)) for row in rows]
    return make_requests(requests, 1, seed), rows


def _values(real: ImageDataset, columns: Sequence[str], row: int) -> dict[str, Any]:
    return {column: real.column(column)[row] for column in columns}
