"""The C++ backend of `masked_conv`: every vector unit, any number of threads, its operators, saturated gates."""

import math
import os
import subprocess
import sys

import pytest
import torch

from infovae_fast import backends
from infovae_fast.masked_conv import Mask, _run, masked_conv2d

pytestmark = pytest.mark.skipif(backends.native_missing() is not None, reason=str(backends.native_missing()))

# n, h, w, cin, cout, window, k, data_channels, gate, spatial, channels of the link: strips of pixels and vectors of
# channels that do not come out even, more rows than fit one task, more images than groups, colours.
CASES = [
    (3, 5, 7, 6, 12, "B", 3, 1, None, None, 0),
    (2, 28, 28, 1, 64, "A", 7, 1, "tanh", False, 0),
    (1, 9, 29, 64, 128, "V", 3, 1, "tanh", True, 70),
    (2, 3, 4, 40, 66, "H", 3, 1, "glu", False, 3),
    (1, 90, 40, 70, 33, "V0", 5, 1, None, True, 1),
    (70, 2, 2, 5, 1, "B", 1, 1, None, None, 0),
    (2, 6, 5, 9, 102, "A", 5, 3, "tanh", True, 5),
]


def problem(n, h, w, cin, cout, window, k, data_channels, gate, spatial, link, dtype=torch.float32):
    torch.manual_seed(0)
    mask = Mask(window, k, data_channels, "interleaved", gate)
    weight = torch.randn(len(mask.taps), cin, cout) / (len(mask.taps) * cin) ** 0.5
    condition = None if spatial is None else torch.randn(n, cout, *((h, w) if spatial else ()))
    links = (torch.randn(n, link, h, w), torch.randn(link, cout)) if link else (None, None)
    tensors = (torch.randn(n, cin, h, w), weight, torch.randn(cout), condition, *links)
    return mask._asdict(), [None if t is None else t.to(dtype).requires_grad_() for t in tensors]


def results(options, tensors, backend):
    """The output and every gradient, by a fixed upstream one."""
    x, weight, bias, condition, *link = tensors
    link = None if link[0] is None else tuple(link)
    out = masked_conv2d(x, weight, bias, condition=condition, link=link, backend=backend, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, [t for t in tensors if t is not None], upstream)]


def sweep():
    for case in CASES:
        options, tensors = problem(*case)
        truth = results(
            options, [None if t is None else t.detach().double().requires_grad_() for t in tensors], "reference"
        )
        double = results(options, [None if t is None else t.detach().double().requires_grad_() for t in tensors], "cpp")
        yardstick, out = results(options, tensors, "reference"), results(options, tensors, "cpp")
        for t, d, y, o in zip(truth, double, yardstick, out, strict=True):
            size = t.abs().max()
            assert (d - t).abs().max() <= 1e-13 * size, case
            assert (o - t).abs().max() <= 2 * (y - t).abs().max() + 1e-6 * size, case


