"""`GatedPixelCNN` a row and a pixel at a time, every number computed once: what the sampler's "cached" strategy runs.

The vertical stack of row i reads finished rows: one product of matrices a layer for the whole row, one for its link.
The horizontal stack reads its own row: one product a layer for each pixel, and for each colour that is ordered. Both
work from one table, `Weights`, and from what z adds, `conditions_of`. `Incremental` goes from row to row in Python;
`Images` leaves whole images to a GPU.
"""

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infovae_fast.models.pixelcnn import GatedPixelCNN
from infovae_fast.models.pixelcnn_weights import Structure, numbers_of, order, places, prepare, structure_of

Callback = Callable[[int, int], None]  # (rows that are done, all rows)
Chooser = Callable[[int, int, int, Tensor], Tensor]


def conditions_of(decoder: GatedPixelCNN, z: Tensor | None, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """What z adds in each layer to V and to the base, [n or 1, 1 or H, 1 or W, 2C] each, contiguous."""
    pairs, groups = decoder.conditions(z), decoder.data_channels
    if z is None:
        nothing = decoder.head[1].weight.new_zeros(1, 1, 1, 2 * decoder.maps, dtype=dtype)
        return [(nothing, nothing)] * len(pairs)
    above, beside = (torch.stack([c.movedim(1, -1) for c in some]).to(dtype) for some in zip(*pairs, strict=True))
    if groups > 1:
        beside = beside.index_select(-1, order(2 * decoder.maps, groups, 2, beside.device))
    if above.ndim == 3:  # one for all pixels
        above, beside = (c[:, :, None, None] for c in (above, beside))
    return list(zip(above, beside, strict=True))


def params_of_pixels(run: Callable[[Chooser], Tensor], x: Tensor, groups: int) -> Tensor:
    """[n, P, H, W]: what `run` computes on the way when it is told x, pixel by pixel."""
    seen: list[Tensor] = []

    def choose(i: int, j: int, group: int, params: Tensor) -> Tensor:
        seen.append(params)
        return x[:, group::groups, i, j]

    run(choose)
    return torch.stack(seen, -1).unflatten(-1, (*x.shape[2:], groups)).permute(0, 1, 4, 2, 3).flatten(1, 2)


class Incremental:
    """`GatedPixelCNN` a row and a pixel at a time; every number is computed once.

    A row of V needs the last r + 1 rows of its input, which a ring holds: row i in place i % (r + 1). The horizontal
    stack keeps the one row it is in. With `native`, rows and pixels are C++ (csrc/cpu/incremental.cpp).
    """

    def __init__(self, decoder: GatedPixelCNN, z: Tensor | None, n: int, *, native: bool = False) -> None:
        self.weights, self.n, self.groups, self.maps = prepare(decoder), n, decoder.data_channels, decoder.maps
        self.channels, self.height, self.width = decoder.image_shape
        self.reaches = [layer.vertical.mask.kernel_size // 2 for layer in decoder.layers]
        self.taps = [layer.vertical.mask.taps for layer in decoder.layers]
        self.conditions = conditions_of(decoder, z, self.weights.skip.dtype)
        new, layers, w = self.weights.skip.new_zeros, len(self.reaches), self.width
        inputs = [self.channels] + [self.maps] * (layers - 1)
        # The inputs of the vertical stack, y and v_l; the row so far of those of the horizontal one, y and h_l; per
        # layer all of T but W_h * h; o of all layers and the two vectors of the head.
        self.rings = [new(n, r + 1, w + 2 * r, c) for r, c in zip(self.reaches, inputs, strict=True)]
        self.state = [new(n, (r + w) * c) for r, c in zip(self.reaches, inputs, strict=True)]
        self.bases = [new(n, w, 2 * self.maps) for _ in inputs]
        self.memory = new(n, (layers + 2) * self.maps)
        self.native = native

    def run(self, choose: Chooser, callback: Callback | None = None) -> Tensor:
        """choose(i, j, group, params [n, P/G]) -> the group's channels [n, C/G] of pixel (i, j)."""
        x = self.memory.new_zeros(self.n, self.channels, self.height, self.width)
        pixel = self._native_pixel if self.native else self._pixel
        y = self.state[0].unflatten(1, (-1, self.channels))  # [n, r + W, C]
        for i in range(self.height):
            self._row(i)
            for j in range(self.width):
                for group in range(self.groups):
                    value = choose(i, j, group, pixel(j, group))
                    x[:, group :: self.groups, i, j] = value
                    y[:, self.reaches[0] + j, group :: self.groups] = 2 * value - 1
            self._finish(i, callback)
        return x

    def run_bits(
        self, uniforms: Tensor, known: Tensor, mask: Tensor, temperature: float, callback: Callback | None = None
    ) -> Tensor:
        """`run` with the choice (u < sigmoid(params / temperature)), or `known` where the mask says so: native only."""
        rows = []
        for i in range(self.height):
            self._row(i)
            x = self.memory.new_empty(self.n, self.channels, self.width)
            u, k, m = (t[:, :, i].contiguous() for t in (uniforms, known, mask))
            torch.ops.infovae_fast.draw_bits(*self._native, x, u, k, m, temperature)
            rows.append(x)
            self._finish(i, callback)
        return torch.stack(rows, 2)

    def params(self, x: Tensor) -> Tensor:
        """Of every pixel of x, [n, P, H, W]."""
        return params_of_pixels(self.run, x, self.groups)

    def _finish(self, i: int, callback: Callback | None) -> None:
        r = self.reaches[0]
        self.rings[0][:, i % (r + 1), r : r + self.width] = self.state[0].unflatten(1, (-1, self.channels))[:, r:]
        if callback is not None:
            callback(i + 1, self.height)

    def _row(self, i: int) -> None:
        """The vertical stack of row i, up to `bases` and row i of the rings."""
        if self.native:
            table = [t for w in self.weights.layers for t in (w.vertical, w.vertical_bias, w.link, w.horizontal_bias)]
            conditions = [c for pair in self.conditions for c in pair]
            torch.ops.infovae_fast.vertical_row(table, conditions, self.rings, self.bases, self.reaches, i)
            return
        for layer, (weights, (above, beside)) in enumerate(zip(self.weights.layers, self.conditions, strict=True)):
            r, ring = self.reaches[layer], self.rings[layer]
            seen = [ring[:, (i + dy) % (r + 1), r + dx : r + dx + self.width] for dy, dx in self.taps[layer]]
            below = torch.addmm(weights.vertical_bias, torch.cat(seen, -1).flatten(0, 1), weights.vertical)
            below = below.unflatten(0, (self.n, self.width)) + above[:, min(i, above.shape[1] - 1)]
            beside = weights.horizontal_bias + beside[:, min(i, beside.shape[1] - 1)]
            self.bases[layer].copy_(below @ weights.link + beside)
            if layer + 1 < len(self.rings):
                r, (a, b) = self.reaches[layer + 1], below.chunk(2, -1)
                self.rings[layer + 1][:, i % (r + 1), r : r + self.width] = a.tanh() * b.sigmoid()

    @cached_property
    def _native(self) -> tuple[Any, ...]:
        """What pixel_params and draw_bits take first."""
        w = self.weights
        head = [w.skip, w.skip_bias, w.hidden, w.hidden_bias, w.output, w.output_bias]
        horizontal = [layer.horizontal for layer in w.layers]
        step, step_bias = ([getattr(layer, name) for layer in w.layers[:-1]] for name in ("step", "step_bias"))
        return self.bases, self.state, horizontal, step, step_bias, head, self.memory, self.reaches, self.channels

    def _native_pixel(self, j: int, group: int) -> Tensor:
        return torch.ops.infovae_fast.pixel_params(*self._native, j, group)

    def _pixel(self, j: int, group: int) -> Tensor:
        """The horizontal stack and the head at column j: params [n, P/G]."""
        weights, state, own, layers = self.weights, self.state, self._slice(self.maps, group), len(self.bases)
        if group == 0 and self.groups > 1:  # what is left of another pixel has no weight, but NaN times that is NaN
            self.memory.zero_()
            for reach, h in zip(self.reaches, state, strict=True):
                h.unflatten(1, (reach + self.width, -1))[:, reach + j].zero_()
        o, s, t = self.memory.split([layers * self.maps, self.maps, self.maps], 1)
        o = o.unflatten(1, (layers, self.maps))
        for layer, table in enumerate(weights.layers):
            matrix = table.horizontal[group]  # [taps * Cin, 2C/G]
            start = j * (self.maps if layer else self.channels)
            seen = state[layer][:, start : start + len(matrix)]
            f = torch.addmm(self.bases[layer][:, j, self._slice(2 * self.maps, group)], seen, matrix)
            a, b = f.chunk(2, 1)
            torch.mul(a.tanh_(), b.sigmoid_(), out=o[:, layer, own])
            if table.step is not None and table.step_bias is not None:
                h = torch.addmm(table.step_bias[own], o[:, layer], table.step[group])
                if layer:
                    h += state[layer][:, self._place(layer, j, own)]
                state[layer + 1][:, self._place(layer + 1, j, own)] = h
        s[:, own] = torch.addmm(weights.skip_bias[own], o.flatten(1), weights.skip[group]).relu_()
        t[:, own] = torch.addmm(weights.hidden_bias[own], s, weights.hidden[group]).relu_()
        p = self._slice(len(weights.output_bias), group)
        return torch.addmm(weights.output_bias[p], t, weights.output[group])

    def _slice(self, channels: int, group: int) -> slice:
        return slice(group * channels // self.groups, (group + 1) * channels // self.groups)

    def _place(self, layer: int, j: int, own: slice) -> slice:
        """Where h_layer of column j and a group lies in the flat row."""
        start = (self.reaches[layer] + j) * self.maps
        return slice(start + own.start, start + own.stop)


THREADS, SLICES, AHEAD, DEEP = 256, 32, 8, 16  # kThreads, kMaxSlices, kAhead and kDeep of csrc/cuda/incremental.cu
MOST_LAYERS, MOST_MAPS = 32, 1024


class Images:
    """`GatedPixelCNN`, whole images in one launch of csrc/cuda/incremental.cu."""

    def __init__(self, decoder: GatedPixelCNN, z: Tensor | None, n: int) -> None:  # n: that of `Incremental`
        numbers = numbers_of(decoder)
        lanes = _lanes(numbers.dtype)
        self.memory = numbers.index_select(0, table(structure_of(decoder), lanes, numbers.device))
        rest = -2 * decoder.maps % lanes
        conditions = [c for pair in conditions_of(decoder, z, numbers.dtype) for c in pair]
        self.conditions = [F.pad(c, (0, rest)) for c in conditions] if rest else conditions
        reaches = [layer.vertical.mask.kernel_size // 2 for layer in decoder.layers]
        self.sizes = [decoder.maps, decoder.data_channels, decoder.head[-1].weight.shape[2], reaches[0], reaches[-1]]

    def draw(
        self, uniforms: Tensor, known: Tensor, mask: Tensor, temperature: float, levels: int = 0, mixtures: int = 0
    ) -> Tensor:
        """Images of bits, of `levels` by a softmax, or by a mixture of logistics; `known` where the mask says so."""
        return self._leaf([*self.sizes, levels, mixtures], uniforms, known, mask, temperature, False)[0]

    def params(self, x: Tensor) -> Tensor:
        """Of every pixel of x, [n, P, H, W]."""
        return self._leaf([*self.sizes, 0, 0], None, x.to(self.memory), None, 1.0, True)[1]

    def _leaf(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.infovae_fast.draw_images(self.memory, self.conditions, *inputs)


@lru_cache(maxsize=4)
def table(structure: Structure, lanes: int, device: torch.device) -> Tensor:
    """Where in `numbers_of` all weights are, as csrc/cuda/incremental.cu reads them, in vectors of so many.

    First the vertical stack, layer by layer: matrix, bias, link, its bias, padded with zeros to whole vectors. Then
    the tape of each group, its horizontal matrices in the order of their use. Then the biases of the horizontal stack.
    """
    weights, wide = places(structure), -structure[0][1][2] % lanes
    parts = []
    for (_, shape, _), layer in zip(structure[::4], weights.layers, strict=False):
        vertical = layer.vertical.view(shape)  # [taps, Cin, 2C]
        parts += [
            F.pad(vertical, (0, wide, 0, -shape[1] % lanes)),
            F.pad(layer.vertical_bias, (0, wide)),
            F.pad(layer.link, (0, wide, 0, wide)),
            F.pad(layer.horizontal_bias, (0, wide)),
        ]
    for group in range(len(weights.skip)):
        for layer in weights.layers:
            parts += [_steps(m[group], lanes) for m in (layer.horizontal, layer.step) if m is not None]
        parts += [_steps(m[group], lanes) for m in (weights.skip, weights.hidden, weights.output)]
    parts += [layer.step_bias for layer in weights.layers if layer.step_bias is not None]
    parts += [weights.skip_bias, weights.hidden_bias, weights.output_bias]
    return torch.cat([part.flatten() for part in parts]).to(device, torch.int32)


def _steps(matrix: Tensor, lanes: int) -> Tensor:
    """[K, M] -> [steps, THREADS, lanes]: in step v thread t has columns t % quads and row t // quads + v slices."""
    matrix = F.pad(matrix, (0, -matrix.shape[1] % lanes))
    slices = min(THREADS * lanes // matrix.shape[1], SLICES)
    matrix = F.pad(matrix, (0, 0, 0, -len(matrix) % slices)).unflatten(0, (-1, slices)).flatten(1)
    return F.pad(matrix, (0, THREADS * lanes - matrix.shape[1])).unflatten(1, (THREADS, lanes))


def _lanes(dtype: torch.dtype) -> int:
    return 16 // max(dtype.itemsize, 4)


def cuda_limits(decoder: GatedPixelCNN, shared: int) -> str | None:
    """What csrc/cuda/incremental.cu has no room for, where a block may have so many bytes of shared memory."""
    layers, maps = len(decoder.layers), decoder.maps
    if layers > MOST_LAYERS or maps > MOST_MAPS:
        return f"got {layers} layers of {maps} maps, accepted: at most {MOST_LAYERS} of {MOST_MAPS}"
    lanes, groups = _lanes(next(decoder.parameters()).dtype), decoder.data_channels
    params = decoder.head[-1].weight.shape[2]
    if (most := max(2 * maps, params) // groups) > THREADS * lanes:
        return f"got {most} columns for a colour, accepted: at most {THREADS * lanes}"
    if (bytes_ := shared_memory(decoder)) > shared:
        return f"an image needs {bytes_} bytes of shared memory, accepted here: at most {shared}"
    return None


def shared_memory(decoder: GatedPixelCNN) -> int:
    """Bytes that a block with one image needs: the larger of those for a row and for a pixel."""
    channels, _, width = decoder.image_shape
    maps, groups, layers, params = (
        decoder.maps,
        decoder.data_channels,
        len(decoder.layers),
        decoder.head[-1].weight.shape[2],
    )
    first, other = (decoder.layers[k].vertical.mask.kernel_size // 2 for k in (0, -1))
    itemsize = max(next(decoder.parameters()).dtype.itemsize, 4)
    lanes = 16 // itemsize

    def whole(count: int) -> int:
        return -(-count // lanes) * lanes

    def sums(columns: int) -> int:
        return min(THREADS * lanes // whole(columns), SLICES) * (whole(columns) + lanes)

    wide = whole(2 * maps)
    tile = min(THREADS // -(-wide // 8) * 2, width)
    row = 2 * tile * (DEEP + lanes) + 2 * DEEP * wide + tile * (wide + lanes)
    offsets = 4 * (tile + (2 * max(first, other) + 1) ** 2)
    state = (2 * first + 1) * channels + (layers - 1) * (2 * other + 1) * maps
    pixel = whole(state + (layers + 2) * maps + params // groups)
    pixel += max(map(sums, (2 * maps // groups, maps // groups, params // groups)))
    fixed = AHEAD * THREADS * lanes + whole((layers + 1) * maps + params)
    return itemsize * fixed + max(itemsize * row + offsets, itemsize * pixel)
