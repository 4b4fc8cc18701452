"""The CUDA kernels of `pairwise`: run through tests/simt, and compiled by nvcc for GPUs that are not here."""

import itertools
import re

import pytest
import torch

from infovae_fast import IMQ, RBF, RationalQuadratic, mmd, wae_imq
from infovae_fast.backends import native_missing
from infovae_fast.pairwise import cuda_limits, force, leaf_scales, pairwise_reference
from tests.oracle import check, near, pairwise_scales
from tests.simt import ARCHITECTURES, ptxas
from tests.simt.pairwise import SOURCES, leaf

KERNELS = [
    RBF(1.3),
    RBF([0.5, 1.0, 3.0]),
    IMQ(0.8),
    wae_imq(4),
    RationalQuadratic(1.5, 0.5),
    RationalQuadratic(1.5, 3.3),
    RationalQuadratic([1.5, 3.0], 1e6),
]
WEIGHTS = (0.7, -0.4, 0.3)
BAR = 3e-6  # of float32, as in tests/test_mmd.py: a gradient's largest error by its largest component


def clouds(n, m, d, dtype=torch.float32, batch=()):
    torch.manual_seed(n + 7 * m + 31 * d)
    return [torch.randn(*batch, k, d, dtype=dtype) * s + 3 for k, s in ((n, 1), (m, 1.5), (n, 1))]


def run(
    x, y=None, v=None, a=None, b=None, kernel=KERNELS[0], energy=True, force=(True, False), potentials=False, **more
):
    """On a GPU where there is one and the extension is built for it."""
    settings = (*leaf_scales(kernel.at(x.shape[-1])), WEIGHTS, energy, *force, potentials)
    if not torch.cuda.is_available() or native_missing("cuda") is not None:
        return leaf(x, y, v, a, b, *settings, **more)
    inputs = [None if t is None else t.cuda() for t in (x, y, v, a, b)]
    return tuple(t.cpu() for t in torch.ops.infovae_fast.pairwise(*inputs, *settings))


@pytest.mark.parametrize("kernel", KERNELS, ids=range(len(KERNELS)))
@pytest.mark.parametrize("d", [1, 2, 5, 10, 18, 19, 33, 64, 80, 96, 128])
def test_it_meets_the_rule(d, kernel):
    """From 19 coordinates on float32 goes to the tensor cores, with v where there is one RBF scale."""
    for n, m in ((1, 1), (31, 129), (140, 40)):
        for dtype in (torch.float32, torch.float64):
            x, y, v = clouds(n, m, d, dtype)
            for other, velocity in ((y, None), (None, v), (y, v)):
                if cuda_limits(x, other, velocity, kernel):
                    continue
                E, F, *_ = run(x, other, velocity, kernel=kernel)
                inputs = [None if t is None else t.double() for t in (x, other, velocity)]
                truth = pairwise_reference(*inputs, kernel, WEIGHTS, True, True)
                if dtype == torch.float64:
                    near(E, truth[0])
                    near(F, truth[1]) if n > 1 or other is not None else None
                    continue
                yardstick = pairwise_reference(x, other, velocity, kernel, WEIGHTS, True, True)
                scale = pairwise_scales(x, other, velocity, kernel, WEIGHTS)
                check(E, truth[0], yardstick[0], scale[0], dtype)
                check(F, truth[1], yardstick[1], scale[1])


def both_ways(*inputs, **options):
    """By CUDA and by the C++ of the CPU, which tests/test_pairwise_native.py holds to the definition."""
    pytest.importorskip("infovae_fast._C")
    x, y, v, a, b = (*inputs, *[None] * (5 - len(inputs)))
    kernel = options.get("kernel", KERNELS[0])
    flags = (options.get("energy", True), *options.get("force", (True, False)), options.get("potentials", False))
    settings = (*leaf_scales(kernel.at(x.shape[-1])), WEIGHTS)
    return run(*inputs, **options), torch.ops.infovae_fast.pairwise(x, y, v, a, b, *settings, *flags)


@pytest.mark.parametrize("kernel", KERNELS[:4], ids=range(4))
def test_every_combination_of_outputs_and_weights(kernel):
    x, y, _ = clouds(150, 260, 7, torch.float64)
    a, b = torch.rand(150).double(), torch.rand(260).double() - 0.3
    for energy, fx, fy, p, weighted in itertools.product([True, False], repeat=5):
        inputs = (x, y, None, a, b) if weighted else (x, y)
        for out, truth in zip(
            *both_ways(*inputs, kernel=kernel, energy=energy, force=(fx, fy), potentials=p), strict=True
        ):
            near(out, truth) if out.numel() else None
            assert out.shape == truth.shape


@pytest.mark.parametrize("kernel", KERNELS[:3], ids=range(3))
def test_few_coordinates_of_many_points_on_tensor_cores(kernel):
    for d in (7, 16):
        x, y, v = clouds(1030, 20, d)
        a = torch.rand(1030) - 0.3
        for inputs in ((x, y), (x, y, None, a), (x, y, v), (x, y, v, a)):
            if cuda_limits(*inputs[:3], kernel=kernel):
                continue
            for out, truth in zip(*both_ways(*inputs, kernel=kernel, potentials=True), strict=True):
                assert not out.numel() or (out - truth).abs().max() < BAR * truth.abs().max()


