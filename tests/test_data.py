"""Data sets: layouts, splits, subsets and binarisation on tiny files, every error, the real sets if present."""

import gzip
import importlib
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
import urllib.error
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from infovae_fast.data import binarize, load_data, some_places, to_unit

REPOSITORY = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("INFOVAE_FAST_DATA", REPOSITORY.parent / "shared" / "data"))


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_npz(path, n=40, classes=4, **more):
    """n labelled images [n, 5, 6]; image i starts with the byte i, so that it can be found again."""
    images = random_images(n, 5, 6)
    images[:, 0, 0] = np.arange(n)
    np.savez(path, images=images, labels=np.arange(n) % classes, **more)
    return images


def indices(images):
    return images[:, 0, 0, 0].tolist()


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, dot="-", pack=bytes, end="", train=12, test=4):
    parts = {}
    for stem, n, seed in (("train", train, 1), ("t10k", test, 2)):
        parts[stem] = random_images(n, 28, 28, seed=seed), np.arange(n, dtype=np.uint8) % 10
        for kind, array in zip(("images", "labels"), parts[stem], strict=True):
            (folder / f"{stem}-{kind}{dot}idx{array.ndim}-ubyte{end}").write_bytes(pack(idx(array)))
    return parts


@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize(("pack", "end"), [(bytes, ""), (gzip.compress, ".gz"), (bytes, ".gz")])
def test_mnist_files(tmp_path, dot, pack, end):
    parts = write_mnist(tmp_path, dot, pack, end)
    data = load_data("mnist", root=tmp_path)
    assert (data.name, data.shape, data.levels) == ("mnist", (1, 28, 28), 256)
    assert data.train_images.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    for images, labels, stem in (
        (data.train_images, data.train_labels, "train"),
        (data.test_images, data.test_labels, "t10k"),
    ):
        assert np.array_equal(images[:, 0], parts[stem][0]) and np.array_equal(labels, parts[stem][1])


@pytest.mark.parametrize("name", ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"])
def test_mnist_missing_file(tmp_path, name):
    write_mnist(tmp_path)
    (tmp_path / f"{name}-ubyte").unlink()
    match = rf"{re.escape(str(tmp_path))} holds none of {name}-ubyte, {name}-ubyte.gz, .*https://.*fetch_openml"
    with pytest.raises(FileNotFoundError, match=match):
        load_data("mnist", root=tmp_path)


def test_mnist_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere holds none of train-images-idx3-ubyte"):
        load_data("mnist", root=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("damage", "got"),
    [
        (lambda raw: b"\0\0\x08\x01" + raw[4:], r"got ValueError: magic number 2049, sizes 12x28x28 and 9408 bytes"),
        (lambda raw: raw[:-5], r"got ValueError: magic number 2051, sizes 12x28x28 and 9403 bytes"),
        (lambda raw: raw + b"\0", r"and 9409 bytes"),
        (lambda raw: b"<html>not found</html>", r"got ValueError: magic number 1013478509"),
        (lambda raw: b"", r"got error: .*buffer of at least 16 bytes"),
        (lambda raw: raw[:10], r"got error: .*buffer of at least 16 bytes"),
        (lambda raw: gzip.compress(raw)[:-300], r"got EOFError: Compressed file ended"),
        (lambda raw: gzip.compress(raw)[:-8] + bytes(8), r"got BadGzipFile: CRC check failed"),
        (lambda raw: gzip.compress(raw)[:10] + bytes(range(7, 99)), r"got error: Error -3"),
    ],
)
def test_mnist_damaged_file(tmp_path, damage, got):
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    expected = (
        r"damaged or of another kind: expected magic number 2051, sizes \(officially 60000x28x28\) and as many bytes"
    )
    with pytest.raises(ValueError, match=re.escape(str(path)) + " is " + expected) as caught:
        load_data("mnist", root=tmp_path)
    assert re.search(got, str(caught.value)) and "https://" in str(caught.value)


def test_mnist_count_mismatch(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(11, np.uint8)))
    with pytest.raises(
        ValueError, match=r"training set: expected one integer label per image, got .*\(11,\) for 12 images"
    ):
        load_data("mnist", root=tmp_path)


def test_mnist_sizes_differ(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(random_images(4, 27, 28)))
    with pytest.raises(ValueError, match=r"one shape \(C, H, W\), got \(1, 28, 28\) and \(1, 27, 28\)"):
        load_data("mnist", root=tmp_path)


