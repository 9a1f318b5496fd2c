"""`medisyn generate`: images from prompts, labels, a reference image, or several of them.

- Arguments are checked before a model is loaded, and nothing is written before everything is known to be right.

    medisyn generate "brain MRI slice showing a glioma" --num-images 4 --out outputs/glioma
"""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .arguments import (
    AdapterOption,
    DeviceOption,
    GuidanceIntervalOption,
    GuidanceOption,
    ModelOption,
    SeedOption,
    StepsOption,
    check_interval,
    check_names,
    load_model,
    model_name,
    parse_adapters,
    parse_guidance,
)
from .manifold import (
    CacheOption,
    ImageNoiseOption,
    LabelColumnOption,
    LikeDataOption,
    LikeOption,
    PriorOption,
    StrategyOption,
    find_manifold,
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(generate)


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="What the images show.")] = None,
    labels: Annotated[
        list[str] | None, typer.Option(metavar="LABELS", help='"glaucoma=1, dr_grade=3"; may be repeated.')
    ] = None,
    class_label: Annotated[
        list[str] | None, typer.Option(metavar="CLASS", help="Class of the model's classifier; may be repeated.")
    ] = None,
    classifier_guidance: Annotated[float | None, typer.Option(help="Weight of the classifier's gradient.")] = None,
    classifier_guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(metavar="LOW HIGH", help="Where that is on, in 0..1.")
    ] = None,
    classifier_guidance_clip: Annotated[
        float | None, typer.Option(help="Root mean square that it may move a latent by (1); a large number: any.")
    ] = None,
    like: LikeOption = None,
    strategy: StrategyOption = None,
    like_data: LikeDataOption = None,
    label_column: LabelColumnOption = None,
    prior: PriorOption = None,
    cache: CacheOption = None,
    image_noise: ImageNoiseOption = None,
    init_image: Annotated[str | None, typer.Option(metavar="IMAGE", help="Image to start from.")] = None,
    strength: Annotated[float | None, typer.Option(help="How far to leave --init-image, above 0, at most 1.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance moves away from.")] = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    num_images: Annotated[int, typer.Option(min=1, max=100_000, help="Images for each prompt.")] = 1,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    guidance_interval: GuidanceIntervalOption = None,
    guidance_rescale: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Against the contrast of high guidance; 0 is off.")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="Sampler: dpm, ddim, euler, ...; the model's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Images made at once.")] = 8,
    size: Annotated[int | None, typer.Option(min=8, max=8192, help="Side in pixels; the model's own.")] = None,
    seed: SeedOption = 0,
    demo: Annotated[bool, typer.Option("--demo", help="One prompt for each modality.")] = False,
    prompts_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="One prompt a line, or .jsonl with prompt, labels, ...")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace images of other requests.")] = False,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Output folder; outputs/NAME-OF-REQUEST.")] = None,
    device: DeviceOption = None,
) -> None:
    """Make images: PNGs with their provenance, metadata.jsonl and grid.png.

    The same command again continues where it was stopped, and makes the same images bit for bit.
    """
    asked = {name: value for name, value in locals().items() if name not in ("out", "overwrite", "device", "cache")}
    from ..generation.output_folder import check_writable
    from ..generation.requests import Request, make_requests, read_image
    from ..generation.schedulers import check_scheduler

    check_names(model=model, out=out, device=device, init_image=init_image)
    check_names(negative_prompt=negative_prompt, prompts_file=prompts_file, scheduler=scheduler)
    weights, adapters = None if guidance is None else parse_guidance(guidance), parse_adapters(adapter)
    if scheduler is not None:
        check_scheduler(scheduler)
    if size is not None and size % 8:
        raise ValueError(f"--size must be a multiple of 8, not {size}")
    if strength is not None and init_image is None and not (strategy or "").startswith("sdedit"):
        raise ValueError("--strength needs --init-image or --strategy sdedit")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"--strength must be above 0 and at most 1, not {strength}")
    for name in ("classifier_guidance", "classifier_guidance_interval", "classifier_guidance_clip"):
        if asked[name] is not None and not class_label and prompts_file is None:
            raise ValueError(f"--{name.replace('_', '-')} needs --class-label")
    if classifier_guidance_clip is not None and not 0 < classifier_guidance_clip < math.inf:
        raise ValueError(f"--classifier-guidance-clip must be a number above 0, not {classifier_guidance_clip}")
    check_interval("--guidance-interval", guidance_interval)
    check_interval("--classifier-guidance-interval", classifier_guidance_interval)
    templates = _templates(prompts or [], labels or [], demo, prompts_file)
    if class_label:
        templates = [replace(one, class_label=name) for one in templates or [Request()] for name in class_label]
    manifold = find_manifold(like, strategy, like_data, label_column, prior, cache, strength, init_image)
    if not templates and manifold is None and model is None:
        raise ValueError(
            "nothing to generate from: give a PROMPT, --labels, --class-label, --like, --prompts-file or --demo"
        )
    shared: dict[str, Any] = {"negative_prompt": negative_prompt} if negative_prompt else {}
    if init_image is not None:
        shared["init_image"] = Path(init_image)
        read_image(shared["init_image"])
    requests = make_requests(templates or [Request()], num_images, seed, **shared)
    slug = requests[0].slug() if manifold is None else manifold.strategy.name
    name = _folder_name("demo" if demo else slug, asked, len(templates))
    folder = Path("outputs") / name if out is None else Path(out)
    check_writable(folder)

    from ..generation.synthesize import synthesize

    pipe = load_model(model, adapters, device)
    if manifold is not None:
        strength = manifold.strategy.arguments().get("strength", strength)
        templates = [replace(template, **shared) for template in templates or [Request()]]
        requests = manifold.requests(pipe, templates, num_images, seed)
    files = synthesize(
        pipe,
        requests,
        folder,
        num_inference_steps=steps,
        guidance_scale=weights,
        guidance_interval=guidance_interval,
        guidance_rescale=guidance_rescale,
        strength=strength,
        image_noise_level=image_noise,
        classifier_guidance_scale=classifier_guidance,
        classifier_guidance_interval=classifier_guidance_interval,
        classifier_guidance_clip=classifier_guidance_clip,
        size=size,
        scheduler=scheduler,
        batch_size=batch_size,
        model=model_name(model),
        adapter=", ".join(f"{model_name(name)}={weight:g}" for name, weight in adapters.items()),
        overwrite=overwrite,
        progress=True,
    )
    typer.echo(f"{len(files)} image{'s' * (len(files) != 1)}, metadata.jsonl and grid.png are in {folder}")


