"""Stein, Gaussian KL and adversarial divergences: definitions, closed forms, what they learn, errors."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from infovae_fast.divergences import (
    AdversarialLoss,
    SteinLoss,
    gaussian_kl,
    stein_direction,
    stein_loss,
)
from infovae_fast.radial import IMQ, RBF
from tests import oracle
from tests.oracle import (
    KERNELS,
    check,
    name_of,
    near,
    normal,
    rbf_mean,
    require_compile,
    require_pairwise,
    stein_loop,
)

backend, one_thread, two_threads = oracle.backend, oracle.one_thread, oracle.two_threads
each_kernel = pytest.mark.parametrize("book", KERNELS, ids=name_of)
each_kind = pytest.mark.parametrize("kind", ["js", "wgan-gp"])

four = torch.ones(4, 2)


def samples(n=7, m=5, dim=3, dtype=torch.float64):
    return normal(n, dim, seed=1, dtype=dtype), (1.3 * normal(m, dim, seed=2) + 0.4).to(dtype)


# Stein


def mixture_score(z):
    """grad log of (N(-2, I) + N(2, I)) / 2: -z + 2 tanh(2 sum z)."""
    return -z + 2 * torch.tanh(2 * z.sum(-1, keepdim=True))


def mixture_score_by_definition(point):
    a, b = (math.exp(-0.5 * sum((p - c) ** 2 for p in point)) for c in (-2.0, 2.0))
    return np.array([(a * (-2 - p) + b * (2 - p)) / (a + b) for p in point])


@each_kernel
def test_stein_direction_is_the_double_loop(backend, book):
    z, _ = samples(8, 1, 3)
    kernel = book.build()
    require_pairwise(backend, z, v=z, kernel=kernel, energy=False)
    near(stein_direction(z, kernel=kernel, backend=backend), stein_loop(z, lambda p: -p, book))
    by_hand = stein_loop(z, mixture_score_by_definition, book)
    near(stein_direction(z, mixture_score, kernel, backend=backend), by_hand)
    near(stein_direction(z, mixture_score(z), kernel, backend=backend), by_hand)


def test_stein_default_kernel_is_the_authors():
    """exp(-|x - y|^2 / (2 D)), phi_i = 1/n sum_j [k_ij (-z_j) + k_ij (z_i - z_j) / D]."""
    z, _ = samples(8, 1, 3)
    k = torch.exp(-torch.cdist(z, z).square() / 6)
    near(stein_direction(z), (-k @ z + (k[..., None] * (z[:, None] - z[None]) / 3).sum(1)) / 8)


def test_stein_direction_between_gaussians_in_expectation():
    """z' ~ N(m, s^2 I), p = N(0, I), RBF: k(z', z) q(z') is C N(z'; mu, .), phi*(z) = C (-mu + (z - mu)/b^2)."""
    b, n, draws = 1.3, 12, 800
    m, s, z = torch.tensor([0.5, -1.0]), 0.8, torch.tensor([1.0, 0.2], dtype=torch.float64)
    mu = (b**2 * m + s**2 * z) / (b**2 + s**2)
    at_z = rbf_mean((z - m).double(), s**2, b) * (-mu + (z - mu) / b**2)
    expected = (n - 1) / n * at_z - z / n  # the point itself is one of the n
    generator = torch.Generator().manual_seed(3)
    values = []
    for _ in range(draws):
        others = m + s * torch.randn(n - 1, 2, generator=generator, dtype=torch.float64)
        values.append(stein_direction(torch.cat([z[None], others]), kernel=RBF(b))[0])
    values = torch.stack(values)
    assert ((values.mean(0) - expected).abs() < 4 * values.std(0) / math.sqrt(draws)).all()


def test_stein_direction_vanishes_where_the_cloud_is_the_density():
    """In one dimension with the quantiles of N(0, 1): q = p up to 1/N, where phi* = 0."""
    n = 400
    quantiles = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    on, off = stein_direction(quantiles), stein_direction(quantiles + 1)
    assert on.abs().max() < 1e-2 < 0.3 < off.abs().mean()


def test_stein_accuracy(backend):
    z, _ = samples(300, 1, 20, torch.float32)
    scores = mixture_score(z)
    kernel = RBF().at(20)
    require_pairwise(backend, z, v=z, kernel=kernel, energy=False)
    truth = stein_direction(z.double(), scores.double(), backend="reference")
    scale = oracle.pairwise_scales(z, None, scores, kernel, (1.0, 0.0, 0.0))[1]
    scale = scale + scores.norm(dim=-1, keepdim=True).cpu()
    yardstick = stein_direction(z, scores, backend="reference")
    check(stein_direction(z, scores, backend=backend), truth, yardstick, scale / 300)


def test_compile_stein_loss_in_one_graph(backend):
    z, _ = samples(12, 1, 3, torch.float32)
    require_compile(backend)
    require_pairwise(backend, z, v=z, kernel=RBF(), energy=False)
    results = []
    torch.compiler.reset()
    for f in (stein_loss, torch.compile(stein_loss, fullgraph=True, backend="aot_eager")):
        leaf = z.clone().requires_grad_()
        value = f(leaf, backend=backend)
        results.append((value, *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(results[1], results[0])


def test_descent_moves_a_shifted_cloud_to_the_density():
    """The minus sign: with plus the cloud would run away."""
    z = (0.3 * normal(50, 2) + 3.0).requires_grad_()
    for _ in range(200):
        (slope,) = torch.autograd.grad(stein_loss(z, reduction="sum"), z)
        z = (z - 0.5 * slope).detach().requires_grad_()
    assert z.mean(0).abs().max() < 0.1
    assert (z.var(0) - 1).abs().max() < 0.3  # from 0.09
    assert stein_direction(z).norm() < 0.1 * stein_direction(0.3 * normal(50, 2) + 3.0).norm()


def test_descent_finds_both_modes_of_a_mixture():
    z = normal(40, 2).requires_grad_()
    for _ in range(200):
        (slope,) = torch.autograd.grad(stein_loss(z, mixture_score, RBF(1.0), reduction="sum"), z)
        z = (z - 0.5 * slope).detach().requires_grad_()
    side = z.sum(1) > 0
    assert 10 <= side.sum() <= 30
    near_mode = torch.where(side[:, None], z - 2, z + 2)
    assert near_mode.mean(0).abs().max() < 0.5 and near_mode.norm(dim=1).max() < 4


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_stein_loss_descends_along_the_direction(reduction):
    z = normal(9, 3).requires_grad_()
    direction = stein_direction(z)
    factor = 9 if reduction == "mean" else 1
    loss = stein_loss(z, reduction=reduction)
    near(loss, -(z * direction).sum() / factor)
    (slope,) = torch.autograd.grad(loss, z, create_graph=True)
    near(slope, -direction / factor)
    assert not slope.requires_grad  # the direction is a constant
    assert torch.equal(SteinLoss(reduction=reduction)(z), loss)


def test_a_score_may_be_a_gradient_itself():
    z = torch.randn(6, 2, dtype=torch.float64)

    def score(z):
        z = z.detach().requires_grad_()
        return torch.autograd.grad(-0.5 * z.square().sum(), z)[0]

    direction = stein_direction(z, score)
    assert not direction.requires_grad
    near(direction, stein_direction(z))


def test_no_gradient_flows_through_the_direction():
    z, shift = normal(9, 3).requires_grad_(), nn.Parameter(torch.zeros(3, dtype=torch.float64))
    b = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    assert not stein_direction(z, lambda t: shift - t, RBF(b)).requires_grad
    seen = []
    stein_loss(z, lambda t: seen.append(t.requires_grad) or shift - t, RBF(b)).backward()
    assert z.grad is not None and shift.grad is None and b.grad is None and seen == [False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_stein_of_half_precision(backend, dtype):
    z = normal(9, 3, dtype=dtype).requires_grad_()
    require_pairwise(backend, z.float(), v=z.float(), kernel=RBF(), energy=False)
    direction = stein_direction(z, backend=backend)
    assert direction.dtype == torch.float32
    assert torch.equal(direction, stein_direction(z.float(), backend=backend))
    loss = stein_loss(z, mixture_score, backend=backend)
    assert loss.dtype == torch.float32 and torch.autograd.grad(loss, z)[0].dtype == dtype


def test_a_kernel_of_weight_zero_moves_nothing(backend):
    z = normal(9, 3)
    for kernel in (RBF(1.0, weights=[0.0]), IMQ(1.0, weights=[0.0])):
        require_pairwise(backend, z, kernel=kernel)
        assert not stein_direction(z, kernel=kernel, backend=backend).any()


def test_stein_of_one_point_is_its_score():
    z = normal(1, 4)
    near(stein_direction(z, kernel=IMQ(weights=[3.0])), -3 * z)
    near(stein_direction(torch.ones(5, 2, dtype=torch.float64)), -torch.ones(5, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: stein_direction([1.0]), TypeError, r"z: got list"),
        (lambda: stein_loss(None), TypeError, r"z: got None"),
        (lambda: stein_direction(four.long()), TypeError, r"z: got dtype torch.int64"),
        (lambda: stein_direction(four[0]), ValueError, r"z: got shape \(2,\)"),
        (lambda: stein_direction(four[None]), ValueError, r"z: got shape \(1, 4, 2\); accepted.*z.flatten\(1\)"),
        (lambda: stein_direction(four[:0]), ValueError, r"z: got shape \(0, 2\)"),
        (
            lambda: stein_direction(four, four[:2]),
            ValueError,
            r"score: got shape \(2, 2\).*accepted: a tensor \(4, 2\)",
        ),
        (lambda: stein_direction(four, lambda z: z[0]), ValueError, r"score: got shape \(2,\)"),
        (lambda: stein_direction(four, lambda z: None), ValueError, r"score: got NoneType; accepted: a tensor"),
        (lambda: stein_direction(four, "normal"), ValueError, r"score: got str"),
        (lambda: stein_direction(four, four.to("meta")), ValueError, r"score: got .* on meta; accepted: .* on cpu"),
        (lambda: stein_direction(four, four * math.nan), ValueError, r"score: 4 of 4 points hold NaN"),
        (lambda: stein_loss(four, reduction="none"), ValueError, r"reduction: got 'none'; accepted: 'mean', 'sum'"),
        (lambda: SteinLoss(reduction="batch"), ValueError, r"reduction: got 'batch'; accepted: 'mean', 'sum'"),
        (lambda: stein_direction(four, backend="gpu"), ValueError, r"backend='gpu' is unknown"),
    ],
)
def test_stein_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Gaussian KL


def test_gaussian_kl_is_the_closed_form_and_torch_s():
    mu, logvar = normal(6, 4, seed=1), 0.7 * normal(6, 4, seed=2)
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    p = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    each = torch.distributions.kl_divergence(q, p).sum(-1)
    near(gaussian_kl(mu, logvar, "none"), each)
    near(gaussian_kl(mu, logvar), each.mean())
    near(gaussian_kl(mu, logvar, "sum"), each.sum())
    by_hand = [
        sum(0.5 * (m * m + math.exp(v) - 1 - v) for m, v in zip(ms, vs, strict=True))
        for ms, vs in zip(mu.tolist(), logvar.tolist(), strict=True)
    ]
    near(gaussian_kl(mu, logvar, "none"), by_hand)


def test_gaussian_kl_derivatives():
    mu, logvar = (t.requires_grad_() for t in (normal(5, 3, seed=1), normal(5, 3, seed=2)))
    slopes = torch.autograd.grad(gaussian_kl(mu, logvar), (mu, logvar))
    near(slopes[0], mu / 5)
    near(slopes[1], (logvar.exp() - 1) / 10)
    assert torch.autograd.gradgradcheck(gaussian_kl, (mu, logvar))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_gaussian_kl_of_small_values(dtype):
    """exp(v) - 1 - v is off by eps, not by eps |v|: at v = 1e-3 in float32 by a seventh of the result."""
    v = torch.tensor([1e-8, -1e-6, 1e-4, -1e-3, 1e-2], dtype=dtype)[:, None]
    w = v.double()
    truth = (w**2 / 2 + w**3 / 6 + w**4 / 24 + w**5 / 120 + w**6 / 720) / 2
    out = gaussian_kl(torch.zeros_like(v), v, "none").double()
    assert ((out - truth[:, 0]).abs() <= torch.finfo(dtype).eps * v[:, 0].abs()).all()
    assert gaussian_kl(torch.zeros(3, 2, dtype=dtype), torch.zeros(3, 2, dtype=dtype)) == 0


def test_gaussian_kl_of_half_precision_is_float32():
    mu, logvar = normal(6, 4, dtype=torch.bfloat16), normal(6, 4, seed=1, dtype=torch.bfloat16)
    out = gaussian_kl(mu, logvar)
    assert out.dtype == torch.float32 and torch.equal(out, gaussian_kl(mu.float(), logvar.float()))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gaussian_kl([1.0], four), TypeError, "mu: got list"),
        (lambda: gaussian_kl(four, None), TypeError, "logvar: got None"),
        (
            lambda: gaussian_kl(four, four.double()),
            TypeError,
            "logvar: got dtype torch.float64, but mu is torch.float32",
        ),
        (lambda: gaussian_kl(four[0], four[0]), ValueError, r"mu: got shape \(2,\)"),
        (lambda: gaussian_kl(four, four[:2]), ValueError, r"mu and logvar: got shapes \(4, 2\) and \(2, 2\)"),
        (lambda: gaussian_kl(four, four[:, :1]), ValueError, r"logvar: got shape \(4, 1\), but mu \(4, 2\)"),
        (
            lambda: gaussian_kl(four, four, "batchmean"),
            ValueError,
            "reduction: got 'batchmean'; accepted: 'mean', 'sum'",
        ),
    ],
)
def test_gaussian_kl_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Adversarial


class Linear(nn.Module):
    """c(x) = x . a + c, with a gradient that is known."""

    def __init__(self, *slope):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x):
        return x @ self.slope + self.offset


@each_kind
def test_no_gradient_crosses_over(kind):
    loss = AdversarialLoss(2, kind=kind)
    x, y = (s.requires_grad_() for s in samples(6, 5, 2, torch.float32))
    loss(x, y).backward()
    assert x.grad.abs().max() > 0 and all(p.grad is None for p in loss.critic.parameters())
    x.grad = y.grad = None
    loss.critic_loss(x, y).backward()
    assert x.grad is None and y.grad is None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.critic.parameters())
    assert all(p.requires_grad for p in loss.critic.parameters())


def test_js_losses_by_their_formulas():
    x, y = samples(6, 5, 2)
    critic = Linear(0.7, -1.1)
    loss = AdversarialLoss(critic=critic)
    on_x, on_y = (critic(s).tolist() for s in (x, y))

    def mean_softplus(values):
        return sum(math.log1p(math.exp(v)) for v in values) / len(values)

    near(loss(x, y), mean_softplus([-v for v in on_x]))
    near(loss.critic_loss(x, y), mean_softplus([-v for v in on_y]) + mean_softplus(on_x))


def test_wgan_losses_by_their_formulas():
    x, y = samples(6, 5, 2)
    critic = Linear(0.6, -0.8 * 3)
    loss = AdversarialLoss(kind="wgan-gp", critic=critic, penalty=4.0)
    distance = critic(y).mean() - critic(x).mean()
    near(loss(x, y), distance)
    length = math.hypot(0.6, 2.4)  # of the gradient, everywhere
    near(loss.critic_loss(x, y), -distance + 4.0 * (length - 1) ** 2)
    slopes = torch.autograd.grad(loss.critic_loss(x, y), critic.slope)[0]
    near(slopes, x.mean(0) - y.mean(0) + 4.0 * 2 * (length - 1) * critic.slope / length)


def test_the_penalty_is_taken_between_the_pairs():
    """Half the squared norm has the gradient x: the penalty sees the points it is taken at."""

    class Half(nn.Module):
        def forward(self, x):
            seen.append(x.detach())
            return 0.5 * x.square().sum(-1)

    seen = []
    x, y = samples(6, 5, 2)
    loss = AdversarialLoss(kind="wgan-gp", critic=Half(), penalty=2.0)
    value = loss.critic_loss(x, y)
    between = seen[-1]
    u = (between - x[:5]) / (y - x[:5])
    assert between.shape == (5, 2) and ((u > 0) & (u < 1)).all()
    near(u[:, 0], u[:, 1])
    assert len(u[:, 0].round(decimals=6).unique()) == 5  # each pair draws its own
    half = [0.5 * s.square().sum(-1).mean() for s in (x, y)]
    near(value, half[0] - half[1] + 2.0 * (between.norm(dim=-1) - 1).square().mean())


def test_a_flat_critic_has_a_finite_penalty():
    loss = AdversarialLoss(2, kind="wgan-gp")
    for p in loss.critic.parameters():
        nn.init.zeros_(p)
    value = loss.critic_loss(*samples(6, 5, 2, torch.float32))
    assert value == 10.0
    value.backward()
    assert all(p.grad.isfinite().all() for p in loss.critic.parameters())


def quantiles(n, mean, std):
    """n points that stand for N(mean, std^2), each for 1/n of its mass."""
    return mean + std * torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]


def test_js_at_the_optimal_critic_is_the_jensen_shannon_divergence():
    p, q = (torch.distributions.Normal(torch.tensor(m, dtype=torch.float64), s) for m, s in ((0.0, 1.0), (1.2, 0.7)))

    class Optimal(nn.Module):  # log p / q
        def forward(self, x):
            return (p.log_prob(x) - q.log_prob(x)).squeeze(-1)

    n = 20000
    loss = AdversarialLoss(critic=Optimal())
    estimate = math.log(2) - loss.critic_loss(quantiles(n, 1.2, 0.7), quantiles(n, 0.0, 1.0)).item() / 2
    t = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    log_mean = torch.logaddexp(p.log_prob(t), q.log_prob(t)) - math.log(2)
    integrand = sum(r.log_prob(t).exp() * (r.log_prob(t) - log_mean) for r in (p, q)) / 2
    # a mean over n quantiles of a function of one turn is off by at most its range a quantile; here two of them
    ranges = sum(F.softplus(s * Optimal()(quantiles(n, *a))).max() for s, a in ((-1, (0.0, 1.0)), (1, (1.2, 0.7))))
    assert abs(estimate - torch.trapezoid(integrand, t).item()) < 2 * ranges / n


def train_critic(loss, x, y, steps, lr):
    optimizer = torch.optim.Adam(loss.critic.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss.critic_loss(x, y).backward()
        optimizer.step()


def test_a_trained_linear_critic_estimates_the_shift_as_computed():
    """min_g -g W + penalty (g - 1)^2 is at g = 1 + W / (2 penalty), and the estimate is g W."""
    shift, penalty = 1.5, 10.0
    loss = AdversarialLoss(kind="wgan-gp", critic=Linear(0.2), penalty=penalty)
    y = quantiles(64, 0.0, 1.0)
    train_critic(loss, y - shift, y, 300, 0.03)
    slope = 1 + shift / (2 * penalty)
    assert loss(y - shift, y).item() == pytest.approx(slope * shift, rel=1e-4)


def test_a_trained_network_estimates_the_shift():
    """The same in two dimensions with a network (in one, a critic that starts downhill cannot turn round)."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.1), nn.Linear(32, 1)).double()
    loss = AdversarialLoss(2, kind="wgan-gp", critic=critic)
    y, shift = normal(64, 2), torch.tensor([2.0, 0.0], dtype=torch.float64)
    train_critic(loss, y - shift, y, 150, 0.02)
    assert loss(y - shift, y).item() == pytest.approx(2 * (1 + 2 / 20), rel=0.02)


