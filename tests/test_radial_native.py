"""phi and phi' in C++ (csrc/radial.h) and in Triton (kernels/radial.py) against the formulas in extended precision."""

import numpy as np
import pytest
import torch

from infovae_fast.__main__ import build_facts
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


def distances(dtype, device="cpu"):
    """From 0 over every magnitude to infinity; more than one thread's share."""
    spread = torch.logspace(-8, 8, 9000, dtype=dtype)
    return torch.cat([torch.tensor([0.0, 1e30, torch.inf], dtype=dtype), spread]).to(device)


def scales(mixture, dtype, device="cpu"):
    return [torch.tensor(numbers, dtype=dtype, device=device) for numbers in mixture]


@pytest.fixture
def native():
    """The op of csrc/bindings.cpp."""
    facts = build_facts()
    if facts["cpp"] != "built":
        pytest.skip(f"C++ {facts['cpp']}")
    return torch.ops.infovae_fast.radial.default


@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda m: f"S={len(m[0])}")
@pytest.mark.parametrize(("kind", "alpha"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_is_the_formula(native, dtype, kind, alpha, mixture):
    d2 = distances(dtype)
    bandwidth, weight = scales(mixture, dtype)
    check(native(d2, kind, bandwidth, weight, alpha), d2, kind, bandwidth, weight, alpha)


def test_native_takes_any_shape_and_layout(native):
    bandwidth, weight = scales(MIXTURES[1], torch.float32)
    torch.manual_seed(0)  # of one number alone the yardstick may be exact by chance
    whole = torch.rand(4, 6, 5)
    views = [whole[0, 0, 0], whole[:0], whole[:, :0, 0], whole.mT, whole[::2, 1:, ::3], whole[:1].expand(7, 6, 5)]
    for d2 in views:
        outputs = native(d2, "rbf", bandwidth, weight, 1.0)
        assert all(out.is_contiguous() for out in outputs)
        check(outputs, d2, "rbf", bandwidth, weight, 1.0)


def test_native_passes_nan_on(native):
    bandwidth, weight = scales(MIXTURES[1], torch.float32)
    for kind, alpha in KINDS:
        phi, dphi = native(torch.tensor([1.0, torch.nan]), kind, bandwidth, weight, alpha)
        assert phi.isnan().tolist() == dphi.isnan().tolist() == [False, True]


def test_native_serves_one_thread_as_many(native):
    d2, (bandwidth, weight) = distances(torch.float32), scales(MIXTURES[1], torch.float32)
    many, threads = native(d2, "rq", bandwidth, weight, 2.5), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = native(d2, "rq", bandwidth, weight, 2.5)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))


def test_native_opcheck(native):
    for dtype in DTYPES:
        torch.library.opcheck(native, (torch.rand(3, 4, dtype=dtype).T, "rq", *scales(MIXTURES[1], dtype), 2.5))


def test_native_errors_help(native):
    d2, one = torch.rand(3), torch.ones(1)
    with pytest.raises(ValueError, match="kind: got 'gauss'; accepted: 'rbf', 'rq'"):
        native(d2, "gauss", one, one, 1.0)
    with pytest.raises(ValueError, match="alpha: got 0; give a positive number"):
        native(d2, "rq", one, one, 0.0)
    with pytest.raises(ValueError, match=r"bandwidth \[2\] and weight \[1\]: give one of each per scale"):
        native(d2, "rbf", torch.ones(2), one, 1.0)
    with pytest.raises(TypeError, match="d2: got Half; accepted: float32, float64"):
        native(d2.half(), "rbf", one, one, 1.0)


def test_build_info_tells_what_was_built(native):
    from infovae_fast import _C

    facts = _C.build_info()
    assert facts["cpp"] == "built" and facts["cuda"].startswith(("built", "not built: "))
    assert facts["torch"].startswith(torch.__version__)
    assert "-O3" in facts["flags"] and "fast-math" not in facts["flags"] and facts["compiler"] and facts["commit"]


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
    d2 = distances(dtype, DEVICE)
    bandwidth, weight = scales(mixture, dtype, DEVICE)
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
    rows = compile_ahead("tests.test_radial_native", "radial_elementwise", cases)
    assert [row["sm"] for row in rows] == list(ARCHITECTURES) * len(cases)
    assert all(row["stack"] == row["local"] == 0 and row["reg"] > 0 for row in rows), rows
