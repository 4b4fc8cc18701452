"""OPERATOR: convolution that cannot see the future.

With pixels in raster order, one matrix for each tap t = (dy, dx), and zeros outside the image,

    f[n, :, p] = sum_t x[n, :, p + t] @ weight[t] + bias + condition[n, :, p] + link[n, :, p] @ link_weight
    out        = f,  or with a gate  tanh(f_a) * sigmoid(f_b)  ("tanh"),  f_a * sigmoid(f_b)  ("glu")

where f_a and f_b are the first and the second half of f's channels. Shapes: x [N, Cin, H, W], weight
[taps, Cin, Cout], bias [Cout], condition [N, Cout] (one for all pixels) or [N, Cout, H, W], link [N, Clink, H, W] with
link_weight [Clink, Cout], out [N, Cout, H, W], with a gate [N, Cout/2, H, W]. Any strides come in (channels-last
without a copy), channels-last comes out.

**Windows.** A tap is a position of the k x k kernel that the mask keeps; r = k // 2. Taps are in raster order:

    "A"    rows -r..-1 of columns -r..r, then (0, -r..-1)     first layer of a raster stack
    "B"    the same, and (0, 0)                               its later layers
    "V0"   rows -r..-1 of columns -r..r                       first layer of the vertical stack
    "V"    rows -r..0  of columns -r..r                       its later layers
    "H0"   (0, -r..-1)                                        first layer of the horizontal stack
    "H"    (0, -r..0)                                         its later layers

B, V and H see their own pixel or row: they are causal behind a first layer, which hid it. Hidden only once
(shift-once), the present costs no past: the vertical stack, linked into the horizontal one, reaches every earlier
pixel. A raster stack does not: it is blind to a triangle above to the right.

**Colours.** With data_channels = G > 1 the channels inside a pixel are ordered too. Channel c of C is in group c % G
("interleaved") or c * G // C ("contiguous"); with a gate C is one half of Cout and each half is grouped alike, so the a
and b of an output share their group. A and H0 now have the centre tap (0, 0), from each group to the strictly later
ones; in B and H it also joins a group to itself. That tap is stored whole: its masked blocks are ignored, never read,
with a gradient of exactly zero. V0 and V see finished rows only, in all groups: there data_channels changes nothing.

**Contract.** Masked inputs are never read: NaN or inf in the future stays in the future, and an output keeps every bit
whatever it may not see. Hence products of matrices, whose rows never meet: 0 * NaN in a dense masked kernel is NaN,
and a convolution library may transform whole tiles (Winograd, FFT).

* Differentiable to x, weight, bias, condition and link; by the reference to any order, by the fast backends once.
* Half precision is computed in float32 and returned as it came; where it meets float32 all is float32. `cuda` and
  `triton` multiply half precision as it came, sum and gate in float32, and round f and its gradient in between to the
  dtype of x.
* Under autocast on a GPU float32 becomes its half precision, as for `conv2d`, and gradients are float32 again; float64
  stays. On the CPU, where half precision would be no faster, nothing changes.
* The sum over (tap, input channel; by group where there are colours) is one matrix product, so that the reference
  holds taps * Cin values for each pixel. Bias, condition and link are added to it, in any order; then comes the gate.
* bias, condition and link are never masked: an output sees all of its own pixel there. What links a vertical stack to a
  horizontal one enters as `link`, and its product is never stored, save by the reference.
* A window without taps (A, V0, H0 with kernel_size=1) is refused: the convolution would be zero.

Source: van den Oord et al., arXiv 1601.06759 (masks) and 1606.05328 (stacks, gate, condition).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infovae_fast.arguments import is_integer, number
from infovae_fast.backends import Backend, check_name, choose, native_missing, transforms, triton_missing

AUTOCAST = ("cuda",)  # devices whose autocast counts
Link = tuple[Tensor, Tensor]  # values [N, Clink, H, W], weight [Clink, Cout]


class Mask(NamedTuple):
    """All that decides which inputs an output sees. `taps` checks it."""

    window: str
    kernel_size: int
    data_channels: int = 1
    group_order: str = "interleaved"
    gate: str | None = None

    @property
    def taps(self) -> tuple[tuple[int, int], ...]:
        _check_mask(self)
        r = self.kernel_size // 2
        above = [(dy, dx) for dy in range(-r, 0) for dx in range(-r, r + 1)]
        end = {"V0": -r, "V": r + 1, "B": 1, "H": 1}.get(self.window, 1 if self.data_channels > 1 else 0)
        current = [(0, dx) for dx in range(-r, end)]
        found = current if self.window in ("H0", "H") else above + current
        if not found:
            raise ValueError(
                f"window={self.window!r} with kernel_size={self.kernel_size} has no taps: the convolution would be "
                "identically zero; accepted: kernel_size 3 or more, or the window of a later layer (B, V, H)"
            )
        return tuple(found)

    @property
    def groups(self) -> int:
        """Channel groups that the centre tap tells apart; where there are several, that tap is the last one."""
        return 1 if self.window in ("V0", "V") else self.data_channels

    @property
    def halves(self) -> int:
        return 2 if self.gate else 1

    def visible(self, group: int) -> int:
        """The centre tap shows an output group the input groups below this number."""
        return group + 1 if self.window in ("B", "H") else group


def taps(window: str, kernel_size: int, data_channels: int = 1) -> tuple[tuple[int, int], ...]:
    """The offsets (dy, dx) that a window reads, in the order of `weight`: raster order."""
    return Mask(window, kernel_size, data_channels).taps


def masked_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    condition: Tensor | None,
    link: Link | None,
    mask: Mask,
    keep_f: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out, f): plain PyTorch: the columns of all taps side by side, then one matrix product for each group."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    n, cin, h, w = x.shape

    # With channels sorted by group and the centre tap last, what a group may see is a prefix of the columns.
    pixels = _to_groups(x.to(dtype).permute(0, 2, 3, 1).contiguous(), mask).flatten(-2)  # [N, H, W, Cin]
    columns = torch.cat([_moved(pixels, dy, dx) for dy, dx in mask.taps], -1).flatten(0, 2)  # [N*H*W, taps*Cin]
    matrix = _to_groups(weight.to(dtype).mT, mask).flatten(-2).mT.flatten(0, 1)  # [taps*Cin, Cout]
    matrix = _to_groups(matrix, mask, mask.halves)  # [taps*Cin, G, Cout/G]
    products = []
    for group in range(mask.groups):
        hidden = (mask.groups - mask.visible(group)) * (cin // mask.groups) if mask.groups > 1 else 0
        seen = columns.shape[1] - hidden
        products.append(columns[:, :seen] @ matrix[:seen, group])  # [N*H*W, Cout/G]
    f = products[0] if mask.groups == 1 else _from_groups(torch.stack(products, -2), mask, mask.halves)

    f = f.unflatten(0, (n, h, w)).permute(0, 3, 1, 2)  # [N, Cout, H, W]
    if bias is not None:
        f = f + bias.to(dtype)[:, None, None]
    if condition is not None:
        f = f + (condition if condition.ndim == 4 else condition[:, :, None, None]).to(dtype)
    if link is not None:
        f = f + (link[0].to(dtype).movedim(1, -1) @ link[1].to(dtype)).movedim(-1, 1)
    return (gated(f, mask.gate) if mask.gate else f).to(x.dtype), f.to(x.dtype)


def gated(f: Tensor, gate: str) -> Tensor:
    """[N, 2C, H, W] -> [N, C, H, W]: tanh(f_a) * sigmoid(f_b) for "tanh", f_a * sigmoid(f_b) for "glu"."""
    a, b = f.chunk(2, 1)
    return (torch.tanh(a) if gate == "tanh" else a) * torch.sigmoid(b)


def _moved(pixels: Tensor, dy: int, dx: int) -> Tensor:
    """Pixel p of the result is pixel p + (dy, dx) of `pixels` [N, H, W, C], dy <= 0; zeros enter."""
    h, w = pixels.shape[1:3]
    dy, dx = max(dy, -h), min(max(dx, -w), w)  # just outside the image there are zeros, and so there are further away
    return F.pad(pixels, (0, 0, -dx, dx, -dy, dy)) if dy or dx else pixels


def _to_groups(values: Tensor, mask: Mask, halves: int = 1) -> Tensor:
    """Channels by group: [..., C] -> [..., G, C/G]."""
    if mask.group_order == "interleaved":
        return values.unflatten(-1, (halves, -1, mask.groups)).movedim(-1, -3).flatten(-2)
    return values.unflatten(-1, (halves, mask.groups, -1)).movedim(-2, -3).flatten(-2)


def _from_groups(values: Tensor, mask: Mask, halves: int = 1) -> Tensor:
    """Channels back in place: [..., G, C/G] -> [..., C]."""
    place = -1 if mask.group_order == "interleaved" else -2
    return values.unflatten(-1, (halves, -1)).movedim(-3, place).flatten(-3)


def _cpp_reason(x: Tensor, *inputs: Any) -> str | None:
    if x.device.type != "cpu":
        return f"it runs on the CPU, and x is on {x.device}"
    return transforms() or native_missing()


MOST_TAPS, MOST_SIDE = 512, 32767  # of csrc/cuda/masked_conv.cu; what is further away than a side reads zeros
CAPABILITY = (8, 0)


def _cuda_reason(x: Tensor, *inputs: Any) -> str | None:
    if x.device.type != "cuda":
        return f"it runs on NVIDIA GPUs, and x is on {x.device}"
    if (capability := torch.cuda.get_device_capability(x.device)) < CAPABILITY:
        return f"it runs from compute capability 8.0 on, and {x.device} has {capability[0]}.{capability[1]}"
    return cuda_limits(x, *inputs) or transforms() or native_missing("cuda")


def cuda_limits(x: Tensor, *inputs: Any) -> str | None:
    """What csrc/cuda/masked_conv.cu has no room for."""
    count, side = max([1, *[len(mask.taps) for mask in inputs if isinstance(mask, Mask)]]), max(x.shape[2:])
    if count > MOST_TAPS or side > MOST_SIDE:
        return f"got {count} taps and {side} pixels a side, accepted: at most {MOST_TAPS} and {MOST_SIDE}"
    return None


def _masked_conv_native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    condition: Tensor | None,
    link: Link | None,
    mask: Mask,
    keep_f: bool = False,
) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if x.is_cuda else torch.promote_types(x.dtype, torch.float32)
    tensors = (None if t is None else t.to(dtype) for t in (x, weight, bias, condition, *(link or (None, None))))
    offsets = [offset for tap in mask.taps for offset in tap]
    out, f = torch.ops.infovae_fast.masked_conv.default(*tensors, offsets, _colours(mask), mask.gate or "", keep_f)
    out = out.to(x.dtype)
    return out, (f.to(x.dtype) if keep_f and mask.gate else out)


def _triton_reason(x: Tensor, *inputs: Any) -> str | None:
    if x.device.type != "cuda":
        return f"it runs on GPUs, and x is on {x.device}"
    return triton_missing() or transforms()


def _masked_conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    condition: Tensor | None,
    link: Link | None,
    mask: Mask,
    keep_f: bool = False,
) -> tuple[Tensor, Tensor]:
    from infovae_fast.kernels.masked_conv import masked_conv

    inputs = (x, weight, bias, condition, *(link or (None, None)))
    keep = keep_f or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs))
    window = (mask.kernel_size, _cells(mask)[0])
    out, f = masked_conv(*inputs, window, _colours(mask), mask.gate or "", keep)
    return out, (f if keep_f and mask.gate else out)


def _colours(mask: Mask) -> tuple[int, int, int]:
    """Groups, are they interleaved, does the last tap join a group to itself."""
    return mask.groups, int(mask.group_order == "interleaved"), mask.visible(0)


BACKENDS = (
    Backend("cuda", _cuda_reason, _masked_conv_native),
    Backend("triton", _triton_reason, _masked_conv_triton),
    Backend("cpp", _cpp_reason, _masked_conv_native),
    Backend("reference", lambda *inputs: None, masked_conv_reference),
)


def _halves_native(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, added_b: Tensor | None, mask: Mask
) -> tuple[Tensor, Tensor]:
    offsets = [offset for tap in mask.taps for offset in tap]
    op = torch.ops.infovae_fast.masked_conv_halves.default
    return tuple(op(x, weight, bias, added, added_b, offsets, _colours(mask)))


def halves_by_two(row: Backend) -> Backend:
    """Of a backend that has no kernel for both halves: two of its convolutions."""

    def run(
        x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, added_b: Tensor | None, mask: Mask
    ) -> tuple[Tensor, ...]:
        biases = (None, None) if bias is None else bias.chunk(2)
        halves = zip(weight.chunk(2, 2), biases, (added, added_b), strict=True)
        return tuple(row.run(x, w.contiguous(), b, more, None, mask)[0] for w, b, more in halves)

    return row._replace(run=run)


HALVES = (BACKENDS[0]._replace(run=_halves_native), *map(halves_by_two, BACKENDS[1:]))


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    window: str,
    kernel_size: int,
    data_channels: int = 1,
    group_order: str = "interleaved",
    condition: Tensor | None = None,
    link: Link | None = None,
    gate: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """The masked convolution of this page.

    Args:
        x: [N, Cin, H, W].
        weight: [taps, Cin, Cout], a matrix for each of `taps(window, kernel_size, data_channels)`.
        bias: [Cout].
        window: "A", "B", "V0", "V", "H0" or "H".
        kernel_size: k, odd.
        data_channels: G, the image channels whose order inside a pixel counts (3 for RGB); divides Cin and Cout.
        group_order: "interleaved" or "contiguous".
        condition: [N, Cout] or [N, Cout, H, W].
        link: (values [N, Clink, H, W], link_weight [Clink, Cout]).
        gate: None, "tanh" or "glu".
        backend: "auto" or one of `infovae_fast.backends.NAMES`.

    Returns:
        [N, Cout, H, W], with a gate [N, Cout/2, H, W].

    Raises:
        TypeError: not a tensor, not floating point, dtypes that do not meet; a size that is not an int.
        ValueError: wrong shapes, devices, names, sizes. RuntimeError: the named backend cannot run these inputs.
    """
    mask = Mask(window, kernel_size, data_channels, group_order, gate)
    return _run(mask, x, weight, bias, condition, backend, link=link)[0]


def masked_conv2d_halves(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    added: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    window: str,
    kernel_size: int,
    data_channels: int = 1,
    group_order: str = "interleaved",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Two convolutions of one image, each with an image added, [N, Cout/2, H, W]: with f = (f_a, f_b) as before a gate,

        a = f_a + added[0],    b = f_b + added[1]

    such as the residual and the skip of a gated layer. `cuda` makes both at once and in one product the gradient to x;
    the other backends are two of `masked_conv2d`. Channels are grouped within each half, as with a gate: where groups
    are contiguous these are not the halves of a convolution without one.

    Args:
        weight, bias: [taps, Cin, Cout] and [Cout], of both.
        added: two images [N, Cout/2, H, W]; None for none.
        x, window, kernel_size, data_channels, group_order, backend: those of `masked_conv2d`.

    Raises:
        TypeError, ValueError, RuntimeError: as `masked_conv2d`.
    """
    mask = Mask(window, kernel_size, data_channels, group_order)
    if not (isinstance(added, tuple) and len(added) == 2):
        got = type(added).__name__
        raise TypeError(f"added: got {got}; accepted: a tuple of two, each an image [N, Cout/2, H, W] or None")
    tensors = _checked_halves(mask, x, weight, bias, *added)
    run = choose("masked_conv", HALVES, backend, *tensors, mask)
    with _without_autocast(x):
        return run(*tensors, mask)


