"""Readers of the files that `data.load_data` knows: numpy arrays as they lie in the files, or errors that help."""

import difflib
import gzip
import importlib
import math
import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_GET_MNIST = """Get the four files, with .gz, from https://ossci-datasets.s3.amazonaws.com/mnist/ and pass their \
folder as root"""
_OR_DOWNLOAD = ", or leave root out to download through scikit-learn's fetch_openml('mnist_784')"
_GET_CIFAR10 = """Get cifar-10-binary.tar.gz or cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html\
, unpack it and pass the folder as root"""
KEYS = {
    "training images": ("x_train", "train_images", "images", "x", "data"),
    "training labels": ("y_train", "train_labels", "labels", "y"),
    "test images": ("x_test", "test_images"),
    "test labels": ("y_test", "test_labels"),
}
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")

Part = tuple[np.ndarray, np.ndarray | None]  # images and labels of the training or of the test set, as in the files


def _digits(root: Path | None) -> list[Part]:
    digits = need("sklearn.datasets", "scikit-learn").load_digits()
    return [(digits.images.astype(np.uint8), digits.target)]


def _mnist(root: Path | None) -> list[Part]:
    if root is not None:
        return [
            (_read_idx(root, f"{stem}-images", 3), _read_idx(root, f"{stem}-labels", 1)) for stem in ("train", "t10k")
        ]
    fetch = need("sklearn.datasets", "scikit-learn").fetch_openml
    try:  # with the parser that needs no pandas
        images, labels = fetch("mnist_784", version=1, return_X_y=True, as_frame=False, parser="liac-arff")
        images, labels = images.reshape(70000, 28, 28).astype(np.uint8), labels.astype(np.int64)
    except (OSError, EOFError, ValueError) as error:
        raise RuntimeError(f"mnist: fetch_openml('mnist_784') failed, offline? ({error}). {_GET_MNIST}") from error
    return [(images[:60000], labels[:60000]), (images[60000:], labels[60000:])]


