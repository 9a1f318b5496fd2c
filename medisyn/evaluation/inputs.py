"""What an evaluation is given: a model or images, real and training images, and what must not be in both.

- Several sources become one set: the images that a base was trained on together with those of a new specialty.
- The guard against leakage knows the training images of the model and of each adapter by their hashes (see
  `medisyn.training_record`), and those given as `train` themselves.

    train = open_images(["corpus/train-*.parquet", "knees@train"], ("modality", "finding"))
    real, overlap = without_overlap(pipe, open_images("knees@validation"), train, adapter="adapters/knees")
"""

import glob
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..config import DataConfig
from ..data.loading import ImageDataset, load_images
from ..data.sources import concatenate, open_source
from ..prompts import choose
from ..training_record import read_training_record

if TYPE_CHECKING:
    from ..loading import Adapters
    from ..pipelines.medisyn_pipeline import MediSynPipeline

TOLERATED_OVERLAP = 0.02  # many public collections have a few copies across their splits; these are left out

Images: TypeAlias = str | Path | Sequence[str | Path] | DataConfig | ImageDataset


# --- models ----------------------------------------------------------------------------------------------------------


def is_images(source) -> bool:
    """Whether `source` names images rather than a model: it exists and is no pipeline's folder, or is a glob."""
    if isinstance(source, ImageDataset):
        return True
    if not isinstance(source, str | Path):
        return False
    if any((Path(source) / place / "model_index.json").is_file() for place in (".", "pipeline")):
        return False
    return Path(source).exists() or bool(glob.glob(str(source)))


def open_pipeline(source, adapter: "Adapters | None" = None) -> "MediSynPipeline":
    """The pipeline itself, or the one of a folder or Hub name (None: the embedded default) with its adapters.

    Raises:
        ValueError: An adapter for a pipeline that is loaded already.
    """
    if source is not None and not isinstance(source, str | Path):
        if adapter is not None:
            raise ValueError(
                "adapter is for a model by name; put it onto this pipeline with medisyn.lora.load_adapter"
            )
        return source
    import torch

    from ..backbone import load_pipeline

    pipe = load_pipeline(None if source is None else str(source), adapter)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)  # one bar over all batches instead
    return pipe


# --- images ----------------------------------------------------------------------------------------------------------


def open_images(source: Images, columns: Sequence[str] = (), label_schema: str | None = None) -> ImageDataset:
    """Images of one source or of several together, without captions of their own.

    Args:
        source: Strings may end in `@SPLIT`.
        columns: What all of several sources must have if one of them has it.
        label_schema: Reads the labels of strings; a `DataConfig` has its own.

    Raises:
        ValueError: No source, a source without one of `columns`, or sources that do not fit together.
        FileNotFoundError: There is no such source.
    """
    if isinstance(source, ImageDataset):
        return source
    if isinstance(source, DataConfig):
        return load_images(source)
    sources = [str(part) for part in ([source] if isinstance(source, str | Path) else source)]
    if not sources:
        raise ValueError("the list of sources is empty; name files, folders or Hub datasets")
    named = [_without_split(part) for part in sources]
    names = tuple(name for name, _ in named)
    config = DataConfig(source=names, caption_column=None, label_schema=label_schema)
    tables = [open_source(name, split, config.image_column) for name, split in named]
    for column in columns:
        having = [bool({column, column.partition(".")[0]} & set(table.column_names)) for table in tables]
        if any(having) and not all(having):
            lacking = having.index(False)
            raise ValueError(
                f"{names[lacking]!r} has no column {column!r}, but {names[having.index(True)]!r} has; its columns: "
                f"{', '.join(tables[lacking].column_names)}"
            )
    return ImageDataset(concatenate(tables, ", ".join(names)), config)


def _without_split(source: str) -> tuple[str, str]:
    name, _, split = source.rpartition("@")
    return (source, "train") if not name or Path(source).exists() else (name, split)


def source_names(images: ImageDataset) -> str | list[str]:
    """The source, or all of several, as it goes into a report."""
    source = images.config.source
    return source if isinstance(source, str) else source[0] if len(source) == 1 else list(source)


def shipped_schema(pipe: "MediSynPipeline | None") -> str | None:
    """The schema whose rules read the labels of real images for `pipe`; one's own comes with a `DataConfig`."""
    if pipe is None or "labels" not in pipe.kinds:
        return None
    from ..conditions.labels import list_schemas

    return pipe.label_schema["name"] if pipe.label_schema["name"] in list_schemas() else None


def with_labels(images: ImageDataset, pipe: "MediSynPipeline", columns: Mapping[str, str]) -> ImageDataset:
    """`images` with labels from `columns` (field of the model -> column) beside those that they have.

    Raises:
        ValueError: A model without labels, a field that it does not have, or no such column.
    """
    from ..pipelines.medisyn_pipeline import label_field

    if "labels" not in pipe.kinds:
        raise ValueError(f"label_columns are for a model that takes labels; this one takes: {', '.join(pipe.kinds)}")
    values = {label_field(pipe.label_schema, field): images.column(name) for field, name in columns.items()}
    labelled = images.select(range(len(images)))
    labelled.labels = [
        dict(own or {}) | {field: column[row] for field, column in values.items() if column[row] is not None} or None
        for row, own in enumerate(images.labels)
    ]
    return labelled


