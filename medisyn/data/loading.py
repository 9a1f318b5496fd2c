"""Images with captions, labels and groups, from anything that `datasets` loads.

- A row keeps its identity: an unreadable image is reported with its row and path and is either fatal or counted and
  skipped, but it never moves the rows behind it.
- Images stay encoded in the memory-mapped table and are decoded one by one, so an `ImageDataset` is cheap to select
  from, to pickle into worker processes and to read from several threads.
- Splits go by group (patient): a group's side depends on the seed and the group's name alone.
- `content_hash` identifies an image by its decoded pixels: a losslessly re-encoded copy has the same hash.

    images = load_images("corpus/train-*.parquet", group_column="group_id", label_columns={"eye_side": "extra.side"})
    rest, held_out = images.split_by_group(0.1, seed=0)
"""

import copy
import hashlib
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from ..config import DataConfig
from . import medical
from .laterality import SIDE_COLUMNS, has_side, is_side, states_side
from .preprocessing import to_rgb
from .sources import concatenate, open_source

logger = logging.getLogger(__name__)


def load_images(config: DataConfig | str | Path | Sequence[str], **options: Any) -> "ImageDataset":
    """Open the images of a configuration, or of a source with `DataConfig` fields as keywords.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: no images in it, an unknown column (the message lists the columns), or a filter that keeps nothing.
    """
    if not isinstance(config, DataConfig):
        source = str(config) if isinstance(config, str | Path) else tuple(str(part) for part in config)
        config = DataConfig(source=source, **options)
    elif options:
        raise ValueError(f"options beside a DataConfig: {', '.join(options)}; set them in the DataConfig")
    sources = (config.source,) if isinstance(config.source, str) else config.source
    if not sources:
        raise ValueError("data.source names no file, folder or Hub dataset")
    tables = [open_source(source, config.split, config.image_column) for source in sources]
    return ImageDataset(concatenate(tables, ", ".join(sources)), config)


def load_readable(config: DataConfig) -> "ImageDataset":
    """`load_images`, without the images that cannot be read where `on_error` is "skip"."""
    images = load_images(config)
    return images.drop_unreadable() if config.on_error == "skip" else images


