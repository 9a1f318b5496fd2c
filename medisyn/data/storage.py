"""Named arrays on disk, one row per content: the format beneath the latent and embedding caches.

- A folder holds `cache.json` (key, contents, types), one `.npy` per array and `done.npy` with one mark per row.
- A folder is bound to its key: one with another key is refused, never silently reused or overwritten.
- Resumable after a kill at any moment: a row counts only once its mark is set, and the mark is set after the row has
  been flushed. Batches always hold the same rows, so an interrupted build gives the same values.
- Float16 (relative error below 0.05 %); an array with a value beyond 65504 becomes float32 as a whole.
- One process fills a folder, others wait for it.

    fill(Path("squares"), {"kind": "squares"}, ["a", "b"], load=lambda i: [i], encode=..., batch_size=32)
    squares = ArrayCache("squares", ["b", "a"]).read("values", 0)
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm

_FLIPPED = "_flipped"
_LARGEST_HALF = float(np.finfo(np.float16).max)


class ArrayCache:
    """Memory-mapped named arrays of which row `rows[i]` belongs to item i; see `fill`.

    Attributes:
        rows: for each item, its row, int64; -1 for an image that cannot be read.
        key: what the values depend on.
    """

    def __init__(self, folder: str | Path, contents: Sequence[str | None]) -> None:
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        self.key: dict[str, Any] = manifest["key"]
        self._dtypes: dict[str, str] = manifest["arrays"]
        row_of = {content: row for row, content in enumerate(manifest["contents"])}
        self.rows = np.array([-1 if content is None else row_of[content] for content in contents], dtype=np.int64)
        self._open_arrays()

    def _open_arrays(self) -> None:
        files = {name: _array_file(self.folder, name, dtype) for name, dtype in self._dtypes.items()}
        self._arrays = {name: np.load(file, mmap_mode="r") for name, file in files.items()}

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry all its values into every worker process.
        return {name: value for name, value in self.__dict__.items() if name != "_arrays"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_arrays()

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, name: str, index: int | Sequence[int], flip: bool | Sequence[bool] = False) -> torch.Tensor:
        """Float32 row of one item, or stacked rows of several; where `flip`, of the mirrored view.

        Raises:
            ValueError: there are no flipped views, or an item has no row.
        """
        rows = self.rows[np.asarray(index)]
        if (rows < 0).any():
            missing = int(np.atleast_1d(np.asarray(index))[np.atleast_1d(rows < 0)][0])
            raise ValueError(f"item {missing} has no row in the cache {self.folder}: its image cannot be read")
        flips = np.asarray(flip)
        if flips.any() and name + _FLIPPED not in self._arrays:
            raise ValueError(f"the cache {self.folder} holds no flipped views; build it with flips=True")
        values = np.asarray(self._arrays[name][rows], dtype=np.float32)
        if flips.any():
            mirrored = np.asarray(self._arrays[name + _FLIPPED][rows], dtype=np.float32)
            values = np.where(flips.reshape(flips.shape + (1,) * (values.ndim - flips.ndim)), mirrored, values)
        return torch.from_numpy(np.array(values))


def fill(
    folder: Path,
    key: dict[str, Any],
    contents: Sequence[str | None],
    load: Callable[[int], list],
    encode: Callable[[Sequence], Mapping[str, torch.Tensor]],
    batch_size: int,
    description: str = "encoding",
) -> None:
    """Compute the rows that the folder does not have yet.

    Args:
        folder: is created.
        key: what the values depend on beside the contents, as JSON values.
        contents: of each item, a name for what it holds; None: the item has no row.
        load: from an item's index to its views: itself, or itself and its mirror image.
        encode: from one view of a batch to named arrays, one row per item.
        batch_size: items per call of `encode`.
        description: of the progress bar.

    Raises:
        ValueError: the folder has another key, no item has a content, or a value is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    item_of = {content: item for item, content in reversed(list(enumerate(contents))) if content is not None}
    if not item_of:
        raise ValueError(f"there is nothing to put into the cache {folder}: no image can be read")
    key = {"version": 1, **key, "content": digest("".join(sorted(item_of)).encode())}
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        rows = list(dict.fromkeys(content for content in contents if content is not None))
        writer = _Writer(folder, key, rows)
        pending = writer.pending(item_of, batch_size)
        if not pending:
            return

        def load_batch(batch: list[int]) -> list[list]:
            return [load(item_of[writer.contents[row]]) for row in batch]

        progress = tqdm(total=len(rows), initial=len(rows) - sum(map(len, pending)), desc=description, unit="row")
        with progress, torch.inference_mode():
            for batch, views in _ahead(load_batch, pending):
                arrays: dict[str, np.ndarray] = {}
                for suffix, view in zip(("", _FLIPPED), zip(*views, strict=True), strict=False):
                    arrays |= {name + suffix: values.float().cpu().numpy() for name, values in encode(view).items()}
                writer.write(batch, arrays)
                progress.update(len(batch))


