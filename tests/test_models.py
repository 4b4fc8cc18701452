"""Networks, priors, the InfoVAE model: shapes, exact log-likelihood, saving and loading, errors."""

import json
import math
from collections import UserDict
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from infovae_fast import IMQ, RBF, Bernoulli, Gaussian, InfoVAE, MMDLoss, mmd
from infovae_fast.models import GaussianMixture, Posterior, Prior, SamplerPrior, StandardNormal, Uniform
from infovae_fast.models.networks import PAPER_FEW_SAMPLES, PAPER_PIXELCNN_ENCODER
from infovae_fast.objective import PRESETS, unregularized

SHAPE = (1, 8, 8)


def images(n=6, shape=SHAPE):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("network", ["mlp", "dcgan", {"name": "mlp", "hidden": []}, PAPER_PIXELCNN_ENCODER])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "discretized_logistic_mixture"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 16)])
def test_every_method_has_the_shape_it_states(network, likelihood, shape):
    model = InfoVAE.from_config(shape, 5, encoder=network, decoder=network, likelihood=likelihood)
    x = (images(6, shape) * 255).round() / 255
    output = model(x)
    assert output.z.shape == output.posterior.mu.shape == output.posterior.logvar.shape == (6, 5)
    assert output.params.shape == (6, model.likelihood.channels(shape[0]), *shape[1:])
    terms = model.loss(x)
    terms.loss.backward()
    assert terms.loss.isfinite() and all(p.grad is not None for p in model.parameters())
    model.eval()
    assert model.reconstruct(x).shape == x.shape
    assert model.sample(4).shape == model.sample(4, mean=False).shape == (4, *shape)
    assert model.interpolate(x[:2], x[2:4], steps=3).shape == (2, 3, *shape)
    assert model.log_likelihood(x, 7, chunk=3).log_likelihood.shape == (6,)


def test_the_papers_networks_have_the_papers_sizes():
    """Section 5.1: 28x28, conv 64 and 128 of 4x4 stride 2, full 1024; decoder 1024, 7*7*128, 64, 1."""
    model = InfoVAE.from_config((1, 28, 28), 10, encoder=PAPER_FEW_SAMPLES, decoder=PAPER_FEW_SAMPLES)
    encoder = 64 * 16 + 64 + 128 * 64 * 16 + 128 + 7 * 7 * 128 * 1024 + 1024 + 1024 * 20 + 20
    decoder = 10 * 1024 + 1024 + 1024 * 7 * 7 * 128 + 7 * 7 * 128 + 128 * 64 * 16 + 64 + 64 * 16 + 1
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder


def test_interpolation_meets_the_reconstructions_of_its_ends():
    model = InfoVAE.from_config(SHAPE, 3)
    a, b = images(4).split(2)
    path = model.interpolate(a, b, 5)
    assert torch.allclose(path[:, 0], model.reconstruct(a), atol=1e-6)
    assert torch.allclose(path[:, -1], model.reconstruct(b), atol=1e-6)


class LinearGaussian:
    """x = W z + b + 0.5 e: log p(x) is known, and so is the exact posterior."""

    def __init__(self, data_dim=4, latent_dim=2):
        generator = torch.Generator().manual_seed(1)
        self.w = torch.randn(data_dim, latent_dim, generator=generator, dtype=torch.float64)
        self.b = torch.randn(data_dim, generator=generator, dtype=torch.float64)
        self.std = 0.5
        self.x = torch.randn(20, data_dim, generator=generator, dtype=torch.float64)

    def log_p(self):
        covariance = self.w @ self.w.T + self.std**2 * torch.eye(len(self.b), dtype=torch.float64)
        return torch.distributions.MultivariateNormal(self.b, covariance).log_prob(self.x)

    def model(self, encoder):
        decoder = nn.Linear(self.w.shape[1], len(self.b)).double()
        decoder.weight.data, decoder.bias.data = self.w, self.b
        likelihood = Gaussian(std=self.std, squash=False)
        return InfoVAE(encoder, decoder, self.w.shape[1], likelihood=likelihood, objective=unregularized()).double()


