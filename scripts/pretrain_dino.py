"""An image encoder from images without labels (DINO, a stock `Dinov2Model`): the embedded default's, or any folder's.

    python scripts/pretrain_dino.py --data DIR                  # two CPU cores
    python scripts/pretrain_dino.py --data DIR --hardware gpu   # one GPU
    python scripts/pretrain_dino.py --images FOLDER             # `dino_diffusion/dino.yaml`
    python scripts/pretrain_dino.py --images FOLDER --class-column label

- The same command again goes on where it was cut off.
- DIR holds `corpus/` (`embedded_default/stages.py`), FOLDER any images: nothing but the images is read.
- With a class column a tenth of FOLDER is held out, and its k-NN accuracy is logged. `label` is the name of the
  folder that an image is in; other columns are those of `metadata.csv`. The two parts are listed in `OUT/split/`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from embedded_default.stages import SPLITS, Hardware, configure, run

from medisyn.config import DataConfig, TrainConfig, load_config
from medisyn.console import one_line_errors, quiet_progress_bars
from medisyn.data.loading import load_readable
from medisyn.data.sources import open_source
from medisyn.trainer import Trainer

RECIPE = Path(__file__).parent / "dino_diffusion" / "dino.yaml"
HELD_OUT = 0.1  # share of the images


def main(
    data: Annotated[
        Path | None, typer.Option(help="Folder with the corpus; data, where no --images are given.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images, in place of --data.")] = None,
    class_column: Annotated[str | None, typer.Option(help="Class, for a metric alone: label, ...")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder with --images; that of the recipe.")] = None,
    hardware: Annotated[Hardware, typer.Option(help="What it runs on.")] = Hardware.CPU,
) -> None:
    """Run what is not done yet, and print the run folder."""
    quiet_progress_bars()
    if images is None:
        if class_column is not None or out is not None:
            raise ValueError(f"{'--out' if class_column is None else '--class-column'} needs --images FOLDER")
        print(*run("dino", data or Path("data"), hardware), sep="\n")
    elif data is not None:
        raise ValueError("--data and --images: give one of them")
    else:
        print(Trainer(configure_images(images, class_column, out, hardware)).fit())


def configure_images(images: Path, class_column: str | None, out: Path | None, hardware: Hardware) -> TrainConfig:
    """The recipe for a folder of images, in the steps that fit the hardware.

    Args:
        images: The folder.
        class_column: Class of the images that are held out; None: all are trained on, and there is no metric.
        out: Run folder; None: that of the recipe.
        hardware: See `Hardware`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images in it, no such column, fewer than two classes, or too few images to hold some out.
    """
    if not images.is_dir():
        raise FileNotFoundError(f"--images {images}: no such folder")
    config, fitted = load_config(RECIPE), configure("dino", images, hardware)
    config = replace(
        config,
        output_dir=str(out or config.output_dir),
        data=replace(config.data, source=str(images), num_workers=fitted.data.num_workers),
        optim=fitted.optim,
        train=replace(fitted.train, validate_every=0, validation_images=config.train.validation_images),
    )
    if class_column is None:
        return config
    parts = hold_out(config.data, class_column, Path(config.output_dir) / "split")
    data, validation = (replace(config.data, source=str(part), dataset_column="dataset") for part in parts)
    task = replace(config.task, class_column=class_column)
    return replace(config, data=data, validation=validation, task=task, train=fitted.train)


def hold_out(data: DataConfig, class_column: str, folder: Path) -> list[Path]:
    """Write `train.parquet` and `validation.parquet`, which name the images of the folder, each its own group."""
    images = load_readable(data)
    classes = {value for value in images.column(class_column) if value is not None}
    if len(classes) < 2:
        found = ", ".join(map(str, classes)) or "none"
        raise ValueError(f"--class-column {class_column}: {data.source} needs two classes or more, it has: {found}")
    table = open_source(str(Path(data.source).absolute()), data.split, data.image_column)
    if "dataset" not in table.column_names:
        table = table.add_column("dataset", [Path(data.source).absolute().name] * len(table))
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, part in zip(SPLITS.values(), images.split_by_group(HELD_OUT, by_image=True), strict=True):
        parts.append(folder / f"{name}.parquet")
        table.select(part.rows).to_parquet(parts[-1])
    return parts


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
