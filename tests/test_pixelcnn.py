"""GatedPixelCNN: causal to the bit, no blind spot, probabilities that sum to 1; the authors' network; in an InfoVAE."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from infovae_fast import Bernoulli, Categorical, DiscretizedLogisticMixture, GatedPixelCNN, Gaussian, InfoVAE
from infovae_fast.backends import native_missing
from infovae_fast.data import load_data, to_unit
from infovae_fast.evaluation.mutual_information import mutual_information
from infovae_fast.masked_conv import MaskedConv2d, to_dense
from infovae_fast.models import pixelcnn
from infovae_fast.models.pixelcnn import PAPER_PIXELCNN, R64
from infovae_fast.models.pixelcnn_pp import PixelCNNPlusPlus
from infovae_fast.objective import PRESETS

MIXTURE = DiscretizedLogisticMixture(mixtures=2, levels=3)
MODELS = {  # (likelihood, image channels, options)
    "grey": (Bernoulli(), 1, {}),
    "spatial": (Bernoulli(), 1, {"condition": "spatial", "spatial_maps": 2}),
    "colours": (Bernoulli(), 3, {}),
    "levels": (Categorical(3), 3, {"condition": "spatial", "spatial_maps": 2}),
    "learned std": (Gaussian(), 3, {}),
    "mixture": (MIXTURE, 3, {}),
    "infovae2017": (Bernoulli(), 1, {"variant": "infovae2017"}),
}
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def seeded_on_one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(name, height, width, inputs=2, **options):
    """A float64 decoder with random weights and biases, its likelihood, and the channels of its image."""
    likelihood, channels, own = MODELS[name]
    groups = 1 if likelihood.joint_channels else channels
    options = {"layers": 3, "maps": 6, "first_kernel": 5} | own | options
    model = GatedPixelCNN(inputs, (likelihood.channels(channels), height, width), channels, groups, **options).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model, likelihood, channels


class Launches(TorchDispatchMode):
    """The operators that fill tensors."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        own = isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given
        if own or function._schema.is_mutable:
            self.names.append(str(function))
        return out


# Causality


@each_model
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1000.0])
def test_the_future_cannot_be_seen(name, poison):
    """Params keep every bit, whatever their own and later pixels (and colours) are."""
    model, _, channels = network(name, 5, 6)
    z, x = torch.randn(2, 2, dtype=torch.float64), torch.rand(2, channels, 5, 6, dtype=torch.float64)
    clean = model(z, x)
    for i, j in ((0, 0), (0, 5), (2, 3), (4, 0), (4, 5)):
        for first in range(model.data_channels):
            poisoned = x.clone()
            poisoned[:, first:, i, j] = poison
            poisoned[:, :, i, j + 1 :] = poison
            poisoned[:, :, i + 1 :] = poison
            params = model(z, poisoned)
            seen = params[:, :, :i].flatten(1), params[:, :, i, :j].flatten(1)
            assert torch.equal(
                torch.cat(seen, 1), torch.cat([clean[:, :, :i].flatten(1), clean[:, :, i, :j].flatten(1)], 1)
            )
            for group in range(first + 1):
                own = slice(group, None, model.data_channels)
                assert torch.equal(params[:, own, i, j], clean[:, own, i, j])


def seen_from(model, i, j, group=0):
    """The pixels and channels [C, H, W] that the params of a pixel's group depend on."""
    channels, height, width = model.image_shape
    x = torch.rand(8, channels, height, width, dtype=torch.float64, requires_grad=True)
    z = torch.randn(8, 2, dtype=torch.float64)
    params = model(z, x)[:, group :: model.data_channels, i, j]
    (gradient,) = torch.autograd.grad((params * torch.rand_like(params)).sum(), x)
    return (gradient != 0).any(0)


