"""Experiments as in `model_cards/augmentation.md`: is a classifier that knows 5 % of the labels helped by a model?

- For each data set of the corpus: `medisyn augment` with the model that was trained on the same 5 % of the labels
  (`label_seed`), selection on, off, and random; small CNN and probe.
- The model has seen all training images, so candidates are compared with all of them, not with the labelled 5 % alone.
- Of the test images of brain_tumor_mri, 12 of 210 are copies of training images: `--drop-overlap` leaves them out.
- MODELS has a folder for each data set, such as MODELS/wbc_bloodcell/pipeline. The same command again continues.

    python scripts/augment_small_dataset.py --corpus DIR --models runs/guided --out outputs/augmentation \\
        --extractor timm:tf_efficientnet_lite0@efficientnet_lite0.pth --classifier-guidance 4 --drop-overlap
"""

import argparse
from pathlib import Path

from medisyn.console import run_command

DATASETS = ("lc25000_lung", "wbc_bloodcell", "brain_tumor_mri")


def main() -> None:
    """One `medisyn augment` for each data set; unknown arguments go to it as they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, help="folder of train-*.parquet and validation-*.parquet")
    parser.add_argument("--models", required=True, help="folder with a model for each data set")
    parser.add_argument("--out", default="outputs/augmentation")
    parser.add_argument("--datasets", default=",".join(DATASETS), help="names joined by commas")
    parser.add_argument("--label-fraction", default="0.05")
    arguments, others = parser.parse_known_args()
    for name in arguments.datasets.split(","):
        command = ["augment", "--real", f"{arguments.corpus}/train-*.parquet"]
        command += ["--test", f"{arguments.corpus}/validation-*.parquet", "--where", f"dataset={name}"]
        command += ["--train", f"{arguments.corpus}/train-*.parquet", "--cache", str(Path(arguments.out) / "features")]
        command += ["--label-fraction", arguments.label_fraction, "--model", str(Path(arguments.models) / name)]
        command += ["--classifier", "cnn,probe", "--out", str(Path(arguments.out) / name), *others]
        run_command(command)


if __name__ == "__main__":
    main()
