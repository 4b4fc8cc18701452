"""The sampler: three ways to the same image, the distribution of the enumerated table, noise that is counted."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from infovae_fast import (
    Bernoulli,
    Categorical,
    DiscretizedLogisticMixture,
    GatedPixelCNN,
    Gaussian,
    InfoVAE,
    PixelSampler,
)
from infovae_fast.models.incremental import Incremental
from infovae_fast.models.pixel_sampler import BACKENDS, pixel_uniforms
from infovae_fast.models.pixelcnn_pp import PixelCNNPlusPlus
from tests import oracle
from tests.test_likelihoods import chi_square
from tests.test_pixelcnn import MODELS, Own, each_model, images, network

SIZES = [(1, 1), (1, 6), (5, 1), (4, 3), (3, 7)]
CPP = next(row for row in BACKENDS if row.name == "cpp")
NATIVE = [name for name in MODELS if name != "infovae2017"]


@pytest.fixture(autouse=True)
def seeded_on_one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[row.name for row in BACKENDS])
def backend(request):
    """Each that can run here; the decoder, codes and images are where its are, `oracle.device`."""
    return request.param


def sampler(name, height, width, backend="auto", **options):
    model, likelihood, _ = network(name, height, width, **options)
    model.to(oracle.device)
    row = next((row for row in BACKENDS if row.name == backend), None)
    if row is not None and (reason := row.reason(next(model.parameters()), model, likelihood)) is not None:
        pytest.skip(reason)
    return PixelSampler(model, likelihood, backend=backend)


def codes(n):
    return torch.randn(n, 2, dtype=torch.float64).to(oracle.device)


# Strategies


@pytest.mark.parametrize("options", [{}, {"layers": 1}, {"layers": 2, "first_kernel": 3, "kernel": 5}], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@each_model
def test_a_pixel_at_a_time_gives_the_params_of_the_whole_image(name, size, options, backend):
    sample = sampler(name, *size, backend, **options)
    z, x = codes(3), torch.rand(3, *sample.image_shape, dtype=torch.float64).to(oracle.device)
    torch.testing.assert_close(sample.params(z, x), sample.decoder(z, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["grey", "infovae2017"])
def test_a_pixel_at_a_time_without_z_and_in_single_precision(name, backend):
    sample = sampler(name, 4, 5, backend, inputs=0)
    x = torch.rand(3, 1, 4, 5, dtype=torch.float64).to(oracle.device)
    torch.testing.assert_close(sample.params(None, x), sample.decoder(None, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(sample.sample(n=4, seed=0), sample.sample(n=4, strategy="naive", seed=0))
    truth = sample.decoder(None, x)
    sample.decoder.float()
    torch.testing.assert_close(sample.params(None, x.float()).double(), truth, rtol=1e-5, atol=1e-5)
    for dtype in (torch.float32, torch.bfloat16):
        sample.decoder.to(dtype)
        for strategy in ("naive", "cached", "fixed_point"):
            drawn = sample.sample(n=2, strategy=strategy, seed=0)
            assert drawn.dtype == dtype and bool(((drawn == 0) | (drawn == 1)).all())


@each_model
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_strategies_draw_the_same_images(name, size, backend):
    sample = sampler(name, *size, backend)
    z = codes(5)
    for temperature in (1.0, 0.5):
        wanted = sample.sample(z, seed=3, strategy="naive", temperature=temperature)
        assert wanted.shape == (5, *sample.image_shape)
        for strategy in ("auto", "fixed_point", "cached"):
            again = sample.sample(z, seed=3, strategy=strategy, temperature=temperature)
            torch.testing.assert_close(again, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strategy", ["naive", "cached", "fixed_point"])
def test_autocast_changes_no_sample(strategy, monkeypatch):
    monkeypatch.setattr("infovae_fast.masked_conv.AUTOCAST", (oracle.device,))
    sample = sampler("grey", 6, 7, "auto")
    sample.decoder.float()
    z = codes(3).float()
    wanted, params = (
        sample.sample(z, strategy=strategy, seed=0),
        sample.params(z, torch.zeros(3, *sample.image_shape).to(z)),
    )
    with torch.autocast(oracle.device, torch.bfloat16):
        assert torch.equal(sample.sample(z, strategy=strategy, seed=0), wanted)
        assert torch.equal(sample.params(z, torch.zeros(3, *sample.image_shape).to(z)), params)


@pytest.mark.parametrize("unit", ["avx512", "avx2", "baseline"])
def test_every_vector_unit_gives_the_params_of_the_whole_image(unit):
    """In a process of its own, held to the unit; a machine without it runs the best it has below that."""
    code = """import torch