def _run(
    mask: Mask,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    condition: Tensor | None,
    backend: str,
    keep_f: bool = False,
    link: Link | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, f); f only counts if it is to be kept."""
    inputs = (*_checked(mask, x, weight, bias, condition, link), mask, keep_f)
    run = choose("masked_conv", BACKENDS, backend, *inputs)
    with _without_autocast(x):
        return run(*inputs)


def _without_autocast(x: Tensor) -> Any:
    device = x.device.type  # torch.compile of older releases does not trace torch.amp.is_autocast_available
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


class MaskedConv2d(nn.Module):
    """`masked_conv2d` with its parameters: weight [taps, Cin, Cout] and bias [Cout].

    `out_channels` come out: with a gate, Cout is twice that. Both start uniform in +-1/sqrt(fan-in), where the fan-in
    of an output channel counts what it sees; masked blocks of a coloured centre tap start at zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        window: str,
        bias: bool = True,
        data_channels: int = 1,
        group_order: str = "interleaved",
        gate: str | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_name(backend)
        number("in_channels", in_channels, int, above=0)
        number("out_channels", out_channels, int, above=0)
        self.mask = Mask(window, kernel_size, data_channels, group_order, gate)
        self.backend = backend
        cout = self.mask.halves * out_channels
        shape = (len(self.mask.taps), in_channels, cout)
        _check_channels(self.mask, in_channels, cout)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(cout, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        kept = _kept(self.mask, self.weight.shape)
        bound = kept.sum((0, 1)).clamp(min=1).rsqrt().to(self.weight)  # [Cout]
        self.weight.uniform_(-1, 1).mul_(bound * kept.to(self.weight))
        if self.bias is not None:
            self.bias.uniform_(-1, 1).mul_(bound)

    def forward(self, x: Tensor, condition: Tensor | None = None, link: Link | None = None) -> Tensor:
        given: dict[str, Any] = {"condition": condition, "link": link, "backend": self.backend}
        return masked_conv2d(x, self.weight, self.bias, **given, **self.mask._asdict())

    def with_f(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(out, f): also what goes into the gate, [N, Cout, H, W]."""
        return _run(self.mask, x, self.weight, self.bias, condition, self.backend, keep_f=True)

    def halves(self, x: Tensor, added: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor]:
        """`masked_conv2d_halves` with these parameters, whatever the gate."""
        window, kernel_size, data_channels, group_order, _ = self.mask
        given: dict[str, Any] = {"group_order": group_order, "backend": self.backend}
        sizes: dict[str, Any] = {"window": window, "kernel_size": kernel_size, "data_channels": data_channels}
        return masked_conv2d_halves(x, self.weight, self.bias, added, **sizes, **given)

    def extra_repr(self) -> str:
        _, cin, cout = self.weight.shape
        options = "".join(f", {name}={value!r}" for name, value in self.mask._asdict().items())
        return f"{cin}, {cout // self.mask.halves}{options}, bias={self.bias is not None}"


def from_dense(
    dense: Tensor, *, window: str, data_channels: int = 1, group_order: str = "interleaved", gate: str | None = None
) -> Tensor:
    """The compact weight of a dense one, [Cout, Cin, k, k] -> [taps, Cin, Cout]; what the mask hides is left out."""
    if not isinstance(dense, Tensor):
        raise TypeError(f"dense: got {type(dense).__name__}; accepted: a tensor [Cout, Cin, k, k]")
    if dense.ndim != 4 or dense.shape[2] != dense.shape[3]:
        raise ValueError(
            f"dense: got shape {tuple(dense.shape)}; accepted: [Cout, Cin, k, k]; "
            "pad 1 x k and cropped kernels with zeros to k x k first (torch.nn.functional.pad)"
        )
    cout, cin, k, _ = dense.shape
    mask = Mask(window, k, data_channels, group_order, gate)
    cells = _cells(mask)
    _check_channels(mask, cin, cout)
    hidden = ~_kept(mask, (len(cells), cin, cout)).to(dense.device)
    return dense.flatten(2).permute(2, 1, 0)[cells].masked_fill(hidden, 0)


def to_dense(
    weight: Tensor,
    *,
    window: str,
    kernel_size: int,
    data_channels: int = 1,
    group_order: str = "interleaved",
    gate: str | None = None,
) -> Tensor:
    """The dense weight of a compact one, [taps, Cin, Cout] -> [Cout, Cin, k, k], zero where the mask hides."""
    mask = Mask(window, kernel_size, data_channels, group_order, gate)
    _check_weight(mask, weight)
    cells = torch.tensor(_cells(mask), device=weight.device)
    hidden = ~_kept(mask, weight.shape).to(weight.device)
    dense = weight.new_zeros(kernel_size**2, *weight.shape[1:])  # [k*k, Cin, Cout]
    dense = dense.index_copy(0, cells, weight.masked_fill(hidden, 0))
    return dense.permute(2, 1, 0).unflatten(2, (kernel_size, kernel_size))


def _cells(mask: Mask) -> list[int]:
    """Where the taps lie in the flattened k x k kernel."""
    k = mask.kernel_size
    return [(dy + k // 2) * k + dx + k // 2 for dy, dx in mask.taps]


def _kept(mask: Mask, shape: Sequence[int]) -> Tensor:
    """False for weights [taps, Cin, Cout] in a masked block of a coloured centre tap, True for all others."""
    kept = torch.ones(*shape, dtype=torch.bool)
    if mask.groups > 1:
        group = torch.arange(mask.groups)[:, None]  # [G, 1]
        source = _from_groups(group.expand(-1, shape[1] // mask.groups), mask)  # [Cin]
        target = _from_groups(group.expand(-1, shape[2] // mask.groups), mask, mask.halves)  # [Cout]
        kept[-1] = source[:, None] < target + mask.visible(0)
    return kept


def _check_mask(mask: Mask) -> None:
    accepted: dict[str, tuple[str | None, ...]] = {
        "window": ("A", "B", "V0", "V", "H0", "H"),
        "group_order": ("interleaved", "contiguous"),
        "gate": (None, "tanh", "glu"),
    }
    for name, choices in accepted.items():
        if getattr(mask, name) not in choices:
            raise ValueError(f"{name}: got {getattr(mask, name)!r}; accepted: " + ", ".join(map(repr, choices)))
    for name, step in (("kernel_size", 2), ("data_channels", 1)):
        size = getattr(mask, name)
        if not is_integer(size):
            raise TypeError(f"{name}: got {size!r} ({type(size).__name__}); accepted: one int")
        if size < 1 or (size - 1) % step:
            raise ValueError(f"{name}: got {size}; accepted: 1, {1 + step}, {1 + 2 * step}, ...")


def _check_channels(mask: Mask, cin: int, cout: int) -> None:
    step = mask.halves * mask.groups
    if cin < 1 or cout < 1 or cin % mask.groups or cout % step:
        raise ValueError(
            f"channels: got Cin={cin}, Cout={cout}; accepted: Cin a multiple of {mask.groups} and Cout of {step}, "
            f"because data_channels={mask.data_channels} and gate={mask.gate!r}: every half of Cout holds every group"
        )


def _check_weight(mask: Mask, weight: Tensor) -> None:
    count = len(mask.taps)
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: got {type(weight).__name__}; accepted: a tensor [taps, Cin, Cout]")
    if weight.ndim != 3 or weight.shape[0] != count:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}; accepted: [taps, Cin, Cout] with the {count} taps of "
            f"window={mask.window!r}, kernel_size={mask.kernel_size}, data_channels={mask.data_channels}; "
            "from_dense makes it from [Cout, Cin, k, k]"
        )
    _check_channels(mask, weight.shape[1], weight.shape[2])


def _autocast_to(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if device in AUTOCAST and torch.is_autocast_enabled(device) else None


def _checked(
    mask: Mask, x: Tensor, weight: Tensor, bias: Tensor | None, condition: Tensor | None, link: Link | None
) -> list[Any]:
    """The tensors and the link, checked, with one dtype."""
    if link is not None and not (isinstance(link, tuple) and len(link) == 2):
        raise TypeError(f"link: got {type(link).__name__}; accepted: (values [N, Clink, H, W], weight [Clink, Cout])")
    values, matrix = (None, None) if link is None else link
    named = {"x": x, "weight": weight, "bias": bias, "condition": condition, "link": values, "link_weight": matrix}
    given = _of_one_kind(named, ("x", "weight") if link is None else ("x", "weight", "link", "link_weight"))
    x, weight = given["x"], given["weight"]
    n, cout, h, w = _checked_shapes(mask, x, weight, bias)
    if condition is not None and condition.shape not in ((n, cout), (n, cout, h, w)):
        raise ValueError(
            f"condition: got shape {tuple(condition.shape)}; accepted: [N, Cout] = {(n, cout)} or "
            f"[N, Cout, H, W] = {(n, cout, h, w)}, both halves of a gate"
        )
    checked = [given.get(name) for name in ("x", "weight", "bias", "condition")]
    if link is None:
        return [*checked, None]
    values, matrix = given["link"], given["link_weight"]
    fits = values.ndim == 4 and values.shape == (n, values.shape[1], h, w) and values.shape[1] > 0
    if not fits or matrix.shape != (values.shape[1], cout):
        raise ValueError(
            f"link: got shapes {tuple(values.shape)} and {tuple(matrix.shape)}; accepted: values [N, Clink, H, W] = "
            f"[{n}, Clink, {h}, {w}] and a weight [Clink, Cout] = [Clink, {cout}], Clink at least 1"
        )
    return [*checked, (values, matrix)]


def _checked_halves(
    mask: Mask, x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, added_b: Tensor | None
) -> list[Any]:
    """The tensors, checked, with one dtype."""
    named = {"x": x, "weight": weight, "bias": bias, "added[0]": added, "added[1]": added_b}
    given = _of_one_kind(named, ("x", "weight"))
    n, cout, h, w = _checked_shapes(mask, given["x"], given["weight"], bias)
    if cout % (2 * mask.groups):
        raise ValueError(
            f"weight: got Cout={cout}; accepted: a multiple of {2 * mask.groups}, two halves of all groups"
        )
    shape = (n, cout // 2, h, w)
    for name in ("added[0]", "added[1]"):
        if name in given and given[name].shape != shape:
            raise ValueError(f"{name}: got shape {tuple(given[name].shape)}; accepted: [N, Cout/2, H, W] = {shape}")
    return [given.get(name) for name in named]


def _of_one_kind(named: dict[str, Any], needed: Sequence[str]) -> dict[str, Any]:
    """The tensors that are given, of one dtype and device."""
    given = {name: t for name, t in named.items() if t is not None or name in needed}
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}; accepted: a torch.Tensor")
        if not t.is_floating_point() or t.dtype.itemsize == 1:
            raise TypeError(f"{name}: got dtype {t.dtype}; accepted: float16, bfloat16, float32, float64")
    if all(t.dtype.itemsize <= 4 for t in given.values()):
        half = _autocast_to(given["x"].device.type)
        if half is not None or len({t.dtype for t in given.values()}) > 1:
            given = {name: t.to(half or torch.float32) for name, t in given.items()}
    x = given["x"]
    for name, t in given.items():
        if t.dtype != x.dtype:
            raise TypeError(f"{name}: got dtype {t.dtype}, but x is {x.dtype}; convert one of them")
        if t.device != x.device:
            raise ValueError(f"{name}: is on {t.device}, but x on {x.device}; move one of them")
    return given


def _checked_shapes(mask: Mask, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int, int, int]:
    """(N, Cout, H, W)."""
    if x.ndim != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}; accepted: [N, Cin, H, W]; x[None] makes a batch of one image")
    _check_weight(mask, weight)
    (n, channels, h, w), (_, cin, cout) = x.shape, weight.shape
    if channels != cin:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}; accepted: [N, {cin}, H, W], because weight reads {cin} channels"
        )
    if bias is not None and bias.shape != (cout,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}; accepted: [Cout] = {(cout,)}")
    return n, cout, h, w
