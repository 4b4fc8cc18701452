"""Divergences between two samples, or a sample and a density: MMD, Stein, adversarial, Gaussian KL.

Each is a function and an `nn.Module`. With x ~ q [N, D], y ~ p [M, D] and a radial kernel k (see `radial`):

    MMD^2(q, p) = E k(x, x') - 2 E k(x, y) + E k(y, y')                                    `mmd`, `MMDLoss`
    phi*(z) = E_{z'~q} [ k(z', z) score(z') + grad_{z'} k(z', z) ], score = grad log p  `stein_direction`, `SteinLoss`
    KL(N(mu, diag e^logvar) || N(0, I)) = 1/2 sum_d (mu_d^2 + e^logvar_d - 1 - logvar_d)   `gaussian_kl`
    Jensen-Shannon and Wasserstein-1 through a critic network                              `AdversarialLoss`

`mmd` returns MMD squared (not MMD, not half of it). Everything returns float32 for half-precision inputs, but a critic
computes in the dtype of its parameters.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from infovae_fast.arguments import Reduction, at_least_float32, is_integer, one_of
from infovae_fast.backends import check_name, on_host, shortcut
from infovae_fast.clouds import (
    KernelLike,
    KernelModule,
    check_kernel,
    check_result,
    kernel_of,
    point_weights,
    refuse_non_finite,
    samples,
)
from infovae_fast.pairwise import energy, energy_of_clouds, force
from infovae_fast.radial import Kernel

Estimator = Literal["unbiased", "biased", "linear", "block"]
Score = Callable[[Tensor], Tensor] | Tensor | None

ESTIMATORS = ("unbiased", "biased", "linear", "block")
CHUNK = 2**15  # points between two reports of progress
FORGOTTEN = 100  # losses without a step of the critic, after which there is a warning


def mmd(
    x: Tensor,
    y: Tensor,
    kernel: KernelLike = None,
    estimator: Estimator = "unbiased",
    *,
    block_size: int | None = None,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    progress: Callable[[int, int], object] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Squared maximum mean discrepancy (Gretton et al., JMLR 13, 2012), a scalar.

        unbiased   sum_{i != i'} k(x_i, x_i') / (N (N-1)) + sum_{j != j'} k(y_j, y_j') / (M (M-1))
                   - 2 sum_ij k(x_i, y_j) / (N M)
        biased     the same with i = i' and j = j' kept, 1/N^2 and 1/M^2: up to rounding not negative, and 0 for x = y
        linear     mean over t of k(x_2t, x_2t+1) + k(y_2t, y_2t+1) - k(x_2t, y_2t+1) - k(x_2t+1, y_2t): O(N), unbiased
        block      mean of the unbiased estimate over consecutive blocks of `block_size` points (Zaremba et al., 2013)

    With weights, a_i = x_weights_i / sum x_weights in place of 1/N and b_j in place of 1/M (importance sampling):

        biased     sum_{ii'} a_i a_i' k(x_i, x_i') + sum_{jj'} b_j b_j' k(y_j, y_j') - 2 sum_ij a_i b_j k(x_i, y_j)
        unbiased   the first sum without i = i' and divided by 1 - sum_i a_i^2 > 0, likewise the second

    Args:
        x: [N, D], floating point. y: [M, D], same dtype and device.
        kernel: a `Kernel`; a function of (x, y) that returns one; a name of `radial.PRESETS`; default `RBF()`, whose
            bandwidth is sqrt(D).
        estimator: see above. "linear" and "block" need N = M and leave out the points of an incomplete pair or block.
        block_size: points a block, default floor(sqrt(N)), at least 2.
        x_weights, y_weights: [N] and [M], only their ratios count; for "biased" and "unbiased". Some may be negative,
            not their sum. None: all the same.
        progress: called as progress(done, all) along the way, for clouds that take minutes: "biased" and "unbiased",
            without weights. Memory stays O((N + M) D) where no gradient is wanted.
        backend: "auto" or one of `infovae_fast.backends.NAMES`. "linear" has no pairs: any will do.

    Returns:
        MMD^2 in x's dtype (float32 for half precision), differentiable to x, y, the weights and a tensor bandwidth; a
        second time with backend="reference".

    Raises:
        TypeError, ValueError: wrong types, shapes, dtypes, devices; unknown names; too few points for the estimator; on
        the CPU, outside `torch.compile`, also NaN or infinity in x or y (elsewhere the result is NaN).
        RuntimeError: the named backend cannot run these inputs.
    """
    if block_size is x_weights is y_weights is progress is None and not torch.compiler.is_compiling():
        value = shortcut("usual_mmd")(x, y, kernel, estimator, backend)
        if value is not None:
            return value
    x, y = samples(x=x, y=y)
    one_of("estimator", estimator, ESTIMATORS)
    if block_size is not None and estimator != "block":
        raise ValueError(f"block_size is for estimator='block', not {estimator!r}")
    if estimator in ("linear", "block") or not isinstance(kernel, Kernel | None):  # where the result might hide it
        refuse_non_finite(x=x, y=y)
    kernel = kernel_of(kernel, x, y)
    n, m = len(x), len(y)
    if estimator in ("linear", "block") and n != m:
        raise ValueError(f"estimator={estimator!r} pairs the samples up: got N={n} and M={m}; accepted: N = M")
    if estimator != "biased" and min(n, m) < 2:
        raise ValueError(f"estimator={estimator!r} needs two points of each sample: got N={n}, M={m}; or use 'biased'")
    if progress is not None and not (estimator in ("biased", "unbiased") and x_weights is y_weights is None):
        raise ValueError("progress is for estimator='biased' or 'unbiased' without weights of the points")
    if x_weights is not None or y_weights is not None:
        value = _weighted_mmd(x, y, x_weights, y_weights, kernel, estimator, backend)
    elif estimator == "biased":
        weights = (1 / n**2, -1 / (n * m), 1 / m**2)
        value = _energy(x, y, kernel, weights, backend, progress) + kernel.phi0 * (1 / n + 1 / m)
    elif estimator == "unbiased":
        weights = (1 / (n * (n - 1)), -1 / (n * m), 1 / (m * (m - 1)))
        value = _energy(x, y, kernel, weights, backend, progress)
    elif estimator == "linear":
        check_name(backend)
        value = _linear_mmd(x, y, kernel)
    else:
        value = _block_mmd(x, y, kernel, block_size, backend)
    check_result(value, x=x, y=y)
    return value if x.dtype == torch.float64 else value.float()


