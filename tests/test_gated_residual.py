"""What stands between the convolutions of PixelCNN++: formulas by loops, the kernels in the interpreter or on a GPU."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from infovae_fast import PixelCNNPlusPlus, gated_residual
from infovae_fast.backends import triton_missing
from infovae_fast.gated_residual import operators
from tests.conftest import launch_ahead

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    pytest.param("reference", id="reference"),
    pytest.param("triton", id="triton", marks=pytest.mark.skipif(triton_missing() is not None, reason="no Triton")),
]
both = pytest.mark.parametrize("backend", BACKENDS)
EPS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0.01}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random(*shape, dtype=torch.float64, last=False):
    t = torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)
    t = t.contiguous(memory_format=torch.channels_last) if last else t
    return t.requires_grad_()


def elu(t):
    return t if t > 0 else math.expm1(t)


@both
@pytest.mark.parametrize("pad", [(), (1, 1, 1, 0), (1, 0, 1, 0), (2, -1, -1, 3)], ids=str)
@pytest.mark.parametrize("maps", [(3,), (5, 2)], ids=str)
def test_elu_pair_by_loops(backend, maps, pad):
    n, height, width = 2, 3, 4
    s, bias = [random(n, m, height, width) for m in maps], random(sum(maps))
    found = operators(s[0], backend).elu_pair(s, bias, pad, 0.0)
    left, right, above, below = pad or (0, 0, 0, 0)
    t = (torch.cat(s, 1) + bias[:, None, None]).cpu()
    wanted = torch.zeros(n, 2 * sum(maps), height + above + below, width + left + right, dtype=torch.float64)
    for i, c, y, x in itertools.product(*map(range, (n, sum(maps), height, width))):
        if 0 <= (to_y := y + above) < wanted.shape[2] and 0 <= (to_x := x + left) < wanted.shape[3]:
            wanted[i, c, to_y, to_x] = elu(t[i, c, y, x].item())
            wanted[i, sum(maps) + c, to_y, to_x] = elu(-t[i, c, y, x].item())
    torch.testing.assert_close(found.cpu().detach(), wanted, rtol=1e-13, atol=1e-15)


@both
def test_gated_residual_by_loops(backend):
    n, maps, height, width = 2, 3, 2, 3
    s, f, bias, z = random(n, maps, height, width), random(n, 6, height, width), random(6), random(n, 6)
    found = operators(s, backend).gated_residual(s, f, bias, z).cpu()
    g = (f + bias[:, None, None] + z[:, :, None, None]).cpu()
    for i, c, y, x in itertools.product(*map(range, s.shape)):
        wanted = s[i, c, y, x].item() + g[i, c, y, x].item() / (1 + math.exp(-g[i, maps + c, y, x].item()))
        assert found[i, c, y, x].item() == pytest.approx(wanted, rel=1e-13)


CASES = [(2, 3, 4, 5), (1, 32, 3, 3), (3, 37, 1, 7), (2, 160, 2, 1), (1, 1, 1, 1), (0, 4, 2, 2), (1, 300, 5, 9)]


def gradients(out, inputs):
    inputs = [t for t in inputs if t is not None]
    upstream = torch.randn(out.shape, dtype=torch.float64).to(out)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


def agree(found, truth, dtype):
    for one, exact in zip(found, truth, strict=True):
        assert one.shape == exact.shape and one.dtype == dtype
        size = exact.abs().max().item() if exact.numel() else 0.0
        torch.testing.assert_close(one.double(), exact.double(), rtol=EPS[dtype], atol=EPS[dtype] * (1 + size))


@pytest.mark.skipif(triton_missing() is not None, reason="no Triton")
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_agree_with_the_reference(case, dtype):
    n, maps, height, width = case
    for last, with_bias, more in itertools.product((True, False), (True, False), ((), (maps + 1,))):
        s = [random(n, m, height, width, dtype=dtype, last=last) for m in (maps, *more)]
        bias = random(sum(t.shape[1] for t in s), dtype=dtype) if with_bias else None
        f, z = random(n, 2 * maps, height, width, dtype=dtype), random(n, 2 * maps, dtype=dtype) if more else None
        gate_bias = random(2 * maps, dtype=dtype) if with_bias else None
        found = {}
        for backend, to in (("triton", dtype), ("reference", torch.float64)):
            torch.manual_seed(1)
            copies = [None if t is None else t.detach().to(to).requires_grad_() for t in (*s, bias)]
            *inputs, b = copies
            out = operators(s[0], backend).elu_pair(inputs, b, (1, 1, 1, 0), 0.0)
            assert backend != "triton" or out.is_contiguous(memory_format=torch.channels_last)
            inputs = [None if t is None else t.detach().to(to).requires_grad_() for t in (s[0], f, gate_bias, z)]
            gate = operators(s[0], backend).gated_residual(*inputs)
            found[backend] = gradients(out, copies) + gradients(gate, inputs)
        agree(found["triton"], found["reference"], dtype)


@pytest.mark.skipif(triton_missing() is not None, reason="no Triton")
def test_several_programs_steps_and_strided_biases(monkeypatch):
    from infovae_fast.kernels import gated_residual as kernels

    s, f, z = random(2, 5, 5, 3, last=True), random(2, 10, 5, 3), random(2, 20)
    found = []
    for size in (kernels.VECTORS, 4):  # of a tile: one program and one step, or many
        monkeypatch.setattr(kernels, "VECTORS", size)
        monkeypatch.setattr(kernels, "PAIR_VECTORS", size)
        torch.manual_seed(1)
        ours = operators(s, "triton")
        bias = torch.linspace(-1, 1, 10, dtype=torch.float64, device=DEVICE)[::2].requires_grad_()
        gate_bias = torch.ones(1, dtype=torch.float64, device=DEVICE).expand(10)
        pair = ours.elu_pair([s], bias, (1, 1, 1, 0), 0.3)
        gate = ours.gated_residual(s, f, gate_bias, z[:, ::2])
        torch.manual_seed(2)
        found.append(gradients(pair, (s, bias)) + gradients(gate, (s, f, z)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    plain, exact = (operators(s, b).elu_pair([s], bias, (), 0.0) for b in ("triton", "reference"))
    torch.testing.assert_close(plain, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gate, operators(s, "reference").gated_residual(s, f, gate_bias, z[:, ::2]), rtol=1e-12, atol=1e-12
    )


@both
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_weights(backend, dtype):
    shapes = [(3, 2, 1, 2), (5, 3, 2, 2), (1, 4, 1, 1), (2, 40, 2, 3), (7, 1, 1, 1), (4, 2, 2, 1)]
    for some, last in ((shapes, True), (shapes[:1], False)):
        v, g = [random(*s, dtype=dtype, last=last) for s in some], [random(s[0], dtype=dtype) for s in some]
        found = operators(v[0], backend).weights(v, g)
        exact = [t.detach().double().requires_grad_() for t in (*v, *g)]
        truth = [
            F.normalize(t.flatten(1), dim=1, eps=0).view_as(t) * one[:, None, None, None]
            for t, one in zip(exact[: len(v)], exact[len(v) :], strict=True)
        ]
        upstream = [torch.randn(s, dtype=torch.float64).to(DEVICE, dtype) for s in some]
        to = torch.autograd.grad(found, (*v, *g), upstream)
        agree([*found, *to], [*truth, *torch.autograd.grad(truth, exact, [t.double() for t in upstream])], dtype)


@both
def test_gradients_to_what_goes_through_are_added(backend):
    """Of one s that is read on and one that is not, whether the pair itself is wanted or not."""
    s, bias = [random(2, m, 3, 5) for m in (4, 2)], random(6)
    pair, *on = operators(s[0], backend).elu_pair_through(s, bias, (1, 0, 1, 0), 0.0)
    assert all(torch.equal(one, own) for one, own in zip(on, s, strict=True))
    of_pair = torch.autograd.grad(pair.sin().sum(), (*s, bias), retain_graph=True)
    found = torch.autograd.grad(pair.sin().sum() + on[0].square().sum(), (*s, bias), retain_graph=True)
    torch.testing.assert_close(found, (of_pair[0] + 2 * s[0], *of_pair[1:]))
    torch.testing.assert_close(torch.autograd.grad(on[0].square().sum(), s[0])[0], 2 * s[0])


@both
def test_near_zero_and_far(backend):
    """float32: elu(t) keeps its digits where it is small; nothing overflows."""
    t = torch.tensor([1e-20, 1e-6, 0.01, 0.2, 0.34, 0.36, 1.0, 20.0, 1e4, math.inf])
    t = torch.cat([t, -t, torch.zeros(1)])
    s = t.view(1, -1, 1, 1).to(DEVICE).requires_grad_()
    out = operators(s, backend).elu_pair([s], None, (), 0.0)
    exact = torch.cat([t.double(), -t.double()])
    exact = torch.where(exact > 0, exact, exact.expm1())
    torch.testing.assert_close(out.flatten().cpu().double().detach(), exact, rtol=3e-7, atol=0)
    slope = torch.autograd.grad(out[:, : len(t)].sum(), s)[0].flatten().cpu()
    torch.testing.assert_close(slope, torch.where(t > 0, 1.0, t.exp()), rtol=3e-7, atol=0)
    f = torch.stack([t, t.flip(0)]).flatten().view(1, -1, 1, 1).clamp(-1e4, 1e4).to(DEVICE).requires_grad_()
    gate = operators(s, backend).gated_residual(torch.zeros_like(s), f, None, None)
    assert gate.isfinite().all() and torch.autograd.grad(gate.sum(), f)[0].isfinite().all()


@both
def test_nan_stays_in_its_pixel(backend):
    s = random(1, 5, 3, 4).detach()
    s[0, 2, 1, 2] = math.nan
    out = operators(s, backend).elu_pair([s], None, (1, 1, 1, 0), 0.0)
    assert out.isnan().nonzero().tolist() == [[0, 2, 2, 3], [0, 7, 2, 3]]


@both
@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
def test_dropout(backend, chance):
    """Of each number by itself, rescaled, the same in the backward pass, and from PyTorch's seed."""
    s, bias = random(3, 40, 16, 17), random(40)
    pair = operators(s, backend).elu_pair
    plain = pair([s], bias, (1, 0, 0, 0), 0.0)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(pair([s], bias, (1, 0, 0, 0), chance))
    assert torch.equal(*outs[:2]) and not torch.equal(*outs[1:])
    kept = (outs[0] != 0).double()
    inside = kept[..., 1:]
    deviation = math.sqrt(chance * (1 - chance) / inside.numel())
    assert abs(inside.mean().item() - (1 - chance)) < 5 * deviation
    halves = inside.chunk(2, 1)
    joint = (halves[0] * halves[1]).mean().item()
    assert abs(joint - (1 - chance) ** 2) < 10 * deviation
    for other in (inside[:, :, 1:] * inside[:, :, :-1], inside[:, 1:] * inside[:, :-1], inside[1:] * inside[:-1]):
        assert abs(other.mean().item() - (1 - chance) ** 2) < 10 * deviation
    threshold = round(chance * 65536)
    scale = 65536 / (65536 - threshold) if backend == "triton" else 1 / (1 - chance)
    torch.testing.assert_close(outs[0], plain * kept * scale)
    upstream = torch.randn(plain.shape, dtype=torch.float64).to(DEVICE)
    found = torch.autograd.grad(outs[0], (s, bias), upstream)
    wanted = torch.autograd.grad(plain, (s, bias), upstream * kept * scale)
    torch.testing.assert_close(found, wanted)


