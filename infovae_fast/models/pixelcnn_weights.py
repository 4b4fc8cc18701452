"""The weights of a `GatedPixelCNN` for those who compute it otherwise than layer by layer.

`numbers_of` has all parameters in a row, `places` tells where in it each weight of `Weights` is: a table in any order
is one gather, by an index that is made once (`lru_cache`).
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infovae_fast.masked_conv import Mask, MaskedConv2d, from_dense, to_dense


class LayerWeights(NamedTuple):
    """A layer for incremental evaluation. Channels of h, o, skip and params are sorted by group; v has no groups."""

    vertical: Tensor  # [taps * Cin, 2C], taps of V0 or V in raster order
    vertical_bias: Tensor  # [2C]
    link: Tensor  # [2C, 2C], to columns (group, half of the gate, map)
    horizontal: Tensor  # [G, taps * Cin, 2C/G], taps of H0 or H; zero where a group may not look
    horizontal_bias: Tensor  # [2C], like the columns of link
    step: Tensor | None  # W_o [G, C, C/G]; None in the last layer
    step_bias: Tensor | None  # [C]


class Weights(NamedTuple):
    """All weights of a `GatedPixelCNN`, contiguous, float32 or better; rows are inputs, columns outputs."""

    layers: tuple[LayerWeights, ...]
    skip: Tensor  # [G, L * C, C/G]: sum over the layers of W_s
    skip_bias: Tensor  # [C]
    hidden: Tensor  # W_1 [G, C, C/G]
    hidden_bias: Tensor  # [C]
    output: Tensor  # W_2 [G, C, P/G]
    output_bias: Tensor  # [P]


Structure = tuple[tuple[Mask, torch.Size, bool], ...]  # of each convolution: mask, shape of the weight, is there a bias


def prepare(decoder: Any) -> Weights:
    """The table that incremental evaluation works from: compact, in the order of its reads, masks applied."""
    numbers = numbers_of(decoder)

    def taken(at: Any) -> Any:
        return None if at is None else numbers.take(at.to(numbers.device))

    layers, *others = places(structure_of(decoder))
    return Weights(tuple(LayerWeights(*map(taken, layer)) for layer in layers), *map(taken, others))


def structure_of(decoder: Any) -> Structure:
    """What decides where a weight goes."""
    return tuple((conv.mask, conv.weight.shape, conv.bias is not None) for conv in convs_of(decoder))


@torch.no_grad()
def numbers_of(decoder: Any) -> Tensor:
    """In a row: zero, the sum of the skips' biases by group, all parameters of the convolutions."""
    given = (t for conv in convs_of(decoder) for t in (conv.weight, conv.bias) if t is not None)
    skips = torch.stack([layer.out.bias[-decoder.maps :] for layer in decoder.layers])
    skip_bias = skips.index_select(1, order(decoder.maps, decoder.data_channels, device=skips.device)).sum(0)
    numbers = torch.cat([skips.new_zeros(1), skip_bias, *(t.flatten() for t in given)])
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def convs_of(decoder: Any) -> list[MaskedConv2d]:
    stack = [conv for layer in decoder.layers for conv in (layer.vertical, layer.link, layer.horizontal, layer.out)]
    return [*stack, decoder.head[1], decoder.head[3]]


@lru_cache(maxsize=16)
def places(structure: Structure) -> Weights:
    """Where each of the weights is in `numbers_of`. Sorting takes long, so it is done once, for numbers that change."""
    groups, maps = structure[-1][0].data_channels, structure[-1][1][1]
    count = 1  # behind the zero

    def new(*shape: int) -> Tensor:
        nonlocal count
        count += math.prod(shape)
        return torch.arange(count - math.prod(shape), count, device="cpu").view(shape)

    def sorted_columns(t: Tensor, halves: int = 1) -> Tensor:
        return t[..., order(t.shape[-1], groups, halves)]

    def by_group(matrix: Tensor, halves: int = 1) -> Tensor:  # [K, M] -> [G, K, M/G]
        return sorted_columns(matrix, halves).unflatten(1, (groups, -1)).movedim(1, 0)

    skip_bias = new(maps)
    convs = [(_matrix(mask, new(*shape)), new(shape[2] if bias else 0)) for mask, shape, bias in structure]
    layers, skips = [], []
    for k in range(0, len(convs) - 2, 4):
        (vertical, vertical_bias), (link, _), (horizontal, horizontal_bias), (out, out_bias) = convs[k : k + 4]
        last = out.shape[1] == maps
        layers.append(
            LayerWeights(
                vertical=vertical,
                vertical_bias=vertical_bias,
                link=sorted_columns(link, halves=2),
                horizontal=by_group(horizontal, halves=2),
                horizontal_bias=sorted_columns(horizontal_bias, halves=2),
                step=None if last else by_group(out[:, :maps]),
                step_bias=None if last else sorted_columns(out_bias[:maps]),
            )
        )
        skips.append(by_group(out[:, -maps:]))
    (hidden, hidden_bias), (output, output_bias) = convs[-2:]
    return Weights(
        layers=tuple(layers),
        skip=torch.cat(skips, 1),
        skip_bias=skip_bias,
        hidden=by_group(hidden),
        hidden_bias=sorted_columns(hidden_bias),
        output=by_group(output),
        output_bias=sorted_columns(output_bias),
    )


def _matrix(mask: Mask, weight: Tensor) -> Tensor:
    """[taps, Cin, Cout] -> [taps * Cin, Cout]: masked blocks zero, the input channels of a tap sorted by group."""
    options = mask._asdict()
    kernel_size = options.pop("kernel_size")
    weight = from_dense(to_dense(weight, kernel_size=kernel_size, **options), **options)
    return weight[:, order(weight.shape[1], mask.data_channels)].flatten(0, 1)


@lru_cache
def order(channels: int, groups: int, halves: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """The channels (half, map, group) in the order (group, half, map)."""
    return torch.arange(channels, device=device).view(halves, -1, groups).permute(2, 0, 1).flatten()
