"""PixelCNN++: the authors' network, causal to the bit, no blind spot, probabilities that sum to 1; its start from data;
in an InfoVAE."""

import itertools
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from infovae_fast import (
    Bernoulli,
    Categorical,
    DiscretizedLogisticMixture,
    Gaussian,
    InfoVAE,
    PixelCNNPlusPlus,
    PixelSampler,
)
from infovae_fast.models.pixelcnn_pp import PIXELCNN_PP, _Conv
from tests.test_pixelcnn import images

MIXTURE = DiscretizedLogisticMixture(mixtures=2, levels=3)
MODELS = {  # (likelihood, image channels, options)
    "bits": (Bernoulli(), 1, {}),
    "spatial": (Bernoulli(), 1, {"condition": "spatial", "spatial_maps": 2}),
    "levels": (Categorical(3), 1, {}),
    "learned std": (Gaussian(), 1, {}),
    "grey mixture": (MIXTURE, 1, {}),
    "mixture": (MIXTURE, 3, {"condition": "spatial", "spatial_maps": 2}),
}
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def seeded_on_one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(name, height, width, inputs=2, dtype=torch.float64, **options):
    """A decoder in eval mode with random weights, gains and biases, its likelihood, and the channels of its image."""
    likelihood, channels, own = MODELS[name]
    options = {"blocks": 1, "maps": 3} | own | options
    model = PixelCNNPlusPlus(inputs, (likelihood.channels(channels), height, width), channels, **options).to(dtype)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return model.eval(), likelihood, channels


def convolutions(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, _Conv)}


# The authors' network


class Authors:
    """github.com/openai/pixel-cnn: pixel_cnn_pp/nn.py and model.py, NCHW, with the weights of a `PixelCNNPlusPlus`."""

    def __init__(self, model):
        self.model = model

    def conv(self, layer, x, left, right, top, stride=1):
        v, g = layer.direction, layer.gain
        w = g[:, None, None, None] * v / v.square().sum((1, 2, 3), keepdim=True).sqrt()
        height, width = x.shape[2:]
        x = F.pad(x, (left, right, top, 0))
        kh, kw = w.shape[2:]
        out = 0
        for ky, kx in itertools.product(range(kh), range(kw)):  # SAME by hand: after the padding, VALID
            tap = x[:, :, ky : ky + height : stride, kx : kx + width : stride]
            out = out + torch.einsum("ncyx,oc->noyx", tap, w[:, :, ky, kx])
        return out + layer.bias[:, None, None]

    def deconv(self, layer, x):
        v, g = layer.direction, layer.gain
        w = g[:, None, None, None] * v / v.square().sum((1, 2, 3), keepdim=True).sqrt()
        n, _, h, w_in = x.shape
        kh, kw = w.shape[2:]
        out = x.new_zeros(n, len(w), 2 * h + kh - 1, 2 * w_in + kw - 1)
        for ky, kx in itertools.product(range(kh), range(kw)):
            out[:, :, ky : ky + 2 * h : 2, kx : kx + 2 * w_in : 2] += torch.einsum("ncyx,oc->noyx", x, w[:, :, ky, kx])
        out = out + layer.bias[:, None, None]
        side = (kw - 1) // 2
        return out[:, :, : 2 * h, side : side + 2 * w_in]

    def down_shifted(self, layer, x, stride=1):
        side = (layer.direction.shape[3] - 1) // 2
        return self.conv(layer, x, side, side, layer.direction.shape[2] - 1, stride)

    def down_right_shifted(self, layer, x, stride=1):
        return self.conv(layer, x, layer.direction.shape[3] - 1, 0, layer.direction.shape[2] - 1, stride)

    def gated_resnet(self, block, conv, x, h, a=None):
        def concat_elu(t):
            return F.elu(torch.cat([t, -t], 1))

        c1 = conv(block.first, concat_elu(x))
        if a is not None:
            c1 = c1 + self.down_right_shifted(block.aside, concat_elu(a))
        c2 = conv(block.second, concat_elu(c1))
        c2 = c2 + (h @ block.condition.weight[:, :, 0, 0].T)[:, :, None, None]
        a, b = c2.chunk(2, 1)
        return x + a * torch.sigmoid(b)

    def __call__(self, h, x):
        model, down, right = self.model, self.down_shifted, self.down_right_shifted
        x = 2 * x - 1
        x_pad = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        u_list = [F.pad(down(model.above, x_pad)[:, :, :-1], (0, 0, 1, 0))]
        ul_list = [
            F.pad(down(model.row_above, x_pad)[:, :, :-1], (0, 0, 1, 0))
            + F.pad(right(model.left, x_pad)[..., :-1], (1, 0))
        ]
        layers = iter(model.up)
        for resolution in range(3):
            for _ in range(model.blocks):
                layer = next(layers)
                u_list.append(self.gated_resnet(layer.u, down, u_list[-1], h))
                ul_list.append(self.gated_resnet(layer.ul, right, ul_list[-1], h, u_list[-1]))
            if resolution < 2:
                layer = next(layers)
                u_list.append(down(layer.u, u_list[-1], 2))
                ul_list.append(right(layer.ul, ul_list[-1], 2))
        layers = iter(model.down)
        u, ul = u_list.pop(), ul_list.pop()
        for resolution in range(3):
            for _ in range(model.blocks + (resolution > 0)):
                layer = next(layers)
                u = self.gated_resnet(layer.u, down, u, h, u_list.pop())
                ul = self.gated_resnet(layer.ul, right, ul, h, torch.cat([u, ul_list.pop()], 1))
            if resolution < 2:
                layer = next(layers)
                u, ul = self.deconv(layer.u, u), self.deconv(layer.ul, ul)
        assert not u_list and not ul_list and next(layers, None) is None
        return self.down_right_shifted(model.head[1], F.elu(ul))


