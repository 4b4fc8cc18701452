"""CUDA graphs compute what the calls they replace do: alone, in training, in the sampler of PixelCNN++."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from infovae_fast import PixelSampler
from infovae_fast.cuda_graph import CudaGraph
from infovae_fast.training import train
from tests.test_pixelcnn_pp import each_model, network
from tests.test_training import SMALL, curve, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_every_call_gives_what_the_function_does():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, device="cuda")

    def run(x):
        layer.zero_grad()
        out = nn.functional.dropout(layer(x)).square().sum()
        out.backward()
        return out.detach()

    graph = CudaGraph(run)
    inputs = [torch.randn(4, 3, device="cuda") for _ in range(8)] + [torch.randn(5, 3, device="cuda") for _ in range(6)]
    found = {}
    for name, call in (("graph", graph), ("function", run)):
        torch.manual_seed(1)
        found[name] = [torch.cat([call(x).view(1), layer.weight.grad.flatten()]) for x in inputs]
    torch.testing.assert_close(found["graph"], found["function"])
    assert len({row[0].item() for row in found["graph"]}) == len(inputs)


def test_weights_may_change_under_autocast():
    layer = nn.Linear(2, 1, bias=False, device="cuda")
    x = torch.ones(1, 2, device="cuda")

    def run():
        with torch.no_grad():
            return layer(x)

    graph = CudaGraph(run)
    for value in range(6):
        nn.init.constant_(layer.weight, value)
        with torch.autocast("cuda", torch.bfloat16):
            assert graph().item() == 2 * value


def test_what_looks_at_numbers_is_refused():
    """In a process of its own: PyTorch's generator stays in the recording that failed."""
    code = "import torch; from infovae_fast.cuda_graph import CudaGraph; x = torch.ones((), device='cuda')\n"
    code += "CudaGraph(torch.Tensor.item, eager=0)(x)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "CUDA error: operation not permitted when stream is capturing" in done.stderr


PIXELS = {"encoder": {"name": "mlp", "hidden": [16], "batch_norm": True}, "binarize": "dynamic"}


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "elbo", "gradient_clip": 1.0},
        {"preset": "stein_vae"},
        {"preset": "wae"},
        {"preset": "aae"},
        {"encoder": "dcgan", "decoder": "dcgan"},
        {"prior": {"name": "gaussian_mixture", "means": [[1.0, 0.0], [-1.0, 0.0]]}},
        {"decoder": {"name": "pixelcnn", "layers": 2, "maps": 8}, **PIXELS},
        {"decoder": {"name": "pixelcnn", "layers": 2, "maps": 8}, "precision": "bf16-mixed", **PIXELS},
        {"decoder": {"name": "pixelcnn", "layers": 2, "maps": 8, "checkpoint_layers": True}, **PIXELS},
        {"decoder": {"name": "pixelcnn_pp", "blocks": 1, "maps": 8}, "gradient_clip": 5.0, **PIXELS},
    ],
    ids=str,
)
def test_training(tmp_path, options):
    """With the same noise and dropout; only the order of sums may differ."""
    curves, states = {}, {}
    for graph in (True, False):
        folder = train(epochs=4, cuda_graph=graph, out=str(tmp_path / str(graph)), **SMALL | options)
        curves[graph] = [list(curve(folder, name).values()) for name in ("train_loss", "val_loss")]
        states[graph] = weights(folder)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if "precision" in options else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.tensor(curves[True]), torch.tensor(curves[False]), **tolerance)
    tolerance["atol"] *= 5  # Adam divides small gradients by their size
    for name, value in states[True].items():
        if value.is_floating_point():
            torch.testing.assert_close(value, states[False][name], **tolerance)


@each_model
@torch.no_grad()
def test_pixels_of_pixelcnn_pp(name):
    for height, width in ((9, 6), (6, 9), (1, 4)):
        model, likelihood, channels = network(name, height, width)
        model = model.cuda()
        z, x = torch.randn(3, 2).cuda().double(), torch.rand(3, channels, height, width).cuda().double()
        truth = model(z, x)
        sampler = PixelSampler(model, likelihood)
        scale = truth.abs().max().item()
        torch.testing.assert_close(sampler.params(z, x), truth, rtol=1e-12, atol=1e-12 * scale)
        drawn = [sampler.sample(z, strategy=strategy) for strategy in ("cached", "naive")]
        torch.testing.assert_close(*drawn, rtol=1e-9, atol=1e-9)
