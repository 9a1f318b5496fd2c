"""Classes of images whose label is not known, by a small CNN that learns from a few labels and from all images.

- FixMatch (Sohn et al. 2020, arXiv 2001.07685): the class that the network is sure of in a weakly changed image is
  its target in the same image strongly changed. Its beliefs are weighed so that their running mean has the classes'
  shares among the labels (distribution alignment, Berthelot et al. 2020, arXiv 1911.09785, section 3.1), and what is
  used in the end is a moving average of the weights.
- On pixels, since the changes that leave a class as it is are known there; of latents only noise and mirror images
  are. Noise alone gives no new labels: a latent classifier is no surer of an image with little noise than with much.
- The classes that are sure stay in the run folder, by the hashes of the images, for whoever trains on the same data;
  so does the network, which can judge generated images (`guessing_judge`).

    probabilities, _ = pseudo_label(images, known, "abc", PseudoLabelsConfig(), seed=0)  # (N, 3)
"""

import copy
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from medisyn.config_parts import PseudoLabelsConfig
from medisyn.data.loading import ImageDataset
from medisyn.data.storage import digest, write_atomically
from medisyn.evaluation.judge import Judge, read_judge
from medisyn.evaluation.utility_classifier import CnnClassifier, augment
from medisyn.tasks.labelled_rows import UNLABELLED

logger = logging.getLogger(__name__)

LABELLED, UNLABELLED_RATIO = 32, 2  # images of a step with a label, and how many times as many without
AVERAGING = 0.995  # of the weights
ALIGNMENT = 0.99  # of the mean belief
CUTOUT = 0.22  # half of the side of the square that is blanked, as a share of the image's
FILE, NETWORK = "pseudo_labels.json", "pseudo_labels.safetensors"  # of a run: the classes, and what guessed them
LABEL_KEYS = ("class_column", "group_column", "label_fraction", "label_seed")  # of what the guesses come from


