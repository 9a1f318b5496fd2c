"""The kinds of condition: text, image embeddings, label vectors, and none.

Importing the package registers them all; see `medisyn.conditions.base` for the protocol.

    >>> from medisyn.conditions import LabelsCondition, get_schema
    >>> LabelsCondition(get_schema("corpus_fundus")).vector_width()
    10
"""

from medisyn.conditions.base import (
    Condition,
    NoCondition,
    condition_dropout,
    conditions_of,
    drop,
    get_condition,
    list_conditions,
    unet_kwargs,
)
from medisyn.conditions.image import ImageCondition
from medisyn.conditions.labels import LabelField, LabelSchema, LabelsCondition, convert, get_schema, list_schemas
from medisyn.conditions.text import TextCondition

__all__ = [
    "Condition",
    "ImageCondition",
    "LabelField",
    "LabelSchema",
    "LabelsCondition",
    "NoCondition",
    "TextCondition",
    "condition_dropout",
    "conditions_of",
    "convert",
    "drop",
    "get_condition",
    "get_schema",
    "list_conditions",
    "list_schemas",
    "unet_kwargs",
]