def test_mnist_download(monkeypatch):
    images, labels = np.zeros((70000, 784), np.uint8), np.full(70000, "7", dtype=object)
    images[60000, 29], labels[60000] = 200, "3"  # the first test image: row 1, column 1

    def fetch(name, **options):
        assert name == "mnist_784" and options["as_frame"] is False and options["return_X_y"] is True
        return images, labels

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    data = load_data("mnist")
    assert data.train_images.shape == (60000, 1, 28, 28) and data.test_images.shape == (10000, 1, 28, 28)
    assert data.test_images[0, 0, 1, 1] == 200 and data.test_labels[0] == 3 and data.train_labels[0] == 7


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), ConnectionResetError("no route")])
def test_mnist_offline(monkeypatch, error):
    def fetch(*args, **options):
        raise error

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    with pytest.raises(RuntimeError, match=r"offline\? \(.*no route.*\)\. Get the four files.*https://.*as root$"):
        load_data("mnist")


def test_mnist_unexpected_download(monkeypatch):
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *_, **__: (np.zeros((5, 784)), np.zeros(5)))
    with pytest.raises(RuntimeError, match="cannot reshape"):
        load_data("mnist")


BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def cifar_batch(seed, n=3):
    return random_images(n, 3072, seed=seed), [(seed + i) % 10 for i in range(n)]


def binary_batch(values, labels):
    return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, values, strict=True))


def python2_batch(values, labels):
    """The very opcodes of the official files: protocol 2 as Python 2 wrote it, byte strings and numpy's old names."""

    def string(value):
        return b"T" + struct.pack("<I", len(value)) + value

    dtype = (
        b"cnumpy\ndtype\n"
        + string(b"u1")
        + b"K\0K\1\x87R(K\3"
        + string(b"|")
        + b"NNN"
        + b"J\xff\xff\xff\xff" * 2
        + b"K\0tb"
    )
    shape = b"M" + struct.pack("<H", len(values)) + b"M" + struct.pack("<H", 3072) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + string(b"b") + b"\x87R"
    array += b"(K\1" + shape + dtype + b"\x89" + string(values.tobytes()) + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\2}(" + string(b"data") + array + string(b"labels") + listed + b"u."


def python3_batch(values, labels):
    return pickle.dumps({b"data": values, b"labels": labels, b"batch_label": b"training batch"}, protocol=4)


def fortran_batch(values, labels):
    return python3_batch(np.asfortranarray(values), labels)


def write_cifar(folder, write, suffix=""):
    folder.mkdir(exist_ok=True)
    for seed, batch in enumerate(BATCHES):
        (folder / f"{batch}{suffix}").write_bytes(write(*cifar_batch(seed)))


def test_python2_batch_is_a_pickle_of_the_array():
    values, labels = cifar_batch(0)
    batch = pickle.loads(python2_batch(values, labels), encoding="bytes")
    assert np.array_equal(batch[b"data"], values) and batch[b"labels"] == labels


@pytest.mark.parametrize(
    ("write", "suffix", "inside"),
    [
        (binary_batch, ".bin", "cifar-10-batches-bin"),
        (binary_batch, ".bin", "."),
        (python2_batch, "", "cifar-10-batches-py"),
        (python2_batch, "", "."),
        (python3_batch, "", "."),
        (fortran_batch, "", "."),
    ],
)
def test_cifar10_files(tmp_path, write, suffix, inside):
    write_cifar(tmp_path / inside, write, suffix)
    data = load_data("cifar10", root=tmp_path)
    values, labels = zip(*map(cifar_batch, range(6)), strict=True)
    assert (data.name, data.shape, data.levels) == ("cifar10", (3, 32, 32), 256)
    assert np.array_equal(data.train_images, np.concatenate(values[:5]).reshape(15, 3, 32, 32))
    assert data.train_labels.tolist() == [label for batch in labels[:5] for label in batch]
    assert np.array_equal(data.test_images, values[5].reshape(3, 3, 32, 32)) and data.test_labels.tolist() == labels[5]


@pytest.mark.parametrize("as_file", [True, False])
def test_cifar10_npz(tmp_path, as_file):
    images = random_images(20, 32, 32, 3)
    np.savez(tmp_path / "some.npz", images=images)
    data = load_data("cifar10", root=tmp_path / "some.npz" if as_file else tmp_path)
    assert data.name == "cifar10" and data.train_labels is None and data.test_labels is None
    assert data.train_images.shape == (18, 3, 32, 32) and data.test_images.shape == (2, 3, 32, 32)


def test_cifar10_npz_of_other_images(tmp_path):
    write_npz(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a.npz holds images of \(5, 6\), not 3x32x32.*https://"):
        load_data("cifar10", root=tmp_path)


def test_cifar10_missing(tmp_path):
    with pytest.raises(ValueError, match=r"cifar10 needs root\. Get cifar-10-binary.tar.gz .*https://"):
        load_data("cifar10")
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            FileNotFoundError, match=r"must hold data_batch_1..5 and test_batch, .*; 0 .npz found.*https://"
        ):
            load_data("cifar10", root=root)
    for name in ("a", "b"):
        write_npz(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError, match=r"or be one; 2 .npz found"):
        load_data("cifar10", root=tmp_path)


@pytest.mark.parametrize(("write", "suffix"), [(binary_batch, ".bin"), (python2_batch, "")])
def test_cifar10_incomplete(tmp_path, write, suffix):
    write_cifar(tmp_path, write, suffix)
    for batch in ("data_batch_3", "test_batch"):
        (tmp_path / f"{batch}{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks data_batch_3{suffix}, test_batch{suffix}\. Get .*https://"):
        load_data("cifar10", root=tmp_path)


def check_bad_batch(tmp_path, write, suffix, content, got):
    write_cifar(tmp_path, write, suffix)
    path = tmp_path / f"data_batch_2{suffix}"
    path.write_bytes(content)
    expected = "expected N labels 0..9 and Nx3072 values, officially N = 10000"
    with pytest.raises(
        ValueError, match=f"{re.escape(str(path))} is damaged or of another kind: {expected}; got {got}"
    ):
        load_data("cifar10", root=tmp_path)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (
            bytes(3 * 3073 - 1),
            r"ValueError: 9218 bytes, not a multiple of 3073 \(officially 30730000\)\. Get .*https://",
        ),
        (b"", r"ValueError: 0 bytes"),
        (bytes([10]) + bytes(3072), r"ValueError: \(1,\) labels up to 10"),
    ],
)
def test_cifar10_damaged_binary(tmp_path, content, got):
    check_bad_batch(tmp_path, binary_batch, ".bin", content, got)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (python2_batch(*cifar_batch(0))[:-4000], "UnpicklingError: "),
        (python2_batch(*cifar_batch(0))[:-1], "EOFError"),
        (b"", "EOFError"),
        (b"<html>", "UnpicklingError: "),
        (pickle.dumps([1, 2]), "TypeError: "),
        (pickle.dumps({b"labels": [1]}), "KeyError: b'data'"),
        (pickle.dumps({b"data": 5, b"labels": [1]}), "AttributeError: "),
        (python3_batch(random_images(2, 3072), [1]), r"ValueError: \(1,\) labels up to 1 and \(2, 3072\) values"),
        (python3_batch(random_images(2, 3072), [1, 10]), r"ValueError: \(2,\) labels up to 10"),
        (python3_batch(random_images(2, 3072), [1, 300]), "OverflowError"),
        (python3_batch(random_images(0, 3072), []), "ValueError"),
        (python3_batch(random_images(2, 3072) / 255, [1, 2]), "ValueError: values of numpy type 'f8'"),
    ],
)
def test_cifar10_damaged_pickle(tmp_path, content, got):
    check_bad_batch(tmp_path, python2_batch, "", content, got)


