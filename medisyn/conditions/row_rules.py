"""Reading labels out of rows by declarative rules: dataset rows, and rows of another schema's labels.

The rules are part of a schema's JSON file. Columns are taken over as they are, optionally with their values
translated; a rule `when ... labels ...` states an inference, and holds in that direction only (no diabetes means DR
grade 0; diabetes does not tell the grade).

    >>> healthy = {"when": {"normal": "1"}, "labels": {"gc": "0"}}
    >>> rules = RowRules.from_dict({"columns": {"gc": "is_gc"}, "rules": [healthy]})
    >>> rules.read({"is_gc": 1, "normal": 0}), rules.read({"normal": True})
    ({'gc': '1'}, {'gc': '0'})
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNKNOWN = "unknown"


@dataclass(frozen=True)
class RowRules:
    """How the labels of a schema are read from a row of something else: a dataset, or labels of another schema.

    Attributes:
        when: Column -> accepted values; a row that differs does not concern the schema at all.
        columns: Field -> the column that holds it, and a translation of its values (may be empty). A dot reaches into
            a column that is a dict or JSON text (`extra.laterality`).
        rules: Pairs of conditions (column -> accepted values, "unknown" among them if wanted) and the labels they
            imply.
    """

    when: Mapping[str, tuple[str, ...]]
    columns: Mapping[str, tuple[str, Mapping[str, str]]]
    rules: tuple[tuple[Mapping[str, tuple[str, ...]], Mapping[str, str]], ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping) -> RowRules:
        """Reads the JSON form (`note` is a comment)."""
        wrong = set(data) - {"note", "when", "columns", "rules"}
        if wrong:
            raise ValueError(
                f"Unknown entries in row rules: {', '.join(sorted(wrong))}. Valid: columns, note, rules, when."
            )
        columns = {
            field: (column, {}) if isinstance(column, str) else (column["column"], column["values"])
            for field, column in data.get("columns", {}).items()
        }
        for rule in data.get("rules", ()):
            if set(rule) != {"when", "labels"}:
                raise ValueError(f"A row rule has the entries when and labels, got {', '.join(rule) or 'none'}.")
        rules = tuple((_accepted(rule["when"]), rule["labels"]) for rule in data.get("rules", ()))
        return cls(_accepted(data.get("when", {})), columns, rules)

    def read(self, row: Mapping) -> dict[str, str] | None:
        """The labels that the row gives, unknown ones left out; None when `when` does not hold.

        Raises:
            ValueError: When the row's statements contradict each other.
        """
        if not _holds(self.when, row):
            return None
        labels: dict[str, str] = {}
        for field, (column, translation) in self.columns.items():
            text = as_text(_cell(row, column))
            if text != UNKNOWN:
                labels[field] = translation.get(text, text)
        for condition, implied in self.rules:
            if _holds(condition, row):
                for field, value in implied.items():
                    if labels.setdefault(field, value) != value:
                        stated = ", ".join(f"{column}={as_text(_cell(row, column))}" for column in condition)
                        raise ValueError(
                            f"Labels contradict each other: {stated} means {field}={value}, not {labels[field]}."
                        )
        return labels


def as_text(value: Any) -> str:
    """The text of a label's value, "unknown" for None, NaN, NA and "": 1, 1.0, True and "1" are all "1"."""
    if isinstance(value, str):
        text = value.strip()
        return UNKNOWN if text.lower() in ("", "nan", UNKNOWN) else text
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return UNKNOWN
    value = value.item() if hasattr(value, "item") else value  # numpy and torch scalars
    if isinstance(value, float) and math.isnan(value):
        return UNKNOWN
    return str(int(value)) if isinstance(value, (bool, float)) and value == int(value) else str(value)


def _cell(row: Mapping, column: str) -> Any:
    """`row[column]`, or for "a.b" the entry b of the dict or JSON text `row["a"]`; None when there is none."""
    if column in row or "." not in column:
        return row.get(column)
    head, _, rest = column.partition(".")
    inner = row.get(head)
    inner = json.loads(inner or "{}") if isinstance(inner, str) else inner
    return _cell(inner, rest) if isinstance(inner, Mapping) else None


def _accepted(conditions: Mapping) -> dict[str, tuple[str, ...]]:
    return {column: (value,) if isinstance(value, str) else tuple(value) for column, value in conditions.items()}


def _holds(conditions: Mapping[str, tuple[str, ...]], row: Mapping) -> bool:
    return all(as_text(_cell(row, column)) in accepted for column, accepted in conditions.items())