class Approximate(nn.Module):
    """The exact posterior's mean with a spread that is too wide: a proposal whose weights vary."""

    def __init__(self, truth, spread):
        super().__init__()
        precision = truth.w.T @ truth.w / truth.std**2 + torch.eye(truth.w.shape[1], dtype=torch.float64)
        self.covariance, self.truth, self.spread = precision.inverse(), truth, spread

    def forward(self, x):
        mu = (x - self.truth.b) @ self.truth.w @ self.covariance / self.truth.std**2
        return torch.cat([mu, (self.spread * self.covariance.diagonal()).log().expand_as(mu)], 1)


def test_log_likelihood_is_the_truth():
    """Importance sampling meets log p(x) of a linear-Gaussian model within its own standard error."""
    truth = LinearGaussian()
    torch.manual_seed(0)
    estimate = truth.model(Approximate(truth, spread=2.0)).log_likelihood(truth.x, 20_000, chunk=500)
    deviation = (estimate.log_likelihood - truth.log_p()) / estimate.standard_error
    assert deviation.abs().max() < 4.5 and 0.5 < deviation.std() < 1.6
    assert (estimate.standard_error < 0.05).all()
    assert ((estimate.effective_samples > 1000) & (estimate.effective_samples < 20_000)).all()


def test_log_likelihood_with_the_exact_posterior_needs_one_sample():
    """With one latent dimension the posterior is N(mu, s^2): every weight is p(x), and the variance is 0."""
    truth = LinearGaussian(latent_dim=1)
    estimate = truth.model(Approximate(truth, spread=1.0)).log_likelihood(truth.x, 5)
    assert torch.allclose(estimate.log_likelihood, truth.log_p(), rtol=1e-12)
    assert torch.allclose(estimate.effective_samples, torch.full((20,), 5.0, dtype=torch.float64))
    assert (estimate.standard_error < 1e-6).all()


def test_log_likelihood_is_streamed_log_mean_exp():
    """Any chunk gives the log-mean-exp of the same weights, also where the weights under- and overflow."""
    truth = LinearGaussian()
    model = truth.model(Approximate(truth, spread=3.0))
    log_w = torch.randn(50, 20, dtype=torch.float64) * 400
    for chunk in (1, 7, 50, 1000):
        rows = iter(log_w)
        model._log_weights = lambda x, posterior, s, rows=rows: torch.stack([next(rows) for _ in range(s)])
        estimate = model.log_likelihood(truth.x, 50, chunk=chunk)
        assert torch.allclose(estimate.log_likelihood, log_w.logsumexp(0) - math.log(50), rtol=1e-13)
        w = (log_w - log_w.max(0).values).exp()
        assert torch.allclose(estimate.effective_samples, w.sum(0) ** 2 / (w**2).sum(0), rtol=1e-12)


def test_log_likelihood_where_weights_are_zero():
    """The prior ends at 1: a chunk may have no weight at all, and so may an image."""
    torch.manual_seed(0)
    model = InfoVAE.from_config(SHAPE, 1, prior="uniform").double()
    x = images().double()
    log_w = torch.full((20, 6), -math.inf, dtype=torch.float64)
    log_w[13, :5] = torch.tensor([-1.0, -2, -3, -4, -5])
    for chunk in (1, 5, 20):
        rows = iter(log_w)
        model._log_weights = lambda x, posterior, s, rows=rows: torch.stack([next(rows) for _ in range(s)])
        estimate = model.log_likelihood(x, 20, chunk=chunk)
        torch.testing.assert_close(estimate.log_likelihood, log_w.logsumexp(0) - math.log(20))
        assert estimate.effective_samples.tolist() == pytest.approx([1] * 5 + [0])
        assert estimate.standard_error[5] == math.inf and estimate.standard_error[:5].isfinite().all()


