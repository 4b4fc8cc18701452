"""Data sets: uint8 images [N, C, H, W] in memory, split into a training and a test set.

    digits      scikit-learn's real 8x8 digits: offline, 17 grey levels, 1,437 training and 360 test images
    mnist       the four IDX files, gzip or not, in the folder `root`; no root: fetch_openml("mnist_784")
    cifar10     the official binary or python files, or one .npz of images, in `root`
    a path      a folder of images of one size, or an .npy or .npz file of uint8 images

With grey values g in 0..levels-1 and x = g / (levels - 1), computed by `to_unit`:

    threshold   [x >= 1/2]                                  load_data(..., binarize="threshold")
    static      b ~ Bernoulli(x), drawn once from a seed    load_data(..., binarize="static")
    dynamic     b ~ Bernoulli(x), anew for every batch      binarize(to_unit(batch, levels))

Of a set without test images every class gives a tenth (digits: a fifth) to the test set; this split is the same
for every `seed`, so that no seed tests a model on images that it was trained on with another one.

Folders hold images, or one level of class sub-folders with images (labels number the sorted names); a sub-folder
train, and if wanted test, may hold either form. Colour becomes RGB, grey stays grey if all images are grey.
Arrays are [N, H, W], [N, H, W, C] or [N, C, H, W], C = 1 or 3; where both fit, channels come last. The names in an
.npz are those of `data_files.KEYS`; a lone array may have any. If the largest value is 1, levels is 2.
"""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infovae_fast.arguments import check_seed
from infovae_fast.data_files import NAMED, existing_path, read_arrays, read_folder


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images uint8 [N, C, H, W] of values 0..levels-1 (256: 8 bits, 17: digits, 2: binary), labels int64 [N]."""

    name: str
    train_images: Tensor
    train_labels: Tensor | None
    test_images: Tensor
    test_labels: Tensor | None
    levels: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width


def load_data(
    name: str | PathLike[str],
    *,
    root: str | PathLike[str] | None = None,
    train_size: int | None = None,
    binarize: str | None = None,
    seed: int = 0,
) -> ImageData:
    """Load a data set; the module's docstring says what the names, files and splits mean.

    Args:
        name: "digits", "mnist", "cifar10" or a path. Of a folder called digits: "./digits", or a `Path`.
        root: where the files of "mnist" or "cifar10" lie; ignored for the others.
        train_size: keep so many training images, as many of each class as possible. With one seed, the subset of
            size n is the first n images of every larger one. None keeps all, in the order of the files.
        binarize: None, "threshold" or "static", both with levels = 2. Pixels do not depend on `train_size`.
        seed: 0..2**32-1, for subset and static draw; the same result on every machine and thread count.

    Raises:
        FileNotFoundError: a file or folder is not there, or holds no images.
        ValueError: unknown name or option, damaged file, or images that do not fit together.
        RuntimeError: the download of MNIST failed. ImportError: scikit-learn or pillow is needed and missing.
    """
    if binarize not in (None, "threshold", "static"):
        accepted = "None, 'threshold', 'static'; for dynamic binarisation load with None and binarize() every batch"
        raise ValueError(f"binarize={binarize!r} is unknown; accepted: {accepted}")
    for option, value in (("train_size", 1 if train_size is None else train_size), ("seed", seed)):
        check_seed(option, value)
    title, source = str(name), Path(root or name).expanduser()
    named = isinstance(name, str) and name in NAMED
    every, levels = (5, 17) if named and name == "digits" else (10, 256)
    if named:
        parts = NAMED[title](None if root is None else source)
    else:
        source = existing_path(title)
        title = source.resolve().name
        parts = read_folder(source) if source.is_dir() else read_arrays(source)
    images, labels = _checked(*parts[0], f"{source}, training set")
    if len(parts) == 2:
        test_images, test_labels = _checked(*parts[1], f"{source}, test set")
    elif len(images) == 1:
        raise ValueError(f"{source}: one image cannot be split into training and test set; give at least two")
    else:
        test = np.isin(np.arange(len(images)), _by_class(labels, seed=0)[::every])
        images, labels, test_images, test_labels = images[~test], labels[~test], images[test], labels[test]
    if images.shape[1:] != test_images.shape[1:]:
        got = f"{images.shape[1:]} and {test_images.shape[1:]}"
        raise ValueError(f"{source}: training and test images must have one shape (C, H, W), got {got}")
    levels = 2 if max(images.max(), test_images.max()) == 1 else levels
    if binarize is not None:  # before the subset is chosen, so that an image has the same pixels in all subsets
        images = _binary(images, levels, binarize, [seed, 1])
        test_images = _binary(test_images, levels, binarize, [seed, 2])
        levels = 2
    if train_size is not None:
        if not 1 <= train_size <= len(images):
            raise ValueError(f"train_size={train_size} must be in 1..{len(images)}, the number of training images")
        chosen = _by_class(labels, seed)
        place = np.arange(len(chosen)) - np.searchsorted(labels[chosen], labels[chosen])  # within its class
        chosen = chosen[np.argsort(place, kind="stable")][:train_size]
        images, labels = images[chosen], labels[chosen]
    # Copies, as arrays over the bytes of a file cannot be written to.
    x, y, test_x, test_y = (
        torch.from_numpy(np.array(a, order="C")) for a in (images, labels, test_images, test_labels)
    )
    return ImageData(title, x, None if y.max() < 0 else y, test_x, None if test_y.max() < 0 else test_y, levels)


def some_places(n: int, most: int) -> Tensor:
    """Up to `most` of n places, in their order: always the same ones, whatever order files or `load_data` have."""
    if n <= most:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:most].sort().values


def to_unit(images: Tensor, levels: int) -> Tensor:
    """images / (levels - 1): integers 0..levels-1 of any shape to float32 in [0, 1].

    TypeError unless integers; ValueError for levels < 2 and, on the CPU (elsewhere it would wait), for wrong values.
    """
    if images.is_floating_point() or images.is_complex():
        raise TypeError(f"to_unit takes integers in 0..levels-1, got {images.dtype}; scale other images yourself")
    if levels < 2:
        raise ValueError(f"levels={levels}: images have at least 2 levels")
    if images.device.type == "cpu" and images.numel():
        low, high = int(images.min()), int(images.max())  # as int: a uint8 tensor compared with 256 compares with 0
        if low < 0 or high >= levels:
            raise ValueError(f"got values {low}..{high}; levels={levels} allows 0..{levels - 1}")
    return images.to(torch.float32) / (levels - 1)


def binarize(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """b ~ Bernoulli(images), float32 in {0, 1}, for probabilities of any shape; a new draw at every call.

    TypeError unless floats; ValueError, on the CPU (elsewhere it would wait), for values outside [0, 1] or NaN.
    """
    if not images.is_floating_point():
        raise TypeError(f"binarize takes floats in [0, 1], got {images.dtype}; call to_unit(images, levels) first")
    if images.device.type == "cpu" and not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError("binarize takes probabilities in [0, 1], got others or NaN; call to_unit on the integers")
    return torch.bernoulli(images.detach().to(torch.float32), generator=generator)


def _by_class(labels: np.ndarray, seed: int) -> np.ndarray:
    """All indices, shuffled, then grouped by class."""
    # numpy has promised never to change RandomState's streams, unlike those of its other generators.
    order = np.random.RandomState([seed, 0]).permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]


def _binary(images: np.ndarray, levels: int, how: str, seed: list[int]) -> np.ndarray:
    if how == "threshold":
        return (images >= levels // 2).astype(np.uint8)
    # u uniform on 0..levels-2: P(u < g) = g / (levels - 1), exactly.
    u = np.random.RandomState(seed).randint(levels - 1, size=images.shape, dtype=np.uint8)
    return (u < images).astype(np.uint8)


def _checked(images: np.ndarray, labels: np.ndarray | None, what: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, C, H, W] and int64 [N], all -1 if there are no labels."""
    shape = images.shape
    if images.dtype not in (np.uint8, np.bool_):
        advice = "np.round(255 * x).astype(np.uint8) for x in [0, 1], x.astype(np.uint8) for x in 0..255"
        raise ValueError(f"{what}: images must be uint8 or bool, got {images.dtype}; convert them: {advice}")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    elif images.ndim != 4 or shape[1] not in (1, 3):
        accepted = "[N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3"
        raise ValueError(f"{what}: images must be {accepted}, got {shape}; reshape them")
    if images.size == 0:
        raise ValueError(f"{what} is empty: images of shape {shape}")
    labels = np.full(len(images), -1) if labels is None else labels
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        got = f"{labels.dtype} {labels.shape} for {len(images)} images"
        raise ValueError(
            f"{what}: expected one integer label per image, got {got}; is a file damaged or of another set?"
        )
    return images.astype(np.uint8), labels.astype(np.int64)