class Evil:
    """Unpickled without care, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def test_cifar10_malicious_pickle_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "trace"
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.exists(), "the attack itself must work, or this test shows nothing"
    trace.unlink()
    content = pickle.dumps({b"data": random_images(1, 3072), b"labels": [Evil(trace)]})
    check_bad_batch(
        tmp_path, python2_batch, "", content, "UnpicklingError: a call of builtins.exec, which no array needs"
    )
    assert not trace.exists()


@pytest.mark.parametrize("name", ["os system", "numpy load", "numpy.core.multiarray fromfile", "builtins getattr"])
def test_cifar10_pickle_names_are_refused(tmp_path, name):
    content = b"c" + name.replace(" ", "\n").encode() + b"\n(S'x'\ntR."
    check_bad_batch(tmp_path, python2_batch, "", content, f"UnpicklingError: a call of {name.replace(' ', '.')}, which")


@pytest.mark.parametrize(
    ("shape", "expected", "order"),
    [
        ((20, 5, 6), (1, 5, 6), (0, 1, 2)),
        ((20, 5, 6, 1), (1, 5, 6), (0, 3, 1, 2)),
        ((20, 5, 6, 3), (3, 5, 6), (0, 3, 1, 2)),
        ((20, 3, 5, 6), (3, 5, 6), (0, 1, 2, 3)),
        ((20, 1, 5, 6), (1, 5, 6), (0, 1, 2, 3)),
        ((20, 3, 5, 3), (3, 3, 5), (0, 3, 1, 2)),  # both fit: channels come last
    ],
)
@pytest.mark.parametrize("end", [".npy", ".npz"])
def test_array_layouts(tmp_path, shape, expected, order, end):
    images = random_images(*shape)
    path = tmp_path / f"shapes{end}"
    if end == ".npy":
        np.save(path, images)
    else:
        np.savez_compressed(path, whatever=images)
    data = load_data(path)
    assert (data.name, data.shape, data.levels) == (path.name, expected, 256)
    assert data.train_labels is None and data.test_labels is None
    assert data.train_images.is_contiguous() and len(data.train_images) == 18 and len(data.test_images) == 2
    kept = {tuple(x.ravel().tolist()) for x in images.transpose(order).reshape(20, *expected)}
    assert {tuple(x.ravel().tolist()) for x in np.concatenate([data.train_images, data.test_images])} == kept


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("X_train", "Y_train", "X_test", "Y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ],
)
def test_npz_names(tmp_path, names):
    arrays = random_images(6, 4, 4), np.arange(6)[:, None], random_images(3, 4, 4, seed=1), np.arange(3, dtype=">i4")
    np.savez(tmp_path / "a.npz", val_images=arrays[2], **dict(zip(names, arrays, strict=True)))
    data = load_data(str(tmp_path / "a.npz"))
    assert np.array_equal(data.train_images[:, 0], arrays[0]) and data.train_labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(data.test_images[:, 0], arrays[2]) and data.test_labels.tolist() == [0, 1, 2]


def test_places_of_many_are_of_every_class_and_the_same_each_time():
    """`load_data` takes classes in turn: every second image would be of half of them."""
    order = np.arange(40) % 4
    places = some_places(40, 20)
    assert set(order[places]) == {0, 1, 2, 3} and len(places.unique()) == 20
    assert torch.equal(places, some_places(40, 20)) and torch.equal(places, places.sort().values)
    assert torch.equal(some_places(7, 20), torch.arange(7))


@pytest.mark.parametrize("name", ["y", "label", "images"])
def test_a_lone_array_may_have_any_name(tmp_path, name):
    np.savez(tmp_path / "one.npz", **{name: np.arange(40 * 16).reshape(40, 4, 4).astype(np.uint8)})
    assert load_data(tmp_path / "one.npz").shape == (1, 4, 4)


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_binary_arrays_have_two_levels(tmp_path, dtype):
    images = random_images(20, 4, 4) % 2
    np.save(tmp_path / "a.npy", images.astype(dtype))
    data = load_data(tmp_path / "a.npy")
    assert (
        data.levels == 2
        and data.train_images.dtype == torch.uint8
        and set(data.train_images.unique().tolist()) == {0, 1}
    )
    for how in ("static", "threshold"):
        assert torch.equal(load_data(tmp_path / "a.npy", binarize=how).train_images, data.train_images)


@pytest.mark.parametrize("end", [".npy", ".npz"])
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(60), pickle.dumps([1])])
def test_array_file_of_another_kind(tmp_path, end, content):
    path = tmp_path / f"a{end}"
    path.write_bytes(content)
    match = rf"{re.escape(str(path))} is damaged or of another kind: expected arrays saved by numpy .*; got \w+: "
    with pytest.raises(ValueError, match=match):
        load_data(path)


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: raw[:500] + b"????" + raw[504:]])
def test_npz_corrupted(tmp_path, damage):
    path = tmp_path / "a.npz"
    write_npz(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a.npz is damaged or of another kind: .*got BadZipFile: .*Write or download"):
        load_data(path)


def test_arrays_are_never_unpickled(tmp_path):
    trace = tmp_path / "trace"
    objects = np.array([Evil(trace)], dtype=object)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "a.npz", images=objects, allow_pickle=True)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(
            ValueError, match="expected arrays saved by numpy without Python objects; got ValueError: Object"
        ):
            load_data(tmp_path / name)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((4, 5, 5))}, r"uint8 or bool, got float64; convert them: np.round\(255 \* x\)"),
        (
            {"images": np.zeros((4, 5, 5), np.int64)},
            r"uint8 or bool, got int64; .*x.astype\(np.uint8\) for x in 0..255",
        ),
        ({"images": np.zeros((4, 25), np.uint8)}, r"\[N, H, W, C\] or .* with C = 1 or 3, got \(4, 25\); reshape"),
        ({"images": np.zeros((4, 5, 5, 4), np.uint8)}, r"with C = 1 or 3, got \(4, 5, 5, 4\)"),
        ({"images": np.zeros((0, 5, 5), np.uint8)}, r"training set is empty: images of shape \(0, 5, 5\)"),
        ({"images": np.zeros((1, 5, 5), np.uint8)}, r"one image cannot be split .*; give at least two"),
        (
            {"images": np.zeros((4, 5, 5), np.uint8), "labels": np.zeros(3, int)},
            r"one integer label per image, got int64 \(3,\) for 4 images",
        ),
        ({"images": np.zeros((4, 5, 5), np.uint8), "labels": np.zeros(4)}, r"got float64 \(4,\) for 4 images"),
        ({"images": np.zeros((4, 5, 5), np.uint8), "labels": np.zeros((4, 2), int)}, r"got int64 \(4, 2\) for 4"),
        (
            {"x_train": np.zeros((4, 5, 5), np.uint8), "x_test": np.zeros((4, 5, 6), np.uint8)},
            r"one shape \(C, H, W\), got \(1, 5, 5\) and \(1, 5, 6\)",
        ),
        (
            {"x_train": np.zeros((4, 5, 5), np.uint8), "x_test": np.zeros((0, 5, 5), np.uint8)},
            r"test set is empty",
        ),
        (
            {"pictures": np.zeros(3), "other": np.zeros(3)},
            r"holds \['pictures', 'other'\]; accepted: one array .*x_train",
        ),
        ({}, r"holds \[\]; accepted: one array of any name, or "),
    ],
)
def test_npz_unfit(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load_data(tmp_path / "a.npz")
    assert "a.npz" in str(caught.value)


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)


def test_folder_of_grey_images(tmp_path):
    images = random_images(10, 4, 5)
    for i, image in enumerate(images):
        save(tmp_path / f"{i}.{'PNG' if i % 2 else 'bmp'}", image)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._0.png").write_bytes(b"left by a file manager")
    data = load_data(tmp_path)
    assert (data.name, data.shape, data.levels) == (tmp_path.name, (1, 4, 5), 256)
    assert data.train_labels is None and len(data.train_images) == 9 and len(data.test_images) == 1
    kept = {image.tobytes() for image in images}
    assert {x.numpy().tobytes() for x in torch.cat([data.train_images, data.test_images])} == kept


def test_folder_with_classes_and_parts(tmp_path):
    images = random_images(7, 4, 5, 3)
    places = ["train/cat/a", "train/cat/b", "train/dog/a", "train/eel/a", "test/dog/a", "test/cat/a", "test/eel/a"]
    for place, image in zip(places, images, strict=True):
        save(tmp_path / f"{place}.png", image)
    save(tmp_path / "train" / ".hidden" / "a.png", images[0])
    data = load_data(tmp_path)
    assert (
        data.shape == (3, 4, 5)
        and data.train_labels.tolist() == [0, 0, 1, 2]
        and data.test_labels.tolist() == [0, 1, 2]
    )
    assert np.array_equal(data.train_images, images[:4].transpose(0, 3, 1, 2))
    assert np.array_equal(data.test_images, images[[5, 4, 6]].transpose(0, 3, 1, 2))


def test_folder_with_classes_and_plain_test(tmp_path):
    for place in ("train/z/a", "train/y/a", "test/a"):
        save(tmp_path / f"{place}.png", random_images(4, 4))
    data = load_data(tmp_path)
    assert data.train_labels.tolist() == [0, 1] and data.test_labels is None


def test_folder_with_train_only(tmp_path):
    for i in range(12):
        save(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", random_images(4, 4, seed=i))
    data = load_data(tmp_path)
    assert len(data.train_images) == 10 and sorted(data.test_labels.tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("modes", "channels"), [(["1", "L", "LA"], 1), (["L", "RGB"], 3), (["P", "RGBA"], 3), (["CMYK"], 3)]
)
def test_folder_modes(tmp_path, modes, channels):
    for i in range(2):
        for mode in modes:
            save(tmp_path / f"{mode}{i}.{'jpg' if mode == 'CMYK' else 'png'}", random_images(4, 5, 3, seed=i), mode)
    assert load_data(tmp_path).shape == (channels, 4, 5)


def test_folder_grey_becomes_rgb_unchanged(tmp_path):
    grey = random_images(4, 5)
    save(tmp_path / "train" / "a.png", grey)
    save(tmp_path / "test" / "a.png", random_images(4, 5, 3))
    assert np.array_equal(load_data(tmp_path).train_images[0], np.stack([grey] * 3))


def test_folder_empty(tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "a.txt").write_text("")
    match = rf"{re.escape(str(tmp_path))} and its sub-folders hold no images; accepted: \.png, \.jpg"
    with pytest.raises(FileNotFoundError, match=match):
        load_data(tmp_path)


def test_folder_unfit(tmp_path):
    for i in range(3):
        save(tmp_path / "test" / f"{i}.png", random_images(4, 4))
    with pytest.raises(ValueError, match=r"has a folder test but no folder train; add it, or rename test"):
        load_data(tmp_path)
    save(tmp_path / "train" / "a.png", random_images(4, 4))
    save(tmp_path / "train" / "b" / "a.png", random_images(4, 4))
    with pytest.raises(ValueError, match=r"train holds images both itself and in sub-folders; keep one"):
        load_data(tmp_path)


def test_folder_sizes_differ(tmp_path):
    for i, height in enumerate((4, 4, 6)):
        save(tmp_path / f"{i}.png", random_images(height, 5))
    with pytest.raises(
        ValueError, match=r"one size \(H, W\), got \S+0.png \(4, 5\) and \S+2.png \(6, 5\); resize or crop"
    ):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("damage", "got"),
    [
        (lambda raw: raw[:-40], "OSError: .*truncated|SyntaxError"),
        (lambda raw: b"", "UnidentifiedImageError"),
        (lambda raw: b"<html>", "UnidentifiedImageError"),
    ],
)
def test_folder_damaged_image(tmp_path, damage, got):
    for i in range(3):
        save(tmp_path / f"{i}.png", random_images(20, 20))
    path = tmp_path / "1.png"
    path.write_bytes(damage(path.read_bytes()))
    match = rf"{re.escape(str(path))} is damaged or .*: expected an image of 8 bits per value; got ({got})"
    with pytest.raises(ValueError, match=match):
        load_data(tmp_path)


def test_folder_of_16_bits(tmp_path):
    for i in range(2):
        save(tmp_path / f"{i}.png", np.full((4, 4), 1000, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"0.png .*expected an image of 8 bits per value; got ValueError: mode I"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("minst", "'mnist'"),
        ("MNIST", "'mnist'"),
        ("cifar-10", "'cifar10'"),
        ("digit", "'digits'"),
        ("zebra", ""),
        ("", ""),
    ],
)
def test_unknown_name(tmp_path, monkeypatch, name, hint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"is unknown; accepted: 'digits', 'mnist', 'cifar10', a folder of images"
    ) as caught:
        load_data(name)
    assert str(caught.value).partition("Did you mean ")[2] == (f"{hint}?" if hint else "")


@pytest.mark.parametrize("name", ["photos/", "some/photos", "photos.npz", "photos.npy", "photos.zip"])
def test_missing_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"there is no file or folder (photos|some.photos).*; accepted: 'digits'"
    ):
        load_data(name)


def test_file_of_another_kind(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.png is not a data set; accepted: a folder of images, an .npy or an .npz"):
        load_data(tmp_path / "a.png")


def test_dot_leads_to_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(20):
        save(tmp_path / "digits" / f"{i}.png", random_images(4, 5))
    for name in ("./digits", Path("digits")):
        data = load_data(name)
        assert (data.name, data.shape, data.levels) == ("digits", (1, 4, 5), 256)
    assert len(data.test_images) == 2 and load_data("digits").shape == (1, 8, 8)


@pytest.mark.parametrize("how", ["dynamic", "Static", "bernoulli"])
def test_binarize_option_unknown(how):
    with pytest.raises(
        ValueError, match=rf"'{how}' is unknown; accepted: None, 'threshold', 'static'; for dynamic .*batch"
    ):
        load_data("digits", binarize=how)


@pytest.mark.parametrize("value", [-1, 2**32, 0.5, "1", True])
@pytest.mark.parametrize("option", ["seed", "train_size"])
def test_option_not_an_integer(option, value):
    with pytest.raises(ValueError, match=rf"{option}={value!r} must be an integer in 0..4294967295"):
        load_data("digits", **{option: value})


@pytest.mark.parametrize("size", [0, 1438])
def test_train_size_out_of_range(size):
    with pytest.raises(ValueError, match=rf"train_size={size} must be in 1..1437, the number of training images"):
        load_data("digits", train_size=size)


@pytest.mark.parametrize(("module", "package"), [("sklearn.datasets", "scikit-learn"), ("PIL.Image", "pillow")])
def test_missing_package(tmp_path, monkeypatch, module, package):
    save(tmp_path / "a.png", random_images(4, 4))
    monkeypatch.setitem(sys.modules, module, None)
    for name in [tmp_path] if package == "pillow" else ["digits", "mnist"]:
        with pytest.raises(ImportError, match=rf"{package} is missing: pip install infovae_fast\[train\]"):
            load_data(name)


def test_import_needs_torch_and_numpy_only():
    code = """import sys
