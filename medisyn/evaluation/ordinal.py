"""Ordered values of a column, such as "KL grade 0" to "KL grade 4": which columns have them, and in which order.

- A column is ordinal because the user says so: that "mild", "moderate" and "severe" are ordered is not in the words.
- Values that end in a number are ordered by it. Any other order is given with the column's name.
- Within a nested column, each outer value has grades of its own: findings of a knee are graded, others are not.

    >>> parse_ordinal(["finding"])
    {'finding': None}
    >>> parse_ordinal("finding=normal, mild, severe")
    {'finding': ('normal', 'mild', 'severe')}
    >>> order_grades({"KL grade 10", "KL grade 2"})
    ('KL grade 2', 'KL grade 10')
"""

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Ordinal: TypeAlias = str | Sequence[str] | Mapping[str, Sequence[str] | None]

_NUMBER_AT_THE_END = re.compile(r"(?<![\d.])\d+(\.\d+)?$")


def parse_ordinal(ordinal: Ordinal | None) -> dict[str, tuple[str, ...] | None]:
    """Ordinal columns with the order of their values, lowest first; None where their numbers order them.

    Args:
        ordinal: "COLUMN" or "COLUMN=FIRST,SECOND,...", several of these, or a mapping from column to values or None.

    Raises:
        ValueError: No name, a column given twice, fewer than two values, or a value given twice.
    """
    if isinstance(ordinal, Mapping):
        pairs = [
            (column, None if order is None else [str(value) for value in order]) for column, order in ordinal.items()
        ]
    else:
        texts = [ordinal] if isinstance(ordinal, str) else list(ordinal or ())
        split = [text.partition("=") for text in texts]
        pairs = [
            (column.strip(), [value.strip() for value in values.split(",")] if equals else None)
            for column, equals, values in split
        ]
    columns: dict[str, tuple[str, ...] | None] = {}
    for column, order in pairs:
        if not column or column in columns:
            problem = f"names {column!r} twice" if column else "has no column"
            raise ValueError(f'ordinal {problem}; write "finding" or "finding=normal,mild,severe"')
        if order is not None and (len(order) < 2 or len(set(order)) < len(order) or not all(order)):
            raise ValueError(f"the order of {column!r} needs two or more different values, not {','.join(order)!r}")
        columns[column] = None if order is None else tuple(order)
    return columns


def order_grades(values: set[str], order: Sequence[str] | None = None) -> tuple[str, ...] | None:
    """`values` from the lowest to the highest; None where they are no grades.

    Args:
        values: Of one column (within one outer value).
        order: All grades; None takes the number at the end of each value.
    """
    if len(values) < 2:
        return None
    if order is not None:
        return tuple(order) if values <= set(order) else None
    numbers = {value: match for value in values if (match := _NUMBER_AT_THE_END.search(value))}
    if len(numbers) < len(values) or len({float(match.group()) for match in numbers.values()}) < len(values):
        return None
    return tuple(sorted(values, key=lambda value: float(numbers[value].group())))


def find_grades(
    column: str,
    order: Sequence[str] | None,
    labels: Sequence[str | None],
    within: Sequence[str | None] | None = None,
    wanted: set[str] | None = None,
) -> dict[str, tuple[str, ...]]:
    """Grades of a column of training images for each outer value that has them ("" for a column that is not nested).

    Args:
        column: Its name, for errors.
        order: See `order_grades`.
        labels: Its value for each training image.
        within: The outer value of each, for a nested column.
        wanted: Outer values that are evaluated; None for all.

    Raises:
        ValueError: None of them has grades, or `order` has none of the values; the message lists the values.
    """
    values: dict[str, set[str]] = {}
    for label, outer in zip(labels, [""] * len(labels) if within is None else within, strict=True):
        if label is not None and outer is not None and (wanted is None or outer in wanted):
            values.setdefault(outer, set()).add(label)
    grades = {outer: found for outer, own in sorted(values.items()) if (found := order_grades(own, order)) is not None}
    if grades:
        return grades
    known = sorted(set().union(*values.values()))
    listed = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "") if known else "none"
    if order is None:
        raise ValueError(
            f"the values of {column!r} are no grades: not all end in a number of their own: {listed}; "
            f'give the order, as in ordinal="{column}=normal,mild,severe"'
        )
    raise ValueError(f"the order of {column!r} does not cover its values: {listed}; given: {', '.join(order)}")
