"""Everything that needs a GPU, in one go: `make gpu-check`, or in an environment of your own

    python -m benchmarks.gpu_check --out OUT [--steps build,test,sanitize,bound,bench]

    build      the extension with CUDA (nvcc), in place
    test       the tests of the kernels, on the GPU, with every backend; --tests for others. With pytest-xdist, in
               several processes: most of their time goes to compilers
    sanitize   compute-sanitizer memcheck and racecheck over the CUDA kernels: of few points and images by the programs
               `pairwise_alone.cu`, `masked_conv_alone.cu` and `resident_alone.cu`, the sampler's by a few of its
               tests (slow)
    bound      the ceilings of this GPU, and what ours reaches of the bound
    bench      the programs, and `run`, `masked_conv` and `models` of benchmarks/

Each step writes OUT/STEP.log, and each of its commands has --limit seconds; the rows go to OUT/rows.jsonl. A step that
fails does not stop the others; the exit status tells, and the table in the end which one it was.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNEL_TESTS = sorted(
    str(path.relative_to(ROOT))
    for stem in (
        "backends",
        "pairwise",
        "radial",
        "masked_conv",
        "logistic",
        "mmd",
        "divergences",
        "normal",
        "two_sample",
        "pixel",
        "gated",
        "cuda_graph",
        "resident",
    )
    for path in ROOT.glob(f"tests/test_{stem}*.py")
)
# And points or images to check: points enough for all kernels.
ALONE = {"pairwise_alone": "1100", "masked_conv_alone": "4", "resident_alone": "3"}


def commands(out: Path, tests: str) -> dict[str, list[str]]:
    python, rows = shlex.quote(sys.executable), shlex.quote(str(out / "rows.jsonl"))
    programs = {name: shlex.quote(str(out / name)) for name in ALONE}
    nvcc = "nvcc -std=c++17 -O3 -Icsrc -arch=native"

    def compiled(options: str = "") -> list[str]:
        return [
            f"{nvcc}{options} benchmarks/{name}.cu csrc/cuda/{name.removesuffix('_alone')}*.cu -o {to}"
            for name, to in programs.items()
        ]

    sanitizer = "compute-sanitizer --error-exitcode 9 --tool"
    sampler = f"{python} -m pytest -x tests/test_pixel_sampler_cuda.py -k 'known or others or order'"
    checked = [f"{to} check {ALONE[name]}" for name, to in programs.items()] + [sampler]
    workers = f" -n {min(8, os.cpu_count() or 1)}" if find_spec("xdist") else ""  # they share the GPU
    missing = "import sys; from infovae_fast.backends import native_missing; sys.exit(native_missing('cuda'))"
    built = f"{python} -c {shlex.quote(missing)}"  # without it the tests of CUDA kernels would run them as C++
    return {
        "build": [f"INFOVAE_FAST_BUILD=cuda {python} setup.py build_ext --inplace", f"{python} -m infovae_fast"],
        "test": [built, f"{python} -m pytest{workers} --maxfail 30 -rs -vv {tests}"],
        "sanitize": [
            *compiled(" -DINFOVAE_FAST_BARRIERS"),  # racecheck takes flags in shared memory for races
            built,
            *(f"{sanitizer} {tool} {it}" for it in checked for tool in ("memcheck", "racecheck")),
        ],
        "bound": [f"{python} -m benchmarks.bound --device cuda --out {rows}"],
        "bench": [
            f"{python} -m benchmarks.run --device cuda --compile --resume --memory 40 --out {rows}",
            f"{python} -m benchmarks.masked_conv --device cuda --compile --resume --out {rows}",
            f"{python} -m benchmarks.models --device cuda --resume --out {rows}",
            *compiled(),
            *(f"{to} $(git describe --always --dirty) >> {rows}" for to in programs.values()),
        ],
    }


def run(step: str, lines: list[str], out: Path, limit: float) -> str:
    """ "ok", or what went wrong."""
    with (out / f"{step}.log").open("w") as log:
        for line in lines:
            log.write(f"$ {line}\n")
            log.flush()
            try:
                done = subprocess.run(
                    ["bash", "-c", line], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False
                )
            except subprocess.TimeoutExpired:
                return f"over {limit:.0f} s: {line}"
            if done.returncode:
                return f"exit status {done.returncode}: {line}"
    return "ok"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check", help="folder for logs and rows")
    parser.add_argument("--steps", default="build,test,sanitize,bound,bench", help="some of them, in this order")
    parser.add_argument("--tests", default=" ".join(KERNEL_TESTS), help="what pytest runs; '' for the whole suite")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for each command of a step")
    options = parser.parse_args()
    options.out = options.out.resolve()
    steps = options.steps.split(",")
    every = commands(options.out, options.tests)
    if unknown := set(steps) - set(every):
        parser.error(f"--steps: got {', '.join(sorted(unknown))}; accepted: {', '.join(every)}")
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"PyTorch {torch.__version__} sees no GPU here; this script is for a machine with one")
    if "sanitize" in steps and shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on PATH (it comes with CUDA's toolkit): that step is left out")
        steps.remove("sanitize")
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    options.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for step in steps:
        start = time.time()
        found[step] = run(step, every[step], options.out, options.limit)
        log = (options.out / f"{step}.log").read_text().splitlines()
        print("\n".join(["", f"== {step}: {time.time() - start:.0f} s, {found[step]}", *log[-25:]]), flush=True)
    print("\n" + "\n".join(f"{step:<10}{result}" for step, result in found.items()))
    sys.exit(any(result != "ok" for result in found.values()))


if __name__ == "__main__":
    main()
