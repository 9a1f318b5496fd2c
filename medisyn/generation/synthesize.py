"""Requests to a folder of traceable images: PNGs, `metadata.jsonl` and `grid.png`.

- Image i has its own seed and its own generator: it is the same image in a batch of 1 and of 8.
- Running the same requests again continues where the folder stops (see `output_folder`). Batches keep their members,
  so what is made later has the same bits.
- The folder is an imagefolder for `datasets` and can be trained on as it is: `caption` is the prompt, `labels.x` is
  a label.

    pipe = medisyn.load_pipeline()
    synthesize(pipe, make_requests(["brain MRI slice showing a glioma"], num_images=4), "outputs/glioma")
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..backbone import model_hash
from ..data.preprocessing import Preprocessor
from ..pipelines.medisyn_pipeline import MediSynPipeline, label_field, label_value
from .output_folder import OutputFolder
from .provenance import SOFTWARE, adapter_hash, file_hash
from .requests import Request, make_requests, read_image
from .schedulers import make_scheduler

__all__ = ["Request", "make_requests", "synthesize"]

logger = logging.getLogger(__name__)


def synthesize(
    pipe: MediSynPipeline,
    requests: Sequence[Request],
    out: str | Path,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | Mapping[str, float] | None = None,
    guidance_interval: tuple[float, float] | None = None,
    guidance_rescale: float | None = None,
    strength: float | None = None,
    image_noise_level: float | None = None,
    classifier_guidance_scale: float | None = None,
    classifier_guidance_interval: tuple[float, float] | None = None,
    classifier_guidance_clip: float | None = None,
    size: int | None = None,
    scheduler: str | None = None,
    batch_size: int = 8,
    model: str = "",
    adapter: str = "",
    overwrite: bool = False,
    progress: bool = False,
) -> list[Path]:
    """Make the images that are not in `out` yet.

    Args:
        pipe: The model, with its adapter if there is one.
        requests: One per image; the position is the image's index.
        out: The folder; made when the first image is ready.
        num_inference_steps: Sampling steps; None: the pipeline's default.
        guidance_scale: Weight of the conditions, or one per kind; None: the pipeline's default.
        guidance_interval: Where guidance is on, see `MediSynPipeline`; None: the pipeline's default.
        guidance_rescale: See `MediSynPipeline`; None: off.
        strength: With `init_image`: how far to go back in the noise schedule, in (0, 1]; None: the pipeline's default.
        image_noise_level: Noise on image embeddings, up to what the model was trained with; None: none.
        classifier_guidance_scale: Weight of the classifier's gradient with `class_label`; None: the default.
        classifier_guidance_interval: Where that is on, see `MediSynPipeline`; None: everywhere.
        classifier_guidance_clip: The root mean square that it may move a latent by; None: the pipeline's default.
        size: Side of the images in pixels; None: the model's own.
        scheduler: One of `schedulers.SCHEDULERS`; None: the model's own.
        batch_size: Images per call of the pipeline.
        model: The model's name, for the record.
        adapter: The loaded adapter's name, for the record.
        overwrite: Replace images that other requests left under this run's indices.
        progress: Show a progress bar on stderr when that is a terminal.

    Returns:
        The image files, one per request.

    Raises:
        ValueError: A request that this model cannot fulfil.
        FloatingPointError: Sampling diverged; nothing is written of that batch.
        FileExistsError: `out` holds images of another request.
        OSError: A file cannot be read or written.
    """
    out = Path(out)
    requests = [_checked(pipe, request) for request in requests]
    if not requests or batch_size < 1:
        raise ValueError(f"synthesize needs requests and a batch_size of at least 1, not {batch_size}")
    settings: dict[str, Any] = {"num_inference_steps": num_inference_steps}
    settings |= {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval}
    settings = {name: _default(pipe, name) if value is None else value for name, value in settings.items()}
    _check_settings(pipe, settings)
    _check_image_noise(pipe, image_noise_level)
    own_scheduler = pipe.scheduler
    sampler = own_scheduler if scheduler is None else make_scheduler(scheduler, own_scheduler.config)
    shared = {
        **settings,
        "scheduler": type(sampler).__name__,
        "height": size,
        "width": size,
        "model": model or None,
        "model_hash": model_hash(pipe),
        "adapter": adapter or None,
        "adapter_hash": adapter_hash(pipe),
        "software": SOFTWARE,
        "synthetic": True,
    }
    started = any(_start(request) is not None for request in requests)
    strength = (_default(pipe, "strength") if strength is None else strength) if started else None
    arguments = {**settings, "height": size, "width": size, **({"strength": strength} if started else {})}
    options: dict[str, Any] = {"guidance_rescale": guidance_rescale, "image_noise_level": image_noise_level}
    if any(request.class_label is not None for request in requests):
        name = "classifier_guidance_scale"
        scale = _default(pipe, name) if classifier_guidance_scale is None else classifier_guidance_scale
        shared[name] = arguments[name] = scale
        options |= {"classifier_guidance_interval": classifier_guidance_interval}
        options |= {"classifier_guidance_clip": classifier_guidance_clip}
    # only what is not the pipeline's own is recorded
    options = {name: value for name, value in options.items() if value not in (None, _default(pipe, name))}
    shared |= options
    arguments |= options
    records = [_record(request, shared, strength) for request in requests]
    names = [request.file_name(index) for index, request in enumerate(requests)]
    columns = [{"caption": request.prompt, **request.columns} for request in requests]
    folder = OutputFolder(out, names, records, columns, overwrite)
    _warn_of_prompts(pipe, requests)
    pipe.scheduler = sampler
    try:
        blocks = [
            [block[position] for position in range(start, min(start + batch_size, len(block)))]
            for block in _same_conditions(requests)
            for start in range(0, len(block), batch_size)
        ]
        pending = [block for block in blocks if not folder.done.issuperset(block)]
        with _progress_bar(sum(map(len, pending)), progress) as bar, folder.keeping_metadata():
            for block in pending:
                images = _generate(pipe, [requests[index] for index in block], arguments, bar)
                for index, image in zip(block, images, strict=True):
                    folder.add(index, image)
    finally:
        pipe.scheduler = own_scheduler
    footer = " · ".join(part for part in (model, SOFTWARE, "synthetic, not for diagnosis") if part)
    folder.draw_grid([request.caption() for request in requests], footer)
    return [out / name for name in names]


def _checked(pipe: MediSynPipeline, request: Request) -> Request:
    """The request with its labels in canonical form; refuses what the model has no condition for."""
    kinds = pipe.kinds
    origin = request.origin
    given = {"text": request.prompt, "labels": request.labels, "image": request.like}
    if origin is not None:
        given["image"] = origin.embedding
    for kind, value in given.items():
        if value is not None and kind not in kinds:
            has = f"it has: {', '.join(kinds)}" if kinds else "it is unconditional"
            what = {"text": "a prompt", "labels": "labels", "image": "an image"}[kind]
            raise ValueError(f"{what} cannot be used: this model has no {kind} condition; {has}")
    if request.negative_prompt is not None and "text" not in kinds:
        raise ValueError("a negative prompt cannot be used: this model has no text condition")
    if request.prompt is not None and not request.prompt.strip():
        raise ValueError("the prompt is empty; describe the image")
    started = origin is not None and origin.start is not None  # an image to start from says enough
    if request.class_label is not None:
        if pipe.classifier is None:
            raise ValueError("a class label cannot be used: this model carries no latent classifier")
        (place,) = pipe.classifier.class_indices(request.class_label).tolist()
        request = replace(request, class_label=pipe.classifier.classes[place])
    elif kinds and not started and not any(value is not None for value in given.values()):
        raise ValueError(f"nothing to generate from; this model takes: {', '.join(kinds)}")
    if request.labels is None and request.prompt is not None and (found := pipe.labels_of_prompt(request.prompt)):
        request = replace(request, labels=found[0])
    if request.labels is None:
        return request
    schema = pipe.label_schema
    if schema is None:
        raise ValueError("labels cannot be used: this model carries no label schema")
    labels: dict[str, str] = {}
    for name, value in request.labels.items():
        code = label_field(schema, name)
        if code in labels:
            raise ValueError(f"label field {code!r} is given twice, once as {name!r}")
        canonical = label_value(schema, code, value)
        if canonical is not None:
            labels[code] = canonical
    return replace(request, labels=labels)


def _check_settings(pipe: MediSynPipeline, settings: Mapping[str, Any]) -> None:
    most = pipe.scheduler.config.num_train_timesteps
    if not 1 <= settings["num_inference_steps"] <= most:
        raise ValueError(f"steps must be in 1..{most} for this model, not {settings['num_inference_steps']}")
    if isinstance(settings["guidance_scale"], Mapping):
        for kind in settings["guidance_scale"]:
            if kind not in pipe.kinds:
                valid = ", ".join(pipe.kinds) or "none, use a number"
                raise ValueError(f"guidance names {kind!r}; this model's conditions are: {valid}")


def _check_image_noise(pipe: MediSynPipeline, level: float | None) -> None:
    most = (pipe.config.get("image_noise") or {"level": 0.0})["level"]
    if level is not None and not 0 <= level <= most:
        trained = f"was trained with noise of up to {most} on image embeddings" if most else "was trained without any"
        raise ValueError(f"image noise must be in 0..{most} for this model, which {trained}, not {level}")


def _warn_of_prompts(pipe: MediSynPipeline, requests: Sequence[Request]) -> None:
    """Say once in a run what the model was not trained on, and what it is left to choose."""
    again = True
    for alone, asked in groupby(sorted(requests, key=_is_prompt_alone), key=_is_prompt_alone):
        for line in pipe.prompt_warnings([request.prompt for request in asked], alone, again):
            logger.warning(line)
        again = False


def _is_prompt_alone(request: Request) -> bool:
    guides = (request.labels, request.like, request.origin, request.init_image, request.class_label)
    return all(guide is None for guide in guides)


def _default(pipe: MediSynPipeline, name: str) -> Any:
    return inspect.signature(type(pipe).__call__).parameters[name].default


def _record(request: Request, shared: Mapping[str, Any], strength: float | None) -> dict[str, Any]:
    """What is written about an image; None is left out. Files are named, not located, and told apart by their hash."""
    files = {
        name: None if path is None else f"{path.name} sha256:{file_hash(path)}"
        for name, path in (("like", request.like), ("init_image", request.init_image))
    }
    record = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "labels": None if request.labels is None else dict(request.labels),
        "class_label": request.class_label,
        **files,
        **({} if request.origin is None else request.origin.record()),
        "strength": None if _start(request) is None else strength,
        "seed": request.seed,
        **shared,
    }
    return {name: value for name, value in record.items() if value is not None}


def _same_conditions(requests: Sequence[Request]) -> Iterator[list[int]]:
    """Runs of indices whose requests use the same arguments of the pipeline."""

    def used(index: int) -> tuple[bool, ...]:
        request = requests[index]
        values = (request.prompt, request.negative_prompt, request.labels, request.like, _embedding(request))
        return tuple(value is not None for value in (*values, _start(request), request.class_label))

    for _, indices in groupby(range(len(requests)), key=used):
        yield list(indices)


def _generate(
    pipe: MediSynPipeline, requests: Sequence[Request], arguments: Mapping[str, Any], bar: tqdm
) -> list[Image.Image]:
    inputs: dict[str, Any] = {
        "prompt": [request.prompt for request in requests],
        "negative_prompt": [request.negative_prompt for request in requests],
        "labels": [request.labels for request in requests],
        "class_label": [request.class_label for request in requests],
        "image": [None if request.like is None else read_image(request.like) for request in requests],
        "image_embeds": [_embedding(request) for request in requests],
        "init_image": [None if (start := _start(request)) is None else start() for request in requests],
    }
    inputs = {name: values for name, values in inputs.items() if values[0] is not None}
    if "image_embeds" in inputs:
        inputs["image_embeds"] = torch.stack(inputs["image_embeds"])
    if not inputs:  # an unconditional model
        inputs["num_images_per_prompt"] = len(requests)
    before = bar.n

    def after_step(_: MediSynPipeline, step: int, timestep: Any, tensors: Mapping[str, torch.Tensor]) -> dict:
        if not torch.isfinite(tensors["latents"]).all():
            raise FloatingPointError(
                f"sampling gave values that are not finite at step {step + 1} of {type(pipe.scheduler).__name__}; try "
                "another scheduler, number of steps or guidance"
            )
        bar.update(before + len(requests) * (step + 1) / pipe.num_timesteps - bar.n)
        return {}

    return pipe(
        **inputs,
        **arguments,
        generator=[torch.Generator().manual_seed(request.seed) for request in requests],
        callback_on_step_end=after_step,
        output_type="pil",
    ).images


def _embedding(request: Request) -> torch.Tensor | None:
    """The image condition (T, width) that a strategy gave the request."""
    return None if request.origin is None else request.origin.embedding


def _start(request: Request) -> Callable[[], Image.Image] | None:
    """Reads the image that sampling starts from."""
    if request.origin is not None and request.origin.start is not None:
        images, row = request.origin.start
        return lambda: _centre_square(images.image(row))  # as training sees it; the pipeline would squeeze it
    return None if request.init_image is None else partial(read_image, request.init_image)


def _centre_square(image: Image.Image) -> Image.Image:
    return Preprocessor(min(image.size)).crop_image(image)


def _progress_bar(total: int, shown: bool) -> tqdm:
    layout = "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total} images [{elapsed}<{remaining}]"
    return tqdm(total=total, desc="generate", bar_format=layout, disable=None if shown and total else True)
