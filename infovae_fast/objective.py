"""The objective of the InfoVAE family: Eq. 6 of Zhao, Song & Ermon (arXiv 1706.02262v3), as a loss to minimise.

    loss = E_q[-log p(x|z)] + (1 - alpha) E KL(q(z|x) || p(z)) + (alpha + lambda - 1) D(q(z) || p(z))

All terms are means over the batch, in nats per example, so that alpha and lambda mean what they mean in the paper
(code that averages the reconstruction over pixels has weights that are smaller by the number of pixels).

    preset           alpha      lambda    D
    `elbo`           0          1         none (weight 0)        the variational autoencoder
    `beta_vae`       1 - beta   beta      none (weight 0)
    `mmd_vae`        1          1000      MMD
    `stein_vae`      1          1000      Stein surrogate        its value is no divergence, only its gradient counts
    `aae`            1          100       adversarial            Jensen-Shannon; kind="wgan-gp" is what the authors ran
    `wae`            1          10        MMD, seven-scale IMQ   Tolstikhin et al., arXiv 1711.01558
    `unregularized`  1          0         none (weight 0)        an autoencoder with a noisy code
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from infovae_fast.arguments import is_integer
from infovae_fast.divergences import AdversarialLoss, MMDLoss, SteinLoss
from infovae_fast.normal_prior import NormalMMDLoss
from infovae_fast.radial import kernel_from_config


@dataclass(frozen=True)
class Terms:
    """The loss and its unweighted terms: scalars in nats per example; only `loss` carries a gradient.

    `divergence` is None where the objective has none. `divergence_name` says what it is: "mmd", "adversarial_js",
    "wasserstein", or "stein_surrogate", whose value is not a divergence (then `loss` is a surrogate as well).
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    divergence: Tensor | None
    divergence_name: str

    def as_dict(self) -> dict[str, Tensor]:
        """The terms by name, the divergence under its own."""
        terms = {"loss": self.loss, "reconstruction": self.reconstruction, "kl": self.kl}
        return terms if self.divergence is None else terms | {self.divergence_name: self.divergence}


