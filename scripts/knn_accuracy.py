r"""k-NN accuracy of an encoder over a column, beside other features reduced to the same dimension.

python scripts/knn_accuracy.py runs/embedded_default/dino/encoder --training "DIR/train-*.parquet" \
    --validation "DIR/validation-*.parquet" --reference timm:tf_efficientnet_lite0@DIR/efficientnet_lite0.pth
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from sklearn.decomposition import PCA

from medisyn.console import one_line_errors
from medisyn.data.loading import ImageDataset, load_images
from medisyn.evaluation.agreement import LabelledFeatures
from medisyn.evaluation.features import extract_features, load_extractor
from medisyn.evaluation.nearest_neighbours import knn_accuracy


def main(
    encoder: Annotated[str, typer.Argument(help="Folder or Hub name of a vision transformer.")],
    training: Annotated[str, typer.Option(help="Images among which neighbours are sought.")],
    validation: Annotated[str, typer.Option(help="Images that are classified.")],
    reference: Annotated[list[str] | None, typer.Option(help="Feature extractor to compare with; repeatable.")] = None,
    column: Annotated[str, typer.Option(help="Classes.")] = "finding",
    group_column: Annotated[str | None, typer.Option(help="Patient, for the confidence interval.")] = "group_id",
    neighbours: Annotated[int, typer.Option(min=1)] = 20,
    bank_images: Annotated[int, typer.Option(help="Training images, evenly spread; 0: all.", min=0)] = 0,
    cache_dir: Annotated[Path, typer.Option(help="Features; an interrupted run goes on.")] = Path("runs/features"),
) -> None:
    """Print accuracy and balanced accuracy with their intervals, one JSON line for each encoder."""
    bank = load_images(training, caption_column=None)
    if 0 < bank_images < len(bank):
        bank = bank.select(np.linspace(0, len(bank) - 1, bank_images).astype(int))
    evaluated = load_images(validation, caption_column=None, group_column=group_column)
    width = None
    for spec in [f"dinov2:{encoder}", *(reference or [])]:
        extractor = load_extractor(spec)
        known, asked = (extract_features(extractor, images, cache_dir) for images in (bank, evaluated))
        width = width or known.shape[1]
        if known.shape[1] > width:  # axes of the training images; centred, as cosine similarity wants it
            axes = PCA(width, random_state=0).fit(known)
            known, asked = axes.transform(known), axes.transform(asked)
        groups = evaluated.column(group_column) if group_column else None
        scores = knn_accuracy(labelled(bank, known, column), labelled(evaluated, asked, column, groups), neighbours)
        kept = ("images", "accuracy", "accuracy_interval", "balanced_accuracy", "balanced_accuracy_interval")
        print(
            json.dumps({"features": spec, "width": width, "bank": len(bank)} | {name: scores[name] for name in kept})
        )


def labelled(images: ImageDataset, features: np.ndarray, column: str, groups: list | None = None) -> LabelledFeatures:
    classes = [None if value is None else str(value) for value in images.column(column)]
    return LabelledFeatures(features, classes, groups=groups)


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
