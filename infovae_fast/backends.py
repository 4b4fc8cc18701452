"""Which backend can run an operator here, and if not, why.

Every operator page holds a small table of `Backend` rows, fastest first. One predicate per row says why the row
cannot run the inputs at hand (a sentence) or that it can (`None`); the same predicate chooses, explains and raises:

* ``backend="auto"`` takes the first row that can run; it may fall back.
* a backend given by name never falls back: it runs or raises `RuntimeError` with the reason.

The environment variable ``INFOVAE_FAST_BACKEND``, read once at import, says which backend ``"auto"`` means; empty is
unset.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMES = ("cuda", "triton", "cpp", "reference")  # fastest first
AUTO = os.environ.get("INFOVAE_FAST_BACKEND") or "auto"
TRITON = find_spec("triton") is not None  # looked up once: torch.compile does not trace the search in every release


class Backend(NamedTuple):
    """One row of an operator's table: `reason(*inputs)` is `None` where `run(*inputs)` works, else why it does not."""

    name: str
    reason: Callable[..., str | None]
    run: Callable[..., Any]


def explain(operator: str, table: Sequence[Backend], *inputs: Any) -> dict[str, str | None]:
    """Why each backend cannot run these inputs; `None` for those that can. In the order in which auto tries them."""
    rows = {row.name: row for row in table}
    return {
        name: rows[name].reason(*inputs) if name in rows else f"{operator} has no {name} kernels in this version"
        for name in NAMES
    }


def choose(operator: str, table: Sequence[Backend], backend: str, *inputs: Any) -> Callable[..., Any]:
    """The `run` of the backend that serves these inputs.

    Raises:
        ValueError: `backend` is neither ``"auto"`` nor one of `NAMES`.
        RuntimeError: the named backend cannot run these inputs; the message says why and names those that can.
    """
    source, name = check_name(backend)
    for row in table:
        if name in ("auto", row.name) and row.reason(*inputs) is None:
            return row.run
    reasons = explain(operator, table, *inputs)
    available = ", ".join(other for other, reason in reasons.items() if reason is None) or "none"
    why = reasons[name] if name != "auto" else "; ".join(f"{k}: {v}" for k, v in reasons.items())
    raise RuntimeError(f"{source}={name!r} cannot run {operator}: {why}. Available here: {available}.")


def check_name(backend: str) -> tuple[str, str]:
    """Where the name comes from, and the name: INFOVAE_FAST_BACKEND's for "auto"; ValueError if it is unknown."""
    name = AUTO if backend == "auto" else backend
    source = "backend" if name == backend else "INFOVAE_FAST_BACKEND"
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{source}={name!r} is unknown; accepted: 'auto', " + ", ".join(map(repr, NAMES)))
    return source, name


_built = {"cpp": False, "cuda": False}  # and loaded


def native_missing(part: str = "cpp") -> str | None:
    """Why the native operators ("cpp" or "cuda") are not there; loads them the first time it is called."""
    if _built[part]:
        return None
    try:
        from infovae_fast import _C  # type: ignore[attr-defined, unused-ignore]
    except ImportError as error:
        return f"the C++ extension cannot be loaded ({error}); pip install --no-build-isolation -e ."
    built = getattr(_C, part)
    _built[part] = built == "built"
    return None if _built[part] else built


def transforms() -> str | None:
    """Why kernels with derivatives of their own cannot run under what PyTorch is doing, or None."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms need the reference"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives need the reference"
    return None


def on_host(t: Tensor) -> bool:
    """Whether a look at the values is free: on a GPU it would synchronise, elsewhere there may be none."""
    if t.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()


def best_device() -> torch.device:
    """The GPU, where PyTorch has CUDA and one; else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def shortcut(name: str) -> Callable[..., Any]:
    """The C++ function that does the usual case in one call, and returns None for all else; or one that always does."""
    if AUTO != "auto" or native_missing() is not None:
        return lambda *inputs: None
    from infovae_fast import _C  # type: ignore[attr-defined, unused-ignore]

    return getattr(_C, name)


def tf32_allowed() -> bool:
    """May products of float32 lose digits on a GPU? PyTorch's switch: older releases know one for all backends."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() != "highest" if precision is None else precision == "tf32"


def triton_missing() -> str | None:
    """Why Triton is not there; does not load it."""
    return None if TRITON else "triton is not installed; pip install triton"
