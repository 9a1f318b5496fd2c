"""What a card says about a model or an adapter, found out by loading it: hash, components, code that runs, a sample.

- The numbers of a report count only if it is about these very weights: the hashes are compared.
- Samples are drawn where none are there: fixed prompts and seeds, so that publishing twice gives the same bytes.

    facts, draw = facts_of(find_subject("runs/chest"), "owner/chest", None, Path("outputs/chest"))
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .adapter_folder import (
    DECODER_WEIGHTS,
    LORA_WEIGHTS,
    MANIFEST,
    SAMPLES,
    read_manifest,
    weights_hash,
    write_manifest,
)
from .card_metrics import metrics_of_report
from .cards import CardFacts
from .cleaning import without_paths
from .hub import is_hub_name, split_revision
from .licenses import Source
from .training_record import find_training_record, read_training_record

if TYPE_CHECKING:
    from .pipelines.medisyn_pipeline import MediSynPipeline
    from .publishing import Subject

SAMPLE_IMAGES = 8
EMBEDDED = "medisyn embedded default"


def record_of(subject: "Subject") -> dict[str, Any] | None:
    """The record of training images of what is published."""
    return read_training_record(subject.folder)


def facts_of(
    subject: "Subject", repo_id: str, report: Mapping[str, Any] | None, folder: Path
) -> tuple[CardFacts, Callable[[], str]]:
    """The facts, and what draws `samples.png` into `folder` unless it is there and returns how, in a sentence.

    Drawing can take minutes, so that it is left until nothing speaks against the card.

    Raises:
        ValueError: It cannot be loaded, or the report is about something else.
    """
    if subject.kind == "adapter":
        return _adapter_facts(subject, repo_id, report, folder)
    return _model_facts(subject, repo_id, report, folder)


# ---- models ---------------------------------------------------------------------------------------------------------


def _model_facts(
    subject: "Subject", repo_id: str, report: Mapping[str, Any] | None, folder: Path
) -> tuple[CardFacts, Callable[[], str]]:
    from .backbone import load_pipeline
    from .info import describe

    pipe = load_pipeline(subject.folder)
    pipe.set_progress_bar_config(disable=True)
    known = describe(pipe, repo_id)
    if report is not None and report["subject"].get("adapters"):
        raise ValueError("the report is about this model with an adapter: evaluate it alone, or name another report")
    if report is not None and report["subject"].get("model_hash") != known["hash"]:
        raise ValueError(
            f"the report is about the model {report['subject'].get('model_hash')}, this one is {known['hash']}: "
            "evaluate it again, or name another report"
        )
    height, width = known["resolution"]
    count = sum(part["parameters"] or 0 for part in known["components"].values())
    conditions = " and ".join(known["conditions"]) or "nothing: it is unconditional"
    is_stock = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    call = _call(pipe)
    base = _base_of_run(subject)
    facts = CardFacts(
        repo_id=repo_id,
        kind="model",
        description=f"A latent diffusion model of {count / 1e6:,.1f} million parameters for synthetic medical images "
        f"of {width} × {height} pixels, conditioned on {conditions}.",
        conditions=known["conditions"],
        snippet=f'import medisyn\n\npipe = medisyn.load_pipeline("{repo_id}")\nimage = pipe({call}).images[0]',
        stock_snippet=_stock_model(repo_id, call, is_stock),
        facts=[f"Model hash: `{known['hash']}`", *_schema_lines(known["label_schema"])],
        components={name: part["class"] for name, part in known["components"].items()},
        datasets=without_paths((record_of(subject) or {}).get("datasets", [])),
        base=base,
        base_model=split_revision(base.name)[0] if base is not None and is_hub_name(base.name) else None,
        metrics=metrics_of_report(report) if report is not None else [],
        notes=report["notes"] if report is not None else [],
        hashes=len((record_of(subject) or {}).get("hashes", [])),
    )
    return facts, lambda: _samples(pipe, folder, _model_requests(pipe), repo_id)


def _stock_model(repo_id: str, call: str, class_name: str | list) -> str:
    if isinstance(class_name, list):  # brings its own code
        load = f'DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)  # runs medisyn_pipeline.py'
    else:
        load = f'DiffusionPipeline.from_pretrained("{repo_id}")'
    return f"from diffusers import DiffusionPipeline\n\npipe = {load}\nimage = pipe({call}).images[0]"


def _base_of_run(subject: "Subject") -> Source | None:
    """What a run started from, where its own record does not tell of it already: a model of the Hub."""
    base = _configured_base(subject)
    if base is None or Path(base).expanduser().exists() or not is_hub_name(base):
        return None
    return Source(base, _license_of(base))


def _configured_base(subject: "Subject") -> str | None:
    config = subject.file("config.yaml")
    if config is None:
        return None
    task = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("task") or {}
    return task.get("base")


# ---- adapters -------------------------------------------------------------------------------------------------------


def _adapter_facts(
    subject: "Subject", repo_id: str, report: Mapping[str, Any] | None, folder: Path
) -> tuple[CardFacts, Callable[[], str]]:
    manifest = read_manifest(subject.folder)
    assert manifest is not None  # it makes a folder a subject of the kind "adapter"
    _require_own_report(subject, manifest, report)
    base, base_hash = manifest["base_model"], manifest["base_hash"]
    record = record_of(subject) or {}
    name = "" if base == "default" else f'"{base}", '
    title = f"the {EMBEDDED}" if base == "default" else f"`{base}`"
    example = manifest["captions"][0] if manifest["captions"] else None
    if example and "text" in manifest["conditions"]:
        call = json.dumps(example, ensure_ascii=False)
    else:
        call = f'labels="{_example_label(manifest["label_schema"])}"' if manifest["label_schema"] else ""
    built_in = manifest.get("built_in_guidance")
    call += ", guidance_scale=1.0" if built_in else ""
    lines = [f"Base: {title}, hash `{base_hash}`; another base is refused"]
    if manifest["rank"] is not None:
        lines.append(f"Rank {manifest['rank']}, alpha {manifest['alpha']:g}")
    if built_in:
        lines.append(f"Guidance {built_in:g} is built in: sample with `guidance_scale=1`")
    if manifest["tokens"]:
        lines.append(f"New words: {', '.join(manifest['tokens'])}")
    lines += _schema_lines(manifest["label_schema"])
    lines += [f"Captions it was trained with: {'; '.join(manifest['captions'][:6])}"] if manifest["captions"] else []
    metrics = _all_metrics(manifest["metrics"], metrics_of_report(report) if report is not None else [])
    write_manifest(folder, without_paths(manifest) | {"metrics": metrics})
    method = "LoRA" if manifest["method"] == "lora" else "scale and shift of the normalisation layers"
    facts = CardFacts(
        repo_id=repo_id,
        kind="adapter",
        description=f"An adapter ({method}) of {title} for synthetic medical images.",
        conditions=manifest["conditions"],
        snippet=f'import medisyn\n\npipe = medisyn.load_pipeline({name}adapter="{repo_id}")\n'
        f"image = pipe({call}).images[0]",
        stock_snippet=_stock_adapter(subject, manifest, repo_id, call),
        facts=lines,
        datasets=without_paths(manifest["training_data"] or record.get("datasets", [])),
        base=Source(EMBEDDED if base == "default" else base, _license_of(_place_of_base(subject, manifest) or base)),
        base_model=split_revision(base)[0] if is_hub_name(base) else None,
        metrics=metrics,
        notes=report["notes"] if report is not None else [],
        hashes=len(record.get("hashes", [])),
        tags=("lora", "peft") if manifest["method"] == "lora" else (),
    )
    return facts, lambda: "" if (folder / SAMPLES).is_file() else _adapter_samples(subject, manifest, folder)


def _all_metrics(recorded: list, reported: list) -> list[dict[str, Any]]:
    """Those of `adapter.json` and of the report, each once; the report's are the newer."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for metric in [*recorded, *reported]:
        if not isinstance(metric, Mapping) or not {"name", "subset", "value"} <= metric.keys():
            raise ValueError(f"{MANIFEST}: metrics must have name, subset and value, not {metric!r}")
        found[metric["name"], metric["subset"]] = dict(metric)
    return list(found.values())


