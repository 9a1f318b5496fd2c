"""Small image sets of different colours for the tests of the evaluation, and the call that most of them make.

report = run(evaluation_data(tmp_path), "images/", tmp_path / "out")
"""

import json

import numpy as np
import timm
import torch
from PIL import Image

from medisyn.evaluation import evaluate

COLOURS = {("CT", "normal"): (60, 60, 60), ("CT", "nodule"): (200, 200, 200), ("fundus", "normal"): (200, 80, 20)}
KNEES = {("knee", f"grade {grade}"): (10, 60 * grade, 200) for grade in range(4)}  # a specialty of its own


def write_images(folder, number, seed, pairs=tuple(COLOURS), columns=("modality", "finding", "caption", "group_id")):
    """`number` noisy 32 px images of each (modality, finding), with their table."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lines = []
    for modality, finding in pairs:
        for index in range(number):
            pixels = np.array((COLOURS | KNEES)[modality, finding]) + rng.normal(0, 25, (32, 32, 3))
            name = f"{modality}-{finding}-{index}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
            row = {
                "modality": modality,
                "finding": finding,
                "caption": f"{modality} {finding}",
                "group_id": f"{seed}-{modality}-{finding}-{index // 2}",
            }
            lines.append({"file_name": name} | {column: row[column] for column in columns})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def nodules_for_everything(folder, number):
    """Images of a generator that makes nodules whatever it is asked for."""
    write_images(folder, number, 5, pairs=[("CT", "nodule")])
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        line["finding"] = ("normal", "nodule")[index % 2]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def evaluation_data(folder):
    """Small sets of images with one table each, and a tiny extractor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(timm.create_model("test_efficientnet").state_dict(), folder / "tiny.pth")
    return {
        "real": write_images(folder / "real", 56, 1),
        "train": write_images(folder / "train", 30, 2),
        "synthetic": write_images(folder / "synthetic", 30, 3, columns=("modality", "finding")),
        "knees": write_images(folder / "knees", 12, 6, pairs=tuple(KNEES)),
        "knees_train": write_images(folder / "knees_train", 20, 7, pairs=tuple(KNEES)),
        "unlabelled": write_images(folder / "unlabelled", 10, 4, columns=()),
        "extractor": f"timm:test_efficientnet@{folder / 'tiny.pth'}?size=32",
        "cache_dir": folder / "cache",
    }


def run(data, subject, out, real="real", **options):
    options = {"extractor": data["extractor"], "cache_dir": data["cache_dir"], "progress": False} | options
    return evaluate(subject, data[real], out=out, **options)
