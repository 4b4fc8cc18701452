"""MMD, Stein, Gaussian KL and adversarial divergences: definitions, closed forms, laws, accuracy, errors."""

import copy
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from infovae_fast import backends
from infovae_fast.divergences import (
    ESTIMATORS,
    AdversarialLoss,
    MMDLoss,
    SteinLoss,
    gaussian_kl,
    mmd,
    stein_direction,
    stein_loss,
)
from infovae_fast.pairwise import force
from infovae_fast.radial import IMQ, PRESETS, RBF, RationalQuadratic, median_rbf, wae_imq
from tests import oracle
from tests.oracle import (
    EXACT,
    KERNELS,
    check,
    mmd_pairs,
    name_of,
    near,
    normal,
    pair_sum,
    require_compile,
    require_pairwise,
    stein_loop,
)

backend, one_thread, two_threads = oracle.backend, oracle.one_thread, oracle.two_threads
each_kernel = pytest.mark.parametrize("book", KERNELS, ids=name_of)
each_kind = pytest.mark.parametrize("kind", ["js", "wgan-gp"])


def samples(n=7, m=5, dim=3, dtype=torch.float64):
    return normal(n, dim, seed=1, dtype=dtype), (1.3 * normal(m, dim, seed=2) + 0.4).to(dtype)


# MMD: the definition


@each_kernel
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mmd_and_its_gradients_are_the_double_loop(backend, book, estimator):
    x, y = samples(7, 7 if estimator in ("linear", "block") else 5)
    b = torch.tensor(book.bandwidths, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, y, b)]
    require_pairwise(backend, x, y, kernel=book.build(b))
    block = {"block_size": 3} if estimator == "block" else {}
    out = mmd(x, y, book.build(b), estimator, backend=backend, **block)
    value, *gradients = pair_sum(mmd_pairs(estimator, len(x), len(y), 3), x, y, book)
    near(out, value)
    for slope, truth in zip(torch.autograd.grad(out, leaves), gradients, strict=True):
        near(slope, truth)


def test_the_default_block_is_the_root_of_n():
    x, y = samples(19, 19)
    near(mmd(x, y, estimator="block"), mmd(x, y, estimator="block", block_size=4))
    x, y = x[:3], y[:3]
    near(mmd(x, y, estimator="block"), mmd(x, y, estimator="block", block_size=2))
    near(mmd(x, y, estimator="block", block_size=3), mmd(x, y))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kernel", [RBF([0.7, 2.0]), IMQ(1.1), RationalQuadratic(0.9, 2.5)])
def test_mmd_derivatives(kernel, estimator):
    x, y = samples(4, 4, 2)
    b = torch.tensor(kernel.bandwidth, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, y, b)]

    def f(x, y, b):
        return mmd(x, y, type(kernel)(b), estimator, backend="reference")

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_mmd_names_mean_kernels():
    x, y = samples()
    assert torch.equal(mmd(x, y), mmd(x, y, RBF(math.sqrt(3))))
    assert torch.equal(mmd(x, y, IMQ()), mmd(x, y, IMQ(math.sqrt(3))))
    for name, preset in PRESETS.items():
        assert torch.equal(mmd(x, y, name), mmd(x, y, preset(x, y)))
    assert torch.equal(mmd(x, y, lambda x, y: IMQ(0.3)), mmd(x, y, IMQ(0.3)))
    assert torch.equal(mmd(x, y, median_rbf), mmd(x, y, "median_rbf"))


# MMD: closed forms


def rbf_mean(m, s2, b):
    """E k(x, y) of an RBF where x - y ~ N(m, s2 I)."""
    return (b**2 / (b**2 + s2)) ** (len(m) / 2) * math.exp(-float(m @ m) / (2 * (b**2 + s2)))


