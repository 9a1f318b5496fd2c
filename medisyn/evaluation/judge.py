"""A judge that has learnt the classes from the real training images: a small CNN on pixels, trained once.

Features that were learnt on photographs read faint texture. An autoencoder may take that from an image whose class is
still there to see, and a distance in such features is then large for a reason that the domain does not care about. A
network of the domain itself is the second opinion: on classes, and on distances between distributions.

- It is trained on the innermost classes ("CT / nodule"), all equally often. A class of an outer column is the sum of
  its inner ones, and within an outer value only its own classes compete, as in `medisyn.evaluation.agreement`.
- An image without an inner value stands for its outer one; an image without any is left out.
- Half of the images are mirrored in training: which side of the body an image shows cannot be judged.
- A generator may have learnt from the images that the judge learns from, and the judge knows again what a drawn image
  has kept of them: agreement above that of unseen real images is no merit.
- Real and synthetic images are brought to the judge's resolution, which is at most that of the synthetic ones.
- A finished network is kept in the cache folder, under a name made of its settings, its images and their classes.

    judge = train_judge(CnnClassifier(steps=2000, batch_size=64, balanced=True), train, ("modality", "finding"))
    label_agreement(training, evaluated, fit=judge.restrict)      # of pixels, as `judge.cnn.inputs` gives them
    judge.features(judge.cnn.inputs(images).numpy())              # (N, D), for distances
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from ..data.loading import ImageDataset
from ..generation.provenance import atomic_file
from .inputs import nested_values
from .utility_classifier import CNN_OPTIONS, CnnClassifier, Part

BATCH = 64  # images whose features are taken at once
METADATA = "judge"  # key of a file's
VERSION = 1  # of the training; another one makes kept networks be trained anew


@dataclass(frozen=True)
class Restricted:
    """The judge where only some classes are possible, in the form that `label_agreement` asks of a classifier.

    Attributes:
        judge: With probabilities of innermost classes.
        classes_: Names of the possible classes (K,), each of an innermost class or of what several have in common.
    """

    judge: "Judge"
    classes_: np.ndarray

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """The likeliest of `classes_` for each image (N,)."""
        parts = [[name in path for path in self.judge.classes] for name in self.classes_.tolist()]
        found = self.judge.cnn.predict(self.judge.network, torch.from_numpy(inputs))
        return self.classes_[(found @ np.array(parts, dtype=found.dtype).T).argmax(1)]


@dataclass(frozen=True)
class Judge:
    """A trained network.

    Attributes:
        cnn: How it was trained; of one that was read, what it sees.
        network: A timm model with one output for each of `classes`.
        classes: Innermost classes by their names from the outermost column on: ("CT", "CT / nodule").
    """

    cnn: CnnClassifier
    network: torch.nn.Module
    classes: tuple[tuple[str, ...], ...]

    def describe(self) -> dict:
        """How it was trained, and the number of its classes, for reports."""
        return self.cnn.describe() | {"classes": len(self.classes)}

    def restrict(self, inputs: np.ndarray, labels: Sequence[str]) -> Restricted:
        """For `label_agreement`: nothing is fitted, the classes of `labels` are those that can be said."""
        return Restricted(self, np.unique(np.asarray(labels)))

    @property
    def names(self) -> list[str]:
        """The classes without the outer ones."""
        return [path[-1] for path in self.classes]

    def verdict(self, images: ImageDataset) -> dict[str, Any]:
        """`probabilities` (N, K) and `classes`, as `medisyn.generation.selection.select` takes them."""
        return {"probabilities": self.cnn.predict(self.network, self.cnn.inputs(images)), "classes": self.names}

    def identity(self) -> dict[str, Any]:
        """What tells one network from another, however it was trained."""
        weights = hashlib.sha256(self.serialize()).hexdigest()
        return {"model": self.cnn.model, "resolution": self.cnn.resolution, "weights_sha256": weights}

    def serialize(self, **metadata: str) -> bytes:
        """The content of a safetensors file that `read_judge` reads; further `metadata` goes into it."""
        facts = {"model": self.cnn.model, "resolution": self.cnn.resolution, "classes": self.classes}
        weights = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        return save(weights, {METADATA: json.dumps(facts), **metadata})

    @torch.no_grad()
    def features(self, inputs: np.ndarray) -> np.ndarray:
        """What the last layer sees (N, D), of pixels (N, 3, resolution, resolution), uint8."""
        network: Any = self.network  # of timm
        parts = torch.from_numpy(inputs).split(BATCH)
        pooled = [network.forward_head(network.forward_features(self.cnn.pixels(p)), pre_logits=True) for p in parts]
        return torch.cat(pooled).float().cpu().numpy()


def check_judge(cnn: CnnClassifier) -> None:
    """Raise ValueError, in one line, for a network that cannot give features of images of the resolution."""
    size = cnn.resolution
    try:
        Judge(cnn, cnn.build(2).eval(), ()).features(np.zeros((2, 3, size, size), dtype=np.uint8))
    except Exception as error:  # a network may fail in any way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{cnn.model} cannot judge images of {size} px: {reason}") from error


def train_judge(
    cnn: CnnClassifier,
    train: ImageDataset,
    columns: Sequence[str],
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> Judge:
    """Train a network on the classes of real training images, or read it from `cache_dir`.

    Args:
        cnn: Network and training.
        train: Images with the first of `columns`.
        columns: Classes, each column nested in those before it.
        seed: Of weights, order and augmentation.
        cache_dir: Keeps networks; None keeps nothing.

    Raises:
        ValueError: Fewer than two classes.
    """
    paths = list(zip(*nested_values(train, columns).values(), strict=True)) if columns else []
    paths = [tuple(name for name in path if name is not None) for path in paths]
    rows = [row for row, path in enumerate(paths) if path]
    classes = sorted({paths[row] for row in rows})
    if len(classes) < 2:
        raise ValueError(f"a judge needs two classes to tell apart, but the training images have {len(classes)}")
    targets = torch.tensor([classes.index(paths[row]) for row in rows])
    images = train.hashes()
    settings = {"seed": seed, "images": [[images[row], paths[row]] for row in rows], **cnn.describe()}
    settings |= {"version": VERSION, "options": dict(CNN_OPTIONS)}
    file = None
    if cache_dir is not None:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        file = Path(cache_dir) / f"judge-{key}.safetensors"
    network = None if file is None else _kept(cnn, len(classes), file)
    if network is None:
        part = Part(cnn.inputs_of(train.image(row) for row in rows), targets)
        network = cnn.fit([[part]], len(classes), seed)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as partial:
                partial.write_bytes(Judge(cnn, network, tuple(classes)).serialize())
    return Judge(cnn, network, tuple(classes))


def read_judge(file: Path, device: str | torch.device = "cpu") -> Judge:
    """A network from a safetensors file that `Judge.serialize` made.

    Raises:
        ValueError: The file is none, or is damaged.
    """
    try:
        with safe_open(file, framework="pt") as kept:
            facts = json.loads((kept.metadata() or {})[METADATA])
            weights = {name: kept.get_tensor(name) for name in kept.keys()}
        classes = tuple(tuple(path) for path in facts["classes"])
        cnn = CnnClassifier(model=facts["model"], resolution=facts["resolution"], device=str(device))
    except (FileNotFoundError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no network that judges images, or is damaged: train it again") from error
    network = cnn.build(len(classes))
    network.load_state_dict(weights)
    return Judge(cnn, network.eval(), classes)


def _kept(cnn: CnnClassifier, number_of_classes: int, file: Path) -> torch.nn.Module | None:
    """The network of a file; None where there is no such file, or half of one."""
    network = cnn.build(number_of_classes)
    try:
        network.load_state_dict(load_file(file))
    except (FileNotFoundError, SafetensorError, RuntimeError):  # the last: of another network
        return None
    return network.eval()
