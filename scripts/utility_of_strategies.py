r"""The experiment of `model_cards/utility.md`: what are prompted images worth beside N real ones?

- For each data set of the corpus: a pool of images prompted by captions of its training rows (so in the proportions of
  its classes), then `medisyn evaluate utility` over N, ratio and regime. Test images are those of other patients.
- The generator has learnt from the labels of all training images, the classifier from N: the gain is that of a model
  which somebody trained on many images and published.
- Unknown arguments go to `medisyn evaluate utility` as they are. The same command again continues.

    python scripts/utility_of_strategies.py --corpus data/corpus --datasets fundus_eyedisease,lc25000_lung \
        --out outputs/utility --num-real 50,100,250,500 --ratios 1,5,20 \
        --extractor timm:tf_efficientnet_lite0@data/weights/efficientnet_lite0.pth
"""

import argparse
import json
from pathlib import Path

import numpy as np

from medisyn.config import DataConfig
from medisyn.console import one_line_errors, run_command
from medisyn.data.loading import load_images

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


def main() -> None:
    """A pool and a measurement for each data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, help="folder of train-*.parquet and validation-*.parquet")
    parser.add_argument("--datasets", required=True, help="names joined by commas")
    parser.add_argument("--out", default="outputs/utility")
    parser.add_argument("--images", type=int, default=10400, help="in the pool of a data set")
    parser.add_argument("--steps", default="8", help="of sampling")
    parser.add_argument("--pool-only", action="store_true", help="draw the pools and stop")
    arguments, others = parser.parse_known_args()
    train, test = (f"{arguments.corpus}/{split}-*.parquet" for split in ("train", "validation"))
    for name in arguments.datasets.split(","):
        out = Path(arguments.out) / name
        prompts = out / "prompts.jsonl"
        if not prompts.is_file():
            write_prompts(train, name, arguments.images, prompts)
        run_command(
            ["generate", "--prompts-file", str(prompts), "--steps", arguments.steps]
            + ["--batch-size", "32", "--out", str(out / "prompted")]
        )
        if arguments.pool_only:
            continue
        run_command(
            ["evaluate", "utility", "--real", train, "--test", test, "--where", f"dataset={name}"]
            + ["--synthetic", f"prompted={out / 'prompted'}", "--generator", "default", "--classifier", "cnn,probe"]
            + ["--cache", str(out / "features"), "--out", str(out / "utility"), "--drop-overlap", *others]
        )


if __name__ == "__main__":
    with one_line_errors():
        main()