@pytest.mark.parametrize("unit", ["avx512", "avx2", "baseline"])
def test_every_vector_unit_meets_the_rule(unit):
    """In a process of its own, held to the unit; a machine without it runs the best it has below that."""
    environment = os.environ | {"INFOVAE_FAST_VECTOR_UNIT": unit, "OMP_NUM_THREADS": "1"}
    code = """from tests.test_masked_conv_native import sweep
sweep()
from infovae_fast import _C
print(_C.build_info()["vector unit here"])"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != unit:
        pytest.skip(f"this processor has no {unit}; {done.stdout.strip()} passed in its place")


def test_results_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        for case in CASES:
            found = []
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                found.append(results(*problem(*case), "cpp"))
            assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("gate", ["tanh", "glu"])
def test_saturated_gates_keep_their_digits(gate):
    """tanh(a) sigmoid(b) and its derivatives, relative to float64, far from zero on both sides and next to it."""
    axis = torch.tensor([-30.0, -12.0, -3.0, -1e-3, -1e-30, 0.0, 1e-30, 1e-3, 3.0, 12.0, 30.0])
    a, b = (t.flatten()[:, None, None, None] for t in torch.meshgrid(axis, axis, indexing="ij"))
    x = torch.cat([a, b], 1).requires_grad_()  # [121, 2, 1, 1]
    weight = torch.eye(2)[None]
    out = masked_conv2d(x, weight, window="B", kernel_size=1, gate=gate, backend="cpp")
    (slope,) = torch.autograd.grad(out.sum(), x)
    a, b = a.double(), b.double()
    tanh, sigmoid = torch.tanh(a), torch.sigmoid(b)
    by_a = sigmoid * (1 / torch.cosh(a).square() if gate == "tanh" else 1)
    by_b = (tanh if gate == "tanh" else a) * sigmoid * torch.sigmoid(-b)
    for got, exact in ((out, (tanh if gate == "tanh" else a) * sigmoid), (slope, torch.cat([by_a, by_b], 1))):
        assert torch.allclose(got.double(), exact, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[6]])
def test_operators_are_well_formed(case):
    """opcheck: schema, autograd registration, fake tensors and AOT autograd."""
    options, tensors = problem(*case)
    mask = Mask(**options)
    taps = [offset for tap in mask.taps for offset in tap]
    colours, gate = (mask.groups, 1, mask.visible(0)), mask.gate or ""
    ops = torch.ops.infovae_fast
    torch.library.opcheck(ops.masked_conv.default, (*tensors, taps, colours, gate, True))
    tensors = [None if t is None else t.detach() for t in tensors]
    out, f = ops.masked_conv_forward(*tensors, taps, colours, gate, True)
    torch.library.opcheck(
        ops.masked_conv_forward.default, (*tensors, taps, colours, gate, True), test_utils="test_schema"
    )
    x, weight, _, _, *link = tensors
    for wanted in ((True,) * 7, (False, True, False, True, False, False, False)):
        torch.library.opcheck(
            ops.masked_conv_backward.default,
            (torch.ones_like(out), f if gate else None, x, weight, *link, f, taps, colours, gate, *wanted),
        )


@pytest.mark.parametrize("case", [case for case in CASES if case[8]])
def test_what_goes_into_the_gate_has_a_gradient_too(case):
    options, tensors = problem(*case, dtype=torch.float64)
    *inputs, values, matrix = tensors
    link = None if values is None else (values, matrix)
    found = {}
    for backend in ("cpp", "reference"):
        mask = Mask(**options)
        out, f = _run(mask, *inputs, backend, keep_f=True, link=link)
        for part in (out.square().sum() + (f * f.cos()).sum(), f.sin().sum()):
            gradients = torch.autograd.grad(part, [t for t in tensors if t is not None], retain_graph=True)
            found.setdefault(backend, []).extend([out, f, *gradients])
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_16_bit_numbers_on_another_device_keep_their_dtype():
    """What a GPU returns, as the fakes have it: gradients to what was half precision, channels last."""
    options, tensors = problem(*CASES[3])
    mask = Mask(**options)
    x, weight, bias, condition, *link = (None if t is None else t.detach().to("meta", torch.bfloat16) for t in tensors)
    settings = ([d for tap in mask.taps for d in tap], (mask.groups, 1, mask.visible(0)), mask.gate or "")
    ops = torch.ops.infovae_fast
    out, f = ops.masked_conv_forward(x, weight, bias, condition, *link, *settings, True)
    gradients = ops.masked_conv_backward(out, None, x, weight, *link, f, *settings, *(True,) * 7)
    assert {t.dtype for t in (out, f, *gradients)} == {torch.bfloat16}
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_refusals():
    x, weight = torch.zeros(2, 4, 5, 5), torch.zeros(5, 4, 8)
    run = torch.ops.infovae_fast.masked_conv
    with pytest.raises(TypeError, match="accepted: float32, float64"):
        run(x.half(), weight, None, None, None, None, [0] * 10, [1, 1, 1], "", False)
    with pytest.raises(TypeError, match="got Double beside Float"):
        run(x, weight.double(), None, None, None, None, [0] * 10, [1, 1, 1], "", False)
    with pytest.raises(ValueError, match="4 taps; accepted"):
        run(x, weight, None, None, None, None, [0] * 8, [1, 1, 1], "", False)
    with pytest.raises(ValueError, match="gate: got 'swish'"):
        run(x, weight, None, None, None, None, [0] * 10, [1, 1, 1], "swish", False)
    with pytest.raises(ValueError, match="groups of equal size"):
        run(x, weight, None, None, None, None, [0] * 10, [3, 1, 1], "", False)
    with pytest.raises(ValueError, match="0 taps; accepted"):
        run(x, torch.zeros(0, 4, 8), None, None, None, None, [], [1, 1, 1], "", False)
    with pytest.raises(ValueError, match=r"got shape \[8, 2\]; accepted: \[2, 8\]"):
        run(x, weight, None, torch.zeros(8, 2), None, None, [0] * 10, [1, 1, 1], "", False)
    with pytest.raises(ValueError, match="link and link_weight: give both or neither"):
        run(x, weight, None, None, x, None, [0] * 10, [1, 1, 1], "", False)
    with pytest.raises(ValueError, match=r"link_weight: got shape \[4, 7\]; accepted: \[C, 8\]"):
        run(x, weight, None, None, x, torch.zeros(4, 7), [0] * 10, [1, 1, 1], "", False)
    far = run(x + 1, torch.ones(1, 4, 8), None, None, None, None, [0, 2**62], [1, 1, 1], "", False)[0]
    assert far.eq(0).all()
    with pytest.raises(ValueError, match="beside x"):
        run(x, weight, None, torch.zeros(2, 8, 5, 4), None, None, [0] * 10, [1, 1, 1], "", False)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]])
@pytest.mark.parametrize("learned", [0, 1, 2, 3, 4, 5])
def test_second_derivatives_point_to_the_reference(case, learned):
    """Also where one tensor alone is learned, unless its gradient is constant: f is linear in it."""
    options, tensors = problem(*case)
    tensors = [None if t is None else t.detach().requires_grad_(k == learned) for k, t in enumerate(tensors)]
    if (one := tensors[learned]) is None:
        pytest.skip("this case has no condition or no link")
    x, weight, bias, condition, *link = tensors
    link = None if link[0] is None else tuple(link)
    out = masked_conv2d(x, weight, bias, condition=condition, link=link, backend="cpp", **options)
    (first,) = torch.autograd.grad(out.square().sum(), one, create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='reference' to differentiate twice"):
        torch.autograd.grad(first.square().sum(), one)


def test_forward_mode_is_left_to_the_reference():
    options, (x, weight, *_) = problem(*CASES[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        out = masked_conv2d(dual, weight.detach(), **options)
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
        with pytest.raises(RuntimeError, match="forward-mode derivatives need the reference"):
            masked_conv2d(dual, weight.detach(), backend="cpp", **options)


def test_a_convolution_alone_may_keep_f():
    options, (x, weight, bias, *_) = problem(*CASES[0])
    out, f = _run(Mask(**options), x, weight, bias, None, "cpp", keep_f=True)
    assert torch.equal(out, f)


def test_a_huge_gate_does_not_overflow():
    x = torch.tensor([[1e13, 70.0], [1e30, -75.0]])[:, :, None, None]
    out = masked_conv2d(x, torch.eye(2)[None], window="B", kernel_size=1, gate="glu", backend="cpp")
    exact = x[:, 0].double() * torch.sigmoid(x[:, 1].double())
    torch.testing.assert_close(out[:, 0].double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("b", [-100.0, -1e4, -math.inf])
def test_a_gate_that_is_shut_passes_nothing(b):
    x, bias = torch.tensor([[1e38, 0.0]])[:, :, None, None].requires_grad_(), torch.tensor([0.0, b])
    out = masked_conv2d(x, torch.eye(2)[None], bias, window="B", kernel_size=1, gate="glu", backend="cpp")
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert out.item() == 0 and (gradient == 0).all()
