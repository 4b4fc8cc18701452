"""Rows of results, one JSON object a line: where they go, which are there already, and the options that say so."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import machine

CASE = ("op", "what", "n", "d", "gradient", "dtype")
HERE = ("device", "threads", "torch", "commit", "malloc")
OURS = "infovae_fast"


class Inaccurate(Exception):
    """A result of ours that is wrong, or training that does not learn: not timed."""


def options_of(parser: argparse.ArgumentParser, *, resume: bool = True) -> argparse.Namespace:
    """The options, with --out, --resume and --device."""
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines to this file, case by case")
    if resume:
        parser.add_argument("--resume", action="store_true", help="skip what --out has of this commit and machine")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: PyTorch {torch.__version__} sees no GPU here")
    if resume and options.resume and options.out is None:
        parser.error("--resume: needs the file to go on with; give --out")
    return options


class Results:
    """The rows of this machine in a file; without one they are only printed by whoever measures them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path | None = options.out
        self.here = machine(options.device)
        self.refused = False
        self.done: set[tuple[Any, ...]] = set()
        if not getattr(options, "resume", False) or self.out is None or not self.out.exists():
            return
        text = self.out.read_text()
        if not text.endswith("\n"):  # killed while it wrote
            text = text[: text.rfind("\n") + 1]
            self.out.write_text(text)
        if self.here["commit"].endswith("-dirty") or self.here["commit"] == "unknown":
            print(f"--resume: rows of {self.here['commit']} may be of other code: all is measured")
            return
        for row in map(json.loads, text.splitlines()):
            if all(row.get(key) == self.here[key] for key in HERE):
                self.done.add((*(row.get(key) for key in CASE), row["implementation"]))

    def has(self, case: dict[str, Any], implementations: Iterable[str] = (OURS,)) -> bool:
        """Whether the case was measured before, with these implementations."""
        return all((*(case.get(key) for key in CASE), name) in self.done for name in implementations)

    def add(self, rows: list[dict[str, Any]]) -> None:
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("a") as file:
                file.write("".join(json.dumps(row | self.here) + "\n" for row in rows))

    def refuse(self, what: str, why: Inaccurate) -> None:
        """Goes on with the next case; `refused` is the exit status in the end."""
        print(f"{what}: {why}", flush=True)
        self.refused = True