def _read_idx(root: Path, stem: str, dims: int) -> np.ndarray:
    """One IDX file of bytes: magic number 2048 + dims and `dims` sizes, all big-endian 32 bits, then the values."""
    names = [f"{stem}{dot}idx{dims}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    path = next((root / name for name in names if (root / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"mnist: {root} holds none of {', '.join(names)}. {_GET_MNIST}{_OR_DOWNLOAD}")
    usual = f"{60000 if stem.startswith('train') else 10000}{'x28x28' if dims == 3 else ''}"
    with _reading(
        path, f"magic number {2048 + dims}, sizes (officially {usual}) and as many bytes", _GET_MNIST + _OR_DOWNLOAD
    ):
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data  # some downloads unpack but keep the name
        magic, *sizes = struct.unpack_from(f">{1 + dims}I", data)
        values = np.frombuffer(data, np.uint8, offset=4 * (1 + dims))
        if magic != 2048 + dims or values.size != math.prod(sizes):
            raise ValueError(f"magic number {magic}, sizes {'x'.join(map(str, sizes))} and {values.size} bytes")
        return values.reshape(sizes)


def _cifar10(root: Path | None) -> list[Part]:
    if root is None:
        raise ValueError(f"cifar10 needs root. {_GET_CIFAR10}")
    for folder in (root, root / "cifar-10-batches-bin", root / "cifar-10-batches-py"):
        for suffix in (".bin", ""):
            paths = [folder / f"{batch}{suffix}" for batch in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
            missing = [path.name for path in paths if not path.is_file()]
            if not missing:
                images, labels = zip(*map(_read_cifar10, paths), strict=True)
                return [(np.concatenate(images[:5]), np.concatenate(labels[:5])), (images[5], labels[5])]
            if len(missing) < len(paths):
                raise FileNotFoundError(f"cifar10: {folder} lacks {', '.join(missing)}. {_GET_CIFAR10}")
    archives = [root] if root.is_file() else sorted(root.glob("*.npz"))
    if len(archives) == 1:
        parts = read_arrays(archives[0])
        if sorted(parts[0][0].shape[1:]) != [3, 32, 32]:
            raise ValueError(f"{archives[0]} holds images of {parts[0][0].shape[1:]}, not 3x32x32. {_GET_CIFAR10}")
        return parts
    expected = "data_batch_1..5 and test_batch, all with .bin or all without, or one .npz, or be one"
    raise FileNotFoundError(f"cifar10: {root} must hold {expected}; {len(archives)} .npz found. {_GET_CIFAR10}")


def _read_cifar10(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A batch, binary (records of a label and 3072 values) or python (a pickled dictionary of data and labels)."""
    with _reading(path, "N labels 0..9 and Nx3072 values, officially N = 10000", _GET_CIFAR10):
        if path.suffix == ".bin":
            records = np.frombuffer(path.read_bytes(), np.uint8)
            if records.size % 3073 or not records.size:
                raise ValueError(f"{records.size} bytes, not a multiple of 3073 (officially 30730000)")
            labels, images = records.reshape(-1, 3073)[:, 0], records.reshape(-1, 3073)[:, 1:]
        else:
            with path.open("rb") as file:
                batch = _BatchReader(file, encoding="bytes").load()
            _, shape, dtype, by_column, data = batch[b"data"].state
            if dtype.given[0] not in ("u1", b"u1"):
                raise ValueError(f"values of numpy type {dtype.given[0]!r}")
            images = np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_column else "C")
            labels = np.array(batch[b"labels"], dtype=np.uint8)
        if images.shape != (len(labels), 3072) or labels.max() > 9:
            raise ValueError(f"{labels.shape} labels up to {labels.max()} and {images.shape} values")
        return images.reshape(-1, 3, 32, 32), labels


class _Inert:
    """Stands for numpy's names in a pickle: keeps what it is given and runs nothing."""

    def __init__(self, *given: Any):
        self.given = given

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _BatchReader(pickle.Unpickler):
    """Reads containers, numbers, strings and, as `_Inert`, arrays; refuses whatever else a pickle asks for."""

    def find_class(self, module: str, name: str) -> type[_Inert]:
        array = ("numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype")
        if f"{module}.{name}".replace("numpy._core", "numpy.core") in array:
            return _Inert
        raise pickle.UnpicklingError(f"a call of {module}.{name}, which no array needs: refused, nothing was run")


NAMED = {"digits": _digits, "mnist": _mnist, "cifar10": _cifar10}


def existing_path(name: str) -> Path:
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    accepted = f"accepted: {', '.join(map(repr, NAMED))}, a folder of images, an .npy or an .npz file"
    if path.name != name or path.suffix:
        raise FileNotFoundError(f"there is no file or folder {path}; {accepted}")
    close = difflib.get_close_matches(name.lower(), NAMED, n=1)
    raise ValueError(f"data set {name!r} is unknown; {accepted}" + (f". Did you mean {close[0]!r}?" if close else ""))


def read_folder(root: Path) -> list[Part]:
    folders = [root / name for name in ("train", "test") if (root / name).is_dir()] or [root]
    if folders == [root / "test"]:
        raise ValueError(f"{root} has a folder test but no folder train; add it, or rename test")
    listings = [_listing(folder) for folder in folders]
    paths = [path for listing in listings for path in listing]
    classes = sorted({path.parent.name for path in paths if path.parent not in folders})
    labels = np.array([-1 if path.parent in folders else classes.index(path.parent.name) for path in paths])
    images, first = _read_images(paths), len(listings[0])
    return [(images[part], labels[part]) for part in (slice(first), slice(first, None))[: len(folders)]]


def _listing(folder: Path) -> list[Path]:
    found = sorted(path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.suffix.lower() in _SUFFIXES)
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not found:
        raise FileNotFoundError(f"{folder} and its sub-folders hold no images; accepted: {', '.join(_SUFFIXES)}")
    if len({path.parent == folder for path in found}) == 2:
        raise ValueError(f"{folder} holds images both itself and in sub-folders; keep one of the two forms")
    return found


def _read_images(paths: list[Path]) -> np.ndarray:
    """[N, H, W, C], C = 1 if all images are grey, else 3."""
    library = need("PIL.Image", "pillow")
    arrays = []
    for path in paths:
        with (
            _reading(path, "an image of 8 bits per value", "Replace, convert or remove it"),
            library.open(path) as image,
        ):
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode}")
            array = np.atleast_3d(np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")))
        arrays.append(array)
        if array.shape[:2] != arrays[0].shape[:2]:
            got = f"{paths[0]} {arrays[0].shape[:2]} and {path} {array.shape[:2]}"
            raise ValueError(f"all images must have one size (H, W), got {got}; resize or crop them first")
    channels = max(array.shape[2] for array in arrays)
    return np.stack([np.broadcast_to(array, (*array.shape[:2], channels)) for array in arrays])


def read_arrays(path: Path) -> list[Part]:
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"{path} is not a data set; accepted: a folder of images, an .npy or an .npz file")
    with _reading(path, "arrays saved by numpy without Python objects", "Write or download it again"):
        loaded = np.load(path, allow_pickle=False)
        files = {"images": loaded} if isinstance(loaded, np.ndarray) else {key.lower(): loaded[key] for key in loaded}
    images, labels, test_images, test_labels = (
        next((files[key] for key in keys if key in files), None) for keys in KEYS.values()
    )
    if len(files) == 1:
        [images], labels, test_images = files.values(), None, None
    if images is None:
        raise ValueError(f"{path} holds {list(files)}; accepted: one array of any name, or {KEYS}")
    return [(images, labels)] if test_images is None else [(images, labels), (test_images, test_labels)]


@contextmanager
def _reading(path: Path, expected: str, advice: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file can raise anything
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged or of another kind: expected {expected}; got {got}. {advice}") from error


def need(module: str, package: str) -> Any:
    """The module of a package that only some functions use; ImportError, with what to install, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{package} is missing: pip install infovae_fast[train]") from error
