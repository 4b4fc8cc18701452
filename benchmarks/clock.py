"""Time and memory of a call, on the CPU or on a GPU, and what a row says about where it was measured."""

import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import infovae_fast
from infovae_fast.backends import native_missing
from infovae_fast.cuda_graph import CudaGraph

SHORTEST_S = 1e-3  # timed are as many calls in a row as take this long,
MOST_CALLS = 200  # but not more
TUNED = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}  # a malloc that keeps memory
CODE = ("infovae_fast", "kernels", "csrc", "setup.py", "benchmarks/*.py")  # what times depend on
COLD_MIB = 64  # that are touched before a cold call: more than the caches of a CPU hold


def measure(run: Callable[[], Any], device: str = "cpu", cold: bool = False) -> tuple[Any, float]:
    """The result and the seconds of a call: of one among several in a row, or of a single one that finds the CPU's
    caches full of other things. On a GPU the longer of queueing it and running it."""
    time_calls = _on_cpu if device == "cpu" else _on_gpu
    if cold:
        torch.ones(COLD_MIB * 2**18).sum()
    out, seconds = time_calls(run, 1)
    if seconds < SHORTEST_S and not cold:
        out, seconds = time_calls(run, min(MOST_CALLS, int(SHORTEST_S / seconds) + 1))
    return out, seconds


def _on_cpu(run: Callable[[], Any], calls: int) -> tuple[Any, float]:
    start = time.perf_counter()
    for _ in range(calls):
        out = run()
    return out, (time.perf_counter() - start) / calls


def _on_gpu(run: Callable[[], Any], calls: int) -> tuple[Any, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        out = run()
    end.record()
    torch.cuda.synchronize()
    return out, start.elapsed_time(end) * 1e-3 / calls


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a CUDA graph that is recorded already. Its leaves must not have met autograd before."""
    graph = CudaGraph(run)
    for _ in range(graph.eager + 1):
        graph()
    return graph


def peak_mib(device: str = "cpu", reset: bool = False) -> float | None:
    """The most memory held since the last reset: by PyTorch on the GPU, or by this process, where Linux tells."""
    if device != "cpu":
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        if reset:  # lets go of what is free
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, AttributeError):
        return None


def processor() -> str:
    """As "AMD EPYC, family 26, model 2, avx512"; less where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().partition("\n\n")[0].splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    more = [f"{key} {facts[fact]}" for key, fact in (("family", "cpu family"), ("model", "model")) if fact in facts]
    if native_missing() is None:
        from infovae_fast._C import build_info  # type: ignore[import-not-found, unused-ignore]

        more.append(build_info()["vector unit here"])
    return ", ".join([name, *more])


def git(*command: str) -> str:
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True).stdout.strip()


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a row says about where it was measured."""
    commit = git("describe", "--always")
    if commit and git("status", "--porcelain", "--", *CODE):
        commit += "-dirty"
    here = {
        "device": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "infovae_fast": infovae_fast.__version__,
        "commit": commit or "unknown",
        "malloc": "tuned" if all(os.environ.get(name) == number for name, number in TUNED.items()) else "default",
    }
    if device == "cpu":
        return here
    import triton

    return here | {
        "device": torch.cuda.get_device_name(),
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
