"""Opening image collections through `datasets`: one source string becomes one table with an undecoded image column.

What a source may be: Parquet, Arrow, CSV, JSON lines and WebDataset tar files (one, several or a glob), image files, a
folder of any of these (with `metadata.jsonl`/`.csv`/`.parquet`, or with a `.txt` caption beside each image), a folder
written by `Dataset.save_to_disk`, DICOM and NIfTI files, or the name of a dataset on the Hub (`user/name`, or
`user/name:config`).

    table = open_source("corpus/train-*.parquet", split="train", image_column="image")
"""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
from PIL import Image

from . import medical

_TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".jsonl": "json", ".json": "json"}
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SPLIT_WORD = re.compile(r"(?<![a-z])(train|training|test|testing|val|valid|validation|dev)(?![a-z])")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
_UNDECODED = datasets.Image(decode=False)


def open_source(source: str, split: str, image_column: str) -> datasets.Dataset:
    """One source as a `datasets.Dataset` whose image column holds undecoded `{"bytes", "path"}`.

    A WebDataset has file extensions for column names; its only image column is named `image` and its `txt` column
    `caption`, as everywhere else.

    Raises:
        FileNotFoundError: no such file, folder or Hub dataset.
        ValueError: nothing in it that can be loaded, no such split, or no such image column.
    """
    path = Path(source).expanduser()
    if not source.strip():
        raise ValueError("the source is an empty string; name files, a folder or a Hub dataset")
    if path.is_file():
        table = _open_files([path], source, image_column)
    elif path.is_dir():
        table = _open_folder(path, split, source, image_column)
    elif any(character in source for character in "*?["):
        files = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        if not files:
            raise FileNotFoundError(f"no file matches {source!r}")
        table = _open_files(files, source, image_column)
    elif path.is_absolute() or path.suffix.lower() in {*_TABLES, ".tar"} or not _HUB_NAME.fullmatch(source):
        raise FileNotFoundError(f"no file or folder {source!r}")
    else:
        table = _open_hub(source, split)
    return _with_undecoded_images(table, source, image_column)


def _open_folder(folder: Path, split: str, source: str, image_column: str) -> datasets.Dataset:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        return _pick_split(saved, split, source) if isinstance(saved, datasets.DatasetDict) else saved
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise ValueError(f"the folder {source!r} is empty")
    at_the_top = {path.name for path in files if path.parent == folder}
    if (folder / split).is_dir() and not at_the_top.intersection(_METADATA):
        return _open_folder(folder / split, "train", source, image_column)
    splits = [path for path in folder.iterdir() if path.is_dir() and _SPLIT_WORD.search(path.name)]
    if splits and not at_the_top.intersection(_METADATA):
        _refuse_other_splits(splits, split, source)
    if any(path.name in _METADATA for path in files):
        _refuse_other_splits([], split, source)
        # Named one by one: from a folder, `datasets` would guess splits from words such as "test" in file names.
        return _only_split(_load("imagefolder", source, data_files=_patterns(files)))
    for suffixes in ((".parquet",), (".tar",), (".arrow",), (".csv", ".jsonl", ".json")):
        chosen = [path for path in files if path.suffix.lower() in suffixes]
        if chosen:
            named = [path for path in chosen if re.search(rf"(?<![a-z]){re.escape(split)}(?![a-z])", path.stem)]
            if not named:
                _refuse_other_splits(chosen, split, source)
            return _open_files(named or chosen, source, image_column)
    _refuse_other_splits([], split, source)
    return _open_files([path for path in files if _is_image(path)] or files, source, image_column)


def _refuse_other_splits(paths: Sequence[Path], split: str, source: str) -> None:
    """What names no split is the split "train"; what names another one must not be taken for it."""
    others = sorted(path for path in paths if _SPLIT_WORD.search(path.stem))
    if others or split != "train":
        raise ValueError(f"no split {split!r} in {source!r}; it has: {_shorten(others) or 'train, unnamed'}")


def _open_files(files: Sequence[Path], source: str, image_column: str) -> datasets.Dataset:
    suffixes = {path.suffix.lower() for path in files}
    if suffixes <= {".tar"}:
        return _name_webdataset_columns(_only_split(_load("webdataset", source, data_files=_patterns(files))))
    if suffixes <= set(_TABLES) and len({_TABLES[suffix] for suffix in suffixes}) == 1:
        builder = _TABLES[suffixes.pop()]
        parts = []
        for folder in sorted({path.parent for path in files}):  # paths in a table are relative to the table's folder
            here = [path for path in files if path.parent == folder]
            part = _only_split(_load(builder, source, data_files=_patterns(here)))
            parts.append(_with_absolute_paths(part, folder, image_column))
        return concatenate(parts, source)
    images = [path for path in files if _is_image(path)]
    if not images:
        raise ValueError(f"no images or tables in {source!r}: {_shorten(files)}; readable: {_readable_kinds()}")
    scans = [path for path in images if medical.is_medical(path)]
    if scans and len(scans) < len(images):
        raise ValueError(f"{source!r} mixes DICOM or NIfTI ({scans[0].name}) with other images; load two sources")
    if scans:
        return datasets.Dataset.from_list(medical.list_slices(images))
    return _list_images(images)


