"""How the rules of a selection are written: as one text, as a YAML file, or as a list.

- One text for the command line: rules joined by commas, each with what is behind its colon.
- YAML where the command line ends: a threshold for each class, names with commas in them.
- Unknown names and options are errors that list the valid ones.

    parse_rules("confidence:quantile=0.5,duplicates:0.95,diverse:500")
    parse_rules([{"confidence": {"threshold": {"melanoma": 0.9, "naevus": 0.5}}}, "duplicates:auto"])
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

from .selection_pool import Rule
from .selection_rules import Centroid, Confidence, Duplicates
from .selection_subsets import Covariance, Diverse, Random

RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (Confidence, Centroid, Duplicates, Covariance, Diverse, Random)
}
# How each may be written; what follows the colon may be left out where the rule has a default.
FORMS = (
    "confidence:0.8",
    "confidence:quantile=0.3",
    "confidence:real=0.1",
    "centroid:0.5",
    "duplicates:0.95",
    "duplicates:auto",
    "covariance:200",
    "diverse:500",
    "random:500",
)
Rules: TypeAlias = str | Path | Sequence[str | Mapping[str, Any] | Rule]


def parse_rules(rules: Rules) -> list[Rule]:
    """Rules from text, a YAML file, or a list.

    Args:
        rules: "confidence:0.8,centroid:0.5" (see `FORMS`); a path that ends in `.yaml` or `.yml`, to a list or to a
            mapping with the key `rules`; or a list of such texts, of rules, and of mappings such as
            `{"confidence": {"threshold": {"melanoma": 0.9, "naevus": 0.5}}}` or `{"diverse": 500}`. Empty: no rule.

    Raises:
        ValueError: An unknown rule or option, or a value that is not one; the message lists the valid ones.
        FileNotFoundError: There is no such YAML file.
    """
    if isinstance(rules, Path) or (isinstance(rules, str) and rules.strip().lower().endswith((".yaml", ".yml"))):
        return parse_rules(_read_yaml(Path(rules)))
    if isinstance(rules, str):
        rules = [part for part in rules.split(",")] if rules.strip() else []
    if not isinstance(rules, Sequence):
        raise ValueError(f"rules must be a text or a list, not {rules!r}; for example: {', '.join(FORMS)}")
    return [_parse_rule(rule) for rule in rules]


def _read_yaml(path: Path) -> Any:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"no file of rules {str(path)!r}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if isinstance(content, Mapping) and set(content) == {"rules"}:
        content = content["rules"]
    if not isinstance(content, list):
        raise ValueError(f"{path} must be a list of rules, or a mapping with the one key rules")
    return content


def _parse_rule(rule: Any) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, str):
        name, colon, value = (part.strip() for part in rule.partition(":"))
        options: Any = _parse_text(value) if colon else {}
    elif isinstance(rule, Mapping) and len(rule) == 1:
        name, options = next(iter(rule.items()))
        options = {} if options is None else _parse_text(options) if isinstance(options, str) else options
    else:
        raise ValueError(f"a rule must be a text such as {FORMS[0]!r} or a mapping with one key, not {rule!r}")
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}; valid: {', '.join(RULES)} (for example {', '.join(FORMS)})")
    kind = RULES[name]
    first, *others = (option.name for option in fields(kind))  # type: ignore[arg-type]
    if not isinstance(options, Mapping):
        options = {first: options}
    if "auto" in options and name == "duplicates":  # auto=0.01
        options = {first: "auto", "rate": options["auto"]}
    unknown = sorted(set(map(str, options)) - {first, *others})
    if unknown:
        raise ValueError(f"the rule {name} has no option {unknown[0]!r}; valid: {', '.join([first, *others])}")
    return kind(**options)


def _parse_text(text: str) -> Any:
    """What follows the colon: a number, a word, or `key=value`."""
    key, equals, value = (part.strip() for part in text.partition("="))
    return {key: _number(value)} if equals else _number(key)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
