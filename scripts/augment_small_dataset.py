"""Experiments as in `model_cards/augmentation.md`: is a classifier that knows 5 % of the labels helped by a model?

- For each data set of the corpus: `medisyn augment` with the model that was trained on the same 5 % of the labels
  (`label_seed`), selection on, off, and random; small CNN and probe.
- The model has seen all training images, so candidates are compared with all of them, not with the labelled 5 % alone.
- Of the test images of brain_tumor_mri, 12 of 210 are copies of training images: `--drop-overlap` leaves them out.
- A model is named for its data set (`--model DATASET=RUN`, repeatable), or there is a folder of them with those names
  (`--models DIR`). All other options go to each `medisyn augment`. The same command again continues.

    python scripts/augment_small_dataset.py --corpus data/corpus --model lc25000_lung=runs/guided --guidance 1 \\
        --drop-overlap --extractor timm:tf_efficientnet_lite0@data/weights/efficientnet_lite0.pth
    python scripts/augment_small_dataset.py --corpus data/corpus --model brain_tumor_mri=runs/classifier_mri \\
        --classifier-guidance 12 --guidance 1 --ratio 5 --balanced \\
        --drop-overlap --extractor timm:tf_efficientnet_lite0@data/weights/efficientnet_lite0.pth
"""

import argparse
from pathlib import Path

from medisyn.console import run_command

DATASETS = ("lc25000_lung", "wbc_bloodcell", "brain_tumor_mri")


def main() -> None:
    """One `medisyn augment` for each data set; unknown arguments go to it as they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--corpus", required=True, help="folder of train-*.parquet and validation-*.parquet")
    parser.add_argument(
        "--model", action="append", default=[], metavar="DATASET=RUN", help="model of a data set; may be repeated"
    )
    parser.add_argument("--models", metavar="DIR", help="folder with a model for each data set without --model")
    parser.add_argument("--out", default="outputs/augmentation")
    parser.add_argument("--datasets", help="names joined by commas; those of --model, or " + ",".join(DATASETS))
    parser.add_argument("--label-fraction", default="0.05")
    arguments, others = parser.parse_known_args()
    models: dict[str, str] = {}
    for text in arguments.model:
        name, _, run = text.partition("=")
        if not name or not run or name in models:
            parser.error(f"--model must be DATASET=RUN, each data set once, not {text!r}")
        models[name] = run
    if not models and arguments.models is None:
        parser.error("no model: give --model DATASET=RUN, or --models DIR")
    given = arguments.datasets.split(",") if arguments.datasets else list(DATASETS)
    names = list(models) if arguments.datasets is None and arguments.models is None else given
    lacking = [name for name in names if name not in models]
    if lacking and arguments.models is None:
        parser.error(f"no model of {lacking[0]}: give --model {lacking[0]}=RUN")
    if unused := sorted(set(models) - set(names)):
        parser.error(f"--model {unused[0]}: not a data set of {', '.join(names)}")
    for name in names:
        command = ["augment", "--real", f"{arguments.corpus}/train-*.parquet"]
        command += ["--test", f"{arguments.corpus}/validation-*.parquet", "--where", f"dataset={name}"]
        command += ["--train", f"{arguments.corpus}/train-*.parquet", "--cache", str(Path(arguments.out) / "features")]
        command += ["--label-fraction", arguments.label_fraction]
        command += ["--model", models.get(name) or str(Path(arguments.models) / name)]
        command += ["--classifier", "cnn,probe", "--out", str(Path(arguments.out) / name), *others]
        run_command(command)


if __name__ == "__main__":
    main()
