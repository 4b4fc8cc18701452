"""Time the operators against what people write: `python -m benchmarks.run --out benchmarks/results/NAME.jsonl`.

Every row is one case and one implementation: median, 20th and 80th percentile of the seconds of value and gradient,
the largest error of each against float64, relative to the largest component, and the memory that a first call takes
beyond its inputs, measured in a process of its own. The implementations of a case take turns in one process, so that
their ratios stand although the machine is shared. Of ours, a result whose error is above `LARGEST_ERROR` is not timed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

import infovae_fast
from benchmarks import pairwise

LARGEST_ERROR = 1e-5  # of the gradient, relative to its largest component; the value's own is reported beside it


def measure(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def errors(out: pairwise.Result, truth: pairwise.Result) -> dict[str, float]:
    (g, value), (g_true, value_true) = out, truth
    found = {}
    if g is not None and g_true is not None:
        found["error"] = ((g.double() - g_true).abs().max() / g_true.abs().max()).item()
    if value is not None and value_true is not None:
        found["value_error"] = abs(value.item() / value_true.item() - 1)
    return found


def memory(case: pairwise.Case, name: str) -> float | None:
    """MiB that a first call takes beyond its inputs, in a process of its own; None where that fails."""
    code = (
        "from benchmarks import pairwise, run; import infovae_fast._C\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        f"case = pairwise.{case!r}; x, y = case.inputs(); small = pairwise.Case(case.what, 64, case.d, case.gradient)\n"
        f"f = run.implementations(True)[{name!r}]; f(small, *small.inputs()); before = peak(); f(case, x, y)\n"
        "print((peak() - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def implementations(compiled: bool) -> dict[str, Callable[..., Any]]:
    """By name, ours first."""
    found: dict[str, Callable[..., Any]] = {"infovae_fast cpp": pairwise.ours("cpp")} | pairwise.COMPETITORS
    if find_spec("pykeops") is None:
        del found["KeOps"]
    return found | ({"torch.compile": pairwise.compiled()} if compiled else {})


def bench(case: pairwise.Case, implementations: dict[str, Callable[..., Any]], rounds: int) -> list[dict[str, Any]]:
    x, y = case.inputs()
    exact = pairwise.truth(case, x, y)
    rows = {}
    for name, run in implementations.items():
        rows[name] = errors(run(case, x, y), exact)
        if name.startswith("infovae_fast") and rows[name].get("error", 0) > LARGEST_ERROR:
            raise SystemExit(f"{case} {name}: error {rows[name]['error']:.1e}, not timed")
        rows[name]["memory_mib"] = memory(case, name)
    times: dict[str, list[float]] = {name: [] for name in implementations}
    for _ in range(rounds):
        for name, run in implementations.items():
            times[name].append(measure(lambda run=run: run(case, x, y)))
    for name, seconds in times.items():
        low, high = (quantiles(seconds, n=5)[0], quantiles(seconds, n=5)[-1]) if rounds > 1 else (seconds[0],) * 2
        rows[name] |= {"median_s": median(seconds), "p20_s": low, "p80_s": high, "rounds": rounds}
    return [{"op": "pairwise", **asdict(case), "implementation": name, **row} for name, row in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines to this file")
    parser.add_argument("--compile", action="store_true", help="also torch.compile (minutes)")
    parser.add_argument("--large", action="store_true", help="also N = 16,384 and 65,536, ours alone")
    parser.add_argument("--bar", action="store_true", help="only the cases of the README")
    options = parser.parse_args()
    everything = implementations(options.compile)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    machine = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "infovae_fast": infovae_fast.__version__,
        "commit": commit,
        "malloc": "tuned" if "MALLOC_MMAP_THRESHOLD_" in os.environ else "default",
    }
    cases = pairwise.README if options.bar else pairwise.CASES
    for case in cases + (pairwise.LARGE if options.large else []):
        some = everything if case in pairwise.CASES else dict(list(everything.items())[:1])
        if case.n * case.n * case.d > 2**25:  # gigabytes
            some = {name: run for name, run in some.items() if name != "eager differences"}
        rows = bench(case, some, 7 if case.n * case.d > 10240 else 50)
        ours = rows[0]["median_s"]
        for row in rows:
            mode = "" if case.gradient else "value"
            problem = f"{case.what:<6} N={case.n:<6} D={case.d:<4} {mode:<6} {row['implementation']:<18}"
            time_taken = f"{row['median_s'] * 1e3:10.3f} ms  {row['median_s'] / ours:7.1f}x"
            found = f"error {row.get('error', 0):.1e}  value {row.get('value_error', 0):.1e}"
            print(f"{problem} {time_taken}  {found}  {row['memory_mib'] or 0:7.0f} MiB", flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a") as file:
                    file.write(json.dumps(row | machine) + "\n")


if __name__ == "__main__":
    main()
