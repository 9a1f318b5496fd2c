"""The embedded default's autoencoder: 128 px images <-> 16x16x16 latents.

    python scripts/pretrain_autoencoder.py --data DIR                  # two CPU cores
    python scripts/pretrain_autoencoder.py --data DIR --hardware gpu   # one GPU

The same command again goes on where it was cut off. DIR holds `corpus/` and `weights/` (`embedded_default/stages.py`).
"""

from pathlib import Path
from typing import Annotated

import typer
from embedded_default.stages import Hardware, run

from medisyn.console import one_line_errors


def main(
    data: Annotated[Path, typer.Option(help="Folder with the corpus and the perceptual network.")] = Path("data"),
    hardware: Annotated[Hardware, typer.Option(help="What it runs on.")] = Hardware.CPU,
) -> None:
    """Run the stages that are not done yet."""
    print(*run("autoencoder", data, hardware), sep="\n")


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
