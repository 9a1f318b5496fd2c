"""An augmented data set: real and selected synthetic images in one place, each row saying which it is.

- As an imagefolder (PNG and `metadata.jsonl`) or as one Parquet file; both load with `datasets`.
- Real images keep their pixels, class and patient. Synthetic ones keep the bytes of their file and every column of
  their own table (seed, prompt or labels, model hash, ...).
- It appears whole or not at all; one that was made here is replaced, anything else is refused.

    write_dataset(labelled, Path("outputs/selected"), "finding", Path("outputs/dataset"), "parquet")
"""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets

from .data.loading import pixel_hash
from .evaluation.utility_inputs import LabelledImages
from .generation.output_folder import METADATA
from .generation.provenance import atomic_file, write_json_lines
from .generation.requests import read_image

FORMATS = ("imagefolder", "parquet")
MARK = "augmented.json"  # says that a folder was made here
TABLE = "train.parquet"


def write_dataset(
    real: LabelledImages, synthetic: Path, label_column: str, folder: Path, dataset_format: str = "imagefolder"
) -> None:
    """Write real images and those of a generated folder together.

    Columns of all rows: `label_column`, `synthetic` (boolean), `content_hash`, `group_id` (a patient, or null).

    Args:
        real: Labelled real images.
        synthetic: Folder with `metadata.jsonl`.
        label_column: Name of the class's column.
        folder: What is written.
        dataset_format: One of `FORMATS`.

    Raises:
        FileExistsError: `folder` holds something that was not made here.
        OSError: It cannot be written.
    """
    check_dataset_folder(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for row, (label, group, content) in enumerate(zip(real.labels, real.groups, real.hashes, strict=True)):
        name = f"real_{row:05d}.png"
        real.images.image(row).save(partial / name)
        patient = group[1] if isinstance(group, tuple) else None
        lines.append(_line(name, label_column, label, False, content, patient))
    own_lines = [json.loads(line) for line in (synthetic / METADATA).read_text("utf-8").splitlines() if line.strip()]
    for line in own_lines:
        name = f"synthetic_{line['file_name']}"
        shutil.copyfile(synthetic / line["file_name"], partial / name)
        content = pixel_hash(read_image(partial / name))
        lines.append(line | _line(name, label_column, str(line[label_column]), True, content, None))
    if dataset_format == "parquet":
        _write_table(lines, partial)
    else:
        write_json_lines(partial / METADATA, lines)
    counts = {"real": len(real), "synthetic": len(own_lines), "label_column": label_column}
    with atomic_file(partial / MARK) as file:
        file.write_text(json.dumps(counts) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def check_dataset_folder(folder: Path) -> None:
    """Raise FileExistsError for a folder that `write_dataset` did not make."""
    if folder.is_symlink() or (folder.exists() and not (folder / MARK).is_file()):
        raise FileExistsError(f"{folder} was not made by an augmentation; move it, or choose another folder")


def _line(
    name: str, label_column: str, label: str, synthetic: bool, content: str, group: str | None
) -> dict[str, Any]:
    return {
        "file_name": name,
        label_column: label,
        "synthetic": synthetic,
        "content_hash": content,
        "group_id": group,
    }


def _write_table(lines: list[dict[str, Any]], folder: Path) -> None:
    """One Parquet file with the encoded images; what is nested in a column becomes JSON text."""
    names = list(dict.fromkeys(name for line in lines for name in line if name != "file_name"))
    nested = {name for name in names if any(isinstance(line.get(name), dict | list) for line in lines)}

    def value(line: dict[str, Any], name: str) -> Any:
        found = line.get(name)
        return json.dumps(found) if name in nested and found is not None else found

    columns: dict[str, list] = {name: [value(line, name) for line in lines] for name in names}
    images = [{"bytes": (folder / line["file_name"]).read_bytes(), "path": line["file_name"]} for line in lines]
    table = datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())
    table.to_parquet(str(folder / TABLE))
    for line in lines:
        (folder / line["file_name"]).unlink()
