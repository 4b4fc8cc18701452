"""`PixelCNNPlusPlus` a row and a pixel at a time, every number computed once: the sampler's strategy "cached".

Stream u of row i reads finished rows: once for the row at full resolution, where i is even once at half, and so on. So
does what u gives to ul and to params: `base` of each block. What is left for a pixel is a product of matrices for each
of ul's convolutions, at half the resolution for one pixel of four.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infovae_fast.masked_conv import gated
from infovae_fast.models.incremental import Callback, Chooser, params_of_pixels
from infovae_fast.models.pixelcnn_pp import RESOLUTIONS, PixelCNNPlusPlus, _Block, _Blocks, _both, _Conv

Table = tuple[Tensor, Tensor]  # matrix [inputs, outputs], bias [outputs]


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
    """The row above and the row so far of what a 2 x 2 convolution of stream ul reads, after a column of zeros."""

    def __init__(self, conv: _Conv, n: int, width: int, options: dict[str, Any]) -> None:
        self.matrix, self.bias = _table(conv, options)
        self.rows = torch.zeros(n, 2, 1 + width, len(self.matrix) // 4, **options)

    def push(self, j: int, value: Tensor) -> Tensor:  # [n, C] -> [n, 4 C]
        self.rows[:, 1, 1 + j] = value
        return self.rows[:, :, j : j + 2].flatten(1)

    def finish_row(self) -> None:
        self.rows[:, 0] = self.rows[:, 1]


class _Larger:
    """What the coarse resolution has written of two rows of the next finer one."""

    def __init__(self, conv: Any, n: int, options: dict[str, Any]) -> None:
        self.weight, self.bias = (t.detach().to(**options) for t in (conv.weight.transpose(0, 1), conv.bias))
        self.left, self.width = conv.pad[1], conv.size[1]
        self.rows = torch.zeros(n, 2, self.width + 1, len(self.bias), **options)

    def row(self, coarse: Tensor) -> None:  # [n, F, w']
        rows = F.conv_transpose2d(coarse[:, :, None], self.weight, self.bias, 2)  # [n, F, 2, at least w]
        self.rows = rows[..., self.left : self.left + self.width].permute(0, 2, 3, 1)

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
        self.ul_first, self.ul_second = (_Pixels(conv, n, width, options) for conv in (ul.first, ul.second))
        # e(a) of a = [u, ul'] is [u, ul', -u, -ul'] under elu.
        maps, (matrix, bias) = u.first.bias.numel(), _table(ul.aside, options)
        parts = matrix.unflatten(0, (2, -1, maps))  # [2, 1 or 2, F, F]
        self.from_u, self.from_passed = parts[:, 0].flatten(0, 1), parts[:, 1:].flatten(0, 2)
        self.first_bias = bias + self.ul_first.bias
        self.base: tuple[
            Tensor, Tensor
        ]  # of the row: all of c and of f that is not read from ul, [n, F, w], [n, 2F, w]

    def row(self, i: int, u: Tensor, passed: Tensor | None = None) -> Tensor:  # [n, F, w] -> [n, F, w]
        c = self.first(_both(u))
        if passed is not None and self.aside is not None:
            matrix, bias = self.aside
            c = c + (_both(passed).mT @ matrix + bias).mT
        conditions = [self._condition(i, matrix) for matrix in self.conditions]  # [n, 2F, 1 or w] or 0
        u = u + gated(self.second(_both(c)) + conditions[0], "glu")
        second = self.ul_second.bias[:, None] + conditions[1] + torch.zeros_like(u[:1, :1])  # [n or 1, 2F, w]
        self.base = (_both(u).mT @ self.from_u + self.first_bias).mT, second.expand(len(u), -1, -1)
        return u

    def _condition(self, i: int, matrix: Tensor | None) -> Tensor | float:
        if matrix is None or self.code is None:
            return 0.0
        return (self.code[:, :, min(i, self.code.shape[2] - 1)].mT @ matrix).mT

    def pixel(self, j: int, ul: Tensor, passed: Tensor | None = None) -> Tensor:  # [n, F] -> [n, F]
        first, second = self.base
        c = torch.addmm(first[:, :, j], self.ul_first.push(j, _both(ul)), self.ul_first.matrix)
        if passed is not None:
            c = torch.addmm(c, _both(passed), self.from_passed)
        f = torch.addmm(second[:, :, j], self.ul_second.push(j, _both(c)), self.ul_second.matrix)
        return ul + gated(f, "glu")


class IncrementalPlusPlus:
    """`PixelCNNPlusPlus` a row and a pixel at a time, in float32 or better."""

    @torch.no_grad()
    def __init__(self, decoder: PixelCNNPlusPlus, z: Tensor | None, n: int) -> None:
        decoder.check_code(z)
        like = decoder.above.bias
        options: dict[str, Any] = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
        self.n, self.options = n, options
        self.channels, self.height, self.width = decoder.image_shape
        widths = [-(-self.width // 2**r) for r in range(RESOLUTIONS)]
        codes = [code(z).to(**options) for code in decoder.codes] if decoder.inputs else [None] * RESOLUTIONS
        # By resolution: blocks of the way up and of the way down, and what leads to the next coarser one and back.
        self.up, self.down = ([list[_Layer]() for _ in widths] for _ in range(2))
        self.smaller: list[tuple[_Rows, _Pixels]] = []
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
        self.head = _table(decoder.head[1], options)

    @torch.no_grad()
    def run(self, choose: Chooser, callback: Callback | None = None) -> Tensor:
        """choose(i, j, 0, params [n, P]) -> pixel (i, j) [n, C]."""
        x = torch.zeros(self.n, self.channels, self.height, self.width, **self.options)
        y = torch.zeros(
            self.n, self.channels + 1, 2, 1 + self.width, **self.options
        )  # row i - 1 and i, of 2 x - 1 and 1
        matrix, bias = self.left
        head, head_bias = self.head
        for i in range(self.height):
            if i:
                self.above.push(y[:, :, 1, 1:])
                self.row_above.push(y[:, :, 1, 1:])
            y[:, :, 0] = y[:, :, 1]
            self._row(0, i, self.above.convolved())
            start = self.row_above.convolved() + bias[:, None]  # [n, F, w]
            for j in range(self.width):
                seen = y[:, :, :, j].mT.flatten(1)  # [n, 2 (C + 1)]
                ul = self._pixel(0, i, j, torch.addmm(start[:, :, j], seen, matrix))
                value = choose(i, j, 0, torch.addmm(head_bias, F.elu(ul), head))
                x[:, :, i, j] = value
                y[:, :-1, 1, 1 + j] = 2 * value - 1
                y[:, -1, 1, 1 + j] = 1
            self._finish_row(i)
            if callback is not None:
                callback(i + 1, self.height)
        return x

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
                larger.row(self._row(r + 1, i // 2, smaller.convolved()))
            u = larger.rows[:, i % 2].mT
        else:
            passed.pop()
        for layer in self.down[r]:
            u = layer.row(i, u, passed.pop())
        return u

    def _pixel(self, r: int, i: int, j: int, ul: Tensor) -> Tensor:
        """Stream ul of a pixel, likewise: [n, F] -> [n, F]."""
        passed = [ul]
        for layer in self.up[r]:
            ul = layer.pixel(j, ul)
            passed.append(ul)
        if r < RESOLUTIONS - 1:
            smaller, larger = self.smaller[r][1], self.larger[r][1]
            seen = smaller.push(j, ul)
            if i % 2 == j % 2 == 0:
                coarse = self._pixel(r + 1, i // 2, j // 2, torch.addmm(smaller.bias, seen, smaller.matrix))
                larger.pixel(j, coarse)
            ul = larger.rows[:, i % 2, j]
        else:
            passed.pop()
        for layer in self.down[r]:
            ul = layer.pixel(j, ul, passed.pop())
        return ul

    def _finish_row(self, i: int) -> None:
        for r in range(RESOLUTIONS):
            if i % 2**r == 0:
                for layer in self.up[r] + self.down[r]:
                    layer.ul_first.finish_row()
                    layer.ul_second.finish_row()
                if r < RESOLUTIONS - 1:
                    self.smaller[r][1].finish_row()


def _table(conv: _Conv, options: dict[str, Any]) -> Table:
    """[height * width * Cin, Cout] and [Cout]."""
    return conv.weight.detach().permute(2, 3, 1, 0).flatten(0, 2).to(**options), conv.bias.detach().to(**options)


def _condition(block: _Block, options: dict[str, Any]) -> Tensor | None:
    """U^T [D or C', 2F]."""
    return block.condition.weight.detach()[:, :, 0, 0].T.to(**options) if hasattr(block, "condition") else None
