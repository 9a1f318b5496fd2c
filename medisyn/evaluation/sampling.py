"""Synthetic counterparts of real images: one for each drawn caption, kept as a folder that can be evaluated again.

Each PNG and each line of the metadata says how the image was made: model, condition, seed and settings. A folder is
replaced only if everything in it was made here.

generate_like(medisyn.load_pipeline(), load_images("corpus/validation-*.parquet"), Path("images"), ["modality"])
"""

import inspect
import json
import re
import shutil
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..data.loading import ImageDataset, load_images
from ..generation.output_folder import METADATA
from ..generation.provenance import SOFTWARE, adapter_hash, read_provenance, write_json_lines, write_png
from ..pipelines.medisyn_pipeline import MediSynPipeline, label_field, label_value
from .inputs import captions_of

SETTINGS = ("num_inference_steps", "guidance_scale", "guidance_interval")  # of the pipeline, recorded with every image
# What is left in the hidden folder of a run that was killed.
_UNFINISHED = re.compile(r"\.(\d{6,}\.png|metadata\.jsonl)\.partial")


def generate_like(
    pipe: MediSynPipeline,
    real: ImageDataset,
    folder: Path,
    columns: Sequence[str] = (),
    number: int = 600,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
    kinds: Sequence[str] | None = None,
    **arguments,
) -> ImageDataset:
    """One image for each of `number` rows of `real`, from conditions of the row.

    Args:
        pipe: The model.
        real: Real images with captions.
        folder: Gets `000000.png`, ... and `metadata.jsonl`; what an earlier call made there is replaced as a whole
            once all images are there.
        columns: Of `real`, copied to each image's metadata; rows are drawn in proportion to the values of the first.
        number: Images to make.
        seed: Of the draw; image i is made with `seed + i`.
        batch_size: Images per call.
        progress: Show a bar.
        kinds: Conditions that the model is given of a row; None: caption and labels, or the row's image where the
            model takes nothing else.
        arguments: Further arguments of every call of the pipeline.

    Raises:
        ValueError: `real` has no captions for a model that takes text, or no labels for one that takes only labels.
        FileExistsError: `folder` has something that was not made here; nothing is generated.
    """
    kinds = tuple(kinds or (kind for kind in pipe.kinds if kind != "image" or pipe.kinds == ("image",)))
    partial = folder.with_name(f".{folder.name}.partial")
    check_replaceable(folder)
    check_replaceable(partial)
    strata = real.column(columns[0]) if columns else [None] * len(real)
    rows = draw_rows(strata, number, seed)
    captions = captions_of(real)
    values = {column: real.column(column) for column in columns}
    if "text" in kinds and all(caption is None for caption in captions):
        raise ValueError(
            f"the model takes text but {real.config.source!r} has no captions; columns: {', '.join(real.column_names)}"
        )
    if kinds == ("labels",) and all(labels is None for labels in real.labels):
        raise ValueError(
            f"the model takes labels but {real.config.source!r} has none; map them with data.label_columns"
        )
    shared = _provenance(pipe, arguments)
    # The earlier images stay until the new ones are complete.
    _remove(partial)
    partial.mkdir(parents=True)
    metadata = []
    with tqdm(total=number, desc="generate", unit="image", disable=not progress) as bar:
        for start in range(0, number, batch_size):
            batch = rows[start : start + batch_size]
            seeds = [seed + start + position for position in range(len(batch))]
            conditions: dict = {}
            if "text" in kinds:
                conditions["prompt"] = [captions[row] for row in batch]
            if "labels" in kinds:
                conditions["labels"] = [_canonical(pipe.label_schema, real.labels[row]) for row in batch]
            if "image" in kinds:
                conditions["image"] = [real.image(row) for row in batch]
            if not kinds:
                conditions["num_images_per_prompt"] = len(batch)
            generators = [torch.Generator().manual_seed(each) for each in seeds]
            images = pipe(**conditions, **arguments, generator=generators).images
            for position, (row, image) in enumerate(zip(batch, images, strict=True)):
                asked = {
                    "prompt": conditions.get("prompt", [None] * len(batch))[position],
                    "seed": seeds[position],
                    **shared,
                }
                if "labels" in conditions:
                    asked["labels"] = conditions["labels"][position] or None
                if "image" in conditions:
                    asked["like"] = f"real image, pixels sha256:{real.content_hash(row)}"
                asked = {key: value for key, value in asked.items() if value is not None}
                copied = {column: values[column][row] for column in columns}
                name = f"{start + position:06d}.png"
                write_png(image, partial / name, copied | asked)
                metadata.append({"file_name": name} | asked | copied)
            bar.update(len(batch))
    write_json_lines(partial / METADATA, metadata)
    check_replaceable(folder)  # once more: making the images takes long enough to put something there
    _remove(folder)
    partial.rename(folder)
    return load_images(str(folder), caption_column=None)