def test_log_likelihood_is_computed_in_eval_mode():
    torch.manual_seed(0)
    model = InfoVAE.from_config(SHAPE, 2, encoder={"name": "mlp", "batch_norm": True}).train()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    values = []
    for mode in (True, False):
        torch.manual_seed(1)
        values.append(model.train(mode).log_likelihood(images(), 3).log_likelihood)
        assert model.training == mode and model.encoder[2].training == mode
    assert torch.equal(*values)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_a_configuration_is_a_copy_that_can_be_written(tmp_path):
    encoder = {"name": "mlp", "hidden": [16]}
    model = InfoVAE.from_config(SHAPE, 2, encoder=encoder)
    encoder["hidden"] = [32]
    assert InfoVAE.from_config(SHAPE, 2, encoder=UserDict(encoder)).config["encoder"] == encoder
    model.save_pretrained(tmp_path)
    assert InfoVAE.from_pretrained(tmp_path).config["encoder"]["hidden"] == [16]
    means = torch.zeros(3, 2)
    numbers = InfoVAE.from_config(SHAPE, np.int64(2), prior={"name": "gaussian_mixture", "means": means})
    assert numbers.config["latent_dim"] == 2 and numbers.config["prior"]["means"] == [[0.0, 0.0]] * 3
    with pytest.raises(
        ValueError, match=r"objective: got .*IMQ.* which config.json cannot hold; accepted: plain values"
    ):
        InfoVAE.from_config(SHAPE, 2, objective={"name": "mmd_vae", "kernel": IMQ(1.0)})


def test_posterior():
    mu, logvar = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    posterior = Posterior(mu, logvar)
    z = torch.randn(7, 5, 3, dtype=torch.float64)
    wanted = torch.distributions.Normal(mu, (logvar / 2).exp()).log_prob(z).sum(-1)
    assert torch.allclose(posterior.log_prob(z), wanted, rtol=1e-13)
    torch.manual_seed(0)
    draws = torch.stack([posterior.rsample() for _ in range(20_000)])
    assert torch.allclose(draws.mean(0), mu, atol=0.1) and torch.allclose(draws.var(0).log(), logvar, atol=0.1)


@pytest.mark.parametrize(
    "prior",
    [
        StandardNormal(2),
        Uniform(2, -1.5, 0.5),
        GaussianMixture([[1.0, 0.0], [-2.0, 1.0]], [0.5, 0.3], weights=[3.0, 1.0]),
    ],
    ids=lambda p: type(p).__name__,
)
def test_priors_sample_their_density(prior):
    """The density integrates to 1, and its samples have its mean and its MMD."""
    torch.manual_seed(0)
    axis = torch.linspace(-6, 6, 601)
    grid = torch.cartesian_prod(axis, axis)
    density = prior.log_prob(grid).exp() * (axis[1] - axis[0]) ** 2
    assert density.sum().item() == pytest.approx(1, abs=0.02)
    z = prior.sample(4000)
    mean = (grid * density[:, None]).sum(0)
    assert torch.allclose(z.mean(0), mean, atol=0.1)
    again = grid[torch.multinomial(density, 4000, replacement=True)]
    assert abs(mmd(z, again)) < 2e-3


class Laplace(Prior):
    """Without a score of its own."""

    def log_prob(self, z):
        return -(z.abs() + math.log(2)).sum(-1)


@pytest.mark.parametrize(
    "prior",
    [StandardNormal(2), GaussianMixture([[1.0, 0.0], [-2.0, 1.0]], [[0.5, 1.0], [2.0, 0.7]], [1, 3]), Laplace(2)],
)
def test_the_score_is_the_gradient_of_the_density(prior):
    prior = prior.double()
    z = torch.randn(4, 2, dtype=torch.float64)
    for d in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[d] = 1e-6
        difference = (prior.log_prob(z + step) - prior.log_prob(z - step)) / 2e-6
        assert torch.allclose(prior.score(z)[:, d], difference, atol=1e-7)
    with torch.inference_mode():
        assert torch.equal(prior.score(z.clone()), prior.score(z))
    assert prior.score(z.half()).dtype == torch.half


