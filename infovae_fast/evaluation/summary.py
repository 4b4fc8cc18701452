"""All metrics of a trained model on a data set."""

from collections.abc import Sequence
from importlib.util import find_spec
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from infovae_fast.arguments import check_seed
from infovae_fast.data import ImageData, to_unit
from infovae_fast.evaluation.classes import class_divergence, fit_classifier, predict_classes
from infovae_fast.evaluation.covariance import log_det_covariance
from infovae_fast.evaluation.full_mmd import full_set_mmd
from infovae_fast.evaluation.mutual_information import mutual_information
from infovae_fast.evaluation.semi_supervised import semi_supervised_errors
from infovae_fast.models import InfoVAE, Posterior
from infovae_fast.models.networks import evaluating, like

BATCH = 500  # images at once
DECODED = 50  # of them, for an autoregressive decoder, which keeps many maps a pixel
GENERATED = 1000  # images whose classes are counted
KNOWN_LABELS = 100


def encode_all(model: InfoVAE, x: Tensor) -> tuple[Posterior, Tensor]:
    """q(z|x) of all images x [N, C, H, W], in eval mode, and one draw z [N, D] from each."""
    with evaluating(model), torch.no_grad():
        parts = [model.encode(batch) for batch in x.split(BATCH)]
        posterior = Posterior(torch.cat([p.mu for p in parts]), torch.cat([p.logvar for p in parts]))
        return posterior, posterior.rsample()


def summarize(model: InfoVAE, data: ImageData, *, n_samples: int = 100, seed: int = 0) -> dict[str, Any]:
    """Metrics on the training and the test set, in nats per image where they are densities.

    Args:
        n_samples: importance samples for the log-likelihood of the test set.
        seed: of every draw; the same model and seed give the same numbers.

    Returns:
        for "train" and "test": images (their number), reconstruction (-log p(x|z)), kl, log_det_covariance,
        full_set_mmd, mutual_information; for "test" also log_likelihood, log_likelihood_standard_error (of the mean
        over the images, both sources of noise), effective_samples (the median), importance_samples, and svm_error, the
        mean of `semi_supervised_errors` with 100 labels. For "generated", where the images have labels: images,
        class_divergence from the training set, as a classifier tells the classes, and classifier_error, how often that
        is wrong on the test set. A PixelCNN's images are drawn, others are means of p(x|z). None where not defined: kl
        where it is infinite (a uniform prior), kl and the log-likelihood's where the prior has no density, the others
        of too few images or labels; without scikit-learn there is no svm_error and nothing "generated". Of grey values
        under a Bernoulli decoder -log p(x|z) is a cross-entropy, and what is made of it no log-likelihood.

    Raises:
        ValueError: n_samples below 1, a seed below 0 or above 2^32 - 1.
    """
    if n_samples < 1:  # before what takes long
        raise ValueError(f"n_samples: got {n_samples}; accepted: 1 or more")
    check_seed("seed", seed)
    device = next(model.parameters()).device
    size = DECODED if model.autoregressive else BATCH
    metrics: dict[str, Any] = {}
    codes: list[Tensor] = []
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for part, images in (("train", data.train_images), ("test", data.test_images)):
            x = to_unit(images, data.levels).to(like(model.encoder))
            posterior, z = encode_all(model, x)
            codes.append(z)
            nll = torch.cat(
                [
                    model.likelihood.nll(model.decode(z_, x_), x_)
                    for z_, x_ in zip(z.split(size), x.split(size), strict=True)
                ]
            )
            metrics[part] = {
                "images": len(x),
                "reconstruction": nll.mean().item(),
                "kl": model.prior.kl(posterior, z).mean().item() if model.prior.has_kl else None,
                "log_det_covariance": log_det_covariance(z) if len(z) > z.shape[1] else None,
                "full_set_mmd": full_set_mmd(z, model.prior) if len(z) > 1 else None,
                "mutual_information": mutual_information(posterior, z),
            }
        metrics["test"] |= _log_likelihood(model, x.split(size), n_samples)
        learns = find_spec("sklearn") is not None
        metrics["test"]["svm_error"] = _svm_error(data, codes, seed) if learns else None
        labelled = data.train_labels is not None and data.test_labels is not None
        if learns and labelled and len(data.train_labels.unique()) > 1:  # type: ignore[union-attr]
            metrics["generated"] = _generated(model, data)
    return metrics


def _log_likelihood(model: InfoVAE, batches: Sequence[Tensor], n_samples: int) -> dict[str, float | None]:
    if not model.prior.has_density:
        names = "log_likelihood", "log_likelihood_standard_error", "effective_samples", "importance_samples"
        return dict.fromkeys(names)
    parts = [model.log_likelihood(x, n_samples) for x in batches]
    value = torch.cat([p.log_likelihood for p in parts])
    return {
        "log_likelihood": value.mean().item(),
        "log_likelihood_standard_error": (value.std() / len(value) ** 0.5).item() if len(value) > 1 else None,
        "effective_samples": torch.cat([p.effective_samples for p in parts]).median().item(),
        "importance_samples": n_samples,
    }


def _svm_error(data: ImageData, codes: Sequence[Tensor], seed: int) -> float | None:
    labels, test_labels = data.train_labels, data.test_labels
    if labels is None or test_labels is None or len(labels) < KNOWN_LABELS:
        return None
    counts = labels.unique(return_counts=True)[1]
    if len(counts) < 2 or len(counts) > KNOWN_LABELS // 2 or int(counts.min()) < 2:
        return None
    z, test_z = codes
    return mean(semi_supervised_errors(z, labels, test_z, test_labels, KNOWN_LABELS, seed=seed))


def _generated(model: InfoVAE, data: ImageData) -> dict[str, float]:
    assert data.train_labels is not None and data.test_labels is not None
    classifier = fit_classifier(to_unit(data.train_images, data.levels), data.train_labels)
    classes = predict_classes(classifier, to_unit(data.test_images, data.levels))
    generated = [model.sample(part, mean=not model.autoregressive) for part in _parts(GENERATED)]
    return {
        "images": GENERATED,
        "class_divergence": class_divergence(data.train_labels, predict_classes(classifier, torch.cat(generated))),
        "classifier_error": (classes != data.test_labels).double().mean().item(),
    }


def _parts(n: int) -> list[int]:
    return [min(BATCH, n - start) for start in range(0, n, BATCH)]
