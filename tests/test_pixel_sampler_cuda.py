"""The CUDA sampler of GatedPixelCNN: run through tests/simt, and compiled by nvcc for GPUs that are not here."""

import copy
import math
import re
from functools import partial

import pytest
import torch
from torch import nn

from infovae_fast import Bernoulli, Categorical, DiscretizedLogisticMixture, GatedPixelCNN, Gaussian, PixelSampler
from infovae_fast.backends import Backend, native_missing
from infovae_fast.models import incremental, pixel_sampler
from infovae_fast.models.pixelcnn import PAPER_PIXELCNN, R64
from tests.oracle import check, near
from tests.simt import ARCHITECTURES, ptxas
from tests.simt import incremental as simt
from tests.test_pixel_sampler import nan_where_the_decoder_has_it
from tests.test_pixelcnn import Launches, network

ON_GPU = torch.cuda.is_available() and native_missing("cuda") is None
SIZES = [(4, 5), (1, 1), (1, 6), (5, 1)]
NAMES = ["grey", "no z", "spatial", "colours"]


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    """The row "cuda" of the sampler runs here; `simulated.shared` and `.processors` are those of the GPU."""
    torch.manual_seed(0)
    gpu = {"processors": 2, "shared": simt.SHARED}

    def run(self, *inputs):
        given = (self.memory, self.conditions, *inputs)
        if not ON_GPU:
            return simt.leaf(*given, **gpu)
        to = partial(torch.utils._pytree.tree_map, lambda t: t.cuda() if isinstance(t, torch.Tensor) else t)
        return tuple(t.cpu() for t in torch.ops.infovae_fast.draw_images(*to(given)))

    def reason(like, *inputs):
        return pixel_sampler.images_reason(gpu["shared"], *inputs)

    monkeypatch.setattr(incremental.Images, "_leaf", run)
    rows = (Backend("cuda", reason, incremental.Images), *pixel_sampler.BACKENDS[1:])
    monkeypatch.setattr(pixel_sampler, "BACKENDS", rows)
    return gpu


def model_of(name, size, **options):
    """A float64 decoder, its likelihood, and codes for some images."""
    model, likelihood, _ = network("grey" if name == "no z" else name, *size, inputs=2 * (name != "no z"), **options)
    return model, likelihood, lambda n: None if name == "no z" else torch.randn(n, 2, dtype=torch.float64)


def bits(model, n):
    return torch.rand(n, *model.image_shape, dtype=torch.float64).round()


@torch.no_grad()
def check_params(model, likelihood, z, x):
    """Against the whole network; the terms of the last product are its scale."""
    truth, terms = model(z, x), []
    model.head[-1].register_forward_hook(lambda layer, inputs, out: terms.append(inputs[0].abs()))
    model(z, x)
    last = model.head[-1]
    scale = torch.einsum("ncij,cp->npij", terms[0], last.weight[0].abs()) + last.bias.abs()[:, None, None]
    near(PixelSampler(model, likelihood, backend="cuda").params(z, x), truth)
    single = PixelSampler(model.float(), likelihood, backend="cuda")
    z, x = (None if t is None else t.float() for t in (z, x))
    check(single.params(z, x), truth, model(z, x), scale)


