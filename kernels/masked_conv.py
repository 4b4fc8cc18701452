"""Masked convolution on the GPU: the same page as `infovae_fast/masked_conv.py`.

Taps of every window are consecutive cells of the flattened k x k kernel, so that tap t is arithmetic on the loop's
counter, cell = first + t. With pixels p of all images in one row, channels last, and zeros outside the image,

    f[p]      = sum_t x[p + t] @ weight[t] + link[p] @ link_weight    one sum over (tap, input channel) and link
                + bias + condition
    dx[p]     = sum_t df[p - t] @ weight[t]^T                         the same kernel, mirrored
    dweight_t = sum_p x[p + t]^T @ df[p]                              split over the pixels, parts added in order

The gradients to a link are those of a convolution with one tap.

Products accumulate in float32 (float64 for float64): half precision goes to the tensor cores as it is, float32 as three
TF32 products, which keep its digits, unless PyTorch's matmul precision permits one ("high", "medium"). Between kernels
f and its gradient are in the dtype of x.

A program owns the same columns of both halves of f, so that the gate is computed where the sums are, in registers; its
columns belong to one group of colours. What an output may not see is masked where it is loaded, data and weights both:
0 * NaN never happens. There are no atomics, and the bits do not change from run to run.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from infovae_fast.backends import tf32_allowed

PROGRAMS = 1024  # of the weight gradient that are wanted, to fill the GPU
FEW = 16  # below so many channels a step of a product spans several taps


class Tile(NamedTuple):
    """What fits the registers; tests/test_masked_conv_triton.py compiles every row."""

    rows: int
    columns: int  # with a gate, in each half
    depth: int  # of a step of the product
    warps: int
    stages: int  # of loads under way


def tile(columns: int, depth: int, itemsize: int, halves: int) -> Tile:
    """For f and the gradient to x: rows are pixels, depth counts input channels."""
    if itemsize == 8:
        return Tile(32, block(columns, 32 // halves), 16, 4, 1)
    if itemsize == 4:
        return Tile(64, block(columns, 64 // halves), block(depth, 32), 4, 3)
    return Tile(128, block(columns, 128 // halves), block(depth, 64), 8, 3)


def weight_tile(rows: int, columns: int, itemsize: int) -> Tile:
    """For the gradient to weight: rows are input channels, or taps and input channels; depth counts pixels."""
    if itemsize == 8:
        return Tile(block(rows, 32), block(columns, 32), 16, 8, 1)
    if itemsize == 4:
        return Tile(block(rows, 64), block(columns, 64), 32, 4, 3)
    return Tile(block(rows, 64), block(columns, 128), 64, 8, 3)


def gate_tile(columns: int, itemsize: int) -> Tile:
    """For the gradient to f: rows are pixels; no product."""
    most = 32 if itemsize == 8 else 64
    return Tile(most, block(columns, most), 0, 8, 1)


def block(size: int, most: int = 1 << 20) -> int:
    """The power of 2 that holds a size."""
    return min(max(16, triton.next_power_of_2(size)), most)


@triton.jit
def tap_and_channel(step, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, FEW: tl.constexpr):
    """Where the numbers of a step lie, both [BLOCK]; taps or channels that are too many are to be masked."""
    lane = tl.arange(0, BLOCK)
    if FEW:
        lane += step * BLOCK
        tap = lane // CHANNELS
        channel = lane % CHANNELS
    else:
        chunks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
        tap = tl.zeros_like(lane) + step // chunks
        channel = lane + step % chunks * BLOCK
    return tap, channel


@triton.jit
def offset(tap, K: tl.constexpr, FIRST: tl.constexpr):
    """(dy, dx); no tap looks down, dy <= 0."""
    return (FIRST + tap) // K - K // 2, (FIRST + tap) % K - K // 2


@triton.jit
def pixel_block(first, H, W, BLOCK: tl.constexpr):
    """Image, y and x of BLOCK pixels, each [BLOCK]; 64 bit arithmetic for the first one alone."""
    image = first // (H * W)
    local = (first % (H * W)).to(tl.int32) + tl.arange(0, BLOCK)
    return image + local // (H * W), local // W % H, local % W


@triton.jit
def group_of(channel, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, INTERLEAVED: tl.constexpr):
    return channel % GROUPS if INTERLEAVED else channel % CHANNELS // (CHANNELS // GROUPS)


@triton.jit
def tanh_and_slope(a):
    """tanh(a) and 1 - tanh(a)^2, both with all their digits: next to 0 by Lambert's continued fraction."""
    e = tl.exp(-2 * tl.abs(a))
    far = (1 - e) / (1 + e)
    z = a * a
    LAST: tl.constexpr = 15 if a.dtype == tl.float64 else 7
    denominator = tl.full(a.shape, LAST, a.dtype)
    numerator = tl.full(a.shape, 1, a.dtype)
    for k in tl.static_range(2, LAST, 2):
        above = denominator
        denominator = (LAST - k) * denominator + z * numerator
        numerator = above
    near = a * (numerator / denominator)
    return tl.where(tl.abs(a) < 0.5, near, tl.where(a < 0, -far, far)), 4 * e / ((1 + e) * (1 + e))


