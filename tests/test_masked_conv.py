"""masked_conv against textbook loops, dense masked convolutions, and the laws of causality."""

import copy
import itertools
import math
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from infovae_fast import backends, masked_conv
from infovae_fast.masked_conv import (
    BACKENDS,
    Mask,
    MaskedConv2d,
    from_dense,
    gated,
    masked_conv2d,
    taps,
    to_dense,
)
from tests import oracle

WINDOWS = ("A", "B", "V0", "V", "H0", "H")
ORDERS = ("interleaved", "contiguous")
GATES = (None, "tanh", "glu")
reference = partial(masked_conv2d, backend="reference")
COLOURS = [(1, "interleaved"), (3, "interleaved"), (3, "contiguous")]  # data_channels, group_order
each_window = pytest.mark.parametrize("window", WINDOWS)
each_colour = pytest.mark.parametrize("data_channels, group_order", COLOURS)
each_gate = pytest.mark.parametrize("gate", GATES)


NOT_OF_CUDA = {"test_half_precision_is_computed_in_float32": "its sums are, its products are of half precision"}
NOT_SIMULATED = {
    "test_poison_stays_in_the_future_at_full_size": "tests/simt would take minutes",
    "test_compiles_as_one_graph": "tests/simt is Python",
}
THERE = oracle.device_of("cuda")


def conv_there(x, weight, bias=None, *, condition=None, link=None, **options):
    """masked_conv2d on a GPU, if there is one, of tensors that are elsewhere; out comes back to where x is."""
    home = x.device
    x, weight, bias, condition = (None if t is None else t.to(THERE) for t in (x, weight, bias, condition))
    link = None if link is None else tuple(t.to(THERE) for t in link)
    return masked_conv2d(x, weight, bias, condition=condition, link=link, **options).to(home)


@pytest.fixture(params=[row.name for row in BACKENDS])
def conv(request):
    """masked_conv2d on every backend that can run here, CUDA's on a GPU or through tests/simt;
    tests/test_masked_conv_triton.py has Triton's, which would compile for too long here."""
    name, table, device = request.param, BACKENDS, "cpu"
    if name == "cuda":
        table, device = masked_conv.BACKENDS, THERE  # with the row of tests/simt
    inputs = (torch.zeros(1, 1, 1, 1, device=device), torch.zeros(1, 1, 1, device=device), None, None, None)
    if None not in (reasons := [row.reason(*inputs, Mask("B", 1)) for row in table if row.name == name]):
        pytest.skip(reasons[0])
    unfit = NOT_OF_CUDA if THERE == "cuda" else NOT_OF_CUDA | NOT_SIMULATED
    if name == "cuda" and (reason := unfit.get(request.node.originalname)):
        pytest.skip(reason)
    return partial(conv_there if name == "cuda" else masked_conv2d, backend=name)


@pytest.fixture(autouse=True)
def seeded_on_one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # most images here are tiny: several threads would only wait for each other
    yield
    torch.set_num_threads(threads)


def group(c, channels, data_channels, order):
    return c % data_channels if order == "interleaved" else c * data_channels // channels


def sees(window, dy, dx, g_in, g_out):
    """Does an output of group g_out look at the input of group g_in at offset (dy, dx)?"""
    past = dx < 0 or (dx == 0 and (g_in <= g_out if window in ("B", "H") else g_in < g_out))
    return {
        "A": dy < 0 or (dy == 0 and past),
        "B": dy < 0 or (dy == 0 and past),
        "V0": dy < 0,
        "V": dy <= 0,
        "H0": dy == 0 and past,
        "H": dy == 0 and past,
    }[window]


