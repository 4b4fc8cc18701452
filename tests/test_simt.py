"""The stand-in for a GPU (tests/simt): CUDA's semantics, and that it finds the mistakes that it promises to find."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.simt import HERE, build, load

SOURCE = HERE / "selftest.cu"
ORDERS = ("forward", "reverse", "shuffle", "shuffle:1")
INVALID_VALUE, INVALID_CONFIGURATION = 1, 9


@pytest.fixture(params=["", "-DSIMT_UCONTEXT"], ids=["assembly", "ucontext"])
def gpu(request):
    return load([SOURCE], [request.param] if request.param else [])


def call(function, *arguments):
    """The status; arrays go as pointers."""
    return function(*(a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a for a in arguments))


def in_orders(monkeypatch, run):
    """The results of `run` in each order."""
    results = []
    for order in ORDERS:
        monkeypatch.setenv("SIMT_ORDER", order)
        results.append(run())
    return results


def identical(results):
    assert all(other.tobytes() == results[0].tobytes() for other in results)
    return results[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "blocks", "threads"), [(1, 1, 32), (1000, 3, 96), (5000, 6, 1024)])
def test_reduction_over_warps_and_blocks(gpu, monkeypatch, n, blocks, threads, dtype):
    x = np.random.default_rng(n).normal(size=n).astype(dtype)
    function = gpu.run_sum_float if dtype == np.float32 else gpu.run_sum_double

    def run():
        out, partial, done = np.full(1, np.nan, dtype), np.full(blocks, np.nan, dtype), np.zeros(1, np.uint32)
        for _ in range(2):  # atomicInc leaves the counter as it was
            assert call(function, x, n, blocks, threads, partial, done, out) == 0 and done == 0
        return out

    out = identical(in_orders(monkeypatch, run))
    np.testing.assert_allclose(out[0], x.astype(np.float64).sum(), rtol=1e-5, atol=1e-5)


def test_dynamic_shared_memory(gpu, monkeypatch):
    x = np.random.default_rng(0).normal(size=(70, 45)).astype(np.float32)

    def run():
        out = np.full((45, 70), np.nan, np.float32)
        assert call(gpu.run_transpose, x, *x.shape, 32 * 33 * 4, out) == 0
        return out

    assert np.array_equal(identical(in_orders(monkeypatch, run)), x.T)


@pytest.mark.parametrize(("n", "distance"), [(32, 1), (32, 31), (64, 32), (1024, 512)])
def test_orders_tell_of_a_missing_barrier(gpu, monkeypatch, n, distance):
    x = np.arange(n, dtype=np.float32)

    def run(barrier):
        out = np.zeros(n, np.float32)
        assert call(gpu.run_neighbour, x, n, distance, barrier, out) == 0
        return out

    assert np.array_equal(identical(in_orders(monkeypatch, lambda: run(True))), np.roll(x, -distance))
    results = in_orders(monkeypatch, lambda: run(False))
    assert all(np.isnan(out).any() for out in results)
    assert results[0].tobytes() != results[1].tobytes()


def test_copies_are_there_when_they_were_waited_for(gpu, monkeypatch):
    x = np.arange(256, dtype=np.float32).reshape(64, 4)

    def run():
        out = np.zeros((4, 64, 4), np.float32)
        assert call(gpu.run_copies, x, out) == 0
        return out

    out = identical(in_orders(monkeypatch, run))
    for row, there in enumerate((1, 3, 4)):  # groups of one, two and one
        assert np.array_equal(out[row, :, :there], x[:, :there]) and np.isnan(out[row, :, there:]).all()
    assert np.array_equal(out[3], x)


def test_orders_are_those_of_the_blocks_too(gpu, monkeypatch):
    def run():
        ints, tickets, wide = np.zeros(4, np.int32), np.zeros(9, np.uint32), np.zeros(1, np.uint64)
        single, twice = np.zeros(1, np.float32), np.zeros(1)
        assert call(gpu.run_atomics, ints, tickets, wide, single, twice) == 0
        # No block saw shared memory that was not poisoned, static or dynamic; one thread won the exchange.
        assert ints.tolist() == [0, 95, 1, 1]
        assert (wide[0], single[0], twice[0]) == (8 * 96 << 40, 8 * 96 / 2, 8 * 96 / 4)
        return tickets[1:].tolist()

    orders = in_orders(monkeypatch, run)
    assert orders[:2] == [list(range(8)), list(range(8))[::-1]]
    assert all(sorted(order) == list(range(8)) for order in orders) and len(set(map(tuple, orders))) == len(ORDERS)


def test_warp_operations(gpu, monkeypatch):
    def run(n):
        x, out = np.arange(n, dtype=np.int32), np.zeros((11, n), np.int32)
        assert call(gpu.run_warp_operations, x, n, out) == 0
        return out

    out = identical(in_orders(monkeypatch, lambda: run(32))).tolist()
    ballots = [sum(1 << lane for lane in range(first, first + 16) if lane % 3 == 0) for first in (0, 16)]
    assert out == [
        [(lane + 5) % 32 for lane in range(32)],
        [lane // 8 * 8 + 3 for lane in range(32)],
        [lane - 3 if lane % 16 >= 3 else lane for lane in range(32)],
        [lane + 3 if lane % 16 < 13 else lane for lane in range(32)],
        [lane ^ 9 if lane & 8 else lane for lane in range(32)],  # earlier groups can be read, later ones not
        [(lane ^ 5) * 2 for lane in range(32)],
        [np.uint32(ballot).astype(np.int32) for ballot in ballots for _ in range(16)],
        [2] * 16 + [1] * 16,
        [7] * 32,
        [1] * 32,
        [16] * 7 + [-1] * 25,
    ]
    partial = run(20)[0].tolist()  # a warp of 20 lanes: what comes from the others is poison
    assert partial == [*range(5, 20), *[-1] * 5]


def test_arithmetic(gpu):
    a, b = 0.75, 3.5
    out = np.zeros(10, np.float32)
    assert call(gpu.run_arithmetic, np.array([a, b], np.float32), out) == 0
    sums = [2**a + b**-0.5 + a * b + 1 + 1 / b + a / b, np.exp(a) + np.log(b) + np.log2(b) + 1]
    np.testing.assert_allclose(out, [a, b, a, b, *sums, a + b, a, 8 + 31 + 4 + 2 + 4, 2 + 1 + 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("grid", "block", "dynamic", "limit", "status"),
    [
        ((1, 1, 1), (1024, 1, 1), 48 << 10, 0, 0),
        ((2, 65535, 1), (1, 1, 1), 0, 0, 0),
        ((1, 65536, 1), (1, 1, 1), 0, 0, INVALID_CONFIGURATION),
        ((1, 1, 65536), (1, 1, 1), 0, 0, INVALID_CONFIGURATION),
        ((0, 1, 1), (32, 1, 1), 0, 0, INVALID_CONFIGURATION),
        ((1, 1, 1), (0, 1, 1), 0, 0, INVALID_CONFIGURATION),
        ((1, 1, 1), (1025, 1, 1), 0, 0, INVALID_CONFIGURATION),
        ((1, 1, 1), (32, 33, 1), 0, 0, INVALID_CONFIGURATION),
        ((1, 1, 1), (1, 1, 65), 0, 0, INVALID_CONFIGURATION),
        ((1, 1, 1), (32, 1, 1), (48 << 10) + 1, 0, INVALID_VALUE),
        ((1, 1, 1), (32, 1, 1), 100 << 10, 100 << 10, 0),
        ((1, 1, 1), (32, 1, 1), 227 << 10, 227 << 10, 0),
        ((1, 1, 1), (32, 1, 1), 0, (227 << 10) + 1, INVALID_VALUE),
    ],
)
def test_launches_have_the_limits_of_the_device(grid, block, dynamic, limit, status):
    gpu = load([SOURCE])
    assert gpu.run_nothing((ctypes.c_int * 3)(*grid), (ctypes.c_int * 3)(*block), dynamic, limit) == status
    assert [gpu.last_error(), gpu.last_error()] == [status, 0]


def alone(code, *arguments, **environment):
    """Runs `code` in a process of its own, with the library as `gpu`."""
    script = f"import ctypes, sys; gpu = ctypes.CDLL(sys.argv[1]); {code}"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_threads_that_never_meet_abort(order):
    library, lines = build([SOURCE]), SOURCE.read_text().splitlines()

    def words(mistake):
        done = alone(f"gpu.run_diverge({mistake})", library, SIMT_ORDER=order)
        assert (done.returncode == 0) == (mistake == 0)
        places = [int(line) for line in re.findall(r"selftest\.cu:(\d+)", done.stderr)]
        assert all("__sync" in lines[place - 1] for place in places)
        return done.stderr, len(set(places))

    block = "block (0, 0, 0)" if order == "forward" else "block (0, 1, 0)"
    assert words(0) == ("", 0)
    for mistake, places, parts in [
        (1, 1, ["and 31 more: exited", "and 31 more: at"]),
        (2, 2, ["and 31 more: at", "all of the block"]),
        (3, 2, ["and 15 more: at", "all of the block", "the lanes 0xffffffff"]),
        (4, 1, ["and 15 more: exited", "the lanes 0xffffffff"]),
    ]:
        said, found = words(mistake)
        assert found == places and all(part in said for part in [block, *parts]), said
    assert "is not in its mask 0x55555555" in words(5)[0]
    assert "accepted: forward, reverse, shuffle" in alone("gpu.run_diverge(0)", library, SIMT_ORDER="sideways").stderr


def test_sanitizers_see_shared_memory():
    """The address sanitizer must be in the process from its start; the leaks are Python's."""
    library = build([SOURCE], ["-fsanitize=address,undefined", "-O0"])
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    code = "x = (ctypes.c_float * (70 * 45))(); out = (ctypes.c_float * (70 * 45))(); " + (
        "print(gpu.run_transpose(x, 70, 45, int(sys.argv[2]), out), gpu.run_neighbour(x, 64, 1, True, out))"
    )

    def run(dynamic):
        return alone(code, library, dynamic, LD_PRELOAD=runtime.strip(), ASAN_OPTIONS="detect_leaks=0")

    good, bad = run(32 * 33 * 4), run(32 * 33 * 4 - 8)
    assert good.stdout == "0 0\n" and not good.stderr, good.stderr
    assert "heap-buffer-overflow" in bad.stderr and "transpose" in bad.stderr, bad.stderr


def test_is_fast(gpu):
    rng = np.random.default_rng(0)
    x, y, out = (rng.normal(size=s).astype(np.float32) for s in ((300, 3), (517, 3), (300,)))
    start = time.perf_counter()
    assert call(gpu.run_pairwise, x, y, 300, 517, out) == 0
    assert time.perf_counter() - start < 1  # some milliseconds
    truth = sum(np.exp(-np.square(x - point).sum(-1, dtype=np.float64)) for point in y)
    np.testing.assert_allclose(out, truth, rtol=1e-5)


def test_helper_tells_what_the_compiler_said(tmp_path):
    source = tmp_path / "source.cpp"
    source.write_text("int one() { return ONE; }")
    with pytest.raises(RuntimeError, match=r"ONE.* was not declared"):
        load([source])
    assert build([source], ["-DONE=1"]) == build([source], ("-DONE=1",)) != build([source], ["-DONE=1", "-O0"])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_selftest_is_cuda():
    command = ["nvcc", "-c", "-std=c++17", "-arch=sm_90", str(SOURCE), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