sys.modules |= dict.fromkeys(("sklearn", "PIL", "pandas", "scipy", "matplotlib"))
import infovae_fast.data, infovae_fast.data_files"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digits():
    data = load_data("digits")
    assert (data.name, data.shape, data.levels) == ("digits", (1, 8, 8), 17)
    assert data.train_images.shape == (1437, 1, 8, 8) and data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    assert data.train_images.max() == 16 and data.test_images.max() == 16
    original = importlib.import_module("sklearn.datasets").load_digits()
    for label in range(10):
        assert abs(int((data.test_labels == label).sum()) - (original.target == label).sum() / 5) < 1
    rows = np.concatenate([data.train_images, data.test_images]).reshape(1797, 64)
    labels = np.concatenate([data.train_labels, data.test_labels])
    got = np.column_stack([rows, labels])
    wanted = np.column_stack([original.data, original.target])
    assert np.array_equal(got[np.lexsort(got.T)], wanted[np.lexsort(wanted.T)])


def test_draws_are_pinned():
    """Published numbers rest on this split, this subset and this draw: a change of any is a new data set."""
    full = load_data("digits")
    part = load_data("digits", train_size=100, binarize="static", seed=7)
    sums = [
        zlib.crc32(x.numpy().tobytes())
        for x in (full.train_images, full.test_labels, part.train_images, part.test_images)
    ]
    assert sums == [1408114316, 1897051086, 3133252447, 1005895747]


