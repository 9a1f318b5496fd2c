"""The page of `compare.py`: its tables in Markdown, and a sheet of images.

Path("comparison.md").write_text(page(facts, scores))
draw_sheet({"real": images, "guided student": drawn}, classes, size=128).save("comparison.png")
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medisyn.data.loading import ImageDataset

IMAGES_IN_SHEET = 4  # of each class and model
FONT_SIZE, MARGIN, HEADING = 14, 8, 24  # pixels


def page(facts: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """The Markdown page: one table of everything, one of each class."""
    real, ways, classes = scores["real"], scores["ways"], facts["classes"]
    labelled = "" if facts["labelled_images"] is None else f", {facts['labelled_images']} of them labelled"
    extractor = facts["extractor"]
    lines = [
        "# From unconditional to conditional",
        "",
        f"Classes: {', '.join(classes)}. {facts['real_training_images']} real training images{labelled}; "
        f"{facts['real_validation_images']} real validation images. {facts['images_per_class']} images of each class "
        f"and model, {facts['num_inference_steps']} sampling steps, seeds from {facts['seed']}. Features: "
        f"{extractor['spec']} (sha256 {extractor['sha256'][:12]}) at {extractor['resolution']} px.",
        "",
        "Agreement: mean recall over classes of a classifier fitted on all real training images, with its 95 % "
        f"interval; chance is {scores['chance']:.2f}. Fréchet distance: to real images of the class, mean over "
        "classes. Diversity: mean cosine distance between images of a class. Near copies: cosine similarity above "
        f"{facts['near_copy']} to a labelled image, and to any training image. Time: {facts['clock']} clock; "
        "training is that of the run itself, without the teacher, and without the classifier of a guided student.",
        "",
        "| model | agreement | of real | Fréchet distance | diversity | recall | near copies | s per image | "
        "training, minutes |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| real images | {_with_interval(real)} | 1 | {_number(mean(real['frechet_distance'].values()), 1)} | "
        f"{real['diversity']:.3f} | {_number(real['recall'])} | | | |",
    ]
    for name, way in ways.items():
        copies = [way.get(f"near_copies_of_{kind}") for kind in ("labelled", "training")]
        lines.append(
            f"| {name} | {_with_interval(way)} | {way['agreement'] / real['agreement']:.2f} | "
            f"{_number(mean(way['frechet_distance'].values()), 1)} | {way['diversity']:.3f} | "
            f"{_number(way['recall'])} | {' / '.join(f'{share:.1%}' for share in copies if share is not None)} | "
            f"{way['seconds_per_image']:.3f} | {_number(way['training_minutes'], 1)} |"
        )
    lines += ["", "Agreement and Fréchet distance of each class:", "", f"| model | {' | '.join(classes)} |"]
    lines.append("|---" * (1 + len(classes)) + "|")
    for name, way in {"real images": real, **ways}.items():
        cells = [
            f"{_number(way['agreement_per_class'].get(value))}, {_number(way['frechet_distance'].get(value), 1)}"
            for value in classes
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += _by_cnn(scores["judge"]) if "judge" in scores else []
    lines += ["", "![Real images and those of each model](comparison.png)", ""]
    return "\n".join(lines)


def _by_cnn(scores: Mapping[str, Any]) -> list[str]:
    """The table of the second judge."""
    cnn, real = scores["classifier"], scores["real"]
    head = f"By {cnn['model']}, {cnn['steps']} steps on all real training images at {cnn['resolution']} px:"
    lines = [
        "",
        head,
        "",
        "| model | agreement | of real | Fréchet distance | diversity | recall |",
        "|---|---|---|---|---|---|",
    ]
    for name, way in {"real images": real, **scores["ways"]}.items():
        share, distance = way["agreement"] / real["agreement"], mean(way["frechet_distance"].values())
        cells = [_with_interval(way), f"{share:.2f}", _number(distance, 1), f"{way['diversity']:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {_number(way['recall'])} |")
    return lines


def _with_interval(scores: Mapping[str, Any]) -> str:
    low, high = scores["agreement_interval"]
    return f"{scores['agreement']:.2f} ({low:.2f} to {high:.2f})"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None of nothing."""
    found = list(values)
    return float(np.mean(found)) if found else None


def draw_sheet(sets: Mapping[str, tuple[ImageDataset, str]], classes: Sequence[str], size: int) -> Image.Image:
    """The first images of every class, classes side by side, a row for each set.

    Args:
        sets: name to images and the column of their class.
        classes: in order.
        size: of one image, pixels.
    """
    font, block = ImageFont.load_default(FONT_SIZE), IMAGES_IN_SHEET * size + MARGIN
    height = HEADING + len(sets) * (size + HEADING)
    sheet = Image.new("RGB", (MARGIN + len(classes) * block, height), "white")
    pen = ImageDraw.Draw(sheet)
    for place, value in enumerate(classes):
        pen.text((MARGIN + place * block, MARGIN // 2), value, fill="black", font=font)
    for row, (name, (images, column)) in enumerate(sets.items()):
        top = HEADING + row * (size + HEADING)
        pen.text((MARGIN, top + MARGIN // 2), name, fill="dimgray", font=font)
        values = images.column(column)
        for place, value in enumerate(classes):
            members = [number for number, other in enumerate(values) if str(other) == value]
            for step, number in enumerate(members[:IMAGES_IN_SHEET]):
                image = images.image(number).resize((size, size), Image.Resampling.BICUBIC)
                sheet.paste(image, (MARGIN + place * block + step * size, top + HEADING))
    return sheet