@triton.jit
def sigmoid_and_slope(b):
    e = tl.exp(-tl.abs(b))
    return tl.where(b < 0, e, 1.0) / (1 + e), e / ((1 + e) * (1 + e))


@triton.jit
def conv_kernel(
    source, weight, bias, condition, link, link_weight, out, f, pixels, H, W,
    IN: tl.constexpr, OUT: tl.constexpr, LINK: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr, TAPS: tl.constexpr,
    GROUPS: tl.constexpr, INTERLEAVED: tl.constexpr, OWN: tl.constexpr, MIRRORED: tl.constexpr, GROUPED: tl.constexpr,
    GATE: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr, CONDITION: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """BM pixels of the convolution, and BN channels of one group, with a gate in each half; or of the gradient to x.

    Args:
        source: [pixels, IN]: x; MIRRORED: the gradient to f. weight: [taps, Cin, Cout]; if not MIRRORED, each
            half with its columns sorted by group. condition: see CONDITION.
        link: [pixels, LINK]. link_weight: [LINK, columns like those of weight].
        out: [pixels, OUT]. f: [pixels, 2 OUT] with a gate, written if it is to be KEPT.
        GROUPED: how many channels of the source are grouped together: IN, or with a gate and MIRRORED half of it.
        OWN: the centre tap joins a group to itself. CONDITION: 0: none, 2: [images, Cout], 4: [pixels, Cout].
    """
    dtype = tl.float64 if source.dtype.element_ty == tl.float64 else tl.float32
    GATED: tl.constexpr = GATE != ""
    WIDTH: tl.constexpr = OUT * (2 if GATED else 1)  # of f
    PART: tl.constexpr = OUT // GROUPS
    tiles: tl.constexpr = (PART + BN - 1) // BN
    group = tl.program_id(1) // tiles
    j = tl.program_id(1) % tiles * BN + tl.arange(0, BN)
    column = j * GROUPS + group if INTERLEAVED and GROUPS > 1 else group * PART + j
    first = tl.program_id(0).to(tl.int64) * BM
    source += first * IN
    out += first * OUT
    pixel = tl.arange(0, BM)
    image, y, x = pixel_block(first, H, W, BM)
    there = pixel < pixels - first
    STEPS: tl.constexpr = (TAPS * IN + BK - 1) // BK if FEW else TAPS * ((IN + BK - 1) // BK)
    a = tl.zeros([BM, BN], dtype)
    b = tl.zeros([BM, BN], dtype)
    for step in range(STEPS):
        tap, channel = tap_and_channel(step, IN, BK, FEW)
        dy, dx = offset(tap, K, FIRST)
        if MIRRORED:
            dy = -dy
            dx = -dx
        seen = (tap < TAPS) & (channel < IN)
        if GROUPS > 1:
            other = group_of(channel, GROUPED, GROUPS, INTERLEAVED)
            seen &= (tap < TAPS - 1) | ((group < other + OWN) if MIRRORED else (other < group + OWN))
        there_y = y[:, None] + dy[None, :]
        there_x = x[:, None] + dx[None, :]
        inside = ((there_y < H) if MIRRORED else (there_y >= 0)) & (there_x >= 0) & (there_x < W) & there[:, None]
        at = (pixel[:, None] + (dy * W + dx)[None, :]) * IN + channel[None, :]
        left = tl.load(source + at, mask=inside & seen[None, :], other=0.0)
        if MIRRORED:
            w = weight + ((tap.to(tl.int64) * OUT)[:, None] + column[None, :]) * IN + channel[:, None]
        else:
            w = weight + (tap.to(tl.int64) * IN + channel)[:, None] * WIDTH + group * PART + j[None, :]
        known = seen[:, None] & (j < PART)[None, :]
        right = tl.load(w, mask=known, other=0.0)
        a = tl.dot(left, right, a, input_precision=PRECISION, out_dtype=dtype)
        if GATED:
            right = tl.load(w + OUT, mask=known, other=0.0)
            b = tl.dot(left, right, b, input_precision=PRECISION, out_dtype=dtype)
    if LINK:
        link += first * LINK
        for start in range(0, LINK, BK):
            channel = start + tl.arange(0, BK)
            left = tl.load(
                link + pixel[:, None] * LINK + channel[None, :],
                mask=there[:, None] & (channel < LINK)[None, :],
                other=0.0,
            )
            w = link_weight + channel[:, None] * WIDTH + group * PART + j[None, :]
            known = (channel < LINK)[:, None] & (j < PART)[None, :]
            right = tl.load(w, mask=known, other=0.0)
            a = tl.dot(left, right, a, input_precision=PRECISION, out_dtype=dtype)
            if GATED:
                right = tl.load(w + OUT, mask=known, other=0.0)
                b = tl.dot(left, right, b, input_precision=PRECISION, out_dtype=dtype)

    mine = there[:, None] & (j < PART)[None, :]
    at = pixel[:, None] * WIDTH + column[None, :]
    if BIAS:
        a += tl.load(bias + column, mask=j < PART, other=0.0).to(dtype)[None, :]
        if GATED:
            b += tl.load(bias + OUT + column, mask=j < PART, other=0.0).to(dtype)[None, :]
    if CONDITION:
        c = condition + (first * WIDTH + at if CONDITION == 4 else image[:, None] * WIDTH + column[None, :])
        a += tl.load(c, mask=mine, other=0.0).to(dtype)
        if GATED:
            b += tl.load(c + OUT, mask=mine, other=0.0).to(dtype)
    if GATED:
        if KEEP:
            f += first * WIDTH
            tl.store(f + at, a.to(f.dtype.element_ty), mask=mine)
            tl.store(f + at + OUT, b.to(f.dtype.element_ty), mask=mine)
        if GATE == "tanh":
            a, _ = tanh_and_slope(a)
        s, _ = sigmoid_and_slope(b)
        a *= s
    tl.store(out + pixel[:, None] * OUT + column[None, :], a.to(out.dtype.element_ty), mask=mine)


@triton.jit
def gate_kernel(
    f, gradient, extra, f_gradient, sums, size,
    HALF: tl.constexpr, GATE: tl.constexpr, EXTRA: tl.constexpr, SUMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """From the gradient to out [pixels, HALF], and an EXTRA one to f, that to f in all, [pixels, 2 HALF].

    Args:
        size: pixels of an image. sums: [images, blocks of BM pixels, 2 HALF], of f_gradient over the block.
    """
    dtype = tl.float64 if f.dtype.element_ty == tl.float64 else tl.float32
    blocks = (size + BM - 1) // BM
    local = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    pixel = (tl.program_id(0) // blocks).to(tl.int64) * size + local
    mine = (local < size)[:, None] & (column < HALF)[None, :]
    at = pixel[:, None] * (2 * HALF) + column[None, :]
    a = tl.load(f + at, mask=mine, other=0.0).to(dtype)
    b = tl.load(f + at + HALF, mask=mine, other=0.0).to(dtype)
    g = tl.load(gradient + pixel[:, None] * HALF + column[None, :], mask=mine, other=0.0).to(dtype)
    s, s_slope = sigmoid_and_slope(b)
    if GATE == "tanh":
        t, t_slope = tanh_and_slope(a)
        a = g * s * t_slope
        b = g * t * s_slope
    else:
        b = g * a * s_slope
        a = g * s
    if EXTRA:
        a += tl.load(extra + at, mask=mine, other=0.0).to(dtype)
        b += tl.load(extra + at + HALF, mask=mine, other=0.0).to(dtype)
    tl.store(f_gradient + at, a.to(f_gradient.dtype.element_ty), mask=mine)
    tl.store(f_gradient + at + HALF, b.to(f_gradient.dtype.element_ty), mask=mine)
    if SUMS:
        to = sums + tl.program_id(0).to(tl.int64) * (2 * HALF) + column
        tl.store(to, tl.sum(a, axis=0), mask=column < HALF)
        tl.store(to + HALF, tl.sum(b, axis=0), mask=column < HALF)


@triton.jit
def weight_kernel(
    source, gradient, parts, pixels, H, W, segment,
    IN: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr, TAPS: tl.constexpr,
    GROUPS: tl.constexpr, INTERLEAVED: tl.constexpr, OWN: tl.constexpr, GROUPED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """The gradient to BM rows (tap, input channel) and BN columns of weight from a segment of the pixels.

    Args:
        source: x [pixels, IN]. gradient: to f, [pixels, OUT]. parts: [segments, taps, IN, OUT].
        GROUPED: how many channels of f are grouped together: OUT, or with a gate half of it.
    """
    dtype = tl.float64 if source.dtype.element_ty == tl.float64 else tl.float32
    tap, channel = tap_and_channel(tl.program_id(0), IN, BM, FEW)
    dy, dx = offset(tap, K, FIRST)
    known = (tap < TAPS) & (channel < IN)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    begin = tl.program_id(2).to(tl.int64) * segment
    total = tl.zeros([BM, BN], dtype)
    for start in range(begin, tl.minimum(begin + segment, pixels), BK):
        pixel = tl.arange(0, BK)
        _, y, x = pixel_block(start, H, W, BK)
        there = pixel < pixels - start
        there_y = y[None, :] + dy[:, None]
        there_x = x[None, :] + dx[:, None]
        inside = (there_y >= 0) & (there_x >= 0) & (there_x < W) & there[None, :]
        at = (pixel[None, :] + (dy * W + dx)[:, None]) * IN + channel[:, None]
        left = tl.load(source + start * IN + at, mask=inside & known[:, None], other=0.0)
        mine = there[:, None] & (column < OUT)[None, :]
        right = tl.load(gradient + start * OUT + pixel[:, None] * OUT + column[None, :], mask=mine, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=dtype)
    if GROUPS > 1:
        source_group = group_of(channel, IN, GROUPS, INTERLEAVED)
        hidden = source_group[:, None] >= group_of(column, GROUPED, GROUPS, INTERLEAVED)[None, :] + OWN
        total = tl.where((tap == TAPS - 1)[:, None] & hidden, 0.0, total)
    row = (tl.program_id(2).to(tl.int64) * TAPS + tap) * IN + channel
    tl.store(parts + row[:, None] * OUT + column[None, :], total, mask=known[:, None] & (column < OUT)[None, :])


class Conv:
    """The sizes of a convolution, and its kernels.

    Args:
        window: kernel_size, and the cell of the flattened k x k kernel that is the first tap.
        colours: groups, are they interleaved, does the last tap join a group to itself.
    """

    def __init__(self, x: Tensor, weight: Tensor, window: Sequence[int], colours: Sequence[int], gate: str) -> None:
        self.n, self.cin, self.h, self.w = x.shape
        self.taps, _, self.cout = weight.shape
        self.half = self.cout // 2 if gate else self.cout
        self.pixels = self.n * self.h * self.w
        self.cells = (*window, self.taps)
        self.colours = (colours[0], bool(colours[1]), int(colours[2]))
        self.gate = gate
        exact = x.dtype == torch.float64
        tf32x3 = x.dtype == torch.float32 and not tf32_allowed()
        self.precision = "ieee" if exact else "tf32x3" if tf32x3 else "tf32"
        self.sum_dtype = torch.float64 if exact else torch.float32

    def f(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, condition: Tensor | None, link: Tensor | None,
        link_weight: Tensor | None, out: Tensor, f: Tensor,
    ) -> None:  # fmt: skip
        """Writes out [N, H, W, half], and f [N, H, W, Cout] with a gate unless it is empty."""
        kind = 0 if condition is None else condition.ndim
        flags = (self.gate, f.numel() > 0, bias is not None, kind)
        added = [
            _pointer(bias, x),
            _pointer(_rows(condition) if condition is not None and kind == 4 else condition, x),
            _pointer(None if link is None else _rows(link), x),
            _pointer(None if link_weight is None else self._by_group(link_weight), x),
        ]
        links = 0 if link is None else link.shape[1]
        self._conv(x, self._by_group(weight), added, out, f, (self.half, links), False, self.cin, flags)

    def to_x(self, f_gradient: Tensor, weight: Tensor, out: Tensor) -> None:
        g = f_gradient
        self._conv(g, weight, [g] * 4, out, g, (self.cin, 0), True, self.half, ("", False, False, 0))

    def _by_group(self, weight: Tensor) -> Tensor:
        """The columns of one group side by side, in each half."""
        if self.colours[0] == 1 or not self.colours[1]:
            return weight.contiguous()
        return weight.unflatten(-1, (self.cout // self.half, -1, self.colours[0])).mT.flatten(-3).contiguous()

    def _conv(
        self, source: Tensor, weight: Tensor, added: list[Tensor], out: Tensor, f: Tensor, channels: tuple[int, int],
        mirrored: bool, grouped: int, flags: tuple[str, bool, bool, int],
    ) -> None:  # fmt: skip
        depth, part, halves = source.shape[-1], channels[0] // self.colours[0], 2 if flags[0] else 1
        few = depth < FEW
        bm, bn, bk, warps, stages = tile(part, depth * self.taps if few else depth, source.itemsize, halves)
        conv_kernel[(triton.cdiv(self.pixels, bm), self.colours[0] * triton.cdiv(part, bn))](
            source, weight, *added, out, f, self.pixels, self.h, self.w, depth, *channels, *self.cells,
            *self.colours, mirrored, grouped, *flags, self.precision, bm, bn, bk, few,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def to_f(self, gradient: Tensor, extra: Tensor | None, f: Tensor, out: Tensor, total: Tensor) -> Tensor:
        """Writes out [N, H, W, Cout]; returns its sums [N, Cout] over the pixels, unless `total` is empty."""
        sums = total.numel() > 0
        bm, bn, _, warps, stages = gate_tile(self.half, f.itemsize)
        blocks = triton.cdiv(self.h * self.w, bm)
        parts = out.new_empty((self.n, blocks, self.cout) if sums else 0, dtype=self.sum_dtype)
        gate_kernel[(self.n * blocks, triton.cdiv(self.half, bn))](
            f, gradient, _pointer(extra, f), out, parts, self.h * self.w, self.half, self.gate, extra is not None,
            sums, bm, bn, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return parts.sum(1) if sums else total

    def products(self, g: Tensor, x: Tensor, weight: Tensor, to_x: bool, to_weight: bool) -> tuple[Tensor, Tensor]:
        """From the gradient to f [N, H, W, Cout] those to x and to weight; what is not wanted is empty."""
        x_gradient = _image(g.permute(0, 3, 1, 2), self.cin if to_x else 0)
        weight_gradient = g.new_zeros(weight.shape if to_weight else 0)
        if to_x and self.pixels > 0:
            self.to_x(g, weight.to(g.dtype).contiguous(), _rows(x_gradient))
        if to_weight and self.pixels > 0:
            weight_gradient = self.to_weight(_rows(x.to(g.dtype)), g)
        return x_gradient.to(x.dtype), weight_gradient.to(x.dtype)

    def to_weight(self, x: Tensor, f_gradient: Tensor) -> Tensor:
        few = self.cin < FEW
        rows = self.taps * self.cin if few else self.cin
        bm, bn, bk, warps, stages = weight_tile(rows, self.cout, x.itemsize)
        tiles = triton.cdiv(rows, bm) * (1 if few else self.taps), triton.cdiv(self.cout, bn)
        splits = triton.cdiv(PROGRAMS, tiles[0] * tiles[1])
        segment = triton.cdiv(triton.cdiv(self.pixels, splits), 4 * bk) * 4 * bk
        splits = triton.cdiv(self.pixels, segment)
        parts = x.new_empty(splits, self.taps, self.cin, self.cout, dtype=self.sum_dtype)
        weight_kernel[(*tiles, splits)](
            x, f_gradient, parts, self.pixels, self.h, self.w, segment, self.cin, self.cout, *self.cells,
            *self.colours, self.half, self.precision, bm, bn, bk, few, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return parts.sum(0)


def _pointer(t: Tensor | None, other: Tensor) -> Tensor:
    return other if t is None else t.contiguous()


def _rows(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).contiguous()  # [N, H, W, C]


def _image(x: Tensor, channels: int) -> Tensor:
    """Room for [N, channels, H, W], channels last."""
    n, _, h, w = x.shape
    return x.new_empty(n, h, w, channels).permute(0, 3, 1, 2)


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _arithmetic(x: Tensor) -> torch.dtype:
    """The dtype that the kernels read; Triton's interpreter cannot multiply bfloat16, and truncates to it."""
    return x.dtype if x.is_cuda else torch.promote_types(x.dtype, torch.float32)


@torch.library.custom_op("infovae_fast::masked_conv_triton", mutates_args=())
def masked_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, condition: Tensor | None, link: Tensor | None,
    link_weight: Tensor | None, window: Sequence[int], colours: Sequence[int], gate: str, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, f): out, and with a gate (not "") what goes into it if it is to be kept; `Conv` has window and colours.

    Differentiable once, if f is kept; so is f.
    """
    conv = Conv(x, weight, window, colours, gate)
    dtype = _arithmetic(x)
    x_, *others = (None if t is None else t.to(dtype) for t in (x, weight, bias, condition, link, link_weight))
    out, f = _image(x_, conv.half), _image(x_, conv.cout if gate and keep else 0)
    if conv.pixels > 0:
        with _on(x):
            conv.f(_rows(x_), *others, _rows(out), _rows(f))
    return out.to(x.dtype), f.to(x.dtype)


@torch.library.custom_op("infovae_fast::masked_conv_triton_backward", mutates_args=())
def masked_conv_backward(
    gradient: Tensor, extra: Tensor | None, x: Tensor, weight: Tensor, link: Tensor | None, link_weight: Tensor | None,
    f: Tensor, window: Sequence[int], colours: Sequence[int], gate: str, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """From the gradients to out and, with a gate, to f: to x, weight, link, link_weight, to f in all, and its sums.

    [N, Cin, H, W], [taps, Cin, Cout], [N, Clink, H, W], [Clink, Cout], with a gate [N, Cout, H, W], and over the pixels
    [N, Cout] in float32 or float64. WANTED are the first four and the sums; what is not, or does not exist, is empty.
    """
    conv = Conv(x, weight, window, colours, gate)
    dtype = _arithmetic(x)
    g, to_f, sums = _rows(gradient.to(dtype)), f.new_empty(0, dtype=dtype), wanted[4]
    total = g.new_zeros((conv.n, conv.cout) if sums else 0, dtype=conv.sum_dtype)
    with _on(x):
        if gate:
            to_f = _image(g.permute(0, 3, 1, 2), conv.cout)
            extra = None if extra is None else _rows(extra.to(dtype))
            if conv.pixels > 0:
                total = conv.to_f(g, extra, _rows(f.to(dtype)), _rows(to_f), total)
            g = _rows(to_f)
        elif sums:
            total = g.sum((1, 2), dtype=conv.sum_dtype)
        found = [*conv.products(g, x, weight, wanted[0], wanted[1]), x.new_empty(0), x.new_empty(0)]
        if link is not None and link_weight is not None:
            one_tap = Conv(link, link_weight[None], (1, 0), (1, 0, 1), "")
            found[2], to_weight = one_tap.products(g, link, link_weight[None], wanted[2], wanted[3])
            found[3] = to_weight[0] if wanted[3] else to_weight
    return found[0], found[1], found[2], found[3], to_f.to(x.dtype), total


@masked_conv.register_fake
def _(x, weight, bias, condition, link, link_weight, window, colours, gate, keep):
    cout = weight.shape[2]
    return _image(x, cout // 2 if gate else cout), _image(x, cout if gate and keep else 0)


@masked_conv_backward.register_fake
def _(gradient, extra, x, weight, link, link_weight, f, window, colours, gate, wanted):
    cin, cout = weight.shape[1:]
    wide = torch.promote_types(x.dtype, torch.float32)
    links = (x.new_empty(0), x.new_empty(0))
    if link is not None:
        links = (_image(link, link.shape[1] if wanted[2] else 0), x.new_empty(link_weight.shape if wanted[3] else 0))
    return (
        _image(x, cin if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        *links,
        _image(x, cout) if gate else x.new_empty(0),
        x.new_empty((x.shape[0], cout) if wanted[4] else 0, dtype=wide),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, condition, link, link_weight, *ctx.settings, _ = inputs
    ctx.save_for_backward(x, weight, link, link_weight, output[1])
    ctx.condition = 0 if condition is None else condition.ndim
    ctx.set_materialize_grads(False)
    if not ctx.settings[2]:
        ctx.mark_non_differentiable(output[1])  # empty


def _first(ctx: Any, gradient: Tensor | None, extra: Tensor | None) -> tuple[Tensor | None, ...]:
    gate = ctx.settings[2]
    need_x, need_weight, need_bias, need_condition, *need_link = ctx.needs_input_grad[:6]
    nothing = (None,) * 10
    if gradient is None:
        if extra is None:
            return nothing
        gradient = torch.zeros_like(extra[:, : extra.shape[1] // 2])
    sums = need_bias or (need_condition and ctx.condition == 2)
    wanted = (need_x, need_weight, *need_link, sums)
    *found, to_f, total = masked_conv_backward(gradient, extra, *ctx.saved_tensors, *ctx.settings, wanted)
    to_x, to_weight, *to_link = (t if needed else None for t, needed in zip(found, wanted, strict=False))
    to_bias = total.sum(0).to(gradient.dtype) if need_bias else None
    to_condition = total.to(gradient.dtype) if ctx.condition == 2 else to_f if gate else gradient
    return to_x, to_weight, to_bias, to_condition if need_condition else None, *to_link, *nothing[6:]


def _second(ctx: Any, *gradients: Tensor) -> Any:
    raise RuntimeError("this backend gives first derivatives; use backend='reference' to differentiate twice")


masked_conv.register_autograd(_first, setup_context=_save)
masked_conv_backward.register_autograd(_second)
