"""The permutation test: the brute-force loop, ties, exact level, power, tiles, errors."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import nn

from infovae_fast import two_sample
from infovae_fast.divergences import mmd
from infovae_fast.radial import IMQ, RBF, RationalQuadratic, median_rbf
from infovae_fast.two_sample import MMDTest, mmd_test
from tests import oracle
from tests.oracle import KERNELS, mmd_pairs, name_of, near, normal, pair_sum

one_thread = oracle.one_thread
each_kernel = pytest.mark.parametrize("book", KERNELS, ids=name_of)
SIZES = [(2, 2), (7, 5), (5, 7), (2, 9), (9, 2), (6, 6)]


def samples(n=7, m=5, dim=3, dtype=torch.float64):
    return normal(n, dim, seed=1, dtype=dtype), (1.3 * normal(m, dim, seed=2) + 0.4).to(dtype)


@pytest.fixture
def relabellings(monkeypatch):
    """The labels that a test drew, [1 + permutations, N + M]; the smaller sample comes first."""
    drawn, draw = [], two_sample._labels

    def spy(*arguments):
        drawn.append(draw(*arguments))
        return drawn[-1]

    monkeypatch.setattr(two_sample, "_labels", spy)
    return drawn


# The definition


@each_kernel
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_every_relabelling_is_the_double_loop(relabellings, book, n, m):
    x, y = samples(n, m)
    found = mmd_test(x, y, book.build(), permutations=12)
    (labels,) = relabellings
    z = torch.cat([x, y] if n <= m else [y, x])
    k = min(n, m)
    assert labels.shape == (13, n + m) and (labels.sum(1) == k).all() and labels[0, :k].all()
    pairs = list(mmd_pairs("unbiased", k, n + m - k))
    truth = [pair_sum(pairs, z[row], z[~row], book)[0] for row in labels]
    terms = 4 * book.phi(0.0)
    assert abs(found.statistic - truth[0]) <= 1e-13 * terms
    assert np.abs(found.null.numpy() - truth[1:]).max() <= 1e-13 * terms
    assert found.null.dtype == torch.float64 and found.permutations == len(found.null) == 12
    assert found.p_value == (1 + sum(t >= truth[0] - 1e-13 * terms for t in truth[1:])) / 13


@pytest.mark.parametrize(("n", "m"), [(40, 30), (30, 40), (300, 3)])
@pytest.mark.parametrize("kernel", [RBF(), IMQ(), RationalQuadratic([0.5, 2.0], 2.5), "wae_imq", "median_rbf"], ids=str)
def test_the_statistic_is_mmd(kernel, n, m):
    x, y = samples(n, m)
    found = mmd_test(x, y, kernel, permutations=5)
    near(found.statistic, mmd(x, y, kernel, backend="reference"))
    assert abs(mmd_test(y, x, kernel, permutations=5).statistic - found.statistic) < 1e-13
    assert isinstance(found, MMDTest) and isinstance(found.statistic, float) and isinstance(found.p_value, float)


def test_far_from_the_origin():
    x, y = samples(20, 30)
    near(mmd_test(x + 1e4, y + 1e4, permutations=30).null, mmd_test(x, y, permutations=30).null.numpy())


# Ties


@pytest.mark.parametrize(("n", "m"), [(3, 3), (2, 3), (2, 2)])
@each_kernel
def test_relabellings_that_tie_count(relabellings, book, n, m):
    """So few points that most relabellings repeat one another, or swap the samples: by the partition, exactly."""
    x, y = samples(n, m)
    found = mmd_test(x, y, book.build(), permutations=400)
    z, (labels,) = torch.cat([x, y]), relabellings
    pairs, statistics = list(mmd_pairs("unbiased", n, m)), {}

    def statistic(row):
        names = tuple(row.tolist())
        if n == m and not names[0]:
            names = tuple(not name for name in names)
        if names not in statistics:
            row = torch.tensor(names)
            statistics[names] = pair_sum(pairs, z[row], z[~row], book)[0]
        return statistics[names]

    reached = sum(statistic(row) >= statistic(labels[0]) for row in labels[1:])
    assert len(statistics) == math.comb(n + m, n) // (2 if n == m else 1)
    assert found.p_value == (1 + reached) / 401


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@each_kernel
def test_equal_points_do_not_differ(dtype, book):
    point = torch.full((30, 3), 0.1, dtype=dtype)
    found = mmd_test(point[:10], point[10:], book.build(), permutations=50)
    assert found.p_value == 1 and abs(found.statistic) < 1e-14 * book.phi(0.0)


def test_repetitions_tie_whatever_tile_they_are_summed_in(monkeypatch):
    """The observed labelling, and the one with x and y swapped, as every other column of a large product."""
    x, y = samples(150, 150, 10, torch.float32)

    def repeat(n, m, permutations, generator):
        labels = torch.arange(n + m).expand(1 + permutations, -1) < n
        labels = labels.clone()
        labels[2::3] = ~labels[2::3]
        return labels

    monkeypatch.setattr(two_sample, "_labels", repeat)
    for numbers in (2**21, 10_000):
        monkeypatch.setattr(two_sample, "TILE_NUMBERS", numbers)
        for kernel in (RBF(), IMQ(), RBF(1e4)):
            assert mmd_test(x, y, kernel, permutations=200).p_value == 1


def test_points_that_occur_several_times():
    """Ten points of two kinds: the p-value is hypergeometric, because all that a relabelling changes is a count."""
    x, y = (torch.tensor(points)[:, None] for points in ([0.0] * 4 + [1.0], [1.0] * 4 + [0.0]))
    found = mmd_test(x, y, RBF(0.7), permutations=20_000)
    counts = [math.comb(5, k) ** 2 for k in range(6)]  # relabellings with k zeros in x
    expected = (counts[0] + counts[1] + counts[4] + counts[5]) / sum(counts)
    assert abs(found.p_value - expected) < 4 * math.sqrt(expected * (1 - expected) / 20_000)
    assert len(found.null.round(decimals=12).unique()) == 3


# Level and power


@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 9), (9, 4)])
def test_p_values_are_uniform_under_the_null_hypothesis(n, m):
    generator, permutations, draws = torch.Generator().manual_seed(n), 39, 600
    p = []
    for seed in range(draws):
        x, y = torch.randn(n + m, 2, generator=generator).split([n, m])
        p.append(mmd_test(x, y, permutations=permutations, seed=seed).p_value)
    ranks = np.array(p) * (permutations + 1)
    assert np.allclose(ranks, ranks.round()) and ranks.min() >= 1
    if n != m:  # with n = m swapped relabellings tie with one another, and then p is not uniform but larger
        spread = (ranks - np.random.default_rng(0).random(draws)) / (permutations + 1)
        assert kstest(spread, "uniform").pvalue > 1e-3
    assert abs(np.mean(ranks <= 0.05 * (permutations + 1)) - 0.05) < 4 * math.sqrt(0.05 * 0.95 / draws)


def test_a_kernel_that_is_fitted_to_its_arguments_keeps_the_level():
    """It gets the joint sample in random order; with x and y themselves it would fit what it is to judge."""
    generator, draws, level = torch.Generator().manual_seed(3), 400, {"blind": [], "fitted": []}
    kernels = [RBF(b) for b in np.geomspace(0.02, 5, 12)]

    def best(x, y):
        return max(kernels, key=lambda kernel: mmd(x, y, kernel).item())

    for seed in range(draws):
        x, y = torch.randn(24, 1, generator=generator).split([12, 12])
        for name, kernel in (("blind", best), ("fitted", best(x, y))):
            level[name].append(mmd_test(x, y, kernel, permutations=19, seed=seed).p_value <= 0.05)
    assert np.mean(level["blind"]) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws) < np.mean(level["fitted"])


def test_a_kernel_that_is_fitted_to_its_arguments_keeps_the_level_for_a_seed_by_which_they_are_nearly_the_samples():
    """Seed 0 would put four of the five points of x together again, were they not sorted first."""
    generator, draws, rejected = torch.Generator().manual_seed(4), 600, 0
    kernels = [RBF(b) for b in np.geomspace(0.02, 5, 12)]

    def best(x, y):
        return max(kernels, key=lambda kernel: mmd(x, y, kernel).item())

    for _ in range(draws):
        x, y = torch.randn(13, 1, generator=generator).split([5, 8])
        rejected += mmd_test(x, y, best, permutations=39, seed=0).p_value <= 0.05
    assert rejected / draws < 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


def test_fine_data_keep_their_digits():
    x, y = (1e-5 * s.float() for s in samples(60, 60))
    found, wide = (mmd_test(x.to(dtype), y.to(dtype), RBF(1.0), permutations=99) for dtype in (x.dtype, torch.float64))
    assert found.statistic == wide.statistic > 0 and found.p_value == wide.p_value < 0.05


def test_a_kernel_function_sees_the_joint_sample_without_its_labels():
    x, y = samples(20, 10)
    seen = []

    def kernel(a, b):
        seen.append((a, b))
        return median_rbf(a, b)

    found = mmd_test(x, y, kernel, permutations=10)
    ((a, b),) = seen
    assert a.shape == x.shape and b.shape == y.shape and not torch.equal(a, x)
    joint, same = (torch.cat(pair)[:, 0].sort().values for pair in ((x, y), (a, b)))
    assert torch.equal(joint, same)
    near(found.statistic, mmd(x, y, median_rbf(x, y), backend="reference"))


@pytest.mark.parametrize("kernel", [None, IMQ(), "median_rbf", "wae_imq"], ids=str)
def test_power(kernel):
    x, y = normal(60, 3, seed=1), normal(50, 3, seed=2)
    same, shifted, wider = (mmd_test(x, other, kernel, permutations=200) for other in (y, y + 1.0, 2.0 * y))
    assert shifted.p_value == wider.p_value == 1 / 201 and same.p_value > 0.05
    assert shifted.statistic > shifted.null.max() and abs(shifted.null.mean()) < 0.1 * shifted.statistic


def test_power_grows_with_the_shift():
    rejected = []
    for shift in (0.0, 0.4, 0.8, 1.6):
        tests = (
            mmd_test(normal(20, 2, seed=s), normal(20, 2, seed=s + 1000) + shift, permutations=19, seed=s)
            for s in range(60)
        )
        rejected.append(np.mean([test.p_value <= 0.05 for test in tests]))
    assert rejected[0] < 0.2 < rejected[2] and rejected == sorted(rejected) and rejected[3] > 0.95


# Tiles


@pytest.mark.parametrize(("n", "m"), [(23, 31), (31, 23), (2, 40)])
def test_tiles(monkeypatch, n, m):
    """Small ones give the same; none is larger than it may be, and each pair of points is in one."""
    x, y = samples(n, m)
    whole = mmd_test(x, y, IMQ(), permutations=9)
    sizes, distances = [], two_sample.squared_distances

    def spy(a, b, dtype):
        sizes.append((len(a), len(b)))
        return distances(a, b, dtype)

    monkeypatch.setattr(two_sample, "squared_distances", spy)
    for numbers, edge in ((1, 1), (49, 4), (150, 12), (400, 20), (3600, 60)):
        sizes.clear()
        monkeypatch.setattr(two_sample, "TILE_NUMBERS", numbers)
        tiled = mmd_test(x, y, IMQ(), permutations=9)
        near(tiled.null, whole.null)
        near(tiled.statistic, whole.statistic)
        assert tiled.p_value == whole.p_value
        parts = math.ceil((n + m) / edge)
        assert len(sizes) == parts * (parts + 1) // 2 and max(itertools.chain(*sizes)) == min(edge, n + m)
        assert numbers == 1 or all(a * b <= numbers and 10 * max(a, b) <= numbers for a, b in sizes)


def test_many_permutations_make_narrow_tiles(monkeypatch):
    seen, distances = [], two_sample.squared_distances
    monkeypatch.setattr(two_sample, "squared_distances", lambda a, b, t: seen.append(len(a)) or distances(a, b, t))
    monkeypatch.setattr(two_sample, "TILE_NUMBERS", 10_000)
    mmd_test(*samples(60, 60), permutations=999)
    assert set(seen) == {10}


def test_progress(monkeypatch):
    monkeypatch.setattr(two_sample, "TILE_NUMBERS", 100)
    calls = []
    mmd_test(*samples(12, 15), permutations=5, progress=lambda done, tiles: calls.append((done, tiles)))
    assert calls == [(k, 6) for k in range(1, 7)]


# Seeds and types


def test_the_seed_makes_the_relabellings():
    x, y = samples(30, 20)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (mmd_test(x, y, permutations=50, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.null, again.null) and first[:3] == again[:3]
    assert not torch.equal(first.null, other.null) and first.statistic == other.statistic
    assert torch.equal(torch.get_rng_state(), state)
    near(mmd_test(x, y, permutations=20, seed=3).null, first.null[:20])
    assert len(mmd_test(x, y).null) == 1000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name_of)
def test_types(dtype):
    x, y = samples(30, 20, dtype=dtype)
    exact = mmd_test(x.double(), y.double(), permutations=50)
    found = mmd_test(x, y, permutations=50)
    assert abs(found.statistic - exact.statistic) < 1e-6
    assert (found.null - exact.null).abs().max() < 1e-6
    for kernel in ("median_rbf", "five_scale_rbf"):
        assert 0 < mmd_test(x, y, kernel, permutations=50).p_value <= 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mmd_test(x, y, permutations=50).null, found.null)


def test_no_gradient():
    x, y = (s.requires_grad_() for s in samples())
    found = mmd_test(x, y, RBF(nn.Parameter(torch.tensor(1.0))), permutations=5)
    assert not found.null.requires_grad
    near(found.statistic, mmd(x, y, RBF(1.0), backend="reference"))


def test_layouts():
    x, y = samples(8, 6, 4)
    gaps = torch.full((16, 8), math.nan, dtype=torch.float64)
    gaps[::2, 1::2] = x
    near(mmd_test(gaps[::2, 1::2], y.T.contiguous().T, permutations=9).null, mmd_test(x, y, permutations=9).null)


# Errors

four = torch.ones(4, 2)


@pytest.mark.parametrize("bad", [2**64, -(2**63) - 1, None, 1.5])
def test_seeds(bad):
    with pytest.raises(ValueError, match=r"seed: got .*; accepted: an integer of 64 bits"):
        mmd_test(four, four, seed=bad)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "3", None])
def test_permutations(bad):
    with pytest.raises(ValueError, match=r"permutations: got .*; accepted: an integer, 1 or more"):
        mmd_test(four, four, permutations=bad)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mmd_test([1.0], four), TypeError, "x: got list; accepted: a torch.Tensor"),
        (lambda: mmd_test(four, None), TypeError, "y: got None"),
        (lambda: mmd_test(four.int(), four), TypeError, "x: got dtype torch.int32; accepted: floating point"),
        (lambda: mmd_test(four, four.double()), TypeError, "y: got dtype torch.float64, but x is torch.float32"),
        (lambda: mmd_test(four[0], four), ValueError, r"x: got shape \(2,\)"),
        (lambda: mmd_test(four[None], four[None]), ValueError, r"x: got shape \(1, 4, 2\)"),
        (lambda: mmd_test(four, four[:, :1]), ValueError, r"y: got shape \(4, 1\), but x \(4, 2\)"),
        (lambda: mmd_test(four[:0], four), ValueError, r"x: got shape \(0, 2\)"),
        (lambda: mmd_test(four, four[:1]), ValueError, "needs two points of each sample: got N=4, M=1"),
        (lambda: mmd_test(four[:1], four), ValueError, "needs two points of each sample: got N=1, M=4"),
        (lambda: mmd_test(four, four.to("meta")), ValueError, "y: is on meta, but x on cpu"),
        (lambda: mmd_test(four, four, "gauss"), ValueError, "kernel: got 'gauss'; accepted"),
        (lambda: mmd_test(four, four, RBF), TypeError, "kernel: got .*; accepted"),
        (lambda: mmd_test(four, four, lambda x, y: 1.0), TypeError, "returned float; accepted: a Kernel"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kernel", [None, "median_rbf"], ids=str)
def test_non_finite_samples_are_named_and_counted(kernel, value):
    x, y = samples(6, 6, dtype=torch.float32)
    bad = y.clone()
    bad[1, 0] = bad[1, 2] = bad[5, 1] = value
    with pytest.raises(ValueError, match="y: 2 of 6 points hold NaN or infinity"):
        mmd_test(x, bad, kernel)
    with pytest.raises(ValueError, match="x: 2 of 6 points hold NaN or infinity"):
        mmd_test(bad, x, kernel)
    with pytest.raises(ValueError, match="x: 6 of 6 points hold NaN or infinity"):
        mmd_test(0 * x + value, y, kernel)


def test_the_default_kernel_has_the_scale_of_the_samples():
    x, y = torch.randn(80, 2) * 1000, torch.randn(80, 2) * 1000 + 1500
    assert mmd_test(x, y).statistic == mmd_test(x, y, "median_rbf").statistic and mmd_test(x, y).p_value < 0.01
    bits = (torch.rand(60, 3) < 0.05).float()  # of which most are equal
    assert mmd_test(bits, bits.flip(0)).p_value == 1


def test_a_statistic_that_is_nan_is_never_significant():
    b = torch.tensor(1.0)
    kernel = IMQ(b)
    b.fill_(math.nan)
    with pytest.raises(ValueError, match=r"bandwidth: got nan; accepted: positive numbers"):
        mmd_test(*samples(), kernel)
