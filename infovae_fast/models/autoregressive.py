"""What the autoregressive decoders share: what they accept, a map from z, sets of offsets."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from infovae_fast.arguments import codes_of_images, floating, is_integer, one_of

Offsets = set[tuple[int, int]]


class SpatialCode(nn.Sequential):
    """s(z) = relu(linear(z)), a map [N, C', H, W]."""

    def __init__(self, inputs: int, shape: Sequence[int]) -> None:
        super().__init__(nn.Linear(inputs, math.prod(shape)), nn.ReLU(), nn.Unflatten(1, tuple(shape)))


def check_sizes(given: dict[str, Any], **least: int) -> None:
    """ValueError unless `condition` and `shape` are what they may be and the named integers large enough."""
    one_of("condition", given["condition"], ("global", "spatial"))
    for name, at_least in ({"inputs": 0, "image_channels": 1, "spatial_maps": 1} | least).items():
        if not is_integer(given[name]) or given[name] < at_least:
            raise ValueError(f"{name}: got {given[name]!r}; accepted: an integer, {at_least} or more")
    shape, keep = given["shape"], given["checkpoint_layers"]
    sizes = tuple(shape) if hasattr(shape, "__len__") else ()
    if len(sizes) != 3 or not all(is_integer(size) and size >= 1 for size in sizes):
        raise ValueError(f"shape: got {shape!r}; accepted: (P, height, width)")
    if not isinstance(keep, bool):
        raise ValueError(f"checkpoint_layers: got {keep!r}; accepted: True or False")


def check_code(decoder: Any, z: Tensor | None) -> None:
    """TypeError or ValueError unless z is what decoder(z, x) may be given: [N, inputs], or None for inputs=0."""
    _check_type(decoder, "z", z)
    if (z.shape[1:] if z is not None else (0,)) != (decoder.inputs,):
        wanted = f"[N, {decoder.inputs}]" if decoder.inputs else "None, as this decoder has inputs=0"
        raise ValueError(f"z: got {None if z is None else tuple(z.shape)}; accepted: {wanted}")


def check_inputs(decoder: Any, z: Tensor | None, x: Tensor) -> None:
    """The same of x [N, C, H, W] and z, S codes for every image."""
    _check_type(decoder, "x", x)
    if x.ndim != 4 or x.shape[1:] != decoder.image_shape:
        size = ", ".join(map(str, decoder.image_shape))
        raise ValueError(f"x: got shape {tuple(x.shape)}; accepted: [N, C, H, W] = [N, {size}]")
    check_code(decoder, z)
    if z is not None:
        codes_of_images(z, x)


def _check_type(decoder: Any, name: str, t: Any) -> None:
    if t is None and name == "z":
        return
    floating(name, t)
    own = decoder.head[-1].bias.dtype  # its parameters may not be listed: replicas have none
    wider = name == "x" and own.itemsize < 4 and t.dtype == torch.float32  # will do for a decoder in half precision
    if t.dtype != own and not wider and not torch.is_autocast_enabled(t.device.type):
        raise TypeError(f"{name}: got dtype {t.dtype}, but the decoder is {own}; convert one of them")
