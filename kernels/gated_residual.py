"""`elu_pair` and `gated_residual` on the GPU: the same page as `infovae_fast/gated_residual.py`.

Tensors are channels-last, [pixels, F]: a program takes a block of pixels and, four times, a quarter of the channels. So
one number of Philox's four serves a quarter, its halves t and -t. With E = e^-|t|

    elu(t), elu(-t) = t, E - 1   where t > 0, else   E - 1, -t          E - 1 by its series where |t| is small
    gradient to t   = g_1 - E g_2   where t > 0, else   E g_1 - g_2

The gradients to biases and conditions are sums over pixels: each program's in float32 (float64), then PyTorch's.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 2048  # of a tile as it is computed: pixels times a quarter of the channels
WARPS = 4
STEPS = 4  # tiles of a program that sums over pixels


@triton.jit
def exponential(t):
    """E = e^-|t| and E - 1."""
    m = tl.where(t > 0, -t, t)
    e = tl.exp(m)
    if t.dtype == tl.float32:
        series = 1.0 + m * (1.0 / 8)
    else:
        series = 1.0 + m * (1.0 / 15)
        for i in tl.static_range(7):
            series = 1.0 + m * (1.0 / (14 - i)) * series
    for i in tl.static_range(6):
        series = 1.0 + m * (1.0 / (7 - i)) * series
    return e, tl.where(m > -0.35, m * series, e - 1.0)


@triton.jit
def kept(words, threshold, HALF: tl.constexpr):
    return ((words >> (16 * HALF)) & 0xFFFF).to(tl.int32) >= threshold


@triton.jit
def words_of(seed, part, q, c, Q: tl.constexpr):
    """Four random words for each pixel and channel of a quarter."""
    offset = q[:, None] * Q + c[None, :]
    return tl.randint4x(tl.load(seed) + part, offset)


@triton.jit
def pick(w0, w1, w2, w3, k: tl.constexpr):
    word = w0 if k == 0 else (w1 if k == 1 else (w2 if k == 2 else w3))
    return word.to(tl.uint32, bitcast=True)


@triton.jit
def elu_pair_kernel(
    s, bias, out, seed, part, threshold, pixels, height, width, out_height, out_width, left, above, at, half,
    F: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, BQ: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Channels at .. at + F and half + at .. of `out`, that has 2 half channels; pixels are those of `out`."""
    q = tl.program_id(0) * R + tl.arange(0, R)
    x = q % out_width - left
    row = q // out_width
    y = row % out_height - above
    inside = (q < pixels) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    source = (row // out_height * height + y) * width + x
    to_pixel = out + q.to(tl.int64) * (2 * half) + at
    from_pixel = s + source.to(tl.int64) * F
    c = tl.arange(0, BQ)
    if DROP:
        w0, w1, w2, w3 = words_of(seed, part, source, c, Q)
    scale = 65536 / (tl.zeros([1, 1], WIDE) + (65536 - threshold))
    for k in tl.static_range(4):
        channel = k * Q + c
        real = (c < Q) & (channel < F)
        there = inside[:, None] & real[None, :]
        t = tl.load(from_pixel[:, None] + channel[None, :], mask=there, other=0.0).to(WIDE)
        if BIAS:
            t += tl.load(bias + channel, mask=real, other=0.0).to(WIDE)[None, :]
        _, less = exponential(t)
        plus, minus = tl.where(t > 0, t, less), tl.where(t > 0, less, -t)
        if DROP:
            word = pick(w0, w1, w2, w3, k)
            plus = tl.where(kept(word, threshold, 0), plus * scale, 0.0)
            minus = tl.where(kept(word, threshold, 1), minus * scale, 0.0)
        to = to_pixel[:, None] + channel[None, :]
        written = (q < pixels)[:, None] & real[None, :]
        tl.store(to, tl.where(there, plus, 0.0), mask=written)
        tl.store(to + half, tl.where(there, minus, 0.0), mask=written)


@triton.jit
def elu_pair_gradients_kernel(
    upstream, s, bias, to_s, sums, seed, part, threshold, steps, pixels, height, width, out_height, out_width, left,
    above, at, half, F: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, BQ: tl.constexpr, BIAS: tl.constexpr,
    DROP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Pixels are those of s, `steps` tiles of them a program. sums [programs, F]: of to_s over those."""
    c = tl.arange(0, BQ)
    sum_0 = tl.zeros([R, BQ], WIDE)
    sum_1, sum_2, sum_3 = sum_0, sum_0, sum_0
    scale = 65536 / (tl.zeros([1, 1], WIDE) + (65536 - threshold))
    for step in range(steps):
        q = (tl.program_id(0) * steps + step) * R + tl.arange(0, R)
        x = q % width + left
        row = q // width
        y = row % height + above
        inside = (q < pixels) & (x >= 0) & (x < out_width) & (y >= 0) & (y < out_height)
        source = (row // height * out_height + y) * out_width + x
        own = q.to(tl.int64) * F
        start = upstream + source.to(tl.int64) * (2 * half) + at
        if DROP:
            w0, w1, w2, w3 = words_of(seed, part, q, c, Q)
        for k in tl.static_range(4):
            channel = k * Q + c
            real = (c < Q) & (channel < F)
            there = (q < pixels)[:, None] & real[None, :]
            t = tl.load(s + own[:, None] + channel[None, :], mask=there, other=0.0).to(WIDE)
            if BIAS:
                t += tl.load(bias + channel, mask=real, other=0.0).to(WIDE)[None, :]
            read = inside[:, None] & real[None, :]
            plus = tl.load(start[:, None] + channel[None, :], mask=read, other=0.0).to(WIDE)
            minus = tl.load(start[:, None] + half + channel[None, :], mask=read, other=0.0).to(WIDE)
            if DROP:
                word = pick(w0, w1, w2, w3, k)
                plus = tl.where(kept(word, threshold, 0), plus * scale, 0.0)
                minus = tl.where(kept(word, threshold, 1), minus * scale, 0.0)
            e, _ = exponential(t)
            slope = tl.where(t > 0, plus - e * minus, e * plus - minus)
            tl.store(to_s + own[:, None] + channel[None, :], slope, mask=there)
            if BIAS:
                slope = tl.where(there, slope, 0.0)
                if k == 0:
                    sum_0 += slope
                elif k == 1:
                    sum_1 += slope
                elif k == 2:
                    sum_2 += slope
                else:
                    sum_3 += slope
    if BIAS:
        put_sums(sums, sum_0, 0, c, F, Q)
        put_sums(sums, sum_1, 1, c, F, Q)
        put_sums(sums, sum_2, 2, c, F, Q)
        put_sums(sums, sum_3, 3, c, F, Q)


@triton.jit
def put_sums(sums, tile, k: tl.constexpr, c, F: tl.constexpr, Q: tl.constexpr):
    channel = k * Q + c
    tl.store(sums + tl.program_id(0).to(tl.int64) * F + channel, tl.sum(tile, axis=0), mask=(c < Q) & (channel < F))


@triton.jit
def gate_of(f, bias, condition, image, q, channel, real, there, F: tl.constexpr, BIAS: tl.constexpr,
            CONDITION: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """g of channels of f; all of a program's pixels are of one image."""
    g = tl.load(f + q[:, None] * (2 * F) + channel[None, :], mask=there, other=0.0).to(WIDE)
    if BIAS:
        g += tl.load(bias + channel, mask=real, other=0.0).to(WIDE)[None, :]
    if CONDITION:
        g += tl.load(condition + image * (2 * F) + channel, mask=real, other=0.0).to(WIDE)[None, :]
    return g


@triton.jit
def gated_residual_kernel(
    s, f, bias, condition, out, pixels, F: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, BQ: tl.constexpr,
    BIAS: tl.constexpr, CONDITION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (image, b): a block of the `pixels` of an image."""
    image = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * R + tl.arange(0, R)
    q = image * pixels + p
    c = tl.arange(0, BQ)
    for k in tl.static_range(4):
        channel = k * Q + c
        real = (c < Q) & (channel < F)
        there = (p < pixels)[:, None] & real[None, :]
        a = gate_of(f, bias, condition, image, q, channel, real, there, F, BIAS, CONDITION, WIDE)
        b = gate_of(f, bias, condition, image, q, F + channel, real, there, F, BIAS, CONDITION, WIDE)
        at = q[:, None] * F + channel[None, :]
        t = tl.load(s + at, mask=there, other=0.0).to(WIDE)
        tl.store(out + at, t + a / (1 + tl.exp(-b)), mask=there)


@triton.jit
def gated_residual_gradients_kernel(
    upstream, f, bias, condition, to_f, sums, steps, pixels, F: tl.constexpr, Q: tl.constexpr, R: tl.constexpr,
    BQ: tl.constexpr, BIAS: tl.constexpr, CONDITION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (image, b, quarter): `steps` tiles. sums [images, blocks, 2F]: of to_f over those."""
    image = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BQ)
    channel = tl.program_id(2) * Q + c
    real = (c < Q) & (channel < F)
    sum_a = tl.zeros([R, BQ], WIDE)
    sum_b = tl.zeros([R, BQ], WIDE)
    for step in range(steps):
        p = (tl.program_id(1) * steps + step) * R + tl.arange(0, R)
        q = image * pixels + p
        there = (p < pixels)[:, None] & real[None, :]
        a = gate_of(f, bias, condition, image, q, channel, real, there, F, BIAS, CONDITION, WIDE)
        b = gate_of(f, bias, condition, image, q, F + channel, real, there, F, BIAS, CONDITION, WIDE)
        g = tl.load(upstream + q[:, None] * F + channel[None, :], mask=there, other=0.0).to(WIDE)
        open = 1 / (1 + tl.exp(-b))
        to_a = g * open
        to_b = to_a * a / (1 + tl.exp(b))  # 1 - open, without cancellation
        to = to_f + q[:, None] * (2 * F) + channel[None, :]
        tl.store(to, to_a, mask=there)
        tl.store(to + F, to_b, mask=there)
        sum_a += tl.where(there, to_a, 0.0)
        sum_b += tl.where(there, to_b, 0.0)
    if BIAS or CONDITION:
        own = sums + (image * tl.num_programs(1) + tl.program_id(1)) * (2 * F) + channel
        tl.store(own, tl.sum(sum_a, axis=0), mask=real)
        tl.store(own + F, tl.sum(sum_b, axis=0), mask=real)


def tile(channels: int, dtype: torch.dtype) -> dict[str, Any]:
    """F; Q, a quarter of it; the tile's R pixels and BQ channels, and what it is computed in."""
    quarter = triton.cdiv(channels, 4)
    columns, wide = triton.next_power_of_2(quarter), wider(dtype)
    rows = max(1, BYTES // wide.itemsize // columns)
    wide = tl.float64 if wide == torch.float64 else tl.float32
    return {"F": channels, "Q": quarter, "R": rows, "BQ": columns, "WIDE": wide}


def wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _on(t: Tensor) -> Any:
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def _threshold(dropout: float) -> int:
    """Of 65536 numbers, how many are dropped."""
    return min(round(dropout * 65536), 65535)


@torch.library.custom_op("infovae_fast::elu_pair_triton", mutates_args=())
def elu_pair(
    s: Sequence[Tensor], bias: Tensor | None, seed: Tensor | None, pad: Sequence[int], dropout: float
) -> Tensor:
    n, _, height, width = s[0].shape
    bias = _flat(bias)
    out_height, out_width, half = _sizes(s, pad)
    out = _new(s[0], n, 2 * half, out_height, out_width)
    at, pixels = 0, n * out_height * out_width
    with _on(out):
        for part, own in enumerate(s):
            sizes = tile(own.shape[1], own.dtype)
            if pixels:
                elu_pair_kernel[(triton.cdiv(pixels, sizes["R"]),)](
                    _last(own), own if bias is None else bias[at:], out, own if seed is None else seed, part,
                    _threshold(dropout), pixels, height, width, out_height, out_width, pad[0], pad[2], at, half,
                    **sizes, BIAS=bias is not None, DROP=seed is not None, num_warps=WARPS,
                )  # fmt: skip
            at += own.shape[1]
    return out


@torch.library.custom_op("infovae_fast::elu_pair_gradients_triton", mutates_args=())
def elu_pair_gradients(
    upstream: Tensor, s: Sequence[Tensor], bias: Tensor | None, seed: Tensor | None, pad: Sequence[int], dropout: float
) -> list[Tensor]:
    """To each of s, and to the bias."""
    n, _, height, width = s[0].shape
    bias = _flat(bias)
    out_height, out_width, half = _sizes(s, pad)
    upstream, found, totals = _last(upstream), [], []
    at, pixels = 0, n * height * width
    with _on(upstream):
        for part, own in enumerate(s):
            sizes = tile(own.shape[1], own.dtype)
            steps = STEPS if bias is not None else 1
            programs = triton.cdiv(pixels, sizes["R"] * steps)
            to_s = _new(own, *own.shape)
            sums = own.new_empty(programs, own.shape[1], dtype=wider(own.dtype)) if bias is not None else to_s
            if pixels:
                elu_pair_gradients_kernel[(programs,)](
                    upstream, _last(own), own if bias is None else bias[at:], to_s, sums, own if seed is None else seed,
                    part, _threshold(dropout), steps, pixels, height, width, out_height, out_width, pad[0], pad[2], at,
                    half, **sizes, BIAS=bias is not None, DROP=seed is not None, num_warps=WARPS,
                )  # fmt: skip
            found.append(to_s)
            totals += [sums.sum(0)] if bias is not None else []
            at += own.shape[1]
    return [*found, upstream.new_empty(0) if bias is None else torch.cat(totals).to(bias.dtype)]


def _sizes(s: Sequence[Tensor], pad: Sequence[int]) -> tuple[int, int, int]:
    """Height and width with the zeros around, and the channels of all s."""
    _, _, height, width = s[0].shape
    return height + pad[2] + pad[3], width + pad[0] + pad[1], sum(t.shape[1] for t in s)


@torch.library.custom_op("infovae_fast::gated_residual_triton", mutates_args=())
def gated_residual(s: Tensor, f: Tensor, bias: Tensor | None, condition: Tensor | None) -> Tensor:
    out, sizes, pixels = _new(s, *s.shape), tile(s.shape[1], s.dtype), s.shape[2] * s.shape[3]
    bias, condition = _flat(bias), _flat(condition)
    with _on(s):
        if out.numel():
            gated_residual_kernel[(len(s), triton.cdiv(pixels, sizes["R"]))](
                _last(s), _last(f), f if bias is None else bias, f if condition is None else condition,
                out, pixels, **sizes, BIAS=bias is not None, CONDITION=condition is not None,
                num_warps=WARPS,
            )  # fmt: skip
    return out


@torch.library.custom_op("infovae_fast::gated_residual_gradients_triton", mutates_args=())
def gated_residual_gradients(
    upstream: Tensor, f: Tensor, bias: Tensor | None, condition: Tensor | None
) -> tuple[Tensor, Tensor]:
    """To f, and its sums over the pixels, [N, 2F]."""
    n, channels, height, width = f.shape
    sizes, pixels = tile(channels // 2, f.dtype), height * width
    bias, condition = _flat(bias), _flat(condition)
    to_f, steps = _new(f, *f.shape), min(STEPS, triton.cdiv(pixels, sizes["R"]))
    blocks = triton.cdiv(pixels, sizes["R"] * steps) if pixels else 0
    wanted = bias is not None or condition is not None
    sums = f.new_empty((n, blocks, channels) if wanted else (0, 0, 0), dtype=wider(f.dtype))
    with _on(f):
        if f.numel():
            gated_residual_gradients_kernel[(n, blocks, 4)](
                _last(upstream), _last(f), f if bias is None else bias, f if condition is None else
                condition, to_f, sums, steps, pixels, **sizes, BIAS=bias is not None,
                CONDITION=condition is not None, num_warps=WARPS,
            )  # fmt: skip
    return to_f, sums.sum(1)


@elu_pair.register_fake
def _(s, bias, seed, pad, dropout):
    out_height, out_width, half = _sizes(s, pad)
    return _new(s[0], len(s[0]), 2 * half, out_height, out_width)


@elu_pair_gradients.register_fake
def _(upstream, s, bias, seed, pad, dropout):
    return [*(_new(t, *t.shape) for t in s), upstream.new_empty(0) if bias is None else torch.empty_like(bias)]


@gated_residual.register_fake
def _(s, f, bias, condition):
    return _new(s, *s.shape)


@gated_residual_gradients.register_fake
def _(upstream, f, bias, condition):
    shape = (len(f), f.shape[1]) if bias is not None or condition is not None else (0, 0)
    return _new(f, *f.shape), f.new_empty(shape, dtype=wider(f.dtype))
