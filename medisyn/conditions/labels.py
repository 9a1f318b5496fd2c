"""Structured labels as a condition: declarative schemas, and the reading of dicts, strings and dataset rows by them.

A schema is data (`schemas/*.json`): binary, ordinal and categorical fields, each of which may be unknown. Labels
become a vector by concatenating one-hot groups in field order; an unknown field is all zeros in its group, so the zero
vector is the unconditional one and partly annotated datasets mix freely. The vector itself is made by the pipeline
file, which a published model carries.

* The same kind of rules (`row_rules.py`) reads dataset rows (`from_row`) and converts between schemas (`convert`).
* Names may be given as code or display name in any case; codes are what comes back.

    >>> from medisyn.conditions.labels import convert, get_schema
    >>> schema = get_schema("synfundus")
    >>> schema.decode(schema.encode("glaucoma=1, dr_grade=3"))
    {'dr_grade': 3, 'gc': 1}
    >>> convert({"D": 0, "G": 1}, "odir8", "synfundus")
    {'dr_grade': 0, 'dme': 0, 'gc': 1}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from medisyn import prompts
from medisyn.conditions.base import register_condition
from medisyn.conditions.row_rules import UNKNOWN, RowRules, as_text
from medisyn.pipelines.medisyn_pipeline import (
    label_field,
    label_value,
    label_vector,
    label_width,
    parse_labels,
)

if TYPE_CHECKING:
    from medisyn.config import LabelsConditionConfig
    from medisyn.data.loading import ImageDataset
    from medisyn.pipelines.medisyn_pipeline import MediSynPipeline


@dataclass(frozen=True)
class LabelField:
    """One field of a schema.

    Attributes:
        name: The code, canonical everywhere.
        type: "binary" (0 or 1), "ordinal" (ordered values) or "categorical".
        values: The values as strings; for a binary field always ("0", "1").
        display: The name shown to people; also understood where labels are read.
    """

    name: str
    type: Literal["binary", "ordinal", "categorical"]
    values: tuple[str, ...] = ("0", "1")
    display: str = ""

    def __post_init__(self) -> None:
        """Refuses values outside the documented ones."""
        if self.type not in ("binary", "ordinal", "categorical"):
            raise ValueError(f"Field {self.name!r} has type {self.type!r}. Valid: binary, ordinal, categorical.")
        if self.type == "binary" and self.values != ("0", "1"):
            raise ValueError(
                f"The binary field {self.name!r} takes no values of its own, got {', '.join(self.values)}."
            )
        distinct = {value.lower() for value in self.values}
        if not 2 <= len(distinct) == len(self.values) or distinct & {UNKNOWN, "nan", ""}:
            raise ValueError(
                f"Field {self.name!r} needs two or more different values, none of them 'unknown'; "
                f"got {', '.join(map(repr, self.values)) or 'none'}."
            )


@dataclass(frozen=True)
class LabelSchema:
    """A named set of label fields. Immutable; `with_display` gives a changed copy."""

    name: str
    fields: tuple[LabelField, ...]
    rows: RowRules | None = None  # how dataset rows are read; None: by columns named like the fields
    sources: Mapping[str, RowRules] | None = None  # other schema's name -> how its labels convert to this one
    rules: Mapping | None = None  # `rows` and `sources` in the JSON form

    @classmethod
    def from_dict(cls, data: Mapping) -> LabelSchema:
        """Reads the JSON form: `{"name": ..., "fields": {code: {"type": ..., "values": [...], "display": ...}}}`.

        Optional: `rows` (see `RowRules`), `from` (other schema -> `RowRules`), `description`, and `prompts`: what
        words say of the labels (`MediSynPipeline.labels_of_prompt`).

        Raises:
            ValueError: For missing, unknown or ill-formed entries.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"A label schema is a JSON object, got {type(data).__name__}.")
        wrong = set(data) - set(known := ("name", "description", "fields", "rows", "from", "prompts"))
        if wrong or not data.get("name") or not data.get("fields"):
            problem = (
                f"has unknown entries: {', '.join(sorted(wrong))}" if wrong else "needs a name and at least one field"
            )
            raise ValueError(f"The label schema {data.get('name', '')!r} {problem}. Valid: {', '.join(known)}.")
        fields = []
        for name, entry in data["fields"].items():
            wrong = set(entry) - {"type", "values", "display"}
            if wrong or "type" not in entry:
                raise ValueError(
                    f"Field {name!r} needs a type and may have values and display; got {', '.join(entry)}."
                )
            values = tuple(
                str(value) for value in entry.get("values", ("0", "1") if entry["type"] == "binary" else ())
            )
            fields.append(LabelField(name, entry["type"], values, entry.get("display", name)))
        rows = RowRules.from_dict(data["rows"]) if "rows" in data else None
        sources = {other: RowRules.from_dict(rules) for other, rules in data.get("from", {}).items()}
        rules = {key: data[key] for key in ("description", "rows", "from", "prompts") if key in data}
        schema = cls(data["name"], tuple(fields), rows, sources, rules)
        for row_rules in (rows, *sources.values()):  # a misspelt rule is an error now, not when a row first meets it
            for name in row_rules.columns if row_rules else ():
                schema.field(name)
            for _, labels in row_rules.rules if row_rules else ():
                schema.canonical(labels)
        return schema

    def to_dict(self, rules: bool = True) -> dict:
        """The JSON form that `LabelSchema.from_dict` reads back.

        Args:
            rules: Whether to include how rows and other schemas are read; a model needs the name and the fields only.
        """
        fields = {}
        for field in self.fields:
            values = {} if field.type == "binary" else {"values": list(field.values)}
            fields[field.name] = {"type": field.type, **values, "display": field.display or field.name}
        return {"name": self.name, "fields": fields, **((self.rules or {}) if rules else {})}

    @cached_property
    def _plain(self) -> dict:  # the form that the pipeline's functions take
        return self.to_dict(rules=False)

    @property
    def width(self) -> int:
        """The length K of the vector."""
        return label_width(self._plain)

    def with_display(self, names: Mapping[str, str]) -> LabelSchema:
        """A copy with other display names (code -> name); the codes stay."""
        for code in names:
            prompts.choose(f"field of {self.name}", code, (field.name for field in self.fields))
        fields = tuple(replace(field, display=names.get(field.name, field.display)) for field in self.fields)
        return replace(self, fields=fields)

    def field(self, name: str) -> LabelField:
        """The field with this code or display name, in any case.

        Raises:
            ValueError: For an unknown name; the message lists the valid ones.
        """
        try:
            code = label_field(self._plain, str(name))
        except ValueError as error:
            spellings = [spelling for field in self.fields for spelling in (field.name, field.display)]
            raise ValueError(f"{error}.{prompts.suggestion(str(name), spellings)}") from None
        return next(field for field in self.fields if field.name == code)

    def value(self, name: str, value: Any) -> int | str | None:
        """A value of a field in its canonical form: an int for whole numbers, else a string; None when unknown.

        Raises:
            ValueError: For an unknown field or a value that it does not have; the message lists the valid ones.
        """
        field = self.field(name)
        try:
            text = label_value(self._plain, field.name, as_text(value))
        except ValueError as error:
            raise ValueError(f"{error}.{prompts.suggestion(str(value), field.values)}") from None
        return int(text) if text is not None and text.isdigit() else text

    def canonical(self, labels: Mapping | str | None) -> dict[str, int | str]:
        """Labels as a dict of codes and canonical values in field order, unknown ones left out.

        Args:
            labels: A dict, a string such as `"glaucoma=1, dr_grade=3"`, or None for nothing known.

        Raises:
            ValueError: For an unknown name or value, or a field given twice.
        """
        if labels is None:
            return {}
        if isinstance(labels, str):
            labels = parse_labels(labels)
        found: dict[str, int | str | None] = {}
        for name, value in labels.items():
            field = self.field(name)
            if field.name in found:
                raise ValueError(f"The label {field.name!r} of {self.name} is given twice.")
            found[field.name] = self.value(field.name, value)
        return {field.name: value for field in self.fields if (value := found.get(field.name)) is not None}

    def encode(self, labels: Mapping | str | None) -> list[float]:
        """The vector of length `width` of labels; see `canonical` for what is accepted and refused."""
        return label_vector(self._plain, self.canonical(labels))

    def decode(self, vector: Sequence[float] | torch.Tensor) -> dict[str, int | str]:
        """The labels of a vector (K,); unknown fields are left out. `decode(encode(x)) == canonical(x)`.

        Raises:
            ValueError: For a vector of another length, or with a group that is neither one-hot nor zero.
        """
        numbers = [float(number) for number in vector]
        if len(numbers) != self.width:
            raise ValueError(f"A label vector of {self.name} has {self.width} numbers, got {len(numbers)}.")
        labels, start = {}, 0
        for field in self.fields:
            group = numbers[start : start + len(field.values)]
            start += len(group)
            if sorted(group)[:-1] != [0.0] * (len(group) - 1) or max(group) not in (0.0, 1.0):
                raise ValueError(
                    f"The group of {field.name} in a label vector must be one-hot or all zeros, got {group}."
                )
            if 1.0 in group:
                labels[field.name] = field.values[group.index(1.0)]
        return self.canonical(labels)

    def format(self, labels: Mapping | str | None, display: bool = False) -> str:
        """Labels as the string that `canonical` reads: `"gc=1, dr_grade=3"`, or with display names."""
        known = self.canonical(labels)
        return ", ".join(f"{self.field(name).display if display else name}={value}" for name, value in known.items())

    def from_row(self, row: Mapping, columns: Mapping[str, str] | None = None) -> dict[str, int | str] | None:
        """The labels of a row of a DataFrame or of `datasets`; NaN, None and "" are unknown.

        Args:
            row: A dict-like row; columns that the schema does not use are ignored.
            columns: Field -> column. Without it the schema's own `rows` rules read the row, or columns named like its
                fields.

        Returns:
            Canonical labels, or None when the row is not of the kind that the schema describes (`rows.when`).

        Raises:
            ValueError: For a field or column that does not exist, a value outside the field, or contradictory
                statements.
        """
        row = row.to_dict() if hasattr(row, "to_dict") else row
        if columns is None:
            rules = self.rows or RowRules({}, {field.name: (field.name, {}) for field in self.fields})
        else:
            for column in columns.values():
                prompts.choose("column for labels", column if column in row else column.split(".")[0], row)
            rules = RowRules({}, {self.field(field).name: (column, {}) for field, column in columns.items()})
        labels = rules.read(row)
        return None if labels is None else self.canonical(labels)


