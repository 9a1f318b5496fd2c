"""A learned prior over image embeddings, conditional on class: new embeddings without a real image.

- A Gaussian mixture for each class, in the space that the covariance within clusters of the classes makes white. Of
  clusters, since a class such as "normal" may lie in several places. A class of few images gets that covariance
  around its own mean.
- Number and shape of the components are those with the best likelihood of held-out images; a group (patient) is never
  on both sides.
- A folder: `prior.safetensors`, `prior.json`, and the hashes of the images (`training_images.json`). It knows which
  encoder the embeddings are of and refuses another. To draw needs no scikit-learn; to fit does.

    prior = fit_prior(embeddings, findings, encoder=module_hash(pipe.image_encoder), label_column="finding")
    prior.save("runs/prior")
    embedding = load_prior("runs/prior").sample("glioma", np.random.default_rng(0))  # (width,)
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..prompts import choose
from .embedding_space import covariance_root, within_class_covariance
from .provenance import HASH_DIGITS, atomic_file

if TYPE_CHECKING:
    from ..pipelines.medisyn_pipeline import MediSynPipeline

WEIGHTS, MANIFEST = "prior.safetensors", "prior.json"
FEWEST_IMAGES = 2  # of a class: one image would be its own mean, hence copied
IMAGES_PER_COMPONENT = 10  # at least, or a component is a handful of images
POOLED = (1, "pooled")  # one component with the covariance within all clusters
# of a component's covariance, relative to that within all clusters; shrunk: full, drawn towards a multiple of it
SHAPES = ("spherical", "diag", "shrunk")
FLOOR = 1e-3  # variance that is added, where 1 is that within all clusters: no component closes around an image


@dataclass(frozen=True)
class Mixture:
    """A Gaussian mixture on white coordinates.

    Attributes:
        weights: (K,), summing to 1.
        means: (K, D).
        roots: Of the covariances: standard deviations (K, D) or lower triangular matrices (K, D, D).
    """

    weights: Tensor
    means: Tensor
    roots: Tensor

    def log_likelihood(self, white: Tensor) -> Tensor:
        """Log density (N,) of white coordinates (N, D)."""
        roots = self.roots if self.roots.ndim == 3 else torch.diag_embed(self.roots)
        normal = torch.distributions.MultivariateNormal(self.means, scale_tril=roots)
        return torch.logsumexp(normal.log_prob(white[:, None]) + self.weights.log(), dim=1)


@dataclass(frozen=True)
class EmbeddingPrior:
    """Distributions of embeddings by class.

    Attributes:
        mean: Of all embeddings, (D,).
        root: L (D, D): an embedding is `mean + L w` of white coordinates w.
        mixtures: Class -> distribution of w.
        counts: Class -> number of images that it was fitted to.
        encoder: Hash of the image encoder (`medisyn.data.cache.module_hash`).
        label_column: What the classes are called.
        facts: What else is known, such as held-out likelihoods.
    """

    mean: Tensor
    root: Tensor
    mixtures: Mapping[str, Mixture]
    counts: Mapping[str, int]
    encoder: str
    label_column: str = "label"
    facts: Mapping[str, Any] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that can be asked for."""
        return tuple(self.mixtures)

    @cached_property
    def hash(self) -> str:
        """Identity of what it draws, 12 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps([list(self.classes), self.encoder]).encode())
        for tensor in self._tensors().values():
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:HASH_DIGITS]

    def sample(self, label: str, rng: np.random.Generator) -> Tensor:
        """One embedding (D,) of a class, float32.

        Raises:
            ValueError: An unknown class; lists the known ones.
        """
        mixture = self.mixtures[choose("class of the prior", label, self.classes)]
        component = int(rng.choice(len(mixture.weights), p=_shares(mixture.weights)))
        noise = torch.from_numpy(rng.standard_normal(len(self.mean))).float()
        scatter = mixture.roots[component]
        return self.mean + self.root @ (
            mixture.means[component] + (scatter * noise if scatter.ndim == 1 else scatter @ noise)
        )

    def log_likelihood(self, embeddings: Tensor, label: str) -> Tensor:
        """Log density (N,) of embeddings (N, D) under a class."""
        mixture = self.mixtures[choose("class of the prior", label, self.classes)]
        return mixture.log_likelihood(_whiten(embeddings, self.mean, self.root)) - self.root.diagonal().log().sum()

    def check_encoder(self, pipe: "MediSynPipeline") -> None:
        """Refuse a pipeline whose image encoder is another one, where it carries one, or of another width.

        Raises:
            ValueError: Names both.
        """
        from ..data.cache import module_hash
        from ..pipelines.medisyn_pipeline import NOISE_CHANNELS

        width = pipe.embeds_width("image")
        if width is not None and pipe.config.get("image_noise"):
            width -= NOISE_CHANNELS  # the pipeline itself adds the level of noise behind what is drawn
        if pipe.config.image_tokens == "patch":
            raise ValueError("the prior draws one global token per image, and this model takes patch tokens")
        found = self.encoder if pipe.image_encoder is None else module_hash(pipe.image_encoder)
        if found != self.encoder:
            raise ValueError(f"the prior is of the image encoder {self.encoder}, but this model has {found}")
        if width not in (None, len(self.mean)):
            raise ValueError(f"the prior draws embeddings of the width {len(self.mean)}; this model takes {width}")

    def save(self, folder: str | Path) -> None:
        """Write the folder; what was there of an earlier prior is replaced."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / WEIGHTS) as partial:
            save_file(self._tensors(), partial)
        manifest = {
            "classes": list(self.classes),
            "counts": dict(self.counts),
            "encoder": self.encoder,
            "label_column": self.label_column,
            "width": len(self.mean),
            "hash": self.hash,
            "facts": dict(self.facts or {}),
        }
        with atomic_file(folder / MANIFEST) as partial:
            partial.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"mean": self.mean, "root": self.root}
        for number, mixture in enumerate(self.mixtures.values()):
            for name, value in vars(mixture).items():
                tensors[f"{name}.{number}"] = value
        return {name: value.contiguous() for name, value in tensors.items()}


