"""The folder of a generation run: which images are finished, and the metadata that says so.

- Running again continues: an image counts as finished when its file is there and its metadata line is the planned one.
  The PNG carries the same record, so an image that was written just before a kill is recognised without its line.
- A folder with images of another request is refused; `overwrite` replaces what other requests left under this run's
  indices and nothing else.
- Files appear whole or not at all. An interruption keeps every finished image.

    folder = OutputFolder(Path("outputs"), ["00000_ct.png"], [{"prompt": "ct", "seed": 0}], [{}])
    with folder.keeping_metadata():
        folder.add(0, image)
"""

import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from . import grid
from .provenance import read_provenance, write_json_lines, write_png

METADATA = "metadata.jsonl"
GRID = "grid.png"
SAVE_SECONDS = 2.0  # between two writings of the metadata
MODEL_KEYS = ("model", "model_hash", "adapter", "adapter_hash", "scheduler") + (
    "num_inference_steps",
    "guidance_scale",
    "guidance_interval",
)


class OutputFolder:
    """Planned images, one per index, and those of them that are finished.

    Args:
        path: The folder; made with the first image.
        names: File name of each image, `00000_....png`.
        records: What each image's PNG and metadata line say.
        columns: What each metadata line says beyond that.
        overwrite: Accept a folder with images of another request.

    Attributes:
        done: Indices of the finished images.

    Raises:
        FileExistsError: The folder holds images of another request.
        NotADirectoryError: `path` is a file.
        ValueError: There is a `metadata.jsonl` that is not one.
    """

    def __init__(
        self,
        path: Path,
        names: Sequence[str],
        records: Sequence[Mapping[str, Any]],
        columns: Sequence[Mapping[str, Any]],
        overwrite: bool = False,
    ) -> None:
        """Look into the folder; nothing is written yet."""
        self.path = path
        self.names = names
        # Through JSON and back, to be compared with what is read.
        self._records = [json.loads(json.dumps(record)) for record in records]
        plan = zip(names, self._records, columns, strict=True)
        self._lines = [json.loads(json.dumps({"file_name": n, **record, **more})) for n, record, more in plan]
        self._others: list[dict[str, Any]] = []  # lines of images that are not this run's
        self._saved = 0.0
        self.done: set[int] = set()
        foreign = self._look_around()
        if foreign and not overwrite:
            raise FileExistsError(
                f"{path} holds the results of another request ({foreign}); choose another folder, or overwrite them"
            )

    def add(self, index: int, image: Image.Image) -> None:
        """Write an image unless it is finished already."""
        if index in self.done:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_png(image, self.path / self.names[index], self._records[index])
        self.done.add(index)
        for line in [line for line in self._others if _index(line) == index]:  # `overwrite` replaces it
            self._others.remove(line)
            (self.path / Path(line["file_name"]).name).unlink(missing_ok=True)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._save()

    @contextmanager
    def keeping_metadata(self) -> Iterator[None]:
        """Whatever ends the block, the metadata names every finished image."""
        try:
            yield
        finally:
            if self.done:
                self._save()

    def draw_grid(self, captions: Sequence[str], footer: str) -> None:
        """Write `grid.png` with the first images of each caption."""
        groups = groupby(range(len(self.names)), key=lambda index: captions[index])
        shown = [index for _, group in groups for index in list(group)[: grid.PER_ROW]][: grid.LARGEST]
        cells = []
        for index in shown:
            with Image.open(self.path / self.names[index]) as image:
                cells.append((captions[index], image.convert("RGB")))
        record = {key: self._records[0].get(key) for key in MODEL_KEYS}
        write_png(grid.draw_grid(cells, len(self.names), footer), self.path / GRID, record)

    def _look_around(self) -> str:
        """Find what is finished; returns the first thing that is not this run's, in words, or an empty string."""
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file, not a folder")
        foreign = []
        recorded = _read_lines(self.path / METADATA)
        planned = {name: index for index, name in enumerate(self.names)}
        for name, line in recorded.items():
            if name not in planned:
                self._others.append(line)
                foreign.append(name)
            elif line != self._lines[planned[name]]:
                foreign.append(f"{name}: {_difference(line, self._lines[planned[name]])}")
            elif (self.path / name).is_file():
                self.done.add(planned[name])
        for name, index in planned.items():
            if name not in recorded and (self.path / name).exists():
                if _is_made_from(self._records[index], self.path / name):
                    self.done.add(index)
                else:
                    foreign.append(name)
        if not recorded and (self.path / GRID).exists() and not _is_made_from({}, self.path / GRID):
            foreign.append(GRID)
        return foreign[0] if foreign else ""

    def _save(self) -> None:
        lines = [self._lines[index] for index in sorted(self.done)] + self._others
        write_json_lines(self.path / METADATA, sorted(lines, key=_index))
        self._saved = time.monotonic()


def check_writable(path: str | Path) -> None:
    """Find out before a long run whether a folder can be written, or made, without leaving a trace.

    Raises:
        NotADirectoryError: The path, or a part of it, is a file.
        OSError: Any other reason, such as missing permission.
    """
    folder = Path(path).absolute()
    try:
        while not _exists(folder):
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(f"{path} cannot be a folder: {folder} is not one")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def _exists(path: Path) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _index(line: Mapping[str, Any]) -> float:
    match = re.match(r"(\d{5,})_", line["file_name"])
    return int(match[1]) if match and str(line.get("software", "")).startswith("medisyn ") else float("inf")


def _difference(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    key = next(key for key in {**now, **there} if there.get(key) != now.get(key))
    return f"{key} is {there.get(key)!r} there and {now.get(key)!r} now"


def _is_made_from(record: Mapping[str, Any], file: Path) -> bool:
    """Whether the file says exactly this of itself; with an empty record, whether it says anything."""
    try:
        found = read_provenance(file)
    except ValueError:
        return False
    return not record or {key: value for key, value in found.items() if key != "notice"} == record


def _read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a metadata file by file name."""
    if not path.is_file():
        return {}
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {line["file_name"]: line for line in lines}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not metadata of generated images; choose another folder") from None