@pytest.mark.parametrize("objective", PRESETS)
def test_save_and_load(tmp_path, objective):
    model = InfoVAE.from_config(
        SHAPE, 3, encoder="dcgan", likelihood={"name": "gaussian", "min_std": 0.1}, objective=objective
    )
    model.save_pretrained(tmp_path / "model")
    loaded = InfoVAE.from_pretrained(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
    assert loaded.config == model.config and not loaded.training
    x = images()
    assert torch.equal(loaded.reconstruct(x), model.eval().reconstruct(x))
    assert loaded.objective.alpha == model.objective.alpha and loaded.likelihood == model.likelihood


def test_batch_normalisation_statistics_are_saved(tmp_path):
    model = InfoVAE.from_config(SHAPE, 3, encoder={"name": "dcgan", "batch_norm": True})
    model(images())
    model.save_pretrained(tmp_path)
    x = images()
    assert torch.equal(InfoVAE.from_pretrained(tmp_path).reconstruct(x), model.eval().reconstruct(x))


def test_loading_refuses_what_is_damaged(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"config\.json is missing; expected a folder written by save_pretrained"
    ):
        InfoVAE.from_pretrained(tmp_path)
    model = InfoVAE.from_config(SHAPE, 3)
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    for text in ("{", "[]", "{}", json.dumps(json.loads(config) | {"latent": 3})):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json does not describe a model"):
            InfoVAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(json.loads(config) | {"latent_dim": 4}))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or of another model: (?s:.*)size mismatch"):
        InfoVAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    weights = (tmp_path / "model.safetensors").read_bytes()
    for content in (weights[:100], weights[: len(weights) // 2], b""):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            InfoVAE.from_pretrained(tmp_path)


def test_an_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch):
    model = InfoVAE.from_config(SHAPE, 3)
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    nn.init.zeros_(model.encoder[-1].weight)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_own_modules(tmp_path):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    decoder = nn.Sequential(nn.Linear(2, 64), nn.Unflatten(1, SHAPE))
    model = InfoVAE(encoder, decoder, 2, prior=SamplerPrior(2, lambda n: torch.rand(n, 2)))
    assert model.loss(images()).loss.isfinite() and model.loss(images()).kl.isnan()
    with pytest.raises(ValueError, match=r"built from modules of your own"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_saved_is_the_model_as_it_is(tmp_path):
    """Weights that were set since are saved; what else the objective has become is told; another network is refused."""
    model = InfoVAE.from_config(SHAPE, 2, objective={"name": "mmd_vae", "kernel": {"name": "imq"}})
    model.objective.alpha, model.objective.lambda_ = 0.5, 7.0
    deepcopy(model).save_pretrained(tmp_path)
    loaded = InfoVAE.from_pretrained(tmp_path)
    assert (loaded.objective.alpha, loaded.objective.lambda_) == (0.5, 7.0)
    assert isinstance(loaded.objective.divergence.kernel, IMQ) and model.config["objective"]["name"] == "mmd_vae"
    beta = InfoVAE.from_config(SHAPE, 2, objective="beta_vae")
    beta.objective.alpha, beta.objective.lambda_ = np.float32(-1), torch.tensor(2.0)
    beta.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["objective"] == {"name": "beta_vae", "beta": 2.0}
    model.likelihood = Bernoulli()  # the same
    model.save_pretrained(tmp_path)
    for change in ({"prior_samples": 500}, {"divergence": MMDLoss(RBF(1.0))}, {"alpha": 0.2, "lambda_": 0.5}):
        changed = deepcopy(model)
        for name, value in change.items():
            setattr(changed.objective, name, value)
        with pytest.warns(UserWarning, match="config.json has the objective .*, which this no longer is"):
            changed.save_pretrained(tmp_path)
        InfoVAE.from_pretrained(tmp_path)
    model.objective, model.likelihood = unregularized(), Gaussian()
    with pytest.raises(ValueError, match="likelihood: not what the configuration made any more"):
        model.save_pretrained(tmp_path)
    elbo = InfoVAE.from_config(SHAPE, 2, objective="elbo")
    elbo.objective.alpha = 0.5  # as KL annealing does
    with pytest.warns(UserWarning, match="config.json has the objective 'elbo', which this no longer is"):
        elbo.save_pretrained(tmp_path)
    assert InfoVAE.from_pretrained(tmp_path).objective.alpha == 0


def test_images_of_codes():
    model = InfoVAE.from_config(SHAPE, 2, encoder={"name": "mlp", "batch_norm": True})
    z = model.encode(images()).mu
    assert torch.equal(model.images(z), model.likelihood.mean(model.decode(z))) and model.training
    assert set(model.images(z, mean=False).unique().tolist()) == {0.0, 1.0}
    drawn = InfoVAE.from_config(SHAPE, 2, decoder={"name": "pixelcnn", "layers": 2, "maps": 4})
    assert not torch.equal(*(drawn.images(z.detach(), mean=False) for _ in range(2)))
    assert torch.equal(*(drawn.reconstruct(images()) for _ in range(2)))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.mu, self.logvar = nn.Linear(64, 2), nn.Linear(64, 2)

    def forward(self, x):
        return self.mu(x.flatten(1)), self.logvar(x.flatten(1))


def test_an_encoder_of_two_heads():
    encoder, x = TwoHeads(), images()
    posterior = InfoVAE(encoder, nn.Identity(), 2).encode(x)
    assert torch.equal(posterior.mu, encoder(x)[0]) and torch.equal(posterior.logvar, encoder(x)[1])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weights": [1.0]}, r"weights: got shape \(1,\); accepted: \[K\] = \[2\]"),
        ({"weights": [0.0, 0.0]}, "weights >= 0 and one of them > 0"),
        ({"weights": [math.nan, 1.0]}, "finite numbers"),
        ({"weights": [[0.5], [0.5]]}, r"weights: got shape \(2, 1\)"),
        ({"stds": math.nan}, "finite numbers"),
        ({"stds": 0.0}, "stds > 0"),
        ({"stds": [[1.0, 2.0]] * 2}, r"stds: got shape \(2, 2\)"),
        ({"stds": [1.0, 2.0, 3.0]}, r"stds: got shape \(3,\); accepted: a number, \[2\] or \[2, 1\]"),
        ({"means": [0.0, 1.0]}, r"means: got shape \(2,\); accepted: \[K, D\]"),
    ],
)
def test_mixtures_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**({"means": [[0.0], [1.0]]} | changes))


