r"""One command from a model (or a folder of images) to `report.json`, a table and a labelled grid.

Notable choices:

* A model is asked for one image per caption of real images, drawn in proportion to the first column of `per` and with
  one seed per image. The row's labels become the requested labels of its image, and the images are kept as a folder
  that can be evaluated again.
* Columns of `per` nest: `modality,finding` looks at findings within their modality.
* Evaluation refuses real images that the model or its adapter was trained on, by the hashes of `training_images.json`,
  which travels with both, or that are among `train`. Below 2 %, copies are left out instead, and counted.
* Captions and seeds depend on the real images and the seed alone: reports with and without an adapter compare.
* A new specialty is judged with `train` = the base's images and the new ones, and `real` = new ones: the agreement of
  the column `modality` is then the share of images that a classifier of all modalities puts into the new one.
* All images are brought to the size of the synthetic ones before features are taken.

    medisyn evaluate default --adapter adapters/knees --real knees@validation --train knees@train \
        --train "corpus/train-*.parquet" --ordinal finding --extractor timm:tf_efficientnet_lite0@lite0.pth
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .agreement import LabelledFeatures, fit_classifier, label_agreement
from .codec import Codec
from .features import extract_features, load_extractor
from .fidelity import NEAREST, fidelity, fidelity_by_value, nearest_training_distance
from .inputs import (
    Images,
    groups_of,
    is_images,
    lacking_column,
    nested_values,
    open_images,
    open_pipeline,
    shipped_schema,
    source_names,
    with_conditions,
    with_labels,
    without_overlap,
)
from .ordinal import Ordinal, find_grades, parse_ordinal
from .presentation import comparison_grid, format_table, write_report
from .sampling import adapter_names, check_replaceable, generate_like, model_name

if TYPE_CHECKING:
    from ..data.loading import ImageDataset
    from ..loading import Adapters
    from ..pipelines.medisyn_pipeline import MediSynPipeline
    from .utility_classifier import CnnClassifier

USUAL_COLUMNS = ("modality", "finding")


def evaluate(
    model_or_folder: "str | Path | ImageDataset | MediSynPipeline | None",
    real: Images,
    *,
    adapter: "Adapters | None" = None,
    train: Images | None = None,
    per: Sequence[str] | None = None,
    ordinal: Ordinal | None = None,
    label_columns: Mapping[str, str] | None = None,
    conditions: Sequence[str] | None = None,
    extractor: str = "inception",
    codec: str | None = None,
    num_images: int = 600,
    num_inference_steps: int | None = None,
    guidance_scale: float | Mapping[str, float] | None = None,
    guidance_interval: tuple[float, float] | None = None,
    seed: int = 0,
    out: str | Path = "outputs/evaluation",
    batch_size: int = 16,
    cache_dir: str | Path | None = None,
    group_column: str = "group_id",
    cnn: "CnnClassifier | None" = None,
    allow_overlap: bool = False,
    progress: bool = True,
) -> dict:
    """Measure synthetic images against real ones; write `report.json`, `report.md` and `grid.png` to `out`.

    Args:
        model_or_folder: A pipeline, its folder or Hub name, None for the embedded default; or synthetic images: a
            folder with `metadata.jsonl`, or any source of `load_images`. Its `per` columns are the requested labels.
        real: Real images that the model has not seen, of one source or several. A string may end in `@SPLIT`.
        adapter: What `medisyn.load_pipeline` takes: a name, several, or a mapping from names to weights.
        train: Real training images, of one source or several; needed for label agreement and for the distance to the
            nearest training image.
        per: Columns to report on, each nested in those before it; None takes those of `USUAL_COLUMNS` that `real` has.
        ordinal: Those of them whose values are grades, which adds quadratic-weighted kappa: "COLUMN" where the values
            end in numbers, else "COLUMN=FIRST,SECOND,..." from the lowest to the highest; several, or a mapping.
        label_columns: Label field of the model -> column of `real`, for fields that its schema cannot read by itself.
        conditions: Kinds of condition that the model is given of each real image, "text", "labels", "image"; only
            images that have all of them are used. None: captions and labels, as far as an image has them.
        extractor: One of `medisyn.evaluation.EXTRACTORS`.
        codec: "webp:90", "jpeg:75": what all images pass through before the extractor sees them, so that traces of a
            codec that only the real ones have do not count.
        num_images: Images to generate; of a folder, all are used.
        num_inference_steps: Of the sampler; None is the pipeline's default.
        guidance_scale: See `MediSynPipeline`; None is the pipeline's default.
        guidance_interval: See `MediSynPipeline`; None is the pipeline's default.
        seed: Image i is generated with seed `seed + i`; also seeds splits, draws and the bootstrap.
        out: Folder of the results; generated images go to `images/` inside.
        batch_size: Images per call of the pipeline.
        cache_dir: Folder that keeps features between evaluations; None keeps nothing.
        group_column: Patient column of the real images, used where they have it.
        cnn: A second judge of agreement and fidelity, which learns the classes from `train`
            (`medisyn.evaluation.judge`); its resolution is at most that of the images.
        allow_overlap: Go on although the model has seen some of the real images; the report says how many.
        progress: Show progress bars.

    Returns:
        The content of `report.json`.

    Raises:
        ValueError: Unknown extractor, codec or column, an ordinal column without an order, an adapter for images or of
            another base, or real images that the model was trained on.
        FileNotFoundError: A source does not exist.
        FileExistsError: `out` has a folder `images` that no evaluation made.
        OSError: `out` cannot be written, or extractor weights cannot be downloaded.
    """
    if cnn is not None and train is None:
        raise ValueError("a cnn learns the classes from real training images: give train")
    if num_images < 1 or batch_size < 1:
        raise ValueError(f"num_images and batch_size must be at least 1, not {num_images} and {batch_size}")
    orders = parse_ordinal(ordinal)
    through = None if codec is None else Codec.parse(codec)
    out = Path(out)
    if is_images(model_or_folder) and (adapter is not None or label_columns or conditions):
        raise ValueError(
            f"adapter, label_columns and conditions are for a model, but {str(model_or_folder)!r} names images"
        )
    pipe = None if is_images(model_or_folder) else open_pipeline(model_or_folder, adapter)
    if pipe is not None:
        check_replaceable(out / "images")
    columns = USUAL_COLUMNS if per is None else tuple(per)
    everything = open_images(real, (*columns, "caption"), shipped_schema(pipe))
    if label_columns:
        everything = with_labels(everything, pipe, label_columns)
    if conditions:
        everything = with_conditions(everything, pipe, conditions)
    train = None if train is None else open_images(train, columns)
    if per is None:
        per = [column for column in USUAL_COLUMNS if column in everything.column_names]
    real, overlap = without_overlap(pipe, everything, train, allow_overlap, adapter)
    real_values = nested_values(real, per)
    grades = _grades(orders, real, train, per)
    # Built before anything is generated, so that a missing weights file does not cost an hour.
    features_of = load_extractor(extractor, pipe, codec=through)
    out.mkdir(parents=True, exist_ok=True)
    if pipe is None:
        synthetic = open_images(model_or_folder)
        subject: dict[str, Any] = {"images": str(synthetic.config.source)}
    else:
        arguments: dict[str, Any] = {"num_inference_steps": num_inference_steps}
        arguments |= {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval}
        arguments = {name: value for name, value in arguments.items() if value is not None}
        # Also the captions of copies, so that what a model has seen does not change what is asked for. An image is not
        # only asked for but shown to the model.
        asked = real if "image" in pipe.kinds else everything
        synthetic = generate_like(
            pipe, asked, out / "images", per, num_images, seed, batch_size, progress, conditions, **arguments
        )
        subject = _subject(pipe) | {"conditions": list(conditions or pipe.kinds), **arguments}

    features_of.resolution = min(synthetic.image(0).size)
    sets = {"real": real, "synthetic": synthetic} | ({} if train is None else {"train": train})
    features = {
        name: extract_features(features_of, images, cache_dir, progress=progress) for name, images in sets.items()
    }
    requested = nested_values(synthetic, [column for column in per if column in synthetic.column_names])
    groups = groups_of(real, group_column)
    train_groups = None if train is None else groups_of(train, group_column)
    shared = None if groups is None or train_groups is None else len(set(groups) & set(train_groups))
    report = {
        "subject": subject | {"seed": seed},
        "images": {name: len(images) for name, images in sets.items()},
        "sources": {name: source_names(images) for name, images in sets.items()},
        "extractor": {
            "spec": extractor,
            "weights_sha256": features_of.weights_sha256,
            "features": features["real"].shape[1],
            "resolution": features_of.resolution,
            "codec": codec,
        },
        "overlap": overlap,
        "fidelity": _fidelity(features, real_values, requested, groups, seed),
        "agreement": _agreement(features, sets, per, groups, seed, grades),
        "nearest_training_image": _nearest(features, seed),
        "notes": _notes(per, requested, groups, shared, overlap),
    }
    if cnn is not None:
        every = {"real": real_values, "synthetic": requested}
        report["judge"] = _judged(cnn, sets, per, groups, seed, grades, every, cache_dir)
    column = per[0] if per and per[0] in requested else None
    values = {} if column is None else {"real": real_values[column], "synthetic": requested[column]}
    write_report(report, out, comparison_grid(real, synthetic, values, seed))
    print(format_table(report))
    return report


def _subject(pipe: "MediSynPipeline") -> dict[str, Any]:
    """Names and hashes of the model and, where there are any, of its adapters with their weights."""
    from ..backbone import model_hash
    from ..generation.provenance import adapter_hash

    subject: dict[str, Any] = {"model": model_name(pipe), "model_hash": model_hash(pipe)}
    adapters = adapter_names(pipe)
    return subject | ({"adapters": adapters, "adapter_hash": adapter_hash(pipe)} if adapters else {})


# --- measures --------------------------------------------------------------------------------------------------------


def _fidelity(features: dict, real_values: dict, requested: dict, groups: list | None, seed: int) -> dict:
    strata = list(real_values.values())[-1] if real_values else None
    result: dict = {"overall": fidelity(features["real"], features["synthetic"], groups, strata, seed)}
    for column, values in requested.items():
        if column in real_values:
            result[column] = fidelity_by_value(
                features["real"], features["synthetic"], real_values[column], values, groups, seed
            )
    return result


def _grades(
    orders: Mapping[str, Sequence[str] | None], real: "ImageDataset", train: "ImageDataset | None", per: Sequence[str]
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Per ordinal column, the grades of each outer value that `real` has."""
    grades = {}
    for column, order in orders.items():
        if column not in per:
            raise ValueError(
                f"the ordinal column {column!r} is not among those to report on: {', '.join(per) or 'none'}"
            )
        if train is None:
            raise ValueError(f"agreement of the ordinal column {column!r} needs training images: give train")
        depth = per.index(column)
        outer = [nested_values(images, per[:depth])[per[depth - 1]] if depth else None for images in (real, train)]
        labels = [None if value is None else str(value) for value in train.column(column)]
        grades[column] = find_grades(column, order, labels, outer[1], None if outer[0] is None else set(outer[0]))
    return grades


