"""What results are held against: the one accuracy rule, and the definitions as loops over pairs of points.

**The rule.** Truth = the reference in float64, yardstick = the reference in the tested dtype, and for every backend

    max|out - truth| <= 2 max|yardstick - truth| + eps * scale,        scale = the sum of |terms|

so that no tolerance is tuned by hand. A squared distance is itself a sum of terms, |a|^2 + |b|^2 - 2 a.b.

**The loops** know nothing of the library: scalar arithmetic in float64, written down from the publications. The
reference must agree with them within `EXACT`.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from infovae_fast import backends, pairwise
from infovae_fast.radial import IMQ, RBF, Kernel, RationalQuadratic

EXACT = 1e-12


device = "cpu"  # of the numbers that `normal` makes; tests/conftest.py sets it to that of a test's backend


def device_of(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


@pytest.fixture(params=backends.NAMES, scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend's name; the test asks `require` whether it runs here."""
    return request.param


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Where other work shares the cores, threads that wait for each other cost more time than they save."""
    with _threads(1):
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For what must not depend on who computes what."""
    with _threads(2):
        yield


def require(operator: str, table: Any, name: str, *inputs: Any) -> None:
    """Skips the test, with the backend's own reason, where the backend cannot run these inputs."""
    reason = backends.explain(operator, table, *inputs)[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def require_compile(name: str) -> None:
    """Skips the test where the backend's kernels run on the CPU only because there is no GPU."""
    if name in ("cuda", "triton") and not torch.cuda.is_available():
        pytest.skip(f"{name}: without a GPU its kernels are simulated, which torch.compile cannot trace")


def require_pairwise(
    name: str, x: Tensor, y: Tensor | None = None, v: Tensor | None = None, *, kernel: Kernel, energy: bool = True
) -> None:
    """`require` for the energy, or else the force, of a cloud."""
    inputs = (x, y, v, kernel.at(x.shape[-1]), (1.0, -1.0, 1.0), energy, not energy)
    require("pairwise", pairwise.BACKENDS, name, *inputs)


def check(
    out: Tensor, truth: Tensor, yardstick: Tensor, scale: Tensor | float, dtype: torch.dtype | None = None
) -> None:
    """The accuracy rule; eps is that of the dtype of the computation, by default out's."""
    assert out.shape == truth.shape, (out.shape, truth.shape)
    assert out.dtype == yardstick.dtype, (out.dtype, yardstick.dtype)
    eps = torch.finfo(dtype or out.dtype).eps
    out, truth, yardstick = (t.detach().cpu().double() for t in (out, truth, yardstick))
    error, peer = ((t - truth).abs().max().item() for t in (out, yardstick))
    allowed = 2 * peer + eps * float(torch.as_tensor(scale).abs().max())
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e} (yardstick {peer:.3e})"


def near(out: Any, truth: Any) -> None:
    """Agreement within `EXACT` of the largest component."""
    out, truth = (np.asarray(t.detach().cpu() if isinstance(t, Tensor) else t, dtype=np.float64) for t in (out, truth))
    assert out.shape == truth.shape, (out.shape, truth.shape)
    error, size = np.abs(out - truth).max(), np.abs(truth).max()
    assert error <= EXACT * size, f"error {error:.3e} at size {size:.3e}"


