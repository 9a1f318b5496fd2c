"""What a model is: components, conditions, resolution, scheduler, what it was trained on, licence and hash.

medisyn info
medisyn info runs/chest --json
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipelines.medisyn_pipeline import MediSynPipeline

TRAINING_IMAGES = "training_images.json"


def describe(pipe: "MediSynPipeline", name: str) -> dict:
    """The facts about a loaded pipeline as plain data.

    Training data come from `training_images.json` in the model's folder, the licence from its model card.
    """
    from .backbone import model_hash

    components = {}
    for component, module in pipe.components.items():
        if module is not None:
            counted = sum(p.numel() for p in module.parameters()) if hasattr(module, "parameters") else None
            components[component] = {"class": type(module).__name__, "parameters": counted}
    sample_size = pipe.unet.config.sample_size or 64
    rows, columns = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    folder = Path(pipe.config.get("_name_or_path") or "")
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
        "training_data": _training_data(folder / TRAINING_IMAGES),
        "license": _license(folder / "README.md"),
    }


def format_description(facts: dict) -> str:
    """The facts for a reader."""
    height, width = facts["resolution"]
    total = sum(part["parameters"] or 0 for part in facts["components"].values())
    lines = [f"{'model':13} {facts['model']}", f"{'hash':13} {facts['hash']}"]
    lines += [f"{'licence':13} {facts['license'] or 'not stated'}", f"{'resolution':13} {width} x {height} pixels"]
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


def _training_data(file: Path) -> dict | None:
    if not file.is_file():
        return None
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
        return {"images": len(recorded["hashes"]), "datasets": recorded.get("datasets", [])}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is not a record of training images (hashes, datasets)") from None


def _license(card: Path) -> str | None:
    if not card.is_file():
        return None
    from huggingface_hub import ModelCard

    return ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
