"""Builds what this machine can build; `python -m infovae_fast` tells what that was, and why the rest was left out.

    pip install --no-build-isolation -e .        (torch must be there already: without it the package is pure Python)

INFOVAE_FAST_BUILD = auto   default: C++ where torch and a C++ compiler are, CUDA where also torch's CUDA and nvcc are
                     none   pure Python: the reference and Triton
                     cpu    C++, or an error that says what is missing
                     cuda   C++ and CUDA, or an error that says what is missing
CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what they mean to PyTorch. Nothing is downloaded.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu", "cuda")
MODE = os.environ.get("INFOVAE_FAST_BUILD") or "auto"
if MODE not in MODES:
    sys.exit(f"INFOVAE_FAST_BUILD={MODE!r} is unknown; accepted: {', '.join(MODES)} (see the top of setup.py)")

torch = None
if MODE != "none":
    try:
        import torch
    except (ImportError, OSError) as error:
        torch_error = error

CXX_NAMES = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
CXX = next((name for name in CXX_NAMES if shutil.which(name.split()[0])), None)
CPP_SOURCES = sorted(str(p.relative_to(ROOT)) for p in (*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")))
CUDA_SOURCES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu"))
FLAGS = ["-O3", "-g0"]  # no -march=native: the wheel may travel; no -ffast-math: the answers may not change


def output(*command: str) -> str:
    """The first line a command prints; '' where it does not run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().partition("\n")[0]


def why_no_cpp() -> str | None:
    if MODE == "none":
        return "INFOVAE_FAST_BUILD=none"
    if os.name != "posix":
        return f"the C++ sources build on Linux and macOS, this is {sys.platform}"
    if torch is None:
        return f"no torch while building ({torch_error}); install torch, then: pip install --no-build-isolation ."
    if CXX is None:
        return f"no C++ compiler (looked for {', '.join(CXX_NAMES)}); install g++ or clang++, or set CXX"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"no Python.h in {sysconfig.get_path('include')}; install Python's headers (python3-dev)"
    return None


def why_no_cuda() -> str | None:
    if MODE in ("none", "cpu"):
        return f"INFOVAE_FAST_BUILD={MODE}"
    if not CUDA_SOURCES:
        return "this version has no CUDA sources yet (csrc/cuda/*.cu); on a GPU, Triton needs no build"
    if no_cpp := why_no_cpp():
        return no_cpp
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        return f"no nvcc (CUDA_HOME={CUDA_HOME}); install the CUDA {torch.version.cuda} toolkit or set CUDA_HOME"
    version = nvcc_version(Path(CUDA_HOME, "bin", "nvcc"))
    if version.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        return (
            f"nvcc {version} cannot build for torch's CUDA {torch.version.cuda}; set CUDA_HOME to one of the same major"
        )
    return None


def nvcc_version(nvcc: Path) -> str:
    """As "13.0"; "unknown" where it does not say."""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found[1] if found else "unknown"


no_cpp, no_cuda = why_no_cpp(), why_no_cuda()
missing = no_cpp if MODE == "cpu" else no_cuda or no_cpp if MODE == "cuda" else None
if missing:
    sys.exit(f"INFOVAE_FAST_BUILD={MODE} cannot be built: {missing}. INFOVAE_FAST_BUILD=auto builds what it can.")

facts = {
    "cpp": f"not built: {no_cpp}" if no_cpp else "built",
    "cuda": f"not built: {no_cuda}" if no_cuda else "built",
    "commit": ((ROOT / ".git").exists() and output("git", "describe", "--always", "--dirty")) or "unknown",
}


class BuildPy(build_py):
    """Writes the facts beside the Python files, so that a package without native code can tell why."""

    def run(self) -> None:
        super().run()
        package = Path(ROOT if self.editable_mode else self.build_lib, "infovae_fast")
        (package / "_build.json").write_text(json.dumps(facts, indent=1) + "\n")
        for binary in package.glob("_C.*"):  # of an earlier build: it would run although this one has none
            binary.unlink()


commands, extensions = {"build_py": BuildPy}, []
if no_cpp is None:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    os.environ["CXX"] = CXX  # torch and setuptools would each look for their own
    compiler = output(*CXX.split(), "--version")
    if sys.platform == "linux" and "clang" not in compiler:
        # Compiled but not linked with OpenMP: torch brings the runtime, and there must be one only.
        FLAGS.append("-fopenmp")
    facts |= {
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "compiler": compiler,
        "flags": " ".join(FLAGS),
    }

    class BuildExt(BuildExtension):
        """Bakes the facts into the binary."""

        def build_extensions(self) -> None:
            self.force = True  # without ninja; with it, the flag BUILT_BY does it
            generated = Path(self.build_temp).resolve()
            generated.mkdir(parents=True, exist_ok=True)
            rows = ", ".join(f"{{{json.dumps(name)}, {json.dumps(text)}}}" for name, text in facts.items())
            (generated / "build_facts.h").write_text(f"#define BUILD_FACTS {rows}\n")
            self.extensions[0].include_dirs += [str(ROOT / "csrc"), str(generated)]
            try:
                super().build_extensions()
            except Exception as error:
                hint = "The native build failed (see above). INFOVAE_FAST_BUILD=none installs without it."
                raise SystemExit(f"{error}\n{hint}") from error

    kind, sources = (CppExtension, CPP_SOURCES) if no_cuda else (CUDAExtension, CPP_SOURCES + CUDA_SOURCES)
    # Another torch has another ABI, and its headers may be older than the objects here: another command compiles anew.
    built_by = f"-DBUILT_BY={zlib.crc32((facts['torch'] + compiler).encode())}u"
    cxx = [*FLAGS, built_by, *([] if no_cuda else ["-DWITH_CUDA"])]
    extensions = [kind("infovae_fast._C", sources, extra_compile_args={"cxx": cxx, "nvcc": ["-O3", built_by]})]
    commands["build_ext"] = BuildExt

setup(
    packages=[*find_packages(include=["infovae_fast", "infovae_fast.*"]), "infovae_fast.kernels"],
    package_dir={"infovae_fast": "infovae_fast", "infovae_fast.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass=commands,
)
