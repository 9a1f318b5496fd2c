"""The page of `medisyn.evaluation.variations`: Markdown that reads well as plain text.

print(format_variations(json.loads(Path("outputs/variations/report.json").read_text())))
"""

from collections.abc import Mapping

from .presentation import describe_judge, markdown_table


def format_variations(report: Mapping) -> str:
    """The report as three tables and what it should show."""
    images = ", ".join(f"{count} {name}" for name, count in report["images"].items())
    extractor = report["extractor"]
    parts = [
        f"# Variations by {report['strategy']} of {report['model']['name']}",
        f"{images} images, compared at {extractor['resolution']} px. Features: `{extractor['spec']}`.",
        "## Agreement with the class of the parent",
        _agreement(report["agreement"]),
        *_judged(report.get("judge")),
        "## Cosine similarity to the parent",
        _similarity(report["similarity"]),
        "## Fréchet distance to real images of other patients",
        _distances(report["fidelity"]),
        "## Checks",
        "\n".join(f"- {name}: {'yes' if holds else 'NO'}" for name, holds in report["checks"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def _agreement(agreement: Mapping) -> str:
    rows = []
    for column, scores in agreement.items():
        for name in ("parents", "variations", "prompted"):
            own = scores.get(name, {})
            if "accuracy" in own:
                ratio = scores.get("ratio", {}).get(name)
                cells = [_with_interval(own, "accuracy"), _with_interval(own, "balanced_accuracy")]
                rows.append([column, name, str(own["images"]), *cells, "" if ratio is None else f"{ratio:.2f}"])
            elif reason := own.get("omitted") or scores.get("omitted"):
                rows.append([column, name, f"omitted: {reason}"])
    header = ["column", "images", "N", "accuracy [95 %]", "balanced accuracy [95 %]", "of the parents'"]
    return markdown_table(header, rows)


def _judged(found: Mapping | None) -> list[str]:
    """The section of a network that learnt from the training images, if there was one."""
    if found is None:
        return []
    return [
        "## Agreement by a network of the domain",
        describe_judge(found["classifier"]),
        _agreement(found["agreement"]),
    ]


def _similarity(similarity: Mapping) -> str:
    rows = []
    for name, scores in similarity.items():
        if "omitted" in scores:
            rows.append([name, f"omitted: {scores['omitted']}"])
            continue
        shares = [
            f"{scores['share_above'][other]:.0%}" if other in scores["share_above"] else "" for other in similarity
        ]
        rows.append([name, str(scores["images"]), _with_interval(scores, "median"), *shares])
    return markdown_table(["images", "N", "median [95 %]", *(f"above {name}" for name in similarity)], rows)


def _distances(fidelity: Mapping) -> str:
    rows = []
    for name, scores in fidelity.items():
        if "omitted" in scores:
            rows.append([name, f"omitted: {scores['omitted']}"])
            continue
        distance = scores["frechet_distance"]
        numbers = [f"{distance[key]:.2f}" for key in ("synthetic", "real", "ratio")]
        rows.append([name, str(scores["images"]), *numbers])
    return markdown_table(["images", "N", "distance", "real to real", "ratio"], rows)


def _with_interval(scores: Mapping, name: str) -> str:
    low, high = scores[f"{name}_interval"]
    return f"{scores[name]:.3f} [{low:.3f}, {high:.3f}]"
