"""Energy and force of a cloud on the GPU: the same page as `infovae_fast/pairwise.py`, any number of dimensions.

The cloud is centred, u = z - centre, and with squares h = |u|^2 a tile of targets i and sources j is

    d2_ij = h_i + h_j - 2 u_i.u_j     A_i = sum_j a_j phi_ij     G_i = sum_j a_j phi'_ij     S_i = sum_j a_j phi'_ij u_j

two matrix products around the radial functions, of which energy = sum_i w a_i A_i, potential = w A_i and
force = 2 w a_i (G_i u_i - S_i) + sum_j phi_ij v_j are made. In float32, from `PRODUCTS_LEAST` dimensions on, cuBLAS
multiplies (`pairwise_products`); what follows here is for fewer, for float64 and for PyTorch before 2.8.

The products run on tensor cores: as three TF32 products, which keep float32's digits, unless PyTorch's matmul precision
permits one ("high", "medium"). Where points have at most `DIRECT_MOST` dimensions, d2 is summed from their differences
instead.

Sums over a tile (for A) or `GROUP` sources are in the dtype of the samples, those of them in float64. Each program owns
its rows of the result for a segment of the sources; there are no atomics, and the bits do not change from run to run.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from infovae_fast.backends import tf32_allowed
from infovae_fast.kernels import pairwise_products as products
from infovae_fast.kernels.pairwise_products import table
from infovae_fast.kernels.radial import radial

DIRECT_MOST = 4
PRODUCTS_LEAST = 33  # dimensions: below, what a tile reads and writes for cuBLAS takes longer than the products here
PADDING = 64  # of both clouds, so that no tile is ragged
GROUP = 256  # sources whose sums go to float64 together
DEPTH = 16  # of a step of the product u_i.u_j; the dimension is padded to a multiple of it
PROGRAMS = 1024  # wanted, to fill the GPU
SAMPLE = 32  # points of each sample in whose middle the centre is


class Tile(NamedTuple):
    """What fits the registers; tests/test_pairwise_triton.py compiles every row."""

    targets: int
    sources: int
    columns: int  # of the force, for one program
    warps: int
    stages: int  # of loads under way


def tile(padded_d: int, itemsize: int, with_v: bool) -> Tile:
    columns = triton.next_power_of_2(padded_d)
    if itemsize == 8:
        return Tile(32, 16, min(columns, 32), 8, 1)
    if columns <= 32:
        return Tile(64, 32, columns, 8, 1)
    return Tile(64, 16, 64, 8, 2) if with_v else Tile(64, 16 if columns > 64 else 32, min(columns, 128), 8, 2)


@triton.jit
def prepare(z, weights, v, centre, u, h, a, v_padded, n, padded_n, D: tl.constexpr, DP: tl.constexpr,
            COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, WITH_V: tl.constexpr):  # fmt: skip
    """u = z - centre, h = |u|^2, the weights a and v, padded with zeros; [clouds, n, D] -> [clouds, padded_n, DP]."""
    cloud = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)  # a power of 2, at least DP
    padded = (row < padded_n)[:, None] & (column < DP)[None, :]
    there = (row < n)[:, None] & (column < D)[None, :]
    at = (cloud * n + row)[:, None] * D + column[None, :]
    c = tl.load(centre + cloud * D + column, mask=column < D, other=0.0)
    point = tl.where(there, tl.load(z + at, mask=there, other=0.0) - c[None, :].to(z.dtype.element_ty), 0.0)
    to = cloud * padded_n + row
    tl.store(u + to[:, None] * DP + column[None, :], point, mask=padded)
    tl.store(h + to, tl.sum(point.to(tl.float64) * point.to(tl.float64), axis=1).to(z.dtype.element_ty))
    if WEIGHTED:
        tl.store(a + to, tl.load(weights + cloud * n + row, mask=row < n, other=0.0))
    else:
        tl.store(a + to, (row < n).to(z.dtype.element_ty))
    if WITH_V:
        tl.store(v_padded + to[:, None] * DP + column[None, :], tl.load(v + at, mask=there, other=0.0), padded)


@triton.jit
def pairwise_kernel(
    u, h, sources, source_h, source_a, source_v, bandwidth, weight, A_out, G_out, S_out, V_out, n, m, segment,
    DP: tl.constexpr, DC: tl.constexpr, DK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    SCALES: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr, PRECISION: tl.constexpr, DIRECT: tl.constexpr,
    SAME: tl.constexpr, UPPER: tl.constexpr, FORCE: tl.constexpr, WITH_V: tl.constexpr,
):  # fmt: skip
    """Adds A, G, S and sum_j phi_ij v_j, in float64, of BM targets and a segment of the sources to the outputs.

    Args:
        u, h: targets [clouds, n, DP], [clouds, n]; the sources [clouds, m, DP], [clouds, m]; n and m are padded.
        A_out, G_out: [clouds, segments, n]. S_out, V_out: [clouds, segments, n, DP]. Each program adds to its own.
        DC: how many columns of S and V a program computes. DIRECT: d2 from that many coordinates; 0: by a product.
        SAME: targets and sources are one cloud, a point is no source of its own; UPPER: nor is one before it.
    """
    dtype = u.dtype.element_ty
    part = tl.program_id(1) % segment_count(m, segment)
    cloud = (tl.program_id(1) // segment_count(m, segment)).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BM
    row = first + tl.arange(0, BM)
    own = cloud * n + row
    u += own[:, None] * DP
    sources += cloud * m * DP
    out = (cloud * segment_count(m, segment) + part) * n + row
    columns = tl.program_id(2) * DC + tl.arange(0, DC)
    here = (columns < DP)[None, :]
    h_i = tl.load(h + own)
    begin = part.to(tl.int64) * segment
    end = tl.minimum(begin + segment, m)
    if UPPER:
        begin = tl.maximum(begin, first // BN * BN)
    for start in range(begin, end, GROUP):
        A = tl.zeros([BM], tl.float64)
        G = tl.zeros([BM], dtype)
        S = tl.zeros([BM, DC], dtype)
        V = tl.zeros([BM, DC], dtype)
        for j0 in range(start, tl.minimum(start + GROUP, end), BN):
            j = j0 + tl.arange(0, BN)
            if DIRECT > 0:
                d2 = tl.zeros([BM, BN], dtype)
                for c in tl.static_range(DIRECT):
                    gap = tl.load(u + c) - tl.load(sources + j * DP + c)[None, :]
                    d2 += gap * gap
            else:
                products = tl.zeros([BM, BN], dtype)
                for c in range(0, DP, DK):
                    some = c + tl.arange(0, DK)
                    left = tl.load(u + some[None, :])
                    right = tl.load(sources + j[None, :] * DP + some[:, None])
                    products += tl.dot(left, right, input_precision=PRECISION, out_dtype=dtype)
                d2 = h_i[:, None] + tl.load(source_h + cloud * m + j)[None, :] - 2 * products
                d2 = tl.where(d2 < 0, 0.0, d2)  # NaN stays NaN
            phi, dphi = radial(d2, bandwidth, weight, SCALES, KIND, ALPHA)
            if SAME:
                keep = (j[None, :] > row[:, None]) if UPPER else (j[None, :] != row[:, None])
                phi = tl.where(keep, phi, 0.0)
                dphi = tl.where(keep, dphi, 0.0)
            a = tl.load(source_a + cloud * m + j)[None, :]
            A += tl.sum(phi * a, axis=1).to(tl.float64)
            if FORCE:
                dphi *= a
                G += tl.sum(dphi, axis=1)
                right = tl.load(sources + j[:, None] * DP + columns[None, :], mask=here, other=0.0)
                S += tl.dot(dphi, right, input_precision=PRECISION, out_dtype=dtype)
                if WITH_V:
                    right = tl.load(source_v + (cloud * m + j)[:, None] * DP + columns[None, :], mask=here, other=0.0)
                    V += tl.dot(phi, right, input_precision=PRECISION, out_dtype=dtype)
        if tl.program_id(2) == 0:
            tl.store(A_out + out, tl.load(A_out + out) + A)
        if FORCE:
            if tl.program_id(2) == 0:
                tl.store(G_out + out, tl.load(G_out + out) + G.to(tl.float64))
            to = out[:, None] * DP + columns[None, :]
            tl.store(S_out + to, tl.load(S_out + to, mask=here) + S.to(tl.float64), mask=here)
            if WITH_V:
                tl.store(V_out + to, tl.load(V_out + to, mask=here) + V.to(tl.float64), mask=here)


@triton.jit
def segment_count(m, segment):
    return (m + segment - 1) // segment


class Cloud:
    """A cloud as the kernels take it, padded."""

    def __init__(self, centre: Tensor, z: Tensor, weights: Tensor | None, v: Tensor | None) -> None:
        clouds, self.n, self.d = z.shape
        dp = triton.cdiv(self.d, DEPTH) * DEPTH
        padded = triton.cdiv(self.n, PADDING) * PADDING
        self.weights = weights
        self.u = z.new_empty(clouds, padded, dp)
        self.h, self.a = z.new_empty(clouds, padded), z.new_empty(clouds, padded)
        self.v = None if v is None else torch.empty_like(self.u)
        columns = triton.next_power_of_2(dp)
        block = max(1, min(PADDING, 4096 // columns))
        prepare[(padded // block, clouds)](
            z, z if weights is None else weights, z if v is None else v, centre, self.u, self.h, self.a,
            self.u if v is None else self.v, self.n, padded, self.d, dp, columns, block, weights is not None,
            v is not None,
        )  # fmt: skip


def sums(
    scales: tuple[Tensor, Tensor], kind: str, alpha: float, own: Cloud, jobs: Sequence[Cloud], w: Sequence[float],
    upper: bool, force: bool,
) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
    """For each cloud of sources, A [clouds, n] of own's points in float64; and own's force [clouds, n, D].

    Args:
        jobs: the clouds of sources, own first; w: their weights, which the force has and A has not.
        upper: of its own cloud, a point has the sources after it alone.
    """
    found: list[Tensor] = []
    F: Tensor | float = 0.0
    for sources, factor in zip(jobs, w, strict=True):
        A, G, S, V = _tiles(scales, kind, alpha, own, sources, upper and sources is own, force)
        found.append(A[:, : own.n])
        if force:
            pull = own.a[..., None] * (G[..., None] * own.u - S)
            F = F + 2 * factor * pull + (0 if sources.v is None else own.a[..., None] * V)
    return found, F[:, : own.n, : own.d] if isinstance(F, Tensor) else None


def _tiles(
    scales: tuple[Tensor, Tensor], kind: str, alpha: float, targets: Cloud, sources: Cloud, upper: bool, force: bool
) -> tuple[Tensor, ...]:
    """A [clouds, n], G [clouds, n], S and sum phi v [clouds, n, DP] in float64; the last three for forces."""
    clouds, n, dp = targets.u.shape
    m, with_v = sources.u.shape[1], force and sources.v is not None
    direct = targets.d if targets.d <= DIRECT_MOST else 0
    bm, bn, dc, warps, stages = tile(dp, targets.u.itemsize, with_v)
    chunks = triton.cdiv(dp, dc) if force else 1
    programs = n // bm * clouds * chunks
    segment = triton.cdiv(triton.cdiv(m, triton.cdiv(PROGRAMS, programs)), GROUP) * GROUP
    segments = triton.cdiv(m, segment)
    wide = {"dtype": torch.float64, "device": targets.u.device}
    A = torch.zeros(clouds, segments, n, **wide)
    G = torch.zeros_like(A) if force else A
    S = torch.zeros(clouds, segments, n, dp, **wide) if force else A
    V = torch.zeros_like(S) if with_v else A
    exact = targets.u.dtype == torch.float64
    precision = "ieee" if exact else "tf32" if tf32_allowed() else "tf32x3"
    grid = (n // bm, clouds * segments, chunks)
    pairwise_kernel[grid](
        targets.u, targets.h, sources.u, sources.h, sources.a, sources.v if with_v else sources.u, *scales,
        A, G, S, V, n, m, segment, dp, dc, DEPTH, bm, bn, GROUP, len(scales[0]), kind, alpha, precision,
        direct, targets is sources, upper, force, with_v, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return tuple(t.sum(1) for t in (A, G, S, V))


def middle(x: Tensor, y: Tensor | None) -> Tensor:
    """[clouds, N, D], [clouds, M, D] -> [clouds, D] in float64: medians of the coordinates of some points.

    Any point near most of the cloud would do; a few that are far away do not move it.
    """
    some = [t[:, :: max(1, t.shape[1] // SAMPLE)][:, :SAMPLE] for t in (x, y) if t is not None]
    ordered, n = torch.cat(some, dim=1).sort(dim=1).values, sum(t.shape[1] for t in some)
    return ordered[:, (n - 1) // 2 : n // 2 + 1].mean(dim=1, dtype=torch.float64)


@torch.library.custom_op("infovae_fast::pairwise_triton", mutates_args=())
def pairwise(
    x: Tensor, y: Tensor | None, v: Tensor | None, a: Tensor | None, b: Tensor | None, rbf: bool,
    bandwidth: Sequence[float], lengths: Tensor | None, weight: Sequence[float], alpha: float, w: Sequence[float],
    energy: bool, x_force: bool, y_force: bool, potentials: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op infovae_fast::pairwise of csrc/bindings.cpp."""
    d, batch = x.shape[-1], x.shape[:-2]
    flat = [None if t is None else t.reshape(-1, *t.shape[len(batch) :]).contiguous() for t in (x, y, v, a, b)]
    x_, y_, v_, a_, b_ = flat
    if len(x_) == 0:  # clouds
        return _results(x, y, energy, x_force, y_force, potentials)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        centre = middle(x_, y_)
        by_cublas = products.AVAILABLE and x.dtype == torch.float32 and d >= PRODUCTS_LEAST
        cloud = products.Cloud if by_cublas else partial(Cloud, centre)
        clouds = [cloud(x_, a_, v_)] + ([] if y_ is None else [cloud(y_, b_, None)])
        lengths = table(tuple(bandwidth), x.device) if lengths is None else lengths.to(x.device).contiguous()
        settings = ((lengths, table(tuple(weight), x.device)), "rbf" if rbf else "rq", alpha)
        run = partial(products.sums, centre, *settings) if by_cublas else partial(sums, *settings)
        results = _assemble(clouds, run, w, energy, (x_force, y_force), potentials)
    shapes = (
        batch,
        x.shape,
        x.shape if y is None else y.shape,
        x.shape[:-1],
        x.shape[:-1] if y is None else y.shape[:-1],
    )
    dtypes = (torch.float64, *[x.dtype] * 4)
    return tuple(
        x.new_empty(0, dtype=dtype) if t is None else t.to(dtype).reshape(shape).contiguous()
        for t, shape, dtype in zip(results, shapes, dtypes, strict=True)
    )