MIXTURE = GaussianMixture([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]], stds=[[0.1], [0.2], [0.3]], weights=[0.2, 0.5, 0.3])


@pytest.mark.parametrize("prior", [StandardNormal(2), Uniform(2), MIXTURE], ids=repr)
def test_priors_in_other_dtypes(prior):
    for dtype, wanted in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        z = prior.to(dtype).sample(3)
        assert z.dtype == wanted and prior.sample(0).shape == (0, 2)
        assert prior.log_prob(z).dtype == wanted and prior.log_prob(z).isfinite().all()
    half = deepcopy(MIXTURE).half()
    again = deepcopy(half).float()  # the same rounded numbers
    z = torch.randn(50, 2)
    torch.testing.assert_close(half.log_prob(z), again.log_prob(z), rtol=1e-5, atol=1e-5)
    torch.set_default_dtype(torch.float64)
    try:
        exact = GaussianMixture([[0.1]])
    finally:
        torch.set_default_dtype(torch.float32)
    assert exact.means.item() == 0.1 and exact.sample(2).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_densities_of_a_model_in_half_precision(dtype):
    """As those of the same weights in float32: q is narrow, 1 / variance beyond float16."""
    model = InfoVAE.from_config(SHAPE, 2, prior={"name": "gaussian_mixture", "means": [[0.0, 0.0]]}, objective="elbo")
    nn.init.zeros_(model.encoder[-1].weight)
    model.encoder[-1].bias.data = torch.tensor([0.5, -0.5, -12.0, -12.0])
    for part in model.decoder.parameters():
        nn.init.zeros_(part)
    x, found = images(4).round(), []
    for kind in (torch.float32, dtype):
        torch.manual_seed(0)  # of the z
        found.append(model.to(kind).log_likelihood(x.to(kind), 50).log_likelihood)
    assert torch.equal(*found)  # all weights and images are numbers of 16 bits
    assert model.loss(x.to(dtype)).loss.isfinite()


