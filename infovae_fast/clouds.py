"""What the losses accept: clouds of points, weights of the points, kernels in their several forms; finite results."""

import math
from collections.abc import Callable
from copy import copy
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from infovae_fast.backends import on_host
from infovae_fast.radial import PRESETS, RBF, Kernel

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KernelLike = Kernel | Callable[[Tensor, Tensor], Kernel] | str | None


def as_cloud(**clouds: Tensor | None) -> tuple[Any, ...]:
    """The named tensors, checked: non-empty floating-point [..., N, D] that agree with the first in all but N.

    All but the first may be None. Where half precision meets float32 (a network under autocast and its prior) all
    become float32.

    Raises:
        TypeError: not a tensor, not floating point, or another dtype than the first.
        ValueError: fewer than two dimensions, no points, another D, batch or device than the first.
    """
    first, *others = clouds
    x = clouds[first]
    if isinstance(x, Tensor) and x.ndim == 2 and x.dtype in FLOATS and 0 not in x.shape:
        dtype, d, device = x.dtype, x.shape[1], x.device
        for name in others:  # the usual case at once: every microsecond counts at small N
            t = clouds[name]
            if not (isinstance(t, Tensor) and t.ndim == 2 and t.dtype == dtype and t.device == device):
                break
            if t.shape[1] != d or t.shape[0] == 0:
                break
        else:
            return tuple(clouds.values())
    given: dict[str, Any] = {name: t for name, t in clouds.items() if t is not None or name == first}
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}; accepted: a torch.Tensor [N, D]")
        if not t.is_floating_point():
            raise TypeError(f"{name}: got dtype {t.dtype}; accepted: floating point; convert with {name}.float()")
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: got dtype {t.dtype}; accepted: 16 bits or more; convert with {name}.float()")
    if len({t.dtype for t in given.values()}) > 1 and all(t.dtype.itemsize <= 4 for t in given.values()):
        given = {name: t.float() for name, t in given.items()}
    x = given[first]
    for name, t in given.items():
        if t.ndim < 2:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}; accepted: [N, D]; reshape with {name}.reshape(N, D)")
        if t.shape[-2] == 0 or t.shape[-1] == 0:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}; accepted: at least one point of one dimension")
        if t.dtype != x.dtype:
            raise TypeError(f"{name}: got dtype {t.dtype}, but {first} is {x.dtype}; convert one of them")
        if t.device != x.device:
            raise ValueError(f"{name}: is on {t.device}, but {first} on {x.device}; move one of them")
        if t.shape[-1] != x.shape[-1] or t.shape[:-2] != x.shape[:-2]:
            shapes = f"{name}: got shape {tuple(t.shape)}, but {first} {tuple(x.shape)}"
            raise ValueError(f"{shapes}; they may differ only in N")
    return tuple(given.get(name) for name in clouds)


def point_weights(name: str, weights: Tensor | None, z: Tensor) -> Tensor | None:
    """The weights of z's points in its dtype, but in float32 for half precision, which would not hold 1/N."""
    if weights is None:
        return None
    shape = tuple(z.shape[:-1])
    if not isinstance(weights, Tensor) or weights.shape != z.shape[:-1] or weights.device != z.device:
        at = isinstance(weights, Tensor)
        got = f"shape {tuple(weights.shape)} on {weights.device}" if at else type(weights).__name__
        raise ValueError(f"{name}: got {got}; accepted: a tensor {shape} on {z.device}")
    if weights.is_complex():
        raise TypeError(f"{name}: got {weights.dtype}; accepted: real numbers")
    return weights.to(torch.promote_types(z.dtype, torch.float32))


def samples(**clouds: Tensor) -> tuple[Tensor, ...]:
    """`as_cloud` where every tensor is needed and is one cloud, [N, D]."""
    for name, t in clouds.items():
        if t is None:
            raise TypeError(f"{name}: got None; accepted: a torch.Tensor [N, D]")
    checked = as_cloud(**clouds)
    for name, t in zip(clouds, checked, strict=True):
        if t.ndim != 2:
            shape = tuple(t.shape)
            raise ValueError(
                f"{name}: got shape {shape}; accepted: [N, D]; flatten each point with {name}.flatten(1), or take "
                "the clouds of a batch [B, N, D] with torch.func.vmap"
            )
    return checked


def refuse_non_finite(**clouds: Tensor) -> None:
    for name, t in clouds.items():
        if on_host(t) and (bad := int((~t.isfinite()).any(-1).sum())):
            raise ValueError(f"{name}: {bad} of {len(t)} points hold NaN or infinity")


def check_result(result: Tensor, **clouds: Tensor) -> None:
    """Refuses a result that is not finite; only then are the samples looked at, to say why."""
    result = result.detach()
    if on_host(result) and not (math.isfinite(result) if result.ndim == 0 else result.isfinite().all()):
        refuse_non_finite(**clouds)
        raise ValueError("squared distances or kernel values overflow: rescale the samples or change the bandwidth")


def check_kernel(kernel: KernelLike) -> KernelLike:
    if isinstance(kernel, str) and kernel not in PRESETS:
        raise ValueError(f"kernel: got {kernel!r}; accepted: a Kernel such as RBF(1.0), or " + ", ".join(PRESETS))
    if isinstance(kernel, type) or not (kernel is None or isinstance(kernel, Kernel | str) or callable(kernel)):
        raise TypeError(f"kernel: got {kernel!r}; accepted: RBF(...), IMQ(...), a name, or a function of (x, y)")
    return kernel


def kernel_of(kernel: KernelLike, x: Tensor, y: Tensor) -> Kernel:
    kernel = check_kernel(kernel)
    if isinstance(kernel, str):
        kernel = PRESETS[kernel]
    if kernel is None:
        kernel = RBF()
    if not isinstance(kernel, Kernel):
        kernel = kernel(x, y)
        if not isinstance(kernel, Kernel):
            raise TypeError(f"kernel: the function of (x, y) returned {type(kernel).__name__}; accepted: a Kernel")
    return kernel.checked().at(x.shape[-1])


class KernelModule(nn.Module):
    """A module with a kernel, whose bandwidth is the module's parameter `bandwidth` if it is an `nn.Parameter`."""

    def __init__(self, kernel: KernelLike) -> None:
        super().__init__()
        self.kernel = kernel

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "kernel":  # nn.Module would register a kernel that is a module, past the property
            type(self).kernel.fset(self, value)  # type: ignore[attr-defined]
        else:
            super().__setattr__(name, value)

    @property
    def kernel(self) -> KernelLike:
        """The kernel, its bandwidth as the module has it now: loaded, parametrized, put there by `functional_call`."""
        if (child := self._modules.get("kernel")) is not None:
            return child
        kernel = self._kernel
        if not (_learns(kernel) and self.bandwidth is not kernel.bandwidth):
            return kernel
        changed = copy(kernel)
        object.__setattr__(changed, "bandwidth", self.bandwidth)
        return changed

    @kernel.setter
    def kernel(self, kernel: KernelLike) -> None:
        kernel = check_kernel(kernel)
        self._parameters.pop("bandwidth", None)
        self._modules.pop("kernel", None)
        if isinstance(kernel, nn.Module):  # a function of (x, y) that learns
            self._modules["kernel"] = kernel
        self._kernel = None if isinstance(kernel, nn.Module) else kernel
        if _learns(kernel):
            self.bandwidth = kernel.bandwidth


def _learns(kernel: KernelLike) -> TypeGuard[Kernel]:
    return isinstance(kernel, Kernel) and isinstance(kernel.bandwidth, nn.Parameter)
