"""A report as a table, as files, and as a grid that puts real images beside synthetic ones.

print(format_table(json.loads(Path("outputs/evaluation/report.json").read_text())))
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..data.loading import ImageDataset
from ..generation.grid import draw_grid
from ..generation.provenance import atomic_file

IMAGES_SHOWN = 4  # of each kind for every value
WITHOUT_COLUMN = 16  # of each kind where no column tells the images apart
SCORES = ("precision", "recall", "density", "coverage")


def format_table(report: Mapping) -> str:
    """The report as Markdown that reads well as plain text, with real against real beside every value."""
    subject, extractor = report["subject"], report["extractor"]
    adapters = " and ".join(f"{name} (weight {weight:g})" for name, weight in subject.get("adapters", {}).items())
    images = ", ".join(f"{count} {name}" for name, count in report["images"].items())
    parts = [
        f"# Evaluation of {subject.get('model') or subject['images']}" + (f" with {adapters}" if adapters else ""),
        f"{images} images at {extractor['resolution']} px. Features: `{extractor['spec']}` ({extractor['features']} "
        f"numbers, weights sha256 {extractor['weights_sha256'][:12]})."
        + (f" The extractor saw all images through {codec}." if (codec := extractor.get("codec")) else ""),
        "## Fidelity",
        "Synthetic (in brackets: real against real). KID is given × 1000 with its standard error.",
        _fidelity_text(report["fidelity"]),
        "## Label agreement",
        _agreement_text(report["agreement"]),
        *_ordinal_text(report["agreement"]),
        *_judge_text(report.get("judge")),
        "## Nearest training image",
        _nearest_text(report["nearest_training_image"]),
        "## Notes",
        "\n".join(f"- {note}" for note in report["notes"]),
    ]
    return "\n\n".join(parts) + "\n"


def _fidelity_text(fidelity: Mapping) -> str:
    rows, omitted = [], []
    by_name = {"all": fidelity["overall"]}
    for column, values in fidelity.items():
        if column != "overall":
            by_name |= {value: result for value, result in values.items()}
    for name, result in by_name.items():
        if "omitted" in result:
            omitted.append(name)
            continue
        frechet, kernel = result["frechet_distance"], result["kernel_distance"]
        kid = [f"{1000 * kernel[k]:.2f} ± {1000 * kernel[f'{k}_standard_error']:.2f}" for k in ("synthetic", "real")]
        rows.append(
            [name, str(result["images"]), f"{frechet['synthetic']:.1f} ({frechet['real']:.1f})"]
            + [f"{frechet['ratio']:.2f}", f"{kid[0]} ({kid[1]})"]
            + [f"{result[score]['synthetic']:.2f} ({result[score]['real']:.2f})" for score in SCORES]
        )
    table = [markdown_table(["images of", "N", "Fréchet distance", "ratio", "KID", *SCORES], rows)] if rows else []
    if omitted:
        table.append(f"Too few images (counts are in report.json): {', '.join(omitted)}.")
    return "\n\n".join(table)


def _agreement_text(agreement: Mapping) -> str:
    if "omitted" in agreement:
        return f"Omitted: {agreement['omitted']}."
    rows = []
    for column, result in agreement.items():
        if "omitted" in result:
            rows.append([column, f"omitted: {result['omitted']}"])
            continue
        for name in ("real", "synthetic"):
            scores = result.get(name)
            if scores is None or "omitted" in scores:
                rows.append([column, name, "omitted: " + ("no such column" if scores is None else scores["omitted"])])
                continue
            rows.append([column, name, *_agreement_cells(scores), f"{result['chance']:.2f}"])
            for value, part in scores.get("by_outer_value", {}).items():
                rows.append([f"{column} in {value}", name, *_agreement_cells(part)])
    # Real beside synthetic also for the rows of each outer value.
    first = {name: index for index, name in reversed([(index, row[0]) for index, row in enumerate(rows)])}
    rows.sort(key=lambda row: first[row[0]])
    return markdown_table(["column", "images", "N", "accuracy [95 %]", "balanced accuracy [95 %]", "chance"], rows)


def _ordinal_text(agreement: Mapping) -> list[str]:
    """The section of grades, if a column has any."""
    rows = []
    for column, result in agreement.items() if "omitted" not in agreement else ():
        real, synthetic = (result.get(name, {}).get("ordinal", {}) for name in ("real", "synthetic"))
        for value in {**real, **synthetic}:
            for name, scores in (("real", real.get(value)), ("synthetic", synthetic.get(value))):
                row = [column if value == "all" else f"{column} in {value}", name]
                if scores is None or "omitted" in scores:
                    rows.append([*row, "omitted: " + ("no such column" if scores is None else scores["omitted"])])
                    continue
                low, high = scores["quadratic_weighted_kappa_interval"]
                kappa = f"{scores['quadratic_weighted_kappa']:.3f} [{low:.3f}, {high:.3f}]"
                rows.append([*row, str(scores["images"]), kappa, " < ".join(scores["grades"])])
    if not rows:
        return []
    header = ["column", "images", "N", "kappa [95 %]", "grades"]
    return [
        "## Agreement of grades",
        "Quadratic-weighted kappa of the classifier's grade with that of the image or the request: 1 is the same, 0 "
        "is chance.",
        markdown_table(header, rows),
    ]


def _judge_text(found: Mapping | None) -> list[str]:
    """The section of a network that learnt from the training images, if there was one."""
    if found is None:
        return []
    heading = "## Fidelity and agreement by a network of the domain"
    if "omitted" in found:
        return [heading, f"Omitted: {found['omitted']}."]
    agreement = [_agreement_text(found["agreement"]), *_ordinal_text(found["agreement"])]
    return [heading, describe_judge(found["classifier"]), _fidelity_text(found["fidelity"]), *agreement]


def describe_judge(classifier: Mapping) -> str:
    """How a judge was trained, as a sentence."""
    return (
        f"{classifier['model']} at {classifier['resolution']} px, trained from random weights on the training images' "
        f"{classifier['classes']} innermost classes, {classifier['steps']} steps of {classifier['batch_size']} images."
    )


def _agreement_cells(scores: Mapping) -> list[str]:
    cells = [str(scores["images"])]
    for name in ("accuracy", "balanced_accuracy"):
        low_high = scores.get(f"{name}_interval")
        cells.append(f"{scores[name]:.3f}" + (f" [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else ""))
    return cells


def _nearest_text(nearest: Mapping) -> str:
    if "omitted" in nearest:
        return f"Omitted: {nearest['omitted']}."
    rows = [
        [name, str(nearest["images"]), f"{nearest[name]['percentile_1']:.4f}", f"{nearest[name]['median']:.4f}"]
        for name in ("synthetic", "real")
    ]
    return markdown_table(["images", "N", "cosine distance, 1st percentile", "median"], rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table with aligned columns; short rows are filled up."""
    cells = [list(row) + [""] * (len(header) - len(row)) for row in [header, *rows]]
    # A sentence in place of numbers must not widen its column for all.
    widths = [max(len(row[i]) for row in cells if len(row[i]) <= 40) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def comparison_grid(
    real: ImageDataset, synthetic: ImageDataset, values: Mapping[str, Sequence[str | None]], seed: int = 0
) -> Image.Image:
    """One row per value: real images left, synthetic ones right, chosen by `seed` alone.

    Args:
        real: Real images.
        synthetic: Synthetic images; the first one's size is that of every cell.
        values: "real" and "synthetic" to one value per image, such as its modality; empty mixes all images.
        seed: Of the choice.
    """
    rng = np.random.default_rng(seed)
    size = synthetic.image(0).size
    cells = []
    for value in sorted({*values["real"], *values["synthetic"]} - {None}) if values else [None]:
        for name, images in (("real", real), ("synthetic", synthetic)):
            rows = [row for row in range(len(images)) if not values or values[name][row] == value]
            chosen = rng.permutation(rows)[: IMAGES_SHOWN if values else WITHOUT_COLUMN]
            caption = f"{value}: real, then synthetic" if values else name
            cells += [
                (caption, ImageOps.fit(images.image(int(row)), size, Image.Resampling.BICUBIC)) for row in chosen
            ]
    return draw_grid(cells, len(cells), "Synthetic images are made by a model and are not for diagnosis.")


def write_report(report: Mapping, out: Path, grid: Image.Image) -> None:
    """Write `report.json`, `report.md` and `grid.png`, each whole or not at all."""
    for name, text in (("report.json", json.dumps(report, indent=2) + "\n"), ("report.md", format_table(report))):
        with atomic_file(out / name) as partial:
            partial.write_text(text, encoding="utf-8")
    with atomic_file(out / "grid.png") as partial:
        grid.save(partial, format="PNG")
