"""The paper's metrics against closed forms."""

import math
import sys
from dataclasses import replace

import pytest
import torch

from infovae_fast import InfoVAE, load_data, mmd
from infovae_fast.data import to_unit
from infovae_fast.evaluation import (
    class_divergence,
    encode_all,
    fit_classifier,
    full_set_mmd,
    log_det_covariance,
    mutual_information,
    predict_classes,
    semi_supervised_errors,
    summarize,
)
from infovae_fast.models import Posterior, SamplerPrior, StandardNormal


def test_log_det_covariance():
    torch.manual_seed(0)
    a = torch.randn(3, 3, dtype=torch.float64)
    z = torch.randn(200_000, 3, dtype=torch.float64) @ a.T
    assert log_det_covariance(z) == pytest.approx(2 * math.log(abs(torch.linalg.det(a).item())), abs=0.03)
    centred = z - z.mean(0)
    exact = torch.logdet(centred.T @ centred / (len(z) - 1)).item()
    assert log_det_covariance(z + 1000) == pytest.approx(exact, rel=1e-6)
    assert log_det_covariance(z[:, :1]) == pytest.approx(math.log(z[:, 0].var().item()), rel=1e-12)
    with pytest.raises(ValueError, match=r"z: got shape \(3, 3\); accepted: \[N, D\] with N > D"):
        log_det_covariance(z[:3])


def test_log_det_covariance_of_a_plane_and_of_axes_in_other_units():
    z = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for added in (z[:, :1] + z[:, 1:2], *(torch.full((500, 1), c, dtype=z.dtype) for c in (7.0, 0.1, 0.3, 1e-3))):
        flat = torch.cat([z, added], 1)
        assert log_det_covariance(flat) == log_det_covariance(flat.float()) == -math.inf
    units = torch.tensor([1e-12, 1.0, 1e9])
    moved = log_det_covariance(z * units) - log_det_covariance(z)
    assert moved == pytest.approx(2 * math.log(1e-3), rel=1e-6)
    with pytest.raises(ValueError, match="z: 1 of 500 points hold NaN"):
        log_det_covariance(torch.where(torch.arange(500)[:, None] == 3, math.nan, z))
    with pytest.raises(TypeError, match="z: got list"):
        log_det_covariance([[0.0], [1.0]])


def test_mutual_information_where_the_precision_overflows():
    mu, logvar = torch.zeros(3, 1), torch.full((3, 1), -750.0)
    posterior = Posterior(mu + torch.arange(3).view(3, 1), logvar)
    assert mutual_information(posterior, posterior.mu) == pytest.approx(math.log(3))


def test_mutual_information_of_a_gaussian_channel():
    """x ~ N(0, I), q(z|x) = N(x, s^2 I): I(x; z) = D/2 log(1 + 1/s^2)."""
    torch.manual_seed(0)
    s = 0.7
    mu = torch.randn(3000, 2)
    posterior = Posterior(mu, torch.full_like(mu, 2 * math.log(s)))
    value = mutual_information(posterior, posterior.rsample())
    assert value == pytest.approx(math.log(1 + 1 / s**2), abs=0.05)


def test_mutual_information_extremes():
    """0 where the code ignores the image; log N where every image has a code of its own, also far below underflow."""
    torch.manual_seed(0)
    zero = torch.zeros(500, 3)
    assert mutual_information(Posterior(zero, zero), torch.randn(500, 3)) == pytest.approx(0, abs=1e-12)
    mu = torch.randn(500, 100) * 50
    posterior = Posterior(mu, torch.full_like(mu, -8.0))
    assert mutual_information(posterior, posterior.rsample()) == pytest.approx(math.log(500), rel=1e-12)