@pytest.mark.parametrize(
    "options",
    [{}, {"layers": 1}, {"first_kernel": 7, "maps": 9}, {"kernel": 1}, {"layers": 2, "first_kernel": 3, "kernel": 5}],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_params_meet_the_rule(name, options):
    for size in SIZES:
        model, likelihood, codes = model_of(name, size, **options)
        check_params(model, likelihood, codes(3), bits(model, 3))


@pytest.mark.parametrize(
    ("name", "size", "maps", "n"),
    [("grey", (2, 70), 32, 1), ("grey", (2, 40), 32, 8), ("spatial", (3, 50), 24, 3), ("colours", (2, 36), 24, 8)],
)
def test_rows_of_several_tiles(simulated, name, size, maps, n):
    """More pixels in a row than threads have places for; columns that do not divide the threads."""
    simulated["processors"] = 1
    model, likelihood, codes = model_of(name, size, maps=maps, layers=2)
    check_params(model, likelihood, codes(n), bits(model, n))


def test_params_of_any_likelihood():
    for name in ("levels", "learned std", "mixture"):
        model, likelihood, codes = model_of(name, (3, 4))
        check_params(model, likelihood, codes(2), bits(model, 2))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_weights_that_change_are_gathered_anew(name):
    model, _, codes = model_of(name, (4, 5))
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        for parameter in model.to(dtype).parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
        z, x = codes(2), bits(model, 2)
        images = incremental.Images(model, None if z is None else z.to(dtype), 2)
        assert images.memory.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        params, truth = images.params(x).double(), copy.deepcopy(model).double()(z, x)
        torch.testing.assert_close(params, truth, rtol=0, atol={8: 1e-13, 4: 1e-5, 2: 0.02}[dtype.itemsize])


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_waits_for_few_launches(name, monkeypatch):
    """Before the one of the images: what gathers the weights, and the conditions, a product a layer."""
    model, likelihood, codes = model_of(name, (4, 5), layers=7)
    sampler, z = PixelSampler(model.float(), likelihood, backend="cuda"), codes(3)
    drawing = {"z": None if z is None else z.float(), "n": 3, "uniforms": sampler.uniforms(3)}
    monkeypatch.setattr(incremental.Images, "_leaf", lambda self, *inputs: (inputs[2], None))
    monkeypatch.setattr(sampler, "_given", lambda uniforms, n: uniforms)  # which on a CPU are looked at
    sampler.sample(**drawing)
    with Launches() as launches:
        sampler.sample(**drawing)
    assert len(launches.names) <= 24, launches.names


@pytest.mark.parametrize("name", NAMES)
def test_the_images_are_those_of_the_cpu(name):
    for size in SIZES:
        model, likelihood, codes = model_of(name, size)
        for dtype in (torch.float64, torch.float32):
            model.to(dtype)
            z = codes(5)
            z = None if z is None else z.to(dtype)
            for temperature in (1.0, 0.5):
                drawing = {"z": z, "n": 5, "seed": 3, "temperature": temperature, "strategy": "cached"}
                images = PixelSampler(model, likelihood, backend="cuda").sample(**drawing)
                assert images.dtype == dtype and images.shape == (5, *model.image_shape)
                assert torch.equal(images, PixelSampler(model, likelihood, backend="reference").sample(**drawing))


LEVELS = [  # likelihood, channels, groups
    (Categorical(5), 1, 1),
    (Categorical(70), 1, 1),  # more than a warp has threads
    (Categorical(3), 3, 3),
    (DiscretizedLogisticMixture(2, 3), 3, 1),
    (DiscretizedLogisticMixture(40, 256), 3, 1),
    (DiscretizedLogisticMixture(5, 256), 1, 1),
]


@pytest.mark.parametrize(("likelihood", "channels", "groups"), LEVELS, ids=str)
def test_levels_are_those_of_the_cpu(likelihood, channels, groups):
    params = likelihood.channels(channels)
    model = GatedPixelCNN(2, (params, 3, 4), channels, groups, layers=2, maps=6, first_kernel=3).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.7, 0.7)
    z, known, mask = torch.randn(5, 2).double(), bits(model, 5), torch.rand(5, 1, 3, 4) < 0.3
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        for drawing in ({"seed": 1}, {"temperature": 0.6, "seed": 0}, {"known": known, "known_mask": mask, "seed": 0}):
            samplers = (PixelSampler(model, likelihood, backend=name) for name in ("cuda", "reference"))
            out, truth = (sampler.sample(z.to(dtype), **drawing) for sampler in samplers)
            torch.testing.assert_close(out, truth, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-15)
            assert len(out.unique()) > 2
    u = torch.full((5, likelihood.uniforms(channels), 3, 4), 1 - 2**-24)  # the cumulated sum may end below
    top = PixelSampler(model, likelihood, backend="cuda").sample(z.float(), uniforms=u)
    assert bool((top > 0).all() and (top <= 1).all())


