r"""`medisyn evaluate utility`: what synthetic images are worth to a classifier of real ones.

- `--synthetic` takes images that are there; `--strategy` makes them from the images of each fold with `--model`.

    medisyn evaluate utility --real "DIR/train-*.parquet" --test "DIR/validation-*.parquet" \
        --where dataset=wbc_bloodcell --synthetic guided=outputs/guided --num-real 50,100 --ratios 1,5
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import quiet_progress_bars
from .arguments import (
    DEFAULT,
    AdapterOption,
    DeviceOption,
    GuidanceOption,
    ModelOption,
    SeedOption,
    StepsOption,
    check_names,
    load_model,
    model_name,
    parse_adapters,
    parse_guidance,
)

if TYPE_CHECKING:
    from ..evaluation.utility_classifier import Classifier, CnnClassifier

CLASSIFIERS = ("cnn", "probe")
# The defaults of `CnnClassifier`, which imports torch.
CNN, CNN_STEPS, CNN_RESOLUTION = "resnet10t", 200, 64
JUDGE_STEPS, JUDGE_RESOLUTION = 2000, 64  # of a CNN that has all training images to learn from
JUDGE_BATCH = 64

RealOption = Annotated[list[str], typer.Option(metavar="DATA", help="Labelled real images; may be repeated.")]
TestOption = Annotated[
    list[str] | None, typer.Option(metavar="DATA", help="Real images of other patients; may be repeated.")
]
LabelColumnOption = Annotated[str, typer.Option(metavar="COLUMN", help="Class of each image.")]
GroupColumnOption = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="Patient of each real image; group_id where there is one.")
]
WhereOption = Annotated[
    list[str] | None, typer.Option(metavar="COLUMN=VALUE,...", help="Only such real images; may be repeated.")
]
ClassesOption = Annotated[str | None, typer.Option(metavar="NAME,...", help="Classes to tell apart; all.")]
FoldsOption = Annotated[int, typer.Option(min=1, max=100, help="Folds by patient.")]
ClassifierOption = Annotated[str, typer.Option(metavar="NAMES", help="cnn, probe, or both: cnn,probe.")]
ExtractorOption = Annotated[
    str | None, typer.Option(metavar="SPEC", help="Features of the probe: inception, timm:NAME@FILE, Hub name, ...")
]
CnnOption = Annotated[str, typer.Option(metavar="NAME", help="timm model that is trained from scratch.")]
CnnStepsOption = Annotated[int, typer.Option(min=1, help="Optimizer steps of the cnn, in every regime.")]
CnnResolutionOption = Annotated[int, typer.Option(min=8, max=1024, help="Pixels that the cnn sees.")]
JudgeOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Judge also by this timm model, trained on --train.")
]
JudgeStepsOption = Annotated[int, typer.Option(min=1, help="Optimizer steps of --cnn.")]
JudgeResolutionOption = Annotated[int, typer.Option(min=8, max=1024, help="Pixels that --cnn sees.")]
ShareOption = Annotated[float, typer.Option(help="Share of synthetic images in mixed batches.")]
DropOverlapOption = Annotated[
    bool, typer.Option("--drop-overlap", help="Leave test images out that were trained on, in place of refusing.")
]
LabelSeedOption = Annotated[int, typer.Option(min=0, help="Chooses the labelled images of a share.")]
CacheOption = Annotated[str | None, typer.Option(metavar="DIR", help="Keeps features for the next run.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate utility")(utility)


def utility(
    real: RealOption,
    test: TestOption = None,
    label_column: LabelColumnOption = "finding",
    group_column: GroupColumnOption = None,
    where: WhereOption = None,
    classes: ClassesOption = None,
    synthetic: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DATA", help="A pool of labelled synthetic images; repeatable.")
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="Made from each fold's images: reconstruction, mixture, ...; repeatable."),
    ] = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    prior: Annotated[str | None, typer.Option(metavar="DIR", help="Learned prior of --strategy prior.")] = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    generator: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="What made --synthetic: its training images must be others; repeatable."),
    ] = None,
    num_real: Annotated[
        str, typer.Option(metavar="N,...", help="Real images: numbers, or shares of the labels up to 1.")
    ] = "50,100,250,500",
    ratios: Annotated[
        str, typer.Option(metavar="R,...", help='Synthetic images for each real one; "all": the whole pool.')
    ] = "1,5,20",
    regimes: Annotated[
        str, typer.Option(metavar="NAMES", help="real, synthetic, both, pretrain.")
    ] = "real,synthetic,both,pretrain",
    compare: Annotated[
        list[str] | None, typer.Option(metavar="A,B", help="Strategies to compare with each other; repeatable.")
    ] = None,
    folds: FoldsOption = 3,
    fold_kind: Annotated[
        str, typer.Option(help="labels: each fold leaves out its part; seeds: all learn from the same images.")
    ] = "labels",
    classifier: ClassifierOption = "cnn",
    extractor: ExtractorOption = None,
    cnn: CnnOption = CNN,
    cnn_steps: CnnStepsOption = CNN_STEPS,
    cnn_resolution: CnnResolutionOption = CNN_RESOLUTION,
    synthetic_share: ShareOption = 0.5,
    drop_overlap: DropOverlapOption = False,
    label_seed: LabelSeedOption = 0,
    seed: SeedOption = 0,
    cache: CacheOption = None,
    device: DeviceOption = None,
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Folder of utility.json, .md, .csv, .png.")
    ] = "outputs/utility",
) -> None:
    """Measure what synthetic images are worth: classifiers trained with and without them.

    The same command again continues where it was stopped. Test images that the classifier or the generator has seen
    are refused.
    """
    from ..generation.strategies import Prior, parse_strategy

    check_names(label_column=label_column, group_column=group_column, model=model, prior=prior, cache=cache, out=out)
    for name, given in (("real", real), ("test", test), ("generator", generator)):
        for source in given or ():
            check_names(**{name: source})
    pools = parse_pools(synthetic or [])
    numbers = parse_numbers("--num-real", num_real)
    sizes = [None if text == "all" else parse_numbers("--ratios", text)[0] for text in split_names("--ratios", ratios)]
    options: dict[str, Any] = {
        "label_column": label_column,
        "group_column": group_column,
        "filter": parse_where(where or []),
        "classes": split_names("--classes", classes) if classes else (),
    }
    chosen = split_names("--regimes", regimes)
    specs = list(strategy or ())
    taken = [spec for spec in specs if spec in pools or specs.count(spec) > 1]
    if taken:
        raise ValueError(f"two strategies are called {taken[0]!r}; give --synthetic another name")
    if not pools and not specs and set(chosen) - {"real"}:
        raise ValueError("nothing to compare: give --synthetic or --strategy, or --regimes real")
    drawn = [spec for spec in specs if isinstance(parse_strategy(spec), Prior)]
    pairs = [parse_pair(text, [*pools, *specs]) for text in compare or ()]
    if (model is not None or adapter or prior or steps or guidance) and not specs:
        raise ValueError("--model, --adapter, --prior, --steps and --guidance are for --strategy; give one")
    if drawn and prior is None:
        raise ValueError("strategy prior needs --prior, the folder that scripts/embedding_prior.py wrote")
    if prior is not None and not drawn:
        raise ValueError("--prior is for --strategy prior; give it")
    weights = None if guidance is None else parse_guidance(guidance)
    adapters = parse_adapters(adapter)
    classifiers = make_classifiers(classifier, extractor, cnn, cnn_steps, cnn_resolution, cache, device)

    from ..evaluation.utility import measure_utility

    quiet_progress_bars()
    makers: dict[str, Callable] = {}
    makes = list(generator or ())
    if specs:
        from ..evaluation.utility_strategies import strategy_maker

        learned = None
        if prior is not None:
            from ..generation.embedding_prior import load_prior

            learned = load_prior(prior)
        pipe = load_model(model, adapters, device)
        settings = {"num_inference_steps": steps, "guidance_scale": weights}
        shared: dict[str, Any] = {
            "model": model_name(model),
            "cache_dir": cache,
            "progress": sys.stderr.isatty(),
            **settings,
        }
        for spec in specs:
            own = learned if spec in drawn else None
            makers[spec] = strategy_maker(pipe, spec, label_column, prior=own, **shared)
        makes += [model or DEFAULT, *adapters, *([prior] if prior else [])]
    measure_utility(
        real,
        test or None,
        strategies={**pools, **makers},
        **options,
        amounts=numbers,
        ratios=sizes,
        regimes=chosen,
        folds=folds,
        fold_kind=fold_kind,
        pairs=pairs,
        classifiers=classifiers,
        generators=list(dict.fromkeys(makes)),
        label_seed=label_seed,
        synthetic_share=synthetic_share,
        drop_overlap=drop_overlap,
        seed=seed,
        out=out,
        progress=sys.stderr.isatty(),
    )
    typer.echo(f"the report, utility.md, is in {out}")


# ---- what `medisyn augment` and `medisyn evaluate` read as well -----------------------------------------------------


def make_classifiers(
    names: str, extractor: str | None, cnn: str, steps: int, resolution: int, cache: str | None, device: str | None
) -> "list[Classifier]":
    """The classifiers of a text such as "cnn,probe". Raises ValueError for an unknown one."""
    wanted = split_names("--classifier", names)
    for name in wanted:
        if name not in CLASSIFIERS:
            raise ValueError(f"unknown classifier {name!r}; valid: {', '.join(CLASSIFIERS)}")
    if "probe" in wanted and extractor is None:
        raise ValueError("the probe needs features: give --extractor (inception, timm:NAME@FILE, a Hub name, ...)")
    from ..doctor import best_device, check_device
    from ..evaluation.features import load_extractor
    from ..evaluation.utility_classifier import CnnClassifier, ProbeClassifier

    place = best_device() if device is None else check_device(device)
    made: list[Classifier] = []
    for name in wanted:
        if name == "cnn":
            made.append(CnnClassifier(model=cnn, steps=steps, resolution=resolution, device=place))
        else:
            made.append(ProbeClassifier(load_extractor(extractor, device=place), cache, progress=sys.stderr.isatty()))
    return made


def make_judge(cnn: str | None, steps: int, resolution: int) -> "CnnClassifier | None":
    """The network that judges beside the features of an extractor; None for none."""
    if cnn is None:
        return None
    from ..doctor import best_device
    from ..evaluation.judge import check_judge
    from ..evaluation.utility_classifier import CnnClassifier

    settings: dict[str, Any] = {"steps": steps, "resolution": resolution, "batch_size": JUDGE_BATCH}
    judge = CnnClassifier(model=cnn, balanced=True, device=best_device(), **settings)
    check_judge(judge)
    return judge


def split_names(option: str, text: str) -> list[str]:
    """`"a, b"` as a list without repetitions. Raises ValueError for an empty name."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"{option} must be names joined by commas, not {text!r}")
    return list(dict.fromkeys(names))


