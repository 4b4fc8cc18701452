"""PixelCNN++: a decoder that draws every pixel given z and the pixels before it, in two streams at three resolutions.

    log p(x|z) = sum_p log p(x_p | x_<p, z)          pixels p in raster order, likelihood.nll(decoder(z, x), x)

Stream u knows the rows above, stream ul pixels above or left. With y = [2 x - 1, 1] (the map of ones tells black from
the zeros around the image), convolutions W * over rectangles of offsets (dy, dx), and e(s) = elu([s, -s]):

    u  = W * y                              dy -2..-1, dx -1..1                                             [F]
    ul = W * y + W' * y                     dy -1, dx -1..1;   dy -1..0, dx -1                              [F]
    block(s, a) = s + f_a sigmoid(f_b),     f = W_2 * drop(e(c)) + U z,   c = W_1 * e(s) + N e(a)           [F]
                                            u: dy -1..0, dx -1..1;   ul: dy -1..0, dx -1..0

    up      u <- block(u),  ul <- block(ul, u)  B times at each resolution; between them W * of stride 2
    down    u <- block(u, u'),  ul <- block(ul, [u, ul'])  for all (u', ul') of the way up, the last first; between
            resolutions transposed W * of stride 2: p writes to 2 p + t, dy 0..1, dx -1..1 or 0..1, cropped
    params = N elu(ul)                                                                                      [P]

N is a product at one pixel. After h x w comes ceil(h/2) x ceil(w/2): any size is accepted. Params see every earlier
pixel up to 4 B + 2 rows and columns away, and of those further away what the coarse rows knew that end above.

**Contract.** The present is hidden once, at the input. Later rectangles end at their own pixel, at half the resolution
in the upper left of the four: there are no masked taps. What may not be seen is never read, NaN in the future stays
there, and on the CPU params keep every bit; on a GPU the convolution library may choose to transform whole tiles.

**Colours.** The likelihood joins the channels of a pixel (`DiscretizedLogisticMixture`), so data_channels = 1. Grey
images take any likelihood.

**Condition.** "global": U z is one vector for all pixels, linear in z, in every block. "spatial": U is 1x1 on a map
s(z) [C', h, w] of each resolution, s = relu(linear). Without z (inputs=0) both are missing.

**Start.** W = g v / |v|, one norm for each map that comes out, also of transposed convolutions. v is drawn from
N(0, 0.05^2); g and b come from data, one convolution after another, such that over images and pixels each map of
W * s + b has mean 0 and deviation 1 (0.1 for W_2; a map that is constant there is only centred). `initialise` does it,
and the first forward pass in train mode with gradients calls it, once in the life of a model. Other than the authors'
code does, zeros are shifted in before the first convolutions, not after them: every pixel has the bias.

Source: Salimans et al., arXiv 1701.05517, github.com/openai/pixel-cnn; Salimans & Kingma, arXiv 1602.07868.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infovae_fast.backends import check_name, transforms
from infovae_fast.gated_residual import TRITON, Operators, operators, weights_reference
from infovae_fast.models.autoregressive import Offsets, SpatialCode, check_inputs, check_sizes

PIXELCNN_PP = {"name": "pixelcnn_pp", "blocks": 5, "maps": 160, "dropout": 0.5}  # the paper's, for CIFAR-10

RESOLUTIONS = 3
Rectangle = tuple[tuple[int, int], tuple[int, int, int, int]]  # (height, width), (left, right, above, below)
ABOVE: Rectangle = (2, 3), (1, 1, 2, -1)  # so many zeros enter on a side; -1: so many pixels leave
ROW_ABOVE: Rectangle = (1, 3), (1, 1, 1, -1)
LEFT: Rectangle = (2, 1), (1, -1, 1, 0)
DOWN: Rectangle = (2, 3), (1, 1, 1, 0)
DOWN_RIGHT: Rectangle = (2, 2), (1, 0, 1, 0)
PIXEL: Rectangle = (1, 1), (0, 0, 0, 0)


class PixelCNNPlusPlus(nn.Module):
    """The decoder of this page: decoder(z, x) -> params [N, P, H, W] of p(x|z), each pixel's from the earlier ones.

    Args:
        inputs: dimension of z; 0 for a model without z.
        shape: of params, (P, H, W), P = likelihood.channels(image_channels).
        image_channels: C of the image.
        data_channels: 1: this decoder does not order the channels inside a pixel.
        blocks, maps: B and F.
        dropout: probability that `drop` sets a number to 0 in train mode; evaluate and sample in eval mode.
        condition: "global" or "spatial"; spatial_maps: C'.
        checkpoint_layers: keep each block's inputs only, and compute the rest again in the backward pass.
        backend: of what is not a convolution (`infovae_fast.gated_residual`): "auto", "triton" or "reference".

    Raises:
        ValueError: sizes that do not fit each other, unknown names. The forward pass raises a RuntimeError where the
            backend cannot run.
    """

    autoregressive = True
    shares_images = True  # among the codes of each

    def __init__(
        self,
        inputs: int,
        shape: Sequence[int],
        image_channels: int = 1,
        data_channels: int = 1,
        blocks: int = 2,
        maps: int = 32,
        dropout: float = 0.5,
        condition: str = "global",
        spatial_maps: int = 16,
        checkpoint_layers: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_sizes(locals())
        params, height, width = shape
        self.backend = backend
        self.inputs, self.image_shape, self.data_channels = inputs, (image_channels, height, width), data_channels
        self.blocks, self.dropout = blocks, dropout
        self.checkpoint_layers, self.initialised = checkpoint_layers, False
        sizes = [(math.ceil(height / 2**r), math.ceil(width / 2**r)) for r in range(RESOLUTIONS)]
        spatial = condition == "spatial" and inputs > 0
        options: dict[str, Any] = {"dropout": dropout, "code": spatial_maps if spatial else inputs}
        up, down = list[nn.Module](), list[nn.Module]()
        for r in range(RESOLUTIONS):
            up += [_Blocks(maps, r, passed=0, **options) for _ in range(blocks)]
            back: list[nn.Module] = [_Blocks(maps, r, passed=maps, **options) for _ in range(blocks)]
            if r < RESOLUTIONS - 1:
                up += [_Streams(_Conv(maps, maps, DOWN, stride=2), _Conv(maps, maps, DOWN_RIGHT, stride=2))]
                back += [_Blocks(maps, r, passed=maps, **options)]  # for what was there before the first block
            if r:
                back += [_Streams(_Larger(maps, DOWN, sizes[r - 1]), _Larger(maps, DOWN_RIGHT, sizes[r - 1]))]
            down = back + down
        self.above = _Conv(image_channels + 1, maps, ABOVE)
        self.row_above = _Conv(image_channels + 1, maps, ROW_ABOVE)
        self.left = _Conv(image_channels + 1, maps, LEFT)
        self.up: Any = nn.ModuleList(up)
        self.down: Any = nn.ModuleList(down)
        self.head: Any = nn.Sequential(nn.ELU(), _Conv(maps, params, PIXEL))
        if inputs:
            codes = [SpatialCode(inputs, (spatial_maps, *size)) for size in sizes] if spatial else None
            self.codes: Any = nn.ModuleList(codes or [nn.Unflatten(1, (inputs, 1, 1))] * RESOLUTIONS)

    def forward(self, z: Tensor | None, x: Tensor) -> Tensor:
        """params [S N, P, H, W] for z [S N, D] and x [N, C, H, W]: S codes for every image, code s of image n in row
        s N + n. z is None where inputs=0."""
        check_inputs(self, z, x)
        if not self.initialised and self.training and torch.is_grad_enabled() and len(x):
            self._start(z, x)
        return self._params(z, x)

    def _start(self, z: Tensor | None, x: Tensor) -> None:
        """The first pass of training: sets g and biases, unless they come from another object that was trained."""
        given = not all(isinstance(p, nn.Parameter) for p in self.parameters())  # by torch.func.functional_call
        blind = torch.compiler.is_compiling() or transforms() is not None
        ranks = torch.distributed
        shared = ranks.is_available() and ranks.is_initialized() and ranks.get_world_size() > 1  # each has other images
        if blind or ((given or shared) and self._untouched()):
            raise RuntimeError(
                "PixelCNNPlusPlus sets its weights in its first pass of training, which compilers, torch.func, weights "
                "given from outside and several processes do not allow: call initialise(z, x) before"
            )
        if not given:
            if self._untouched():
                self.initialise(z, x)
            self.initialised = True

    @torch.no_grad()
    def initialise(self, z: Tensor | None, x: Tensor) -> Tensor:
        """Sets every g and bias from these images and codes. Returns params, computed with what it has set."""
        check_inputs(self, z, x)
        if not len(x) or not all(bool(t.isfinite().all()) for t in (x, z) if t is not None):
            raise ValueError(f"initialise: got {len(x)} images; accepted: 1 or more, x and z without NaN and inf")
        hooks = [m.register_forward_pre_hook(_Conv.start) for m in self.modules() if isinstance(m, _Conv)]
        try:
            params = self._params(z, x, starting=True)
        finally:
            for hook in hooks:
                hook.remove()
        self.initialised = True
        return params

    def _untouched(self) -> bool:
        """Not trained as another object, whose weights this one was given."""
        convs = [m for m in self.modules() if isinstance(m, _Conv)]
        return all(bool((conv.gain == 1).all() and (conv.bias == 0).all()) for conv in convs)

    def receptive_field_of(self, i: int, j: int) -> Offsets:
        """The offsets (dy, dx) of all pixels that params of pixel (i, j) can depend on; strides make it depend on the
        pixel. Found by sending NaN through a network of one map."""
        _, height, width = self.image_shape
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            thin = PixelCNNPlusPlus(0, (1, height, width), blocks=self.blocks, maps=1, backend="reference").eval()
            x = torch.zeros(height * width, height * width).fill_diagonal_(torch.nan)  # a pixel of each image
            hit = thin(None, x.unflatten(1, (1, height, width)))[:, 0, i, j].isnan()
        return {(p // width - i, p % width - j) for p in hit.nonzero().flatten().tolist()}

    def get_extra_state(self) -> Tensor:  # a flag on the host, that a GPU need not be waited for
        return torch.tensor(self.initialised)

    def set_extra_state(self, state: Tensor) -> None:
        self.initialised = bool(state)

    def _params(self, z: Tensor | None, x: Tensor, starting: bool = False) -> Tensor:
        codes = [code(z) for code in self.codes] if self.inputs else [None] * RESOLUTIONS
        own = self.above.bias.dtype
        x = x.to(own) if own.itemsize < x.dtype.itemsize else x
        y = torch.cat([2 * x - 1, torch.ones_like(x[:, :1])], 1)
        between = operators(y, self.backend)
        if between is TRITON:
            y = y.contiguous(memory_format=torch.channels_last)
        alone = between is not TRITON or starting or self.checkpoint_layers or torch.compiler.is_compiling()
        convs = [] if alone else [m for m in self.modules() if isinstance(m, _Conv)]

        def run(layer: Any, *streams: Tensor) -> tuple[Tensor, Tensor]:
            of_block = (between, codes[layer.resolution]) if isinstance(layer, _Blocks) else ()
            if self.checkpoint_layers and torch.is_grad_enabled():
                return checkpoint(layer, *of_block, *streams, use_reentrant=False)
            return layer(*of_block, *streams)

        with _weights_at_once(between, convs):
            u, ul = self.above(y), self.row_above(y) + self.left(y)
            if z is not None and len(z) != len(x):
                u, ul = (s.repeat(len(z) // len(x), 1, 1, 1) for s in (u, ul))
            passed = [(u, ul)]
            for layer in self.up:
                u, ul = run(layer, u, ul)
                passed.append((u, ul))
            passed.pop()
            for layer in self.down:
                u, ul = run(layer, u, ul, *(passed.pop() if isinstance(layer, _Blocks) else ()))
            return self.head(ul)


class _Conv(nn.Module):
    """W * s + b over a rectangle, weight-normalised; `deviation` of its outputs at the start. `bare`: W * s alone, of
    an s that has its zeros around."""

    ready: Tensor | None = None  # the weight, where it was found with all others': for one forward pass at a time

    def __init__(
        self, cin: int, cout: int, rectangle: Rectangle, stride: int = 1, deviation: float = 1.0, bare: bool = False
    ) -> None:
        super().__init__()
        (kernel, self.pad), self.stride, self.deviation, self.bare = rectangle, stride, deviation, bare
        v = 0.05 * torch.randn(cout, cin, *kernel)
        self.direction = nn.Parameter(v.contiguous(memory_format=torch.channels_last))  # as the convolutions want it
        self.gain = nn.Parameter(torch.ones(cout))  # g
        self.bias = nn.Parameter(torch.zeros(cout))

    @property
    def weight(self) -> Tensor:  # [Cout, Cin, height, width]
        if self.ready is not None:
            return self.ready
        return weights_reference([self.direction], [self.gain])[0]  # exact in float64, with all derivatives

    def forward(self, x: Tensor) -> Tensor:
        if self.bare:
            return F.conv2d(x, self.weight, None, self.stride)
        return F.conv2d(F.pad(x, self.pad), self.weight, self.bias, self.stride)

    def start(self, inputs: tuple[Tensor, ...]) -> None:
        """A hook: g and b from the inputs that are about to be convolved."""
        self.bias.zero_()
        std, mean = torch.std_mean(self.forward(*inputs), (0, 2, 3), correction=0)
        scale = torch.where(std > 1e-3, self.deviation / std, 1.0)
        self.gain.mul_(scale)
        self.bias.copy_(-mean * scale)


@contextmanager
def _weights_at_once(between: Operators, convs: Sequence[_Conv]) -> Iterator[None]:
    """Their weights are found in a few kernels rather than one for each."""
    if convs:
        weights = between.weights([conv.direction for conv in convs], [conv.gain for conv in convs])
        for conv, weight in zip(convs, weights, strict=True):
            conv.ready = weight
    try:
        yield
    finally:
        for conv in convs:
            conv.ready = None


class _Larger(_Conv):
    """Transposed, of stride 2, to images of the given size."""

    def __init__(self, maps: int, rectangle: Rectangle, size: tuple[int, int]) -> None:
        super().__init__(maps, maps, rectangle, stride=2)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        (height, width), left = self.size, self.pad[1]
        out = F.conv_transpose2d(x, self.weight.transpose(0, 1), self.bias, self.stride)
        return out[:, :, :height, left : left + width]


class _Block(nn.Module):
    """block(s, a); `aside`: maps of a."""

    def __init__(self, maps: int, aside: int, rectangle: Rectangle, dropout: float, code: int) -> None:
        super().__init__()
        self.dropout = dropout
        self.first = _Conv(2 * maps, maps, rectangle, bare=True)
        self.aside: Any = _Conv(2 * aside, maps, PIXEL, bare=True) if aside else None
        self.second = _Conv(2 * maps, 2 * maps, rectangle, deviation=0.1, bare=True)
        if code:
            self.condition: Any = nn.Conv2d(code, 2 * maps, 1, bias=False)
            nn.init.normal_(self.condition.weight, std=0.05)

    def forward(self, between: Operators, s: Tensor, code: Tensor | None, *a: Tensor) -> tuple[Tensor, ...]:
        """And a, for who reads it after. `between`: what the convolutions have between them."""
        pair, s = between.elu_pair_through([s], None, self.first.pad, 0.0)
        c, bias = self.first(pair), self.first.bias
        if a:
            pair, *a = between.elu_pair_through(a, None, (), 0.0)  # type: ignore[assignment]
            c, bias = c + self.aside(pair), bias + self.aside.bias
        f = self.second(between.elu_pair([c], bias, self.second.pad, self.dropout if self.training else 0.0))
        condition = None if code is None else self.condition(code)
        if condition is not None and condition.shape[2:] != (1, 1):
            f, condition = f + condition, None
        condition = None if condition is None else condition[:, :, 0, 0]
        return between.gated_residual(s, f, self.second.bias, condition), *a


class _Blocks(nn.Module):
    """A block for each stream; `passed`: maps of u' and of ul', 0 on the way up."""

    def __init__(self, maps: int, resolution: int, passed: int, **options: Any) -> None:
        super().__init__()
        self.resolution = resolution
        self.u = _Block(maps, passed, DOWN, **options)
        self.ul = _Block(maps, maps + passed, DOWN_RIGHT, **options)

    def forward(
        self, between: Operators, code: Tensor | None, u: Tensor, ul: Tensor, *passed: Tensor
    ) -> tuple[Tensor, Tensor]:
        u, *_ = self.u(between, u, code, *passed[:1])
        ul, u, *_ = self.ul(between, ul, code, u, *passed[1:])
        return u, ul


class _Streams(nn.Module):
    """A convolution for each stream."""

    def __init__(self, u: _Conv, ul: _Conv) -> None:
        super().__init__()
        self.u, self.ul = u, ul

    def forward(self, u: Tensor, ul: Tensor) -> tuple[Tensor, Tensor]:
        return self.u(u), self.ul(ul)


def _check_sizes(given: dict[str, Any]) -> None:
    check_name(given["backend"])
    check_sizes(given, blocks=1, maps=1)
    if not isinstance(given["dropout"], Real) or not 0 <= float(given["dropout"]) < 1:
        raise ValueError(f"dropout: got {given['dropout']!r}; accepted: a probability, at least 0 and below 1")
    if given["data_channels"] != 1:
        raise ValueError(
            f"data_channels: got {given['data_channels']}; accepted: 1, as PixelCNN++ does not order the colours of a "
            "pixel: use the likelihood 'discretized_logistic_mixture', grey images, or the decoder 'pixelcnn'"
        )