@pytest.mark.parametrize("labelled", [True, False])
def test_hold_out_is_a_tenth_whatever_the_seed(tmp_path, labelled):
    path = tmp_path / "a.npz"
    images = write_npz(path, n=100)
    if not labelled:
        np.savez(path, images=images)
    data = load_data(path)
    assert len(data.test_images) == 10 and sorted(indices(data.train_images) + indices(data.test_images)) == list(
        range(100)
    )
    assert indices(data.train_images) == sorted(indices(data.train_images)), "the order of the file stays"
    assert torch.equal(load_data(path, seed=5).test_images, data.test_images)
    if labelled:
        assert data.train_labels.tolist() == [i % 4 for i in indices(data.train_images)]
        assert set(data.test_labels.bincount().tolist()) == {2, 3}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.booleans(), st.integers(0, 2**32 - 1))
def test_subsets_are_nested_and_balanced(labels, labelled, seed):
    images = np.zeros((len(labels), 2, 2), np.uint8)
    images[:, 0, 0] = np.arange(len(labels))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        np.savez(path, x_train=images, x_test=images[:1], **({"y_train": np.array(labels)} if labelled else {}))
        whole = load_data(path, train_size=len(labels), seed=seed)
        for size in {1, 2, len(labels) // 2, len(labels) - 1} - {0}:
            data = load_data(path, train_size=size, seed=seed)
            assert indices(data.train_images) == indices(whole.train_images)[:size]
            if labelled:
                assert data.train_labels.tolist() == [labels[i] for i in indices(data.train_images)]
                # The fullest class has at most one image more than any class that still has some to give.
                counts, available = np.bincount(data.train_labels, minlength=5), np.bincount(labels, minlength=5)
                assert all(
                    counts.max() - count <= 1 for count, all_ in zip(counts, available, strict=True) if count < all_
                )
    assert sorted(indices(whole.train_images)) == list(range(len(labels)))


def test_subset_depends_on_the_seed():
    first, again, other = (load_data("digits", train_size=50, seed=seed).train_images for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_threshold_is_at_half(tmp_path):
    images = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (2, 16, 16))
    np.save(tmp_path / "a.npy", images)
    data = load_data(tmp_path / "a.npy", binarize="threshold")
    assert data.levels == 2 and torch.equal(data.train_images.ravel(), (torch.arange(256) >= 127.5).to(torch.uint8))
    digits, grey = load_data("digits", binarize="threshold"), load_data("digits")
    assert digits.levels == 2 and torch.equal(
        digits.test_images, (to_unit(grey.test_images, 17) >= 0.5).to(torch.uint8)
    )


def test_static_binarisation_follows_the_grey_values(tmp_path):
    n = 2000
    images = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (n, 16, 16))
    np.savez(tmp_path / "a.npz", x_train=images, x_test=images[:100])
    data = load_data(tmp_path / "a.npz", binarize="static")
    assert data.levels == 2 and data.train_images.dtype == torch.uint8 and data.train_images.max() == 1
    p = torch.arange(256, dtype=torch.float64) / 255
    frequency = data.train_images.double().mean(0).ravel()
    assert frequency[0] == 0 and frequency[255] == 1
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()
    assert not torch.equal(data.train_images[:100], data.test_images), "training and test draws differ"


