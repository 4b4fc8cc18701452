"""The backends of the discretised logistic mixture against its reference, which tests/test_likelihoods.py holds against
loops and many digits.

Errors are in units of what is to be summed, to first order in the terms of a bin's edges too: then small components of
the gradient count beside those of a scale of e^-30.
"""

import itertools
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import cache

import pytest
import torch

from infovae_fast import DiscretizedLogisticMixture, backends, logistic_mixture
from infovae_fast.backends import triton_missing
from infovae_fast.logistic_mixture import (
    conditional_mean,
    discretized_logistic_mixture_nll,
    logistic_mixture_reference,
    split_params,
)
from tests import oracle
from tests.conftest import ARCHITECTURES, launch_ahead
from tests.oracle import EXACT, check, require, require_compile

backend, one_thread = oracle.backend, oracle.one_thread
if triton_missing() is None:
    from infovae_fast.kernels import logistic_mixture as kernels

    SETTING = kernels.NUMBERS  # before the other tests' larger one

ROWS = {1: ("logits", "means", "scales"), 3: ("logits", *("means", "scales", "coefficients") * 3)}
needs_native = pytest.mark.skipif(backends.native_missing() is not None, reason=str(backends.native_missing()))
DTYPES = (torch.float32, torch.float64)


def problem(k, channels, levels, shape, extreme=False, seed=0):
    """params [n, P, ...] and x [n, C, ...]; extreme: log-scales of -30 .. 30, means far outside, huge logits."""
    rng = torch.Generator().manual_seed(seed)
    n, *spatial = shape
    table = torch.randn(n, len(ROWS[channels]), k, *spatial, generator=rng)
    if extreme:
        table[:, 0] *= 40
        table[:, 1::3] *= torch.where(torch.rand(table[:, 1::3].shape, generator=rng) < 0.1, 1000, 1)
        table[:, 2::3] = 60 * torch.rand(table[:, 2::3].shape, generator=rng) - 30
        table[:, 3::3] *= 5
    x = torch.randint(levels, (n, channels, *spatial), generator=rng) / (levels - 1)
    return table.flatten(1, 2).to(oracle.device), x.to(oracle.device)


def channels_last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def results(params, x, levels, backend):
    """nll and its gradient."""
    params = params.detach().requires_grad_()
    nll = discretized_logistic_mixture_nll(params, x, levels=levels, backend=backend)
    return nll.detach().cpu(), torch.autograd.grad(nll.sum(), params)[0].cpu()


def pixels(t):
    """[n, C, *S] -> [n S, C]."""
    return t.flatten(2).movedim(1, -1).flatten(0, 1) if t.ndim > 2 else t


def terms_of_slopes(params, x, levels, share):
    """What the slopes are summed of: to means share (sigmoid(-p) + sigmoid(m)) / s, to log-scales these times p and m.

    A sigmoid changes as its edge does; float64's second derivatives forget that where it is below 1e-16.
    """
    _, mu, log_s, coefficients = split_params(params)  # [pixels, C, k]
    y = 2 * x - 1
    means = torch.stack([conditional_mean(mu, coefficients, y[:, :c].T[..., None]) for c in range(x.shape[1])], 1)
    reach = (mu.abs() + torch.arange(1, x.shape[1] + 1)[:, None]) / log_s.exp()
    to_mean, to_log_s = torch.zeros_like(mu), torch.ones_like(mu)
    for side in (1, -1):
        edge = side * (y[..., None] + side / (levels - 1) - means) / log_s.exp()  # p, -m
        tail = torch.where(side * y[..., None] < 1, edge.neg().sigmoid() * (1 + edge.sigmoid() * reach), 0)
        to_mean, to_log_s = to_mean + tail / log_s.exp(), to_log_s + tail * edge.abs()
    return share.unsqueeze(1) * to_mean, share.unsqueeze(1) * to_log_s


