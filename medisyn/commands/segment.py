"""`medisyn segment`: masks and overlays of real images, by a model that has never seen a mask.

- `--rule` names the structure among the segments, `--word` asks where a word of the prompt acts, neither leaves the
  segments unnamed. What speaks against the masks is a warning, and in segmentation.json.
- Files have the size of the image; what the model's square does not reach is outside of every mask.

    medisyn segment chest.png --rule lungs --out outputs/lungs
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import AdapterOption, DeviceOption, ModelOption, check_names, load_model, model_name, parse_adapters

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

logger = logging.getLogger(__name__)

NO_SEGMENT = 255  # in a file of segments: outside of the square that the model saw


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(segment)


def segment(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Output folder.")],
    rule: Annotated[str | None, typer.Option(help="What the segments are to name: lungs, polyp.")] = None,
    word: Annotated[
        str | None, typer.Option(help="A word of the prompt: where it acts; for models with fine attention.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What the images show; by default a caption that fits the rule or the word.")
    ] = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    method: Annotated[str, typer.Option(help="features; diffseg, for models with fine attention.")] = "features",
    timestep: Annotated[int | None, typer.Option(min=0, help="Whose noise is added to the images.")] = None,
    layer: Annotated[str | None, typer.Option(help="Whose features are clustered: up_blocks.1.")] = None,
    segments: Annotated[int | None, typer.Option(min=2, max=254, help="How many clusters of features.")] = None,
    references: Annotated[
        int | None,
        typer.Option(min=0, help="Images drawn to fit clusters on; 0: on IMAGE... together. By default the rule's."),
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Divergence below which diffseg merges.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of noise, drawn images and clusters.")] = 0,
    device: DeviceOption = None,
) -> None:
    """Segment images without masks: PNG files of segments, mask and overlay, and segmentation.json."""
    from ..generation.output_folder import check_writable
    from ..generation.requests import read_image

    check_names(model=model, out=out, device=device, rule=rule, word=word, prompt=prompt, layer=layer)
    if rule is not None and word is not None:
        raise ValueError("--rule and --word make one mask each: give one of them")
    names = _file_names(images)
    pictures = [read_image(Path(path)) for path in images]
    adapters = parse_adapters(adapter)
    check_writable(out)

    from ..segmentation import Segmenter, Settings
    from ..segmentation.rules import get_rule
    from ..segmentation.words import SHARE_OF_MAXIMUM

    if rule is not None and references is None:
        references = get_rule(rule).references
    options: dict[str, Any] = {"timestep": timestep, "segments": segments, "references": references}
    options |= {"threshold": threshold, "layer": layer}
    options = {name: value for name, value in options.items() if value is not None}
    Settings(method=method, seed=seed, **options)  # a wrong option is told before a model is loaded
    pipe = load_model(model, adapters, device)
    if prompt is None and "text" in pipe.kinds:
        prompt = _default_prompt(rule, word)
    settings = Settings(method=method, prompt=prompt, seed=seed, **options)
    segmenter = Segmenter(pipe, settings)
    used = settings.used(word is not None)
    used |= {"layer": segmenter.layer} if "layer" in used else {}
    facts: dict[str, Any] = {"model": model_name(model), "settings": used}
    if word is not None:
        numbers, masks = None, segmenter.word_masks(pictures, word)
        facts |= {"word": word, "share_of_maximum": SHARE_OF_MAXIMUM}
    else:
        numbers = segmenter.segments(pictures)
        masks = None if rule is None else segmenter.name(numbers, segmenter.pixels(pictures), rule)
        facts |= {} if rule is None else {"rule": rule}
    facts |= {} if segmenter.grid is None else {"attention_grid": list(segmenter.grid)}
    facts["warnings"] = segmenter.doubts(len(pictures), rule, masks)
    for doubt in facts["warnings"]:
        logger.warning("%s", doubt)

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (name, picture) in enumerate(zip(names, pictures, strict=True)):
        row: dict[str, Any] = {"image": Path(images[index]).name}
        if numbers is not None:
            row["segments"] = f"{name}_segments.png"
            _to_picture(numbers[index], picture, NO_SEGMENT).save(folder / row["segments"])
        if masks is not None:
            row |= {"mask": f"{name}_mask.png", "share": round(float(masks[index].float().mean()), 4)}
            _to_picture(masks[index].int() * 255, picture, 0).save(folder / row["mask"])
        row["overlay"] = f"{name}_overlay.png"
        _overlay(picture, numbers[index] if masks is None else masks[index].long()).save(folder / row["overlay"])
        rows.append(row)
    text = json.dumps(facts | {"images": rows}, indent=2, ensure_ascii=False)
    (folder / "segmentation.json").write_text(text + "\n", encoding="utf-8")
    typer.echo(f"{len(rows)} image{'s' * (len(rows) != 1)}; masks, overlays and segmentation.json are in {out}")


def _file_names(paths: list[str]) -> list[str]:
    """The files' names without extension; numbered where several are the same."""
    stems = [Path(path).stem for path in paths]
    return [stem if stems.count(stem) == 1 else f"{index:03d}_{stem}" for index, stem in enumerate(stems)]


def _default_prompt(rule: str | None, word: str | None) -> str | None:
    """A caption of the vocabulary that fits; None where nothing is asked for.

    Raises:
        ValueError: No caption has the word.
    """
    from ..prompts import all_captions
    from ..segmentation.rules import get_rule

    if word is None:
        return None if rule is None else get_rule(rule).prompt
    import re

    fitting = [one for one in all_captions() if re.search(rf"\b{re.escape(word)}\b", one, re.IGNORECASE)]
    if not fitting:
        raise ValueError(f"no caption of the vocabulary has the word {word!r}: give a --prompt that has it")
    return fitting[0]


def _to_picture(values: "Tensor", picture: "Image.Image", outside: int) -> "Image.Image":
    """Values of the model's square at their place in the picture, 8-bit grey."""
    from PIL import Image

    side = min(picture.size)
    square = Image.fromarray(values.numpy().astype("uint8")).resize((side, side), Image.Resampling.NEAREST)
    whole = Image.new("L", picture.size, outside)
    whole.paste(square, ((picture.width - side) // 2, (picture.height - side) // 2))
    return whole


def _overlay(picture: "Image.Image", numbers: "Tensor") -> "Image.Image":
    """The picture with segments in colours; of a mask (0 and 1), the structure in red."""
    import colorsys

    count = int(numbers.max()) + 1
    colours: list[tuple[int, ...] | None] = [None, (230, 30, 60)]
    if count > 2:
        colours = [tuple(int(255 * part) for part in colorsys.hsv_to_rgb(i / count, 0.9, 1)) for i in range(count)]
    labels, result = _to_picture(numbers, picture, NO_SEGMENT), picture.copy()
    for number, colour in enumerate(colours[:count]):
        if colour is not None:
            cover = labels.point([120 if value == number else 0 for value in range(256)])
            result.paste(colour, mask=cover)
    return result
