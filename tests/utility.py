"""Small labelled image sets of different colours for the tests of utility and augmentation.

real = write_labelled(tmp_path / "real", 12, seed=1)
"""

import json

import numpy as np
import timm
import torch
from PIL import Image

KINDS = {"dark": (60, 60, 90), "bright": (190, 150, 150), "green": (60, 190, 60)}


def write_labelled(folder, number, seed, kinds=tuple(KINDS), spread=40, size=32, **columns):
    """`number` noisy images of each kind, two of each patient, with finding, caption and group_id."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lines = []
    for kind in kinds:
        for index in range(number):
            pixels = np.array(KINDS[kind]) + rng.normal(0, spread, 3) + rng.normal(0, 25, (size, size, 3))
            name = f"{kind}-{index}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
            row = {"file_name": name, "finding": kind, "caption": f"a {kind} one"}
            lines.append(row | {"group_id": f"{seed}-{kind}-{index // 2}"} | columns)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def write_extractor(folder):
    """The specification of a tiny extractor, whose weights go to `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(timm.create_model("test_efficientnet").state_dict(), folder / "tiny.pth")
    return f"timm:test_efficientnet@{folder / 'tiny.pth'}?size=32"
