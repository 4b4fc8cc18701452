"""`PixelCNNPlusPlus` a row and a pixel at a time, every number computed once: the sampler's strategy "cached".

Stream u of row i reads finished rows: once for the row at full resolution, where i is even once at half, and so on. So
does what u gives to ul and to params: `base` of each block. What is left for a pixel is a product of matrices for each
of ul's convolutions, at half the resolution for one pixel of four. They are small: on a GPU the products of a pixel are
recorded as a CUDA graph, which the pixels below it use again: of every `PERIOD` rows the same ones reach as deep.
"""

from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infovae_fast.cuda_graph import CudaGraph
from infovae_fast.gated_residual import elu_pair_reference
from infovae_fast.masked_conv import gated
from infovae_fast.models.incremental import Callback, Chooser, params_of_pixels
from infovae_fast.models.pixelcnn_pp import RESOLUTIONS, PixelCNNPlusPlus, _Block, _Blocks, _Conv

Table = tuple[Tensor, Tensor]  # matrix [inputs, outputs], bias [outputs]
PERIOD = 2 ** (RESOLUTIONS - 1)  # rows of the image to one of the coarsest resolution


class _Rows:
    """The last rows of what a convolution of stream u reads, with its zeros on the left and on the right."""

    def __init__(self, conv: _Conv, n: int, width: int, options: dict[str, Any]) -> None:
        self.weight, self.bias = (t.detach().to(**options) for t in (conv.weight, conv.bias))
        (_, channels, height, _), (self.left, right, _, _) = self.weight.shape, conv.pad
        self.stride = conv.stride
        self.rows = torch.zeros(n, channels, height, self.left + width + right, **options)

    def push(self, row: Tensor) -> None:  # [n, C, w]
        self.rows[:, :, :-1] = self.rows[:, :, 1:].clone()
        self.rows[:, :, -1, self.left : self.left + row.shape[2]] = row

    def convolved(self) -> Tensor:  # [n, C', w']
        return F.conv2d(self.rows, self.weight, self.bias, self.stride)[:, :, 0]

    def __call__(self, row: Tensor) -> Tensor:
        self.push(row)
        return self.convolved()


