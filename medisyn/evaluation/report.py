r"""One command from a model (or a folder of images) to `report.json`, a table and a labelled grid.

Notable choices:

* A model is asked for one image per caption of real images, drawn in proportion to the first column of `per` and with
  one seed per image. The row's labels become the requested labels of its image, and the images are kept as a folder
  that can be evaluated again.
* Columns of `per` nest: `modality,finding` looks at findings within their modality.
* Evaluation refuses real images that the model was trained on, by the hashes of `training_images.json`, which travels
  with a model, or that are among `train`. Below 2 %, copies are left out instead, and counted in the report.
* All images are brought to the size of the synthetic ones before features are taken.

    medisyn evaluate outputs/run/pipeline --real "corpus/validation-*.parquet" --train "corpus/train-*.parquet" \
        --extractor timm:tf_efficientnet_lite0@efficientnet_lite0.pth --out outputs/evaluation
"""

import glob
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import DataConfig
from ..data.loading import ImageDataset, load_images
from ..training_record import read_training_record
from .agreement import LabelledFeatures, label_agreement
from .features import extract_features, load_extractor
from .fidelity import NEAREST, fidelity, fidelity_by_value, nearest_training_distance
from .presentation import comparison_grid, format_table, write_report
from .sampling import check_replaceable, generate_like, model_name

if TYPE_CHECKING:
    from ..pipelines.medisyn_pipeline import MediSynPipeline

USUAL_COLUMNS = ("modality", "finding")
TOLERATED_OVERLAP = 0.02  # many public collections have a few copies across their splits; these are left out


