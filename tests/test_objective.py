"""Eq. 6 against its definition on a linear-Gaussian model, where every term is known exactly; presets and refusals."""

import math
import warnings

import pytest
import torch

from infovae_fast import IMQ, AdversarialLoss, MMDLoss, SteinLoss, objective
from infovae_fast.divergences import mmd, stein_direction
from infovae_fast.models import GaussianMixture, Posterior, SamplerPrior, StandardNormal, Uniform
from infovae_fast.normal_prior import NormalMMDLoss, mmd_to_normal
from infovae_fast.objective import PRESETS, Objective, objective_from_config
from tests.oracle import near

D = 3
W = torch.tensor([[0.7, -0.2, 0.4], [0.1, 0.5, -0.6]], dtype=torch.float64)  # x = z W^T + noise, [2, 3]
NOISE = 0.8


@pytest.fixture
def batch():
    """z ~ q(z|x) = N(A x + b, diag s^2) for the model p(x|z) = N(W z, 0.8^2 I), p(z) = N(0, I)."""
    torch.manual_seed(0)
    x = torch.randn(64, 2, dtype=torch.float64)
    mu = x @ torch.randn(2, D, dtype=torch.float64) + 0.3
    logvar = torch.tensor([0.2, -1.0, 0.5], dtype=torch.float64).expand(64, D)
    posterior = Posterior(mu, logvar)
    z = posterior.rsample()
    nll = 0.5 * (((x - z @ W.T) / NOISE) ** 2 + math.log(2 * math.pi * NOISE**2)).sum(1)
    return x, posterior, z, nll


def exact_terms(x, posterior):
    """E_q[-log p(x|z)] and KL(q(z|x) || p(z)) of every example, by the Gaussian integrals."""
    variance = posterior.logvar.exp()
    residual = ((x - posterior.mu @ W.T) ** 2).sum(1) + variance @ (W**2).sum(0)
    reconstruction = residual / (2 * NOISE**2) + math.log(2 * math.pi * NOISE**2)  # 2 data dimensions
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior.mu, variance.sqrt()), torch.distributions.Normal(0.0, 1.0)
    ).sum(1)
    return reconstruction, kl


class FixedPrior:
    """A prior whose one sample is known."""

    def __init__(self, y):
        self.y = y

    def sample(self, n):
        return self.y[:n]

    def score(self, z):
        return -z


@pytest.mark.parametrize(("alpha", "lambda_"), [(0.0, 1.0), (0.3, 5.0), (1.0, 100.0), (-3.0, 4.0), (0.5, 0.5)])
def test_equation_6(batch, alpha, lambda_):
    """loss = E[-log p(x|z)] + (1 - alpha) E KL + (alpha + lambda - 1) MMD, term by term and in the gradient."""
    x, posterior, z, _ = batch
    reconstruction, kl = exact_terms(x, posterior)
    y = torch.randn(64, D, dtype=torch.float64)
    z = z.clone().requires_grad_()
    terms = Objective(alpha, lambda_, MMDLoss())(reconstruction, kl, z, FixedPrior(y))
    weight = alpha + lambda_ - 1
    expected = reconstruction.mean() + (1 - alpha) * kl.mean() + weight * mmd(z, y)
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-14)
    assert terms.reconstruction.item() == pytest.approx(reconstruction.mean().item(), rel=1e-14)
    assert terms.kl.item() == pytest.approx(kl.mean().item(), rel=1e-14)
    assert terms.divergence.item() == pytest.approx(mmd(z, y).item(), rel=1e-14)
    if weight != 0:
        (gradient,) = torch.autograd.grad(terms.loss, z)
        (wanted,) = torch.autograd.grad(weight * mmd(z, y), z)
        assert torch.allclose(gradient, wanted, rtol=1e-13, atol=0)
    else:
        assert not terms.loss.requires_grad


