"""Radial kernels k(a, b) = phi(|a - b|^2): the function phi, its derivative, mixtures of scales, named conventions.

Every bandwidth b is a **length in the units of the samples**. With d2 = |a - b|^2:

    RBF                 phi = exp(-d2 / (2 b^2))                   phi' = -phi / (2 b^2)
    RationalQuadratic   phi = (1 + d2 / (2 alpha b^2))^(-alpha)    phi' = -(1 + d2 / (2 alpha b^2))^(-alpha-1) / (2 b^2)
    IMQ                 phi = C / (C + d2), C = 2 b^2              RationalQuadratic with alpha = 1

RationalQuadratic with alpha = 1/2 and b = c is the classic inverse multiquadric (1 + d2/c^2)^(-1/2); alpha -> infinity
is RBF. A sequence of bandwidths is a mixture, phi = sum_s w_s phi_s, with weights that default to 1/S.

Publications and libraries disagree about constants more than about anything else. The conventions in use have names
here, each with its formula: `paper_pixelcnn`, `paper_few_samples`, `wae_imq`, `cmmd`, `median_rbf`, `five_scale_rbf`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from infovae_fast.arguments import at_least_float32, is_integer
from infovae_fast.backends import on_host

Scale = float | Tensor
_ACCEPTED = "positive numbers whose squares are neither 0 nor infinite"


@dataclass(frozen=True)
class Kernel:
    """A mixture of scales of one radial function; use `RBF`, `IMQ` or `RationalQuadratic`.

    Or a kernel of your own: a subclass with `phi` and `dphi`, for the reference.

    Args:
        bandwidth: a positive length, a sequence of them (a mixture), or a tensor of shape [] or [S], which may require
            a gradient. `None` stands for sqrt(D), D the dimension of the samples: two points of N(0, I) are sqrt(2 D)
            apart on average, so that RBF is exp(-1) there. `at` fills it in. It is not a length for each coordinate:
            for that divide the samples by the lengths.
        weights: one weight a scale; default 1/S each. They need not sum to 1 (phi(0) is their sum).

    Raises:
        TypeError: a bandwidth or weight that is not a number.
        ValueError: a bandwidth that is not positive, or whose square overflows or underflows (not looked at in a tensor
            on a GPU); weights of another length; an empty sequence.
    """

    bandwidth: Scale | Sequence[float] | None = None
    weights: Sequence[float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.bandwidth, Tensor):
            b = self.bandwidth
            if b.ndim > 1 or b.numel() == 0 or not b.is_floating_point():
                raise ValueError(
                    f"bandwidth: got a {b.dtype} tensor of shape {tuple(b.shape)}; accepted: "
                    "a floating-point tensor of shape [] (one scale) or [S] (a mixture)"
                )
            self.checked()
        elif self.bandwidth is not None:
            object.__setattr__(self, "bandwidth", _lengths("bandwidth", self.bandwidth))
        if self.weights is not None:
            object.__setattr__(self, "weights", _numbers("weights", self.weights))
            if len(self.weights) != self._count:
                raise ValueError(f"weights: got {len(self.weights)} for {self._count} bandwidths; give one a bandwidth")

    def checked(self) -> "Kernel":
        """The kernel; ValueError where a tensor bandwidth, which may have learnt since, is seen to be no length."""
        b = self.bandwidth
        if isinstance(b, Tensor) and on_host(b):
            numbers = torch.finfo(torch.promote_types(b.dtype, torch.float32))
            lengths = b.detach().reshape(-1).tolist()
            if not all(v > 0 and numbers.smallest_normal * numbers.eps <= v * v <= numbers.max for v in lengths):
                raise ValueError(f"bandwidth: got {b.tolist()}; accepted: {_ACCEPTED}; one that is learnt, as exp(t)")
        return self

    @property
    def _count(self) -> int:
        if isinstance(self.bandwidth, Tensor):
            return self.bandwidth.numel()
        return len(self.bandwidth) if isinstance(self.bandwidth, tuple) else 1

    def at(self, dim: int) -> "Kernel":
        """The same kernel with the default bandwidth sqrt(dim) filled in."""
        return self if self.bandwidth is not None else replace(self, bandwidth=math.sqrt(dim))

    def scales(self) -> list[tuple[Scale, float]]:
        """The mixture as (bandwidth, weight) pairs."""
        if self.bandwidth is None:
            raise ValueError("bandwidth=None depends on the dimension: use kernel.at(dim)")
        if isinstance(self.bandwidth, Tensor):
            lengths: Sequence[Scale] = at_least_float32(self.bandwidth).reshape(-1).unbind()
        else:
            lengths = self.bandwidth  # type: ignore[assignment]
        weights = self.weights or (1 / len(lengths),) * len(lengths)
        return list(zip(lengths, weights, strict=True))

    @property
    def phi0(self) -> float:
        """phi(0), the sum of the weights: what every point has with itself."""
        return math.fsum(self.weights) if self.weights else 1.0

    @cached_property
    def plain(self) -> tuple[bool, tuple[float, ...], tuple[float, ...], float] | None:
        """Is it RBF, bandwidths (none for the default), weights, alpha: for C++. None if they are not all numbers."""
        if type(self) not in _NAMES or isinstance(self.bandwidth, Tensor):
            return None
        scales = () if self.bandwidth is None else self.scales()
        weights = tuple(w for _, w in scales) or tuple(self.weights or (1.0,))
        return isinstance(self, RBF), tuple(float(b) for b, _ in scales), weights, getattr(self, "alpha", 1.0)

    def phi(self, d2: Tensor) -> Tensor:
        """phi of squared distances, elementwise."""
        return sum(w * self._phi(d2, b) for b, w in self.scales())  # type: ignore[return-value]

    def dphi(self, d2: Tensor) -> Tensor:
        """The derivative of phi to the squared distance, elementwise."""
        return sum(w * self._dphi(d2, b) for b, w in self.scales())  # type: ignore[return-value]

    def _phi(self, d2: Tensor, b: Scale) -> Tensor:
        raise TypeError("Kernel is abstract: use RBF, IMQ or RationalQuadratic")

    _dphi = _phi

    def to_config(self) -> dict[str, Any]:
        """Plain data from which `kernel_from_config` builds the same kernel."""
        bandwidth = self.bandwidth.tolist() if isinstance(self.bandwidth, Tensor) else self.bandwidth
        config: dict[str, Any] = {"name": _NAMES[type(self)]}
        if bandwidth is not None:
            config["bandwidth"] = list(bandwidth) if isinstance(bandwidth, tuple) else bandwidth
        if self.weights is not None:
            config["weights"] = list(self.weights)
        return config


@dataclass(frozen=True)
class RBF(Kernel):
    """phi = sum_s w_s exp(-d2 / (2 b_s^2)). Arguments: see `Kernel`."""

    def _phi(self, d2: Tensor, b: Scale) -> Tensor:
        return torch.exp(d2 * (-0.5 / (b * b)))

    def _dphi(self, d2: Tensor, b: Scale) -> Tensor:
        return self._phi(d2, b) * (-0.5 / (b * b))


@dataclass(frozen=True)
class RationalQuadratic(Kernel):
    """phi = sum_s w_s (1 + d2 / (2 alpha b_s^2))^(-alpha), alpha > 0. Other arguments: see `Kernel`."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.alpha, Real) or isinstance(self.alpha, bool):
            raise TypeError(f"alpha: got {self.alpha!r}; accepted: a positive number, the same for all scales")
        if not 1e-30 <= self.alpha <= 1e30:  # what float32 can hold, and its reciprocal
            raise ValueError(f"alpha: got {self.alpha!r}; accepted: 1e-30 to 1e30; of larger ones the limit is RBF")
        object.__setattr__(self, "alpha", float(self.alpha))

    def _phi(self, d2: Tensor, b: Scale) -> Tensor:
        return _inverse_power(d2 * (0.5 / (self.alpha * b * b)), self.alpha)

    def _dphi(self, d2: Tensor, b: Scale) -> Tensor:
        return _inverse_power(d2 * (0.5 / (self.alpha * b * b)), self.alpha + 1) * (-0.5 / (b * b))

    def to_config(self) -> dict[str, Any]:
        return super().to_config() | {"alpha": self.alpha}


