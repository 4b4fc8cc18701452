"""Images from an autoregressive decoder, pixel after pixel in raster order:

    x_p = F^-1(u_p | x_<p, z),     u_p uniform in (0, 1),     F the distribution function of p(x_p | x_<p, z)

An image is a function of z and u, which all strategies compute (they differ where u is within rounding of a jump of F):

    naive         H W G passes of the whole network, G the colours that are ordered: the definition
    fixed_point   every pixel from the image so far, again until nothing changes: exact after at most H W G passes,
                  usually far fewer, as a pass makes all leading pixels right whose past was
    cached        one pass in all. What reads finished rows (the vertical stack, stream u) is computed once for a row,
                  as products of matrices; the rest once for a pixel (and colour)

The uniforms are counted, not drawn: bits of a hash of (seed, sample, pixel, channel), the same on every device. So
sample i does not depend on how many are drawn with it, but for rounding where pixels are not levels.
"""

from collections.abc import Callable
from functools import partial, wraps
from operator import index as as_index
from typing import Any

import torch
from torch import Tensor, nn

from infovae_fast.arguments import floating, is_integer, one_of
from infovae_fast.backends import AUTO, NAMES, Backend, check_name, explain, native_missing
from infovae_fast.backends import choose as choose_backend
from infovae_fast.likelihoods import (
    Bernoulli,
    Categorical,
    DiscretizedLogisticMixture,
    Likelihood,
    inside,
    usable_temperature,
)
from infovae_fast.models.autoregressive import check_code
from infovae_fast.models.incremental import Callback, Chooser, Images, Incremental, cuda_limits
from infovae_fast.models.incremental_2017 import Incremental2017
from infovae_fast.models.incremental_pp import IncrementalPlusPlus
from infovae_fast.models.networks import evaluating, like
from infovae_fast.models.pixelcnn import GatedPixelCNN
from infovae_fast.models.pixelcnn_pp import PixelCNNPlusPlus

Pixelwise = Incremental | Incremental2017 | IncrementalPlusPlus
STRATEGIES = ("auto", "naive", "cached", "fixed_point")
DRAWN = (Bernoulli, Categorical, DiscretizedLogisticMixture)  # by `Images`
LEAST_SHARED = 99 << 10  # bytes of shared memory that a block may have on all GPUs since sm_80


def uncached(decoder: nn.Module) -> str | None:
    """Why "cached" cannot run, or None."""
    if not isinstance(decoder, GatedPixelCNN | PixelCNNPlusPlus):
        return f"knows GatedPixelCNN and PixelCNNPlusPlus, not {type(decoder).__name__}"
    return None


# A reason is given for a parameter of the decoder, the decoder, and what is to be drawn (None: params alone).
def _cuda_reason(like: Tensor, *inputs: Any) -> str | None:
    if like.device.type != "cuda":
        return f"it runs on NVIDIA GPUs, and the decoder is on {like.device}"
    if (reason := native_missing("cuda")) is not None:
        return reason
    gpu = torch.cuda.get_device_properties(like.device)
    return images_reason(getattr(gpu, "shared_memory_per_block_optin", LEAST_SHARED), *inputs)


def images_reason(shared: int, decoder: Any = None, likelihood: Likelihood | None = None) -> str | None:
    """What `Images` cannot do, where a block may have so many bytes of shared memory."""
    if likelihood is not None and type(likelihood) not in DRAWN:
        names = ", ".join(kind.__name__ for kind in DRAWN)
        return f"it draws for {names}, and the likelihood is {type(likelihood).__name__}"
    return None if decoder is None else _no_kernels(decoder) or cuda_limits(decoder, shared)


def _cpp_reason(like: Tensor, decoder: Any = None, likelihood: Likelihood | None = None) -> str | None:
    if like.device.type != "cpu":
        return f"it runs on the CPU, and the decoder is on {like.device}"
    return _no_kernels(decoder) or native_missing()


def _no_kernels(decoder: Any) -> str | None:
    if isinstance(decoder, PixelCNNPlusPlus):
        return "it has no kernels for PixelCNNPlusPlus in this version"
    return "it has no kernels for variant 'infovae2017'" if _is_2017(decoder) else None


def _is_2017(decoder: Any) -> bool:
    return isinstance(decoder, GatedPixelCNN) and decoder.variant == "infovae2017"


