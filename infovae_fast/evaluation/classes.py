"""Do generated images fall into the classes as often as real ones? (section 5.2 of the InfoVAE paper)"""

import math
from typing import Any

import torch
from torch import Tensor

from infovae_fast.data import some_places
from infovae_fast.data_files import need

MOST = 10_000  # images that a classifier learns from: its time grows with their square


def class_divergence(real: Tensor, generated: Tensor) -> float:
    """KL(c || c^) = sum_k c_k log(c_k / c^_k) in nats, c the shares of the classes in one set and c^ in the other.

    Args:
        real, generated: integer labels, [N] and [M], those of generated images from a classifier (`fit_classifier`).

    0 where the shares are equal; inf where a class of `real` is never generated. A perfect model has (K - 1) / (2 M)
    on average, K the number of classes, and more where the classifier errs. The authors' code has c = 1/K for all
    classes instead of their shares.

    Raises:
        TypeError: not integers. ValueError: no labels, or more than one dimension.
    """
    for name, t in (("real", real), ("generated", generated)):
        if not isinstance(t, Tensor) or t.is_floating_point() or t.is_complex():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: got {got}; accepted: a tensor of integer labels")
        if t.ndim != 1 or not len(t):
            raise ValueError(f"{name}: got shape {tuple(t.shape)}; accepted: [N] with N > 0")
    total = 0.0
    for label in real.unique():
        c, other = (float((t == label).double().mean()) for t in (real, generated))
        total += c * math.log(c / other) if other else math.inf
    return total


def fit_classifier(images: Tensor, labels: Tensor) -> Any:
    """A support vector machine (scikit-learn's SVC, RBF kernel) of images [N, C, H, W] in [0, 1] and labels [N].

    Learns from at most `MOST` of them, drawn once and for all: they may lie in an order.
    `predict_classes(classifier, images)` tells labels.

    Raises:
        ImportError: scikit-learn is missing. ValueError: fewer than two classes.
    """
    some = some_places(len(images), MOST)
    classifier = need("sklearn.svm", "scikit-learn").SVC(C=10.0)
    return classifier.fit(images[some].flatten(1).cpu().numpy(), labels[some].cpu().numpy())


def predict_classes(classifier: Any, images: Tensor) -> Tensor:
    """int64 [N] of images [N, C, H, W]."""
    return torch.from_numpy(classifier.predict(images.flatten(1).cpu().float().numpy())).long()
