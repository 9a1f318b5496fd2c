"""k-nearest-neighbour accuracy: how well features alone, without any training, tell classes apart.

- The vote of DINO (Caron et al. 2021, section 4.1; Wu et al. 2018): the k training images of largest cosine similarity
  s vote for their class with weight exp(s / temperature).
- Nothing is fitted, so the number follows the progress of a self-supervised encoder and compares encoders.

    bank = LabelledFeatures(training_features, training_findings)
    knn_accuracy(bank, LabelledFeatures(validation_features, validation_findings))["accuracy"]
"""

import numpy as np

from .agreement import LabelledFeatures
from .scores import score_predictions

TEMPERATURE = 0.07


def knn_predict(
    bank: LabelledFeatures, features: np.ndarray, neighbours: int = 20, temperature: float = TEMPERATURE
) -> list[str]:
    """The class of each row of features (N, D) by the weighted vote of its neighbours in the bank.

    Images of the bank whose class is not known (None) have no vote. Of equal votes the class first in the alphabet
    wins.

    Args:
        bank: Features of labelled images.
        features: To be classified, of the same width.
        neighbours: How many vote; at least 1, and no more than there are.
        temperature: Above 0; a small one listens to the nearest only.

    Raises:
        ValueError: Too few labelled images, or features of another width.
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError as error:
        raise ImportError("k-NN accuracy needs scikit-learn: pip install medisyn[eval]") from error
    classes = bank.classes()
    known = [row for row, label in enumerate(classes) if label is not None]
    if not 1 <= neighbours <= len(known):
        raise ValueError(f"neighbours={neighbours} of {len(known)} labelled images; valid: 1 to {len(known)}")
    if bank.features.shape[1:] != features.shape[1:]:
        raise ValueError(f"features of width {features.shape[1:]} against a bank of width {bank.features.shape[1:]}")
    # the distance is 1 - s, and a factor common to all votes does not matter
    vote = KNeighborsClassifier(neighbours, weights=lambda distance: np.exp(-distance / temperature), metric="cosine")
    vote.fit(bank.features[known], [classes[row] for row in known])
    return vote.predict(features).tolist()


def knn_accuracy(
    bank: LabelledFeatures, evaluated: LabelledFeatures, neighbours: int = 20, temperature: float = TEMPERATURE
) -> dict:
    """Scores of `knn_predict` on the images of `evaluated` whose class is known.

    Returns:
        As `score_predictions`: `images`, `accuracy`, `balanced_accuracy`, their intervals over patients
        (`evaluated.groups`), `per_class` and `confusion_matrix`.

    Raises:
        ValueError: As `knn_predict`, or no image of `evaluated` has a class.
    """
    classes = evaluated.classes()
    known = [row for row, label in enumerate(classes) if label is not None]
    if not known:
        raise ValueError("none of the evaluated images has a class")
    predicted = knn_predict(bank, evaluated.features[known], neighbours, temperature)
    groups = None if evaluated.groups is None else [evaluated.groups[row] for row in known]
    return score_predictions(predicted, [str(classes[row]) for row in known], groups)
