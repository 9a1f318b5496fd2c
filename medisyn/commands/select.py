r"""`medisyn select`: a smaller data set from generated images, and a line for each on why it was kept or dropped.

medisyn select outputs/run --real data/labelled --label-column finding \
    --rules confidence:quantile=0.5,duplicates:0.95 --out outputs/selected
"""

import sys
from typing import Annotated

import typer

from ..console import quiet_progress_bars
from .arguments import check_names

# The default of `medisyn.generation.selection`, which imports torch.
RULES = "confidence:quantile=0.5,duplicates:0.95"

JudgeRunOption = Annotated[
    str | None,
    typer.Option(metavar="RUN", help="Run of a classifier with pseudo-labels: its network judges the confidence."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(select)


def select(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Generated images with metadata.jsonl.")],
    real: Annotated[list[str], typer.Option(metavar="DATA", help="Labelled real images; may be repeated.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the selected images.")],
    label_column: Annotated[
        str, typer.Option(metavar="COLUMNS", help='Class of each image: finding, "labels.dr_grade".')
    ] = "finding",
    rules: Annotated[
        str, typer.Option(metavar="RULES", help="Rules joined by commas, or a YAML file; in this order.")
    ] = RULES,
    extractor: Annotated[
        str, typer.Option(metavar="SPEC", help="inception, timm:NAME@FILE, Hub name, ...")
    ] = "inception",
    train: Annotated[
        list[str] | None, typer.Option(metavar="DATA", help="What the generator was trained on; may be repeated.")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(metavar="DATA", help="Other real images, for duplicates:auto; may be repeated.")
    ] = None,
    real_label_column: Annotated[
        str | None, typer.Option(metavar="COLUMNS", help="The class column of --real, where it has another name.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Only such images of --real; may be repeated.")
    ] = None,
    group_column: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Patient column of --real; without it, group_id if there.")
    ] = None,
    judge: JudgeRunOption = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="DIR", help="Also write a random selection of the same size.")
    ] = None,
    link: Annotated[str, typer.Option(help="How images get there: copy, hardlink, symlink.")] = "copy",
    warn_below: Annotated[
        float, typer.Option(min=0, max=1, help="Warn where diversity is below this share of a random selection's.")
    ] = 0.8,
    search: Annotated[str, typer.Option(help="How features are compared: auto, torch, faiss.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the random selection.")] = 0,
    cache: Annotated[str | None, typer.Option(metavar="DIR", help="Keeps features for the next selection.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier selection.")] = False,
) -> None:
    """Select generated images by rules; selection.jsonl says of each why it was kept or dropped.

    Rules: confidence:0.8, confidence:quantile=0.3, confidence:real=0.1, centroid:0.5, duplicates:0.95,
    duplicates:auto, covariance:200, diverse:500, random:500. Counts and shares are of each class. The default keeps
    the surer half of each class; a fixed threshold, such as confidence:0.8, may leave a class empty.
    """
    check_names(folder=folder, out=out, label_column=label_column, extractor=extractor, cache=cache, baseline=baseline)
    check_names(real_label_column=real_label_column, group_column=group_column)
    for name, sources in (("real", real), ("train", train), ("held_out", held_out)):
        for source in sources or ():
            check_names(**{name: source})
    conditions = _conditions(where or [])
    check_names(judge=judge)
    from ..doctor import best_device
    from ..generation.selected_folder import select_folder
    from ..tasks.pseudo_labels import guessing_judge

    quiet_progress_bars()
    selection = select_folder(
        folder,
        real,
        label_column,
        rules,
        out=out,
        train=train or None,
        held_out=held_out or None,
        real_label_column=real_label_column,
        where=conditions,
        extractor=extractor,
        cache_dir=cache,
        group_column=group_column,
        judge=None if judge is None else guessing_judge(judge, (), device=best_device()),
        link=link,
        baseline=baseline,
        seed=seed,
        warn_below=warn_below,
        search=search,
        overwrite=overwrite,
        progress=sys.stderr.isatty(),
    )
    for step in selection.report["steps"]:
        typer.echo(f"{step['rule']}: {step['after']} of {step['before']}")
    for label, number in selection.report["kept"].items():
        typer.echo(f"  {label}: {number} of {selection.report['images'][label]}")
    typer.echo(f"{len(selection.kept)} of {len(selection.records)} images are in {out}; selection.jsonl says why")


def _conditions(given: list[str]) -> dict[str, str]:
    """`["dataset=busi"]` as column -> value."""
    pairs: dict[str, str] = {}
    for text in given:
        column, equals, value = (part.strip() for part in text.partition("="))
        if not (column and equals and value) or column in pairs:
            raise ValueError(f"--where must be COLUMN=VALUE, each column once, not {text!r}")
        pairs[column] = value
    return pairs