def _list_images(images: Sequence[Path]) -> datasets.Dataset:
    """Image files with their captions from `.txt` files of the same name and their folder's name as `label`."""
    columns: dict[str, list] = {"image": _strings(images), "label": [path.parent.name for path in images]}
    sidecars = [path.with_suffix(".txt") for path in images]
    if any(path.is_file() for path in sidecars):
        columns["caption"] = [_read_caption(path) if path.is_file() else None for path in sidecars]
    return datasets.Dataset.from_dict(columns)


def _read_caption(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def _open_hub(source: str, split: str) -> datasets.Dataset:
    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if datasets.config.HF_HUB_OFFLINE else ""
        message = f"no file or folder {source!r}, and no such dataset on the Hub{offline}: {_one_line(error)}"
        raise FileNotFoundError(message) from None
    except (ValueError, RuntimeError) as error:  # an unknown split or configuration, a dataset that is a script
        raise ValueError(f"{source!r}: {_one_line(error)}") from None


def _load(builder: str, source: str, **arguments) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(builder, **arguments)
    except (OSError, ImportError):
        raise
    except Exception as error:  # noqa: BLE001 - damaged tables and archives raise whatever their reader raises
        raise ValueError(f"{source!r} cannot be loaded: {_one_line(error.__cause__ or error)}") from None


def _with_absolute_paths(table: datasets.Dataset, folder: Path, image_column: str) -> datasets.Dataset:
    feature = table.features.get(image_column)
    if not isinstance(feature, datasets.Value) or feature.dtype not in ("string", "large_string"):
        return table
    paths = [None if path is None else str(folder / path) for path in table[image_column]]
    return table.remove_columns(image_column).add_column(image_column, paths)


def _with_undecoded_images(table: datasets.Dataset, source: str, image_column: str) -> datasets.Dataset:
    if image_column not in table.column_names:
        raise ValueError(f"{source!r} has no column {image_column!r}; its columns: {', '.join(table.column_names)}")
    feature = table.features[image_column]
    encoded = isinstance(feature, datasets.Value) and feature.dtype.removeprefix("large_") in ("string", "binary")
    if not encoded and not isinstance(feature, datasets.Image):
        images = ", ".join(name for name, kind in table.features.items() if isinstance(kind, datasets.Image)) or "none"
        raise ValueError(f"column {image_column!r} of {source!r} holds no images; image columns: {images}")
    return table.cast_column(image_column, _UNDECODED)


def _name_webdataset_columns(table: datasets.Dataset) -> datasets.Dataset:
    images = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    names = {images[0]: "image"} if len(images) == 1 else {}
    if "txt" in table.column_names:
        names["txt"] = "caption"
    return table.rename_columns({old: new for old, new in names.items() if new not in table.column_names})


def concatenate(tables: Sequence[datasets.Dataset], source: str) -> datasets.Dataset:
    """Several tables one after the other; a column that one lacks is None in its rows."""
    if len(tables) == 1:
        return tables[0]
    try:
        return datasets.concatenate_datasets(list(tables))
    except ValueError as error:
        raise ValueError(f"the tables of {source!r} do not fit together: {_one_line(error)}") from None


def _pick_split(tables: datasets.DatasetDict, split: str, source: str) -> datasets.Dataset:
    if split not in tables:
        raise ValueError(f"no split {split!r} in {source!r}; it has: {', '.join(tables)}")
    return tables[split]


def _only_split(tables: datasets.DatasetDict) -> datasets.Dataset:
    (table,) = tables.values()
    return table


def _is_image(path: Path) -> bool:
    # Pillow registers the formats that it can only write (PDF) as well.
    return medical.is_medical(path) or Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN


def _readable_kinds() -> str:
    return f"{', '.join(_TABLES)}, .tar, image files (.png, .jpg, .tif, .webp, ...), .dcm, .nii, .nii.gz"


def _strings(paths: Sequence[Path]) -> list[str]:
    return [str(path) for path in paths]


def _patterns(paths: Sequence[Path]) -> list[str]:
    return [glob.escape(str(path)) for path in paths]  # `datasets` reads brackets as a pattern


def _shorten(paths: Sequence[Path]) -> str:
    names = [path.name for path in paths[:3]]
    return ", ".join(names) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
