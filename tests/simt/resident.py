"""The CUDA kernels of `models.resident` on the CPU, with the signature of the leaf op infovae_fast::resident."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from tests import simt

SOURCES = ("csrc/cuda/resident.cu", "tests/simt/resident.cpp")


def leaf(
    table: Tensor, biases: Tensor, condition: Tensor | None, y: Tensor, codes: int, sizes: Sequence[int]
) -> Tensor:
    """The params start as NaN: what a kernel leaves out shows."""
    return run(table, biases, condition, y, codes, sizes)[0]


def run(
    table: Tensor, biases: Tensor, condition: Tensor | None, y: Tensor, codes: int, sizes: Sequence[int]
) -> tuple[Tensor, tuple[int, ...]]:
    """`leaf`; the bytes of shared memory, the tiles of an image, and how many behind one are waited for."""
    images, channels, height, width = y.shape
    params, layers, *others = sizes
    out = y.new_full((codes, height, width, params), torch.nan)
    call, used = simt.load(SOURCES).resident, (ctypes.c_int64 * 3)()
    call.restype = ctypes.c_char_p

    def pointer(t: Tensor | None) -> ctypes.c_void_p:
        assert t is None or t.is_contiguous()
        return ctypes.c_void_p(None if t is None else t.data_ptr())

    assert table.dtype == y.dtype and biases.dtype == torch.float32
    numbers = [codes, images, channels, height, width, params, layers, *others]
    error = call(
        ctypes.c_bool(y.dtype == torch.bfloat16), (ctypes.c_int64 * 10)(*numbers), pointer(y), pointer(table),
        ctypes.c_int64(table.numel()), pointer(condition), pointer(biases), ctypes.c_int64(biases.numel()),
        pointer(out), used,
    )  # fmt: skip
    if error is not None:
        raise RuntimeError(error.decode())
    return out.permute(0, 3, 1, 2), tuple(used)