def list_schemas() -> tuple[str, ...]:
    """The names of the schemas that are shipped."""
    folder = resources.files("medisyn.conditions") / "schemas"
    return tuple(sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json")))


def get_schema(name: str) -> LabelSchema:
    """A shipped schema by its name, or one's own by the path of its JSON file.

    Raises:
        ValueError: For an unknown name, or a file that is not a schema.
        FileNotFoundError: When a path ends in `.json` and there is no such file.
    """
    if name.endswith(".json"):
        text = Path(name).read_text(encoding="utf-8")
    else:
        file = prompts.choose("label schema", name, list_schemas()) + ".json"
        text = (resources.files("medisyn.conditions") / "schemas" / file).read_text(encoding="utf-8")
    try:
        return LabelSchema.from_dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name!r} is not JSON: {error}") from error


def convert(
    labels: Mapping | str | None, source: str | LabelSchema, target: str | LabelSchema
) -> dict[str, int | str]:
    """Labels of one schema in terms of another, where one follows from the other; everything else stays unknown.

    Raises:
        ValueError: When the target has no rules for the source, or the labels are invalid or contradict each other.
    """
    source = get_schema(source) if isinstance(source, str) else source
    target = get_schema(target) if isinstance(target, str) else target
    sources = target.sources or {}
    prompts.choose(f"source of a conversion to {target.name}", source.name, sources)
    return target.canonical(sources[source.name].read(source.canonical(labels)))


