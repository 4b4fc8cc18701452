"""What functions accept: tensors in float32 or better, numbers, a choice of reduction, codes."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]


def at_least_float32(t: Tensor) -> Tensor:
    """Half precision as float32; others as they are."""
    return t.float() if t.dtype.itemsize < 4 else t


def float32_or_better(**tensors: Tensor) -> list[Tensor]:
    """The tensors in their common dtype, half precision as float32; TypeError for what is no floating-point tensor."""
    dtype = torch.float32
    for name, t in tensors.items():
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}; use .float(), and / 255 for bytes")
        dtype = torch.promote_types(dtype, t.dtype)
    return [t.to(dtype) for t in tensors.values()]


def floating(name: str, t: Any) -> None:
    """TypeError unless a floating-point tensor."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = f"dtype {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name}: got {got}; accepted: a floating-point tensor (of bytes, .float() / 255)")


def is_integer(value: Any) -> bool:
    """NumPy's too, but no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def number(name: str, value: Any, kind: type[int] | type[float], above: float) -> Any:
    """The value, if it is a finite number of that kind."""
    known = is_integer(value) if kind is int else isinstance(value, Real) and not isinstance(value, bool)
    if not known or not above < value < math.inf:
        raise ValueError(f"{name} must be {'an integer' if kind is int else 'a number'} > {above}, got {value!r}")
    return value


def check_seed(name: str, value: Any) -> None:
    """ValueError unless it is an integer that every generator takes, NumPy's too."""
    if not is_integer(value) or not 0 <= value < 2**32:
        raise ValueError(f"{name}={value!r} must be an integer in 0..{2**32 - 1}")


def one_of(name: str, value: Any, accepted: Sequence[Any]) -> None:
    """ValueError unless the value is one of those."""
    if value not in accepted:
        raise ValueError(f"{name}: got {value!r}; accepted: " + ", ".join(map(repr, accepted)))


def reduced(nll: Tensor, reduction: Reduction) -> Tensor:
    """[N, ...] summed to [N], and that as asked for."""
    per_example = nll if nll.ndim == 1 else nll.flatten(1).sum(1)  # [N, ...] -> [N]
    one_of("reduction", reduction, ("none", "mean", "sum"))
    return per_example if reduction == "none" else getattr(per_example, reduction)()


def codes_of_images(z: Tensor, x: Tensor) -> None:
    """ValueError unless z [S N, D] has S codes for every image of x [N, ...]."""
    if len(z) % len(x) or not len(z) if len(x) else len(z):
        raise ValueError(f"z: got {len(z)} codes for {len(x)} images; accepted: S for every image, [S N, D]")
