"""What each kernel adds to a training step on a GPU.

    python -m benchmarks.kernels [--decoder R64] [--batch 128] [--all]

The step is that of `benchmarks.models` in bfloat16, as a CUDA graph. Launches overlap: a kernel may "run" while it
waits for the one in front of it. So what counts is the time from the end of all before it to its own end; the sum is
the step. With --all every kernel is listed, in order, with its grid; else they are summed by name.
"""

import argparse
import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.models import DECODERS, Run, model, train

STEPS = 3  # recorded, of which the middle one is shown


class Kernel(NamedTuple):
    name: str
    grid: list[int] | None
    added_us: float


def kernels(run: Run) -> list[Kernel]:
    """Of one call among several in a row."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(STEPS):
            run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(trace))
        return middle_step(json.loads(trace.read_text())["traceEvents"])


def middle_step(events: list[dict[str, Any]]) -> list[Kernel]:
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    on_gpu.sort(key=lambda e: e["ts"])
    each = len(on_gpu) // STEPS
    found, last = [], max((e["ts"] + e["dur"] for e in on_gpu[:each]), default=0.0)
    for event in on_gpu[each : 2 * each]:
        end = max(last, event["ts"] + event["dur"])
        found.append(Kernel(short(event["name"]), event.get("args", {}).get("grid"), end - last))
        last = end
    return found


def short(name: str) -> str:
    """Without namespaces and the types of parameters."""
    name = re.sub(r"infovae_fast::|at::native::|\(anonymous namespace\)::|^void ", "", name)
    return name.split("(")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", choices=sorted(DECODERS), default="R64")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--all", action="store_true", help="every kernel, in order")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"PyTorch {torch.__version__} sees no GPU here")
    vae = model(options.decoder, "cuda", torch.bfloat16)
    x = torch.rand(options.batch, 1, 28, 28, device="cuda").round()
    found = kernels(train(vae, lambda: vae.loss(x).loss, graph=True))
    print(f"{options.decoder}, batch {options.batch}: {len(found)} kernels, {sum(k.added_us for k in found):.0f} us")
    if options.all:
        for kernel in found:
            print(f"{kernel.added_us:8.1f} us {kernel.grid or ''!s:>16} {kernel.name[:90]}")
        return
    sums: dict[str, list[float]] = defaultdict(list)
    for kernel in found:
        sums[kernel.name].append(kernel.added_us)
    for name, added in sorted(sums.items(), key=lambda item: -sum(item[1])):
        print(f"{sum(added):8.1f} us {len(added):4} x {sum(added) / len(added):6.1f} {name[:90]}")


if __name__ == "__main__":
    main()
