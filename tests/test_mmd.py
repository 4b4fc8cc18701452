"""MMD: the definition, closed forms, laws, the accuracy bar, types and layouts, errors."""

import copy
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from infovae_fast import NormalMMDLoss, backends, mmd_to_normal
from infovae_fast.divergences import (
    ESTIMATORS,
    MMDLoss,
    SteinLoss,
    mmd,
    stein_direction,
)
from infovae_fast.pairwise import energy, force
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
    rbf_mean,
    require_compile,
    require_pairwise,
)

backend, one_thread, two_threads = oracle.backend, oracle.one_thread, oracle.two_threads
each_kernel = pytest.mark.parametrize("book", KERNELS, ids=name_of)


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
    a, b = (torch.tensor(numbers).to(x) for numbers in ([1.0, 2.0, 1.0, 3.0, 0.0], [2.0, 1.0, 1.0, 1.0]))
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
    a, b = torch.full_like(x[:, 0], 2.0).requires_grad_(), torch.ones_like(y[:, 0])
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
        mmd(x, y, x_weights=torch.ones_like(x[:, 0]), progress=print)
    with pytest.raises(ValueError, match="progress is for"):
        mmd(x[:7], y, estimator="linear", progress=print)


def test_func_transforms():
    x, y = normal(3, 6, 2, seed=1), normal(3, 5, 2, seed=2)
    together = torch.func.vmap(mmd)(x, y)
    near(together, torch.stack([mmd(a, b) for a, b in zip(x, y, strict=True)]))
    leaf = x[0].clone().requires_grad_()
    near(torch.func.grad(mmd)(x[0], y[0]), torch.autograd.grad(mmd(leaf, y[0]), leaf)[0])

    (kernels,) = torch.func.vmap(lambda b: (mmd(x[0], y[0], RBF(b)),))(torch.tensor([0.5, 2.0], dtype=torch.float64))
    near(kernels, torch.stack([mmd(x[0], y[0], RBF(b)) for b in (0.5, 2.0)]))
    presets = torch.func.vmap(lambda a, b: mmd(a, b, "median_rbf"))(x, y)
    near(presets, torch.stack([mmd(a, b, "median_rbf") for a, b in zip(x, y, strict=True)]))


