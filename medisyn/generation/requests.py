"""What is asked for: one request per image, each with its own seed.

- `num_images` of each prompt; the seed goes up by one from image to image.
- A prompts file is text, one prompt per line, or `.jsonl`, one object per line with `prompt` and/or `labels`; its
  other keys (`modality`, `finding`, ...) become columns of the metadata.
- No torch is imported here, so that a command can refuse a request at once.

    requests = make_requests(["brain MRI slice showing a glioma"], num_images=4, seed=7)
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.loading import ImageDataset

LARGEST_SEED = 2**63 - 1
# Keys of the metadata that a prompts file cannot set.
RESERVED = frozenset(
    ("file_name", "caption", "like", "init_image", "strength", "seed", "num_inference_steps", "guidance_scale")
    + ("scheduler", "height", "width", "model", "model_hash", "adapter", "adapter_hash", "software", "synthetic")
    + ("strategy", "label_rule", "parents", "parent_weights", "parent_labels", "image_noise_level")
    + ("guidance_interval", "guidance_rescale")
    + ("classifier_guidance_scale", "classifier_guidance_interval", "classifier_guidance_clip")
)


@dataclass(frozen=True)
class Origin:
    """Where an image comes from on the embedding manifold; made by `strategies.like_requests`.

    Attributes:
        strategy: Name and options, such as "mixture:neighbours=5,concentration=1".
        label_rule: How the label follows from those of the parents.
        parents: Hashes of the real images that it was made of, as in `training_images.json`.
        weights: Share of each parent; they sum to 1.
        labels: Label of each parent.
        title: In place of a prompt in the grid and the file's name.
        embedding: The image condition (T, width); None: there is none.
        start: The dataset and the item that sampling starts from; None: it starts from noise.
    """

    strategy: str
    label_rule: str
    parents: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    labels: tuple[str | None, ...] = ()
    title: str = ""
    embedding: "Tensor | None" = field(default=None, compare=False, repr=False)
    start: "tuple[ImageDataset, int] | None" = field(default=None, compare=False, repr=False)

    def record(self) -> dict[str, Any]:
        """What is written about it."""
        record: dict[str, Any] = {"strategy": self.strategy, "label_rule": self.label_rule}
        if self.parents:
            record |= {"parents": list(self.parents), "parent_weights": list(self.weights)}
        if any(label is not None for label in self.labels):
            record["parent_labels"] = list(self.labels)
        return record


@dataclass(frozen=True)
class Request:
    """One image to make.

    Attributes:
        prompt: Text condition; None: none.
        negative_prompt: Takes the place of the empty prompt in guidance.
        labels: Label condition, field -> value.
        like: File of an image whose embedding is the image condition.
        init_image: File of an image to start from.
        seed: Of this image's noise.
        title: Short name for the grid.
        columns: Further columns of the metadata, such as the modality.
        origin: Real images that it is made of, in place of `like` (and, with a `start`, of `init_image`).
        class_label: Class of the model's latent classifier that guides it.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    labels: Mapping[str, Any] | None = None
    like: Path | None = None
    init_image: Path | None = None
    seed: int = 0
    title: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = None
    class_label: str | None = None

    def caption(self) -> str:
        """What the grid prints beside the image."""
        labels = ", ".join(f"{name}={value}" for name, value in (self.labels or {}).items())
        like = None if self.like is None else f"like {self.like.name}"
        like = like if self.origin is None else self.origin.title
        asked = "; ".join(part for part in (self.class_label, self.prompt, labels, like) if part)
        return ": ".join(part for part in (self.title, asked) if part) or "unconditional"

    def slug(self) -> str:
        """The caption as part of a file name: `brain_mri_slice_showing_a_glioma`."""
        return re.sub(r"[^a-z0-9]+", "_", self.caption().lower()).strip("_")[:48].rstrip("_") or "image"

    def file_name(self, index: int) -> str:
        """`00007_brain_mri_slice_showing_a_glioma.png`."""
        return f"{index:05d}_{self.slug()}.png"


def make_requests(
    prompts: Sequence[str] | Sequence[Request], num_images: int = 1, seed: int = 0, **conditions: Any
) -> list[Request]:
    """`num_images` requests for each prompt, with the seeds `seed`, `seed + 1`, ... in order of the result.

    Args:
        prompts: Prompts, or requests whose seed does not matter yet.
        num_images: Images of each.
        seed: Of the first image.
        conditions: Fields of `Request` that all share.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, not {num_images}")
    templates = [prompt if isinstance(prompt, Request) else Request(prompt=prompt) for prompt in prompts]
    if not 0 <= seed <= LARGEST_SEED - len(templates) * num_images:
        raise ValueError(f"seed must be in 0..{LARGEST_SEED} (with room for one per image), not {seed}")
    each = [template for template in templates for _ in range(num_images)]
    return [replace(template, seed=seed + index, **conditions) for index, template in enumerate(each)]


def read_prompts(path: str | Path) -> list[Request]:
    """The requests of a prompts file, see above.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is empty, not UTF-8, or a line is not what it should be; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompts file {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a UTF-8 text file") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path} has no prompts")
    if path.suffix != ".jsonl":
        return [Request(prompt=line) for _, line in numbered]
    return [_parse(line, f"{path} line {number}") for number, line in numbered]


def read_image(path: Path) -> Image.Image:
    """An image file as upright 8-bit RGB. Raises FileNotFoundError or ValueError naming the path."""
    if not path.is_file():
        raise FileNotFoundError(f"no image file {path}")
    try:
        with Image.open(path) as image:
            image.load()
            from ..data.preprocessing import to_rgb

            return to_rgb(image)
    except Exception as error:  # noqa: BLE001 - Pillow's plugins raise nearly anything on damaged files
        raise ValueError(f"{path} cannot be read as an image: {' '.join(str(error).split())}") from None


def _parse(line: str, where: str) -> Request:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is not an object with prompt or labels")
    reserved = sorted(RESERVED & entry.keys())
    if reserved:
        raise ValueError(
            f"{where} has {reserved[0]!r}, which is written by the run; valid: prompt, labels, class_label, "
            "your columns"
        )
    known = {key: entry.pop(key, None) for key in ("prompt", "negative_prompt", "labels", "class_label")}
    known = {key: value for key, value in known.items() if value is not None}
    for key, value in known.items():
        if not isinstance(value, dict if key == "labels" else str):
            raise ValueError(f"{where}: {key} must be {'an object' if key == 'labels' else 'text'}, not {value!r}")
    if not known.get("prompt", "x").strip():
        raise ValueError(f"{where}: the prompt is empty")
    if not known.keys() & {"prompt", "labels", "class_label"}:
        raise ValueError(f"{where} has neither prompt nor labels")
    return Request(**known, columns=entry)
