"""Priors p(z) and the Gaussian posterior q(z|x).

A prior samples; where it has a density it also gives `log_prob`, its gradient `score`, and the KL divergence from a
Gaussian posterior:

    KL(q(z|x) || p(z)) = E_q [log q(z|x) - log p(z)]        in closed form for N(0, I), else by the one z drawn for it
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from infovae_fast.divergences import gaussian_kl

LOG_2PI = math.log(2 * math.pi)


class Posterior(NamedTuple):
    """q(z|x) = N(mu, diag e^logvar), one a row."""

    mu: Tensor  # [N, D]
    logvar: Tensor  # [N, D]

    def rsample(self) -> Tensor:
        """One z ~ q(z|x) a row, [N, D], differentiable to mu and logvar: z = mu + e^(logvar/2) eps."""
        return self.mu + (0.5 * self.logvar).exp() * torch.randn_like(self.mu)

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z|x) in nats, [..., N, D] -> [..., N]."""
        standard = (z - self.mu) * (-0.5 * self.logvar).exp()
        return -0.5 * (standard.square() + self.logvar + LOG_2PI).sum(-1)


class Prior(nn.Module):
    """A distribution of z in D dimensions: subclasses give `sample` and, where there is a density, `log_prob`."""

    has_density = True
    has_kl = True  # KL(q(z|x) || p(z)) is defined and finite
    is_normal = False  # N(0, I)
    _like: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim: got {dim}; accepted: 1 or more")
        self.dim = dim
        self.register_buffer("_like", torch.empty(0), persistent=False)  # follows .to(device, dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self._like.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self._like.device

    def sample(self, n: int) -> Tensor:
        """n points, [n, D], on the module's device, in its dtype or float32 where that is better."""
        raise TypeError(f"{type(self).__name__} gives no samples")

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, [..., D] -> [...]."""
        raise ValueError(f"{type(self).__name__} has no density: use alpha=1 and a divergence of samples, such as MMD")

    def score(self, z: Tensor) -> Tensor:
        """grad log p(z), [N, D] -> [N, D]."""
        with torch.inference_mode(False), torch.enable_grad():
            z = z.detach().clone().requires_grad_()  # a clone: of a tensor of inference mode there is no gradient
            return torch.autograd.grad(self.log_prob(z).sum(), z)[0]

    def kl(self, posterior: Posterior, z: Tensor) -> Tensor:
        """KL(q(z|x) || p(z)) in nats, [N]: here the estimate log q(z|x) - log p(z) at the z [N, D] drawn from q."""
        return posterior.log_prob(z) - self.log_prob(z)


class StandardNormal(Prior):
    """N(0, I)."""

    is_normal = True

    def sample(self, n: int) -> Tensor:
        return torch.randn(n, self.dim, device=self._like.device, dtype=self._dtype)

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * (z.square() + LOG_2PI).sum(-1)

    def score(self, z: Tensor) -> Tensor:
        return -z

    def kl(self, posterior: Posterior, z: Tensor) -> Tensor:
        return gaussian_kl(posterior.mu, posterior.logvar, reduction="none")


class Uniform(Prior):
    """Uniform on [low, high]^D. KL from a Gaussian is infinite: use alpha=1."""

    has_kl = False

    def __init__(self, dim: int, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(dim)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"low and high: got {low} and {high}; accepted: finite numbers, low < high")
        self.low, self.high = low, high

    def sample(self, n: int) -> Tensor:
        unit = torch.rand(n, self.dim, device=self._like.device, dtype=self._dtype)
        return self.low + (self.high - self.low) * unit

    def log_prob(self, z: Tensor) -> Tensor:
        inside = ((z >= self.low) & (z <= self.high)).all(-1)
        return torch.where(inside, z.new_full((), -self.dim * math.log(self.high - self.low)), -math.inf)

    def score(self, z: Tensor) -> Tensor:
        raise ValueError("a uniform prior has no score (its density has jumps): use MMD or an adversarial divergence")


class GaussianMixture(Prior):
    """sum_k w_k N(m_k, diag s_k^2).

    Args:
        means: [K, D]. stds: [K, D], [K] or a number. weights: [K], normalised to sum 1; default equal.
    """

    means: Tensor
    stds: Tensor
    log_weights: Tensor

    def __init__(self, means: Any, stds: Any = 1.0, weights: Sequence[float] | None = None) -> None:
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        means, stds = (torch.as_tensor(t, dtype=dtype) for t in (means, stds))
        if means.ndim != 2 or len(means) == 0:
            raise ValueError(f"means: got shape {tuple(means.shape)}; accepted: [K, D]")
        k, dim = means.shape
        super().__init__(dim)
        try:
            stds = (stds[:, None] if stds.ndim == 1 else stds).expand_as(means).clone()
        except RuntimeError:
            got = tuple(stds.shape)
            raise ValueError(f"stds: got shape {got}; accepted: a number, [{k}] or [{k}, {dim}]") from None
        w = torch.ones(k) if weights is None else torch.as_tensor(weights, dtype=dtype)
        if w.shape != (k,):
            raise ValueError(f"weights: got shape {tuple(w.shape)}; accepted: [K] = [{k}]")
        finite = means.isfinite().all() and stds.isfinite().all() and w.isfinite().all()
        if not finite or not (stds > 0).all() or not (w >= 0).all() or not w.sum() > 0:
            raise ValueError(
                f"got means {means.tolist()}, stds {stds.tolist()}, weights {w.tolist()}; accepted: finite numbers, "
                "stds > 0, weights >= 0 and one of them > 0"
            )
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)
        self.register_buffer("log_weights", (w / w.sum()).log())

    def sample(self, n: int) -> Tensor:
        weights = self.log_weights.to(self._dtype).exp()
        k = torch.multinomial(weights, n, replacement=True) if n else weights.new_empty(0, dtype=torch.long)
        means, stds = self.means[k].to(self._dtype), self.stds[k].to(self._dtype)
        return means + stds * torch.randn_like(means)

    def log_prob(self, z: Tensor) -> Tensor:
        return self._of_components(z)[0].logsumexp(-1)

    def score(self, z: Tensor) -> Tensor:
        log_joint, towards = self._of_components(z)
        return (log_joint.softmax(-1).unsqueeze(-1) * towards).sum(-2).to(z.dtype)

    def _of_components(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log of w_k N(z; m_k, diag s_k^2), [..., D] -> [..., K], and its gradient to z, [..., K, D]."""
        means, stds, log_weights = (t.to(self._dtype) for t in (self.means, self.stds, self.log_weights))
        standard = (z.unsqueeze(-2) - means) / stds
        log_normal = -0.5 * (standard.square() + LOG_2PI).sum(-1) - stds.log().sum(-1)
        return log_weights + log_normal, -standard / stds


class SamplerPrior(Prior):
    """A prior known by its samples alone: `sampler(n)` returns [n, D]. For alpha=1 and divergences of samples."""

    has_density = has_kl = False

    def __init__(self, dim: int, sampler: Callable[[int], Tensor]) -> None:
        super().__init__(dim)
        self.sampler = sampler

    def sample(self, n: int) -> Tensor:
        z = self.sampler(n)
        if not isinstance(z, Tensor) or z.shape != (n, self.dim):
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"the prior's sampler returned {got}; accepted: a tensor {(n, self.dim)}")
        return z.to(self._like.device, self._dtype)


PRIORS: dict[str, type[Prior]] = {"normal": StandardNormal, "uniform": Uniform, "gaussian_mixture": GaussianMixture}
