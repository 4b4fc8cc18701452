"""The radial functions against their formulas, and each named convention against what its source publishes."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infovae_fast import radial
from infovae_fast.divergences import mmd
from infovae_fast.radial import IMQ, PRESETS, RBF, Kernel, RationalQuadratic, kernel_from_config
from tests.oracle import KERNELS, Textbook, name_of, near, normal

each_kernel = pytest.mark.parametrize("book", KERNELS, ids=name_of)
DISTANCES = torch.tensor([0.0, 1e-12, 1e-3, 0.4, 1.0, 7.0, 90.0], dtype=torch.float64)


# The functions


@each_kernel
def test_phi_and_its_derivative_are_the_textbook_ones(book):
    kernel = book.build()
    near(kernel.phi(DISTANCES), [book.phi(d2) for d2 in DISTANCES.tolist()])
    near(kernel.dphi(DISTANCES), [book.dphi(d2) for d2 in DISTANCES.tolist()])
    assert kernel.phi0 == pytest.approx(book.phi(0.0), rel=1e-15)


@each_kernel
def test_dphi_is_the_derivative_that_autograd_finds(book):
    d2 = DISTANCES.clone().requires_grad_()
    kernel = book.build()
    (slope,) = torch.autograd.grad(kernel.phi(d2).sum(), d2)
    near(slope, kernel.dphi(d2))


@each_kernel
def test_a_tensor_bandwidth_is_the_same_kernel_and_learns(book):
    b = torch.tensor(book.bandwidths, dtype=torch.float64, requires_grad=True)
    kernel = book.build(b)
    near(kernel.phi(DISTANCES), book.build().phi(DISTANCES))
    (slope,) = torch.autograd.grad(kernel.phi(DISTANCES).sum(), b)
    near(slope, sum(book.dphi_db(d2) for d2 in DISTANCES.tolist()))


def test_rational_quadratic_contains_the_classic_and_the_inverse_multiquadric():
    c = 1.7
    near(RationalQuadratic(c, 0.5).phi(DISTANCES), (1 + DISTANCES / c**2) ** -0.5)
    assert torch.equal(RationalQuadratic(c, 1.0).phi(DISTANCES), IMQ(c).phi(DISTANCES))
    assert torch.equal(RationalQuadratic(c).dphi(DISTANCES), IMQ(c).dphi(DISTANCES))
    assert IMQ(c) != RationalQuadratic(c)  # another name in configurations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("alpha", [1e2, 1e4, 1e8])
def test_large_alpha_tends_to_rbf_without_losing_digits(alpha, dtype):
    t = torch.linspace(0, 5, 101, dtype=torch.float64)
    exact = torch.tensor([math.exp(-alpha * math.log1p(s / alpha)) for s in t.tolist()], dtype=torch.float64)
    out = RationalQuadratic(1.0, alpha).phi(2 * t.to(dtype)).double()
    eps = torch.finfo(dtype).eps
    rounding = eps * (1 + t) * exact  # exp of a number that is -t within an eps or so
    assert ((out - exact).abs() <= 4 * rounding).all()
    series = t**2 / (2 * alpha)  # exp(-alpha log1p(t / alpha)) = exp(-t + t^2 / (2 alpha) - ...)
    assert ((exact - torch.exp(-t)).abs() <= torch.exp(-t) * series.expm1() + 1e-15).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@each_kernel
def test_far_and_near_are_finite(book, dtype):
    d2 = torch.tensor([0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max, math.inf], dtype=dtype)
    kernel = book.build()
    assert kernel.phi(d2).dtype == dtype and kernel.phi(d2).isfinite().all() and kernel.dphi(d2).isfinite().all()
    assert kernel.phi(d2)[-1] == 0 and kernel.dphi(d2)[-1] == 0


def test_bandwidth_none_is_the_root_of_the_dimension():
    near(RBF().at(9).phi(DISTANCES), torch.exp(-DISTANCES / 18))
    assert IMQ(2.0).at(9) == IMQ(2.0)
    assert RationalQuadratic(alpha=3.0, weights=[2.0]).at(4) == RationalQuadratic(2.0, 3.0, weights=[2.0])
    with pytest.raises(ValueError, match=r"use kernel.at\(dim\)"):
        RBF().phi(DISTANCES)


def test_half_precision_bandwidth_is_squared_in_float32():
    b = torch.tensor([300.0], dtype=torch.float16)  # 300^2 overflows float16
    near(RBF(b).phi(torch.tensor([9e4])), RBF(300.0).phi(torch.tensor([9e4])))


def test_numpy_numbers_are_numbers():
    assert RBF(np.float32(0.5)) == RBF(np.float64(0.5)) == RBF(0.5)
    assert RBF([1, 2]) == RBF((1.0, 2.0))


@given(
    kind=st.sampled_from(["rbf", "imq", "rq"]),
    bandwidths=st.lists(st.floats(0.05, 20), min_size=1, max_size=5),
    alpha=st.floats(0.1, 50),
    d2=st.lists(st.floats(0, 1e4), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_mixture_is_a_weighted_sum_of_its_scales(kind, bandwidths, alpha, d2):
    weights = tuple(1.0 / (s + 1) for s in range(len(bandwidths)))
    book = Textbook(kind, tuple(bandwidths), weights, alpha)
    kernel = book.build()
    distances = torch.tensor(d2, dtype=torch.float64)
    near(kernel.phi(distances), [book.phi(d) for d in d2])
    near(kernel.dphi(distances), [book.dphi(d) for d in d2])
    assert (kernel.dphi(distances) <= 0).all() and (kernel.phi(distances) <= kernel.phi0 * (1 + 1e-15)).all()


# The conventions, from their publications


def cloud(n=23, m=17, dim=4):
    return normal(n, dim, seed=1), 1.5 * normal(m, dim, seed=2) + 0.3


def all_d2(x, y):
    z = torch.cat([x, y]).numpy()
    return ((z[:, None] - z[None]) ** 2).sum(-1)


def biased_by(k, x, y):
    """MMD^2 of a numpy function of the squared distances of the joint sample, diagonal kept."""
    values = k(all_d2(x, y))
    n = len(x)
    return values[:n, :n].mean() + values[n:, n:].mean() - 2 * values[:n, n:].mean()


def off_diagonal_mean(d2):
    return d2.sum() / (len(d2) * (len(d2) - 1))


def median(d2):
    pairs = np.sort(np.sqrt(d2[np.triu_indices(len(d2), 1)]))
    return pairs[(len(pairs) - 1) // 2]


PUBLISHED = {
    # the authors' code: exp(-mean_d (x - y)^2 / 2) for the PixelCNN, exp(-mean_d (x - y)^2 / D) elsewhere
    "paper_pixelcnn": lambda d2, dim: np.exp(-(d2 / dim) / 2),
    "paper_few_samples": lambda d2, dim: np.exp(-(d2 / dim) / dim),
    # Wasserstein autoencoders: sum of C / (C + d2), C = 2 D sigma^2 s
    "wae_imq": lambda d2, dim: sum(2 * dim * s / (2 * dim * s + d2) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10)),
    # CMMD: 1000 exp(-gamma d2), gamma = 1 / (2 * 10^2)
    "cmmd": lambda d2, dim: 1000 * np.exp(-d2 / (2 * 10**2)),
    "median_rbf": lambda d2, dim: np.exp(-d2 / (2 * median(d2) ** 2)),
    # bandwidth = mean of d2 over pairs of different points / 2^(5 // 2); sum_i exp(-d2 / (bandwidth 2^i))
    "five_scale_rbf": lambda d2, dim: sum(np.exp(-d2 / (off_diagonal_mean(d2) / 4 * 2**i)) for i in range(5)),
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_what_its_source_publishes(name):
    x, y = cloud()
    near(mmd(x, y, name, "biased"), biased_by(lambda d2: PUBLISHED[name](d2, x.shape[1]), x, y))
    assert f"`{name}`" in radial.__doc__


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_wae_scales_follow_the_prior(std):
    x, y = cloud()
    scales = [2 * 4 * std**2 * s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10)]
    near(mmd(x, y, radial.wae_imq(4, std), "biased"), biased_by(lambda d2: sum(c / (c + d2) for c in scales), x, y))


def test_default_kernel_is_the_paper_s_for_section_5_2():
    x, y = cloud()
    assert torch.equal(mmd(x, y), mmd(x, y, "paper_pixelcnn"))


@pytest.mark.parametrize("name", ["median_rbf", "five_scale_rbf"])
def test_no_gradient_flows_into_a_data_dependent_bandwidth(name):
    x, y = cloud()
    x.requires_grad_()
    frozen = PRESETS[name](x.detach(), y)
    assert isinstance(frozen.bandwidth, torch.Tensor) and not PRESETS[name](x, y).bandwidth.requires_grad
    (through_name,) = torch.autograd.grad(mmd(x, y, name), x)
    (through_constant,) = torch.autograd.grad(mmd(x, y, frozen), x)
    assert torch.equal(through_name, through_constant)


def test_median_of_an_even_number_of_pairs_is_the_lower_one():
    z = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # distances 1 2 3 4 6 7
    assert radial.median_rbf(z).bandwidth == 3
    assert radial.median_rbf(z[:2], z[2:]).bandwidth == 3


def test_median_of_many_points_uses_an_evenly_spaced_subset_of_both_samples():
    x, y = torch.zeros(5000, 1), torch.ones(5000, 1)
    assert radial.median_rbf(x, y, most=11).bandwidth == 1  # 6 of x and 5 of y: 30 of 55 pairs at distance 1
    subset = normal(3000, 2)
    assert radial.median_rbf(subset, most=100).bandwidth == radial.median_rbf(subset[::30]).bandwidth


def test_data_dependent_bandwidths_of_half_precision_samples_are_float32():
    x, y = (s.half() for s in cloud())
    for name in ("median_rbf", "five_scale_rbf"):
        b = PRESETS[name](x, y).bandwidth
        assert b.dtype == torch.float32
        torch.testing.assert_close(b, PRESETS[name](x.float(), y.float()).bandwidth, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["median_rbf", "five_scale_rbf"])
def test_data_dependent_bandwidths_need_two_different_points(name):
    with pytest.raises(ValueError, match="at least two points"):
        PRESETS[name](torch.zeros(1, 2), torch.zeros(0, 2))
    same = f"the {'median' if name == 'median_rbf' else 'mean squared'} distance of the points is 0; accepted: "
    with pytest.raises(ValueError, match=f"{name}: .*{same}"):
        PRESETS[name](torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="needs finite points; got NaN"):
        PRESETS[name](torch.tensor([[0.0], [1.0], [math.nan]]), torch.zeros(3, 1))
    for bad in ([[0.0], [1.0]], torch.arange(4).view(4, 1)):
        with pytest.raises(TypeError, match="needs floating-point tensors"):
            PRESETS[name](bad, torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"got shape \(3, 2\) and \(3, 1\)"):
        PRESETS[name](torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="most: got 1; accepted: an integer, 2 points or more"):
        radial.median_rbf(torch.zeros(3, 2), most=1)


def test_conventions_refuse_what_is_no_dimension_or_length():
    for bad in (0, -2, 1.5, True, "3"):
        for convention in (radial.paper_pixelcnn, radial.paper_few_samples, radial.wae_imq):
            with pytest.raises(ValueError, match=f"dim: got {bad!r}; accepted: an integer, 1 or more"):
                convention(bad)
    with pytest.raises(ValueError, match=r"prior_std: got -1\.0; accepted: positive"):
        radial.wae_imq(3, -1.0)


# Configurations


@each_kernel
def test_config_round_trip(book):
    kernel = book.build()
    config = json.loads(json.dumps(kernel.to_config()))
    assert kernel_from_config(config) == kernel and type(kernel_from_config(config)) is type(kernel)
    learned = book.build(torch.tensor(book.bandwidths, dtype=torch.float64))
    near(kernel_from_config(learned.to_config()).phi(DISTANCES), kernel.phi(DISTANCES))


def test_config_of_the_default_bandwidth():
    assert kernel_from_config(RBF().to_config()) == RBF()
    assert RBF().to_config() == {"name": "rbf"}
    assert kernel_from_config({"name": "imq", "bandwidth": None}) == IMQ()


def test_config_is_not_changed_by_reading_it():
    config = {"name": "rational_quadratic", "bandwidth": [1.0, 2.0], "alpha": 0.5}
    before = copy.deepcopy(config)
    kernel_from_config(config)
    assert config == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "gauss"}, "got 'gauss'; accepted: 'rbf', 'imq', 'rational_quadratic'"),
        ({"bandwidth": 1.0}, "got None; accepted: 'rbf'"),
        ({"name": "rbf", "sigma": 1.0}, r"unknown keys \['sigma'\]; accepted: \['bandwidth', 'weights'\]"),
        ({"name": "imq", "alpha": 1.0}, r"unknown keys \['alpha'\]"),
        ({"name": "rbf", "bandwidth": -1.0}, "accepted: positive numbers"),
    ],
)
def test_config_errors_say_what_is_accepted(config, message):
    with pytest.raises(ValueError, match=message):
        kernel_from_config(config)


# Errors


@pytest.mark.parametrize("bad", [0.0, -1.0, [1.0, 0.0], math.nan, math.inf, [1.0, math.nan], 1e-200, 1e200])
@pytest.mark.parametrize("kernel", [RBF, IMQ, RationalQuadratic])
def test_bandwidths_are_positive_and_finite(kernel, bad):
    with pytest.raises(ValueError, match=r"bandwidth: got .*; accepted: (positive|finite)"):
        kernel(bad)
    with pytest.raises(ValueError, match=r"bandwidth: got .*; accepted: positive"):
        kernel(torch.tensor(bad))
    with pytest.raises(ValueError, match=r"bandwidth: got .*; accepted: a number or a non-empty sequence"):
        kernel([])


@pytest.mark.parametrize("bad", ["1.0", True, [None], {}, np.array([1.0, 2.0])])
def test_bandwidths_are_numbers(bad):
    with pytest.raises(TypeError, match=r"bandwidth: got .*; accepted: a number or a non-empty sequence"):
        RBF(bad)


@pytest.mark.parametrize("bad", [torch.ones(2, 2), torch.ones(0), torch.ones(2, dtype=torch.int64)])
def test_tensor_bandwidths_have_one_dimension_and_are_real(bad):
    with pytest.raises(ValueError, match=r"bandwidth: got a torch\.\w+ tensor of shape .*accepted: a floating-point"):
        RBF(bad)


def test_weights_are_one_for_each_bandwidth():
    with pytest.raises(ValueError, match="weights: got 2 for 3 bandwidths"):
        RBF([1.0, 2.0, 3.0], weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="weights: got 2 for 1 bandwidths"):
        IMQ(weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="weights: got 1 for 2 bandwidths"):
        IMQ(torch.ones(2), weights=[1.0])
    with pytest.raises(ValueError, match=r"weights: got .*accepted: finite"):
        RBF(1.0, weights=[math.inf])
    with pytest.raises(TypeError, match="weights: got"):
        RBF(1.0, weights=["1"])


def test_alpha_is_one_positive_number():
    for bad in (0.0, -1.0, math.nan, 1e31, 1e-31):
        with pytest.raises(ValueError, match=r"alpha: got .*; accepted: 1e-30 to 1e30"):
            RationalQuadratic(1.0, bad)
    with pytest.raises(TypeError, match=r"alpha: got \[1.0, 2.0\]"):
        RationalQuadratic(1.0, [1.0, 2.0])


def test_the_base_class_is_no_kernel():
    with pytest.raises(TypeError, match="abstract: use RBF"):
        Kernel(1.0).phi(DISTANCES)