def test_the_terms_of_a_linear_gaussian_model(batch):
    """The model's terms are unbiased: averaged over draws of z they meet the integrals within their standard error."""
    x, posterior, _, _ = batch
    reconstruction, kl = exact_terms(x, posterior)
    draws, monte_carlo_kl = [], []
    prior = StandardNormal(D).double()
    mixture = GaussianMixture(torch.zeros(1, D), 1.0).double()  # N(0, I) by another name: KL by its samples
    for _ in range(2000):
        z = posterior.rsample()
        draws.append((0.5 * (((x - z @ W.T) / NOISE) ** 2 + math.log(2 * math.pi * NOISE**2)).sum(1)).mean())
        monte_carlo_kl.append(mixture.kl(posterior, z).mean())
    assert torch.allclose(prior.kl(posterior, z), kl, rtol=1e-13)
    for estimates, exact in ((draws, reconstruction), (monte_carlo_kl, kl)):
        estimates = torch.stack(estimates)
        error = estimates.std() / len(estimates) ** 0.5
        assert abs(estimates.mean() - exact.mean()) < 4 * error


def test_alpha_0_lambda_1_is_the_elbo_whatever_the_divergence(batch):
    _, posterior, z, nll = batch
    prior = StandardNormal(D).double()
    kl = prior.kl(posterior, z)
    elbo = nll.mean() + kl.mean()
    for divergence in (None, MMDLoss(), SteinLoss(), AdversarialLoss(D).double()):
        assert torch.equal(Objective(0.0, 1.0, divergence)(nll, kl, z, prior).loss, elbo)
    assert torch.equal(objective.elbo()(nll, kl, z, prior).loss, elbo)


def test_beta_vae_weighs_the_kl_alone(batch):
    _, posterior, z, nll = batch
    prior = StandardNormal(D).double()
    kl = prior.kl(posterior, z)
    for beta in (0.0, 0.5, 1.0, 4.0):
        terms = objective.beta_vae(beta)(nll, kl, z, prior)
        assert terms.loss.item() == pytest.approx((nll.mean() + beta * kl.mean()).item(), rel=1e-14)
        assert terms.divergence is None and "none" not in terms.as_dict()


def test_alpha_1_ignores_a_kl_that_is_infinite_or_undefined(batch):
    _, _, z, nll = batch
    prior = StandardNormal(D).double()
    infinite = torch.full_like(nll, math.inf)
    assert objective.mmd_vae()(nll, infinite, z, prior).loss.isfinite()
    terms = objective.mmd_vae()(nll, None, z, prior)
    assert terms.loss.isfinite() and terms.kl.isnan()
    with pytest.raises(ValueError, match=r"alpha=0\.5 weighs the KL term, but it is not defined here"):
        Objective(0.5, 10.0, MMDLoss())(nll, None, z, prior)


def test_stein_moves_z_by_its_direction(batch):
    """The gradient at z is -weight/N times the direction; the value is reported as a surrogate."""
    _, _, z, nll = batch
    z = z.clone().requires_grad_()
    terms = objective.stein_vae(lambda_=7.0)(nll, None, z, StandardNormal(D).double())
    (gradient,) = torch.autograd.grad(terms.loss, z)
    assert torch.allclose(gradient, -7.0 * stein_direction(z) / len(z), rtol=1e-12, atol=0)
    assert terms.divergence_name == "stein_surrogate" and "stein_surrogate" in terms.as_dict()


def test_stein_uses_the_priors_score(batch):
    _, _, z, nll = batch
    prior = GaussianMixture([[2.0] * D, [-2.0] * D], 0.5).double()
    z = z.clone().requires_grad_()
    terms = objective.stein_vae(lambda_=1.0)(nll, None, z, prior)
    (gradient,) = torch.autograd.grad(terms.loss, z)
    leaf = z.detach().requires_grad_()
    normals = torch.distributions.Normal(torch.tensor([[2.0] * D, [-2.0] * D], dtype=torch.float64), 0.5)
    log_p = torch.logsumexp(normals.log_prob(leaf[:, None]).sum(-1) + math.log(0.5), 1)
    (score,) = torch.autograd.grad(log_p.sum(), leaf)
    assert torch.allclose(gradient, -stein_direction(z, score) / len(z), rtol=1e-9, atol=1e-15)


