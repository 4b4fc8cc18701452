"""The CUDA kernels of `pairwise` on the CPU, with the signature of the leaf op infovae_fast::pairwise."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from tests import simt

SOURCES = ("csrc/cuda/pairwise.cu", "csrc/cuda/pairwise_products.cu", "tests/simt/pairwise.cpp")


def leaf(
    x: Tensor,
    y: Tensor | None,
    v: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    rbf: bool,
    bandwidth: Sequence[float],
    lengths: Tensor | None,
    weight: Sequence[float],
    alpha: float,
    w: Sequence[float],
    energy: bool,
    x_force: bool,
    y_force: bool,
    potentials: bool,
    processors: int = 2,
) -> tuple[Tensor, ...]:
    """Outputs start as NaN: what a kernel leaves out shows."""
    batch, (n, d) = x.shape[:-2], x.shape[-2:]
    given = [None if t is None else t.detach().contiguous() for t in (x, y, v, a, b)]
    m = 0 if y is None else y.shape[-2]

    def out(wanted: bool, *shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return torch.full((*batch, *shape) if wanted else (0,), torch.nan, dtype=dtype)

    both = y is not None
    results = (
        out(energy, dtype=torch.float64),
        out(x_force, n, d),
        out(y_force and both, m, d),
        out(potentials, n),
        out(potentials and both, m),
    )

    def pointer(t: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(t.data_ptr() if t is not None and t.numel() else None)

    def numbers(values: Sequence[float]) -> ctypes.Array[ctypes.c_double]:
        return (ctypes.c_double * len(values))(*values)

    library = simt.load(SOURCES)
    run = {torch.float32: library.pairwise_float, torch.float64: library.pairwise_double}[x.dtype]
    run.restype = ctypes.c_char_p
    lengths = None if lengths is None else lengths.double().contiguous()
    error = run(
        *map(pointer, given), *map(ctypes.c_int64, (n, m, d)), ctypes.c_bool(rbf), numbers(bandwidth), pointer(lengths),
        numbers(weight), len(weight), ctypes.c_double(alpha), numbers(w), *map(pointer, results),
        ctypes.c_int64(batch.numel()), processors,
    )  # fmt: skip
    if error is not None:
        raise RuntimeError(error.decode())
    return results
