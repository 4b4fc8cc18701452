"""The energy and force of a cloud: definitions, derivatives, tiles, laws, layouts, errors, on every backend."""

import itertools
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infovae_fast import pairwise
from infovae_fast.clouds import as_cloud
from infovae_fast.pairwise import energy, force, pairwise_reference
from infovae_fast.radial import IMQ, RBF, RationalQuadratic, wae_imq
from tests import oracle
from tests.oracle import KERNELS, check, energy_pairs, force_loop, name_of, near, normal, pair_sum, require_pairwise

backend, one_thread, two_threads = oracle.backend, oracle.one_thread, oracle.two_threads
each_kernel = pytest.mark.parametrize("book", KERNELS, ids=name_of)
WEIGHTS = (0.7, -1.3, 0.4)


def points(n=6, m=5, dim=3, dtype=torch.float64):
    return (
        normal(n, dim, seed=1, dtype=dtype),
        normal(m, dim, seed=2, dtype=dtype) + 0.5,
        normal(n, dim, seed=3, dtype=dtype),
    )


# The definition


@each_kernel
def test_energy_and_its_gradient_are_the_double_loop(backend, book):
    x, y, _ = points()
    b = torch.tensor(book.bandwidths, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, y, b)]
    require_pairwise(backend, x, y, kernel=book.build(b))
    E = energy(x, y, kernel=book.build(b), weights=WEIGHTS, backend=backend)
    assert E.dtype == torch.float64 and E.shape == ()
    value, *gradient = pair_sum(energy_pairs(6, 5, WEIGHTS), x, y, book)
    near(E, value)
    for out, truth in zip(torch.autograd.grad(E, leaves), gradient, strict=True):
        near(out, truth)


@each_kernel
@pytest.mark.parametrize("with_y", [True, False])
def test_weights_of_the_points(backend, book, with_y):
    """E = sum w_ij a_i a_j phi_ij by the double loop, and its derivatives to the points and the weights."""
    x, y, _ = points(7, 5, 3)
    a, b = normal(7, seed=4), normal(5, seed=5)
    y, b = (y, b) if with_y else (y[:0], b[:0])
    weight = {("x", i): float(w) for i, w in enumerate(a)} | {("y", j): float(w) for j, w in enumerate(b)}
    terms = [(c * weight[p] * weight[q], p, q) for c, p, q in energy_pairs(7, len(y), WEIGHTS)]
    value, on_x, on_y, _ = pair_sum(iter(terms), x, y, book)
    potentials = dict.fromkeys(weight, 0.0)
    for c, p, q in energy_pairs(7, len(y), WEIGHTS):
        ends = [(x if which == "x" else y)[i] for which, i in (p, q)]
        potentials[p] += 2 * c * weight[q] * book.phi(float((ends[0] - ends[1]).square().sum()))
    leaves = [t.requires_grad_() for t in (x, a, y, b)][: 4 if with_y else 2]
    require_pairwise(backend, x, y if with_y else None, kernel=book.build())
    others = {"y": y, "y_weights": b} if with_y else {}
    E = energy(x, **others, x_weights=a, kernel=book.build(), weights=WEIGHTS, backend=backend)
    near(E, value)
    truths = [on_x, [w for p, w in potentials.items() if p[0] == "x"], on_y]
    truths.append([w for p, w in potentials.items() if p[0] == "y"])
    for out, truth in zip(torch.autograd.grad(E, leaves), truths, strict=False):
        near(out, truth)


def test_only_weights_need_a_gradient(backend):
    x, y, _ = points()
    a = normal(6, seed=4).requires_grad_()
    require_pairwise(backend, x, y, kernel=RBF(1.0))
    E = energy(x, y, kernel=RBF(1.0), x_weights=a, backend=backend)
    (slope,) = torch.autograd.grad(E, a)
    near((slope * a).sum() + energy(y, kernel=RBF(1.0)) - energy(x, kernel=RBF(1.0), x_weights=a), E)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(4, 2), [1.0] * 4, torch.ones(4, device="meta")], ids=repr)
