"""-log P of a discretised logistic mixture on the GPU: the same page as `infovae_fast/logistic_mixture.py`.

A program takes a block of pixels; a number of each pixel and component is a tile [BLOCK, KP], KP at least K. With p
and m the edges of a bin, w = p - m and all in units of s,

    P = sigmoid(p) sigmoid(-m) (1 - e^-w) = e^-(max(-p, 0) + max(m, 0)) (1 - e^-w) / ((1 + e^-|p|) (1 + e^-|m|))

so that a component's log P is a sum, of what may be huge, and the logarithm of a factor that is near 1: log w goes to
the sum where w < 1. The factors stay as they are in the sum over components, and a pixel needs one logarithm.
"""

import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 128  # of a tile
WARPS = 4
COEFFICIENTS = tl.constexpr(tuple(1 / math.factorial(i + 1) for i in range(19)))  # of (1 - e^-w) / w


@triton.jit
def exp(x):
    """e^x; float32's loses digits where |x| is large, and has no denormal numbers, which GPUs need more steps for."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def power_of_e(x):
    """e^x with all digits."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    k = tl.floor(x * 1.44269504 + 0.5)
    return exp((x - k * 0.693359375) + k * 2.12194440e-4) * tl.exp2(k)


@triton.jit
def decay(w, TERMS: tl.constexpr):
    """For w >= 0: e^-w and 1 - e^-w, that divided by w where w < 1, by its series."""
    e = exp(-w)
    small = tl.where(w < 1, w, 1.0)
    series = tl.zeros_like(w)
    for i in tl.static_range(TERMS + 1):
        series = COEFFICIENTS[TERMS - i] - small * series
    return e, tl.where(w < 1, series, 1.0 - e)


@triton.jit
def tanh(a, TERMS: tl.constexpr):
    """And its derivative."""
    w = 2 * tl.abs(a)
    e, f = decay(w, TERMS)
    f = tl.where(w < 1, w * f, f)
    r = 1 / (1 + e)
    return tl.where(a < 0, -f, f) * r, 4 * e * (r * r)


@triton.jit
def level_of(x, last):
    """The value in half bins; rounds half to even."""
    scaled = x * last
    below = tl.floor(scaled)
    odd = below - 2 * tl.floor(below * 0.5)
    up = (scaled - below > 0.5) | ((scaled - below == 0.5) & (odd == 1))
    return 2 * tl.where(up, below + 1, below) - last


@triton.jit
def bin_of(halves, mean, log_s, last, log_width, TERMS: tl.constexpr):
    """-log P of a bin as `down` - log(factor), and its slopes to the mean and the log-scale."""
    first_bin, last_bin = halves == -last, halves == last
    inverse_s = power_of_e(-log_s)
    per_half = inverse_s / last
    p = tl.where(last_bin, 10000.0, (halves + 1 - mean * last) * per_half)
    m = tl.where(first_bin, -10000.0, (halves - 1 - mean * last) * per_half)
    ep, em = exp(-tl.abs(p)), exp(-tl.abs(m))
    both = 1 / ((1 + ep) * (1 + em))  # sigmoid of |p| times that of |m|
    w = 2 * per_half
    e, f = decay(w, TERMS)
    outer = first_bin | last_bin
    down = tl.where(p < 0, -p, 0.0) + tl.where(m > 0, m, 0.0) - tl.where(outer | (w >= 1), 0.0, log_width - log_s)
    factor = both * tl.where(outer, 1.0, f)
    above = both * (1 + em) * tl.where(p > 0, ep, 1.0)  # sigmoid of -p
    below = both * (1 + ep) * tl.where(m > 0, 1.0, em)  # and of m
    narrowing = tl.where(w < 1, e, tl.where(e == 0, 0.0, w * e)) / f
    return down, factor, (above - below) * inverse_s, above * p - below * m + tl.where(outer, 0.0, narrowing)


@triton.jit
def row_of(start, row: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, stride):
    return start[:, None] + (row * K + tl.arange(0, KP)).to(tl.int64)[None, :] * stride