@pytest.mark.parametrize("lost", [1e-4, 0.0])  # 0: by differences
def test_mutual_information_is_the_double_loop(lost, monkeypatch):
    torch.manual_seed(0)
    mu, logvar = torch.randn(30, 2, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    z = Posterior(mu, logvar).rsample()
    total = 0.0
    for i in range(30):
        densities = [
            math.prod(
                math.exp(-((z[i, d] - mu[j, d]) ** 2) / (2 * logvar[j, d].exp()))
                / math.sqrt(2 * math.pi * logvar[j, d].exp())
                for d in range(2)
            )
            for j in range(30)
        ]
        total += math.log(densities[i]) - math.log(sum(densities) / 30)
    module = sys.modules[mutual_information.__module__]
    monkeypatch.setattr(module, "LOST", lost)
    for rows in (7, 1024):
        monkeypatch.setattr(module, "ENTRIES", rows * (60 if lost == 0 else 30))
        assert mutual_information(Posterior(mu, logvar), z) == pytest.approx(total / 30, rel=1e-12)


def test_full_set_mmd():
    torch.manual_seed(0)
    z = torch.randn(500, 2)
    assert abs(full_set_mmd(z, StandardNormal(2))) < 5e-3 < full_set_mmd(z + 1, StandardNormal(2))
    torch.manual_seed(1)
    value = full_set_mmd(z, StandardNormal(2), "wae_imq")
    torch.manual_seed(1)
    assert value == mmd(z, torch.randn(500, 2), "wae_imq").item()


@pytest.mark.parametrize("logvar", [-8.0, -20.0, -40.0, -80.0])
def test_mutual_information_of_equal_images(logvar):
    """Each twice, and the pairs told apart: log (N / 2)."""
    torch.manual_seed(0)
    mu = 3 * torch.randn(200, 10, dtype=torch.float64).repeat(2, 1)
    posterior = Posterior(mu, torch.full_like(mu, logvar))
    assert mutual_information(posterior, posterior.rsample()) == pytest.approx(math.log(200), rel=1e-6)


def test_mutual_information_needs_a_draw_of_each():
    mu = torch.zeros(5, 2)
    for z in (torch.zeros(1, 2), torch.zeros(4, 2), torch.zeros(2)):
        with pytest.raises(
            ValueError, match=r"got shapes z .*, mu \(5, 2\), logvar \(5, 2\); accepted: one draw from each"
        ):
            mutual_information(Posterior(mu, mu), z)
    with pytest.raises(ValueError, match="got shapes z"):
        mutual_information(Posterior(mu[:0], mu[:0]), mu[:0])
    with pytest.raises(ValueError, match=r"mu \(\d+, \d+\), logvar \(1, \d+\)"):
        mutual_information(Posterior(mu, mu[:1]), mu)
    broken = mu.clone()
    broken[2, 1] = torch.nan
    with pytest.raises(ValueError, match="logvar: got 1 values that are not finite"):
        mutual_information(Posterior(mu, broken), mu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_metrics_of_a_model_of_another_dtype(dtype):
    data = load_data("digits", train_size=20)
    metrics = summarize(InfoVAE.from_config(data.shape, 2).to(dtype), data, n_samples=2)
    assert all(math.isfinite(value) for value in metrics["test"].values() if isinstance(value, float))


def test_metrics_leave_the_model_as_it_was():
    data = load_data("digits", train_size=20)
    torch.manual_seed(0)
    model = InfoVAE.from_config(data.shape, 2).train()
    model.decoder.eval()
    modes = [part.training for part in model.modules()]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    summarize(model, data, n_samples=2)
    encode_all(model, data.test_images.float() / 16)
    assert [part.training for part in model.modules()] == modes and any(modes) and not all(modes)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_summary():
    data = load_data("digits", train_size=100)
    torch.manual_seed(0)
    model = InfoVAE.from_config(data.shape, 3, objective="elbo")
    metrics = summarize(model, data, n_samples=5)
    assert metrics == summarize(model, data, n_samples=5)
    assert metrics != summarize(model, data, n_samples=5, seed=1)
    for part, n in (("train", 100), ("test", 360)):
        row = metrics[part]
        assert row["images"] == n and all(math.isfinite(value) for value in row.values())
        x = (data.train_images if part == "train" else data.test_images).float() / 16
        posterior, _ = encode_all(model, x)
        kl = 0.5 * (posterior.mu**2 + posterior.logvar.exp() - 1 - posterior.logvar).sum(1).mean().item()
        assert row["kl"] == pytest.approx(kl, rel=1e-5)
    test = metrics["test"]
    assert test["log_likelihood"] >= -test["reconstruction"] - test["kl"] - 1  # the ELBO is a lower bound
    assert 1 <= test["effective_samples"] <= 5 == test["importance_samples"]


def test_summary_of_too_few_draws_or_images():
    data = load_data("digits", train_size=20)
    model = InfoVAE.from_config(data.shape, 2, prior="uniform")
    with pytest.raises(ValueError, match=r"seed=-1 must be an integer in 0\.\.4294967295"):
        summarize(model, data, seed=-1)
    with pytest.raises(ValueError, match="n_samples: got 0; accepted: 1 or more"):
        summarize(model, data, n_samples=0)
    one = replace(data, test_images=data.test_images[:1], test_labels=data.test_labels[:1])
    assert (
        summarize(InfoVAE.from_config(data.shape, 2), one, n_samples=2)["test"]["log_likelihood_standard_error"] is None
    )


def test_summary_where_the_kl_is_infinite_or_the_prior_has_no_density():
    data = load_data("digits", train_size=20)
    model = InfoVAE.from_config(data.shape, 2, prior="uniform")
    metrics = summarize(model, data)
    assert metrics["train"]["kl"] is None and math.isfinite(metrics["test"]["log_likelihood"])
    model.prior = SamplerPrior(2, lambda n: torch.randn(n, 2))
    metrics = summarize(model, data, n_samples=5)
    assert metrics["train"]["kl"] is None is metrics["test"]["log_likelihood"]


# Classes


def test_class_divergence_is_the_kl_of_the_shares():
    real, generated = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 2, 2, 2, 2, 1])
    shares = [(2 / 6, 1 / 8), (1 / 6, 3 / 8), (3 / 6, 4 / 8)]
    assert class_divergence(real, generated) == pytest.approx(sum(c * math.log(c / d) for c, d in shares), rel=1e-12)
    assert class_divergence(real, real.flip(0)) == 0
    assert class_divergence(real, real[real != 1]) == math.inf
    assert class_divergence(real[real != 1], real) == pytest.approx(math.log(6 / 5))


