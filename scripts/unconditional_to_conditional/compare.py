r"""One page that compares the ways from an unconditional model to a conditional one: `comparison.md`, .json and .png.

- Guidance at sampling time by the teacher's classifier, at several scales, beside models that take the class as a
  label: the guided student, plain fine-tuning (all weights, LoRA), a model from scratch.
- The judge is a classifier on features of an independent network, fitted on all real training images, most of which
  no model had the label of. Agreement on real validation images is the ceiling.
- `--cnn resnet10t` adds a second judge, a small CNN that has learnt the classes from all real training images: the
  features of a network of photographs see texture first (`medisyn.evaluation.judge`).
- Fréchet distances are those of each class to all its real training images, beside one half of those against the
  other. Diversity is the mean cosine distance between two images of a class. Near copies are images whose cosine
  similarity to a labelled training image is above 0.95.
- Seconds per image are those of a batch, the fastest of several, with adapters fused into the weights, as a run's own
  `pipeline/` has them; `--clock cpu` counts this process alone, on a machine that others use. Images that are there
  already are not drawn again.
- RUN+RUN puts several adapters onto the teacher: a student, and a decoder tuned for class consistency.

    python scripts/unconditional_to_conditional/compare.py runs/comparison --classifier runs/classifier \
        --scale 1 --scale 3 --scale 6 --model "guided student=runs/guided" --model "full=runs/finetune_full" \
        --model "LoRA=runs/finetune_lora" --model "LoRA, guidance 2=runs/finetune_lora@2" \
        --model "student, tuned decoder=runs/guided+runs/unconditional-decoder" \
        --model "from scratch=runs/from_scratch" --teacher runs/unconditional_lung \
        --train 'data/corpus/train-*.parquet' --validation 'data/corpus/validation-*.parquet' \
        --labelled runs/labelled/train.parquet --where dataset=lc25000_lung \
        --extractor timm:tf_efficientnet_lite0@efficientnet_lite0.pth
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from comparison_measures import NEAR_COPY, measure, measure_by_cnn
from comparison_page import draw_sheet, page
from labelled_subset import parse_where
from tqdm import tqdm

from medisyn import load_pipeline
from medisyn.backbone import model_hash
from medisyn.commands.utility import (
    JUDGE_RESOLUTION,
    JUDGE_STEPS,
    JudgeOption,
    JudgeResolutionOption,
    JudgeStepsOption,
    make_judge,
)
from medisyn.config import DataConfig, load_config
from medisyn.console import one_line_errors
from medisyn.data.loading import ImageDataset, load_images
from medisyn.evaluation import extract_features, load_extractor
from medisyn.generation.output_folder import OutputFolder
from medisyn.generation.provenance import adapter_hash
from medisyn.lora import fuse_adapters
from medisyn.pipelines.medisyn_pipeline import MediSynPipeline
from medisyn.prompts import choose

TIMED_BATCHES = 3
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Way:
    """One way to draw an image of a class.

    Attributes:
        name: In the tables.
        run: Run folder, model folder or Hub name; of a run that made an adapter, or several joined by "+", they go
            onto the teacher.
        guidance_scale: Of classifier-free guidance, 1 for none.
        classifier_guidance_scale: Of the pipeline's own classifier; None where the class is a label.
    """

    name: str
    run: str
    guidance_scale: float = 1.0
    classifier_guidance_scale: float | None = None

    def load(self, teacher: str | None) -> MediSynPipeline:
        """The pipeline, on the GPU where there is one."""
        folders = [Path(name) for name in self.run.split("+")]
        alone = (folders[0] / "adapter" / "adapter.json").is_file() and not (folders[0] / "pipeline").is_dir()
        if len(folders) > 1 or alone:
            if teacher is None:
                raise typer.BadParameter(f"{self.run} is an adapter: name the model under it by --teacher")
            pipe = load_pipeline(teacher, adapter=[folder / "adapter" for folder in folders])
        else:
            pipe = load_pipeline(self.run)
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def conditions(self, field: str, names: Sequence[str]) -> dict[str, Any]:
        """The pipeline's arguments that ask for images of these classes."""
        if self.classifier_guidance_scale is not None:
            return {"class_label": list(names)}
        return {"labels": [{field: name} for name in names]}

    def settings(self, steps: int) -> dict[str, Any]:
        """The pipeline's other arguments, the same for all images."""
        settings = {"num_inference_steps": steps, "guidance_scale": self.guidance_scale}
        if self.classifier_guidance_scale is not None:
            settings["classifier_guidance_scale"] = self.classifier_guidance_scale
        return settings