def test_known_pixels_stay_and_others_heed_them():
    for name in NAMES:
        model, likelihood, codes = model_of(name, (4, 5))
        z, known = codes(6), torch.rand(6, *model.image_shape, dtype=torch.float64)
        mask = torch.rand(6, *model.image_shape) < 0.5  # colours one by one
        drawing = {"z": z, "n": 6, "known": known.masked_fill(~mask, math.nan), "known_mask": mask, "seed": 0}
        x = PixelSampler(model, likelihood, backend="cuda").sample(**drawing)
        assert torch.equal(x[mask], known[mask]) and bool(((x == 0) | (x == 1) | mask).all())
        assert torch.equal(x, PixelSampler(model, likelihood, backend="reference").sample(**drawing))


def test_nan_is_seen_where_the_decoder_sees_it(monkeypatch):
    for order in ("forward", "reverse", "shuffle:1"):
        monkeypatch.setenv("SIMT_ORDER", order)
        nan_where_the_decoder_has_it("cuda")


def test_an_image_does_not_depend_on_the_others(simulated):
    """Nor on how many a block has (1, 2, 4, 8), nor on rounds and memory: every bit of the params."""
    for name, dtype in (("grey", torch.float32), ("colours", torch.float64)):
        model, _, codes = model_of(name, (2, 5), maps=6)
        images = incremental.Images(model.to(dtype), codes(11).to(dtype), 11)  # torch's sums may depend on the others
        u, x = torch.rand(11, *model.image_shape), bits(model, 11).to(dtype)
        conditions, no = images.conditions, torch.zeros(x.shape, dtype=torch.bool)
        drawn, params = images.draw(u, x, no, 1.0), images.params(x)
        for first, n, processors in ((0, 1, 1), (2, 3, 1), (1, 5, 1), (0, 7, 2), (0, 11, 7), (0, 11, 1), (0, 11, 40)):
            simulated["processors"] = processors
            part = slice(first, first + n)
            images.conditions = [c[part].contiguous() for c in conditions]
            assert torch.equal(images.draw(u[part], x[part], no[part], 1.0), drawn[part])
            assert torch.equal(images.params(x[part]), params[part])
    model, _, codes = model_of("grey", (1, 20), maps=128, layers=2)
    images, x = incremental.Images(model, codes(2), 2), bits(model, 2)
    simulated["processors"] = 1
    params = images.params(x)
    simulated["shared"] = incremental.shared_memory(model)  # room for one
    assert torch.equal(images.params(x), params)


