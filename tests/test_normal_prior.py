"""MMD^2 to a Gaussian: the expectations by quadrature of other kinds, the estimator's law, invariances, errors."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import gammaln, ive
from torch import nn

from infovae_fast.divergences import MMDLoss, mmd
from infovae_fast.normal_prior import NormalMMDLoss, _gamma_nodes, _mean_phi, _nodes, mmd_to_normal
from infovae_fast.objective import Objective
from infovae_fast.radial import IMQ, RBF, Kernel, RationalQuadratic, five_scale_rbf, median_rbf
from tests import oracle
from tests.oracle import KERNELS, energy_pairs, name_of, near, normal, pair_sum, require_pairwise

backend, one_thread = oracle.backend, oracle.one_thread
each_kernel = pytest.mark.parametrize("book", KERNELS, ids=name_of)
each_estimator = pytest.mark.parametrize("estimator", ["unbiased", "biased"])

MEAN = torch.tensor([0.4, -0.2, 0.7], dtype=torch.float64)
VARIANCES = torch.tensor([0.5, 1.3, 2.1], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.1, 0.5, -0.2], [0.5, 0.9, 0.1], [-0.2, 0.1, 1.6]], dtype=torch.float64)


def within(z, book, estimator):
    """The mean of k over the pairs of z, by the double loop."""
    n = len(z)
    total = pair_sum(energy_pairs(n, 1, (1.0, 0.0, 0.0)), z, z[:1], book)[0]
    return (total + n * book.phi(0.0)) / n**2 if estimator == "biased" else total / (n * (n - 1))


# The expectations


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 1.0, 2.0, 2.5, 5.0, 10.0, 30.0, 100.0, 1000.0, 1e6, 1e9, 1e12])
def test_the_mixture_of_exponentials_is_the_power(alpha):
    """To 12 digits of every value down to 1e-30; a mean of such values over any distances inherits that."""
    t, p = (numbers.numpy() for numbers in _gamma_nodes(alpha, torch.zeros(0, dtype=torch.float64)))
    s = np.append(0.0, np.geomspace(1e-8 / alpha, math.expm1(math.log(10) * min(12, 30 / alpha)), 1000))
    error = np.exp(-np.outer(s * alpha, t)) @ p / np.exp(-alpha * np.log1p(s)) - 1
    assert np.abs(error).max() < 1e-12
    assert 25 < len(t) < 180 and (p > 0).all()


def mean_over_a_shell(phi, dim, a, breaks):
    """E phi(|u + a|^2), u ~ N(0, I), through the density of the distance r = |u + a|: a Bessel function."""
    order = dim / 2 - 1
    middle = math.hypot(a, math.sqrt(dim))
    edges = sorted({0.0, *np.linspace(max(0.0, middle - 12), middle + 12, 9), *(b for b in breaks if b < middle + 12)})
    nodes, weights = np.polynomial.legendre.leggauss(80)
    total = 0.0
    for left, right in itertools.pairwise(edges):
        r = (left + right) / 2 + (right - left) / 2 * nodes
        if a == 0:
            log_density = (dim - 1) * np.log(r) - r**2 / 2 - gammaln(dim / 2) - order * math.log(2)
        else:
            with np.errstate(divide="ignore"):
                bessel = np.log(ive(order, a * r))
            log_density = np.log(r) + order * np.log(r / a) - (r - a) ** 2 / 2 + bessel
        total += (right - left) / 2 * weights @ (np.exp(log_density) * phi(r**2))
    return total


def expectation(kernel, square, variance, dim):
    """E phi(|a + u|^2), u ~ N(0, variance I), |a|^2 = square: what the value is made of."""
    squares, variances = (torch.tensor(v, dtype=torch.float64) for v in ([[square]], [variance]))
    return _mean_phi(kernel, *_nodes(kernel, squares), squares, variances, dim).item()


@pytest.mark.parametrize("dim", [1, 2, 16, 128, 512])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5, 10.0, None])
def test_every_dimension_and_bandwidth(alpha, dim):
    """Each expectation to 1e-11 of itself, however small it is; and one point's value, which is made of them."""
    for b in math.sqrt(dim) * np.array([0.1, 0.3, 1.0, 10.0]):
        kernel = RBF(b) if alpha is None else RationalQuadratic(b, alpha)
        breaks = b * np.array([0.5, 1.0, 2.0, 4.0, 8.0, 16.0])

        def phi(d2, kernel=kernel):
            return kernel.phi(torch.from_numpy(d2)).numpy()

        prior = mean_over_a_shell(lambda d2: phi(2 * d2), dim, 0.0, breaks / math.sqrt(2))
        assert expectation(kernel, 0.0, 2.0, dim) == pytest.approx(prior, rel=1e-11)
        for a in math.sqrt(dim) * np.array([0.0, 0.7, 2.0]):
            across = mean_over_a_shell(phi, dim, a, breaks)
            assert expectation(kernel, a**2, 1.0, dim) == pytest.approx(across, rel=1e-11)
            z = torch.full((1, dim), a / math.sqrt(dim), dtype=torch.float64)
            assert abs(mmd_to_normal(z, kernel, "biased").item() - (1 - 2 * across + prior)) < 1e-12


