"""The measured utility of synthetic images as Markdown, CSV, JSON and a plot.

- Every score has its interval, every gain its interval and the p of named paired tests; what a reader must know to
  judge them stands below.
- The plot needs matplotlib (`pip install medisyn[eval]`); without it the report says that there is none.

    write_utility(report, Path("outputs/utility"))      # utility.md, utility.json, utility.csv, utility.png
"""

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..generation.provenance import atomic_file
from .presentation import markdown_table

logger = logging.getLogger(__name__)

SHOWN = {"accuracy": "accuracy", "macro_f1": "macro-F1", "auc_macro": "macro AUC"}
REGIME_NAMES = {
    "real": "real only",
    "synthetic": "synthetic only",
    "both": "real + synthetic",
    "pretrain": "synthetic, then real",
}
NO_PLOT = "There is no plot: it needs matplotlib (pip install medisyn[eval])."


def write_utility(report: Mapping, out: Path) -> None:
    """Write `utility.json`, `.md`, `.csv` and, with matplotlib, `.png`; each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    with_plot = find_spec("matplotlib") is not None
    if not with_plot:
        logger.warning(NO_PLOT)
    texts = {"utility.json": json.dumps(report, indent=2) + "\n", "utility.md": format_utility(report, with_plot)}
    for name, text in texts.items():
        with atomic_file(out / name) as partial:
            partial.write_text(text, encoding="utf-8")
    with atomic_file(out / "utility.csv") as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        rows = flat_rows(report)
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if with_plot:
        with atomic_file(out / "utility.png") as partial:
            draw_plot(report["results"], partial)


def format_utility(report: Mapping, with_plot: bool = True) -> str:
    """The report as Markdown that reads well as plain text."""
    settings, images = report["settings"], report["images"]
    counts = [
        [name, *(str(of.get(label, 0)) for label in settings["classes"]), str(sum(of.values()))]
        for name, of in images.items()
        if of is not None
    ]
    parts = [
        "# Utility of synthetic images",
        "## Images",
        markdown_table(["images", *settings["classes"], "all"], counts),
        "## Scores",
        "Mean over folds [95 % interval].",
        markdown_table(
            ["classifier", "real", "regime", "strategy", "ratio", "synthetic", *SHOWN.values()],
            [_place(row) + [_value(row["scores"][name]) for name in SHOWN] for row in report["results"]],
        ),
    ]
    header = ["classifier", "real", "regime", "strategy", "ratio", "synthetic"]
    gains = [_place(row) + _gains(row["gain"]) for row in report["results"] if row["gain"] is not None]
    if gains:
        parts += [
            "## Gain over real images only",
            "Difference [95 % interval] (p of the paired bootstrap; p of the corrected resampled t test over folds). "
            "McNemar: images that only this classifier gets right, that only the other one does, and p.",
            markdown_table([*header, *SHOWN.values(), "McNemar"], gains),
        ]
    pairs = [
        _place(row) + [other] + _gains(gain) for row in report["results"] for other, gain in row["against"].items()
    ]
    if pairs:
        parts += [
            "## Strategy against strategy",
            "As above, in place of real images only the other strategy with the same number of real images.",
            markdown_table([*header, "other", *SHOWN.values(), "McNemar"], pairs),
        ]
    parts += ["## AUC of each class", _auc_table(report["results"])]
    if with_plot:
        parts.append("![scores over the number of real images](utility.png)")
    parts += ["## Notes", "\n".join(f"- {note}" for note in notes(report, with_plot))]
    return "\n\n".join(parts) + "\n"


def notes(report: Mapping, with_plot: bool = True) -> list[str]:
    """What a reader must know to judge the numbers."""
    settings, overlap = report["settings"], report["overlap"]
    learnt = overlap["generators_learnt_labels"]
    with_test = report["sources"]["test"] is not None
    folds = settings["folds"]
    comparisons = sum(row["gain"] is not None for row in report["results"])
    asked = (
        "All folds are asked about the same test images; intervals resample patients and folds (pigeonhole bootstrap)."
        if with_test
        else "Each fold is asked about the patients that it holds out; intervals resample patients."
    )
    whom = "patient" if report["patients_known"] else "image (patients are not known)"
    how = f"{folds} fold{'s' * (folds != 1)} by {whom}, seed {settings['seed']}. {asked}"
    if settings["fold_kind"] == "seeds":
        how = (
            f"{folds} folds that learn from the same images (label seed {settings['label_seed']}) with another seed: "
            f"a generator that has learnt from all of these labels must not be compared with fewer. {asked}"
        )
    found = [
        how,
        "Within a fold, all regimes share the real images, the seed and the number of optimizer steps; for a ratio, "
        "synthetic images come in the proportions of the real classes.",
        f"McNemar's test asks {'the mean probability of the folds' if with_test else 'each fold'} and takes images "
        "for independent; where patients have several images, trust the bootstrap, which resamples patients. The t "
        "test is corrected for overlapping training sets (Nadeau & Bengio 2003).",
    ]
    if comparisons:
        found.append(f"p is not corrected for the {comparisons} comparisons of this table.")
    found += [_classifier_note(each, settings) for each in report["classifiers"]]
    shares = sorted({row["amount"] for row in report["results"] if row["amount"] <= 1})
    if shares and settings["fold_kind"] == "labels":
        found.append(
            f"Of {', '.join(f'{share:.3g}' for share in shares)} of the labels (label seed {settings['label_seed']}), "
            "each fold leaves out its part; the column `real` is what is left."
        )
    if with_test:
        absent = sorted(set(settings["classes"]) - set(report["images"]["test"]))
        if absent:
            found.append(f"The test images have no {', '.join(absent)}: macro scores are over the other classes.")
    if overlap["generators_without_record"]:
        names = ", ".join(overlap["generators_without_record"])
        found.append(f"LEAKAGE WAS NOT CHECKED against {names}: its training images are not known.")
    if not settings["generators"] and comparisons:
        found.append("LEAKAGE WAS NOT CHECKED against the training images of a generator: none was named.")
    if overlap["generators_with_record"]:
        others = "" if any(learnt.values()) else "; it may have seen others of their data set"
        others += " without labels" if others and None not in learnt.values() else ""
        found.append(
            "No test image is among the generator's training images (by content hash). Of the labelled images, "
            f"{overlap['labelled_images_of_generator']} are{others}."
        )
    if any(learnt.values()):
        names = ", ".join(name for name, has in learnt.items() if has)
        found.append(
            f"{names} takes text or labels, so it has learnt from labelled images, perhaps from more of this data set "
            "than a fold has: what the synthetic images gain, those labels gain too."
        )
    if overlap["left_out"]:
        found.append(f"{overlap['left_out']} test images were no strangers and were left out.")
    return found if with_plot else [*found, NO_PLOT]


def summary_table(report: Mapping) -> str:
    """The scores of every cell, with the gain over real images only and the p of its paired bootstrap, as Markdown."""
    results = report["results"]
    shown = {name: title for name, title in SHOWN.items() if all(name in row["scores"] for row in results)}

    def cell(row: Mapping, name: str) -> str:
        value, gain = f"{row['scores'][name]['value']:.3f}", (row["gain"] or {}).get(name)
        return value if gain is None else f"{value} ({gain['gain']:+.3f}, p {_p(gain['p'])})"

    header = ["classifier", "real", "regime", "strategy", "ratio", "synthetic", *shown.values()]
    return markdown_table(header, [_place(row) + [cell(row, name) for name in shown] for row in results])


def flat_rows(report: Mapping) -> list[dict[str, Any]]:
    """One row per classifier, cell and score, for spreadsheets."""
    rows = []
    for result in report["results"]:
        for score, found in result["scores"].items():
            gain = (result["gain"] or {}).get(score, {})
            row = {key: result[key] for key in ("classifier", "amount", "regime", "strategy", "ratio")}
            row |= {key: result[key] for key in ("real_images", "synthetic_images", "test_images")}
            row |= {"score": score, "value": found["value"], "fold_deviation": found["fold_deviation"]}
            row |= dict(zip(("low", "high"), found["interval"] or (None, None), strict=True))
            row |= {"gain": gain.get("gain"), "p_bootstrap": gain.get("p")}
            row |= dict(zip(("gain_low", "gain_high"), gain.get("interval") or (None, None), strict=True))
            row["p_corrected_t"] = (gain.get("corrected_t") or {}).get("p")
            row["p_mcnemar"] = gain.get("mcnemar", {}).get("p")
            rows.append(row)
    return rows


def draw_plot(results: Sequence[Mapping], file: Path) -> None:
    """Scores over the number of real images: a column per classifier and regime, a line per strategy and ratio."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["classifier"], row["regime"]) for row in results if row["regime"] != "real"))
    panels = panels or list(dict.fromkeys((row["classifier"], "real") for row in results))
    amounts = list(dict.fromkeys(row["amount"] for row in results))
    figure = Figure(figsize=(1.5 + 3.2 * len(panels), 1.5 + 2.4 * len(SHOWN)), layout="constrained")
    axes = figure.subplots(len(SHOWN), len(panels), sharex=True, sharey="row", squeeze=False)
    for column, (classifier, regime) in enumerate(panels):
        own = [row for row in results if row["classifier"] == classifier]
        lines = {"real only": [row for row in own if row["regime"] == "real"]}
        for row in own:
            if row["regime"] == regime != "real":
                lines.setdefault(_line_name(row), []).append(row)
        for position, (score, title) in enumerate(SHOWN.items()):
            axis = axes[position][column]
            for number, (name, rows) in enumerate(lines.items()):
                shift = 0.5 * (number - (len(lines) - 1) / 2) / len(lines)
                places = [amounts.index(row["amount"]) + shift for row in rows]
                values = [row["scores"][score]["value"] for row in rows]
                bounds = [
                    row["scores"][score]["interval"] or (value, value) for row, value in zip(rows, values, strict=True)
                ]
                errors = [
                    [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)],
                    [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)],
                ]
                style = {"color": "black", "linestyle": "--"} if number == 0 else {}
                axis.errorbar(places, values, errors, marker="o", markersize=4, capsize=2, label=name, **style)
            axis.grid(alpha=0.3)
            if position == 0:
                axis.set_title(f"{classifier}: {REGIME_NAMES[regime]}", fontsize=10)
            if column == 0:
                axis.set_ylabel(title)
        axes[-1][column].set_xticks(range(len(amounts)), [_amount(amount) for amount in amounts])
        axes[-1][column].set_xlabel("real images")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def _amount(amount: float) -> str:
    return f"{100 * amount:.3g} %" if amount <= 1 else f"{amount:g}"