def test_one_weight_a_point(bad):
    with pytest.raises(ValueError, match=r"x_weights: got .*; accepted: a tensor \(4,\) on cpu"):
        energy(torch.ones(4, 2), kernel=RBF(1.0), x_weights=bad)


@each_kernel
@pytest.mark.parametrize("with_y", [True, False])
@pytest.mark.parametrize("with_v", [True, False])
def test_force_is_the_double_loop(backend, book, with_y, with_v):
    x, y, v = points()
    y, v = y if with_y else None, v if with_v else None
    require_pairwise(backend, x, y, v, kernel=book.build(), energy=False)
    F = force(x, y, v, kernel=book.build(), weights=WEIGHTS, backend=backend)
    near(F, force_loop(x, y, v, book, WEIGHTS))


def test_both_at_once_are_each_alone():
    x, y, v = points()
    kernel = RBF(1.0)
    E, F = pairwise_reference(x, y, v, kernel, WEIGHTS, True, True)
    assert torch.equal(E, energy(x, y, kernel=kernel, weights=WEIGHTS, backend="reference"))
    assert torch.equal(F, force(x, y, v, kernel=kernel, weights=WEIGHTS, backend="reference"))
    assert pairwise_reference(x, y, v, kernel, WEIGHTS, False, False) == (None, None)


@each_kernel
def test_the_gradient_of_the_energy_is_twice_the_force(backend, book):
    x, y, _ = points(9, 7, 4)
    x.requires_grad_()
    require_pairwise(backend, x, y, kernel=book.build())
    E = energy(x, y, kernel=book.build(), weights=WEIGHTS, backend=backend)
    F = force(x.detach(), y, kernel=book.build(), weights=WEIGHTS, backend=backend)
    near(torch.autograd.grad(E, x)[0], 2 * F)


# First and second derivatives of the reference by finite differences


@each_kernel
def test_energy_derivatives(book):
    x, y, _ = points(4, 3, 2)
    b = torch.tensor(book.bandwidths, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, y, b)]

    def f(x, y, b):
        return energy(x, y, kernel=book.build(b), weights=WEIGHTS, backend="reference")

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@each_kernel
def test_force_derivatives(book):
    x, y, v = points(4, 3, 2)
    b = torch.tensor(book.bandwidths, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, y, v, b)]

    def f(x, y, v, b):
        return force(x, y, v, kernel=book.build(b), weights=WEIGHTS, backend="reference")

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-5])
@pytest.mark.parametrize("kernel", [RBF(3.0), IMQ(3.0), RationalQuadratic(3.0, 0.5)])
def test_derivatives_where_points_coincide(kernel, gap):
    """Where |a|^2 + |b|^2 - 2 a.b rounds below zero, the derivatives are those of the true distance."""

    def slope(x):
        return torch.autograd.grad(energy(x, kernel=kernel, backend="reference"), x, create_graph=True)[0]

    for seed in range(6):
        x = normal(4, 10, seed=seed)
        x[1], x[3] = x[0], x[2] + gap
        x.requires_grad_()
        near(slope(x), 2 * force(x, kernel=kernel, backend="reference").detach())
        hessian = torch.autograd.functional.jacobian(slope, x)
        of_force = torch.autograd.functional.jacobian(lambda t: 2 * force(t, kernel=kernel, backend="reference"), x)
        near(hessian, of_force)
        # d2/dx_0 dx_1 of 2 phi(|x_0 - x_1|^2) = -4 phi'(0) I
        at_zero = kernel.dphi(torch.zeros(1, dtype=torch.float64))
        near(hessian[0, :, 1], -4 * at_zero * torch.eye(10))


@pytest.mark.parametrize("kernel", [RBF(1e-7), IMQ(1e-7), RationalQuadratic(1e-7, 0.5)])
def test_no_distance_is_negative(kernel):
    """Coinciding points and a bandwidth below the rounding of their distance: (1 + d2 / b^2) must not turn negative."""
    for seed in range(6):
        x = 30 * normal(1, 10, seed=seed).expand(4, 10) * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
        x = x.clone().requires_grad_()
        E = energy(x, kernel=kernel, backend="reference")
        assert 0 <= E <= 4 * 3 and torch.autograd.grad(E, x)[0].isfinite().all()