from tests.test_pixel_sampler import NATIVE, codes, sampler
for name in NATIVE:
    sample = sampler(name, 4, 5, "cpp")
    z, x = codes(7), torch.rand(7, *sample.image_shape, dtype=torch.float64)
    torch.testing.assert_close(sample.params(z, x), sample.decoder(z, x), rtol=1e-12, atol=1e-12)"""
    if (reason := CPP.reason(torch.zeros(()))) is not None:
        pytest.skip(reason)
    environment = os.environ | {"INFOVAE_FAST_VECTOR_UNIT": unit, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_native_operators_refuse_what_does_not_fit():
    if (reason := CPP.reason(torch.zeros(()))) is not None:
        pytest.skip(reason)
    model, _, _ = network("grey", 4, 5)
    ops, good = torch.ops.infovae_fast, Incremental(model, codes(2), 2, native=True)
    table = [t for w in good.weights.layers for t in (w.vertical, w.vertical_bias, w.link, w.horizontal_bias)]
    conditions = [c for pair in good.conditions for c in pair]
    for rings, reaches, i in (
        (good.rings, good.reaches, -1),
        (good.rings, [-1] * len(good.reaches), 0),
        ([ring[..., :1].contiguous() for ring in good.rings], good.reaches, 0),
    ):
        with pytest.raises(ValueError, match="vertical_row"):
            ops.vertical_row(table, conditions, rings, good.bases, reaches, i)
    bases, state, *lists, memory, reaches, channels = good._native
    for changed in (([-1] * len(reaches), channels), (reaches, 0), ([2**60] * len(reaches), channels)):
        with pytest.raises(ValueError, match="pixel_row"):
            ops.pixel_params(bases, state, *lists, memory, *changed, 0, 0)
    with pytest.raises(ValueError, match="no column 5"):
        ops.pixel_params(*good._native, 5, 0)


def test_images_do_not_depend_on_the_number_of_threads(backend):
    sample = sampler("grey", 4, 5, backend, maps=24)
    z, found = codes(7), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append((sample.sample(z, seed=0), sample.params(z, found[0][0] if found else sample.sample(z, seed=0))))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_an_image_is_drawn_by_its_definition():
    """Bit by bit: x = [u < p(x = 1 | the bits before)], from the table of all images."""
    model, likelihood, _ = network("grey", 2, 3)
    z, x = codes(1), images(1, 2, 3, 2)
    table = -likelihood.nll(model(z.expand(64, -1), x), x)
    table, bits = table.exp(), x.flatten(1)
    u = torch.rand(20, 1, 2, 3, dtype=torch.float64)
    drawn = PixelSampler(model, likelihood).sample(z, 20, uniforms=u)
    for image, uniforms in zip(drawn.flatten(1), u.flatten(1), strict=True):
        possible = torch.ones(64, dtype=torch.bool)
        for p in range(6):
            one = table[possible & (bits[:, p] == 1)].sum() / table[possible].sum()
            assert image[p] == float(uniforms[p] < one)
            possible &= bits[:, p] == image[p]


@pytest.mark.parametrize("name", ["grey", "mixture"])
def test_samples_follow_the_enumerated_table(name):
    size, levels, n = ((3, 3), 2, 1_000_000) if name == "grey" else ((1, 2), 3, 200_000)
    sample = sampler(name, *size, layers=2, first_kernel=3, maps=4)
    z, x = codes(1), images(sample.image_shape[0], *size, levels)
    with torch.no_grad():
        table = -sample.likelihood.nll(sample.decoder(z.expand(len(x), -1), x), x)
    sample.decoder.float()
    drawn = sample.sample(z.float(), n, seed=1).flatten(1)
    place = levels ** torch.arange(drawn.shape[1] - 1, -1, -1)
    counts = ((drawn * (levels - 1)).round().long() * place).sum(1).bincount(minlength=len(x))
    assert torch.equal((x.flatten(1) * (levels - 1)).round().long() @ place, torch.arange(len(x)))
    assert abs(chi_square(counts, table.exp())) < 5


def test_fixed_point_says_which_rows_are_final():
    sample = sampler("grey", 6, 5)
    seen = []
    sample.sample(codes(2), strategy="fixed_point", callback=lambda *rows: seen.append(rows), seed=0)
    assert seen == sorted(seen) and seen[-1] == (6, 6) and len(seen) <= 31
    for strategy in ("naive", "cached"):
        seen.clear()
        sample.sample(codes(2), strategy=strategy, callback=lambda *rows: seen.append(rows), seed=0)
        assert seen == [(i, 6) for i in range(1, 7)]


# Noise


def test_uniforms_are_nested_splitmix64():
    """The same numbers by Python's integers."""
    mask = 2**64 - 1

    def number(state, index):
        x = (state + 0x9E3779B97F4A7C15 * (index + 1)) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    assert number(1234567, 0) == 6457827717110365317  # the first of the published test vector
    for seed in (0, 7, 2**63 + 5, -1):
        u = pixel_uniforms((2, 3, 2, 2), seed, first=5)
        assert u.shape == (2, 3, 2, 2) and u.dtype == torch.float32
        for n in range(2):
            for c in range(3):
                for p in range(4):
                    bits = number(number(number(seed & mask, 5 + n), p), c)
                    assert u[n, c].flatten()[p].item() == ((bits >> 41) + 0.5) / 2**23