def pseudo_label(
    images: ImageDataset,
    known: np.ndarray,
    classes: Sequence[str],
    options: PseudoLabelsConfig,
    seed: int,
    others: ImageDataset | None = None,
    device: str | torch.device = "cpu",
    file: Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the classes for `images`, (N, K), and for `others`, (M, K), which are not learnt from.

    Args:
        images: all of one of the classes; mirrored in training only if all of them may be.
        known: class of each, (N,) int; `UNLABELLED` where it is not known.
        classes: names of the K classes, in order.
        options: see there.
        seed: of weights, order and changes.
        others: images to judge the network by.
        device: where it is trained.
        file: a .safetensors that keeps the network; read again if it is of the same images, classes and options.
    """
    cnn = CnnClassifier(
        resolution=options.resolution,
        batch_size=LABELLED,
        horizontal_flip=bool(images.config.horizontal_flip and images.may_flip().all()),
        device=str(device),
    )
    network = cnn.build(len(classes))
    constants = (LABELLED, UNLABELLED_RATIO, AVERAGING, ALIGNMENT, CUTOUT)
    facts = f"{options} {cnn.describe()} {constants} {seed} {list(classes)} {known.tolist()} {images.hashes()}"
    key = digest(facts.encode())
    inputs = cnn.inputs(images)
    if file is None or not _read(network, file, key):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _train(cnn, inputs, torch.from_numpy(known), len(classes), options, seed)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            judge = Judge(cnn, network, tuple((name,) for name in classes))
            write_atomically(file, judge.serialize(key=key))
    network.eval()
    judged = np.zeros((0, len(classes)), dtype=np.float32)
    return cnn.predict(network, inputs), judged if others is None else cnn.predict(network, cnn.inputs(others))


def by_hash(images: ImageDataset, classes: Mapping[int, str], apart: Sequence[ImageDataset]) -> dict[str, str]:
    """The guessed classes (row -> class) by the images' content hashes, but for copies of images in `apart`."""
    hashes, known = images.hashes(), {content for others in apart for content in others.hashes()}
    return {str(hashes[row]): name for row, name in classes.items() if hashes[row] and hashes[row] not in known}


def keep_pseudo_labels(folder: Path, labels: Mapping[str, Any], classes: Mapping[str, str]) -> None:
    """Write the classes of images, by their content hashes, into a run folder.

    Args:
        folder: of the run.
        labels: what they were guessed from, see `label_record`.
        classes: hash -> class.
    """
    kept = {name: labels[name] for name in LABEL_KEYS} | {"images": dict(classes)}
    write_atomically(folder / FILE, (json.dumps(kept, indent=0, sort_keys=True) + "\n").encode())


def with_pseudo_labels(
    row_classes: np.ndarray, images: ImageDataset, name: str, classes: Sequence[str], options: Any
) -> np.ndarray:
    """The classes of rows, (N,) int64, completed by those that a classifier's run has kept for the same images.

    Args:
        row_classes: see `labelled_rows`; a known class stays.
        images: N.
        name: of a latent classifier's run, see `read_pseudo_labels`.
        classes: in order.
        options: of the task, which say what labels may be known (`LABEL_KEYS`).

    Raises:
        FileNotFoundError: the run keeps no such classes.
        ValueError: they come from other labels, or are of other images or classes; or the file is damaged.
    """
    # the patients' column is the one key that is not the task's
    guessed = read_pseudo_labels(name, {key: getattr(options, key, images.config.group_column) for key in LABEL_KEYS})
    file = _kept_file(name)
    if foreign := sorted(set(guessed.values()) - set(classes)):
        raise ValueError(f"{file} has the class {foreign[0]!r}, which the classifier has not: {', '.join(classes)}")
    place = {label: index for index, label in enumerate(classes)}
    found = np.array(
        [place.get(guessed.get(content or ""), UNLABELLED) for content in images.hashes()], dtype=np.int64
    )
    found[row_classes != UNLABELLED] = UNLABELLED
    if not (found != UNLABELLED).any():
        raise ValueError(f"none of the images without a label is among the {len(guessed)} of {file}")
    completed = np.where(found != UNLABELLED, found, row_classes)
    rest = (completed == UNLABELLED).sum()
    logger.info("pseudo-labels: of %d images, and %d have no class", (found != UNLABELLED).sum(), rest)
    return completed


def read_pseudo_labels(name: str, labels: Mapping[str, Any] | None) -> dict[str, str]:
    """The classes that a latent classifier's run has guessed, by the images' content hashes.

    Args:
        name: of a latent classifier that was trained with `task.pseudo_labels`: its run folder, or a part of it.
        labels: what they must be guessed from (`LABEL_KEYS`); None: that is not asked.

    Raises:
        FileNotFoundError: the run keeps no such classes.
        ValueError: they come from other labels, or the file is damaged.
    """
    file = _kept_file(name)
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        guessed, origin = dict(kept["images"]), {key: kept[key] for key in LABEL_KEYS}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is damaged: train the classifier again") from None
    for key, asked in (labels or {}).items():
        if asked != origin[key]:
            raise ValueError(f"{file} was guessed from labels with {key} {origin[key]!r}, not {asked!r}")
    return guessed


def guessing_judge(
    name: str, classes: Sequence[str], labels: Mapping[str, Any] | None = None, device: str | torch.device = "cpu"
) -> Judge:
    """The network that has guessed the classes of a latent classifier's run.

    Args:
        name: see `read_pseudo_labels`.
        classes: that it must know.
        labels: what it must have learnt from (`LABEL_KEYS`); None: that is not asked.
        device: where it judges.

    Raises:
        FileNotFoundError: the run is not finished, or has no such network.
        ValueError: it has learnt from other labels, does not know a class, or its file is damaged.
    """
    read_pseudo_labels(name, labels)
    judge = read_judge(_kept_file(name).with_name(NETWORK), device)
    if lacking := sorted(set(classes) - set(judge.names)):
        raise ValueError(
            f"the judge {name} does not know the class {lacking[0]!r}; its classes: {', '.join(judge.names)}"
        )
    return judge


def _kept_file(name: str) -> Path:
    """Where a run keeps its guesses."""
    file = Path(name).expanduser() / FILE
    if not file.is_file() and file.parent.name in ("classifier", "pipeline"):  # a part of a run, unless the run's name
        file = file.parent.parent / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"no {Path(name) / FILE}: a finished run of the task latent_classifier writes it, with "
            "task.pseudo_labels; name such a run"
        )
    return file


