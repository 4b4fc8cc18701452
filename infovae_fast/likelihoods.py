"""p(x|z) from what a decoder puts out: Bernoulli, Gaussian, categorical, discretised logistic mixture.

A decoder maps z to `params` [N, P, *S]; the data are `x` [N, C, *S]: C channels over the axes S (none for
vectors). A likelihood says how many channels P it needs, and gives -log p(x|z) in nats per example, the mean
and samples. Given params the elements of x are independent, save the channels of one pixel under the mixture:
params[:, c::C] are those of channel c alone.

    Bernoulli           P = C         -log p = sum_e log(1 + exp(l_e)) - x_e l_e              l: the logits
    Gaussian            P = C or 2C   -log p = sum_e (x_e - m_e)^2 / (2 s_e^2) + log s_e + log(2 pi)/2
    categorical         P = levels C  -log p = sum_e logsumexp_k l_ek - l_e,level(x_e)
    logistic mixture    P = 3K, 10K   -log p = -sum_pixel logsumexp_k [log w_k + sum_c log P_kc(bin of x_c)]

* Units: nats, summed over all but the batch; reduction "none" gives [N], "mean" and "sum" reduce over the batch.
  The Gaussian's is the log of a density per unit of x and may be negative.
* Computed and returned in float32 or better (float64 stays), also under autocast and for half inputs: in bfloat16
  the mixture would be off by hundreds of nats.
* Differentiable in params, and in x except for categorical and mixture, constant inside a bin. NaN in, NaN out.
* `draw` is the inverse distribution function (a bit is 1 where u < p): the same x for the same params and uniforms in
  (0, 1). A temperature divides logits and multiplies scales and deviations: below 1 it draws likelier images.
* TypeError for anything but floating-point tensors, ValueError for shapes, names and numbers. All but the Gaussian
  need x in [0, 1]: the classes check that on the CPU (on a GPU it would wait for the host). A tensor std must be
  positive.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from infovae_fast.arguments import Reduction, float32_or_better, number, reduced
from infovae_fast.backends import on_host
from infovae_fast.logistic_mixture import conditional_mean, discretized_logistic_mixture_nll, split_params

TINY = torch.finfo(torch.float32).tiny


def bernoulli_nll(logits: Tensor, x: Tensor, reduction: Reduction = "none") -> Tensor:
    """-log p(x|z) of bits with p(x_e = 1) = sigmoid(logits_e); logits and x [N, ...] have the same shape.

    Grey x in [0, 1] gives the cross entropy: the mean of -log p over bits drawn with probabilities x.
    """
    logits, x = _same_shape(logits=logits, x=x)
    return reduced(F.binary_cross_entropy_with_logits(logits, x, reduction="none"), reduction)


def gaussian_nll(mean: Tensor, std: float | Tensor, x: Tensor, reduction: Reduction = "none") -> Tensor:
    """-log N(x; mean, std^2), with log(2 pi)/2 for every element: 720.4 nats of constant for 784 pixels.

    mean and x [N, ...] have the same shape; std is a positive number or a tensor of that shape.
    """
    if isinstance(std, Tensor):
        mean, x, std = _same_shape(mean=mean, x=x, std=std)
    else:
        (mean, x), std = _same_shape(mean=mean, x=x), number("std", std, float, above=0)
    log_std = std.log() if isinstance(std, Tensor) else math.log(std)
    return reduced(((x - mean) / std).square() / 2 + log_std + math.log(2 * math.pi) / 2, reduction)


def categorical_nll(params: Tensor, x: Tensor, *, levels: int, reduction: Reduction = "none") -> Tensor:
    """-log p(x|z), each element one of `levels` values k/(levels - 1) with probabilities softmax(logits)_k.

    Args:
        params: [N, levels C, *S], level after level: the logit of level k of channel c is channel k C + c.
        x: [N, C, *S] in [0, 1], rounded to the nearest level.
    """
    params, x = float32_or_better(params=params, x=x)
    log_p = _by_level(params, levels).log_softmax(1)  # [N, levels, C, *S]
    if log_p.shape[:1] + log_p.shape[2:] != x.shape:
        raise ValueError(f"params {tuple(params.shape)}, x {tuple(x.shape)} must be [N, {levels} C, *S] and [N, C, *S]")
    level = (x.nan_to_num() * (levels - 1)).round().clamp(0, levels - 1).long()
    return reduced((x - x).detach() - log_p.take_along_dim(level.unsqueeze(1), 1).squeeze(1), reduction)  # NaN stays


class Likelihood(Protocol):
    """What a VAE asks of its `likelihood=`, for data [N, C, *S] and params [N, channels(C), *S]."""

    name: ClassVar[str]
    joint_channels: ClassVar[bool] = False  # the channels of a pixel depend on each other, given params

    def channels(self, data_channels: int) -> int: ...  # that the decoder puts out for C data channels
    def nll(self, params: Tensor, x: Tensor) -> Tensor: ...  # [N] nats per example
    def mean(self, params: Tensor) -> Tensor: ...  # [N, C, *S] in data units, float32 or better
    def sample(self, params: Tensor, generator: Generator | None = None) -> Tensor: ...  # like mean
    def uniforms(self, data_channels: int) -> int: ...  # U that a pixel takes from `draw`
    def draw(self, params: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor: ...  # [N, U, *S] -> like mean
    def to_config(self) -> dict[str, Any]:  # plain values, for `likelihood_from_config`
        return {"name": self.name, **vars(self)}


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent bits; params [N, C, *S] are the logits. For binary images, or grey ones as probabilities."""

    name = "bernoulli"

    def channels(self, data_channels: int) -> int:
        return data_channels

    def nll(self, params: Tensor, x: Tensor) -> Tensor:
        return bernoulli_nll(params, _unit(x))

    def mean(self, params: Tensor) -> Tensor:
        return float32_or_better(params=params)[0].sigmoid()

    def sample(self, params: Tensor, generator: Generator | None = None) -> Tensor:
        p = self.mean(params)
        return torch.bernoulli(p.nan_to_num(), generator=generator) + (p - p)  # NaN stays

    def uniforms(self, data_channels: int) -> int:
        return data_channels

    def draw(self, params: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
        (logits,) = float32_or_better(params=params)
        p = (logits / usable_temperature(temperature)).sigmoid()
        return (uniforms < p).to(p.dtype) + (p - p)  # NaN stays


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Independent normals, their standard deviation fixed or learned per element.

    std a number: params [N, C, *S] are raw means. std=None: [N, 2C, *S], C raw means, then C raw deviations,
    std = min_std + sigmoid(raw) < 1 + min_std, so scale data to unit order. The floor bounds -log p, which else falls
    for ever as std goes to 0 (proposition 1 of the InfoVAE paper). The authors' code adds 0.0005 (figure 1, there
    with squash=False) or clips at 0.01 (figures 2 to 5); adding keeps the gradient that a clip loses.
    squash: mean = sigmoid(raw), for data in [0, 1]; else raw. Samples are not clipped.
    """

    name = "gaussian"
    std: float | None = None
    min_std: float = 0.01
    squash: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.squash, bool):
            raise ValueError(f"squash: got {self.squash!r}; accepted: True or False")
        number("min_std", self.min_std, float, above=0)
        number("std", 1.0 if self.std is None else self.std, float, above=0)

    def channels(self, data_channels: int) -> int:
        return data_channels if self.std is not None else 2 * data_channels

    def nll(self, params: Tensor, x: Tensor) -> Tensor:
        return gaussian_nll(*self._mean_std(params), x)

    def mean(self, params: Tensor) -> Tensor:
        return self._mean_std(params)[0]

    def sample(self, params: Tensor, generator: Generator | None = None) -> Tensor:
        mean, std = self._mean_std(params)
        return mean + std * mean.new_empty(mean.shape).normal_(generator=generator)

    def uniforms(self, data_channels: int) -> int:
        return data_channels

    def draw(self, params: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
        mean, std = self._mean_std(params)
        return mean + usable_temperature(temperature) * std * torch.special.ndtri(inside(uniforms, mean.dtype))

    def _mean_std(self, params: Tensor) -> tuple[Tensor, float | Tensor]:
        (raw,) = float32_or_better(params=params)
        std: float | Tensor | None = self.std
        if std is None:
            if raw.ndim < 2 or raw.shape[1] % 2:
                raise ValueError(f"Gaussian(std=None) needs params [N, 2C, *S], got shape {tuple(raw.shape)}")
            raw, raw_std = raw.chunk(2, dim=1)
            std = self.min_std + raw_std.sigmoid()
        return (raw.sigmoid() if self.squash else raw), std


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Independent elements of `levels` values in [0, 1], a softmax each; see `categorical_nll` for the order of P."""

    name = "categorical"
    levels: int = 256

    def __post_init__(self) -> None:
        number("levels", self.levels, int, above=1)

    def channels(self, data_channels: int) -> int:
        return self.levels * data_channels

    def nll(self, params: Tensor, x: Tensor) -> Tensor:
        return categorical_nll(params, _unit(x), levels=self.levels)

    def mean(self, params: Tensor) -> Tensor:
        p = _by_level(float32_or_better(params=params)[0], self.levels).softmax(1)  # [N, levels, C, *S]
        values = torch.linspace(0, 1, self.levels, dtype=p.dtype, device=p.device)
        return (p * values.view(-1, *[1] * (p.ndim - 2))).sum(1)

    def sample(self, params: Tensor, generator: Generator | None = None) -> Tensor:
        logits = _by_level(float32_or_better(params=params)[0], self.levels)
        level = _first_to_ring(logits, generator).squeeze(1).to(logits.dtype)
        return level / (self.levels - 1) + _none_or_nan(logits).squeeze(1)

    def uniforms(self, data_channels: int) -> int:
        return data_channels

    def draw(self, params: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
        logits = _by_level(float32_or_better(params=params)[0], self.levels)
        level = _inverse_cdf(logits, uniforms.unsqueeze(1), temperature).squeeze(1)
        return level.to(logits.dtype) / (self.levels - 1) + _none_or_nan(logits).squeeze(1)


@dataclass(frozen=True)
class DiscretizedLogisticMixture(Likelihood):
    """K logistics rounded to `levels` values in [0, 1]; see `discretized_logistic_mixture_nll`. 1 or 3 channels.

    `sample` follows that probability: k per pixel, then R, G given the drawn R, B given both, each rounded.
    `mean` is of logistics clipped but not rounded: for 1 channel within half a level of the exact mean. For 3, G and B
    see the earlier channels' means for their values: the same where nothing clips.
    """

    name = "discretized_logistic_mixture"
    joint_channels = True
    mixtures: int = 10
    levels: int = 256

    def __post_init__(self) -> None:
        number("mixtures", self.mixtures, int, above=0)
        number("levels", self.levels, int, above=1)

    def channels(self, data_channels: int) -> int:
        if data_channels not in (1, 3):
            raise ValueError(f"the logistic mixture models 1 or 3 data channels, got {data_channels}")
        return (3 if data_channels == 1 else 10) * self.mixtures

    def nll(self, params: Tensor, x: Tensor) -> Tensor:
        params, x = float32_or_better(params=params, x=_unit(x))
        split_params(params, x.shape[1] if x.ndim > 1 else None, self.mixtures)  # refuses any other K
        return discretized_logistic_mixture_nll(params, x, levels=self.levels)

    def mean(self, params: Tensor) -> Tensor:
        logits, mu, log_s, coefficients = split_params(params, mixtures=self.mixtures)
        means: list[Tensor] = []  # per channel [N, K, *S]
        for c in range(mu.shape[1]):
            # E clip(Y, -1, 1) = -1 + s [g((m + 1)/s) - g((m - 1)/s)] for logistic Y, g(u) = log(1 + exp(u))
            m, s = conditional_mean(mu, coefficients, means), log_s[:, c].clamp(-20.0, 2.0).exp()
            near = torch.maximum(torch.minimum(m, 1 + 100 * s), -1 - 100 * s)
            narrow = s * (F.softplus((near + 1) / s, threshold=30) - F.softplus((near - 1) / s, threshold=30)) - 1
            # Where that cancels: -1 + integral of P(Y > y) over (-1, 1), by Gauss's rule of three points.
            s = log_s[:, c].clamp(2.0, 80.0).exp()
            above = [((m - y) / s).sigmoid() for y in (-math.sqrt(0.6), 0.0, math.sqrt(0.6))]
            wide = (5 * above[0] + 8 * above[1] + 5 * above[2]) / 9 - 1
            means.append(torch.where(log_s[:, c] > 2.0, wide, narrow))
        return ((logits.softmax(1).unsqueeze(1) * torch.stack(means, 1)).sum(2) + 1) / 2

    def sample(self, params: Tensor, generator: Generator | None = None) -> Tensor:
        logits, *others = split_params(params, mixtures=self.mixtures)
        k = _first_to_ring(logits, generator)
        uniforms = logits.new_empty(others[0][:, :, 0].shape).uniform_(generator=generator)  # [N, C, *S]
        return self._levels(k, others, uniforms.logit()) + _none_or_nan(logits)

    def uniforms(self, data_channels: int) -> int:
        return 1 + data_channels  # of the choice of k, then of each channel

    def draw(self, params: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
        logits, *others = split_params(params, mixtures=self.mixtures)
        uniforms = inside(uniforms, logits.dtype)
        k = _inverse_cdf(logits, uniforms[:, :1], temperature)
        return self._levels(k, others, temperature * uniforms[:, 1:].logit()) + _none_or_nan(logits)

    def _levels(self, k: Tensor, others: Sequence[Tensor], noise: Tensor) -> Tensor:
        """Component k [N, 1, *S] at standard logistic noise [N, C, *S], rounded channel after channel."""
        mu, log_s, coefficients = (t.take_along_dim(k.unsqueeze(1), 2).squeeze(2) for t in others)  # [N, C, *S]
        half, drawn = (self.levels - 1) / 2, list[Tensor]()  # drawn: the levels of R, G, B
        for c in range(mu.shape[1]):
            mean = conditional_mean(mu, coefficients, [level / half - 1 for level in drawn])
            y = mean + log_s[:, c].exp() * noise[:, c]
            drawn.append(((y + 1) * half).round().clamp(0, self.levels - 1))
        return torch.stack(drawn, 1) / (self.levels - 1)


def likelihood_from_config(config: Mapping[str, Any]) -> Likelihood:
    """The inverse of `to_config`: {"name": ..., options}; ValueError, with what is accepted, for anything unknown."""
    kinds: dict[str, Any] = {kind.name: kind for kind in (Bernoulli, Gaussian, Categorical, DiscretizedLogisticMixture)}
    options = dict(config)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"likelihood name={name!r} is unknown; accepted: {', '.join(map(repr, kinds))}")
    accepted = [field.name for field in fields(kinds[name])]
    if unknown := sorted(options.keys() - accepted):
        raise ValueError(f"likelihood {name!r} has no option {unknown}; accepted: {accepted}")
    return kinds[name](**options)


def _by_level(params: Tensor, levels: int) -> Tensor:
    """[N, levels C, *S] -> [N, levels, C, *S]."""
    number("levels", levels, int, above=1)
    if params.ndim < 2 or params.shape[1] == 0 or params.shape[1] % levels:
        raise ValueError(f"params {tuple(params.shape)}: axis 1 must be {levels} C long, a logit for each level")
    return params.unflatten(1, (levels, -1))


def _first_to_ring(logits: Tensor, generator: Generator | None) -> Tensor:
    """Of K exponential clocks [N, K, ...] with rates exp(logits) the first is k with probability softmax(logits)_k."""
    return (logits - logits.new_empty(logits.shape).exponential_(generator=generator).log()).argmax(1, keepdim=True)


def _inverse_cdf(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """The k at which the cumulated softmax(logits / temperature) [N, K, ...] passes the uniforms [N, 1, ...]."""
    up_to = ((logits - logits.amax(1, keepdim=True)) / usable_temperature(temperature)).softmax(1).cumsum(1)
    return (up_to[:, :-1] <= uniforms * up_to[:, -1:]).sum(1, keepdim=True)  # of which the last is 1 but for rounding


def usable_temperature(temperature: float | Tensor) -> float:
    """The number, not below the least that float32 knows; ValueError unless it is positive and finite."""
    value = temperature.item() if isinstance(temperature, Tensor) and temperature.ndim == 0 else temperature
    return max(number("temperature", value, float, above=0), TINY)


def inside(uniforms: Tensor, dtype: torch.dtype) -> Tensor:
    """Uniforms in a dtype, still above 0 and below 1."""
    numbers = torch.finfo(dtype)
    return uniforms.to(dtype).clamp(numbers.tiny, 1 - numbers.eps / 2)


def _none_or_nan(logits: Tensor) -> Tensor:
    """0 [N, 1, ...], or NaN where a logit is."""
    return torch.where(logits.isnan().any(1, keepdim=True), logits.new_full((), math.nan), 0)


def _unit(x: Tensor) -> Tensor:
    """x; ValueError if it is seen to leave [0, 1] by more than rounding."""
    if isinstance(x, Tensor) and x.is_floating_point() and on_host(x) and x.numel():
        least, most = (t.item() for t in x.detach().aminmax())
        if least < -1e-3 or most > 1 + 1e-3:
            accepted = "in [0, 1] (x / 255 of bytes, (x + 1) / 2 of [-1, 1], x.clamp(0, 1)), or the Gaussian likelihood"
            raise ValueError(f"x: got values from {least:g} to {most:g}; accepted: {accepted}")
    return x


def _same_shape(**tensors: Tensor) -> list[Tensor]:
    converted = float32_or_better(**tensors)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if len(set(shapes.values())) > 1 or () in shapes.values():
        raise ValueError(f"{' and '.join(shapes)} must have one shape [N, ...], got {shapes}")
    return converted