def test_static_binarisation_is_reproducible():
    threads = torch.get_num_threads()
    try:
        draws = []
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(count)
            draws.append(load_data("digits", binarize="static", seed=3).train_images)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], load_data("digits", binarize="static", seed=4).train_images)


def test_subset_has_the_pixels_of_the_whole(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, images=random_images(50, 8, 8), labels=np.arange(50))
    whole = load_data(path, binarize="static")
    small = load_data(path, binarize="static", train_size=9)
    by_label = dict(zip(whole.train_labels.tolist(), whole.train_images, strict=True))
    for label, image in zip(small.train_labels.tolist(), small.train_images, strict=True):
        assert torch.equal(image, by_label[label])


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_to_unit(levels):
    images = torch.arange(levels, dtype=torch.uint8)
    x = to_unit(images, levels)
    assert x.dtype == torch.float32 and x[0] == 0 and x[-1] == 1
    assert torch.equal(x, (images.double() / (levels - 1)).float())
    assert to_unit(images[:0], levels).shape == (0,)


def test_to_unit_refuses():
    images = torch.tensor([0, 17], dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"integers in 0..levels-1, got torch.float32"):
        to_unit(images.float(), 256)
    with pytest.raises(ValueError, match=r"levels=1: images have at least 2 levels"):
        to_unit(images, 1)
    with pytest.raises(ValueError, match=r"got values 0..17; levels=17 allows 0..16"):
        to_unit(images, 17)
    with pytest.raises(ValueError, match=r"got values -1..0; levels=256 allows 0..255"):
        to_unit(torch.tensor([0, -1]), 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_binarize(dtype):
    p = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=dtype, requires_grad=True).expand(20000, 4)
    b = binarize(p, torch.Generator().manual_seed(0))
    assert b.dtype == torch.float32 and not b.requires_grad and set(b.unique().tolist()) == {0.0, 1.0}
    q = p[0].detach().float()
    frequency = b.mean(0)
    assert ((frequency - q).abs() <= 5 * (q * (1 - q) / 20000).sqrt()).all()
    assert torch.equal(b, binarize(p, torch.Generator().manual_seed(0)))
    assert not torch.equal(binarize(p), binarize(p)), "a new draw at every call"
    assert binarize(p[:0]).shape == (0, 4)


