"""The Triton kernels of `pairwise`: in the interpreter without a GPU, and compiled for GPUs that are not here."""

import itertools

import pytest
import torch

from infovae_fast import IMQ, RBF, RationalQuadratic
from infovae_fast.pairwise import leaf_scales, pairwise_reference
from tests.conftest import ARCHITECTURES, compile_ahead, launch_ahead
from tests.oracle import check, near, pairwise_scales

kernels = pytest.importorskip("infovae_fast.kernels.pairwise")
products = kernels.products
SETTINGS = kernels.tile, kernels.DEPTH  # before the other tests' larger ones


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "tile", SETTINGS[0])
    monkeypatch.setattr(kernels, "DEPTH", SETTINGS[1])


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = [RBF(), RBF([0.5, 3.0]), IMQ(), RationalQuadratic(alpha=2.5), RationalQuadratic(alpha=1e6)]
WEIGHTS = (0.7, -0.4, 0.3)
BAR = 3e-6  # of float32, as in tests/test_mmd.py: the largest error by the largest component


def clouds(n, m, d, dtype=torch.float32, batch=()):
    torch.manual_seed(n + 7 * m + 31 * d)
    return [(torch.randn(*batch, k, d, dtype=dtype) * s + 3).to(DEVICE) for k, s in ((n, 1), (m, 1.5), (n, 1))]


def run(x, y=None, v=None, a=None, b=None, kernel=KERNELS[0], energy=True, force=(True, False), potentials=False):
    settings = (*leaf_scales(kernel.at(x.shape[-1])), WEIGHTS)
    return kernels.pairwise(x, y, v, a, b, *settings, energy, *force, potentials)


def meets_the_rule(x, y, v, kernel):
    E, F, *_ = run(x, y, v, kernel=kernel)
    truth = pairwise_reference(x.double(), y.double(), None if v is None else v.double(), kernel, WEIGHTS, True, True)
    if x.dtype == torch.float64:
        near(E.cpu(), truth[0].cpu())
        near(F.cpu(), truth[1].cpu())
        return
    yardstick = pairwise_reference(x, y, v, kernel, WEIGHTS, True, True)
    scale = pairwise_scales(x, y, v, kernel, WEIGHTS)
    check(E, truth[0], yardstick[0], scale[0], torch.float32)
    check(F, truth[1], yardstick[1], scale[1])


@pytest.mark.parametrize("kernel", KERNELS, ids=range(len(KERNELS)))
@pytest.mark.parametrize("d", [1, 4, 5, 17, 80, 150])
def test_it_meets_the_rule(d, kernel):
    for n, m in ((1, 1), (66, 31)):
        for dtype in (torch.float32, torch.float64) if d in (4, 17) else (torch.float32,):
            x, y, v = clouds(n, m, d, dtype)
            for velocity in (None, v):
                meets_the_rule(x, y, velocity, kernel)


@pytest.mark.parametrize("kernel", KERNELS, ids=range(len(KERNELS)))
def test_it_meets_the_rule_without_cublas(kernel, monkeypatch):
    monkeypatch.setattr(products, "AVAILABLE", False)
    x, y, v = clouds(66, 31, 80)
    meets_the_rule(x, y, v, kernel)


def small_tiles(monkeypatch):
    """Several of everything: targets, sources split at once, tiles of them, clouds at once."""
    monkeypatch.setattr(products, "TARGETS", 128)
    monkeypatch.setattr(products, "SOURCES", 64)


HARD = {  # what is done to the first cloud, and the bandwidth
    "far from the origin": (lambda x: x + 100, 20.0),
    "very far from the origin": (lambda x: x + 1e4, 20.0),
    "one point far away": (lambda x: torch.cat([x[:1] + 1e4 * 20, x[1:]]), 20.0),
    "one point, one coordinate": (lambda x: x * torch.eye(len(x), 1).to(x) * 1e4 + x, 20.0),
    "exp(-50) at most": (lambda x: x, 1.2),
    "coordinates of all sizes": (lambda x: x * torch.logspace(-12, 1, x.shape[1]).to(x), 2.0),
    "points of all sizes": (lambda x: x * torch.logspace(-12, 1, len(x)).to(x)[:, None], 20.0),
    "equal points": (lambda x: x[:1].expand_as(x).contiguous(), 20.0),
    "tiny": (lambda x: x * 1e-15, 20e-15),
    "large": (lambda x: x * 1e12, 20e12),
}


