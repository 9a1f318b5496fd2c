"""Overrides of a configuration on the command line: `train.steps=10`, `task.conditions.0.dropout=0.3`."""

from contextlib import suppress
from typing import Any

import yaml

NO_IS_A_WORD = frozenset(("train.mixed_precision",))  # where YAML 1.1 would read `no` as false


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one value, in place.

    - Sections that are missing or null are made; an item of a list is named by its place, counted from 0.
    - `train.mixed_precision=no` is the word; everywhere else `no` is false, as YAML has it.

    Args:
        tree: Nested dictionaries and lists, as YAML gives them.
        override: `a.b=c` with a YAML value.

    Raises:
        ValueError: not of that form, not YAML, a value where a section is meant, or no such place of a list.
    """
    name, equals, value = override.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"override {override!r} is not of the form key.subkey=value")
    *parents, last = name.strip().split(".")
    node: Any = tree
    for parent in parents:
        key = _key(node, parent, override)
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, (dict, list)):
            raise ValueError(f"override {override!r}: {parent} is a value, not a section")
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"override {override!r}: {value!r} is not a YAML value") from None
    if isinstance(read, str):  # YAML 1.1 reads 1e-4 as a string
        with suppress(ValueError):
            read = float(read)
    if name.strip() in NO_IS_A_WORD and value.strip() == "no":
        read = "no"
    node[_key(node, last, override)] = read


def _key(node: dict[str, Any] | list[Any], part: str, override: str) -> Any:
    """What a part of an override's name means in a section: a key, or in a list a place."""
    if isinstance(node, dict):
        return part
    if not part.isdecimal() or int(part) >= len(node):
        raise ValueError(f"override {override!r}: {part!r} is not a place of a list of {len(node)}, counted from 0")
    return int(part)