def _judged(
    cnn: "CnnClassifier",
    sets: dict,
    per: Sequence[str],
    groups: list | None,
    seed: int,
    grades: Mapping[str, Mapping],
    values: Mapping[str, dict],
    cache_dir: str | Path | None,
) -> dict:
    """Agreement and fidelity by a network that learns from the training images, and how it was trained."""
    from .judge import train_judge

    cnn = replace(cnn, resolution=min(cnn.resolution, *sets["synthetic"].image(0).size))
    known = [column for depth, column in enumerate(per) if not lacking_column(sets["train"], per[: depth + 1])]
    try:
        judge = train_judge(cnn, sets["train"], known, seed, cache_dir)
    except ValueError as error:
        return {"omitted": str(error)}
    pixels = {name: cnn.inputs(sets[name]).numpy() for name in ("real", "synthetic")}
    features = {name: judge.features(inputs) for name, inputs in pixels.items()}
    pixels["train"] = np.empty((len(sets["train"]), 0))  # it has learnt from them already
    return {
        "classifier": judge.describe(),
        "agreement": _agreement(pixels, sets, per, groups, seed, grades, judge.restrict),
        "fidelity": _fidelity(features, values["real"], values["synthetic"], groups, seed),
    }


def _agreement(
    features: dict,
    sets: dict,
    per: Sequence[str],
    groups: list | None,
    seed: int,
    grades: Mapping[str, Mapping],
    fit: Callable = fit_classifier,
) -> dict:
    if "train" not in sets:
        return {"omitted": "no training images were given"}
    result = {}
    for depth, column in enumerate(per):
        lacking = {name: lacking_column(images, per[: depth + 1]) for name, images in sets.items()}
        reason = lacking["train"] or lacking["real"]
        if reason is not None:
            result[column] = {"omitted": reason}
            continue
        labelled = {}
        for name in (name for name, reason in lacking.items() if reason is None):
            own = [None if value is None else str(value) for value in sets[name].column(column)]
            within = nested_values(sets[name], per[:depth])[per[depth - 1]] if depth else None
            labelled[name] = LabelledFeatures(features[name], own, within, groups if name == "real" else None)
        training = labelled.pop("train")
        result[column] = label_agreement(training, dict(sorted(labelled.items())), seed, grades.get(column), fit)
    return result