def test_binarize_refuses():
    with pytest.raises(TypeError, match=r"floats in \[0, 1\], got torch.uint8; call to_unit\(images, levels\) first"):
        binarize(torch.zeros(3, dtype=torch.uint8))
    for value in (-0.1, 1.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"probabilities in \[0, 1\], got others or NaN; call to_unit"):
            binarize(torch.tensor([0.5, value]))


def test_image_data_is_frozen():
    data = load_data("digits", train_size=10)
    with pytest.raises(AttributeError):
        data.levels = 2
    data.train_images[0] = 0  # and its tensors are ordinary, writable memory


def real(name):
    if not (REAL / name).is_dir():
        pytest.skip(f"no folder {name} in {REAL}; INFOVAE_FAST_DATA names the folder of the data sets")
    return REAL / name


def test_real_mnist():
    data = load_data("mnist", root=real("mnist"))
    assert data.train_images.shape == (60000, 1, 28, 28) and data.test_images.shape == (10000, 1, 28, 28)
    assert data.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.test_labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert round(data.train_images.float().mean().item(), 2) == 33.32
    small = load_data("mnist", root=real("mnist"), train_size=500)
    assert small.train_labels.bincount().tolist() == [50] * 10


def test_real_cifar10():
    data = load_data("cifar10", root=real("cifar10"), train_size=100)
    assert data.shape == (3, 32, 32) and data.levels == 256 and len(data.train_images) == 100
    x = to_unit(data.test_images, 256)
    assert 0.4 < x.mean() < 0.55 and x[:, 0].mean() > x[:, 2].mean(), "red is the brightest channel, blue the darkest"
    if data.test_labels is not None:
        assert data.test_labels.min() >= 0 and data.test_labels.max() <= 9
