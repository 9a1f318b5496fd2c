"""The embedded default, from images and captions to the folder that is shipped.

    python scripts/pretrain_default.py --data DIR                  # two CPU cores
    python scripts/pretrain_default.py --data DIR --hardware gpu   # one GPU
    python scripts/pretrain_default.py --data DIR --hardware gpu --parts medisyn/pretrained --minutes 8

The same command again goes on where it was cut off. DIR holds `corpus/` and `weights/` (`embedded_default/stages.py`,
`embedded_default/lite_weights.py`).
"""

import math
from pathlib import Path
from typing import Annotated

import typer
from embedded_default.embed import embed
from embedded_default.stages import Hardware, check_matching, configure, run, run_diffusion, run_matching

from medisyn.console import one_line_errors


def main(
    data: Annotated[Path, typer.Option(help="Folder with the corpus and the perceptual network.")] = Path("data"),
    hardware: Annotated[Hardware, typer.Option(help="What it runs on.")] = Hardware.CPU,
    folder: Annotated[Path, typer.Option(help="The pipeline goes here; replaced.")] = Path("medisyn/pretrained"),
    parts: Annotated[
        Path | None, typer.Option(help="Pipeline whose autoencoder and image encoder are taken, not trained anew.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="On a GPU: when the UNet's main stage ends.")] = math.inf,
) -> None:
    """Run the stages that are not done yet."""
    configure("diffusion", data, hardware, parts)  # what is missing is said before the first stage
    check_matching(data)
    for earlier in ("autoencoder", "dino") if parts is None else ():
        run(earlier, data, hardware)
    run_diffusion(data, hardware, parts, minutes)
    embed(run_matching(data, hardware), folder, eight_bits=hardware is Hardware.GPU)


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
