"""OPERATOR: energy and force of a point cloud.

Put two samples in one cloud z = [x; y], x [N, D] and y [M, D], with a weight w_ij that knows only the block of a pair
(w_xx, w_xy, w_yy), weights a_i of the points (1 if not given), and a radial kernel phi of the squared distance
d2_ij = |z_i - z_j|^2:

    energy   E   = sum_{i != j} w_ij a_i a_j phi(d2_ij) = w_xx sum_xx + 2 w_xy sum_xy + w_yy sum_yy
    force    F_i = sum_{j != i} [ w_ij 2 phi'(d2_ij) (z_i - z_j) + phi(d2_ij) v_j ]     for i in x; v optional

E has dE/dx = 2 F (v = 0, a = 1). MMD is an energy, its gradient and the Stein direction are forces: see `divergences`.

* The diagonal is never evaluated: it is known exactly and its gradient is zero.
* The cloud is centred first (E and F do not change): d2 = |a|^2 + |b|^2 - 2 a.b stays accurate far from the origin, its
  error being eps times the squared distances from the middle of the cloud. C++ takes differences where those are large.
* phi is evaluated in the dtype of the samples (half precision in float32, under autocast too). Distances and sums are
  float64: an MMD is a small difference of large sums, and so is its gradient.
* backend="cpp" takes an RBF in one to three dimensions by its Fourier series where that is cheaper: from some hundred
  points on (in three dimensions some thousand), later the narrower the bandwidth beside the extent of the cloud. Then
  the work grows with N + M, and what a pair gives is off by about 1e-12 phi(0) in float32, 1e-15 phi(0) in float64. Not
  where weights are negative, nor where the pairs that are asked for are so far apart that this would count.
* Memory: tiles of at most 2^24 pairs, recomputed in the backward pass when there are several (not under torch.func
  transforms, which do not recompute).

The reference gives first and second derivatives of `energy` to x, y, a and the bandwidth, of `force` to x, y, v and the
bandwidth. The fast backends give the first derivatives of the energy to x, y and a, from the same pass as its value.
"auto" takes the reference where the bandwidth or a force needs a gradient and under torch.func transforms such as vmap;
it cannot know that a gradient will be differentiated again: there give backend="reference".
Leading dimensions [..., N, D] are a batch of clouds, each with an energy and forces of its own.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infovae_fast.backends import Backend, choose, native_missing, transforms, triton_missing
from infovae_fast.clouds import as_cloud, point_weights
from infovae_fast.radial import IMQ, RBF, Kernel, RationalQuadratic

TILE_PAIRS = 2**24
LEAF_KERNELS = (RBF, IMQ, RationalQuadratic)  # not their subclasses, which may have a phi of their own
CUDA_MOST_DIM, CUDA_MOST_PRODUCTS_DIM, CUDA_MOST_SCALES, GPU_MOST_CLOUDS = 18, 128, 32, 65535

Weights = tuple[float, float, float]  # w_xx, w_xy, w_yy


def squared_distances(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """|a_i - b_j|^2, [..., N, D] and [..., M, D] -> [..., N, M], as one product [a, |a|^2, 1] [-2 b, 1, |b|^2]^T."""
    left = torch.cat([a, (a * a).sum(-1, keepdim=True), torch.ones_like(a[..., :1])], dim=-1)  # [..., N, D + 2]
    right = torch.cat([-2 * b, torch.ones_like(b[..., :1]), (b * b).sum(-1, keepdim=True)], dim=-1)  # [..., M, D + 2]
    d2 = (left @ right.mT).to(dtype)
    return d2 - d2.detach().clamp_max(0)  # no clamp_min: where d2 rounds below zero its derivatives still count


def _middle(z: Tensor) -> Tensor:
    """[..., N, D] -> [..., 1, D]: the median of each coordinate; a few points that are far away do not move it."""
    n = z.shape[-2]
    return z.sort(dim=-2).values[..., (n - 1) // 2 : n // 2 + 1, :].mean(dim=-2, keepdim=True)


def pairwise_reference(
    x: Tensor,
    y: Tensor | None,
    v: Tensor | None,
    kernel: Kernel,
    weights: Weights,
    energy: bool,
    force: bool,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Plain PyTorch: (E [...] in float64, F [..., N, D]), each only if asked for, tile by tile. a and b are for E."""
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
        x = x.to(wide)
        y, v, a, b = (None if t is None else t.to(wide) for t in (y, v, a, b))
        centre = _middle((x if y is None else torch.cat([x, y], dim=-2)).detach())
        x = x - centre
        y = None if y is None else y - centre
        kernel = kernel.at(x.shape[-1])
        w_xx, w_xy, w_yy = weights
        E = F = None
        if energy:
            E = w_xx * _energy_within(x, a, kernel, dtype)
            if y is not None:
                between = _energy_between(x, y, a, b, kernel, dtype)
                E = E + 2 * w_xy * between + w_yy * _energy_within(y, b, kernel, dtype)
        if force:
            F = _force(x, x, v, kernel, dtype, w_xx, within=True)
            if y is not None:
                F = F + _force(x, y, None, kernel, dtype, w_xy, within=False)
            F = F.to(dtype)
        return E, F