def test_func_transforms_of_several_tiles(monkeypatch):
    x, y = samples(9, 7)
    leaf = x.clone().requires_grad_()
    slope = torch.autograd.grad(mmd(leaf, y), leaf)[0]
    monkeypatch.setattr("infovae_fast.pairwise.TILE_PAIRS", 16)
    near(torch.func.grad(mmd)(x, y), slope)
    near(torch.func.jacrev(mmd)(x, y), slope)
    leaf = torch.stack([x, x]).requires_grad_()
    (slopes,) = torch.autograd.grad(torch.func.vmap(mmd)(leaf, torch.stack([y, y])).sum(), leaf)
    near(slopes, torch.stack([slope, slope]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_points_are_float32(backend, dtype):
    x, y = (s.to(oracle.device, dtype) for s in samples(300, 200))
    require_pairwise(backend, x, y, kernel=RBF())
    a = torch.ones(300, device=x.device)
    for estimator in ("biased", "unbiased"):
        wanted = mmd(x, y, None, estimator, backend=backend)
        for weights in (a, a.to(dtype), a.double()):
            found = mmd(x, y, None, estimator, x_weights=weights, backend=backend)
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-7)
    itself = mmd(x, x, None, "biased", x_weights=a, y_weights=a, backend=backend)
    assert abs(itself.item()) < 2e-7


def test_a_learned_bandwidth_is_the_module_s_parameter():
    x, y = samples()
    three = mmd(x, y, RBF(3.0))
    loss = MMDLoss(RBF(nn.Parameter(torch.tensor(1.0, dtype=torch.float64))))
    near(torch.func.functional_call(loss, {"bandwidth": three.new_tensor(3.0)}, (x, y)), three)
    near(copy.deepcopy(loss)(x, y), mmd(x, y, RBF(1.0)))
    loss.load_state_dict({"bandwidth": three.new_tensor(3.0)}, assign=True)
    near(loss(x, y), three)
    assert loss.kernel.bandwidth is loss.bandwidth
    loss.bandwidth = nn.Parameter(three.new_tensor(1.0))
    nn.utils.parametrize.register_parametrization(loss, "bandwidth", nn.Softplus())
    near(loss(x, y), mmd(x, y, RBF(math.log1p(math.e))))
    loss(x, y).backward()
    assert loss.parametrizations.bandwidth.original.grad != 0
    loss = MMDLoss()
    loss.kernel = RBF(nn.Parameter(three.new_tensor(3.0)))
    near(loss(x, y), three)
    assert len(list(loss.parameters())) == 1
    loss.kernel = RBF(3.0)
    near(loss(x, y), three)
    assert not list(loss.parameters())

    class Named(RBF):
        def __init__(self, name, length):
            super().__init__(length)

    mine = MMDLoss(Named("mine", nn.Parameter(three.new_tensor(1.0))))
    near(mine(x, y), mmd(x, y, RBF(1.0)))
    near(torch.func.functional_call(mine, {"bandwidth": three.new_tensor(3.0)}, (x, y)), three)
    prior = NormalMMDLoss(RBF(nn.Parameter(three.new_tensor(1.0))))
    near(torch.func.functional_call(prior, {"bandwidth": three.new_tensor(3.0)}, (x,)), mmd_to_normal(x, RBF(3.0)))


def test_the_kernel_of_a_module_may_be_a_module():
    """nn.Module takes modules for children before it looks for properties."""

    class Learnt(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_length = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, x, y):
            return RBF(self.log_length.exp())

    x, y = samples()
    for loss in (MMDLoss(Learnt()), MMDLoss(RBF(nn.Parameter(x.new_tensor(3.0))))):
        loss.kernel = Learnt()
        near(loss(x, y), mmd(x, y, RBF(math.e)))
        assert [name for name, _ in loss.named_parameters()] == ["kernel.log_length"]
        near(copy.deepcopy(loss)(x, y), mmd(x, y, RBF(math.e)))
        loss.kernel = RBF(3.0)
        near(loss(x, y), mmd(x, y, RBF(3.0)))
        assert not list(loss.parameters())
        with pytest.raises(ValueError, match="kernel: got 'unknown'"):
            loss.kernel = "unknown"


def test_the_linear_estimator_knows_the_names_of_the_backends():
    x, y = samples(6, 6)
    near(mmd(x, y, None, "linear", backend="triton"), mmd(x, y, None, "linear"))
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        mmd(x, y, None, "linear", backend="fast")


@pytest.mark.parametrize("least", [-30, -36, -45, -300])
def test_weights_of_which_one_is_nearly_all(least):
    """Importance weights that have degenerated: 1 - sum a^2, taken so, would be 0 or lose its digits."""
    x, y = samples(4, 5)
    log_w = torch.tensor([least + 1.0, 0.0, least + 2.0, least], dtype=torch.float64)
    w = [math.exp(v) for v in log_w]
    phi = RBF(1.0).phi(torch.cdist(x, torch.cat([x, y]), compute_mode="donot_use_mm_for_euclid_dist") ** 2)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    within = math.fsum(w[i] * w[j] * phi[i, j] for i, j in pairs) / math.fsum(w[i] * w[j] for i, j in pairs)
    between = math.fsum(w[i] * phi[i, 4:].mean() for i in range(4)) / math.fsum(w)
    within_y = energy(y, kernel=RBF(1.0)) / 20
    near(mmd(x, y, RBF(1.0), x_weights=log_w.exp()), within - 2 * between + within_y)


def test_weights_that_cannot_be():
    x, y = samples(4, 4)
    with pytest.raises(ValueError, match="estimator='linear' takes no weights of the points"):
        mmd(x, y, estimator="linear", x_weights=torch.ones(4))
    with pytest.raises(ValueError, match=r"y_weights: got shape \(3,\) on cpu; accepted: a tensor \(4,\) on cpu"):
        mmd(x, y, y_weights=torch.ones(3))
    for bad in (torch.zeros(4), torch.tensor([1.0, math.nan, 1.0, 1.0]), torch.tensor([1.0, math.inf, 1.0, 1.0])):
        with pytest.raises(ValueError, match=r"x_weights: their sum is .*; accepted: finite weights with a positive"):
            mmd(x, y, x_weights=bad)
    two = "accepted: above 0, as with two points of positive weight and none of negative"
    for bad, pairs in (([0.0, 1.0, 0.0, 0.0], "0"), ([2.0, -0.5, -0.5, 0.0], r"-3\.5")):
        with pytest.raises(ValueError, match=f"x_weights: for estimator='unbiased' 1 - .* of sum 1, is {pairs}; {two}"):
            mmd(x, y, x_weights=torch.tensor(bad))
    with pytest.raises(ValueError, match="y_weights: got weights, but no y"):
        energy(x, kernel=RBF(), y_weights=torch.ones(4))
    with pytest.raises(TypeError, match=r"kernel: got 'wae_imq'; accepted: a Kernel such as RBF\(1.0\)"):
        energy(x, y, kernel="wae_imq")
    with pytest.raises(TypeError, match="kernel: got None; accepted: a Kernel"):
        force(x, y, kernel=None)


def test_one_point_each_with_the_biased_estimator(backend):
    x, y = samples(1, 1)
    require_pairwise(backend, x, y, kernel=RBF(2.0))
    near(mmd(x, y, RBF(2.0), "biased", backend=backend), 2 - 2 * RBF(2.0).phi((x - y).square().sum()))


@each_kernel
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_coinciding_points(backend, book, estimator):
    x, y = torch.ones(2, 6, 3, device=oracle.device)
    x.requires_grad_()
    require_pairwise(backend, x, y, kernel=book.build())
    value = mmd(x, y, book.build(), estimator, backend=backend)
    (slope,) = torch.autograd.grad(value, x)
    assert abs(value) <= torch.finfo(torch.float32).eps * 4 * book.phi(0.0)  # four terms that cancel
    assert torch.equal(slope, torch.zeros_like(x))


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
    if not torch.cuda.is_available() and (backend == "triton" or (backend == "cuda" and dim > 10)):
        pytest.skip(f"{backend}: simulated, it would take minutes for these clouds of 1,000 points")
    kernel = BAR_KERNELS[name](dim).at(dim)
    require_pairwise(backend, *torch.zeros(2, 1, dim, device=oracle.device), kernel=kernel)
    truths, errors = [], []
    for seed, shift in BAR_CASES:
        x, y, biased, unbiased, slope = bar_truth(name, dim, seed, shift)
        x, y = x.to(oracle.device), y.to(oracle.device)
        leaf = x.clone().requires_grad_(slope is not None)
        value = mmd(leaf, y, kernel, "biased", backend=backend)
        assert value.dtype == torch.float32
        assert abs(value.item() - biased) / biased < 1e-5
        if slope is not None:
            error = (torch.autograd.grad(value, leaf)[0].cpu().double() - slope).abs().max() / slope.abs().max()
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
    with torch.autocast(oracle.device, torch.bfloat16):
        under = both()
    for a, b in zip(plain, under, strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_layouts(backend, estimator):
    x, y = samples(8, 8, 4, torch.float32)
    require_pairwise(backend, x, y, kernel=RBF(1.0))
    gaps = torch.full((16, 8), math.nan, device=y.device)
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


def test_the_module_takes_weights_of_points():
    x, y = samples(6, 5, 2, torch.float32)
    a, b = torch.rand(6), torch.rand(5)
    module, function = MMDLoss(IMQ(1.0)), mmd(x, y, IMQ(1.0), x_weights=a, y_weights=b)
    assert module(x, y, x_weights=a, y_weights=b) == function != module(x, y)


def test_a_bandwidth_that_has_become_no_length_is_found():
    b = nn.Parameter(torch.tensor(1.0))
    loss = MMDLoss(RBF(b))
    for value in (math.nan, 0.0, -1.0):
        b.data.fill_(value)
        with pytest.raises(ValueError, match=rf"bandwidth: got {value}; accepted: positive numbers"):
            loss(*samples(4, 4, 2, torch.float32))


def test_the_environment_chooses_the_backend(monkeypatch, request):
    monkeypatch.setattr(backends, "AUTO", "nonsense")
    backends.shortcut.cache_clear()
    request.addfinalizer(backends.shortcut.cache_clear)
    with pytest.raises(ValueError, match="INFOVAE_FAST_BACKEND='nonsense' is unknown"):
        mmd(four, four)
    assert mmd(four, four, backend="reference") == 0
