"""A gated PixelCNN in shared memory: its kernel through tests/simt or on a GPU, and compiled by nvcc for other GPUs."""

import copy
import re

import pytest
import torch

from infovae_fast import GatedPixelCNN, InfoVAE
from infovae_fast.backends import native_missing
from infovae_fast.models import resident
from infovae_fast.models.pixelcnn import PAPER_PIXELCNN, R64
from tests.oracle import check
from tests.simt import ARCHITECTURES, ptxas
from tests.simt import resident as simt

ON_GPU = torch.cuda.is_available() and native_missing("cuda") is None
DEVICE = "cuda" if ON_GPU else "cpu"

# image, params, codes for each image (0: no z), options: fewer tiles of 16 pixels than warps, one or two a warp,
# several rounds, an odd one that gets a partner; reaches that differ; channels that do not fill a step of 16.
CASES = [
    ((1, 5, 6), 1, 2, {"layers": 3, "maps": 16}),
    ((1, 3, 4), 2, 0, {"layers": 1, "maps": 32, "first_kernel": 3}),
    ((3, 9, 10), 20, 1, {"layers": 4, "maps": 16, "first_kernel": 3, "kernel": 5}),
    ((1, 14, 17), 1, 3, {"layers": 3, "maps": 32}),
    ((2, 7, 21), 3, 1, {"layers": 2, "maps": 32, "kernel": 1}),
    ((1, 20, 22), 1, 1, {"layers": 5, "maps": 16}),
    ((1, 28, 28), 1, 1, {"layers": 3, "maps": 32}),
    ((1, 30, 31), 5, 1, {"layers": 2, "maps": 16}),
]


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    torch.manual_seed(0)
    if not ON_GPU:
        monkeypatch.setattr(resident, "leaf", simt.leaf)


def network(image, params, codes, options, dtype=torch.bfloat16):
    """A decoder, its codes and images, all in 16 bits."""
    inputs = 3 if codes else 0
    model = GatedPixelCNN(inputs, (params, *image[1:]), image[0], **options).to(DEVICE)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2).add_(torch.randn_like(p), alpha=0.02)
    x = torch.rand(2, *image, device=DEVICE)
    z = torch.randn(2 * codes, inputs, device=DEVICE).to(dtype) if codes else None
    return model.to(dtype).requires_grad_(False), z, x.to(dtype)