def _energy(
    x: Tensor,
    y: Tensor,
    kernel: Kernel,
    weights: tuple[float, float, float],
    backend: str,
    progress: Callable[[int, int], object] | None,
) -> Tensor:
    if progress is None:
        return energy_of_clouds(x, y, kernel, weights, backend)
    w_xx, w_xy, w_yy = weights
    xs, ys = x.split(CHUNK), y.split(CHUNK)
    jobs: list[tuple[Tensor, Tensor | None, tuple[float, float, float]]] = []
    for parts, w in ((xs, w_xx), (ys, w_yy)):
        jobs += [(part, None, (w, 0.0, 0.0)) for part in parts]
        jobs += [(a, b, (0.0, w, 0.0)) for a, b in itertools.combinations(parts, 2)]
    jobs += [(a, b, (0.0, w_xy, 0.0)) for a, b in itertools.product(xs, ys)]
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for done, (a, b, w_ab) in enumerate(jobs, 1):
        total = total + energy(a, b, kernel=kernel, weights=w_ab, backend=backend)
        progress(done, len(jobs))
    return total


def _weighted_mmd(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, kernel: Kernel, estimator: str, backend: str
) -> Tensor:
    if estimator not in ("biased", "unbiased"):
        raise ValueError(f"estimator={estimator!r} takes no weights of the points; accepted: 'biased', 'unbiased'")
    a, b = _normalised("x_weights", a, x), _normalised("y_weights", b, y)

    def e(x: Tensor, y: Tensor | None, a: Tensor, b: Tensor | None, weights: tuple[float, float, float]) -> Tensor:
        return energy(x, y, kernel=kernel, weights=weights, x_weights=a, y_weights=b, backend=backend)

    if estimator == "biased":
        return e(x, y, a, b, (1.0, -1.0, 1.0)) + kernel.phi0 * (a.square().sum() + b.square().sum())
    pairs_x, pairs_y = _of_pairs("x_weights", a), _of_pairs("y_weights", b)
    within_x, within_y = (e(z, None, c, None, (1.0, 0.0, 0.0)) for z, c in ((x, a), (y, b)))
    return within_x / pairs_x + within_y / pairs_y + e(x, y, a, b, (0.0, -1.0, 0.0))


