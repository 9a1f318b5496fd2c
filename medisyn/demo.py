"""What the web demo does, without its page: controls from a label schema, values to requests, images.

- Images come from `medisyn.generation`, so those of the demo and of the command line are the same and say the same.
- A model is shown with one adapter at a time. Each is loaded once at the start: a wrong one is an error then, and its
  own labels and captions are known before it is chosen.
- With and without an adapter is one request with the same seeds; what only the adapter knows is left out without it.
- Nothing here imports Gradio; the page is `medisyn.demo_page`.

    studio = Studio(medisyn.load_pipeline(), "default", {"adapters/knee-osteoarthritis": 1.0}, Path("/tmp/images"))
    studio.generate(Form(prompt="brain MRI slice showing a glioma")).records[0]["seed"]
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .generation.provenance import read_provenance
from .generation.requests import Request, make_requests
from .prompts import demo_prompts

if TYPE_CHECKING:
    from .pipelines.medisyn_pipeline import MediSynPipeline

UNKNOWN = "unknown"
BANNER = "Synthetic images for research. Not for diagnosis."
MOST_IMAGES = 16
BATCH = 8  # images at once
_GROUPS = {"binary": "Findings", "ordinal": "Grades", "categorical": "Properties"}


@dataclass(frozen=True)
class Control:
    """One label as something to click: its field's code, its shown name, and (shown, value) for each choice."""

    code: str
    title: str
    choices: tuple[tuple[str, str], ...]

    @property
    def is_short(self) -> bool:
        """Whether the choices fit beside each other."""
        return len(self.choices) <= 3


@dataclass(frozen=True)
class Group:
    """Controls under one heading; those of an adapter are there only while it is chosen."""

    title: str
    controls: tuple[Control, ...]
    adapter: str | None = None


@dataclass(frozen=True)
class Ability:
    """What can be asked of a model, or of a model with an adapter.

    Attributes:
        kinds: Its conditions, some of "text", "image", "labels".
        schema: Its label schema as plain data.
        examples: (short name, prompt).
        weight: Of the adapter, until the visitor changes it.
        guidance: Likewise; None: the pipeline's own.
    """

    kinds: tuple[str, ...]
    schema: Mapping[str, Any] | None
    examples: tuple[tuple[str, str], ...]
    weight: float = 1.0
    guidance: float | None = None


@dataclass(frozen=True)
class Form:
    """What a visitor has filled in. Empty texts and unknown labels count as not given.

    Attributes:
        prompt: Text condition.
        negative_prompt: What guidance moves away from.
        labels: Field code -> value, of the model and of the chosen adapter.
        like: File of the reference image.
        init_image: File of the image to start from.
        strength: How far to leave it, in (0, 1].
        adapter: Name of the adapter, or None.
        weight: Of the adapter.
        compare: Whether to make the images without the adapter as well.
        seed: Of the first image.
        num_images: 1 to `MOST_IMAGES`.
        steps: Sampling steps.
        guidance: Weight of the conditions.
    """

    prompt: str = ""
    negative_prompt: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    like: Path | None = None
    init_image: Path | None = None
    strength: float | None = None
    adapter: str | None = None
    weight: float = 1.0
    compare: bool = False
    seed: int = 0
    num_images: int = 4
    steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Result:
    """The images of a form.

    Attributes:
        files: PNGs with their provenance.
        records: That provenance, one for each file.
        without: The same without the adapter, where that was asked for.
        notes: What the visitor should know, such as that the prompt is too long.
        seconds: It took.
    """

    files: list[Path]
    records: list[dict[str, Any]]
    without: list[Path]
    notes: list[str]
    seconds: float


# ---- labels ----


