"""MMD^2 between a sample and a Gaussian, with the expectations over the Gaussian taken exactly: no prior sample.

With y, y' ~ N(mean, Sigma) and an RBF of precision tau = 1 / b^2 (Rustamov, arXiv 1901.03227):

    E k(z, y)  = |I + tau Sigma|^(-1/2) exp(-tau/2 (z - mean)^T (I + tau Sigma)^-1 (z - mean))
    E k(y, y') = |I + 2 tau Sigma|^(-1/2)

RationalQuadratic, and with it IMQ, is a mixture of RBFs over the precision,

    (1 + d2 / (2 alpha b^2))^(-alpha) = E exp(-t d2 / (2 b^2)),    t ~ Gamma(alpha, rate alpha), of mean 1

so that its expectations are integrals over t alone, which 30 to 170 nodes give to 13 digits: see `_gamma_nodes`.

Everything is float64, the kernel values of the sample too. In float32 their mean would be off by up to eps/4, which
cancels between the three terms of `mmd`, but not against exact expectations.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn

from infovae_fast.arguments import number, one_of
from infovae_fast.backends import on_host
from infovae_fast.clouds import KernelLike, KernelModule, check_result, kernel_of, refuse_non_finite, samples
from infovae_fast.pairwise import energy
from infovae_fast.radial import RBF, Kernel, RationalQuadratic

Estimator = Literal["unbiased", "biased"]

ESTIMATORS = ("unbiased", "biased")


def mmd_to_normal(
    z: Tensor,
    kernel: KernelLike = None,
    estimator: Estimator = "unbiased",
    *,
    mean: Tensor | None = None,
    covariance: Tensor | float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Squared maximum mean discrepancy between z and N(mean, covariance), a scalar:

        unbiased   sum_{i != j} k(z_i, z_j) / (N (N-1)) - 2/N sum_i E k(z_i, y) + E k(y, y')
        biased     the same with i = j kept and 1/N^2: not negative, up to rounding

    What `mmd(z, y, kernel, estimator)` tends to with more and more points y of the prior: the same expectation (where
    biased, without the (phi(0) - E k(y, y')) / M of those points), a smaller variance, and a quarter of the pairs that
    M = N takes.

    Args:
        z: [N, D], floating point.
        kernel: as in `mmd`; a function of (x, y) gets (z, z).
        estimator: see above.
        mean: [D]; default zero.
        covariance: a variance (a number or a tensor []), variances [D], or a symmetric positive definite matrix [D, D];
            default the identity.
        backend: of the sum over pairs, "auto" or one of `infovae_fast.backends.NAMES`.

    Returns:
        MMD^2 in z's dtype (float32 for half precision), differentiable to z, mean, variances and a tensor bandwidth.
        RBF needs memory O(N D), the others O(N (D + 170)).

    Raises:
        TypeError, ValueError: as `mmd`, and for a mean or covariance of another type, shape or device, not finite, not
        positive definite, or a matrix that needs a gradient.
        RuntimeError: the named backend cannot run these inputs.
    """
    (z,) = samples(z=z)
    one_of("estimator", estimator, ESTIMATORS)
    refuse_non_finite(z=z)
    n, dim = z.shape
    if estimator == "unbiased" and n < 2:
        raise ValueError("estimator='unbiased' needs two points: got N=1; or use 'biased'")
    kernel = kernel_of(kernel, z, z)
    dtype, wide = z.dtype, torch.float32 if z.device.type == "mps" else torch.float64  # MPS has no float64
    z = z.to(wide)
    if isinstance(kernel.bandwidth, Tensor):
        kernel = replace(kernel, bandwidth=kernel.bandwidth.to(wide))

    centred = z if mean is None else z - _parameter("mean", mean, [(dim,)], z)
    sigma = _parameter("covariance", 1.0 if covariance is None else covariance, [(), (dim,), (dim, dim)], z)
    if sigma.ndim == 2:
        sigma, axes = _principal(sigma)
        centred = centred @ axes
    if on_host(sigma) and not (sigma > 0).all():
        raise ValueError(f"covariance: got the variance {sigma.min().item():g} along an axis; accepted: positive ones")
    squares = centred.square()  # [N, D]
    if sigma.ndim == 0:
        squares = squares.sum(-1, keepdim=True)  # all axes are alike: one stands for all D

    if estimator == "unbiased":
        within = energy(z, kernel=kernel, weights=(1 / (n * (n - 1)), 0.0, 0.0), backend=backend)
    else:
        within = energy(z, kernel=kernel, weights=(1 / n**2, 0.0, 0.0), backend=backend) + kernel.phi0 / n
    sigma = sigma.reshape(-1)
    t, p = _nodes(kernel, z)
    across = _mean_phi(kernel, t, p, squares, sigma, dim)
    prior = _mean_phi(kernel, t, p, torch.zeros_like(squares[:1]), 2 * sigma, dim)
    value = within - 2 * across.mean() + prior.squeeze()
    check_result(value, z=z)
    return value if dtype == torch.float64 else value.float()