def test_uniforms_look_random():
    u = pixel_uniforms((1000, 2, 10, 10), seed=1).double()
    assert 0 < u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    assert chi_square((u * 1000).long().flatten().bincount(minlength=1000), torch.full((1000,), 1e-3)) < 5
    v = (u - 0.5) * math.sqrt(12)
    others = v.roll(1, 0), v.roll(1, 1), v.roll(1, 3), v.roll(1, 2), (pixel_uniforms((1000, 2, 10, 10), 2) - 0.5) * 3.46
    for other in others:  # another sample, channel, column, row, seed
        assert abs((v * other).mean()) < 5 / math.sqrt(v.numel())


@pytest.mark.parametrize("strategy", ["naive", "cached", "fixed_point"])
def test_a_sample_does_not_depend_on_the_others(strategy):
    sample = sampler("grey", 3, 4)
    z = codes(7)
    together = sample.sample(z, seed=5, strategy=strategy)
    assert torch.equal(together[:2], sample.sample(z[:2], seed=5, strategy=strategy))
    rest = sample.sample(z[2:], uniforms=sample.uniforms(5, 5, first=2), strategy=strategy)
    assert torch.equal(together[2:], rest)
    one = sample.sample(z[:1], 4, seed=5, strategy=strategy)
    assert len(one) == 4 and torch.equal(one[0], together[0])
    assert not torch.equal(together, sample.sample(z, seed=6, strategy=strategy))


@pytest.mark.parametrize("model", ["gated", "infovae2017", "pp"])
def test_nor_does_an_image_of_real_numbers_but_for_rounding(model):
    torch.manual_seed(0)
    options = {"variant": model} if model != "pp" else {}
    kind = PixelCNNPlusPlus if model == "pp" else GatedPixelCNN
    sample = PixelSampler(kind(2, (1, 5, 6), maps=8, **options), Gaussian(std=0.1))
    z = torch.randn(33, 2)
    together = sample.sample(z, seed=5)
    for k in (1, 2, 7):
        torch.testing.assert_close(together[:k], sample.sample(z[:k], seed=5), rtol=0, atol=2e-6)


