"""The Triton kernels of `masked_conv`: in the interpreter without a GPU, and compiled for GPUs that are not here.

What every backend owes is in tests/test_masked_conv.py; of its laws, a selection runs here, as far as the interpreter's
time allows.
"""

from functools import partial

import pytest
import torch

from infovae_fast.masked_conv import Mask, _cells, _colours, _run
from infovae_fast.models.pixelcnn import GatedPixelCNN
from tests import test_masked_conv as laws
from tests.conftest import ARCHITECTURES, compile_ahead
from tests.oracle import check, near

kernels = pytest.importorskip("infovae_fast.kernels.masked_conv")
SETTINGS = {name: getattr(kernels, name) for name in ("tile", "weight_tile", "gate_tile", "PROGRAMS")}
DEVICE = laws.THERE
conv = partial(laws.conv_there, backend="triton")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The tiles of the GPU in place of the interpreter's, which are large."""
    for name, value in SETTINGS.items():
        monkeypatch.setattr(kernels, name, value)


@pytest.fixture(autouse=True)
def unwritten_is_nan():
    """Memory that is read before it is written holds NaN."""
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


# n, h, w, cin, cout, mask, the dimensions of the condition, and channels of the link: every window with every gate,
# each condition and shape with each gate; channels fewer than fill a tile, and more.
CASES = [
    (2, 3, 7, 17, 34, Mask("A", 3), 0, 0),
    (3, 1, 5, 3, 12, Mask("A", 5, 3, "interleaved", "tanh"), 4, 4),
    (1, 6, 1, 6, 12, Mask("A", 3, 3, "contiguous", "glu"), 2, 0),
    (3, 1, 1, 1, 3, Mask("B", 3), 4, 0),
    (1, 6, 11, 35, 140, Mask("B", 3, 1, "interleaved", "tanh"), 2, 40),
    (2, 4, 5, 33, 198, Mask("B", 1, 3, "interleaved", "glu"), 0, 17),
    (2, 7, 3, 5, 7, Mask("V0", 5), 2, 3),
    (1, 5, 6, 1, 66, Mask("V0", 7, 1, "interleaved", "tanh"), 0, 0),
    (2, 2, 3, 24, 20, Mask("V0", 3, 1, "interleaved", "glu"), 4, 0),
    (2, 6, 1, 20, 150, Mask("V", 3), 4, 0),
    (3, 4, 6, 40, 66, Mask("V", 3, 3, "interleaved", "tanh"), 4, 80),
    (1, 5, 5, 3, 8, Mask("V", 1, 1, "interleaved", "glu"), 2, 0),
    (1, 1, 9, 18, 27, Mask("H0", 3, 3, "contiguous"), 2, 0),
    (2, 3, 4, 9, 36, Mask("H0", 3, 3, "contiguous", "tanh"), 2, 36),
    (2, 3, 8, 2, 4, Mask("H0", 7, 1, "interleaved", "glu"), 4, 0),
    (2, 4, 4, 51, 60, Mask("H", 3, 3, "interleaved"), 0, 5),
    (2, 5, 3, 21, 42, Mask("H", 5, 3, "contiguous", "tanh"), 0, 42),
    (2, 3, 6, 12, 6, Mask("H", 1, 1, "interleaved", "glu"), 2, 0),
]