class NormalMMDLoss(KernelModule):
    """`mmd_to_normal` as a module: ``NormalMMDLoss(RBF(1.0))(z)``; a drop-in for `MMDLoss` where the prior is Gaussian.

    A bandwidth, mean or covariance that is an `nn.Parameter` is learned with it.
    """

    report_name = "mmd"
    mean: Tensor | None
    covariance: Tensor | float | None

    def __init__(
        self,
        kernel: KernelLike = None,
        estimator: Estimator = "unbiased",
        *,
        mean: Tensor | None = None,
        covariance: Tensor | float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(kernel)
        one_of("estimator", estimator, ESTIMATORS)
        if isinstance(covariance, Real):
            number("covariance", covariance, float, above=0)
        self.estimator, self.backend = estimator, backend
        for name, value in (("mean", mean), ("covariance", covariance)):
            if not isinstance(value, Tensor | Real | None) or (name == "mean" and isinstance(value, Real)):
                accepted = "a tensor" if name == "mean" else "a number or a tensor"
                raise TypeError(f"{name}: got {type(value).__name__}; accepted: {accepted}, or None")
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, z: Tensor, prior_sample: Tensor | None = None) -> Tensor:
        """MMD^2 of z [N, D] to the Gaussian: a scalar. A prior sample, as `MMDLoss` takes it, is not looked at."""
        return mmd_to_normal(
            z, self.kernel, self.estimator, mean=self.mean, covariance=self.covariance, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, estimator={self.estimator!r}"


def _mean_phi(kernel: Kernel, t: Tensor, p: Tensor, squares: Tensor, variances: Tensor, dim: int) -> Tensor:
    """E phi(|a + u|^2), u ~ N(0, diag variances), of squares a_d^2: [N, D], [D] -> [N].

    Where all `dim` variances are alike: of |a|^2 [N, 1] and the variance [1].
    """
    total = squares.new_zeros(len(squares))
    for b, weight in kernel.scales():
        tau = t / (b * b)
        stretch = variances[:, None] * tau  # [D, T]
        log_det = dim / len(variances) * stretch.log1p().sum(0)  # [T]
        exponent = squares @ (tau / (1 + stretch)) + log_det  # [N, T]
        total = total + weight * (torch.exp(-0.5 * exponent) @ p)
    return total


def _nodes(kernel: Kernel, like: Tensor) -> tuple[Tensor, Tensor]:
    """t [T] and p [T] such that phi(d2) = sum_k p_k exp(-t_k d2 / (2 b^2)), in like's dtype and on its device."""
    if isinstance(kernel, RBF):
        return like.new_ones(1), like.new_ones(1)
    if isinstance(kernel, RationalQuadratic):
        return _gamma_nodes(kernel.alpha, like)
    raise TypeError(f"kernel: got {type(kernel).__name__}; accepted: RBF, IMQ, RationalQuadratic")


def _gamma_nodes(alpha: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """t and p such that sum_k p_k exp(-t_k s) = (1 + s / alpha)^(-alpha), s >= 0: t ~ Gamma(alpha, rate alpha).

    The trapezoidal rule in log t. exp(-t s) only rescales the density of t, so that a step h has the same relative
    error for all s, and for a mean over any s: at most 2 sum_m |Gamma(alpha + 2 pi i m / h)| / Gamma(alpha), with this
    step below 5e-15. The last node stands for all below it, where exp(-t s) is linear in t, with their mass and their
    mean; what that costs is below 2e-14 up to s = 1e12 alpha, or to where the right side is 1e-30.
    """
    h = 0.7 / math.sqrt(alpha + 6)
    top = alpha + math.sqrt(80 * alpha) + 40  # the mass above is less than exp(-40)
    reach = 10.0 ** min(12.0, 30 / alpha)
    linear = math.exp((math.log(1e-14) + math.lgamma(alpha + 1)) / (alpha + 2))
    bottom = max(linear, alpha - math.sqrt(80 * alpha)) / reach
    steps = math.ceil(math.log(top / bottom) / h)
    log_t = math.log1p((top - alpha) / alpha) - h * torch.arange(steps + 1, dtype=like.dtype, device=like.device)
    t = log_t.exp()  # of mean 1 from here on
    log_p = alpha * _log_less_expm1(log_t)
    p = (log_p - log_p.max()).exp()
    p[-1] /= -math.expm1(-alpha * h)  # the last and all below it: two geometric series
    t[-1] *= math.expm1(-alpha * h) / math.expm1(-(alpha + 1) * h)
    return t, p / p.sum()


def _log_less_expm1(v: Tensor) -> Tensor:
    """v - (e^v - 1): near 0, where it would cancel, by its series -v^2 (1/2! + v/3! + v^2/4! + ...)."""
    small, series = v.clamp(-1, 1), torch.zeros_like(v)
    for k in range(20, 1, -1):
        series = series * small + 1 / math.factorial(k)
    return torch.where(v.abs() < 1, -v.square() * series, v - v.expm1())


def _principal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The variances [D] and the axes [D, D] (columns) of a covariance matrix."""
    if matrix.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "covariance: got a matrix that needs a gradient, which eigenvectors do not give where variances coincide; "
            "accepted: variances [D] that need one, or covariance.detach()"
        )
    if on_host(matrix) and (matrix - matrix.mT).abs().max() > 1e-5 * matrix.abs().max():
        raise ValueError("covariance: got a matrix that is not symmetric; accepted: symmetric, positive definite")
    return torch.linalg.eigh((matrix + matrix.mT) / 2)


def _parameter(name: str, value: Tensor | float, shapes: Sequence[tuple[int, ...]], z: Tensor) -> Tensor:
    number = "a number, or " if () in shapes else ""
    accepted = f"accepted: {number}a floating-point tensor of shape " + " or ".join(str(list(s)) for s in shapes)
    if () in shapes and isinstance(value, Real) and not isinstance(value, bool):
        value = z.new_full((), float(value))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; {accepted}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}; {accepted}; convert with {name}.float()")
    if tuple(value.shape) not in shapes:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; {accepted}")
    if value.device != z.device:
        raise ValueError(f"{name}: is on {value.device}, but z on {z.device}; move one of them")
    if on_host(value) and not value.isfinite().all():
        raise ValueError(f"{name}: got NaN or infinity; accepted: finite numbers")
    return value.to(z.dtype)
