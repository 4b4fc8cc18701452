"""Gated PixelCNN: a decoder that draws every pixel given z and the pixels before it.

    log p(x|z) = sum_p log p(x_p | x_<p, z)          pixels p in raster order, likelihood.nll(decoder(z, x), x)

With y = 2 x - 1 (so that black is not the zeros around the image) and v_0 = h_0 = y, layer l = 0 .. L-1 of C maps is

    V = W_v * v_l + b_v + U_v z                      window "V0" in layer 0, then "V"          [2C]
    T = W_h * h_l + b_h + W_link V + U_h z           window "H0" in layer 0, then "H"          [2C]
    v_{l+1} = gate(V),   o = gate(T)                 gate(f) = tanh(f_a) sigmoid(f_b)          [C]
    h_{l+1} = W_o o + b_o (+ h_l for l > 0)          skip_l = W_s o + b_s                      [C]
    params  = W_2 relu(W_1 relu(sum_l skip_l) + b_1) + b_2                                     [P]

in convolutions of `infovae_fast.masked_conv` and products at one pixel. The present is hidden once, in layer 0, so that
there is no blind spot: params see every earlier pixel up to R = r_0 + (L - 1) r rows and columns away, r = kernel // 2.

**Colours.** data_channels = G > 1 orders the channels of a pixel: maps and params belong to group c % G, a group sees
the groups before it at its own pixel. Likelihoods whose params[:, c::G] are channel c's alone (Bernoulli, categorical,
Gaussian) need G = C; the logistic mixture joins the channels itself and takes G = 1.

**Condition.** "global": U z is one vector for all pixels, linear in z. "spatial": U is 1x1 on a map s(z) [C', H, W],
s = relu(linear). Without z (inputs=0) both are missing.

**variant="infovae2017"** is the network of the InfoVAE authors' code (ShengjiaZhao/PixelCNN), with its properties:

    v_{l+1} = gate(W_v * v_l + U_v z)                window "A" in layer 0, then "B"
    k = relu(W_link v_{l+1} + b)                     [C], after the gate; added to both halves of T
    o = gate(W_h * h_l + [k, k] + U_h z)             window "H"
    h_{l+1} = relu(W_o o + b_o) + h_l,   h_1 = relu(b_o);   the head reads h_L, not skips

* The vertical stack hides the present in a raster window: pixels above to the right of a slope of 1 are never seen.
* 1x1 convolutions of layer 0 had mask "A", which leaves no weight: its horizontal stack ends in relu(b_o), the same at
  every pixel and for every image (at 0 by their initialisation, where relu passes no gradient). All that h knows comes
  through later links. What has no effect on the output is not built.
* U z replaces the biases of the gates, which are there only without z. The network sees x, not 2 x - 1.
* Weights start uniform in +-sqrt(6 / (fan-in + fan-out)) of the unmasked kernels, biases at 0.

Source: van den Oord et al., arXiv 1606.05328; section 5.2 and appendix C of Zhao, Song & Ermon, arXiv 1706.02262.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infovae_fast.arguments import one_of
from infovae_fast.masked_conv import MaskedConv2d
from infovae_fast.models import resident
from infovae_fast.models.autoregressive import Offsets, SpatialCode, check_inputs, check_sizes

PAPER_PIXELCNN = {"name": "pixelcnn", "layers": 12, "maps": 32, "first_kernel": 7, "kernel": 3}
R64 = {"name": "pixelcnn", "layers": 7, "maps": 64, "first_kernel": 7, "kernel": 3}
BYTES_AT_ONCE = 4 << 20  # of a stack's sums [n, 2C, H, W] for a thread, where no gradient is wanted


class GatedPixelCNN(nn.Module):
    """The decoder of this page: decoder(z, x) -> params [N, P, H, W] of p(x|z), each pixel's from the earlier ones.

    Args:
        inputs: dimension of z; 0 for a model without z.
        shape: of params, (P, H, W), P = likelihood.channels(image_channels).
        image_channels: C of the image.
        data_channels: G, the channels that are ordered inside a pixel: 1 or C.
        layers, maps: L and the width C of both stacks, a multiple of G.
        first_kernel, kernel: odd sizes of layer 0 (3 or more) and of the others.
        condition: "global" or "spatial"; spatial_maps: C'.
        variant: "gated" or "infovae2017".
        checkpoint_layers: keep each layer's inputs only, and compute the rest again in the backward pass.
        backend: of `masked_conv2d`.

    Raises:
        ValueError: sizes that do not fit each other, unknown names.
    """

    autoregressive = True
    shares_images = True  # among the codes of each

    def __init__(
        self,
        inputs: int,
        shape: Sequence[int],
        image_channels: int = 1,
        data_channels: int = 1,
        layers: int = 7,
        maps: int = 48,
        first_kernel: int = 7,
        kernel: int = 3,
        condition: str = "global",
        spatial_maps: int = 16,
        variant: str = "gated",
        checkpoint_layers: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_sizes(locals())
        params, height, width = shape
        self.inputs, self.image_shape, self.data_channels = inputs, (image_channels, height, width), data_channels
        self.maps, self.variant, self.checkpoint_layers = maps, variant, checkpoint_layers
        kind = _Layer if variant == "gated" else _Layer2017
        sizes = [(image_channels, first_kernel)] + [(maps, kernel)] * (layers - 1)
        options: dict[str, Any] = {"data_channels": data_channels, "bias": inputs == 0, "backend": backend}
        stack = [kind(cin, maps, k, first=i == 0, last=i == layers - 1, **options) for i, (cin, k) in enumerate(sizes)]
        self.layers: Any = nn.ModuleList(stack)
        pixel: dict[str, Any] = {"window": "H", "data_channels": data_channels, "backend": backend}
        self.head: Any = nn.Sequential(
            nn.ReLU(),
            MaskedConv2d(maps, maps, 1, **pixel),
            nn.ReLU(),
            MaskedConv2d(maps, params, 1, **pixel),
        )
        if inputs:
            spatial = condition == "spatial"
            self.code: Any = SpatialCode(inputs, (spatial_maps, height, width)) if spatial else nn.Identity()
            self.condition: Any = nn.ModuleList(
                nn.Conv2d(spatial_maps, layer.conditions, 1, bias=False)
                if spatial
                else nn.Linear(inputs, layer.conditions, bias=False)
                for layer in stack
            )
        if variant == "infovae2017":
            _start_as_2017(self)

    def forward(self, z: Tensor | None, x: Tensor) -> Tensor:
        """params [S N, P, H, W] for z [S N, D] and x [N, C, H, W]: S codes for every image, code s of image n in row
        s N + n. z is None where inputs=0."""
        check_inputs(self, z, x)
        if resident.reason(self, z, x) is None:
            return resident.params(self, z, x)
        if z is not None and len(z) > len(x):
            x = x.repeat(len(z) // len(x), 1, 1, 1)
        whole = torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling()
        if whole or len(x) <= (size := self._images_at_once()):
            return self._params(z, x)
        codes = [None] * -(-len(x) // size) if z is None else z.split(size)
        return torch.cat([self._params(*some) for some in zip(codes, x.split(size), strict=True)])

    @property
    def condition_is_spatial(self) -> bool:
        """Does z become a map before it conditions the layers?"""
        return self.inputs > 0 and isinstance(self.code, SpatialCode)

    def _images_at_once(self) -> int:
        """On the CPU, of many: memory that is touched for the first time would cost more than the arithmetic."""
        _, height, width = self.image_shape
        return max(1, BYTES_AT_ONCE * torch.get_num_threads() // (8 * self.maps * height * width))

    def _params(self, z: Tensor | None, x: Tensor) -> Tensor:
        v = h = x if self.variant == "infovae2017" else 2 * x - 1
        skip: Tensor | None = None
        for layer, condition in zip(self.layers, self.conditions(z), strict=True):
            if self.checkpoint_layers and torch.is_grad_enabled():
                # Without the sum of the skips: it would be kept once for each layer.
                v, h, more = checkpoint(layer, v, h, None, *condition, use_reentrant=False)
                skip = more if skip is None else skip + more
            else:
                v, h, skip = layer(v, h, skip, *condition)
        return self.head(h if skip is None else skip)

    def conditions(self, z: Tensor | None) -> list[tuple[Tensor, ...]]:
        """What z adds in each layer, (U_v z, U_h z): [N, 2C] each, or [N, 2C, H, W]; nothing without z."""
        if not self.inputs:
            return [()] * len(self.layers)
        code = self.code(z)
        if self.variant != "gated" or code.ndim != 2:
            return [linear(code).split(2 * self.maps, 1) for linear in self.condition]
        # All products in one, [2 L, N, 2C], whose parts are contiguous as the convolutions want them.
        weight = torch.stack([linear.weight for linear in self.condition]).view(-1, 2 * self.maps, self.inputs)
        both = torch.bmm(code.expand(len(weight), -1, -1), weight.mT).unbind()
        return list(zip(both[::2], both[1::2], strict=True))

    def receptive_field(self) -> Offsets:
        """The offsets (dy, dx) of all other pixels that params can depend on."""
        v: Offsets = {(0, 0)}
        h: Offsets = {(0, 0)}
        for layer in self.layers:
            v, h = layer.reach(v, h)
        return h - {(0, 0)}

    def extra_repr(self) -> str:
        c, h, w = self.image_shape
        return f"inputs={self.inputs}, image={c}x{h}x{w}, data_channels={self.data_channels}, variant={self.variant!r}"


class _Layer(nn.Module):
    """(v_l, h_l, sum of the skips before) -> (v_{l+1}, h_{l+1}, the sum with skip_l); the last gives V and h_l.

    `link` holds weights that another convolution reads."""

    def __init__(
        self, cin: int, maps: int, kernel: int, *, first: bool, last: bool, data_channels: int, bias: bool, backend: str
    ) -> None:
        super().__init__()
        self.first, self.last, self.maps, self.conditions = first, last, maps, 4 * maps
        colours: dict[str, Any] = {"data_channels": data_channels, "backend": backend}
        present = "0" if first else ""
        wide, gate = (2 * maps, None) if last else (maps, "tanh")  # the last gate(V) would not be read
        self.vertical = MaskedConv2d(cin, wide, kernel, window="V" + present, gate=gate, backend=backend)
        self.link = MaskedConv2d(2 * maps, 2 * maps, 1, window="V", bias=False, backend=backend)
        self.horizontal = MaskedConv2d(cin, maps, kernel, window="H" + present, gate="tanh", **colours)
        self.out = MaskedConv2d(maps, maps if last else 2 * maps, 1, window="H", **colours)  # W_o, W_s: [C + C]

    def forward(
        self,
        v: Tensor,
        h: Tensor,
        skip: Tensor | None,
        above: Tensor | None = None,
        beside: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        v, below = self.vertical.with_f(v, above)
        o = self.horizontal(h, beside, link=(below, self.link.weight.squeeze(0)))
        if self.last:
            return v, h, self.out(o, skip)
        return v, *self.out.halves(o, (None if self.first else h, skip))

    def reach(self, v: Offsets, h: Offsets) -> tuple[Offsets, Offsets]:
        v = _sums(v, self.vertical.mask.taps)
        return v, _sums(h, self.horizontal.mask.taps) | v


class _Layer2017(nn.Module):
    """A layer of the authors' network, as the page has it: without skips, so that the head reads h."""

    def __init__(
        self, cin: int, maps: int, kernel: int, *, first: bool, last: bool, data_channels: int, bias: bool, backend: str
    ) -> None:
        super().__init__()
        self.first, self.conditions = first, 2 * maps if first else 4 * maps
        gate: dict[str, Any] = {"gate": "tanh", "bias": bias, "backend": backend}
        self.vertical = MaskedConv2d(cin, maps, kernel, window="A" if first else "B", **gate)
        if first:
            self.start = nn.Parameter(torch.zeros(maps))  # b_o
        else:
            self.link = MaskedConv2d(maps, maps, 1, window="B", backend=backend)
            self.horizontal = MaskedConv2d(cin, maps, kernel, window="H", **gate)
            self.out = MaskedConv2d(maps, maps, 1, window="B", backend=backend)

    def forward(
        self,
        v: Tensor,
        h: Tensor,
        skip: None,
        above: Tensor | None = None,
        beside: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, None]:
        v = self.vertical(v, above)
        if self.first:
            h = self.start.relu()[:, None, None].expand_as(v)
        else:
            link = self.link(v).relu().repeat(1, 2, 1, 1)
            o = self.horizontal(h, link if beside is None else link + beside[:, :, None, None])
            h = self.out(o).relu() + h
        return v, h, skip

    def reach(self, v: Offsets, h: Offsets) -> tuple[Offsets, Offsets]:
        v = _sums(v, self.vertical.mask.taps)
        return v, set() if self.first else _sums(h, self.horizontal.mask.taps) | v