def problem(n, h, w, cin, cout, mask, dim, link, dtype=torch.float32):
    """x, weight, bias, condition, link and its weight, and gradients to out and to f."""
    torch.manual_seed(0)
    taps = len(mask.taps)
    shape = {2: (n, cout), 4: (n, cout, h, w)}.get(dim)
    tensors = [torch.randn(n, cin, h, w), torch.randn(taps, cin, cout) / (taps * cin) ** 0.5, torch.randn(cout)]
    tensors += [None if shape is None else torch.randn(shape)]
    tensors += [torch.randn(n, link, h, w), torch.randn(link, cout) / link**0.5] if link else [None, None]
    upstream = [torch.randn(n, cout // mask.halves, h, w), torch.randn(n, cout, h, w)]
    return [None if t is None else t.to(dtype) for t in tensors], [t.to(dtype) for t in upstream]


def run(mask, x, weight, bias, condition, link, link_weight, backend, keep_f=False):
    link = None if link is None else (link, link_weight)
    return _run(mask, x, weight, bias, condition, backend, keep_f, link)


def results(mask, tensors, upstream, backend, keep_f=False):
    """out, f if it is kept, and the gradients to what was given."""
    device = "cpu" if backend == "reference" else DEVICE
    tensors = [None if t is None else t.detach().to(device).requires_grad_() for t in tensors]
    found = run(mask, *tensors, backend, keep_f)[: 2 if keep_f else 1]
    upstream = [g.to(device) for g in upstream[: len(found)]]
    gradients = torch.autograd.grad(found, [t for t in tensors if t is not None], upstream)
    return [t.detach().cpu() for t in (*found, *gradients)]


def scales(mask, tensors, upstream, keep_f=False):
    """The sums of |terms| of `results`."""
    f = run(mask, *tensors, "reference", True)[1].requires_grad_()
    out = laws.gated(f, mask.gate) if mask.gate else f * 1
    (to_f,) = torch.autograd.grad([out, f * 1][: 2 if keep_f else 1], f, upstream[: 2 if keep_f else 1])
    sizes = [None if t is None else t.abs().requires_grad_() for t in tensors]
    total = run(mask, *sizes, "reference", True)[1]
    gradients = torch.autograd.grad(total, [t for t in sizes if t is not None], to_f.abs())
    return [*[total] * (2 if keep_f else 1), *gradients]


def meets_the_rule(case, dtype, keep_f=False, backend="triton"):
    mask = case[5]
    tensors, upstream = problem(*case, dtype)
    exact = [None if t is None else t.double() for t in tensors], [g.double() for g in upstream]
    truth = results(mask, *exact, "reference", keep_f)
    out = results(mask, tensors, upstream, backend, keep_f)
    if dtype == torch.float64:
        for o, t in zip(out, truth, strict=True):
            near(o, t)
        return
    yardstick = results(mask, tensors, upstream, "reference", keep_f)
    for o, t, y, scale in zip(out, truth, yardstick, scales(mask, *exact, keep_f), strict=True):
        check(o, t, y, scale)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_meets_the_rule(case, as_on_a_gpu):
    meets_the_rule(case, torch.float32)


@pytest.mark.parametrize("case", [case for case in CASES if case[5].gate], ids=str)
def test_it_meets_the_rule_with_a_gradient_to_what_goes_into_the_gate(case):
    meets_the_rule(case, torch.float64, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[12], CASES[14]], ids=str)
def test_half_precision_meets_the_rule(case, dtype):
    meets_the_rule(case, dtype, case[5].gate is not None)


def test_what_goes_into_the_gate_may_be_differentiated_alone():
    tensors = [None if t is None else t.to(DEVICE).requires_grad_() for t in problem(*CASES[1])[0]]
    out, f = run(CASES[1][5], *tensors, "triton", True)
    (alone,) = torch.autograd.grad(f.sum(), tensors[1], retain_graph=True)
    (both,) = torch.autograd.grad([f.sum(), 0 * out.sum()], tensors[1])
    assert torch.equal(alone, both) and (alone != 0).any()


def test_segments_of_pixels_add_up_in_order(monkeypatch):
    case = (2, 10, 9, 6, 12, Mask("H", 3, 3, "interleaved"), 0, 0)  # 180 pixels
    tensors, upstream = problem(*case, torch.float64)
    monkeypatch.setattr(kernels, "weight_tile", SETTINGS["weight_tile"])
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    one = results(case[5], tensors, upstream, "triton")
    monkeypatch.setattr(kernels, "PROGRAMS", SETTINGS["PROGRAMS"])
    several, again = (results(case[5], tensors, upstream, "triton") for _ in range(2))
    assert torch.equal(several[2], again[2]) and not torch.equal(several[2], one[2])
    near(several[2], one[2])


def test_twice_the_same(as_on_a_gpu):
    one, other = (results(CASES[13][5], *problem(*CASES[13]), "triton", True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


LAWS = [
    *((laws.test_what_is_not_seen_does_not_change_a_bit, arguments) for arguments in [
        ("A", 1, "interleaved", None), ("B", 3, "interleaved", "tanh"), ("H0", 3, "contiguous", None),
    ]),
    *((laws.test_poisoned_upstream_gradients_reach_only_what_was_seen, arguments) for arguments in [
        ("V0", 1, "interleaved"), ("A", 3, "contiguous"), ("H", 3, "interleaved"),
    ]),
    *((laws.test_masked_blocks_of_the_weight_are_never_read, arguments) for arguments in [
        ("A", "interleaved", None), ("B", "contiguous", "tanh"), ("H", "interleaved", "glu"),
    ]),
    (laws.test_any_strides, ("H0", 3, "tanh")),
    (laws.test_empty_batch, ("B", "tanh", 3, "interleaved")),
    (laws.test_empty_batch, ("V", None, 1, "interleaved")),
    (laws.test_compiles_as_one_graph, ()),
    (laws.test_a_link_is_a_condition_made_by_a_product_at_each_pixel, (3, "tanh")),
]  # fmt: skip


@pytest.mark.parametrize("law, arguments", LAWS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_laws(law, arguments):
    torch.manual_seed(0)
    law(conv, *arguments)


@pytest.mark.parametrize("gate", ["tanh", "glu"])
def test_saturated_gates_keep_their_digits(gate, conv=conv):
    """tanh(a) sigmoid(b) and its derivatives, relative to float64, far from zero on both sides and next to it.

    The rounding of x is |x| of that of exp(x).
    """
    axis = torch.tensor([-30.0, -12.0, -3.0, -0.499, -1e-3, -1e-30, 0.0, 1e-30, 1e-3, 0.501, 3.0, 12.0, 30.0])
    a, b = (t.flatten()[:, None, None, None] for t in torch.meshgrid(axis, axis, indexing="ij"))
    x = torch.cat([a, b], 1).requires_grad_()  # [169, 2, 1, 1]
    out = conv(x, torch.eye(2)[None], window="B", kernel_size=1, gate=gate)
    (slope,) = torch.autograd.grad(out.sum(), x)
    a, b = a.double(), b.double()
    tanh, sigmoid = torch.tanh(a), torch.sigmoid(b)
    by_a = sigmoid * (1 / torch.cosh(a).square() if gate == "tanh" else 1)
    by_b = (tanh if gate == "tanh" else a) * sigmoid * torch.sigmoid(-b)
    for got, exact in ((out, (tanh if gate == "tanh" else a) * sigmoid), (slope, torch.cat([by_a, by_b], 1))):
        assert torch.allclose(got.double(), exact, rtol=60 * torch.finfo(torch.float32).eps, atol=1e-37)
    (nan,) = conv(torch.full((1, 1, 1, 1), torch.nan), torch.ones(1, 1, 2), window="B", kernel_size=1, gate=gate)
    assert nan.isnan()


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[12]], ids=str)
@pytest.mark.parametrize("learned", [0, 1, 2, 3, 4, 5])
def test_second_derivatives_point_to_the_reference(case, learned):
    tensors = [None if t is None else t.to(DEVICE) for t in problem(*case)[0]]
    if (one := tensors[learned]) is None:
        pytest.skip("this case has no condition or no link")
    one.requires_grad_()
    out, _ = run(case[5], *tensors, "triton")
    (first,) = torch.autograd.grad(out.square().sum(), one, create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='reference' to differentiate twice"):
        torch.autograd.grad(first.square().sum(), one)


@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=str)
def test_schemas_and_fakes(case):
    mask = case[5]
    (x, weight, *others), (gradient, extra) = (
        [None if t is None else t.to(DEVICE) for t in group] for group in problem(*case)
    )
    settings = ((mask.kernel_size, _cells(mask)[0]), _colours(mask), mask.gate or "")
    f = run(mask, x, weight, *others, "triton", True)[1]
    ops = torch.ops.infovae_fast
    torch.library.opcheck(ops.masked_conv_triton.default, (x.requires_grad_(), weight, *others, *settings, True))
    if not mask.gate:
        f, extra = f.new_empty(0), None
    for wanted in ((True,) * 5, (False, True, True, False, False), (False, False, False, True, True)):
        arguments = (gradient, extra, x.detach(), weight, *others[2:], f, *settings, wanted)
        torch.library.opcheck(ops.masked_conv_triton_backward.default, arguments)


@pytest.mark.parametrize("data_channels, variant", [(3, "gated"), (1, "infovae2017")])
def test_a_network_of_them(data_channels, variant):
    found = {}
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        channels = data_channels
        sizes = {"layers": 3, "maps": 6, "data_channels": data_channels, "variant": variant}
        network = GatedPixelCNN(4, (2 * channels, 5, 4), channels, backend=backend, **sizes).double().to(DEVICE)
        z, x = torch.randn(2, 4), torch.rand(2, channels, 5, 4)
        out = network(z.double().to(DEVICE), x.double().to(DEVICE))
        out.square().sum().backward()
        found[backend] = [out, *(p.grad for p in network.parameters() if p.grad is not None)]
    for one, other in zip(*found.values(), strict=True):
        near(one, other)


COMPILED = [  # dtype, Cin, Cout, mask, condition, channels of the link
    *((dtype, maps, 2 * maps, Mask("V", 3, gate="tanh"), 4, 0) for maps in (32, 64, 160) for dtype in ("bf16", "fp32")),
    ("bf16", 1, 128, Mask("V0", 7, gate="tanh"), 2, 0),
    ("fp32", 1, 128, Mask("A", 7, gate="tanh"), 2, 0),
    ("bf16", 96, 192, Mask("H", 3, 3, gate="tanh"), 4, 192),
    ("fp32", 96, 192, Mask("H", 3, 3, gate="tanh"), 4, 192),
    ("fp32", 64, 64, Mask("B", 7), 0, 0),
    ("fp64", 64, 128, Mask("H", 3, gate="tanh"), 2, 128),
]
SIZES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


def case_of(pointers, numbers, constants, tile):
    """As `compile_ahead` takes it; the pointers and numbers by name with their types."""
    constants |= {"BM": tile.rows, "BN": tile.columns} | ({"BK": tile.depth} if tile.depth else {})
    launch = {"num_warps": tile.warps, "num_stages": tile.stages}
    return pointers | numbers | {name: [value] for name, value in constants.items()} | launch


def cells_of(dtype, mask, few):
    groups, interleaved, own = _colours(mask)
    colours = {"GROUPS": groups, "INTERLEAVED": bool(interleaved), "OWN": own}
    cells = {"K": mask.kernel_size, "FIRST": _cells(mask)[0], "TAPS": len(mask.taps)}
    return cells | colours | {"PRECISION": {"fp32": "tf32x3", "fp64": "ieee"}.get(dtype, "tf32"), "FEW": few}


def conv_case(dtype, cin, cout, mask, condition, link, mirrored):
    half = cout // mask.halves
    depth, columns = (cout, cin) if mirrored else (cin, half)
    few, halves, gate = depth < kernels.FEW, 1 if mirrored else mask.halves, "" if mirrored else mask.gate or ""
    tile = SETTINGS["tile"](columns // mask.groups, depth * len(mask.taps) if few else depth, SIZES[dtype], halves)
    constants = {"IN": depth, "OUT": columns, "GROUPED": half if mirrored else cin, "MIRRORED": mirrored, "GATE": gate,
                 "KEEP": True, "BIAS": not mirrored, "CONDITION": 0 if mirrored else condition,
                 "LINK": 0 if mirrored else link}  # fmt: skip
    pointers = dict.fromkeys(["source", "weight", "bias", "condition", "link", "link_weight", "out", "f"], f"*{dtype}")
    numbers = dict.fromkeys(["pixels", "H", "W"], "i32")
    return case_of(pointers, numbers, constants | cells_of(dtype, mask, few), tile)


def weight_case(dtype, cin, cout, mask, *_):
    few = cin < kernels.FEW
    tile = SETTINGS["weight_tile"](cin * len(mask.taps) if few else cin, cout, SIZES[dtype])
    pointers = {"source": f"*{dtype}", "gradient": f"*{dtype}", "parts": "*fp64" if dtype == "fp64" else "*fp32"}
    numbers = dict.fromkeys(["pixels", "H", "W", "segment"], "i32")
    constants = {"IN": cin, "OUT": cout, "GROUPED": cout // mask.halves} | cells_of(dtype, mask, few)
    return case_of(pointers, numbers, constants, tile)


def gate_case(dtype, half, gate):
    tile = SETTINGS["gate_tile"](half, SIZES[dtype])
    pointers = dict.fromkeys(["f", "gradient", "extra", "f_gradient"], f"*{dtype}")
    pointers["sums"] = "*fp64" if dtype == "fp64" else "*fp32"
    return case_of(pointers, {"size": "i32"}, {"HALF": half, "GATE": gate, "EXTRA": True, "SUMS": True}, tile)


@pytest.mark.parametrize(
    "kernel, cases",
    [
        ("conv_kernel", [*(conv_case(*case, False) for case in COMPILED),
                         *(conv_case(*case, True) for case in COMPILED[3:4] + COMPILED[8:9])]),
        ("weight_kernel", [weight_case(*case) for case in COMPILED[3:4] + COMPILED[7:9] + COMPILED[-1:]]),
        ("gate_kernel", [gate_case(dtype, 64, "tanh") for dtype in ("fp32", "fp64")]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_they_compile_without_spilling(kernel, cases):
    found = compile_ahead("infovae_fast.kernels.masked_conv", kernel, cases)
    for case, resources in zip((case for case in cases for _ in ARCHITECTURES), found, strict=True):
        assert resources["stack"] == resources["local"] == 0, (case, resources)
        assert resources["shared"] <= 96 * 1024, (case, resources)