def parse_numbers(option: str, text: str) -> list[float]:
    """`"50,0.05"` as numbers. Raises ValueError naming what is none."""
    try:
        return [float(part) for part in split_names(option, text)]
    except ValueError:
        raise ValueError(f"{option} must be numbers joined by commas, not {text!r}") from None


def parse_pools(given: Sequence[str]) -> dict[str, str]:
    """`["guided=outputs/guided"]` as name -> source."""
    pools: dict[str, str] = {}
    for text in given:
        name, equals, source = (part.strip() for part in text.partition("="))
        if not (name and equals and source) or name in pools:
            raise ValueError(f"--synthetic must be NAME=DATA, each name once, not {text!r}")
        pools[name] = source
    return pools


def parse_where(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`["dataset=busi,ham10000"]` as column -> values."""
    columns: dict[str, tuple[str, ...]] = {}
    for text in given:
        column, equals, values = (part.strip() for part in text.partition("="))
        if not (column and equals and values) or column in columns:
            raise ValueError(f"--where must be COLUMN=VALUE,..., each column once, not {text!r}")
        columns[column] = tuple(split_names("--where", values))
    return columns


def parse_pair(text: str, names: Sequence[str]) -> tuple[str, str]:
    """`"selected,random"` as two of `names`, which may have commas themselves."""
    for first in names:
        if text.startswith(f"{first},") and text[len(first) + 1 :].strip() in names:
            return first, text[len(first) + 1 :].strip()
    raise ValueError(f"--compare must be two strategies joined by a comma, not {text!r}; valid: {', '.join(names)}")