def test_the_bits_do_not_depend_on_the_order_of_threads_and_blocks(monkeypatch):
    model, likelihood, codes = model_of("colours", (3, 4))
    sampler, z = PixelSampler(model.float(), likelihood, backend="cuda"), codes(5).float()
    results = []
    for order in ("forward", "reverse", "shuffle:1", "shuffle:2"):
        monkeypatch.setenv("SIMT_ORDER", order)
        x = sampler.sample(z, seed=0)
        results.append((x, sampler.params(z, x)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_the_future_is_not_read_and_nan_stays_visible():
    model, likelihood, codes = model_of("grey", (3, 4))
    sampler, z, x = PixelSampler(model, likelihood, backend="cuda"), codes(2), bits(model, 2)
    clean = sampler.params(z, x)
    x[0, :, 1, 2:] = x[0, :, 2] = math.nan
    params = sampler.params(z, x)
    assert torch.equal(params[1], clean[1]) and torch.equal(params[0].flatten(1)[:, :7], clean[0].flatten(1)[:, :7])
    assert params[0].flatten(1)[:, 7:].isnan().all()


def test_empty_batches_and_the_callback():
    model, likelihood, codes = model_of("grey", (3, 4))
    sampler, seen = PixelSampler(model, likelihood, backend="cuda"), []
    assert sampler.sample(codes(0), seed=0).shape == (0, 1, 3, 4) == sampler.params(codes(0), bits(model, 0)).shape
    sampler.sample(codes(2), callback=lambda *rows: seen.append(rows), seed=0)
    assert seen == [(3, 3)]


def test_what_has_no_room_is_said(simulated):
    def refusal(likelihood, **options):
        sampler = PixelSampler(GatedPixelCNN(0, (likelihood.channels(1), 3, 4), **options), likelihood, backend="cuda")
        with pytest.raises(RuntimeError) as error:
            sampler.sample(n=1, seed=0)
        return str(error.value)

    assert "it draws for Bernoulli, Categorical, Discr" in refusal(Gaussian(), layers=2, maps=4)
    assert "got 33 layers of 4 maps, accepted: at most 32 of 1024" in refusal(Bernoulli(), layers=33, maps=4)
    assert "got 1200 columns for a colour, accepted: at most 1024" in refusal(Bernoulli(), layers=1, maps=600)
    simulated["shared"] = 40 << 10
    assert re.search(
        r"an image needs \d+ bytes of shared memory, accepted here: at most 40960",
        refusal(Bernoulli(), layers=7, maps=64),
    )


@pytest.mark.parametrize("options", [R64, PAPER_PIXELCNN, {"layers": 2, "maps": 6, "kernel": 7}], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_shared_memory_is_as_predicted(options, channels):
    options = {key: value for key, value in options.items() if key != "name"} | {"first_kernel": 7}
    options["maps"] += -options["maps"] % channels
    for dtype in (torch.float32, torch.float64):
        model = GatedPixelCNN(2, (channels, 28, 28), channels, channels, **options).to(dtype)
        images = incremental.Images(model, torch.zeros(0, 2, dtype=dtype), 0)
        given = (
            images.memory,
            images.conditions,
            [*images.sizes, 0, 0],
            None,
            torch.zeros(0, *model.image_shape, dtype=dtype),
        )
        *_, used = simt.run(*given, None, 1.0, False, 1, simt.SHARED)
        assert used == incremental.shared_memory(model)
        assert (
            incremental.cuda_limits(model, pixel_sampler.LEAST_SHARED if dtype == torch.float32 else simt.SHARED)
            is None
        )


def test_the_operator_has_a_fake():
    if (reason := native_missing()) is not None:
        pytest.skip(reason)
    model, _, codes = model_of("grey", (3, 4))
    images, x = incremental.Images(model, codes(2), 2), bits(model, 2)
    given = (images.memory.to("meta"), images.conditions, [*images.sizes, 0, 0], None, x.to("meta"), None, 1.0)
    for params, shape in ((True, x.shape), (False, (0,))):
        fakes = torch.ops.infovae_fast.draw_images(*given, params)
        assert [(t.shape, t.dtype, t.is_contiguous()) for t in fakes] == [
            (x.shape, x.dtype, True),
            (shape, x.dtype, True),
        ]
    with pytest.raises(ValueError, match="draw_images: got 5 sizes and 4 dimensions; accepted: 7 sizes"):
        torch.ops.infovae_fast.draw_images(given[0], given[1], images.sizes, *given[3:], True)


def test_the_kernel_refuses_what_does_not_fit():
    if ON_GPU:
        pytest.skip("on a GPU the binding refuses first")
    model, _, codes = model_of("grey", (3, 4))
    images = incremental.Images(model, codes(2), 2)
    given = (images.memory, images.conditions, [*images.sizes, 0, 0], None, bits(model, 2), None, 1.0, True)
    with pytest.raises(RuntimeError, match="more shared memory"):
        simt.leaf(*given, shared=1000)
    with pytest.raises(RuntimeError, match="the table has another size"):
        simt.leaf(images.memory[:-1], *given[1:])
    with pytest.raises(RuntimeError, match="at most 32 layers, 1024 maps"):
        simt.leaf(images.memory, images.conditions * 20, *given[2:])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_compiles_without_spilling(architecture, tmp_path):
    said = ptxas(simt.SOURCES[0], architecture, tmp_path)
    kernels = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(kernels) == 6 and set(kernels) == {("0", "0", "0")}, said