@cache
def dense_mask(window, k, cin, cout, data_channels=1, group_order="interleaved", gate=None):  # [Cout, Cin, k, k]
    half = cout // 2 if gate else cout
    inputs = [group(c, cin, data_channels, group_order) for c in range(cin)]
    outputs = [group(o % half, half, data_channels, group_order) for o in range(cout)]
    near = range(-(k // 2), k // 2 + 1)
    seen = [[[[sees(window, dy, dx, i, o) for dx in near] for dy in near] for i in inputs] for o in outputs]
    return torch.tensor(seen, dtype=torch.float64)


def textbook(x, dense, bias, condition, window, data_channels, group_order, gate):
    """One scalar product at a time."""
    (n, cin, h, w), (cout, _, k, _) = x.shape, dense.shape
    half = cout // 2 if gate else cout
    f = [[[[0.0] * w for _ in range(h)] for _ in range(cout)] for _ in range(n)]
    X, D = x.tolist(), dense.tolist()
    for b, o, i, j in itertools.product(range(n), range(cout), range(h), range(w)):
        g_out = group(o % half, half, data_channels, group_order)
        total = 0.0 if bias is None else bias[o].item()
        if condition is not None:
            total += (condition[b, o] if condition.ndim == 2 else condition[b, o, i, j]).item()
        for c, u, v in itertools.product(range(cin), range(k), range(k)):
            dy, dx = u - k // 2, v - k // 2
            inside = 0 <= i + dy < h and 0 <= j + dx < w
            if inside and sees(window, dy, dx, group(c, cin, data_channels, group_order), g_out):
                total += X[b][c][i + dy][j + dx] * D[o][c][u][v]
        f[b][o][i][j] = total
    if gate is None:
        return torch.tensor(f, dtype=torch.float64).reshape(n, cout, h, w)
    out = torch.empty(n, half, h, w, dtype=torch.float64)
    for b, o, i, j in itertools.product(range(n), range(half), range(h), range(w)):
        a = math.tanh(f[b][o][i][j]) if gate == "tanh" else f[b][o][i][j]
        out[b, o, i, j] = a / (1 + math.exp(-f[b][o + half][i][j]))
    return out


def problem(window, k=3, data_channels=1, group_order="interleaved", gate=None, cin=6, cout=12, **sizes):
    """Random x, dense weight, and the keywords of masked_conv2d."""
    n, h, w = sizes.get("n", 2), sizes.get("h", 4), sizes.get("w", 5)
    x = torch.randn(n, cin, h, w, dtype=torch.float64)
    dense = torch.randn(cout, cin, k, k, dtype=torch.float64) / (cin * k)
    layout = {"window": window, "data_channels": data_channels, "group_order": group_order, "gate": gate}
    return x, dense, layout


def assert_oracle(out, truth, yardstick, scale):
    """No worse than twice the reference in the same dtype, up to one rounding of the sum of |terms|."""
    bound = 2 * (yardstick.double() - truth).abs().max() + torch.finfo(out.dtype).eps * scale
    assert (out.double() - truth).abs().max() <= bound


@each_window
@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize("data_channels", [1, 3])
def test_taps_are_the_seen_offsets_in_raster_order(window, k, data_channels):
    offsets = itertools.product(range(-(k // 2), k // 2 + 1), repeat=2)
    pairs = list(itertools.product(range(data_channels), repeat=2))
    expected = tuple(t for t in offsets if any(sees(window, *t, *pair) for pair in pairs))
    if expected:
        assert taps(window, k, data_channels) == expected
    else:
        with pytest.raises(ValueError, match="has no taps: the convolution would be identically zero"):
            taps(window, k, data_channels)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_equals_the_textbook_loops(data):
    draw = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    window, data_channels, gate, k = draw(*WINDOWS), draw(1, 2, 3), draw(*GATES), draw(1, 3, 5)
    if k == 1 and (window == "V0" or (window in ("A", "H0") and data_channels == 1)):
        k = 3
    cin, cout = draw(1, 2) * data_channels, draw(1, 2) * data_channels * (2 if gate else 1)
    sizes = {"n": draw(1, 2), "h": draw(1, 2, 3), "w": draw(1, 2, 4)}
    x, dense, layout = problem(window, k, data_channels, draw(*ORDERS), gate, cin, cout, **sizes)
    n, _, h, w = x.shape
    bias = draw(None, torch.randn(cout, dtype=torch.float64))
    condition = draw(None, torch.randn(n, cout, dtype=torch.float64), torch.randn(n, cout, h, w, dtype=torch.float64))
    weight = from_dense(dense, **layout)
    out = reference(x, weight, bias, condition=condition, kernel_size=k, **layout)
    torch.testing.assert_close(out, textbook(x, dense, bias, condition, **layout), rtol=0, atol=1e-12)


@each_window
@each_colour
@each_gate
def test_equals_the_dense_masked_convolution_with_its_gradients(window, data_channels, group_order, gate):
    k = 5
    x, dense, layout = problem(window, k, data_channels, group_order, gate)
    mask = dense_mask(window, k, 6, 12, data_channels, group_order, gate)
    x.requires_grad_()
    dense.requires_grad_()
    bias = torch.randn(12, dtype=torch.float64, requires_grad=True)
    f = F.conv2d(x, dense * mask, bias, padding=k // 2)
    truth = f if gate is None else gated(f, gate)
    weight = from_dense(dense.detach(), **layout).requires_grad_()
    out = reference(x, weight, bias, kernel_size=k, **layout)
    assert (out - truth).abs().max() < 1e-12
    upstream = torch.randn_like(out)
    d_x, d_dense, d_bias = torch.autograd.grad(truth, (x, dense, bias), upstream)
    g_x, g_weight, g_bias = torch.autograd.grad(out, (x, weight, bias), upstream)
    g_dense = to_dense(g_weight, kernel_size=k, **layout)
    for got, expected in ((g_x, d_x), (g_dense, d_dense), (g_bias, d_bias)):
        assert (got - expected).abs().max() < 1e-11
    assert torch.equal(from_dense(g_dense, **layout), g_weight)  # no gradient in masked blocks


@each_window
@each_colour
@each_gate
def test_dense_and_compact_weights_round_trip(window, data_channels, group_order, gate):
    _, dense, layout = problem(window, 5, data_channels, group_order, gate)
    dense.requires_grad_()
    weight = from_dense(dense, **layout)
    assert weight.shape == (len(taps(window, 5, data_channels)), 6, 12)
    again = to_dense(weight, kernel_size=5, **layout)
    mask = dense_mask(window, 5, 6, 12, data_channels, group_order, gate)
    assert torch.equal(again, dense * mask)
    assert torch.equal(from_dense(again, **layout), weight)
    assert torch.equal(torch.autograd.grad(again.sum(), dense)[0], mask)  # both are differentiable


@each_window
@each_gate
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_backend_obeys_the_oracle_rule(conv, window, gate, dtype):
    x, dense, layout = problem(window, 3, 3, gate=gate, h=6, w=7)
    weight, bias = from_dense(dense, **layout), torch.randn(12).double()
    condition = torch.randn(2, 12).double()
    rounded = [t.to(dtype).requires_grad_() for t in (x, weight, bias, condition)]
    exact = [t.detach().double().requires_grad_() for t in rounded]
    run = lambda f, t: f(t[0], t[1], t[2], condition=t[3], kernel_size=3, **layout)  # noqa: E731
    out, yardstick, truth = (
        run(conv, rounded),
        run(reference, rounded),
        run(reference, exact),
    )
    assert out.dtype == dtype
    size = [t.detach().abs() for t in exact]
    scale = run(reference, size).max() + 1
    assert_oracle(out, truth, yardstick, scale)
    upstream = torch.randn(out.shape).to(dtype)
    got, meant = torch.autograd.grad(out, rounded, upstream), torch.autograd.grad(yardstick, rounded, upstream)
    for g, y, t in zip(got, meant, torch.autograd.grad(truth, exact, upstream.double()), strict=True):
        assert g.dtype == dtype
        assert_oracle(g, t, y, t.abs().max() + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(conv, dtype):
    x, dense, layout = problem("B", gate="tanh", cin=64, cout=64)
    x, weight = x.to(dtype), from_dense(dense, **layout).to(dtype)
    exact = conv(x.float(), weight.float(), kernel_size=3, **layout)
    assert torch.equal(conv(x, weight, kernel_size=3, **layout), exact.to(dtype))
    assert torch.equal(conv(x, weight.float(), kernel_size=3, **layout), exact)  # half meets float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(conv(x.float(), weight.float(), kernel_size=3, **layout), exact)


def test_autocast_of_a_gpu_multiplies_in_half_precision(conv, monkeypatch):
    """As conv2d does: float32 is cast, and its gradients are float32; float64 stays."""
    x, dense, layout = problem("H", gate="tanh", cin=8, cout=12)
    weight, link = from_dense(dense, **layout), (torch.randn(2, 3, *x.shape[2:]), torch.randn(3, 12))
    tensors = [t.float().requires_grad_() for t in (x, weight, torch.randn(12), torch.randn(len(x), 12), *link)]

    def run(x, weight, bias, condition, values, matrix):
        return conv(x, weight, bias, condition=condition, link=(values, matrix), kernel_size=3, **layout)

    def gradients(out, tensors):
        return torch.autograd.grad(out.float().square().sum(), tensors)

    half = [t.detach().bfloat16().requires_grad_() for t in tensors]
    meant, device = run(*half), THERE if conv.func is conv_there else "cpu"
    monkeypatch.setattr("infovae_fast.masked_conv.AUTOCAST", (device,))
    with torch.autocast(device, torch.bfloat16):
        out = run(*tensors)
        assert conv(x.double(), weight.double(), kernel_size=3, **layout).dtype == torch.float64
    assert out.dtype == torch.bfloat16 and torch.equal(out, meant)
    for found, other in zip(gradients(out, tensors), gradients(meant, half), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, other.float())


def visibility(window, k, position, h, w, g_in, g_out):  # [H, W] bool: which inputs of g_in the output looks at
    dy, dx = (range(-at, size - at) for at, size in zip(position, (h, w), strict=True))
    near = k // 2
    return torch.tensor([[max(abs(u), abs(v)) <= near and sees(window, u, v, g_in, g_out) for v in dx] for u in dy])


def channels_of(g, channels, data_channels, group_order):
    return [c for c in range(channels) if group(c, channels, data_channels, group_order) == g]


@each_window
@pytest.mark.parametrize(
    "data_channels, group_order, gate",
    [(1, "interleaved", None), (3, "interleaved", "tanh"), (3, "contiguous", None), (3, "contiguous", "glu")],
)
def test_what_is_not_seen_does_not_change_a_bit(conv, window, data_channels, group_order, gate):
    h, w, k = 5, 7, 3
    x, dense, layout = problem(window, k, data_channels, group_order, gate, h=h, w=w)
    x, weight, bias = x.float(), from_dense(dense.float(), **layout), torch.randn(12)
    clean = conv(x, weight, bias, kernel_size=k, **layout)
    for position, g_out in itertools.product([(0, 0), (2, 3), (3, 6), (4, 0)], range(data_channels)):
        seen = torch.zeros(2, 6, h, w, dtype=torch.bool)  # nothing of the other image
        for g_in in range(data_channels):
            channels = channels_of(g_in, 6, data_channels, group_order)
            seen[0, channels] = visibility(window, k, position, h, w, g_in, g_out)
        at = (0, channels_of(g_out, clean.shape[1], data_channels, group_order), *position)
        assert clean[at].isfinite().all()
        for poison in (math.nan, math.inf, 1000.0):
            poisoned = conv(torch.where(seen, x, poison), weight, bias, kernel_size=k, **layout)
            assert torch.equal(poisoned[at], clean[at])


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1000.0])
@pytest.mark.parametrize("window, k", [("A", 7), ("B", 3), ("V0", 3), ("V", 5), ("H0", 5), ("H", 3)])
def test_poison_stays_in_the_future_at_full_size(conv, window, k, poison):
    torch.set_num_threads(2)
    layer = MaskedConv2d(64, 64, k, window=window, gate="tanh")
    run = partial(conv, weight=layer.weight, bias=layer.bias, kernel_size=k, window=window, gate="tanh")
    x = torch.randn(3, 64, 28, 28)
    row, column = 13, 9
    with torch.no_grad():
        clean = run(x)
        poisoned = x.clone()
        poisoned[:, :, row + 1 :] = poison
        if window != "V":  # V reads its whole row
            first = column + 1 if window in ("B", "H") else column
            poisoned[:, :, row, first:] = poison
        out = run(poisoned)
    assert torch.equal(out[:, :, :row], clean[:, :, :row])
    assert torch.equal(out[:, :, row, : column + 1], clean[:, :, row, : column + 1])


@each_window
@each_colour
def test_poisoned_upstream_gradients_reach_only_what_was_seen(conv, window, data_channels, group_order):
    h, w, position = 4, 5, (2, 2)
    x, dense, layout = problem(window, 3, data_channels, group_order, None, h=h, w=w)
    x, weight = x.float().requires_grad_(), from_dense(dense.float(), **layout)
    upstream = torch.randn(2, 12, h, w)
    out = conv(x, weight, kernel_size=3, **layout)
    (clean,) = torch.autograd.grad(out, x, upstream, retain_graph=True)
    for g_out in range(data_channels):
        poisoned = upstream.clone()
        poisoned[(0, channels_of(g_out, 12, data_channels, group_order), *position)] = math.nan
        (gradient,) = torch.autograd.grad(out, x, poisoned, retain_graph=True)
        for c in range(6):
            seen = visibility(window, 3, position, h, w, group(c, 6, data_channels, group_order), g_out)
            assert torch.equal(gradient[0, c].isnan(), seen)
            assert torch.equal(gradient[0, c][~seen], clean[0, c][~seen])
        assert torch.equal(gradient[1], clean[1])


@pytest.mark.parametrize("group_order", ORDERS)
@pytest.mark.parametrize("window", ["A", "B", "H0", "H"])
@each_gate
def test_masked_blocks_of_the_weight_are_never_read(conv, window, group_order, gate):
    x, dense, layout = problem(window, 3, 3, group_order, gate)
    x, weight = x.float(), from_dense(dense.float(), **layout)
    hidden = from_dense(dense_mask(window, 3, 6, 12, 3, group_order, gate), **layout) == 0  # [taps, Cin, Cout]
    assert hidden.sum() == 6 * 12 * (6 if window in ("A", "H0") else 3) / 9
    poisoned = weight.masked_fill(hidden, math.nan).requires_grad_()
    out = conv(x, poisoned, kernel_size=3, **layout)
    assert torch.equal(out, conv(x, weight, kernel_size=3, **layout))
    (gradient,) = torch.autograd.grad(out.square().sum(), poisoned)
    assert (gradient[hidden] == 0).all()
    assert (gradient[~hidden] != 0).all()


def dependencies(network, shape):  # [C_out, H, W, C_in, H, W] bool: where the Jacobian is not zero
    x = torch.randn(shape, dtype=torch.float64)
    outputs = network(x[None])[0].shape
    count = outputs.numel()
    copies = x.expand(count, *shape).clone().requires_grad_()  # one copy for each output
    (jacobian,) = torch.autograd.grad(network(copies), copies, torch.eye(count).reshape(count, *outputs).double())
    return (jacobian != 0).reshape(*outputs, *shape)


@each_window
@each_colour
@pytest.mark.parametrize("gate", [None, "tanh"])
def test_jacobian_has_no_leak_and_no_gap(window, data_channels, group_order, gate):
    h, w, k = 4, 6, 3
    layer = MaskedConv2d(
        3, 6, k, window=window, data_channels=data_channels, group_order=group_order, gate=gate, dtype=torch.float64
    )
    found = dependencies(layer, (3, h, w))
    expected = torch.zeros_like(found)
    for o, i, j, c in itertools.product(range(6), range(h), range(w), range(3)):
        groups = group(c, 3, data_channels, group_order), group(o, 6, data_channels, group_order)
        expected[o, i, j, c] = visibility(window, k, (i, j), h, w, *groups)
    assert not (found & ~expected).any(), "leak"
    assert not (expected & ~found).any(), "missing"


class RasterStack(torch.nn.Module):
    """A, then B, then B of size 1."""

    def __init__(self, first="A", k=3, layers=2, channels=6, colours=1, z=4, **options):
        super().__init__()
        make = partial(MaskedConv2d, data_channels=colours, dtype=torch.float64, **options)
        self.first = make(colours, channels, k, window=first)
        self.later = torch.nn.ModuleList(make(channels, channels, k, window="B") for _ in range(layers - 1))
        self.head = MaskedConv2d(
            channels,
            colours,
            1,
            window="B",
            data_channels=colours,
            group_order=options.get("group_order", "interleaved"),
            dtype=torch.float64,
        )
        cout = self.first.weight.shape[2]
        self.z = torch.nn.Linear(z, cout, dtype=torch.float64)
        self.code = torch.randn(1, z, dtype=torch.float64)

    def forward(self, x):
        condition = self.z(self.code).expand(len(x), -1)
        h = self.first(x, condition)
        for layer in self.later:
            h = layer(h, condition)
        return self.head(h)


class ShiftOnceStack(torch.nn.Module):
    """The vertical stack V0, V, V, ... linked before its gate into the horizontal stack H0, H, H, ..."""

    def __init__(self, k=3, layers=3, channels=6, colours=1, z=4, group_order="interleaved", gate="tanh"):
        super().__init__()
        self.gate = gate
        make = partial(MaskedConv2d, dtype=torch.float64)
        coloured = {"data_channels": colours, "group_order": group_order}
        widths = [colours] + [channels] * (layers - 1)
        self.vertical = torch.nn.ModuleList(
            make(c, 2 * channels, k, window="V" if i else "V0") for i, c in enumerate(widths)
        )
        self.horizontal = torch.nn.ModuleList(
            make(c, channels, k, window="H" if i else "H0", gate=gate, **coloured) for i, c in enumerate(widths)
        )
        self.link = torch.nn.ModuleList(
            torch.nn.Conv2d(2 * channels, 2 * channels, 1, dtype=torch.float64) for _ in widths
        )
        self.z = torch.nn.Linear(z, 2 * channels, dtype=torch.float64)
        self.code = torch.randn(1, z, dtype=torch.float64)
        self.head = make(channels, colours, 1, window="B", **coloured)

    def forward(self, x):
        v = h = x
        condition = self.z(self.code)[:, :, None, None]
        for vertical, link, horizontal in zip(self.vertical, self.link, self.horizontal, strict=True):
            before = vertical(v)
            v = gated(before + condition, self.gate)
            h = horizontal(h, link(before) + condition)
        return self.head(h)


def test_receptive_field_of_a_raster_stack():
    h, w, layers = 4, 6, 3
    found = dependencies(RasterStack(layers=layers, gate="tanh"), (1, h, w))[0, :, :, 0]
    for p in itertools.product(range(h), range(w)):
        reached = {p}
        for window in ["B"] * (layers - 1) + ["A"]:
            steps = itertools.product(reached, taps(window, 3))
            reached = {(i + dy, j + dx) for (i, j), (dy, dx) in steps if 0 <= i + dy < h and 0 <= j + dx < w}
        assert {tuple(q) for q in found[p].nonzero().tolist()} == reached


@pytest.mark.parametrize("k, layers, h, w", [(3, 2, 5, 6), (3, 3, 4, 8), (5, 3, 6, 6), (3, 1, 3, 3), (3, 2, 1, 5)])
def test_receptive_field_of_the_shift_once_stack_is_a_rectangle_of_past(k, layers, h, w):
    found = dependencies(ShiftOnceStack(k, layers), (1, h, w))[0, :, :, 0]
    reach = layers * (k // 2)
    i, j = torch.arange(h), torch.arange(w)
    dy = i[None, None, :, None] - i[:, None, None, None]  # [H, 1, H, 1]
    dx = j[None, None, None, :] - j[None, :, None, None]  # [1, W, 1, W]
    expected = (dy >= -reach) & (dx.abs() <= reach) & ((dy < 0) | ((dy == 0) & (dx < 0)))
    assert not (found & ~expected).any(), "leak"
    assert not (expected & ~found).any(), "missing"
    if reach >= max(h, w) - 1:  # deep enough: every past pixel, no blind spot
        assert torch.equal(found.reshape(h * w, h * w), torch.ones(h * w, h * w, dtype=torch.bool).tril(-1))


@pytest.mark.parametrize("stack", [RasterStack, ShiftOnceStack])
@pytest.mark.parametrize("group_order", ORDERS)
@pytest.mark.parametrize("gate", ["tanh", "glu"])
@pytest.mark.parametrize("channels", [3, 6])
def test_colours_of_one_pixel_see_the_earlier_ones(stack, group_order, gate, channels):
    h, w = 2, 3
    network = stack(layers=3, channels=channels, colours=3, group_order=group_order, gate=gate)
    found = dependencies(network, (3, h, w))  # [3, H, W, 3, H, W]
    strictly_lower = torch.ones(3, 3, dtype=torch.bool).tril(-1)
    for i, j in itertools.product(range(h), range(w)):
        assert torch.equal(found[:, i, j, :, i, j], strictly_lower)
    order = found.permute(1, 2, 0, 4, 5, 3).reshape(h * w * 3, h * w * 3)  # pixel after pixel, colour after colour
    assert not order.triu().any(), "leak"
    if stack is ShiftOnceStack:  # a raster stack has its blind spot
        assert torch.equal(order, torch.ones_like(order).tril(-1)), "missing"


def test_colours_of_one_pixel_without_a_gate():
    for group_order in ORDERS:
        found = dependencies(RasterStack(colours=3, group_order=group_order), (3, 1, 2))[:, 0, 1, :, 0, 1]
        assert torch.equal(found, torch.ones(3, 3, dtype=torch.bool).tril(-1))


def total_probability(network, colours, h, w):
    bits = colours * h * w
    images = torch.tensor(list(itertools.product((0.0, 1.0), repeat=bits)), dtype=torch.float64)
    images = images.reshape(-1, colours, h, w)
    with torch.no_grad():
        logits = 3 * network(images)
    log_p = -F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum((1, 2, 3))
    return log_p.exp().sum().item()


@pytest.mark.parametrize("colours, h, w", [(1, 3, 3), (1, 2, 4), (1, 4, 2), (1, 1, 5), (1, 5, 1), (3, 1, 3), (3, 2, 1)])
@pytest.mark.parametrize("stack", [RasterStack, ShiftOnceStack])
def test_probabilities_of_all_images_sum_to_one(stack, colours, h, w):
    for seed, group_order in enumerate(ORDERS):
        torch.manual_seed(seed)
        network = stack(layers=3, colours=colours, group_order=group_order, gate="tanh")
        assert abs(total_probability(network, colours, h, w) - 1) < 1e-6


def test_probabilities_do_not_sum_to_one_where_the_first_layer_sees_the_present():
    assert abs(total_probability(RasterStack(first="B", gate="tanh"), 1, 3, 3) - 1) > 1e-3


@each_window
@pytest.mark.parametrize("data_channels, gate, spatial", [(1, None, False), (1, "glu", True), (2, "tanh", False)])
def test_first_and_second_derivatives(window, data_channels, gate, spatial):
    x, dense, layout = problem(window, 3, data_channels, "contiguous", gate, cin=2, cout=4, n=2, h=2, w=3)
    bias = torch.randn(4, dtype=torch.float64)
    condition = torch.randn((2, 4, 2, 3) if spatial else (2, 4), dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, from_dense(dense, **layout), bias, condition)]

    def f(x, weight, bias, condition):
        return reference(x, weight, bias, condition=condition, kernel_size=3, **layout)

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@each_window
@pytest.mark.parametrize("data_channels, gate", [(1, None), (3, "tanh")])
def test_any_strides(conv, window, data_channels, gate):
    x, dense, layout = problem(window, 3, data_channels, gate=gate, h=5, w=5)
    numbers = x.float(), from_dense(dense.float(), **layout), torch.randn(12), torch.randn(12)
    x, weight, bias, condition = (t.to(oracle.device) for t in numbers)  # on its way there, a view may lose its strides
    condition = condition.expand(2, 12)
    run = partial(conv, kernel_size=3, **layout)

    def results(x, weight, bias, condition, upstream=None):
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias, condition)]  # detach keeps the strides
        out = run(*inputs[:3], condition=inputs[3])
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out) if upstream is None else upstream)]

    plain = results(x, weight, bias, condition.contiguous())
    assert plain[0].is_contiguous(memory_format=torch.channels_last)
    wide = x.new_zeros(2, 12, 5, 10)
    wide[:, ::2, :, ::2] = x
    for hostile_x in (
        x.to(memory_format=torch.channels_last),
        x.mT.contiguous().mT,
        x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        wide[:, ::2, :, ::2],
    ):
        hostile_weight = weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        one = x.new_ones(1, 1, 1, 1).expand(plain[0].shape)  # an expanded upstream gradient
        spatial = condition[:, :, None, None].expand(2, 12, 5, 5)
        for hostile in (
            results(hostile_x, hostile_weight, bias, condition, one),
            results(hostile_x, weight, bias, spatial),
        ):
            hostile[4] = hostile[4] if hostile[4].ndim == 2 else hostile[4].sum((2, 3))
            for got, expected in zip(hostile, plain, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    row = x[:1, :1, :1, :1].expand(2, 6, 5, 5)  # one number in memory
    torch.testing.assert_close(run(row, weight), run(row.contiguous(), weight), rtol=1e-5, atol=1e-5)


@each_window
@each_gate
@pytest.mark.parametrize("shape", [(2, 6, 1, 1), (2, 6, 1, 4), (2, 6, 4, 1), (1, 6, 2, 3)])
def test_images_smaller_than_the_kernel(conv, window, gate, shape):
    n, _, h, w = shape
    x, dense, layout = problem(window, 9, 3, gate=gate, n=n, h=h, w=w)
    inputs = [x.float().requires_grad_(), from_dense(dense, **layout).float().requires_grad_()]
    out = conv(*inputs, kernel_size=9, **layout)
    expected = textbook(x, dense, None, None, **layout)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert all(g is not None and g.isfinite().all() for g in torch.autograd.grad(out.sum(), inputs))


@each_window
@each_gate
@each_colour
def test_empty_batch(conv, window, gate, data_channels, group_order):
    layer = MaskedConv2d(3, 6, 3, window=window, gate=gate, data_channels=data_channels, group_order=group_order)
    x = torch.zeros(0, 3, 4, 5, requires_grad=True)
    out = conv(x, layer.weight, layer.bias, condition=torch.zeros(0, layer.weight.shape[2]), **layer.mask._asdict())
    assert out.shape == (0, 6, 4, 5)
    out.sum().backward()
    assert x.grad.shape == x.shape and layer.weight.grad.eq(0).all()


@pytest.mark.parametrize("data_channels, gate", [(1, None), (3, "tanh"), (3, "glu")])
def test_a_link_is_a_condition_made_by_a_product_at_each_pixel(conv, data_channels, gate):
    x, dense, layout = problem("H", data_channels=data_channels, gate=gate)
    weight = from_dense(dense, **layout)
    values, matrix = torch.randn(2, 7, 4, 5, dtype=x.dtype), torch.randn(7, 12, dtype=x.dtype)
    inputs = [t.requires_grad_() for t in (x, weight, values, matrix)]
    beside = torch.randn(2, 12, dtype=x.dtype)
    options = {"kernel_size": 3, **layout}
    product = torch.einsum("nchw,cd->ndhw", values, matrix) + beside[:, :, None, None]
    results = []
    for extra in ({"condition": beside, "link": (values, matrix)}, {"condition": product}):
        out = conv(x, weight, **extra, **options)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_same_bits_twice(conv):
    torch.set_num_threads(2)
    layer = MaskedConv2d(32, 32, 5, window="B", gate="tanh")
    x = torch.randn(4, 32, 14, 14, requires_grad=True)
    run = partial(conv, x, layer.weight, layer.bias, **layer.mask._asdict())
    results = []
    for _ in range(2):
        out = run()
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, layer.weight, layer.bias))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiles_as_one_graph(conv):
    layer = MaskedConv2d(3, 6, 3, window="B", data_channels=3, gate="tanh")
    run = partial(conv, **layer.mask._asdict())
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x, condition = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 12)
    eager, out = (f(x, layer.weight, layer.bias, condition=condition) for f in (run, compiled))
    torch.testing.assert_close(out, eager)
    torch.testing.assert_close(*(torch.autograd.grad(f.square().sum(), x)[0] for f in (out, eager)))


