r"""A smaller data set from a folder of generated images: `medisyn select`, from the files to the files.

Notable choices:

* The result is a folder like the first one: images, and `metadata.jsonl` with every column (prompt, labels, seed,
  model hash, ...) as it was, so all that reads generated images reads it. The bytes of an image do not change.
* Beside them `selection.jsonl`, a line for every image of the first folder, and `selection.json`, the report.
* The folder appears whole or not at all. The same command again finds it finished; a folder with anything else in it
  is refused, and `overwrite` replaces only what a selection made.
* All images are brought to the size of the generated ones before features are taken, as in `medisyn evaluate`.

    select_folder("outputs/run", "data/labelled", "finding", "confidence:quantile=0.5", out="outputs/selected")
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from ..config import DataConfig
from ..data.loading import ImageDataset
from ..evaluation.features import extract_features, load_extractor
from ..evaluation.inputs import Images, groups_of, nested_values, open_images, source_names
from .output_folder import METADATA, check_writable
from .provenance import SOFTWARE, atomic_file, write_json_lines
from .selection import DEFAULT_RULES, WARN_BELOW, Selection, select
from .selection_parsing import Rules, parse_rules
from .selection_rules import check_real_images
from .selection_search import check_search

if TYPE_CHECKING:
    from ..evaluation.judge import Judge

AUDIT = "selection.jsonl"
REPORT = "selection.json"
LINKS = ("copy", "hardlink", "symlink")


def select_folder(
    folder: str | Path,
    real: Images,
    label_column: str | Sequence[str],
    rules: Rules = DEFAULT_RULES,
    *,
    out: str | Path,
    train: Images | None = None,
    held_out: Images | None = None,
    real_label_column: str | Sequence[str] | None = None,
    where: Mapping[str, str] | None = None,
    extractor: str = "inception",
    cache_dir: str | Path | None = None,
    group_column: str | None = None,
    judge: "Judge | None" = None,
    link: str = "copy",
    baseline: str | Path | None = None,
    seed: int = 0,
    warn_below: float = WARN_BELOW,
    search: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> Selection:
    """Select among the images of a folder, and write the selected ones with the audit to `out`.

    Args:
        folder: What `medisyn generate` wrote: images and `metadata.jsonl`.
        real: Labelled real images, of one source or several. A string may end in `@SPLIT`.
        label_column: Class of the generated images, "finding" or "labels.dr_grade"; several nest ("CT / nodule").
        rules: See `parse_rules`.
        out: Folder to write.
        train: Real images that the generator was trained on, beside `real`; copies of either are dropped.
        held_out: Real images that are in neither; they calibrate `duplicates:auto`.
        real_label_column: Where it has another name among the real images.
        where: Column -> value: only such images of `real`.
        extractor: One of `medisyn.evaluation.EXTRACTORS`.
        cache_dir: Folder that keeps features, so that an interrupted or changed selection takes them from there.
        group_column: Patient column of the real images; None is `group_id`, used where they have it.
        judge: What `confidence` asks in place of a classifier on the features of the real images.
        link: How images get to `out`: "copy", "hardlink" or "symlink" (relative).
        baseline: A second folder, for a random selection with as many images of each class.
        seed: Of random draws.
        warn_below: See `select`.
        search: See `select`.
        overwrite: Replace an earlier selection in `out` (and `baseline`).
        progress: Show progress bars.

    Raises:
        FileNotFoundError: A folder, source or image is missing.
        FileExistsError: `out` holds something else.
        ValueError: Unknown rules, columns or classes; an empty folder; no image passes the rules.
        OSError: Images cannot be written, or not be linked.
    """
    out, targets = Path(out), [Path(path) for path in (out, baseline) if path is not None]
    chain = parse_rules(rules)
    check_search(search)
    if link not in LINKS:
        raise ValueError(f"unknown way {link!r} to place images; valid: {', '.join(LINKS)}")
    if len({path.resolve() for path in (Path(folder), *targets)}) <= len(targets):
        raise ValueError(f"{out}: the selection, its baseline and the generated images need folders of their own")
    for target in targets:
        check_writable(target)
        _check_replaceable(target)
    lines = read_lines(Path(folder))
    images = _open_lines(Path(folder), lines)
    own_columns = _columns(label_column)
    labels = _labels_of_lines(lines, own_columns, Path(folder))
    columns = own_columns if real_label_column is None else _columns(real_label_column)
    real_images, real_labels, unlabelled = _labelled(real, columns, where or {})
    if group_column is not None and group_column not in real_images.column_names:
        known = ", ".join(real_images.column_names)
        raise ValueError(f"the real images have no column {group_column!r} of patients; columns: {known}")
    missing = sorted(set(labels) - set(real_labels))
    if missing:
        known = ", ".join(sorted(set(real_labels)))
        raise ValueError(f"no real image has the class {missing[0]!r}; classes of the real images: {known}")
    check_real_images(chain, labels, real_labels, judge is not None)  # before the features, which take the time
    features_of = load_extractor(extractor)
    features_of.resolution = min(images.image(0).size)
    sets, counts = _sets(images, real_images, train, held_out)
    vectors = {name: extract_features(features_of, each, cache_dir, progress=progress) for name, each in sets.items()}
    groups = {name: groups_of(sets[name], group_column or "group_id") for name in ("real", "train") if name in sets}
    selection = select(
        vectors["generated"],
        labels,
        vectors["real"],
        real_labels,
        vectors.get("train"),
        chain,
        real_groups=groups["real"],
        train_groups=groups.get("train"),
        held_out_features=vectors.get("held_out"),
        names=[line["file_name"] for line in lines],
        seed=seed,
        warn_below=warn_below,
        search=search,
        **({} if judge is None else judge.verdict(images)),
    )
    if not len(selection.kept):
        strictest = max(selection.report["steps"], key=lambda step: step["dropped"])
        raise ValueError(
            f"no image passes the rules {', '.join(selection.report['rules'])}; {strictest['rule']} alone dropped "
            f"{strictest['dropped']} of {strictest['before']}; nothing was written"
        )
    for record, content in zip(selection.records, images.hashes(), strict=True):
        record["content_hash"] = content
    sources: dict[str, Any] = {"folder": str(folder), "real": source_names(real_images), "label_column": own_columns}
    sources |= {name: source_names(sets[name]) for name in ("train", "held_out") if name in sets}
    facts: dict[str, Any] = {
        "software": SOFTWARE,
        "sources": sources | ({"where": dict(where)} if where else {}),
        "counts": counts | {"real_without_class": unlabelled},
        "extractor": {
            "spec": extractor,
            "weights_sha256": features_of.weights_sha256,
            "resolution": features_of.resolution,
        },
    }
    chosen = [lines[index] for index in selection.kept]
    about = facts | ({} if judge is None else {"judge": judge.identity()}) | {"kind": "selection"} | selection.report
    _write(out, Path(folder), chosen, about, selection, link, overwrite)
    if baseline is not None:
        drawn = [lines[index] for index in selection.baseline]
        facts |= {"kind": "random baseline", "seed": seed, "kept": selection.report["kept"]}
        _write(Path(baseline), Path(folder), drawn, facts, None, link, overwrite)
    return selection


# --- what is read ----------------------------------------------------------------------------------------------------


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's `metadata.jsonl`, each with the `file_name` of an image that is there.

    Raises:
        FileNotFoundError: No such folder, no `metadata.jsonl`, or an image is missing.
        ValueError: A damaged line, a name given twice or outside the folder, or no line.
    """
    file = folder / METADATA
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}")
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {METADATA}: it is no folder of generated images")
    lines: list[dict[str, Any]] = []
    known: set[str] = set()
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            name = line["file_name"]
            right = isinstance(name, str) and bool(name) and name not in known
        except (ValueError, KeyError, TypeError):
            right = False
        if not right or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"line {number} of {file} is not the metadata of an image of its own")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing, which {METADATA} names")
        known.add(name)
        lines.append(line)
    if not lines:
        raise ValueError(f"{file} names no images")
    return lines


