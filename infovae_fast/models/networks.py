"""Encoder and decoder networks: MLP and DCGAN, with the sizes of the paper's experiments as presets; their tables.

An encoder maps images [N, C, H, W] to 2 D numbers (mean and log-variance of q(z|x)); a decoder maps z [N, D] to the
parameters of p(x|z) [N, K, H, W], K being `likelihood.channels(C)`. Activations are leaky ReLU 0.1 in encoders and
ReLU in decoders, as in the authors' code.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from itertools import chain, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from infovae_fast.arguments import is_integer, number
from infovae_fast.models.pixelcnn import GatedPixelCNN
from infovae_fast.models.pixelcnn_pp import PixelCNNPlusPlus

Shape = Sequence[int]  # (C, H, W)

PAPER_FEW_SAMPLES = {"name": "dcgan", "channels": [64, 128], "hidden": 1024, "batch_norm": False}  # section 5.1
PAPER_PIXELCNN_ENCODER = {"name": "dcgan", "channels": [64, 128], "hidden": 512, "batch_norm": True}  # section 5.2


def like(network: nn.Module) -> Tensor:
    """A tensor of the network's device and floating-point dtype: a parameter or buffer of it, if it has one."""
    tensors = chain(network.parameters(), network.buffers())
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards every part is in the mode in which it was."""
    training = [part for part in network.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


class MLPEncoder(nn.Sequential):
    """Fully connected: flatten, then one layer for each of `hidden`, then a linear layer to `outputs`.

    Batch normalisation: as in `DCGANEncoder`.
    """

    def __init__(
        self, shape: Shape, outputs: int, hidden: Sequence[int] = (256, 256), batch_norm: bool = False
    ) -> None:
        sizes = [prod(shape), *_counts("hidden", hidden), outputs]
        super().__init__(nn.Flatten(1), *_mlp(sizes, lambda: nn.LeakyReLU(0.1), batch_norm))


class MLPDecoder(nn.Sequential):
    """Fully connected: z [N, inputs], one layer for each of `hidden`, then a linear layer to `shape` (K, H, W)."""

    def __init__(self, inputs: int, shape: Shape, hidden: Sequence[int] = (256, 256)) -> None:
        super().__init__(
            *_mlp([inputs, *_counts("hidden", hidden), prod(shape)], nn.ReLU), nn.Unflatten(1, tuple(shape))
        )


class DCGANEncoder(nn.Sequential):
    """Convolutions 4x4 of stride 2 with `channels` maps, a fully connected layer of `hidden`, a linear layer.

    Height and width must be multiples of 2^len(channels). Batch normalisation, where asked for, follows each hidden
    layer but makes q(z|x) depend on the batch in training. With an autoregressive decoder and MMD it decides whether z
    is used at all: tests/test_pixelcnn.py.
    """

    def __init__(
        self,
        shape: Shape,
        outputs: int,
        channels: Sequence[int] = (64, 128),
        hidden: int = 1024,
        batch_norm: bool = False,
    ) -> None:
        maps = [shape[0], *_counts("channels", channels)]
        number("hidden", hidden, int, 0)
        height, width = _downsampled(shape, len(channels))
        super().__init__()
        for i, (before, after) in enumerate(pairwise(maps)):
            self.add_module(f"conv{i}", nn.Conv2d(before, after, 4, stride=2, padding=1, bias=not batch_norm))
            if batch_norm:
                self.add_module(f"conv_norm{i}", nn.BatchNorm2d(after))
            self.add_module(f"conv_act{i}", nn.LeakyReLU(0.1))
        self.add_module("flatten", nn.Flatten(1))
        self.add_module("full", nn.Linear(maps[-1] * height * width, hidden, bias=not batch_norm))
        if batch_norm:
            self.add_module("full_norm", nn.BatchNorm1d(hidden))
        self.add_module("full_act", nn.LeakyReLU(0.1))
        self.add_module("out", nn.Linear(hidden, outputs))

    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = part(x)
            if x.is_cuda and x.ndim == 4 and x.dtype.itemsize == 2:  # tensor cores: no copies between layouts
                x = x.contiguous(memory_format=torch.channels_last)
        return x


class DCGANDecoder(nn.Sequential):
    """`DCGANEncoder` backwards: two fully connected layers, then transposed convolutions 4x4 of stride 2."""

    def __init__(
        self,
        inputs: int,
        shape: Shape,
        channels: Sequence[int] = (64, 128),
        hidden: int = 1024,
        batch_norm: bool = False,
    ) -> None:
        maps = [*reversed(_counts("channels", channels)), shape[0]]
        number("hidden", hidden, int, 0)
        height, width = _downsampled(shape, len(channels))
        super().__init__()
        for i, (before, after) in enumerate([(inputs, hidden), (hidden, maps[0] * height * width)]):
            self.add_module(f"full{i}", nn.Linear(before, after, bias=not batch_norm))
            if batch_norm:
                self.add_module(f"full_norm{i}", nn.BatchNorm1d(after))
            self.add_module(f"full_act{i}", nn.ReLU())
        self.add_module("unflatten", nn.Unflatten(1, (maps[0], height, width)))
        for i, (before, after) in enumerate(pairwise(maps)):
            last = i == len(channels) - 1
            self.add_module(
                f"conv{i}", nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=last or not batch_norm)
            )
            if not last:
                if batch_norm:
                    self.add_module(f"conv_norm{i}", nn.BatchNorm2d(after))
                self.add_module(f"conv_act{i}", nn.ReLU())


ENCODERS: dict[str, Callable[..., nn.Module]] = {"mlp": MLPEncoder, "dcgan": DCGANEncoder}
DECODERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLPDecoder,
    "dcgan": DCGANDecoder,
    "pixelcnn": GatedPixelCNN,
    "pixelcnn_pp": PixelCNNPlusPlus,
}


def build(table: Mapping[str, Callable[..., Any]], what: str, config: dict[str, Any] | str, *args: Any) -> Any:
    """table[name](*args, **options) for a configuration {"name": ..., **options} or a bare name.

    Raises:
        ValueError: an unknown name or option; the message lists the accepted ones.
    """
    options: dict[str, Any] = {"name": config} if isinstance(config, str) else dict(config)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{what}: got {name!r}; accepted: " + ", ".join(map(repr, table)))
    accepted = list(signature(table[name]).parameters)[len(args) :]
    if unknown := sorted(set(options) - set(accepted)):
        raise ValueError(f"{what} {name!r}: unknown options {unknown}; accepted: {accepted}")
    try:
        signature(table[name]).bind(*args, **options)
    except TypeError as error:
        raise ValueError(f"{what} {name!r}: {error}; accepted: {accepted}") from None
    return table[name](*args, **options)


def _counts(name: str, values: Any) -> Sequence[int]:
    """The values, if they are a sequence of sizes."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(is_integer(v) and v > 0 for v in values):
        raise ValueError(f"{name}: got {values!r}; accepted: a list of integers, 1 or more each")
    return values


def _mlp(sizes: Sequence[int], activation: Callable[[], nn.Module], batch_norm: bool = False) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes[:-1]):
        norm = [nn.BatchNorm1d(after)] if batch_norm else []
        layers += [nn.Linear(before, after, bias=not batch_norm), *norm, activation()]
    return [*layers, nn.Linear(sizes[-2], sizes[-1])]


def _downsampled(shape: Shape, times: int) -> tuple[int, int]:
    _, height, width = shape
    if height % 2**times or width % 2**times:
        raise ValueError(
            f"dcgan with {times} layers of stride 2 needs height and width that are multiples of {2**times}; got "
            f"{height}x{width}: use fewer channels, or 'mlp'"
        )
    return height // 2**times, width // 2**times