@pytest.mark.parametrize("kernel", [RBF, IMQ])
@pytest.mark.parametrize("how", HARD)
def test_products_meet_the_rule(how, kernel, monkeypatch):
    small_tiles(monkeypatch)
    change, bandwidth = HARD[how]
    x, y, v = clouds(130, 70, 130)
    x, y = change(torch.cat([x, y])).split([130, 70])
    meets_the_rule(x.contiguous(), y.contiguous(), v, kernel(bandwidth))
    meets_the_rule(x.contiguous(), y.contiguous(), None, kernel([bandwidth / 3, bandwidth]))


def test_products_of_hundreds_of_coordinates():
    x, y, v = clouds(70, 40, 600)
    meets_the_rule(x, y, v, RBF())
    meets_the_rule(x, y, None, RationalQuadratic([10.0, 30.0], alpha=2.5))


def test_a_power_of_two_grows_with_g(monkeypatch):
    """The nearest sources come last, and are e^60 times what came before."""
    small_tiles(monkeypatch)
    x, y, v = clouds(70, 200, 40)
    y = x[:1] + (y - 3) * torch.linspace(1.6, 0.1, 200).to(x)[:, None]
    x = x[:1] + (x - 3) * torch.linspace(1.6, 0.1, 70).to(x)[:, None]
    for velocity in (None, v):
        meets_the_rule(x, y, velocity, RBF(0.8))


def test_products_in_many_tiles_are_one(monkeypatch):
    x, y, v = clouds(150, 140, 40, batch=(3,))
    a, b = torch.rand(3, 150).to(DEVICE), (torch.rand(3, 140) - 0.3).to(DEVICE)
    cases = [
        ((x, y, v, None, None), (True, True), False),
        ((x, y, None, a, b), (False, True), True),
        ((x, y, None, a, b), (False, False), False),
    ]
    whole = [run(*given, kernel=IMQ(), force=force, potentials=p) for given, force, p in cases]
    small_tiles(monkeypatch)
    monkeypatch.setattr(products, "TARGETS", 300)  # two clouds at once
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN
    parts = [run(*given, kernel=IMQ(), force=force, potentials=p) for given, force, p in cases]
    torch.use_deterministic_algorithms(False)
    for one, other in zip(itertools.chain(*whole), itertools.chain(*parts), strict=True):
        assert one.shape == other.shape
        assert not one.numel() or (one - other).abs().max() <= 1e-6 * one.abs().max()


def test_where_tf32_is_allowed_one_product_will_do(monkeypatch):
    x, y, v = clouds(70, 90, 130)
    truth = pairwise_reference(x.double(), y.double(), v.double(), RBF(), WEIGHTS, True, True)
    monkeypatch.setattr(products, "tf32_allowed", lambda: True)
    for out, exact in zip(run(x, y, v), truth, strict=False):
        error = ((out - exact).abs().max() / exact.abs().max()).item()
        assert 1e-7 < error < 2**-10, error


@pytest.mark.parametrize("weighted", [True, False])
def test_every_combination_of_outputs_and_weights(weighted):
    x, y, _ = clouds(70, 90, 6, torch.float64)
    a, b = torch.rand(70).double().to(DEVICE), (torch.rand(90).double() - 0.3).to(DEVICE)
    a, b = (a, b) if weighted else (None, None)
    leaves = [t.requires_grad_() for t in (x, y, a, b) if t is not None]
    E, _ = pairwise_reference(x, y, None, IMQ(1.3), WEIGHTS, True, False, a, b)
    truth = dict(zip("xyab", (g / 2 for g in torch.autograd.grad(E, leaves)), strict=False))
    inputs = [None if t is None else t.detach() for t in (x, y, None, a, b)]
    for energy, fx, fy, p in itertools.product([True, False], repeat=4):
        out = run(*inputs, kernel=IMQ(1.3), energy=energy, force=(fx, fy), potentials=p)
        wanted = (energy, fx, fy, p and weighted, p and weighted)
        for got, there, exact in zip(out, wanted, (E, *(truth.get(k) for k in "xyab")), strict=True):
            if there:
                near(got.cpu(), exact.detach().cpu())
        assert [t.numel() > 0 for t in out] == [energy, fx, fy, p, p]