def _line_name(row: Mapping) -> str:
    return f"{row['strategy']}, " + ("all" if row["ratio"] is None else f"× {row['ratio']:g}")


def _place(row: Mapping) -> list[str]:
    real = _amount(row["amount"]) + (f" ({row['real_images']:.0f})" if row["amount"] <= 1 else "")
    ratio = "" if row["strategy"] is None else "all" if row["ratio"] is None else f"{row['ratio']:g}"
    synthetic = f"{row['synthetic_images']:.0f}"
    return [row["classifier"], real, REGIME_NAMES[row["regime"]], row["strategy"] or "", ratio, synthetic]


def _value(found: Mapping) -> str:
    deviation = "" if found["fold_deviation"] is None else f" ± {found['fold_deviation']:.3f}"
    return f"{found['value']:.3f}{_bounds(found)}{deviation}"


def _bounds(found: Mapping, sign: str = "") -> str:
    return "" if found["interval"] is None else " [{:{s}.3f}, {:{s}.3f}]".format(*found["interval"], s=sign)


def _gain(found: Mapping) -> str:
    over_folds = found.get("corrected_t")
    tests = [_p(found["p"]), "–" if over_folds is None else _p(over_folds["p"])]
    return f"{found['gain']:+.3f}{_bounds(found, '+')} ({'; '.join(tests)})"