@triton.jit
def logistic_mixture_kernel(
    source, x, nll, gradient, n, pixels, source_n, source_p, source_s, x_n, x_c, x_s, gradient_n, gradient_p,
    gradient_s, last_level, K: tl.constexpr, KP: tl.constexpr, CHANNELS: tl.constexpr, GRADIENT: tl.constexpr,
    TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """-log P of the pixels of n images, [n, pixels], and its gradient to source [n, P, pixels], with any strides.

    A parameter named params would be lost: what Triton binds the arguments of a launch with has a local of that name.
    """
    dtype = source.dtype.element_ty
    q = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    image, pixel = q // pixels, q % pixels
    there = image < n
    start = image * source_n + pixel * source_s
    to = image * gradient_n + pixel * gradient_s
    inside = there[:, None] & (tl.arange(0, KP) < K)[None, :]
    last = tl.zeros([1], dtype) + last_level
    log_width = tl.log(2 / last)[:, None]

    logits = tl.load(source + row_of(start, 0, K, KP, source_p), mask=inside, other=float("-inf"))
    logits -= tl.where(there, tl.max(logits, axis=1), 0.0)[:, None]
    weight = exp(logits)
    mean_0 = tl.load(source + row_of(start, 1, K, KP, source_p), mask=inside, other=0.0)
    log_s_0 = tl.load(source + row_of(start, 2, K, KP, source_p), mask=inside, other=0.0)
    at = x + image * x_n + pixel * x_s
    x_0 = level_of(tl.load(at, mask=there, other=0.0), last)[:, None]
    last = last[:, None]
    down, factor, to_mean_0, to_log_s_0 = bin_of(x_0, mean_0, log_s_0, last, log_width, TERMS)
    down -= logits
    if CHANNELS == 3:
        y_0 = x_0 / last
        x_1 = level_of(tl.load(at + x_c, mask=there, other=0.0)[:, None], last)
        x_2 = level_of(tl.load(at + 2 * x_c, mask=there, other=0.0)[:, None], last)
        y_1 = x_1 / last
        t_0, slope_0 = tanh(tl.load(source + row_of(start, 3, K, KP, source_p), mask=inside, other=0.0), TERMS)
        t_1, slope_1 = tanh(tl.load(source + row_of(start, 6, K, KP, source_p), mask=inside, other=0.0), TERMS)
        t_2, slope_2 = tanh(tl.load(source + row_of(start, 9, K, KP, source_p), mask=inside, other=0.0), TERMS)
        mean_1 = tl.load(source + row_of(start, 4, K, KP, source_p), mask=inside, other=0.0) + t_0 * y_0
        log_s_1 = tl.load(source + row_of(start, 5, K, KP, source_p), mask=inside, other=0.0)
        down_1, factor_1, to_mean_1, to_log_s_1 = bin_of(x_1, mean_1, log_s_1, last, log_width, TERMS)
        mean_2 = tl.load(source + row_of(start, 7, K, KP, source_p), mask=inside, other=0.0) + (t_1 * y_0 + t_2 * y_1)
        log_s_2 = tl.load(source + row_of(start, 8, K, KP, source_p), mask=inside, other=0.0)
        down_2, factor_2, to_mean_2, to_log_s_2 = bin_of(x_2, mean_2, log_s_2, last, log_width, TERMS)
        down += down_1 + down_2
        factor *= factor_1 * factor_2

    # P = sum_k weight_k / weights e^-down_k factor_k, the weight being in down.
    weights = tl.sum(weight, axis=1)
    least = tl.where(there, tl.min(down, axis=1), 0.0)
    part = exp(least[:, None] - down) * factor
    total = tl.sum(part, axis=1)
    tl.store(nll + q, least + tl.log(weights / total), mask=there)
    if GRADIENT:
        share = part / total[:, None]  # of the component in P
        tl.store(gradient + row_of(to, 0, K, KP, gradient_p), weight / weights[:, None] - share, mask=inside)
        tl.store(gradient + row_of(to, 1, K, KP, gradient_p), to_mean_0 * share, mask=inside)
        tl.store(gradient + row_of(to, 2, K, KP, gradient_p), to_log_s_0 * share, mask=inside)
        if CHANNELS == 3:
            to_mean_1 *= share
            to_mean_2 *= share
            tl.store(gradient + row_of(to, 3, K, KP, gradient_p), to_mean_1 * y_0 * slope_0, mask=inside)
            tl.store(gradient + row_of(to, 4, K, KP, gradient_p), to_mean_1, mask=inside)
            tl.store(gradient + row_of(to, 5, K, KP, gradient_p), to_log_s_1 * share, mask=inside)
            tl.store(gradient + row_of(to, 6, K, KP, gradient_p), to_mean_2 * y_0 * slope_1, mask=inside)
            tl.store(gradient + row_of(to, 7, K, KP, gradient_p), to_mean_2, mask=inside)
            tl.store(gradient + row_of(to, 8, K, KP, gradient_p), to_log_s_2 * share, mask=inside)
            tl.store(gradient + row_of(to, 9, K, KP, gradient_p), to_mean_2 * y_1 * slope_2, mask=inside)


def terms(dtype: torch.dtype) -> int:
    """Of the series of (1 - e^-w) / w, w < 1: the next one is below a rounding."""
    return 18 if dtype == torch.float64 else 10


def block(k: int) -> tuple[int, int]:
    """The pixels of a program and its warps: one number for each thread, or what the gradient needs fills registers."""
    columns = triton.next_power_of_2(k)
    pixels = max(1, NUMBERS // columns)
    return pixels, max(1, min(WARPS, pixels * columns // 32))


def _flat(t: Tensor) -> Tensor:
    """[N, C, *S] as [N, C, pixels], a view if that can be."""
    return t.flatten(2) if t.ndim > 2 else t.unsqueeze(2)


def launch(params: Tensor, x: Tensor, levels: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """The op infovae_fast::logistic_mixture of csrc/bindings.cpp."""
    flat, x_flat = _flat(params), _flat(x)
    n, channels, pixels = x_flat.shape
    slope = torch.empty_like(params) if gradient else params.new_empty(0)
    to = _flat(slope) if gradient else flat
    nll = params.new_empty(n, pixels)
    if nll.numel():
        k = params.shape[1] // (3 if channels == 1 else 10)
        pixels_of_program, warps = block(k)
        with torch.cuda.device(params.device) if params.is_cuda else nullcontext():
            logistic_mixture_kernel[(triton.cdiv(n * pixels, pixels_of_program),)](
                flat, x_flat, nll, to, n, pixels, *flat.stride(), *x_flat.stride(), *to.stride(), levels - 1, k,
                triton.next_power_of_2(k), channels, gradient, terms(params.dtype), pixels_of_program, num_warps=warps,
            )  # fmt: skip
        if gradient and to.data_ptr() != slope.data_ptr():
            slope.copy_(to.view(params.shape))
    return nll.sum(1, dtype=torch.float64).to(params.dtype), slope


logistic_mixture = torch.library.custom_op("infovae_fast::logistic_mixture_triton", launch, mutates_args=())


@logistic_mixture.register_fake
def _(params, x, levels, gradient):
    return params.new_empty(params.shape[0]), torch.empty_like(params) if gradient else params.new_empty(0)
