r"""The small labelled set by itself: the same images that `label_fraction` and `label_seed` of a task choose.

For what is trained on labelled images alone. Writes `train.parquet`, and `labels.json`, the schema of its one field.

    python scripts/unconditional_to_conditional/labelled_subset.py 'data/corpus/train-*.parquet' runs/labelled \
        --where dataset=lc25000_lung --label-fraction 0.05
"""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from medisyn.config import DataConfig
from medisyn.console import one_line_errors
from medisyn.data.loading import ImageDataset
from medisyn.data.sources import open_source
from medisyn.data.subsets import class_names, stratified_subset


def labelled_subset(
    source: str,
    folder: Path,
    where: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Keep these rows; may be repeated.")
    ] = None,
    class_column: str = "finding",
    group_column: Annotated[str | None, typer.Option(help="Patient; none is split.")] = "group_id",
    label_fraction: Annotated[float, typer.Option(min=0, max=1)] = 0.05,
    label_seed: int = 0,
) -> None:
    """Write the labelled share of SOURCE into FOLDER."""
    table = open_source(source, "train", "image")
    options = {"caption_column": None, "group_column": group_column, "filter": parse_where(where or [])}
    images = ImageDataset(table, DataConfig(source=source, **options))
    classes = images.column(class_column)
    rows = stratified_subset(
        classes, images.column(group_column) if group_column else None, label_fraction, label_seed
    )
    few = [str(classes[row]) for row in rows]
    names = class_names(few)
    folder.mkdir(parents=True, exist_ok=True)
    table.select(images.rows[rows]).to_parquet(folder / "train.parquet")
    field = class_column.rpartition(".")[2]
    schema = {"name": field, "fields": {field: {"type": "categorical", "values": list(names)}}}
    (folder / "labels.json").write_text(json.dumps(schema, indent=2) + "\n", encoding="utf-8")
    counts = ", ".join(f"{name} {count}" for name, count in sorted(Counter(few).items()))
    print(f"{len(rows)} of {len(images)} images: {counts}")


def parse_where(where: list[str]) -> dict[str, tuple[str, ...]]:
    """`["dataset=a", "dataset=b"]` as the filter `{"dataset": ("a", "b")}`. Raises BadParameter for anything else."""
    found: dict[str, tuple[str, ...]] = {}
    for text in where:
        column, equals, value = text.partition("=")
        if not (equals and column and value):
            raise typer.BadParameter(f"--where {text!r} is not of the form COLUMN=VALUE")
        found[column] = (*found.get(column, ()), value)
    return found


if __name__ == "__main__":
    with one_line_errors():
        typer.run(labelled_subset)
