"""phi and phi' in Triton (kernels/radial.py) against the formulas in extended precision."""

import numpy as np
import pytest
import torch

from tests.conftest import ARCHITECTURES, compile_ahead

try:
    import triton
    import triton.language as tl

    from infovae_fast.kernels.radial import radial as radial_tile
except ImportError:
    triton = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64]
KINDS = [("rbf", 1.0), ("rq", 1.0), ("rq", 0.5), ("rq", 2.5), ("rq", 30.0)]
MIXTURES = [([1.5], [1.0]), ([0.1, 1.0, 7.0], [0.5, 0.3, 0.2]), ([2.0**k for k in range(-3, 4)], [1 / 7] * 7)]


def formula(d2, kind, bandwidth, weight, alpha):
    """phi, phi' in the dtype of its arguments."""
    rate = 1 / (2 * bandwidth**2)
    if kind == "rbf":
        terms = weight * np.exp(-rate * d2[..., None])
        return terms.sum(-1), (-rate * terms).sum(-1)
    base = 1 + rate * d2[..., None] / alpha
    return (weight * base**-alpha).sum(-1), (-rate * weight * base ** (-alpha - 1)).sum(-1)


def check(outputs, d2, kind, bandwidth, weight, alpha):
    """The oracle rule: at most twice the error of the formula in the tested dtype, plus eps times the terms."""
    inputs = [t.cpu().numpy() for t in (d2, bandwidth, weight)]
    dtype = inputs[0].dtype.type
    truths = formula(*_cast(inputs, kind, alpha, np.longdouble))
    yardsticks = formula(*_cast(inputs, kind, alpha, dtype))
    for out, truth, yardstick in zip(outputs, truths, yardsticks, strict=True):
        assert out.shape == d2.shape and out.dtype == d2.dtype
        if d2.numel():
            error = np.abs(out.cpu().numpy() - truth).max()
            allowed = 2 * np.abs(yardstick - truth).max() + np.finfo(dtype).eps * np.abs(truth).max()
            assert error <= allowed, f"error {error}, allowed {allowed}"


def _cast(inputs, kind, alpha, dtype):
    d2, bandwidth, weight = (a.astype(dtype) for a in inputs)
    return d2, kind, bandwidth, weight, dtype(alpha)


def distances(dtype):
    """From 0 over every magnitude to infinity."""
    spread = torch.logspace(-8, 8, 9000, dtype=dtype)
    return torch.cat([torch.tensor([0.0, 1e30, torch.inf], dtype=dtype), spread]).to(DEVICE)


def scales(mixture, dtype):
    return [torch.tensor(numbers, dtype=dtype, device=DEVICE) for numbers in mixture]


if triton is not None:

    @triton.jit
    def radial_elementwise(
        d2,
        bandwidth,
        weight,
        phi,
        dphi,
        n,
        SCALES: tl.constexpr,
        KIND: tl.constexpr,
        ALPHA: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        p, slope = radial_tile(tl.load(d2 + i, mask=i < n, other=0.0), bandwidth, weight, SCALES, KIND, ALPHA)
        tl.store(phi + i, p, mask=i < n)
        tl.store(dphi + i, slope, mask=i < n)


needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda m: f"S={len(m[0])}")
@pytest.mark.parametrize(("kind", "alpha"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_is_the_formula(dtype, kind, alpha, mixture):
    d2 = distances(dtype)
    bandwidth, weight = scales(mixture, dtype)
    outputs = torch.full_like(d2, torch.nan), torch.full_like(d2, torch.nan)
    block = 1024
    radial_elementwise[(triton.cdiv(d2.numel(), block),)](
        d2, bandwidth, weight, *outputs, d2.numel(), SCALES=len(weight), KIND=kind, ALPHA=alpha, BLOCK=block
    )
    check(outputs, d2, kind, bandwidth, weight, alpha)


@needs_triton
def test_triton_compiles_ahead_without_spills():
    cases = [
        dict.fromkeys(("d2", "bandwidth", "weight", "phi", "dphi"), type_)
        | {"n": "i64", "SCALES": [7], "KIND": [kind], "ALPHA": [alpha], "BLOCK": [256]}
        for type_ in ("*fp32", "*fp64")
        for kind, alpha in KINDS[:4]
    ]
    rows = compile_ahead("tests.test_radial_triton", "radial_elementwise", cases)
    assert [row["sm"] for row in rows] == list(ARCHITECTURES) * len(cases)
    assert all(row["stack"] == row["local"] == 0 and row["reg"] > 0 for row in rows), rows
