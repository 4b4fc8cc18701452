"""masked_conv2d_halves: two convolutions of one image on every backend, each with an image added."""

import pytest
import torch

from infovae_fast import masked_conv
from infovae_fast.backends import native_missing
from infovae_fast.masked_conv import Mask, MaskedConv2d, masked_conv2d, masked_conv2d_halves
from tests.oracle import check, device_of, near, require
from tests.simt import load
from tests.simt.masked_conv import SOURCES

# n, h, w, Cin, Cout, mask: at a pixel and with taps to all sides, colours, channels that are no vectors; in half
# precision weights that fit shared memory, more tiles of pixels than blocks, columns that do not fill a tile.
CASES = [
    (3, 5, 7, 6, 12, Mask("B", 3, 3)),
    (2, 9, 8, 33, 66, Mask("V", 3)),
    (2, 6, 7, 48, 96, Mask("H", 1, 3, "contiguous")),
    (9, 16, 16, 16, 48, Mask("H", 1)),
    (4, 10, 16, 64, 144, Mask("H", 3)),
]
names = pytest.mark.parametrize("name", ["cuda", "triton", "cpp", "reference"])


def problem(n, h, w, cin, cout, mask, dtype=torch.float32):
    """x, weight, bias, what is added to either half, and the gradients to both."""
    torch.manual_seed(0)
    taps, half = len(mask.taps), (n, cout // 2, h, w)
    given = [torch.randn(n, cin, h, w), torch.randn(taps, cin, cout) / (taps * cin) ** 0.5, torch.randn(cout)]
    given += [torch.randn(half), torch.randn(half)]
    return [t.to(dtype) for t in given], [torch.randn(half).to(dtype) for _ in range(2)]


def options(mask):
    return {name: value for name, value in mask._asdict().items() if name != "gate"}


def run(mask, x, weight, bias, added, added_b, backend):
    return masked_conv2d_halves(x, weight, bias, (added, added_b), **options(mask), backend=backend)


def two(mask, x, weight, bias, added, added_b):
    """By two convolutions of the reference."""
    biases = (None, None) if bias is None else bias.chunk(2)
    each = zip(weight.chunk(2, 2), biases, (added, added_b), strict=True)
    return [masked_conv2d(x, w, b, condition=c, **options(mask), backend="reference") for w, b, c in each]


def results(f, mask, given, upstream, *backend):
    """Both halves and the gradients to what was given."""
    device = device_of(backend[0]) if backend else "cpu"
    given = [None if t is None else t.detach().to(device).requires_grad_() for t in given]
    halves = f(mask, *given, *backend)
    wanted = [t for t in given if t is not None]
    gradients = torch.autograd.grad(halves, wanted, [g.to(device) for g in upstream])
    return [t.detach().cpu() for t in (*halves, *gradients)]


def able(name, case, dtype):
    (x, *rest), _ = problem(*case, dtype)
    require("masked_conv", masked_conv.HALVES, name, x.to(device_of(name)), *rest, case[5])


def meets_the_rule(name, case, dtype, without=()):
    """Without some of x, weight, bias, added and added_b."""
    able(name, case, dtype)
    given, upstream = problem(*case, dtype)
    given = [None if k in without else t for k, t in enumerate(given)]
    exact, exact_upstream = [None if t is None else t.double() for t in given], [g.double() for g in upstream]
    found, truth = results(run, case[5], given, upstream, name), results(two, case[5], exact, exact_upstream)
    if dtype == torch.float64:
        for o, t in zip(found, truth, strict=True):
            near(o, t)
        return
    sizes = results(two, case[5], [None if t is None else t.abs() for t in exact], [g.abs() for g in exact_upstream])
    yardstick = results(two, case[5], given, upstream)
    for o, t, y, scale in zip(found, truth, yardstick, sizes, strict=True):
        check(o, t, y, scale)


@names
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_they_meet_the_rule(name, case, dtype):
    meets_the_rule(name, case, dtype)


@names
@pytest.mark.parametrize("without", [(2,), (3,), (4,), (2, 3, 4)], ids=["bias", "added", "added_b", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_bias_and_what_is_added_may_be_left_out(name, without, dtype):
    meets_the_rule(name, CASES[3], dtype, without)


@names
def test_one_half_may_be_differentiated_alone(name):
    able(name, CASES[3], torch.float64)
    given = [t.to(device_of(name)).requires_grad_() for t in problem(*CASES[3], torch.float64)[0]]
    a, b = run(CASES[3][5], *given, name)
    for half, of_weight in ((a, slice(0, 24)), (b, slice(24, 48))):
        alone = torch.autograd.grad(half.square().sum(), given[:2], retain_graph=True)
        both = torch.autograd.grad(half.square().sum() + 0 * (a + b).sum(), given[:2], retain_graph=True)
        for one, other in zip(alone, both, strict=True):
            near(one, other)
        assert (alone[1][..., of_weight] != 0).all() and alone[1].count_nonzero() == alone[1].numel() // 2


@names
def test_the_future_stays_unread(name):
    """In both halves: a NaN is seen at its own pixel and by those behind it."""
    case = CASES[4]
    able(name, case, torch.bfloat16)
    (x, *rest), _ = problem(*case, torch.bfloat16)
    x[1, :, 5, 7] = torch.nan
    given = [t.to(device_of(name)) for t in (x, *rest)]
    seen = torch.zeros(4, 10, 16, dtype=torch.bool)
    seen[1, 5, 7:9] = True
    for half in run(case[5], *given, name):
        assert torch.equal(half.isnan().any(1).cpu(), seen)


@pytest.fixture
def on_the_cpu():
    """The operators that autograd calls on a GPU, made of two convolutions: its derivatives without one."""
    if reason := native_missing():
        pytest.skip(reason)
    ops = torch.ops.infovae_fast

    def parts(tensor, dim):
        return (None, None) if tensor is None else [t.contiguous() for t in tensor.chunk(2, dim)]

    def forward(x, weight, bias, added, added_b, taps, colours):
        each = zip(parts(weight, 2), parts(bias, 0), (added, added_b), strict=True)
        return tuple(ops.masked_conv_forward(x, w, b, c, None, None, taps, colours, "", False)[0] for w, b, c in each)

    def backward(gradient, gradient_b, x, weight, taps, colours, to_x, to_weight, to_bias):
        wanted = (to_x, to_weight, False, False, False, to_bias, False)
        each = [
            ops.masked_conv_backward(g, None, x, w, None, None, x[:0], taps, colours, "", *wanted)
            for g, w in zip((gradient, gradient_b), parts(weight, 2), strict=True)
        ]
        (x_a, weight_a, *_, bias_a, _), (x_b, weight_b, *_, bias_b, _) = each
        return x_a + x_b, torch.cat([weight_a, weight_b], 2 if to_weight else 0), torch.cat([bias_a, bias_b])

    library = torch.library.Library("infovae_fast", "IMPL", "CPU")
    library.impl("masked_conv_halves_forward", forward)
    library.impl("masked_conv_halves_backward", backward)
    yield
    library._destroy()


def native(mask, *given):
    return masked_conv._halves_native(*given, mask)


def test_the_operators_derivatives(on_the_cpu):
    mask = CASES[0][5]
    given, upstream = problem(*CASES[0], torch.float64)
    for found, truth in zip(results(native, mask, given, upstream), results(two, mask, given, upstream), strict=True):
        near(found, truth)
    settings = ([d for tap in mask.taps for d in tap], masked_conv._colours(mask))
    leaves = [t.requires_grad_() for t in given]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.infovae_fast.masked_conv_halves.default, (*leaves, *settings), test_utils=tests)
    a, _ = native(mask, *leaves)
    (slope,) = torch.autograd.grad(a.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='reference' to differentiate twice"):
        torch.autograd.grad(slope.sum(), leaves[1])


@pytest.mark.parametrize("half", [0, 1])
def test_the_operators_other_half_has_no_part_in_a_gradient(on_the_cpu, half):
    """Nor an infinite weight of it; what is added to it has none."""
    mask = CASES[0][5]
    given, upstream = problem(*CASES[0], torch.float64)
    given[1][..., 6 * (1 - half)] = torch.inf
    leaves = [t.requires_grad_() for t in given]
    some = [leaves[k] for k in (0, 1, 2, 3 + half)]
    found = torch.autograd.grad(native(mask, *leaves)[half], some, upstream[half])
    for one, other in zip(found, torch.autograd.grad(two(mask, *leaves)[half], some, upstream[half]), strict=True):
        near(one, other)
    halves = native(mask, *leaves)
    assert torch.autograd.grad(halves[half].sum(), leaves[4 - half], allow_unused=True) == (None,)
    (bias,) = torch.autograd.grad(native(mask, *leaves)[half].sum(), leaves[2])
    assert bias.count_nonzero() == 6 and bias[6 * half :][:6].ne(0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/simt tells which kernel ran")
def test_weights_that_fit_stay_in_shared_memory():
    """Its tiles are twice as high: this is the kernel that the cases in half precision are for."""
    for case in (CASES[3], CASES[4]):
        n, h, w, *_, mask = case
        for dtype, kept in ((torch.bfloat16, True), (torch.float32, False)):
            run(mask, *problem(*case, dtype)[0], "cuda")
            blocks = load(SOURCES).last_grid()
            assert (blocks < n * h * w / 128) == kept


def test_the_module_learns_both():
    conv = MaskedConv2d(4, 8, 1, window="H", dtype=torch.float64)
    x, added = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)
    a, b = conv.halves(x, (None, added))
    whole = conv(x)
    near(torch.cat([a, b - added], 1), whole)
    (a.sum() + b.sum()).backward()
    assert (conv.weight.grad != 0).all() and torch.equal(conv.bias.grad, torch.full_like(conv.bias, 18))


def test_empty_batch():
    a, b = masked_conv2d_halves(torch.zeros(0, 4, 3, 3), torch.zeros(1, 4, 8), window="H", kernel_size=1)
    assert a.shape == b.shape == (0, 4, 3, 3)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"weight": torch.zeros(1, 4, 7)}, ValueError, r"weight: got Cout=7; accepted: a multiple of 2"),
        (
            {"added": (torch.zeros(2, 4, 3, 3), None)},
            ValueError,
            r"added\[0\]: got shape .*\(2, 4, 5, 5\)",
        ),
        ({"added": (None, torch.zeros(2, 8, 5, 5))}, ValueError, r"added\[1\]: got shape"),
        ({"added": (None, 1.0)}, TypeError, r"added\[1\]: got float; accepted: a torch.Tensor"),
        ({"added": None}, TypeError, r"added: got NoneType; accepted: a tuple of two"),
        ({"added": torch.zeros(2, 2, 4, 5, 5)}, TypeError, r"added: got Tensor; accepted: a tuple of two"),
        ({"added": (torch.zeros(2, 4, 5, 5).double(), None)}, TypeError, r"added\[0\]: got dtype torch.float64"),
        ({"x": torch.zeros(2, 3, 5, 5)}, ValueError, r"x: got shape \(2, 3, 5, 5\); accepted: \[N, 4, H, W\]"),
        ({"backend": "gpu"}, ValueError, r"backend='gpu' is unknown"),
    ],
)
def test_errors_say_what_is_accepted(changes, error, message):
    arguments = {"x": torch.zeros(2, 4, 5, 5), "weight": torch.zeros(1, 4, 8), "window": "H", "kernel_size": 1}
    masked_conv2d_halves(**arguments)
    with pytest.raises(error, match=message):
        masked_conv2d_halves(**(arguments | changes))
