"""Temperatures of a classifier, and what says how far its probabilities can be trusted.

Probabilities are calibrated if what is called 0.8 is right in 0.8 of cases; a temperature divides the logits.

    temperature = fit_temperature(logits, classes, images=len(classes))
    calibration_scores(logits / temperature, classes)["calibration_error"]
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURES = (0.2, 5.0)  # range that is searched, in steps of 1 %
# standard deviation of the normal prior on a log temperature: a handful of images that are all told apart would ask
# for the steepest gradient of the range
TEMPERATURE_PRIOR = math.log(2)
CALIBRATION_BINS = 15


def fit_temperature(logits: Tensor, classes: Tensor, images: int) -> float:
    """What to divide logits by: most probable by their cross-entropy (Guo et al. 2017, section 4.2) and a prior.

    Args:
        logits: (N, K), several of an image where it was noised several times.
        classes: (N,) in [0, K).
        images: how many there are, for their weight beside the prior.
    """
    low, high = map(math.log, TEMPERATURES)
    logs = torch.arange(low, high, 0.01, dtype=torch.float64)
    losses = torch.stack([F.cross_entropy(logits.double() / each.exp(), classes) for each in logs])
    best = (images * losses + 0.5 * (logs / TEMPERATURE_PRIOR).square()).argmin()
    return round(float(logs[best].exp()), 4)


def require_torchmetrics() -> None:
    """Fail before the training if the measurement at its end could not run."""
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise ImportError("the calibration error needs torchmetrics: pip install medisyn[eval]") from error


def calibration_scores(logits: Tensor, classes: Tensor) -> dict[str, float]:
    """Cross-entropy, accuracy and expected calibration error of logits (N, K) for classes (N,)."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    error = multiclass_calibration_error(
        logits.softmax(dim=1), classes, num_classes=logits.shape[1], n_bins=CALIBRATION_BINS
    )
    accuracy = (logits.argmax(dim=1) == classes).float().mean()
    loss = F.cross_entropy(logits, classes)
    return {"loss": loss.item(), "accuracy": accuracy.item(), "calibration_error": error.item()}