def label_groups(schema: Mapping[str, Any] | None, adapter: str | None = None) -> list[Group]:
    """Controls for the fields of a schema, grouped by their type; an adapter's are one group of their own.

    Args:
        schema: As `MediSynPipeline.label_schema`; None gives no groups.
        adapter: Name of the adapter that brings these fields.
    """
    groups: dict[str, list[Control]] = {}
    for code, entry in _fields(schema).items():
        title = f"Labels of {adapter}" if adapter else _GROUPS[entry["type"]]
        if entry["type"] == "binary":
            choices: tuple[tuple[str, str], ...] = (("unknown", UNKNOWN), ("no", "0"), ("yes", "1"))
        else:
            choices = (("unknown", UNKNOWN), *((str(value), str(value)) for value in entry["values"]))
        groups.setdefault(title, []).append(Control(code, entry.get("display") or code, choices))
    order = {title: position for position, title in enumerate(_GROUPS.values())}
    return [
        Group(title, tuple(controls), adapter)
        for title, controls in sorted(groups.items(), key=lambda item: order.get(item[0], 0))
    ]


def chosen_labels(groups: Sequence[Group], values: Sequence[str | None], adapter: str | None) -> dict[str, str]:
    """The known labels of a page: field code -> value.

    Args:
        groups: All groups of the page.
        values: One for each of their controls, in order.
        adapter: The chosen one; what is set for others does not count.
    """
    controls = [(group, control) for group in groups for control in group.controls]
    return {
        control.code: value
        for (group, control), value in zip(controls, values, strict=True)
        if group.adapter in (None, adapter) and value not in (None, UNKNOWN)
    }


