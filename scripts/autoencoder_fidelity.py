r"""What an autoencoder alone takes from real images, before any diffusion: the ceiling of every model on its latents.

- PSNR, mean over images, and by a column.
- Fréchet distance of one half of the images to their own reconstructions, beside that to the other half.
- What a classifier of real training images makes of the reconstructions, beside the originals: a finding that it does
  not see in them, no diffusion model can draw.

    python scripts/autoencoder_fidelity.py default --real "DIR/validation-*.parquet" --train "DIR/train-*.parquet" \
        --extractor timm:tf_efficientnet_lite0@DIR/efficientnet_lite0.pth
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from tqdm import tqdm

from medisyn.console import one_line_errors
from medisyn.data.preprocessing import Preprocessor
from medisyn.evaluation.agreement import LabelledFeatures, label_agreement
from medisyn.evaluation.features import extract_features, load_extractor
from medisyn.evaluation.fidelity import frechet_distance, split_halves
from medisyn.evaluation.inputs import groups_of, nested_values, open_images, open_pipeline
from medisyn.losses import peak_signal_to_noise_ratio


def main(
    model: Annotated[str, typer.Argument(help='Folder, Hub name or "default": a pipeline.')],
    real: Annotated[list[str], typer.Option(help="Images that the autoencoder has not seen; repeatable.")],
    train: Annotated[list[str] | None, typer.Option(help="Training images, for the classifier; repeatable.")] = None,
    extractor: Annotated[str, typer.Option(help="inception, timm:MODEL@FILE, dinov2:NAME.")] = "inception",
    columns: Annotated[str, typer.Option(help="Classes, each nested in those before it.")] = "modality,finding",
    group_column: Annotated[str, typer.Option(help="Patient, whose images stay in one half.")] = "group_id",
    cache_dir: Annotated[Path, typer.Option(help="Features; an interrupted run goes on.")] = Path("runs/features"),
) -> None:
    """Print the numbers as JSON."""
    names = columns.split(",")
    pipe = open_pipeline(model)
    resolution = pipe.unet.config.sample_size * pipe.vae_scale_factor
    network = load_extractor(extractor, resolution=resolution)  # originals and reconstructions at one size
    images = open_images(real, names)
    features = extract_features(network, images, cache_dir)
    whole = Preprocessor(resolution, crop="center")
    psnr, drawn = [], []
    for rows in tqdm(
        np.array_split(np.arange(len(images)), -(-len(images) // 32)), desc="reconstructions", unit="batch"
    ):
        originals = torch.stack([whole(images.image(row)) for row in rows])
        reconstructions = reconstruct(pipe, originals)
        psnr += peak_signal_to_noise_ratio(reconstructions, originals).tolist()
        drawn.append(network(pipe.image_processor.postprocess(reconstructions, output_type="pil")).numpy())
    reconstructed = np.concatenate(drawn)

    values, groups = nested_values(images, names), groups_of(images, group_column)
    first, second = split_halves(groups or range(len(images)), values[names[0]])
    result = {
        "images": len(images),
        "psnr": float(np.mean(psnr)),
        "psnr_by_" + names[0]: mean_by(psnr, values[names[0]]),
        "frechet_distance": frechet_distance(features[first], reconstructed[first]),
        "frechet_distance_of_real": frechet_distance(features[first], features[second]),
    }
    if train:
        known = open_images(train, names)
        known_features, known_values = extract_features(network, known, cache_dir), nested_values(known, names)
        for name, outer in zip(names, [None, *names], strict=False):
            asked = {"real": features, "reconstructed": reconstructed}
            found = label_agreement(
                LabelledFeatures(known_features, known_values[name], known_values.get(outer)),
                {
                    kind: LabelledFeatures(part, values[name], values.get(outer), groups)
                    for kind, part in asked.items()
                },
            )
            result[f"{name}_agreement"] = {
                kind: [found[kind]["accuracy"], *found[kind]["accuracy_interval"]] for kind in asked if kind in found
            }
    print(json.dumps(result, indent=2))


@torch.no_grad()
def reconstruct(pipe, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as the pipeline would draw them from their own latents, in levels of 255."""
    moments = pipe.encode_latents(images)
    decoded = pipe.decode_latents(pipe.scale_latents(moments["mean"])).float().cpu()
    return (decoded * 127.5 + 127.5).round() / 127.5 - 1


def mean_by(numbers: list[float], values: list[str | None]) -> dict[str, float]:
    """The mean of the numbers with each value."""
    known = sorted({value for value in values if value is not None})
    return {name: float(np.mean([n for n, v in zip(numbers, values, strict=True) if v == name])) for name in known}


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
