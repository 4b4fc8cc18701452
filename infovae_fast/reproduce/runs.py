"""What the experiments share: many runs, some at a time, then a report of them. Started again, an experiment keeps the
runs that are finished and continues those that are not."""

import argparse
import contextlib
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from infovae_fast.report import Run, Section, number, write_report
from infovae_fast.training import read_run, train


@dataclass(frozen=True)
class Experiment:
    """`plan(folder, **options)` gives the arguments of `train` for every run; `quick`: options of a few steps only.

    `opening` makes the first section of the report, whose heading is `title`; `out`: its folder, if none is given.
    """

    description: str
    out: str
    title: str
    plan: Callable[..., list[dict[str, Any]]]
    quick: dict[str, Any]
    opening: Callable[[list[Run]], Section]


def run_one(settings: dict[str, Any]) -> str:
    """Trains a run, or continues it, or finds it finished; returns which.

    Raises:
        ValueError: its folder holds a run with other settings.
    """
    folder, start = Path(settings["out"]), time.perf_counter()
    started = (folder / "config.json").is_file()
    if started:
        found = read_run(folder)
        if other := [key for key, value in settings.items() if key != "out" and found.get(key) != value]:
            what = f"a run with another {', '.join(other)}"
            raise ValueError(f"{folder} holds {what}: delete {folder.parent}, or choose another --out")
        if (folder / "model" / "config.json").is_file():
            return "finished before"
    with contextlib.redirect_stdout(io.StringIO()):  # `train` announces itself; here one line a run is enough
        train(resume=str(folder), progress=False) if started else train(**settings, progress=False)
    return f"{'continued' if started else 'trained'} in {time.perf_counter() - start:.0f} s"


def run_all(runs: list[dict[str, Any]], workers: int) -> Iterator[tuple[str, str]]:
    """Yields the folder of each run and what was done, as they end.

    The networks are too small for several cores to share, so every core trains a run of its own.
    """
    if workers == 1:
        yield from ((settings["out"], run_one(settings)) for settings in runs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        futures = {pool.submit(run_one, settings): settings["out"] for settings in runs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: what a run has written is always whole
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker that outlived a killed parent would write into the same folders as the next start."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def cell(values: Sequence[float], digits: int) -> str:
    """The mean over the seeds, and in brackets each."""
    each = ", ".join(number(value, digits) for value in values)
    return f"{number(mean(values), digits)} ({each})"


def run_experiment(argv: Sequence[str] | None, experiment: Experiment) -> None:
    """The command line of an experiment: an error a user can mend ends with one line."""
    parser = argparse.ArgumentParser(description=experiment.description)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(experiment.out),
        help=f"folder of the report and the runs (default: {experiment.out})",
    )
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that all works")
    options = parser.parse_args(argv)
    if options.workers < 1:
        parser.error(f"argument --workers: got {options.workers}; accepted: 1 or more")
    start = time.perf_counter()
    folder = options.out / ("quick-runs" if options.quick else "runs")
    runs = experiment.plan(folder, **(experiment.quick if options.quick else {}))
    print(f"{len(runs)} runs, {options.workers} at a time")
    try:
        for done, (run, what) in enumerate(run_all(runs, options.workers), start=1):
            print(f"[{done:2}/{len(runs)}] {run}: {what}", flush=True)
        path = write_report(
            [run["out"] for run in runs],
            options.out,
            title=experiment.title,
            n_samples=5 if options.quick else 100,
            opening=experiment.opening,
        )
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")
    print(f"done in {time.perf_counter() - start:.0f} s: {path}")