def compare(
    out: Path,
    train: Annotated[str, typer.Option(help="All real training images, for the judge and the distances.")],
    validation: Annotated[str, typer.Option(help="Real images that nothing was trained on, for the ceiling.")],
    extractor: Annotated[str, typer.Option(help="Features, as in medisyn evaluate.")],
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME=RUN[@SCALE]", help="Takes the class as a label; may be repeated.")
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(metavar="RUN", help="A pipeline that carries a classifier.")
    ] = None,
    scale: Annotated[list[float] | None, typer.Option(help="Of its guidance; may be repeated.")] = None,
    teacher: Annotated[str | None, typer.Option(metavar="RUN", help="Under models that are adapters.")] = None,
    labelled: Annotated[str | None, typer.Option(help="The labelled images, for the share of near copies.")] = None,
    where: Annotated[list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Real rows to keep.")] = None,
    class_column: str = "finding",
    group_column: str | None = "group_id",
    images_per_class: Annotated[int, typer.Option(min=2)] = 64,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    seed: int = 0,
    clock: Annotated[str, typer.Option(help=" or ".join(CLOCKS))] = "wall",
    cnn: JudgeOption = None,
    cnn_steps: JudgeStepsOption = JUDGE_STEPS,
    cnn_resolution: JudgeResolutionOption = JUDGE_RESOLUTION,
) -> None:
    """Draw, measure and write the page into OUT."""
    choose("clock", clock, CLOCKS)
    if (classifier is None) == bool(scale):
        raise typer.BadParameter("--classifier and --scale belong together")
    ways = [Way(f"classifier guidance {each:g}", str(classifier), 1.0, each) for each in scale or []]
    ways += [parse_model(text) for text in model or []]
    if not ways:
        raise typer.BadParameter("nothing to compare: give --model, or --classifier with --scale")
    second = make_judge(cnn, cnn_steps, cnn_resolution)
    options = {"caption_column": None, "filter": parse_where(where or [])}
    real = {
        "training": load_images(DataConfig(source=train, **options)),
        "real": load_images(DataConfig(source=validation, **options)),
    }
    classes = sorted({str(name) for name in real["training"].column(class_column) if name not in (None, "")})
    field = class_column.rpartition(".")[2]
    drawn: dict[str, ImageDataset] = {}
    costs: dict[str, dict[str, Any]] = {}
    for way in ways:
        pipe = way.load(teacher)
        folder = out / "images" / re.sub(r"[^a-z0-9]+", "_", way.name.lower()).strip("_")
        drawn[way.name] = draw(pipe, way, classes, field, folder, images_per_class, steps, batch_size, seed)
        costs[way.name] = {
            "seconds_per_image": seconds_per_image(pipe, way, classes[0], field, steps, batch_size, clock),
            "training_minutes": training_minutes(way.run),
        }
        print(f"{way.name}: {costs[way.name]['seconds_per_image']:.3f} s per image", flush=True)

    size = drawn[ways[0].name].image(0).width
    network = load_extractor(extractor, resolution=size)
    sets = real | drawn | ({} if labelled is None else {"labelled": load_images(labelled, caption_column=None)})
    features = {name: extract_features(network, images, out / "features") for name, images in sets.items()}
    scores = measure(sets, features, list(drawn), classes, class_column, group_column)
    if second is not None:
        second = replace(second, resolution=min(second.resolution, size))
        facts_of_judge, by_cnn = measure_by_cnn(second, sets, list(drawn), classes, class_column, group_column, out)
        scores["judge"] = {"classifier": facts_of_judge, **by_cnn}
    for name, cost in costs.items():
        scores["ways"][name] |= cost
    facts = {
        "classes": classes,
        "real_training_images": len(real["training"]),
        "real_validation_images": len(real["real"]),
        "labelled_images": len(sets["labelled"]) if labelled is not None else None,
        "images_per_class": images_per_class,
        "num_inference_steps": steps,
        "seed": seed,
        "clock": clock,
        "near_copy": NEAR_COPY,
        "extractor": {"spec": extractor.partition("@")[0], "sha256": network.weights_sha256, "resolution": size},
    }
    (out / "comparison.json").write_text(json.dumps(facts | scores, indent=2) + "\n", encoding="utf-8")
    (out / "comparison.md").write_text(page(facts, scores), encoding="utf-8")
    sheet = {"real images": (real["training"], class_column)} | {
        name: (images, field) for name, images in drawn.items()
    }
    draw_sheet(sheet, classes, size).save(out / "comparison.png")
    print(f"{out / 'comparison.md'}, .json and .png are written")


