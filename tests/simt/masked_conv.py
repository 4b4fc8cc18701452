"""The CUDA kernels of `masked_conv` on the CPU: what the backend "cuda" of its page runs on a GPU."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infovae_fast.masked_conv import Link, Mask, _colours
from tests import simt

SOURCES = ("csrc/cuda/masked_conv.cu", "tests/simt/masked_conv.cpp")
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    condition: Tensor | None,
    link: Link | None,
    mask: Mask,
    keep_f: bool = False,
    *,
    exact: bool = True,
    processors: int = 2,
) -> tuple[Tensor, Tensor]:
    """As the backend "cuda", differentiable once. Results start as NaN: what a kernel leaves out shows."""
    out, f = _Conv.apply(mask, exact, processors, x, weight, bias, condition, *(link or (None, None)))
    return out, (f if mask.gate else out)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: Mask, exact: bool, processors: int, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        x, weight, bias, condition, link, link_weight = (
            None if t is None else t.detach().contiguous() for t in tensors
        )
        assert x is not None and weight is not None
        out, f = _image(x, weight.shape[2] // mask.halves), _image(x, weight.shape[2] if mask.gate else 0)
        spatial = condition is not None and condition.ndim == 4
        given = (*_rows(x, weight), bias, _pixels(condition) if spatial else condition)
        if x.numel():
            _call("conv_forward", exact, mask, x, weight, link, *given, spatial, *_rows(link, link_weight), out, f)
        ctx.save_for_backward(x, weight, link, link_weight, f)
        ctx.mask, ctx.exact, ctx.processors, ctx.condition = mask, exact, processors, condition
        ctx.set_materialize_grads(False)
        if not mask.gate:
            ctx.mark_non_differentiable(f)
        return out, f

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, extra: Tensor | None) -> tuple[Any, ...]:
        x, weight, link, link_weight, f = ctx.saved_tensors
        need_x, need_weight, need_bias, need_condition, need_link, need_matrix = ctx.needs_input_grad[3:]
        if gradient is None:
            gradient = torch.zeros_like(_image(x, weight.shape[2] // ctx.mask.halves))
        spatial = need_condition and ctx.condition.ndim == 4
        cout = weight.shape[2]
        results = (
            _image(x, x.shape[1] if need_x else 0),
            x.new_full(weight.shape if need_weight else (0,), torch.nan),
            _image(x, link.shape[1] if need_link else 0),
            x.new_full(link_weight.shape if need_matrix else (0,), torch.nan),
            _image(x, cout if spatial and ctx.mask.gate else 0),
            x.new_full((cout if need_bias else 0,), torch.nan),
            x.new_full((len(x), cout) if need_condition and not spatial else (0,), torch.nan),
        )
        if x.numel():
            pointers = (ctypes.c_void_p * 7)(*(t.data_ptr() if t.numel() else None for t in results))
            _call(
                "conv_backward", ctx.exact, ctx.mask, x, weight, link, *_rows(x, weight), *_rows(link, link_weight),
                _pixels(f) if ctx.mask.gate else None, _pixels(gradient), None if extra is None else _pixels(extra),
                pointers, ctx.processors,
            )  # fmt: skip
        else:
            for t in results:
                t.zero_()
        to_condition = (results[4] if ctx.mask.gate else gradient) if spatial else results[6]
        return (
            *(None,) * 3,
            results[0] if need_x else None,
            results[1] if need_weight else None,
            results[5] if need_bias else None,
            to_condition if need_condition else None,
            results[2] if need_link else None,
            results[3] if need_matrix else None,
        )


def run_halves(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    added_b: Tensor | None,
    mask: Mask,
    *,
    exact: bool = True,
    processors: int = 2,
) -> tuple[Tensor, Tensor]:
    """As the backend "cuda" of `masked_conv2d_halves`."""
    return _Halves.apply(mask, exact, processors, x, weight, bias, added, added_b)


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: Mask, exact: bool, processors: int, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        x, weight, bias, added, added_b = (None if t is None else t.detach().contiguous() for t in tensors)
        assert x is not None and weight is not None
        halves = _image(x, weight.shape[2] // 2), _image(x, weight.shape[2] // 2)
        more = [None if t is None else _pixels(t) for t in (added, added_b)]
        if x.numel():
            _call("halves_forward", exact, mask, x, weight, None, *_rows(x, weight), bias, *more, *halves)
        ctx.save_for_backward(x, weight)
        ctx.mask, ctx.exact, ctx.processors = mask, exact, processors
        return halves

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, need_added, need_added_b = ctx.needs_input_grad[3:]
        results = (
            _image(x, x.shape[1] if need_x else 0),
            x.new_full(weight.shape if need_weight else (0,), torch.nan),
            x.new_full((weight.shape[2] if need_bias else 0,), torch.nan),
        )
        if x.numel():
            pointers = (ctypes.c_void_p * 3)(*(t.data_ptr() if t.numel() else None for t in results))
            given = (*_rows(x, weight), *map(_pixels, gradients), pointers)
            _call("halves_backward", ctx.exact, ctx.mask, x, weight, None, *given, ctx.processors)
        else:
            for t in results:
                t.zero_()
        needed = (need_x, need_weight, need_bias, need_added, need_added_b)
        found = (*results, *gradients)
        return (*(None,) * 3, *(t if need else None for t, need in zip(found, needed, strict=True)))


def _pixels(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).contiguous()


def _rows(image: Tensor | None, matrix: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None if image is None else _pixels(image)), (None if matrix is None else matrix.contiguous())


def _image(x: Tensor, channels: int) -> Tensor:
    n, _, h, w = x.shape
    return x.new_full((n, h, w, channels), torch.nan).permute(0, 3, 1, 2)


def _call(name: str, exact: bool, mask: Mask, x: Tensor, weight: Tensor, link: Tensor | None, *arguments: Any) -> None:
    n, cin, h, w = x.shape
    links = 0 if link is None else link.shape[1]
    gate = 3 if name.startswith("halves") else {None: 0, "tanh": 1, "glu": 2}[mask.gate]
    taps = [(max(min(dy, h), -h), max(min(dx, w), -w)) for dy, dx in mask.taps]
    sizes = _numbers([n, h, w, cin, weight.shape[2], links, *_colours(mask), gate])
    call = getattr(simt.load(SOURCES), name)
    call.restype = ctypes.c_char_p
    error = call(
        NUMBERS.index(x.dtype), ctypes.c_bool(exact), sizes, _numbers([d for tap in taps for d in tap]),
        ctypes.c_int64(len(taps)), *map(_argument, arguments),
    )  # fmt: skip
    if error is not None:
        raise RuntimeError(error.decode())


def _numbers(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr() if value.numel() else None)
    return value