def test_class_divergence_of_a_perfect_model():
    torch.manual_seed(0)
    real, draws = torch.arange(10).repeat(100), [torch.randint(10, (1000,)) for _ in range(300)]
    values = torch.tensor([class_divergence(real, generated) for generated in draws])
    assert values.mean() == pytest.approx(9 / 2000, rel=0.1)


def test_class_divergence_refuses_what_is_no_label():
    for bad in (torch.ones(3), [1, 2]):
        with pytest.raises(TypeError, match=r"generated: got .*; accepted: a tensor of integer labels"):
            class_divergence(torch.ones(3).long(), bad)
    with pytest.raises(ValueError, match=r"real: got shape \(0,\); accepted: \[N\] with N > 0"):
        class_divergence(torch.ones(0).long(), torch.ones(3).long())


def test_the_classifier_of_digits():
    data = load_data("digits")
    classifier = fit_classifier(to_unit(data.train_images, 17), data.train_labels)
    assert (predict_classes(classifier, to_unit(data.test_images, 17)) != data.test_labels).double().mean() < 0.03


def test_semi_supervised_errors_of_codes_that_tell_all_and_nothing():
    torch.manual_seed(0)
    labels, test_labels = torch.arange(10).repeat(100), torch.arange(10).repeat(40)
    corners = torch.randn(10, 4) * 10
    z, test_z = (corners[y] + 0.1 * torch.randn(len(y), 4) for y in (labels, test_labels))
    assert semi_supervised_errors(z, labels, test_z, test_labels, draws=3) == [0.0] * 3
    noise = semi_supervised_errors(torch.randn(1000, 4), labels, torch.randn(400, 4), test_labels, draws=3)
    assert all(0.8 < error < 0.97 for error in noise)


def test_semi_supervised_errors_are_of_the_seed_and_know_no_other_labels():
    """Labels that are not among the known ones, and those of the test set, do not change what is learned."""
    torch.manual_seed(0)
    labels, z, test_z = torch.arange(4).repeat(50), torch.randn(200, 2), torch.randn(100, 2)
    z[:, 0] += labels
    zeros, options = torch.zeros(100).long(), {"n_labels": 20, "draws": 2}
    first, again, other = (semi_supervised_errors(z, labels, test_z, zeros, **options, seed=seed) for seed in (1, 1, 2))
    assert first == again != other and len(first) == 2
    shares = [
        1 - torch.tensor(semi_supervised_errors(z, labels, test_z, zeros + k, **options, seed=1)) for k in range(4)
    ]
    torch.testing.assert_close(torch.stack(shares).sum(0), torch.ones(2))  # each prediction is one of the four