def captions_of(images: ImageDataset) -> list[str | None]:
    """The captions, also of images that were opened without: then those of the column "caption"."""
    if "caption" in images.column_names and all(caption is None for caption in images.captions):
        return images.column("caption")
    return images.captions


def with_conditions(images: ImageDataset, pipe: "MediSynPipeline", kinds: Sequence[str]) -> ImageDataset:
    """The images that have all of these kinds of condition to give to `pipe`.

    Raises:
        ValueError: A kind that the model does not take, or no image that has them.
    """
    for kind in kinds:
        choose("condition of this model", kind, pipe.kinds)
    has = {
        "text": [caption is not None for caption in captions_of(images)],
        "labels": [any(value is not None for value in (own or {}).values()) for own in images.labels],
        "image": [True] * len(images),
    }
    rows = [row for row in range(len(images)) if all(has[kind][row] for kind in kinds)]
    if not rows:
        raise ValueError(f"no image of {images.config.source!r} has these conditions: {', '.join(kinds)}")
    return images.select(rows)


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


def lacking_column(dataset: ImageDataset, columns: Sequence[str]) -> str | None:
    """Why not all of `columns` can be read (a column may be the key of another, "extra.grade"), or None."""
    for column in columns:
        try:
            dataset.column(column)
        except ValueError as error:
            return str(error)
    return None


def groups_of(dataset: ImageDataset, group_column: str) -> list[Hashable] | None:
    """Patient of each image, where that is known; an image without one stands for itself."""
    column = dataset.config.group_column or (group_column if group_column in dataset.column_names else None)
    if column is None:
        return None
    return [("row", row) if group is None else group for row, group in enumerate(dataset.column(column))]


# --- leakage ---------------------------------------------------------------------------------------------------------


def without_overlap(
    pipe: "MediSynPipeline | None",
    real: ImageDataset,
    train: ImageDataset | None = None,
    allow_overlap: bool = False,
    adapter: "Adapters | None" = None,
) -> tuple[ImageDataset, dict]:
    """`real` without what the model, its adapters or `train` have, and how many of it each has.

    Returns:
        The images, and `{"model", "train", "left_out"}`, with `adapters` (name to count) where there are any; a count
        is None where the training images are not known.

    Raises:
        ValueError: More than `TOLERATED_OVERLAP` of `real` is among them and `allow_overlap` is not set.
    """
    hashes = real.hashes()
    adapters = _adapter_hashes(pipe, adapter)
    seen: list[tuple[str, set[str] | None]] = [
        ("the model's training images", _model_hashes(pipe)),
        ("the images given as train", None if train is None else set(train.hashes())),
        *((f"the training images of the adapter {name!r}", known) for name, known in adapters.items()),
    ]
    counts = [None if known is None else sum(content in known for content in hashes) for _, known in seen]
    everything = set().union(*(known for _, known in seen if known is not None))
    unseen = np.array([content not in everything for content in hashes])
    number = int((~unseen).sum())
    if number > TOLERATED_OVERLAP * len(real) and not allow_overlap:
        whose = next(owner for (owner, _), count in zip(seen, counts, strict=True) if count)
        raise ValueError(
            f"{number} of {len(real)} real images are among {whose}: they measure memory, not quality; give images "
            "that the model has not seen, or allow the overlap"
        )
    overlap: dict[str, Any] = {"model": counts[0], "train": counts[1]}
    if adapters:
        overlap["adapters"] = dict(zip(adapters, counts[2:], strict=True))
    overlap["left_out"] = 0 if allow_overlap else number
    return (real if allow_overlap or not number else real.select(unseen)), overlap


def _model_hashes(pipe: "MediSynPipeline | None") -> set[str] | None:
    folder = None if pipe is None else pipe.config.get("_name_or_path")
    return _recorded(Path(folder)) if folder else None


def _adapter_hashes(pipe: "MediSynPipeline | None", adapter: "Adapters | None") -> dict[str, set[str] | None]:
    """Adapter's name -> hashes of its training images; None where they are not known."""
    if pipe is None:
        return {}
    from ..loading import find_adapter
    from ..lora import loaded_adapters

    if adapter is None:  # they were put onto the pipeline by the caller, and do not know where they came from
        return dict.fromkeys(loaded_adapters(pipe))
    names = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    places = [find_adapter(name) for name in names]
    folders = [place if place.is_dir() else place.parent for place in places]
    return dict(zip(loaded_adapters(pipe), map(_recorded, folders), strict=True))


def _recorded(folder: Path) -> set[str] | None:
    record = read_training_record(folder)
    return None if record is None else set(record["hashes"])
