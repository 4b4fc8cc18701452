"""Cases and competitors of the `pairwise` operator: MMD and the Stein direction, value and gradient to x.

The competitors are what people write: MMD^2 by the expanded product, by `cdist` and by explicit differences, the first
through `torch.compile`; and the library KeOps, where it is installed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from infovae_fast import IMQ, RBF, mmd, stein_direction, wae_imq
from infovae_fast.radial import Kernel

Result = tuple[Tensor | None, Tensor | None]  # the gradient or the Stein direction, and the value


@dataclass(frozen=True)
class Case:
    """One problem: N points of D dimensions against as many others."""

    what: str  # "rbf", "imq", "imq7" (seven scales) or "stein"
    n: int
    d: int
    gradient: bool = True  # to x; the Stein direction is one already

    @cached_property
    def kernel(self) -> Kernel:
        return {"rbf": RBF(), "imq": IMQ(), "imq7": wae_imq(self.d), "stein": RBF()}[self.what].at(self.d)

    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.n, self.d, generator=generator)
        return x.requires_grad_(self.gradient and self.what != "stein"), torch.randn(
            self.n, self.d, generator=generator
        )


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
README = [case for case in CASES if case.gradient and case.n > 64 and case.d < 512 and (case.n, case.d) != (1024, 10)]
LARGE = [  # ours alone: the others take minutes or gigabytes
    Case("rbf", 16384, 10),
    Case("rbf", 16384, 80),
    Case("rbf", 65536, 10),
]


def truth(case: Case, x: Tensor, y: Tensor) -> Result:
    """The result in float64, by the reference."""
    return ours("reference")(case, x.detach().double().requires_grad_(x.requires_grad), y.double())


def ours(backend: str) -> Callable[[Case, Tensor, Tensor], Result]:
    def run(case: Case, x: Tensor, y: Tensor) -> Result:
        if case.what == "stein":
            return stein_direction(x, kernel=case.kernel, backend=backend), None
        return gradient(mmd(x, y, case.kernel, backend=backend), x)

    return run


def gradient(value: Tensor, x: Tensor) -> Result:
    return (torch.autograd.grad(value, x)[0] if x.requires_grad else None), value


def expanded(a: Tensor, b: Tensor) -> Tensor:
    return (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)


def differences(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] - b).square().sum(-1)


def cdist(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b).square()


def _mmd(case: Case, x: Tensor, y: Tensor, distances: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    n, phi = case.n, case.kernel.phi
    xx, xy, yy = phi(distances(x, x)), phi(distances(x, y)), phi(distances(y, y))
    within = (xx.sum() - xx.diagonal().sum() + yy.sum() - yy.diagonal().sum()) / (n * (n - 1))
    return within - 2 * xy.mean()


def _stein(case: Case, x: Tensor, distances: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    k = case.kernel.phi(distances(x, x))
    b2 = case.kernel.bandwidth[0] ** 2  # type: ignore[index]
    return (k @ -x + (x * k.sum(1, keepdim=True) - k @ x) / b2) / case.n


def eager(distances: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Case, Tensor, Tensor], Result]:
    def run(case: Case, x: Tensor, y: Tensor) -> Result:
        if case.what == "stein":
            return _stein(case, x, distances), None
        return gradient(_mmd(case, x, y, distances), x)

    return run


def compiled() -> Callable[[Case, Tensor, Tensor], Result]:
    functions: dict[Case, Callable[[Tensor, Tensor], Tensor]] = {}

    def run(case: Case, x: Tensor, y: Tensor) -> Tensor:
        if case not in functions:
            plain = (
                (lambda x, y: _stein(case, x, expanded))
                if case.what == "stein"
                else (lambda x, y: _mmd(case, x, y, expanded))
            )
            functions[case] = torch.compile(plain, fullgraph=True, dynamic=False)
        value = functions[case](x, y)
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


COMPETITORS: dict[str, Callable[[Case, Tensor, Tensor], Result]] = {
    "eager expanded": eager(expanded),
    "eager cdist": eager(cdist),
    "eager differences": eager(differences),
    "KeOps": keops,
}