@pytest.mark.parametrize(("height", "width", "blocks"), [(8, 12, 2), (4, 4, 1)])
def test_it_is_the_authors_network(height, width, blocks):
    """Where the first biases are 0; elsewhere theirs are missing in the first row and column."""
    model, _, _ = network("mixture", height, width, blocks=blocks, condition="global")
    for first in (model.above, model.row_above, model.left):
        nn.init.zeros_(first.bias)
    z, x = torch.randn(2, 2, dtype=torch.float64), torch.rand(2, 3, height, width, dtype=torch.float64)
    torch.testing.assert_close(model(z, x), Authors(model)(z, x), rtol=1e-11, atol=1e-11)


def test_the_preset_has_the_papers_size():
    """53.6 million parameters without classes; images of CIFAR-10, 10 logistics."""
    options = {key: value for key, value in PIXELCNN_PP.items() if key != "name"}
    with torch.device("meta"):
        model = PixelCNNPlusPlus(0, (100, 32, 32), 3, **options)
    f, b = 160, 5
    blocks = {"up": 3 * b, "down": 3 * b + 2}
    u = 6 * (2 * f * f + 2 * f * 2 * f)  # both convolutions of a block, of 6 taps
    ul = 4 * (2 * f * f + 2 * f * 2 * f)
    aside = {"up": 2 * f * f, "down": 2 * f * f + 4 * f * f}
    weights = sum(n * (u + ul + aside[way]) for way, n in blocks.items()) + 4 * (6 + 4) * f * f
    weights += (6 + 3 + 2) * 4 * f + f * 100
    maps = sum(n * (2 * 3 * f + (f if way == "up" else 2 * f)) for way, n in blocks.items()) + (8 + 3) * f + 100
    assert sum(p.numel() for p in model.parameters()) == weights + 2 * maps == 53_659_080


# Causality


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("height", "width"), [(5, 6), (8, 4)])
def test_the_future_cannot_be_seen(name, dtype, height, width):
    """Params keep every bit, whatever their own and later pixels are; any size, multiples of 4 or not."""
    model, _, channels = network(name, height, width, dtype=dtype)
    z, x = torch.randn(2, 2, dtype=dtype), torch.rand(2, channels, height, width, dtype=dtype)
    with torch.no_grad():
        clean = model(z, x).flatten(2)
        for poison in (math.nan, math.inf, -math.inf, 1000.0):
            for p in (0, width - 1, 2 * width + 3, (height - 1) * width, height * width - 1):
                poisoned = x.flatten(2).clone()
                poisoned[:, :, p:] = poison
                params = model(z, poisoned.view_as(x)).flatten(2)
                assert torch.equal(params[:, :, : p + 1], clean[:, :, : p + 1])