class _Writer:
    """The folder of a cache while it is filled."""

    def __init__(self, folder: Path, key: dict[str, Any], contents: list[str]) -> None:
        self.folder, self.key, self.contents = folder, key, contents
        self.dtypes: dict[str, str] = {}
        self.arrays: dict[str, np.memmap] = {}
        if (folder / "cache.json").is_file():
            manifest = _read_manifest(folder)
            self._refuse_other_key(manifest)
            self.contents, self.dtypes, self.key = manifest["contents"], manifest["arrays"], manifest["key"]
            files = {name: _array_file(folder, name, dtype) for name, dtype in self.dtypes.items()}
            self.arrays = {name: np.load(file, mmap_mode="r+") for name, file in files.items()}
            self.done = np.load(folder / "done.npy", mmap_mode="r+")
        else:
            self.done = _create(folder / "done.npy", "uint8", (len(contents),))

    def _refuse_other_key(self, manifest: Mapping[str, Any]) -> None:
        made, wanted = dict(manifest["key"]), dict(self.key)
        if set(self.contents) <= set(manifest["contents"]):  # a part of what is here
            wanted["content"] = made.get("content")
        if made != wanted:
            parts = [part for part in {**made, **wanted} if made.get(part) != wanted.get(part)]
            found = ", ".join(f"{part}={made.get(part)}" for part in parts)
            asked = ", ".join(f"{part}={wanted.get(part)}" for part in parts)
            raise ValueError(
                f"the cache {self.folder} was built for {found}, not for {asked}; name another folder or delete it"
            )

    def pending(self, wanted: Mapping[str, int], batch_size: int) -> list[list[int]]:
        """Rows to compute, in batches that do not depend on where an earlier build was interrupted."""
        todo = ~self.done.astype(bool) & np.array([content in wanted for content in self.contents], dtype=bool)
        starts = range(0, len(self.contents), batch_size)
        batches = [[row for row in range(start, min(start + batch_size, len(todo))) if todo[row]] for start in starts]
        return [batch for batch in batches if batch]

    def write(self, rows: list[int], values: Mapping[str, np.ndarray]) -> None:
        for name, array in values.items():
            if not np.isfinite(array).all():
                raise ValueError(f"the encoder gave values that are not finite ({name}); try without bf16 or float16")
        if not self.arrays:
            shapes = {name: (len(self.contents), *array.shape[1:]) for name, array in values.items()}
            self.dtypes = dict.fromkeys(values, "float16")
            self.arrays = {
                name: _create(_array_file(self.folder, name, "float16"), "float16", shape)
                for name, shape in shapes.items()
            }
            self._write_manifest()
        for name, array in values.items():
            if self.dtypes[name] == "float16" and np.abs(array).max() > _LARGEST_HALF:
                self._widen(name)
            self.arrays[name][rows] = array
            self.arrays[name].flush()
        self.done[rows] = 1
        self.done.flush()

    def _widen(self, name: str) -> None:
        narrow = self.arrays[name]
        wide = _create(_array_file(self.folder, name, "float32"), "float32", narrow.shape)
        wide[:] = narrow
        wide.flush()
        self.arrays[name], self.dtypes[name] = wide, "float32"
        self._write_manifest()  # from here on the wide file counts, also for a build that is killed now
        _array_file(self.folder, name, "float16").unlink()

    def _write_manifest(self) -> None:
        manifest = {"key": self.key, "arrays": self.dtypes, "contents": self.contents}
        write_atomically(self.folder / "cache.json", json.dumps(manifest).encode())


def _ahead(load_batch: Callable[[list[int]], list], batches: Sequence[list[int]]) -> Iterator[tuple[list[int], list]]:
    """Each batch with its loaded items; the next one is loaded in a thread while this one is encoded."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(load_batch, batches[0])
        for position, batch in enumerate(batches):
            loaded = following.result()
            if position + 1 < len(batches):
                following = pool.submit(load_batch, batches[position + 1])
            yield batch, loaded


def _create(file: Path, dtype: str, shape: tuple[int, ...]) -> np.memmap:
    array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash while writing to the map
        with open(file, "r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return array


def _array_file(folder: Path, name: str, dtype: str) -> Path:
    return folder / f"{name}.{dtype}.npy"


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "cache.json").read_text("utf-8"))
    except ValueError:
        raise ValueError(f"{folder / 'cache.json'} is damaged; delete the folder to build the cache again") from None


def digest(content: bytes) -> str:
    """First 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a run killed at any moment, finds the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