@dataclass(frozen=True)
class IMQ(RationalQuadratic):
    """phi = sum_s w_s C_s / (C_s + d2), C_s = 2 b_s^2. Arguments: see `Kernel`."""

    alpha: float = field(default=1.0, init=False)

    def to_config(self) -> dict[str, Any]:
        return Kernel.to_config(self)


def _inverse_power(u: Tensor, alpha: float) -> Tensor:
    """(1 + u)^-alpha. log1p keeps the digits of u that 1 + u drops: the error of pow grows like alpha * eps."""
    if alpha == 1:
        return (1 + u).reciprocal()
    if alpha == 2:
        return (1 + u).square().reciprocal()
    return torch.exp(-alpha * torch.log1p(u))


_NAMES: dict[type[Kernel], str] = {RBF: "rbf", IMQ: "imq", RationalQuadratic: "rational_quadratic"}


def paper_pixelcnn(dim: int) -> RBF:
    """RBF with 2 b^2 = 2 D: the kernel of the InfoVAE authors' code for section 5.2 of the paper. The default here."""
    return RBF(math.sqrt(_dimension(dim)))


def paper_few_samples(dim: int) -> RBF:
    """RBF with 2 b^2 = D^2: the kernel of the authors' code for section 5.1 and of their MMD-VAE tutorial.

    It is flat for large D (1 - 2/D between two points of N(0, I)), where its gradient vanishes.
    """
    return RBF(_dimension(dim) / math.sqrt(2))


