"""The network of the InfoVAE authors a row and a pixel at a time, every number computed once: the sampler's "cached".

Its vertical stack reads the pixels to the left as well: all of it moves from pixel to pixel. What a layer reads of
finished rows is one product of matrices for the whole row, `above`. What is left for a pixel are products with the
columns to the left, the links and the horizontal stack.
"""

from typing import Any

import torch
from torch import Tensor

from infovae_fast.masked_conv import MaskedConv2d, gated
from infovae_fast.models.incremental import Callback, Chooser, params_of_pixels
from infovae_fast.models.pixelcnn import GatedPixelCNN


class _Product:
    """A convolution as a product, [n, taps Cin] in raster order -> [n, Cout]; what z adds takes the bias's place."""

    def __init__(self, conv: MaskedConv2d, options: dict[str, Any], condition: Tensor | None = None) -> None:
        self.reach = conv.mask.kernel_size // 2
        added: Any = conv.bias if condition is None else condition
        self.matrix, self.added = (t.detach().to(**options) for t in (conv.weight.flatten(0, 1), added))

    def __call__(self, columns: Tensor) -> Tensor:
        return torch.addmm(self.added, columns, self.matrix)


class _Vertical:
    """v_l [n, C] at pixel after pixel -> gate(W_v * v_l + U_v z) [n, C]."""

    def __init__(self, conv: MaskedConv2d, n: int, width: int, options: dict[str, Any], *condition: Tensor) -> None:
        product, (_, channels, _) = _Product(conv, options, *condition), conv.weight.shape
        self.reach, self.width, self.added = product.reach, width, product.added.unsqueeze(-2)  # [n or 1, 1, 2C]
        rows = sum(dy < 0 for dy, _ in conv.mask.taps) * channels
        self.finished, self.left = product.matrix.split([rows, len(product.matrix) - rows])
        self.columns = len(self.left) // channels
        r = self.reach
        self.rows = torch.zeros(n, r + 1, r + width + r, channels, **options)  # row i in place i % (r + 1)
        self.above: Tensor  # [n, W, 2C]

    def row(self, i: int) -> None:
        r = self.reach
        offsets = [(dy, dx) for dy in range(-r, 0) for dx in range(-r, r + 1)]
        seen = [self.rows[:, (i + dy) % (r + 1), r + dx : r + dx + self.width] for dy, dx in offsets]
        columns = torch.cat(seen, -1) if seen else self.rows.new_zeros(len(self.rows), self.width, 0)
        self.above = columns @ self.finished + self.added

    def put(self, i: int, j: int, v: Tensor) -> None:
        self.rows[:, i % (self.reach + 1), self.reach + j] = v

    def pixel(self, i: int, j: int) -> Tensor:
        left = self.rows[:, i % (self.reach + 1), j : j + self.columns]
        return gated(torch.addmm(self.above[:, j], left.flatten(1), self.left), "tanh")


class _Horizontal:
    """v_{l+1} and h_l [n, C] at pixel after pixel -> h_{l+1} [n, C]."""

    def __init__(self, layer: Any, n: int, width: int, options: dict[str, Any], *condition: Tensor) -> None:
        self.link, self.out = _Product(layer.link, options), _Product(layer.out, options)
        self.own = _Product(layer.horizontal, options, *condition)
        self.rows = torch.zeros(n, self.own.reach + width, len(self.out.added), **options)  # the row so far

    def pixel(self, j: int, v: Tensor, h: Tensor) -> Tensor:
        r = self.own.reach
        self.rows[:, r + j] = h
        f = self.own(self.rows[:, j : j + r + 1].flatten(1)) + self.link(v).relu().repeat(1, 2)
        return self.out(gated(f, "tanh")).relu() + h


class Incremental2017:
    """`GatedPixelCNN(variant="infovae2017")`; see `infovae_fast.models.incremental.Incremental`."""

    def __init__(self, decoder: GatedPixelCNN, z: Tensor | None, n: int) -> None:
        like = next(decoder.parameters())
        options: dict[str, Any] = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
        self.new_image = torch.zeros(n, *decoder.image_shape, **options)
        self.vertical, self.horizontal = list[_Vertical](), list[_Horizontal]()
        for layer, condition in zip(decoder.layers, decoder.conditions(z), strict=True):
            self.vertical.append(_Vertical(layer.vertical, n, decoder.image_shape[2], options, *condition[:1]))
            if not layer.first:
                self.horizontal.append(_Horizontal(layer, n, decoder.image_shape[2], options, *condition[1:]))
        self.start = decoder.layers[0].start.detach().relu().to(**options).expand(n, -1)  # h_1
        self.hidden, self.output = (_Product(conv, options) for conv in (decoder.head[1], decoder.head[3]))

    @torch.no_grad()
    def run(self, choose: Chooser, callback: Callback | None = None) -> Tensor:
        """choose(i, j, 0, params [n, P]) -> pixel (i, j) [n, C]."""
        x = self.new_image.clone()
        _, _, height, width = x.shape
        for layer in self.vertical:
            layer.rows.zero_()  # above the first row
        for i in range(height):
            for layer in self.vertical:
                layer.row(i)
            for j in range(width):
                x[:, :, i, j] = choose(i, j, 0, self._pixel(i, j))
                self.vertical[0].put(i, j, x[:, :, i, j])
            if callback is not None:
                callback(i + 1, height)
        return x

    def params(self, x: Tensor) -> Tensor:
        """Of every pixel of x, [n, P, H, W]."""
        return params_of_pixels(self.run, x, 1)

    def _pixel(self, i: int, j: int) -> Tensor:
        v, h = self.vertical[0].pixel(i, j), self.start
        for vertical, horizontal in zip(self.vertical[1:], self.horizontal, strict=True):
            vertical.put(i, j, v)
            v = vertical.pixel(i, j)
            h = horizontal.pixel(j, v, h)
        return self.output(self.hidden(h.relu()).relu())
