r"""Augmentation, end to end: a small labelled set in, an augmented one out, and what it is worth to a classifier.

Notable choices:

* Candidates are drawn for each class by what the model has: classifier guidance (`class_label`), a label condition, or
  a prompt; in the proportions of the labelled images, or as many of each class.
* Selection works on features of the candidates (`medisyn.generation.selection`). A random selection with as many
  images of each class, and all candidates, stand beside it: the three pools are measured against real images alone and
  against each other (`medisyn.evaluation.utility`).
* Test images must be strangers to classifier and generator. What the generator learnt without labels may hold the
  unlabelled rest of the same data set; so candidates are compared with all of `real`, not with the labelled share.
* A generator that learnt from other labels than these is refused (`medisyn.augmentation_checks`).
* By default all folds learn from all labelled images, with another seed: the generator has learnt from these labels,
  so a comparison with fewer of them would flatter it.
* The same call goes on where it stopped. Every synthetic image keeps its seed, condition and model hash.

    pipe = medisyn.load_pipeline("outputs/guided")
    augment("train.parquet", "validation.parquet", pipe, model="outputs/guided", label_fraction=0.05)
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .augmentation_candidates import (
    candidate_counts,
    candidate_requests,
    captions_by_class,
    check_strategy,
    guessed_images,
    relabelled,
)
from .augmentation_checks import check_labels, find_uncompared, keep_strangers
from .augmentation_report import format_augmentation, with_share
from .augmented_dataset import FORMATS, check_dataset_folder, write_dataset
from .evaluation.features import load_extractor
from .evaluation.inputs import Images, open_images
from .evaluation.utility import check_settings, measure_utility
from .evaluation.utility_cells import make_folds
from .evaluation.utility_classifier import Classifier
from .evaluation.utility_inputs import (
    LabelledImages,
    check_classes,
    check_test_classes,
    choose_labels,
    filter_images,
    generator_hashes,
    open_labelled,
)
from .evaluation.utility_report import write_utility
from .generation.class_requests import class_requests, condition_of
from .generation.output_folder import check_writable
from .generation.provenance import atomic_file
from .generation.selected_folder import select_folder
from .generation.selection import DEFAULT_RULES, Selection
from .generation.selection_parsing import Rules, parse_rules
from .generation.selection_rules import check_real_images
from .generation.synthesize import synthesize
from .prompts import choose
from .tasks.pseudo_labels import guessing_judge

if TYPE_CHECKING:
    from .pipelines.medisyn_pipeline import MediSynPipeline

logger = logging.getLogger(__name__)

POOLS = {"all candidates": "candidates", "random selection": "random", "selected": "selected"}  # name -> folder
PAIRS = [("selected", "random selection"), ("selected", "all candidates")]
GUESSED = "guessed images"  # real ones


def augment(
    real: Images,
    test: Images,
    pipe: "MediSynPipeline",
    *,
    model: str = "default",
    adapters: Mapping[str, float] | None = None,
    label_column: str = "finding",
    group_column: str | None = None,
    filter: Mapping[str, Sequence[str]] | None = None,
    classes: Sequence[str] = (),
    label_fraction: float = 1.0,
    label_seed: int = 0,
    condition: str | None = None,
    label_field: str | None = None,
    prompt: str | None = None,
    ratio: float = 10.0,
    balanced: bool = False,
    strategy: str | None = None,
    pseudo_labels: str | None = None,
    judge: str | None = None,
    sampling: Mapping[str, Any] | None = None,
    rules: Rules = DEFAULT_RULES,
    extractor: str = "inception",
    train: Images | None = None,
    classifiers: Sequence[Classifier] | None = None,
    folds: int = 5,
    fold_kind: str = "seeds",
    regimes: Sequence[str] = ("both", "pretrain"),
    synthetic_share: float = 0.5,
    drop_overlap: bool = False,
    dataset_format: str = "imagefolder",
    seed: int = 0,
    cache_dir: str | Path | None = None,
    out: str | Path = "outputs/augmented",
    progress: bool = False,
) -> dict:
    """Generate, select, write the augmented set, and measure what it is worth.

    `out` gets `candidates/`, `selected/` and `random/` (generated images), `dataset/` (real and selected images),
    `utility/` (the measurement), `augment.json` and `augment.md`.

    Args:
        real: Labelled real images.
        test: Real images of other patients.
        pipe: The model.
        model: Its name (folder, run, Hub name, "default"), whose training record is checked against the test images.
        adapters: Those on the pipeline, by name; their records are checked as well.
        label_column: Column of the class.
        group_column: Column of the patient; None: `group_id` where there is one.
        filter: Column -> values that are kept, of `real` and `test`.
        classes: What is told apart; empty: every class of `real`.
        label_fraction: Share of the labels to use, whole patients of every class (`stratified_subset`).
        label_seed: Of that share: the one that the generator was trained with.
        condition: One of `class_requests.CONDITIONS`; None: the first of them that has all classes.
        label_field: Field of the model's label schema; None: the one that has all classes.
        prompt: Template with `{label}`; None: the captions of the labelled images.
        ratio: Candidates for each labelled image.
        balanced: As many candidates of each class, in place of the proportions of the labelled images.
        strategy: How candidates are made of real images of their class (`medisyn.generation.strategies`), such as
            "sdedit:strength=0.6"; None: of none.
        pseudo_labels: Run of a latent classifier. The images whose class it has guessed are parents of the strategy as
            well, and are measured as they are, as one more pool: what they are worth without synthesis.
        judge: Run of a latent classifier with pseudo-labels: its network gives the confidence of the selection, in
            place of a probe of the labelled images.
        sampling: Further arguments of `synthesize`, such as `num_inference_steps`.
        rules: Of the selection.
        extractor: Features for the selection.
        train: Real images that the generator has seen; copies of them are dropped as well. None: all of `real`, also
            what the filter, the classes and the share of the labels leave out.
        classifiers: See `measure_utility`.
        folds: See `measure_utility`.
        fold_kind: See `measure_utility`.
        regimes: See `measure_utility`.
        synthetic_share: See `measure_utility`.
        drop_overlap: See `measure_utility`.
        dataset_format: One of `FORMATS`.
        seed: Candidate i is made with `seed + i`; also of selection, folds and training.
        cache_dir: Keeps features; None: in `out`.
        out: Folder of the results.
        progress: Show bars.

    Returns:
        The content of `augment.json`.

    Raises:
        ValueError: Bad settings; a single class, a class with one image, or one that the model does not know; test
            images that are no strangers; a generator that learnt from other labels; a selection that leaves a class
            empty.
        FileNotFoundError: A source does not exist.
        FileExistsError: `out` holds the candidates of another request, or a data set that was not made here.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    check_writable(out)
    choose("dataset_format", dataset_format, FORMATS)
    check_settings((label_fraction,), (None,), regimes, folds, fold_kind, True, synthetic_share)
    chain = parse_rules(rules)
    if not 0 < label_fraction <= 1:
        raise ValueError(f"label_fraction must be above 0 and at most 1, not {label_fraction:g}")
    if not 0 < ratio <= 1000:
        raise ValueError(f"ratio of candidates to labelled images must be above 0 and at most 1000, not {ratio:g}")
    made_by = None if strategy is None else check_strategy(pipe, strategy)
    load_extractor(extractor, pipe)  # a missing weights file must not cost an hour
    options: dict[str, Any] = {"group_column": group_column, "filter": filter}
    source = open_images(real, [label_column])
    labelled = open_labelled(source, label_column, classes=classes, **options)
    asked = open_labelled(test, label_column, classes=classes, **options)
    small = choose_labels(labelled, label_fraction, label_seed)
    classes = check_classes(small, classes)
    check_test_classes(asked, classes)
    make_folds(small, asked, 1.0, folds, fold_kind, label_seed, seed)  # too few patients must not be found out late
    generators = [model, *(adapters or {})]
    origin: dict[str, Any] = {"class_column": label_column, "group_column": labelled.group_column}
    origin |= {"label_fraction": label_fraction, "label_seed": label_seed}
    network = None if judge is None else guessing_judge(judge, classes, origin, pipe.device)
    check_real_images(chain, classes, small.labels, network is not None)
    parents, guessed = small, None
    if pseudo_labels is not None:
        images = filter_images(source, filter)
        guessed = guessed_images(pseudo_labels, images, small, classes, origin)
        both = [pair for part in (guessed, small) for pair in zip(part.hashes, part.labels, strict=True)]
        parents = relabelled(images, dict(both), labelled.group_column)
    teachers = list(dict.fromkeys([*generators, *(name for name in (pseudo_labels, judge) if name is not None)]))
    # found out again when it is measured, but that is after hours of sampling
    owners = {"generator's training images": generator_hashes(teachers)[0], "labelled images": parents.hashes}
    asked = keep_strangers(asked, owners, parents, drop_overlap)
    warnings = check_labels(teachers, labelled, small, label_fraction, label_seed)
    seen = source if train is None else open_images(train)
    compared = [*small.hashes, *map(str, seen.hashes())]
    if made_by is not None and (alone := len(set(parents.hashes).difference(compared))):
        raise ValueError(f"--train lacks {alone} of the images that candidates are made of: leave it out, or add them")
    warnings += find_uncompared(generators, compared)
    if guessed is not None and (lacking := sorted(set(classes) - set(guessed.labels))):
        text = (
            f"{pseudo_labels} has guessed no image of class {lacking[0]!r}: such images are not measured as they are"
        )
        warnings.append(text)
        guessed = None
    check_dataset_folder(out / "dataset")

    cache = out / "features" if cache_dir is None else Path(cache_dir)
    counts = candidate_counts(small, classes, ratio, balanced)
    templates = class_requests(pipe, classes, condition, label_field, prompt, captions_by_class(small))
    requests = candidate_requests(pipe, templates, counts, label_column, seed, made_by, parents, cache)
    if condition_of(requests[0]) != "class_label" and any(key.startswith("classifier_") for key in sampling or {}):
        warnings.append(f"classifier guidance has no effect: classes are asked for by {condition_of(requests[0])}")
    for warning in warnings:
        logger.warning("%s", warning)
    name = Path(model).name if Path(model).exists() else model
    settings = dict(sampling or {}) | ({} if made_by is None else made_by.arguments())
    synthesize(pipe, requests, out / "candidates", model=name, progress=progress, **settings)
    selection = select_folder(
        out / "candidates",
        small.images,
        label_column,
        rules,
        out=out / "selected",
        train=seen,
        extractor=extractor,
        cache_dir=cache,
        group_column=group_column,
        judge=network,
        baseline=out / "random",
        seed=seed,
        overwrite=True,
        progress=progress,
    )
    pools = {name: open_labelled(str(out / folder), label_column, classes=classes) for name, folder in POOLS.items()}
    pools |= {} if guessed is None else {GUESSED: guessed}
    _check_kept(pools["selected"], classes, selection)
    write_dataset(small, out / "selected", label_column, out / "dataset", dataset_format)
    utility = measure_utility(
        small,
        asked,
        strategies=pools,
        classes=classes,
        amounts=(1.0,),
        ratios=(None,),
        regimes=regimes,
        folds=folds,
        fold_kind=fold_kind,
        pairs=PAIRS if guessed is None else [*PAIRS, *((name, GUESSED) for name in ("selected", "all candidates"))],
        classifiers=classifiers,
        generators=teachers,
        label_seed=label_seed,
        synthetic_share=synthetic_share,
        drop_overlap=drop_overlap,
        seed=seed,
        out=out / "utility",
        progress=progress,
    )
    utility = with_share(utility, label_fraction)
    write_utility(utility, out / "utility")
    asked_for = replace(templates[classes[0]], columns={}).caption()
    report = {
        "label_fraction": label_fraction,
        "label_seed": label_seed,
        "labelled_images": small.counts(),
        "generator": {
            "model": name,
            "adapters": dict(adapters or {}),
            "condition": condition_of(templates[classes[0]]),
            "example": asked_for,
            "strategy": strategy,
            "pseudo_labels": pseudo_labels,
            "judge": judge,
            "sampling": settings,
            "seeds": [requests[0].seed, requests[-1].seed],
        },
        "candidates": counts,
        "warnings": warnings,
        "selection": selection.report,
        "dataset": {"format": dataset_format, "real": len(small), "synthetic": len(pools["selected"])},
        "utility": utility,
    }
    texts = {"augment.json": json.dumps(report, indent=2) + "\n", "augment.md": format_augmentation(report)}
    for file, text in texts.items():
        with atomic_file(out / file) as partial:
            partial.write_text(text, encoding="utf-8")
    return report


def _check_kept(selected: LabelledImages, classes: Sequence[str], selection: Selection) -> None:
    for label in classes:
        if not selected.counts().get(label):
            raise ValueError(
                f"the selection left no image of class {label!r} ({len(selection.kept)} of {len(selection.records)} in"
                " all): take weaker rules, or more candidates"
            )