@cache
def truth_and_scales(*case, extreme):
    """The reference in float64 by pixels, and what rounding is measured by, [pixels, 1] and [pixels, P]."""
    params, x = (pixels(t).double().cpu() for t in problem(*case, extreme=extreme))
    k, channels, levels, _ = case
    nll, gradient = results(params, x, levels, "reference")

    def one(p, v):
        return logistic_mixture_reference(p[None], v[None], levels)[0]

    hessian = torch.func.vmap(torch.func.hessian(one))(params, x).unflatten(1, (-1, k))  # [pixels, rows, k, P]
    size = params.abs().unflatten(1, (-1, k))  # of what logits, edges, 1/s and coefficients are made of
    size[:, 1::3] += torch.arange(1, channels + 1)[:, None]
    size[:, 2::3] = 1
    scale = (hessian.abs() @ size.flatten(1)[:, None, :, None]).squeeze(-1) + gradient.abs().unflatten(1, (-1, k))
    weight = params[:, :k].softmax(1)
    share = weight - gradient[:, :k]
    to_mean, to_log_s = terms_of_slopes(params, x, levels, share)
    log_s = params.abs().unflatten(1, (-1, k))[:, 2::3].sum(1)  # a summand of log P, of which the shares are made
    left_open = (1 - share) * log_s + (share * log_s).sum(1, keepdim=True) - share * log_s
    scale += gradient.abs().unflatten(1, (-1, k)) * left_open[:, None]
    scale[:, 0] += weight + share.abs() * (1 + left_open)
    scale[:, 1::3] += to_mean
    scale[:, 2::3] += to_log_s
    if channels == 3:  # 1 - tanh^2, times the slope of the mean that the coefficient moves
        scale[:, 3::3] += 2 * to_mean[:, [1, 2, 2]]
    value = 1 + nll.abs() + (gradient.abs() * (size.flatten(1) + params.abs())).sum(1)
    assert value.isfinite().all() and scale.isfinite().all()
    return nll, gradient, value[:, None], scale.flatten(1) + 1e-26  # what underflows has no digits


def holds(out, case, extreme, backend_dtype):
    """The rule of tests/oracle.py for out = (nll, gradient) by pixels; in float64, where it has no truth, `EXACT`."""
    k, channels, levels, _ = case
    *truth, value, to_params = truth_and_scales(*case, extreme=extreme)
    yardstick = results(*map(pixels, problem(*case, extreme=extreme)), levels, "reference")
    kinds = [("nll", slice(None), value)]
    kinds += [(name, slice(r * k, r * k + k), to_params[:, r * k : r * k + k]) for r, name in enumerate(ROWS[channels])]
    for name, columns, scale in kinds:
        o, t, y = (s[0][:, None] if name == "nll" else s[1][:, columns] for s in (out, truth, yardstick))
        assert o.dtype == backend_dtype and o.isfinite().all(), (name, case)
        if backend_dtype == torch.float64:
            assert ((o - t).abs() / scale).max() <= EXACT, (name, case)
        else:
            check((o.double() - t) / scale, torch.zeros_like(t), (y.double() - t) / scale, 1.0, torch.float32)


CASES = [  # k, channels, levels, shape: numbers of pixels that fill no vector, one, and several
    (k, channels, levels, shape)
    for (k, levels), channels, shape in zip(
        itertools.product((1, 5, 10), (2, 32, 256)),
        itertools.cycle((3, 1)),
        itertools.cycle(((70,), (3, 5, 7), (2, 33), (2, 4, 8), (1, 2, 3, 5))),
    )
] + [(10, 3, 256, (2, 7, 5)), (5, 1, 256, (40,)), (1, 1, 2, (3, 3))]


def sweep(name, cases=CASES, dtypes=DTYPES):
    """Every case in both layouts."""
    for case, extreme, dtype in itertools.product(cases, (False, True), dtypes):
        params, x = (t.to(dtype) for t in problem(*case, extreme=extreme))
        for layout in (torch.Tensor.contiguous, channels_last):
            p, v = layout(params), layout(x)
            nll, gradient = results(p, v, case[2], name)
            assert gradient.stride() == p.stride()
            one_by_one, _ = results(pixels(p).contiguous(), pixels(v), case[2], name)
            together = one_by_one.double().view(len(p), -1).sum(1).to(dtype)
            assert torch.allclose(nll, together, rtol=4 * torch.finfo(dtype).eps), (case, dtype)
            holds((one_by_one, pixels(gradient)), case, extreme, dtype)