class _Pixels:
    """The row so far of what a 2 x 2 convolution of stream ul reads, after a column of zeros: until a pixel is written,
    what lies there is the row above. The views of its pixels are made once."""

    def __init__(self, conv: _Conv, n: int, width: int, options: dict[str, Any]) -> None:
        matrix, self.bias = _table(conv, options)  # rows: (above, here) x (left, here) x C
        above, self.matrix = matrix.chunk(2)
        self.above_left, self.above_here = above.chunk(2)
        self.row = torch.zeros(n, 1 + width, len(matrix) // 4, **options)
        self.at = self.row[:, 1:].unbind(1)  # [n, C], to write to
        self.seen = [self.row[:, j : j + 2].flatten(1) for j in range(width)]  # [n, 2 C]

    def above(self) -> Tensor:  # [n, w, C'], what comes from the row above, before the first pixel of a row
        return self.row[:, :-1] @ self.above_left + self.row[:, 1:] @ self.above_here


class _BothOfPixels(_Pixels):
    """Of e(values)."""

    def __init__(self, conv: _Conv, n: int, width: int, options: dict[str, Any]) -> None:
        super().__init__(conv, n, width, options)
        self.halves = [pixel.unflatten(1, (2, -1)) for pixel in self.at]  # [n, 2, C / 2]
        self.signs = torch.tensor([[1.0], [-1.0]], **options)

    def write(self, j: int, value: Tensor) -> Tensor:  # [n, C / 2] -> [n, 2 C]
        torch.mul(value.unsqueeze(1), self.signs, out=self.halves[j])
        F.elu_(self.at[j])
        return self.seen[j]


class _Larger:
    """What the coarse resolution has written of two rows of the next finer one."""

    def __init__(self, conv: Any, n: int, options: dict[str, Any]) -> None:
        self.weight, self.bias = (t.detach().to(**options) for t in (conv.weight.transpose(0, 1), conv.bias))
        self.left, self.width = conv.pad[1], conv.size[1]
        self.rows = torch.zeros(n, 2, self.width + 1, len(self.bias), **options)

    def row(self, coarse: Tensor) -> None:  # [n, F, w']
        rows = F.conv_transpose2d(coarse[:, :, None], self.weight, self.bias, 2)  # [n, F, 2, at least w]
        self.rows[:, :, : self.width] = rows[..., self.left : self.left + self.width].permute(0, 2, 3, 1)

    def pixel(self, j: int, coarse: Tensor) -> None:  # [n, F] -> pixels j and j + 1 of both rows
        four = coarse @ self.weight.flatten(1)  # [n, F 2 2]
        self.rows[:, :, j : j + 2] = four.unflatten(1, (-1, 2, 2)).permute(0, 2, 3, 1) + self.bias


class _Layer:
    """A block of both streams."""

    def __init__(self, blocks: _Blocks, code: Tensor | None, n: int, width: int, options: dict[str, Any]) -> None:
        u, ul = blocks.u, blocks.ul
        self.first, self.second = (_Rows(conv, n, width, options) for conv in (u.first, u.second))
        self.aside = None if u.aside is None else _table(u.aside, options)
        self.code, self.conditions = code, [_condition(block, options) for block in (u, ul)]
        self.ul_first, self.ul_second = (_BothOfPixels(conv, n, width, options) for conv in (ul.first, ul.second))
        # e(a) of a = [u, ul'] is [u, ul', -u, -ul'] under elu.
        maps, (matrix, bias) = u.first.bias.numel(), _table(ul.aside, options)
        parts = matrix.unflatten(0, (2, -1, maps))  # [2, 1 or 2, F, F]
        self.from_u, self.from_passed = parts[:, 0].flatten(0, 1), parts[:, 1:].flatten(0, 2)
        self.first_bias = bias + self.ul_first.bias
        # Of the row: all of c and of f that is not read from its pixels of ul, [n, w, F] and [n, w, 2F].
        self.base = [torch.zeros(n, width, channels, **options) for channels in (maps, 2 * maps)]
        self.base_c, self.base_f = (base.unbind(1) for base in self.base)

    def row(self, i: int, u: Tensor, passed: Tensor | None = None) -> Tensor:  # [n, F, w] -> [n, F, w]
        c = self.first(elu_pair_reference([u]))
        if passed is not None and self.aside is not None:
            matrix, bias = self.aside
            c = c + (elu_pair_reference([passed]).mT @ matrix + bias).mT
        conditions = [self._condition(i, matrix) for matrix in self.conditions]  # [n, 1 or w, 2F] or 0
        of_u = conditions[0] if isinstance(conditions[0], float) else conditions[0].mT
        u = u + gated(self.second(elu_pair_reference([c])) + of_u, "glu")
        self.base[0].copy_(elu_pair_reference([u]).mT @ self.from_u + self.first_bias + self.ul_first.above())
        self.base[1].copy_(self.ul_second.above() + (self.ul_second.bias + conditions[1]))
        return u

    def _condition(self, i: int, matrix: Tensor | None) -> Tensor | float:
        if matrix is None or self.code is None:
            return 0.0
        return self.code[:, :, min(i, self.code.shape[2] - 1)].mT @ matrix

    def pixel(self, j: int, ul: Tensor, passed: Tensor | None = None) -> Tensor:
        """ul [n, F] and e(passed) [n, 2F] -> [n, F]. Afterwards ul_first.at[j] is e(ul)."""
        c = torch.addmm(self.base_c[j], self.ul_first.write(j, ul), self.ul_first.matrix)
        if passed is not None:
            c.addmm_(passed, self.from_passed)
        f = torch.addmm(self.base_f[j], self.ul_second.write(j, c), self.ul_second.matrix)
        return F.glu(f, 1).add_(ul)


class IncrementalPlusPlus:
    """`PixelCNNPlusPlus` a row and a pixel at a time, in float32 or better."""

    @torch.no_grad()
    def __init__(self, decoder: PixelCNNPlusPlus, z: Tensor | None, n: int) -> None:
        like = decoder.above.bias
        options: dict[str, Any] = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
        self.n, self.options = n, options
        self.channels, self.height, self.width = decoder.image_shape
        widths = [-(-self.width // 2**r) for r in range(RESOLUTIONS)]
        codes = [code(z).to(**options) for code in decoder.codes] if decoder.inputs else [None] * RESOLUTIONS
        # By resolution: blocks of the way up and of the way down, and what leads to the next coarser one and back.
        self.up, self.down = ([list[_Layer]() for _ in widths] for _ in range(2))
        self.smaller: list[tuple[_Rows, _Pixels]] = []
        # By resolution: what ul starts with there, but for what comes from its own row, [n, w, F].
        maps = decoder.above.bias.numel()
        self.start = [torch.zeros(n, width, maps, **options) for width in widths]
        self.larger: list[tuple[_Larger, _Larger]] = []
        for blocks, layers in ((decoder.up, self.up), (decoder.down, self.down)):
            for block in blocks:
                if isinstance(block, _Blocks):
                    r = block.resolution
                    layers[r].append(_Layer(block, codes[r], n, widths[r], options))
                elif blocks is decoder.up:
                    width = widths[len(self.smaller)]
                    self.smaller.append((_Rows(block.u, n, width, options), _Pixels(block.ul, n, width, options)))
                else:
                    self.larger.insert(0, (_Larger(block.u, n, options), _Larger(block.ul, n, options)))
        self.above, self.row_above = (
            _Rows(conv, n, self.width, options) for conv in (decoder.above, decoder.row_above)
        )
        self.left = _table(decoder.left, options)
        self.y = torch.zeros(n, self.channels + 1, 2, 1 + self.width, **options)  # row i - 1 and i, of 2 x - 1 and 1
        self.head = _table(decoder.head[1], options)

    @torch.no_grad()
    def run(self, choose: Chooser, callback: Callback | None = None) -> Tensor:
        """choose(i, j, 0, params [n, P]) -> pixel (i, j) [n, C]."""
        x = torch.zeros(self.n, self.channels, self.height, self.width, **self.options)
        y, graphs = self.y, self._graphs() if x.is_cuda and self.n else {}
        for i in range(self.height):
            if i:
                self.above.push(y[:, :, 1, 1:])
                self.row_above.push(y[:, :, 1, 1:])
            y[:, :, 0] = y[:, :, 1]
            self._row(0, i, self.above.convolved())
            self.start[0].copy_((self.row_above.convolved() + self.left[1][:, None]).mT)
            for j in range(self.width):
                place = i % PERIOD, j
                # The first row gets the libraries ready.
                params = graphs[place]().clone() if i and graphs else self._params(*place)
                value = choose(i, j, 0, params)
                x[:, :, i, j] = value
                y[:, :-1, 1, 1 + j] = 2 * value - 1
                y[:, -1, 1, 1 + j] = 1
            if callback is not None:
                callback(i + 1, self.height)
        return x

    def _graphs(self) -> dict[tuple[int, int], CudaGraph[Tensor]]:
        device = self.y.device
        with torch.cuda.device(device):
            shared: dict[str, Any] = {"pool": torch.cuda.graph_pool_handle(), "stream": torch.cuda.Stream()}
        places = product(range(PERIOD), range(self.width))
        return {place: CudaGraph(partial(self._params, *place), device=device, eager=0, **shared) for place in places}

    def _params(self, i: int, j: int) -> Tensor:
        """Of pixel (i, j), [n, P]; i counts modulo `PERIOD`."""
        seen = self.y[:, :, :, j].mT.flatten(1)  # [n, 2 (C + 1)]
        ul = self._pixel(0, i, j, torch.addmm(self.start[0][:, j], seen, self.left[0]))
        matrix, bias = self.head
        return torch.addmm(bias, F.elu(ul), matrix)

    def params(self, x: Tensor) -> Tensor:
        """Of every pixel of x, [n, P, H, W]."""
        return params_of_pixels(self.run, x, 1)

    def _row(self, r: int, i: int, u: Tensor) -> Tensor:
        """Stream u of row i and resolution r, up, through the coarser ones, and down: [n, F, w] -> [n, F, w]."""
        passed = [u]
        for layer in self.up[r]:
            u = layer.row(i, u)
            passed.append(u)
        if r < RESOLUTIONS - 1:
            smaller, larger = self.smaller[r][0], self.larger[r][0]
            smaller.push(u)
            if i % 2 == 0:
                self.start[r + 1].copy_((self.smaller[r][1].above() + self.smaller[r][1].bias)[:, ::2])
                larger.row(self._row(r + 1, i // 2, smaller.convolved()))
            u = larger.rows[:, i % 2, : larger.width].mT
        else:
            passed.pop()
        for layer in self.down[r]:
            u = layer.row(i, u, passed.pop())
        return u

    def _pixel(self, r: int, i: int, j: int, ul: Tensor) -> Tensor:
        """Stream ul of a pixel, likewise: [n, F] -> [n, F]."""
        passed = []  # e of what the blocks read, and of what the last one gives
        for layer in self.up[r]:
            ul = layer.pixel(j, ul)
            passed.append(layer.ul_first.at[j])
        if r < RESOLUTIONS - 1:
            smaller, larger = self.smaller[r][1], self.larger[r][1]
            smaller.at[j].copy_(ul)
            passed.append(elu_pair_reference([ul]))
            if i % 2 == j % 2 == 0:
                start = torch.addmm(self.start[r + 1][:, j // 2], smaller.seen[j], smaller.matrix)
                larger.pixel(j, self._pixel(r + 1, i // 2, j // 2, start))
            ul = larger.rows[:, i % 2, j]
        for layer in self.down[r]:
            ul = layer.pixel(j, ul, passed.pop())
        return ul


def _table(conv: _Conv, options: dict[str, Any]) -> Table:
    """[height * width * Cin, Cout] and [Cout]."""
    return conv.weight.detach().permute(2, 3, 1, 0).flatten(0, 2).to(**options), conv.bias.detach().to(**options)


def _condition(block: _Block, options: dict[str, Any]) -> Tensor | None:
    """U^T [D or C', 2F]."""
    return block.condition.weight.detach()[:, :, 0, 0].T.to(**options) if hasattr(block, "condition") else None