class Objective(nn.Module):
    """Eq. 6 with any alpha, lambda and divergence.

    Args:
        alpha: the weight of the KL term is 1 - alpha. Above 1 it rewards distance from the prior: a warning.
        lambda_: the weight of the divergence is alpha + lambda - 1.
        divergence: a module of (z, prior sample), such as `MMDLoss()` or `AdversarialLoss(dim)`; a `SteinLoss`, which
            is given the prior's score instead; a `NormalMMDLoss`, which knows the prior; or None where the weight is 0.
            Evaluated for the report, without a gradient, where the weight is 0.
        prior_samples: how many points of the prior to compare with; default as many as the batch has.
        allow_negative: accept a negative weight of the divergence, which rewards mismatch with the prior.

    `strength`, None or a tensor [] on the model's device, is a factor of both weights, for a warm-up from 0 to 1. (A
    CUDA graph reads the tensor anew at every replay; alpha and lambda_ it keeps as they were.)

    Raises:
        TypeError: not a number, not a module.
        ValueError: not finite; a negative weight of the divergence; a weight without a divergence.
    """

    strength: Tensor | None = None

    def __init__(
        self,
        alpha: float = 1.0,
        lambda_: float = 1000.0,
        divergence: nn.Module | None = None,
        *,
        prior_samples: int | None = None,
        allow_negative: bool = False,
    ) -> None:
        super().__init__()
        _finite(alpha=alpha, lambda_=lambda_)
        if not isinstance(divergence, nn.Module | None):
            accepted = "accepted: a module of (z, prior sample), such as MMDLoss(), or None"
            raise TypeError(f"divergence: got {divergence!r}; {accepted}")
        if prior_samples is not None and not (is_integer(prior_samples) and prior_samples >= 1):
            accepted = "accepted: an integer, 1 or more, or None for the batch size"
            raise ValueError(f"prior_samples: got {prior_samples!r}; {accepted}")
        self.alpha, self.lambda_ = float(alpha), float(lambda_)
        self.divergence, self.prior_samples = divergence, prior_samples
        if self.divergence_weight < 0 and not allow_negative:
            raise ValueError(
                f"alpha + lambda - 1 = {self.divergence_weight:g} (alpha={alpha:g}, lambda_={lambda_:g}): a negative "
                "weight rewards mismatch of q(z) and p(z); choose lambda_ >= 1 - alpha, or build "
                "Objective(..., allow_negative=True)"
            )
        if self.divergence_weight != 0 and divergence is None:
            raise ValueError(
                f"the weight of the divergence, alpha + lambda - 1, is {self.divergence_weight:g}, but there is no "
                "divergence: pass one, such as MMDLoss()"
            )
        if alpha > 1:
            warnings.warn(
                f"alpha={alpha:g} > 1 gives KL(q(z|x) || p(z)) the negative weight {1 - alpha:g}: training may diverge",
                stacklevel=2,
            )

    @property
    def kl_weight(self) -> float:
        return 1 - self.alpha

    @property
    def divergence_weight(self) -> float:
        weight = self.alpha + self.lambda_ - 1
        return 0.0 if abs(weight) < 1e-12 * (1 + abs(self.alpha) + abs(self.lambda_)) else weight

    @property
    def divergence_name(self) -> str:
        return "none" if self.divergence is None else getattr(self.divergence, "report_name", "divergence")

    def forward(self, reconstruction: Tensor, kl: Tensor | None, z: Tensor, prior: Any) -> Terms:
        """The loss of a batch.

        Args:
            reconstruction: -log p(x|z) in nats, [N].
            kl: KL(q(z|x) || p(z)) in nats, [N]; None where it is not defined, which needs alpha=1.
            z: [N, D], drawn from q(z|x).
            prior: has `sample(n)` -> [n, D]; for Stein `score(z)` instead.

        Raises:
            ValueError: another shape; no kl where it counts; a `NormalMMDLoss` whose Gaussian is not the prior.
        """
        for name, t in (("reconstruction", reconstruction), ("kl", kl)):
            if t is not None and t.shape != z.shape[:1]:
                accepted = f"accepted: {tuple(z.shape[:1])}, the sum over pixels or dimensions of each example"
                raise ValueError(f"{name}: got shape {tuple(t.shape)}; {accepted}")
        if kl is None and self.kl_weight != 0:
            raise ValueError(f"alpha={self.alpha:g} weighs the KL term, but it is not defined here; use alpha=1")
        loss = reconstruction.mean()
        if self.kl_weight != 0:
            loss = loss + self._strengthened(self.kl_weight * kl.mean())  # type: ignore[union-attr]
        divergence = None
        if self.divergence is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.divergence_weight != 0):
                divergence = self._divergence(z, prior)
            if self.divergence_weight != 0:
                loss = loss + self._strengthened(self.divergence_weight * divergence)
        return Terms(
            loss=loss,
            reconstruction=reconstruction.mean().detach(),
            kl=torch.full_like(loss.detach(), math.nan) if kl is None else kl.mean().detach(),
            divergence=None if divergence is None else divergence.detach(),
            divergence_name=self.divergence_name,
        )

    def _strengthened(self, term: Tensor) -> Tensor:
        return term if self.strength is None else self.strength * term

    def _divergence(self, z: Tensor, prior: Any) -> Tensor:
        if isinstance(self.divergence, SteinLoss):
            return self.divergence(z, prior.score)
        if isinstance(self.divergence, NormalMMDLoss):
            if self.divergence.mean is self.divergence.covariance is None and not getattr(prior, "is_normal", True):
                known = "knows N(0, I) or the mean and covariance that it is given"
                raise ValueError(f"prior: got {type(prior).__name__}, but NormalMMDLoss {known}; use MMDLoss")
            return self.divergence(z)
        return self.divergence(z, prior.sample(self.prior_samples or len(z)))  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, lambda_={self.lambda_:g}"


def elbo() -> Objective:
    """alpha = 0, lambda = 1: the evidence lower bound of the variational autoencoder."""
    return Objective(0.0, 1.0)


def beta_vae(beta: float = 4.0) -> Objective:
    """alpha = 1 - beta, lambda = beta: the KL term weighs beta, the divergence nothing."""
    _finite(beta=beta)
    if beta < 0:
        raise ValueError(f"beta: got {beta}; accepted: 0 or more")
    return Objective(1 - beta, beta)