def test_a_divergence_of_weight_0_is_reported_without_a_gradient(batch):
    _, posterior, z, nll = batch
    z = z.clone().requires_grad_()
    prior = StandardNormal(D).double()
    terms = Objective(0.0, 1.0, MMDLoss())(nll, prior.kl(posterior, z), z, prior)
    assert terms.divergence is not None and terms.as_dict()["mmd"].isfinite()
    assert not terms.loss.requires_grad


def test_only_the_loss_carries_a_gradient(batch):
    _, _posterior, z, nll = batch
    z = z.clone().requires_grad_()
    nll = nll + 0 * z.sum()
    terms = objective.mmd_vae(alpha=0.5)(nll, nll * 0, z, StandardNormal(D).double())
    assert terms.loss.requires_grad
    assert not any(t.requires_grad for name, t in terms.as_dict().items() if name != "loss")


def test_number_of_prior_samples(batch):
    _, _, z, nll = batch
    drawn = []

    class Counting(StandardNormal):
        def sample(self, n):
            drawn.append(n)
            return super().sample(n)

    prior = Counting(D).double()
    objective.mmd_vae()(nll, None, z, prior)
    objective.mmd_vae(prior_samples=200)(nll, None, z, prior)
    assert drawn == [64, 200]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_weights_they_state(name):
    """The table of the module's text."""
    alpha, lambda_, report = {
        "elbo": (0, 1, "none"),
        "beta_vae": (-3, 4, "none"),
        "mmd_vae": (1, 1000, "mmd"),
        "stein_vae": (1, 1000, "stein_surrogate"),
        "aae": (1, 100, "adversarial_js"),
        "wae": (1, 10, "mmd"),
        "unregularized": (1, 0, "none"),
    }[name]
    made = objective_from_config(name, dim=D)
    assert (made.alpha, made.lambda_, made.divergence_name) == (alpha, lambda_, report)
    assert made.kl_weight == 1 - alpha and made.divergence_weight == alpha + lambda_ - 1


def test_configurations():
    made = objective_from_config(
        {"name": "mmd_vae", "lambda_": 3.0, "kernel": {"name": "imq", "bandwidth": [1.0, 2.0]}, "estimator": "biased"},
        dim=D,
    )
    assert made.lambda_ == 3.0 and made.divergence.estimator == "biased"
    assert made.divergence.kernel.bandwidth == (1.0, 2.0)
    assert objective_from_config({"name": "aae", "kind": "wgan-gp"}, dim=5).divergence.critic[0].in_features == 5
    assert objective_from_config("wae", dim=D).divergence.kernel == "wae_imq"
    exact = objective_from_config({"name": "mmd_vae", "closed_form": True, "kernel": {"name": "imq"}}, dim=D)
    assert isinstance(exact.divergence, NormalMMDLoss) and isinstance(exact.divergence.kernel, IMQ)
    with pytest.raises(ValueError, match="closed_form: got an estimator or prior_samples too"):
        objective.mmd_vae(closed_form=True, estimator="biased")


def test_strength_is_a_factor_of_both_weights(batch):
    _, _posterior, z, nll = batch
    kl = torch.rand(len(z), dtype=z.dtype)
    made = Objective(0.25, 10.0, NormalMMDLoss())
    divergence = mmd_to_normal(z)
    for strength in (0.0, 0.3, 1.0):
        made.strength = torch.tensor(strength, dtype=z.dtype)
        near(made(nll, kl, z, StandardNormal(D)).loss, nll.mean() + strength * (0.75 * kl.mean() + 9.25 * divergence))
    assert not made.state_dict()