def pairwise_scales(
    x: Tensor, y: Tensor | None, v: Tensor | None, kernel: Kernel, weights: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """The sums of |terms| of the energy and of the force, to first order in the terms of the distances too."""
    n = x.shape[-2]
    z = (x if y is None else torch.cat([x, y], dim=-2)).detach().cpu().double()
    z = z - z.mean(-2, keepdim=True)
    total = z.shape[-2]
    kernel = _in_float64(kernel.at(x.shape[-1]))
    d2 = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").square().requires_grad_()
    slope = kernel.dphi(d2)
    (curvature,) = torch.autograd.grad(slope.sum(), d2)
    length = z.norm(dim=-1, keepdim=True)
    reach = length + length.mT  # [..., total, total]
    off = 1 - torch.eye(total, dtype=torch.float64)
    phi = (kernel.phi(d2).abs() + slope.abs() * reach**2).detach() * off
    force = ((slope.abs() + curvature.abs() * reach**2) * reach).detach() * off
    w = torch.full((total, total), weights[1], dtype=torch.float64)
    w[:n, :n], w[n:, n:] = weights[0], weights[2]
    F = (2 * w.abs() * force)[..., :n, :].sum(-1, keepdim=True)
    if v is not None:
        F = F + phi[..., :n, :n] @ v.detach().cpu().double().norm(dim=-1, keepdim=True)
    return (w.abs() * phi).sum((-2, -1)), F


def _in_float64(kernel: Kernel) -> Kernel:
    b = kernel.bandwidth
    return replace(kernel, bandwidth=b.detach().double()) if isinstance(b, Tensor) else kernel


@dataclass(frozen=True)
class Textbook:
    """A mixture of scales of one radial function by its published formula, in scalar arithmetic."""

    kind: str
    bandwidths: tuple[float, ...]
    weights: tuple[float, ...] | None = None
    alpha: float = 1.0

    def build(self, bandwidth: Tensor | None = None) -> Kernel:
        """The library's kernel."""
        if bandwidth is None and len(self.bandwidths) == 1:
            lengths: Any = self.bandwidths[0]
        else:
            lengths = self.bandwidths if bandwidth is None else bandwidth
        if self.kind == "rq":
            return RationalQuadratic(lengths, self.alpha, weights=self.weights)
        return {"rbf": RBF, "imq": IMQ}[self.kind](lengths, weights=self.weights)

    def _scales(self) -> list[tuple[float, float]]:
        s = len(self.bandwidths)
        return list(zip(self.bandwidths, self.weights or [1 / s] * s, strict=True))

    def phi(self, d2: float) -> float:
        return math.fsum(w * self._one(d2, b)[0] for b, w in self._scales())

    def dphi(self, d2: float) -> float:
        return math.fsum(w * self._one(d2, b)[1] for b, w in self._scales())

    def dphi_db(self, d2: float) -> np.ndarray:
        """The derivative to each bandwidth."""
        return np.array([w * self._one(d2, b)[2] for b, w in self._scales()])

    def _one(self, d2: float, b: float) -> tuple[float, float, float]:  # phi, its derivative to d2, and to b
        if self.kind == "rbf":
            e = math.exp(-d2 / (2 * b**2))
            return e, -e / (2 * b**2), e * d2 / b**3
        if self.kind == "imq":
            c = 2 * b**2
            return c / (c + d2), -c / (c + d2) ** 2, 4 * b * d2 / (c + d2) ** 2
        a = self.alpha
        base = 1 + d2 / (2 * a * b**2)
        return base**-a, -(base ** (-a - 1)) / (2 * b**2), base ** (-a - 1) * d2 / b**3


KERNELS = [
    Textbook("rbf", (1.3,)),
    Textbook("rbf", (0.5, 1.0, 2.0, 4.0)),
    Textbook("rbf", (0.7, 1.9), (2.0, 0.25)),
    Textbook("imq", (0.9,)),
    Textbook("imq", (0.4, 0.8, 2.5), (1.0, 1.0, 3.0)),
    Textbook("rq", (1.1,), alpha=0.5),
    Textbook("rq", (0.6, 1.7), (0.3, 1.2), alpha=2.5),
]


def name_of(value: Any) -> str | None:
    """Readable test names."""
    if isinstance(value, Textbook):
        return f"{value.kind}{len(value.bandwidths)}" + ("w" if value.weights else "")
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


Point = tuple[str, int]  # "x" or "y", and which


def mmd_pairs(estimator: str, n: int, m: int, block: int = 0) -> Iterator[tuple[float, Point, Point]]:
    """Every term c k(a, b) of an MMD^2 estimate (Gretton et al., 2012; block: Zaremba et al., 2013)."""
    if estimator in ("biased", "unbiased"):
        same = estimator == "biased"
        for i, j in itertools.product(range(n), range(n)):
            if same or i != j:
                yield 1 / (n * n if same else n * (n - 1)), ("x", i), ("x", j)
        for i, j in itertools.product(range(m), range(m)):
            if same or i != j:
                yield 1 / (m * m if same else m * (m - 1)), ("y", i), ("y", j)
        for i, j in itertools.product(range(n), range(m)):
            yield -2 / (n * m), ("x", i), ("y", j)
    elif estimator == "linear":
        pairs = n // 2
        for t in range(pairs):
            a, b = 2 * t, 2 * t + 1
            yield 1 / pairs, ("x", a), ("x", b)
            yield 1 / pairs, ("y", a), ("y", b)
            yield -1 / pairs, ("x", a), ("y", b)
            yield -1 / pairs, ("x", b), ("y", a)
    else:
        blocks = n // block
        for start in range(0, blocks * block, block):
            for c, (p, i), (q, j) in mmd_pairs("unbiased", block, block):
                yield c / blocks, (p, start + i), (q, start + j)


def energy_pairs(n: int, m: int, weights: tuple[float, float, float]) -> Iterator[tuple[float, Point, Point]]:
    """Every term of E = sum_{i != j} w_ij phi(d2_ij)."""
    cloud = [("x", i) for i in range(n)] + [("y", j) for j in range(m)]
    for a, b in itertools.permutations(cloud, 2):
        yield weights[(a[0] == "y") + (b[0] == "y")], a, b


def pair_sum(
    terms: Iterator[tuple[float, Point, Point]], x: Tensor, y: Tensor, k: Textbook
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """sum c k(a, b) over the terms, and its derivatives to x, y and the bandwidths."""
    points = {"x": x.detach().double().cpu().numpy(), "y": y.detach().double().cpu().numpy()}
    gradient = {name: np.zeros_like(p) for name, p in points.items()}
    values, by_bandwidth = [], np.zeros(len(k.bandwidths))
    for c, (p, i), (q, j) in terms:
        difference = points[p][i] - points[q][j]
        d2 = math.fsum(d * d for d in difference)
        values.append(c * k.phi(d2))
        by_bandwidth += c * k.dphi_db(d2)
        gradient[p][i] += c * k.dphi(d2) * 2 * difference
        gradient[q][j] -= c * k.dphi(d2) * 2 * difference
    return math.fsum(values), gradient["x"], gradient["y"], by_bandwidth


def force_loop(
    x: Tensor, y: Tensor | None, v: Tensor | None, k: Textbook, weights: tuple[float, float, float]
) -> np.ndarray:
    """F_i = sum_{j != i} [w_ij 2 phi'(d2_ij) (z_i - z_j) + phi(d2_ij) v_j], i in x."""
    z = x.cpu().numpy() if y is None else np.concatenate([x.cpu().numpy(), y.cpu().numpy()])
    F = np.zeros(x.shape)
    for i, j in itertools.product(range(len(x)), range(len(z))):
        if i != j:
            difference = z[i] - z[j]
            d2 = math.fsum(d * d for d in difference)
            F[i] += weights[0 if j < len(x) else 1] * 2 * k.dphi(d2) * difference
            if v is not None and j < len(x):
                F[i] += k.phi(d2) * v[j].cpu().numpy()
    return F


def stein_loop(z: Tensor, score: Callable[[np.ndarray], np.ndarray], k: Textbook) -> np.ndarray:
    """phi*_i = 1/N sum_j [k(z_j, z_i) score(z_j) + grad_{z_j} k(z_j, z_i)] (Liu & Wang, 2016)."""
    points = z.cpu().numpy()
    direction = np.zeros_like(points)
    for i, j in itertools.product(range(len(z)), repeat=2):
        difference = points[j] - points[i]
        d2 = math.fsum(d * d for d in difference)
        direction[i] += (k.phi(d2) * score(points[j]) + k.dphi(d2) * 2 * difference) / len(z)
    return direction


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same on every call."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(device, dtype)


def rbf_mean(m, s2, b):
    """E k(x, y) of an RBF where x - y ~ N(m, s2 I)."""
    return (b**2 / (b**2 + s2)) ** (len(m) / 2) * math.exp(-float(m @ m) / (2 * (b**2 + s2)))
