"""`python -m infovae_fast`: the versions, what was built, and which backend runs which operator here, or why not."""

import importlib
import json
import platform
import sys
from pathlib import Path

import torch

from infovae_fast import __version__, backends

# Modules with a table of backends, and the shape of a tiny input.
OPERATORS = {
    "pairwise": (2, 2),
    "masked_conv": (1, 1, 3, 3),
    "logistic_mixture": (1, 3),
    "gated_residual": (1, 2, 3, 3),
    "models.pixel_sampler": (1,),
}
REBUILD = "pip install --no-build-isolation -e ."


def build_facts() -> dict[str, str]:
    """What was built: from the binary itself, or, where there is none, from the note that setup.py leaves."""
    try:
        from infovae_fast import _C  # type: ignore[attr-defined, unused-ignore]

        return _C.build_info()
    except ImportError as error:
        note = Path(__file__).with_name("_build.json")
        facts = json.loads(note.read_text()) if note.exists() else {"cpp": f"not built: no set-up; run {REBUILD}"}
        if facts["cpp"] == "built":  # by another Python or for another torch, or lost since
            facts["cpp"] = f"built, but it cannot be loaded ({error}); run {REBUILD}"
        return facts


def triton_version() -> str:
    try:
        import triton
    except ImportError as error:
        return f"not here ({error})"
    return triton.__version__


def report() -> str:
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    names = [f"{device} {torch.cuda.get_device_name(device)}" for device in devices]
    versions = {
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "triton": triton_version(),
        "devices": ", ".join(["cpu", *names]),
    }
    lines = [f"infovae_fast {__version__}", *(f"  {name:<10}{text}" for name, text in versions.items())]
    lines += ["", "Native code", *(f"  {name:<18}{text}" for name, text in build_facts().items())]
    lines += ["", f"Backends, as 'auto' tries them (INFOVAE_FAST_BACKEND={backends.AUTO})"]
    for module, shape in OPERATORS.items():
        operator, table = module.split(".")[-1], importlib.import_module(f"infovae_fast.{module}").BACKENDS
        for device in [torch.device("cpu"), *devices[:1]]:
            lines.append(f"  {operator} on {device}")
            reasons = backends.explain(operator, table, torch.zeros(shape, device=device))
            lines += [f"    {name:<11}{'runs' if why is None else f'no: {why}'}" for name, why in reasons.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
    try:
        backends.check_name("auto")
    except ValueError as error:
        sys.exit(str(error))