@each_model
def test_all_of_the_past_is_seen_as_far_as_predicted(name):
    """The Jacobian: nothing leaks, and nothing earlier is missing."""
    height, width = 8, 11
    model, _, channels = network(name, height, width, maps=24)  # some survive every relu
    field = model.receptive_field()
    assert all(offset < (0, 0) for offset in field)
    for i, j in ((0, 0), (0, 10), (4, 5), (7, 0), (7, 10), (6, 8)):
        predicted = torch.zeros(height, width, dtype=torch.bool)
        for dy, dx in field:
            if i + dy >= 0 and 0 <= j + dx < width:
                predicted[i + dy, j + dx] = True
        for group in range(model.data_channels):
            seen = seen_from(model, i, j, group)
            # At the own pixel: the groups before this one. Everywhere else all channels alike.
            own = [model.data_channels > 1 and c < group for c in range(channels)]
            assert seen[:, i, j].tolist() == own
            seen[:, i, j] = False
            assert all(torch.equal(channel, predicted) for channel in seen)


@pytest.mark.parametrize("options", [R64, PAPER_PIXELCNN, {"layers": 3, "first_kernel": 5, "kernel": 5}])
def test_the_receptive_field_has_no_blind_spot(options):
    """A box of radius r_0 + (L - 1) r, above and to the left."""
    options = {key: value for key, value in options.items() if key != "name"}
    reach = options["first_kernel"] // 2 + (options["layers"] - 1) * (options["kernel"] // 2)
    box = itertools.product(range(-reach, 1), range(-reach, reach + 1))
    model = GatedPixelCNN(0, (1, 8, 8), **options)
    assert model.receptive_field() == {offset for offset in box if offset < (0, 0)}


# Probability


def images(channels, height, width, levels):
    """All of them, [levels^(C H W), C, H, W]."""
    values = torch.arange(levels, dtype=torch.float64) / (levels - 1)
    every = torch.cartesian_prod(*[values] * (channels * height * width)).view(-1, channels * height * width)
    return every.unflatten(1, (channels, height, width))


@pytest.mark.parametrize(
    ("name", "height", "width", "levels"),
    [
        *[("grey", *size, 2) for size in ((3, 3), (2, 4), (4, 2), (1, 8), (8, 1), (1, 1))],
        *[("spatial", *size, 2) for size in ((3, 3), (2, 4))],
        *[("infovae2017", *size, 2) for size in ((3, 3), (4, 2))],
        *[("colours", *size, 2) for size in ((1, 3), (3, 1), (1, 1))],
        *[("levels", *size, 3) for size in ((1, 2), (2, 1))],
        *[("mixture", *size, 3) for size in ((1, 2), (2, 1))],
    ],
)
def test_the_probabilities_of_all_images_sum_to_one(name, height, width, levels):
    model, likelihood, channels = network(name, height, width)
    x = images(channels, height, width, levels)
    for z in torch.randn(2, 2, dtype=torch.float64):
        log_p = -likelihood.nll(model(z.expand(len(x), -1), x), x)
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
        assert log_p.exp().std() > 1e-4  # not all the same


def test_without_z():
    model, likelihood, _ = network("grey", 3, 3, inputs=0)
    x = images(1, 3, 3, 2)
    assert (-likelihood.nll(model(None, x), x)).exp().sum().item() == pytest.approx(1, abs=1e-9)
    assert torch.equal(model(torch.empty(len(x), 0, dtype=torch.float64), x), model(None, x))


