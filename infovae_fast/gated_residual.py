"""OPERATORS: what stands between the convolutions of PixelCNN++ (arXiv 1701.05517), each in one pass over memory.

    elu_pair(s_1, ..)      drop(elu([t, -t])),  t = [s_1, ..] + b, with zeros around     [N, F, H, W] -> [N, 2F, H', W']
    elu_pair_through(s)    elu_pair(s), s_1, ..: who reads s on from here has both gradients added in one pass
    weights(v, g)          g v / |v| for all of v [O, I, h, w] and g [O], the norm over what an output is made of
    gated_residual(s, f)   s + g_a sigmoid(g_b),  g = f + b + U z                        [N, 2F, H, W] -> [N, F, H, W]

* b are the biases of the convolutions that made s and f, U z is one vector for an image; each may be missing.
* drop sets a number to 0 with probability p and divides the others by 1 - p. The kernels round p to 1/65536, and which
  numbers it meets is a hash of a seed that PyTorch's generator draws: no mask is kept for the backward pass.
* Results are in the dtype of s; the kernels compute in float32 or better. NaN stays NaN, in its pixel, unless a kernel
  drops it.
* The kernels want and give channels-last tensors, as the tensor cores' convolutions do.

The reference is differentiable any number of times, the kernels once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from infovae_fast.backends import AUTO, NAMES, Backend, choose, transforms, triton_missing

Pad = Sequence[int]  # zeros on the left, on the right, above, below; negative: so many pixels leave


class Operators(NamedTuple):
    """The functions of this page, positional arguments only."""

    elu_pair: Callable[[Sequence[Tensor], Tensor | None, Pad, float], Tensor]
    elu_pair_through: Callable[[Sequence[Tensor], Tensor | None, Pad, float], tuple[Tensor, ...]]
    gated_residual: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    weights: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


def elu_pair_reference(s: Sequence[Tensor], bias: Tensor | None = None, pad: Pad = (), dropout: float = 0.0) -> Tensor:
    """Plain PyTorch, for s [N, F, ...]."""
    t = torch.cat([*s], 1) if len(s) > 1 else s[0]
    t = t if bias is None else t + bias.to(t.dtype).view(-1, *[1] * (t.ndim - 2))
    t = F.elu(torch.cat([t, -t], 1))
    t = F.dropout(t, dropout) if dropout else t
    return F.pad(t, [*pad]) if any(pad) else t


def _reference_through(s: Sequence[Tensor], *options: Any) -> tuple[Tensor, ...]:
    return elu_pair_reference(s, *options), *s


def gated_residual_reference(s: Tensor, f: Tensor, bias: Tensor | None, condition: Tensor | None) -> Tensor:
    """Plain PyTorch."""
    for added in (None if bias is None else bias[None], condition):
        f = f if added is None else f + added.to(f.dtype)[:, :, None, None]
    a, b = f.chunk(2, 1)
    return s + (a * b.sigmoid()).to(s.dtype)


def weights_reference(v: Sequence[Tensor], g: Sequence[Tensor]) -> list[Tensor]:
    """Plain PyTorch; in float32 or better, as a norm in bfloat16 would be off by more than the weights."""
    wide = [torch.promote_types(t.dtype, torch.float32) for t in v]
    norms = [t.flatten(1).to(dtype).norm(dim=1) for t, dtype in zip(v, wide, strict=True)]
    scales = [(one.to(norm.dtype) / norm)[:, None, None, None] for one, norm in zip(g, norms, strict=True)]
    return [(t * scale).to(t.dtype) for t, scale in zip(v, scales, strict=True)]


def _kernels() -> Any:
    from infovae_fast.kernels import gated_residual

    return gated_residual


class _EluPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor | None, pad: Pad, dropout: float, *s: Tensor) -> tuple[Tensor, ...]:
        seed = torch.randint(2**31, (1,), device=s[0].device) if dropout else None
        ctx.save_for_backward(bias, seed, *s)
        ctx.options = tuple(pad) or (0, 0, 0, 0), dropout
        ctx.set_materialize_grads(False)
        return _kernels().elu_pair(s, bias, seed, *ctx.options), *s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *more: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None, *more
        bias, seed, *s = ctx.saved_tensors
        *to_s, to_bias = _kernels().elu_pair_gradients(upstream, s, bias, seed, *ctx.options, more)
        return None if bias is None else to_bias, None, None, *to_s


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, f: Tensor, bias: Tensor | None, condition: Tensor | None) -> Tensor:
        ctx.save_for_backward(f, bias, condition)
        return _kernels().gated_residual(s, f, bias, condition)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        f, bias, condition = ctx.saved_tensors
        to_f, to_bias, to_condition = _kernels().gated_residual_gradients(upstream, f, bias, condition)
        return upstream, to_f, None if bias is None else to_bias, None if condition is None else to_condition


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *both: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*both)
        return tuple(_kernels().normalised(both[: len(both) // 2], both[len(both) // 2 :]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        v, g = ctx.saved_tensors[: len(upstream)], ctx.saved_tensors[len(upstream) :]
        return tuple(_kernels().normalised_gradients(v, g, upstream))


def _triton_weights(v: Sequence[Tensor], g: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return _Weights.apply(*v, *g)


def _triton_through(s: Sequence[Tensor], bias: Tensor | None, pad: Pad, dropout: float) -> tuple[Tensor, ...]:
    return _EluPair.apply(bias, pad, dropout, *s)


def _triton_elu_pair(s: Sequence[Tensor], *options: Any) -> Tensor:
    return _triton_through(s, *options)[0]


def _triton_reason(s: Tensor) -> str | None:
    if s.device.type != "cuda":
        return f"it runs on GPUs, and s is on {s.device}"
    return triton_missing() or transforms()


TRITON = Operators(_triton_elu_pair, _triton_through, _GatedResidual.apply, _triton_weights)
REFERENCE = Operators(elu_pair_reference, _reference_through, gated_residual_reference, weights_reference)
BACKENDS = (
    Backend("triton", _triton_reason, TRITON),  # type: ignore[arg-type]
    Backend("reference", lambda s: None, REFERENCE),  # type: ignore[arg-type]
)


def operators(s: Tensor, backend: str = "auto") -> Operators:
    """The functions of the backend that serves s. Where "auto" means one that has none, those of the reference.

    Raises:
        ValueError: an unknown backend. RuntimeError: the named one cannot run here; the message says why.
    """
    if backend == "auto" and AUTO in NAMES and AUTO not in [row.name for row in BACKENDS]:
        backend = "reference"
    return choose("gated_residual", BACKENDS, backend, s)  # type: ignore[return-value]