def _sums(offsets: Offsets, taps: Iterable[tuple[int, int]]) -> Offsets:
    return {(y + dy, x + dx) for (y, x), (dy, dx) in product(offsets, taps)}


@torch.no_grad()
def _start_as_2017(network: nn.Module) -> None:
    for conv in network.modules():
        if isinstance(conv, MaskedConv2d):
            k, (_, cin, cout) = conv.mask.kernel_size, conv.weight.shape
            area = k if conv.mask.window == "H" else k * k  # a kernel 1 x k, else k x k
            bound = math.sqrt(6 / (area * (cin + cout // conv.mask.halves)))
            conv.weight.uniform_(-bound, bound)
            if conv.bias is not None:
                conv.bias.zero_()


def _check_sizes(given: dict[str, Any]) -> None:
    check_sizes(given, layers=1, maps=1, first_kernel=1, kernel=1)
    one_of("variant", given["variant"], ("gated", "infovae2017"))
    shape, channels, groups = given["shape"], given["image_channels"], given["data_channels"]
    if groups not in (1, channels):
        raise ValueError(f"data_channels: got {groups}; accepted: 1, or image_channels = {channels}")
    if given["maps"] % groups or shape[0] % groups:
        raise ValueError(
            f"maps={given['maps']} and P={shape[0]}; accepted: multiples of data_channels = {groups}, because every "
            "colour has as many maps: choose such a number of maps"
        )
    if given["variant"] == "infovae2017" and (groups > 1 or given["condition"] == "spatial"):
        raise ValueError(
            f"variant 'infovae2017' has condition='global' and no order of colours; got {given['condition']!r}, "
            f"data_channels={groups}: use grey images, the logistic mixture, or variant 'gated'"
        )
