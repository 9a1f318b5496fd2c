r"""`medisyn augment`: a small labelled set in, an augmented one out, and what it is worth to a classifier.

medisyn augment --real "DIR/train-*.parquet" --test "DIR/validation-*.parquet" --where dataset=wbc_bloodcell \
    --label-fraction 0.05 --model outputs/classifier --classifier-guidance 4 --extractor timm:NAME@FILE
"""

import sys
from typing import Annotated, Any

import typer

from ..console import quiet_progress_bars
from .arguments import (
    DEFAULT,
    AdapterOption,
    ClassifierGuidanceClipOption,
    ClassifierGuidanceIntervalOption,
    DeviceOption,
    GuidanceOption,
    ModelOption,
    SeedOption,
    StepsOption,
    check_clip,
    check_interval,
    check_names,
    load_model,
    parse_adapters,
    parse_guidance,
)
from .select import RULES, JudgeRunOption
from .utility import (
    CNN,
    CNN_RESOLUTION,
    CNN_STEPS,
    CacheOption,
    ClassesOption,
    ClassifierOption,
    CnnOption,
    CnnResolutionOption,
    CnnStepsOption,
    DropOverlapOption,
    FoldsOption,
    GroupColumnOption,
    LabelColumnOption,
    LabelSeedOption,
    RealOption,
    ShareOption,
    WhereOption,
    make_classifiers,
    parse_where,
    split_names,
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(augment)


def augment(
    real: RealOption,
    test: Annotated[list[str], typer.Option(metavar="DATA", help="Real images of other patients; may be repeated.")],
    model: ModelOption = None,
    adapter: AdapterOption = None,
    label_column: LabelColumnOption = "finding",
    group_column: GroupColumnOption = None,
    where: WhereOption = None,
    classes: ClassesOption = None,
    label_fraction: Annotated[float, typer.Option(help="Share of the labels to use: 0.05; all.")] = 1.0,
    label_seed: LabelSeedOption = 0,
    condition: Annotated[
        str | None, typer.Option(help="How a class is asked for: class_label, labels, prompt; what the model has.")
    ] = None,
    label_field: Annotated[str | None, typer.Option(metavar="FIELD", help="The model's field of the class.")] = None,
    prompt: Annotated[str | None, typer.Option(help='"brain MRI showing {label}"; captions of the images.')] = None,
    ratio: Annotated[float, typer.Option(help="Candidates for each labelled image.")] = 10.0,
    balanced: Annotated[bool, typer.Option("--balanced", help="As many candidates of each class.")] = False,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="STRATEGY", help="Candidates are made of real images of their class: sdedit:strength=0.6."
        ),
    ] = None,
    pseudo_labels: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Run of a classifier: images whose class it guessed are parents too."),
    ] = None,
    judge: JudgeRunOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    classifier_guidance: Annotated[
        float | None, typer.Option(min=0, max=100, help="Weight of the latent classifier's gradient.")
    ] = None,
    classifier_guidance_interval: ClassifierGuidanceIntervalOption = None,
    classifier_guidance_clip: ClassifierGuidanceClipOption = None,
    scheduler: Annotated[str | None, typer.Option(help="Sampler: dpm, ddim, euler, ...; the model's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Images made at once.")] = 8,
    rules: Annotated[
        str, typer.Option(metavar="RULES", help="Rules of the selection, or a YAML file; see medisyn select.")
    ] = RULES,
    extractor: Annotated[
        str, typer.Option(metavar="SPEC", help="Features of selection and probe: inception, timm:NAME@FILE, ...")
    ] = "inception",
    train: Annotated[
        list[str] | None,
        typer.Option(metavar="DATA", help="What the model has seen, in place of all of --real; may be repeated."),
    ] = None,
    folds: FoldsOption = 5,
    fold_kind: Annotated[
        str, typer.Option(help="seeds: all folds learn from the same labels; labels: each leaves out its part.")
    ] = "seeds",
    regimes: Annotated[str, typer.Option(metavar="NAMES", help="synthetic, both, pretrain.")] = "both,pretrain",
    classifier: ClassifierOption = "cnn",
    cnn: CnnOption = CNN,
    cnn_steps: CnnStepsOption = CNN_STEPS,
    cnn_resolution: CnnResolutionOption = CNN_RESOLUTION,
    synthetic_share: ShareOption = 0.5,
    drop_overlap: DropOverlapOption = False,
    dataset_format: Annotated[
        str, typer.Option("--format", help="Of the augmented set: imagefolder, parquet.")
    ] = "imagefolder",
    seed: SeedOption = 0,
    cache: CacheOption = None,
    device: DeviceOption = None,
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of everything.")] = "outputs/augmented",
) -> None:
    """Augment a small labelled set with selected synthetic images, and measure what that is worth.

    Real images only, all candidates, a random selection and the selection train a classifier each, in folds, asked
    about the test images. The same command again continues where it was stopped.
    """
    check_names(label_column=label_column, group_column=group_column, model=model, out=out, cache=cache, rules=rules)
    check_names(condition=condition, label_field=label_field, prompt=prompt, extractor=extractor, scheduler=scheduler)
    check_names(strategy=strategy, pseudo_labels=pseudo_labels, judge=judge)
    for name, given in (("real", real), ("test", test), ("train", train)):
        for source in given or ():
            check_names(**{name: source})
    if not 0 < label_fraction <= 1:
        raise ValueError(f"--label-fraction must be above 0 and at most 1, not {label_fraction:g}")
    check_interval("--classifier-guidance-interval", classifier_guidance_interval)
    check_clip("--classifier-guidance-clip", classifier_guidance_clip)
    filter_, names = parse_where(where or []), split_names("--classes", classes) if classes else []
    chosen = split_names("--regimes", regimes)
    if scheduler is not None:
        from ..generation.schedulers import check_scheduler

        check_scheduler(scheduler)
    sampling: dict[str, Any] = {"num_inference_steps": steps, "scheduler": scheduler, "batch_size": batch_size}
    sampling |= {"guidance_scale": None if guidance is None else parse_guidance(guidance)}
    sampling |= {"classifier_guidance_scale": classifier_guidance}
    sampling |= {"classifier_guidance_interval": classifier_guidance_interval}
    sampling |= {"classifier_guidance_clip": classifier_guidance_clip}
    adapters = parse_adapters(adapter)
    classifiers = make_classifiers(classifier, extractor, cnn, cnn_steps, cnn_resolution, cache, device)
    from ..augmentation import augment as run

    quiet_progress_bars()
    run(
        real,
        test,
        load_model(model, adapters, device),
        model=model or DEFAULT,
        adapters=adapters,
        label_column=label_column,
        group_column=group_column,
        filter=filter_,
        classes=names,
        label_fraction=label_fraction,
        label_seed=label_seed,
        condition=condition,
        label_field=label_field,
        prompt=prompt,
        ratio=ratio,
        balanced=balanced,
        strategy=strategy,
        pseudo_labels=pseudo_labels,
        judge=judge,
        sampling={name: value for name, value in sampling.items() if value is not None},
        rules=rules,
        extractor=extractor,
        train=train or None,
        classifiers=classifiers,
        folds=folds,
        fold_kind=fold_kind,
        regimes=chosen,
        synthetic_share=synthetic_share,
        drop_overlap=drop_overlap,
        dataset_format=dataset_format,
        seed=seed,
        cache_dir=cache,
        out=out,
        progress=sys.stderr.isatty(),
    )
    typer.echo(f"augment.md, augment.json and the augmented set in dataset/ are in {out}")
