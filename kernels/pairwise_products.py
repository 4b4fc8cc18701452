"""Energy and force of a cloud on the GPU where points have many coordinates: cuBLAS multiplies, kernels do the rest.

A tile of targets i and sources j, with the formulas of `kernels/pairwise.py`:

    T = u u^T                                                                                cuBLAS
    d2_ij = h_i + h_j - 2 T_ij,  phi,  g = phi' a_j,  A_i += sum_j phi a_j,  G_i += sum_j g  `radial_kernel`
    S += g u,  and V += phi v                                                                cuBLAS
    force_i = sum over the clouds of sources of 2 w a_i (G_i u_i - S_i), + V_i               `force_kernel`

**Numbers.** Tensor cores multiply float16 twice as fast as TF32. A float32 number is a power of two times high + low,
both float16, and a product is low high + high low + high high: 22 bits. Side by side, [low | high | high] of the
targets and [high | low | high] of the sources, the three are one product of matrices. Every row of u and of g has a
power of two of its own, which brings its largest number into [2^13, 2^14), so that a far point takes no digits from the
others, nor a near one from those whose every g is tiny. The power of a row of g grows when a larger g comes, and S is
brought to it. Where PyTorch's matmul precision permits TF32, high high is all: 11 bits, as TF32 has. h is |u|^2 of the
numbers as multiplied, without low low, so that equal points have d2 = 0 but for the rounding of sums.

**Sums.** Tensor cores cut sums off instead of rounding them, which adds up: a product of matrices sums `SOURCES`
sources, small terms first, and cuBLAS adds it to S in float32, rounded. A and G are in float64 from the first addition
on: roundings of float32 were most of the error of an MMD and of its gradient. Each cloud of sources has an S of its
own: their weights w cancel, and are applied in float64.

**Memory.** At most `NUMBERS` coordinates of targets, and of sources, are split at once; T and g are those of a tile of
`TARGETS` x `SOURCES`. Beyond the results, A and G, that is 200 MB (300 with v), whatever N. Every tile reuses it, and
finds some of it in the L2 cache.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from infovae_fast.backends import tf32_allowed
from infovae_fast.kernels.radial import radial

AVAILABLE = hasattr(torch.ops.aten.baddbmm, "dtype_out")  # float32 products of float16 matrices: PyTorch 2.8
TARGETS, SOURCES = 8192, 1024  # a tile: 256 and 128 blocks of 128 x 256, two waves and one of an H100, at D = 512
NUMBERS = 2**22  # coordinates of targets, and of sources, that are split at once
PADDING = 64  # of the points, with zeros; the last tile has as many sources as there are
DEPTH = 16  # of the coordinates, with zeros: cuBLAS wants rows of 16 bytes
ROWS = 4  # of a tile in a program's registers

LEAST, MOST = tl.constexpr(2.0**-100), tl.constexpr(2.0**126)  # of what has a power of two
LARGEST = tl.constexpr(2.0**15)  # that a scaled number may be: the largest float16 is almost 2^16
BELOW = tl.constexpr(2.0**-13)


class Cloud(NamedTuple):
    """[clouds, n, D], [clouds, n] and [clouds, n, D], contiguous; no weights: 1, no v: 0."""

    z: Tensor
    weights: Tensor | None
    v: Tensor | None


@triton.jit
def power_below(x):
    """2^floor(log2 x) of positive normal x."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def inverse_power(power):
    """Exactly 1 / power, and 2^127 of 0."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def unit_of(most):
    """The power of two which numbers up to `most` are divided by to lie below 2^14."""
    return power_below(tl.minimum(tl.maximum(most, LEAST), MOST)) * BELOW


@triton.jit
def split(x):
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit(do_not_specialize=["first", "n"])
def split_kernel(
    z, weights, centre, left, right, numbers, first, n, rows, D: tl.constexpr, DP: tl.constexpr,
    PARTS: tl.constexpr, SOURCES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TARGET: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CENTRED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """u = z - centre of the points from `first` on, `rows` of each cloud, in parts, padded with zeros.

    Args:
        left: [clouds, rows, PARTS, DP]: the parts are low, high, high of targets and high, low, high of sources.
        right: as of sources, [clouds, tiles of SOURCES, PARTS, points of the tile, DP].
        numbers: [3, clouds, rows]: the powers of two, h and the weights; of these h and weights only with left.
        LEFT, RIGHT: whether they are wanted.
    """
    cloud = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)  # a power of 2, at least DP
    padded = (row < rows)[:, None] & (column < DP)[None, :]
    there = (first + row < n)[:, None] & (column < D)[None, :]
    at = cloud * n + first + row
    u = tl.load(z + at[:, None] * D + column[None, :], mask=there, other=0.0)
    if CENTRED:
        c = tl.load(centre + cloud * D + column, mask=column < D, other=0.0)
        u = tl.where(there, u - c[None, :].to(tl.float32), 0.0)
    scale = unit_of(tl.max(tl.abs(u), axis=1))
    high, low = split(u * inverse_power(scale)[:, None])
    to = cloud * rows + row
    every = tl.num_programs(1) * rows
    inside = row < rows
    tl.store(numbers + to, scale, mask=inside)
    if LEFT:
        left += to[:, None] * (PARTS * DP) + column[None, :]
        if PARTS == 1:
            tl.store(left, high, mask=padded)
        else:
            tl.store(left, low if TARGET else high, mask=padded)
            tl.store(left + DP, high if TARGET else low, mask=padded)
            tl.store(left + 2 * DP, high, mask=padded)
        square = high.to(tl.float64)
        square *= square if PARTS == 1 else square + 2 * low.to(tl.float64)
        wide = scale.to(tl.float64)
        tl.store(numbers + every + to, (tl.sum(square, axis=1) * wide * wide).to(tl.float32), mask=inside)
        a = (first + row < n).to(tl.float32)
        if WEIGHTED:
            a = tl.load(weights + at, mask=first + row < n, other=0.0)
        tl.store(numbers + 2 * every + to, a, mask=inside)
    if RIGHT:
        tile = row // SOURCES * SOURCES
        width = tl.minimum(rows - tile, SOURCES)
        right += (cloud * rows + tile)[:, None] * (PARTS * DP) + (row - tile)[:, None] * DP + column[None, :]
        tl.store(right, high, mask=padded)
        if PARTS == 3:
            tl.store(right + (width * DP)[:, None], low, mask=padded)
            tl.store(right + (2 * width * DP)[:, None], high, mask=padded)


@triton.jit
def put(x, unit, sums, out, column, width, DP: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes rows x in parts low, high, high, in units of their own; where a unit grows, the sums are brought to it.

    Args:
        unit, sums, out: pointers to the rows: [ROWS], [ROWS] of DP and [ROWS] of PARTS x width numbers. A unit of 0: no
            number but 0 yet.
    """
    most = tl.max(tl.abs(x), axis=1)
    before = tl.load(unit)
    grown = most > before * LARGEST
    after = tl.where(grown, unit_of(most), before)
    if tl.max(grown.to(tl.int32), axis=0) > 0:
        tl.store(unit, after)
        ratio = tl.where(grown, before * inverse_power(after), 1.0)
        for c in range(0, DP, BLOCK):
            some = c + tl.arange(0, BLOCK)
            at = sums[:, None] + some[None, :]
            mask = (some < DP)[None, :] & grown[:, None]
            tl.store(at, tl.load(at, mask=mask) * ratio[:, None], mask=mask)
    high, low = split(x * inverse_power(after)[:, None])
    at = out[:, None] + column[None, :]
    mask = (column < width)[None, :]
    if PARTS == 1:
        tl.store(at, high, mask=mask)
    else:
        tl.store(at, low, mask=mask)
        tl.store(at + width, high, mask=mask)
        tl.store(at + 2 * width, high, mask=mask)


