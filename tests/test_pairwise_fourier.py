"""Energies and forces of many points of few coordinates on the CPU, by Fourier series (csrc/cpu/pairwise_fourier.cpp).

Sums of pairs are not as exact: of a series the results in float32 are those of float64, rounded."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from infovae_fast import RBF, mmd
from infovae_fast.backends import native_missing
from infovae_fast.pairwise import Weights, energy, force
from infovae_fast.radial import Kernel
from tests import oracle
from tests.oracle import check, near, normal, pairwise_scales

one_thread, two_threads = oracle.one_thread, oracle.two_threads
pytestmark = pytest.mark.skipif(native_missing() is not None, reason=str(native_missing()))

POINTS = {1: (300, 257), 2: (1300, 700), 3: (1900, 1100)}  # enough for a series to be cheaper
WEIGHTS = (0.7, -0.4, 0.3)
MIXTURES = {d: RBF((2.0, 2.5), weights=(0.8, 0.3)) for d in (1, 2)} | {3: RBF((3.0, 3.1, 3.2, 3.3))}


def gradients(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, kernel: Kernel, backend: str = "cpp"
) -> tuple[Tensor, ...]:
    """The energy and its derivatives to all that is given."""
    leaves = [t.detach().requires_grad_() for t in (x, y, a, b) if t is not None]
    x, y, *weights = leaves
    a, b = weights or (None, None)
    value = energy(x, y, kernel=kernel, weights=WEIGHTS, x_weights=a, y_weights=b, backend=backend)
    return (value.detach(), *torch.autograd.grad(value, leaves))


def exact(x: Tensor, y: Tensor | None, kernel: Kernel, weights: Weights) -> tuple[Tensor, Tensor]:
    """The energy and the force on x in long double, from differences; `kernel` an RBF."""
    scales = kernel.at(x.shape[-1]).scales()
    clouds = [z.double().numpy().astype(np.longdouble) for z in (x, y) if z is not None]

    def between(a: np.ndarray, b: np.ndarray) -> tuple[np.longdouble, np.ndarray]:  # sums of phi and of 2 phi' (a - b)
        difference = a[:, None] - b  # [N, M, D]
        d2 = (difference**2).sum(-1)
        phi = [w * np.exp(-d2 / (2 * np.longdouble(b) ** 2)) for b, w in scales]
        slope = sum(one / np.longdouble(b) ** 2 for one, (b, _) in zip(phi, scales, strict=True))
        return sum(phi).sum(), -(slope[..., None] * difference).sum(1)

    def within(z: np.ndarray) -> np.longdouble:
        return between(z, z)[0] - len(z) * np.longdouble(sum(w for _, w in scales))

    E, F = weights[0] * within(clouds[0]), weights[0] * between(clouds[0], clouds[0])[1]
    for z in clouds[1:]:
        e, f = between(clouds[0], z)
        E, F = E + 2 * weights[1] * e + weights[2] * within(z), F + weights[1] * f
    return tuple(torch.from_numpy(np.asarray(t, dtype=np.float64)) for t in (E, F))


def meets_the_rule(x: Tensor, y: Tensor | None, kernel: Kernel, weights: Weights = (1.0, 1.0, 1.0)) -> None:
    """Of the energy and the force on x by C++."""
    kernel, scales = kernel.at(x.shape[-1]), pairwise_scales(x, y, None, kernel, weights)
    for f, truth, scale in zip((energy, force), exact(x, y, kernel, weights), scales, strict=True):
        out, yardstick = (f(x, y, kernel=kernel, weights=weights, backend=name) for name in ("cpp", "reference"))
        check(out, truth, yardstick, scale, dtype=x.dtype)


def is_rounded(out: Tensor, truth: Tensor) -> bool:
    """Whether float32 numbers are the float64 ones to the last bit but what 1e-9 of the largest may change."""
    error = (out.double() - truth).abs()
    return bool((error <= 2.0**-24 * truth.abs() + 1e-9 * truth.abs().max()).all())


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("d", POINTS)
def test_float32_is_float64_rounded(d, weighted, offset):
    n, m = POINTS[d]
    x, y = (normal(k, d, seed=k, dtype=torch.float32) + offset for k in (n, m))
    a, b = (normal(n, dtype=torch.float32).abs(), normal(m, dtype=torch.float32).abs()) if weighted else (None, None)
    kernel = MIXTURES[d]
    truths = gradients(*(None if t is None else t.double() for t in (x, y, a, b)), kernel, "reference")
    value, *rest = gradients(x, y, a, b, kernel)
    assert abs(value - truths[0]) <= 1e-11 * truths[0].abs()
    assert all(map(is_rounded, rest, truths[1:]))
    if d < 3:
        v = normal(n, d, seed=5, dtype=torch.float32)
        truth = force(x.double(), y.double(), v.double(), kernel=kernel, weights=WEIGHTS, backend="reference")
        assert is_rounded(force(x, y, v, kernel=kernel, weights=WEIGHTS, backend="cpp"), truth)


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("d", POINTS)
def test_float64_is_exact(d, mixture):
    kernel = MIXTURES[d] if mixture else RBF()
    x, y = (normal(k, d, seed=k) for k in POINTS[d])
    for out, truth in zip(*(gradients(x, y, None, None, kernel, name) for name in ("cpp", "reference")), strict=True):
        near(out, truth)


@pytest.mark.parametrize("b", [0.5, 1.0, 3.0, 10.0])
@pytest.mark.parametrize(("n", "d"), [(500, 1), (900, 2)])
def test_float64_meets_the_rule(n, d, b):
    meets_the_rule(normal(n, d), None, RBF(b))


@pytest.mark.parametrize(
    ("x", "kernel"),
    [
        (normal(400, 2), RBF(1e-3)),  # more waves than pairs
        (torch.cat([normal(400, 2), torch.full((1, 2), 1e30, dtype=torch.float64)]), RBF()),
        (torch.cat([normal(400, 1), torch.full((1, 1), 300.0, dtype=torch.float64)]), RBF()),
        (torch.zeros(400, 2, dtype=torch.float64), RBF()),
        (torch.full((400, 1), 7.0, dtype=torch.float64), RBF(1e-10)),
        (normal(400, 2), RBF(1e12)),
        (normal(400, 2), RBF((1e-2, 1e2))),
        (normal(800, 2), RBF((1.0, 2.0), weights=(1.0, -0.9))),
        (normal(800, 2), RBF((1.0, 2.0), weights=(1.0, 0.0))),
        (normal(700, 4), RBF()),
        (normal(400, 2)[::2].mT.contiguous().mT, RBF()),
    ],
)
def test_any_cloud_is_right(x, kernel):
    for dtype in (torch.float64, torch.float32):
        meets_the_rule(x.to(dtype), None, kernel)


@pytest.mark.parametrize("b", [1e-160, 1e-154, 1e-30, 1e150])
def test_units_do_not_matter(b):
    x = normal(800, 1)
    for unit, backend in ((1.0, "reference"), (b, "cpp")):
        E, F = (f(x * unit, kernel=RBF(unit), backend=backend) for f in (energy, force))
        if backend == "reference":
            truth = E, F
    near(E, truth[0])
    near(F * b, truth[1])


@pytest.mark.parametrize("distance", [0.0, 2.0, 2.5, 3.0, 6.0, 9.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_of_clouds_apart_meet_the_rule(dtype, distance):
    """All asked for are far from each other: what a series leaves of phi(0) would be large beside them."""
    x, y = (0.3 * normal(600, 1)).to(dtype), (0.3 * normal(500, 1, seed=1) + distance).to(dtype)
    meets_the_rule(x, y, RBF(1.0), (0.0, -1.0, 0.0))


@pytest.mark.parametrize("extent", [1e-6, 1e-2, 0.5])
def test_forces_of_a_wide_kernel_meet_the_rule(extent):
    meets_the_rule(extent * normal(900, 1), None, RBF(1.0))


def test_weights_of_one_point_above_all_others():
    x, b = normal(600, 1), torch.ones(600, dtype=torch.float64)
    b[7] = 1e12
    out, truth = (energy(x, kernel=RBF(), x_weights=b, backend=name) for name in ("cpp", "reference"))
    near(out, truth)


def test_more_blocks_than_parts_of_moments():
    """A point for each of many: of N points r times, sum_{i != j} = r^2 sum_{i != j} + (r^2 - r) N phi(0)."""
    x, r = normal(300, 3), 120
    one, kernel = energy(x, kernel=RBF(2.0), backend="reference"), RBF(2.0)
    many = x.repeat(r, 1).requires_grad_()
    out = energy(many, kernel=kernel, backend="cpp")
    near(out, r**2 * one + (r**2 - r) * len(x))
    (gradient,) = torch.autograd.grad(out, many)
    near(gradient[-300:], 2 * r * force(x, kernel=kernel, backend="reference"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_nan_and_infinity_are_refused_or_seen(d, bad):
    for where in (17, 0, slice(None, None, 256), slice(None)):
        x = normal(2000, d, dtype=torch.float32)
        x[where, d - 1] = bad
        with pytest.raises(ValueError, match=r"x: .* hold NaN or infinity"):
            mmd(x, x)
        assert energy(x, kernel=RBF(), backend="cpp").isnan()


def test_mmd_of_a_sample_and_itself_is_zero():
    x = normal(900, 2, dtype=torch.float32)
    assert abs(mmd(x, x.clone(), estimator="biased").item()) <= 1e-15


def test_an_isolated_point_has_its_force():
    x = torch.cat([normal(3000, 2), torch.tensor([[9.0, 0.0]], dtype=torch.float64)]).float()
    out, truth = (force(z, kernel=RBF(), backend=name) for z, name in ((x, "cpp"), (x.double(), "reference")))
    by_pairs = force(torch.nn.functional.pad(x, (0, 2)), kernel=RBF(2**0.5), backend="cpp")[:, :2]
    assert not torch.equal(out, by_pairs)
    assert truth[-1].norm() < 1e-4 * truth.norm(dim=1).mean()
    assert (out[-1].double() - truth[-1]).norm() <= 1e-5 * truth[-1].norm()


def test_the_bits_do_not_depend_on_the_threads(two_threads):
    x, y = (normal(n, 2, seed=n, dtype=torch.float32) for n in (1500, 900))
    both = gradients(x, y, None, None, RBF())
    torch.set_num_threads(1)
    assert all(torch.equal(p, q) for p, q in zip(both, gradients(x, y, None, None, RBF()), strict=True))