@pytest.mark.parametrize("strategy", ["naive", "cached", "fixed_point"])
def test_uniforms_of_float64_stay_inside(strategy):
    decoder = GatedPixelCNN(0, (1, 3, 4), layers=2, maps=4)
    head = decoder.head[-1]
    head.weight.data.zero_(), head.bias.data.fill_(100.0)  # a 1 for certain
    for u in (1 - 1e-12, 0.0):  # torch.rand gives 0
        uniforms = torch.full((2, 1, 3, 4), u, dtype=torch.float64)
        assert (PixelSampler(decoder, Bernoulli()).sample(uniforms=uniforms, n=2, strategy=strategy) == 1).all()


def test_seeds_codes_and_temperatures_of_other_types():
    sample, z = sampler("grey", 3, 4), codes(3)
    assert torch.equal(
        sample.sample(z, temperature=torch.tensor(0.5), seed=0), sample.sample(z, temperature=0.5, seed=0)
    )
    for seed in (np.int64(5), torch.tensor(5)):
        assert torch.equal(sample.sample(z, seed=5), sample.sample(z, seed=seed))
    assert torch.equal(sample.sample(z.float(), seed=0), sample.sample(z.float().double(), seed=0))


# In-painting and temperature


@each_model
@pytest.mark.parametrize("strategy", ["naive", "auto", "fixed_point"])
def test_known_pixels_stay_and_others_heed_them(name, strategy):
    sample = sampler(name, 3, 4)
    z, channels = codes(6), sample.image_shape[0]
    known = torch.rand(6, channels, 3, 4, dtype=torch.float64).round()
    mask = torch.rand(1, 1, 3, 4) < 0.5
    hidden = known.masked_fill(~mask, math.nan)  # what is not known is not read
    x = sample.sample(z, known=hidden, known_mask=mask, strategy=strategy, seed=0)
    assert torch.equal(torch.where(mask, x, 0), torch.where(mask, known, 0)) and x.isfinite().all()
    wanted = sample.sample(z, known=known, known_mask=mask, strategy="naive", seed=0)
    torch.testing.assert_close(x, wanted, rtol=0, atol=1e-12)
    everything = sample.sample(
        z, known=known, known_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool), strategy=strategy, seed=0
    )
    assert torch.equal(everything, known)
    free = sample.sample(z, seed=9, strategy=strategy)
    assert torch.equal(free, sample.sample(z, seed=9, known=free, known_mask=mask, strategy=strategy))


def test_colours_can_be_known_one_by_one_where_they_are_ordered():
    sample = sampler("colours", 2, 3)
    mask = torch.tensor([True, False, True]).view(1, 3, 1, 1)
    known = torch.ones(4, 3, 2, 3, dtype=torch.float64)
    z = codes(4)
    x = sample.sample(z, known=known, known_mask=mask, seed=0)
    assert bool((x[:, [0, 2]] == 1).all()) and torch.equal(
        x, sample.sample(z, known=known, known_mask=mask, strategy="naive", seed=0)
    )


def test_a_low_temperature_draws_the_likeliest_bits():
    sample = sampler("grey", 3, 3)
    z = codes(1)
    cold = sample.sample(z, 20, temperature=1e-9, seed=0)
    assert torch.equal(cold, cold[:1].expand_as(cold))
    assert torch.equal(cold, (sample.decoder(z.expand(20, -1), cold) > 0).double())


# Which models