@each_model
def test_gradients(name):
    model, likelihood, channels = network(name, 2, 3, layers=2)
    z = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    x = torch.rand(2, channels, 2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(model, (z, x))
    nll = likelihood.nll(model(z, x), x.detach().round()).sum()
    grads = torch.autograd.grad(nll, list(model.parameters()))
    assert all(bool((g != 0).any()) for g in grads)


@each_model
def test_checkpoints_change_memory_alone(name):
    model, _, channels = network(name, 4, 4)
    z, x = torch.randn(3, 2, dtype=torch.float64), torch.rand(3, channels, 4, 4, dtype=torch.float64)
    found, kept = [], []
    for model.checkpoint_layers in (False, True):
        model.zero_grad()
        kept.append(0)

        def count(t):
            kept[-1] += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            params = model(z, x)
        params.square().sum().backward()
        found.append([params.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[1] < 0.7 * kept[0]


def test_a_step_launches_little_beside_the_convolutions():
    """Sums of the gradients to biases, mostly; nothing that fills a gradient with zeros to write a part of it."""
    if (reason := native_missing()) is not None:
        pytest.skip(reason)
    model = GatedPixelCNN(2, (1, 5, 6), layers=5, maps=6, backend="cpp")
    z, x = torch.randn(3, 2), torch.rand(3, 1, 5, 6)
    with Launches() as launches:
        torch.autograd.grad(model(z, x).sum(), list(model.parameters()))
    assert len(launches.names) <= 15 * 5, launches.names
    assert not any(name.startswith(("aten.slice_backward", "aten.select_backward")) for name in launches.names)


@each_model
def test_several_codes_of_an_image(name):
    """z [S N, D] for x [N, C, H, W] is z with the images repeated."""
    model, _, channels = network(name, 4, 3)
    z, x = torch.randn(6, 2, dtype=torch.float64), torch.rand(2, channels, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(model(z, x), model(z, x.repeat(3, 1, 1, 1)), rtol=1e-13, atol=1e-13)
    assert model(z[:0], x[:0]).shape == (0, model.head[-1].weight.shape[2], 4, 3)


@each_model
@pytest.mark.parametrize("inputs", [2, 0])
def test_many_images_go_through_some_at_a_time_where_no_gradient_is_wanted(name, inputs, monkeypatch):
    model, _, channels = network(name, 4, 3, inputs=inputs)
    monkeypatch.setattr(pixelcnn, "BYTES_AT_ONCE", 8 * model.maps * 4 * 3 * 4)  # four images
    z, x = torch.randn(10, 2, dtype=torch.float64), torch.rand(10, channels, 4, 3, dtype=torch.float64)
    z, whole, counts = z if inputs else None, model(z if inputs else None, x), []
    model.head.register_forward_hook(lambda module, inputs, out: counts.append(len(out)))
    with torch.no_grad():
        torch.testing.assert_close(model(z, x), whole, rtol=1e-13, atol=1e-13)
    assert counts == [4, 4, 2]


def test_sizes():
    """R64 has 7 x (6 x 64 x 128 + 128^2 + 2 x 64 x 128 + 2 x 64^2) weights, but for its ends."""
    model = GatedPixelCNN(10, (1, 28, 28), **{key: value for key, value in R64.items() if key != "name"})
    first = (21 + 3) * 128 + 128 * 128 + 64 * 128
    later = (6 + 2) * 64 * 128 + 128 * 128 + 64 * 128
    weights = first + 6 * later - 64 * 64 + 64 * 64 + 64  # the last layer has no W_o; the head
    biases = 7 * 2 * 128 + 6 * 128 + 64 + 64 + 1
    assert sum(p.numel() for p in model.parameters()) == weights + biases + 7 * 10 * 256


# The authors' network


def authors_network(model, z, x):
    """Their TensorFlow code in dense convolutions, dead parts included, with the weights of `model`."""

    def conv(layer, y, activation=None):  # a masked convolution: zeros in a square kernel
        dense = to_dense(layer.weight, **layer.mask._asdict())
        y = F.conv2d(y, dense, layer.bias, padding=dense.shape[-1] // 2)
        return y if activation is None else activation(y)

    def gate(f, payload, bias):
        f = f + bias[:, :, None, None]
        a, b = f.chunk(2, 1)
        return torch.tanh(a + payload) * torch.sigmoid(b + payload)

    v, h = x, x
    for i, layer in enumerate(model.layers):
        biases = model.condition[i](z).chunk(1 if i == 0 else 2, 1)
        v = gate(conv(layer.vertical, v), 0.0, biases[0])
        if i == 0:  # 1 x 1 with mask "A": no weight is left
            anything = torch.randn_like(v)
            link = F.relu(F.conv2d(v, torch.zeros(6, 6, 1, 1).double()))
            o = gate(anything.repeat(1, 2, 1, 1), link, biases[0])
            h = F.relu(F.conv2d(o, torch.zeros(6, 6, 1, 1).double(), layer.start))
        else:
            link = conv(layer.link, v, F.relu)
            h = conv(layer.out, gate(conv(layer.horizontal, h), link, biases[1]), F.relu) + h
    return conv(model.head[3], conv(model.head[1], h, F.relu))


def test_infovae2017_is_the_authors_network():
    model, _, _ = network("infovae2017", 6, 7, first_kernel=7, layers=4)
    z, x = torch.randn(2, 2, dtype=torch.float64), torch.rand(2, 1, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(model(z, x), authors_network(model, z, x), rtol=1e-12, atol=1e-12)


def test_infovae2017_starts_with_a_dead_horizontal_stack():
    """After layer 0 it is one number a map; by their initialisation 0, and it stays there: no gradient."""
    model, _, _ = network("infovae2017", 6, 7)
    found = []
    model.layers[0].register_forward_hook(lambda _, __, output: found.append(output[1]))
    z, x = torch.randn(5, 2, dtype=torch.float64), torch.rand(5, 1, 6, 7, dtype=torch.float64)
    model(z, x)
    assert torch.equal(found[0], model.layers[0].start.relu()[:, None, None].expand(5, 6, 6, 7))
    fresh = GatedPixelCNN(2, (1, 6, 7), variant="infovae2017", layers=3, maps=6).double()
    fresh(z, x).sum().backward()
    start = fresh.layers[0].start
    assert not start.any() and not start.grad.any()
    bounds = {"vertical": (6 / (9 * 12)) ** 0.5, "horizontal": (6 / (3 * 12)) ** 0.5, "out": (6 / 12) ** 0.5}
    for part, bound in bounds.items():
        largest = getattr(fresh.layers[1], part).weight.abs().max().item()
        assert 0.8 * bound < largest <= bound


def test_infovae2017_has_a_blind_spot():
    """Of the 208 pixels before (8, 8) in an image of 12 x 25, 12 layers miss 76: a triangle above to the right."""
    options = {key: value for key, value in PAPER_PIXELCNN.items() if key != "name"} | {"maps": 2}
    before = {(dy, dx) for dy in range(-8, 1) for dx in range(-8, 17) if (dy, dx) < (0, 0)}
    blind = before - GatedPixelCNN(2, (1, 12, 25), variant="infovae2017", **options).receptive_field()
    assert len(before) == 208 and len(blind) == 76
    assert all(dx > -dy for dy, dx in blind)
    assert (
        not before
        - {(dy, dx) for dy, dx in before if dx > 14}
        - GatedPixelCNN(2, (1, 12, 25), **options).receptive_field()
    )


def test_infovae2017_has_biases_only_without_z():
    for inputs in (0, 2):
        model, _, _ = network("infovae2017", 3, 3, inputs=inputs)
        gates = [conv for conv in model.modules() if isinstance(conv, MaskedConv2d) and conv.mask.gate]
        assert len(gates) == 5 and all((conv.bias is None) == (inputs > 0) for conv in gates)


# InfoVAE with a PixelCNN


SMALL = {"name": "pixelcnn", "layers": 2, "maps": 6, "first_kernel": 3}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "likelihood", ["bernoulli", "gaussian", {"name": "categorical", "levels": 4}, MIXTURE.to_config()]
)
@pytest.mark.parametrize("options", [{}, {"condition": "spatial"}], ids=str)
def test_every_method_has_the_shape_it_states(channels, likelihood, options):
    model = InfoVAE.from_config((channels, 4, 5), 3, decoder=SMALL | options, likelihood=likelihood)
    x = torch.rand(6, channels, 4, 5).round()
    output = model(x)
    assert output.params.shape == (6, model.likelihood.channels(channels), 4, 5)
    terms = model.loss(x)
    terms.loss.backward()
    assert terms.loss.isfinite() and all(p.grad is not None for p in model.parameters())
    assert model.decoder.data_channels == (1 if model.likelihood.joint_channels else channels)
    assert model.reconstruct(x).shape == x.shape and torch.equal(model.reconstruct(x), model.reconstruct(x))
    assert model.sample(4).shape == model.sample(4, mean=False).shape == (4, channels, 4, 5)
    path = model.interpolate(x[:2], x[2:4], steps=3)
    assert path.shape == (2, 3, channels, 4, 5)
    assert torch.allclose(path[0, 0], model.reconstruct(x)[0], atol=1e-6)
    for proposal in ("posterior", "prior"):
        assert model.log_likelihood(x, 7, chunk=3, proposal=proposal).log_likelihood.shape == (6,)


@pytest.mark.parametrize("objective", PRESETS)
def test_every_objective_and_saving(tmp_path, objective):
    model = InfoVAE.from_config((1, 4, 4), 2, decoder=SMALL, objective=objective)
    x = torch.rand(8, 1, 4, 4).round()
    model.loss(x).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = InfoVAE.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["decoder"] == SMALL
    assert torch.equal(loaded.reconstruct(x), model.eval().reconstruct(x))


def test_samples_follow_the_global_seed():
    model = InfoVAE.from_config((1, 4, 4), 2, decoder=SMALL)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model.sample(8, mean=False))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert set(draws[0].unique().tolist()) <= {0.0, 1.0}


class Own(nn.Module):
    """An autoregressive decoder of a user: every pixel sees the first one."""

    autoregressive, image_shape = True, (1, 2, 2)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 4)

    def forward(self, z, x):
        assert len(z) == len(x)
        first = F.pad(x[:, :, :1, :1].expand(-1, 1, 2, 2).flatten(1)[:, 1:], (1, 0))
        return (self.linear(z) + first).view(-1, 1, 2, 2)


def test_a_decoder_of_your_own():
    model = InfoVAE(nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), Own(), 2)
    x = torch.rand(6, 1, 2, 2).round()
    assert model.loss(x).loss.isfinite() and model.sample(3).shape == (3, 1, 2, 2)
    assert model.log_likelihood(x, 5).log_likelihood.isfinite().all()


@pytest.mark.parametrize("proposal", ["posterior", "prior"])
def test_log_likelihood_is_the_integral_over_z(proposal):
    """One latent dimension: the quadrature of p(x|z) p(z) is known."""
    model = InfoVAE.from_config((1, 2, 3), 1, decoder=SMALL).double()
    for parameter in model.decoder.parameters():
        nn.init.uniform_(parameter, -1, 1)
    nn.init.zeros_(model.encoder[-1].weight)  # the proposal N(0.5, e^0.5), the same for all x
    model.encoder[-1].bias.data = torch.tensor([0.5, 0.5], dtype=torch.float64)
    x = images(1, 2, 3, 2)[::9]
    z = torch.linspace(-8, 8, 801, dtype=torch.float64)[:, None]
    with torch.no_grad():
        nll = model.likelihood.nll(model.decode(z.repeat_interleave(len(x), 0), x), x.repeat(len(z), 1, 1, 1))
    truth = (model.prior.log_prob(z)[:, None] - nll.view(len(z), -1)).logsumexp(0) + math.log(0.02)
    estimate = model.log_likelihood(x, 3000, chunk=500, proposal=proposal)
    deviation = (estimate.log_likelihood - truth) / estimate.standard_error
    assert deviation.abs().max() < 4.5 and (estimate.standard_error < 0.05).all()


def test_training_and_report(tmp_path, capsys):
    """The command line on digits: bits by dynamic binarisation, and a report with in-painting."""
    from infovae_fast import cli

    options = ["--train_size=40", "--epochs=1", "--batch_size=20", "--latent_dim=2", "--progress=false"]
    decoder = json.dumps(SMALL)
    for name, likelihood in (("bits", "bernoulli"), ("levels", "categorical")):
        cli.main(["train", *options, f"--decoder={decoder}", f"--likelihood={likelihood}", f"--out={tmp_path / name}"])
    printed = capsys.readouterr().out
    assert printed.count("binarize: dynamic, as this decoder draws bits") == 1
    assert printed.count("encoder: with batch normalisation") == 2
    config = json.loads((tmp_path / "bits" / "config.json").read_text())
    assert config["binarize"] == "dynamic" and config["encoder"] == {"name": "mlp", "batch_norm": True}
    config = json.loads((tmp_path / "levels" / "config.json").read_text())
    assert config["likelihood"] == {"name": "categorical", "levels": load_data("digits").levels}
    assert config["binarize"] is None
    cli.main(["train", f"--resume={tmp_path / 'bits'}", "--epochs=2", "--progress=false"])
    cli.main(["sample", str(tmp_path / "bits"), "--n=4", "--mean=false", "--progress=true"])
    assert "8/8" in capsys.readouterr().err.replace("\r", "\n")
    cli.main(["report", json.dumps([str(tmp_path / "bits")]), f"--out={tmp_path / 'report'}"])
    pictures = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert {"inpainting-bits.png", "samples-bits.png", "reconstructions-bits.png"} <= pictures
    page = (tmp_path / "report" / "report.html").read_text()
    assert "In-painting" in page and "pixel by pixel" in page


def test_mmd_vae_uses_z_although_a_pixelcnn_can_do_without():
    """The paper's claim, on digits, after 100 steps: MMD-VAE tells more about the image in z than the ELBO does."""
    data = load_data("digits")
    x = to_unit(data.train_images, data.levels)
    found = {}
    for objective in ("mmd_vae", "elbo"):
        torch.manual_seed(0)
        encoder, decoder = {"name": "mlp", "batch_norm": True}, {"name": "pixelcnn", "layers": 3, "maps": 16}
        model = InfoVAE.from_config((1, 8, 8), 2, encoder=encoder, decoder=decoder, objective=objective)
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(100):
            optimizer.zero_grad()
            model.loss(x[torch.randint(len(x), (100,))].bernoulli()).loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            posterior = model.encode(x[:500].bernoulli())
            found[objective] = mutual_information(posterior, posterior.rsample())
    assert found["mmd_vae"] > 1 > 0.5 > found["elbo"], found


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition": "local"}, "condition: got 'local'; accepted: 'global', 'spatial'"),
        ({"variant": "2017"}, "variant: got '2017'; accepted: 'gated', 'infovae2017'"),
        ({"layers": 0}, "layers: got 0; accepted: an integer, 1 or more"),
        ({"maps": 2.5}, "maps: got 2.5; accepted: an integer"),
        ({"kernel": 4}, "kernel_size: got 4"),
        ({"first_kernel": 1}, "has no taps"),
        ({"image_channels": 3, "data_channels": 2}, "data_channels: got 2; accepted: 1, or image_channels = 3"),
        ({"image_channels": 3, "data_channels": 3, "maps": 8}, "accepted: multiples of data_channels = 3"),
        (
            {"variant": "infovae2017", "condition": "spatial"},
            "use grey images, the logistic mixture, or variant 'gated'",
        ),
        ({"shape": (8, 8)}, r"shape: got \(8, 8\); accepted: \(P, height, width\)"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        GatedPixelCNN(**{"inputs": 2, "shape": (6, 8, 8), "maps": 6} | options)


@pytest.mark.parametrize("options", [{}, {"variant": "infovae2017"}, {"checkpoint_layers": True}], ids=str)
def test_a_training_step_compiles_as_one_graph(options):
    model = InfoVAE.from_config((1, 6, 5), 2, decoder=SMALL | options, objective="mmd_vae")
    x, found = torch.rand(8, 1, 6, 5).round(), []
    torch.compiler.reset()
    step = torch.compile(lambda x: model.loss(x).loss, fullgraph=True, backend="aot_eager")
    for f in (step, lambda x: model.loss(x).loss):
        torch.manual_seed(1)
        loss = f(x)
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    torch.testing.assert_close(*found)


def test_many_images_without_a_gradient_compile_as_one_graph():
    model, z, x = GatedPixelCNN(2, (1, 6, 5), layers=2, maps=4), torch.randn(3, 2), torch.rand(3, 1, 6, 5).round()
    torch.compiler.reset()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(z, x), model(z, x))


def test_integers_of_numpy():
    one = np.int64(1)
    model = InfoVAE.from_config(
        (one, 8 * one, 8 * one), 2 * one, decoder={"name": "pixelcnn", "layers": one, "maps": 4}
    )
    assert model.config["shape"] == [1, 8, 8] and type(model.config["latent_dim"]) is int
    for bad in (True, 1.0, "1"):
        with pytest.raises(ValueError, match=f"layers: got {bad!r}; accepted: an integer, 1 or more"):
            GatedPixelCNN(2, (1, 4, 5), layers=bad)


@pytest.mark.parametrize("decoder", [GatedPixelCNN, PixelCNNPlusPlus])
def test_inputs_of_other_types(decoder):
    model, z, x = decoder(2, (1, 4, 5), maps=4).eval(), torch.randn(3, 2), torch.rand(3, 1, 4, 5)
    for bad, message in (
        ((z.long(), x), r"z: got dtype torch\.int64; accepted: a floating-point tensor"),
        ((z.tolist(), x), "z: got list; accepted: a floating-point tensor"),
        ((z.half(), x), r"z: got dtype torch\.float16, but the decoder is torch\.float32; convert one of them"),
        ((z, (255 * x).byte()), r"x: got dtype torch\.uint8; accepted: a floating-point tensor .of bytes, \.float"),
    ):
        with pytest.raises(TypeError, match=message):
            model(*bad)
    with pytest.raises(ValueError, match="z: got 0 codes for 3 images"):
        model(z[:0], x)
    with pytest.raises(ValueError, match="backend='gpu' is unknown; accepted: 'auto'"):
        decoder(2, (1, 4, 5), maps=4, backend="gpu")


@pytest.mark.parametrize("decoder", [{"name": "pixelcnn", "layers": 2, "maps": 4}, {"name": "pixelcnn_pp", "maps": 4}])
def test_images_in_float32_do_for_a_decoder_in_half_precision(decoder):
    model = InfoVAE.from_config((1, 4, 5), 2, decoder=decoder).eval()
    z, x = torch.randn(3, 2), torch.rand(3, 1, 4, 5).round()
    exact = model.decode(z, x)
    model.decoder.to(torch.bfloat16)
    torch.testing.assert_close(model.decode(z, x).float(), exact, rtol=0.1, atol=0.05)


def test_a_replica_whose_weights_are_no_parameters():
    model, z, x = GatedPixelCNN(2, (1, 4, 5), layers=2, maps=4), torch.randn(3, 2), torch.rand(3, 1, 4, 5)
    expected = model(z, x)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            setattr(module, name, parameter.detach())
    assert torch.equal(model(z, x), expected)


def test_inputs_that_do_not_fit():
    model = GatedPixelCNN(2, (1, 4, 5), layers=2, maps=4)
    z, x = torch.randn(3, 2), torch.rand(3, 1, 4, 5)
    for wrong in (x[0], x.mT, x.expand(3, 2, 4, 5)):
        with pytest.raises(ValueError, match=r"x: got shape .*; accepted: \[N, C, H, W\] = \[N, 1, 4, 5\]"):
            model(z, wrong)
    for wrong in (None, z[:, :1], z[:, :, None]):
        with pytest.raises(ValueError, match=r"z: got .*; accepted: \[N, 2\]"):
            model(wrong, x)
    with pytest.raises(ValueError, match=r"z: got 2 codes for 3 images; accepted: S for every image, \[S N, D\]"):
        model(z[:2], x)
    with pytest.raises(ValueError, match=r"z: got \(3, 2\); accepted: None, as this decoder has inputs=0"):
        GatedPixelCNN(0, (1, 4, 5), layers=2, maps=4)(z, x)
    vae = InfoVAE.from_config((1, 4, 5), 2, decoder=SMALL)
    with pytest.raises(ValueError, match=r"decode: got no x; .* use PixelSampler\(model\)\.sample\(z\)"):
        vae.decode(z)
    with pytest.raises(ValueError, match="proposal: got 'q'; accepted: 'posterior', 'prior'"):
        vae.log_likelihood(x, proposal="q")
    with pytest.raises(ValueError, match=r"decoder 'pixelcnn': unknown options \['depth'\]; accepted: \['layers'"):
        InfoVAE.from_config((1, 4, 5), 2, decoder={"name": "pixelcnn", "depth": 3})
