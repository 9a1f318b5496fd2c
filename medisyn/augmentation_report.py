"""The report of an augmentation as Markdown: what was made and kept, how diverse it is, and what it is worth.

- What the selection is worth stands first: every gain with its interval and the p of two paired tests.
- A real amount is the share of the labels that was used (5 %), not of the small set.

    text = format_augmentation(report)      # of `medisyn.augmentation.augment`
"""

from collections.abc import Mapping
from typing import Any

from .evaluation.presentation import markdown_table
from .evaluation.utility_report import REGIME_NAMES, format_utility
from .generation.selection_report import MEASURES

WORTH = ("classifier", "regime", "selected, against", "accuracy", "p, paired bootstrap", "p, McNemar")


def format_augmentation(report: Mapping) -> str:
    """The report as Markdown."""
    generator, selection, dataset = report["generator"], report["selection"], report["dataset"]
    steps = [f"- `{step['rule']}`: {step['after']} of {step['before']} left" for step in selection["steps"]]
    warnings = [f"- WARNING: {text}" for text in selection["warnings"]]
    kept = ", ".join(
        f"{label}: {number} of {selection['images'][label]}" for label, number in selection["kept"].items()
    )
    small = ", ".join(f"{label} {number}" for label, number in report["labelled_images"].items())
    settings = ", ".join(f"{name} {value}" for name, value in generator["sampling"].items() if value is not None)
    facts = [
        f"- Labelled images: {small} ({100 * report['label_fraction']:.3g} % of the labels, label seed "
        f"{report['label_seed']}).",
        f"- Generator: {generator['model']}, asked by {generator['condition']} (such as: {generator['example']}); "
        f"seeds {generator['seeds'][0]} to {generator['seeds'][1]}{'; ' + settings if settings else ''}.",
        *_origin_lines(generator),
        f"- Augmented set: {dataset['real']} real and {dataset['synthetic']} selected synthetic images "
        f"({dataset['format']}).",
        *(f"- WARNING: {text}." for text in report["warnings"]),
    ]
    worth = _worth(report["utility"])
    parts = [
        "# Augmentation of a small labelled set",
        "\n".join(facts),
        *(["## What the selection is worth", worth] if worth else []),
        "## Selection",
        "\n".join([*steps, f"- Kept: {kept}", _diversity_line(selection["diversity"]["overall"]), *warnings]),
        format_utility(report["utility"])
        .replace("\n## ", "\n### ")
        .replace("# Utility", "## Utility", 1)
        .replace("(utility.png)", "(utility/utility.png)"),
    ]
    return "\n\n".join(parts)


def _origin_lines(generator: Mapping) -> list[str]:
    """Which real images candidates were made of, if of any; what guessed classes; what judged, if not a probe."""
    strategy, guessed, judge = (generator[name] for name in ("strategy", "pseudo_labels", "judge"))
    lines = []
    if strategy is not None:
        whose = "the labelled images" + (f" and of those that {guessed} has guessed" if guessed else "")
        lines.append(f"- Made by {strategy} of {whose}: each names its parents in metadata.jsonl.")
    if guessed is not None:
        lines.append(f"- Guessed images: real ones without a label, with the class that {guessed} has guessed.")
    if judge is not None:
        lines.append(f"- Confidence of the selection: that of the network of {judge}.")
    return lines


def with_share(utility: Mapping[str, Any], label_fraction: float) -> dict[str, Any]:
    """A report of utility on a small set, its amounts as shares of all labels in place of 1 (all of the small set)."""
    return {**utility, "results": [row | {"amount": label_fraction} for row in utility["results"]]}


def _worth(utility: Mapping) -> str:
    """A row for the selection against real images only and against each other pool, by classifier and regime."""
    rows = []
    for row in utility["results"]:
        against = {"real only": row["gain"], **row["against"]} if row["strategy"] == "selected" else {}
        for other, gain in against.items():
            if gain is not None:
                found = gain["accuracy"]
                bounds = "" if found["interval"] is None else " [{:+.3f}, {:+.3f}]".format(*found["interval"])
                tests = [_p(found["p"]), _p(found["mcnemar"]["p"])]
                place = [row["classifier"], REGIME_NAMES[row["regime"]], other]
                rows.append([*place, f"{found['gain']:+.3f}{bounds}", *tests])
    return markdown_table(list(WORTH), rows) if rows else ""


def _diversity_line(overall: Mapping) -> str:
    measures = [
        f"{name.replace('_', ' ')} {', '.join(_number(overall[part][name]) for part in ('after', 'random', 'before'))}"
        for name in sorted(MEASURES, key=("coverage", "recall", "mean_pairwise_distance", "vendi_score").index)
    ]
    return f"- Diversity (selected, a random selection of the same size, all candidates): {'; '.join(measures)}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _p(value: float | None) -> str:
    return "–" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"