def test_refusals():
    with pytest.raises(ValueError, match=r"alpha \+ lambda - 1 = -0\.999 .* a negative weight rewards mismatch"):
        Objective(0.0, 0.001, MMDLoss())
    assert Objective(0.0, 0.001, MMDLoss(), allow_negative=True).divergence_weight == pytest.approx(-0.999)
    with pytest.raises(ValueError, match="there is no divergence: pass one, such as MMDLoss"):
        Objective(1.0, 10.0)
    with pytest.raises(ValueError, match="finite numbers"):
        Objective(math.nan, 1.0)
    with pytest.raises(ValueError, match="prior_samples: got 0"):
        objective.mmd_vae(prior_samples=0)
    with pytest.raises(ValueError, match="beta: got -1"):
        objective.beta_vae(-1)
    with pytest.warns(UserWarning, match=r"alpha=1\.5 > 1 gives KL.* the negative weight -0\.5"):
        Objective(1.5, 10.0, MMDLoss())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Objective(1.0, 10.0, MMDLoss())
    with pytest.raises(ValueError, match="objective: got 'mmdvae'; accepted: 'elbo', 'beta_vae', 'mmd_vae'"):
        objective_from_config("mmdvae", dim=D)
    with pytest.raises(ValueError, match=r"objective 'elbo': unknown arguments \['lambda'\]; accepted: \[\]"):
        objective_from_config({"name": "elbo", "lambda": 3}, dim=D)


def test_refusals_of_wrong_types_and_shapes(batch):
    _, _posterior, z, nll = batch
    for options, what in (
        ({"alpha": "1"}, "alpha: got '1'; accepted: a number"),
        ({"lambda_": True}, "lambda_: got True; accepted: a number"),
        ({"divergence": MMDLoss}, "divergence: got .*MMDLoss.*accepted: a module"),
    ):
        with pytest.raises(TypeError, match=what):
            Objective(**options)
    with pytest.raises(ValueError, match=r"prior_samples: got 2\.5; accepted: an integer, 1 or more"):
        Objective(1.0, 10.0, MMDLoss(), prior_samples=2.5)
    with pytest.raises(TypeError, match="beta: got '4'; accepted: a number"):
        objective.beta_vae("4")
    with pytest.raises(
        ValueError, match=r"reconstruction: got shape \(64, 2\); accepted: \(64,\), the sum over pixels"
    ):
        objective.elbo()(nll[:, None].expand(64, 2), nll, z, StandardNormal(D))
    with pytest.raises(ValueError, match=r"kl: got shape \(64, 3\); accepted: \(64,\), the sum over pixels or dimen"):
        objective.elbo()(nll, nll[:, None].expand(64, 3), z, StandardNormal(D))


def test_the_mmd_to_a_gaussian_is_for_a_gaussian_prior(batch):
    _, _posterior, z, nll = batch
    exact = Objective(1.0, 10.0, NormalMMDLoss())
    near(exact(nll, None, z, StandardNormal(D)).divergence, mmd_to_normal(z))
    with pytest.raises(ValueError, match=r"prior: got Uniform, but NormalMMDLoss knows N.0, I.*; use MMDLoss"):
        exact(nll, None, z, Uniform(D, -2, 2))
    mixture = GaussianMixture([[1.0] * D], 2.0).double()  # one Gaussian, which is told
    told = NormalMMDLoss(mean=mixture.means[0], covariance=4.0)
    near(Objective(1.0, 10.0, told)(nll, None, z, mixture).divergence, mmd_to_normal(z - 1, covariance=4.0))


def test_priors_without_density_or_score(batch):
    _, _posterior, z, nll = batch
    uniform, sampler = Uniform(D, -2, 2).double(), SamplerPrior(D, lambda n: torch.zeros(n, D)).double()
    assert not uniform.has_kl and not sampler.has_kl
    with pytest.raises(ValueError, match="uniform prior has no score"):
        objective.stein_vae()(nll, None, z, uniform)
    with pytest.raises(ValueError, match="SamplerPrior has no density: use alpha=1"):
        objective.stein_vae()(nll, None, z, sampler)
    for prior in (uniform, sampler):
        assert objective.mmd_vae()(nll, None, z, prior).loss.isfinite()
    with pytest.raises(ValueError, match=r"the prior's sampler returned \(3,\); accepted: a tensor \(64, 3\)"):
        objective.mmd_vae()(nll, None, z, SamplerPrior(D, lambda n: torch.zeros(3)))