@triton.jit
def radial_kernel(
    T, targets, sources, values, bandwidth, weight, A, g, sums_unit, sums, first, padded, rows, ahead, begin,
    source_rows, width, DP: tl.constexpr, JOB: tl.constexpr, JOBS: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCALES: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr,
    UPPER: tl.constexpr, FORCE: tl.constexpr, WITH_V: tl.constexpr,
):  # fmt: skip
    """phi and phi' of a tile: adds to A and G, and writes g, and with v phi, for the next product.

    Args:
        T: [clouds, rows of the tile, width].
        targets: numbers of `split_kernel`, [3, clouds, rows]. sources, values: those of u and of v, [3, clouds,
            source_rows], of which the tile is `width` from `begin` on.
        A: A and G, [clouds, JOBS, 2, padded], float64; the tile's rows are those from `first` on.
        g: [1, or 2 with v, clouds, rows of the tile, PARTS, width].
        sums_unit, sums: of S of the jobs, then V: [JOBS or JOBS + 1, clouds, rows], and [.., DP].
        ahead: of the first target the first source is, in a cloud. JOB 0: targets and sources are one cloud, a point is
            no source of its own; UPPER: nor is one before it.
    """
    cloud, clouds = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    there = column < width
    target, source = cloud * rows + row, cloud * source_rows + begin + column
    every, every_source = clouds * rows, clouds * source_rows
    high = tl.num_programs(0) * ROWS
    in_tile = cloud * high + row
    units = tl.load(sources + source, mask=there, other=0.0)[None, :]
    h_j = tl.load(sources + every_source + source, mask=there, other=0.0)[None, :]
    a = tl.load(sources + 2 * every_source + source, mask=there, other=0.0)[None, :]
    products = tl.load(T + in_tile[:, None] * width + column[None, :], mask=there[None, :], other=0.0)
    h_i, twice = tl.load(targets + every + target)[:, None], 2 * tl.load(targets + target)[:, None]
    d2 = (h_i + h_j) - twice * (products * units)
    d2 = tl.where(d2 < 0, 0.0, d2)  # NaN stays NaN
    phi, dphi = radial(d2, bandwidth, weight, SCALES, KIND, ALPHA)
    if JOB == 0:
        other = (column + ahead)[None, :]
        keep = other > row[:, None] if UPPER else other != row[:, None]
        phi = tl.where(keep, phi, 0.0)
        dphi = tl.where(keep, dphi, 0.0)
    A += (cloud * JOBS + JOB) * 2 * padded + first + row
    tl.store(A, tl.load(A) + tl.sum((phi * a).to(tl.float64), axis=1))
    if FORCE:
        dphi *= a
        tl.store(A + padded, tl.load(A + padded) + tl.sum(dphi.to(tl.float64), axis=1))
        at, out = JOB * every + target, in_tile * (PARTS * width)
        put(dphi * units, sums_unit + at, sums + at * DP, g + out, column, width, DP, PARTS, COLUMNS)
        if WITH_V:
            at, out = JOBS * every + target, (clouds * high + in_tile) * (PARTS * width)
            units = tl.load(values + source, mask=there, other=0.0)[None, :]
            put(phi * units, sums_unit + at, sums + at * DP, g + out, column, width, DP, PARTS, COLUMNS)