# Tiles


@pytest.mark.parametrize("pairs", [1, 7, 50])
def test_many_tiles_are_one_tile(monkeypatch, pairs):
    x, y, v = points(11, 8, 3)
    b = torch.tensor([0.8, 1.9], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, y, v, b)]

    def results():
        kernel = RBF(b)
        E = energy(x, y, kernel=kernel, weights=WEIGHTS, backend="reference")
        F = force(x, y, v, kernel=kernel, weights=WEIGHTS, backend="reference")
        first = torch.autograd.grad(E + F.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [E, F, *first, *second]

    whole = results()
    sizes = limit_tiles(monkeypatch, pairs)
    for out, truth in zip(results(), whole, strict=True):
        near(out, truth.detach())
    assert max(sizes) <= pairs


def limit_tiles(monkeypatch, pairs):
    """Sets the size of a tile; the list it returns will hold the sizes of the tiles."""
    sizes, original = [], pairwise.squared_distances

    def spy(*args):
        d2 = original(*args)
        sizes.append(d2.numel())
        return d2

    monkeypatch.setattr(pairwise, "TILE_PAIRS", pairs)
    monkeypatch.setattr(pairwise, "squared_distances", spy)
    return sizes


def test_tiles_of_a_batch_of_clouds(monkeypatch):
    x, y = normal(3, 6, 2, seed=1), normal(3, 5, 2, seed=2)
    whole = energy(x, y, kernel=RBF(1.0), backend="reference"), force(x, y, kernel=RBF(1.0), backend="reference")
    sizes = limit_tiles(monkeypatch, 30)
    near(energy(x, y, kernel=RBF(1.0), backend="reference"), whole[0])
    near(force(x, y, kernel=RBF(1.0), backend="reference"), whole[1])
    assert max(sizes) <= 30


def test_tiles_under_autocast_are_recomputed_in_float32(monkeypatch):
    x, y, _ = points(11, 8, 3, torch.float32)
    x.requires_grad_()
    monkeypatch.setattr(pairwise, "TILE_PAIRS", 16)
    (plain,) = torch.autograd.grad(energy(x, y, kernel=RBF(1.0), backend="reference"), x)
    with torch.autocast("cpu", torch.bfloat16):
        (under,) = torch.autograd.grad(energy(x, y, kernel=RBF(1.0), backend="reference"), x)
    assert torch.equal(plain, under)


def test_memory_does_not_grow_with_the_matrix():
    """4000 points: one float32 matrix of all pairs has 61 MiB, and value and gradient would need several."""
    code = """
        import resource, torch
        from infovae_fast import pairwise, radial
        torch.set_num_threads(1)
        pairwise.TILE_PAIRS = 2**18
        def step(n):
            x = torch.randn(n, 2, requires_grad=True)
            pairwise.energy(x, torch.randn(n, 2), kernel=radial.RBF(1.0), backend="reference").backward()
            assert x.grad.isfinite().all()
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        step(600)
        before = peak()
        step(4000)
        print(peak() - before)
    """
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back what is freed, as it does for large tiles
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 30, f"{done.stdout} MiB more for 4000 points"


# Every backend and dtype by the accuracy rule

SHAPES = [(1, 1, 1), (2, 1, 3), (5, 7, 1), (33, 130, 17), (64, 65, 2), (16, 24, 512)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(backend, shape, dtype):
    def check(out, truth, *rule):
        near(out, truth) if dtype == torch.float64 else oracle.check(out, truth, *rule)  # else it is its own truth

    x, y, v = points(*shape, dtype=dtype)
    for kernel in (RBF(), IMQ([0.5, 3.0]), RationalQuadratic(alpha=0.5), wae_imq(shape[2])):
        truth = pairwise_reference(x.double(), y.double(), v.double(), kernel, WEIGHTS, True, True)
        yardstick = pairwise_reference(x, y, v, kernel, WEIGHTS, True, True)
        scale = oracle.pairwise_scales(x, y, v, kernel, WEIGHTS)
        require_pairwise(backend, x, y, kernel=kernel)
        out = energy(x, y, kernel=kernel, weights=WEIGHTS, backend=backend)
        computed = torch.promote_types(dtype, torch.float32)
        check(out, truth[0], yardstick[0], scale[0], computed)
        require_pairwise(backend, x, y, v, kernel=kernel, energy=False)
        F = force(x, y, v, kernel=kernel, weights=WEIGHTS, backend=backend)
        assert F.dtype == computed
        check(F, truth[1], yardstick[1], scale[1])
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(energy(leaf, y, kernel=kernel, weights=WEIGHTS, backend=backend), leaf)
        assert slope.dtype == dtype
        truth_slope = 2 * pairwise_reference(x.double(), y.double(), None, kernel, WEIGHTS, False, True)[1]
        rounded = truth_slope.to(dtype)
        check(slope, truth_slope, rounded, 2 * oracle.pairwise_scales(x, y, None, kernel, WEIGHTS)[1])


@pytest.mark.parametrize("shift", [100.0, 1e4])
def test_accuracy_far_from_the_origin(backend, shift):
    x, y, v = (t.float() for t in points(60, 70, 10))
    x, y = x + shift, y + shift
    require_pairwise(backend, x, y, kernel=RBF())
    inputs = (RBF(), (1.0, -1.0, 1.0), True, True)
    truth = pairwise_reference(x.double(), y.double(), v.double(), *inputs)
    yardstick = pairwise_reference(x, y, v, *inputs)
    scale = oracle.pairwise_scales(x, y, v, RBF(), (1.0, -1.0, 1.0))
    E = energy(x, y, kernel=RBF(), weights=(1, -1, 1), backend=backend)
    check(E, truth[0], yardstick[0], scale[0], torch.float32)
    check(force(x, y, v, kernel=RBF(), weights=(1, -1, 1), backend=backend), truth[1], yardstick[1], scale[1])


def test_a_distant_float64_cloud_keeps_its_digits(backend):
    """Numbers that are the same after a shift by 2^14, to the last bit: without centring, seven digits would go."""
    x, y, v = ((t * 2**20).round() / 2**20 for t in points(12, 9, 4))
    require_pairwise(backend, x, y, kernel=RBF(1.0))
    near(energy(x + 2**14, y + 2**14, kernel=RBF(1.0), backend=backend), energy(x, y, kernel=RBF(1.0), backend=backend))
    shifted = force(x + 2**14, y + 2**14, v, kernel=RBF(1.0), backend=backend)
    near(shifted, force(x, y, v, kernel=RBF(1.0), backend=backend))


def test_one_distant_cloud_does_not_spoil_the_other():
    """Distances of a nearby pair keep their digits where the common centre is far from both."""
    x, y, _ = points(20, 20, 3, torch.float32)
    out = force(x, y + 3e3, kernel=RBF(1.0), backend="reference")
    truth = force(x.double(), (y + 3e3).double(), kernel=RBF(1.0), backend="reference")
    alone = oracle.pairwise_scales(x, None, None, RBF(1.0), (1.0, 1.0, 1.0))[1]
    check(out, truth, truth.float(), alone)


# Laws


def test_translation_rotation_permutation_and_scaling(backend):
    x, y, v = points(12, 9, 4)
    kernel = IMQ(1.3)
    require_pairwise(backend, x, y, kernel=kernel)

    def both(x, y, v, kernel=kernel):
        E = energy(x, y, kernel=kernel, weights=WEIGHTS, backend=backend)
        return E, force(x, y, v, kernel=kernel, weights=WEIGHTS, backend=backend)

    E, F = both(x, y, v)
    shifted = both(x + 5.0, y + 5.0, v)
    near(shifted[0], E)
    near(shifted[1], F)
    Q = torch.linalg.qr(normal(4, 4, seed=9))[0]
    turned = both(x @ Q, y @ Q, v @ Q)
    near(turned[0], E)
    near(turned[1], F @ Q)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = both(x[order], y.flip(0), v[order])
    near(mixed[0], E)
    near(mixed[1], F[order])
    near(both(3.0 * x, 3.0 * y, v / 3.0, IMQ(3.9))[0], E)
    near(both(3.0 * x, 3.0 * y, v / 3.0, IMQ(3.9))[1], F / 3.0)


def test_energy_adds_up_over_splits_of_y_and_is_linear_in_the_weights(backend):
    x, y, _ = points(8, 9, 3)
    require_pairwise(backend, x, y, kernel=RBF(1.0))

    def e(x, y, *weights):
        return energy(x, y, kernel=RBF(1.0), weights=weights, backend=backend)

    near(e(x, y, 0, 1, 0), e(x, y[:4], 0, 1, 0) + e(x, y[4:], 0, 1, 0))
    near(e(x, y, 0, 0, 1), e(y[:4], y[4:], 1, 1, 1))
    near(e(x, y, 2, 3, 5), 2 * e(x, y, 1, 0, 0) + 3 * e(x, y, 0, 1, 0) + 5 * e(x, y, 0, 0, 1))
    near(e(x, y, 1, 0, 0), energy(x, kernel=RBF(1.0), backend=backend))
    near(e(x, y, 2, 3, 5), e(y, x, 5, 3, 2))


@pytest.mark.parametrize("d", [2, 5])
@pytest.mark.parametrize("far", [1e4, 1e6])
def test_a_point_far_away_costs_the_others_no_digits(backend, far, d):
    """It would move their mean, from which they then were far."""
    torch.manual_seed(0)
    x, y = torch.randn(60, d), torch.randn(70, d)
    x[0, 0] = far
    require_pairwise(backend, x, y, kernel=RBF(1.5))
    E, F = (f(x, y, kernel=RBF(1.5), weights=(1, -1, 1), backend=backend).cpu() for f in (energy, force))
    exact = [t.double() for t in (x[1:], y)]
    truth = [f(*exact, kernel=RBF(1.5), weights=(1, -1, 1), backend="reference") for f in (energy, force)]
    terms = energy(*exact, kernel=RBF(1.5), weights=(1, 1, 1), backend="reference")
    assert (E - truth[0]).abs() <= 1e-6 * terms
    assert (F[1:] - truth[1]).abs().max() <= 5e-6 * truth[1].abs().max()


@pytest.mark.parametrize("bad", [(1.0, 2.0), None, 1.0, (1.0, math.nan, 1.0), ("1", "2", "3")])
def test_weights_of_the_blocks_are_three_numbers(bad):
    x, y, v = points(4, 5, 2)
    for call in (
        lambda: energy(x, y, kernel=RBF(1.0), weights=bad),
        lambda: force(x, y, v, kernel=RBF(1.0), weights=bad),
    ):
        with pytest.raises(ValueError, match=r"weights: got .*; accepted: three finite numbers"):
            call()


def test_weights_of_the_blocks_may_change_under_compile():
    def compiled(x, w):
        return energy(x, kernel=RBF(1.0), weights=(w, 0.0, 0.0), backend="reference")

    x = points(6, 1, 2)[0]
    f = torch.compile(compiled, fullgraph=True, backend="eager")
    for w in (1.0, 2.0, 3.0):
        near(f(x, w), compiled(x, w))


def test_forces_of_a_cloud_on_itself_cancel(backend):
    x, y, _ = points(8, 9, 3)
    require_pairwise(backend, x, y, kernel=RBF(1.0), energy=False)
    on_x = force(x, y, kernel=RBF(1.0), weights=WEIGHTS, backend=backend)
    on_y = force(y, x, kernel=RBF(1.0), weights=WEIGHTS[::-1], backend=backend)
    assert (on_x.sum(0) + on_y.sum(0)).abs().max() <= oracle.EXACT * on_x.abs().sum()


def test_one_point_alone_feels_nothing(backend):
    x = normal(1, 3)
    require_pairwise(backend, x, kernel=RBF(1.0))
    assert energy(x, kernel=RBF(1.0), backend=backend) == 0
    assert torch.equal(force(x, v=x, kernel=RBF(1.0), backend=backend), torch.zeros_like(x))


def test_coinciding_points_are_finite(backend):
    x = torch.ones(7, 3, device=oracle.device, requires_grad=True)
    require_pairwise(backend, x, x, kernel=IMQ(1.0))
    E = energy(x, x.detach(), kernel=IMQ(1.0), backend=backend)
    assert E == 14 * 13
    assert torch.equal(torch.autograd.grad(E, x)[0], torch.zeros_like(x))


def test_a_batch_of_clouds_is_each_cloud(backend):
    x, y, v = normal(2, 3, 6, 2, seed=1), normal(2, 3, 4, 2, seed=2), normal(2, 3, 6, 2, seed=3)
    kernel = RBF([0.5, 2.0])
    require_pairwise(backend, x, y, v, kernel=kernel, energy=False)
    E = energy(x, y, kernel=kernel, weights=WEIGHTS, backend=backend)
    F = force(x, y, v, kernel=kernel, weights=WEIGHTS, backend=backend)
    assert E.shape == (2, 3) and F.shape == x.shape
    for i, j in itertools.product(range(2), range(3)):
        near(E[i, j], energy(x[i, j], y[i, j], kernel=kernel, weights=WEIGHTS, backend=backend))
        near(F[i, j], force(x[i, j], y[i, j], v[i, j], kernel=kernel, weights=WEIGHTS, backend=backend))


def test_an_expanded_upstream_gradient(backend):
    x, y = normal(3, 6, 2, seed=1).requires_grad_(), normal(3, 4, 2, seed=2)
    require_pairwise(backend, x, y, kernel=RBF(1.0))
    E = energy(x, y, kernel=RBF(1.0), backend=backend)
    (g,) = torch.autograd.grad(E, x, torch.full_like(E[:1], 2.0).expand(3))
    near(g, 4 * force(x.detach(), y, kernel=RBF(1.0), backend=backend))


def layouts(t):
    """The same numbers among NaNs, by columns, and behind an offset."""
    wide = torch.full((2 * t.shape[0], 3 * t.shape[1]), float("nan"), dtype=t.dtype, device=t.device)
    wide[::2, ::3] = t
    return wide[::2, ::3], t.T.contiguous().T, torch.cat([torch.full_like(t[:1], float("nan")), t])[1:]


def test_any_layout(backend):
    x, y, v = points(9, 6, 5, torch.float32)
    kernel = RBF(1.0)
    require_pairwise(backend, x, y, v, kernel=kernel, energy=False)
    inputs = (kernel, WEIGHTS, True, True)

    def check_both(a, b, c):
        truth = pairwise_reference(a.double(), b.double(), c.double(), *inputs)
        yardstick = pairwise_reference(a.contiguous(), b.contiguous(), c.contiguous(), *inputs)
        scale = oracle.pairwise_scales(a, b, c, kernel, WEIGHTS)
        E = energy(a, b, kernel=kernel, weights=WEIGHTS, backend=backend)
        check(E, truth[0], yardstick[0], scale[0], torch.float32)
        check(force(a, b, c, kernel=kernel, weights=WEIGHTS, backend=backend), truth[1], yardstick[1], scale[1])

    for a, b, c in itertools.product(layouts(x), layouts(y), layouts(v)):
        check_both(a, b, c)
    check_both(x, y[:1].expand(6, 5), v[:, :1].expand(9, 5))
    check_both(x[1:7], x[3:], v[2:8])  # overlapping


def test_twice_the_same_bits(backend, two_threads):
    x, y, v = points(200, 300, 7, torch.float32)
    require_pairwise(backend, x, y, kernel=RBF())

    def bits():
        leaf = x.clone().requires_grad_()
        E = energy(leaf, y, kernel=RBF(), backend=backend)
        return [E, *torch.autograd.grad(E, leaf), force(x, y, v, kernel=RBF(), backend=backend)]

    for first, second in zip(bits(), bits(), strict=True):
        assert torch.equal(first, second)


@given(
    n=st.integers(1, 9),
    m=st.integers(0, 9),
    dim=st.integers(1, 12),
    book=st.sampled_from(KERNELS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    spread=st.sampled_from([1e-2, 1.0, 30.0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_small_cloud_is_its_double_loop(backend, n, m, dim, book, dtype, spread, seed):
    x, y = (spread * normal(n + m, dim, seed=seed)).to(dtype).split([n, m])
    y = y if m else None
    kernel = book.build()
    require_pairwise(backend, x, y, kernel=kernel)
    E = energy(x, y, kernel=kernel, weights=WEIGHTS, backend=backend)
    none = torch.zeros(0, dim)
    truth, *_ = pair_sum(energy_pairs(n, m, WEIGHTS), x, none if y is None else y, book)
    F = force(x, y, kernel=kernel, weights=WEIGHTS, backend=backend)
    loop = torch.from_numpy(force_loop(x.double(), None if y is None else y.double(), None, book, WEIGHTS))
    scale_E, scale_F = oracle.pairwise_scales(x, y, None, kernel, WEIGHTS)
    allowed, tiny = max(2 * torch.finfo(F.dtype).eps, oracle.EXACT), torch.finfo(F.dtype).tiny
    underflow = tiny * (n + m) ** 2 * (1 + x.double().norm(dim=1).max().item())
    assert abs(E.item() - truth) <= allowed * scale_E + underflow
    assert ((F.double().cpu() - loop).abs() <= allowed * scale_F + underflow).all()


# What the inputs must be


def test_half_precision_meets_float32():
    x, y = as_cloud(x=torch.ones(2, 3), y=torch.ones(2, 3, dtype=torch.bfloat16))
    assert x.dtype == y.dtype == torch.float32
    x, y = as_cloud(x=torch.ones(2, 3, dtype=torch.float16), y=torch.ones(2, 3, dtype=torch.bfloat16))
    assert x.dtype == y.dtype == torch.float32
    x, y = as_cloud(x=torch.ones(2, 3, dtype=torch.float16), y=None)
    assert x.dtype == torch.float16 and y is None


good = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([[1.0, 2.0]], TypeError, r"b: got list; accepted: a torch.Tensor \[N, D\]"),
        (1.0, TypeError, "b: got float"),
        (good.long(), TypeError, r"b: got dtype torch.int64; accepted: floating point; convert with b.float\(\)"),
        (good.bool(), TypeError, "b: got dtype torch.bool"),
        (good.to(torch.float8_e5m2), TypeError, "b: got dtype torch.float8_e5m2; accepted: 16 bits or more"),
        (good.double(), TypeError, "b: got dtype torch.float64, but a is torch.float32"),
        (good[0], ValueError, r"b: got shape \(2,\); accepted: \[N, D\]; reshape with b.reshape"),
        (good[0, 0], ValueError, r"b: got shape \(\); accepted: \[N, D\]"),
        (good[:0], ValueError, r"b: got shape \(0, 2\); accepted: at least one point of one dimension"),
        (good[:, :0], ValueError, r"b: got shape \(4, 0\)"),
        (good[:, :1], ValueError, r"b: got shape \(4, 1\), but a \(4, 2\); they may differ only in N"),
        (good[None], ValueError, r"b: got shape \(1, 4, 2\), but a \(4, 2\)"),
        (good.to("meta"), ValueError, "b: is on meta, but a on cpu; move one of them"),
    ],
)
def test_clouds_must_agree(bad, error, message):
    with pytest.raises(error, match=message):
        as_cloud(a=good, b=bad)


def test_the_first_cloud_may_not_be_missing():
    with pytest.raises(TypeError, match="x: got NoneType; accepted"):
        energy(None, kernel=RBF(1.0))
    with pytest.raises(TypeError, match="x: got list"):
        force([1.0], kernel=RBF(1.0))


def test_v_has_the_shape_of_x():
    with pytest.raises(ValueError, match=r"v: got shape \(3, 2\); accepted: x's shape \(4, 2\)"):
        force(good, v=good[:3], kernel=RBF(1.0))