@register_condition
@dataclass(frozen=True)
class LabelsCondition:
    """A label vector as the condition `"labels"`; see `medisyn.conditions.base.Condition`."""

    schema: LabelSchema

    kind: ClassVar[str] = "labels"
    embeds_name: ClassVar[str | None] = "label_embeds"
    cacheable: ClassVar[bool] = True

    @classmethod
    def from_pipeline(cls, pipe: MediSynPipeline) -> LabelsCondition:
        """The schema that the pipeline stores."""
        return cls(LabelSchema.from_dict(pipe.config.label_schema))

    @classmethod
    def from_config(
        cls, config: LabelsConditionConfig, captions: Sequence[str | None], base: MediSynPipeline | None = None
    ) -> LabelsCondition:
        """The schema that the configuration names, else that of `base`."""
        if config.schema is not None:
            return cls(get_schema(config.schema))
        if base is None or cls.kind not in base.kinds:
            raise ValueError(f"The label condition needs a schema, such as {', '.join(list_schemas())}.")
        return cls.from_pipeline(base)

    def build_cache(self, pipe: MediSynPipeline, images: ImageDataset, folder: Path, **options) -> None:
        """None: a label vector is quicker to write than to read."""
        return None

    def components(self) -> dict:
        """The constructor arguments of `MediSynPipeline` that this condition stands for."""
        stated = {"prompt_labels": self.schema.rules["prompts"]} if "prompts" in (self.schema.rules or {}) else {}
        return {"label_schema": self.schema.to_dict(rules=False)} | stated

    def token_width(self) -> None:
        """Labels give no tokens."""
        return None

    def vector_width(self) -> int:
        """The length of the label vector."""
        return self.schema.width

    def encode(self, pipe: MediSynPipeline, examples: Sequence[Mapping]) -> torch.Tensor:
        """Label vectors (B, K); an example without labels gets zeros."""
        return pipe.encode_labels([example.get("labels") for example in examples])

    def null(self, pipe: MediSynPipeline, batch_size: int) -> torch.Tensor:
        """Zeros (B, K)."""
        return pipe.null_embeds(self.kind, batch_size)