def mmd_vae(
    lambda_: float = 1000.0,
    alpha: float = 1.0,
    *,
    kernel: Any = None,
    estimator: str = "unbiased",
    prior_samples: int | None = None,
    closed_form: bool = False,
    backend: str = "auto",
) -> Objective:
    """MMD between q(z) and p(z).

    Args:
        kernel: as in `mmd`, or a configuration such as {"name": "imq", "bandwidth": 1.0}.
        closed_form: to N(0, I) without a sample of it (`mmd_to_normal`): less noise. For that prior, and kernels that
            are RBF, IMQ or RationalQuadratic; estimator and prior_samples must be left as they are.
    """
    if closed_form:
        if prior_samples is not None or estimator != "unbiased":
            raise ValueError("closed_form: got an estimator or prior_samples too; accepted: without, as none is drawn")
        return Objective(alpha, lambda_, NormalMMDLoss(_kernel(kernel), backend=backend))
    loss = MMDLoss(_kernel(kernel), estimator, backend=backend)  # type: ignore[arg-type]
    return Objective(alpha, lambda_, loss, prior_samples=prior_samples)


def stein_vae(lambda_: float = 1000.0, alpha: float = 1.0, *, kernel: Any = None, backend: str = "auto") -> Objective:
    """The Stein variational gradient from q(z) to p(z), as a mean over the batch (see `stein_loss`)."""
    return Objective(alpha, lambda_, SteinLoss(_kernel(kernel), backend=backend))


def aae(
    dim: int, lambda_: float = 100.0, alpha: float = 1.0, *, kind: str = "js", critic_lr: float = 1e-3
) -> Objective:
    """An adversarial divergence: `AdversarialLoss` in `dim` dimensions.

    `InfoVAETraining` trains its critic; in a loop of your own, a step of it goes before every step of the model:

        critic = objective.divergence.critic_optimizer()
        z, prior = model.encode(x).rsample(), model.prior.sample(len(x))
        critic.zero_grad(); objective.divergence.critic_loss(z, prior).backward(); critic.step()
    """
    return Objective(alpha, lambda_, AdversarialLoss(dim, kind=kind, critic_lr=critic_lr))  # type: ignore[arg-type]


def wae(lambda_: float = 10.0, alpha: float = 1.0, *, kernel: Any = "wae_imq", backend: str = "auto") -> Objective:
    """The Wasserstein autoencoder's MMD penalty: the seven-scale IMQ sum, unbiased."""
    return mmd_vae(lambda_, alpha, kernel=kernel, backend=backend)


def unregularized() -> Objective:
    """alpha = 1, lambda = 0: nothing ties q(z) to the prior."""
    return Objective(1.0, 0.0)


PRESETS: dict[str, Callable[..., Objective]] = {
    preset.__name__: preset for preset in (elbo, beta_vae, mmd_vae, stein_vae, aae, wae, unregularized)
}


def objective_from_config(config: dict[str, Any] | str, dim: int) -> Objective:
    """The objective that a name or a configuration describes, e.g. {"name": "mmd_vae", "lambda_": 500}.

    Args:
        config: the name of a preset, or a dict of it and the preset's arguments.
        dim: the dimension of z.

    Raises:
        ValueError: an unknown preset or argument; the message lists the accepted ones.
    """
    options: dict[str, Any] = {"name": config} if isinstance(config, str) else dict(config)
    name = options.pop("name", None)
    if name not in PRESETS:
        raise ValueError(f"objective: got {name!r}; accepted: " + ", ".join(map(repr, PRESETS)))
    accepted = set(signature(PRESETS[name]).parameters)
    if unknown := set(options) - accepted:
        raise ValueError(f"objective {name!r}: unknown arguments {sorted(unknown)}; accepted: {sorted(accepted)}")
    if "dim" in accepted:
        options.setdefault("dim", dim)
    return PRESETS[name](**options)


def _finite(**numbers: Any) -> None:
    for name, value in numbers.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name}: got {value!r}; accepted: a number")
        if not math.isfinite(value):
            raise ValueError(f"{name}: got {value}; accepted: finite numbers")


def _kernel(kernel: Any) -> Any:
    return kernel_from_config(kernel) if isinstance(kernel, dict) else kernel