@each_window
@each_colour
@each_gate
def test_module_starts_with_the_fan_in_of_what_it_sees(window, data_channels, group_order, gate):
    layer = MaskedConv2d(12, 24, 3, window=window, data_channels=data_channels, group_order=group_order, gate=gate)
    cout = 48 if gate else 24
    kept = from_dense(dense_mask(window, 3, 12, cout, data_channels, group_order, gate), **mask_options(layer)).float()
    bound = kept.sum((0, 1)).clamp(min=1).rsqrt()  # [Cout]
    uniform = (layer.weight / bound)[kept == 1].detach()
    assert uniform.abs().max() <= 1.001 and abs(uniform.std() - 3**-0.5) < 0.05 and (uniform != 0).all()
    assert (layer.weight[kept == 0] == 0).all()
    assert (layer.bias.abs() <= 1.001 * bound).all() and abs((layer.bias / bound).std() - 3**-0.5) < 0.2


def mask_options(layer):
    return {name: value for name, value in layer.mask._asdict().items() if name != "kernel_size"}


def test_module_is_an_ordinary_module():
    layer = MaskedConv2d(3, 6, 3, window="A", data_channels=3, gate="tanh")
    mask = "window='A', kernel_size=3, data_channels=3, group_order='interleaved', gate='tanh'"
    assert repr(layer) == f"MaskedConv2d(3, 6, {mask}, bias=True)"
    x, condition = torch.randn(2, 3, 4, 4), torch.randn(2, 12, 4, 4)
    version = layer.weight._version
    out = layer(x, condition)
    assert out.shape == (2, 6, 4, 4)
    assert layer.weight._version == version  # the forward pass does not write to its parameters
    other = MaskedConv2d(3, 6, 3, window="A", data_channels=3, gate="tanh")
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert torch.equal(other(x, condition), out)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert MaskedConv2d(3, 6, 3, window="A", bias=False).bias is None
    on_meta = MaskedConv2d(3, 6, 3, window="B", device="meta", dtype=torch.float16)
    assert on_meta(torch.empty(2, 3, 4, 5, device="meta", dtype=torch.float16)).shape == (2, 6, 4, 5)