@triton.jit(do_not_specialize=["first", "n"])
def force_kernel(
    left, targets, A, sums_unit, sums, w, F, first, n, padded, rows, D: tl.constexpr, DP: tl.constexpr,
    JOBS: tl.constexpr, PARTS: tl.constexpr, WITH_V: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """F of the targets from `first` on, [clouds, n, D], in float64 up to the end.

    Args:
        left, targets: as `split_kernel` left them. w: [JOBS], float64. Others: as in `radial_kernel`.
    """
    cloud, clouds = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < rows
    mask = (first + row < n)[:, None] & (column < D)[None, :]
    target = cloud * rows + row
    at = left + target[:, None] * (PARTS * DP) + column[None, :]
    u = tl.load(at, mask=mask, other=0.0).to(tl.float64)
    if PARTS == 3:
        u += tl.load(at + DP, mask=mask, other=0.0).to(tl.float64)
    u *= tl.load(targets + target, mask=inside, other=0.0).to(tl.float64)[:, None]
    a = tl.load(targets + 2 * clouds * rows + target, mask=inside, other=0.0).to(tl.float64)
    total = tl.zeros([BLOCK, COLUMNS], tl.float64)
    for k in tl.static_range(JOBS + WITH_V):
        at = k * clouds * rows + target
        S = tl.load(sums + at[:, None] * DP + column[None, :], mask=mask, other=0.0).to(tl.float64)
        S *= tl.load(sums_unit + at, mask=inside, other=0.0).to(tl.float64)[:, None]
        if k < JOBS:
            G = tl.load(A + ((cloud * JOBS + k) * 2 + 1) * padded + first + row, mask=inside, other=0.0)
            total += (2 * tl.load(w + k) * a)[:, None] * (G[:, None] * u - S)
        else:
            total += a[:, None] * S
    to = F + (cloud * n + first + row)[:, None] * D + column[None, :]
    tl.store(to, total.to(tl.float32), mask=mask)


def multiply(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    """out = left right, added to out if so wished; [clouds, n, k] and [clouds, k, m] in float16 -> float32."""
    if out.is_cuda:
        torch.baddbmm(out, left, right, beta=int(add), out_dtype=torch.float32, out=out)
    else:
        out.baddbmm_(left.float(), right.float(), beta=int(add))


class Points:
    """Room for `most` points of all clouds together, in parts; `fill` splits some."""

    def __init__(self, most: int, dp: int, parts: int, device: torch.device, left: bool, right: bool) -> None:
        self.dp, self.parts = dp, parts
        self.numbers = torch.empty(3 * most, dtype=torch.float32, device=device)
        half = {"dtype": torch.float16, "device": device}
        self._left = torch.empty(left * most * parts * dp, **half)
        self._right = torch.empty(right * most * parts * dp, **half)

    def fill(
        self, z: Tensor, weights: Tensor | None, centre: Tensor | None, first: int, rows: int, target: bool = False
    ) -> None:
        """Of every cloud, the points from `first` on."""
        (clouds, n, d), (dp, parts) = z.shape, (self.dp, self.parts)
        columns = triton.next_power_of_2(dp)
        block = max(1, min(PADDING, 4096 // columns))
        left, right = self._left.numel() > 0, self._right.numel() > 0
        split_kernel[(triton.cdiv(rows, block), clouds)](
            z, z if weights is None else weights, z if centre is None else centre, self._left, self._right,
            self.numbers, first, n, rows, d, dp, parts, SOURCES, columns, block, target, left, right,
            centre is not None, weights is not None, num_warps=min(16, max(4, columns // 1024)),
        )  # fmt: skip
        self.left = _shaped(self._left, clouds, rows, parts * dp) if left else None  # of a product u u^T
        self.right = _shaped(self._right, clouds, rows * parts, dp) if right else None  # of g u, tile by tile


_of_graphs: list[Tensor] = []  # tables that CUDA graphs go on reading


@lru_cache(4096)  # the weights of the clouds change with their sizes
def _table(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def table(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """The numbers on the device; they stay there."""
    found = _table(numbers, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _of_graphs.append(found)
    return found


def sums(
    centre: Tensor, scales: tuple[Tensor, Tensor], kind: str, alpha: float, own: Cloud, jobs: Sequence[Cloud],
    w: Sequence[float], upper: bool, force: bool,
) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
    """As `pairwise.sums`."""
    (clouds, n, d), device = own.z.shape, own.z.device
    dp, parts = _up(d, DEPTH), 1 if tf32_allowed() else 3
    padded, longest = _up(n, PADDING), max(_up(s.z.shape[1], PADDING) for s in jobs)
    most = min(TARGETS, _up(NUMBERS // dp, SOURCES))
    rows = _up(triton.cdiv(padded, triton.cdiv(padded, most)), PADDING)  # targets at once
    width = min(SOURCES, longest)
    together = max(1, min(clouds, most // max(rows, width)))  # clouds at once
    some = min(longest, max(1, most // together // SOURCES) * SOURCES)  # sources split at once
    with_v = force and own.v is not None

    A = torch.zeros(clouds, len(jobs), 2, padded, dtype=torch.float64, device=device)
    F = torch.empty_like(own.z) if force else None
    targets = Points(together * rows, dp, parts, device, left=True, right=False)
    sources = Points(together * some, dp, parts, device, left=True, right=force)
    values = Points(together * some, dp, parts, device, left=False, right=True) if with_v else sources
    T_room = torch.empty(together * rows * width, dtype=torch.float32, device=device)
    g_room = torch.empty((force + with_v) * parts * T_room.numel(), dtype=torch.float16, device=device)
    kept = (len(jobs) + with_v) * force
    S_room = torch.empty(kept * together * rows * dp, dtype=torch.float32, device=device)

    for (c, count), (first, height) in product(_ranges(0, clouds, together), _ranges(0, padded, rows)):
        cloud = slice(c, c + count)
        targets.fill(own.z[cloud], _some(own.weights, cloud), centre[cloud], first, height, target=True)
        S = _shaped(S_room, kept, count, height, dp)
        S_unit = torch.zeros(kept, count, height, dtype=torch.float32, device=device)
        for job, other in enumerate(jobs):
            m, after, moved = _up(other.z.shape[1], PADDING), upper and job == 0, with_v and job == 0
            for chunk, length in _ranges(first // some * some if after else 0, m, some):
                sources.fill(other.z[cloud], _some(other.weights, cloud), centre[cloud], chunk, length)
                if moved:
                    values.fill(own.v[cloud], None, None, chunk, length)
                for begin, wide in _ranges(0, length, SOURCES):
                    ahead = chunk + begin - first
                    high = min(height, ahead + wide) if after else height  # those with sources after them
                    if high <= 0:
                        continue
                    T = _shaped(T_room, count, high, wide)
                    g = _shaped(g_room, force + moved, count, high, parts * wide)
                    multiply(targets.left[:, :high], sources.left[:, begin : begin + wide].mT, T, add=False)
                    radial_kernel[(high // ROWS, count)](
                        T, targets.numbers, sources.numbers, values.numbers, *scales, A[cloud], g, S_unit, S, first,
                        padded, height, ahead, begin, length, wide, dp, job, len(jobs), parts, ROWS,
                        triton.next_power_of_2(min(m, SOURCES)), len(scales[0]), kind, alpha, after, force, moved,
                    )  # fmt: skip
                    for factor, points, out in zip(g, (sources, values), (job, -1), strict=False):
                        right = points.right[:, begin * parts : (begin + wide) * parts]
                        multiply(factor, right, S[out], add=chunk + begin > 0)
        if force:
            columns = min(128, triton.next_power_of_2(dp))
            force_kernel[(triton.cdiv(height, 16), count, triton.cdiv(dp, columns))](
                targets.left, targets.numbers, A[cloud], S_unit, S, table(tuple(w), device), F[cloud], first, n, padded,
                height, d, dp, len(jobs), parts, with_v, 16, columns,
            )  # fmt: skip
    return list(A[:, :, 0, :n].unbind(1)), F


def _up(number: int, step: int) -> int:
    return triton.cdiv(number, step) * step


def _ranges(begin: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """(first, length) of the pieces of [begin, end)."""
    return ((first, min(step, end - first)) for first in range(begin, end, step))


def _shaped(room: Tensor, *shape: int) -> Tensor:
    return room[: math.prod(shape)].view(shape)


def _some(t: Tensor | None, some: slice) -> Tensor | None:
    return None if t is None else t[some]