@pytest.mark.parametrize("kernel", KERNELS[:3], ids=range(3))
def test_every_combination_on_tensor_cores(kernel):
    x, y, _ = clouds(150, 260, 20)
    kernel = type(kernel)([3 * b for b in kernel.bandwidth], weights=kernel.weights)
    a, b = torch.rand(150), torch.rand(260) - 0.3
    for energy, fx, fy, p, weighted in itertools.product([True, False], repeat=5):
        inputs = (x, y, None, a, b) if weighted else (x, y)
        for out, truth in zip(
            *both_ways(*inputs, kernel=kernel, energy=energy, force=(fx, fy), potentials=p), strict=True
        ):
            assert out.shape == truth.shape
            assert not out.numel() or (out - truth).abs().max() < BAR * truth.abs().max()


def test_tensor_cores_hold_the_rule_far_from_the_bandwidth():
    """Where 16 bits alone would not: a far point, an offset, g of any size, and a target with one near source."""
    x, y, v = clouds(100, 150, 20)
    far = x.clone()
    far[7] += 1e4
    near_twin = torch.cat([x[:1] + 1e-3, y])
    for points, other, length in ((far, y, 5.0), (x + 1e4, y + 1e4, 5.0), (x, y, 0.6), (x, near_twin, 1.0)):
        kernel = RBF(length)
        for velocity in (None, v):
            E, F, *_ = run(points, other, velocity, kernel=kernel)
            truth = pairwise_reference(
                points.double(), other.double(), None if velocity is None else v.double(), kernel, WEIGHTS, True, True
            )
            yardstick = pairwise_reference(points, other, velocity, kernel, WEIGHTS, True, True)
            scale = pairwise_scales(points, other, velocity, kernel, WEIGHTS)
            check(E, truth[0], yardstick[0], scale[0], torch.float32)
            check(F, truth[1], yardstick[1], scale[1])
            rows = [k for k in range(100) if k != 7]
            if points is far:
                check(F[rows], truth[1][rows], yardstick[1][rows], scale[1][rows])


@pytest.mark.parametrize("d", [2, 10, 24])
@pytest.mark.parametrize("far", [300.0, 3e4])
def test_a_far_point_does_not_matter_to_the_others(d, far):
    """Whether it is in the sample that tells the centre (point 0 is) or not."""
    for which in (0, 1):
        x, y, _ = clouds(300, 300, d)
        x[which] += far
        F = run(x, y, kernel=RBF(d**0.5))[1]
        truth = pairwise_reference(x.double(), y.double(), None, RBF(d**0.5), WEIGHTS, False, True)[1]
        others = torch.arange(300) != which
        assert ((F - truth)[others].abs().max() <= BAR * truth.abs().max()).item(), (which, far)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [RBF(), RBF([4.0, 1.0, 0.25]), IMQ(), RationalQuadratic(1.5, 2.0)], ids=str)
def test_phi_is_one_at_most(kernel, dtype):
    """Two parts of the clouds are so far apart that rounding errors of t are larger than the t of close points."""
    for d, far in ((2, 1e4), (10, 3e3), (10, 1e5)):
        x, y, _ = clouds(96, 96, d, dtype)
        x[48:] += far
        y[48:] += far
        E, F, *_ = run(x, y, kernel=kernel)
        most = 96 * 95 * (abs(WEIGHTS[0]) + abs(WEIGHTS[2])) + 2 * 96**2 * abs(WEIGHTS[1])
        assert abs(E) <= kernel.phi0 * most and F.isfinite().all()


@pytest.mark.parametrize("kernel", [RBF(1.0), wae_imq(4), RationalQuadratic(1.5, 0.5)], ids=["one", "several", "power"])
def test_points_at_one_place(kernel):
    """Where nothing is far from the centre in units of anything, and a tile has room for more points."""
    lonely = torch.zeros(700, 20)
    lonely[5] = 1  # not in the sample that tells the centre
    for x, y in ((torch.full((100, 20), 0.1), None), (torch.ones(10, 20), torch.ones(10, 20)), (lonely, None)):
        E, F, *_ = run(x, y, kernel=kernel)
        truth = pairwise_reference(x.double(), None if y is None else y.double(), None, kernel, WEIGHTS, True, True)
        yardstick = pairwise_reference(x, y, None, kernel, WEIGHTS, True, True)
        scale = pairwise_scales(x, y, None, kernel, WEIGHTS)
        check(E, truth[0], yardstick[0], scale[0], torch.float32)
        check(F, truth[1], yardstick[1], scale[1])


def test_many_targets_a_lane():
    """From 8,192 points on; a part of them is compared."""
    for kernel in (RBF(1.3), IMQ(1.0)):
        x, y, _ = clouds(8200, 150, 3)
        out, truth = both_ways(x, y, kernel=kernel, force=(True, True), potentials=True)
        assert abs(out[0] / truth[0] - 1) < 1e-6
        for one, other in zip(out[1:], truth[1:], strict=True):
            assert (one - other).abs().max() < BAR * other.abs().max()


