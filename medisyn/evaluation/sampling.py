"""Synthetic counterparts of real images: one for each drawn caption, kept as a folder that can be evaluated again.

generate_like(medisyn.load_pipeline(), load_images("corpus/validation-*.parquet"), Path("images"), ["modality"])
"""

import shutil
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from ..data.loading import ImageDataset, load_images
from ..generation.provenance import write_json_lines, write_png

if TYPE_CHECKING:
    from ..pipelines.medisyn_pipeline import MediSynPipeline


def generate_like(
    pipe: "MediSynPipeline",
    real: ImageDataset,
    folder: Path,
    columns: Sequence[str] = (),
    number: int = 600,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
    **arguments,
) -> ImageDataset:
    """One image for each of `number` rows of `real`, from the row's caption and labels.

    A model that is conditioned on images alone gets the row's image.

    Args:
        pipe: The model.
        real: Real images with captions.
        folder: Gets `000000.png`, ... and `metadata.jsonl`; replaced as a whole once all images are there.
        columns: Of `real`, copied to each image's metadata; rows are drawn in proportion to the values of the first.
        number: Images to make.
        seed: Of the draw; image i is made with `seed + i`.
        batch_size: Images per call.
        progress: Show a bar.
        arguments: Further arguments of every call of the pipeline.

    Raises:
        ValueError: `real` has no captions for a model that takes text, or no labels for one that takes only labels.
    """
    strata = real.column(columns[0]) if columns else [None] * len(real)
    rows = draw_rows(strata, number, seed)
    captions = real.captions
    if "caption" in real.column_names and all(caption is None for caption in captions):
        captions = real.column("caption")
    values = {column: real.column(column) for column in columns}
    if "text" in pipe.kinds and all(caption is None for caption in captions):
        raise ValueError(
            f"the model takes text but {real.config.source!r} has no captions; columns: {', '.join(real.column_names)}"
        )
    if pipe.kinds == ("labels",) and all(labels is None for labels in real.labels):
        raise ValueError(
            f"the model takes labels but {real.config.source!r} has none; map them with data.label_columns"
        )
    # The earlier images stay until the new ones are complete.
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    metadata = []
    with tqdm(total=number, desc="generate", unit="image", disable=not progress) as bar:
        for start in range(0, number, batch_size):
            batch = rows[start : start + batch_size]
            seeds = [seed + start + position for position in range(len(batch))]
            conditions: dict = {}
            if "text" in pipe.kinds:
                conditions["prompt"] = [captions[row] for row in batch]
            if "labels" in pipe.kinds:
                conditions["labels"] = [real.labels[row] for row in batch]
            if pipe.kinds == ("image",):
                conditions["image"] = [real.image(row) for row in batch]
            if not pipe.kinds:
                conditions["num_images_per_prompt"] = len(batch)
            generators = [torch.Generator().manual_seed(each) for each in seeds]
            images = pipe(**conditions, **arguments, generator=generators).images
            for position, (row, image) in enumerate(zip(batch, images, strict=True)):
                record = {
                    "prompt": captions[row],
                    "seed": seeds[position],
                    **{column: values[column][row] for column in columns},
                }
                name = f"{start + position:06d}.png"
                write_png(image, partial / name, record)
                metadata.append({"file_name": name, **record})
            bar.update(len(batch))
    write_json_lines(partial / "metadata.jsonl", metadata)
    shutil.rmtree(folder, ignore_errors=True)
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