@each_kind
def test_the_encoder_loss_pulls_towards_the_prior(kind):
    """Where the critic knows that y lies higher, descent on the encoder's loss raises x."""
    loss = AdversarialLoss(kind=kind, critic=Linear(1.0))
    x = quantiles(8, -1.0, 1.0).requires_grad_()
    (slope,) = torch.autograd.grad(loss(x, quantiles(8, 1.0, 1.0)), x)
    assert (slope < 0).all()


@each_kind
def test_adversarial_losses_of_a_half_precision_critic_are_float32(kind):
    loss = AdversarialLoss(2, kind=kind)
    x, y = samples(6, 6, 2, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(x, y).dtype == loss.critic_loss(x, y).dtype == torch.float32
    loss.critic.bfloat16()
    assert loss(x, y).dtype == loss.critic_loss(x, y).dtype == torch.float32
    loss.critic_loss(x, y).backward()
    assert all(p.grad.isfinite().all() for p in loss.critic.parameters())


def test_a_critic_computes_in_its_own_dtype():
    torch.manual_seed(0)
    loss, x, y = AdversarialLoss(3), torch.randn(8, 3), torch.randn(8, 3)
    for dtype in (torch.float16, torch.float64):
        x, y = x.to(dtype), y.to(dtype)
        for method in (loss, loss.critic_loss):
            torch.testing.assert_close(method(x, y), method(x.float(), y.float()))


def test_the_critic_s_optimiser():
    loss = AdversarialLoss(2, critic_lr=3e-4, critic_betas=(0.1, 0.2))
    optimizer = loss.critic_optimizer()
    assert isinstance(optimizer, torch.optim.Adam)
    (group,) = optimizer.param_groups
    assert group["lr"] == 3e-4 and group["betas"] == (0.1, 0.2)
    assert group["params"] == list(loss.critic.parameters())
    assert AdversarialLoss(2).report_name == "adversarial_js"
    assert AdversarialLoss(2, kind="wgan-gp").report_name == "wasserstein"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AdversarialLoss(2, kind="gan"), ValueError, "kind: got 'gan'; accepted: 'js', 'wgan-gp'"),
        (lambda: AdversarialLoss(), ValueError, r"needs dim \(the dimension of the samples\) or a critic of your own"),
        (
            lambda: AdversarialLoss(2, critic_steps=0),
            ValueError,
            "critic_steps: got 0; accepted: an integer, 1 or more",
        ),
        (lambda: AdversarialLoss(2, penalty=-1.0), ValueError, "penalty: got -1.0; accepted: 0 or more"),
    ],
)
def test_adversarial_construction_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("method", ["forward", "critic_loss"])
@each_kind
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        ([1.0], four, TypeError, "x: got list"),
        (four, [1.0], TypeError, "y: got list"),
        (four, None, TypeError, "y: got None"),
        (four, four.double(), TypeError, "y: got dtype torch.float64"),
        (four.long(), four, TypeError, "x: got dtype torch.int64"),
        (four, four[:0], ValueError, r"y: got shape \(0, 2\)"),
        (four[None], four[None], ValueError, r"x: got shape \(1, 4, 2\)"),
        (four, four[:, :1], ValueError, r"y: got shape \(4, 1\), but x \(4, 2\)"),
        (four[:, :1], four[:, :1], ValueError, r"x: got shape \(4, 1\); accepted: \[N, 2\], the critic's dim"),
        (four, four.to("meta"), ValueError, "y: is on meta, but x on cpu"),
    ],
)
def test_adversarial_errors(method, kind, x, y, error, message):
    with pytest.raises(error, match=message):
        getattr(AdversarialLoss(2, kind=kind), method)(x, y)


@pytest.mark.parametrize("kind", ["js", "wgan-gp"])
def test_a_critic_that_is_forgotten_is_told(kind, recwarn):
    """Of backward passes alone: values that are looked at, and steps of the critic in between, tell nothing."""
    loss, x, y = AdversarialLoss(2, kind=kind), torch.randn(3, 2, requires_grad=True), torch.randn(3, 2)
    for _ in range(99):
        loss(x, y)
        loss(x, y).backward()
    loss.critic_loss(x, y)
    for _ in range(99):
        loss(x, y).backward()
    assert not recwarn.list
    with pytest.warns(UserWarning, match="100 backward passes without a step of the critic"):
        loss(x, y).backward()