def _of_pairs(name: str, a: Tensor) -> Tensor:
    """sum_{i != j} a_i a_j = 1 - sum_i a_i^2 of weights of sum 1, to all digits where one of them is nearly 1."""
    index = torch.arange(len(a), device=a.device)
    rest = a.where(index != a.detach().abs().argmax(), 0)  # a without its largest, which is 1 - r
    r = rest.sum()
    pairs = r * (2 - r) - rest.square().sum()
    if on_host(pairs) and not pairs > 0:
        ours = f"1 - the sum of squares of the weights, of sum 1, is {pairs.item():g}"
        accepted = "accepted: above 0, as with two points of positive weight and none of negative; or use 'biased'"
        raise ValueError(f"{name}: for estimator='unbiased' {ours}; {accepted}")
    return pairs


def _normalised(name: str, weights: Tensor | None, z: Tensor) -> Tensor:  # [N] -> [N] in float64, with the sum 1
    if weights is None:
        return torch.full((len(z),), 1 / len(z), dtype=torch.float64, device=z.device)
    point_weights(name, weights, z)
    total = weights.detach().double().sum()
    if on_host(total) and not 0 < total < math.inf:
        raise ValueError(f"{name}: their sum is {total.item()}; accepted: finite weights with a positive sum")
    return weights.double() / weights.double().sum()


