"""What a model was trained on: `training_images.json`, which travels with every saved model.

- `hashes` are those of `ImageDataset.content_hash`: evaluation finds training images among its real ones by them.
- `datasets` names each data set with its licence and number of images; `license` is the model's own, where known.
- A model trained further has seen the images of its base too: merge both records.

    base = read_training_record("base") or {}
    record = merge_training_records(base, {"hashes": ["0123456789abcdef"], "datasets": []})
    write_training_record("outputs/run/pipeline", record)
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from .generation.provenance import atomic_file

TRAINING_RECORD = "training_images.json"


def read_training_record(folder: str | Path) -> dict[str, Any] | None:
    """The record in a model's folder; None if there is none.

    Returns:
        `{"hashes": [16 hexadecimal digits, ...], "datasets": [{"name", "license", "images"}, ...]}`, with "license"
        and other keys where they were written.

    Raises:
        ValueError: The file is damaged or is something else.
        OSError: The file cannot be read.
    """
    file = Path(folder) / TRAINING_RECORD
    if not file.is_file():
        return None
    try:
        return _checked(json.loads(file.read_bytes().decode("utf-8")), file)
    except RecursionError:
        raise _not_a_record(file, "nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise _not_a_record(file, "not JSON in UTF-8") from None


def find_training_record(name_or_dir: str | Path) -> dict[str, Any] | None:
    """The record of a model or autoencoder named as for `load_pipeline`.

    A folder, a run, a downloaded Hub name, or "default", the embedded model.
    """
    embedded = Path(str(resources.files("medisyn"))) / "pretrained"
    folder = embedded if str(name_or_dir) == "default" else Path(name_or_dir).expanduser()
    if not folder.exists():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(str(name_or_dir), TRAINING_RECORD)
        return read_training_record(Path(cached).parent) if isinstance(cached, str) else None
    places = (folder, folder / "pipeline", folder / "vae", folder / "adapter")
    return next((record for place in places if (record := read_training_record(place)) is not None), None)


def write_training_record(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record to a model's folder, made if need be; an earlier one is replaced in one step or stays.

    Raises:
        ValueError: `record` is none.
        TypeError: It holds what JSON cannot.
        OSError: The file cannot be written.
    """
    file = Path(folder) / TRAINING_RECORD
    text = json.dumps(_checked(dict(record), file), ensure_ascii=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        partial.write_bytes(text.encode("utf-8"))


def merge_training_records(*records: Mapping[str, Any]) -> dict[str, Any]:
    """One record of everything in `records`.

    Hashes are their sorted union. A data set with the same name and licence comes once, with the larger number of
    images, since the records may count the same images. The licence stays if all records state the same one: of two
    licences, or an unstated one, no program can say what holds.
    """
    hashes: set[str] = set()
    found: dict[tuple[str | None, str | None], dict[str, Any]] = {}
    for record in records:
        hashes.update(record.get("hashes", ()))
        for dataset in record.get("datasets", ()):
            kept = found.setdefault((dataset.get("name"), dataset.get("license")), dict(dataset))
            counts = [each["images"] for each in (kept, dataset) if each.get("images") is not None]
            if counts:
                kept["images"] = max(counts)
    licenses = {record.get("license") for record in records}
    agreed = licenses.pop() if len(licenses) == 1 else None
    merged = {"hashes": sorted(hashes), "datasets": list(found.values())}
    return merged if agreed is None else merged | {"license": agreed}


def _checked(record: Any, file: Path) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise _not_a_record(file, "not an object")
    hashes, datasets = record.get("hashes"), record.get("datasets", [])
    if not isinstance(hashes, list) or not all(isinstance(each, str) for each in hashes):
        raise _not_a_record(file, "hashes must be a list of text")
    if not isinstance(datasets, list) or not all(map(_is_dataset, datasets)):
        raise _not_a_record(file, "datasets must be a list of name, license and images")
    if not isinstance(record.get("license"), str | None):
        raise _not_a_record(file, "license must be text")
    return {**record, "datasets": datasets}


def _is_dataset(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), str | None) for key in ("name", "license"))
        and isinstance(entry.get("images"), int | None)
    )


def _not_a_record(file: Path, why: str) -> ValueError:
    return ValueError(f"{file} is not a record of training images: {why}")