def can_run(name):
    require("logistic_mixture", logistic_mixture.BACKENDS, name, *problem(*CASES[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=oracle.name_of)  # apart, as Triton compiles ten kernels for each
def test_it_meets_the_rule(backend, dtype):
    can_run(backend)
    if backend == "reference":
        pytest.skip("the truth")
    with initial_nans():
        sweep(backend, CASES if backend == "cpp" else [CASES[1], CASES[4], CASES[9]], [dtype])


def test_several_programs(monkeypatch):
    """Triton's blocks as they are on a GPU; the interpreter's are large."""
    monkeypatch.setattr(oracle, "device", oracle.device_of("triton"))
    can_run("triton")
    monkeypatch.setattr(kernels, "NUMBERS", SETTING)
    sweep("triton", [(10, 3, 256, (2, 3, 7))], [torch.float32])


@contextmanager
def initial_nans():
    """What is not written is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@needs_native
@pytest.mark.parametrize("unit", ["avx2", "baseline"])
def test_every_vector_unit_meets_the_rule(unit):
    """In a process of its own, held to the unit; a machine without it runs the best it has below that."""
    environment = os.environ | {"INFOVAE_FAST_VECTOR_UNIT": unit, "OMP_NUM_THREADS": "1"}
    code = """from tests.test_logistic_mixture import *
with initial_nans():
    sweep("cpp", [CASES[k] for k in (1, 4, 10, 11)] + [(10, 3, 256, (2, 17))])
from infovae_fast import _C
print(_C.build_info()["vector unit here"])"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != unit:
        pytest.skip(f"this processor has no {unit}; {done.stdout.strip()} passed in its place")


@needs_native
def test_results_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        for layout in (torch.Tensor.contiguous, channels_last):
            params, x = map(layout, problem(3, 3, 256, (5, 9, 31)))
            found = []
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                found.append(results(params, x, 256, "cpp"))
            assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_pixels_are_summed_in_float64(backend):
    can_run(backend)
    if backend == "reference" or (backend == "triton" and not torch.cuda.is_available()):
        pytest.skip("the reference sums in its own dtype, and the interpreter would take long")
    params, x = problem(1, 1, 256, (1,))
    one, _ = results(params, x, 256, backend)
    many, _ = results(params[..., None].expand(-1, -1, 2**20), x[..., None].expand(-1, -1, 2**20), 256, backend)
    assert many.item() == one.item() * 2**20


def test_hostile_layouts(backend):
    """Any strides: slices, expanded and transposed tensors; the gradient has the layout of params if they fill one."""
    can_run(backend)
    params, x = problem(2, 3, 16, (3, 4, 5))
    wanted = results(params, x, 16, backend)
    wide = torch.full((6, 20, 9, 5), torch.nan, device=oracle.device)
    wide[::2, :, 1::2] = params
    turned = params.transpose(2, 3).contiguous().transpose(2, 3)
    for p, v in ((wide[::2, :, 1::2], x), (turned, channels_last(x)), (channels_last(params), x)):
        for got, exact in zip(results(p, v, 16, backend), wanted, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
    if backend != "reference":
        assert results(turned, x, 16, backend)[1].stride() == turned.stride()
    same = results(params[:1].expand(3, -1, -1, -1), x[:1].expand(3, -1, -1, -1), 16, backend)
    for got, exact in zip(same, wanted, strict=True):
        torch.testing.assert_close(got, exact[:1].expand_as(got), rtol=1e-5, atol=1e-5)


def test_upstream_gradients_reach_the_params_alone(backend):
    can_run(backend)
    params, x = problem(2, 1, 16, (3, 4))
    _, gradient = results(params, x, 16, backend)
    params, x = params.requires_grad_(), x.requires_grad_()
    nll = discretized_logistic_mixture_nll(params, x, levels=16, backend=backend)
    for upstream in (torch.tensor(numbers, device=oracle.device).expand(3) for numbers in ([2.0, 0.0, -1.0], 3.0)):
        to_params, to_x = torch.autograd.grad(nll, (params, x), upstream, retain_graph=True)
        torch.testing.assert_close(to_params.cpu(), upstream.cpu()[:, None, None] * gradient, rtol=1e-6, atol=1e-6)
        assert torch.equal(to_x, torch.zeros_like(x))
    nll = discretized_logistic_mixture_nll(params.detach(), x, levels=16, backend=backend)
    assert torch.equal(torch.autograd.grad(nll.sum(), x)[0], torch.zeros_like(x))
    with torch.no_grad():
        assert not discretized_logistic_mixture_nll(params, x, levels=16, backend=backend).requires_grad


def test_saturated_coefficients_keep_their_slope(backend):
    """d nll / d coefficient is d nll / d mean times y / cosh^2, also where tanh is 1 in float32."""
    can_run(backend)
    if backend == "reference":
        pytest.skip("its 1 - tanh^2 is 0 there")
    a = torch.tensor([-30.0, -12.0, -3.0, -0.5, -1e-3, 0.0, 1e-3, 0.3, 0.7, 3.0, 12.0, 30.0])
    params = torch.zeros(len(a), 10)
    params[:, [3, 6, 9]] = a[:, None]
    x = torch.tensor([[1.0, 0.2, 0.6]], device=oracle.device).expand(len(a), -1)
    _, gradient = results(params.to(oracle.device), x, 256, backend)
    slope = torch.cosh(a.double()).square().reciprocal()
    for coefficient, mean, y in ((3, 4, 1.0), (6, 7, 1.0), (9, 7, -0.6)):
        assert torch.allclose(gradient[:, coefficient].double(), gradient[:, mean] * y * slope, rtol=1e-5, atol=0)


def test_bins_of_any_width(backend):
    """In float64, from far below s to far above it: where the formulas change."""
    can_run(backend)
    w = torch.logspace(-4, 3, 150, dtype=torch.float64, device=oracle.device)
    params = torch.stack([torch.zeros_like(w), torch.full_like(w, 0.01), (2 / 31 / w).log()], 1)
    x = torch.full_like(w, 16 / 31)[:, None]
    wanted = results(params, x, 32, "reference")
    for got, exact in zip(results(params, x, 32, backend), wanted, strict=True):
        assert ((got - exact).abs() <= EXACT * (1 + exact.abs())).all()


def test_x_is_rounded_to_its_level(backend):
    can_run(backend)
    levels = torch.arange(256, device=oracle.device)[:, None]
    params = torch.tensor([[0.0, 0.1, -4.0]], device=oracle.device).expand(256, -1)
    exact, _ = results(params, levels / 255, 256, backend)
    for shift in (-0.4, 0.4):
        assert torch.equal(results(params, (levels + shift) / 255, 256, backend)[0], exact)
    far, _ = results(params[:3], torch.tensor([[-1.0], [255.0], [1e6]], device=oracle.device), 256, backend)
    assert (far > 2 * exact.max()).all()


def test_extreme_params_stay_finite(backend):
    can_run(backend)
    mu, log_s = torch.tensor([-1000.0, -1.0, 0.0, 1 / 255, 50.0]), torch.tensor([-60.0, -20.0, 0.0, 30.0, 80.0, 100.0])
    grid = torch.cartesian_prod(torch.tensor([0.0, 5e3]), mu, log_s, torch.tensor([0.0, 1 / 255, 0.5, 1.0]))
    there = grid.to(oracle.device)
    nll, gradient = results(there[:, :3].contiguous(), there[:, 3:], 256, backend)
    assert (nll.isfinite() & gradient.isfinite().all(1))[grid[:, 2] < 88].all()  # e^-100 is 0 in float32
    assert nll.isfinite().all() or backend == "reference"


def test_nan_stays_visible_and_in_its_pixel(backend):
    can_run(backend)
    for channels in (1, 3):
        for row in range(len(ROWS[channels]) + 1):
            params, x = problem(2, channels, 256, (2, 40))
            if row < len(ROWS[channels]):
                params[1, 2 * row, 17] = torch.nan
            else:
                x[1, 0, 17] = torch.nan
            nll, gradient = results(params, x, 256, backend)
            pixel = gradient[1, :, 17].isnan()
            assert nll.isnan().tolist() == [False, True] and pixel[0] and gradient.isnan().sum() == pixel.sum()


def test_half_precision_is_computed_in_float32(backend):
    can_run(backend)
    params, x = problem(2, 1, 256, (2, 3))
    params = params.bfloat16().requires_grad_()
    nll = discretized_logistic_mixture_nll(params, x.bfloat16(), backend=backend)
    exact, gradient = results(params.detach().float(), x, 256, backend)
    assert torch.equal(nll.cpu(), exact) and nll.dtype == torch.float32
    assert torch.equal(torch.autograd.grad(nll.sum(), params)[0].cpu(), gradient.bfloat16())


def test_nothing_in_it(backend):
    can_run(backend)
    for shape in ((0,), (0, 3, 3), (2, 0)):
        nll, gradient = results(*problem(2, 3, 16, shape), 16, backend)
        assert nll.shape == shape[:1] and not nll.any() and gradient.shape == (shape[0], 20, *shape[1:])


def test_second_derivatives_point_to_the_reference(backend):
    can_run(backend)
    if backend == "reference":
        pytest.skip("it differentiates twice")
    params, x = problem(2, 1, 16, (3, 4))
    params.requires_grad_()
    nll = discretized_logistic_mixture_nll(params, x, levels=16, backend=backend)
    (first,) = torch.autograd.grad(nll.sum(), params, create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='reference' to differentiate twice"):
        torch.autograd.grad(first.sum(), params)


@needs_native
def test_what_the_kernels_cannot_do_is_left_to_the_reference():
    params, x = problem(2, 1, 16, (3, 4))
    with torch.autograd.forward_ad.dual_level():
        nll = discretized_logistic_mixture_nll(torch.autograd.forward_ad.make_dual(params, torch.ones_like(params)), x)
        assert torch.autograd.forward_ad.unpack_dual(nll).tangent is not None
    one_by_one = torch.func.vmap(discretized_logistic_mixture_nll)(params[:, None], x[:, None])
    torch.testing.assert_close(one_by_one.flatten(), discretized_logistic_mixture_nll(params, x))
    openai = discretized_logistic_mixture_nll(params, x, tail="openai")
    assert torch.equal(openai, discretized_logistic_mixture_nll(params, x, tail="openai", backend="reference"))
    with pytest.raises(RuntimeError, match="cannot run logistic_mixture: tail='openai' is in the reference only"):
        discretized_logistic_mixture_nll(params, x, tail="openai", backend="cpp")


def test_auto_takes_the_kernels(monkeypatch):
    """Also under the likelihood; the order of the table is that of auto."""
    order = [row.name for row in logistic_mixture.BACKENDS]
    order = order[: order.index("reference") + 1]  # behind it, what the tests have added
    assert order == sorted(order, key=backends.NAMES.index)
    params, x = problem(2, 1, 256, (3, 4))
    wanted = "reference" if backends.native_missing() else "cpp"
    nll = DiscretizedLogisticMixture(mixtures=2).nll(params, x)
    assert torch.equal(nll, discretized_logistic_mixture_nll(params, x, backend=wanted))
    monkeypatch.setattr(backends, "AUTO", "reference")
    assert torch.equal(
        discretized_logistic_mixture_nll(params, x), discretized_logistic_mixture_nll(params, x, backend="reference")
    )


def test_it_compiles_as_one_graph_with_its_gradient(backend):
    can_run(backend)
    require_compile(backend)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(params, x):
        return discretized_logistic_mixture_nll(params, x, backend=backend)

    params, x = problem(2, 3, 256, (3, 4))
    wanted = results(params, x, 256, backend)
    nll = compiled(params.requires_grad_(), x)
    got = nll.detach(), torch.autograd.grad(nll.sum(), params)[0]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("leaf", ["native", "triton"])
def test_operators_are_well_formed(leaf):
    """opcheck: schema and fake tensors, in both layouts and one that is neither."""
    can_run({"native": "cpp"}.get(leaf, leaf))
    op = {"native": logistic_mixture._native, "triton": lambda: kernels.logistic_mixture._opoverload}[leaf]()
    for channels, gradient in ((1, False), (3, True)):
        params, x = problem(1, channels, 16, (2, 3, 2))
        for p in (params, channels_last(params), params.transpose(2, 3).contiguous().transpose(2, 3)):
            torch.library.opcheck(op, (p, x, 16, gradient), test_utils=("test_schema", "test_faketensor"))


@needs_native
def test_refusals():
    run = torch.ops.infovae_fast.logistic_mixture
    params, x = problem(2, 3, 16, (3, 4))
    with pytest.raises(TypeError, match="accepted: float32, float64"):
        run(params.half(), x, 16, True)
    with pytest.raises(TypeError, match="got Double beside Float"):
        run(params, x.double(), 16, True)
    for p, v, levels in (
        (params, x[:2], 16), (params, x[:, :2], 16), (params[:, 1:], x, 16), (params[:, :0], x, 16), (params, x, 1),
        (params, x[..., None], 16), (params, x[..., :3], 16), (params[0, 0], x[0, 0], 16),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"levels; accepted: \[N, 3 K, \*S\] and \[N, 1, \*S\]"):
            run(p, v, levels, True)


def test_it_compiles_for_gpus_without_spilling():
    """What is launched: in both layouts, and with sizes of 1, which Triton compiles into the kernel."""
    can_run("triton")
    found = launch_ahead("""from tests.test_logistic_mixture import *
for k, channels, levels, shape, dtype, gradient in (
    (10, 3, 256, (3, 7, 16), torch.float32, True),
    (10, 3, 256, (3, 7, 16), torch.float32, False),
    (5, 3, 256, (3, 7, 5), torch.float64, True),
    (5, 1, 256, (3, 7, 5), torch.float32, True),
    (10, 3, 256, (1, 4, 8), torch.float32, True),
    (1, 1, 2, (1,), torch.float64, True),
):
    params, x = (t.to(dtype) for t in problem(k, channels, levels, shape))
    kernels.logistic_mixture(params, x, levels, gradient)
    kernels.logistic_mixture(channels_last(params), channels_last(x), levels, gradient)""")
    assert {resources["sm"] for resources in found} == set(ARCHITECTURES)
    for resources in found:
        assert resources["stack"] == resources["local"] == 0, resources