def parse_model(text: str) -> Way:
    """`NAME=RUN[@SCALE]`. Raises BadParameter for anything else."""
    name, equals, run = text.partition("=")
    if not (equals and name.strip() and run.strip()):
        raise typer.BadParameter(f"--model {text!r} is not of the form NAME=RUN or NAME=RUN@SCALE")
    place, at, number = run.rpartition("@")
    if not at or Path(run).exists():
        return Way(name.strip(), run.strip())
    try:
        return Way(name.strip(), place.strip(), float(number))
    except ValueError:
        raise typer.BadParameter(f"--model {text!r}: {number!r} is no guidance scale") from None


def draw(
    pipe: MediSynPipeline,
    way: Way,
    classes: Sequence[str],
    field: str,
    folder: Path,
    images_per_class: int,
    steps: int,
    batch_size: int,
    seed: int,
) -> ImageDataset:
    """The images of one way with their provenance, those that `folder` lacks; image i of every way has seed + i."""
    names = [name for name in classes for _ in range(images_per_class)]
    shared = {
        **way.settings(steps),
        "scheduler": type(pipe.scheduler).__name__,
        "model": way.name,
        "model_hash": model_hash(pipe),
        "adapter_hash": adapter_hash(pipe),
    }
    shared = {key: value for key, value in shared.items() if value is not None}
    asked = [{key: values[0] for key, values in way.conditions(field, [name]).items()} for name in names]
    records = [{**condition, "seed": seed + index, **shared} for index, condition in enumerate(asked)]
    files = [f"{index:05d}_{re.sub(r'[^a-z0-9]+', '_', name.lower())}.png" for index, name in enumerate(names)]
    output = OutputFolder(folder, files, records, [{field: name} for name in names])
    with output.keeping_metadata():
        for start in tqdm(range(0, len(names), batch_size), desc=way.name, unit="batch"):
            places = range(start, min(start + batch_size, len(names)))
            if output.done.issuperset(places):
                continue
            conditions = way.conditions(field, [names[place] for place in places])
            generators = [torch.Generator().manual_seed(seed + place) for place in places]
            images = pipe(**conditions, **way.settings(steps), generator=generators).images
            for place, image in zip(places, images, strict=True):
                output.add(place, image)
    return load_images(str(folder), caption_column=None)


def seconds_per_image(
    pipe: MediSynPipeline, way: Way, name: str, field: str, steps: int, batch_size: int, clock: str
) -> float:
    """Time of one image in a batch, decoding included: the fastest of several batches after a first one.

    Adapters on the pipeline are fused into its weights for good: draw before, since images name their adapters.
    """
    fuse_adapters(pipe)
    seconds = []
    for _ in range(1 + TIMED_BATCHES):
        generators = [torch.Generator().manual_seed(number) for number in range(batch_size)]
        start = CLOCKS[clock]()
        pipe(**way.conditions(field, [name] * batch_size), **way.settings(steps), generator=generators)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append((CLOCKS[clock]() - start) / batch_size)
    return min(seconds[1:])


def training_minutes(runs: str) -> float | None:
    """How long the steps of a run took, by its log, or of several joined by "+"; None for a model without one."""
    folders = [Path(name) for name in runs.split("+")]
    if not all((folder / "log.jsonl").is_file() for folder in folders):
        return None
    return sum(map(_minutes, folders))


def _minutes(run: Path) -> float:
    batch_size = load_config(run / "config.yaml").train.batch_size
    seconds, before = 0.0, 0
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "images_per_second" in entry:
            seconds += max(0, entry["step"] - before) * batch_size / entry["images_per_second"]
            before = entry["step"]
    return seconds / 60


if __name__ == "__main__":
    with one_line_errors():
        typer.run(compare)