def test_semi_supervised_errors_refuse_too_many_and_too_few_labels():
    z, labels = torch.randn(30, 2), torch.arange(10).repeat(3)
    for n in (19, 2.5, True):
        with pytest.raises(ValueError, match=f"n_labels: got {n!r}; accepted: an integer, 20 or more"):
            semi_supervised_errors(z, labels, z, labels, n)
    with pytest.raises(ValueError, match="n_labels: got 31 of 30 labels in 10 classes, of which the rarest has 3"):
        semi_supervised_errors(z, labels, z, labels, 31)
    with pytest.raises(ValueError, match="draws: got 0; accepted: an integer, 1 or more"):
        semi_supervised_errors(z, labels, z, labels, 20, draws=0)


def test_semi_supervised_errors_refuse_labels_of_other_shapes():
    z, labels = torch.randn(40, 2), torch.arange(4).repeat(10)
    for given in ((labels[:30], z, labels), (labels, z, labels[:, None]), (labels, z, labels[:1])):
        with pytest.raises(ValueError, match=r"labels: got shape .* for codes \(40, 2\); accepted: \[N\] for codes"):
            semi_supervised_errors(z, *given, 20)


@pytest.mark.parametrize("decoder", ["mlp", {"name": "pixelcnn", "layers": 1, "maps": 4}])
def test_summary_of_classes_is_that_of_the_functions(decoder, monkeypatch):
    data, seen = load_data("digits", train_size=200, binarize="static"), []
    torch.manual_seed(0)
    model = InfoVAE.from_config(data.shape, 2, decoder=decoder)
    sample = InfoVAE.sample

    def watched(*args, **options):
        seen.append(sample(*args, **options))
        return seen[-1]

    monkeypatch.setattr(InfoVAE, "sample", watched)
    metrics = summarize(model, data, n_samples=1, seed=3)
    generated, x, test_x = torch.cat(seen), data.train_images.float(), data.test_images.float()
    assert len(generated) == metrics["generated"]["images"] == 1000
    assert bool((generated == generated.round()).all()) == model.autoregressive  # drawn, or means
    classifier = fit_classifier(x, data.train_labels)
    divergence = class_divergence(data.train_labels, predict_classes(classifier, generated))
    assert metrics["generated"]["class_divergence"] == divergence
    wrong = (predict_classes(classifier, test_x) != data.test_labels).double().mean().item()
    assert metrics["generated"]["classifier_error"] == wrong
    watched_errors = []
    monkeypatch.setattr(
        "infovae_fast.evaluation.summary.semi_supervised_errors",
        lambda z, labels, test_z, test_labels, n, seed: (
            watched_errors.append((z, labels, test_z, test_labels, n, seed)) or [0.25, 0.5]
        ),
    )
    assert summarize(model, data, n_samples=1, seed=3)["test"]["svm_error"] == 0.375
    [(z, labels, test_z, test_labels, n, seed)] = watched_errors
    assert (len(z), len(test_z), n, seed) == (200, 360, 100, 3)
    assert torch.equal(labels, data.train_labels) and torch.equal(test_labels, data.test_labels)


def test_summary_without_scikit_learn(monkeypatch):
    data = load_data("digits", train_size=100)
    monkeypatch.setattr("infovae_fast.evaluation.summary.find_spec", lambda name: None)
    metrics = summarize(InfoVAE.from_config(data.shape, 2), data, n_samples=1)
    assert metrics["test"]["svm_error"] is None and "generated" not in metrics
    assert math.isfinite(metrics["test"]["log_likelihood"])


def test_summary_of_images_without_labels_or_of_too_few():
    data = load_data("digits", train_size=99)
    model = InfoVAE.from_config(data.shape, 2)
    metrics = summarize(model, data, n_samples=1)
    assert metrics["test"]["svm_error"] is None and metrics["generated"]["class_divergence"] > 0
    metrics = summarize(model, replace(data, train_labels=None), n_samples=1)
    assert metrics["test"]["svm_error"] is None and "generated" not in metrics
