"""OPERATOR: -log P of a discretised logistic mixture (PixelCNN++, arXiv 1701.05517), with its gradient.

A decoder puts out `params` [N, P, *S], P = 3K for 1 channel and 10K for 3; the data are `x` [N, C, *S], C channels of
`levels` values k/(levels - 1) over the pixels S. On the scale y = 2 x - 1 the bin of a level is y +- 1/(levels - 1),
the first open below and the last above, so that the levels' probabilities sum to 1. With p and m the upper and lower
edge minus mu, divided by s, w = p - m = 2/((levels - 1) s):

    nll      = -sum_pixel log sum_k softmax(logits)_k prod_c P_kc
    log P_kc = log sigmoid(p) + log sigmoid(-m) + log(1 - e^-w)        first bin: log sigmoid(p), last: log sigmoid(-m)

No difference of sigmoids, so no cancellation and no clamp. Its derivatives, r_k being the share of component k in P and
those to the coefficients those to the means that they move:

    d nll/d logits_k = softmax(logits)_k - r_k
    d nll/d mu_kc    = r_k (sigmoid(-p) - sigmoid(m)) / s                      without p in the last bin, m in the first
    d nll/d log s_kc = r_k (p sigmoid(-p) - m sigmoid(m) + w/(e^w - 1))        the last term in neither

* params: for 1 channel K logits, K means, K log-scales. For 3 channels K logits, then per channel K means, K
  log-scales, K coefficients; with c = tanh(coefficients) of the three channels, mu_G += c_0 y_R and
  mu_B += c_1 y_R + c_2 y_G. A pixel's channels share the choice of k.
* x is rounded to the levels, half to even; values outside [0, 1] are far from every mean. NaN in, NaN out.
* Value and gradient are finite as long as (y - mu)/s is (in float32: all log-scales from -60 up, |mu| up to 1000).
* Computed and returned in float32 or better (float64 stays), under autocast too; a pixel's error is a few roundings of
  1 + its nll, and of mu / s: a component far narrower than a bin whose mean is at an edge tells its side no better. The
  sums over pixels of the fast backends are float64.

The reference is differentiable, twice, to params; x has the gradient zero. The fast backends compute the first
derivatives in the same pass as the value and keep them for the backward pass, in the layout of params; "auto" takes the
reference for the `tail` of other code, forward mode and torch.func transforms such as vmap.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from infovae_fast.arguments import Reduction, float32_or_better, number, reduced
from infovae_fast.backends import Backend, choose, native_missing, transforms, triton_missing

Tail = Literal["exact", "openai"]


def split_params(params: Tensor, data_channels: int | None = None, mixtures: int | None = None) -> tuple[Tensor, ...]:
    """Logits [N, K, *S]; means and log-scales [N, C, K, *S]; raw coefficients [N, 3, K, *S], none for one channel."""
    (params,) = float32_or_better(params=params)
    table = params.unflatten(1, (_rows(params, data_channels, mixtures), -1))
    return table[:, 0], table[:, 1::3], table[:, 2::3], table[:, 3::3]


def _rows(params: Tensor, data_channels: int | None, mixtures: int | None = None) -> int:
    """Of K numbers each. ValueError for what is no mixture."""
    for channels, rows in ((1, 3), (3, 10)):
        k, rest = divmod(params.shape[1] if params.ndim > 1 else 0, rows)
        if k and not rest and data_channels in (None, channels) and mixtures in (None, k):
            return rows
    raise ValueError(
        f"params {tuple(params.shape)} fit no mixture of {mixtures or 'K'} logistics for {data_channels or '1 or 3'} "
        "data channel(s): axis 1 must be 3 K long for 1 channel, 10 K for 3; other numbers of channels do not work"
    )


def conditional_mean(mu: Tensor, coefficients: Tensor, earlier: Sequence[Tensor]) -> Tensor:
    """The logistics' means in the channel that comes after the `earlier` ones, given those."""
    c = len(earlier)  # 1: coefficient 0; 2: coefficients 1 and 2
    return mu[:, c] + sum(coefficients[:, c * (c - 1) // 2 + j].tanh() * y for j, y in enumerate(earlier))


def logistic_mixture_reference(params: Tensor, x: Tensor, levels: int, tail: Tail = "exact") -> Tensor:
    """Plain PyTorch: nll [N]."""
    logits, mu, log_s, coefficients = split_params(params, data_channels=x.shape[1])
    halves = 2 * torch.round(x * (levels - 1)).unsqueeze(2) - (levels - 1)  # y in half bins, [N, C, 1, *S]
    y = (halves / (levels - 1)).unbind(1)
    means = torch.stack([conditional_mean(mu, coefficients, y[:c]) for c in range(len(y))], 1)  # [N, C, K, *S]
    log_bin = _log_bin(halves, means, log_s, levels - 1, tail)
    return reduced(-(logits.log_softmax(1) + log_bin.sum(1)).logsumexp(1), "none")


def _log_bin(halves: Tensor, mu: Tensor, log_s: Tensor, last: int, tail: Tail) -> Tensor:
    """log P of the bin at y = halves/last. Neighbours find the same number for the edge between them."""
    log_s = log_s.clamp(min=-7.0) if tail == "openai" else log_s
    mu, per_half = mu * last, (-log_s).exp() / last
    upper, lower = (halves + 1 - mu) * per_half, (halves - 1 - mu) * per_half
    below, above = F.logsigmoid(upper), F.logsigmoid(-lower)
    log_width = math.log(2 / last) - log_s
    if tail == "openai":
        mass, centre = upper.sigmoid() - lower.sigmoid(), (halves - mu) * per_half
        density = F.logsigmoid(centre) + F.logsigmoid(-centre) + log_width
        inner = torch.where(mass > 1e-5, mass.clamp(min=1e-12).log(), density)
    else:
        inner = below + above + _log1mexp_exp(log_width)
    return torch.where(halves == -last, below, torch.where(halves == last, above, inner))


def _log1mexp_exp(t: Tensor) -> Tensor:
    """log(1 - exp(-e^t)), finite with its gradient for t up to 88 in float32; below -60 it is t to rounding."""
    small, large = t.clamp(-60.0, 0.0).exp(), t.clamp(min=0.0).exp()
    near_zero = torch.log(-torch.expm1(-small)) + (t + 60).clamp(max=0.0)
    return torch.where(t < 0, near_zero, torch.log1p(-torch.exp(-large)))


# params, x, levels, whether the gradient is wanted. Returns nll [N] and the gradient, or an empty tensor in its place;
# csrc/bindings.cpp.
Leaf = Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor]]


