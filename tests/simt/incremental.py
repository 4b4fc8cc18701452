"""The CUDA kernels of `models.incremental` on the CPU, with the signature of the leaf op infovae_fast::draw_images."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from tests import simt

SOURCES = ("csrc/cuda/incremental.cu", "tests/simt/incremental.cpp")
SHARED = 227 << 10  # bytes that a block may have


def leaf(
    table: Tensor,
    conditions: Sequence[Tensor],
    sizes: Sequence[int],
    uniforms: Tensor | None,
    known: Tensor,
    mask: Tensor | None,
    temperature: float,
    params: bool,
    *,
    processors: int = 2,
    shared: int = SHARED,
) -> tuple[Tensor, Tensor]:
    """Outputs and workspace start as NaN: what a kernel leaves out shows."""
    return run(table, conditions, sizes, uniforms, known, mask, temperature, params, processors, shared)[:2]


def run(
    table: Tensor,
    conditions: Sequence[Tensor],
    sizes: Sequence[int],
    uniforms: Tensor | None,
    known: Tensor,
    mask: Tensor | None,
    temperature: float,
    params: bool,
    processors: int,
    shared: int,
) -> tuple[Tensor, Tensor, int]:
    """`leaf`, and the bytes of shared memory."""
    n, channels, height, width = known.shape
    maps, groups, count, *others = sizes
    x = torch.full_like(known, torch.nan, memory_format=torch.contiguous_format)
    out = x.new_full((n, count, height, width) if params else (0,), torch.nan)
    known, mask, uniforms = (None if t is None else t.contiguous() for t in (known, mask, uniforms))
    _, rows, columns, wide = conditions[0].shape
    sides = (rows * columns * wide, columns * wide, wide)
    strides = [0 if size == 1 else side for size, side in zip(conditions[0].shape, sides, strict=False)]
    library = simt.load(SOURCES)
    call = {torch.float32: library.images_float, torch.float64: library.images_double}[table.dtype]
    call.restype = ctypes.c_char_p

    def numbers(*values: int) -> ctypes.Array[ctypes.c_int64]:
        return (ctypes.c_int64 * len(values))(*values)

    def pointer(t: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(t.data_ptr() if t is not None and t.numel() else None)

    assert all(t.is_contiguous() and t.dtype == table.dtype for t in (table, known, *conditions))
    used = ctypes.c_int64()
    pointers = (ctypes.c_void_p * len(conditions))(*map(Tensor.data_ptr, conditions))
    error = call(
        numbers(n, channels, height, width, maps, groups, count, len(conditions) // 2, *others),
        pointer(table), ctypes.c_int64(table.numel()), pointers, numbers(*strides), pointer(uniforms),
        pointer(known), pointer(mask), ctypes.c_double(temperature), pointer(x), pointer(out),
        processors, ctypes.c_int64(shared), ctypes.byref(used),
    )  # fmt: skip
    if error is not None:
        raise RuntimeError(error.decode())
    return x, out, used.value
