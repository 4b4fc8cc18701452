"""How near ours comes to what this machine can do: `python -m benchmarks.bound --out benchmarks/results/NAME.jsonl`.

Value and gradient of the MMD of N = M points do 8 D N^2 flops in matrix products, if the pairs of one cloud are visited
once, and 2 N^2 exponentials; the value alone half the flops, a Stein direction 3 D N^2 and a quarter of the
exponentials. Their times at the rates that PyTorch reaches make the bound: the sum on a CPU, where both use the same
units, the longer one on a GPU. (On a CPU it binds code that takes its exponentials from PyTorch. Ours are several times
as fast, so that with few coordinates it ends before that.) A product that keeps float32's digits is float32, or three
of TF32; bfloat16 needs one. The rates are `mm` of square matrices, `exp` of what stays in the cache (on a GPU in
registers), and a copy; all take turns with ours in one process; medians.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks import pairwise
from benchmarks.clock import measure
from benchmarks.pairwise import Case
from benchmarks.rows import Results, options_of
from benchmarks.run import errors

ROUNDS = 9
CASES = {
    "cpu": (Case("rbf", 16384, 10), Case("rbf", 16384, 80)),
    "cuda": (Case("rbf", 16384, 10), Case("rbf", 65536, 10), Case("rbf", 65536, 80), Case("rbf", 65536, 512)),
}
EDGE = {"cpu": 2048, "cuda": 8192}  # of the matrices
CACHED = 2**18  # numbers whose exponentials are taken
ON_GPU, IN_A_ROW = 2**24, 256  # numbers, and exponentials of each
COPIED = {"cpu": 2**26, "cuda": 2**30}  # bytes


def ceilings(device: str) -> dict[str, tuple[float, Callable[[], Any]]]:
    """By name: the operations of a call (bytes read and written for a copy), and the call."""

    def product(dtype: torch.dtype, precision: str) -> Callable[[], Any]:
        a, b = (torch.randn(EDGE[device], EDGE[device], device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def run() -> None:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            torch.mm(a, b, out=out)
            torch.set_float32_matmul_precision(before)

        return run

    copied = torch.ones(COPIED[device] // 4, device=device)
    copy = torch.empty_like(copied)
    flops = 2.0 * EDGE[device] ** 3
    found: dict[str, tuple[float, Callable[[], Any]]] = {
        "float32": (flops, product(torch.float32, "highest")),
        "exp": exponentials(device),
        "copy": (2.0 * COPIED[device], partial(copy.copy_, copied)),
    }
    if device == "cuda":
        found["tf32"] = flops, product(torch.float32, "high")
        found["bfloat16"] = flops, product(torch.bfloat16, "highest")
    return found


def exponentials(device: str) -> tuple[float, Callable[[], Any]]:
    if device == "cpu":
        numbers = torch.randn(CACHED)
        return float(CACHED), partial(torch.exp, numbers, out=torch.empty_like(numbers))
    import triton
    import triton.language as tl

    @triton.jit
    def in_registers(numbers, COUNT: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(numbers + at)
        for _ in range(COUNT):
            x = tl.exp2(-x)  # stays between 1/2 and 1
        tl.store(numbers + at, x)

    numbers = torch.rand(ON_GPU, device=device)
    return float(ON_GPU * IN_A_ROW), lambda: in_registers[(ON_GPU // 1024,)](numbers, IN_A_ROW, 1024)


def bound(case: Case, rates: dict[str, float], device: str) -> float:
    """Seconds, of one RBF scale."""
    flops, exps = (3, 0.5) if case.what == "stein" else (8 if case.gradient else 4, 2)
    exact = max(rates["float32"], rates.get("tf32", 0) / 3)
    products = flops * case.d * case.n**2 / (rates["bfloat16"] if case.dtype == "bfloat16" else exact)
    exponentials = exps * case.n**2 / rates["exp"]
    return products + exponentials if device == "cpu" else max(products, exponentials)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    options = options_of(parser, resume=False)
    device, results = options.device, Results(options)
    ours = pairwise.IMPLEMENTATIONS[pairwise.OURS].run
    for case in CASES[device]:
        work, x_y = ceilings(device), case.inputs(device)
        found = errors(ours(case, *x_y), pairwise.truth(case, device=device))
        runs = {"ours": partial(ours, case, *x_y)} | {name: run for name, (_, run) in work.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                times[name].append(measure(run, device)[1])
        seconds = {name: median(taken) for name, taken in times.items()}
        rates = {name: operations / seconds[name] for name, (operations, _) in work.items()}
        least = bound(case, rates, device)
        reached = f"bound {least:.4g} s, {least / seconds['ours']:.0%}, error {found['error']:.1e}"
        print(f"N={case.n} D={case.d}: {seconds['ours']:.4g} s, {reached}")
        print("  " + ", ".join(f"{name} {rate / 1e9:,.1f}e9/s" for name, rate in rates.items()), flush=True)
        row = {"op": "bound", "n": case.n, "d": case.d, "seconds": seconds["ours"], "bound": least, "rates": rates}
        results.add([row | found])


if __name__ == "__main__":
    main()
