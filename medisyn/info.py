"""What a model is: components, conditions, resolution, scheduler, what it was trained on, licence and hash.

medisyn info
medisyn info runs/chest --json
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from .training_record import read_training_record

if TYPE_CHECKING:
    from .pipelines.medisyn_pipeline import MediSynPipeline

# Licences of data sets, as people write them, that leave open or forbid other uses than research.
_RESTRICTED = re.compile(r"\bnc\b|non-?commercial|research|not stated|unknown|unverified", re.IGNORECASE)


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
    lines += ["", f"conditions: {', '.join(facts['conditions']) or 'none (unconditional)'}"]
    if facts["label_schema"]:
        lines.append(f"  labels of the schema {facts['label_schema'].get('name', '')}:")
        for code, field in facts["label_schema"]["fields"].items():
            values = "0, 1" if field["type"] == "binary" else ", ".join(str(value) for value in field["values"])
            lines.append(f"  {code:18} {field.get('display') or code} ({field['type']}): {values}")
    lines.append("")
    data = facts["training_data"]
    if data is None:
        lines.append("training data: not recorded")
    else:
        lines.append(f"training data ({data['images']:,} images)")
        for dataset in data["datasets"]:
            count = dataset.get("images")
            lines.append(
                f"  {dataset.get('name') or 'unnamed':24} {'' if count is None else f'{count:,}':>8}  "
                f"{dataset.get('license') or 'licence not stated'}"
            )
    return "\n".join([*lines, "", "Images of this model are synthetic and not for diagnosis."])


def _training_data(record: dict) -> dict | None:
    return {"images": len(record["hashes"]), "datasets": record["datasets"]} if record else None


def _card_license(card: Path) -> str | None:
    if not card.is_file():
        return None
    from huggingface_hub import ModelCard

    return ModelCard.load(card, ignore_metadata_errors=True).data.get("license")


def _license(facts: dict) -> str:
    """The model's licence in words; without one, its training data may still say that it is not for every use."""
    datasets = (facts["training_data"] or {}).get("datasets", [])
    restricted = any(_RESTRICTED.search(dataset.get("license") or "not stated") for dataset in datasets)
    return facts["license"] or ("research only (see the training data)" if restricted else "not stated")
