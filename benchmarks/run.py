"""Time the operators against what people write: `python -m benchmarks.run --out benchmarks/results/NAME.jsonl`.

Every row is one case and one implementation: median, 20th and 80th percentile of the seconds of value and gradient, the
memory that a call takes beyond what the process holds, and the largest error of the gradient and of the value against
float64, relative to the largest component (for large N, of some rows of the gradient alone: `pairwise.truth`).
The implementations of a case take turns in one process, the slow ones fewer, so that their ratios stand although the
machine is shared; a turn is as many calls in a row as take a millisecond, at most 200, or with --cold one. Of ours, a
result whose error is above `LARGEST_ERROR` is not timed, nor one whose value is off by more than `VALUE_ERROR` of it,
or of phi(0) / N where that is larger: about the standard deviation of an unbiased MMD.
"""

import argparse
import sys
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks import pairwise
from benchmarks.clock import measure, peak_mib
from benchmarks.rows import Inaccurate, Results, options_of

LARGEST_ERROR = {"float32": 1e-5, "bfloat16": 1e-2}  # of the gradient, relative to its largest component
VALUE_ERROR = 1e-5
LONGEST_S = 20  # of one call by its predicted cost: with a longer one the grid would take hours
MOST_ROUNDS = 50
README_S, GRID_S = 8, 3  # the time to spend on one implementation of a case


