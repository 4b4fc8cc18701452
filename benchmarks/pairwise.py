"""Cases and competitors of the `pairwise` operator: MMD and the Stein direction, value and gradient to x.

The competitors are what people write: MMD^2 by the expanded product, by `cdist` and by explicit differences, the first
through `torch.compile`; and the libraries KeOps and GeomLoss, where they are installed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import captured
from benchmarks.rows import OURS
from infovae_fast import IMQ, RBF, mmd, stein_direction, wae_imq
from infovae_fast.pairwise import CUDA_MOST_PRODUCTS_DIM
from infovae_fast.radial import Kernel

Result = tuple[Tensor | None, Tensor | None]  # the gradient or the Stein direction, and the value


@dataclass(frozen=True)
class Case:
    """One problem: N points of D dimensions against as many others."""

    what: str  # "rbf", "imq", "imq7" (seven scales) or "stein"
    n: int
    d: int
    gradient: bool = True  # to x; the Stein direction is one already
    dtype: str = "float32"

    @cached_property
    def kernel(self) -> Kernel:
        return {"rbf": RBF(), "imq": IMQ(), "imq7": wae_imq(self.d), "stein": RBF()}[self.what].at(self.d)

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, self.dtype)
        x, y = (torch.randn(self.n, self.d, generator=generator).to(device, dtype) for _ in range(2))
        return x.requires_grad_(self.needs_gradient), y

    @property
    def needs_gradient(self) -> bool:
        return self.gradient and self.what != "stein"


CASES = [
    *(Case("rbf", n, 10) for n in (16, 64, 256, 1024, 4096)),
    Case("rbf", 1024, 2),
    Case("rbf", 4096, 80),
    Case("rbf", 1024, 512),
    Case("rbf", 4096, 10, gradient=False),
    Case("imq", 4096, 10),
    Case("imq7", 4096, 10),
    Case("stein", 4096, 10),
]
README = [  # the rows of its table of a CPU
    Case("rbf", 256, 10),
    Case("rbf", 4096, 10),
    Case("rbf", 1024, 2),
    Case("rbf", 65536, 2),
    Case("rbf", 16384, 3),
    Case("rbf", 4096, 80),
    *(Case(what, 4096, 10) for what in ("imq", "imq7", "stein")),
    Case("rbf", 16384, 10),
    Case("rbf", 16384, 80),
]
GRID = [
    *(Case("rbf", 4**k, d, g) for k in range(2, 9) for d in (2, 10, 80, 512) for g in (True, False)),
    *(Case(what, n, 10) for n in (1024, 4096, 16384) for what in ("imq", "imq7", "stein")),
]

GPU_CASES = [
    *(Case("rbf", n, d) for n in (256, 1024, 4096) for d in (2, 10, 80)),
    *(Case("rbf", n, 10) for n in (16384, 60000, 65536)),
    *(Case("rbf", 65536, d) for d in (80, 512)),
    *(Case(what, n, 10) for what in ("imq", "imq7") for n in (4096, 16384)),
    Case("stein", 16384, 64),
    Case("rbf", 16384, 512, dtype="bfloat16"),
    Case("rbf", 10**6, 10, gradient=False),
]
GPU_README = [
    *(Case("rbf", n, 10) for n in (256, 4096, 16384, 65536)),
    *(Case("rbf", n, 80) for n in (4096, 65536)),
    Case("imq7", 16384, 10),
    Case("stein", 16384, 64),
]

REFERENCE_N = 4096  # above it the truth is that of `ROWS` rows: a pass of the reference would take minutes
ROWS = 256


@lru_cache(2)
def truth(case: Case, estimator: str = "unbiased", device: str = "cpu") -> Result:
    """The result in float64: by the reference, or, for large N, evenly spaced rows of the gradient and no value."""
    n = case.n
    x, y = (z.detach().double() for z in case.inputs(device))
    if n <= REFERENCE_N:
        return ours("reference", estimator)(case, x.requires_grad_(case.needs_gradient), y)
    rows = x[:: n // ROWS].clone().requires_grad_(case.needs_gradient)
    if case.what == "stein":
        return _stein(case.kernel, rows, x, expanded), None
    if not case.gradient:
        return None, None
    within, between = (case.kernel.phi(expanded(rows, z)).sum() for z in (x, y))  # phi(0) is there: it has no gradient
    pairs = n**2 if estimator == "biased" else n * (n - 1)
    return gradient(2 * within / pairs - 2 * between / n**2, rows)[0], None


def ours(backend: str, estimator: str = "unbiased") -> Callable[[Case, Tensor, Tensor], Result]:
    def run(case: Case, x: Tensor, y: Tensor) -> Result:
        if case.what == "stein":
            return stein_direction(x, kernel=case.kernel, backend=backend), None
        return gradient(mmd(x, y, case.kernel, estimator, backend=backend), x)  # type: ignore[arg-type]

    return run


def graphed(run: Callable[[Case, Tensor, Tensor], Result]) -> Callable[[Case, Tensor, Tensor], Result]:
    """`run` as a CUDA graph, captured at the first call of a case and replayed, which must take no longer than it."""
    held: list[Any] = [None, None, None]  # x, y, the graph

    def replay(case: Case, x: Tensor, y: Tensor) -> Result:
        if held[0] is not x:
            held[:] = None, None, None
            leaf = x.detach().requires_grad_(x.requires_grad)  # autograd waits for the stream where a leaf was used
            held[:] = x, y, captured(partial(run, case, leaf, y))
        return held[2]()

    return replay


class Empty(torch.autograd.Function):
    """What Python and PyTorch take for an operator that does nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def empty(case: Case, x: Tensor, y: Tensor) -> Result:
    value = Empty.apply(x)
    if x.requires_grad:
        torch.autograd.grad(value, x, value.detach())
    return None, None