@pytest.mark.parametrize("decoder", ["mlp", "dcgan", {"name": "pixelcnn", "layers": 2, "maps": 4}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pictures_of_a_model_of_another_dtype(decoder, dtype):
    model, x = InfoVAE.from_config(SHAPE, 2, decoder=decoder).to(dtype), images(2).round().to(dtype)
    for pictures in (model.reconstruct(x), model.sample(2), model.interpolate(x, x, 2)[:, 0]):
        assert pictures.shape == x.shape and pictures.isfinite().all()


def test_a_saved_model_keeps_its_dtype(tmp_path):
    model = InfoVAE.from_config(SHAPE, 2).double()
    model.encoder[-1].bias.data[0] = 1 + 1e-12
    model.save_pretrained(tmp_path)
    loaded = InfoVAE.from_pretrained(tmp_path)
    assert loaded.encoder[-1].bias[0].item() == 1 + 1e-12 and loaded.sample(2).dtype == torch.float64


def test_a_saved_model_keeps_the_dtype_of_each_part(tmp_path):
    model = InfoVAE.from_config(SHAPE, 2)
    model.decoder.half()
    model.save_pretrained(tmp_path)
    loaded = InfoVAE.from_pretrained(tmp_path)
    assert loaded.decoder[0].weight.dtype == torch.half and loaded.encoder[-1].weight.dtype == torch.float32


def test_pictures_are_made_in_eval_mode():
    """One image too, whose batch has no variance; buffers stay, and so does the mode."""
    parts = {"encoder": {"name": "dcgan", "batch_norm": True}, "decoder": {"name": "dcgan", "batch_norm": True}}
    model, x = InfoVAE.from_config((1, 8, 8), 2, **parts), images(3)
    before = [buffer.clone() for buffer in model.buffers()]
    some = model.reconstruct(x)
    torch.testing.assert_close(model.reconstruct(x[:1]), some[:1])
    model.sample(1), model.interpolate(x[:1], x[:1])
    assert model.training and all(part.training for part in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("decoder", ["mlp", {"name": "pixelcnn", "layers": 2, "maps": 4}])
def test_codes_of_the_same_images(decoder):
    """Images are not repeated for a decoder that shares them among codes."""
    model, x, z = InfoVAE.from_config(SHAPE, 2, decoder=decoder).eval(), images(2).round(), torch.randn(6, 2)
    torch.testing.assert_close(model.decode(z, x), model.decode(z, x.repeat(3, 1, 1, 1)))
    if model.autoregressive:
        seen = []
        with model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[1]))):
            model.decode(z, x), model.log_likelihood(x, 5)
        assert seen == [2, 2]
        for some in (x, x[:0]):
            with pytest.raises(ValueError, match=f"z: got 5 codes for {len(some)} images; accepted: S for every image"):
                model.decode(z[:5], some)
        assert model.decode(z[:0], x[:0]).shape == (0, 1, 8, 8)


def test_the_standard_error_is_that_of_few_samples_too():
    """Over many estimates from three weights that differ little, its mean square is their variance."""
    truth = LinearGaussian(latent_dim=1)
    model, x = truth.model(Approximate(truth, spread=1.05)), truth.x[:1].expand(4000, -1)
    torch.manual_seed(0)
    estimate = model.log_likelihood(x, 3)
    assert estimate.standard_error.square().mean() == pytest.approx(estimate.log_likelihood.var().item(), rel=0.15)


def test_one_sample_tells_no_error():
    assert InfoVAE.from_config(SHAPE, 2).log_likelihood(images(2), 1).standard_error.isinf().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("network", ["mlp", "dcgan", "pixelcnn"])
def test_a_model_of_another_dtype(network, dtype):
    encoder = "mlp" if network == "pixelcnn" else network
    model = InfoVAE.from_config((1, 16, 16), 4, encoder=encoder, decoder=network).to(dtype)
    x = torch.rand(3, 1, 16, 16).round().to(dtype)
    loss = model.loss(x).loss
    loss.backward()
    assert loss.isfinite() and model.encode(x).mu.dtype == torch.promote_types(dtype, torch.float32)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_large_logvar_stays_finite():
    model = InfoVAE.from_config(SHAPE, 2, objective="elbo")
    nn.init.constant_(model.encoder[-1].bias, 1e4)
    terms = model.loss(images())
    assert terms.loss.isfinite()


