"""CUDA sources on a machine without a GPU: g++ compiles them as C++ against cuda_runtime.h of this folder.

`cuda_runtime.h` tells what it can do and how a source declares its dynamic shared memory.
"""

import ctypes
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Without -fno-gnu-unique, all libraries of the process would share the static variables of templates.
FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-fno-gnu-unique", f"-I{HERE}", f"-I{ROOT / 'csrc'}")

ARCHITECTURES = ["80", "90a", *(pytest.param(name, marks=pytest.mark.slow) for name in ("100", "120"))]  # for `ptxas`

FOLDER = ROOT / "build" / "simt"  # of libraries, for all processes of a test run and for later ones
_errors: dict[Path, str] = {}  # of what has been compiled; none: ""


@cache
def _beside() -> bytes:
    """What a library depends on beside its sources: every header, and the compiler."""
    headers = sorted(path for folder in (HERE, ROOT / "csrc") for path in folder.rglob("*.h"))
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    return b"".join([version, *(path.read_bytes() for path in headers)])


def build(sources: Sequence[str | Path], flags: Sequence[str] = ()) -> Path:
    """The shared library of .cu and .cpp sources (paths from the root of the repository), built once.

    Args:
        flags: further flags of g++, as "-O2" or "-DNAME".
    """
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("needs Linux and g++")
    import fcntl

    paths = [ROOT / source for source in sources]
    content = hashlib.sha256(repr((paths, FLAGS, tuple(flags))).encode() + _beside())
    for path in paths:
        content.update(path.read_bytes())
    library = FOLDER / f"{content.hexdigest()}.so"
    if library not in _errors:
        FOLDER.mkdir(parents=True, exist_ok=True)
        with library.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds it, the others wait
            _errors[library] = "" if library.exists() else _compile(paths, flags, library)
    if _errors[library]:
        raise RuntimeError(_errors[library])
    return library


def _compile(paths: Sequence[Path], flags: Sequence[str], library: Path) -> str:
    unfinished = library.with_suffix(".unfinished")
    command = ["g++", *FLAGS, *flags, "-x", "c++", *map(str, paths), "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return f"{' '.join(command)}\n{done.stderr}"
    unfinished.rename(library)
    return ""


def ptxas(source: str, architecture: str, folder: Path) -> str:
    """What ptxas says of the kernels of a source that nvcc compiles, without a warning, for sm_`architecture`."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", "-std=c++17", "-O3", "-Icsrc", "-Xptxas", "-v", "-cubin", "-gencode", target]
    command += [source, "-o", str(folder / "kernels.cubin")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    return done.stderr


def load(sources: Sequence[str | Path], flags: Sequence[str] = ()) -> ctypes.CDLL:
    """`build`, loaded. SIMT_ORDER is read at each launch; what aborts takes the process along."""
    return ctypes.CDLL(str(build(sources, flags)))
