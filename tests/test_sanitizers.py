"""csrc/cpu/*.cpp without torch under the sanitizers: no memory errors, undefined behaviour or data races, and results
as the formulas give them (tests/sanitizers/*.cpp)."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "sanitizers"
SOURCES = {
    "pairwise": ("pairwise", "pairwise_fourier"),
    "masked_conv": ("masked_conv",),
    "incremental": ("incremental",),
    "logistic_mixture": ("logistic_mixture",),
}
UNITS = ("zen4", "avx512", "avx2", "baseline")
ADDRESS = (
    f"-include{HERE / 'apart.h'}",
    "-fsanitize=address,undefined",
    # Compilation would take minutes without these: calls in place of inline checks, and no second check of addresses.
    "--param=asan-instrumentation-with-call-threshold=0",
    "-fno-sanitize=null,object-size,pointer-overflow",
    "-fno-sanitize-recover=all",
)
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64") or shutil.which("g++") is None,
    reason="needs Linux on x86-64 and g++",
)


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def launcher(folder: Path, sanitizer: str) -> list[str]:
    """What a program of the sanitizer is started with, or a skip: its runtime may be missing, or refuse this kernel."""
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}\n")
    built = run("g++", f"-fsanitize={sanitizer}", source, "-o", program)
    if built.returncode != 0:
        pytest.skip(f"g++ -fsanitize={sanitizer} does not link: {built.stderr.strip()[-200:]}")
    # ThreadSanitizer may not like where a randomised address space puts things.
    fixed = ["setarch", "-R"] if shutil.which("setarch") and run("setarch", "-R", "true").returncode == 0 else []
    started = run(*fixed, program)
    if started.returncode != 0:
        pytest.skip(f"a program of g++ -fsanitize={sanitizer} does not start: {started.stderr.strip()[-200:]}")
    return fixed


def holds(folder: Path, stem: str, sanitizer: str, flags: tuple[str, ...], threads: list[int]) -> None:
    """Every vector unit in a process of its own; a machine without one runs the best that it has below that."""
    start = launcher(folder, sanitizer)
    program, main = folder / "program", folder / "main.o"
    libraries = [folder / f"{source}.library.o" for source in SOURCES[stem]]
    steps: list[tuple[str | Path, ...]] = [
        ("-O1", "-g1", "-fira-region=one", *flags, "-c", ROOT / f"csrc/cpu/{source}.cpp", "-o", library)
        for source, library in zip(SOURCES[stem], libraries, strict=True)
    ]
    steps += [
        ("-O2", "-c", HERE / f"{stem}.cpp", "-o", main),  # the formulas need no checks
        (f"-fsanitize={sanitizer}", *libraries, main, "-o", program),
    ]
    for step in steps:
        done = run("g++", "-std=c++17", "-pthread", f"-I{HERE}", f"-I{ROOT / 'csrc'}", *step)
        assert done.returncode == 0, done.stderr
    missing = set()
    for unit in UNITS:
        for count in threads:
            done = run(*start, program, str(count), INFOVAE_FAST_VECTOR_UNIT=unit)
            assert done.returncode == 0, f"{unit}, {count} threads: {done.stdout}\n{done.stderr[:8000]}"
            if not done.stdout.startswith(f"{unit}:"):
                missing.add(unit)
    if missing:
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}; what it has passed")


@pytest.mark.parametrize("stem", SOURCES)
def test_no_memory_errors_or_undefined_behaviour(stem, tmp_path):
    holds(tmp_path, stem, "address,undefined", ADDRESS, [1, 3])


@pytest.mark.parametrize("stem", SOURCES)
def test_no_data_races(stem, tmp_path):
    holds(tmp_path, stem, "thread", ("-fsanitize=thread",), [3])