def _linear_mmd(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    pairs = len(x) // 2 * 2
    x0, x1, y0, y1 = (s[start:pairs:2] for s in (x, y) for start in (0, 1))  # [N // 2, D]
    within = _mean_phi(kernel, x0, x1) + _mean_phi(kernel, y0, y1)
    return within - _mean_phi(kernel, x0, y1) - _mean_phi(kernel, x1, y0)


def _mean_phi(kernel: Kernel, a: Tensor, b: Tensor) -> Tensor:  # [T, D], [T, D] -> []
    return kernel.phi((at_least_float32(a) - at_least_float32(b)).square().sum(-1)).mean(dtype=torch.float64)


def _block_mmd(x: Tensor, y: Tensor, kernel: Kernel, block_size: int | None, backend: str) -> Tensor:
    n = len(x)
    size = max(2, int(n**0.5)) if block_size is None else block_size
    if not is_integer(size) or not 2 <= size <= n:
        raise ValueError(f"block_size: got {size!r}; accepted: an integer from 2 to N={n}")
    blocks = n // size
    x, y = (s[: blocks * size].unflatten(0, (blocks, size)) for s in (x, y))  # [blocks, size, D]
    within = 1 / (size * (size - 1))
    return energy(x, y, kernel=kernel, weights=(within, -1 / size**2, within), backend=backend).mean()


def stein_direction(z: Tensor, score: Score = None, kernel: KernelLike = None, *, backend: str = "auto") -> Tensor:
    """The Stein variational direction, along which the points move towards p (Liu & Wang, NeurIPS 2016):

        phi*_i = 1/N sum_j [ k(z_j, z_i) score_j + grad_{z_j} k(z_j, z_i) ]

    Args:
        z: [N, D], floating point.
        score: grad log p at the points: None (standard normal, -z), a tensor [N, D], or a function of z that gives one.
        kernel, backend: as in `mmd`; a function of (x, y) gets (z, z).

    Returns:
        [N, D] in z's dtype (float32 for half precision), without a gradient.

    Raises:
        TypeError, ValueError, RuntimeError: as `mmd`, and for a score of another shape or device.
    """
    if not torch.compiler.is_compiling():
        direction = shortcut("usual_stein")(z, score, kernel, backend)
        if direction is not None:
            return direction
    (z,) = samples(z=z)
    with torch.no_grad():
        z = at_least_float32(z.detach())
        with torch.enable_grad():  # for a function that is the gradient of a log-density
            s = z if score is None else score(z) if callable(score) else score
        if not isinstance(s, Tensor) or s.shape != z.shape or s.device != z.device:
            got = f"shape {tuple(s.shape)} on {s.device}" if isinstance(s, Tensor) else type(s).__name__
            accepted = f"a tensor {tuple(z.shape)} on {z.device}, or a function of z that gives one"
            raise ValueError(f"score: got {got}; accepted: {accepted}")
        s = s.detach().to(z.dtype)
        if not isinstance(kernel, Kernel | None):
            refuse_non_finite(z=z)
        kernel, v = kernel_of(kernel, z, z), s if score is None else -s  # minus the scores
        direction = force(z, v=v, kernel=kernel, weights=(1.0, 0.0, 0.0), backend=backend)  # [N, D], but for j = i
        direction = direction.add_(v if kernel.phi0 == 1 else kernel.phi0 * v).div_(-len(z))
    check_result(direction, z=z, score=s)
    return direction


def stein_loss(
    z: Tensor,
    score: Score = None,
    kernel: KernelLike = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    backend: str = "auto",
) -> Tensor:
    """A surrogate whose gradient descent moves z along `stein_direction`:

        loss = -1/N sum_i z_i . stop_gradient(phi*_i)          d loss / d z_i = -phi*_i / N

    The **minus** matters: appendix B of the InfoVAE paper prints plus, which moves away from p; its authors' code has
    the minus. The value is not a divergence and its size means nothing; only the gradient does.

    Args:
        reduction: "mean" over the points, as every other term of the objective is, or "sum" (the authors' code, whose
            weight is therefore N times larger).
        z, score, kernel, backend: as in `stein_direction`.

    Raises:
        TypeError, ValueError, RuntimeError: as `stein_direction`, and for an unknown reduction.
    """
    one_of("reduction", reduction, ("mean", "sum"))
    direction = stein_direction(z, score, kernel, backend=backend)
    total = -(z.to(direction.dtype) * direction).sum()
    return total / len(z) if reduction == "mean" else total


def gaussian_kl(mu: Tensor, logvar: Tensor, reduction: Reduction = "mean") -> Tensor:
    """KL(N(mu, diag e^logvar) || N(0, I)) = 1/2 sum_d (mu_d^2 + e^logvar_d - 1 - logvar_d), in nats.

    Args:
        mu, logvar: [N, D], floating point. logvar is the logarithm of the variance, not of the standard deviation.
        reduction: "mean" over the N examples, "sum", or "none".

    Returns:
        a scalar, or [N] for "none". With expm1 the rounding error is eps |logvar|, not eps, where logvar is small.

    Raises:
        TypeError, ValueError: wrong types, different shapes, an unknown reduction.
    """
    mu, logvar = samples(mu=mu, logvar=logvar)
    if mu.shape != logvar.shape:
        raise ValueError(f"mu and logvar: got shapes {tuple(mu.shape)} and {tuple(logvar.shape)}; accepted: the same")
    one_of("reduction", reduction, ("mean", "sum", "none"))
    mu, logvar = at_least_float32(mu), at_least_float32(logvar)
    kl = 0.5 * (mu.square() + (logvar.expm1() - logvar)).sum(-1)  # [N]
    return kl.mean() if reduction == "mean" else kl.sum() if reduction == "sum" else kl


class MMDLoss(KernelModule):
    """`mmd` as a module: ``MMDLoss(RBF(1.0))(x, y)``. A bandwidth that is an `nn.Parameter` is learned with it."""

    report_name = "mmd"

    def __init__(
        self,
        kernel: KernelLike = None,
        estimator: Estimator = "unbiased",
        *,
        block_size: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(kernel)
        one_of("estimator", estimator, ESTIMATORS)
        self.estimator, self.block_size, self.backend = estimator, block_size, backend

    def forward(
        self, x: Tensor, y: Tensor, *, x_weights: Tensor | None = None, y_weights: Tensor | None = None
    ) -> Tensor:
        """MMD^2 of x [N, D] and y [M, D], with weights of the points [N] and [M] if given: a scalar."""
        return mmd(
            x, y, self.kernel, self.estimator, block_size=self.block_size, x_weights=x_weights, y_weights=y_weights,
            backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, estimator={self.estimator!r}"


class SteinLoss(nn.Module):
    """`stein_loss` as a module: ``SteinLoss()(z)``, or ``SteinLoss()(z, score)`` for another density than N(0, I)."""

    report_name = "stein_surrogate"

    def __init__(
        self, kernel: KernelLike = None, *, reduction: Literal["mean", "sum"] = "mean", backend: str = "auto"
    ) -> None:
        super().__init__()
        one_of("reduction", reduction, ("mean", "sum"))
        self.kernel, self.reduction, self.backend = check_kernel(kernel), reduction, backend

    def forward(self, z: Tensor, score: Score = None) -> Tensor:
        """The surrogate of z [N, D]: a scalar."""
        return stein_loss(z, score, self.kernel, reduction=self.reduction, backend=self.backend)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, reduction={self.reduction!r}"


class AdversarialLoss(nn.Module):
    """A divergence by a critic c that is trained alongside, x ~ q [N, D] against y ~ p [M, D].

        kind        critic minimises (`critic_loss`)                                encoder minimises (`forward`)
        "js"        E softplus(-c(y)) + E softplus(c(x))                            E softplus(-c(x))
        "wgan-gp"   E c(x) - E c(y) + penalty E (|grad c(u y + (1-u) x)| - 1)^2     E c(y) - E c(x)         u ~ U(0, 1)

    "js" is the adversarial autoencoder (Makhzani et al., arXiv 1511.05644) with the non-saturating encoder loss; at the
    optimal critic, log 2 - critic_loss / 2 is the Jensen-Shannon divergence. "wgan-gp" is Gulrajani et al. (arXiv
    1704.00028), what the InfoVAE authors' code runs; its encoder loss estimates the Wasserstein-1 distance.
    In one dimension its critic can stick at the wrong sign, a local optimum of the penalty.

    `forward` gives no gradient to the critic, `critic_loss` none to x and y. Training alternates:

        critic_optimizer = loss.critic_optimizer()
        critic_optimizer.zero_grad(); loss.critic_loss(z, prior_sample).backward(); critic_optimizer.step()
        (reconstruction + weight * loss(z, prior_sample)).backward(); ...

    Args:
        dim: D; checked against the samples. May be left out if `critic` is given.
        kind: "js" or "wgan-gp".
        critic: a module [N, D] -> [N] or [N, 1]; default an MLP with two hidden layers of 512 and leaky ReLU 0.1.
        penalty: the weight of the gradient penalty. Each pair of points draws its own u.
        critic_lr, critic_betas: of the Adam optimiser that `critic_optimizer` makes.
        critic_steps: critic updates for each encoder update, for the training loop.

    Raises:
        TypeError, ValueError: wrong types, shapes, dtypes, devices, an unknown kind, neither dim nor critic.
    """

    _backwards = 0  # through `forward` since `critic_loss`

    def __init__(
        self,
        dim: int | None = None,
        *,
        kind: Literal["js", "wgan-gp"] = "js",
        critic: nn.Module | None = None,
        penalty: float = 10.0,
        critic_lr: float = 1e-4,
        critic_betas: tuple[float, float] = (0.5, 0.9),
        critic_steps: int = 1,
    ) -> None:
        super().__init__()
        one_of("kind", kind, ("js", "wgan-gp"))
        if critic is None:
            if dim is None:
                raise ValueError("AdversarialLoss needs dim (the dimension of the samples) or a critic of your own")
            critic = nn.Sequential(
                nn.Linear(dim, 512),
                nn.LeakyReLU(0.1),
                nn.Linear(512, 512),
                nn.LeakyReLU(0.1),
                nn.Linear(512, 1),
            )
        if not is_integer(critic_steps) or critic_steps < 1:
            raise ValueError(f"critic_steps: got {critic_steps!r}; accepted: an integer, 1 or more")
        if not 0 <= penalty < math.inf:
            raise ValueError(f"penalty: got {penalty!r}; accepted: 0 or more")
        self.dim, self.kind, self.critic, self.penalty = dim, kind, critic, penalty
        self.critic_lr, self.critic_betas, self.critic_steps = critic_lr, critic_betas, critic_steps

    @property
    def report_name(self) -> str:
        return "adversarial_js" if self.kind == "js" else "wasserstein"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The encoder's loss: a scalar, with a gradient to x but none to the critic."""
        x, y = self._samples(x, y)
        frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
        on_x = self._scores(functional_call(self.critic, frozen, (x,)), x)
        if self.kind == "js":
            loss = F.softplus(-on_x).mean()
        else:
            loss = self._scores(functional_call(self.critic, frozen, (y,)), y).mean() - on_x.mean()
        if loss.requires_grad and not torch.compiler.is_compiling():
            loss.register_hook(self._count)
        return loss

    def _count(self, gradient: Tensor) -> None:
        self._backwards += 1
        if self._backwards == FORGOTTEN:
            warnings.warn(
                f"AdversarialLoss: {FORGOTTEN} backward passes without a step of the critic, which the encoder's "
                "optimizer does not train: before each, take one on critic_loss (see AdversarialLoss)",
                stacklevel=1,
            )

    def critic_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The critic's loss: a scalar, with a gradient to the critic but none to x and y."""
        self._backwards = 0
        x, y = (sample.detach() for sample in self._samples(x, y))
        on_x, on_y = self._scores(self.critic(x), x), self._scores(self.critic(y), y)
        if self.kind == "js":
            return F.softplus(-on_y).mean() + F.softplus(on_x).mean()
        return on_x.mean() - on_y.mean() + self.penalty * self._gradient_penalty(x, y)

    @staticmethod
    def _scores(output: Tensor, x: Tensor) -> Tensor:  # [N] or [N, 1]
        if tuple(output.shape) not in ((len(x),), (len(x), 1)):
            raise ValueError(f"critic: got {tuple(output.shape)} for {len(x)} points; accepted: one number each, [N]")
        return at_least_float32(output)

    def _gradient_penalty(self, x: Tensor, y: Tensor) -> Tensor:
        n = min(len(x), len(y))
        u = torch.rand(n, 1, dtype=x.dtype, device=x.device)
        between = (u * y[:n] + (1 - u) * x[:n]).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)  # [n, D]
        return (at_least_float32(gradient).norm(dim=-1) - 1).square().mean()

    def _samples(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        x, y = samples(x=x, y=y)
        if self.dim is not None and x.shape[-1] != self.dim:
            raise ValueError(f"x: got shape {tuple(x.shape)}; accepted: [N, {self.dim}], the critic's dim")
        dtype = next((p.dtype for p in self.critic.parameters()), x.dtype)
        return x.to(dtype), y.to(dtype)

    def critic_optimizer(self) -> torch.optim.Optimizer:
        """Adam over the critic's parameters."""
        return torch.optim.Adam(self.critic.parameters(), lr=self.critic_lr, betas=self.critic_betas)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"