def draw_rows(strata: Sequence[Hashable], number: int, seed: int) -> list[int]:
    """`number` rows in proportion to the size of each stratum; no row twice before all were drawn once."""
    rng = np.random.default_rng(seed)
    position = np.empty(len(strata))
    for stratum in dict.fromkeys(strata):
        rows = [row for row, other in enumerate(strata) if other == stratum]
        # Evenly spread over [0, 1), so that any beginning of the sorted order has every stratum's share.
        position[rng.permutation(rows)] = (np.arange(len(rows)) + rng.random()) / len(rows)
    order = np.argsort(position, kind="stable")
    return [int(order[index % len(order)]) for index in range(number)]


def check_replaceable(folder: Path) -> None:
    """Refuse a folder with anything that `generate_like` did not make, before it is replaced.

    Its own are `000000.png`, ... that carry the provenance of medisyn, and a `metadata.jsonl` about only these.

    Raises:
        FileExistsError: Names the first other thing.
        NotADirectoryError: `folder` is a file or a link.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder of generated images; choose another folder")
    images: set[str] = set()
    for file in sorted(folder.iterdir(), key=lambda file: (file.name == METADATA, file.name)):
        if not _is_own(file, images):
            raise FileExistsError(
                f"{folder} holds {file.name}, which no evaluation made; move it, or choose another folder"
            )
        images.add(file.name)


def model_name(pipe: MediSynPipeline) -> str:
    """Folder or Hub name, without the path of this machine."""
    name = pipe.config.get("_name_or_path") or type(pipe).__name__
    return Path(name).name if Path(name).exists() else name


def adapter_names(pipe: MediSynPipeline) -> dict[str, float]:
    """The adapters on a pipeline with their weights."""
    from ..lora import loaded_adapters

    return {name: adapter.weight for name, adapter in loaded_adapters(pipe).items()}


def _is_own(file: Path, images: set[str]) -> bool:
    """Whether `generate_like` made a file of a folder with `images` of its own."""
    if file.is_symlink() or not file.is_file():
        return False
    if _UNFINISHED.fullmatch(file.name):
        return True
    try:
        if file.name == METADATA:
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            return images.issuperset(line["file_name"] for line in lines)
        return bool(re.fullmatch(r"\d{6,}\.png", file.name) and read_provenance(file)["synthetic"])
    except (ValueError, KeyError, TypeError):
        return False


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _provenance(pipe: MediSynPipeline, arguments: dict[str, Any]) -> dict[str, Any]:
    """What all images have in common, under the names that `medisyn generate` uses."""
    from ..backbone import model_hash

    parameters = inspect.signature(type(pipe).__call__).parameters
    return {
        **{name: arguments.get(name, parameters[name].default) for name in SETTINGS},
        "scheduler": type(pipe.scheduler).__name__,
        "model": model_name(pipe),
        "model_hash": model_hash(pipe),
        "adapter": ", ".join(f"{name}={weight:g}" for name, weight in adapter_names(pipe).items()) or None,
        "adapter_hash": adapter_hash(pipe),
        "software": SOFTWARE,
        "synthetic": True,
    }


def _canonical(schema: dict, labels: dict[str, Any] | None) -> dict[str, str]:
    """The known labels by code, as the schema writes their values."""
    codes = {label_field(schema, name): value for name, value in (labels or {}).items()}
    slots = {code: label_value(schema, code, value) for code, value in codes.items()}
    return {code: slot for code, slot in slots.items() if slot is not None}
