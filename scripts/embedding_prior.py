r"""Learn a prior over the image embeddings of a model, by class: new embeddings, hence new images, without a real one.

- The embeddings are those of the model's own image encoder, from the cache where there is one.
- With `--held-out` images it says how likely they are under the prior, and how far drawn embeddings are from them,
  beside how far real training embeddings are: both as the squared Fréchet distance of each class, averaged.
- Into the folder go the mixture, its description and the hashes of the images that it was fitted to.

python scripts/embedding_prior.py "corpus/train-*.parquet" runs/prior --model runs/image/pipeline \
    --label-column finding --group-column group_id --held-out "corpus/validation-*.parquet"
medisyn generate --prior runs/prior --model runs/image/pipeline --num-images 100
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from medisyn import load_pipeline
from medisyn.console import one_line_errors
from medisyn.data.cache import module_hash
from medisyn.data.loading import load_images
from medisyn.evaluation.fidelity import frechet_distance
from medisyn.generation.embedding_prior import EmbeddingPrior, fit_prior
from medisyn.generation.manifold_requests import make_parents
from medisyn.tasks.base import image_record
from medisyn.training_record import write_training_record

FEWEST = 20  # images of a class on either side for a distance between two sets of them


def main(
    data: Annotated[str, typer.Argument(help="Labelled images: file, glob, folder or Hub name.")],
    out: Annotated[Path, typer.Argument(help="Folder of the prior.")],
    model: Annotated[str, typer.Option(help="Folder or Hub name of a model with an image condition.")],
    label_column: Annotated[str, typer.Option(help="Column with the class.")],
    group_column: Annotated[str | None, typer.Option(help="Column with the patient.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Images to measure with.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Keeps the embeddings.")] = None,
    seed: int = 0,
) -> None:
    """Fit, measure, save."""
    with one_line_errors():
        run(data, out, model, label_column, group_column, held_out, cache, seed)


def run(
    data: str,
    out: Path,
    model: str,
    label_column: str,
    group_column: str | None,
    held_out: str | None,
    cache: Path | None,
    seed: int,
) -> EmbeddingPrior:
    pipe = load_pipeline(model)
    if "image" not in pipe.kinds or pipe.image_encoder is None:
        raise ValueError(f"{model} has no image encoder; its conditions are: {', '.join(pipe.kinds) or 'none'}")
    images = load_images(data, caption_column=None, group_column=group_column)
    parents = make_parents(pipe, images, label_column, None if cache is None else cache / "train")
    groups = None
    if group_column is not None:
        found = zip(parents.images.column(group_column), parents.hashes, strict=True)
        groups = [content if group in (None, "") else str(group) for group, content in found]
    encoder = module_hash(pipe.image_encoder)
    prior = fit_prior(parents.vectors, parents.labels, encoder, label_column, groups, seed=seed)
    if held_out is not None:
        unseen = load_images(held_out, caption_column=None)
        others = make_parents(pipe, unseen, label_column, None if cache is None else cache / "held_out")
        facts = measure(prior, parents.vectors, parents.labels, others.vectors, others.labels)
        prior.facts.update(facts)
        for name, value in facts.items():
            print(f"{name}: {value:.4g}")
    prior.save(out)
    write_training_record(out, image_record(parents.images))
    print(f"{out}: {len(prior.classes)} classes, {len(parents)} images, hash {prior.hash}")
    return prior


def measure(prior: EmbeddingPrior, known, known_labels, others, other_labels) -> dict[str, float]:
    """Likelihood of held-out embeddings, and Fréchet distances to them of drawn and of known ones."""
    likelihoods, drawn_distances, known_distances = [], [], []
    for name in prior.classes:
        real = others[[label == name for label in other_labels]]
        same = known[[label == name for label in known_labels]]
        if len(real):
            likelihoods.append(float(prior.log_likelihood(real, name).mean()))
        number = min(len(real), len(same))
        if number >= FEWEST:
            drawn = torch.stack([prior.sample(name, np.random.default_rng((0, i))) for i in range(number)])
            few = same[np.random.default_rng(0).permutation(len(same))[:number]]
            drawn_distances.append(frechet_distance(real[:number].numpy(), drawn.numpy()))
            known_distances.append(frechet_distance(real[:number].numpy(), few.numpy()))
    facts = {"held_out_log_likelihood": float(np.mean(likelihoods))} if likelihoods else {}
    if drawn_distances:
        facts["frechet_distance_of_drawn"] = float(np.mean(drawn_distances))
        facts["frechet_distance_of_training"] = float(np.mean(known_distances))
    return facts


if __name__ == "__main__":
    typer.run(main)
