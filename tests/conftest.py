"""GPU kernels without a GPU: Triton's run through its interpreter, CUDA's as C++ (tests/simt); both are also compiled
ahead for GPUs that are not here."""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined, so: before any is imported

ARCHITECTURES = (80, 90)


@pytest.fixture(scope="session", autouse=True)
def cuda_kernels_as_cpp() -> None:
    """Without a GPU backend="cuda" runs the CUDA kernels through tests/simt; never backend="auto", it comes last."""
    from infovae_fast import pairwise
    from infovae_fast.backends import Backend
    from tests.simt.pairwise import leaf

    def reason(x: torch.Tensor, *inputs: Any) -> str | None:
        if torch.compiler.is_compiling():
            return "torch.compile cannot trace the kernels as C++"
        return pairwise.cuda_limits(x, *inputs) or pairwise._leaf_reason(x, *inputs)

    if not torch.cuda.is_available():
        pairwise.BACKENDS += (Backend("cuda", reason, partial(pairwise._run_leaf, lambda: leaf)),)


def compile_ahead(module: str, kernel: str, cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Registers, stack and local memory of `module.kernel`, one dict for each case and each of `ARCHITECTURES`.

    Args:
        cases: the parameters by name: a Triton type ("*fp32", "i64") or [value] for a constexpr.

    In a process of its own, because in this one the kernels may be the interpreter's.
    """
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "tests.conftest", module, kernel],
            input=json.dumps(cases),
            env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _resources(kernel: Any, case: dict[str, Any], architecture: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if isinstance(given, list) else given for name, given in case.items()}
    constants = {name: given[0] for name, given in case.items() if isinstance(given, list)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # "REG:21 STACK:0 SHARED:0 LOCAL:0 ...": what spills goes to the stack or to local memory.
    fields = dict(field.split(":") for field in usage.split() if field.startswith(("REG:", "STACK:", "LOCAL:")))
    return {name.lower(): int(number) for name, number in fields.items()} | {"sm": architecture}


if __name__ == "__main__":
    import importlib

    target = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
    print(json.dumps([_resources(target, case, sm) for case in json.load(sys.stdin) for sm in ARCHITECTURES]))