def evaluate(
    model_or_folder: "str | Path | ImageDataset | MediSynPipeline | None",
    real: "str | Path | DataConfig | ImageDataset",
    *,
    train: "str | Path | DataConfig | ImageDataset | None" = None,
    per: Sequence[str] | None = None,
    extractor: str = "inception",
    num_images: int = 600,
    num_inference_steps: int | None = None,
    guidance_scale: float | Mapping[str, float] | None = None,
    seed: int = 0,
    out: str | Path = "outputs/evaluation",
    batch_size: int = 16,
    cache_dir: str | Path | None = None,
    group_column: str = "group_id",
    allow_overlap: bool = False,
    progress: bool = True,
) -> dict:
    """Measure synthetic images against real ones; write `report.json`, `report.md` and `grid.png` to `out`.

    Args:
        model_or_folder: A pipeline, its folder or Hub name, None for the embedded default; or synthetic images: a
            folder with `metadata.jsonl`, or any source of `load_images`. Its `per` columns are the requested labels.
        real: Real images that the model has not seen. A string may end in `@SPLIT`.
        train: Real training images; needed for label agreement and for the distance to the nearest training image.
        per: Columns to report on, each nested in those before it; None takes those of `USUAL_COLUMNS` that `real` has.
        extractor: One of `medisyn.evaluation.EXTRACTORS`.
        num_images: Images to generate; of a folder, all are used.
        num_inference_steps: Of the sampler; None is the pipeline's default.
        guidance_scale: See `MediSynPipeline`; None is the pipeline's default.
        seed: Image i is generated with seed `seed + i`; also seeds splits, draws and the bootstrap.
        out: Folder of the results; generated images go to `images/` inside.
        batch_size: Images per call of the pipeline.
        cache_dir: Folder that keeps features between evaluations; None keeps nothing.
        group_column: Patient column of the real images, used where they have it.
        allow_overlap: Go on although the model has seen some of the real images; the report says how many.
        progress: Show progress bars.

    Returns:
        The content of `report.json`.

    Raises:
        ValueError: Unknown extractor or column, or real images that the model was trained on.
        FileNotFoundError: A source does not exist.
        FileExistsError: `out` has a folder `images` that no evaluation made.
        OSError: `out` cannot be written, or extractor weights cannot be downloaded.
    """
    if num_images < 1 or batch_size < 1:
        raise ValueError(f"num_images and batch_size must be at least 1, not {num_images} and {batch_size}")
    out = Path(out)
    pipe = None if _is_images(model_or_folder) else _open_pipeline(model_or_folder)
    if pipe is not None:
        check_replaceable(out / "images")
    real = _open_images(real, None if pipe is None else _shipped_schema(pipe))
    train = None if train is None else _open_images(train)
    if per is None:
        per = [column for column in USUAL_COLUMNS if column in real.column_names]
    real, overlap = _without_overlap(pipe, real, train, allow_overlap)
    real_values = nested_values(real, per)
    # Built before anything is generated, so that a missing weights file does not cost an hour.
    features_of = load_extractor(extractor, pipe)
    out.mkdir(parents=True, exist_ok=True)
    if pipe is None:
        synthetic = _open_images(model_or_folder)
        subject: dict[str, Any] = {"images": str(synthetic.config.source)}
    else:
        arguments: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        arguments = {name: value for name, value in arguments.items() if value is not None}
        synthetic = generate_like(pipe, real, out / "images", per, num_images, seed, batch_size, progress, **arguments)
        from ..backbone import model_hash

        subject = {
            "model": model_name(pipe),
            "model_hash": model_hash(pipe),
            "conditions": list(pipe.kinds),
            **arguments,
        }

    features_of.resolution = min(synthetic.image(0).size)
    sets = {"real": real, "synthetic": synthetic} | ({} if train is None else {"train": train})
    features = {
        name: extract_features(features_of, images, cache_dir, progress=progress) for name, images in sets.items()
    }
    requested = nested_values(synthetic, [column for column in per if column in synthetic.column_names])
    groups = _groups(real, group_column)
    train_groups = None if train is None else _groups(train, group_column)
    shared = None if groups is None or train_groups is None else len(set(groups) & set(train_groups))
    report = {
        "subject": subject | {"seed": seed},
        "images": {name: len(images) for name, images in sets.items()},
        "sources": {name: images.config.source for name, images in sets.items()},
        "extractor": {
            "spec": extractor,
            "weights_sha256": features_of.weights_sha256,
            "features": features["real"].shape[1],
            "resolution": features_of.resolution,
        },
        "overlap": overlap,
        "fidelity": _fidelity(features, real_values, requested, groups, seed),
        "agreement": _agreement(features, sets, per, groups, seed),
        "nearest_training_image": _nearest(features, seed),
        "notes": _notes(per, requested, groups, shared, overlap),
    }
    column = per[0] if per and per[0] in requested else None
    values = {} if column is None else {"real": real_values[column], "synthetic": requested[column]}
    write_report(report, out, comparison_grid(real, synthetic, values, seed))
    print(format_table(report))
    return report


def nested_values(dataset: ImageDataset, columns: Sequence[str]) -> dict[str, list[str | None]]:
    """Per column, one value per image: "CT / normal" for a finding within a modality; None where a part is missing."""
    values: dict[str, list[str | None]] = {}
    outer = None
    for column in columns:
        own = [None if value is None else str(value) for value in dataset.column(column)]
        if outer is not None:
            own = [None if a is None or b is None else f"{a} / {b}" for a, b in zip(outer, own, strict=True)]
        values[column] = outer = own
    return values


# --- sources ---------------------------------------------------------------------------------------------------------


def _is_images(source) -> bool:
    """Whether `source` names images rather than a model: it exists and is no pipeline's folder, or is a glob."""
    if isinstance(source, ImageDataset):
        return True
    if not isinstance(source, str | Path):
        return False
    if any((Path(source) / place / "model_index.json").is_file() for place in (".", "pipeline")):
        return False
    return Path(source).exists() or bool(glob.glob(str(source)))


def _open_pipeline(source) -> "MediSynPipeline":
    if source is not None and not isinstance(source, str | Path):
        return source
    import torch

    from ..backbone import load_pipeline

    pipe = load_pipeline(None if source is None else str(source))
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)  # one bar over all batches instead
    return pipe


