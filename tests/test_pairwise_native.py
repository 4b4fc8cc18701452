"""The C++ backend of `pairwise`: every vector unit, any number of threads, its schema, batches, weights of points."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from infovae_fast import IMQ, RBF, RationalQuadratic, backends, mmd, pairwise, stein_direction, wae_imq
from infovae_fast.radial import paper_pixelcnn
from tests.oracle import check, near, pairwise_scales

pytestmark = pytest.mark.skipif(backends.native_missing() is not None, reason=str(backends.native_missing()))

KERNELS = [
    RBF(),
    RBF([0.5, 1.0, 3.0]),
    IMQ(0.8),
    wae_imq(4),
    RationalQuadratic(1.5, 0.5),
    RationalQuadratic(1.5, 3.3),
    RationalQuadratic([1.5, 3.0], 1e6),
]
WEIGHTS = (0.7, -0.4, 0.3)


def native(
    x,
    y=None,
    v=None,
    a=None,
    b=None,
    kernel=KERNELS[0],
    energy=True,
    force=(True, False),
    potentials=False,
    weights=WEIGHTS,
):
    scales = kernel.at(x.shape[-1]).scales()
    return torch.ops.infovae_fast.pairwise(
        x, y, v, a, b, isinstance(kernel, RBF), [float(s) for s, _ in scales], None, [w for _, w in scales],
        float(getattr(kernel, "alpha", 1.0)), list(weights), energy, *force, potentials,
    )  # fmt: skip


def clouds(n, m, d, dtype=torch.float32):
    torch.manual_seed(n + 7 * m + 31 * d)
    return torch.randn(n, d, dtype=dtype) + 3, torch.randn(m, d, dtype=dtype) * 1.5 + 3, torch.randn(n, d, dtype=dtype)


def holds(out, alone, inputs, weights=WEIGHTS):
    """The accuracy rule for energy and forces on x, and for the energy without them; `near` in float64, whose truth it
    would be."""
    x, y, v, kernel = inputs

    def reference(x, y, v):
        return pairwise.pairwise_reference(x, y, v, kernel, weights, True, True)

    truth = reference(*(None if t is None else t.double() for t in (x, y, v)))
    if x.dtype == torch.float64:
        for found, k in ((out[0], 0), (out[1], 1), (alone, 0)):
            near(found, truth[k])
        return
    yardstick, scale = reference(x, y, v), pairwise_scales(x, y, v, kernel, weights)
    for found, k in ((out[0], 0), (out[1], 1), (alone, 0)):
        check(found, truth[k], yardstick[k], scale[k], x.dtype)


def sweep(unit):
    for d in (5, 13, 40, 132) if unit == "zen4" else (1, 2, 3, 7, 10, 13, 16, 17, 40, 130):  # what it has for itself
        for n, m in ((1, 1), (2, 3), (17, 70), (300, 257), (577, 70)):
            if n > 500 and d not in (3, 13):
                continue  # where pairs of one cloud are visited once
            for kernel in KERNELS:
                for dtype in (torch.float32, torch.float64) if d in (3, 40) and n < 500 else (torch.float32,):
                    x, y, v = clouds(n, m, d, dtype)
                    for other, velocity in ((y, None), (None, v), (y, v)):
                        alone = native(x, other, None, kernel=kernel, force=(False, False))
                        holds(native(x, other, velocity, kernel=kernel), alone[0], (x, other, velocity, kernel))


def no_nan_is_lost():
    """What NaN carries in its lower bits must not become a number: R's NA is such a one."""
    for bits in (0x7FC00000, 0x7FC00001, 0x7F800001):
        x, y, _ = clouds(20, 17, 5)
        x.view(torch.int32)[3, 2] = bits
        for kernel in KERNELS:
            energy, force, *_ = native(x, y, kernel=kernel)
            assert energy.isnan() and force[3].isnan().all()


