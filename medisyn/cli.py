"""The `medisyn` command: parse, check, build, call.

- Every failure that the user can mend is one line on stderr and exit code 2; `MEDISYN_DEBUG=1` shows the traceback.
- Arguments are checked before a model is loaded, and nothing is written before everything is known to be right.
- torch is imported inside the commands, so that `medisyn --help` and a typing error answer at once.

    medisyn generate "brain MRI slice showing a glioma" --num-images 4 --out outputs/glioma
"""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .console import EXPECTED, OneLineErrors, one_line, quiet_progress_bars

if TYPE_CHECKING:
    from .pipelines.medisyn_pipeline import MediSynPipeline

KINDS = ("text", "image", "labels")
DEFAULT = "default"  # names the embedded model where a name is needed
LARGEST_GUIDANCE = 100.0

app = typer.Typer(
    name="medisyn",
    cls=OneLineErrors,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="medisyn")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"medisyn {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Synthetic medical images by conditioned latent diffusion. Not for diagnosis."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


ModelOption = Annotated[str | None, typer.Option(help="Folder or Hub name; without it, the embedded default.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; without it, the best there is.")]
StepsOption = Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps (20).")]
GuidanceOption = Annotated[
    str | None, typer.Option(help='Weight of the conditions: a number, or one per kind, "text=3,labels=2".')
]
SeedOption = Annotated[int, typer.Option(min=0, help="Image i is made with the seed SEED + i.")]


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="What the images show.")] = None,
    labels: Annotated[
        list[str] | None, typer.Option(metavar="LABELS", help='"glaucoma=1, dr_grade=3"; may be repeated.')
    ] = None,
    like: Annotated[str | None, typer.Option(metavar="IMAGE", help="Image whose embedding conditions.")] = None,
    init_image: Annotated[str | None, typer.Option(metavar="IMAGE", help="Image to start from.")] = None,
    strength: Annotated[float | None, typer.Option(help="How far to leave --init-image, above 0, at most 1.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance moves away from.")] = None,
    model: ModelOption = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA to load on top: folder, file or Hub name.")] = None,
    num_images: Annotated[int, typer.Option(min=1, max=100_000, help="Images for each prompt.")] = 1,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
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
    asked = {name: value for name, value in locals().items() if name not in ("out", "overwrite", "device")}
    from .generation.output_folder import check_writable
    from .generation.requests import Request, make_requests, read_image
    from .generation.schedulers import check_scheduler

    _check_names(model=model, adapter=adapter, out=out, device=device, like=like, init_image=init_image)
    _check_names(negative_prompt=negative_prompt, prompts_file=prompts_file, scheduler=scheduler)
    weights = None if guidance is None else parse_guidance(guidance)
    if scheduler is not None:
        check_scheduler(scheduler)
    if size is not None and size % 8:
        raise ValueError(f"--size must be a multiple of 8, not {size}")
    if strength is not None and init_image is None:
        raise ValueError("--strength needs --init-image")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"--strength must be above 0 and at most 1, not {strength}")
    templates = _templates(prompts or [], labels or [], demo, prompts_file)
    if not any((templates, like)) and model is None:
        raise ValueError("nothing to generate from: give a PROMPT, --labels, --like, --prompts-file or --demo")
    shared: dict[str, Any] = {"negative_prompt": negative_prompt} if negative_prompt else {}
    for name, path in (("like", like), ("init_image", init_image)):
        if path is not None:
            shared[name] = Path(path)
            read_image(shared[name])
    requests = make_requests(templates or [Request()], num_images, seed, **shared)
    name = _folder_name("demo" if demo else requests[0].slug(), asked, len(templates))
    folder = Path("outputs") / name if out is None else Path(out)
    check_writable(folder)

    from .generation.synthesize import synthesize

    pipe = load_model(model, adapter, device)
    files = synthesize(
        pipe,
        requests,
        folder,
        num_inference_steps=steps,
        guidance_scale=weights,
        strength=strength,
        size=size,
        scheduler=scheduler,
        batch_size=batch_size,
        model=model_name(model),
        adapter=model_name(adapter) if adapter else "",
        overwrite=overwrite,
        progress=True,
    )
    typer.echo(f"{len(files)} image{'s' * (len(files) != 1)}, metadata.jsonl and grid.png are in {folder}")


