"""Cases and competitors of the `pairwise` operator: MMD and the Stein direction, value and gradient to x.

The competitors are what people write: MMD^2 by the expanded product and by `cdist`, the same through `torch.compile`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from infovae_fast import IMQ, RBF, mmd, stein_direction, wae_imq
from infovae_fast.radial import Kernel

Result = tuple[Tensor, Tensor | None]  # the gradient and the value; or the Stein direction


@dataclass(frozen=True)
class Case:
    """One problem: N points of D dimensions against as many others."""

    what: str  # "rbf", "imq", "imq7" (seven scales) or "stein"
    n: int
    d: int

    @cached_property
    def kernel(self) -> Kernel:
        return {"rbf": RBF(), "imq": IMQ(), "imq7": wae_imq(self.d), "stein": RBF()}[self.what].at(self.d)

    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.n, self.d, generator=generator)
        return x.requires_grad_(self.what != "stein"), torch.randn(self.n, self.d, generator=generator)


CASES = [
    *(Case("rbf", n, 10) for n in (16, 64, 256, 1024, 4096)),
    Case("rbf", 1024, 2),
    Case("rbf", 4096, 80),
    Case("imq7", 4096, 10),
    Case("stein", 4096, 10),
]
LARGE = [Case("rbf", 16384, 10), Case("rbf", 16384, 80)]  # ours alone: the others take minutes or gigabytes


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
    return torch.autograd.grad(value, x)[0], value


def expanded(a: Tensor, b: Tensor) -> Tensor:
    return (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)


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
