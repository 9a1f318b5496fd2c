r"""How long a model takes to load and to draw: wall-clock seconds, the median of several rounds.

python scripts/benchmarks/sampling_speed.py default --images 8 --threads 2
python scripts/benchmarks/sampling_speed.py default --adapter adapters/few-step --fuse --guidance 1 --steps 8
"""

import json
import time
from statistics import median
from typing import Annotated

import torch
import typer

from medisyn.commands.arguments import parse_adapters
from medisyn.console import one_line_errors
from medisyn.loading import load_pipeline
from medisyn.lora import fuse_adapters

PROMPT = "frontal chest X-ray of a child with clear lungs"


def main(
    model: Annotated[str, typer.Argument(help='Folder, Hub name or "default".')] = "default",
    images: Annotated[int, typer.Option(min=1, help="Drawn in one batch.")] = 8,
    adapter: Annotated[str | None, typer.Option(help="NAME[=WEIGHT]")] = None,
    fuse: Annotated[bool, typer.Option("--fuse", help="Make the adapter part of the weights first.")] = False,
    guidance: Annotated[float | None, typer.Option(help="By default that of the pipeline.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; by default those of the pipeline.")] = None,
    prompt: Annotated[str, typer.Option(help="For a model with a text condition.")] = PROMPT,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: PyTorch's choice.")] = 0,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Print seconds of loading and of a batch as one JSON line."""
    if fuse and adapter is None:
        raise typer.BadParameter("--fuse needs an --adapter")
    if threads:
        torch.set_num_threads(threads)
    loading, drawing = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        pipe = load_pipeline(model, adapter=parse_adapters([adapter]) if adapter else None)
        loading.append(time.perf_counter() - start)
    if fuse:
        fuse_adapters(pipe)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": guidance}
    options = {name: value for name, value in options.items() if value is not None}
    given = {"prompt": [prompt] * images} if "text" in pipe.kinds else {"num_images_per_prompt": images}
    for seed in range(rounds + 1):
        generators = [torch.Generator().manual_seed(seed * images + index) for index in range(images)]
        start = time.perf_counter()
        pipe(**given, generator=generators, **options)
        drawing.append(time.perf_counter() - start)
    numbers = {"load_seconds": median(loading), "batch_seconds": median(drawing[1:])}  # the first one warms up
    setting = {"model": model, "adapter": adapter, "fused": fuse, "images": images, "threads": torch.get_num_threads()}
    print(json.dumps(setting | options | numbers))


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
