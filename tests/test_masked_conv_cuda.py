"""The CUDA kernels of `masked_conv`: run through tests/simt, or on a GPU, and compiled by nvcc for other GPUs.

tests/test_masked_conv.py runs all of its laws on them, too.
"""

import math
import re
from functools import partial

import pytest
import torch

from infovae_fast.backends import native_missing
from infovae_fast.masked_conv import Mask, masked_conv2d
from infovae_fast.models.pixelcnn import GatedPixelCNN
from tests import test_masked_conv_triton as shared
from tests.oracle import check, near
from tests.simt import ARCHITECTURES, load, ptxas
from tests.simt.masked_conv import SOURCES
from tests.simt.masked_conv import run as simt

ON_GPU = torch.cuda.is_available()
if ON_GPU and native_missing("cuda") is not None:
    pytest.skip(native_missing("cuda"), allow_module_level=True)
conv = partial(shared.conv, backend="cuda")
results = partial(shared.results, backend="cuda")

# More than a tile of everything: rows of pixels, columns, both with a link; and vectors of colours that lie together.
LARGE = [
    (2, 9, 8, 40, 272, Mask("B", 3, 1, "interleaved", "tanh"), 2, 24),
    (1, 12, 17, 48, 96, Mask("H", 3, 3, "contiguous", "glu"), 4, 16),
    (3, 9, 10, 64, 72, Mask("V", 3), 0, 0),
    (2, 8, 9, 24, 48, Mask("A", 5, 3, "contiguous"), 4, 8),
]

# In half precision, weights that stay in shared memory (csrc/cuda/masked_conv_kept.h): more tiles of pixels than
# blocks, columns that do not fill their tile, windows to all sides, many images in a tile.
KEPT = [
    (2, 11, 30, 32, 64, Mask("V", 3, 1, "interleaved", "tanh"), 2, 0),
    (9, 16, 16, 16, 24, Mask("V0", 3), 4, 0),
    (4, 7, 21, 16, 96, Mask("H", 5, 1, "interleaved", "glu"), 4, 0),
    (3, 9, 10, 64, 72, Mask("B", 3), 0, 0),
    (5, 20, 23, 48, 32, Mask("A", 5, 1, "interleaved", "tanh"), 0, 0),
    (9, 4, 9, 80, 40, Mask("H", 3), 2, 0),
    (9, 16, 16, 16, 48, Mask("V", 3, 1, "interleaved", "tanh"), 2, 0),
    (40, 5, 9, 32, 80, Mask("H", 3, 1, "interleaved", "glu"), 2, 0),
]