def _fields(schema: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return {} if schema is None else schema["fields"]


# ---- images ----


class Studio:
    """A model with its adapters, and the folder for its images.

    Args:
        pipe: The model, without an adapter.
        model: Its name, for the provenance.
        adapters: Folders, files or Hub names of adapters to choose from, and the weight of each.
        folder: Each form's images get a folder in it.

    Attributes:
        abilities: What can be asked, by adapter name; of the bare model under None.
        groups: The label controls of all of them.

    Raises:
        ValueError: An adapter that does not fit the model, or two of one name.
        FileNotFoundError: There is no such adapter.
    """

    def __init__(self, pipe: MediSynPipeline, model: str, adapters: Mapping[str, float], folder: Path) -> None:
        """Load every adapter once."""
        self.pipe = pipe
        self.model = model
        self.folder = folder
        examples = tuple((one.name, one.prompt) for one in demo_prompts()) if "text" in pipe.kinds else ()
        self.abilities: dict[str | None, Ability] = {None: Ability(pipe.kinds, pipe.label_schema, examples)}
        self.groups = label_groups(pipe.label_schema)
        self._sources: dict[str, str] = {}
        self._loaded: str | None = None
        self._count = 0
        self._lock = threading.Lock()  # one pipeline, whoever calls
        for source, weight in adapters.items():
            self._add(source, weight)

    def default(self, name: str) -> Any:
        """The pipeline's own value of an argument, such as `num_inference_steps`."""
        return inspect.signature(type(self.pipe).__call__).parameters[name].default

    def generate(self, form: Form, on_step: Callable[[float], None] = lambda part: None) -> Result:
        """Make the images of a form, in a new folder.

        Args:
            form: What is asked.
            on_step: Is called after each sampling step with the part that is done, up to 1.

        Raises:
            ValueError: What the model cannot fulfil.
            OSError: An image that cannot be read, or a full disk.
            FloatingPointError: Sampling diverged.
        """
        started = time.monotonic()
        with self._lock, _heard_warnings() as notes:
            requests, plain = self._requests(form, form.adapter), []
            if form.compare and form.adapter is not None:
                plain = self._requests(form, None)
                if self.abilities[None].kinds and not _asks_something(plain[0]):
                    notes.append("nothing to compare with: without the adapter, nothing of this is known")
                    plain = []
            self._count += 1
            folder = self.folder / f"{self._count:05d}"
            with self._watched(math.ceil(len(requests) / BATCH) * (2 if plain else 1), on_step):
                files = self._synthesize(form, requests, folder, form.adapter)
                without = self._synthesize(form, plain, folder / "without_adapter", None) if plain else []
        notes = list(dict.fromkeys(notes))
        return Result(files, [read_provenance(file) for file in files], without, notes, time.monotonic() - started)

    @contextmanager
    def _watched(self, batches: int, on_step: Callable[[float], None]) -> Iterator[None]:
        """Report the part that is done after each pass of the UNet, of which a step has one."""
        passes = itertools.count(1)

        def after_pass(*_: Any) -> None:
            on_step(min(1.0, next(passes) / (batches * self.pipe.num_timesteps)))

        hook = self.pipe.unet.register_forward_hook(after_pass)
        try:
            yield
        finally:
            hook.remove()

    def _add(self, source: str, weight: float) -> None:
        from .lora import load_adapter, loaded_adapters, unload_adapters

        name = load_adapter(self.pipe, source)
        manifest = loaded_adapters(self.pipe)[name].manifest or {}
        schema, kinds = self.pipe.label_schema, self.pipe.kinds
        unload_adapters(self.pipe)
        if name in self.abilities:
            raise ValueError(f"two adapters are named {name!r}; give each of them once")
        base = self.abilities[None]
        fields = {code: entry for code, entry in _fields(schema).items() if code not in _fields(base.schema)}
        captions = tuple((caption, caption) for caption in manifest.get("captions", ())) if "text" in kinds else ()
        guidance = 1.0 if manifest.get("built_in_guidance") else None
        self.abilities[name] = Ability(kinds, schema, captions or base.examples, weight, guidance)
        self.groups += label_groups({"fields": fields}, name)
        self._sources[name] = source

    def _use(self, adapter: str | None, weight: float) -> None:
        """Have exactly this adapter on the pipeline."""
        if adapter == self._loaded and adapter is None:
            return
        from .lora import load_adapter, set_adapters, unload_adapters

        if adapter != self._loaded:
            unload_adapters(self.pipe)
            self._loaded = None
        if adapter is not None and self._loaded is None:
            load_adapter(self.pipe, self._sources[adapter], weight=weight)
            self._loaded = adapter
        elif adapter is not None:
            set_adapters(self.pipe, [adapter], [weight])

    def _requests(self, form: Form, adapter: str | None) -> list[Request]:
        """One request for each image, of what the model knows with this adapter."""
        if form.adapter is not None and form.adapter not in self._sources:
            raise ValueError(f"unknown adapter {form.adapter!r}; valid: {', '.join(self._sources) or 'none'}")
        if not 1 <= form.num_images <= MOST_IMAGES:
            raise ValueError(f"the number of images must be in 1..{MOST_IMAGES}, not {form.num_images}")
        labels = {code: value for code, value in form.labels.items() if value != UNKNOWN}
        prompt, negative_prompt, like = form.prompt.strip(), form.negative_prompt.strip(), form.like
        if adapter != form.adapter:
            ability = self.abilities[adapter]
            labels = {code: value for code, value in labels.items() if code in _fields(ability.schema)}
            if "text" not in ability.kinds:
                prompt = negative_prompt = ""
            if "image" not in ability.kinds:
                like = None
        asked = (prompt or None, negative_prompt or None, labels or None, like, form.init_image)
        return make_requests([Request(*asked)], form.num_images, form.seed)

    def _synthesize(self, form: Form, requests: list[Request], folder: Path, adapter: str | None) -> list[Path]:
        from .generation.synthesize import synthesize

        self._use(adapter, form.weight)
        built_in = adapter != form.adapter and self.abilities[form.adapter].guidance is not None  # not in the base
        return synthesize(
            self.pipe,
            requests,
            folder,
            num_inference_steps=form.steps,
            guidance_scale=None if built_in else form.guidance,
            strength=form.strength if form.init_image is not None else None,
            batch_size=BATCH,
            model=self.model,
            adapter=f"{adapter}={form.weight:g}" if adapter else "",
        )


def _asks_something(request: Request) -> bool:
    return any(value is not None for value in (request.prompt, request.labels, request.like))


@contextmanager
def _heard_warnings() -> Iterator[list[str]]:
    """What medisyn warns of in the block, such as a prompt that is longer than the text encoder's window."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(" ".join(record.getMessage().split()))

    listener, logger = Listener(logging.WARNING), logging.getLogger("medisyn")
    logger.addHandler(listener)
    try:
        yield heard
    finally:
        logger.removeHandler(listener)