def test_models_and_decoders():
    vae = InfoVAE.from_config((1, 4, 4), 2, decoder={"name": "pixelcnn", "layers": 2, "maps": 4, "first_kernel": 3})
    z = torch.randn(3, 2)
    whole, parts = PixelSampler(vae), PixelSampler(vae.decoder, Bernoulli())
    assert (
        torch.equal(whole.sample(z, seed=0), parts.sample(z, seed=0)) and whole.sample(z, seed=0).dtype == torch.float32
    )
    assert not whole.sample(z, seed=0).requires_grad
    own = PixelSampler(Own(), Bernoulli())
    assert torch.equal(own.sample(z, seed=0), own.sample(z, strategy="naive", seed=0))


def test_weights_that_training_changed_are_used():
    sample = sampler("grey", 3, 3)
    z = codes(8)
    before = sample.sample(z, seed=0)
    for parameter in sample.decoder.parameters():
        parameter.data.mul_(-3)
    assert not torch.equal(sample.sample(z, seed=0), before)
    assert torch.equal(sample.sample(z, seed=0), sample.sample(z, strategy="naive", seed=0))


def test_refusals():
    vae = InfoVAE.from_config((1, 4, 4), 2)
    with pytest.raises(ValueError, match=r"got a decoder MLPDecoder, which is not autoregressive: .* InfoVAE\.sample"):
        PixelSampler(vae)
    decoder = GatedPixelCNN(2, (1, 3, 4), layers=2, maps=4)
    with pytest.raises(ValueError, match="likelihood: got None; accepted: the one that"):
        PixelSampler(decoder)
    mixture = DiscretizedLogisticMixture(3)
    with pytest.raises(ValueError, match=r"orders 3 colours, which .* draws together: build it with data_channels=1"):
        PixelSampler(GatedPixelCNN(2, (30, 3, 4), 3, 3, layers=2, maps=6), mixture)
    sample, z = PixelSampler(decoder, Bernoulli()), torch.randn(3, 2)
    x, mask = torch.rand(3, 1, 3, 4), torch.ones(3, 1, 3, 4, dtype=torch.bool)
    for call, message in (
        ({"strategy": "fast"}, "strategy: got 'fast'; accepted: 'auto', 'naive', 'cached', 'fixed_point'"),
        ({"temperature": 0.0}, r"temperature must be a number > 0, got 0\.0"),
        ({"temperature": math.nan}, "temperature must be a number > 0, got nan"),
        ({"temperature": "1"}, "temperature must be a number > 0, got '1'"),
        (
            {"uniforms": torch.ones(3, 1, 3, 4)},
            r"uniforms: got numbers that are not between 0 and 1; accepted: in \[0, 1",
        ),
        ({"n": 5}, r"z: got shape \(3, 2\) for n=5; accepted: \[n, D\], or \[1, D\] for all images"),
        ({"known": x}, "known and known_mask: got one of them; accepted: both or neither"),
        ({"known": x[:2], "known_mask": mask}, r"known: got shape \(2, 1, 3, 4\); accepted: \(3, 1, 3, 4\), or 1 for"),
        ({"known": x, "known_mask": mask[:, :, :2]}, r"known_mask: got shape \(3, 1, 2, 4\); accepted: \(3, 1, 3, 4\)"),
        ({"uniforms": x[:, :, :2]}, r"uniforms: got shape \(3, 1, 2, 4\); accepted: \(3, 1, 3, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sample.sample(z, **call)
    for call, message in (
        ({"known": x, "known_mask": x}, r"known_mask: got dtype torch\.float32; accepted: a tensor of torch\.bool"),
        ({"known": x, "known_mask": mask.numpy()}, "known_mask: got ndarray; accepted: a tensor of torch"),
        ({"known": (255 * x).byte(), "known_mask": mask}, r"known: got dtype torch\.uint8; accepted: a floating-point"),
        ({"uniforms": [0.5]}, "uniforms: got list; accepted: a floating-point tensor"),
        ({"seed": 1.0}, r"seed: got 1\.0; accepted: an integer"),
    ):
        with pytest.raises(TypeError, match=message):
            sample.sample(z, **call)
    for n in (-1, 2.0):
        with pytest.raises(ValueError, match=rf"n: got {n}; accepted: an integer, 0 or more"):
            sample.uniforms(n)
    for wrong, got in (([1, 2], "list"), (torch.ones(3, 1, 3, 4).long(), "dtype torch.int64")):
        with pytest.raises(TypeError, match=rf"x: got {got}; accepted: a floating-point tensor"):
            sample.params(z, wrong)
    for likelihood, wanted in ((Categorical(5), 5), (Gaussian(std=None), 2)):
        with pytest.raises(ValueError, match=rf"needs params of {wanted} channels, but the decoder has 1"):
            PixelSampler(decoder, likelihood)
    with pytest.raises(ValueError, match="likelihood: got 'bernoulli'; accepted: the one that the decoder was"):
        PixelSampler(decoder, "bernoulli")
    with pytest.raises(TypeError, match="z: got list; accepted: a floating-point tensor"):
        sample.sample([[0.0, 0.0]], seed=0)
    with pytest.raises(ValueError, match="backend='gpu' is unknown; accepted: 'auto'"):
        PixelSampler(decoder, Bernoulli(), backend="gpu")
    with pytest.raises(ValueError, match="z and n: got neither"):
        sample.sample(seed=0)
    with pytest.raises(ValueError, match=r"z: got None; accepted: \[N, 2\]"):
        sample.sample(n=2, seed=0)
    old = PixelSampler(GatedPixelCNN(2, (1, 3, 4), variant="infovae2017", layers=2, maps=4), Bernoulli(), backend="cpp")
    with pytest.raises(RuntimeError, match="it has no kernels for variant 'infovae2017'"):
        old.sample(z)
    with pytest.raises(ValueError, match="'cached' knows GatedPixelCNN and PixelCNNPlusPlus, not Own"):
        PixelSampler(Own(), Bernoulli()).sample(z, strategy="cached", seed=0)
    colour = PixelSampler(GatedPixelCNN(2, (30, 3, 4), 3, 1, layers=2, maps=4), mixture)
    with pytest.raises(ValueError, match="known_mask: differs between the channels of a pixel"):
        colour.sample(z, known=x, known_mask=torch.tensor([True, False, False]).view(1, 3, 1, 1))


def test_empty_batches():
    for likelihood in (Bernoulli(), Categorical(3)):
        sample = PixelSampler(GatedPixelCNN(2, (likelihood.channels(1), 3, 4), layers=2, maps=4), likelihood)
        for strategy in ("naive", "cached", "fixed_point"):
            assert sample.sample(torch.randn(0, 2), strategy=strategy, seed=0).shape == (0, 1, 3, 4)


def test_fixed_point_ends_with_all_rows():
    """Where the last pass still changes a pixel, too."""
    drawing, z, calls = sampler("grey", 1, 1), codes(1), []
    for seed in range(20):
        drawing.sample(z, seed=seed, strategy="fixed_point", callback=lambda *at: calls.append(at))
        assert calls[-1] == (1, 1)
    assert (0, 1) in calls  # the only pass changed the pixel


def test_without_a_seed_every_draw_is_another():
    sample, z = PixelSampler(GatedPixelCNN(2, (1, 3, 4), layers=2, maps=4), Bernoulli()), torch.randn(4, 2)
    assert not torch.equal(sample.sample(z), sample.sample(z))
    torch.manual_seed(3)
    first = sample.sample(z)
    torch.manual_seed(3)
    assert torch.equal(sample.sample(z), first)


def nan_where_the_decoder_has_it(backend):
    """With colours in order, "cached" keeps what later colours of the pixel before left, times weights of zero."""
    net = GatedPixelCNN(0, (3, 2, 20), 3, 3, layers=2, maps=3, first_kernel=3).eval()
    x = torch.rand(2, 3, 2, 20)
    x[0, 0, 0, 3] = x[1, 2, 0, 5] = math.nan
    sample = PixelSampler(net, Bernoulli(), backend=backend)
    wanted = net(None, x).isnan()
    assert torch.equal(sample.params(None, x).isnan(), wanted) and 0 < wanted.sum() < wanted.numel()
    bits = x.round()
    known = torch.ones(1, 1, 2, 20, dtype=torch.bool)
    known[..., 10:] = False
    drawn = [sample.sample(n=2, known=bits, known_mask=known, seed=0, strategy=name) for name in ("cached", "naive")]
    assert torch.equal(drawn[0].isnan(), drawn[1].isnan())


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_nan_is_seen_where_the_decoder_sees_it(backend):
    nan_where_the_decoder_has_it(backend)


@pytest.mark.parametrize("name", ["grey", "levels", "mixture"])
def test_nan_params_draw_nan(name, backend):
    """One NaN among the logits of a choice is enough; and it is drawn as often as it takes, not more."""
    drawing, passes = sampler(name, 3, 4, backend), []
    drawing.decoder.head[-1].bias.data[: 3 if name == "levels" else 1] = math.nan
    for strategy in ("cached", "naive", "fixed_point"):
        callback = None if strategy != "fixed_point" else lambda *at: passes.append(at)
        assert drawing.sample(codes(2), strategy=strategy, callback=callback, seed=0).isnan().all()
    assert len(passes) < 12


def test_the_smallest_temperature_draws_the_likeliest_level(backend):
    drawing = sampler("levels", 2, 2, backend)
    bias = drawing.decoder.head[-1].bias.data
    bias.zero_(), drawing.decoder.head[-1].weight.data.zero_()
    bias[3:6] = 50  # level 1 of each colour
    assert (drawing.sample(codes(2), temperature=1e-37, seed=0) == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"condition": "spatial"}, {"variant": "infovae2017"}], ids=str)