def by_layers(model, z, x, dtype):
    model = copy.deepcopy(model).to(dtype)
    for layer in model.modules():
        if hasattr(layer, "backend"):
            layer.backend = "reference"
    return model(None if z is None else z.to(dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_params_meet_the_rule(case, dtype):
    model, z, x = network(*case, dtype)
    truth = by_layers(model, z, x, torch.float64)
    yardstick = by_layers(model, z, x, dtype)
    check(resident.params(model, z, x).double(), truth, yardstick.double(), truth.abs().amax())


def test_a_code_sees_its_image_alone():
    """Code s of image n stands in row s N + n, to the bit what it is alone."""
    model, z, x = network(*CASES[3])
    out = resident.params(model, z, x)
    assert len(out) == 6 and out.isfinite().all()
    for row, code in enumerate(z):
        assert torch.equal(out[row : row + 1], resident.params(model, code[None], x[row % 2][None]))


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[6]], ids=str)
def test_the_future_is_never_read(case):
    model, z, x = network(*case)
    _, height, width = case[0]
    for pixel in (0, height // 2 * width + 1, height * width - 1):
        hidden = x.clone()
        hidden.flatten(2)[:, :, pixel:] = torch.nan
        out, other = (resident.params(model, z, t).flatten(2)[..., : pixel + 1] for t in (x, hidden))
        assert torch.equal(out, other)
    hidden = x.clone()
    hidden[:, :, 0, 0] = torch.nan
    assert resident.params(model, z, hidden).flatten(2)[..., 1:].isnan().any(1).any()


def test_twice_the_same():
    model, z, x = network(*CASES[6])
    assert torch.equal(resident.params(model, z, x), resident.params(model, z, x))


def test_weights_may_change():
    model, z, x = network(*CASES[0])
    before = resident.params(model, z, x)
    model.head[-1].bias.add_(1)
    digit = torch.finfo(before.dtype).eps
    torch.testing.assert_close(resident.params(model, z, x), before + 1, rtol=digit, atol=digit)


def watched(case, monkeypatch):
    """The network of a case, and what tests/simt tells of its launch."""
    found = []
    monkeypatch.setattr(resident, "leaf", lambda *inputs: found.append(simt.run(*inputs)) or found[-1][0])
    model, z, x = network(*case)
    resident.params(model, z, x)
    return model, found[0][1]


@pytest.mark.skipif(ON_GPU, reason="tests/simt tells what a block takes")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_knows_the_shared_memory(case, monkeypatch):
    model, (taken, _, _) = watched(case, monkeypatch)
    assert taken == resident.shared_memory(model)


@pytest.mark.skipif(ON_GPU, reason="tests/simt tells how many tiles are waited for")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_who_reads_what_is_overwritten_is_waited_for(case, monkeypatch):
    """Pixel p takes the place of v's pixel p + reach and of h's pixel p: who reads them is p itself or behind it."""
    _, (_, tiles, readers) = watched(case, monkeypatch)
    _, height, width = case[0]
    reach = case[3].get("kernel", 3) // 2
    row = width + reach
    taps = [dy * row + dx for dy in range(-reach, 1) for dx in range(-reach, reach + 1)]
    for p in range(height * row):
        of_v, of_h = ([p + reach - tap for tap in taps], [p + dx for dx in range(reach + 1)])
        seen = [q // 16 for q in of_v + of_h if q < 16 * tiles]
        assert p // 16 <= min(seen) and max(seen) <= p // 16 + readers


def test_what_it_has_no_room_for():
    def limits(image=(1, 28, 28), params=1, shared=227 << 10, **options):
        return resident.limits(GatedPixelCNN(2, (params, *image[1:]), image[0], **options), shared)

    paper = {key: value for key, value in PAPER_PIXELCNN.items() if key != "name"}
    assert limits(**paper) is None and limits(params=256, maps=16) is None
    assert limits(**{key: value for key, value in R64.items() if key != "name"}) == (
        "accepted: 16 or 32 maps, at most 512 params of a pixel"
    )
    assert "at most 512 params" in limits(params=513, maps=32)
    assert limits((1, 8, 8), maps=32) == "got 64 pixels; accepted: at least 192"
    needed = resident.shared_memory(GatedPixelCNN(2, (1, 28, 28), **paper))
    assert limits(shared=needed, **paper) is None
    assert limits(shared=needed - 1, **paper) == (
        f"an image needs {needed} bytes of shared memory, accepted here: at most {needed - 1}"
    )
    for options in ({"variant": "infovae2017"}, {"condition": "spatial"}):
        assert "variant 'gated'" in limits(maps=32, **options)
    assert limits(maps=32, backend="reference") == "got backends ['reference']; accepted: 'auto', 'cuda'"
    assert "data_channels 1" in limits((3, 16, 16), 3, data_channels=3, maps=15)


def test_where_it_runs():
    model, z, x = network(*CASES[6])
    with torch.no_grad():
        assert (resident.reason(model, z, x) is None) == ON_GPU
        with torch.autograd.forward_ad.dual_level():
            assert resident.reason(model, z, x) == "there are no derivatives"
    assert resident.reason(model, z, x) == "there are no derivatives"


def test_its_numbers_are_those_of_the_layers():
    model, z, x = network(*CASES[6])
    single = copy.deepcopy(model).float()
    of = resident.dtype_of
    assert of(model, z, x) == torch.bfloat16 and of(single, z.float(), x.float()) == torch.float32
    assert of(model, z, x.float()) is None and of(single, z, x) is None
    with torch.autocast(DEVICE, torch.bfloat16):
        assert of(single, z.float(), x) == torch.bfloat16 and of(single, z.double(), x) is None


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_decoder_takes_it_where_no_gradient_is_wanted(monkeypatch):
    calls = []
    leaf = resident.leaf
    monkeypatch.setattr(resident, "leaf", lambda *inputs: calls.append(inputs) or leaf(*inputs))
    vae = InfoVAE.from_config((1, 28, 28), 3, decoder=PAPER_PIXELCNN | {"layers": 3}).cuda().eval()
    x = torch.rand(4, 1, 28, 28, device="cuda").round()

    def estimate():
        torch.manual_seed(1)
        return vae.log_likelihood(x, 64, chunk=16, proposal="prior").log_likelihood

    exact = estimate()
    assert not calls
    with torch.autocast("cuda", torch.bfloat16):
        found = estimate()
        assert len(calls) == 4
        torch.testing.assert_close(found, exact, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0)
        vae.loss(x).loss.backward()
    assert len(calls) == 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_compiles_almost_without_spilling(architecture, tmp_path):
    said = ptxas(simt.SOURCES[0], architecture, tmp_path)
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", said)]
    assert len(spilled) == 4 and max(spilled) <= 256, said