def test_a_colour_that_sees_nothing_has_its_bias_only():
    layer = MaskedConv2d(3, 3, 1, window="A", data_channels=3)
    out = layer(torch.full((1, 3, 2, 2), math.nan))
    assert torch.equal(out[:, 0], layer.bias[0].expand(1, 2, 2))
    assert layer.weight[0, :, 0].eq(0).all() and layer.bias[0].abs() <= 1


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"window": "C"}, ValueError, r"window: got 'C'; accepted: 'A', 'B', 'V0', 'V', 'H0', 'H'"),
        ({"group_order": "rgb"}, ValueError, r"group_order: got 'rgb'; accepted: 'interleaved', 'contiguous'"),
        ({"gate": "relu"}, ValueError, r"gate: got 'relu'; accepted: None, 'tanh', 'glu'"),
        ({"kernel_size": 4}, ValueError, r"kernel_size: got 4; accepted: 1, 3, 5, \.\.\."),
        ({"kernel_size": -3}, ValueError, r"kernel_size: got -3; accepted: 1, 3, 5"),
        ({"kernel_size": (3, 3)}, TypeError, r"kernel_size: got \(3, 3\) \(tuple\); accepted: one int"),
        ({"kernel_size": 3.0}, TypeError, r"kernel_size: got 3\.0 \(float\)"),
        ({"data_channels": 0}, ValueError, r"data_channels: got 0; accepted: 1, 2, 3, \.\.\."),
        ({"data_channels": True}, TypeError, r"data_channels: got True \(bool\)"),
        ({"window": "A", "kernel_size": 1}, ValueError, r"window='A' with kernel_size=1 has no taps.*identically zero"),
        ({"window": "V0", "kernel_size": 1}, ValueError, r"accepted: kernel_size 3 or more, or the window of a later"),
        ({"window": "H0", "kernel_size": 1}, ValueError, r"window='H0'"),
        ({"x": [1.0]}, TypeError, r"x: got list; accepted: a torch.Tensor"),
        ({"weight": None}, TypeError, r"weight: got NoneType; accepted: a torch.Tensor"),
        ({"bias": 0.0}, TypeError, r"bias: got float"),
        ({"x": torch.zeros(2, 4, 5, 5, dtype=torch.uint8)}, TypeError, r"x: got dtype torch.uint8; accepted: float16"),
        ({"weight": torch.zeros(5, 4, 8, dtype=torch.complex64)}, TypeError, r"weight: got dtype torch.complex64"),
        (
            {"x": torch.zeros(2, 4, 5, 5).double()},
            TypeError,
            r"weight: got dtype torch.float32, but x is torch.float64",
        ),
        ({"x": torch.zeros(2, 4, 5, 5, device="meta")}, ValueError, r"weight: is on cpu, but x on meta; move one"),
        ({"x": torch.zeros(4, 5, 5)}, ValueError, r"x: got shape \(4, 5, 5\); accepted: \[N, Cin, H, W\]; x\[None\]"),
        ({"x": torch.zeros(2, 3, 5, 5)}, ValueError, r"x: got shape \(2, 3, 5, 5\); accepted: \[N, 4, H, W\]"),
        ({"weight": torch.zeros(8, 4, 3, 3)}, ValueError, r"weight: got shape \(8, 4, 3, 3\).*from_dense makes it"),
        ({"weight": torch.zeros(9, 4, 8)}, ValueError, r"weight: got shape \(9, 4, 8\).*the 5 taps of window='B'"),
        ({"weight": torch.zeros(5, 4, 0)}, ValueError, r"channels: got Cin=4, Cout=0"),
        ({"weight": torch.zeros(5, 4, 7), "gate": "glu"}, ValueError, r"Cout=7; .*and Cout of 2, .*gate='glu'"),
        ({"data_channels": 3}, ValueError, r"Cin=4, Cout=8; accepted: Cin a multiple of 3 and Cout of 3"),
        (
            {"x": torch.zeros(2, 6, 5, 5), "weight": torch.zeros(5, 6, 9), "data_channels": 3, "gate": "tanh"},
            ValueError,
            r"Cin=6, Cout=9; accepted: Cin a multiple of 3 and Cout of 6, because data_channels=3 and gate='tanh'",
        ),
        ({"bias": torch.zeros(1, 8)}, ValueError, r"bias: got shape \(1, 8\); accepted: \[Cout\] = \(8,\)"),
        (
            {"condition": torch.zeros(2, 4)},
            ValueError,
            r"condition: got shape \(2, 4\); .*= \(2, 8\) or .*\(2, 8, 5, 5\)",
        ),
        ({"condition": torch.zeros(2, 8, 1, 1)}, ValueError, r"condition: got shape \(2, 8, 1, 1\)"),
        ({"link": torch.zeros(2, 3, 5, 5)}, TypeError, r"link: got Tensor; accepted: \(values .*, weight "),
        ({"link": (torch.zeros(2, 3, 5, 5), None)}, TypeError, r"link_weight: got NoneType"),
        (
            {"link": (torch.zeros(2, 3, 5, 5), torch.zeros(8, 3))},
            ValueError,
            r"link: got shapes \(2, 3, 5, 5\) and \(8, 3\); accepted: values .*\[2, Clink, 5, 5\] and .*\[Clink, 8\]",
        ),
        ({"link": (torch.zeros(2, 0, 5, 5), torch.zeros(0, 8))}, ValueError, r"link: got shapes \(2, 0, 5, 5\)"),
        ({"link": (torch.zeros(1, 3, 5, 5), torch.zeros(3, 8))}, ValueError, r"link: got shapes \(1, 3, 5, 5\)"),
        ({"backend": "gpu"}, ValueError, r"backend='gpu' is unknown; accepted: 'auto'"),
    ],
)
def test_errors_say_what_is_accepted(changes, error, message):
    arguments = {"x": torch.zeros(2, 4, 5, 5), "weight": torch.zeros(5, 4, 8), "window": "B", "kernel_size": 3}
    masked_conv2d(**arguments)
    with pytest.raises(error, match=message):
        masked_conv2d(**(arguments | changes))