@pytest.mark.skipif(triton_missing() is not None, reason="no Triton")
@pytest.mark.parametrize(
    "options", [{}, {"condition": "spatial", "spatial_maps": 2, "checkpoint_layers": True}], ids=str
)
def test_a_network_of_them(options):
    found = {}
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        model = PixelCNNPlusPlus(2, (3, 4, 3), 3, blocks=1, maps=5, dropout=0.0, backend=backend, **options)
        model = model.double().to(DEVICE).train()
        z, x = (torch.rand(shape, dtype=torch.float64).to(DEVICE) for shape in ((2, 2), (2, 3, 4, 3)))
        out = model(z, x)
        out.square().sum().backward()
        found[backend] = [out, *(p.grad for p in model.parameters())]
    for one, exact in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(one, exact, rtol=1e-9, atol=1e-9 * (1 + exact.abs().max().item()))


def test_a_second_derivative_is_refused_or_right():
    for backend in ("reference",) if triton_missing() else ("reference", "triton"):
        s = random(1, 2, 2, 2)
        out = operators(s, backend).elu_pair([s], None, (), 0.0)
        (slope,) = torch.autograd.grad(out.sum(), s, create_graph=True)
        if backend == "triton":
            with pytest.raises(RuntimeError):
                slope.sum().backward()
        else:
            slope.sum().backward()