MEAN, STD, BANDWIDTH = torch.tensor([0.6, -0.3], dtype=torch.float64), 1.4, 1.2
WITHIN_X = rbf_mean(0 * MEAN, 2.0, BANDWIDTH)
WITHIN_Y = rbf_mean(0 * MEAN, 2 * STD**2, BANDWIDTH)
POPULATION = WITHIN_X + WITHIN_Y - 2 * rbf_mean(MEAN, 1 + STD**2, BANDWIDTH)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_expectation_between_gaussians(estimator):
    """The mean of many estimates is within its standard error of the population's value: exactly known bias."""
    n, m, draws = 16, 16 if estimator in ("linear", "block") else 11, 600
    generator = torch.Generator().manual_seed(5)
    values = []
    for _ in range(draws):
        x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        y = MEAN + STD * torch.randn(m, 2, generator=generator, dtype=torch.float64)
        values.append(mmd(x, y, RBF(BANDWIDTH), estimator).item())
    bias = (1 - WITHIN_X) / n + (1 - WITHIN_Y) / m if estimator == "biased" else 0.0
    error = np.std(values) / math.sqrt(draws)
    assert abs(np.mean(values) - POPULATION - bias) < 4 * error
    assert estimator != "biased" or bias > 20 * error  # the test tells the two apart


def test_large_samples_reach_the_population_value():
    x = normal(3000, 2, seed=1)
    y = MEAN + STD * normal(3000, 2, seed=2)
    blocks = [mmd(a, b, RBF(BANDWIDTH)).item() for a, b in zip(x.split(300), y.split(300), strict=True)]
    whole = mmd(x, y, RBF(BANDWIDTH), "block", block_size=300).item()
    assert whole == pytest.approx(np.mean(blocks), rel=1e-12)
    assert abs(whole - POPULATION) < 4 * np.std(blocks) / math.sqrt(len(blocks))


# MMD: laws


@each_kernel
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_mmd_laws(backend, book, estimator):
    x, y = samples(9, 6, 4)
    kernel = book.build()
    require_pairwise(backend, x, y, kernel=kernel)

    def f(x, y, kernel=kernel):
        return mmd(x, y, kernel, estimator, backend=backend)

    value = f(x, y)
    near(f(y, x), value)
    near(f(x - 7.0, y - 7.0), value)
    Q = torch.linalg.qr(normal(4, 4, seed=9))[0]
    near(f(x @ Q, y @ Q), value)
    near(f(x.flip(0), y.roll(2, 0)), value)
    longer = book.build(torch.tensor([3.0 * b for b in book.bandwidths], dtype=torch.float64))
    near(f(3.0 * x, 3.0 * y, longer), value)
    doubled = replace(kernel, weights=[2.0] * len(book.bandwidths))
    near(f(x, y, doubled), 2 * each_scale_alone(f, x, y, book))


def each_scale_alone(f, x, y, book):
    return sum(f(x, y, oracle.Textbook(book.kind, (b,), None, book.alpha).build()) for b in book.bandwidths)


@each_kernel
def test_biased_mmd_of_a_sample_with_itself_is_zero_and_otherwise_positive(backend, book):
    x, y = samples(30, 20)
    kernel = book.build()
    require_pairwise(backend, x, x, kernel=kernel)
    assert abs(mmd(x, x.clone(), kernel, "biased", backend=backend)) <= EXACT * kernel.phi0
    assert mmd(x, y, kernel, "biased", backend=backend) > 1e-3 * kernel.phi0
    # unbiased, of a sample with itself: -2/N (phi(0) - mean of k over pairs), below zero
    pairs = torch.cdist(x, x).square()[~torch.eye(30, dtype=torch.bool)]
    near(mmd(x, x.clone(), kernel, backend=backend), -2 / 30 * (kernel.phi0 - kernel.phi(pairs).mean()))


@pytest.mark.parametrize("dim", [1, 2, 16, 100, 512])
@pytest.mark.parametrize("sizes", [(2, 2), (40, 3), (3, 40), (40, 40)], ids=str)
def test_every_size(backend, sizes, dim):
    x, y = samples(*sizes, dim, torch.float32)
    x.requires_grad_()
    require_pairwise(backend, x, y, kernel=RBF())
    for estimator in ("biased", "unbiased"):
        value = mmd(x, y, estimator=estimator, backend=backend)
        (slope,) = torch.autograd.grad(value, x)
        assert value.dtype == slope.dtype == torch.float32 and value.isfinite() and slope.isfinite().all()
        truth = mmd(x.detach().double(), y.double(), estimator=estimator, backend="reference")
        assert abs(value.double() - truth) <= torch.finfo(torch.float32).eps * mmd_scale(x, y, RBF(), estimator)
        assert value.ndim == 0


