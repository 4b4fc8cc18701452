"""Energies and forces of many points of few coordinates on the CPU, by Fourier series (csrc/cpu/pairwise_fourier.cpp).

Sums of pairs are not as exact: of a series the results in float32 are those of float64, rounded."""

import math

import pytest
import torch
from torch import Tensor

from infovae_fast import IMQ, RBF, mmd
from infovae_fast.backends import native_missing
from infovae_fast.pairwise import energy, force
from infovae_fast.radial import Kernel
from tests import oracle
from tests.oracle import check, near, normal, pairwise_scales

one_thread, two_threads = oracle.one_thread, oracle.two_threads
pytestmark = pytest.mark.skipif(native_missing() is not None, reason=str(native_missing()))

POINTS = {1: (300, 257), 2: (1300, 700), 3: (1900, 1100)}  # enough for a series to be cheaper
WEIGHTS = (0.7, -0.4, 0.3)
MIXTURES = {d: RBF((2.0, 2.5), weights=(0.8, -0.3)) for d in (1, 2)} | {3: RBF((3.0, 3.1, 3.2, 3.3))}


def gradients(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, kernel: Kernel, backend: str = "cpp"
) -> tuple[Tensor, ...]:
    """The energy and its derivatives to all that is given."""
    leaves = [t.detach().requires_grad_() for t in (x, y, a, b) if t is not None]
    x, y, *weights = leaves
    a, b = weights or (None, None)
    value = energy(x, y, kernel=kernel, weights=WEIGHTS, x_weights=a, y_weights=b, backend=backend)
    return (value.detach(), *torch.autograd.grad(value, leaves))


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
    a, b = (normal(n, dtype=torch.float32), normal(m, dtype=torch.float32)) if weighted else (None, None)
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


@pytest.mark.parametrize(("n", "d"), [(500, 1), (900, 2)])
def test_energy_in_float64_meets_the_rule(n, d):
    x = normal(n, d)
    for b in (0.5, 1.0, 3.0, 10.0):
        d2 = torch.nn.functional.pdist(x).square()
        truth = torch.tensor(2 * math.fsum(torch.exp(-d2 / (2 * b**2)).tolist()), dtype=torch.float64)
        scale, _ = pairwise_scales(x, None, None, RBF(b), (1.0, 1.0, 1.0))
        check(energy(x, kernel=RBF(b), backend="cpp"), truth, truth, scale)


@pytest.mark.parametrize(
    ("x", "kernel"),
    [
        (normal(400, 2), RBF(1e-3)),  # more waves than pairs
        (torch.cat([normal(400, 2), torch.full((1, 2), 1e30, dtype=torch.float64)]), RBF()),
        (torch.cat([normal(400, 1), torch.full((1, 1), 300.0, dtype=torch.float64)]), RBF()),
        (torch.zeros(400, 2, dtype=torch.float64), RBF()),
        (torch.full((400, 1), 7.0, dtype=torch.float64), RBF(1e-20)),
        (normal(400, 2), RBF(1e12)),
        (normal(400, 2), RBF((1e-2, 1e2))),
        (normal(400, 2), IMQ(1.0)),
        (normal(700, 4), RBF()),
        (normal(400, 2)[::2].mT.contiguous().mT, RBF()),
    ],
)
def test_any_cloud_is_right(x, kernel):
    for dtype, eps in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        truth = energy(x.to(dtype).double(), kernel=kernel, backend="reference")
        out = energy(x.to(dtype), kernel=kernel, backend="cpp")
        assert abs(out - truth) <= eps * truth.abs() + eps * len(x), (dtype, out, truth)


def test_nan_and_infinity_are_refused_or_seen():
    for bad in (math.nan, math.inf):
        x = normal(600, 2, dtype=torch.float32)
        x[17, 1] = bad
        with pytest.raises(ValueError, match="x"):
            mmd(x, x)
        assert energy(x, kernel=RBF(), backend="cpp").isnan()


def test_mmd_of_a_sample_and_itself_is_zero():
    x = normal(900, 2, dtype=torch.float32)
    assert abs(mmd(x, x.clone(), estimator="biased").item()) <= 1e-15


def test_an_isolated_point_has_its_force():
    x = torch.cat([normal(800, 2), torch.tensor([[9.0, 0.0]], dtype=torch.float64)]).float()
    truth = force(x.double(), kernel=RBF(), backend="reference")[-1]
    assert truth.norm() < 2e-3  # others: about 100
    assert ((force(x, kernel=RBF(), backend="cpp")[-1].double() - truth).norm() <= 1e-5 * truth.norm()).all()


def test_the_bits_do_not_depend_on_the_threads(two_threads):
    x, y = (normal(n, 2, seed=n, dtype=torch.float32) for n in (1500, 900))
    both = gradients(x, y, None, None, RBF())
    torch.set_num_threads(1)
    assert all(torch.equal(p, q) for p, q in zip(both, gradients(x, y, None, None, RBF()), strict=True))
