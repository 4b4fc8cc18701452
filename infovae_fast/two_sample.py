"""The two-sample test: are x and y drawn from one distribution? (Gretton et al., JMLR 13, 2012, section 3)

The statistic is the unbiased MMD^2. Under the null hypothesis the labels "x" and "y" mean nothing, so that its
distribution is what random relabellings of the joint sample z = [x; y], L = N + M points, give.

All of them come out of one pass over the joint kernel matrix. With K its off-diagonal part and a in {0, 1}^L the
labels of one relabelling, a_i = 1 for "x":

    q = a^T K a,    t = a^T K 1,    s = 1^T K 1,    sum_xx = q,    sum_xy = t - q,    sum_yy = s - 2 t + q

A tile of K meets the labels of all relabellings in one matrix product; each pair of points is visited once, and the
matrix is never held.
"""

from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from torch import Tensor

from infovae_fast.arguments import at_least_float32, is_integer
from infovae_fast.clouds import KernelLike, check_result, kernel_of, refuse_non_finite, samples
from infovae_fast.pairwise import squared_distances
from infovae_fast.radial import RBF, Kernel, median_rbf

TILE_NUMBERS = 2**21  # in a tile of the kernel matrix, and in the labels that meet it


class MMDTest(NamedTuple):
    """What `mmd_test` found.

    statistic: the unbiased MMD^2 of the samples. p_value: how likely at least as large a statistic is under the null
    hypothesis. permutations: how many relabellings that rests on. null: their statistics, [permutations], in float64 on
    the CPU.
    """

    statistic: float
    p_value: float
    permutations: int
    null: Tensor


@torch.no_grad()
def mmd_test(
    x: Tensor,
    y: Tensor,
    kernel: KernelLike = None,
    *,
    permutations: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> MMDTest:
    """The permutation test of whether x and y are samples of one distribution, with the unbiased MMD^2:

        p = (1 + the number of random relabellings with a statistic >= the observed one) / (1 + permutations)

    Exact for independent points and every sample size: where the distributions are equal, p <= a happens with
    probability at most a. That needs a kernel that does not know the labels: one chosen to tell this x from this y
    apart would favour the observed labelling over all others. Hence a function of (x, y), and a preset such as
    "median_rbf", is called with a random split of the joint sample, so that it cannot see which points are x. Do not
    give a kernel that was fitted to these same data.

    Args:
        x: [N, D], floating point, N >= 2. y: [M, D], same dtype and device, M >= 2.
        kernel: as in `mmd`, but see above; the default is RBF with the median distance between two points as its
            bandwidth (`median_rbf`), or sqrt(D) where that is 0.
        permutations: how many relabellings; the smallest possible p is 1 / (1 + permutations).
        seed: of the relabellings, drawn on the CPU: the same on every device.
        progress: called as progress(tiles done, all tiles).

    Returns:
        An `MMDTest`. Memory: (N + M) (permutations + 1) bytes for the labels, and tiles.

    Raises:
        TypeError, ValueError: as `mmd`; fewer than one permutation; fewer than two points.
    """
    x, y = samples(x=x, y=y)
    if not is_integer(permutations) or permutations < 1:
        raise ValueError(f"permutations: got {permutations!r}; accepted: an integer, 1 or more")
    if not is_integer(seed) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: got {seed!r}; accepted: an integer of 64 bits")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"the unbiased MMD^2 needs two points of each sample: got N={len(x)}, M={len(y)}")
    refuse_non_finite(x=x, y=y)
    x, y = at_least_float32(x), at_least_float32(y)
    z = torch.cat([x, y])  # [L, D]
    generator = torch.Generator().manual_seed(int(seed))
    shuffled = torch.randperm(len(z), generator=generator).to(z.device)
    if not isinstance(kernel, Kernel):  # in an order that does not know the labels either
        shuffled = torch.unique(z, dim=0, return_inverse=True)[1].argsort(stable=True)[shuffled]
    halves = z[shuffled].split([len(x), len(y)])
    kernel = _median_or_usual(*halves) if kernel is None else kernel_of(kernel, *halves)
    if len(x) > len(y):  # the statistic is symmetric, and sum_yy, a difference, is accurate where it is the larger one
        x, y = y, x
        z = torch.cat([x, y])
    labels = _labels(len(x), len(y), permutations, generator).to(z.device)
    statistics, rounding = _statistics(z, labels, len(x), kernel, progress)
    check_result(statistics, x=x, y=y)
    reached = int((statistics[1:] >= statistics[0] - (rounding[1:] + rounding[0])).sum())
    return MMDTest(statistics[0].item(), (reached + 1) / (permutations + 1), permutations, statistics[1:])


def _median_or_usual(x: Tensor, y: Tensor) -> Kernel:
    try:
        return median_rbf(x, y)
    except ValueError:  # more than half of the distances are 0
        return RBF().at(x.shape[1])


def _labels(n: int, m: int, permutations: int, generator: torch.Generator) -> Tensor:
    """Which points are "x", bool [1 + permutations, n + m]: first the n observed ones, then n at random."""
    labels = torch.zeros(1 + permutations, n + m, dtype=torch.bool)
    labels[0, :n] = True
    for row in labels[1:]:
        row[torch.randperm(n + m, generator=generator)[:n]] = True
    return labels


def _statistics(
    z: Tensor, labels: Tensor, n: int, kernel: Kernel, progress: Callable[[int, int], None] | None
) -> tuple[Tensor, Tensor]:
    """The unbiased MMD^2 of each row of labels, [P + 1], and how far it may be off by rounding, both on the CPU.

    Relabellings that tie, such as a repetition of the observed one, are summed in different orders.
    """
    wide = torch.float32 if z.device.type == "mps" else torch.float64
    z = z.to(wide)
    z = z - z.mean(0)
    L, m = len(z), len(z) - n
    edge = max(1, int(TILE_NUMBERS / max(TILE_NUMBERS**0.5, len(labels))))
    slices = [slice(start, start + edge) for start in range(0, L, edge)]
    tiles = list(combinations_with_replacement(slices, 2))
    q, row_sums = z.new_zeros(len(labels)), z.new_zeros(L)  # a^T K a of each row of labels, K 1
    for done, (i, j) in enumerate(tiles, 1):
        K = kernel.phi(squared_distances(z[i], z[j], wide)).to(wide)
        if i == j:
            K = K.triu(1)  # each pair once, so that K is symmetric to the last bit
        row_sums[i] += K.sum(1)
        row_sums[j] += K.sum(0)
        q += 2 * ((labels[:, i].to(wide) @ K) * labels[:, j].to(wide)).sum(1)
        if progress is not None:
            progress(done, len(tiles))
    t = sum(labels[:, i].to(wide) @ row_sums[i] for i in slices)  # a^T K 1
    xx, xy, yy = q / (n * (n - 1)), (t - q) / (n * m), (row_sums.sum() - 2 * t + q) / (m * (m - 1))
    statistics = (xx - 2 * xy + yy).cpu()
    rounding = 64 * torch.finfo(wide).eps * (xx.abs() + 2 * xy.abs() + yy.abs()).cpu()
    return statistics, rounding
