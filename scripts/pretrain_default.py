"""The embedded default, from images and captions to the folder that is shipped.

    python scripts/pretrain_default.py --data DIR                  # two CPU cores
    python scripts/pretrain_default.py --data DIR --hardware gpu   # one GPU

The same command again goes on where it was cut off. DIR holds `corpus/` and `weights/` (`embedded_default/stages.py`).
"""

from pathlib import Path
from typing import Annotated

import typer
from embedded_default.embed import embed
from embedded_default.stages import Hardware, run

from medisyn.console import one_line_errors


def main(
    data: Annotated[Path, typer.Option(help="Folder with the corpus and the perceptual network.")] = Path("data"),
    hardware: Annotated[Hardware, typer.Option(help="What it runs on.")] = Hardware.CPU,
    folder: Annotated[Path, typer.Option(help="The pipeline goes here; replaced.")] = Path("medisyn/pretrained"),
) -> None:
    """Run the stages that are not done yet."""
    for earlier in ("autoencoder", "dino"):
        run(earlier, data, hardware)
    (trained,) = run("default", data, hardware)
    embed(trained, folder)


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
