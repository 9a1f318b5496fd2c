r"""Do variations of images stay in their class, and are they no copies? See medisyn/evaluation/variations.py.

python scripts/variations.py runs/dino_diffusion/diffusion outputs/variations --real "DIR/validation-*.parquet" \
    --train "DIR/train-*.parquet" --extractor timm:tf_efficientnet_lite0@DIR/efficientnet_lite0.pth
"""

from pathlib import Path
from typing import Annotated

import typer

from medisyn.commands.arguments import parse_adapters, parse_guidance
from medisyn.commands.utility import (
    JUDGE_RESOLUTION,
    JUDGE_STEPS,
    JudgeOption,
    JudgeResolutionOption,
    JudgeStepsOption,
    make_judge,
)
from medisyn.console import one_line_errors
from medisyn.evaluation.features import load_extractor
from medisyn.evaluation.inputs import open_images, open_pipeline
from medisyn.evaluation.variations import evaluate_variations
from medisyn.evaluation.variations_report import format_variations


def main(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a model with an image condition.")],
    out: Annotated[Path, typer.Argument(help="Gets report.json, report.md and the images.")],
    real: Annotated[list[str], typer.Option(help="Images that the model has not seen: the parents; repeatable.")],
    train: Annotated[list[str], typer.Option(help="Training images, for the classifier; repeatable.")],
    extractor: Annotated[str, typer.Option(help="inception, timm:MODEL@FILE, dinov2:NAME.")] = "inception",
    columns: Annotated[str, typer.Option(help="Classes, each nested in those before it.")] = "modality,finding",
    group_column: Annotated[str, typer.Option(help="Patient.")] = "group_id",
    strategy: Annotated[str, typer.Option(help="reconstruction, perturbation:scale=.., sdedit:..")] = "reconstruction",
    adapter: Annotated[list[str] | None, typer.Option(help="NAME[=WEIGHT]; repeatable.")] = None,
    parents: Annotated[int, typer.Option(min=1, help="Of each, one variation is made.")] = 200,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    guidance: Annotated[str | None, typer.Option(help='A number, or "text=3,image=2".')] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    cnn: JudgeOption = None,
    cnn_steps: JudgeStepsOption = JUDGE_STEPS,
    cnn_resolution: JudgeResolutionOption = JUDGE_RESOLUTION,
    cache_dir: Annotated[Path, typer.Option(help="Features; an interrupted run goes on.")] = Path("runs/features"),
) -> None:
    """Print and write the report."""
    names, adapters = columns.split(","), parse_adapters(adapter) or None
    pipe = open_pipeline(model, adapters)
    report = evaluate_variations(
        pipe,
        open_images(real, (*names, "caption")),
        open_images(train, names),
        load_extractor(extractor, pipe),
        out,
        names,
        strategy,
        parents,
        seed,
        adapter=adapters,
        group_column=group_column,
        cnn=make_judge(cnn, cnn_steps, cnn_resolution),
        cache_dir=cache_dir,
        num_inference_steps=steps,
        guidance_scale=None if guidance is None else parse_guidance(guidance),
        batch_size=batch_size,
    )
    print(format_variations(report))


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
