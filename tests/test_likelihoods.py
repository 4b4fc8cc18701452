"""The likelihoods against textbook loops, 50-digit bins, sums over all levels, and their own samples."""

import itertools
import json
import math
from functools import partial

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infovae_fast.likelihoods import (
    Bernoulli,
    Categorical,
    DiscretizedLogisticMixture,
    Gaussian,
    bernoulli_nll,
    categorical_nll,
    discretized_logistic_mixture_nll,
    gaussian_nll,
    likelihood_from_config,
)

LIKELIHOODS = [
    Bernoulli(),
    Gaussian(),
    Gaussian(std=0.3),
    Gaussian(min_std=0.0005, squash=False),
    Categorical(levels=16),
    DiscretizedLogisticMixture(mixtures=2, levels=16),
]
EXTREME_MU = (-1000.0, -30.0, -1.0, -0.4, 0.0, 1 / 255, 0.9, 1.0, 50.0)
EXTREME_LOG_S = (-60.0, -20.0, -7.0, -3.0, 0.0, 3.0, 30.0, 80.0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: threads only wait for each other, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def random(*shape, rng, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=dtype)


def on_grid(*shape, levels, rng, dtype=torch.float64):
    return torch.randint(levels, shape, generator=rng).to(dtype) / (levels - 1)


def bin_log_probability(level, mu, log_s, levels):
    """log P of one level of one logistic: a difference of two CDFs, with digits enough for it to be no 0."""
    with mpmath.workdps(50 + int((abs(mu) + 2) * math.exp(-log_s))):
        s, half = mpmath.exp(log_s), mpmath.mpf(1) / (levels - 1)
        y = mpmath.mpf(2) * level / (levels - 1) - 1

        def cdf(edge):
            return 1 / (1 + mpmath.exp(-(edge - mu) / s))

        upper = mpmath.mpf(1) if level == levels - 1 else cdf(y + half)
        lower = mpmath.mpf(0) if level == 0 else cdf(y - half)
        return float(mpmath.log(upper - lower))


def mixture_loops(params, x, levels):
    """PixelCNN++'s likelihood, one scalar at a time; params [N, 3K or 10K, H, W], x [N, 1 or 3, H, W]."""
    n, channels, height, width = x.shape
    k = params.shape[1] // (3 if channels == 1 else 10)
    totals = []
    for i in range(n):
        total = 0.0
        for h, w in itertools.product(range(height), range(width)):
            p, pixel = params[i, :, h, w].tolist(), [round(v * (levels - 1)) for v in x[i, :, h, w].tolist()]
            y = [2 * level / (levels - 1) - 1 for level in pixel]
            weights = [math.exp(v) for v in p[:k]]
            likelihood = mpmath.mpf(0)
            for j in range(k):
                if channels == 1:
                    log_p = bin_log_probability(pixel[0], p[k + j], p[2 * k + j], levels)
                else:
                    r, g, b = (p[k + 3 * k * c : k + 3 * k * (c + 1)] for c in range(3))
                    c0, c1, c2 = (math.tanh(block[2 * k + j]) for block in (r, g, b))
                    means = r[j], g[j] + c0 * y[0], b[j] + c1 * y[0] + c2 * y[1]
                    scales = r[k + j], g[k + j], b[k + j]
                    log_p = sum(map(bin_log_probability, pixel, means, scales, [levels] * 3))
                likelihood += weights[j] / sum(weights) * mpmath.exp(log_p)
            total -= float(mpmath.log(likelihood))
        totals.append(total)
    return torch.tensor(totals, dtype=torch.float64)


def probability_table(params, channels, levels, tail="exact"):
    """P of every pixel value, [levels^C]; params [P] of one pixel."""
    values = torch.tensor(list(itertools.product(range(levels), repeat=channels)), dtype=params.dtype)
    every = params.expand(len(values), -1)
    return discretized_logistic_mixture_nll(every, values / (levels - 1), levels=levels, tail=tail).neg().exp()


def chi_square(counts, probabilities):
    """(chi^2 - its mean) / its deviation, cells of fewer than 5 expected counts merged into one."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected > 0
    cells = int(kept.sum())
    return float(((observed - expected)[kept].square() / expected[kept]).sum() - (cells - 1)) / math.sqrt(
        2 * (cells - 1)
    )


# Bernoulli


def test_bernoulli_is_the_textbook_sum(rng):
    logits, x = random(3, 2, 4, rng=rng) * 4, torch.rand(3, 2, 4, generator=rng, dtype=torch.float64)
    expected = []
    for row, target in zip(logits.flatten(1).tolist(), x.flatten(1).tolist(), strict=True):
        p = [1 / (1 + math.exp(-v)) for v in row]
        expected.append(-sum(t * math.log(q) + (1 - t) * math.log(1 - q) for t, q in zip(target, p, strict=True)))
    torch.testing.assert_close(
        bernoulli_nll(logits, x), torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0
    )


def test_bernoulli_extreme_logits_are_exact():
    logits = torch.tensor([-1000.0, -200.0, -20.0, 20.0, 200.0, 1000.0], dtype=torch.float64)
    assert bernoulli_nll(logits, torch.ones(6)).tolist() == pytest.approx(
        [1000, 200, 20 + math.log1p(math.exp(-20)), math.log1p(math.exp(-20)), math.exp(-200), 0], rel=1e-14
    )
    logits = logits.float().requires_grad_()
    bernoulli_nll(logits, torch.full((6,), 0.3), "sum").backward()
    torch.testing.assert_close(logits.grad, torch.tensor([-0.3, -0.3, -0.3, 0.7, 0.7, 0.7]))


def test_bernoulli_grey_is_the_expectation_over_bits():
    logit = torch.tensor([[0.7]], dtype=torch.float64)
    one, zero = (bernoulli_nll(logit, torch.full((1, 1), bit)) for bit in (1.0, 0.0))
    torch.testing.assert_close(bernoulli_nll(logit, torch.full((1, 1), 0.25)), one / 4 + zero * 3 / 4)


def test_bernoulli_all_images_sum_to_one(rng):
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    nll = bernoulli_nll(random(6, rng=rng).expand(64, 6), images)
    assert float(nll.neg().exp().sum()) == pytest.approx(1, abs=1e-14)


# Gaussian


def test_gaussian_is_the_textbook_sum(rng):
    mean, x, std = random(2, 3, 2, rng=rng), random(2, 3, 2, rng=rng), random(2, 3, 2, rng=rng).exp()
    expected = -torch.distributions.Normal(mean, std).log_prob(x).sum((1, 2))
    torch.testing.assert_close(gaussian_nll(mean, std, x), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gaussian_nll(mean, 0.3, x), gaussian_nll(mean, torch.full_like(x, 0.3), x))


def test_gaussian_constant_counts_every_element():
    image = torch.zeros(1, 1, 28, 28)
    nll = float(gaussian_nll(image, 1.0, image))
    assert nll == pytest.approx(784 * math.log(2 * math.pi) / 2, rel=1e-6)
    # A constant counted once per image, as in the authors' code, is 719.5 nats too little.
    assert nll - math.log(2 * math.pi) / 2 == pytest.approx(719.5, abs=0.05)


def test_gaussian_learned_std_has_a_floor_and_keeps_its_gradient():
    likelihood = Gaussian(min_std=0.01)
    params = torch.tensor([[0.0, -30.0]], dtype=torch.float64, requires_grad=True)  # mean 1/2, std at its floor
    nll = likelihood.nll(params, torch.tensor([[0.5]]))
    assert nll.item() == pytest.approx(math.log(0.01) + math.log(2 * math.pi) / 2, abs=1e-9)
    nll.sum().backward()
    assert params.grad[0, 1] > 0


def test_gaussian_reads_means_then_deviations(rng):
    params, x = random(2, 6, 5, rng=rng), random(2, 3, 5, rng=rng)
    std = 0.2 + params[:, 3:].sigmoid()
    expected = -torch.distributions.Normal(params[:, :3], std).log_prob(x).sum((1, 2))
    torch.testing.assert_close(Gaussian(min_std=0.2, squash=False).nll(params, x), expected)
    torch.testing.assert_close(Gaussian(min_std=0.2).mean(params), params[:, :3].sigmoid())
    torch.testing.assert_close(Gaussian(std=0.2, squash=False).mean(params), params)


def test_gaussian_samples_have_the_mean_and_deviation(rng):
    params = torch.tensor([0.4, -1.0, -2.0, 0.5]).expand(100_000, 4)
    x = Gaussian().sample(params, rng)
    torch.testing.assert_close(x.mean(0), params[0, :2].sigmoid(), atol=0.01, rtol=0)
    torch.testing.assert_close(x.std(0), 0.01 + params[0, 2:].sigmoid(), atol=0.01, rtol=0)


# Discretised logistic mixture


@pytest.mark.parametrize("levels", [2, 4, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_mixture_is_the_textbook_sum(channels, levels, rng):
    params = random(2, 3 * (3 if channels == 1 else 10), 2, 1, rng=rng)
    x = on_grid(2, channels, 2, 1, levels=levels, rng=rng)
    nll = discretized_logistic_mixture_nll(params, x, levels=levels)
    torch.testing.assert_close(nll, mixture_loops(params, x, levels), rtol=1e-12, atol=0)


@pytest.mark.parametrize("levels", [2, 4, 256])
def test_extreme_bins_against_many_digits(levels):
    scales = (-6.0, -3.0, 0.0, 5.0, 30.0)
    for mu, log_s in itertools.product((-4.0, -1.0, -0.4, 0.0, 1 / 255, 0.9, 1.0, 3.0), scales):
        for level in sorted({0, 1, levels // 2, levels - 2, levels - 1}):
            truth = bin_log_probability(level, mu, log_s, levels)
            params = torch.tensor([[0.0, mu, log_s]], dtype=torch.float64)
            x = torch.tensor([[level / (levels - 1)]], dtype=torch.float64)
            # Half an ulp of mu and y, magnified by 1/s, is what the inputs themselves leave open.
            left_open = (1 + abs(mu)) * math.exp(-log_s) + abs(truth) + 1
            for dtype in (torch.float64, torch.float32):
                nll = discretized_logistic_mixture_nll(params.to(dtype), x.to(dtype), levels=levels).item()
                assert abs(nll + truth) <= 4 * torch.finfo(dtype).eps * left_open, (mu, log_s, level, dtype)


@pytest.mark.parametrize("levels", [2, 4, 256])
@pytest.mark.parametrize("log_s", EXTREME_LOG_S)
@pytest.mark.parametrize("mu", EXTREME_MU)
def test_levels_sum_to_one(mu, log_s, levels):
    table = probability_table(torch.tensor([0.0, mu, log_s], dtype=torch.float64), 1, levels)
    assert float(table.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_joint_rgb_levels_sum_to_one(scale, rng):
    for _ in range(10):
        assert float(probability_table(random(20, rng=rng) * scale, 3, 4).sum()) == pytest.approx(1, abs=1e-12)


def test_usual_approximation_is_off_by_up_to_2_15_nats():
    mu = torch.linspace(-3, 3, 601, dtype=torch.float64)
    worst = 0.0
    for log_s in (-7.0, -6.0, -5.0, -3.0, 0.0):
        params = torch.stack([torch.zeros_like(mu), mu, torch.full_like(mu, log_s)], 1)
        x = torch.full((len(mu), 1), 128 / 255, dtype=torch.float64)
        exact, usual = (discretized_logistic_mixture_nll(params, x, tail=tail) for tail in ("exact", "openai"))
        assert bool((usual - exact > -1e-9).all())
        torch.testing.assert_close(usual[exact < 11], exact[exact < 11], rtol=0, atol=1e-9)  # bins above 1e-5
        worst = max(worst, float((usual - exact).max()))
    width = 2 / 255 * math.exp(7)  # of a bin, in scales at the clamp
    assert worst == pytest.approx(width / 2 - math.log(width), abs=1e-3)
    assert worst == pytest.approx(2.15, abs=0.01)


def test_usual_approximation_clamps_log_scales():
    params = torch.tensor([[0.0, 0.31, -9.0], [0.0, 0.31, -7.0]], dtype=torch.float64)
    nll = discretized_logistic_mixture_nll(params, torch.full((2, 1), 0.6), tail="openai")
    assert nll[0] == nll[1]


@pytest.mark.parametrize("tail", ["exact", "openai"])
@pytest.mark.parametrize("levels", [2, 4, 256])
def test_float32_values_and_gradients_stay_finite(levels, tail):
    grid = torch.tensor(list(itertools.product(EXTREME_MU, EXTREME_LOG_S)))
    for level in {0, 1, levels // 2, levels - 1}:
        params = torch.cat([torch.zeros(len(grid), 1), grid], 1).requires_grad_()
        nll = discretized_logistic_mixture_nll(
            params, torch.full((len(grid), 1), level / (levels - 1)), levels=levels, tail=tail
        )
        nll.sum().backward()
        assert bool(nll.isfinite().all() and params.grad.isfinite().all())


def test_gradient_where_the_scale_is_huge_or_tiny():
    params = torch.tensor([[0.0, 0.2, 70.0], [0.0, 0.5, -60.0]], requires_grad=True)
    discretized_logistic_mixture_nll(params, torch.tensor([[0.4], [1 / 255]]), reduction="sum").backward()
    assert params.grad[0].tolist() == pytest.approx([0, 0, 1])  # P is proportional to 1/s
    assert params.grad[1, 1] == pytest.approx(math.exp(60), rel=1e-5)  # -log P is |y - mu|/s


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("tail", ["exact", "openai"])
def test_mixture_gradcheck(channels, tail, rng):
    params = random(3, 2 * (3 if channels == 1 else 10), rng=rng).requires_grad_()
    x = torch.tensor([[0, 5, 15], [15, 0, 9], [5, 9, 0]], dtype=torch.float64)[:, :channels] / 15

    def nll(p, backend="auto"):
        return discretized_logistic_mixture_nll(p, x, levels=16, tail=tail, backend=backend)

    assert torch.autograd.gradcheck(nll, params)
    if tail == "exact":
        assert torch.autograd.gradgradcheck(partial(nll, backend="reference"), params, fast_mode=True)


def test_bernoulli_and_gaussian_gradcheck(rng):
    a, b, c = (random(2, 3, rng=rng).requires_grad_() for _ in range(3))
    x = torch.rand(2, 3, generator=rng, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(bernoulli_nll, (a, x))
    assert torch.autograd.gradgradcheck(bernoulli_nll, (a, x))
    assert torch.autograd.gradcheck(lambda m, s, v: gaussian_nll(m, s.exp(), v), (a, b, c))
    assert torch.autograd.gradgradcheck(lambda m, s, v: gaussian_nll(m, s.exp(), v), (a, b, c))


def test_x_between_levels_counts_as_the_nearest_one(rng):
    params = random(1, 6, 3, rng=rng)
    x = on_grid(1, 1, 3, levels=256, rng=rng)
    shifted = (x + 0.3 / 255).clamp(0, 1)
    assert torch.equal(discretized_logistic_mixture_nll(params, x), discretized_logistic_mixture_nll(params, shifted))


def test_x_outside_the_range_is_conspicuous():
    params = torch.zeros(1, 3)
    inside, bytes_ = (discretized_logistic_mixture_nll(params, torch.tensor([[v]])) for v in (1.0, 255.0))
    assert bytes_ > 100 * inside


@pytest.mark.parametrize("channels", [1, 3])
def test_mixture_samples_follow_the_table(channels, rng):
    levels, draws = 4, 100_000
    likelihood = DiscretizedLogisticMixture(mixtures=2, levels=levels)
    for _ in range(2):
        params = random(likelihood.channels(channels), rng=rng)
        x = likelihood.sample(params.expand(draws, -1), rng)
        level = (x * (levels - 1)).round().long()
        assert torch.equal(x, level.double() / (levels - 1))
        cell = (level * torch.tensor([levels**c for c in reversed(range(channels))])).sum(1)
        counts = cell.bincount(minlength=levels**channels).double()
        assert abs(chi_square(counts, probability_table(params, channels, levels))) < 4.5
        if channels == 3:  # the test has teeth: without the coefficients it fails
            independent = params.clone()
            for block in range(3):
                independent[2 + 6 * block + 4 : 2 + 6 * block + 6] = 0
            assert chi_square(counts, probability_table(independent, 3, levels)) > 50


def test_bernoulli_samples_follow_the_logits(rng):
    logits = torch.tensor([-2.0, 0.0, 3.0])
    x = Bernoulli().sample(logits.expand(100_000, 3), rng)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(x.mean(0), logits.sigmoid(), atol=0.01, rtol=0)


@pytest.mark.parametrize("levels", [2, 4, 256])
def test_grey_mixture_mean_is_within_half_a_level(levels, rng):
    likelihood = DiscretizedLogisticMixture(mixtures=3, levels=levels)
    values = torch.arange(levels, dtype=torch.float64) / (levels - 1)
    for spread in (0.5, 2.0, 4.0):
        params = random(9, rng=rng) * spread
        exact = (probability_table(params, 1, levels) * values).sum()
        assert abs(likelihood.mean(params[None]).item() - exact) <= 0.5 / (levels - 1)
    for mu, log_s in itertools.product(
        (-1000.0, -1.0, 0.0, 0.3, 1000.0), (-60.0, -5.0, 0.0, 1.99, 2.01, 5.0, 8.0, 15.0)
    ):
        table = probability_table(torch.tensor([0.0, mu, log_s], dtype=torch.float64), 1, levels)
        mean = DiscretizedLogisticMixture(1, levels).mean(torch.tensor([[0.0, mu, log_s]])).item()
        assert abs(mean - float((table * values).sum())) <= 0.5 / (levels - 1) + 1e-5


@pytest.mark.parametrize("log_s", [-8.0, -3.0, 0.0, 1.999, 2.001, 6.0])
@pytest.mark.parametrize("mu", [-1.0, 0.3, 1.0, 1.7])
def test_grey_mixture_mean_has_the_derivatives_of_the_integral(mu, log_s):
    """E clip(Y, -1, 1) changes with mu by P(|Y| < 1), also where mu is on the edge."""
    params = torch.tensor([[0.0, mu, log_s]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(DiscretizedLogisticMixture(1).mean(params).sum(), params)
    edges = torch.tensor([1.0 - mu, -1.0 - mu], dtype=torch.float64) / math.exp(log_s)
    inside = edges.sigmoid().diff().neg().item()
    assert gradient[0, 1].item() == pytest.approx(inside / 2, rel=1e-6, abs=1e-9)


def test_rgb_mixture_mean_is_the_sample_mean_where_nothing_clips(rng):
    likelihood = DiscretizedLogisticMixture(mixtures=2)
    params = random(20, rng=rng) * 0.2
    for block in range(3):
        params[2 + 6 * block + 2 : 2 + 6 * block + 4] = -4  # log-scales
    x = likelihood.sample(params.expand(50_000, -1), rng)
    torch.testing.assert_close(x.mean(0), likelihood.mean(params[None])[0], atol=0.003, rtol=0)


# Categorical


@pytest.mark.parametrize("channels", [1, 3])
def test_categorical_is_the_textbook_sum(channels, rng):
    params, x = random(2, 5 * channels, 2, 3, rng=rng), on_grid(2, channels, 2, 3, levels=5, rng=rng)
    totals, mean = torch.zeros(2, dtype=torch.float64), torch.zeros_like(x)
    for n, c, i, j in itertools.product(range(2), range(channels), range(2), range(3)):
        logits = [params[n, k * channels + c, i, j].item() for k in range(5)]
        weights = [math.exp(value) for value in logits]
        totals[n] -= math.log(weights[round(4 * x[n, c, i, j].item())] / sum(weights))
        mean[n, c, i, j] = sum(k / 4 * weight for k, weight in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(categorical_nll(params, x, levels=5), totals, rtol=1e-12, atol=0)
    torch.testing.assert_close(Categorical(5).mean(params), mean, rtol=1e-12, atol=0)
    assert torch.equal(categorical_nll(params, x, levels=5, reduction="mean"), Categorical(5).nll(params, x).mean())


def test_categorical_samples_follow_the_softmax(rng):
    params = random(8, rng=rng)  # four levels of two channels
    x = Categorical(4).sample(params.expand(100_000, -1), rng)
    assert set(x.unique().tolist()) == {0, 1 / 3, 2 / 3, 1}
    for c in range(2):
        assert chi_square((x[:, c] * 3).round().long().bincount(), params[c::2].softmax(0)) < 5


# All of them


def steps(likelihood):
    """A grey pixel's params, and the values it takes at 100,000 evenly spaced uniforms."""
    params = random(likelihood.channels(1), rng=torch.Generator().manual_seed(3))
    n = 100_000
    u = torch.full((n, likelihood.uniforms(1)), 0.5, dtype=torch.float64)
    u[:, -1] = (torch.arange(n) + 0.5) / n
    return params, likelihood.draw(params.expand(n, -1), u)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical(16), DiscretizedLogisticMixture(1, 16)], ids=repr)
