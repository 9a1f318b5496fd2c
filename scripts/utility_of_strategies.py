r"""The experiment of `model_cards/utility.md`: what are the images of each strategy worth beside N real ones?

- For each data set of the corpus: `medisyn evaluate utility` over N, ratio and regime, then its scores as a table.
  Test images are those of other patients.
- `--strategy prompted`, the default, is a pool of images prompted by captions of the training rows (so in the
  proportions of the classes). The others (reconstruction, interpolation, mixture, perturbation, sdedit, prior; with
  options, as `mixture:neighbours=5`) are made from the images of each fold by `medisyn evaluate utility --strategy`.
- The generator has learnt from the labels of all training images, the classifier from N: the gain is that of a model
  which somebody trained on many images and published. So is that of the other strategies with this model.
- Unknown arguments go to `medisyn evaluate utility` as they are. The same command again continues.

    python scripts/utility_of_strategies.py --corpus data/corpus --datasets fundus_eyedisease,lc25000_lung \
        --out outputs/utility --num-real 50,100,250,500 --ratios 1,5,20 \
        --strategy prompted --strategy reconstruction --strategy mixture:neighbours=5 \
        --extractor timm:tf_efficientnet_lite0@data/weights/efficientnet_lite0.pth
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medisyn.config import DataConfig
from medisyn.console import one_line_errors, run_command
from medisyn.data.loading import load_images
from medisyn.evaluation.utility_report import summary_table
from medisyn.generation.strategies import Prior, parse_strategy

PROMPTED = "prompted"
COLUMNS = ("finding", "modality", "dataset")  # of each prompt's row, which its image inherits


def write_prompts(source: str, dataset: str, number: int, file: Path) -> None:
    """`number` captions of the data set's rows in random order, every row once before any comes twice.

    Fewer are the first of more.
    """
    images = load_images(DataConfig(source=source, filter={"dataset": (dataset,)}))
    rng = np.random.default_rng(0)
    passes = [rng.permutation(len(images)) for _ in range(-(-number // len(images)))]
    columns = {name: images.column(name) for name in ("caption", *COLUMNS)}
    lines = [
        json.dumps({"prompt": columns["caption"][row]} | {name: columns[name][row] for name in COLUMNS})
        for row in np.concatenate(passes)[:number]
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def check_strategies(strategies: Sequence[str], prior: str | None) -> None:
    """Raise ValueError for a strategy that is unknown or given twice, and for a prior that is missing or not used."""
    for text in strategies:
        if strategies.count(text) > 1:
            raise ValueError(f"--strategy {text} is given twice")
    try:
        parsed = [parse_strategy(text) for text in strategies if text != PROMPTED]
    except ValueError as error:
        raise ValueError(f"{error}; or {PROMPTED}") from None
    needed = any(isinstance(each, Prior) for each in parsed)
    if needed != (prior is not None):
        raise ValueError("--strategy prior and --prior DIR go together: DIR is what scripts/embedding_prior.py wrote")


def main() -> None:
    """A pool, a measurement and a table for each data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--corpus", required=True, help="folder of train-*.parquet and validation-*.parquet")
    parser.add_argument("--datasets", required=True, help="names joined by commas")
    parser.add_argument("--out", default="outputs/utility")
    parser.add_argument("--strategy", action="append", help="prompted, the default, reconstruction, ...; repeatable")
    parser.add_argument("--prior", help="folder of the learned prior, for --strategy prior")
    parser.add_argument("--images", type=int, default=10400, help="in the pool of prompted images of a data set")
    parser.add_argument("--steps", default="8", help="of sampling")
    parser.add_argument("--pool-only", action="store_true", help="draw the pools of prompted images and stop")
    arguments, others = parser.parse_known_args()
    strategies = arguments.strategy or [PROMPTED]
    check_strategies(strategies, arguments.prior)
    made = [text for text in strategies if text != PROMPTED]
    if arguments.pool_only and made:
        raise ValueError(f"--pool-only draws prompted images alone; leave out --strategy {made[0]}")
    train, test = (f"{arguments.corpus}/{split}-*.parquet" for split in ("train", "validation"))
    for name in arguments.datasets.split(","):
        out = Path(arguments.out) / name
        given = [part for text in made for part in ("--strategy", text)]
        given += ["--steps", arguments.steps] if made else []
        given += [] if arguments.prior is None else ["--prior", arguments.prior]
        if PROMPTED in strategies:
            prompts = out / "prompts.jsonl"
            there = len(prompts.read_text(encoding="utf-8").splitlines()) if prompts.is_file() else 0
            if there < arguments.images:
                write_prompts(train, name, arguments.images, prompts)
            run_command(
                ["generate", "--prompts-file", str(prompts), "--steps", arguments.steps]
                + ["--batch-size", "32", "--out", str(out / PROMPTED)]
            )
            given += ["--synthetic", f"{PROMPTED}={out / PROMPTED}", "--generator", "default"]
        if arguments.pool_only:
            continue
        run_command(
            ["evaluate", "utility", "--real", train, "--test", test, "--where", f"dataset={name}"]
            + [*given, "--classifier", "cnn,probe"]
            + ["--cache", str(out / "features"), "--out", str(out / "utility"), "--drop-overlap", *others]
        )
        report = json.loads((out / "utility" / "utility.json").read_text(encoding="utf-8"))
        print(f"\n{name}\n\n{summary_table(report)}\n", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