def errors(out: pairwise.Result, truth: pairwise.Result) -> dict[str, float]:
    (g, value), (g_true, value_true) = out, truth
    found = {}
    if g is not None and g_true is not None:
        g = g if len(g) == len(g_true) else g[:: len(g) // pairwise.ROWS]
        found["error"] = ((g.double() - g_true).abs().max() / g_true.abs().max()).item()
    if value is not None and value_true is not None:
        found["value_error"] = abs(value.item() / value_true.item() - 1)
    return found


def right(case: pairwise.Case, found: dict[str, float], truth: Tensor | None) -> bool:
    """Whether the errors of a result, that of the value relative to the truth, are small enough to time it."""
    size = abs(truth.item()) if truth is not None else 1.0
    allowed = VALUE_ERROR * max(size, case.kernel.phi0 / case.n)
    return found.get("error", 0.0) <= LARGEST_ERROR[case.dtype] and found.get("value_error", 0.0) * size <= allowed


def implementations(compiled: bool, device: str = "cpu") -> dict[str, pairwise.Implementation]:
    """By name, ours first, those that are installed."""
    every = pairwise.IMPLEMENTATIONS if device == "cpu" else pairwise.ON_GPU
    found = {k: i for k, i in every.items() if all(find_spec(name) for name in i.packages)}
    return found if compiled else {name: i for name, i in found.items() if name != "torch.compile"}


def feasible(case: pairwise.Case, implementation: pairwise.Implementation, most_gib: float) -> bool:
    seconds, gib = implementation.cost(case)
    fits = case.what in implementation.kernels and case.d <= implementation.most_d
    fits = fits and (case.dtype == "float32" or "pykeops" not in implementation.packages)  # KeOps has no bfloat16
    return fits and seconds <= LONGEST_S and gib <= most_gib


def bench(
    case: pairwise.Case,
    implementations: dict[str, pairwise.Implementation],
    device: str = "cpu",
    cold: bool = False,
) -> list[dict[str, Any]]:
    x, y = case.inputs(device)
    rows: dict[str, dict[str, Any]] = {}
    rounds: dict[str, int] = {}
    times: dict[str, list[float]] = {}
    for name, implementation in implementations.items():
        first = case if name == "torch.compile" else replace(case, n=64)  # what compiles does it in a call before
        implementation.run(first, *first.inputs(device))
        if device != "cpu":  # where kernels are compiled, or a graph is captured, for a case
            implementation.run(case, x, y)
        before = peak_mib(device, reset=True)
        out, seconds = measure(partial(implementation.run, case, x, y), device)
        after = peak_mib(device)
        truth = pairwise.truth(case, implementation.estimator, device)
        rows[name] = errors(out, truth)
        if name.startswith(pairwise.OURS) and not right(case, rows[name], truth[1]):
            raise Inaccurate(f"{name}: {rows[name]}, not timed")
        rows[name]["memory_mib"] = None if before is None or after is None else after - before
        rounds[name] = min(MOST_ROUNDS, int((README_S if case in pairwise.README else GRID_S) / seconds))
        if implementation.floats != (0, 0):  # the first call found no memory kept by malloc
            rounds[name] = max(rounds[name], 1)
        times[name] = [] if rounds[name] else [seconds]
    if device == "cpu":
        most_mib = max(row["memory_mib"] or 0 for row in rows.values())
        held = [torch.ones(2**24) for _ in range(int(most_mib / 64) + 1)]  # 64 MiB each
        del held  # a malloc that keeps memory has it again
    most = max(rounds.values())
    for i in range(most):
        for name, implementation in implementations.items():
            if (i + 1) * rounds[name] // most > i * rounds[name] // most:  # spread over all rounds
                times[name].append(measure(partial(implementation.run, case, x, y), device, cold)[1])
    for name, taken in times.items():
        low, *_, high = quantiles(taken, n=5) if len(taken) > 1 else taken * 2
        rows[name] |= {"median_s": median(taken), "p20_s": low, "p80_s": high, "rounds": len(taken)}
    return [{"op": "pairwise", **asdict(case), "implementation": name, **row} for name, row in rows.items()]


def selected(options: argparse.Namespace) -> list[pairwise.Case]:
    if options.device != "cpu":
        cases = pairwise.GPU_CASES
    else:
        cases = pairwise.README if options.bar else pairwise.GRID if options.grid else pairwise.CASES
    if options.only:
        every = {f"{c.what},{c.n},{c.d}": c for c in [*cases, *(pairwise.README if options.device == "cpu" else ())]}
        if options.only not in every:
            raise SystemExit(f"--only: got {options.only}; accepted: {', '.join(every)}")
        return [every[options.only]]
    found = [case for case in cases if options.least <= case.n <= options.most]
    if not found:
        raise SystemExit(f"--least {options.least}, --most {options.most}: no case has so many points")
    return found


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        mode = ("" if row["gradient"] else "value ") + ("" if row["dtype"] == "float32" else row["dtype"])
        problem = f"{row['what']:<6} N={row['n']:<6} D={row['d']:<4} {mode:<8} {row['implementation']:<18}"
        time_taken = f"{row['median_s'] * 1e3:10.3f} ms  {row['median_s'] / rows[0]['median_s']:7.1f}x"
        error, value = (f"{row[key]:.1e}" if key in row else "  –    " for key in ("error", "value_error"))
        memory = "–" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}"
        print(f"{problem} {time_taken}  error {error}  value {value} {memory:>7} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="also torch.compile (some seconds a case)")
    parser.add_argument("--without", default="", help="implementations to leave out, as 'KeOps,GeomLoss KeOps'")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--bar", action="store_true", help="only the cases of the README (of a CPU)")
    which.add_argument("--grid", action="store_true", help="N = 16 .. 65,536, D = 2 .. 512 (of a CPU; long)")
    which.add_argument("--only", metavar="WHAT,N,D", help="one case, as rbf,256,10")
    parser.add_argument("--cold", action="store_true", help="a call a turn, the caches filled with other things before")
    parser.add_argument("--least", type=int, default=2, help="smallest N")
    parser.add_argument("--most", type=int, default=10**6, help="largest N")
    parser.add_argument("--memory", type=float, default=8, help="GiB that a call may take; default 8")
    options = options_of(parser)
    if options.cold and (options.out or options.device != "cpu"):
        parser.error("--cold prints times of a CPU; they do not go to a file with those of calls in a row")
    if (options.bar or options.grid) and options.device != "cpu":
        parser.error("--bar and --grid are cases of a CPU; a GPU has cases of its own")
    installed = implementations(options.compile, options.device)
    left_out = set(filter(None, options.without.split(",")))
    if wrong := left_out - (set(installed) - {pairwise.OURS}):
        accepted = ", ".join(name for name in installed if name != pairwise.OURS)
        parser.error(f"--without: got {', '.join(sorted(wrong))}; accepted: {accepted}")
    results = Results(options)
    for case in selected(options):
        some = {k: i for k, i in installed.items() if k not in left_out and feasible(case, i, options.memory)}
        if results.has({"op": "pairwise", **asdict(case)}, some):
            continue
        try:
            rows = bench(case, some, options.device, options.cold)
        except Inaccurate as why:
            results.refuse(str(case), why)
            continue
        show(rows)
        results.add(rows)
    sys.exit(results.refused)


if __name__ == "__main__":
    main()