def test_errors_of_the_helpers_and_the_module():
    with pytest.raises(ValueError, match=r"dense: got shape \(8, 4, 1, 3\).*pad 1 x k"):
        from_dense(torch.zeros(8, 4, 1, 3), window="H")
    with pytest.raises(ValueError, match=r"kernel_size: got 2"):
        from_dense(torch.zeros(8, 4, 2, 2), window="B")
    with pytest.raises(ValueError, match=r"Cin a multiple of 3"):
        from_dense(torch.zeros(8, 4, 3, 3), window="B", data_channels=3)
    with pytest.raises(ValueError, match=r"the 6 taps of window='V', kernel_size=3"):
        to_dense(torch.zeros(5, 4, 8), window="V", kernel_size=3)
    with pytest.raises(ValueError, match=r"identically zero"):
        MaskedConv2d(1, 8, 1, window="A")
    with pytest.raises(ValueError, match=r"Cin=1, Cout=16; accepted: Cin a multiple of 3 and Cout of 6"):
        MaskedConv2d(1, 8, 3, window="A", data_channels=3, gate="tanh")
    with pytest.raises(ValueError, match=r"gate: got 'swish'"):
        MaskedConv2d(1, 8, 3, window="A", gate="swish")


def test_a_named_backend_that_cannot_run_says_why():
    x, weight = torch.zeros(1, 1, 3, 3), torch.zeros(5, 1, 1)
    inputs = (x, weight, None, None, None, Mask("B", 3))
    for name, reason in backends.explain("masked_conv", masked_conv.BACKENDS, *inputs).items():
        if reason is not None:
            message = f"backend='{name}' cannot run masked_conv: .*Available here: .*reference"
            with pytest.raises(RuntimeError, match=message):
                masked_conv2d(x, weight, window="B", kernel_size=3, backend=name)