def _p(value: float | None) -> str:
    return "–" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _gains(gain: Mapping) -> list[str]:
    test = gain["accuracy"]["mcnemar"]
    mcnemar = f"{test['first_only']} / {test['second_only']}, {_p(test['p'])}"
    return [_gain(gain[name]) for name in SHOWN] + [mcnemar]


def _auc_table(results: Sequence[Mapping]) -> str:
    names = [name for name in results[0]["scores"] if name.startswith("auc ")]
    header = ["classifier", "real", "regime", "strategy", "ratio", "synthetic"]
    rows = [_place(row) + [_value(row["scores"][name]) for name in names] for row in results]
    return markdown_table([*header, *(name.removeprefix("auc ") for name in names)], rows)


def _classifier_note(each: Mapping, settings: Mapping) -> str:
    both, pretrain, share = REGIME_NAMES["both"], REGIME_NAMES["pretrain"], f"{settings['synthetic_share']:.0%}"
    if each["classifier"] == "cnn":
        return (
            f"cnn: timm {each['model']} from scratch at {each['resolution']} px, {each['steps']} optimizer steps of "
            f"{each['batch_size']} images in every regime; in `{both}`, {share} of each batch are synthetic, in "
            f"`{pretrain}`, the first half of the steps are."
        )
    return (
        f"probe: logistic regression on frozen features of {each['extractor']}; in `{both}`, synthetic images have "
        f"{share} of the weight, in `{pretrain}`, their solution is the prior of the second fit."
    )
