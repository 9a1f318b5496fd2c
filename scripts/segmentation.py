r"""Zero-shot segmentation against masks: one structure, the model's features beside pixels and an encoder's features.

- `--timesteps` or several `--model` scan on the first `--development` images only and take the best; the report is
  about all images, and about those after the first `--development`. What a model was trained on is left out.

    python scripts/segmentation.py "DIR/cxr_lungs/validation-*.parquet" lungs outputs/lungs
    python scripts/segmentation.py "DIR/cxr_lungs/validation-*.parquet" lungs outputs/scan \
        --model runs/mine/checkpoints/step_00001000 --model runs/mine/pipeline --timesteps 100,300,500
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from medisyn.console import one_line_errors
from medisyn.data.loading import ImageDataset
from medisyn.evaluation.features import load_extractor
from medisyn.evaluation.inputs import without_overlap
from medisyn.evaluation.segmentation import MaskedImages, evaluate_segmentation, open_masks, scan
from medisyn.segmentation import Settings
from medisyn.segmentation.checkpoints import open_model
from medisyn.segmentation.probing import image_tensor
from medisyn.segmentation.rules import get_rule


def main(
    masks: Annotated[str, typer.Argument(help="Table with the columns image and mask.")],
    rule: Annotated[str, typer.Argument(help="lungs, polyp.")],
    out: Path,
    model: Annotated[
        list[str] | None, typer.Option(help="Folder, Hub name or checkpoint; the embedded default. May be repeated.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="By default that of the rule.")] = None,
    method: str = Settings.method,
    timesteps: str = str(Settings.timestep),
    layers: Annotated[str, typer.Option(help="Joined by commas; by default the last decoder block but one.")] = "",
    segments: int = Settings.segments,
    references: Annotated[int | None, typer.Option(help="By default those of the rule.")] = None,
    draws: int = Settings.draws,
    seed: int = Settings.seed,
    extractor: Annotated[str | None, typer.Option(help="Encoder of the baseline: timm:MODEL@FILE.")] = None,
    development: Annotated[int, typer.Option(min=0, help="First images, on which a scan chooses.")] = 20,
) -> None:
    """Write report.json and overlays.png (every third image: the mask in green, the rule in red)."""
    times, models, names = parse_times(timesteps), list(model or [None]), [name or None for name in layers.split(",")]
    scans = len(times) * len(models) * len(names) > 1
    if scans and not development:
        raise ValueError("several timesteps, layers or models need --development 1 or more: images to choose them on")
    settings = Settings(method, prompt or get_rule(rule).prompt, times[0], segments=segments)
    references = get_rule(rule).references if references is None else references
    settings = replace(settings, references=references, draws=draws, seed=seed, layer=names[0])
    pipe = open_model(models[0])
    data = open_masks(masks, image_tensor(pipe, [Image.new("RGB", (8, 8))]).shape[-1])
    seen = {name: without_overlap(pipe if name == models[0] else _open(name), data.dataset) for name in models}
    data = strangers(data, [kept for kept, _ in seen.values()])
    rows: list[dict] = []
    if scans:
        first = MaskedImages(data.images[:development], data.masks[:development], data.dataset)
        rows = scan(models, first, settings, rule, times, _open, names)
        settings = replace(settings, timestep=rows[0]["timestep"], layer=rows[0]["layer"])
        pipe = open_model(rows[0]["model"])
    pipe = _quiet(pipe)
    encoder = None if extractor is None else load_extractor(extractor)
    report, ruled = evaluate_segmentation(pipe, data, settings, rule, encoder, development)
    used = rows[0]["model"] if rows else models[0]
    report |= {
        "data": masks,
        "seen_in_training": seen[used][1],
        "encoder": extractor or "the model's own",
        "scan": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _overlays(image_tensor(pipe, data.images)[::3], data.masks[::3], ruled["model"][::3]).save(out / "overlays.png")
    for row in rows:
        print(
            f"scan {row['model'] or 'default'} t={row['timestep']} {row['layer']}: "
            f"Dice {row['rule']['dice']['mean']:.3f}, best match {row['best_match']['dice']['mean']:.3f}"
        )
    for part in ("all", "held_out"):
        for name, scores in report.get(part, {}).items():
            values = [
                f"{measure} {one[measure]['mean']:.3f} [{one[measure]['interval'][0]:.3f}, "
                f"{one[measure]['interval'][1]:.3f}]"
                for one in (scores["rule"], scores["best_match"])
                for measure in ("dice", "iou")
            ]
            print(f"{part} {name}: rule {values[0]}, {values[1]}; best match {values[2]}, {values[3]}")


def parse_times(text: str) -> list[int]:
    """`"100,300"` as timesteps. Raises ValueError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"--timesteps must be whole numbers of at least 0 joined by commas, not {text!r}")
    return list(dict.fromkeys(map(int, parts)))


def strangers(data: MaskedImages, kept: Sequence[ImageDataset]) -> MaskedImages:
    """The images that are, by content, in every one of `kept`: those that none of the models has seen."""
    known = set.intersection(*(set(images.hashes()) for images in kept))
    rows = [row for row, content in enumerate(data.dataset.hashes()) if content in known]
    if not rows:
        raise ValueError("none of the images is a stranger to all models")
    return MaskedImages([data.images[row] for row in rows], data.masks[rows], data.dataset.select(rows))


def _open(name):
    return _quiet(open_model(name))


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _overlays(pixels, masks, found, columns: int = 8) -> Image.Image:
    size = pixels.shape[-1]
    sheet = Image.new("RGB", (columns * size, -(-len(pixels) // columns) * size))
    for index, (image, mask, one) in enumerate(zip(pixels, masks, found, strict=True)):
        shown = (image + 1) * 0.375
        shown[1][mask] += 0.25
        shown[0][one] += 0.25
        array = (shown.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(array), (index % columns * size, index // columns * size))
    return sheet


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