def load_prior(folder: str | Path) -> EmbeddingPrior:
    """Read what `EmbeddingPrior.save` wrote.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is damaged, or its two files are of different priors.
    """
    folder = Path(folder)
    for name in (WEIGHTS, MANIFEST):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no prior in {folder}: {name} is missing; scripts/embedding_prior.py writes one")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        # copies, since the last bits of a product depend on where a mapped file lies in memory
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        parts = [
            Mixture(**{part: tensors[f"{part}.{number}"] for part in ("weights", "means", "roots")})
            for number in range(len(manifest["classes"]))
        ]
        prior = EmbeddingPrior(
            tensors["mean"],
            tensors["root"],
            dict(zip(manifest["classes"], parts, strict=True)),
            manifest["counts"],
            manifest["encoder"],
            manifest["label_column"],
            manifest["facts"],
        )
        matches = prior.hash == manifest["hash"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no readable prior: {' '.join(str(error).split())}") from None
    if not matches:
        raise ValueError(f"{folder} holds {WEIGHTS} and {MANIFEST} of different priors")
    return prior


def fit_prior(
    embeddings: Tensor,
    labels: Sequence[str],
    encoder: str,
    label_column: str = "label",
    groups: Sequence[str] | None = None,
    components: Sequence[int] = (1, 2, 4, 8),
    folds: int = 5,
    seed: int = 0,
) -> EmbeddingPrior:
    """Fit a mixture to each class; its number and shape of components by cross-validation over groups.

    Args:
        embeddings: (N, D), global tokens.
        labels: Class of each.
        encoder: Hash of the encoder that they are of.
        label_column: What the classes are called.
        groups: Patient of each; None: every image is its own.
        components: Numbers of components to try, where a class has `IMAGES_PER_COMPONENT` for each.
        folds: Parts that are held out in turn, fewer where a class has fewer groups.
        seed: Of the starting points and folds.

    Raises:
        ValueError: A class with a single image, or embeddings that are all alike.
        ImportError: scikit-learn is missing.
    """
    counts = Counter(labels)
    few = [name for name, count in counts.items() if count < FEWEST_IMAGES]
    if few:
        raise ValueError(f"the class {few[0]!r} has one image; a prior needs {FEWEST_IMAGES} or more of each class")
    embeddings = embeddings.float()
    mean = embeddings.mean(dim=0)
    scatter = within_class_covariance(embeddings, _clusters(embeddings.numpy(), labels, max(components), seed))
    root = covariance_root(scatter).float().contiguous()  # as it is when loaded
    white = _whiten(embeddings, mean, root).numpy()
    names, owners = np.array(labels), np.arange(len(labels)) if groups is None else np.array(groups)
    mixtures, scores, shapes = {}, {}, {}
    for name in sorted(counts):
        own = names == name
        enough = [(k, shape) for k in components for shape in SHAPES if k * IMAGES_PER_COMPONENT <= counts[name]]
        held_out = {each: _held_out(white[own], owners[own], *each, folds, seed) for each in (POOLED, *enough)}
        best = max(held_out, key=lambda each: held_out[each])  # without any comparison the first
        mixtures[name] = _fit(white[own], *best, seed)
        scores[name] = held_out[best] if np.isfinite(held_out[best]) else None
        shapes[name] = f"{best[0]} {best[1]}"
    facts = {"components": shapes, "held_out_log_likelihood_of_white": scores}
    return EmbeddingPrior(
        mean, root, mixtures, {name: counts[name] for name in mixtures}, encoder, label_column, facts
    )


def _clusters(embeddings: np.ndarray, labels: Sequence[str], most: int, seed: int) -> list[tuple[str, int]]:
    """A class and a cluster in it for each embedding (N, D)."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("fitting a prior needs scikit-learn: pip install medisyn[eval]") from error

    names, cluster = np.array(labels), np.zeros(len(labels), dtype=int)
    for name in set(labels):
        own = names == name
        number = min(most, int(own.sum()) // (2 * IMAGES_PER_COMPONENT))
        if number > 1:
            cluster[own] = KMeans(number, n_init=3, random_state=seed).fit_predict(embeddings[own])
    return list(zip(labels, cluster.tolist(), strict=True))


def _fit(white: np.ndarray, number: int, shape: str, seed: int) -> Mixture:
    """A mixture of `number` components with `shape` covariances on white coordinates (N, D)."""
    if (number, shape) == POOLED:
        own = torch.from_numpy(white.mean(axis=0, keepdims=True)).clone()
        return Mixture(torch.ones(1), own, torch.ones_like(own))
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    kind = "spherical" if shape == "shrunk" else shape
    model = GaussianMixture(number, covariance_type=kind, reg_covar=FLOOR, random_state=seed, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an unfinished fit loses the comparison, if it matters
        model.fit(white)
    if shape == "shrunk":
        return _shrunk(white, model.predict(white))
    variances = model.covariances_ if shape == "diag" else model.covariances_[:, None] * np.ones(white.shape[1])
    return _mixture(model.weights_, model.means_, np.sqrt(variances))


def _shrunk(white: np.ndarray, cluster: np.ndarray) -> Mixture:
    """A component for each cluster (N,), with the shrunk covariance (Ledoit & Wolf 2004) of its members.

    A cluster of too few images has that of all around the means of their clusters.
    """
    from sklearn.covariance import ledoit_wolf

    parts = [white[cluster == each] for each in np.unique(cluster)]
    shared, _ = ledoit_wolf(np.concatenate([part - part.mean(axis=0) for part in parts]), assume_centered=True)
    few = IMAGES_PER_COMPONENT // 2
    covariances = [ledoit_wolf(part)[0] if len(part) >= few else shared for part in parts]
    covariances = [covariance + FLOOR * np.eye(white.shape[1]) for covariance in covariances]
    weights = np.array([len(part) for part in parts]) / len(white)
    return _mixture(weights, np.stack([part.mean(axis=0) for part in parts]), np.linalg.cholesky(covariances))


def _mixture(*parts: np.ndarray) -> Mixture:
    return Mixture(*(torch.from_numpy(np.ascontiguousarray(part, dtype=np.float64)).float() for part in parts))


def _held_out(white: np.ndarray, groups: np.ndarray, number: int, shape: str, folds: int, seed: int) -> float:
    """Mean log likelihood of images whose group was not fitted; -inf where there is no such comparison."""
    names = np.unique(groups)
    if len(names) < 2:
        return -np.inf
    part_of = np.random.default_rng(seed).permutation(len(names)) % min(folds, len(names))
    fold = part_of[np.searchsorted(names, groups)]
    scores = []
    for part in np.unique(fold):
        rest, own = white[fold != part], white[fold == part]
        if len(rest) < max(number, FEWEST_IMAGES):
            return -np.inf
        scores.append(_fit(rest, number, shape, seed).log_likelihood(torch.from_numpy(own)).numpy())
    return float(np.concatenate(scores).mean())


def _whiten(embeddings: Tensor, mean: Tensor, root: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(root, (embeddings.float() - mean).T, upper=False).T


def _shares(weights: Tensor) -> np.ndarray:
    shares = weights.double().numpy()
    return shares / shares.sum()
