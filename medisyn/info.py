"""What a model is: components, conditions, resolution, scheduler, what it was trained on, licence and hash.

An adapter: its base, method, conditions, labels, words and captions, training data with licences, measured numbers.

medisyn info
medisyn info runs/chest --json
medisyn info adapters/knee-osteoarthritis
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from .adapter_folder import MANIFEST, read_manifest, weights_hash
from .cards import show_number
from .hub import ADAPTER_MARKS, INDEX, is_hub_name
from .training_record import read_training_record

if TYPE_CHECKING:
    from .pipelines.medisyn_pipeline import MediSynPipeline

# Licences of data sets, as people write them, that leave open or forbid other uses than research.
_RESTRICTED = re.compile(r"\bnc\b|non-?commercial|research|not stated|unknown|unverified", re.IGNORECASE)

# The numbers of an adapter that are shown to a reader, by the end of their names; --json has all.
_HEADLINES = (", accuracy", "quadratic-weighted kappa", "kernel distance (KID) × 1000", "1st percentile")


def describe(pipe: "MediSynPipeline", name: str) -> dict:
    """The facts about a loaded pipeline as plain data.

    Training data come from the training record in the model's folder, the licence from there or the model card.

    Raises:
        ValueError: The training record is damaged.
    """
    from .backbone import model_hash

    components = {}
    for component, module in pipe.components.items():
        if module is not None:
            counted = sum(p.numel() for p in module.parameters()) if hasattr(module, "parameters") else None
            components[component] = {"class": type(module).__name__, "parameters": counted}
    sample_size = pipe.unet.config.sample_size or 64
    rows, columns = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    source = pipe.config.get("_name_or_path")
    record = (read_training_record(source) if source else None) or {}
    return {
        "model": name,
        "hash": model_hash(pipe),
        "components": components,
        "conditions": list(pipe.kinds),
        "label_schema": pipe.label_schema,
        "resolution": [rows * pipe.vae_scale_factor, columns * pipe.vae_scale_factor],
        "scheduler": {
            "class": type(pipe.scheduler).__name__,
            "prediction_type": pipe.scheduler.config.get("prediction_type", "epsilon"),
        },
        "training_data": _training_data(record),
        "license": record.get("license") or (_card_license(Path(source) / "README.md") if source else None),
    }


def adapter_place(name_or_dir: str | Path) -> Path | None:
    """The folder of an adapter, its own or that of a run; None: a model is there, or nothing.

    Raises:
        ValueError: An adapter of other software, which says nothing about itself.
    """
    folder = Path(name_or_dir).expanduser()
    if any((place / INDEX).is_file() for place in (folder, folder / "pipeline")):
        return None
    for place in (folder, folder / "adapter"):
        if (place / MANIFEST).is_file():
            return place
        if any((place / mark).is_file() for mark in ADAPTER_MARKS[:2]):
            raise ValueError(f"{str(name_or_dir)!r} is an adapter without {MANIFEST}: nothing else is known about it")
    return None


def hub_adapter(name: str | None) -> Path | None:
    """The downloaded folder of an adapter of the Hub that has a manifest; None: there is none of this name."""
    from .loading import find_adapter

    if name is None or not is_hub_name(name) or Path(name).exists():
        return None
    try:
        return adapter_place(find_adapter(name))
    except (OSError, ValueError):
        return None


def describe_adapter(folder: Path) -> dict:
    """What `adapter.json`, the training record and the card of an adapter's folder say, as plain data.

    Raises:
        ValueError: `adapter.json` or the training record is missing or damaged.
    """
    from .published_facts import EMBEDDED

    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{folder} has no {MANIFEST}")
    record = read_training_record(folder) or {}
    datasets = manifest["training_data"] or record.get("datasets", [])
    images = len(record["hashes"]) if record else sum(each.get("images") or 0 for each in datasets)
    base = {"model": EMBEDDED if manifest["base_model"] == "default" else manifest["base_model"]}
    kept = ("method", "rank", "alpha", "target_modules", "conditions", "label_schema", "tokens", "captions")
    return {
        "adapter": manifest["name"],
        "hash": weights_hash(folder),
        "base": base | {"hash": manifest["base_hash"]},
        **{name: manifest[name] for name in kept},
        "training_data": {"images": images, "datasets": datasets} if datasets or record else None,
        "license": record.get("license") or _card_license(folder / "README.md"),
        "metrics": manifest["metrics"],
    }


def format_adapter(facts: dict) -> str:
    """What `describe_adapter` says, for a reader."""
    method = "LoRA" if facts["method"] == "lora" else "scale and shift of the normalisation layers"
    if facts["rank"] is not None:
        method += f", rank {facts['rank']}, alpha {facts['alpha']:g}"
    lines = [f"{'adapter':13} {facts['adapter']}", f"{'hash':13} {facts['hash']}"]
    lines.append(f"{'base':13} {facts['base']['model']}, hash {facts['base']['hash']}; another base is refused")
    lines += [f"{'licence':13} {_license(facts)}", f"{'method':13} {method}", ""]
    lines += _condition_lines(facts)
    if facts["tokens"]:
        lines.append(f"new words: {', '.join(facts['tokens'])}")
    if facts["captions"]:
        lines += ["trigger captions:", *(f"  {caption}" for caption in facts["captions"])]
    lines += ["", *_data_lines(facts["training_data"]), ""]
    shown = [each for each in facts["metrics"] if each.get("name", "").endswith(_HEADLINES)] or facts["metrics"]
    lines.append("measured numbers (of synthetic images, of real ones)" if shown else "measured numbers: none")
    for metric in shown:
        numbers = f"{show_number(metric.get('value')):>8} {show_number(metric.get('real')):>8}"
        lines.append(f"  {metric.get('name', ''):66} {numbers}  {metric.get('subset', '')}")
    return "\n".join([*lines, "", "Images of this adapter are synthetic and not for diagnosis."])


def format_description(facts: dict) -> str:
    """The facts for a reader."""
    height, width = facts["resolution"]
    total = sum(part["parameters"] or 0 for part in facts["components"].values())
    lines = [f"{'model':13} {facts['model']}", f"{'hash':13} {facts['hash']}"]
    lines += [f"{'licence':13} {_license(facts)}", f"{'resolution':13} {width} x {height} pixels"]
    scheduler = facts["scheduler"]
    lines += [f"{'scheduler':13} {scheduler['class']}, {scheduler['prediction_type']}", ""]
    lines.append(f"components ({total:,} parameters)")
    for component, part in facts["components"].items():
        count = "" if part["parameters"] is None else f"{part['parameters']:,}"
        lines.append(f"  {component:18} {part['class']:30} {count:>14}".rstrip())
    lines += ["", *_condition_lines(facts), "", *_data_lines(facts["training_data"])]
    return "\n".join([*lines, "", "Images of this model are synthetic and not for diagnosis."])


def _condition_lines(facts: dict) -> list[str]:
    lines = [f"conditions: {', '.join(facts['conditions']) or 'none (unconditional)'}"]
    if facts["label_schema"]:
        lines.append(f"  labels of the schema {facts['label_schema'].get('name', '')}:")
        for code, field in facts["label_schema"]["fields"].items():
            values = "0, 1" if field["type"] == "binary" else ", ".join(str(value) for value in field["values"])
            lines.append(f"  {code:18} {field.get('display') or code} ({field['type']}): {values}")
    return lines


def _data_lines(data: dict | None) -> list[str]:
    if data is None:
        return ["training data: not recorded"]
    lines = [f"training data ({data['images']:,} images)"]
    for dataset in data["datasets"]:
        count = dataset.get("images")
        lines.append(
            f"  {dataset.get('name') or 'unnamed':24} {'' if count is None else f'{count:,}':>8}  "
            f"{dataset.get('license') or 'licence not stated'}"
        )
    return lines


def _training_data(record: dict) -> dict | None:
    return {"images": len(record["hashes"]), "datasets": record["datasets"]} if record else None


def _card_license(card: Path) -> str | None:
    if not card.is_file():
        return None
    from huggingface_hub import ModelCard

    data = ModelCard.load(card, ignore_metadata_errors=True).data
    return data.get("license_name") or data.get("license")  # of a licence that the Hub has no name for


def _license(facts: dict) -> str:
    """The model's licence in words; without one, its training data may still say that it is not for every use."""
    datasets = (facts["training_data"] or {}).get("datasets", [])
    restricted = any(_RESTRICTED.search(dataset.get("license") or "not stated") for dataset in datasets)
    return facts["license"] or ("research only (see the training data)" if restricted else "not stated")