def test_half_precision_models_draw_their_own_codes(options, dtype):
    decoder = {"name": "pixelcnn", "layers": 2, "maps": 4} | options
    model, x = InfoVAE.from_config((1, 4, 4), 2, decoder=decoder).to(dtype), torch.rand(2, 1, 4, 4).round().to(dtype)
    z = model.encode(x).mu
    assert z.dtype == torch.float32
    for strategy in ("cached", "naive", "fixed_point"):
        assert PixelSampler(model).sample(z, strategy=strategy, seed=0).dtype == dtype
    assert PixelSampler(model).params(z, x).isfinite().all()


def test_a_decoder_without_parameters():
    class Half(torch.nn.Module):
        autoregressive, image_shape = True, (1, 2, 2)

        def forward(self, z, x):
            return torch.zeros_like(x)

    assert PixelSampler(Half(), Bernoulli()).sample(torch.zeros(3, 1), seed=0).shape == (3, 1, 2, 2)


def test_numbers_of_images_that_are_none():
    drawing = sampler("grey", 3, 4)
    assert len(drawing.sample(codes(1), n=np.int64(2), seed=0)) == 2
    for n in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"n: got {n}; accepted: an integer, 0 or more"):
            drawing.sample(codes(1), n=n, seed=0)
    with pytest.raises(ValueError, match=r"z: got shape .* for n=0"):
        drawing.sample(codes(4), n=0, seed=0)


def test_a_backend_of_the_environment_that_draws_nothing_is_passed_over():
    """It is meant for the operators that have it; one given by name is not."""
    code = """
import torch
from infovae_fast import InfoVAE, PixelSampler
decoder = {"name": "pixelcnn", "layers": 2, "maps": 4, "variant": "infovae2017"}
model = InfoVAE.from_config((1, 4, 4), 2, decoder=decoder)
assert model.sample(2).shape == (2, 1, 4, 4)
try:
    PixelSampler(model, backend="cpp").sample(torch.zeros(1, 2), seed=0)
except RuntimeError as error:
    assert "cannot run pixel_sampler" in str(error), error
else:
    raise SystemExit("named, it ran")
"""
    environment = os.environ | {"INFOVAE_FAST_BACKEND": "cpp"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