def gradient(value: Tensor, x: Tensor) -> Result:
    return (torch.autograd.grad(value, x)[0] if x.requires_grad else None), value


def expanded(a: Tensor, b: Tensor) -> Tensor:
    return (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)


def differences(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] - b).square().sum(-1)


def cdist(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b).square()


def _mmd(kernel: Kernel, x: Tensor, y: Tensor, distances: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    n, phi = len(x), kernel.phi
    xx, xy, yy = phi(distances(x, x)), phi(distances(x, y)), phi(distances(y, y))
    within = (xx.sum() - xx.diagonal().sum() + yy.sum() - yy.diagonal().sum()) / (n * (n - 1))
    return within - 2 * xy.mean()


def _stein(kernel: Kernel, z: Tensor, x: Tensor, distances: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of the points z, some or all of x."""
    k = kernel.phi(distances(z, x))
    b2 = kernel.bandwidth[0] ** 2  # type: ignore[index]
    return (k @ -x + (z * k.sum(1, keepdim=True) - k @ x) / b2) / len(x)


def eager(distances: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Case, Tensor, Tensor], Result]:
    def run(case: Case, x: Tensor, y: Tensor) -> Result:
        if case.what == "stein":
            return _stein(case.kernel, x, x, distances), None
        return gradient(_mmd(case.kernel, x, y, distances), x)

    return run


def compiled() -> Callable[[Case, Tensor, Tensor], Result]:
    function: dict[Case, Callable[[Tensor, Tensor], Tensor]] = {}

    def run(case: Case, x: Tensor, y: Tensor) -> Result:
        if case not in function:
            torch.compiler.reset()  # each case compiles the same code again, and after eight times it is refused
            function.clear()
            kernel = case.kernel  # here: the lock of a cached_property (Python 3.11) cannot be traced
            plain = (
                (lambda x, y: _stein(kernel, x, x, expanded))
                if case.what == "stein"
                else (lambda x, y: _mmd(kernel, x, y, expanded))
            )
            function[case] = torch.compile(plain, fullgraph=True, dynamic=False)
        value = function[case](x, y)
        return (value, None) if case.what == "stein" else gradient(value, x)

    return run


def keops(case: Case, x: Tensor, y: Tensor) -> Result:
    from pykeops.torch import LazyTensor

    def phi(a: Tensor, b: Tensor) -> Any:
        d2 = ((LazyTensor(a[:, None]) - LazyTensor(b[None])) ** 2).sum(-1)
        if case.what in ("rbf", "stein"):
            return (d2 * (-0.5 / case.kernel.bandwidth[0] ** 2)).exp()  # type: ignore[index]
        return sum(w / (1 + d2 * (0.5 / b**2)) for b, w in case.kernel.scales())

    n = case.n
    if case.what == "stein":
        k, b2 = phi(x, x), case.kernel.bandwidth[0] ** 2  # type: ignore[index]
        return (k @ -x + (x * k.sum(1) - k @ x) / b2) / n, None
    within = (phi(x, x).sum(1).sum() + phi(y, y).sum(1).sum() - 2 * n * case.kernel.phi0) / (n * (n - 1))
    return gradient(within - 2 * phi(x, y).sum(1).sum() / n**2, x)


def geomloss(backend: str) -> Callable[[Case, Tensor, Tensor], Result]:
    """GeomLoss's kernel exp(-|x - y|^2 / (2 blur^2)) is our RBF, its loss half the biased MMD^2."""

    def run(case: Case, x: Tensor, y: Tensor) -> Result:
        from geomloss import SamplesLoss

        loss = SamplesLoss("gaussian", blur=case.kernel.bandwidth[0], backend=backend)  # type: ignore[index]
        return gradient(2 * loss(x, y), x)

    return run


@dataclass(frozen=True)
class Implementation:
    """A function to time, and what it takes for value and gradient of the RBF MMD on two cores with AVX-512.

    The cost decides what is left out: rounded up from N = 4,096, so that a call fits in memory and ends in time. On a
    GPU it is the memory alone.
    """

    run: Callable[[Case, Tensor, Tensor], Result]
    nanoseconds: tuple[float, float] = (0, 0)  # for each of the N^2 pairs: at D = 0, more for each dimension
    floats: tuple[float, float] = (0, 0)  # alive at once, counted in the same way
    packages: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ("rbf", "imq", "imq7", "stein")
    estimator: str = "unbiased"
    most_d: int = 2**31

    def cost(self, case: Case) -> tuple[float, float]:
        """Seconds and GiB of a call."""
        scale = case.n**2 * {"imq7": 3, "stein": 0.5}.get(case.what, 1) * (1 if case.gradient else 0.5)
        seconds, gib = (scale * (base + case.d * more) for base, more in (self.nanoseconds, self.floats))
        return seconds * 1e-9, gib * 4 / 2**30


EAGER = (70, 0.15)  # most of it page faults
IMPLEMENTATIONS = {
    OURS: Implementation(ours("auto")),  # never left out
    "eager expanded": Implementation(eager(expanded), EAGER, (16, 0)),
    "eager cdist": Implementation(eager(cdist), EAGER, (16, 0)),
    "eager differences": Implementation(eager(differences), (0, 20), (9, 6)),
    "KeOps": Implementation(keops, (20, 4.2), packages=("pykeops",)),
    "GeomLoss": Implementation(geomloss("tensorized"), EAGER, (16, 0), ("geomloss",), ("rbf",), "biased"),
    "GeomLoss KeOps": Implementation(
        geomloss("online"), (20, 4.2), (0, 0), ("geomloss", "pykeops"), ("rbf",), "biased"
    ),
    "torch.compile": Implementation(compiled(), (20, 0.1), (7, 0)),
}
ON_GPU = {
    name: replace(implementation, nanoseconds=(0, 0))
    for name, implementation in {
        OURS: IMPLEMENTATIONS[OURS],
        f"{OURS} cuda": Implementation(ours("cuda"), most_d=CUDA_MOST_PRODUCTS_DIM),
        f"{OURS} triton": Implementation(ours("triton")),
        f"{OURS} graph": Implementation(graphed(ours("auto"))),
        "empty function": Implementation(empty),
        **{name: i for name, i in IMPLEMENTATIONS.items() if name != OURS},
        "eager expanded graph": Implementation(graphed(eager(expanded)), floats=(16, 0)),
    }.items()
}