def _native() -> Leaf:
    return torch.ops.infovae_fast.logistic_mixture.default


def _triton() -> Leaf:
    from infovae_fast.kernels.logistic_mixture import launch, logistic_mixture

    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return logistic_mixture if traced else launch  # which saves an op's way through PyTorch


def _cpp_reason(params: Tensor, *inputs: Any) -> str | None:
    if params.device.type != "cpu":
        return f"it runs on the CPU, and params is on {params.device}"
    return native_missing() or _leaf_reason(params, *inputs)


def _triton_reason(params: Tensor, *inputs: Any) -> str | None:
    if params.device.type != "cuda":
        return f"it runs on GPUs, and params is on {params.device}"
    return triton_missing() or _leaf_reason(params, *inputs)


def _leaf_reason(params: Tensor, x: Tensor | None = None, levels: int = 256, tail: Tail = "exact") -> str | None:
    """What no leaf does."""
    return f"tail={tail!r} is in the reference only" if tail != "exact" else transforms()


def _run_leaf(leaf: Callable[[], Leaf], params: Tensor, x: Tensor, levels: int, tail: Tail = "exact") -> Tensor:
    if torch.is_grad_enabled() and (params.requires_grad or x.requires_grad):
        return _Mixture.apply(params, x, levels, leaf())[0]
    return leaf()(params, x, levels, False)[0]


class _Mixture(torch.autograd.Function):
    """The nll by a leaf. The gradient of its pixels is an output too, so that who differentiates it ends up here."""

    @staticmethod
    def forward(ctx: Any, params: Tensor, x: Tensor, levels: int, leaf: Leaf) -> tuple[Tensor, Tensor]:
        nll, gradient = leaf(params, x, levels, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient, x)
        ctx.set_materialize_grads(False)
        return nll, gradient

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, again: Tensor | None) -> tuple[Any, ...]:
        if again is not None and not torch.compiler.is_compiling():  # it gives all gradients
            raise RuntimeError("this backend gives first derivatives; use backend='reference' to differentiate twice")
        gradient, x = ctx.saved_tensors
        need_params, need_x, *_ = ctx.needs_input_grad
        to_params = None
        if need_params and upstream is not None:
            to_params = upstream.reshape(-1, *[1] * (x.ndim - 1)) * gradient
        return to_params, torch.zeros_like(x) if need_x else None, None, None


BACKENDS = (
    Backend("triton", _triton_reason, partial(_run_leaf, _triton)),
    Backend("cpp", _cpp_reason, partial(_run_leaf, _native)),
    Backend("reference", lambda *inputs: None, logistic_mixture_reference),
)


def discretized_logistic_mixture_nll(
    params: Tensor,
    x: Tensor,
    *,
    levels: int = 256,
    tail: Tail = "exact",
    reduction: Reduction = "none",
    backend: str = "auto",
) -> Tensor:
    """-log P(x|z), every pixel a mixture of K logistics rounded to `levels` values (PixelCNN++, arXiv 1701.05517).

    Args:
        params: for 1 channel [N, 3K, *S]: K logits, K means, K log-scales. For 3 channels [N, 10K, *S]: K logits,
            then per channel K means, K log-scales, K coefficients; see the top of this page.
        x: [N, 1 or 3, *S], multiples of 1/(levels - 1) in [0, 1]; rounded to them (256 levels survive bfloat16).
        tail: "openai" is the approximation behind published numbers: log-scales clamped at -7; density times width
            for bins of probability under 1e-5, there too large by up to 2.15 nats per subpixel of 256 levels.
        reduction: "none" gives [N], "mean" and "sum" reduce over the batch.
        backend: "auto" or one of `infovae_fast.backends.NAMES`.

    Raises:
        TypeError: not a tensor, not floating point. ValueError: shapes, names, numbers.
        RuntimeError: the named backend cannot run these inputs.
    """
    params, x = float32_or_better(params=params, x=x)
    number("levels", levels, int, above=1)
    if tail not in ("exact", "openai"):
        raise ValueError(f"tail={tail!r} is unknown; accepted: 'exact', 'openai'")
    if x.ndim < 2 or params.shape[:1] + params.shape[2:] != x.shape[:1] + x.shape[2:]:
        raise ValueError(f"params {tuple(params.shape)}, x {tuple(x.shape)} must be [N, P, *S] and [N, C, *S]")
    _rows(params, data_channels=x.shape[1])  # refuses what is no mixture
    inputs = (params, x, levels, tail)
    return reduced(choose("logistic_mixture", BACKENDS, backend, *inputs)(*inputs), reduction)