@app.command()
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Configuration file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="train.steps=10")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train; the same command again resumes the run."""
    from .config import config_to_dict, load_config

    resolved = load_config(config, overrides)
    if dry_run:
        import yaml

        typer.echo(yaml.safe_dump(config_to_dict(resolved), sort_keys=False), nl=False)
        return
    from .generation.output_folder import check_writable

    check_writable(resolved.output_dir)
    from .trainer import Trainer

    quiet_progress_bars()
    typer.echo(f"finished: {Trainer(resolved).fit()}")


@app.command()
def evaluate(
    model_or_folder: Annotated[
        str, typer.Argument(metavar="MODEL_OR_FOLDER", help='A model ("default": the embedded one) or images.')
    ],
    real: Annotated[str, typer.Option(metavar="DATA", help="Real images that the model has not seen.")],
    train: Annotated[str | None, typer.Option(metavar="DATA", help="Real training images.")] = None,
    per: Annotated[str | None, typer.Option(metavar="COLUMNS", help="Columns to report on: modality,finding.")] = None,
    extractor: Annotated[
        str, typer.Option(metavar="SPEC", help="inception, timm:NAME@FILE, Hub name, ...")
    ] = "inception",
    num_images: Annotated[int, typer.Option(min=2, max=100_000, help="Images to generate.")] = 600,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: SeedOption = 0,
    cache: Annotated[str | None, typer.Option(metavar="DIR", help="Keeps features for the next evaluation.")] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Go on although the model has seen real images.")
    ] = False,
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Folder of report.json, report.md, grid.png.")
    ] = "outputs/evaluation",
) -> None:
    """Measure synthetic images against real ones."""
    from .generation.output_folder import check_writable

    weights = None if guidance is None else parse_guidance(guidance)
    columns = None if per is None else [column.strip() for column in per.split(",")]
    if columns is not None and not all(columns):
        raise ValueError(f"--per must be column names joined by commas, not {per!r}")
    _check_names(model_or_folder=model_or_folder, real=real, train=train, extractor=extractor, cache=cache, out=out)
    for folder in filter(None, (out, cache)):
        check_writable(folder)
    from .evaluation.report import evaluate as measure

    quiet_progress_bars()
    measure(
        None if model_or_folder == DEFAULT else model_or_folder,
        real,
        train=train,
        per=columns,
        extractor=extractor,
        num_images=num_images,
        num_inference_steps=steps,
        guidance_scale=weights,
        seed=seed,
        out=out,
        cache_dir=cache,
        allow_overlap=allow_overlap,
        progress=sys.stderr.isatty(),
    )
    typer.echo(f"report.json, report.md and grid.png are in {out}")


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub name; without it, the embedded default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model's components, conditions, training data, licence and hash."""
    _check_names(model=model)
    from .info import describe, format_description

    facts = describe(load_model(model, device="cpu"), model_name(model))
    typer.echo(json.dumps(facts, indent=2) if as_json else format_description(facts))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, number formats and extras, and what will not work and why."""
    from .doctor import examine, format_findings

    findings = examine()
    typer.echo(json.dumps(findings, indent=2) if as_json else format_findings(findings))


# ---- arguments ------------------------------------------------------------------------------------------------------


def parse_guidance(text: str) -> float | dict[str, float]:
    """`"3"` as 3.0, `"text=3,labels=2"` as a dictionary. Raises ValueError naming what is wrong."""

    def number(part: str) -> float:
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not 0 <= value <= LARGEST_GUIDANCE:
            raise ValueError(
                f'--guidance must be a number in 0..{LARGEST_GUIDANCE:.0f} or "text=3,labels=2", not {text!r}'
            )
        return value

    if "=" not in text:
        return number(text)
    weights: dict[str, float] = {}
    for item in text.split(","):
        kind, _, value = (part.strip() for part in item.partition("="))
        if kind not in KINDS or kind in weights:
            raise ValueError(f"--guidance {text!r}: {kind!r} is not one of {', '.join(KINDS)}, once each")
        weights[kind] = number(value)
    return weights


def _templates(prompts: list[str], labels: list[str], demo: bool, prompts_file: str | None) -> list:
    """The requests without seeds: every prompt with every set of labels."""
    from .generation.requests import Request, read_prompts

    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("the prompt is empty; describe the image")
    if demo and (prompts or labels or prompts_file):
        raise ValueError("--demo has prompts of its own: leave out PROMPT, --labels and --prompts-file")
    if demo:
        from .prompts import demo_prompts

        return [Request(prompt=one.prompt, title=one.name) for one in demo_prompts()]
    templates = [Request(prompt=prompt) for prompt in prompts]
    if prompts_file is not None:
        templates += read_prompts(prompts_file)
    if not labels:
        return templates
    if any(template.labels is not None for template in templates):
        raise ValueError("labels are in the prompts file already: leave out --labels")
    from .pipelines.medisyn_pipeline import parse_labels

    parsed = [parse_labels(text) for text in labels]
    return [Request(**{**vars(template), "labels": one}) for template in templates or [Request()] for one in parsed]


def _folder_name(slug: str, asked: dict[str, Any], prompts: int) -> str:
    """A folder for each request; more images of a single prompt, which keep their numbers, go to the same one."""
    identity = asked | {"batch_size": None, "num_images": asked["num_images"] if prompts > 1 else None}
    identity = {name: value for name, value in identity.items() if value}
    return f"{slug}-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:6]}"


def _check_names(**names: str | None) -> None:
    for name, value in names.items():
        if value is not None and not value.strip():
            raise ValueError(f"--{name.replace('_', '-')} is empty")


# ---- models ---------------------------------------------------------------------------------------------------------


def load_model(model: str | None, adapter: str | None = None, device: str | None = None) -> "MediSynPipeline":
    """The pipeline on its device, without progress bars of its own.

    Raises:
        ValueError, OSError, ImportError: Whatever is wrong with it.
    """
    from .doctor import best_device, check_device

    device = best_device() if device is None else check_device(device)
    from .backbone import load_pipeline

    quiet_progress_bars()
    try:
        pipe = load_pipeline(None if model == DEFAULT else model, adapter)
    except Exception as error:  # noqa: BLE001 - damaged files raise errors of every library in between
        if isinstance(error, EXPECTED) and model_name(adapter or model) in str(error):
            raise
        raise ValueError(f"{model_name(adapter or model)!r} cannot be loaded: {one_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def model_name(model: str | None) -> str:
    """A name to write into images: a Hub name, or a folder without the path to it."""
    if model in (None, DEFAULT):
        return "medisyn embedded default"
    if not Path(model).exists():
        return model
    folder = Path(model).resolve()
    return folder.parent.name if folder.name == "pipeline" else folder.name  # of a run
