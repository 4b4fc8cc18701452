"""`elu_pair`, `gated_residual` and `weights` on the GPU: the same page as `infovae_fast/gated_residual.py`.

Tensors are channels-last, rows of pixels of F channels. A thread takes vectors: V neighbouring channels, 16 bytes where
F allows; a program takes P of a row of `elu_pair`, else R pixels and C vectors of each. What depends on the row alone
is found once for all of a program. With E = e^-|t|

    elu(t), elu(-t) = t, E - 1   where t > 0, else   E - 1, -t          E - 1 by its series where |t| is small
    gradient to t   = g_1 - E g_2   where t > 0, else   E g_1 - g_2

The numbers of a vector share the four words of a Philox call, a second one where p is no multiple of 1/256.

The gradients to biases and conditions are sums over pixels: each program's in float32 (float64), then of those.
`weights` are `normalised`: a program has what one output is made of, a launch four convolutions.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTORS = 128  # of a program's tile
PAIR_VECTORS = 256  # the same where `elu_pair` writes its result
WARPS = 4
STEPS = 4  # tiles of a program that sums over pixels
ROUNDS = tl.constexpr(7)  # of Philox: the fewest in which its authors found no flaw
PARTS = 1024  # about so many sums of programs are left to be added


@triton.jit
def decay(t, SHORT: tl.constexpr):
    """E = e^-|t|."""
    if SHORT:
        return tl.exp2(tl.abs(t) * -1.4426950408889634)
    return tl.exp(-tl.abs(t))


@triton.jit
def decay_less_one(t, SHORT: tl.constexpr):
    """E - 1, to float32's digits or float64's; where it is SHORT, to more than bfloat16 and float16 have."""
    m = -tl.abs(t)
    if SHORT:
        return tl.where(m > -0.03125, m + m * m * 0.5, decay(t, SHORT) - 1.0)
    if t.dtype == tl.float32:
        series = 1.0 + m * (1.0 / 8)
    else:
        series = 1.0 + m * (1.0 / 15)
        for i in tl.static_range(7):
            series = 1.0 + m * (1.0 / (14 - i)) * series
    for i in tl.static_range(6):
        series = 1.0 + m * (1.0 / (7 - i)) * series
    return tl.where(m > -0.35, m * series, decay(t, SHORT) - 1.0)


@triton.jit
def pick(words, k):
    """The k-th of four words."""
    low, high = tl.where(k == 0, words[0], words[1]), tl.where(k == 2, words[2], words[3])
    return tl.where(k < 2, low, high).to(tl.uint32, bitcast=True)


@triton.jit
def random_bits(seed, part, vector, v, V: tl.constexpr, BITS: tl.constexpr):
    """In a word for each number v of a vector: BITS of its own, and above them BITS for its negative."""
    key = tl.load(seed) + part
    if BITS == 8:
        return pick(tl.randint4x(key, vector, ROUNDS), v // 2) >> ((v % 2) * 16).to(tl.uint32)
    word = pick(tl.randint4x(key, 2 * vector, ROUNDS), v % 4)
    if V == 8:
        word = tl.where(v < 4, word, pick(tl.randint4x(key, 2 * vector + 1, ROUNDS), v % 4))
    return word


@triton.jit
def dropped(plus, minus, bits, threshold, BITS: tl.constexpr):
    """What stays of the pair, divided by the chance to stay."""
    scale = (1 << BITS) / (tl.zeros_like(plus) + ((1 << BITS) - threshold))
    first, second = bits & ((1 << BITS) - 1), (bits >> BITS) & ((1 << BITS) - 1)
    plus = tl.where(first.to(tl.int32) >= threshold, plus * scale, 0.0)
    return plus, tl.where(second.to(tl.int32) >= threshold, minus * scale, 0.0)


@triton.jit
def elu_pair_kernel(
    s, bias, out, seed, part, threshold, height, width, out_height, out_width, left, above, at, half, G: tl.constexpr,
    V: tl.constexpr, P: tl.constexpr, BIAS: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """Program (row, b): of a row of `out` the vectors at .. at + G and half + at .. of each pixel, out of 2 half."""
    row = tl.program_id(0)
    image = row // out_height
    y = row - image * out_height - above
    source_row = image * height + y
    vector = tl.program_id(1) * P + tl.arange(0, P)[:, None]
    x, g = vector // G, vector % G
    v = tl.arange(0, V)[None, :]
    written = x < out_width
    inside = written & (x >= left) & (x < width + left) & (y >= 0) & (y < height)
    own = vector - left * G
    t = tl.load(s + source_row.to(tl.int64) * width * (G * V) + (own * V + v), mask=inside, other=0.0).to(WIDE)
    if BIAS:
        t += tl.load(bias + (g * V + v), mask=written, other=0.0).to(WIDE)
    less = decay_less_one(t, SHORT)
    plus, minus = tl.where(t > 0, t, less), tl.where(t > 0, less, -t)
    if BITS:
        bits = random_bits(seed, part, source_row * (width * G) + own, v, V, BITS)
        plus, minus = dropped(plus, minus, bits, threshold, BITS)
    to = out + row.to(tl.int64) * out_width * (2 * half * V) + ((x * (2 * half) + at + g) * V + v)
    tl.store(to, tl.where(inside, plus, 0.0), mask=written)
    tl.store(to + half * V, tl.where(inside, minus, 0.0), mask=written)


@triton.jit
def elu_pair_gradients_kernel(
    upstream, s, bias, more, to_s, sums, seed, part, threshold, steps, rows, height, width, out_height, out_width, left,
    above, at, half, G: tl.constexpr, V: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BIAS: tl.constexpr,
    MORE: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """Program (r, b): `steps` of the rows of s. sums [programs, F]: of to_s over those. `more` is added to to_s."""
    chunks: tl.constexpr = (G + C - 1) // C
    first = tl.program_id(0) // chunks
    x = (tl.program_id(1) * R + tl.arange(0, R))[:, None, None]
    g = (tl.program_id(0) % chunks * C + tl.arange(0, C))[None, :, None]
    v = tl.arange(0, V)[None, None, :]
    real = (x < width) & (g < G)
    inside = real & (x + left >= 0) & (x + left < out_width)
    vector = x * G + g
    own = vector * V + v
    to_pair = ((x + left) * (2 * half) + at + g) * V + v
    if BIAS:
        shift = tl.load(bias + (g * V + v), mask=g < G, other=0.0).to(WIDE)
        total = tl.zeros([R, C, V], WIDE)
    for step in range(steps):
        row = first * steps + step
        image = row // height
        y = row - image * height + above
        there = real & (row < rows)
        read = inside & (row < rows) & (y >= 0) & (y < out_height)
        start = row.to(tl.int64) * width * (G * V)
        pair = upstream + (image * out_height + y).to(tl.int64) * out_width * (2 * half * V)
        t = tl.load(s + start + own, mask=there, other=0.0).to(WIDE)
        plus = tl.load(pair + to_pair, mask=read, other=0.0).to(WIDE)
        minus = tl.load(pair + half * V + to_pair, mask=read, other=0.0).to(WIDE)
        if BIAS:
            t += shift
        if BITS:
            bits = random_bits(seed, part, row * (width * G) + vector, v, V, BITS)
            plus, minus = dropped(plus, minus, bits, threshold, BITS)
        e = decay(t, SHORT)
        slope = tl.where(t > 0, plus - e * minus, e * plus - minus)
        if BIAS:
            total += tl.where(there, slope, 0.0)
        if MORE:
            slope += tl.load(more + start + own, mask=there, other=0.0).to(WIDE)
        tl.store(to_s + start + own, slope, mask=there)
    if BIAS:
        program = (first * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
        put_sums(sums + program * (G * V), total, g, v, G, V)


@triton.jit
def put_sums(sums, tile, g, v, G: tl.constexpr, V: tl.constexpr):
    tl.store(sums + (g * V + v), tl.sum(tile, axis=0, keep_dims=True), mask=g < G)


@triton.jit
def totals_kernel(sums, out, rows, F: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The sums over the rows of sums [rows, F]."""
    channel = tl.program_id(0) * C + tl.arange(0, C)
    total = tl.zeros([R, C], sums.dtype.element_ty)
    for start in range(0, rows, R):
        row = start + tl.arange(0, R)
        there = (row < rows)[:, None] & (channel < F)[None, :]
        total += tl.load(sums + row.to(tl.int64)[:, None] * F + channel[None, :], mask=there, other=0.0)
    tl.store(out + channel, tl.sum(total, axis=0), mask=channel < F)