def _open_lines(folder: Path, lines: Sequence[Mapping[str, Any]]) -> ImageDataset:
    table = datasets.Dataset.from_dict({"image": [str(folder / line["file_name"]) for line in lines]})
    table = table.cast_column("image", datasets.Image(decode=False))
    return ImageDataset(table, DataConfig(source=str(folder), caption_column=None))


def _columns(column: str | Sequence[str]) -> list[str]:
    columns = [part.strip() for part in (column.split(",") if isinstance(column, str) else column)]
    if not columns or not all(columns):
        raise ValueError(f"the label column must be names joined by commas, not {column!r}")
    return columns


def _labels_of_lines(lines: Sequence[Mapping[str, Any]], columns: Sequence[str], folder: Path) -> list[str]:
    """The joint class of each image, "CT / nodule"."""
    labels = []
    for line in lines:
        values = []
        for column in columns:
            value, parent = line.get(column), line.get(column.partition(".")[0])
            if value is None and isinstance(parent, Mapping):
                value = parent.get(column.partition(".")[2])
            if value is None or isinstance(value, Mapping | list):
                known = ", ".join(sorted(set(line) - {"file_name"}))
                what = f"{line['file_name']} of {folder} has no class in the column {column!r}"
                raise ValueError(f"{what}; its columns: {known}")
            values.append(str(value))
        labels.append(" / ".join(values))
    return labels