def _nearest(features: dict, seed: int) -> dict:
    """Cosine distances to the nearest training image: far below the real images' own means copies."""
    if "train" not in features:
        return {"omitted": "no training images were given"}
    size = min(len(features["real"]), len(features["synthetic"]))
    result: dict = {"images": size}
    for name in ("synthetic", "real"):
        chosen = np.random.default_rng(seed).permutation(len(features[name]))[:size]
        distances = nearest_training_distance(features[name][chosen], features["train"])
        result[name] = {"percentile_1": float(np.percentile(distances, 1)), "median": float(np.median(distances))}
    return result


def _notes(
    per: Sequence[str], requested: Mapping, groups: list | None, shared_groups: int | None, overlap: Mapping
) -> list[str]:
    """What a reader must know to judge the numbers."""
    split = "share no patient" if groups is not None else "were drawn image by image, since no patient column is known"
    notes = [
        f"Real against real: two halves of the real images, which {split}; every set in a row has the same number of "
        f"images. Precision, recall, density and coverage use {NEAREST} nearest neighbours.",
    ]
    missing = [column for column in per if column not in requested]
    if missing:
        notes.append(
            f"The synthetic images have no column {', '.join(missing)}: no agreement with what was asked for."
        )
    seen = {"the model": overlap["model"]}
    seen |= {f"the adapter {name!r}": count for name, count in overlap.get("adapters", {}).items()}
    for name, count in seen.items():
        if count is None:
            notes.append(f"Leakage was not checked against {name}: its training images are not known.")
    if overlap["left_out"]:
        notes.append(f"{overlap['left_out']} real images are copies of training images and were left out.")
    elif any(seen.values()) or overlap["train"]:
        most = max(count or 0 for count in (*seen.values(), overlap["train"]))
        notes.append(f"LEAKAGE: {most} real images are copies of training images and were kept on request.")
    if shared_groups:
        notes.append(f"LEAKAGE: {shared_groups} patients have images in both the real and the training set.")
    return notes