def wae_imq(dim: int, prior_std: float = 1.0) -> IMQ:
    """Sum of seven IMQ scales, C = 2 D prior_std^2 s with s in {0.1, 0.2, 0.5, 1, 2, 5, 10} (Wasserstein autoencoders).

    A sum, as published: phi(0) = 7.
    """
    if isinstance(prior_std, Sequence):
        raise TypeError(f"prior_std: got {prior_std!r}; accepted: one positive number")
    (prior_std,) = _lengths("prior_std", prior_std)
    dim, scales = _dimension(dim), (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    return IMQ([prior_std * math.sqrt(dim * s) for s in scales], weights=[1.0] * len(scales))


def cmmd() -> RBF:
    """RBF with b = 10, scaled by 1000: the CMMD image metric (Jayasumana et al., arXiv 2401.09603), on embeddings."""
    return RBF(10.0, weights=[1000.0])


def median_rbf(x: Tensor, y: Tensor | None = None, *, most: int = 1000) -> RBF:
    """RBF whose bandwidth is the median distance between two points of the joint sample (Gretton et al., 2012).

    Computed on an evenly spaced subset of at most `most` points, without a gradient and without a host
    synchronisation: the bandwidth is a 0-d tensor. The lower median, so that it is a distance that occurs.
    """
    if not is_integer(most) or most < 2:
        raise ValueError(f"most: got {most!r}; accepted: an integer, 2 points or more")
    z = _joint(x, y)
    n = min(len(z), most)
    z = z[torch.arange(n, device=z.device) * len(z) // n]  # [n, D]
    rows, columns = torch.triu_indices(n, n, 1, device=z.device)
    distances = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")[rows, columns]  # [n (n-1) / 2]
    median = distances.sort().values[(len(distances) - 1) // 2]
    if on_host(median) and not 0 < median.square() < math.inf:
        raise ValueError(
            f"median_rbf: the median distance of the points is {median.item():g}; accepted: a positive one "
            "whose square is neither 0 nor infinite: rescale the points, or give a length: RBF(1.0)"
        )
    return RBF(median)


def five_scale_rbf(x: Tensor, y: Tensor | None = None) -> RBF:
    """Sum of five RBF scales, 2 b_s^2 = m 2^(s-2), s = 0..4, m the mean squared distance of the joint sample.

    The loss most copied in domain adaptation (bandwidth multiplier 2, five kernels). No gradient flows into m and
    nothing synchronises with the host: m = 2 sum_i |z_i - mean|^2 / (n - 1).
    """
    z = _joint(x, y)
    m = 2 * (z - z.mean(0)).square().sum() / (len(z) - 1)
    if on_host(m) and not 0 < m < math.inf:
        raise ValueError(
            f"five_scale_rbf: the mean squared distance of the points is {m.item():g}; accepted: neither 0 nor "
            "infinite: rescale the points, or give bandwidths: RBF([1.0])"
        )
    factors = 2.0 ** torch.arange(-2, 3, dtype=z.dtype, device=z.device)
    return RBF((m * factors / 2).sqrt(), weights=[1.0] * 5)


# Kernels by name, for configurations: a function of both samples.
PRESETS: dict[str, Callable[[Tensor, Tensor], Kernel]] = {
    "paper_pixelcnn": lambda x, y: paper_pixelcnn(x.shape[-1]),
    "paper_few_samples": lambda x, y: paper_few_samples(x.shape[-1]),
    "wae_imq": lambda x, y: wae_imq(x.shape[-1]),
    "cmmd": lambda x, y: cmmd(),
    "median_rbf": median_rbf,
    "five_scale_rbf": five_scale_rbf,
}


def kernel_from_config(config: dict[str, Any]) -> Kernel:
    """The kernel that `Kernel.to_config` described, e.g. ``{"name": "imq", "bandwidth": [1.0, 2.0]}``.

    Raises:
        ValueError: an unknown name or key; the message lists the accepted ones.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"kernel: got {config!r}; accepted: a dict such as {{'name': 'rbf', 'bandwidth': 1.0}}")
    config = dict(config)
    classes = {name: cls for cls, name in _NAMES.items()}
    name = config.pop("name", None)
    if name not in classes:
        raise ValueError(f"kernel name: got {name!r}; accepted: " + ", ".join(map(repr, classes)))
    accepted = {"bandwidth", "weights"} | ({"alpha"} if name == "rational_quadratic" else set())
    if unknown := set(config) - accepted:
        raise ValueError(f"kernel {name!r}: unknown keys {sorted(unknown)}; accepted: {sorted(accepted)}")
    return classes[name](**config)


def _joint(x: Tensor, y: Tensor | None) -> Tensor:
    given = [x] if y is None else [x, y]
    if not all(isinstance(t, Tensor) and t.is_floating_point() for t in given):
        got = " and ".join(str(t.dtype) if isinstance(t, Tensor) else type(t).__name__ for t in given)
        raise TypeError(f"a data-dependent bandwidth needs floating-point tensors [n, D]; got {got}")
    shapes = [tuple(t.shape) for t in given]
    if any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes) or sum(map(len, given)) < 2:
        got = " and ".join(map(str, shapes))
        raise ValueError(f"a data-dependent bandwidth needs at least two points [n, D]; got shape {got}")
    z = at_least_float32(torch.cat(given).detach())  # [n, D]
    if on_host(z) and not z.isfinite().all():
        raise ValueError("a data-dependent bandwidth needs finite points; got NaN or infinity")
    return z


def _dimension(dim: int) -> int:
    if not is_integer(dim) or dim < 1:
        raise ValueError(f"dim: got {dim!r}; accepted: an integer, 1 or more")
    return dim


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer
        return False


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    sequence = values if isinstance(values, Sequence) and not isinstance(values, str) else (values,)
    if not all(isinstance(v, Real) and not isinstance(v, bool) for v in sequence):
        raise TypeError(f"{name}: got {values!r}; accepted: a number or a non-empty sequence of numbers")
    if not sequence:
        raise ValueError(f"{name}: got {values!r}; accepted: a number or a non-empty sequence of numbers")
    if not all(map(_is_finite, sequence)):
        raise ValueError(f"{name}: got {values!r}; accepted: finite numbers")
    return tuple(float(v) for v in sequence)


def _lengths(name: str, values: Any) -> tuple[float, ...]:
    numbers = _numbers(name, values)
    if not all(v > 0 and 0 < v * v < math.inf for v in numbers):
        raise ValueError(f"{name}: got {values!r}; accepted: {_ACCEPTED}")
    return numbers