def _reference(decoder: Any, z: Tensor | None, n: int) -> Pixelwise:
    if isinstance(decoder, PixelCNNPlusPlus):
        return IncrementalPlusPlus(decoder, z, n)
    return (Incremental2017 if _is_2017(decoder) else Incremental)(decoder, z, n)


BACKENDS = (
    Backend("cuda", _cuda_reason, Images),
    Backend("cpp", _cpp_reason, partial(Incremental, native=True)),
    Backend("reference", lambda like, *inputs: None, _reference),
)


def _alike(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """All strategies compute in eval mode and in the decoder's dtype, lest their samples differ."""

    @wraps(method)
    def run(self: Any, *inputs: Any, **options: Any) -> Tensor:
        with evaluating(self.decoder), torch.autocast(self._like.device.type, enabled=False):
            return method(self, *inputs, **options)

    return run


class PixelSampler:
    """Draws from p(x|z).

    Args:
        model: an `InfoVAE` with an autoregressive decoder, or such a decoder: a module decoder(z, x) -> params with
            `autoregressive = True` and `image_shape` = (C, H, W).
        likelihood: of a decoder; that of an `InfoVAE` is known.
        backend: of "cached", "auto" or one of `infovae_fast.backends.NAMES`. "cuda" draws whole images, not for
            `Gaussian`; "cpp" draws bits in whole rows, other values a pixel at a time.

    Raises:
        ValueError: a decoder that is not autoregressive; no likelihood; one that does not fit the order of colours.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood | None = None, *, backend: str = "auto") -> None:
        check_name(backend)
        decoder: Any = getattr(model, "decoder", model)
        likelihood = getattr(model, "likelihood", likelihood)
        if not getattr(decoder, "autoregressive", False):
            raise ValueError(
                f"got a decoder {type(decoder).__name__}, which is not autoregressive: its pixels are independent "
                "given z; use likelihood.sample(decoder(z)), or InfoVAE.sample"
            )
        if likelihood is None or not hasattr(likelihood, "draw"):
            raise ValueError(f"likelihood: got {likelihood!r}; accepted: the one that the decoder was trained with")
        self.decoder, self.likelihood, self.image_shape = decoder, likelihood, tuple(decoder.image_shape)
        self.backend = backend
        joint, channels = likelihood.joint_channels, self.image_shape[0]
        if isinstance(decoder, GatedPixelCNN | PixelCNNPlusPlus):
            given, wanted = len(decoder.head[-1].bias), likelihood.channels(channels)
            if given != wanted:
                raise ValueError(
                    f"likelihood: {type(likelihood).__name__} needs params of {wanted} channels, but the decoder has "
                    f"{given}; accepted: the likelihood that it was trained with"
                )
        self.groups = getattr(decoder, "data_channels", 1 if joint else channels)
        if joint and self.groups > 1:
            raise ValueError(
                f"the decoder orders {self.groups} colours, which {type(likelihood).__name__} draws together: "
                "build it with data_channels=1"
            )

    @torch.no_grad()
    @_alike
    def sample(
        self,
        z: Tensor | None = None,
        n: int | None = None,
        *,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        temperature: float = 1.0,
        seed: int | None = None,
        uniforms: Tensor | None = None,
        callback: Callback | None = None,
        strategy: str = "auto",
    ) -> Tensor:
        """Images [n, C, H, W] in the decoder's dtype, drawn in eval mode.

        Args:
            z: [n, D], or [1, D] for n images of one code; None for a decoder without z.
            n: number of images; default: as many as z has rows.
            known: [n or 1, C, H, W], values to keep (in-painting); they condition the pixels after them, not z.
            known_mask: bool, broadcast to [n, C, H, W]: True where `known` counts. The logistic mixture, which draws
                the channels of a pixel together, needs the same for all channels.
            temperature: above 0; see `likelihoods`.
            seed: of the uniforms; None: one drawn from PyTorch's own generator.
            uniforms: [n, U, H, W] in [0, 1) instead, U = likelihood.uniforms(C); used in float32, 0 as the next number.
            callback: called as callback(done, H) with the number of rows that are final; for "cuda" once.
            strategy: "auto" is "cached" where that can run, else "fixed_point".

        Raises:
            TypeError: what is no tensor, or of another type. ValueError: shapes, names or numbers that do not fit.
        """
        z, n = self._codes(z, n)
        temperature = usable_temperature(temperature)
        one_of("strategy", strategy, STRATEGIES)
        if strategy == "auto":
            strategy = "fixed_point" if uncached(self.decoder) else "cached"
        if strategy == "cached":
            self._check_cached()
        known, mask = self._known(n, known, known_mask)
        if uniforms is None:
            u = self.uniforms(n, int(torch.randint(2**62, ())) if seed is None else seed)
        else:
            u = self._given(uniforms, n)
        g = self.groups

        def choose(i: int, j: int, group: int, params: Tensor) -> Tensor:
            """[n, P/G] of a pixel's group -> its channels [n, C/G]."""
            drawn = self.likelihood.draw(params, u[:, group::g, i, j], temperature)
            return torch.where(mask[:, group::g, i, j], known[:, group::g, i, j], drawn.to(known.dtype))

        if strategy == "cached":
            incremental = self._incremental(z, n, self.likelihood)
            if isinstance(incremental, Images):
                sizes = (getattr(self.likelihood, name, 0) for name in ("levels", "mixtures"))
                x = incremental.draw(u, known.to(incremental.memory), mask, temperature, *sizes)
                if callback is not None:
                    callback(x.shape[2], x.shape[2])
            elif isinstance(incremental, Incremental) and incremental.native and type(self.likelihood) is Bernoulli:
                x = incremental.run_bits(u, known.to(incremental.memory), mask, temperature, callback)
            else:
                x = incremental.run(choose, callback)
            return x.to(self._like.dtype)
        if strategy == "naive":
            return self._naive(z, n, choose, callback)
        return self._fixed_point(z, known, mask, u, temperature, callback)

    def uniforms(self, n: int, seed: int = 0, *, first: int = 0) -> Tensor:
        """The uniforms [n, U, H, W] of samples first .. first + n - 1."""
        for name, value in (("n", n), ("first", first)):
            if not is_integer(value) or value < 0:
                raise ValueError(f"{name}: got {value!r}; accepted: an integer, 0 or more")
        return pixel_uniforms(self._uniforms_shape(n), seed, first=first, device=self._like.device)

    @torch.no_grad()
    @_alike
    def params(self, z: Tensor | None, x: Tensor) -> Tensor:
        """decoder(z, x) as "cached" computes it, a pixel and colour at a time: [N, P, H, W], equal but for rounding."""
        floating("x", x)
        z, n = self._codes(z, len(x))
        self._check_cached()
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}; accepted: [N, C, H, W] = {(n, *self.image_shape)}")
        return self._incremental(z, n, None).params(x)

    def _check_cached(self) -> None:
        if (reason := uncached(self.decoder)) is not None:
            raise ValueError(f"strategy 'cached' {reason}; accepted here: 'fixed_point', 'naive'")

    def _incremental(self, z: Tensor | None, n: int, likelihood: Likelihood | None) -> Pixelwise | Images:
        check_code(self.decoder, z)
        inputs, backend = (self._like, self.decoder, likelihood), self.backend
        if backend == "auto" and AUTO in NAMES and explain("pixel_sampler", BACKENDS, *inputs)[AUTO] is not None:
            backend = "reference"  # what INFOVAE_FAST_BACKEND names is meant for the operators that it has
        return choose_backend("pixel_sampler", BACKENDS, backend, *inputs)(self.decoder, z, n)

    def _naive(self, z: Tensor | None, n: int, choose: Chooser, callback: Callback | None) -> Tensor:
        x = self._like.new_zeros(n, *self.image_shape)
        _, height, width = self.image_shape
        for i in range(height):
            for j in range(width):
                for group in range(self.groups):
                    params = self.decoder(z, x)[:, group :: self.groups, i, j]
                    x[:, group :: self.groups, i, j] = choose(i, j, group, params)
            if callback is not None:
                callback(i + 1, height)
        return x

    def _fixed_point(
        self, z: Tensor | None, known: Tensor, mask: Tensor, u: Tensor, temperature: float, callback: Callback | None
    ) -> Tensor:
        x = torch.where(mask, known, 0)
        _, height, width = self.image_shape
        for _ in range(height * width * self.groups):
            drawn = self.likelihood.draw(self.decoder(z, x), u, temperature).to(x.dtype)
            new = torch.where(mask, known, drawn)
            equal = (new == x) | (new.isnan() & x.isnan())
            same = equal.all(dim=3).all(dim=1).all(dim=0)  # [H]
            final = int(same.cumprod(0).sum())  # rows of which none before has changed
            if callback is not None:
                callback(final, height)
            x = new
            if final == height:
                return x
        if callback is not None:
            callback(height, height)
        return x

    @property
    def _like(self) -> Tensor:
        return like(self.decoder)

    def _uniforms_shape(self, n: int) -> tuple[int, int, int, int]:
        channels, height, width = self.image_shape
        return n, self.likelihood.uniforms(channels), height, width

    def _given(self, uniforms: Tensor, n: int) -> Tensor:
        floating("uniforms", uniforms)
        if uniforms.shape != (wanted := self._uniforms_shape(n)):
            raise ValueError(f"uniforms: got shape {tuple(uniforms.shape)}; accepted: {wanted}")
        if uniforms.device.type == "cpu" and not bool(((uniforms >= 0) & (uniforms < 1)).all()):
            raise ValueError("uniforms: got numbers that are not between 0 and 1; accepted: in [0, 1), as torch.rand's")
        return inside(uniforms, torch.float32)

    def _codes(self, z: Tensor | None, n: int | None) -> tuple[Tensor | None, int]:
        if n is not None and not (is_integer(n) and n >= 0):
            raise ValueError(f"n: got {n!r}; accepted: an integer, 0 or more")
        if z is None:
            if n is None:
                raise ValueError("z and n: got neither; accepted: z [n, D], or n for a decoder without z")
            return None, int(n)
        floating("z", z)
        if z.ndim != 2 or len(z) not in (1, len(z) if n is None else n):
            raise ValueError(f"z: got shape {tuple(z.shape)} for n={n}; accepted: [n, D], or [1, D] for all images")
        n = len(z) if n is None else int(n)
        return z.to(self._like.dtype).expand(n, -1), n

    def _known(self, n: int, known: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """known and known_mask, [n, C, H, W] both."""
        shape = (n, *self.image_shape)
        if (known is None) != (mask is None):
            raise ValueError("known and known_mask: got one of them; accepted: both or neither")
        if known is None or mask is None:
            zeros = self._like.new_zeros(())
            return zeros.expand(shape), zeros.bool().expand(shape)
        floating("known", known)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"known_mask: got {got}; accepted: a tensor of torch.bool, True where `known` counts")
        for name, t in (("known", known), ("known_mask", mask)):
            try:
                t.expand(shape)
            except RuntimeError:
                raise ValueError(f"{name}: got shape {tuple(t.shape)}; accepted: {shape}, or 1 for any size") from None
        known, mask = known.to(self._like).expand(shape), mask.to(self._like.device).expand(shape)
        if self.likelihood.joint_channels and bool((mask != mask[:, :1]).any()):
            raise ValueError(
                f"known_mask: differs between the channels of a pixel, which {type(self.likelihood).__name__} draws "
                "together; accepted: the same mask for all channels"
            )
        return known, mask


GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def pixel_uniforms(
    shape: tuple[int, int, int, int], seed: int = 0, *, first: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Uniforms [n, U, H, W], float32: the middles (k + 1/2) / 2^23 of 2^23 intervals, never 0 or 1.

    k are the upper bits of splitmix64 (Steele, Lea & Flood 2014), nested: a number of the stream of the seed starts the
    stream of a sample (numbered from `first`), a number of that the stream of a pixel, whose numbers are the channels'.
    """
    n, u, height, width = shape
    try:
        seed = as_index(seed)
    except TypeError:
        raise TypeError(f"seed: got {seed!r}; accepted: an integer") from None
    state = torch.full((1, 1, 1), (seed + 2**63) % 2**64 - 2**63, device=device)
    pixels = torch.arange(height * width, device=device)
    for index in (
        torch.arange(first, first + n, device=device)[:, None, None],
        pixels[None, None, :],
        torch.arange(u, device=device)[None, :, None],
    ):
        state = _splitmix(state, index)  # [n, U, H W] in the end
    k = _shifted(state, 64 - 23)
    return ((k.to(torch.float32) + 0.5) / 2**23).unflatten(2, (height, width))


def _splitmix(state: Tensor, index: Tensor) -> Tensor:
    """Number `index` of the stream that starts at `state`; int64 wraps around."""
    x = state + GOLDEN * (index + 1)
    x = (x ^ _shifted(x, 30)) * MIX1
    x = (x ^ _shifted(x, 27)) * MIX2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits as if x had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
