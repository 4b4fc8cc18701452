"""How well do codes tell the class of an image to one who knows few labels? (section 5.2 of the InfoVAE paper)"""

import numpy as np
from torch import Tensor

from infovae_fast.arguments import is_integer
from infovae_fast.data_files import need

GRID = {"svc__C": [1.0, 10.0, 100.0], "svc__gamma": [0.1, 0.3, 1.0]}  # of coordinates scaled to variance 1


def semi_supervised_errors(
    z: Tensor,
    labels: Tensor,
    test_z: Tensor,
    test_labels: Tensor,
    n_labels: int = 100,
    *,
    draws: int = 5,
    seed: int = 0,
) -> list[float]:
    """The share of test images that a support vector machine on their codes gets wrong, for each of `draws` choices of
    the labels that it knows.

    An SVC with an RBF kernel of standardised codes. C and gamma are chosen by cross-validation among the known labels
    (the authors' code keeps the gamma of the least test error).

    Args:
        z: codes of the training set, [N, D]. labels: [N]. test_z, test_labels: of the test set.
        n_labels: how many are known, as many of each class as possible.
        draws: choices of those. seed: of the choices.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: other shapes; more labels wanted than there are, or fewer than two of a class.
    """
    for name, t, codes in (("labels", labels, z), ("test_labels", test_labels, test_z)):
        if t.shape != codes.shape[:1] or codes.ndim != 2 or not len(codes):
            got = f"shape {tuple(t.shape)} for codes {tuple(codes.shape)}"
            raise ValueError(f"{name}: got {got}; accepted: [N] for codes [N, D], N > 0")
    classes, counts = np.unique(labels.cpu().numpy(), return_counts=True)
    for name, value, least in (("n_labels", n_labels, 2 * len(classes)), ("draws", draws, 1)):
        if not is_integer(value) or value < least:
            raise ValueError(f"{name}: got {value!r}; accepted: an integer, {least} or more")
    if n_labels > len(z) or len(classes) < 2 or counts.min() < 2:
        got = f"{n_labels} of {len(z)} labels in {len(classes)} classes, of which the rarest has {counts.min()}"
        raise ValueError(
            f"n_labels: got {got}; accepted: no more than there are, and two or more classes of two or more"
        )
    parts = (
        need(f"sklearn.{part}", "scikit-learn") for part in ("model_selection", "pipeline", "preprocessing", "svm")
    )
    model_selection, pipeline, preprocessing, svm = parts
    x, test_x = (t.detach().cpu().double().numpy() for t in (z, test_z))
    y, test_y = (t.cpu().numpy() for t in (labels, test_labels))
    random, errors = np.random.RandomState(seed), []
    for _ in range(draws):
        known = _balanced(y, n_labels, random)
        folds = int(min(5, np.unique(y[known], return_counts=True)[1].min()))
        model = pipeline.make_pipeline(preprocessing.StandardScaler(), svm.SVC())
        model = model_selection.GridSearchCV(model, GRID, cv=folds).fit(x[known], y[known])
        errors.append(float((model.predict(test_x) != test_y).mean()))
    return errors


def _balanced(y: np.ndarray, n: int, random: np.random.RandomState) -> np.ndarray:
    """n places, as many of each class as possible."""
    order = random.permutation(len(y))
    rank = np.empty(len(y), dtype=np.int64)  # within its class
    for label in np.unique(y):
        own = order[y[order] == label]
        rank[own] = np.arange(len(own))
    return order[np.argsort(rank[order], kind="stable")][:n]