@pytest.mark.parametrize("case", shared.CASES + LARGE, ids=str)
def test_it_meets_the_rule(case):
    for dtype in (torch.float32, torch.float64):
        shared.meets_the_rule(case, dtype, backend="cuda")
        if case[5].gate:
            shared.meets_the_rule(case, dtype, keep_f=True, backend="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*shared.CASES[1:18:4], *LARGE, *KEPT], ids=str)
def test_half_precision_meets_the_rule(case, dtype):
    shared.meets_the_rule(case, dtype, case[5].gate is not None, backend="cuda")


@pytest.mark.skipif(ON_GPU, reason="tests/simt tells which kernel ran")
def test_weights_that_fit_stay_in_shared_memory():
    """A block then takes several tiles, and there are fewer blocks than tiles."""
    n, h, w, _, _, mask, *_ = KEPT[6]
    (x, weight, bias, *_), _ = shared.problem(*KEPT[6])
    for dtype, kept in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
        simt(x.to(dtype), weight.to(dtype), bias.to(dtype), None, None, mask)
        blocks = load(SOURCES).last_grid()
        assert blocks < n * h * w // 256 if kept else blocks >= n * h * w // 128


@pytest.mark.parametrize("case", [KEPT[0], KEPT[2], KEPT[4]], ids=str)
def test_what_may_not_be_seen_is_never_read_in_half_precision(case):
    mask = case[5]
    (x, weight, bias, *_), (upstream, _) = shared.problem(*case, torch.bfloat16)
    y, at = case[1] // 2, case[2] // 2
    pixel = y * case[2] + at
    hidden = x.clone()
    hidden.flatten(2)[:, :, pixel] = torch.nan
    out, other = (results(mask, (t, weight, bias, None, None, None), (upstream, None))[0] for t in (x, hidden))
    same = other.isnan().any(1).logical_not()  # [n, h, w]
    assert same[:, :y].all() and not same.all()
    assert torch.equal(out.movedim(1, -1)[same], other.movedim(1, -1)[same])

    # The gradient to a pixel hears of no earlier output.
    silent = upstream.clone()
    silent.flatten(2)[:, :, pixel] = torch.nan
    to_x, other = (results(mask, (x, weight, bias, None, None, None), (g, None))[1] for g in (upstream, silent))
    same = other.isnan().any(1).logical_not()
    assert same[:, y + 1 :].all() and not same.all()
    assert torch.equal(to_x.movedim(1, -1)[same], other.movedim(1, -1)[same])


@pytest.mark.parametrize("law, arguments", shared.LAWS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_laws(law, arguments):
    torch.manual_seed(0)
    if law is shared.laws.test_compiles_as_one_graph and not ON_GPU:
        pytest.skip("the operator on a GPU compiles; tests/simt is Python")
    law(conv, *arguments)


@pytest.mark.parametrize("gate", ["tanh", "glu"])
def test_saturated_gates_keep_their_digits(gate):
    shared.test_saturated_gates_keep_their_digits(gate, conv)


def test_a_network_of_them():
    found = {}
    for backend in ("cuda", "reference"):
        torch.manual_seed(0)
        network = GatedPixelCNN(4, (6, 5, 4), 3, 3, layers=3, maps=6, backend=backend).double().to(shared.DEVICE)
        z, x = torch.randn(2, 4), torch.rand(2, 3, 5, 4)
        out = network(z.double().to(shared.DEVICE), x.double().to(shared.DEVICE))
        out.square().sum().backward()
        found[backend] = [out, *(p.grad for p in network.parameters() if p.grad is not None)]
    for one, other in zip(*found.values(), strict=True):
        near(one, other)


def test_twice_the_same():
    case = LARGE[0]
    one, other = (results(case[5], *shared.problem(*case), keep_f=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.skipif(ON_GPU, reason="tests/simt decides in which order threads run")
@pytest.mark.parametrize(
    "case, dtype",
    [(LARGE[0], None), (LARGE[1], None), (shared.CASES[1], None), (KEPT[0], torch.bfloat16), (KEPT[6], torch.bfloat16)],
    ids=str,
)
def test_the_bits_do_not_depend_on_the_order_of_threads_and_blocks(case, dtype, monkeypatch):
    found = []
    for order in ("forward", "reverse", "shuffle:1", "shuffle:2"):
        monkeypatch.setenv("SIMT_ORDER", order)
        problem = shared.problem(*case, dtype or torch.float32)
        found.append(results(case[5], *problem, keep_f=case[5].gate is not None))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# Which of x, weight, bias, condition, link and its weight are learnt.
LEARNT = ["weight", "link_weight", "bias", "x link", "bias link_weight", "weight bias", "x weight bias condition"]


@pytest.mark.parametrize("learnt", LEARNT)
@pytest.mark.parametrize("cin", [1, 24], ids=["alone", "together"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_to_some_are_those_of_all(learnt, cin, dtype):
    """Those to weight and to the link's come from one product where both are read in vectors, or neither is."""
    case = (2, 9, 8, cin, 48, Mask("H0" if cin == 1 else "H", 3), 2, 16)
    tensors, (upstream, _) = shared.problem(*case, dtype)
    names = ("x", "weight", "bias", "condition", "link", "link_weight")
    gradients = {}
    for some in (names, learnt.split()):
        given = [t.to(shared.DEVICE).requires_grad_(name in some) for name, t in zip(names, tensors, strict=True)]
        out = shared.run(case[5], *given, "cuda")[0]
        wanted = [t for t in given if t.requires_grad]
        found = torch.autograd.grad(out, wanted, upstream.to(shared.DEVICE))
        gradients[len(some)] = dict(zip([name for name in names if name in some], found, strict=True))
    every, some = gradients.values()
    for name, gradient in some.items():
        size, digit = every[name].abs().max(), 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
        assert (gradient - every[name]).abs().max() <= digit * size


@pytest.mark.parametrize("case", [LARGE[0], LARGE[3]], ids=str)
def test_any_division_of_the_pixels_gives_the_same(case):
    (x, weight, *_), (upstream, _) = shared.problem(*case, torch.float64)
    weight.requires_grad_()
    found = []
    for processors in (1, 2, 5, 300):
        out, _ = simt(x, weight, None, None, None, case[5], processors=processors)
        found.append(torch.autograd.grad(out, weight, upstream)[0])
    assert not torch.equal(found[0], found[-1])  # it was divided
    for other in found[1:]:
        near(other, found[0])


def test_tf32_is_for_those_who_allow_it():
    (x, weight, *_), _ = shared.problem(*LARGE[2])
    one_product_of_tf32(lambda exact: simt(x, weight, None, None, None, LARGE[2][5], exact=exact)[0], x, weight)


def one_product_of_tf32(run, x, weight):
    """run(exact) meets the rule if it is exact; else it does not, but each factor is rounded to 11 bits, no worse."""
    forward = partial(masked_conv2d, backend="reference", **LARGE[2][5]._asdict())
    truth, scale = forward(x.double(), weight.double()), forward(x.double().abs(), weight.double().abs())
    check(run(True), truth, forward(x, weight), scale)
    with pytest.raises(AssertionError):
        check(run(False), truth, forward(x, weight), scale)
    assert ((run(False) - truth).abs() <= 2 * 2.0**-11 * scale).all()


def test_infinite_inputs_and_sums_that_are_seen_give_no_nan():
    x = torch.zeros(1, 1, 3, 3)
    for value, weight in ((torch.inf, 1.0), (1e30, 1e12)):
        x[0, 0, 1, 1] = value
        out = conv(x, torch.full((5, 1, 2), weight), window="B", kernel_size=3)
        assert out.isinf().sum() == 10 and not out.isnan().any()


def test_views_that_start_anywhere():
    """Vectors of 16 bytes are read where they are aligned, else number by number: the same bits."""
    torch.manual_seed(0)
    shapes = ((2, 5, 6, 16), (5, 16, 32), (2, 5, 6, 8), (8, 32), (2, 5, 6, 16))
    for off in range(1 + len(shapes)):
        views = []
        for k, shape in enumerate(shapes):
            memory = torch.randn(math.prod(shape) + 1, device=shared.DEVICE)
            views.append((memory[1:] if k == off else memory[:-1]).view(shape))
        found = []
        for given in (views, [t.clone() for t in views]):
            x, weight, values, matrix = inputs = [t.detach().requires_grad_() for t in given[:4]]
            options = {"window": "B", "kernel_size": 3, "gate": "tanh", "link": (values.permute(0, 3, 1, 2), matrix)}
            out = masked_conv2d(x.permute(0, 3, 1, 2), weight, backend="cuda", **options)
            gradients = torch.autograd.grad(out, inputs, given[4].permute(0, 3, 1, 2))
            found.append([out.detach(), *gradients])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_operators_are_well_formed(dtype):
    mask = LARGE[0][5]
    tensors, (upstream, extra) = shared.problem(*LARGE[0], dtype)
    tensors = [t.cuda() for t in tensors]
    settings = ([d for tap in mask.taps for d in tap], shared._colours(mask), mask.gate)
    ops = torch.ops.infovae_fast
    f = ops.masked_conv_forward(*tensors, *settings, True)[1]
    x, weight, _, _, *link = tensors
    torch.library.opcheck(ops.masked_conv_forward.default, (*tensors, *settings, True), test_utils="test_schema")
    arguments = (upstream.cuda(), extra.cuda(), x, weight, *link, f, *settings, *(True,) * 7)
    torch.library.opcheck(ops.masked_conv_backward.default, arguments)
    torch.library.opcheck(ops.masked_conv.default, (x.requires_grad_(), *tensors[1:], *settings, True))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_tf32_is_for_those_who_set_pytorchs_precision():
    (x, weight, *_), _ = shared.problem(*LARGE[2])
    before = torch.get_float32_matmul_precision()

    def run(exact):
        torch.set_float32_matmul_precision("highest" if exact else "high")
        out = conv(x, weight, **LARGE[2][5]._asdict())
        torch.set_float32_matmul_precision(before)
        return out

    one_product_of_tf32(run, x, weight)


def test_what_has_no_room_is_said():
    x = torch.zeros(1, 1, 2, 2, device=shared.DEVICE)
    weight = torch.zeros(33 * 16, 1, 2, device=shared.DEVICE)
    with pytest.raises(RuntimeError, match=r"got 528 taps and 2 pixels a side, accepted: at most 512 and 32767"):
        masked_conv2d(x, weight, window="V0", kernel_size=33, backend="cuda")
    if not ON_GPU:
        with pytest.raises(RuntimeError, match="at most 512 taps, and 32767 pixels a side"):
            simt(x, torch.zeros(33 * 16, 1, 2), None, None, None, Mask("V0", 33))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_compiles_without_spilling(architecture, tmp_path):
    said = ptxas(SOURCES[0], architecture, tmp_path)
    kernels = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(kernels) == 35 and set(kernels) == {("0", "0", "0")}, said