@triton.jit
def gate_of(f, bias, condition, image, start, of_pixel, g, v, there, G: tl.constexpr, V: tl.constexpr,
            BIAS: tl.constexpr, CONDITION: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Vectors g of f, of pixels of one image, with what is added to them."""
    t = tl.load(f + start + of_pixel + (g * V + v), mask=there, other=0.0).to(WIDE)
    if BIAS:
        t += tl.load(bias + (g * V + v), mask=g < 2 * G, other=0.0).to(WIDE)
    if CONDITION:
        t += tl.load(condition + image * (2 * G * V) + (g * V + v), mask=g < 2 * G, other=0.0).to(WIDE)
    return t


@triton.jit
def gated_residual_kernel(
    s, f, bias, condition, out, blocks, pixels, G: tl.constexpr, V: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    BIAS: tl.constexpr, CONDITION: tl.constexpr, WIDE: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """A program: a block of the `pixels` of an image."""
    chunks: tl.constexpr = (G + C - 1) // C
    block = tl.program_id(0) // chunks
    image = (block // blocks).to(tl.int64)
    p = (block % blocks * R + tl.arange(0, R))[:, None, None]
    g = (tl.program_id(0) % chunks * C + tl.arange(0, C))[None, :, None]
    v = tl.arange(0, V)[None, None, :]
    there = (p < pixels) & (g < G)
    start, twice = image * pixels * (G * V), p * (2 * G * V)
    a = gate_of(f, bias, condition, image, 2 * start, twice, g, v, there, G, V, BIAS, CONDITION, WIDE)
    b = gate_of(f, bias, condition, image, 2 * start, twice, G + g, v, there, G, V, BIAS, CONDITION, WIDE)
    at = start + (p * G + g) * V + v
    t = tl.load(s + at, mask=there, other=0.0).to(WIDE)
    e = decay(b, SHORT)
    far = 1 / (1 + e)
    tl.store(out + at, t + a * tl.where(b > 0, far, e * far), mask=there)


@triton.jit
def gated_residual_gradients_kernel(
    upstream, f, bias, condition, to_f, sums, steps, blocks, pixels, G: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, BIAS: tl.constexpr, CONDITION: tl.constexpr, WIDE: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """A program: `steps` tiles of an image. sums [images, blocks, 2F]: of to_f over those."""
    chunks: tl.constexpr = (G + C - 1) // C
    block = tl.program_id(0) // chunks
    image = (block // blocks).to(tl.int64)
    g = (tl.program_id(0) % chunks * C + tl.arange(0, C))[None, :, None]
    v = tl.arange(0, V)[None, None, :]
    start = image * pixels * (G * V)
    sum_a = tl.zeros([R, C, V], WIDE)
    sum_b = tl.zeros([R, C, V], WIDE)
    for step in range(steps):
        p = ((block % blocks * steps + step) * R + tl.arange(0, R))[:, None, None]
        there = (p < pixels) & (g < G)
        twice = p * (2 * G * V)
        a = gate_of(f, bias, condition, image, 2 * start, twice, g, v, there, G, V, BIAS, CONDITION, WIDE)
        b = gate_of(f, bias, condition, image, 2 * start, twice, G + g, v, there, G, V, BIAS, CONDITION, WIDE)
        up = tl.load(upstream + start + (p * G + g) * V + v, mask=there, other=0.0).to(WIDE)
        e = decay(b, SHORT)
        far = 1 / (1 + e)
        near = e * far
        to_a = up * tl.where(b > 0, far, near)
        to_b = to_a * a * tl.where(b > 0, near, far)  # 1 - sigmoid, without cancellation
        to = to_f + 2 * start + twice + g * V + v
        tl.store(to, to_a, mask=there)
        tl.store(to + G * V, to_b, mask=there)
        sum_a += tl.where(there, to_a, 0.0)
        sum_b += tl.where(there, to_b, 0.0)
    if BIAS or CONDITION:
        own = sums + block.to(tl.int64) * (2 * G * V)
        put_sums(own, sum_a, g, v, G, V)
        put_sums(own + G * V, sum_b, g, v, G, V)


@triton.jit
def normalised_row(v, g, w, rows, columns, B: tl.constexpr, WIDE: tl.constexpr):
    """A row of w = g v / |v|."""
    row = tl.program_id(0)
    if row < rows:
        c = tl.arange(0, B)
        at = row * columns + c
        t = tl.load(v + at, mask=c < columns, other=0.0).to(WIDE)
        scale = tl.load(g + row).to(WIDE) / tl.sqrt(tl.sum(t * t, axis=0))
        tl.store(w + at, t * scale, mask=c < columns)


@triton.jit
def normalised_gradients_row(v, g, up, to_v, to_g, rows, columns, B: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if row < rows:
        c = tl.arange(0, B)
        at = row * columns + c
        t = tl.load(v + at, mask=c < columns, other=0.0).to(WIDE)
        u = tl.load(up + at, mask=c < columns, other=0.0).to(WIDE)
        squares, product = tl.sum(t * t, axis=0), tl.sum(t * u, axis=0)
        norm = tl.sqrt(squares)
        tl.store(to_v + at, (u - t * (product / squares)) * (tl.load(g + row).to(WIDE) / norm), mask=c < columns)
        tl.store(to_g + row, product / norm)


@triton.jit
def normalised_kernel(
    v0, v1, v2, v3, g0, g1, g2, g3, w0, w1, w2, w3, rows0, rows1, rows2, rows3, columns0, columns1, columns2, columns3,
    B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (row, which)."""
    which = tl.program_id(1)
    if which == 0:
        normalised_row(v0, g0, w0, rows0, columns0, B, WIDE)
    elif which == 1:
        normalised_row(v1, g1, w1, rows1, columns1, B, WIDE)
    elif which == 2:
        normalised_row(v2, g2, w2, rows2, columns2, B, WIDE)
    else:
        normalised_row(v3, g3, w3, rows3, columns3, B, WIDE)


@triton.jit
def normalised_gradients_kernel(
    v0, v1, v2, v3, g0, g1, g2, g3, u0, u1, u2, u3, to_v0, to_v1, to_v2, to_v3, to_g0, to_g1, to_g2, to_g3,
    rows0, rows1, rows2, rows3, columns0, columns1, columns2, columns3, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (row, which)."""
    which = tl.program_id(1)
    if which == 0:
        normalised_gradients_row(v0, g0, u0, to_v0, to_g0, rows0, columns0, B, WIDE)
    elif which == 1:
        normalised_gradients_row(v1, g1, u1, to_v1, to_g1, rows1, columns1, B, WIDE)
    elif which == 2:
        normalised_gradients_row(v2, g2, u2, to_v2, to_g2, rows2, columns2, B, WIDE)
    else:
        normalised_gradients_row(v3, g3, u3, to_v3, to_g3, rows3, columns3, B, WIDE)


def vectors(parts: Sequence[Tensor], channels: int) -> dict[str, Any]:
    """The vectors that fit each of `parts`, G of them in `channels`; what is computed in, and with how many digits."""
    dtype = parts[0].dtype
    v = math.gcd(16 // dtype.itemsize, *(t.shape[1] for t in parts))
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    return {"G": channels // v, "V": v, "WIDE": wide, "SHORT": dtype.itemsize < 4}


def tile(sizes: dict[str, Any], itemsize: int, pixels: int) -> dict[str, Any]:
    """R of so many pixels in a row and C vectors of each: a power of 2 that divides G, if it fills 64 bytes."""
    g = sizes["G"]
    whole = g & -g
    c = min(whole if whole * sizes["V"] * itemsize >= 64 else triton.next_power_of_2(g), VECTORS)
    r = max(1, min(triton.next_power_of_2(pixels), VECTORS // c))
    return sizes | {"R": r, "C": c, "num_warps": max(1, min(WARPS, r * c // 32))}


def bits(seed: Tensor | None, dropout: float) -> tuple[int, int]:
    """Of a random number that drops, 0 without dropout; and how many of their values do."""
    threshold = min(round(dropout * 65536), 65535)
    if seed is None:
        return 0, 0
    return (16, threshold) if threshold % 256 else (8, threshold // 256)


def wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def totals(sums: Tensor, out: Tensor) -> None:
    """out = sums.sum(0)."""
    rows, channels = sums.shape
    totals_kernel[(triton.cdiv(channels, 16),)](sums, out, rows, channels, R=128, C=16, num_warps=WARPS)


def _last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _on(t: Tensor) -> Any:
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


@torch.library.custom_op("infovae_fast::elu_pair_triton", mutates_args=())
def elu_pair(
    s: Sequence[Tensor], bias: Tensor | None, seed: Tensor | None, pad: Sequence[int], dropout: float
) -> Tensor:
    n, _, height, width = s[0].shape
    bias = _flat(bias)
    out_height, out_width, half = _sizes(s, pad)
    out = _new(s[0], n, 2 * half, out_height, out_width)
    at, (n_bits, threshold) = 0, bits(seed, dropout)
    with _on(out):
        for part, own in enumerate(s):
            sizes = vectors(s, own.shape[1])
            v, in_row = sizes["V"], out_width * sizes["G"]
            p = min(PAIR_VECTORS, triton.next_power_of_2(in_row))
            if out.numel():
                elu_pair_kernel[(n * out_height, triton.cdiv(in_row, p))](
                    _last(own), own if bias is None else bias[at:], out, own if seed is None else seed, part, threshold,
                    height, width, out_height, out_width, pad[0], pad[2], at // v, half // v, **sizes, P=p,
                    BIAS=bias is not None, BITS=n_bits, num_warps=max(1, min(WARPS, p // 32)),
                )  # fmt: skip
            at += own.shape[1]
    return out


@torch.library.custom_op("infovae_fast::elu_pair_gradients_triton", mutates_args=())
def elu_pair_gradients(
    upstream: Tensor,
    s: Sequence[Tensor],
    bias: Tensor | None,
    seed: Tensor | None,
    pad: Sequence[int],
    dropout: float,
    more: Sequence[Tensor | None],
) -> list[Tensor]:
    """To each of s, with the one of `more` added, and to the bias."""
    n, _, height, width = s[0].shape
    bias = _flat(bias)
    to_bias = upstream.new_empty(0) if bias is None else torch.empty_like(bias)
    out_height, out_width, half = _sizes(s, pad)
    upstream, found, rows = _last(upstream), [], n * height
    at, (n_bits, threshold) = 0, bits(seed, dropout)
    with _on(upstream):
        for part, (own, added) in enumerate(zip(s, more, strict=True)):
            sizes = tile(vectors(s, own.shape[1]), own.dtype.itemsize, width)
            v, steps = sizes["V"], max(STEPS, triton.cdiv(rows, PARTS)) if bias is not None else 1
            blocks, groups = triton.cdiv(width, sizes["R"]), triton.cdiv(rows, steps)
            to_s = _new(own, *own.shape)
            sums = to_s if bias is None else own.new_empty(groups * blocks, own.shape[1], dtype=wider(own.dtype))
            if own.numel():
                elu_pair_gradients_kernel[(groups * triton.cdiv(sizes["G"], sizes["C"]), blocks)](
                    upstream, _last(own), own if bias is None else bias[at:], own if added is None else _last(added),
                    to_s, sums, own if seed is None else seed, part, threshold, steps, rows, height, width, out_height,
                    out_width, pad[0], pad[2], at // v, half // v, **sizes, BIAS=bias is not None,
                    MORE=added is not None, BITS=n_bits,
                )  # fmt: skip
            if bias is not None:
                totals(sums, to_bias[at : at + own.shape[1]])
            found.append(to_s)
            at += own.shape[1]
    return [*found, to_bias]


def _sizes(s: Sequence[Tensor], pad: Sequence[int]) -> tuple[int, int, int]:
    """Height and width with the zeros around, and the channels of all s."""
    _, _, height, width = s[0].shape
    return height + pad[2] + pad[3], width + pad[0] + pad[1], sum(t.shape[1] for t in s)


def _fits(f: Tensor) -> None:
    """Within an image kernels count in 32 bits."""
    if f.shape[1:].numel() >= 2**31:
        shape = tuple(f.shape)
        raise ValueError(f"f: got shape {shape}; accepted: fewer than 2^31 numbers an image; use backend='reference'")


@torch.library.custom_op("infovae_fast::gated_residual_triton", mutates_args=())
def gated_residual(s: Tensor, f: Tensor, bias: Tensor | None, condition: Tensor | None) -> Tensor:
    out, pixels = _new(s, *s.shape), s.shape[2] * s.shape[3]
    _fits(f)
    sizes = tile(vectors([s], s.shape[1]), s.dtype.itemsize, pixels)
    blocks, chunks = triton.cdiv(pixels, sizes["R"]), triton.cdiv(sizes["G"], sizes["C"])
    bias, condition = _flat(bias), _flat(condition)
    with _on(s):
        if out.numel():
            gated_residual_kernel[(len(s) * blocks * chunks,)](
                _last(s), _last(f), f if bias is None else bias, f if condition is None else condition, out, blocks,
                pixels, **sizes, BIAS=bias is not None, CONDITION=condition is not None,
            )  # fmt: skip
    return out


@torch.library.custom_op("infovae_fast::gated_residual_gradients_triton", mutates_args=())
def gated_residual_gradients(
    upstream: Tensor, f: Tensor, bias: Tensor | None, condition: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """To f, to the bias and to the condition."""
    n, channels, height, width = f.shape
    pixels = height * width
    _fits(f)
    sizes = tile(vectors([upstream], channels // 2), f.dtype.itemsize, pixels)
    bias, condition = _flat(bias), _flat(condition)
    to_f, steps = _new(f, *f.shape), max(1, min(STEPS, triton.cdiv(pixels, sizes["R"])))
    blocks, chunks = triton.cdiv(pixels, sizes["R"] * steps), triton.cdiv(sizes["G"], sizes["C"])
    wanted = bias is not None or condition is not None
    sums = f.new_empty((n, blocks, channels) if wanted else (0, 0, 0), dtype=wider(f.dtype))
    to_bias = f.new_empty(0) if bias is None else torch.empty_like(bias)
    with _on(f):
        if f.numel():
            gated_residual_gradients_kernel[(n * blocks * chunks,)](
                _last(upstream), _last(f), f if bias is None else bias, f if condition is None else condition, to_f,
                sums, steps, blocks, pixels, **sizes, BIAS=bias is not None, CONDITION=condition is not None,
            )  # fmt: skip
        of_images = sums.flatten(0, 1) if condition is None else sums.sum(1)
        if bias is not None:
            totals(of_images, to_bias)
    return to_f, to_bias, f.new_empty(0) if condition is None else of_images.to(condition.dtype)


def _by_fours(kernel: Any, v: Sequence[Tensor], *more: Sequence[Tensor]) -> None:
    """The kernel on four tensors of each sequence at a time, the last one again where there are fewer."""
    wide = tl.float64 if v[0].dtype == torch.float64 else tl.float32
    for start in range(0, len(v), 4):
        some = [min(i, len(v) - 1) for i in range(start, start + 4)]
        rows = [len(v[i]) if i == start + k else 0 for k, i in enumerate(some)]
        columns = [v[i][0].numel() for i in some]
        size = triton.next_power_of_2(max(columns))
        kernel[(max(rows), 4)](
            *(own[i] for own in (v, *more) for i in some), *rows, *columns, size, wide,
            num_warps=max(1, min(8, size // 256)),
        )  # fmt: skip


@torch.library.custom_op("infovae_fast::normalised_triton", mutates_args=())
def normalised(v: Sequence[Tensor], g: Sequence[Tensor]) -> list[Tensor]:
    found = [_new(t, *t.shape) for t in v]
    with _on(v[0]):
        _by_fours(normalised_kernel, [_last(t) for t in v], [t.contiguous() for t in g], found)
    return found


@torch.library.custom_op("infovae_fast::normalised_gradients_triton", mutates_args=())
def normalised_gradients(v: Sequence[Tensor], g: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """To each of v, then to each of g."""
    to_v, to_g = [_new(t, *t.shape) for t in v], [torch.empty_like(t) for t in g]
    inputs = [_last(t) for t in v], [t.contiguous() for t in g], [_last(t) for t in upstream]
    with _on(v[0]):
        _by_fours(normalised_gradients_kernel, *inputs, to_v, to_g)
    return [*to_v, *to_g]


@normalised.register_fake
def _(v, g):
    return [_new(t, *t.shape) for t in v]


@normalised_gradients.register_fake
def _(v, g, upstream):
    return [*(_new(t, *t.shape) for t in v), *(torch.empty_like(t) for t in g)]


@elu_pair.register_fake
def _(s, bias, seed, pad, dropout):
    out_height, out_width, half = _sizes(s, pad)
    return _new(s[0], len(s[0]), 2 * half, out_height, out_width)


@elu_pair_gradients.register_fake
def _(upstream, s, bias, seed, pad, dropout, more):
    return [*(_new(t, *t.shape) for t in s), upstream.new_empty(0) if bias is None else torch.empty_like(bias)]


@gated_residual.register_fake
def _(s, f, bias, condition):
    return _new(s, *s.shape)


@gated_residual_gradients.register_fake
def _(upstream, f, bias, condition):
    to_bias, to_condition = (f.new_empty(0) if t is None else t.new_empty(t.shape) for t in (bias, condition))
    return _new(f, *f.shape), to_bias, to_condition
