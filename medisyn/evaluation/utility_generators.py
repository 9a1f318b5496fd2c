"""Whether a generator has learnt from labels: then a gain is not one of the labels of a fold alone.

- A model that is conditioned on text or labels was trained on captions or labels; a learned prior on classes.
- What cannot be told on this machine, such as a Hub name that was not loaded, stays unknown.

    learnt_labels("default")        # True: it takes text and labels
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..hub import split_revision
from ..loading import DEFAULT

PIPELINE, ADAPTER, PRIOR = "model_index.json", "adapter.json", "prior.json"  # what says of what kind a folder is


def learnt_labels(name: str) -> bool | None:
    """Whether a generator was trained with text or labels; None: not known.

    Args:
        name: A model, adapter or prior: folder, run, Hub name, or "default".
    """
    found = [_has_labels(file.name, _read(file)) for file in _manifests(name)]
    return next((each for each in found if each is not None), None)


def _manifests(name: str) -> list[Path]:
    folder = Path(str(resources.files("medisyn"))) / "pretrained" if name == DEFAULT else Path(name).expanduser()
    if folder.exists():
        places = (folder, folder / "pipeline", folder / "adapter")
        return [place / file for place in places for file in (PIPELINE, ADAPTER, PRIOR) if (place / file).is_file()]
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, revision = split_revision(name)
    try:
        cached = [try_to_load_from_cache(repository, file, revision=revision) for file in (PIPELINE, ADAPTER)]
    except HFValidationError:
        return []
    return [Path(file) for file in cached if isinstance(file, str)]


def _read(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _has_labels(kind: str, manifest: Mapping[str, Any]) -> bool | None:
    if not manifest:
        return None
    if kind == PRIOR:
        return True
    if "conditions" in manifest:  # "text+image" of a pipeline, ["text", "image"] of an adapter
        given = manifest["conditions"] or ()
        return bool({"text", "labels"}.intersection(given.split("+") if isinstance(given, str) else given))
    if kind == ADAPTER:
        return None
    # a pipeline of diffusers: components are [library, class], of which both are null where there is none
    encoders = (value for part, value in manifest.items() if part.startswith("text_encoder"))
    return "id2label" in manifest or any(isinstance(value, list) and None not in value for value in encoders)