@pytest.mark.parametrize("d", [5, 20])
def test_the_bits_do_not_depend_on_the_order_of_threads_and_blocks(monkeypatch, d):
    x, y, v = clouds(300, 200, d)
    results = []
    for order in ("forward", "reverse", "shuffle:1", "shuffle:2"):
        monkeypatch.setenv("SIMT_ORDER", order)
        results.append(
            [*run(x, y, force=(True, True), potentials=True), *run(x, y, v), *run(x, y, force=(False, False))]
        )
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("y_force", [True, False])
def test_any_division_of_the_work_gives_the_same_on_tensor_cores(y_force):
    """Of a cloud without forces the blocks are others."""
    x, y, _ = clouds(300, 700, 20)
    settings = (*leaf_scales(RBF(4.0)), WEIGHTS, True, True, y_force, y_force)
    truth = leaf(x, y, None, None, None, *settings, processors=1)
    for processors in (2, 16, 400):
        for one, other in zip(leaf(x, y, None, None, None, *settings, processors=processors), truth, strict=True):
            assert one.shape == other.shape
            assert not one.numel() or (one - other).abs().max() < BAR * other.abs().max()


def test_any_division_of_the_work_gives_the_same():
    x, y, _ = clouds(300, 700, 5, torch.float64)
    a = torch.rand(300).double()
    truth = run(x, y, None, a, torch.ones(700).double(), force=(True, True), potentials=True, processors=1)
    for processors in (2, 16, 400):
        out = run(x, y, None, a, torch.ones(700).double(), force=(True, True), potentials=True, processors=processors)
        for one, other in zip(out, truth, strict=True):
            near(one, other)


@pytest.mark.parametrize(("d", "dtype"), [(4, torch.float64), (20, torch.float32)])
def test_a_batch_is_each_cloud(d, dtype):
    x, y, v = clouds(40, 30, d, dtype, batch=(2, 3))
    E, F, *_ = run(x, y, v)
    for i, j in itertools.product(range(2), range(3)):
        one = run(x[i, j], y[i, j], v[i, j])
        near(E[i, j], one[0])
        near(F[i, j], one[1])


def test_bandwidths_in_memory_are_the_same_bits():
    for d, b in itertools.product((4, 20), ([1.3], [0.5, 2.0])):
        x, y, _ = clouds(40, 30, d)
        given, in_memory = run(x, y, kernel=RBF(b)), run(x, y, kernel=RBF(torch.tensor(b)))
        in_float32 = run(x, y, kernel=RBF(torch.tensor(b).tolist()))
        assert torch.equal(in_memory[1], in_float32[1])
        assert (given[1] - in_memory[1]).abs().max() <= 1e-5 * given[1].abs().max()


def test_nan_stays_visible():
    for kernel, d in itertools.product(KERNELS, (3, 20)):
        x, y, _ = clouds(150, 40, d)
        x[7, 1] = torch.nan
        E, F, *_ = run(x, y, kernel=kernel)
        assert E.isnan() and F.isnan().all()


def test_what_has_no_room_is_said():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    too_many = "got D={}, accepted: at most {}, for this dtype, kernel and v"
    four = [torch.randn(9, d, device=device) for d in (19, 129)]
    for x, v, kernel, most in (
        (four[0].double(), None, RBF(), 18),
        (four[0], four[0], RBF([1.0, 2.0]), 18),
        (four[0], four[0], IMQ(1.0), 18),
        (four[1], None, RBF(), 128),
    ):
        with pytest.raises(RuntimeError, match=too_many.format(x.shape[1], most)):
            force(x, None, v, kernel=kernel, backend="cuda")
    with pytest.raises(RuntimeError, match="got 33 scales, accepted: at most 32"):
        mmd(*torch.randn(2, 9, 3, device=device), RBF([1.0 + k for k in range(33)]), backend="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"18 coordinates .*, 32 scales and 65535 clouds"):
            run(torch.randn(4, 19).double())
        with pytest.raises(RuntimeError, match=r"18 coordinates .* weights of points\), 32 scales"):
            run(x := torch.randn(4, 19), None, x, x[:, 0])
        with pytest.raises(RuntimeError, match=r"18 coordinates .*, 32 scales and 65535 clouds"):
            run(torch.randn(4, 3), kernel=RBF([1.0 + k for k in range(400)]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("source", "count"), [(SOURCES[0], 28), (SOURCES[1], 38)])
def test_what_it_takes_of_a_gpu(source, count, architecture, tmp_path):
    """No kernel spills, but those on tensor cores: up to 32 registers that their loop over sources does not need."""
    said = ptxas(source, architecture, tmp_path)
    numbers = r"entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers"
    kernels = re.findall(numbers, said, re.DOTALL)
    assert len(kernels) == count, said
    for name, *found in kernels:
        stack, spilled, registers = map(int, found)
        most = 128 if "products_kernel" in name else 0
        assert max(stack, spilled) <= most and registers <= 255, (name, found)