def test_several_segments_and_groups_are_one(monkeypatch):
    x, y, v = clouds(100, 300, 9, torch.float64)
    whole = run(x, y, v)
    monkeypatch.setattr(kernels, "GROUP", 64)
    monkeypatch.setattr(kernels, "PROGRAMS", 10**6)
    for one, other in zip(whole, run(x, y, v), strict=True):
        near(one.cpu(), other.cpu()) if one.numel() else None


def test_a_batch_is_each_cloud():
    x, y, v = clouds(40, 30, 4, torch.float64, batch=(2, 3))
    E, F, *_ = run(x, y, v)
    for i, j in itertools.product(range(2), range(3)):
        one = run(x[i, j], y[i, j], v[i, j])
        near(E[i, j].cpu(), one[0].cpu())
        near(F[i, j].cpu(), one[1].cpu())


def test_bandwidths_in_memory():
    x, y, _ = clouds(40, 30, 4)
    given, in_memory = run(x, y, kernel=RBF([0.5, 2.0])), run(x, y, kernel=RBF(torch.tensor([0.5, 2.0], device=DEVICE)))
    assert all(torch.equal(one, other) for one, other in zip(given, in_memory, strict=True))
    for strided in (torch.tensor([[0.5, 9.0], [2.0, 9.0]])[:, 0], torch.tensor([0.5, 9.0, 2.0])[::2]):
        again = run(x, y, kernel=RBF(strided.to(DEVICE)))
        assert all(torch.equal(one, other) for one, other in zip(again, in_memory, strict=True))


def test_no_clouds():
    x, y, _ = clouds(5, 4, 3, batch=(0,))
    assert [t.shape for t in run(x, y, force=(True, True), potentials=True)] == [(0,), x.shape, y.shape, (0, 5), (0, 4)]
    assert run(x, y, energy=False, force=(False, True))[0].shape == (0,)


@pytest.mark.parametrize("d", [4, 40])
def test_velocities_of_weighted_points(d):
    """The force on point i times its weight, as in csrc/pairwise.h."""
    x, _, v = clouds(50, 1, d)
    a = torch.rand(50, device=DEVICE) + 0.5
    phi = RBF(1.0).at(d).phi((x[:, None] - x).double().square().sum(-1)).fill_diagonal_(0)
    F = run(x, None, v, a, kernel=RBF(1.0))[1]
    pulls = run(x, None, None, a, kernel=RBF(1.0))[1]
    moved = a[:, None] * (phi @ v.double())
    assert (F - pulls - moved).abs().max() <= BAR * torch.stack([F, pulls]).abs().max()


def test_nan_stays_visible():
    for kernel, d in itertools.product(KERNELS, (5, 130)):
        x, y, _ = clouds(66, 31, d)
        x[7, 1] = torch.nan
        E, F, *_ = run(x, y, kernel=kernel)
        assert E.isnan() and F.isnan().all()


def test_schema_and_fake():
    x, y, _ = clouds(9, 5, 3)
    args = (x, y, None, None, None, True, [1.0], None, [1.0], 1.0, list(WEIGHTS), True, True, True, False)
    torch.library.opcheck(torch.ops.infovae_fast.pairwise_triton.default, args)