def _templates(prompts: list[str], labels: list[str], demo: bool, prompts_file: str | None) -> list:
    """The requests without seeds: every prompt with every set of labels."""
    from ..generation.requests import Request, read_prompts

    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("the prompt is empty; describe the image")
    if demo and (prompts or labels or prompts_file):
        raise ValueError("--demo has prompts of its own: leave out PROMPT, --labels and --prompts-file")
    if demo:
        from ..prompts import demo_prompts

        return [Request(prompt=one.prompt, title=one.name) for one in demo_prompts()]
    templates = [Request(prompt=prompt) for prompt in prompts]
    if prompts_file is not None:
        templates += read_prompts(prompts_file)
    if not labels:
        return templates
    if any(template.labels is not None for template in templates):
        raise ValueError("labels are in the prompts file already: leave out --labels")
    from ..pipelines.medisyn_pipeline import parse_labels

    parsed = [parse_labels(text) for text in labels]
    return [Request(**{**vars(template), "labels": one}) for template in templates or [Request()] for one in parsed]


def _folder_name(slug: str, asked: dict[str, Any], prompts: int) -> str:
    """A folder for each request; more images of a single prompt, which keep their numbers, go to the same one."""
    identity = asked | {"batch_size": None, "num_images": asked["num_images"] if prompts > 1 else None}
    identity = {name: value for name, value in identity.items() if value}
    return f"{slug}-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:6]}"