def _require_own_report(subject: "Subject", manifest: Mapping[str, Any], report: Mapping[str, Any] | None) -> None:
    if report is None:
        return
    about, own = report["subject"], weights_hash(subject.folder)
    weights = list((about.get("adapters") or {}).values())
    expected = hashlib.sha256(json.dumps([[own, weights[0]]]).encode()).hexdigest()[:12] if weights else None
    if len(weights) != 1 or about.get("adapter_hash") != expected:
        raise ValueError(
            f"the report is not about this adapter ({manifest['name']}, weights {own}) alone: evaluate it again with "
            "--adapter, or name another report"
        )


def _stock_adapter(subject: "Subject", manifest: Mapping[str, Any], repo_id: str, call: str) -> str:
    """Stock code, where the adapter is a LoRA alone and its base is a model of the Hub."""
    more = manifest["label_schema"] or manifest["tokens"] or manifest["method"] != "lora"
    more = more or (subject.folder / DECODER_WEIGHTS).is_file()
    if more or not is_hub_name(manifest["base_model"]) or not (subject.folder / LORA_WEIGHTS).is_file():
        return ""
    repository, revision = split_revision(manifest["base_model"])
    pinned = "" if revision is None else f', revision="{revision}"'
    load = f'pipe = DiffusionPipeline.from_pretrained("{repository}"{pinned})'
    return (
        f'from diffusers import DiffusionPipeline\n\n{load}\npipe.load_lora_weights("{repo_id}")\n'
        f"image = pipe({call}).images[0]"
    )


