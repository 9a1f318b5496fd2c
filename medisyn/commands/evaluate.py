"""`medisyn evaluate`: synthetic images measured against real ones.

medisyn evaluate default --real "DIR/validation-*.parquet" --train "DIR/train-*.parquet" --per modality,finding
"""

import sys
from typing import Annotated

import typer

from ..console import quiet_progress_bars
from .arguments import (
    DEFAULT,
    AdapterOption,
    GuidanceIntervalOption,
    GuidanceOption,
    SeedOption,
    StepsOption,
    check_interval,
    check_names,
    parse_adapters,
    parse_guidance,
)
from .utility import JUDGE_RESOLUTION, JUDGE_STEPS, JudgeOption, JudgeResolutionOption, JudgeStepsOption, make_judge


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(evaluate)


def evaluate(
    model_or_folder: Annotated[
        str, typer.Argument(metavar="MODEL_OR_FOLDER", help='A model ("default": the embedded one) or images.')
    ],
    real: Annotated[
        list[str], typer.Option(metavar="DATA", help="Real images that the model has not seen; may be repeated.")
    ],
    adapter: AdapterOption = None,
    train: Annotated[
        list[str] | None, typer.Option(metavar="DATA", help="Real training images; may be repeated.")
    ] = None,
    per: Annotated[str | None, typer.Option(metavar="COLUMNS", help="Columns to report on: modality,finding.")] = None,
    ordinal: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN[=LOW,..,HIGH]", help="Column of grades; may be repeated.")
    ] = None,
    label_columns: Annotated[
        str | None, typer.Option(metavar="FIELD=COLUMN,...", help="Label fields read from columns of --real.")
    ] = None,
    conditions: Annotated[
        str | None, typer.Option(metavar="KINDS", help="Conditions to give, alone or together: text,labels,image.")
    ] = None,
    extractor: Annotated[
        str, typer.Option(metavar="SPEC", help="inception, timm:NAME@FILE, Hub name, ...")
    ] = "inception",
    codec: Annotated[
        str | None,
        typer.Option(metavar="FORMAT:QUALITY", help="The extractor sees all images through it: webp:90."),
    ] = None,
    cnn: JudgeOption = None,
    cnn_steps: JudgeStepsOption = JUDGE_STEPS,
    cnn_resolution: JudgeResolutionOption = JUDGE_RESOLUTION,
    num_images: Annotated[int, typer.Option(min=2, max=100_000, help="Images to generate.")] = 600,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    guidance_interval: GuidanceIntervalOption = None,
    seed: SeedOption = 0,
    cache: Annotated[str | None, typer.Option(metavar="DIR", help="Keeps features for the next evaluation.")] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Go on although the model has seen real images.")
    ] = False,
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Folder of report.json, report.md, grid.png.")
    ] = "outputs/evaluation",
) -> None:
    """Measure synthetic images against real ones."""
    from ..generation.output_folder import check_writable

    weights = None if guidance is None else parse_guidance(guidance)
    check_interval("--guidance-interval", guidance_interval)
    columns = None if per is None else [column.strip() for column in per.split(",")]
    if columns is not None and not all(columns):
        raise ValueError(f"--per must be column names joined by commas, not {per!r}")
    check_names(model_or_folder=model_or_folder, extractor=extractor, cache=cache, out=out)
    for source in real:
        check_names(real=source)
    for source in train or ():
        check_names(train=source)
    for folder in filter(None, (out, cache)):
        check_writable(folder)
    from ..evaluation.report import evaluate as measure
    from ..pipelines.medisyn_pipeline import parse_labels

    judge = make_judge(cnn, cnn_steps, cnn_resolution)
    quiet_progress_bars()
    measure(
        None if model_or_folder == DEFAULT else model_or_folder,
        real,
        adapter=parse_adapters(adapter) or None,
        train=train or None,
        per=columns,
        ordinal=ordinal,
        label_columns=parse_labels(label_columns) if label_columns else None,
        conditions=None if conditions is None else [kind.strip() for kind in conditions.split(",")],
        extractor=extractor,
        codec=codec,
        num_images=num_images,
        num_inference_steps=steps,
        guidance_scale=weights,
        guidance_interval=guidance_interval,
        seed=seed,
        out=out,
        cache_dir=cache,
        cnn=judge,
        allow_overlap=allow_overlap,
        progress=sys.stderr.isatty(),
    )
    typer.echo(f"report.json, report.md and grid.png are in {out}")