@pytest.mark.skipif(triton_missing() is not None, reason="no Triton")
def test_gpus_have_room_for_the_kernels():
    code = """
import torch
from infovae_fast.kernels import gated_residual as kernels
for dtype in (torch.float32, torch.bfloat16):
    for maps in (160, 32):
        s, f = torch.zeros(1, maps, 3, 3, dtype=dtype), torch.zeros(1, 2 * maps, 3, 3, dtype=dtype)
        seed, pad = torch.zeros(1, dtype=torch.int64), [1, 1, 1, 0]
        bias, z = torch.zeros(2 * maps, dtype=dtype), torch.zeros(1, 2 * maps, dtype=dtype)
        out = kernels.elu_pair([s], bias, seed, pad, 0.5)
        kernels.elu_pair_gradients(out, [s], bias, seed, pad, 0.5, [s])
        kernels.gated_residual(s, f, bias, z)
        kernels.gated_residual_gradients(s, f, bias, z)
        v = [torch.zeros(2 * maps, maps, 2, 3, dtype=dtype)]
        kernels.normalised(v, [bias])
        kernels.normalised_gradients(v, [bias], v)
"""
    found = launch_ahead(code)
    assert len(found) == 2 * 2 * 2 * 8
    assert all(one["local"] == 0 and one["stack"] == 0 for one in found), found


def test_backends_are_explained(monkeypatch):
    with pytest.raises(ValueError, match="fastest"):
        operators(torch.zeros(1, 1, 1, 1), "fastest")
    with pytest.raises(ValueError, match="fastest"):
        PixelCNNPlusPlus(0, (3, 4, 4), backend="fastest")
    with pytest.raises(RuntimeError, match="no cpp kernels"):
        operators(torch.zeros(1, 1, 1, 1), "cpp")
    monkeypatch.setattr(gated_residual, "AUTO", "cpp")  # means the C++ of those who have it
    assert operators(torch.zeros(1, 1, 1, 1)).elu_pair is gated_residual.elu_pair_reference
    assert [row.name for row in gated_residual.BACKENDS][:2] == ["triton", "reference"]