def _read(network: nn.Module, file: Path, key: str) -> bool:
    """Load the weights of a file into the network if they are those of this key."""
    if not file.is_file():
        return False
    with safe_open(file, framework="pt") as kept:
        if (kept.metadata() or {}).get("key") != key:
            return False
        network.load_state_dict({name: kept.get_tensor(name) for name in kept.keys()})
    return True


def _train(
    cnn: CnnClassifier, inputs: Tensor, known: Tensor, number_of_classes: int, options: PseudoLabelsConfig, seed: int
) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    network = cnn.build(number_of_classes).train()
    averaged = copy.deepcopy(network).eval()
    optimizer = torch.optim.AdamW(network.parameters(), lr=cnn.learning_rate, weight_decay=cnn.weight_decay)
    labelled = torch.nonzero(known != UNLABELLED)[:, 0]
    shares = torch.bincount(known[labelled], minlength=number_of_classes) / len(labelled)
    mean_belief, warmup = shares.clone(), max(1, options.steps // 20)
    for step in tqdm(range(options.steps), desc="pseudo-labels", unit="step", leave=False):
        rate = min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * cnn.learning_rate
        own = labelled[torch.randint(len(labelled), (LABELLED,), generator=rng)]
        others = torch.randint(len(known), (UNLABELLED_RATIO * LABELLED,), generator=rng)
        weak = augment(cnn.pixels(inputs[torch.cat([own, others])]), rng, cnn.horizontal_flip)
        again = augment(cnn.pixels(inputs[others]), rng, cnn.horizontal_flip)
        logits = network(torch.cat([weak, strongly_changed(again, rng)]))
        on_own, on_weak, on_strong = logits.split([len(own), len(others), len(others)])
        with torch.no_grad():
            belief = on_weak.softmax(dim=1)
            mean_belief = ALIGNMENT * mean_belief + (1 - ALIGNMENT) * belief.mean(dim=0).cpu()
            belief = belief * (shares / mean_belief).to(belief.device)
            sure, target = (belief / belief.sum(dim=1, keepdim=True)).max(dim=1)
        loss = F.cross_entropy(on_own, known[own].to(logits.device), label_smoothing=cnn.label_smoothing)
        consistency = F.cross_entropy(on_strong, target, reduction="none")
        loss = loss + (consistency * (sure > options.threshold)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _average(averaged, network, min(AVERAGING, (1 + step) / (10 + step)))
    return averaged


@torch.no_grad()
def _average(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    for old, new in zip(averaged.state_dict().values(), network.state_dict().values(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)


def strongly_changed(images: Tensor, rng: torch.Generator) -> Tensor:
    """Turned, sheared, scaled and shifted, other brightness, contrast and tint, blurred at times, a square blanked.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        rng: on the CPU.
    """
    count, side = len(images), images.shape[-1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(count, *shape, generator=rng)).to(images.device)

    angle, scale, shear = uniform(-math.pi / 6, math.pi / 6), uniform(0.75, 1.25), uniform(-0.2, 0.2)
    cosine, sine = angle.cos(), angle.sin()
    rows = [scale * cosine, shear - sine, uniform(-0.2, 0.2), sine, scale * cosine, uniform(-0.2, 0.2)]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(count, 2, 3), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    images = images * uniform(0.5, 1.5, 1, 1, 1) + uniform(-0.3, 0.3, 1, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    images = torch.where(uniform(0, 1, 1, 1, 1) < 0.3, blurred, images)
    place = torch.arange(side, device=images.device)
    far = [(place - uniform(0, side, 1)).abs() >= CUTOUT * side for _ in range(2)]
    return images * (far[0][:, None, :, None] | far[1][:, None, None, :])