def mmd_weights(n, m, estimator):
    own = (1 / n**2, 1 / m**2) if estimator == "biased" else (1 / (n * (n - 1)), 1 / (m * (m - 1)))
    return own[0], -1 / (n * m), own[1]


def mmd_scale(x, y, kernel, estimator):
    """The sum of |terms| of an MMD, the terms of the distances and the diagonal included, and its rounding."""
    n, m = len(x), len(y)
    diagonal = kernel.phi0 * (1 / n + 1 / m) if estimator == "biased" else 0.0
    return oracle.pairwise_scales(x, y, None, kernel, mmd_weights(n, m, estimator))[0] + diagonal


LAYOUTS = {
    "contiguous": lambda t: t,
    "by columns": lambda t: t.T.contiguous().T,
    "every other": lambda t: t.repeat_interleave(2, 0)[::2],
    "offset": lambda t: torch.cat([t[:1], t])[1:],
    "one row expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("seed", range(20))
def test_a_hundred_random_cases(seed):
    """N, M, D, dtype, layout, kernel, estimator and spread at random, by the accuracy rule."""
    require_pairwise("cpp", torch.zeros(1, 1), kernel=RBF())
    draw = np.random.default_rng(seed)
    dtypes = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
    for _ in range(100):
        n, m, d = (int(2 ** draw.uniform(1, most)) for most in (6.5, 6.5, 6))
        dtype, estimator = dtypes[draw.integers(5)], ["biased", "unbiased"][draw.integers(2)]
        kernel, shift = KERNELS[draw.integers(len(KERNELS))].build(), draw.choice([0.0, 0.0, 30.0])
        layouts = draw.choice(list(LAYOUTS), 2)
        x, y = (
            LAYOUTS[layout](torch.from_numpy(draw.normal(size=(k, d)) + shift).to(dtype))
            for layout, k in zip(layouts, (n, m), strict=True)
        )

        def value_and_slope(x, y, backend, kernel=kernel, estimator=estimator):
            leaf = x.detach().requires_grad_()
            value = mmd(leaf, y, kernel, estimator, backend=backend)
            return value.detach(), torch.autograd.grad(value, leaf)[0]

        computed = torch.promote_types(dtype, torch.float32)
        truth, yardstick = value_and_slope(x.double(), y.double(), "reference"), value_and_slope(x, y, "reference")
        out = value_and_slope(x, y, "cpp")
        scales = (
            mmd_scale(x, y, kernel, estimator),
            2 * oracle.pairwise_scales(x, y, None, kernel, mmd_weights(n, m, estimator))[1],
        )
        # Where all pairs are the same pair, so are their rounding errors: nothing averages out.
        coherent = 2 if "one row expanded" in layouts else 1
        for k, eps_of in enumerate((computed, dtype)):
            if dtype == torch.float64:  # the truth is the yardstick
                assert (out[k] - truth[k]).abs().max() <= EXACT * scales[k].max()
            else:
                check(out[k], truth[k], yardstick[k], coherent * scales[k], eps_of)


@each_kernel
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_importance_weights(backend, book, estimator):
    """Weights of whole numbers are points that occur several times; only their ratios count."""
    x, y = samples(5, 4)
    a, b = torch.tensor([1.0, 2.0, 1.0, 3.0, 0.0]).double(), torch.tensor([2.0, 1.0, 1.0, 1.0]).double()
    kernel = book.build()
    require_pairwise(backend, x, y, kernel=kernel)
    value = mmd(x, y, kernel, estimator, x_weights=5 * a, y_weights=b / 3, backend=backend)
    many = [z.repeat_interleave(w.long(), 0) for z, w in ((x, a), (y, b))]
    if estimator == "biased":
        near(value, mmd(*many, kernel, "biased", backend="reference"))
    p, q = a / a.sum(), b / b.sum()
    phi = [[kernel.phi((s[:, None] - t).square().sum(-1)) for t in (x, y)] for s in (x, y)]
    xx, yy = p @ phi[0][0] @ p, q @ phi[1][1] @ q
    if estimator == "unbiased":
        xx = (xx - kernel.phi0 * p @ p) / (1 - p @ p)
        yy = (yy - kernel.phi0 * q @ q) / (1 - q @ q)
    near(value, xx + yy - 2 * p @ phi[0][1] @ q)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_equal_weights_are_none_and_gradients_reach_the_weights(backend, estimator):
    x, y = samples(9, 7)
    require_pairwise(backend, x, y, kernel=RBF())
    a, b = torch.full((9,), 2.0).double().requires_grad_(), torch.ones(7).double()
    value = mmd(x, y, None, estimator, x_weights=a, backend=backend)
    near(value, mmd(x, y, None, estimator, backend=backend))
    near(mmd(x, y, None, estimator, y_weights=b, backend=backend), value)
    assert torch.autograd.gradcheck(lambda a, x: mmd(x, y, None, estimator, x_weights=a, backend=backend), (a, x))


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_progress(backend, estimator, monkeypatch):
    x, y = samples(11, 7)
    require_pairwise(backend, x, y, kernel=RBF())
    monkeypatch.setattr("infovae_fast.divergences.CHUNK", 4)
    calls = []
    leaf = x.clone().requires_grad_()
    value = mmd(leaf, y, None, estimator, progress=lambda *call: calls.append(call), backend=backend)
    near(value, mmd(x, y, None, estimator, backend=backend))
    assert calls == [(k, 15) for k in range(1, 16)]  # 3 and 2 parts: 6 + 3 pairs of parts of a cloud, 6 of both
    x.requires_grad_()
    (slope,) = torch.autograd.grad(mmd(x, y, None, estimator, backend=backend), x)
    near(torch.autograd.grad(value, leaf)[0], slope)
    with pytest.raises(ValueError, match="progress is for estimator='biased' or 'unbiased' without weights"):
        mmd(x, y, x_weights=torch.ones(11), progress=print)
    with pytest.raises(ValueError, match="progress is for"):
        mmd(x[:7], y, estimator="linear", progress=print)


def test_func_transforms():
    x, y = normal(3, 6, 2, seed=1), normal(3, 5, 2, seed=2)
    together = torch.func.vmap(mmd)(x, y)
    near(together, torch.stack([mmd(a, b) for a, b in zip(x, y, strict=True)]))
    leaf = x[0].clone().requires_grad_()
    near(torch.func.grad(mmd)(x[0], y[0]), torch.autograd.grad(mmd(leaf, y[0]), leaf)[0])


def test_weights_that_cannot_be():
    x, y = samples(4, 4)
    with pytest.raises(ValueError, match="estimator='linear' takes no weights of the points"):
        mmd(x, y, estimator="linear", x_weights=torch.ones(4))
    with pytest.raises(ValueError, match=r"y_weights: got shape \(3,\) on cpu; accepted: a tensor \(4,\) on cpu"):
        mmd(x, y, y_weights=torch.ones(3))
    for bad in (torch.zeros(4), torch.tensor([1.0, math.nan, 1.0, 1.0]), torch.tensor([1.0, math.inf, 1.0, 1.0])):
        with pytest.raises(ValueError, match=r"x_weights: their sum is .*; accepted: finite weights with a positive"):
            mmd(x, y, x_weights=bad)
    with pytest.raises(ValueError, match="x_weights: estimator='unbiased' needs weight on two points"):
        mmd(x, y, x_weights=torch.tensor([0.0, 1.0, 0.0, 0.0]))


def test_one_point_each_with_the_biased_estimator(backend):
    x, y = samples(1, 1)
    require_pairwise(backend, x, y, kernel=RBF(2.0))
    near(mmd(x, y, RBF(2.0), "biased", backend=backend), 2 - 2 * RBF(2.0).phi((x - y).square().sum()))


@each_kernel
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_coinciding_points(backend, book, estimator):
    x, y = torch.ones(6, 3, requires_grad=True), torch.ones(6, 3)
    require_pairwise(backend, x, y, kernel=book.build())
    value = mmd(x, y, book.build(), estimator, backend=backend)
    (slope,) = torch.autograd.grad(value, x)
    assert abs(value) <= torch.finfo(torch.float32).eps * 4 * book.phi(0.0)  # four terms that cancel
    assert torch.equal(slope, torch.zeros(6, 3))


@given(
    n=st.integers(2, 12),
    m=st.integers(2, 12),
    dim=st.integers(1, 20),
    book=st.sampled_from(KERNELS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    estimator=st.sampled_from(ESTIMATORS),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_any_samples(n, m, dim, book, dtype, estimator, seed):
    m = n if estimator in ("linear", "block") else m
    x, y = normal(n + m, dim, seed=seed).to(dtype).split([n, m])
    value = mmd(x, y, book.build(), estimator)
    block = max(2, math.isqrt(n))
    truth, *_ = pair_sum(mmd_pairs(estimator, n, m, block), x, y, book)
    terms = 4 * book.phi(0.0) + 4 * max(p.double().norm(dim=1).max() for p in (x, y)) ** 2 * abs(book.dphi(0.0))
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert abs(value.double() - truth) <= max(2 * torch.finfo(value.dtype).eps, EXACT) * terms


# MMD: the accuracy bar. Both samples are from one distribution, where the value is a small difference of large sums.

BAR_KERNELS = {"rbf": lambda dim: RBF(), "imq": lambda dim: IMQ(), "seven": wae_imq}
BAR_CASES = [(seed, shift) for seed in range(3) for shift in (0.0, 100.0, 1e4) if seed == 0 or shift != 100.0]


@cache
def bar_truth(name, dim, seed, shift):
    """Two float32 samples of 1000 points; in float64 their biased and unbiased MMD^2 and the gradient of the first."""
    n, kernel = 1000, BAR_KERNELS[name](dim).at(dim)
    x, y = (torch.randn(2, n, dim, generator=torch.Generator().manual_seed(seed)) + shift).unbind()
    exact = x.double(), y.double()
    values = [mmd(*exact, kernel, estimator, backend="reference").item() for estimator in ("biased", "unbiased")]
    slope = None
    if seed == 0:
        slope = 2 * force(*exact, kernel=kernel, weights=mmd_weights(n, n, "biased"), backend="reference")
    return x, y, *values, slope


@pytest.mark.parametrize("name", BAR_KERNELS)
@pytest.mark.parametrize("dim", [2, 10, 80])
def test_float32_accuracy(backend, dim, name):
    """Value within 1e-5, gradient within 3e-6 of its largest component, at the origin and far from it.

    The unbiased estimate has expectation zero here, so that its relative error has no bound where it happens to fall
    near zero: it is judged against its standard deviation, or its size where that is larger.
    """
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("triton: its interpreter would take minutes for these clouds of 1,000 points")
    kernel = BAR_KERNELS[name](dim).at(dim)
    require_pairwise(backend, torch.zeros(1, dim), torch.zeros(1, dim), kernel=kernel)
    truths, errors = [], []
    for seed, shift in BAR_CASES:
        x, y, biased, unbiased, slope = bar_truth(name, dim, seed, shift)
        leaf = x.clone().requires_grad_(slope is not None)
        value = mmd(leaf, y, kernel, "biased", backend=backend)
        assert value.dtype == torch.float32
        assert abs(value.item() - biased) / biased < 1e-5
        if slope is not None:
            error = (torch.autograd.grad(value, leaf)[0].double() - slope).abs().max() / slope.abs().max()
            assert error.item() < 3e-6
        truths.append(unbiased)
        errors.append(abs(mmd(x, y, kernel, backend=backend).item() - unbiased))
    deviation = np.std(truths)
    for truth, error in zip(truths, errors, strict=True):
        assert error / max(abs(truth), deviation) < 1e-5


# MMD: types and layouts


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_half_precision_is_computed_in_float32(backend, dtype, estimator):
    x, y = samples(8, 8, 3, dtype)
    require_pairwise(backend, x, y, kernel=RBF(1.0))
    value = mmd(x.requires_grad_(), y, RBF(1.0), estimator, backend=backend)
    assert value.dtype == torch.float32
    x32 = x.detach().float().requires_grad_()
    assert torch.equal(value, mmd(x32, y.float(), RBF(1.0), estimator, backend=backend))
    assert torch.autograd.grad(value, x)[0].dtype == dtype
    mixed = mmd(x, y.float(), RBF(1.0), estimator, backend=backend)
    assert torch.equal(mixed, value)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_autocast_changes_nothing(backend, estimator):
    x, y = samples(8, 8, 3, torch.float32)
    require_pairwise(backend, x, y, kernel=RBF(1.0))

    def both():
        leaf = x.clone().requires_grad_()
        value = mmd(leaf, y, RBF(1.0), estimator, backend=backend)
        return value, *torch.autograd.grad(value, leaf), stein_direction(x, kernel=RBF(1.0), backend=backend)

    plain = both()
    with torch.autocast("cpu", torch.bfloat16):
        under = both()
    for a, b in zip(plain, under, strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_layouts(backend, estimator):
    x, y = samples(8, 8, 4, torch.float32)
    require_pairwise(backend, x, y, kernel=RBF(1.0))
    gaps = torch.full((16, 8), math.nan)
    gaps[::2, 1::2] = y
    for a, b in [(x.T.contiguous().T, gaps[::2, 1::2]), (x, y[:1].expand(8, 4)), (x, x), (x[:6], x[2:])]:
        value = mmd(a, b, RBF(1.0), estimator, backend=backend)
        a, b = a.contiguous(), b.contiguous()
        truth = mmd(a.double(), b.double(), RBF(1.0), estimator, backend="reference")
        yardstick = mmd(a, b, RBF(1.0), estimator, backend="reference")
        scale = mmd_scale(a, b, RBF(1.0), "biased" if estimator == "biased" else "unbiased")
        check(value, truth, yardstick, 4 * scale if estimator in ("linear", "block") else scale)


def test_gradient_with_respect_to_both_uses_of_one_tensor(backend):
    x = normal(6, 2).requires_grad_()
    require_pairwise(backend, x, x, kernel=RBF(1.0))
    a, b = (x.detach().clone().requires_grad_() for _ in range(2))
    ga, gb = torch.autograd.grad(mmd(a, 2 * b, RBF(1.0), backend=backend), (a, b))
    near(torch.autograd.grad(mmd(x, 2 * x, RBF(1.0), backend=backend), x)[0], ga + gb)


def test_twice_the_same_bits(backend, two_threads):
    x, y = samples(150, 170, 9, torch.float32)
    require_pairwise(backend, x, y, kernel=RBF())
    for f in (mmd, lambda x, y, **k: stein_direction(x, **k)):
        assert torch.equal(f(x, y, backend=backend), f(x, y, backend=backend))


def compiled(f):
    torch.compiler.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("kernel", [None, RationalQuadratic([0.5, 2.0], 0.5)], ids=["rbf", "mixture"])
def test_compile_mmd_in_one_graph(backend, kernel):
    require_compile(backend)
    require_pairwise(backend, *samples(12, 9, 3, torch.float32), kernel=RBF())
    compare_compiled_mmd(kernel, backend)


@pytest.mark.parametrize("name", PRESETS)
def test_compile_every_preset(name):
    compare_compiled_mmd(name, "auto")


def compare_compiled_mmd(kernel, backend):
    x, y = samples(12, 9, 3, torch.float32)
    results = []
    for f in (mmd, compiled(mmd)):
        leaf = x.clone().requires_grad_()
        value = f(leaf, y, kernel, backend=backend)
        results.append((value, *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("estimator", ["biased", "linear", "block"])
def test_compile_the_other_estimators(estimator):
    x, y = samples(12, 12, 3, torch.float32)
    torch.testing.assert_close(compiled(mmd)(x, y, estimator=estimator), mmd(x, y, estimator=estimator))


def test_compile_stein_loss_in_one_graph(backend):
    z, _ = samples(12, 1, 3, torch.float32)
    require_compile(backend)
    require_pairwise(backend, z, v=z, kernel=RBF(), energy=False)
    results = []
    for f in (stein_loss, compiled(stein_loss)):
        leaf = z.clone().requires_grad_()
        value = f(leaf, backend=backend)
        results.append((value, *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(results[1], results[0])


# MMD: the module


def test_mmd_loss_is_mmd():
    x, y = samples(9, 9)
    assert torch.equal(MMDLoss()(x, y), mmd(x, y))
    block = MMDLoss(IMQ(0.4), "block", block_size=4, backend="reference")
    assert torch.equal(block(x, y), mmd(x, y, IMQ(0.4), "block", block_size=4, backend="reference"))
    assert torch.equal(MMDLoss("wae_imq", "biased")(x, y), mmd(x, y, "wae_imq", "biased"))
    assert "IMQ" in repr(block) and "block" in repr(block)
    assert MMDLoss.report_name == "mmd" and list(MMDLoss(RBF(1.0)).parameters()) == []


def test_mmd_loss_learns_its_bandwidth():
    x, y = samples(40, 40)
    loss = MMDLoss(RBF(nn.Parameter(torch.tensor([1.0], dtype=torch.float64))), backend="reference")
    assert list(loss.state_dict()) == ["bandwidth"]
    before, other = loss(x, y).item(), copy.deepcopy(loss)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        (-loss(x, y)).backward()
        optimizer.step()
    assert loss(x, y).item() > before and other(x, y).item() == before
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(x, y), loss(x, y))
    assert loss.float().bandwidth.dtype == torch.float32
    near(loss(x, y), mmd(x, y, RBF(loss.bandwidth.detach()), backend="reference"))


# MMD: errors

four = torch.ones(4, 2)


@pytest.mark.parametrize("bad", ["gauss", "RBF", ""])
def test_unknown_kernel_names(bad):
    for call in (lambda: mmd(four, four, bad), lambda: MMDLoss(bad), lambda: SteinLoss(bad)):
        with pytest.raises(ValueError, match=r"kernel: got .*accepted: a Kernel such as RBF\(1.0\), or paper_pixelcnn"):
            call()


@pytest.mark.parametrize("bad", [RBF, IMQ, 1.0, torch.ones(()), ["rbf"]])
def test_kernels_of_the_wrong_type(bad):
    for call in (lambda: mmd(four, four, bad), lambda: MMDLoss(bad), lambda: stein_direction(four, kernel=bad)):
        with pytest.raises(TypeError, match=r"kernel: got .*; accepted: RBF\(\.\.\.\), IMQ"):
            call()


def test_kernel_functions_return_kernels():
    with pytest.raises(TypeError, match="returned float; accepted: a Kernel"):
        mmd(four, four, lambda x, y: 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mmd([1.0], four), TypeError, r"x: got list; accepted: a torch.Tensor"),
        (lambda: mmd(four, [1.0]), TypeError, r"y: got list"),
        (lambda: mmd(four, four.numpy()), TypeError, r"y: got ndarray"),
        (lambda: mmd(four, None), TypeError, r"y: got None; accepted"),
        (lambda: mmd(None, four), TypeError, r"x: got None; accepted"),
        (lambda: mmd(four.int(), four), TypeError, r"x: got dtype torch.int32; accepted: floating point"),
        (lambda: mmd(four, four.double()), TypeError, r"y: got dtype torch.float64, but x is torch.float32"),
        (lambda: mmd(four.half(), four.double()), TypeError, r"y: got dtype torch.float64, but x is torch.float16"),
        (lambda: mmd(four[0], four), ValueError, r"x: got shape \(2,\); accepted: \[N, D\]"),
        (lambda: mmd(four, four[:, :1]), ValueError, r"y: got shape \(4, 1\), but x \(4, 2\)"),
        (lambda: mmd(four[None], four[None]), ValueError, r"x: got shape \(1, 4, 2\); accepted.*x.flatten\(1\)"),
        (lambda: mmd(four[:0], four), ValueError, r"x: got shape \(0, 2\); accepted: at least one point"),
        (lambda: mmd(four, four[:0]), ValueError, r"y: got shape \(0, 2\)"),
        (lambda: mmd(four, four.to("meta")), ValueError, r"y: is on meta, but x on cpu"),
        (lambda: mmd(four, four, estimator="u"), ValueError, r"got 'u'; accepted: 'unbiased', 'biased', 'linear', 'b"),
        (lambda: MMDLoss(estimator="u"), ValueError, r"estimator: got 'u'; accepted: 'unbiased'"),
        (lambda: mmd(four, four[:1]), ValueError, r"needs two points of each sample: got N=4, M=1; or use 'biased'"),
        (lambda: mmd(four[:1], four[:1], estimator="linear"), ValueError, r"'linear' needs two points"),
        (lambda: mmd(four, four[:3], estimator="linear"), ValueError, r"pairs the samples up: got N=4 and M=3"),
        (lambda: mmd(four, four[:3], estimator="block"), ValueError, r"estimator='block' pairs the samples up"),
        (lambda: mmd(four, four, block_size=2), ValueError, r"block_size is for estimator='block', not 'unbiased'"),
        (lambda: mmd(four, four, backend="gpu"), ValueError, r"backend='gpu' is unknown; accepted: 'auto', 'cuda'"),
    ],
)
def test_mmd_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("size", [0, 1, 5, -2, 2.0, "2"])
def test_block_sizes(size):
    with pytest.raises(ValueError, match=r"block_size: got .*accepted: an integer from 2 to N=4"):
        mmd(four, four, estimator="block", block_size=size)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kernel", [None, IMQ(), "median_rbf"], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_non_finite_samples_are_named_and_counted(estimator, kernel, value):
    x, y = samples(6, 6, 3, torch.float32)
    bad = y.clone()
    bad[1, 0] = bad[1, 2] = bad[5, 1] = value
    with pytest.raises(ValueError, match="y: 2 of 6 points hold NaN or infinity"):
        mmd(x, bad, kernel, estimator)
    with pytest.raises(ValueError, match="x: 2 of 6 points hold NaN or infinity"):
        mmd(bad, y, kernel, estimator)
    with pytest.raises(ValueError, match="z: 2 of 6 points"):
        stein_direction(bad, kernel=kernel)


def test_values_that_overflow():
    huge = torch.tensor([[1e200], [-1e200]], dtype=torch.float64)
    with pytest.raises(ValueError, match="overflow: rescale the samples or change the bandwidth"):
        mmd(huge, -huge, backend="reference")


def test_a_bandwidth_that_has_become_nan_is_found():
    b = nn.Parameter(torch.tensor(1.0))
    loss = MMDLoss(RBF(b))
    with torch.no_grad():
        b.fill_(math.nan)
    with pytest.raises(ValueError, match=r"kernel values overflow.*change the bandwidth"):
        loss(*samples(4, 4, 2, torch.float32))


def test_the_environment_chooses_the_backend(monkeypatch):
    monkeypatch.setattr(backends, "AUTO", "nonsense")
    with pytest.raises(ValueError, match="INFOVAE_FAST_BACKEND='nonsense' is unknown"):
        mmd(four, four)
    assert mmd(four, four, backend="reference") == 0


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
    scale = oracle.pairwise_scales(z, None, scores, kernel, (1.0, 0.0, 0.0))[1] + scores.norm(dim=-1, keepdim=True)
    yardstick = stein_direction(z, scores, backend="reference")
    check(stein_direction(z, scores, backend=backend), truth, yardstick, scale / 300)


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
        (lambda: AdversarialLoss(2, critic_steps=0), ValueError, "critic_steps: got 0; accepted: 1 or more"),
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
