r"""A picture of what goes wrong: the images of an evaluation that a classifier of real images doubts most.

python scripts/embedded_default/failures.py outputs/report/images model_cards/images/failures.jpg \
    --train "DIR/train-*.parquet" --extractor timm:tf_efficientnet_lite0@FILE --cache cache/features

Top half: the lowest probability of the modality that was asked for. Bottom half: of the finding within its modality,
two for each modality. All images are synthetic.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from medisyn.console import one_line_errors
from medisyn.data.loading import load_images
from medisyn.evaluation.agreement import fit_classifier
from medisyn.evaluation.features import extract_features, load_extractor
from medisyn.generation.grid import draw_grid

SHOWN = 18


def failures(
    images: Annotated[str, typer.Argument(help="Folder `images` of an evaluation with --per modality,finding.")],
    picture: Annotated[Path, typer.Argument(help="PNG or JPEG to write.")],
    train: Annotated[str, typer.Option(help="Real training images.")],
    extractor: Annotated[str, typer.Option(help="As in medisyn evaluate.")],
    cache: Annotated[Path | None, typer.Option(help="Features of an evaluation.")] = None,
) -> None:
    """Draw the grid; under each image what was asked for and what it was taken for."""
    synthetic, real = (load_images(source, caption_column=None) for source in (images, train))
    network = load_extractor(extractor, resolution=min(synthetic.image(0).size))
    drawn, known = (extract_features(network, each, cache) for each in (synthetic, real))
    asked = {column: np.array(synthetic.column(column)) for column in ("modality", "finding")}
    truth = {column: np.array(real.column(column)) for column in asked}
    judge = fit_classifier(known, list(truth["modality"]))
    taken = judge.predict(drawn)
    doubts = judge.predict_proba(drawn)[np.arange(len(drawn)), np.searchsorted(judge.classes_, asked["modality"])]
    cells = []
    for row in np.argsort(doubts, kind="stable")[:SHOWN]:
        cells.append((f"{asked['modality'][row]} -> {taken[row]}", synthetic.image(int(row))))
    for name in judge.classes_:
        rows, learnt = np.flatnonzero(asked["modality"] == name), truth["modality"] == name
        if len(set(truth["finding"][learnt])) < 2 or not len(rows):
            continue
        expert = fit_classifier(known[learnt], list(truth["finding"][learnt]))
        places = np.searchsorted(expert.classes_, asked["finding"][rows])
        doubts = expert.predict_proba(drawn[rows])[np.arange(len(rows)), places]
        for place in np.argsort(doubts, kind="stable")[:2]:
            row = int(rows[place])
            found = expert.predict(drawn[row : row + 1])[0]
            cells.append((f"{name}: {asked['finding'][row]} -> {found}", synthetic.image(row)))
    cells = [(f"{number}. {caption}", image) for number, (caption, image) in enumerate(cells, 1)]  # none is grouped
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(cells, len(cells), "asked for -> taken for; all synthetic").convert("RGB").save(picture, quality=92)


if __name__ == "__main__":
    with one_line_errors():
        typer.run(failures)