CASES = [  # padded dimension and kernel
    (16, {}), (16, {"DIRECT": 1}), (16, {"DIRECT": 4}), (16, {"KIND": "rq", "SCALES": 7, "ALPHA": 2.5}), (32, {}),
    (80, {}), (128, {}), (512, {}), (80, {"FORCE": False, "UPPER": True}), (80, {"KIND": "rq", "SCALES": 7}),
]  # fmt: skip


@pytest.mark.parametrize("with_v", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_it_compiles_without_spilling(dtype, with_v):
    samples = dict.fromkeys(["u", "h", "sources", "source_h", "source_a", "source_v"], f"*{dtype}")
    wide = dict.fromkeys(["bandwidth", "weight", "A_out", "G_out", "S_out", "V_out"], "*fp64")
    cases = []
    for dp, more in CASES if dtype == "fp32" else CASES[2:6]:
        if with_v and "FORCE" in more:
            continue
        tile = kernels.tile(dp, {"fp32": 4, "fp64": 8}[dtype], with_v)
        constants = {
            "DP": dp, "DC": tile.columns, "DK": kernels.DEPTH, "BM": tile.targets, "BN": tile.sources,
            "GROUP": kernels.GROUP, "SCALES": 1, "KIND": "rbf", "ALPHA": 1.0,
            "PRECISION": "tf32x3" if dtype == "fp32" else "ieee", "DIRECT": 0, "SAME": True, "UPPER": False,
            "FORCE": True, "WITH_V": with_v,
        } | more  # fmt: skip
        sizes = {"n": "i32", "m": "i32", "segment": "i32"}
        launch = {"num_warps": tile.warps, "num_stages": tile.stages}
        cases.append(samples | wide | sizes | {name: [value] for name, value in constants.items()} | launch)
    found = compile_ahead("infovae_fast.kernels.pairwise", "pairwise_kernel", cases)
    for case, resources in zip((case for case in cases for _ in ARCHITECTURES), found, strict=True):
        assert resources["stack"] == resources["local"] == 0, (case, resources)
        assert resources["shared"] <= 96 * 1024, (case, resources)


def test_the_preparation_compiles_without_spilling():
    pointers = dict.fromkeys(["z", "weights", "v", "u", "h", "a", "v_padded"], "*fp32") | {"centre": "*fp64"}
    order = ["z", "weights", "v", "centre", "u", "h", "a", "v_padded"]
    constants = {"D": 80, "DP": 80, "COLUMNS": 128, "BLOCK": 32, "WEIGHTED": True, "WITH_V": True}
    case = {name: pointers[name] for name in order} | {"n": "i32", "padded_n": "i32"}
    found = compile_ahead("infovae_fast.kernels.pairwise", "prepare", [case | {k: [c] for k, c in constants.items()}])
    assert all(resources["stack"] == resources["local"] == 0 for resources in found), found


def test_what_is_launched_for_products_compiles_without_spilling():
    found = launch_ahead("""import torch
from infovae_fast import IMQ, RBF, RationalQuadratic
from infovae_fast.kernels.pairwise import pairwise
from infovae_fast.pairwise import leaf_scales
def launch(n, m, d, kernel, moved, *wanted):
    x, y, a, b = torch.randn(n, d), torch.randn(m, d), torch.rand(n), torch.rand(m)
    v, a, b = torch.randn(n, d) if moved else None, *([a, b] if wanted[-1] else [None, None])
    pairwise(x, y, v, a, b, *leaf_scales(kernel.at(d)), [0.1, 0.2, 0.3], *wanted)
launch(1100, 1100, 512, RBF(), False, True, True, False, False)
launch(1100, 70, 512, RBF(), True, False, True, False, False)
launch(1100, 1100, 128, RationalQuadratic([1.0, 2.0, 3.0], alpha=2.5), False, True, False, True, True)
launch(1, 100, 80, IMQ([0.5] * 7), True, True, False, False, False)""")
    assert {resources["sm"] for resources in found} == set(ARCHITECTURES)
    assert {resources["kernel"] for resources in found} == {"split_kernel", "radial_kernel", "force_kernel"}
    for resources in found:
        assert resources["stack"] == resources["local"] == 0, resources