def _sets(
    images: ImageDataset, real: ImageDataset, train: Images | None, held_out: Images | None
) -> tuple[dict[str, ImageDataset], dict[str, int]]:
    """All sets by name without images that an earlier one has (by their pixels), and how many of each there are."""
    sets = {"generated": images, "real": real}
    counts = {name: len(each) for name, each in sets.items()}
    seen = set(real.hashes())
    for name, source in (("train", train), ("held_out", held_out)):
        if source is None:
            continue
        given = open_images(source)
        new = np.array([content not in seen for content in given.hashes()], dtype=bool)
        seen |= set(given.hashes())
        counts |= {name: int(new.sum()), f"{name}_copies_left_out": int((~new).sum())}
        if new.any():
            sets[name] = given.select(new)
        elif name == "held_out":
            raise ValueError(f"all {len(given)} held-out images are among the real or training images")
    return sets, counts


def _labelled(real: Images, columns: Sequence[str], where: Mapping[str, str]) -> tuple[ImageDataset, list[str], int]:
    """Real images that have a class, their classes, and how many have none."""
    images = open_images(real, (*columns, *where))
    for column, wanted in where.items():
        values = [str(value) for value in images.column(column)]
        if wanted not in values:
            raise ValueError(f"no real image has {column}={wanted!r}; values: {', '.join(sorted(set(values))[:30])}")
        images = images.select(np.array([value == wanted for value in values], dtype=bool))
    classes = nested_values(images, columns)[columns[-1]]
    known = np.array([label is not None for label in classes], dtype=bool)
    if not known.any():
        raise ValueError(f"no real image has a class in the column {columns[-1]!r}")
    return images.select(known), [label for label in classes if label is not None], int((~known).sum())


# --- what is written -------------------------------------------------------------------------------------------------


def _write(
    out: Path,
    folder: Path,
    chosen: Sequence[Mapping[str, Any]],
    report: Mapping[str, Any],
    selection: Selection | None,
    link: str,
    overwrite: bool,
) -> None:
    """Assemble the data set in a hidden neighbour of `out` and move it there; an equal one stays untouched."""
    partial = out.parent / f".{out.name}.partial"
    names = [line["file_name"] for line in chosen]
    text = json.dumps({**report, "file_names": names}, indent=2, ensure_ascii=False) + "\n"
    if (out / REPORT).is_file():
        same = (out / REPORT).read_text(encoding="utf-8") == text
        if same and all((out / name).is_file() for name in (*names, METADATA)):
            return
        if not same and not overwrite:
            raise FileExistsError(f"{out} holds another selection; choose another folder, or overwrite it")
    if partial.exists():  # of a run that was killed
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    for line in chosen:
        target = partial / line["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        _place(folder / line["file_name"], target, out / line["file_name"], link)
    write_json_lines(partial / METADATA, chosen)
    if selection is not None:
        selection.write_audit(partial / AUDIT)
    with atomic_file(partial / REPORT) as file:
        file.write_text(text, encoding="utf-8")
    if out.exists():
        old = out.parent / f".{out.name}.replaced"
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)
    else:
        partial.rename(out)


def _place(source: Path, target: Path, final: Path, link: str) -> None:
    if link == "copy":
        shutil.copy2(source, target)
    elif link == "hardlink":
        try:
            os.link(source.resolve(), target)
        except OSError as error:
            raise OSError(error.errno, f"cannot link ({error.strerror}); use copy", str(source)) from None
    else:
        target.symlink_to(os.path.relpath(source.resolve(), final.parent.resolve()))


def _check_replaceable(out: Path) -> None:
    """Refuse, before anything is computed, a folder that no selection made."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise NotADirectoryError(f"{out} is not a folder; choose another one")
    if not out.exists() or not any(out.iterdir()):
        return
    made: set[str] = set()
    try:
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
        if str(report["software"]).startswith("medisyn "):
            made = {METADATA, AUDIT, REPORT, *report["file_names"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    others = sorted(str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir() or path.is_symlink())
    foreign = [name for name in others if name not in made]
    if foreign:
        raise FileExistsError(f"{out} holds {foreign[0]}, which no selection made; choose another folder")