@pytest.mark.parametrize(
    ("height", "width", "options"),
    [(9, 14, {}), (8, 12, {}), (1, 9, {}), (9, 1, {}), (7, 10, {"inputs": 0}), (5, 13, {"blocks": 2})],
)
def test_all_of_the_past_is_seen_as_far_as_predicted(height, width, options):
    """The Jacobian: nothing leaks, and nothing earlier is missing up to 4 B + 2 rows and columns away."""
    model, _, _ = network("bits", height, width, **{"maps": 8} | options)
    x = torch.rand(1, 1, height, width, dtype=torch.float64)
    z = torch.randn(1, 2, dtype=torch.float64) if model.inputs else None
    seen = torch.autograd.functional.jacobian(lambda x: model(z, x)[0, 0], x)[:, :, 0, 0] != 0  # [H, W, H, W]
    reach = 4 * model.blocks + 2
    for i, j in [(0, 0), (0, width - 1), (height // 2, width // 2), (height - 1, 0), (height - 1, width - 1)]:
        offsets = {(y - i, x - j) for y, x in seen[i, j].nonzero().tolist()}
        past = {(y - i, x - j) for y in range(height) for x in range(width) if (y, x) < (i, j)}
        box = {(dy, dx) for dy, dx in past if max(-dy, abs(dx)) <= reach}
        assert box <= offsets <= past
        assert offsets == model.receptive_field_of(i, j)


def test_how_far_it_sees():
    """The paper's network on images of its width: all of the past but the row's far end, 23 or more away."""
    model = PixelCNNPlusPlus(0, (1, 4, 32), blocks=5, maps=1)
    state = torch.random.get_rng_state()
    field = model.receptive_field_of(3, 31)
    assert torch.equal(torch.random.get_rng_state(), state)
    past = {(y - 3, x - 31) for y in range(4) for x in range(32)} - {(0, 0)}
    assert past - field == {(0, dx) for dx in range(-31, -22)}


# Probability


@pytest.mark.parametrize(
    ("name", "height", "width", "levels"),
    [
        *[("bits", *size, 2) for size in ((3, 3), (2, 5), (5, 2), (1, 9), (9, 1), (1, 1), (3, 4))],
        *[("spatial", *size, 2) for size in ((3, 3), (2, 4))],
        *[("levels", *size, 3) for size in ((2, 2), (1, 5))],
        *[("grey mixture", *size, 3) for size in ((2, 3), (5, 1))],
        *[("mixture", *size, 3) for size in ((1, 2), (2, 1))],
    ],
)
def test_the_probabilities_of_all_images_sum_to_one(name, height, width, levels):
    model, likelihood, channels = network(name, height, width)
    x = images(channels, height, width, levels)
    with torch.no_grad():
        for z in torch.randn(2, 1, 2, dtype=torch.float64):
            log_p = -likelihood.nll(model(z.expand(len(x), -1), x), x)
            assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
            assert log_p.exp().std() > 1e-5  # not all the same


def test_without_z():
    for condition in ("global", "spatial"):
        model, likelihood, _ = network("bits", 3, 3, inputs=0, condition=condition)
        x = images(1, 3, 3, 2)
        assert (-likelihood.nll(model(None, x), x)).exp().sum().item() == pytest.approx(1, abs=1e-9)
        assert torch.equal(model(torch.empty(len(x), 0, dtype=torch.float64), x), model(None, x))


@each_model
def test_gradients(name):
    model, likelihood, channels = network(name, 3, 5, maps=2)
    z = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    x = torch.rand(2, channels, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(model, (z, x), fast_mode=True)
    nll = likelihood.nll(model(z, x), x.detach().round()).sum()
    grads = torch.autograd.grad(nll, list(model.parameters()))
    assert all(bool((g != 0).any()) for g in grads)


def test_checkpoints_change_memory_alone():
    """With dropout, too: the same numbers are dropped again."""
    model, _, channels = network("mixture", 8, 8, blocks=2)
    model.train().initialised = True
    z, x = torch.randn(3, 2, dtype=torch.float64), torch.rand(3, channels, 8, 8, dtype=torch.float64)
    found, kept = [], []
    for model.checkpoint_layers in (False, True):
        torch.manual_seed(1)
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
    assert kept[1] < 0.5 * kept[0]


@each_model
def test_several_codes_of_an_image(name):
    """z [S N, D] for x [N, C, H, W] is z with the images repeated."""
    model, likelihood, channels = network(name, 4, 3)
    z, x = torch.randn(6, 2, dtype=torch.float64), torch.rand(2, channels, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(model(z, x), model(z, x.repeat(3, 1, 1, 1)), rtol=1e-13, atol=1e-13)
    assert not torch.allclose(model(z, x)[:2], model(z, x)[2:4])
    for training in (False, True):
        assert model.train(training)(z[:0], x[:0]).shape == (0, likelihood.channels(channels), 4, 3)


def test_forward_mode_to_the_weights():
    model, _, channels = network("bits", 3, 4, inputs=0)
    x = torch.rand(2, channels, 3, 4, dtype=torch.float64)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    way = {name: torch.randn_like(p) for name, p in weights.items()}

    def params(weights):
        return torch.func.functional_call(model, weights, (None, x))

    _, slope = torch.func.jvp(params, (weights,), (way,))
    moved = [params({n: p + h * way[n] for n, p in weights.items()}) for h in (1e-5, -1e-5)]
    torch.testing.assert_close(slope, (moved[0] - moved[1]) / 2e-5, rtol=1e-5, atol=1e-6)


# The start from data


def recorded(model, z, x):
    """The output of each convolution by name, with its bias, and of the model."""
    found = {}

    def note(name, conv, inputs, out):
        found[name] = out + conv.bias[:, None, None] if conv.bare else out

    hooks = [conv.register_forward_hook(partial(note, name)) for name, conv in convolutions(model).items()]
    params = model(z, x)
    for hook in hooks:
        hook.remove()
    return found, params


@each_model
def test_the_start_normalises_every_map(name):
    likelihood, channels, options = MODELS[name]
    model = PixelCNNPlusPlus(2, (likelihood.channels(channels), 10, 9), channels, blocks=2, maps=4, **options).double()
    z, x = torch.randn(20, 2, dtype=torch.float64), torch.rand(20, channels, 10, 9, dtype=torch.float64)
    params = model.eval().initialise(z, x)
    assert model.initialised and not params.requires_grad
    outputs, again = recorded(model, z, x)
    assert torch.equal(params, again)  # what it returned is what it will compute
    assert len(outputs) == 4 + 4 * 2 + (6 + 8) * 4 + 6 + 8 * 2
    for part, out in outputs.items():
        deviation = 0.1 if part.endswith("second") else 1.0
        std, mean = torch.std_mean(out, (0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-10)
        torch.testing.assert_close(std, torch.full_like(std, deviation), rtol=1e-9, atol=0)
    gains = {part: conv.gain.clone() for part, conv in convolutions(model).items()}
    model.initialise(z, x)  # nothing is left to do
    assert all(torch.allclose(conv.gain, gains[part]) for part, conv in convolutions(model).items())


def test_the_norm_of_a_weight_is_its_gain():
    """A norm for each map that comes out, of transposed convolutions too."""
    model, _, _ = network("bits", 5, 5)
    for conv in convolutions(model).values():
        torch.testing.assert_close(conv.weight.square().sum((1, 2, 3)).sqrt(), conv.gain.abs())
        assert conv.direction.shape[0] == len(conv.bias) == len(conv.gain)


@pytest.mark.parametrize(("n", "height", "width"), [(1, 4, 4), (1, 1, 1), (3, 1, 1)])
def test_a_start_without_variation(n, height, width):
    """Maps that are constant on blank images, as at a last resolution of one pixel, are not divided by 0."""
    model = PixelCNNPlusPlus(2, (1, height, width), blocks=1, maps=4).eval()
    params = model.initialise(torch.randn(n, 2), torch.zeros(n, 1, height, width))
    assert params.isfinite().all()
    assert model(torch.randn(50, 2), torch.rand(50, 1, height, width)).abs().max() < 100


def test_the_first_training_batch_starts_the_model():
    def fresh():
        torch.manual_seed(3)
        return PixelCNNPlusPlus(2, (1, 6, 6), blocks=1, maps=4, dropout=0.0)

    model, other = fresh(), fresh()
    z, x = torch.randn(8, 2, requires_grad=True), torch.rand(8, 1, 6, 6)
    with torch.no_grad():
        model(z, x)  # sampling or evaluation in train mode
    model.eval()(z, x)
    model.train()(z[:0], x[:0])
    assert not model.initialised
    expected = other.initialise(z, x)
    params = model(z, x)
    assert model.initialised and params.requires_grad and torch.equal(params, expected)
    assert torch.equal(model(z, x + 1), other(z, x + 1))  # once only
    loaded = PixelCNNPlusPlus(2, (1, 6, 6), blocks=1, maps=4, dropout=0.0)
    loaded.load_state_dict(model.state_dict())
    assert loaded.initialised and torch.equal(loaded(z, x), params)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_start_from_nan_is_refused(bad):
    model = PixelCNNPlusPlus(2, (1, 4, 4), blocks=1, maps=2)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x, z = torch.rand(2, 1, 4, 4), torch.randn(2, 2)
    for wrong in ((z, torch.full_like(x, bad)), (torch.full_like(z, bad), x)):
        with pytest.raises(ValueError, match="initialise: got 2 images; accepted: 1 or more, x and z without NaN"):
            model(*wrong)
    with pytest.raises(ValueError, match="initialise: got 0 images"):
        model.initialise(z[:0], x[:0])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_weights_from_outside_are_not_initialised():
    torch.manual_seed(0)
    model, trained = (PixelCNNPlusPlus(2, (1, 4, 5), blocks=1, maps=4, dropout=0.0) for _ in range(2))
    z, x = torch.randn(3, 2), torch.rand(3, 1, 4, 5)
    new = {name: p.detach().clone() for name, p in model.named_parameters()}
    call = torch.func.functional_call
    for first_pass in (
        lambda: call(model, new, (z, x)),
        lambda: torch.func.grad(lambda given: call(model, given, (z, x)).sum())(new),
        lambda: torch.compile(model, fullgraph=True, backend="eager")(z, x),
    ):
        with pytest.raises(Exception, match=r"call initialise\(z, x\) before"):
            first_pass()
        assert not model.initialised and all(torch.equal(p, new[name]) for name, p in model.named_parameters())
    trained.initialise(z, x)
    given = {name: p.detach() for name, p in trained.named_parameters()}
    torch.testing.assert_close(call(model, given, (z, x)), trained(z, x))
    assert not model.initialised


# InfoVAE with PixelCNN++

SMALL = {"name": "pixelcnn_pp", "blocks": 1, "maps": 4}


@each_model
def test_all_strategies_draw_the_same_images(name):
    inputs = 0 if name == "bits" else 2
    model, likelihood, channels = network(name, 3, 5, inputs=inputs)
    sampler = PixelSampler(model, likelihood)
    z = torch.randn(6, 2, dtype=torch.float64) if inputs else None
    known = torch.rand(1, channels, 3, 5).round()
    upper = torch.arange(3).view(3, 1) < 2
    for options in ({}, {"known": known, "known_mask": upper, "temperature": 0.7}):
        naive, *others = (
            sampler.sample(z, 6, seed=4, strategy=s, **options) for s in ("naive", "fixed_point", "cached", "auto")
        )
        rounding = 1e-9 if name == "learned std" else 0.0  # F^-1 of a row and of a pixel
        for drawn in others:
            torch.testing.assert_close(drawn, naive, rtol=rounding, atol=rounding)
        assert torch.equal(*others[1:])
    assert naive.flatten(1).unique(dim=0).shape[0] > 1


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (2, 2), (9, 10), (4, 13)], ids=str)
@pytest.mark.parametrize("name", ["bits", "spatial", "mixture"])
def test_a_pixel_at_a_time_gives_the_params_of_the_whole_image(name, size):
    for options in ({"inputs": 0}, {"blocks": 2}):
        model, likelihood, channels = network(name, *size, **options)
        z = torch.randn(3, 2, dtype=torch.float64) if model.inputs else None
        x = torch.rand(3, channels, *size, dtype=torch.float64)
        sampler, truth = PixelSampler(model, likelihood), model(z, x)
        scale = truth.abs().max().item()
        torch.testing.assert_close(sampler.params(z, x), truth, rtol=1e-12, atol=1e-12 * scale)
        model.float()
        found = sampler.params(None if z is None else z.float(), x.float()).double()
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5 * scale)


def test_a_copy_that_was_given_trained_weights_keeps_them():
    torch.manual_seed(0)
    model = PixelCNNPlusPlus(2, (1, 6, 6), blocks=1, maps=4)
    average = torch.optim.swa_utils.AveragedModel(model)
    model(torch.randn(8, 2), torch.rand(8, 1, 6, 6)).sum().backward()
    average.update_parameters(model)
    loaded = PixelCNNPlusPlus(2, (1, 6, 6), blocks=1, maps=4)
    loaded.load_state_dict(average.module.state_dict())
    before = {name: t.clone() for name, t in loaded.named_parameters()}
    loaded.train()(torch.randn(8, 2), torch.rand(8, 1, 6, 6) + 1)
    assert all(torch.equal(t, before[name]) for name, t in loaded.named_parameters())


def test_samples_are_drawn_in_eval_mode_and_there_may_be_none():
    model, likelihood, _ = network("bits", 3, 5, inputs=0)
    assert PixelSampler(model, likelihood).sample(n=0, strategy="cached", seed=0).shape == (0, 1, 3, 5)
    x = torch.rand(2, 1, 3, 5, dtype=torch.float64)
    drawn = PixelSampler(model, likelihood).sample(n=8, seed=0), PixelSampler(model, likelihood).params(None, x)
    training = PixelSampler(model.train(), likelihood)
    assert all(
        torch.equal(training.sample(n=8, strategy=name, seed=0), drawn[0]) for name in ("auto", "naive", "fixed_point")
    )
    assert torch.equal(training.params(None, x), drawn[1]) and model.training
    with pytest.raises(ValueError, match=r"z: got \(3, 2\); accepted: None, as this decoder has inputs=0"):
        PixelSampler(model.eval(), likelihood).sample(torch.randn(3, 2), seed=0)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 1, 3, 4\); accepted: \[N, C, H, W\]"):
        PixelSampler(model.eval(), likelihood).params(None, torch.rand(2, 1, 3, 4))
    with pytest.raises(RuntimeError, match="no kernels for PixelCNNPlusPlus in this version"):
        PixelSampler(model.eval(), likelihood, backend="cpp").sample(n=2, strategy="cached", seed=0)


@pytest.mark.parametrize(
    ("channels", "likelihood"),
    [
        (1, "bernoulli"),
        (1, "gaussian"),
        (1, {"name": "categorical", "levels": 4}),
        *[(c, MIXTURE.to_config()) for c in (1, 3)],
    ],
)
@pytest.mark.parametrize("options", [{}, {"condition": "spatial", "checkpoint_layers": True}], ids=str)
def test_every_method_has_the_shape_it_states(tmp_path, channels, likelihood, options):
    model = InfoVAE.from_config((channels, 4, 5), 3, decoder=SMALL | options, likelihood=likelihood)
    x = torch.rand(6, channels, 4, 5).round()
    assert model(x).params.shape == (6, model.likelihood.channels(channels), 4, 5)
    terms = model.loss(x)
    terms.loss.backward()
    assert terms.loss.isfinite() and all(p.grad is not None for p in model.parameters())
    assert model.decoder.initialised
    model.eval()
    assert model.reconstruct(x).shape == x.shape and torch.equal(model.reconstruct(x), model.reconstruct(x))
    assert model.sample(4).shape == model.sample(4, mean=False).shape == (4, channels, 4, 5)
    assert model.interpolate(x[:2], x[2:4], steps=3).shape == (2, 3, channels, 4, 5)
    for proposal in ("posterior", "prior"):
        assert model.log_likelihood(x, 7, chunk=3, proposal=proposal).log_likelihood.shape == (6,)
    model.save_pretrained(tmp_path)
    loaded = InfoVAE.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["decoder"] == SMALL | options
    assert loaded.decoder.initialised and torch.equal(loaded.reconstruct(x), model.reconstruct(x))


def test_training_learns():
    """A few steps from the start lower the loss on stripes, whose period they cannot miss."""
    model = PixelCNNPlusPlus(0, (1, 8, 8), blocks=1, maps=8, dropout=0.1)
    x = ((torch.arange(8) + torch.randint(2, (32, 1, 8, 1))) % 2).float().expand(32, 1, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = Bernoulli().nll(model(None, x), x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 90  # 64 log 2 = 44 nats and what logits of deviation 1 cost
    assert losses[-1] < 0.5 * 64 * math.log(2)


def test_the_command_line(tmp_path, capsys):
    """Bits by dynamic binarisation, resumed bit for bit; colours by the mixture; a report."""
    from safetensors.torch import load_file

    from infovae_fast import cli

    options = ["--train_size=40", "--batch_size=20", "--latent_dim=2", "--progress=false"]
    decoder = f"--decoder={json.dumps(SMALL)}"
    for name, epochs in (("bits", 1), ("whole", 2)):
        cli.main(["train", *options, decoder, f"--epochs={epochs}", f"--out={tmp_path / name}"])
    assert capsys.readouterr().out.count("binarize: dynamic, as this decoder draws bits") == 2
    cli.main(["train", f"--resume={tmp_path / 'bits'}", "--epochs=2", "--progress=false"])
    resumed, whole = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("bits", "whole"))
    assert all(torch.equal(t, whole[name]) for name, t in resumed.items()) and resumed["decoder._extra_state"]
    colours = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "colours.npy", colours)
    options = [f"--data={tmp_path / 'colours.npy'}", "--epochs=1", *options]
    cli.main(["train", *options, decoder, "--likelihood=discretized_logistic_mixture", f"--out={tmp_path / 'colours'}"])
    cli.main(["sample", str(tmp_path / "colours"), "--n=4", "--mean=false"])
    cli.main(["report", json.dumps([str(tmp_path / "bits")]), f"--out={tmp_path / 'report'}", "--n_samples=3"])
    assert (tmp_path / "report" / "inpainting-bits.png").exists()


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition": "local"}, "condition: got 'local'; accepted: 'global', 'spatial'"),
        ({"blocks": 0}, "blocks: got 0; accepted: an integer, 1 or more"),
        ({"maps": 2.5}, "maps: got 2.5; accepted: an integer"),
        ({"dropout": 1.0}, "dropout: got 1.0; accepted: a probability, at least 0 and below 1"),
        ({"shape": (8, 8)}, r"shape: got \(8, 8\); accepted: \(P, height, width\)"),
        ({"image_channels": 3, "data_channels": 3}, "data_channels: got 3; accepted: 1, .* or the decoder 'pixelcnn'"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        PixelCNNPlusPlus(**{"inputs": 2, "shape": (6, 8, 8), "maps": 6} | options)


def test_inputs_that_do_not_fit():
    model = PixelCNNPlusPlus(2, (1, 4, 5), blocks=1, maps=4).eval()
    z, x = torch.randn(3, 2), torch.rand(3, 1, 4, 5)
    for call in (model, model.initialise):
        for wrong in (x[0], x.mT, x.expand(3, 2, 4, 5)):
            with pytest.raises(ValueError, match=r"x: got shape .*; accepted: \[N, C, H, W\] = \[N, 1, 4, 5\]"):
                call(z, wrong)
        for wrong in (None, z[:, :1], z[:, :, None]):
            with pytest.raises(ValueError, match=r"z: got .*; accepted: \[N, 2\]"):
                call(wrong, x)
        with pytest.raises(ValueError, match=r"z: got 2 codes for 3 images; accepted: S for every image, \[S N, D\]"):
            call(z[:2], x)
    with pytest.raises(ValueError, match=r"z: got \(3, 2\); accepted: None, as this decoder has inputs=0"):
        PixelCNNPlusPlus(0, (1, 4, 5), blocks=1, maps=4)(z, x)
    with pytest.raises(ValueError, match=r"data_channels: got 3; .*use the likelihood 'discretized_logistic_mixture'"):
        InfoVAE.from_config((3, 4, 5), 2, decoder=SMALL)
    with pytest.raises(ValueError, match=r"decoder 'pixelcnn_pp': unknown options \['layers'\]; accepted: \['blocks'"):
        InfoVAE.from_config((1, 4, 5), 2, decoder=SMALL | {"layers": 3})


def test_ranks_do_not_start_from_images_of_their_own(monkeypatch):
    """Where several processes train, each would set its weights; a single one may."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for ranks in (1, 2):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda ranks=ranks: ranks)
        model, x = PixelCNNPlusPlus(0, (1, 4, 4), blocks=1, maps=4), torch.rand(2, 1, 4, 4)
        if ranks > 1:
            with pytest.raises(RuntimeError, match=r"several processes do not allow: call initialise\(z, x\) before"):
                model(None, x)
            model.initialise(None, x)
        model(None, x)