def normal_density(t, variance):
    return math.exp(-(t**2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


@each_kernel
@each_estimator
def test_the_value_in_one_dimension(backend, book, estimator):
    like = {"dtype": torch.float64, "device": oracle.device}
    z, mean, variance = normal(7, 1, seed=1), torch.tensor([0.3], **like), 1.7
    require_pairwise(backend, z, kernel=book.build())

    def expected(distance, variance):  # of phi((distance - u)^2), u ~ N(0, variance)
        reach = 9 * math.sqrt(variance)
        options = {"points": [min(max(distance, -reach), reach)], "epsabs": 1e-14, "epsrel": 1e-13, "limit": 200}
        return quad(lambda u: book.phi((distance - u) ** 2) * normal_density(u, variance), -reach, reach, **options)[0]

    across = np.mean([expected(point - 0.3, variance) for point in z[:, 0].tolist()])
    truth = within(z, book, estimator) - 2 * across + expected(0.0, 2 * variance)
    for covariance in (variance, *(torch.full(shape, variance, **like) for shape in ((), (1,), (1, 1)))):
        value = mmd_to_normal(z, book.build(), estimator, mean=mean, covariance=covariance, backend=backend)
        assert value.item() == pytest.approx(truth, abs=1e-11 * book.phi(0.0))


@each_kernel
@each_estimator
def test_the_value_in_two_dimensions(book, estimator):
    """Expectations on a grid of the plane, whose error vanishes exponentially with its step."""
    z, mean, covariance = normal(5, 2, seed=2), MEAN[:2], COVARIANCE[:2, :2]
    ticks = torch.arange(-8.5, 8.5, 0.1, dtype=torch.float64)
    grid = torch.cartesian_prod(ticks, ticks)
    weights = torch.exp(-grid.square().sum(1) / 2) * 0.1**2 / (2 * math.pi)
    u = grid @ torch.linalg.cholesky(covariance).T  # N(0, covariance)

    def expected(distance, u):
        return (book.build().phi((distance - u).square().sum(1)) * weights).sum().item()

    across = np.mean([expected(point - mean, u) for point in z])
    truth = within(z, book, estimator) - 2 * across + expected(0.0, math.sqrt(2) * u)
    value = mmd_to_normal(z, book.build(), estimator, mean=mean, covariance=covariance)
    assert value.item() == pytest.approx(truth, abs=1e-11 * book.phi(0.0))


@each_kernel
def test_expectations_against_a_large_sample(book):
    z, kernel, draws = normal(4, 3, seed=1), book.build(), 200_000
    y, other = (MEAN + normal(draws, 3, seed=s) @ torch.linalg.cholesky(COVARIANCE).T for s in (2, 3))
    across = torch.stack([kernel.phi((point - y).square().sum(1)) for point in z]).mean(0)  # [draws]
    prior = kernel.phi((y - other).square().sum(1))
    terms = prior - 2 * across
    estimate, error = terms.mean().item(), terms.std().item() / math.sqrt(draws)
    value = mmd_to_normal(z, kernel, mean=MEAN, covariance=COVARIANCE).item()
    assert abs(value - within(z, book, "unbiased") - estimate) < 5 * error


# The estimator


@each_estimator
@pytest.mark.parametrize("kernel", [RBF(1.2), IMQ([0.5, 2.0])], ids=["rbf", "imq"])
def test_the_sampled_estimate_has_the_same_mean_but_for_its_bias_and_a_larger_variance(kernel, estimator):
    generator = torch.Generator().manual_seed(5)
    n, draws, root = 16, 800, torch.linalg.cholesky(COVARIANCE).T
    exact, sampled = [], []
    for _ in range(draws):
        z, y = torch.randn(2, n, 3, generator=generator, dtype=torch.float64).unbind()
        exact.append(mmd_to_normal(z, kernel, estimator, mean=MEAN, covariance=COVARIANCE).item())
        sampled.append(mmd(z, MEAN + y @ root, kernel, estimator).item())
    if estimator == "biased":  # (phi(0) - E k(y, y')) / M
        y, other = (normal(100_000, 3, seed=s) @ root for s in (1, 2))
        sampled = np.array(sampled) - (1 - kernel.phi((y - other).square().sum(1)).mean().item()) / n
    assert abs(np.mean(exact) - np.mean(sampled)) < 4 * np.std(np.subtract(exact, sampled)) / math.sqrt(draws)
    assert np.mean(exact) > 10 * np.std(exact) / math.sqrt(draws)
    assert np.var(exact) < 0.7 * np.var(sampled)


@each_estimator
@pytest.mark.parametrize("kernel", [RBF(1.2), IMQ([0.5, 2.0])], ids=["rbf", "imq"])
def test_a_sample_of_the_prior_is_at_zero_up_to_the_known_bias(kernel, estimator):
    generator = torch.Generator().manual_seed(6)
    n, draws, root = 12, 800, torch.linalg.cholesky(COVARIANCE).T
    values = []
    for _ in range(draws):
        z = MEAN + torch.randn(n, 3, generator=generator, dtype=torch.float64) @ root
        values.append(mmd_to_normal(z, kernel, estimator, mean=MEAN, covariance=COVARIANCE).item())
    y, other = (normal(100_000, 3, seed=s) @ root for s in (1, 2))
    bias = (kernel.phi0 - kernel.phi((y - other).square().sum(1)).mean().item()) / n if estimator == "biased" else 0.0
    error = np.std(values) / math.sqrt(draws)
    assert abs(np.mean(values) - bias) < 4 * error
    assert estimator != "biased" or (min(values) >= 0 and bias > 20 * error)


def test_quantiles_are_the_density():
    """In one dimension the biased estimate of N quantiles tends to zero like 1/N^2."""
    values = [
        mmd_to_normal(torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None], IMQ(), "biased")
        for n in (50, 200)
    ]
    assert 0 < values[1] < values[0] / 10 < 1e-5


# Derivatives and laws


@each_estimator
@pytest.mark.parametrize("shape", [(), (3,)], ids=["isotropic", "diagonal"])
@pytest.mark.parametrize("kernel", [RBF([0.7, 2.0]), IMQ(1.1), RationalQuadratic(0.9, 2.5)], ids=["rbf", "imq", "rq"])
def test_derivatives(kernel, shape, estimator):
    z, mean, b = normal(4, 3), MEAN.clone(), torch.tensor(kernel.bandwidth, dtype=torch.float64)
    variances = VARIANCES.clone() if shape else torch.tensor(1.3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (z, mean, variances, b)]
    alpha = {"alpha": 2.5} if type(kernel) is RationalQuadratic else {}

    def f(z, mean, variances, b):
        rule = type(kernel)(b, **alpha)
        return mmd_to_normal(z, rule, estimator, mean=mean, covariance=variances, backend="reference")

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_derivatives_with_a_full_covariance():
    z, mean = normal(4, 3).requires_grad_(), MEAN.clone().requires_grad_()
    for matrix in (COVARIANCE, torch.eye(3, dtype=torch.float64)):
        assert torch.autograd.gradcheck(
            lambda z, mean, matrix=matrix: mmd_to_normal(
                z, IMQ(1.1), mean=mean, covariance=matrix, backend="reference"
            ),
            (z, mean),
        )


@each_kernel
@each_estimator
def test_laws(backend, book, estimator):
    z, kernel = 1.4 * normal(8, 3) + 0.2, book.build()
    require_pairwise(backend, z, kernel=kernel)
    centre, matrix, diagonal = (t.to(oracle.device) for t in (MEAN, COVARIANCE, VARIANCES))

    def f(z, kernel=kernel, mean=centre, covariance=matrix):
        return mmd_to_normal(z, kernel, estimator, mean=mean, covariance=covariance, backend=backend)

    def same(a, b):
        assert abs(a - b) <= 1e-12 * kernel.phi0

    value = f(z)
    same(f(z + 50.0, mean=centre + 50.0), value)
    same(f(z.flip(0)), value)
    longer = book.build(torch.tensor([3.0 * b for b in book.bandwidths], dtype=torch.float64, device=oracle.device))
    same(f(3.0 * z, longer, 3.0 * centre, 9.0 * matrix), value)
    Q = torch.linalg.qr(normal(3, 3, seed=9))[0]
    same(f(z @ Q, mean=centre @ Q, covariance=Q.T @ matrix @ Q), value)
    variances, axes = torch.linalg.eigh(matrix)
    same(f(z @ axes, mean=centre @ axes, covariance=variances), value)
    same(f(z, covariance=diagonal.diag()), f(z, covariance=diagonal))
    unit = torch.ones_like(centre)
    same(f(z, covariance=1.7 * unit[0]), f(z, covariance=1.7))
    same(f(z, covariance=1.7 * unit), f(z, covariance=1.7))
    for mean, covariance in ((None, None), (0 * unit, 1), (None, unit), (0 * unit, unit.diag())):
        same(f(z, mean=mean, covariance=covariance), mmd_to_normal(z, kernel, estimator, backend=backend))


def test_names_mean_kernels():
    z = normal(9, 3)
    assert torch.equal(mmd_to_normal(z), mmd_to_normal(z, RBF(math.sqrt(3))))
    assert torch.equal(mmd_to_normal(z, IMQ()), mmd_to_normal(z, RationalQuadratic(math.sqrt(3))))
    assert torch.equal(mmd_to_normal(z, "median_rbf"), mmd_to_normal(z, median_rbf(z, z)))
    assert torch.equal(mmd_to_normal(z, five_scale_rbf), mmd_to_normal(z, five_scale_rbf(z, z)))
    assert torch.equal(mmd_to_normal(z, lambda x, y: IMQ(len(x) + len(y))), mmd_to_normal(z, IMQ(18.0)))


# Types


@each_estimator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_the_value_is_that_of_float64_rounded_once(backend, tensor, dtype, estimator):
    z = normal(30, 5, dtype=dtype)
    kernel = IMQ(torch.tensor(1.3)) if tensor else IMQ(1.3)
    exact = IMQ(torch.tensor(1.3).double()) if tensor else IMQ(1.3)
    require_pairwise(backend, z.double(), kernel=exact)
    value = mmd_to_normal(z.requires_grad_(), kernel, estimator, backend=backend)
    truth = mmd_to_normal(z.detach().double(), exact, estimator, backend=backend)
    assert value.dtype == torch.float32 and truth.dtype == torch.float64
    assert torch.equal(value, truth.float())
    (slope,) = torch.autograd.grad(value, z)
    assert slope.dtype == dtype and slope.isfinite().all()
    with torch.autocast(oracle.device, torch.bfloat16):
        assert torch.equal(mmd_to_normal(z, kernel, estimator, backend=backend), value)


@pytest.mark.parametrize(
    ("kernel", "covariance"),
    [(None, 2.0), (RationalQuadratic([0.5, 2.0], 0.5), VARIANCES), ("median_rbf", COVARIANCE)],
    ids=["isotropic", "diagonal", "full"],
)
def test_compile_in_one_graph(kernel, covariance):
    torch.compiler.reset()
    z, results = normal(12, 3, dtype=torch.float32), []
    for f in (mmd_to_normal, torch.compile(mmd_to_normal, fullgraph=True, backend="aot_eager")):
        leaf = z.clone().requires_grad_()
        value = f(leaf, kernel, mean=MEAN, covariance=covariance)
        results.append((value, *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(results[1], results[0])


# The module


def test_the_module_is_the_function():
    z = normal(9, 3)
    assert torch.equal(NormalMMDLoss()(z), mmd_to_normal(z))
    loss = NormalMMDLoss(IMQ(0.4), "biased", mean=MEAN, covariance=COVARIANCE, backend="reference")
    value = mmd_to_normal(z, IMQ(0.4), "biased", mean=MEAN, covariance=COVARIANCE, backend="reference")
    assert torch.equal(loss(z), value) and torch.equal(loss(z, normal(4, 3)), value)
    assert "IMQ" in repr(loss) and "biased" in repr(loss)
    assert NormalMMDLoss.report_name == MMDLoss.report_name and list(loss.parameters()) == []
    assert set(dict(loss.named_buffers())) == {"mean", "covariance"}
    assert torch.equal(NormalMMDLoss(covariance=2.0)(z), mmd_to_normal(z, covariance=2.0))


def test_the_module_learns_its_prior_and_bandwidth():
    z = 1.5 * normal(200, 2) + 1.0
    mean, variances = (nn.Parameter(make(2, dtype=torch.float64)) for make in (torch.zeros, torch.ones))
    loss = NormalMMDLoss(IMQ(nn.Parameter(torch.tensor(1.0))), "biased", mean=mean, covariance=variances)
    assert set(loss.state_dict()) == {"mean", "covariance", "bandwidth"}
    optimizer = torch.optim.Adam([mean, variances], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss(z).backward()
        optimizer.step()
    assert loss.bandwidth.grad is not None
    assert (mean - z.mean(0)).abs().max() < 0.3 and (variances / z.var(0)).log().abs().max() < 0.5


def test_the_module_is_the_divergence_of_an_objective():
    class Prior:
        def sample(self, n):
            return torch.zeros(n, 3, dtype=torch.float64)

    z = normal(9, 3)
    terms = Objective(1.0, 10.0, NormalMMDLoss())(torch.ones(9, dtype=torch.float64), None, z, Prior())
    near(terms.loss, 1 + 10 * mmd_to_normal(z))
    assert terms.divergence_name == "mmd"


# Errors

four, numbers = torch.ones(4, 2), "accepted: a floating-point tensor of shape"


class Unknown(Kernel):
    def _phi(self, d2, b):
        return torch.exp(-d2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mmd_to_normal([1.0]), TypeError, "z: got list; accepted: a torch.Tensor"),
        (lambda: mmd_to_normal(None), TypeError, "z: got None"),
        (lambda: mmd_to_normal(four.int()), TypeError, "z: got dtype torch.int32; accepted: floating point"),
        (lambda: mmd_to_normal(four[0]), ValueError, r"z: got shape \(2,\); accepted: \[N, D\]"),
        (lambda: mmd_to_normal(four[None]), ValueError, r"z: got shape \(1, 4, 2\); accepted.*z.flatten\(1\)"),
        (lambda: mmd_to_normal(four[:0]), ValueError, r"z: got shape \(0, 2\)"),
        (lambda: mmd_to_normal(four[:1]), ValueError, "'unbiased' needs two points: got N=1; or use 'biased'"),
        (lambda: mmd_to_normal(four, estimator="block"), ValueError, "got 'block'; accepted: 'unbiased', 'biased'"),
        (lambda: NormalMMDLoss(estimator="linear"), ValueError, "got 'linear'; accepted: 'unbiased', 'biased'"),
        (lambda: mmd_to_normal(four, "gauss"), ValueError, "kernel: got 'gauss'; accepted"),
        (lambda: NormalMMDLoss(RBF), TypeError, "kernel: got .*; accepted"),
        (lambda: mmd_to_normal(four, Unknown(1.0), backend="reference"), TypeError, "kernel: got Unknown; accepted"),
        (lambda: mmd_to_normal(four, backend="gpu"), ValueError, "backend='gpu' is unknown"),
        (lambda: mmd_to_normal(four, mean=0.0), TypeError, rf"mean: got float; {numbers} \[2\]$"),
        (lambda: mmd_to_normal(four, mean=four[0].int()), TypeError, r"mean: got dtype torch.int32;.*mean.float\(\)"),
        (lambda: mmd_to_normal(four, mean=four), ValueError, r"mean: got shape \(4, 2\)"),
        (lambda: mmd_to_normal(four, mean=four[0].to("meta")), ValueError, "mean: is on meta, but z on cpu"),
        (lambda: mmd_to_normal(four, mean=four[0] / 0), ValueError, "mean: got NaN or infinity"),
        (
            lambda: mmd_to_normal(four, covariance="1"),
            TypeError,
            r"covariance: got str; accepted: a number, or .* \[\] or \[2\] or \[2, 2\]$",
        ),
        (lambda: mmd_to_normal(four, covariance=True), TypeError, "covariance: got bool"),
        (lambda: mmd_to_normal(four, covariance=four), ValueError, r"covariance: got shape \(4, 2\)"),
        (lambda: mmd_to_normal(four, covariance=math.inf), ValueError, "covariance: got NaN or infinity"),
        (lambda: mmd_to_normal(four, covariance=0), ValueError, "covariance: got the variance 0 along an axis"),
        (lambda: mmd_to_normal(four, covariance=-1.5), ValueError, "the variance -1.5 along an axis; accepted: posi"),
        (lambda: mmd_to_normal(four, covariance=torch.tensor([1.0, -2.0])), ValueError, "got the variance -2 along"),
        (
            lambda: mmd_to_normal(four, covariance=torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
            ValueError,
            "covariance: got the variance -1 along an axis",
        ),
        (
            lambda: mmd_to_normal(four, covariance=torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
            ValueError,
            "covariance: got a matrix that is not symmetric",
        ),
        (
            lambda: mmd_to_normal(four, covariance=torch.eye(2).requires_grad_()),
            ValueError,
            r"covariance: got a matrix that needs a gradient.*accepted: variances \[D\]",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_matrix_that_could_need_a_gradient_is_accepted_without_one():
    matrix = COVARIANCE.clone().requires_grad_()
    with torch.no_grad():
        value = mmd_to_normal(normal(4, 3), covariance=matrix)
    assert torch.equal(value, mmd_to_normal(normal(4, 3), covariance=matrix.detach()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kernel", [None, IMQ(), "median_rbf"], ids=str)
@each_estimator
def test_non_finite_samples_are_named_and_counted(estimator, kernel, value):
    bad = normal(6, 3, dtype=torch.float32)
    bad[1, 0] = bad[1, 2] = bad[5, 1] = value
    with pytest.raises(ValueError, match="z: 2 of 6 points hold NaN or infinity"):
        mmd_to_normal(bad, kernel, estimator)


def test_a_bandwidth_that_has_become_nan_is_found():
    b = nn.Parameter(torch.tensor(1.0))
    loss = NormalMMDLoss(IMQ(b), backend="reference")
    with torch.no_grad():
        b.fill_(math.nan)
    with pytest.raises(ValueError, match="bandwidth: got nan; accepted: positive numbers"):
        loss(normal(4, 2))