@pytest.mark.parametrize("unit", ["zen4", "avx512", "avx2", "baseline"])
def test_every_vector_unit_meets_the_rule(unit):
    """In a process of its own, held to the unit; a machine without it runs the best it has below that."""
    environment = os.environ | {"INFOVAE_FAST_VECTOR_UNIT": unit, "OMP_NUM_THREADS": "1"}
    code = f"""from tests.test_pairwise_native import no_nan_is_lost, sweep
sweep({unit!r})
no_nan_is_lost()
from infovae_fast import _C
print(_C.build_info()["vector unit here"])"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != unit:
        pytest.skip(f"this processor has no {unit}; {done.stdout.strip()} passed in its place")


def test_results_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        for d in (5, 40):
            x, y, _ = clouds(1500, 1100, d)
            results = []
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                results.append(native(x, y, force=(True, True)))
            assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_fewer_threads_than_asked_for_do_it_all():
    """OpenMP gives a program no more than its limit, whatever torch has been told."""
    code = """import torch
from tests.test_pairwise_native import clouds, native
x, y, _ = clouds(1500, 300, 10)
wanted = native(x, y)
torch.set_num_threads(4)
assert all(torch.equal(a, b) for a, b in zip(wanted, native(x, y), strict=True))
def some(_):
    assert all(torch.equal(a, b) for a, b in zip(wanted, native(x, y), strict=True))
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(3) as pool:
    list(pool.map(some, range(12)))"""
    for limit in ("1", "3"):
        environment = os.environ | {"OMP_THREAD_LIMIT": limit}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr


def test_both_gradients_and_potentials_with_weights_of_the_points():
    """E = sum w_ij a_i a_j phi_ij: its derivatives to the points and the weights, against autograd of the formula."""
    for d in (3, 40):
        for kernel in KERNELS:
            x, y, _ = clouds(37, 90, d, torch.float64)
            a, b = torch.rand(37, dtype=torch.float64), torch.rand(90, dtype=torch.float64) - 0.3
            leaves = [t.requires_grad_() for t in (x, y, a, b)]
            z, weight = torch.cat([x, y]), torch.cat([a, b])
            w = torch.full((127, 127), WEIGHTS[1], dtype=torch.float64)
            w[:37, :37], w[37:, 37:] = WEIGHTS[0], WEIGHTS[2]
            w = w.masked_fill(torch.eye(127, dtype=torch.bool), 0)
            phi = kernel.at(d).phi((z[:, None] - z).square().sum(-1))
            energy = (w * phi * weight[:, None] * weight).sum()
            wanted = torch.autograd.grad(energy, leaves)
            with torch.no_grad():
                out = native(x, y, None, a, b, kernel, force=(True, True), potentials=True)
            assert out[0].item() == pytest.approx(energy.item(), rel=1e-12)
            for got, exact in zip(out[1:], wanted, strict=True):
                assert torch.allclose(2 * got, exact, rtol=1e-11, atol=1e-12 * exact.abs().max())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("d", [3, 40])
def test_v_counts_where_pairs_of_x_weigh_nothing(d, kernel):
    x, y, v = clouds(40, 20, d)
    got, yardstick, truth = (
        pairwise.force(*tensors, kernel=kernel, weights=(0.0, -0.3, 1.0), backend=backend)
        for tensors, backend in (
            ((x, y, v), "cpp"),
            ((x, y, v), "reference"),
            ((x.double(), y.double(), v.double()), "reference"),
        )
    )
    assert (got - truth).abs().max() <= 2 * (yardstick - truth).abs().max() + 1e-6 * truth.abs().max()


def test_batches_are_clouds_of_their_own():
    x, y, _ = clouds(6 * 20, 6 * 15, 4)
    out = native(x.view(2, 3, 20, 4), y.view(2, 3, 15, 4), force=(True, True))
    assert out[0].shape == (2, 3) and out[1].shape == (2, 3, 20, 4) and out[2].shape == (2, 3, 15, 4)
    one = native(x.view(6, 20, 4)[4], y.view(6, 15, 4)[4], force=(True, True))
    assert all(torch.equal(out[k].flatten(0, 1)[4], one[k]) for k in range(3))


def test_far_pairs_are_as_good_as_nothing():
    """Where phi underflows each pair counts as the smallest normal number."""
    x = torch.tensor([[0.0], [1e3]])
    out = native(x, kernel=RBF(1.0))
    assert 0 <= out[0].item() <= 2 * torch.finfo(torch.float32).tiny
    assert out[1].abs().max() <= 2e3 * torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("dim", [10, 80])
def test_values_keep_their_digits_where_distances_are_alike(dim):
    values, errors = [], []
    for seed in range(8):
        torch.manual_seed(seed)
        x, y = torch.randn(2, 1000, dim)
        values.append(mmd(x.double(), y.double(), wae_imq(dim)).item())
        errors.append(mmd(x, y, wae_imq(dim)).item() - values[-1])
    values, errors = torch.tensor(values), torch.tensor(errors)
    # Where phi itself is summed in float32 it is 2e-6 and 6e-6.
    assert errors.square().mean().sqrt() < (1e-6 if dim == 10 else 2e-6) * values.std()


@pytest.mark.parametrize("n", [30, 520])
def test_nan_stays_visible(n):
    for d in (3, 40):
        for kernel in KERNELS:
            for wrong in (torch.nan, torch.inf):
                x, y, v = clouds(n, 20, d)
                x[7, 1] = wrong
                out = native(x, y, kernel=kernel)
                assert out[0].isnan() and out[1].isnan().all()
                x[7, 1], v[7, 1] = 0, wrong
                assert not native(x, y, v, kernel=kernel)[1].isfinite().all(1).any()


@pytest.mark.parametrize("kernel", [RBF, lambda b: RBF([b, 2 * b]), IMQ, lambda b: RationalQuadratic(b, 0.5)])
def test_pairs_visited_once_and_twice_give_the_same_forces(kernel):
    """Once: of 512 points or more whose potentials nobody asks for."""
    from infovae_fast._C import build_info

    for d in (4, 10, 80):
        x, y, v = clouds(700, 600, d)
        one = kernel(2 * d**0.5)
        for b in (None, torch.rand(600), torch.full((600,), 1e4), torch.full((600,), torch.nan)):
            for velocity in (None, v) if kernel is RBF else (None,):
                arguments = {"kernel": one, "b": b, "force": (True, velocity is None)}
                once, twice = native(x, y, velocity, **arguments), native(x, y, velocity, **arguments, potentials=True)
                if b is not None and b.isnan().any():
                    assert once[0].isnan() and once[1].isnan().all()
                    continue
                assert once[0].item() == pytest.approx(twice[0].item(), rel=1e-6)
                for k in (1, 2) if velocity is None else (1,):
                    assert (once[k] - twice[k]).abs().max() < 1e-6 * twice[k].abs().max()
                if b is None and build_info()["vector unit here"] in ("zen4", "avx512"):
                    assert not torch.equal(once[1], twice[1])


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1.0])
def test_forces_far_below_or_above_others_keep_their_digits(scale):
    """Of points that are all but one, and of a cloud whose pairs weigh far less or far more than others."""
    x, y, v = clouds(600, 520, 10)
    for weights, velocity in (((0.7, -0.4, 0.3), None), ((1.0, 0.0, 1e-12), None), ((1e-12, 1.0, 0.0), v)):
        points = [(t - 3) * scale for t in (x, y)] + [velocity]
        arguments = {"weights": weights, "force": (True, velocity is None)}
        out = native(*points, **arguments)
        truth = native(*(None if t is None else t.double() for t in points), **arguments)
        for k in (1, 2) if velocity is None else (1,):
            assert (out[k] - truth[k]).abs().max() <= 3e-6 * truth[k].abs().max()


@pytest.mark.parametrize("bandwidth", [0.3, 0.1, 1e3])
def test_small_forces_of_many_points_keep_their_digits(bandwidth):
    """Those of the usual pair vanish beside those of close ones, or all are alike."""
    x, y, _ = clouds(600, 30, 8)
    x[1::2] = x[::2] + 0.5
    for kernel in (RBF(bandwidth), IMQ(bandwidth), RationalQuadratic(bandwidth, alpha=9.0)):
        out, truth = native(x, y, kernel=kernel), native(x.double(), y.double(), kernel=kernel)
        error = (out[1] - truth[1]).abs().max()
        # Relative errors of phi grow as the exponent does.
        assert error < 5e-6 * max(1, 0.5 / bandwidth) ** 2 * truth[1].abs().max()


@pytest.mark.parametrize("force", [(False, False), (True, False), (True, True)])
def test_schema_and_fake(force):
    x, y, _ = clouds(9, 5, 3)
    args = (x, y, None, None, None, True, [1.0], None, [1.0], 1.0, list(WEIGHTS), True, *force, False)
    torch.library.opcheck(torch.ops.infovae_fast.pairwise.default, args)


@pytest.mark.parametrize("clouds_of", [(), (3,)])
def test_energy_and_its_derivatives_are_one_operator(clouds_of):
    """opcheck: schema, autograd registration, fake tensors and AOT autograd; and twice the forces and potentials."""
    torch.manual_seed(0)
    x, y, a, b = (torch.randn(*clouds_of, *shape) for shape in ((9, 3), (5, 3), (9,), (5,)))
    inputs = [t.requires_grad_() for t in (x, y, a, b)]
    args = (x, y, a, b, True, [1.0], None, [1.0], 1.0, list(WEIGHTS))
    torch.library.opcheck(torch.ops.infovae_fast.energy.default, args)
    value = torch.ops.infovae_fast.energy(*args)
    upstream = torch.randn(clouds_of, dtype=torch.float64)
    gradients = torch.autograd.grad(value, inputs, upstream)
    with torch.no_grad():
        out = native(x, y, None, a, b, RBF(1.0), force=(True, True), potentials=True)
    assert torch.equal(value, out[0])
    for gradient, half in zip(gradients, out[1:], strict=True):
        factor = (2 * upstream).float().reshape(clouds_of + (1,) * (half.ndim - len(clouds_of)))
        assert gradient.dtype == torch.float32 and torch.allclose(gradient, factor * half, rtol=1e-6)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("kernel", [None, *KERNELS], ids=range(len(KERNELS) + 1))
def test_the_usual_mmd_is_the_one_of_the_long_way(kernel, estimator, monkeypatch):
    for dtype in (torch.float32, torch.float64):
        inputs = [z.requires_grad_() for z in clouds(40, 30, 5, dtype)[:2]]

        def both(inputs=inputs):
            value = mmd(*inputs, kernel, estimator)
            return value, *torch.autograd.grad(3 * value, inputs)

        with monkeypatch.context() as patch:
            patch.setattr("infovae_fast.divergences.shortcut", lambda name: lambda *inputs: None)
            long_way = both()
            patch.undo()
            patch.setattr("infovae_fast.divergences.energy_of_clouds", None)
            usual = both()
        for got, wanted in zip(usual, long_way, strict=True):
            assert got.dtype == dtype and torch.equal(got, wanted)


@pytest.mark.parametrize("kernel", [None, *KERNELS], ids=range(len(KERNELS) + 1))
def test_the_usual_stein_direction_is_the_one_of_the_long_way(kernel, monkeypatch):
    for dtype in (torch.float32, torch.float64):
        z, _, score = clouds(40, 30, 5, dtype)
        for s in (None, score, score.T.contiguous().T):
            with monkeypatch.context() as patch:
                patch.setattr("infovae_fast.divergences.shortcut", lambda name: lambda *inputs: None)
                long_way = stein_direction(z, s, kernel)
                patch.undo()
                patch.setattr("infovae_fast.divergences.force", None)
                usual = stein_direction(z.clone().requires_grad_(), s, kernel)
            assert usual.dtype == dtype and not usual.requires_grad
            torch.testing.assert_close(usual, long_way, rtol=2 * torch.finfo(dtype).eps, atol=1e-9)


def test_the_usual_stein_direction_leaves_what_is_unusual_alone():
    from infovae_fast._C import usual_stein

    z, _, score = clouds(6, 5, 3)
    assert usual_stein(z, None, None, "auto") is not None and usual_stein(z[:1], None, None, "cpp") is not None
    for other in (torch.neg, score.double(), score[:5], score.tolist(), score * torch.nan):
        assert usual_stein(z, other, None, "auto") is None
    for backend in ("reference", None):
        assert usual_stein(z, score, None, backend) is None
    assert usual_stein(z, score, "median_rbf", "auto") is None and usual_stein(z.half(), None, None, "auto") is None


def test_a_trace_computes_and_views_keep_their_sign():
    x, y, _ = clouds(6, 5, 3)
    traced = torch.jit.trace(lambda a, b: mmd(a, b), (x, y))
    torch.testing.assert_close(traced(x + 1, y), mmd(x + 1, y))
    torch.testing.assert_close(mmd(torch._neg_view(x), y), mmd(-x, y))


def test_the_usual_mmd_leaves_what_is_unusual_alone():
    from infovae_fast._C import usual_mmd

    x, y, _ = clouds(6, 5, 3)
    assert usual_mmd(x, y, None, "biased", "auto") is not None
    unusual = [
        (x.tolist(), y), (x, y.tolist()), (x, y.double()), (x.half(), y.half()), (x.int(), y.int()), (x, y[:, :2]),
        (x[:1], y), (x, y[:1]), (x[0], y), (x[None], y[None]), (x[:, :0], y[:, :0]), (x.to("meta"), y),
        (x.to_sparse(), y), (x.as_subclass(type("Own", (torch.Tensor,), {})), y), (x * torch.nan, y),
    ]  # fmt: skip
    for a, b in unusual:
        assert usual_mmd(a, b, None, "unbiased", "auto") is None, (a, b)

    class Own(RBF):
        pass

    for kernel in ("median_rbf", paper_pixelcnn, RBF, RBF(torch.tensor(1.0)), Own(1.0)):
        assert usual_mmd(x, y, kernel, "biased", "auto") is None
    assert usual_mmd(x, y, None, "linear", "auto") is None
    for estimator, backend in (("biased", "reference"), ("biased", None), (None, "auto"), (b"biased", "auto")):
        assert usual_mmd(x, y, None, estimator, backend) is None
    with torch.autograd.forward_ad.dual_level():
        assert usual_mmd(torch.autograd.forward_ad.make_dual(x, x), y, None, "biased", "auto") is None
    inside = []
    torch.func.vmap(lambda z: inside.append(usual_mmd(x, y, None, "biased", "auto")) or z)(x)
    with FakeTensorMode():
        inside.append(usual_mmd(x, y, None, "biased", "auto"))
    assert inside == [None, None]


@pytest.mark.parametrize("w", [1e-38, 1e-12, 1e12])
def test_forces_with_v_beside_a_weight_of_any_size(w):
    x, _, v = clouds(20, 0, 5)
    options = {"kernel": RBF(10.0), "weights": (w, 0.0, 0.0)}
    found, alone = native(x, None, v, **options), native(x, **options)[0]
    holds(found, alone, (x, None, v, options["kernel"]), options["weights"])


def test_a_point_alone_in_its_cloud_feels_no_force_of_it():
    x, y, _ = clouds(1, 130, 10)
    assert (native(x, y, weights=(1.0, 0.0, 1.0))[1] == 0).all()


@pytest.mark.parametrize("kernel", [RBF(1.5), IMQ(1.5), RationalQuadratic(1.5, 0.5)], ids=str)
def test_two_groups_far_apart_keep_their_digits(kernel):
    x, y, _ = clouds(40, 30, 7, torch.float64)
    found = native(torch.cat([x, y + 1e8]), kernel=kernel, weights=(1.0, 0.0, 0.0))
    alone = [native(z, kernel=kernel, weights=(1.0, 0.0, 0.0)) for z in (x, y)]
    between = 2 * 40 * 30 * kernel.phi(torch.tensor(7e16, dtype=torch.float64))
    assert abs(found[0] - between - alone[0][0] - alone[1][0]) <= 1e-6 * found[0]
    assert (found[1] - torch.cat([alone[0][1], alone[1][1]])).abs().max() <= 1e-6 * found[1].abs().max()


def test_refusals():
    x, y, v = clouds(9, 5, 3)
    with pytest.raises(TypeError, match="accepted: float32, float64"):
        native(x.half())
    with pytest.raises(TypeError, match="got Double beside Float"):
        native(x, y.double())
    with pytest.raises(ValueError, match=r"y: got shape \[5, 2\] beside x \[9, 3\]; accepted: \[5, 3\]"):
        native(x, y[:, :2])
    for cloud, bad in ((x, y[None]), (torch.zeros(2, 5, 3), y), (torch.zeros(2, 2, 5, 3), y), (x, y[0])):
        with pytest.raises(ValueError, match="y: got shape"):
            native(cloud, bad)
    with pytest.raises(ValueError, match="v: got shape"):
        native(x, y, v.mT)
    length = torch.tensor(1.0)
    kernel = RBF(length)
    for wrong in (0.0, -1.0, torch.inf):
        length.fill_(wrong)
        with pytest.raises(ValueError, match=r"bandwidth: got .*; accepted: positive numbers whose squares"):
            mmd(x, y, kernel, backend="cpp")
    with pytest.raises(ValueError, match=r"accepted: \[..., N, D\]"):
        native(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="v belongs to the forces on x"):
        native(x, y, v, force=(True, True))


def test_second_derivatives_point_to_the_reference():
    x, y, _ = clouds(9, 5, 3)
    x.requires_grad_()
    (first,) = torch.autograd.grad(mmd(x, y, backend="cpp"), x, create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='reference' to differentiate twice"):
        torch.autograd.grad(first.sum(), x)


def test_what_came_from_above_is_not_constant_to_second_derivatives():
    x, y, _ = clouds(9, 5, 3)
    with pytest.raises(RuntimeError, match="to differentiate twice"):  # by differentiating a backward pass
        torch.autograd.functional.jvp(lambda z: mmd(z, y, backend="cpp"), x, torch.ones_like(x))
    x.requires_grad_()
    c = torch.tensor(2.0, requires_grad=True)
    (first,) = torch.autograd.grad(c * mmd(x, y, backend="cpp"), x, create_graph=True)
    with pytest.raises(RuntimeError, match="to differentiate twice"):
        torch.autograd.grad(first.square().sum(), c)


def test_hooks_and_modes_see_the_backward_pass():
    x, y, _ = clouds(9, 5, 3)
    x.requires_grad_()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or len(packed) - 1, lambda k: packed[k]):
        value = mmd(x, y, backend="cpp")
    seen = []

    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Log():
        (logged,) = torch.autograd.grad(value, x)
    assert [t.shape for t in packed] == [x.shape] and "aten.mul.Tensor" in seen
    assert torch.equal(logged, torch.autograd.grad(mmd(x, y, backend="cpp"), x)[0])


def test_backward_twice_and_to_some_of_the_inputs():
    x, y, _ = (z.requires_grad_() for z in clouds(9, 5, 3))
    value = mmd(x, y, backend="cpp")
    both = torch.autograd.grad(value, (x, y), retain_graph=True)
    assert torch.equal(torch.autograd.grad(value, y, retain_graph=True)[0], both[1])
    assert torch.equal(torch.autograd.grad(2 * value, x)[0], 2 * both[0])
    with pytest.raises(RuntimeError, match="a second time"):
        value.backward()


@pytest.mark.skipif(torch.__version__ < "2.7", reason="compiled autograd knows the node from PyTorch 2.7 on")
@pytest.mark.parametrize("weighted", [False, True])
def test_compiled_autograd_sees_the_derivatives(weighted):
    x, y, _ = (z.requires_grad_() for z in clouds(9, 5, 3))
    w = torch.rand(9) if weighted else None
    wanted = torch.autograd.grad(3 * mmd(x, y, x_weights=w, backend="cpp"), (x, y))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        (3 * mmd(x, y, x_weights=w, backend="cpp")).backward()
    assert torch.equal(x.grad, wanted[0]) and torch.equal(y.grad, wanted[1])
    value = mmd(x, y, backend="cpp")
    value.backward()
    with (
        torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")),
        pytest.raises(RuntimeError, match="a second time"),
    ):
        value.backward()


def test_transforms_are_refused_where_no_caller_asks():
    x, y, _ = clouds(9, 5, 3)

    def value(x):
        return torch.ops.infovae_fast.energy(x, y, None, None, True, [1.0], None, [1.0], 1.0, list(WEIGHTS))

    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(value)(x)
    for needs_gradient in (False, True):
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode derivatives"):
            dual = torch.autograd.forward_ad.make_dual(x.requires_grad_(needs_gradient), torch.ones_like(x))
            value(dual)


def test_forward_mode_is_left_to_the_reference():
    x, y, _ = clouds(9, 5, 3)
    with torch.autograd.forward_ad.dual_level():
        value = mmd(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), y)
        assert torch.autograd.forward_ad.unpack_dual(value).tangent is not None


def test_kernels_of_one_s_own_are_the_reference_s():
    class Own(RBF):
        def _phi(self, d2, b):
            return 1 / (1 + d2 / b)

    x, y, _ = clouds(6, 5, 3, torch.float64)
    wanted = mmd(x, y, Own(2.0), backend="reference")
    assert torch.equal(mmd(x, y, Own(2.0)), wanted) and not torch.isclose(mmd(x, y, RBF(2.0)), wanted)
    with pytest.raises(RuntimeError, match="the kernel is a Own, which only the reference can evaluate"):
        mmd(x, y, Own(2.0), backend="cpp")


@pytest.mark.parametrize("dim", [10, 20, 80])
def test_few_heavy_points_and_outliers_keep_their_digits(dim):
    """Where phi of some pairs is many orders below that of most."""
    torch.manual_seed(0)
    x = torch.randn(600, dim)
    x[:20] *= 6
    a = (torch.arange(600) < 20).float()
    for weights in (a, torch.where(a > 0, a, 1e-6)):
        truth = pairwise.energy(x.double(), kernel=RBF(), x_weights=weights.double(), backend="reference")
        found = pairwise.energy(x, kernel=RBF(), x_weights=weights)
        assert abs(found / truth - 1) < 1e-5
    x = torch.randn(500, dim)
    x[0] *= 40 / x[0].norm()
    P = native(x, potentials=True, kernel=RBF())[3]
    d2 = (x[0].double() - x[1:].double()).square().sum(1)
    truth = WEIGHTS[0] * torch.exp(-d2 / (2 * dim)).sum()
    assert abs(P[0] / truth - 1) < 1e-4  # 1e-7 of an exponent of some 80
    assert native(x, kernel=RBF())[1][0].abs().max() < 100 * truth


@pytest.mark.parametrize(("dim", "opposite"), [(1, False), (3, False), (20, False), (21, True)])
def test_close_points_of_a_wide_cloud(dim, opposite):
    """Distances that float32 products of coordinates would lose, of clouds thousands of bandwidths apart."""
    torch.manual_seed(0)
    signs = torch.tensor([1.0, -1.0, 0.0]).repeat(dim // 3) if opposite else torch.ones(dim)  # sums of two are 0 then
    x = 3000.3 * signs + torch.randn(20, dim) * torch.tensor([0.0, 1.0]).repeat(10)[:, None]
    y = -x - 9 * signs
    for kernel in (RBF(1.0), RBF([1.0, 0.1]), IMQ([1.0, 0.1, 3.0, 0.3])):
        leaf = x.clone().requires_grad_()
        value, wanted = (mmd(leaf, y, kernel, "biased", backend=name) for name in ("cpp", "reference"))
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=0)
        found, truth = (torch.autograd.grad(v, leaf)[0] for v in (value, wanted))
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6 * truth.abs().max().item())


@pytest.mark.parametrize("dim", [5, 10, 80])
@pytest.mark.parametrize("n", [300, 700, 769])
def test_groups_near_to_and_far_from_the_others(n, dim):
    """Forces are sums of products of pairs of sources where phi is usually of the size of coordinates: for 64 targets,
    and where pairs are visited once 64 sources, at a time."""
    torch.manual_seed(n + dim)
    x, y = torch.randn(n, dim), torch.randn(320, dim)
    x[64:128] += 0.7  # near, but with sums of their own
    x[192:256:8] *= 2.5 * dim**0.5 / x[192:256:8].norm(dim=1, keepdim=True)
    x[n - 1] *= 3 * dim**0.5 / x[n - 1].norm()
    for other in (None, y):
        out, truth = (native(t, None if other is None else other.to(t)) for t in (x, x.double()))
        alone = native(x, other, force=(False, False))[0]
        holds(out, alone, (x, other, None, RBF()))
        assert (out[1] - truth[1]).abs().max() <= 3e-6 * truth[1].abs().max()


@pytest.mark.parametrize(("dim", "wide"), [(6, 3), (200, 3), (200, 10)])
def test_two_far_sources_side_by_side(dim, wide):
    """Of a product of both, where pairs of sources are multiplied, phi would be the last digits."""
    torch.manual_seed(dim)
    kernel, weights = RBF(wide * dim**0.5), (1.0, -1.0, 1.0)
    for n, m in ((63, 65), (65, 63)):
        x, y = torch.randn(n, dim), 0.3 * torch.randn(m, dim)
        y[30:32, 1] = 5.5 * wide * dim**0.5
        arguments = {"kernel": kernel, "weights": weights}
        alone = native(x, y, force=(False, False), **arguments)[0]
        holds(native(x, y, **arguments), alone, (x, y, None, kernel), weights)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 0.0])
def test_a_small_coordinate_keeps_its_digits(size):
    torch.manual_seed(0)
    x, y = torch.randn(600, 10), torch.randn(300, 10)
    for z in (x, y):
        z[:, 3] *= size
    out, truth = native(x, y)[1], native(x.double(), y.double())[1]
    assert ((out - truth).abs().amax(0) <= 3e-6 * truth.abs().amax(0)).all()


@pytest.mark.parametrize("far", [3.0, 6.0, 10.0, 20.0, 60.0, 900.0])
@pytest.mark.parametrize("dim", [2, 8, 64])
def test_clusters_some_bandwidths_apart(dim, far):
    """Two samples of almost the same clusters: value and gradient are small differences. An exponent is off by 1e-5 at
    most, and by that part the terms of their sums."""
    torch.manual_seed(1)
    centres = torch.nn.functional.normalize(torch.randn(5, dim)) * far
    x, y = (centres[torch.randint(5, (500,))] + (0.7 * torch.randn(500, dim) + s) / dim**0.5 for s in (0.0, 0.1))
    for kernel in (RBF(1.0), IMQ(1.0)):
        found, truth = [], []
        z = torch.cat([x, y]).double()
        apart = torch.cdist(z, z)
        terms = (2 * kernel.dphi(apart.square()).abs() * apart).sum(1).max() * 2 / (500 * 499)
        for results, dtype in ((found, torch.float32), (truth, torch.float64)):
            leaf = x.to(dtype).requires_grad_()
            value = mmd(leaf, y.to(dtype), kernel, backend="cpp")
            results += [value.detach().double(), torch.autograd.grad(value, leaf)[0].double()]
        assert abs(found[0] - truth[0]) < 1e-5 * kernel.phi(apart.square()).sum() / (500 * 499)
        assert (found[1] - truth[1]).abs().max() < 1e-5 * terms


@pytest.mark.parametrize("dim", [2, 4, 5, 8, 40])
def test_close_points_where_a_later_scale_is_small(dim):
    torch.manual_seed(0)
    x = torch.randn(200, dim) * 10
    y = x + 1e-4 * torch.randn(200, dim)
    for kernel in (RBF([20, 0.01]), IMQ([20, 0.01]), RationalQuadratic([20, 0.01], alpha=2), IMQ([5, 2, 3, 1, 0.1])):
        value, truth = mmd(x, y, kernel), mmd(x.double(), y.double(), kernel, backend="reference")
        assert abs(value - truth) < 2e-5 * 2 * kernel.phi0 / 200


def test_what_it_cannot_do_is_said():
    x, y, _ = clouds(9, 5, 3)
    learned = RBF(torch.tensor(1.0, requires_grad=True))
    with pytest.raises(RuntimeError, match="the bandwidth needs a gradient, which only the reference gives"):
        mmd(x, y, learned, backend="cpp")
    mmd(x, y, learned).backward()
    assert learned.bandwidth.grad is not None
    with pytest.raises(RuntimeError, match="a force needs a gradient"):
        pairwise.force(x.requires_grad_(), kernel=RBF(1.0), backend="cpp")
    batch = torch.randn(4, 9, 3)
    assert torch.func.vmap(lambda z: pairwise.energy(z, kernel=RBF(1.0)))(batch).shape == (4,)


def test_a_power_of_distances_that_overflow():
    x = torch.tensor([[0.0], [1e150], [1.0]], dtype=torch.float64)
    for kernel in (RationalQuadratic(1.0, 0.5), RationalQuadratic(1e-10, 2.5)):
        near(*(pairwise.energy(x, kernel=kernel, backend=backend) for backend in ("cpp", "reference")))
