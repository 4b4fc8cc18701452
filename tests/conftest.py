"""GPU kernels without a GPU: Triton's run through its interpreter, CUDA's as C++ (tests/simt); both are also compiled
ahead for GPUs that are not here."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined, so: before any is imported

ARCHITECTURES = (80, 90)


@pytest.fixture(scope="session", autouse=True)
def gpu_kernels_without_a_gpu() -> None:
    """backend="cuda" runs its kernels as C++ and "triton" in the interpreter; "auto" never does, they come last."""
    from infovae_fast import gated_residual, logistic_mixture, masked_conv, pairwise
    from infovae_fast.backends import Backend, transforms, triton_missing
    from tests.simt.masked_conv import run as simt_conv
    from tests.simt.masked_conv import run_halves as simt_halves
    from tests.simt.pairwise import leaf

    def cuda_reason(x: torch.Tensor, *inputs: Any) -> str | None:
        return pairwise.cuda_limits(x, *inputs) or pairwise._leaf_reason(x, *inputs)

    def triton_reason(x: torch.Tensor, *inputs: Any) -> str | None:
        return triton_missing() or pairwise._leaf_reason(x, *inputs)

    def conv_reason(*inputs: Any) -> str | None:
        return triton_missing() or transforms()

    def cuda_conv_reason(x: torch.Tensor, *inputs: Any) -> str | None:
        return masked_conv.cuda_limits(x, *inputs) or transforms()

    if not torch.cuda.is_available():
        if triton_missing() is None:
            from triton.runtime.interpreter import interpreter_builder

            from infovae_fast.kernels import gated_residual as residual_kernels
            from infovae_fast.kernels import logistic_mixture as mixture_kernels
            from infovae_fast.kernels import masked_conv as conv_kernels
            from infovae_fast.kernels import pairwise as kernels
            from infovae_fast.kernels import pairwise_products

            # The interpreter's time is the number of its operations: none for overflow, which takes more points than it
            # can do, and few and large tiles.
            interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
            kernels.tile, kernels.DEPTH = (
                lambda dp, *_: kernels.Tile(64, 64, kernels.triton.next_power_of_2(dp), 4, 1),
                64,
            )
            pairwise_products.ROWS = pairwise_products.PADDING
            block, tile = conv_kernels.block, conv_kernels.Tile
            conv_kernels.tile = lambda columns, depth, *_: tile(256, block(columns), block(depth), 4, 1)
            conv_kernels.weight_tile = lambda rows, columns, *_: tile(block(rows), block(columns), 256, 4, 1)
            conv_kernels.gate_tile = lambda columns, *_: tile(256, block(columns), 0, 4, 1)
            conv_kernels.PROGRAMS = 1
            triton_conv = Backend("triton", conv_reason, masked_conv._masked_conv_triton)
            masked_conv.BACKENDS += (triton_conv,)
            masked_conv.HALVES += (masked_conv.halves_by_two(triton_conv),)
            mixture_kernels.NUMBERS *= 128
            residual_kernels.VECTORS *= 128
            residual_kernels.PAIR_VECTORS *= 128
        masked_conv.BACKENDS += (Backend("cuda", cuda_conv_reason, simt_conv),)
        masked_conv.HALVES += (Backend("cuda", cuda_conv_reason, simt_halves),)
        pairwise.BACKENDS += (
            Backend("cuda", cuda_reason, partial(pairwise._run_leaf, lambda: leaf)),
            Backend("triton", triton_reason, partial(pairwise._run_leaf, pairwise._triton)),
        )
        gated_residual.BACKENDS += (Backend("triton", lambda s: triton_missing(), gated_residual.TRITON),)  # type: ignore[arg-type]
        logistic_mixture.BACKENDS += (
            Backend(
                "triton",
                lambda *inputs: triton_missing() or logistic_mixture._leaf_reason(*inputs),
                partial(logistic_mixture._run_leaf, logistic_mixture._triton),
            ),
        )


@pytest.fixture(autouse=True)
def device_of_the_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test with a parameter "cuda" or "triton" has its numbers there; every other one has them on the CPU."""
    from tests import oracle

    values = getattr(request.node, "callspec", None)
    names = [value for value in values.params.values() if isinstance(value, str)] if values else []
    monkeypatch.setattr(oracle, "device", max(map(oracle.device_of, names), default="cpu"))  # "cuda" > "cpu"


def compile_ahead(module: str, kernel: str, cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Registers, stack and local memory of `module.kernel`, one dict for each case and each of `ARCHITECTURES`.

    Args:
        cases: the parameters by name: a Triton type ("*fp32", "i64") or [value] for a constexpr; and if wanted
            "num_warps" and "num_stages".
    """
    return _for_gpus([module, kernel], json.dumps(cases))


def launch_ahead(code: str) -> list[dict[str, Any]]:
    """As `compile_ahead`, with its name as "kernel", for every Triton kernel that `code` launches on CPU tensors.

    The launches compile what they would on each of `ARCHITECTURES`, with these very arguments, and run nothing.
    """
    return _for_gpus([], code)


def _for_gpus(arguments: list[str], given: str) -> list[dict[str, Any]]:
    """In a process of its own, because in this one the kernels may be the interpreter's."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "tests.conftest", *arguments],
            input=given,
            env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _compile(kernel: Any, case: dict[str, Any], architecture: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: case.pop(name) for name in ("num_warps", "num_stages") if name in case}
    signature = {name: "constexpr" if isinstance(given, list) else given for name, given in case.items()}
    constants = {name: given[0] for name, given in case.items() if isinstance(given, list)}
    aligned = {
        (k,): [["tt.divisibility", 16]] for k, t in enumerate(signature.values()) if t[0] == "*"
    }  # as torch's are
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return _resources(triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options), architecture)


def _launch(code: str) -> list[dict[str, Any]]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found, run = [], JITFunction.run

    class NoGpu:
        """As much of a driver as a launch asks for before it has compiled; the devices' numbers are architectures."""

        def __init__(self, architecture: int) -> None:
            self.get_current_device = lambda: architecture
            self.get_current_stream = lambda device: 0
            self.get_current_target = lambda: GPUTarget("cuda", architecture, 32)

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        found.append(_resources(compiled, compiled.metadata.target.arch) | {"kernel": kernel.fn.__name__})

    JITFunction.run = compile_only
    for architecture in ARCHITECTURES:
        driver.set_active(NoGpu(architecture))
        exec(code, {})
    return found


def _resources(compiled: Any, architecture: int) -> dict[str, Any]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # "REG:21 STACK:0 SHARED:0 LOCAL:0 ...": what spills goes to the stack or to local memory.
    fields = dict(field.split(":") for field in usage.split() if field.startswith(("REG:", "STACK:", "LOCAL:")))
    resources = {name.lower(): int(number) for name, number in fields.items()}
    return resources | {"sm": architecture, "shared": compiled.metadata.shared}


if __name__ == "__main__":
    import importlib

    given = sys.stdin.read()
    if len(sys.argv) == 1:
        found = _launch(given)
    else:
        target = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
        found = [_compile(target, dict(case), sm) for case in json.loads(given) for sm in ARCHITECTURES]
    print(json.dumps(found))