def _assemble(
    clouds: list[Any], sums: Callable[..., tuple[list[Tensor], Tensor | None]], w: Sequence[float], energy: bool,
    forces: tuple[bool, bool], potentials: bool,
) -> list[Tensor | None]:  # fmt: skip
    E: Tensor | float = 0.0
    F: list[Tensor | None] = [None, None]
    P: list[Tensor | None] = [None, None]
    full = [force or potentials for force in forces[: len(clouds)]]
    for k, own in enumerate(clouds):
        if not full[k] and not energy:
            continue
        jobs = [(own, w[0] if k == 0 else w[2], 1.0 if full[k] else 2.0)]
        # Pairs of both clouds are visited by those whose rows are wanted; if none are, by x.
        if len(clouds) == 2 and (full[k] or (k == 0 and not any(full))):
            jobs.append((clouds[1 - k], w[1], 1.0 if all(full) else 2.0))
        sources, factors, shares = zip(*jobs, strict=True)
        A, F[k] = sums(own, sources, factors, not full[k], forces[k])
        for one, factor, share in zip(A, factors, shares, strict=True):
            E = E + share * factor * (one if own.weights is None else own.weights * one).sum(1)
        if potentials:
            P[k] = sum(factor * one for one, factor in zip(A, factors, strict=True))
    return [E if energy else None, *F, *P]


@pairwise.register_fake
def _(x, y, v, a, b, rbf, bandwidth, lengths, weight, alpha, w, energy, x_force, y_force, potentials):
    return _results(x, y, energy, x_force, y_force, potentials)


def _results(
    x: Tensor, y: Tensor | None, energy: bool, x_force: bool, y_force: bool, potentials: bool
) -> tuple[Tensor, ...]:
    """Room for what is asked for, and empty tensors for the rest."""
    other = x if y is None else y
    wanted = (
        (energy, x.shape[:-2], torch.float64),
        (x_force, x.shape, x.dtype),
        (y_force and y is not None, other.shape, x.dtype),
        (potentials, x.shape[:-1], x.dtype),
        (potentials and y is not None, other.shape[:-1], x.dtype),
    )
    return tuple(x.new_empty(shape if there else (0,), dtype=dtype) for there, shape, dtype in wanted)
