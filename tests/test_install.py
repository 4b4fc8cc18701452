"""What an installation contains and costs, what the build says, and the two rules of the tree: mirror and layers."""

import ast
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import infovae_fast

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "infovae_fast"
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
# Each may import its own layer and those before it. "" stands for the public names of infovae_fast itself.
LAYERS = (
    {"arguments", "backends", "kernels", "cuda_graph", "files"},
    {"radial"},
    {"clouds"},
    {"pairwise", "masked_conv", "logistic_mixture", "gated_residual"},
    {"divergences", "likelihoods"},
    {"normal_prior", "two_sample"},
    {"objective", "models"},
    {"data_files", "data"},
    {"evaluation", "training"},
    {"pictures", "report"},
    {"", "reproduce", "cli", "__main__"},
)


def run(*command, cwd=ROOT, **environment):
    env = {name: text for name, text in os.environ.items() if name not in ("INFOVAE_FAST_BUILD", "PYTHONPATH")}
    env |= {name: str(text) for name, text in environment.items()}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)


def output(*command, **options):
    done = run(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of this tree in which nothing was built."""
    copy = tmp_path_factory.mktemp("copy") / "checkout"
    copy.mkdir()
    for name in ("infovae_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.json"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout):
    output("setup.py", "-q", "sdist", cwd=checkout, INFOVAE_FAST_BUILD="none")
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the source distribution, as a package index would see it."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, sdist)
    output(*map(str, build), INFOVAE_FAST_BUILD="none")
    (archive,) = folder.glob("*.whl")
    return archive


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with a plain installation."""
    folder = tmp_path_factory.mktemp("site")
    output("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    return folder


def plain_path(*folders):
    """PYTHONPATH for `python -S`: the dependencies, but not the editable installation that may lie beside them."""
    return os.pathsep.join(map(str, (*folders, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))))


def test_import_is_light_and_quick():
    code = """
import sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import infovae_fast
print(time.perf_counter() - start, *sorted(set(sys.modules) - before))
"""
    seconds = []
    for _ in range(3):
        first, *modules = output("-c", code, PYTHONDONTWRITEBYTECODE="").split()
        seconds.append(float(first))
        heavy = (
            r"(triton|lightning|pytorch_lightning|sklearn|scipy|matplotlib|tensorboard|jsonargparse|safetensors)(\.|$)"
        )
        unwanted = [name for name in modules if re.match(heavy + r"|infovae_fast\.(_C|kernels)(\.|$)", name)]
        assert not unwanted, f"`import infovae_fast` imports {unwanted}"
    assert statistics.median(seconds) < 0.1, f"`import infovae_fast` takes {seconds} s longer than `import torch`"


def test_source_distribution_is_complete(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    wanted = {f"kernels/{name}" for name in KERNELS} | {str(path.relative_to(ROOT)) for path in sources}
    assert wanted | {"setup.py", "pyproject.toml", "LICENSE", "infovae_fast/__init__.py"} <= names


def test_wheel_holds_the_kernels_inside_the_package(wheel):
    assert wheel.name.startswith(f"infovae_fast-{infovae_fast.__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"infovae_fast/kernels/{name}" for name in KERNELS} | {"infovae_fast/_build.json"} <= set(names)
    assert {name.partition("/")[0] for name in names} == {
        "infovae_fast",
        f"infovae_fast-{infovae_fast.__version__}.dist-info",
    }
    assert not [name for name in names if name.endswith(".so")]


def test_kernels_are_found_beside_a_plain_installation(checkout, installed):
    (checkout / "test_here.py").write_text(
        "import infovae_fast, infovae_fast.kernels\n"
        "def test_here():\n"
        f"    assert infovae_fast.__file__.startswith({str(checkout)!r})\n"
        f"    assert infovae_fast.kernels.__file__.startswith({str(checkout)!r})\n"
    )
    command = ("-S", "-m", "pytest", "-p", "no:cacheprovider", "test_here.py")
    assert "1 passed" in output(*command, cwd=checkout, PYTHONPATH=plain_path(installed))


def test_report_of_a_pure_installation_says_why(installed, tmp_path):
    text = output("-S", "-m", "infovae_fast", cwd=tmp_path, PYTHONPATH=plain_path(installed))
    assert "not built: INFOVAE_FAST_BUILD=none" in text


def test_report():
    import torch

    text = output("-m", "infovae_fast")
    for words in (f"infovae_fast {infovae_fast.__version__}", f"torch     {torch.__version__}", "triton", "devices"):
        assert words in text
    assert re.search(r"^  cpp +(built|not built: \w)", text, re.M) and re.search(
        r"^  cuda +(built|not built: \w)", text, re.M
    )
    for operator in ("pairwise", "masked_conv", "logistic_mixture"):
        table = re.search(rf"^  {operator} on cpu\n((?:    .+\n?)+)", text, re.M)
        assert table, text
        rows = dict(line.split(maxsplit=1) for line in table[1].splitlines())
        assert list(rows) == ["cuda", "triton", "cpp", "reference"] and rows["reference"] == "runs"
        assert all(row == "runs" or row.startswith("no: ") for row in rows.values())


def test_build_that_cannot_be_done_is_an_error_that_helps(checkout):
    unknown = run("setup.py", "--version", cwd=checkout, INFOVAE_FAST_BUILD="typo")
    assert unknown.returncode == 1
    assert "INFOVAE_FAST_BUILD='typo' is unknown; accepted: auto, none, cpu, cuda" in unknown.stderr
    no_compiler = run("setup.py", "--version", cwd=checkout, INFOVAE_FAST_BUILD="cpu", CXX="no-such-compiler")
    assert no_compiler.returncode == 1
    assert "no C++ compiler (looked for no-such-compiler); install g++ or clang++, or set CXX" in no_compiler.stderr


def test_cuda_build_without_its_parts_is_an_error_that_helps(checkout):
    import torch

    if list((ROOT / "csrc" / "cuda").glob("*.cu")) and torch.version.cuda:
        pytest.skip("here CUDA can be built")
    done = run("setup.py", "--version", cwd=checkout, INFOVAE_FAST_BUILD="cuda")
    assert done.returncode == 1
    assert re.search(
        r"INFOVAE_FAST_BUILD=cuda cannot be built: (this version has no CUDA sources|torch .* without CUDA)",
        done.stderr,
    )


def test_the_code_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "your_own.md").read_text(), re.DOTALL)
    space: dict = {"__name__": "your_own"}
    for block in blocks:
        exec(compile(block, "your_own.md", "exec"), space)
    assert len(blocks) == 7 and space["pictures"].shape == (4, 1, 8, 8)
    assert space["critic"].kernel.log_bandwidth.grad is not None
    readme = (ROOT / "README.md").read_text().replace("mmd(z, y, progress=print) ", "mmd(z, y) ")
    losses, _, pixelcnn = (part for part in re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[:3])
    exec(losses, {"encoder": lambda x: x, "x": torch.randn(20, 3), "y": torch.randn(30, 3), "w": torch.rand(20)})
    exec(pixelcnn.replace("torch.rand(16, ", "torch.rand(2, "), {})


def test_mirror_rule():
    stems = {path.stem for path in PACKAGE.rglob("*.py")}
    mirrored = [ROOT / "kernels" / name for name in KERNELS if name != "__init__.py"]
    mirrored += [path for part in ("cpu", "cuda") for path in (ROOT / "csrc" / part).glob("*.c*")]
    for path in mirrored:
        page = next((stem for stem in stems if path.stem == stem or path.stem.startswith(f"{stem}_")), None)
        assert page, (
            f"{path.relative_to(ROOT)}: no {path.stem}.py, nor of a beginning of it, in infovae_fast/ says what it is"
        )


def imported(path):
    """The parts of infovae_fast that a file imports: "pairwise", "models", ... ; "" for its public names."""
    inside = ("infovae_fast", *path.relative_to(PACKAGE).parts[:-1]) if path.is_relative_to(PACKAGE) else ()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else ()
            module = ".".join((*base, node.module) if node.module else base)
            names = [f"{module}.{alias.name}" for alias in node.names if alias.name != "__version__"]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "infovae_fast":
                part = rest.partition(".")[0]
                known = part == "_C" or any(part in layer for layer in LAYERS) or (PACKAGE / f"{part}.py").exists()
                yield part if known else ""


def test_layer_rule():
    level = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    files = {path: path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    files |= dict.fromkeys((ROOT / "kernels").glob("*.py"), "kernels")
    for path, part in sorted(files.items()):
        if part == "__init__":
            continue
        assert part in level, f"{path.relative_to(ROOT)}: name its layer in tests/test_install.py"
        for other in set(imported(path)) - {"_C"}:
            assert level[other] <= level[part], f"{path.relative_to(ROOT)} imports {other or 'the top level'}, above it"
