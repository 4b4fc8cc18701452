"""`GatedPixelCNN` over whole images that are known, in one launch of csrc/cuda/resident.cu; without derivatives.

Layer after layer, each of an image's numbers goes to the GPU's memory and back many times. Where v, h and the sum of
the skips of an image, in 16 bits, fit what a block may have of shared memory, with the weights of one layer, they stay
there from the first layer to the params: no more than z, x and params is read and written. That is what many codes for
an image need, as in a likelihood by importance sampling. Sums are float32; what is between products is rounded as it is
between layers.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infovae_fast.backends import native_missing, transforms
from infovae_fast.models.pixelcnn_weights import Structure, convs_of, numbers_of, places, structure_of

WARPS = 12  # kWarps of csrc/cuda/resident.cu
LEAST_PIXELS = 16 * WARPS  # of an image: with fewer the layers, each over all images, are faster
MOST_COLOURS = 512  # params of a pixel


def reason(decoder: Any, z: Tensor | None, x: Tensor) -> str | None:
    """Why `params` cannot run this, or None. decoder is a `GatedPixelCNN`."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or transforms() is not None:
        return "there are no derivatives"
    if x.device.type != "cuda":
        return f"it runs on a GPU, and x is on {x.device}"
    if missing := native_missing("cuda"):
        return missing
    if dtype_of(decoder, z, x) not in (torch.float16, torch.bfloat16):
        return "it computes in 16 bits: where all is in one such type, or under autocast, without float64"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs compute capability 8.0"
    gpu: Any = torch.cuda.get_device_properties(x.device)
    return limits(decoder, getattr(gpu, "shared_memory_per_block_optin", 99 << 10))


def limits(decoder: Any, shared: int) -> str | None:
    """What of the network there is no kernel for, where a block may have so many bytes of shared memory."""
    if decoder.variant != "gated" or decoder.data_channels != 1 or decoder.condition_is_spatial:
        return "accepted: variant 'gated', data_channels 1, a global condition"
    if backends := {conv.backend for conv in convs_of(decoder)} - {"auto", "cuda"}:
        return f"got backends {sorted(backends)}; accepted: 'auto', 'cuda'"
    _, height, width = decoder.image_shape
    if decoder.maps not in (16, 32) or decoder.head[-1].weight.shape[2] > MOST_COLOURS:
        return f"accepted: 16 or 32 maps, at most {MOST_COLOURS} params of a pixel"
    if height * width < LEAST_PIXELS:
        return f"got {height * width} pixels; accepted: at least {LEAST_PIXELS}"
    if (needed := shared_memory(decoder)) > shared:
        return f"an image needs {needed} bytes of shared memory, accepted here: at most {shared}"
    return None


def dtype_of(decoder: Any, z: Tensor | None, x: Tensor) -> torch.dtype | None:
    """Of all products, by the rule of `masked_conv2d`; None where they are of several types."""
    dtypes = {t.dtype for t in (*decoder.parameters(), x, *([] if z is None else [z]))}
    if torch.is_autocast_enabled(x.device.type):
        return None if torch.float64 in dtypes else torch.get_autocast_dtype(x.device.type)
    return dtypes.pop() if len(dtypes) == 1 else None


def params(decoder: Any, z: Tensor | None, x: Tensor) -> Tensor:
    """params [S N, P, H, W] for z [S N, D] and x [N, C, H, W], code s of image n in row s N + n; see `reason`."""
    dtype = dtype_of(decoder, z, x)
    table_places, bias_places = tables(structure_of(decoder), x.device)
    numbers = numbers_of(decoder)
    condition = None
    if z is not None:
        weights = torch.cat([linear.weight for linear in decoder.condition])
        condition = F.linear(decoder.code(z).to(dtype), weights.to(dtype))
    return leaf(
        numbers.to(dtype).index_select(0, table_places),
        numbers.float().index_select(0, bias_places),
        condition,
        (2 * x - 1).to(dtype).contiguous(),
        len(x if z is None else z),
        sizes(decoder),
    )


def leaf(*inputs: Any) -> Tensor:
    return torch.ops.infovae_fast.resident(*inputs)


def sizes(decoder: Any) -> list[int]:
    """[P, L, C, r_0, r]"""
    reaches = [layer.vertical.mask.kernel_size // 2 for layer in decoder.layers]
    return [decoder.head[-1].weight.shape[2], len(reaches), decoder.maps, reaches[0], reaches[-1]]


@lru_cache(maxsize=16)
def tables(structure: Structure, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where in `numbers_of` the weights are, as csrc/cuda/resident.cu reads them, and the biases."""
    weights = places(structure)
    maps = weights.skip.shape[2]
    nothing = torch.zeros(maps, maps, dtype=torch.int64, device="cpu")
    matrices, biases = [], []
    for layer, skip in zip(weights.layers, weights.skip[0].split(maps), strict=True):
        step = nothing if layer.step is None else layer.step[0]
        matrices += [layer.vertical, layer.link, layer.horizontal[0], torch.cat([step, skip], 1)]
        biases += [layer.vertical_bias, layer.horizontal_bias]
        biases.append(nothing[0] if layer.step_bias is None else layer.step_bias)
    matrices += [weights.hidden[0], weights.output[0]]
    biases += [weights.skip_bias, weights.hidden_bias, weights.output_bias]
    return torch.cat([_fragments(matrix) for matrix in matrices]).to(device), torch.cat(biases).to(device)


def _fragments(matrix: Tensor) -> Tensor:
    """[K, M], by 16 x 16 as the lanes of a warp hold the right side of an mma: lane 4 g + q has rows 2 q, 2 q + 1 and
    8 more of columns g and 8 + g."""
    rows, columns = matrix.shape
    matrix = F.pad(matrix, (0, -columns % 16, 0, -rows % 16))
    return matrix.view(-(-rows // 16), 2, 4, 2, -(-columns // 16), 2, 8).permute(0, 4, 6, 2, 5, 1, 3).flatten()


def shared_memory(decoder: Any) -> int:
    """Bytes that a block needs: `Places` of csrc/cuda/resident.cu."""
    channels, height, width = decoder.image_shape
    params, layers, maps, far, reach = sizes(decoder)
    row = width + reach
    tiles = -(-height * row // 16)
    tiles += tiles % 2 if tiles % (2 * WARPS) > WARPS else 0
    first = [-(-taps * channels // 16) for taps in (far * (2 * far + 1), far)]
    other = [(reach + 1) * taps * maps // 16 for taps in (2 * reach + 1, 1)]
    weights = max(16 * 2 * maps * sum(first), 16 * 2 * maps * sum(other)) + 6 * maps**2
    numbers = (
        max(weights, maps * (maps + -(-params // 16) * 16)),
        (reach * (row + 2 + layers) + 16 * tiles) * maps,
        (reach + 16 * tiles) * maps,
        16 * tiles * maps,
        (height + far) * (width + 2 * far) * channels,
        32 * sum(first),
        20 * maps,
        2 * tiles,
    )
    return 2 * sum(math.ceil(count / 64) * 64 for count in numbers)