def _place_of_base(subject: "Subject", manifest: Mapping[str, Any]) -> str | None:
    """Where the base is on this machine or the Hub; None: nobody knows."""
    base = manifest["base_model"]
    if base == "default" or is_hub_name(base):
        return base
    configured = _configured_base(subject)
    return configured if configured is not None and Path(configured).expanduser().exists() else None


def _license_of(base: str) -> str | None:
    """What the record or the card of a base states."""
    from importlib import resources

    place = str(resources.files("medisyn") / "pretrained") if base == "default" else base
    record = find_training_record(place) or {}
    if record.get("license"):
        return record["license"]
    from huggingface_hub import ModelCard

    try:
        file = Path(place).expanduser() / "README.md"
        card = ModelCard.load(file if file.is_file() else split_revision(place)[0], ignore_metadata_errors=True)
    except Exception:  # noqa: BLE001 - no card, no network, no access: then nothing is stated
        return None
    return card.data.get("license_name") or card.data.get("license")


# ---- samples --------------------------------------------------------------------------------------------------------


def _model_requests(pipe: "MediSynPipeline") -> list:
    """Prompts of all modalities, or a value of each label; none for a model that needs an image to start."""
    from .generation.requests import Request
    from .prompts import demo_prompts

    if "text" in pipe.kinds:
        return [Request(prompt=one.prompt, title=one.name) for one in demo_prompts()]
    if "labels" in pipe.kinds:
        fields = pipe.label_schema["fields"].items()
        return [
            Request(labels={code: 1 if field["type"] == "binary" else field["values"][-1]}) for code, field in fields
        ]
    return [] if "image" in pipe.kinds else [Request()] * SAMPLE_IMAGES


def _adapter_samples(subject: "Subject", manifest: Mapping[str, Any], folder: Path) -> str:
    from .backbone import load_pipeline
    from .generation.requests import Request

    place = _place_of_base(subject, manifest)
    if place is None:
        raise ValueError(
            f"no {SAMPLES} beside {MANIFEST}, and the base {manifest['base_model']!r} is not here to draw it"
        )
    pipe = load_pipeline(place, adapter=subject.folder)
    pipe.set_progress_bar_config(disable=True)
    if "text" in pipe.kinds and manifest["captions"]:
        requests = [Request(prompt=caption) for caption in manifest["captions"][:SAMPLE_IMAGES]]
    else:
        requests = _model_requests(pipe)[:SAMPLE_IMAGES]
    guidance = {"guidance_scale": 1.0} if manifest.get("built_in_guidance") else {}
    return _samples(pipe, folder, requests, manifest["name"], **guidance)


def _samples(pipe: "MediSynPipeline", folder: Path, requests: list, name: str, **arguments: Any) -> str:
    """Draw `samples.png`; returns how, in a sentence."""
    from .generation.synthesize import make_requests, synthesize

    if (folder / SAMPLES).is_file() or not requests:
        return ""
    with tempfile.TemporaryDirectory(prefix="medisyn-samples-") as place:
        batch_size = 8 if pipe.kinds else 1  # an unconditional pipeline takes its batch size from nothing
        synthesize(pipe, make_requests(requests, seed=0), place, model=name, batch_size=batch_size, **arguments)
        (folder / SAMPLES).write_bytes((Path(place) / "grid.png").read_bytes())
    return f"Drawn when this was published, with the seeds 0 to {len(requests) - 1}; nothing was picked."


def _call(pipe: "MediSynPipeline") -> str:
    """Arguments of an example; one condition, since a prompt and labels chosen apart may contradict each other."""
    from .prompts import demo_prompts

    if "text" in pipe.kinds:
        return json.dumps(demo_prompts()[0].prompt)
    if "labels" in pipe.kinds:
        return f'labels="{_example_label(pipe.label_schema)}"'
    return 'image=PIL.Image.open("reference.png")' if "image" in pipe.kinds else ""


def _example_label(schema: Mapping[str, Any]) -> str:
    code, field = next(iter(schema["fields"].items()))
    return f"{code}={1 if field['type'] == 'binary' else field['values'][-1]}"


def _schema_lines(schema: Mapping[str, Any] | None) -> list[str]:
    if not schema:
        return []
    fields = (
        f"{code} ({'0, 1' if field['type'] == 'binary' else ', '.join(map(str, field['values']))})"
        for code, field in schema["fields"].items()
    )
    return [f"Labels: {'; '.join(fields)}"]
