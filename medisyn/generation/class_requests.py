"""Requests for images of given classes, by what a model has: classifier guidance, a label condition, or prompts.

- `class_label` needs a latent classifier in the pipeline, `labels` a field of its schema that has every class,
  `prompt` a text condition.
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
        condition: One of `CONDITIONS`; None: `prompt` if one is given, else the first that the model has.
        label_field: Field of the model's label schema; None: the one that has all classes.
        prompt: Template with `{label}`.
        captions: Captions of real images by class, of which the commonest takes the place of a template.

    Raises:
        ValueError: A condition that the model does not have, a class that it does not know, or a prompt without
            `{label}`.
    """
    found = _known_conditions(pipe, classes, label_field)
    if prompt is not None and "{label}" not in prompt:
        raise ValueError(f"the prompt must have {{label}} in it, not {prompt!r}")
    if condition is None and prompt is not None:
        condition = "prompt"
    if condition is None and not any(found.values()):
        raise ValueError(
            "this model cannot be asked for a class: it has no latent classifier, no label condition and no text "
            "condition; train one of them first"
        )
    chosen = condition or next(name for name in CONDITIONS if found[name])
    choose("condition", chosen, CONDITIONS)
    if chosen == "class_label":
        _refuse_unknown("the model's latent classifier", classes, found["class_label"])
        return {label: Request(class_label=label) for label in classes}
    if chosen == "labels":
        if not found["labels"]:
            raise ValueError(f"no label field of this model has all of the classes {', '.join(classes)}")
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
    """Per condition what the model has of it: classes of its classifier, a label field, text; or nothing."""
    from ..pipelines.medisyn_pipeline import label_field as find_field

    classifier = getattr(pipe, "classifier", None)
    field = None
    if "labels" in pipe.kinds and pipe.label_schema is not None:
        fields = pipe.label_schema["fields"]
        names = fields if label_field is None else [find_field(pipe.label_schema, label_field)]
        having = [name for name in names if set(classes) <= {str(value) for value in fields[name].get("values", ())}]
        field = having[0] if having else None
        if label_field is not None and field is None:
            valid = ", ".join(map(str, fields[names[0]].get("values", ())))
            raise ValueError(f"label field {label_field!r} does not have all of {', '.join(classes)}; it has: {valid}")
    return {
        "class_label": tuple(classifier.classes) if classifier is not None else (),
        "labels": field,
        "prompt": "text" in pipe.kinds,
    }


def _refuse_unknown(owner: str, classes: Sequence[str], known: Sequence[str]) -> None:
    if not known:
        raise ValueError("class labels cannot be used: this model has no latent classifier")
    for label in classes:
        if label not in known:
            raise ValueError(f"{owner} does not know the class {label!r}; valid: {', '.join(known)}")


def _commonest_caption(captions: Sequence[str | None], label: str) -> str:
    own = [text for text in captions if text]
    if not own:
        raise ValueError(f"no image of class {label!r} has a caption to ask with: give a prompt with {{label}}")
    return max(dict.fromkeys(own), key=own.count)
