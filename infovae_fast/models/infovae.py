"""InfoVAE: encoder, decoder, likelihood, prior and objective in one module.

q(z|x) = N(mu(x), diag e^logvar(x))      p(x|z) = likelihood(decoder(z))      p(z) = prior      loss = objective (Eq. 6)

An autoregressive decoder, such as a PixelCNN, is given the image too: likelihood(decoder(z, x)), pixels seeing earlier
ones only. What then is drawn, is drawn pixel by pixel (`PixelSampler`).
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from inspect import signature
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from infovae_fast.arguments import codes_of_images, floating
from infovae_fast.files import write_bytes
from infovae_fast.likelihoods import Bernoulli, Likelihood, likelihood_from_config
from infovae_fast.models.incremental import Callback
from infovae_fast.models.networks import DECODERS, ENCODERS, build, evaluating, like
from infovae_fast.models.pixel_sampler import PixelSampler
from infovae_fast.models.priors import PRIORS, Posterior, Prior, StandardNormal
from infovae_fast.objective import PRESETS, Objective, Terms, mmd_vae, objective_from_config

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class Output(NamedTuple):
    """What a forward pass computes."""

    params: Tensor  # [N, K, H, W], of p(x|z)
    posterior: Posterior
    z: Tensor  # [N, D], drawn from q(z|x)


class LogLikelihood(NamedTuple):
    """An importance-sampling estimate of log p(x) for each example, [N] each."""

    log_likelihood: Tensor  # nats; its expectation is a lower bound that tightens with the number of samples
    standard_error: Tensor  # of log_likelihood, by the delta method; too small where effective_samples is; inf of one
    effective_samples: Tensor  # (sum w)^2 / sum w^2, between 1 and n_samples


class InfoVAE(nn.Module):
    """A latent-variable model of images, trained with any objective of the InfoVAE family.

    Build it from names with `InfoVAE.from_config`, which makes it possible to save it, or from modules of your own:

    Args:
        encoder: a module [N, C, H, W] -> [N, 2 D], the mean and log-variance of q(z|x), or the two as a pair.
        decoder: a module [N, D] -> [N, K, H, W], K = likelihood.channels(C); or ([N, D], [N, C, H, W]) -> the same,
            with attributes autoregressive = True and image_shape = (C, H, W).
        latent_dim: D.
        likelihood: `Bernoulli()` (default), `Gaussian()`, `Categorical()` or `DiscretizedLogisticMixture()`.
        prior: a `Prior` in D dimensions; default N(0, I).
        objective: an `Objective`; default `mmd_vae()`.

    Images x are float [N, C, H, W], in [0, 1] but for `Gaussian`, which takes any.

    Raises:
        TypeError, ValueError: what is none of these (names are for `from_config`); a prior of another dimension.
    """

    config: dict[str, Any] | None = None  # of `from_config`, and what it made:
    _made: dict[str, Any] | None = None

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        *,
        likelihood: Likelihood | None = None,
        prior: Prior | None = None,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        if not _is_count(latent_dim):
            raise ValueError(f"latent_dim: got {latent_dim!r}; accepted: an integer, 1 or more")
        for name, part, needs in (
            ("likelihood", likelihood, "nll"),
            ("prior", prior, "dim"),
            ("objective", objective, "forward"),
        ):
            if part is not None and (isinstance(part, type) or not hasattr(part, needs)):
                accepted = f"an object like those of infovae_fast, with {needs}; names are for InfoVAE.from_config"
                raise TypeError(f"{name}: got {part!r}; accepted: {accepted}")
        self.encoder, self.decoder, self.latent_dim = encoder, decoder, int(latent_dim)
        self.likelihood = likelihood or Bernoulli()
        self.prior = prior or StandardNormal(latent_dim)
        self.objective = objective or mmd_vae()
        if self.prior.dim != latent_dim:
            raise ValueError(f"the prior has {self.prior.dim} dimensions, but latent_dim is {latent_dim}")

    @classmethod
    def from_config(
        cls,
        shape: Sequence[int],
        latent_dim: int = 10,
        *,
        encoder: dict[str, Any] | str = "mlp",
        decoder: dict[str, Any] | str = "mlp",
        likelihood: dict[str, Any] | str = "bernoulli",
        prior: dict[str, Any] | str = "normal",
        objective: dict[str, Any] | str = "mmd_vae",
    ) -> "InfoVAE":
        """A model from names and plain options.

        Args:
            shape: of an image, (C, H, W).
            latent_dim: D.
            encoder: "mlp" or "dcgan", or {"name": "mlp", "hidden": [256, 256]} and the like.
            decoder: likewise, or "pixelcnn", a `GatedPixelCNN`, e.g. `pixelcnn.R64`. The likelihood decides whether it
                orders the colours of a pixel. Or "pixelcnn_pp", a `PixelCNNPlusPlus`, e.g. `pixelcnn_pp.PIXELCNN_PP`.
            likelihood: "bernoulli", "gaussian", "categorical", "discretized_logistic_mixture", with options likewise.
            prior: "normal", "uniform", {"name": "gaussian_mixture", "means": ...}.
            objective: a preset of `objective.PRESETS`, or {"name": "mmd_vae", "lambda_": 500.0}.

        Raises:
            ValueError: an unknown name or option (the message lists the accepted ones), sizes that do not fit, what a
                config.json cannot hold.
        """
        config = dict(locals())
        del config["cls"]
        parts = ("encoder", "decoder", "likelihood", "prior", "objective")
        for part in parts:
            if not isinstance(value := config[part], str | Mapping):
                raise ValueError(
                    f"{part}: got {type(value).__name__}; accepted: a name, or a dict of its name and options; "
                    "a model of modules of your own is InfoVAE(encoder, decoder, latent_dim, ...)"
                )
            config[part] = value if isinstance(value, str) else dict(value)
        encoder, decoder, likelihood, prior, objective = (config[part] for part in parts)
        if not hasattr(shape, "__len__") or len(shape) != 3 or not all(_is_count(size) for size in shape):
            raise ValueError(f"shape: got {shape!r}; accepted: (channels, height, width)")
        if not _is_count(latent_dim):
            raise ValueError(f"latent_dim: got {latent_dim!r}; accepted: an integer, 1 or more")
        shape, latent_dim = tuple(map(int, shape)), int(latent_dim)
        config["shape"], config["latent_dim"] = list(shape), latent_dim
        p_x = likelihood_from_config({"name": likelihood} if isinstance(likelihood, str) else likelihood)
        name = decoder if isinstance(decoder, str) else decoder.get("name", "")
        image: tuple[int, ...] = ()
        if getattr(DECODERS.get(name), "autoregressive", False):
            image = (shape[0], 1 if p_x.joint_channels else shape[0])
        prior_args = () if isinstance(prior, dict) and prior.get("name") == "gaussian_mixture" else (latent_dim,)
        model = cls(
            build(ENCODERS, "encoder", encoder, shape, 2 * latent_dim),
            build(DECODERS, "decoder", decoder, latent_dim, (p_x.channels(shape[0]), *shape[1:]), *image),
            latent_dim,
            likelihood=p_x,
            prior=build(PRIORS, "prior", prior, *prior_args),
            objective=objective_from_config(objective, latent_dim),
        )
        model.config = _plain(config)
        model._made = {part: getattr(model, part) for part in parts if part != "objective"}
        return model

    def encode(self, x: Tensor) -> Posterior:
        """q(z|x) for images x [N, C, H, W], in float32 or better."""
        floating("x", x)
        parameters = self.encoder(x)
        if isinstance(parameters, tuple | list):
            parameters = torch.cat(list(parameters), 1)
        if parameters.shape != (len(x), 2 * self.latent_dim):
            raise ValueError(
                f"the encoder returned shape {tuple(parameters.shape)}; accepted: {(len(x), 2 * self.latent_dim)}, "
                "the mean and log-variance of q(z|x), or a pair of the two"
            )
        # Half precision, of the weights or by autocast, would leave z and the densities few digits, and overflow.
        digits = torch.promote_types(torch.promote_types(parameters.dtype, like(self.encoder).dtype), torch.float32)
        mu, logvar = parameters.to(digits).chunk(2, dim=1)
        return Posterior(mu, logvar.clamp(-30, 20))  # e^(logvar/2) and e^-logvar stay finite in float32

    @property
    def autoregressive(self) -> bool:
        """The decoder needs the image."""
        return getattr(self.decoder, "autoregressive", False)

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """The parameters of p(x|z), [N, D] -> [N, K, H, W].

        Args:
            x: [N, C, H, W], for an autoregressive decoder; others ignore it. With z [S N, D] of S codes for every
                image, code s of image n in row s N + n, the images need not be repeated.
        """
        z = self._code(z)
        if not self.autoregressive:
            return self.decoder(z)
        if x is None:
            raise ValueError(
                "decode: got no x; accepted: decode(z, x), as this decoder is autoregressive: parameters depend on "
                "earlier pixels. To draw images use PixelSampler(model).sample(z), or model.sample(n)"
            )
        if len(x) < len(z):
            codes_of_images(z, x)
            if not getattr(self.decoder, "shares_images", False):
                x = x.repeat(len(z) // len(x), 1, 1, 1)
        return self.decoder(z, x)

    def _code(self, z: Tensor) -> Tensor:
        """z for a decoder in half precision."""
        dtype = like(self.decoder).dtype
        return z.to(dtype) if dtype.itemsize < 4 else z

    def forward(self, x: Tensor) -> Output:
        """Encode, draw z ~ q(z|x), decode."""
        posterior = self.encode(x)
        z = posterior.rsample()
        return Output(self.decode(z, x), posterior, z)

    def loss(self, x: Tensor) -> Terms:
        """The objective and its terms on a batch x [N, C, H, W]: call `.loss.backward()`."""
        output = self(x)
        kl = self.prior.kl(output.posterior, output.z) if self.prior.has_kl else None
        return self.objective(self.likelihood.nll(output.params, x), kl, output.z, self.prior)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x|z) at z = mu(x), [N, C, H, W], in eval mode.

        For an autoregressive decoder's mean see `sample`; the draw is of one seed.
        """
        with evaluating(self):
            return self._images(self.encode(x).mu, seed=0)

    @torch.no_grad()
    def images(self, z: Tensor, *, mean: bool = True, callback: Callback | None = None) -> Tensor:
        """Images of codes z [N, D], [N, C, H, W], in eval mode: the mean of p(x|z), or a draw; see `sample`."""
        with evaluating(self):
            return self._images(z, mean, callback=callback)

    @torch.no_grad()
    def sample(self, n: int, *, mean: bool = True, callback: Callback | None = None) -> Tensor:
        """n images from the model, [n, C, H, W], in eval mode: z ~ p(z), then the mean of p(x|z), or a draw from it.

        Args:
            mean: of an autoregressive decoder it is the mean of every pixel given the earlier ones of a draw from
                p(x|z), which is the mean of p(x|z) on average over the draws.
            callback: called as callback(done, H) with the number of rows drawn, by an autoregressive decoder only.
        """
        return self.images(self.prior.sample(n), mean=mean, callback=callback)

    def _images(self, z: Tensor, mean: bool = True, **drawing: Any) -> Tensor:
        if self.autoregressive:
            x = PixelSampler(self).sample(z, **drawing)
            return self.likelihood.mean(self.decode(z, x)) if mean else x
        params = self.decode(z)
        return self.likelihood.mean(params) if mean else self.likelihood.sample(params)

    @torch.no_grad()
    def interpolate(self, a: Tensor, b: Tensor, steps: int = 8) -> Tensor:
        """Means of p(x|z) on the straight line from mu(a) to mu(b), in eval mode.

        [N, C, H, W] twice -> [N, steps, C, H, W].
        An autoregressive decoder draws all images of a line from the same uniforms; see `sample`.
        """
        if a.shape != b.shape or steps < 2:
            raise ValueError(
                f"interpolate: got shapes {tuple(a.shape)}, {tuple(b.shape)}, steps={steps}; accepted: two batches of "
                "the same shape, 2 steps or more"
            )
        with evaluating(self):
            start, end = self.encode(a).mu[:, None], self.encode(b).mu[:, None]  # [N, 1, D]
            t = torch.linspace(0, 1, steps, device=start.device, dtype=start.dtype)[:, None]  # [steps, 1]
            z = start * (1 - t) + end * t  # [N, steps, D]
            drawing: dict[str, Any] = {}
            if self.autoregressive:
                drawing["uniforms"] = PixelSampler(self).uniforms(len(a)).repeat_interleave(steps, 0)
            return self._images(z.flatten(0, 1), **drawing).unflatten(0, (len(a), steps))

    @torch.no_grad()
    def log_likelihood(
        self, x: Tensor, n_samples: int = 100, *, chunk: int = 10, proposal: str = "posterior"
    ) -> LogLikelihood:
        """log p(x) by importance sampling:

            log p(x) ~ log 1/S sum_s w_s,   w_s = p(x|z_s) p(z_s) / q(z_s|x),   z_s ~ q(z|x)      "posterior"
                                            w_s = p(x|z_s),                     z_s ~ p(z)        "prior"

        Args:
            x: [N, C, H, W]. n_samples: S. chunk: samples decoded at once; memory is that of N * chunk images.
            proposal: "prior" is what the paper's authors did, with 50,000 samples; it needs no density of the prior.
                The posterior needs far fewer where z tells much about x.

        Returns:
            the estimate in nats with its standard error and effective sample size, [N] each. The mean log-weight is
            streamed: no [S, N] array exists. Computed in eval mode, in which the model need not be. Where all weights
            are 0 the estimate is -inf.
        """
        if n_samples < 1 or chunk < 1:
            raise ValueError(f"n_samples and chunk: got {n_samples} and {chunk}; accepted: 1 or more")
        if proposal not in ("posterior", "prior"):
            raise ValueError(f"proposal: got {proposal!r}; accepted: 'posterior', 'prior'")
        if proposal == "posterior" and not getattr(self.prior, "has_density", True):
            raise ValueError(
                f"proposal: got 'posterior', which needs the density of the prior, and {type(self.prior).__name__} has "
                "none; accepted: 'prior'"
            )
        with evaluating(self):
            return self._log_likelihood(x, n_samples, chunk, self.encode(x) if proposal == "posterior" else None)

    def _log_likelihood(self, x: Tensor, n_samples: int, chunk: int, posterior: Posterior | None) -> LogLikelihood:
        top = x.new_full((len(x),), -math.inf, dtype=torch.float64)  # the largest log-weight so far
        s1, s2 = torch.zeros_like(top), torch.zeros_like(top)  # sums of e^(log w - top) and of its square
        for start in range(0, n_samples, chunk):
            log_w = self._log_weights(x, posterior, min(chunk, n_samples - start)).double()  # [s, N]
            new_top = torch.maximum(top, log_w.max(0).values)
            unit = torch.where(new_top == -math.inf, 0, new_top)
            s1 = s1 * (top - unit).exp() + (log_w - unit).exp().sum(0)
            s2 = s2 * (2 * (top - unit)).exp() + (2 * (log_w - unit)).exp().sum(0)
            top = new_top
        variance = (s2 / s1.square() - 1 / n_samples).clamp_min(0)
        error = (variance * n_samples / max(1, n_samples - 1)).sqrt()
        effective = torch.where(s2 > 0, s1.square() / s2, 0)
        known = (s2 > 0) & (n_samples > 1)
        return LogLikelihood(top + s1.log() - math.log(n_samples), torch.where(known, error, math.inf), effective)

    def _log_weights(self, x: Tensor, posterior: Posterior | None, s: int) -> Tensor:  # [s, N]
        if posterior is None:
            z = self.prior.sample(s * len(x)).unflatten(0, (s, len(x)))  # [s, N, D]
        else:
            z = Posterior(*(t.expand(s, *t.shape) for t in posterior)).rsample()
        nll = self.likelihood.nll(self.decode(z.flatten(0, 1), x), x.expand(s, *x.shape).flatten(0, 1)).view(s, len(x))
        return -nll if posterior is None else self.prior.log_prob(z) - posterior.log_prob(z) - nll

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors into the folder; each file appears whole or not at all.

        Raises:
            ValueError: the model was built from modules, not by `from_config`, or has other parts now: save its
                `state_dict()` instead.
        """
        from safetensors.torch import save

        if self.config is None:
            raise ValueError(
                "this model was built from modules of your own, which a config.json cannot describe: build it with "
                "InfoVAE.from_config, or save model.state_dict() with safetensors.torch.save_file"
            )
        config = self._described()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: t.contiguous().cpu() for name, t in self.state_dict().items()}
        write_bytes(folder / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))
        write_bytes(folder / CONFIG_FILE, json.dumps(config, indent=1).encode())

    def _described(self) -> dict[str, Any]:
        """The configuration of the model as it is."""
        config, made = dict(self.config or {}), self._made or {}
        if others := [name for name, part in made.items() if getattr(self, name) != part]:
            raise ValueError(
                f"{', '.join(others)}: not what the configuration made any more; accepted: a model as from_config made "
                "it, or save model.state_dict() with safetensors.torch.save_file"
            )
        config["objective"] = self._described_objective(config["objective"])
        return config

    def _described_objective(self, made: dict[str, Any] | str) -> dict[str, Any] | str:
        """With the alpha and lambda of now. What else has changed no configuration tells: a warning, as it only counts
        where training goes on."""
        now, options = self.objective, {"name": made} if isinstance(made, str) else dict(made)
        accepted = signature(PRESETS[options["name"]]).parameters
        try:
            weights = {"alpha": float(now.alpha), "lambda_": float(now.lambda_)}
            weights |= {"beta": weights["lambda_"]}
            options |= {name: weights[name] for name in weights if name in accepted}
            with torch.random.fork_rng(devices=[]):  # a critic has weights
                old, new = (objective_from_config(config, self.latent_dim) for config in (made, options))
            same = repr(now) == repr(new) and now.prior_samples == new.prior_samples
            if same and (new.alpha, new.lambda_) == (weights["alpha"], weights["lambda_"]):
                return made if (old.alpha, old.lambda_) == (new.alpha, new.lambda_) else options
        except (AttributeError, TypeError, ValueError):  # another kind of objective, or weights that no preset takes
            pass
        warnings.warn(f"save_pretrained: config.json has the objective {made!r}, which this no longer is", stacklevel=3)
        return made

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "InfoVAE":
        """The model that `save_pretrained` wrote, its parts in their dtypes; nothing in the files is executed.

        Raises:
            FileNotFoundError: a file is missing. ValueError: a file is damaged or does not fit the configuration.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing; expected a folder written by save_pretrained")
        try:
            config = json.loads((folder / CONFIG_FILE).read_text())
            if not isinstance(config, dict) or "shape" not in config:
                raise ValueError("no key 'shape'")
            model = cls.from_config(**config)
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{folder / CONFIG_FILE} does not describe a model: {error}") from error
        try:
            weights = load_file(folder / WEIGHTS_FILE)
            for name, part in [("", model), *model.named_children()]:  # a decoder may be in half precision alone
                own = {t.dtype for key, t in weights.items() if key.startswith(name) and t.is_floating_point()}
                if len(own) == 1:
                    part.to(own.pop())
            model.load_state_dict(weights)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{folder / WEIGHTS_FILE} is damaged or of another model: {error}") from error
        return model.eval()


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A copy, as config.json will hold it; tensors and numbers of NumPy as lists and numbers."""
    plain = {}
    for name, value in config.items():
        try:
            plain[name] = json.loads(json.dumps(value, default=lambda v: v.tolist()))
        except (AttributeError, TypeError) as error:
            accepted = 'plain values, as {"name": "imq", "bandwidth": 1.0} for a kernel; or build the model of modules'
            raise ValueError(f"{name}: got {value!r}, which config.json cannot hold; accepted: {accepted}") from error
    return plain