def _energy_between(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, kernel: Kernel, dtype: torch.dtype
) -> Tensor:  # [..., N, D], [..., M, D], [..., N], [..., M] -> [...]
    def tile(rows: Tensor, columns: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        return _weighted_sum(kernel.phi(squared_distances(rows, columns, dtype)), a, b, rows.dtype)

    tile, row_slices, column_slices = _tiled(tile, x, y)
    return _add(tile(x[..., i, :], y[..., j, :], _part(a, i), _part(b, j)) for i in row_slices for j in column_slices)


def _energy_within(z: Tensor, a: Tensor | None, kernel: Kernel, dtype: torch.dtype) -> Tensor:
    def tile(rows: Tensor, columns: Tensor, a: Tensor | None, b: Tensor | None, diagonal: bool) -> Tensor:
        phi = kernel.phi(squared_distances(rows, columns, dtype))
        total = _weighted_sum(_off_diagonal(phi) if diagonal else phi, a, b, rows.dtype)
        return total if diagonal else 2 * total  # each unordered pair of tiles once

    tile, slices, _ = _tiled(tile, z, z)
    return _add(
        tile(z[..., i, :], z[..., j, :], _part(a, i), _part(a, j), i == j)
        for k, i in enumerate(slices)
        for j in slices[k:]
    )


def _weighted_sum(phi: Tensor, a: Tensor | None, b: Tensor | None, wide: torch.dtype) -> Tensor:
    """sum_ij a_i phi_ij b_j; no weights stand for ones."""
    if b is not None:
        phi = phi.to(wide) * b[..., None, :]
    if a is not None:
        phi = phi.to(wide) * a[..., :, None]
    return phi.sum((-2, -1), dtype=wide)


def _part(a: Tensor | None, i: slice) -> Tensor | None:
    return None if a is None else a[..., i]


def _force(
    a: Tensor, b: Tensor, v: Tensor | None, kernel: Kernel, dtype: torch.dtype, w: float, within: bool
) -> Tensor:  # [..., N, D]
    def tile(rows: Tensor, columns: Tensor, v_columns: Tensor | None, diagonal: bool) -> Tensor:
        d2 = squared_distances(rows, columns, dtype)
        B = kernel.dphi(d2).to(rows.dtype)  # [..., n, m]
        B = _off_diagonal(B) if diagonal else B
        F = 2 * w * (B.sum(-1, keepdim=True) * rows - B @ columns)
        if v_columns is None:
            return F
        A = kernel.phi(d2).to(rows.dtype)
        return F + (_off_diagonal(A) if diagonal else A) @ v_columns

    tile, row_slices, column_slices = _tiled(tile, a, b)

    def row(i: slice) -> Tensor:
        return _add(
            tile(a[..., i, :], b[..., j, :], None if v is None else v[..., j, :], within and i == j)
            for j in column_slices
        )

    return torch.cat([row(i) for i in row_slices], dim=-2)


def _tiled(tile: Callable[..., Tensor], a: Tensor, b: Tensor) -> tuple[Callable[..., Tensor], list[slice], list[slice]]:
    """The tile function with the slices of a's and b's rows; several tiles are recomputed in the backward pass."""
    n, m, batch = a.shape[-2], b.shape[-2], a.shape[:-2].numel()
    if n * m * batch <= TILE_PAIRS:
        return tile, [slice(0, n)], [slice(0, m)]
    edge = max(1, int((TILE_PAIRS / batch) ** 0.5))
    if transforms() is None:
        tile = partial(checkpoint, tile, use_reentrant=False, preserve_rng_state=False)
    return tile, _slices(n, edge), _slices(m, edge)


def _slices(n: int, edge: int) -> list[slice]:
    return [slice(start, min(start + edge, n)) for start in range(0, n, edge)]


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix.masked_fill(torch.eye(matrix.shape[-1], dtype=torch.bool, device=matrix.device), 0)


def _add(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


# x, y, v, a, b, is it RBF, bandwidths (numbers, or a tensor), weights of the scales, alpha, w, what is wanted: energy,
# forces on x and on y, potentials P_i = sum_{j != i} w_ij a_j phi_ij. Returns those five; csrc/bindings.cpp.
Leaf = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


def _native() -> Leaf:
    return torch.ops.infovae_fast.pairwise.default


def _triton() -> Leaf:
    from infovae_fast.kernels.pairwise import pairwise

    return pairwise


def _cpp_reason(x: Tensor, *inputs: Any) -> str | None:
    if x.device.type != "cpu":
        return f"it runs on the CPU, and x is on {x.device}"
    return native_missing() or _leaf_reason(x, *inputs)


def _cuda_reason(x: Tensor, *inputs: Any) -> str | None:
    if x.device.type != "cuda":
        return f"it runs on NVIDIA GPUs, and x is on {x.device}"
    if x.shape[-1] > CUDA_MOST_DIM and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"points of D={x.shape[-1]} > {CUDA_MOST_DIM} need tensor cores of compute capability 8.0"
    return native_missing("cuda") or cuda_limits(x, *inputs) or _leaf_reason(x, *inputs)


def _triton_reason(x: Tensor, *inputs: Any) -> str | None:
    if x.device.type != "cuda":
        return f"it runs on GPUs, and x is on {x.device}"
    return triton_missing() or _too_many_clouds(x) or _leaf_reason(x, *inputs)


def _too_many_clouds(x: Tensor) -> str | None:
    clouds = x.shape[:-2].numel()
    return f"got a batch of {clouds} clouds, accepted: at most {GPU_MOST_CLOUDS}" if clouds > GPU_MOST_CLOUDS else None


def cuda_limits(
    x: Tensor, y: Tensor | None = None, v: Tensor | None = None, kernel: Kernel | None = None, *inputs: Any
) -> str | None:
    """What the CUDA kernels have no room for (csrc/cuda/pairwise*.cu)."""
    d = x.shape[-1]
    scales = 1 if kernel is None else len(kernel.at(d).scales())
    if scales > CUDA_MOST_SCALES:
        return f"got {scales} scales, accepted: at most {CUDA_MOST_SCALES}"
    if (reason := _too_many_clouds(x)) is not None:
        return reason
    several = v is not None and kernel is not None and not (scales == 1 and isinstance(kernel, RBF))
    most = CUDA_MOST_DIM if x.dtype == torch.float64 or several else CUDA_MOST_PRODUCTS_DIM
    if d > most:
        return f"got D={d}, accepted: at most {most}, for this dtype, kernel and v"
    return None


def _leaf_reason(
    x: Tensor,
    y: Tensor | None = None,
    v: Tensor | None = None,
    kernel: Kernel | None = None,
    weights: Weights | None = None,
    energy: bool = True,
    force: bool = False,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> str | None:
    """What no leaf does."""
    if (reason := transforms()) is not None:
        return reason
    if kernel is not None and type(kernel) not in LEAF_KERNELS:
        return f"the kernel is a {type(kernel).__name__}, which only the reference can evaluate"
    if not torch.is_grad_enabled():
        return None
    if kernel is not None and isinstance(kernel.bandwidth, Tensor) and kernel.bandwidth.requires_grad:
        return "the bandwidth needs a gradient, which only the reference gives"
    if force and any(t is not None and t.requires_grad for t in (x, y, v)):
        return "a force needs a gradient, which only the reference gives"
    return None


def _run_leaf(
    leaf: Callable[[], Leaf],
    x: Tensor,
    y: Tensor | None,
    v: Tensor | None,
    kernel: Kernel,
    weights: Weights,
    energy: bool,
    force: bool,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    if x.dtype.itemsize < 4:
        x, y, v, a, b = (None if t is None else t.float() for t in (x, y, v, a, b))  # type: ignore[assignment]
    settings = (*leaf_scales(kernel.at(x.shape[-1])), weights)
    if force:
        return None, leaf()(x, y, v, None, None, *settings, False, True, False, False)[1]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y, a, b)):
        return _Energy.apply(x, y, a, b, leaf(), settings), None
    return leaf()(x, y, None, a, b, *settings, True, False, False, False)[0], None


def _run_native(
    x: Tensor,
    y: Tensor | None,
    v: Tensor | None,
    kernel: Kernel,
    weights: Weights,
    energy: bool,
    force: bool,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """`_run_leaf` of the native leaf. Its derivatives are native too: at small N Python would take most of the time."""
    if force or x.dtype.itemsize < 4:
        return _run_leaf(_native, x, y, v, kernel, weights, energy, force, a, b)
    return torch.ops.infovae_fast.energy.default(x, y, a, b, *leaf_scales(kernel.at(x.shape[-1])), weights), None


def leaf_scales(kernel: Kernel) -> tuple[bool, Sequence[float], Tensor | None, Sequence[float], float]:
    """As a leaf takes them; a bandwidth in a tensor stays there, so that nothing waits for a GPU."""
    rbf, alpha = isinstance(kernel, RBF), getattr(kernel, "alpha", 1.0)
    if isinstance(kernel.bandwidth, Tensor):
        return rbf, (), kernel.bandwidth.detach().reshape(-1), [w for _, w in kernel.scales()], alpha
    bandwidths, weights = zip(*kernel.scales(), strict=True)
    return rbf, bandwidths, None, weights, alpha


class _Energy(torch.autograd.Function):
    """The energy by a leaf: the forces and potentials come out of the same pass and wait for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, a: Tensor | None, b: Tensor | None, leaf: Leaf, settings: Any
    ) -> Tensor:
        need_x, need_y, need_a, need_b = ctx.needs_input_grad[:4]
        E, F_x, F_y, P_x, P_y = leaf(x, y, None, a, b, *settings, True, need_x, need_y, need_a or need_b)
        halves = (F_x if need_x else None, F_y if need_y else None, P_x if need_a else None, P_y if need_b else None)
        ctx.save_for_backward(*halves, x, y, a, b)
        return E

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        twice = 2 * gradient
        gradients = [None if half is None else _times(twice, half) for half in saved[:4]]
        if torch.is_grad_enabled():  # create_graph: what is differentiated again must not look constant
            gradients = [None if g is None else _Once.apply(g, *saved[4:]) for g in gradients]
        return *gradients, None, None


def _times(factor: Tensor, t: Tensor) -> Tensor:  # [...], [..., N, D] or [..., N]
    if factor.ndim:
        factor = factor.to(t.dtype).reshape(factor.shape + (1,) * (t.ndim - factor.ndim))
    return factor * t


class _Once(torch.autograd.Function):
    """The first argument, with an error in place of its derivative to the others."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise RuntimeError("this backend gives first derivatives; use backend='reference' to differentiate twice")


def _check(kernel: Kernel, weights: Weights) -> None:
    if not isinstance(kernel, Kernel):
        raise TypeError(f"kernel: got {kernel!r}; accepted: a Kernel such as RBF(1.0)")
    numbers = weights if isinstance(weights, Sequence) else ()
    if len(numbers) != 3 or not all(isinstance(w, Real | torch.SymFloat) and -math.inf < w < math.inf for w in numbers):
        raise ValueError(f"weights: got {weights!r}; accepted: three finite numbers, w_xx, w_xy and w_yy")


BACKENDS = (
    Backend("cuda", _cuda_reason, _run_native),
    Backend("triton", _triton_reason, partial(_run_leaf, _triton)),
    Backend("cpp", _cpp_reason, _run_native),
    Backend("reference", lambda *inputs: None, pairwise_reference),
)


def energy(
    x: Tensor,
    y: Tensor | None = None,
    *,
    kernel: Kernel,
    weights: Weights = (1.0, 1.0, 1.0),
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """E = sum_{i != j} w_ij a_i a_j phi(|z_i - z_j|^2) over the cloud z = [x; y].

    Args:
        x: [..., N, D]. y: [..., M, D] of the same dtype and device, or None.
        kernel: RBF, IMQ or RationalQuadratic.
        weights: (w_xx, w_xy, w_yy). A pair of x and y counts twice, as (i, j) and (j, i).
        x_weights, y_weights: the weights a_i of the points, [..., N] and [..., M], of any sign; None for ones.
        backend: "auto" or one of `infovae_fast.backends.NAMES`.

    Returns:
        [...] in float64. Differentiable to x, y, the weights of the points and a tensor bandwidth.

    Raises:
        TypeError, ValueError: see `as_cloud`; no Kernel; weights of another shape or device.
        RuntimeError: the named backend cannot run these inputs.
    """
    x, y = as_cloud(x=x, y=y)
    _check(kernel, weights)
    if y is None and y_weights is not None:
        raise ValueError("y_weights: got weights, but no y; accepted: None")
    a = point_weights("x_weights", x_weights, x)
    b = None if y is None else point_weights("y_weights", y_weights, y)
    return energy_of_clouds(x, y, kernel, weights, backend, a, b)


def energy_of_clouds(
    x: Tensor,
    y: Tensor | None,
    kernel: Kernel,
    weights: Weights,
    backend: str,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """`energy` of what `as_cloud` has returned."""
    inputs = (x, y, None, kernel, weights, True, False, a, b)
    return choose("pairwise", BACKENDS, backend, *inputs)(*inputs)[0]


def force(
    x: Tensor,
    y: Tensor | None = None,
    v: Tensor | None = None,
    *,
    kernel: Kernel,
    weights: Weights = (1.0, 1.0, 1.0),
    backend: str = "auto",
) -> Tensor:
    """F_i = sum_{j != i} [w_ij 2 phi'(d2_ij) (z_i - z_j) + phi(d2_ij) v_j] for the points i of x; v_j = 0 for j in y.

    Args:
        x: [..., N, D]. y: [..., M, D] or None. v: [..., N, D] or None (zero).
        Others as in `energy`; w_yy is not used.

    Returns:
        [..., N, D] in x's dtype (float32 for half precision); half the gradient of `energy` to x where v is None.

    Raises:
        TypeError, ValueError: see `as_cloud`. RuntimeError: the named backend cannot run these inputs.
    """
    x, y, v = as_cloud(x=x, y=y, v=v)
    _check(kernel, weights)
    if v is not None and v.shape != x.shape:
        raise ValueError(f"v: got shape {tuple(v.shape)}; accepted: x's shape {tuple(x.shape)}")
    inputs = (x, y, v, kernel, weights, False, True)
    return choose("pairwise", BACKENDS, backend, *inputs)(*inputs)[1]
