"""How near ours comes to what this machine can do: `python -m benchmarks.bound --out benchmarks/results/NAME.jsonl`.

Value and gradient of the MMD of N = M points do 8 D N^2 flops in matrix products, if the pairs of one cloud are visited
once, and 2 N^2 exponentials. The bound is the time of both at the rates that PyTorch reaches: `mm` of square float32
matrices, and `exp` of what stays in the cache. All three take turns in one process; medians.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks import pairwise
from benchmarks.pairwise import Case
from benchmarks.run import machine, measure

EDGE = 2048  # of the matrices
CACHED, PASSES = 2**18, 50  # numbers whose exponentials are taken, and how often
ROUNDS = 9


def rates_and_seconds(case: Case) -> dict[str, float]:
    """{"flops": rate, "exponentials": rate, "seconds": of ours}."""
    x, y = case.inputs()
    a, b, small = torch.randn(EDGE, EDGE), torch.randn(EDGE, EDGE), torch.randn(CACHED)
    out, result = torch.empty(EDGE, EDGE), torch.empty(CACHED)

    def exponentials() -> None:
        for _ in range(PASSES):
            torch.exp(small, out=result)

    runs = (
        partial(torch.mm, a, b, out=out),
        exponentials,
        partial(pairwise.IMPLEMENTATIONS[pairwise.OURS].run, case, x, y),
    )
    times: list[list[float]] = [[], [], []]
    for _ in range(ROUNDS):
        for run, taken in zip(runs, times, strict=True):
            taken.append(measure(run)[1])
    mm, exp, ours = map(median, times)
    return {"flops": 2 * EDGE**3 / mm, "exponentials": CACHED * PASSES / exp, "seconds": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines to this file")
    options = parser.parse_args()
    for case in (Case("rbf", 16384, 10), Case("rbf", 16384, 80)):
        found = rates_and_seconds(case)
        bound = 8 * case.d * case.n**2 / found["flops"] + 2 * case.n**2 / found["exponentials"]
        row = {"op": "bound", "n": case.n, "d": case.d, **found, "bound": bound, "reached": bound / found["seconds"]}
        print(
            f"N={case.n} D={case.d}: {found['flops'] / 1e9:.0f} GFLOP/s, {found['exponentials'] / 1e9:.2f}e9 exp/s: "
            f"bound {bound:.3f} s, ours {found['seconds']:.3f} s, {row['reached']:.0%}",
            flush=True,
        )
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(row | machine()) + "\n")


if __name__ == "__main__":
    main()