def test_draw_is_the_inverse_distribution_function(likelihood):
    """Evenly spaced uniforms give every level as often as its probability says, in order."""
    levels = getattr(likelihood, "levels", 2)
    params, x = steps(likelihood)
    assert bool((x.diff(dim=0) * (-1 if levels == 2 else 1) >= 0).all())
    values = torch.arange(levels, dtype=torch.float64)[:, None] / (levels - 1)
    p = likelihood.nll(params.expand(levels, -1), values).neg().exp()
    counts = (x[:, 0] * (levels - 1)).round().long().bincount(minlength=levels)
    torch.testing.assert_close(
        counts.double() / len(x), p, atol=2.1e-5, rtol=0
    )  # a level gains or loses one at either end


def test_draw_of_a_gaussian_has_its_quantiles():
    params = torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    likelihood = Gaussian(squash=False)
    mean, std = likelihood._mean_std(params)
    u = torch.tensor([[0.5], [0.841344746068543], [0.022750131948179]], dtype=torch.float64)
    wanted = mean + std * torch.tensor([[0.0], [1.0], [-2.0]])
    torch.testing.assert_close(likelihood.draw(params.expand(3, -1), u), wanted)
    torch.testing.assert_close(likelihood.draw(params.expand(3, -1), u, 0.5), (wanted + mean) / 2)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_draw_follows_sample(likelihood, rng):
    """Two ways to the same distribution: means of a pixel with three channels, also of their products."""
    params = (random(likelihood.channels(3), rng=rng) / 2).expand(100_000, -1)
    u = torch.rand(100_000, likelihood.uniforms(3), generator=rng)
    a, b = likelihood.draw(params, u), likelihood.sample(params, rng)
    assert a.dtype == torch.float64 and a.shape == b.shape
    torch.testing.assert_close(a.mean(0), b.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(a.T), torch.cov(b.T), atol=0.02, rtol=0.05)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_a_low_temperature_draws_the_likeliest(likelihood, rng):
    params = random(50, likelihood.channels(1), rng=rng)
    u = torch.rand(50, likelihood.uniforms(1), generator=rng, dtype=torch.float64)
    torch.testing.assert_close(
        likelihood.draw(params, u, 1e-6), likelihood.draw(params, torch.full_like(u, 0.5), 1e-9), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_nan_params_draw_nan(likelihood, rng):
    """Of the example that has it, and no other."""
    params = random(3, likelihood.channels(1), 4, rng=rng)
    params[1] = math.nan
    u = torch.rand(3, likelihood.uniforms(1), 4, generator=rng, dtype=torch.float64)
    for drawn in (likelihood.draw(params, u), likelihood.sample(params), likelihood.draw(params, u, 1e-6)):
        assert torch.equal(drawn.isnan().all(-1).flatten(), torch.tensor([False, True, False]))
        assert drawn[[0, 2]].isfinite().all()


def test_one_nan_logit_is_enough():
    for likelihood in (Categorical(4), DiscretizedLogisticMixture(mixtures=2)):
        params = torch.zeros(1, likelihood.channels(1), 1)
        params[:, 1] = math.nan
        assert likelihood.draw(params, torch.full((1, likelihood.uniforms(1), 1), 0.5)).isnan().all()
        assert likelihood.sample(params).isnan().all()


def test_the_smallest_temperature_draws_the_likeliest_level():
    logits = torch.tensor([0.0, 50.0, 0.0, 0.0]).view(1, 4, 1)
    assert Categorical(4).draw(logits, torch.full((1, 1, 1), 0.9), 1e-37).item() == pytest.approx(1 / 3)


def test_a_temperature_that_float32_does_not_know():
    logits, u = torch.tensor([0.0, 50.0, 0.0, 0.0]).view(1, 4, 1), torch.full((1, 1, 1), 0.9)
    assert Categorical(4).draw(logits, u, 1e-46).item() == pytest.approx(1 / 3)
    assert Bernoulli().draw(torch.tensor([[-1e-6, 1e-6, 0.0]]), torch.full((1, 3), 0.4), 1e-46).tolist() == [[0, 1, 1]]
    for likelihood in LIKELIHOODS:
        for bad in (0, -1.0, math.nan, "1"):
            with pytest.raises(ValueError, match="temperature must be a number > 0, got "):
                likelihood.draw(*_params_and_uniforms(likelihood), bad)


def test_a_temperature_divides_logits_in_float32():
    """3 / 0.7 in bfloat16 would be off by 1 in 200, and turn this bit."""
    logits, u = torch.tensor([[3.0]], dtype=torch.bfloat16), torch.tensor([[0.9864]])
    assert u < torch.tensor(3 / 0.7).sigmoid() and Bernoulli().draw(logits, u, 0.7) == 1


@pytest.mark.parametrize("likelihood", [Gaussian(), Gaussian(std=0.1), DiscretizedLogisticMixture(2)], ids=repr)
def test_uniforms_of_float64_stay_below_1(likelihood):
    params, _ = _params_and_uniforms(likelihood)
    for u in (1 - 1e-12, 1e-300):
        uniforms = torch.full((2, likelihood.uniforms(1), 3), u, dtype=torch.float64)
        assert likelihood.draw(params, uniforms).isfinite().all()


def _params_and_uniforms(likelihood):
    return torch.zeros(2, likelihood.channels(1), 3), torch.full((2, likelihood.uniforms(1), 3), 0.5)


def test_the_largest_uniform_draws_no_level_that_cannot_be():
    torch.manual_seed(36)
    logits = torch.randn(1, 256, 1)
    logits[:, 200:] = -60
    drawn = Categorical(256).draw(logits, torch.full((1, 1, 1), 1 - 2.0**-24))
    assert (drawn * 255).round().item() <= 199


@pytest.mark.parametrize("likelihood", [some for some in LIKELIHOODS if not some.joint_channels], ids=repr)
def test_params_of_a_channel(likelihood, rng):
    """Unless the channels of a pixel are joint, params[:, c::C] are those of channel c alone."""
    params, x = random(2, likelihood.channels(3), 4, rng=rng), on_grid(2, 3, 4, levels=2, rng=rng)
    alone = sum(likelihood.nll(params[:, c::3], x[:, c::3]) for c in range(3))
    torch.testing.assert_close(alone, likelihood.nll(params, x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
@settings(max_examples=15, deadline=None)
@given(n=st.integers(0, 3), rgb=st.booleans(), spatial=st.lists(st.integers(1, 4), max_size=3), seed=st.integers(0, 99))
def test_shapes_and_additivity(likelihood, n, rgb, spatial, seed):
    rng = torch.Generator().manual_seed(seed)
    channels = 3 if rgb else 1
    x = on_grid(n, channels, *spatial, levels=16, rng=rng).round()  # binary: in the domain of all
    params = random(n, likelihood.channels(channels), *spatial, rng=rng)
    nll = likelihood.nll(params, x)
    assert nll.shape == (n,) and nll.dtype == torch.float64
    assert likelihood.mean(params).shape == likelihood.sample(params, rng).shape == x.shape
    assert bool(likelihood.sample(params, rng).isfinite().all())
    # An image is as improbable as its pixels together: [N, C, *S] -> [N * pixels, C].
    pixels, pixel_params = (t.flatten(2).movedim(1, -1).flatten(0, 1) if spatial else t for t in (x, params))
    together = likelihood.nll(pixel_params, pixels).reshape(n, math.prod(spatial)).sum(1)
    torch.testing.assert_close(nll, together, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "nll", [bernoulli_nll, lambda p, x, r: gaussian_nll(p, 0.5, x, r)], ids=["bernoulli", "gaussian"]
)
def test_reductions(nll, rng):
    params, x = random(4, 2, 3, rng=rng), torch.rand(4, 2, 3, generator=rng, dtype=torch.float64)
    none = nll(params, x, "none")
    assert none.shape == (4,)
    assert torch.equal(nll(params, x, "mean"), none.mean()) and torch.equal(nll(params, x, "sum"), none.sum())


def test_mixture_reductions_and_empty_batch(rng):
    params, x = random(4, 6, 3, rng=rng), on_grid(4, 1, 3, levels=256, rng=rng)
    none = discretized_logistic_mixture_nll(params, x)
    assert torch.equal(discretized_logistic_mixture_nll(params, x, reduction="mean"), none.mean())
    assert torch.equal(discretized_logistic_mixture_nll(params, x, reduction="sum"), none.sum())
    assert discretized_logistic_mixture_nll(params[:0], x[:0]).shape == (0,)
    assert discretized_logistic_mixture_nll(params[:0], x[:0], reduction="sum") == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_half_inputs_and_autocast_are_computed_in_float32(likelihood, dtype, rng):
    params = random(3, likelihood.channels(3), 4, rng=rng).to(dtype)
    x = on_grid(3, 3, 4, levels=16, rng=rng).to(dtype)
    expected = likelihood.nll(params.float(), x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = likelihood.nll(params, x)
        mean = likelihood.mean(params)
    for value in (inside, likelihood.nll(params, x)):
        assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert mean.dtype == torch.float32 and torch.equal(mean, likelihood.mean(params.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert likelihood.nll(params.double(), x).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_of_256_levels_survive_half_precision(dtype):
    x = (torch.arange(256) / 255)[:, None]
    params = torch.tensor([0.0, 0.1, -5.0]).expand(256, 3)
    assert torch.equal(
        discretized_logistic_mixture_nll(params, x.to(dtype)), discretized_logistic_mixture_nll(params, x)
    )


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_nan_stays_visible_and_in_its_example(likelihood, rng):
    params, x = random(3, likelihood.channels(1), 2, rng=rng), on_grid(3, 1, 2, levels=2, rng=rng)
    params[1, -1, 0] = math.nan
    assert likelihood.nll(params, x).isnan().tolist() == [False, True, False]
    x[2, 0, 1] = math.nan
    assert likelihood.nll(params, x).isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_samples_depend_on_the_seed_not_on_the_layout(likelihood, rng):
    params = random(2, likelihood.channels(3), 4, 5, rng=rng, dtype=torch.float32)
    first, again, other_layout, other_seed = (
        likelihood.sample(p, torch.Generator().manual_seed(seed))
        for p, seed in ((params, 1), (params, 1), (params.to(memory_format=torch.channels_last), 1), (params, 2))
    )
    torch.testing.assert_close(first, other_layout)
    assert torch.equal(first, again) and not torch.equal(first, other_seed)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_compiles_as_one_graph(likelihood, rng):
    params, x = random(2, likelihood.channels(1), 3, rng=rng), on_grid(2, 1, 3, levels=2, rng=rng)
    torch.compiler.reset()
    compiled = torch.compile(likelihood.nll, fullgraph=True, backend="eager")
    assert torch.equal(compiled(params, x), likelihood.nll(params, x))


def test_channels():
    assert [Bernoulli().channels(c) for c in (1, 3, 7)] == [1, 3, 7]
    assert [Gaussian(std=1).channels(c) for c in (1, 3)] == [1, 3]
    assert [Gaussian().channels(c) for c in (1, 3)] == [2, 6]
    assert [Categorical(5).channels(c) for c in (1, 3)] == [5, 15]
    assert [DiscretizedLogisticMixture().channels(c) for c in (1, 3)] == [30, 100]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_config_round_trip(likelihood):
    config = json.loads(json.dumps(likelihood.to_config()))
    assert likelihood_from_config(config) == likelihood
    assert config["name"] == likelihood.name
    assert likelihood_from_config({"name": likelihood.name}) == type(likelihood)()


def test_likelihoods_are_values():
    assert len({Gaussian(std=1.0), Gaussian(std=1.0), Gaussian(), Bernoulli()}) == 3
    with pytest.raises(AttributeError):
        Gaussian().std = 2.0


MIX = discretized_logistic_mixture_nll
A, B, BYTES = torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bernoulli_nll(A, B), ValueError, r"logits and x .* one shape .*\(2, 3\).*\(2, 4\)"),
        (lambda: bernoulli_nll(A, BYTES), TypeError, r"x must be a floating-point tensor, got torch.uint8; .* / 255"),
        (lambda: bernoulli_nll(A, A.bool()), TypeError, r"got torch.bool; use .float\(\)"),
        (lambda: bernoulli_nll(A.numpy(), A), TypeError, r"logits must be a floating-point tensor, got ndarray"),
        (lambda: bernoulli_nll(A[0, 0], A[0, 0]), ValueError, r"one shape \[N, ...\]"),
        (
            lambda: bernoulli_nll(A, A, "avg"),
            ValueError,
            r"reduction: got 'avg'; accepted: 'none', 'mean', 'sum'",
        ),
        (lambda: gaussian_nll(A, 1.0, B), ValueError, r"mean and x must have one shape"),
        (lambda: gaussian_nll(A, torch.ones(3), A), ValueError, r"mean and x and std .*'std': \(3,\)"),
        (lambda: gaussian_nll(A, 0.0, A), ValueError, r"std must be a number > 0, got 0.0"),
        (lambda: gaussian_nll(A, A.int(), A), TypeError, r"std must be a floating-point tensor, got torch.int32"),
        (lambda: MIX(A, torch.zeros(3, 1)), ValueError, r"params \(2, 3\), x \(3, 1\) must be \[N, P, \*S\] and"),
        (
            lambda: MIX(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 5)),
            ValueError,
            r"\(2, 3, 4, 4\), x \(2, 1, 4, 5\)",
        ),
        (lambda: MIX(A[0], A[0]), ValueError, r"must be \[N, P, \*S\]"),
        (lambda: MIX(B, torch.zeros(2, 1)), ValueError, r"\(2, 4\) fit no mixture of K logistics for 1 data channel"),
        (
            lambda: MIX(A, torch.zeros(2, 3)),
            ValueError,
            r"for 3 data channel\(s\): .* 3 K long for 1 channel, 10 K for 3",
        ),
        (lambda: MIX(A, torch.zeros(2, 2)), ValueError, r"for 2 data channel\(s\): .* other numbers of channels"),
        (lambda: MIX(A[:, :0], torch.zeros(2, 1)), ValueError, r"\(2, 0\) fit no mixture"),
        (lambda: MIX(A, torch.zeros(2, 1), levels=1), ValueError, r"levels must be an integer > 1, got 1"),
        (lambda: MIX(A, torch.zeros(2, 1), levels=256.0), ValueError, r"levels must be an integer > 1, got 256.0"),
        (
            lambda: MIX(A, torch.zeros(2, 1), tail="fast"),
            ValueError,
            r"tail='fast' is unknown; accepted: 'exact', 'openai'",
        ),
        (lambda: MIX(A, BYTES[:, :1]), TypeError, r"x must be a floating-point tensor, got torch.uint8"),
        (lambda: MIX(A, torch.zeros(2, 1), reduction=None), ValueError, r"reduction: got None"),
        (
            lambda: DiscretizedLogisticMixture().nll(A, torch.zeros(2, 1)),
            ValueError,
            r"no mixture of 10 logistics for 1 ",
        ),
        (lambda: DiscretizedLogisticMixture().nll(A, A[0]), ValueError, r"no mixture of 10 logistics"),
        (lambda: DiscretizedLogisticMixture().sample(A), ValueError, r"no mixture of 10 logistics for 1 or 3 data"),
        (lambda: DiscretizedLogisticMixture().mean(BYTES), TypeError, r"params must be a floating-point tensor"),
        (lambda: DiscretizedLogisticMixture().channels(2), ValueError, r"1 or 3 data channels, got 2"),
        (lambda: Categorical(1), ValueError, r"levels must be an integer > 1, got 1"),
        (lambda: Categorical(2).nll(A, A), ValueError, r"params \(2, 3\): axis 1 must be 2 C long"),
        (lambda: Categorical(2).nll(B, A), ValueError, r"params \(2, 4\), x \(2, 3\) must be \[N, 2 C, \*S\]"),
        (lambda: DiscretizedLogisticMixture(mixtures=0), ValueError, r"mixtures must be an integer > 0, got 0"),
        (lambda: DiscretizedLogisticMixture(levels=True), ValueError, r"levels must be an integer > 1, got True"),
        (lambda: Gaussian(std=-1.0), ValueError, r"std must be a number > 0, got -1.0"),
        (lambda: Gaussian(std=math.nan), ValueError, r"std must be a number > 0, got nan"),
        (lambda: Gaussian(min_std=0), ValueError, r"min_std must be a number > 0, got 0"),
        (
            lambda: Gaussian().nll(A, A),
            ValueError,
            r"Gaussian\(std=None\) needs params \[N, 2C, \*S\], got shape \(2, 3\)",
        ),
        (lambda: Gaussian().nll(B, A), ValueError, r"mean and x and std .*\(2, 2\).*\(2, 3\)"),
        (
            lambda: likelihood_from_config({"name": "poisson"}),
            ValueError,
            r"'poisson' is unknown; accepted: 'bernoulli', ",
        ),
        (lambda: likelihood_from_config({"std": 1.0}), ValueError, r"name=None is unknown; accepted: .*'gaussian'"),
        (
            lambda: likelihood_from_config({"name": "gaussian", "sigma": 1}),
            ValueError,
            r"'gaussian' has no option \['sigma'\]; accepted: \['std', 'min_std', 'squash'\]",
        ),
        (
            lambda: likelihood_from_config({"name": "discretized_logistic_mixture", "mixtures": "ten"}),
            ValueError,
            r"mixtures must be an integer > 0, got 'ten'",
        ),
    ],
)
def test_errors_say_what_and_what_instead(call, error, message):
    with pytest.raises(error, match=message):
        call()
