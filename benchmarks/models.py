"""Time whole models: a training step, an epoch, samples, likelihoods.

    python -m benchmarks.models --device cuda --out benchmarks/results/NAME.jsonl

Images of 28x28 bits, latent dimension 10, the encoder of the paper; the weights are random, which time does not see.

* train: MMD-VAE with the decoder R64 (7 gated layers of 64 maps) or the paper's (12 of 32): loss, gradients and a step
  of Adam. On a GPU also as one CUDA graph, and with the decoder in bfloat16.
* epoch: 60,000 images that lie on the GPU, binarised anew, in such steps of R64 as CUDA graphs.
* sample: images of the paper's network, each of their pixels drawn given those before.
* likelihood: N passes of the paper's decoder, in `log_likelihood(proposal="prior")`; the paper's table took 1e8.
* PixelCNN++: a training step (5 x 160) on 3x32x32, and samples; "naive" is its time for one pass times 1,024.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.clock import captured, machine, measure
from infovae_fast import DiscretizedLogisticMixture, InfoVAE, PixelSampler
from infovae_fast.models.networks import PAPER_PIXELCNN_ENCODER
from infovae_fast.models.pixelcnn import PAPER_PIXELCNN, R64
from infovae_fast.models.pixelcnn_pp import PIXELCNN_PP, PixelCNNPlusPlus

OURS = "infovae_fast"
DECODERS = {"R64": R64, "paper": PAPER_PIXELCNN}
EPOCH = 60_000  # images

Run = Callable[[], Any]
Case = tuple[dict[str, Any], Callable[[], dict[str, tuple[Run, int]]], int]  # what, {name: (call, times)}, rounds


class InBfloat16(nn.Module):
    """A decoder in bfloat16 between an encoder and a likelihood in float32."""

    autoregressive = True

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder, self.image_shape = decoder.bfloat16(), decoder.image_shape

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.decoder(z.bfloat16(), x.bfloat16()).float()


def model(decoder: str, device: str, dtype: torch.dtype = torch.float32) -> InfoVAE:
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    found = InfoVAE.from_config((1, 28, 28), 10, encoder=PAPER_PIXELCNN_ENCODER, decoder=DECODERS[decoder])
    if dtype != torch.float32:
        found.decoder = InBfloat16(found.decoder)
    return found.to(device)


def train(module: nn.Module, loss: Callable[[], Tensor], graph: bool) -> Run:
    adam = torch.optim.Adam(module.parameters(), 1e-4, fused=True, capturable=graph)

    def step() -> Tensor:
        adam.zero_grad()
        value = loss()
        value.backward()
        adam.step()
        return value.detach()

    return captured(step) if graph else step


def graphs(device: str) -> dict[str, bool]:
    return {OURS: False} | ({f"{OURS} graph": True} if device == "cuda" else {})


def train_case(decoder: str, batch: int, device: str, dtype: torch.dtype) -> dict[str, tuple[Run, int]]:
    runs = {}
    for name, graph in graphs(device).items():
        vae, x = model(decoder, device, dtype), torch.rand(batch, 1, 28, 28, device=device).round()
        runs[name] = train(vae, lambda vae=vae, x=x: vae.loss(x).loss, graph), 1
    return runs


def epoch_case(batch: int, images: int, device: str, dtype: torch.dtype) -> dict[str, tuple[Run, int]]:
    vae, grey = model("R64", device, dtype), torch.rand(images, 1, 28, 28, device=device)
    x = grey[:batch].round()
    step = train(vae, lambda: vae.loss(x).loss, device == "cuda")

    def epoch() -> Any:
        order = torch.randperm(images, device=device)
        for some in order[: images // batch * batch].view(-1, batch):
            x.copy_(torch.bernoulli(grey[some]))
            step()

    return {OURS: (epoch, 1)}


def sample_case(n: int, device: str) -> dict[str, tuple[Run, int]]:
    sampler, z = PixelSampler(model("paper", device).eval()), torch.randn(n, 10, device=device)
    return {OURS: (lambda: sampler.sample(z), 1)}


def likelihood_case(n: int, device: str, dtype: torch.dtype) -> dict[str, tuple[Run, int]]:
    vae, x = model("paper", device, dtype).eval(), torch.rand(100, 1, 28, 28, device=device).round()
    return {OURS: (lambda: vae.log_likelihood(x, n // len(x), chunk=20, proposal="prior"), 1)}


def plus_plus(device: str, dtype: torch.dtype) -> tuple[PixelCNNPlusPlus, DiscretizedLogisticMixture]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {key: value for key, value in PIXELCNN_PP.items() if key != "name"}
    likelihood = DiscretizedLogisticMixture()
    decoder = PixelCNNPlusPlus(0, (likelihood.channels(3), 32, 32), 3, **sizes).to(device)
    decoder.initialise(None, torch.rand(16, 3, 32, 32, device=device))
    return decoder.to(dtype), likelihood


def pp_train_case(batch: int, device: str, dtype: torch.dtype) -> dict[str, tuple[Run, int]]:
    runs = {}
    for name, graph in graphs(device).items():
        decoder, likelihood = plus_plus(device, dtype)
        x = torch.randint(256, (batch, 3, 32, 32), device=device) / 255

        def loss(decoder: Any = decoder, likelihood: Any = likelihood, x: Tensor = x) -> Tensor:
            return likelihood.nll(decoder(None, x.to(dtype)).float(), x).mean()

        runs[name] = train(decoder, loss, graph), 1
    return runs


def pp_sample_case(n: int, device: str) -> dict[str, tuple[Run, int]]:
    decoder, likelihood = plus_plus(device, torch.float32)
    sampler, x = PixelSampler(decoder.eval(), likelihood), torch.rand(n, 3, 32, 32, device=device)

    @torch.no_grad()
    def naive() -> Tensor:
        return likelihood.draw(decoder(None, x), sampler.uniforms(n))

    return {OURS: (lambda: sampler.sample(n=n, strategy="cached"), 1), "naive": (naive, 32 * 32)}


def cases(device: str) -> list[Case]:
    large = device == "cuda"
    dtypes = (torch.float32, torch.bfloat16) if large else (torch.float32,)
    found: list[Case] = []

    def add(what: str, n: int, case: Callable[..., Any], *args: Any, rounds: int = 9, **more: Any) -> None:
        gradient, dtype = what.split()[-1] in ("train", "epoch"), str(more.get("dtype", torch.float32))
        names = {"op": "models", "what": what, "n": n, "d": 10, "gradient": gradient, "dtype": dtype.split(".")[1]}
        found.append((names, partial(case, *args, device=device, **more), rounds))

    for dtype in dtypes:
        for decoder, batch in (("paper", 100), ("R64", 128)) if large else (("paper", 8), ("R64", 8)):
            add(f"{decoder} train", batch, train_case, decoder, batch, dtype=dtype)
        images, batch = (EPOCH, 128) if large else (64, 8)
        add("R64 epoch", images, epoch_case, batch, images, rounds=3, dtype=dtype)
        passes = 100_000 if large else 2_000
        add("paper likelihood", passes, likelihood_case, passes, rounds=3, dtype=dtype)
    for n in (100, 10_000) if large else (16,):
        add("paper sample", n, sample_case, n, rounds=3)
    batch, n = (64, 16) if large else (1, 1)
    add("PixelCNN++ train", batch, pp_train_case, batch, dtype=dtypes[-1], rounds=3)
    add("PixelCNN++ sample", n, pp_sample_case, n, rounds=1)
    return found


def bench(what: dict[str, Any], runs: dict[str, tuple[Run, int]], rounds: int, device: str) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run, _ in runs.values():
        run()
    for _ in range(rounds):
        for name, (run, repeated) in runs.items():
            times[name].append(measure(run, device)[1] * repeated)
    rows = []
    for name, taken in times.items():
        low, *_, high = quantiles(taken, n=5) if len(taken) > 1 else taken * 2
        row = {"implementation": name, "median_s": median(taken), "p20_s": low, "p80_s": high, "rounds": rounds}
        rows.append(what | row)
        case = f"{what['what']:<18} N={what['n']:<6} {what['dtype']:<8}"
        print(f"{case} {name:<18} {row['median_s']:10.6f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines to this file")
    parser.add_argument("--only", default="", help="cases with this in their name: train, epoch, sample, ...")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    for what, case, rounds in cases(options.device):
        if options.only not in what["what"]:
            continue
        rows = bench(what, case(), rounds, options.device)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.write("".join(json.dumps(row | machine(options.device)) + "\n" for row in rows))


if __name__ == "__main__":
    main()
