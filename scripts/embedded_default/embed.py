r"""Put a trained pipeline into the package as the embedded default: half precision, files below 16 MB, 32 MB in all.

python scripts/embedded_default/embed.py runs/embedded_default/matching medisyn/pretrained
"""

import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer

from medisyn import load_pipeline
from medisyn.backbone import load_autoencoder
from medisyn.eight_bits import to_eight_bits
from medisyn.training_record import read_training_record, write_training_record

LIMIT = 32_000_000  # bytes of safetensors
LICENSE = "research only (several training sources are non-commercial or of unknown licence)"


def embed(
    run: Path,
    folder: Path,
    vae: Annotated[
        Path | None, typer.Option(help="Run whose autoencoder has the same encoder and a better decoder.")
    ] = None,
    eight_bits: Annotated[bool, typer.Option(help="Store the UNet's large matrices in 8 bits.")] = False,
) -> None:
    """Save the pipeline of `run` into `folder` (replaced) and refuse it if it is too large to ship."""
    pipe = load_pipeline(run)
    if vae is not None:
        tuned = load_autoencoder(vae)
        now, then = tuned.encoder.state_dict(), pipe.vae.encoder.state_dict()
        if any(not torch.equal(now[name], value) for name, value in then.items()):
            raise typer.BadParameter(f"{vae} has another encoder than {run}: its latents are not the model's")
        pipe.register_modules(vae=tuned)
    pipe.to(torch.float16)
    if eight_bits:
        to_eight_bits(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial, max_shard_size="15MB")
    record = read_training_record(partial)
    if record is None:
        raise typer.BadParameter(f"{run} has no record of its training images")
    write_training_record(partial, record | {"license": LICENSE})
    size = sum(file.stat().st_size for file in partial.rglob("*.safetensors"))
    if size > LIMIT:
        shutil.rmtree(partial)
        raise typer.BadParameter(f"{size} bytes of safetensors are more than {LIMIT}")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    print(f"{folder}: {size / 1e6:.1f} MB of safetensors")


if __name__ == "__main__":
    typer.run(embed)