def _shipped_schema(pipe) -> str | None:
    """The schema whose rules read the labels of real images for `pipe`; one's own comes with a `DataConfig`."""
    if "labels" not in pipe.kinds:
        return None
    from ..conditions.labels import list_schemas

    return pipe.label_schema["name"] if pipe.label_schema["name"] in list_schemas() else None


def _open_images(source, label_schema: str | None = None) -> ImageDataset:
    if isinstance(source, ImageDataset):
        return source
    if isinstance(source, DataConfig):
        return load_images(source)
    name, _, split = str(source).rpartition("@")
    if not name or Path(source).exists():
        name, split = str(source), "train"
    return load_images(name, split=split, caption_column=None, label_schema=label_schema)


def _groups(dataset: ImageDataset, group_column: str) -> list[Hashable] | None:
    column = dataset.config.group_column or (group_column if group_column in dataset.column_names else None)
    if column is None:
        return None
    return [("row", row) if group is None else group for row, group in enumerate(dataset.column(column))]


def _without_overlap(
    pipe, real: ImageDataset, train: ImageDataset | None, allow_overlap: bool
) -> tuple[ImageDataset, dict]:
    """`real` without what the model or `train` has, and the counts; None where that cannot be known."""
    hashes = real.hashes()
    seen = {"model": _training_hashes(pipe), "train": None if train is None else set(train.hashes())}
    overlap: dict = {name: None if known is None else sum(h in known for h in hashes) for name, known in seen.items()}
    everything = set().union(*(known for known in seen.values() if known is not None))
    unseen = np.array([content not in everything for content in hashes])
    count = int((~unseen).sum())
    if count > TOLERATED_OVERLAP * len(real) and not allow_overlap:
        whose = "the model's training images" if overlap["model"] else "the images given as train"
        raise ValueError(
            f"{count} of {len(real)} real images are among {whose}: they measure memory, not quality; give images "
            "that the model has not seen, or allow the overlap"
        )
    overlap["left_out"] = 0 if allow_overlap else count
    return (real if allow_overlap or not count else real.select(unseen)), overlap


def _training_hashes(pipe) -> set[str] | None:
    if pipe is None:
        return None
    folder = pipe.config.get("_name_or_path")
    record = read_training_record(folder) if folder else None
    return None if record is None else set(record["hashes"])


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


def _agreement(features: dict, sets: dict, per: Sequence[str], groups: list | None, seed: int) -> dict:
    if "train" not in sets:
        return {"omitted": "no training images were given"}
    result = {}
    for depth, column in enumerate(per):
        lacking = [name for name, images in sets.items() if not set(per[: depth + 1]) <= set(images.column_names)]
        if "train" in lacking or "real" in lacking:
            result[column] = {"omitted": f"no column {column!r} in the {lacking[0]} images"}
            continue
        labelled = {}
        for name in sets.keys() - set(lacking):
            own = [None if value is None else str(value) for value in sets[name].column(column)]
            within = nested_values(sets[name], per[:depth])[per[depth - 1]] if depth else None
            labelled[name] = LabelledFeatures(features[name], own, within, groups if name == "real" else None)
        training = labelled.pop("train")
        result[column] = label_agreement(training, dict(sorted(labelled.items())), seed)
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
    if overlap["model"] is None:
        notes.append("Leakage was not checked against the model: its training images are not known.")
    if overlap["left_out"]:
        notes.append(f"{overlap['left_out']} real images are copies of training images and were left out.")
    elif overlap["model"] or overlap["train"]:
        seen = overlap["model"] or overlap["train"]
        notes.append(f"LEAKAGE: {seen} real images are copies of training images and were kept on request.")
    if shared_groups:
        notes.append(f"LEAKAGE: {shared_groups} patients have images in both the real and the training set.")
    return notes
