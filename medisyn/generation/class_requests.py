"""Requests for images of given classes, by what a model has: classifier guidance, a label condition, or prompts.

- `class_label` needs a latent classifier of every class in the pipeline, `labels` a field of its schema that has every
  class, `prompt` a text condition. The first that fits is taken; a classifier of other classes is passed over.
- Every request has its class in the column of that name, so that the folder can be trained on and selected from.

    templates = class_requests(pipe, ["benign", "malignant"], prompt="breast ultrasound image of a {label} lesion")
    requests = spread_requests(templates, {"benign": 10, "malignant": 20}, "finding", seed=0)
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..prompts import choose
from .requests import Request, make_requests

if TYPE_CHECKING:
    from ..pipelines.medisyn_pipeline import MediSynPipeline

CONDITIONS = ("class_label", "labels", "prompt")
MOST_VALUES = 12  # of a label field in a message


def class_requests(
    pipe: "MediSynPipeline",
    classes: Sequence[str],
    condition: str | None = None,
    label_field: str | None = None,
    prompt: str | None = None,
    captions: Mapping[str, Sequence[str | None]] | None = None,
) -> dict[str, Request]:
    """What the model is asked for, by class.

    Args:
        pipe: The model.
        classes: Names of the classes.
        condition: One of `CONDITIONS`; None: `prompt` if one is given, else the first that has all classes.
        label_field: Field of the model's label schema; None: the one that has all classes.
        prompt: Template with `{label}`.
        captions: Captions of real images by class, of which the commonest takes the place of a template.

    Raises:
        ValueError: A condition that the model does not have, a class that it does not know (the message lists those
            that it does), or a prompt without `{label}`.
    """
    found = _known_conditions(pipe, classes, label_field)
    if prompt is not None and "{label}" not in prompt:
        raise ValueError(f"the prompt must have {{label}} in it, not {prompt!r}")
    if condition is None and prompt is not None:
        condition = "prompt"
    if condition is None and not any(found.values()):
        raise ValueError(_why_none(pipe, classes))
    chosen = condition or next(name for name in CONDITIONS if found[name])
    choose("condition", chosen, CONDITIONS)
    if chosen == "class_label":
        if not found["class_label"]:
            raise ValueError(
                _unknown_to_classifier(pipe, classes)
                or "class labels cannot be used: this model has no latent classifier"
            )
        return {label: Request(class_label=label) for label in classes}
    if chosen == "labels":
        if not found["labels"]:
            raise ValueError(
                _unknown_to_labels(pipe, classes) or "labels cannot be used: this model has no label condition"
            )
        return {label: Request(labels={found["labels"]: label}) for label in classes}
    if "text" not in pipe.kinds:
        raise ValueError("prompts cannot be used: this model has no text condition")
    if prompt is not None:
        return {label: Request(prompt=prompt.replace("{label}", label)) for label in classes}
    return {label: Request(prompt=_commonest_caption((captions or {}).get(label, ()), label)) for label in classes}


def spread_requests(
    templates: Mapping[str, Request], counts: Mapping[str, int], label_column: str, seed: int
) -> list[Request]:
    """`counts` requests of each class, class by class, each with its class in the metadata and its own seed."""
    named = [
        replace(template, columns={label_column: label})
        for label, template in templates.items()
        for _ in range(counts[label])
    ]
    return make_requests(named, 1, seed)


def condition_of(request: Request) -> str:
    """Which of `CONDITIONS` a request uses."""
    return next(name for name in CONDITIONS if getattr(request, name, None) is not None)


def _known_conditions(pipe: "MediSynPipeline", classes: Sequence[str], label_field: str | None) -> dict[str, Any]:
    """Per condition what of it has all classes: the classifier, a label field, text (of any words); or nothing."""
    from ..pipelines.medisyn_pipeline import label_field as find_field

    having = [name for name, values in _label_values(pipe).items() if set(classes) <= set(values)]
    if label_field is not None and "labels" in pipe.kinds and pipe.label_schema is not None:
        name = find_field(pipe.label_schema, label_field)
        if name not in having:
            valid = ", ".join(_label_values(pipe).get(name, ()))
            raise ValueError(f"label field {label_field!r} does not have all of {', '.join(classes)}; it has: {valid}")
        having = [name]
    return {
        "class_label": set(classes) <= set(_classifier_classes(pipe)),
        "labels": having[0] if having else None,
        "prompt": "text" in pipe.kinds,
    }


def _classifier_classes(pipe: "MediSynPipeline") -> tuple[str, ...]:
    classifier = getattr(pipe, "classifier", None)
    return () if classifier is None else tuple(classifier.classes)


def _label_values(pipe: "MediSynPipeline") -> dict[str, tuple[str, ...]]:
    """The values of each field that the model's label condition has."""
    if "labels" not in pipe.kinds or pipe.label_schema is None:
        return {}
    return {name: tuple(map(str, field.get("values", ()))) for name, field in pipe.label_schema["fields"].items()}


def _unknown_to_classifier(pipe: "MediSynPipeline", classes: Sequence[str]) -> str:
    """Which class the latent classifier does not know; empty where there is none."""
    known = _classifier_classes(pipe)
    missing = next((label for label in classes if label not in known), None)
    if not known or missing is None:
        return ""
    return f"the model's latent classifier does not know the class {missing!r}; valid: {', '.join(known)}"


def _unknown_to_labels(pipe: "MediSynPipeline", classes: Sequence[str]) -> str:
    """Which class the label condition does not have, with the values of each field; empty where there is none."""
    fields = _label_values(pipe)
    if not fields:
        return ""
    every = {value for values in fields.values() for value in values}
    missing = next((label for label in classes if label not in every), None)
    what = "all of " + ", ".join(classes) if missing is None else f"the class {missing!r}"
    listed = "; ".join(f"{name}: {_listed(values)}" for name, values in fields.items())
    return f"no label field of this model has {what}; its fields: {listed}"


def _listed(values: Sequence[str]) -> str:
    if not values:
        return "no named values"
    return ", ".join(values[:MOST_VALUES]) + (", ..." if len(values) > MOST_VALUES else "")


def _why_none(pipe: "MediSynPipeline", classes: Sequence[str]) -> str:
    """Why no class can be asked for: what the model's conditions lack, or that it has none."""
    reasons = [text for text in (_unknown_to_classifier(pipe, classes), _unknown_to_labels(pipe, classes)) if text]
    return "; ".join(reasons) or (
        "this model cannot be asked for a class: it has no latent classifier, no label condition and no text "
        "condition; train one of them first"
    )


def _commonest_caption(captions: Sequence[str | None], label: str) -> str:
    own = [text for text in captions if text]
    if not own:
        raise ValueError(f"no image of class {label!r} has a caption to ask with: give a prompt with {{label}}")
    return max(dict.fromkeys(own), key=own.count)
