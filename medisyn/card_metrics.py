"""The numbers of `report.json` of `medisyn evaluate` as a model card lists them.

Where a network of the domain judged as well (`medisyn.evaluation.judge`), its numbers stand beside those of the
extractor, under names of their own.

    metrics_of_report(json.loads(Path("outputs/evaluation/report.json").read_text()))[0]["value"]
"""

from collections.abc import Iterator, Mapping
from typing import Any


def metrics_of_report(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers of `report.json` that a card shows, each beside that of real images.

    Raises:
        ValueError: It is no report of `medisyn evaluate`.
    """
    try:
        return list(_metrics(report))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"report.json is not a report of medisyn evaluate: {error!r}") from None


def _metrics(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    extractor = str(report["extractor"]["spec"]).partition("@")[0]

    def metric(name: str, subset: str, values: Mapping[str, Any], images: int, judge: str) -> dict:
        value, real = values.get("synthetic"), values.get("real")
        return {"name": name, "subset": subset, "value": value, "real": real, "images": images, "extractor": judge}

    def agreement(columns: Mapping[str, Any], judge: str, suffix: str) -> Iterator[dict[str, Any]]:
        for column, result in columns.items():
            synthetic = result.get("synthetic", {}) if isinstance(result, Mapping) else {}
            if "accuracy" not in synthetic:
                continue
            for score, title in (("accuracy", "accuracy"), ("balanced_accuracy", "balanced accuracy")):
                values = {name: result.get(name, {}).get(score) for name in ("synthetic", "real")}
                name = f"agreement with the requested {column}, {title}{suffix}"
                yield metric(name, "all", values, synthetic["images"], judge)
            for subset, scores in synthetic.get("ordinal", {}).items():
                kappa = "quadratic_weighted_kappa"
                if kappa in scores:
                    real = result.get("real", {}).get("ordinal", {}).get(subset, {})
                    values = {"synthetic": scores[kappa], "real": real.get(kappa)}
                    name = f"{column}, quadratic-weighted kappa{suffix}"
                    yield metric(name, subset, values, scores["images"], judge)

    def fidelity(overall: Mapping[str, Any], judge: str, suffix: str) -> Iterator[dict[str, Any]]:
        if "omitted" in overall:
            return
        images = overall["images"]
        yield metric(f"Fréchet distance{suffix}", "all", overall["frechet_distance"], images, judge)
        kernel = {name: 1000 * overall["kernel_distance"][name] for name in ("synthetic", "real")}
        yield metric(f"kernel distance (KID) × 1000{suffix}", "all", kernel, images, judge)
        for score in ("precision", "recall", "density", "coverage"):
            yield metric(f"{score}{suffix}", "all", overall[score], images, judge)

    judges = [(report, extractor, "")]
    second = report.get("judge")
    if second is not None and "omitted" not in second:
        cnn = second["classifier"]
        judges.append((second, f"{cnn['model']} at {cnn['resolution']} px", ", by a CNN of the domain"))
    for part, *judge in judges:
        yield from agreement(part["agreement"], *judge)
    for part, *judge in judges:
        yield from fidelity(part["fidelity"]["overall"], *judge)
    nearest = report["nearest_training_image"]
    if "omitted" not in nearest:
        for score, title in (("percentile_1", "1st percentile"), ("median", "median")):
            values = {name: nearest[name][score] for name in ("synthetic", "real")}
            name = f"cosine distance to the nearest training image, {title}"
            yield metric(name, "all", values, nearest["images"], extractor)