class ImageDataset:
    """A map-style dataset of images, usable as a `torch.utils.data.Dataset`.

    `ds[i]` is `{"image": PIL RGB or None, "caption": str or None, "labels": dict or None, "index": i}`; the image is
    None only where it cannot be read and `on_error="skip"`.

    Attributes:
        rows: for each item, its row in the loaded table; unchanged by `select`, `split_by_group` and skips.
        captions: one per item; None where there is none.
        labels: one dictionary (field -> value, None where unknown) per item; None if the configuration maps no labels.
        skipped: table row -> why its image cannot be read, as far as this process has tried.
    """

    def __init__(self, table: datasets.Dataset, config: DataConfig) -> None:
        self.config = config
        self.skipped: dict[int, str] = {}
        self._source = config.source if isinstance(config.source, str) else ", ".join(config.source)
        self._table = table if table._indices is None else table.flatten_indices()  # items are found by table row
        self._columns: dict[str, list] = {}
        self._hashes: dict[int, str | None] = {}
        self._open_images()
        self.rows = np.arange(len(table))
        self._check_columns()
        self.rows = self._filtered_rows()
        caption_column = config.caption_column
        self.captions: list[str | None] = self.column(caption_column) if caption_column else [None] * len(self)
        self.labels: list[dict[str, Any] | None] = self._read_labels()

    def _open_images(self) -> None:
        self._bytes, self._paths = self._table.data.column(self.config.image_column).flatten()

    def __getstate__(self) -> dict[str, Any]:
        # The columns of a memory-mapped table would be pickled by value; the table itself is pickled by path.
        return {name: value for name, value in self.__dict__.items() if name not in ("_bytes", "_paths")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_images()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.image(index)
        return {"image": image, "caption": self.captions[index], "labels": self.labels[index], "index": index}

    def image(self, index: int) -> Image.Image | None:
        """The image as upright 8-bit RGB (see `to_rgb`), at its own size.

        Raises:
            FileNotFoundError, ValueError: it cannot be read and `on_error` is "raise"; names the row and the path.
        """
        row = int(self.rows[index])
        try:
            return self._decode(row)
        except ImportError:  # a missing extra is not a damaged image
            raise
        except Exception as error:  # noqa: BLE001 - Pillow's plugins raise nearly anything on damaged files
            message = f"{self._where(row)} cannot be read: {' '.join(str(error).split()) or type(error).__name__}"
            if self.config.on_error == "raise":
                kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
                raise kind(message) from None
            if row not in self.skipped:
                self.skipped[row] = message
                logger.warning("skipped: %s", message)
            return None

    def column(self, name: str) -> list:
        """The values of a column, one per item; `extra.x` reads key x of `extra`, a column of JSON text or structures.

        Class labels come as their names.

        Raises:
            ValueError: there is no such column.
        """
        values = self._whole_column(name)
        return [values[row] for row in self.rows]

    @property
    def column_names(self) -> list[str]:
        """The columns beside the image."""
        return [name for name in self._table.column_names if name != self.config.image_column]

    def select(self, indices: Iterable[int]) -> "ImageDataset":
        """The items at `indices` (of this dataset), in that order; a boolean mask selects where it is true."""
        chosen = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices))
        positions = np.arange(len(self))[chosen if chosen.size else chosen.astype(np.int64)]
        part = copy.copy(self)
        part.rows = self.rows[positions]
        part.captions = [self.captions[position] for position in positions]
        part.labels = [self.labels[position] for position in positions]
        return part

    def split_by_group(
        self, fraction: float, seed: int = 0, *, by_image: bool = False
    ) -> "tuple[ImageDataset, ImageDataset]":
        """Split into (rest, held out) so that no group is on both sides.

        The hash of the seed and a group's name decides: its side never changes when others are added, and `fraction`
        is met on average over groups. A row without a group (with `by_image` any row) goes by its image's content.

        Raises:
            ValueError: no `group_column` (nor `by_image`), `fraction` is not in (0, 1), or a side would be empty.
        """
        if (column := self.config.group_column) is None and not by_image:
            raise ValueError(f"splitting needs data.group_column; columns: {', '.join(self.column_names)}")
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must lie between 0 and 1, not {fraction}")
        groups = self.column(column) if column is not None else [None] * len(self)
        if column is None:
            logger.warning("no data.group_column: each image is a group of its own; a patient may be on both sides")
        names = [self.content_hash(i) if group in (None, "") else str(group) for i, group in enumerate(groups)]
        position = {name: _position(f"{seed}:{name}") for name in set(names)}
        held_out = np.array([position[name] < fraction for name in names], dtype=bool)
        if held_out.all() or not held_out.any():
            raise ValueError(f"{len(position)} groups are too few to hold out {fraction:.0%} of them with seed {seed}")
        return self.select(~held_out), self.select(held_out)

    def drop_unreadable(self) -> "ImageDataset":
        """Only the items whose image can be read; decodes each image once and fills `skipped`."""
        return self.select(np.array([found is not None for found in self.hashes()], dtype=bool))

    def content_hash(self, index: int) -> str | None:
        """First 16 hexadecimal digits of the SHA-256 of the size and the decoded RGB pixels; None if unreadable."""
        row = int(self.rows[index])
        if row not in self._hashes:
            image = self.image(index)
            self._hashes[row] = None if image is None else pixel_hash(image)
        return self._hashes[row]

    def hashes(self) -> list[str | None]:
        """All content hashes; decodes each image once, in several threads."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(self.content_hash, range(len(self)), chunksize=64))

    def file_hash(self, index: int) -> str | None:
        """SHA-256 of the encoded image, without decoding it; None where that does not identify one image."""
        encoded, path = self._encoded(int(self.rows[index]))
        if encoded is None and path and not medical.is_medical(path) and Path(path).is_file():
            encoded = Path(path).read_bytes()
        return None if encoded is None else hashlib.sha256(encoded).hexdigest()

    def remember_hash(self, index: int, content_hash: str) -> None:
        """Take a content hash that was computed earlier for the same encoded image."""
        self._hashes[int(self.rows[index])] = content_hash

    def may_flip(self) -> np.ndarray:
        """Per item, whether it is among `flip_only` and no caption, label or column states a body side."""
        stated = np.array([states_side(caption) for caption in self.captions], dtype=bool)
        for i, labels in enumerate(self.labels):
            for name, value in (labels or {}).items():
                side = name in SIDE_COLUMNS or self.config.label_columns.get(name) in SIDE_COLUMNS
                stated[i] |= has_side(value) if side else is_side(value)
        for name in SIDE_COLUMNS:
            with suppress(ValueError):  # no such column
                stated |= np.array([has_side(value) for value in self.column(name)], dtype=bool)
        for name, allowed in self.config.flip_only.items():
            stated |= np.array([str(value) not in allowed for value in self.column(name)], dtype=bool)
        return ~stated

    def sampling_weights(self) -> np.ndarray:
        """Per item, float64 summing to 1: (1 / frequency of its `balance_columns` together) ** `balance_power`."""
        values = list(zip(*map(self.column, self.config.balance_columns), strict=True)) or [()] * len(self)
        frequency = Counter(values)
        weights = np.array([frequency[value] ** -self.config.balance_power for value in values])
        return weights / weights.sum()

    def provenance(self) -> list[dict[str, Any]]:
        """What the model card must name: `{"name", "license", "images"}` per data set and licence, largest first."""
        config, unnamed = self.config, [None] * len(self)
        names = self.column(config.dataset_column) if config.dataset_column else unnamed
        licenses = self.column(config.license_column) if config.license_column else unnamed
        known = zip(names, licenses, strict=True)
        counts = Counter((name or Path(self._source).name, text or "not stated") for name, text in known)
        return [{"name": name, "license": text, "images": count} for (name, text), count in counts.most_common()]

    def _whole_column(self, name: str) -> list:
        if name not in self._columns:
            self._columns[name] = self._read_column(name)
        return self._columns[name]

    def _read_column(self, name: str) -> list:
        feature = self._table.features.get(name)
        if feature is not None and name != self.config.image_column:
            values = self._table.data.column(name).to_pylist()
            if isinstance(feature, datasets.ClassLabel):
                return [None if value is None or value < 0 else feature.int2str(value) for value in values]
            return [None if isinstance(value, float) and math.isnan(value) else value for value in values]
        parent, dot, key = name.partition(".")
        if not dot or parent not in self.column_names:
            hint = "; set data.caption_column to null for images without captions" if name == "caption" else ""
            columns = ", ".join(self.column_names) or "none"
            raise ValueError(f"no column {name!r} in {self._source!r}; columns: {columns}{hint}")
        structures = [_structure(value, parent) for value in self._whole_column(parent)]
        keys = {each for structure in structures for each in structure}
        if key not in keys:
            raise ValueError(f"no key {key!r} in the column {parent!r}; its keys: {', '.join(sorted(keys)) or 'none'}")
        return [structure.get(key) for structure in structures]

    def _check_columns(self) -> None:
        config = self.config
        single = (config.caption_column, config.group_column, config.dataset_column, config.license_column)
        for name in (*single, *config.balance_columns, *config.label_columns.values(), *config.filter):
            if name is not None:
                self._whole_column(name)
        for key in ("filter", "flip_only"):
            for name, wanted in getattr(config, key).items():
                values = {str(value) for value in self._whole_column(name)}
                if unknown := sorted(set(map(str, wanted)) - values):
                    known = ", ".join(sorted(values)[:30])
                    raise ValueError(f"data.{key}: no row has {name}={unknown[0]!r}; values: {known}")

    def _filtered_rows(self) -> np.ndarray:
        keep = np.ones(len(self._table), dtype=bool)
        for name, kept in self.config.filter.items():
            values = [str(value) for value in self._whole_column(name)]
            keep &= np.isin(np.array(values, dtype=object), list(map(str, kept)))
        if not keep.any():
            raise ValueError(f"no rows of {self._source!r} pass data.filter {self.config.filter}")
        rows = np.flatnonzero(keep)
        most = self.config.max_images or len(rows)
        # the same ones in every call, and the fewer among the more
        return np.sort(np.random.default_rng(0).permutation(rows)[:most])

    def _read_labels(self) -> list[dict[str, Any] | None]:
        if self.config.label_schema is not None:
            from ..conditions.labels import get_schema

            schema = get_schema(self.config.label_schema)
            columns = {name: self.column(name) for name in self.column_names}
            labels = []
            for i, row in enumerate(self.rows):
                values = {name: column[i] for name, column in columns.items()}
                try:
                    labels.append(schema.from_row(values, self.config.label_columns or None))
                except ValueError as error:
                    raise ValueError(f"labels of row {row} of {self._source!r}: {error}") from None
            return labels
        if not self.config.label_columns:
            return [None] * len(self)
        columns = {field: self.column(name) for field, name in self.config.label_columns.items()}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _encoded(self, row: int) -> tuple[pa.Buffer | None, str | None]:
        encoded = self._bytes[row]
        return (encoded.as_buffer() if encoded.is_valid else None), self._paths[row].as_py()

    def _decode(self, row: int) -> Image.Image:
        encoded, path = self._encoded(row)
        if encoded is None and path is None:
            raise ValueError("the row has no image")
        if encoded is None and medical.is_medical(str(path)):
            return medical.read_slice(str(path))
        with Image.open(str(path) if encoded is None else io.BytesIO(encoded)) as image:
            return to_rgb(image).copy()  # a copy lets go of the file and its decoder, and can be pickled

    def _where(self, row: int) -> str:
        path = self._paths[row].as_py()
        return f"image in row {row} of {self._source!r}" + (f" ({path})" if path else "")


def pixel_hash(image: Image.Image) -> str:
    """First 16 hexadecimal digits of the SHA-256 of an RGB image's size and pixels."""
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()[:16]


def _position(name: str) -> float:
    """A place in [0, 1) that depends on the name alone (Python's own `hash` differs between processes)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _structure(value: Any, column: str) -> Mapping[str, Any]:
    if value is None or value == "":
        return {}
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"the column {column!r} holds no JSON: {str(value)[:60]!r}") from None
    if not isinstance(value, Mapping):
        raise ValueError(f"the column {column!r} holds no JSON objects: {str(value)[:60]!r}")
    return value