def test_refusals():
    with pytest.raises(ValueError, match=r"shape: got \(8, 8\); accepted: \(channels, height, width\)"):
        InfoVAE.from_config((8, 8))
    with pytest.raises(ValueError, match="latent_dim: got 0"):
        InfoVAE.from_config(SHAPE, 0)
    with pytest.raises(ValueError, match="encoder: got 'resnet'; accepted: 'mlp', 'dcgan'"):
        InfoVAE.from_config(SHAPE, encoder="resnet")
    for wrong in ("abc", 5, [-3], [1.5]):
        for name, option in (("mlp", "hidden"), ("dcgan", "channels")):
            with pytest.raises(ValueError, match=rf"{option}: got .*; accepted: a list of integers, 1 or more each"):
                InfoVAE.from_config((1, 8, 8), encoder={"name": name, option: wrong})
    with pytest.raises(ValueError, match="prior 'gaussian_mixture': missing a required argument: 'means'"):
        InfoVAE.from_config((1, 8, 8), prior={"name": "gaussian_mixture"})
    with pytest.raises(ValueError, match=r"encoder: got \[\]; accepted: 'mlp'"):
        InfoVAE.from_config((1, 8, 8), encoder={"name": []})
    with pytest.raises(ValueError, match=r"decoder 'mlp': unknown options \['width'\]; accepted: \['hidden'\]"):
        InfoVAE.from_config(SHAPE, decoder={"name": "mlp", "width": 3})
    with pytest.raises(
        ValueError, match="dcgan with 2 layers of stride 2 needs height and width that are multiples of 4"
    ):
        InfoVAE.from_config((1, 10, 10), encoder="dcgan")
    with pytest.raises(ValueError, match="prior: got 'cauchy'; accepted: 'normal', 'uniform', 'gaussian_mixture'"):
        InfoVAE.from_config(SHAPE, prior="cauchy")
    with pytest.raises(ValueError, match="the prior has 2 dimensions, but latent_dim is 10"):
        InfoVAE.from_config(SHAPE, 10, prior={"name": "gaussian_mixture", "means": [[0.0, 1.0]]})
    for low, high in ((1.0, 1.0), (-math.inf, 1.0), (0.0, math.nan)):
        with pytest.raises(ValueError, match="accepted: finite numbers, low < high"):
            Uniform(2, low, high)
    for part, value in (("likelihood", Bernoulli()), ("encoder", nn.Flatten()), ("decoder", None)):
        kind = type(value).__name__
        with pytest.raises(ValueError, match=rf"{part}: got {kind}; accepted: a name.*InfoVAE\(encoder"):
            InfoVAE.from_config(SHAPE, 2, **{part: value})
    for latent_dim in (2.5, "3", True):
        with pytest.raises(ValueError, match=f"latent_dim: got {latent_dim!r}; accepted: an integer"):
            InfoVAE.from_config(SHAPE, latent_dim)
    with pytest.raises(ValueError, match="shape: got 784; accepted"):
        InfoVAE.from_config(784)
    for part, value in (("likelihood", "gaussian"), ("prior", torch.distributions.Normal(0, 1)), ("objective", "elbo")):
        with pytest.raises(TypeError, match=rf"{part}: got .*names are for InfoVAE.from_config"):
            InfoVAE(nn.Identity(), nn.Identity(), 2, **{part: value})
    with pytest.raises(ValueError, match=r"latent_dim: got 4\.0; accepted: an integer"):
        InfoVAE(nn.Identity(), nn.Identity(), 4.0)
    model = InfoVAE.from_config(SHAPE, 2)
    with pytest.raises(TypeError, match=r"x: got dtype torch\.uint8; accepted: a floating-point tensor"):
        model.loss((255 * images()).byte())
    for likelihood in ("bernoulli", "categorical", "discretized_logistic_mixture"):
        other = InfoVAE.from_config(SHAPE, 2, likelihood=likelihood)
        for x, got in ((255 * images(), "from 0.* to 25"), (2 * images() - 1, "from -0.9.* to 0.9")):
            with pytest.raises(ValueError, match=rf"x: got values {got}.*; accepted: in \[0, 1\]"):
                other.loss(x)
    assert InfoVAE.from_config(SHAPE, 2, likelihood="gaussian").loss(255 * images()).loss.isfinite()
    sampler = InfoVAE(model.encoder, model.decoder, 2, prior=SamplerPrior(2, lambda n: torch.rand(n, 2)))
    with pytest.raises(ValueError, match="needs the density of the prior, and SamplerPrior has none; accepted: 'prior"):
        sampler.log_likelihood(images())
    assert sampler.log_likelihood(images(), proposal="prior").log_likelihood.isfinite().all()
    with pytest.raises(ValueError, match="n_samples and chunk: got 0 and 10"):
        model.log_likelihood(images(), 0)
    with pytest.raises(ValueError, match="interpolate: got shapes"):
        model.interpolate(images(2), images(3))
    with pytest.raises(ValueError, match=r"the encoder returned shape \(6, 3\); accepted: \(6, 4\)"):
        InfoVAE(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), nn.Identity(), 2)(images())
