"""Time whole models: a training step, an epoch, samples, likelihoods.

    python -m benchmarks.models --device cuda --out benchmarks/results/NAME.jsonl

Images of 28x28 bits, latent dimension 10, the encoder of the paper; the weights are random, which time does not see.

* train: MMD-VAE with the decoder R64 (7 gated layers of 64 maps) or the paper's (12 of 32): loss, gradients and a step
  of Adam. On a GPU also as one CUDA graph, and with the decoder in bfloat16.
* epoch: 60,000 images that lie on the GPU, binarised anew, in such steps of R64 as CUDA graphs.
* sample: images of the paper's network, each of their pixels drawn given those before.
* likelihood: N passes of the paper's decoder, in `log_likelihood(proposal="prior")`; the paper's table took 1e8.
* PixelCNN++: a training step (5 x 160) on 3x32x32, and samples; "naive" is its time for one pass times 1,024.

"error" is that of the decoder's params against the reference in float64 with the same weights, relative to the largest;
of samples the share that one pass of the decoder over them would draw otherwise. What is above `LARGEST_ERROR` (of a
whole network ten times that of a layer) or `MOST_DIFFERENT` is not timed, nor training whose loss grows.
"""

import argparse
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.clock import captured, measure
from benchmarks.masked_conv import LARGEST_ERROR, MOST_DIFFERENT
from benchmarks.rows import OURS, Inaccurate, Results, options_of
from infovae_fast import DiscretizedLogisticMixture, InfoVAE, PixelSampler
from infovae_fast.models.networks import PAPER_PIXELCNN_ENCODER
from infovae_fast.models.pixelcnn import PAPER_PIXELCNN, R64
from infovae_fast.models.pixelcnn_pp import PIXELCNN_PP, PixelCNNPlusPlus

DECODERS = {"R64": R64, "paper": PAPER_PIXELCNN}
EPOCH = 60_000  # images
LEARNING = 20  # steps after which the loss must be smaller

Run = Callable[[], Any]
Runs = dict[str, tuple[Run, int, float | None]]  # by name the call, how often it counts, and its error
Case = tuple[dict[str, Any], Callable[[], Runs], int]  # what, the runs, rounds


class Autocast(nn.Module):
    """An encoder whose products are in bfloat16, its weights, sums and normalisation in float32."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.encoder(x)


class InBfloat16(nn.Module):
    """A decoder in bfloat16 before a likelihood in float32."""

    autoregressive = shares_images = True

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder, self.image_shape = decoder.bfloat16(), decoder.image_shape

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.decoder(z.bfloat16(), x.bfloat16()).float()


def model(decoder: str, device: str, dtype: torch.dtype = torch.float32) -> InfoVAE:
    torch.manual_seed(0)
    found = InfoVAE.from_config((1, 28, 28), 10, encoder=PAPER_PIXELCNN_ENCODER, decoder=DECODERS[decoder])
    if dtype != torch.float32:
        found.encoder, found.decoder = Autocast(found.encoder), InBfloat16(found.decoder)
    return found.to(device)


def relative(name: str, found: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    error = ((found - truth).abs().max() / truth.abs().max()).item()
    if not error <= 10 * LARGEST_ERROR[dtype]:
        raise Inaccurate(f"{name}: error {error:.1e}, allowed {10 * LARGEST_ERROR[dtype]:.1e}: not timed")
    return error


@torch.no_grad()
def decoder_error(vae: InfoVAE, decoder: str, dtype: torch.dtype) -> float:
    """Of the params of two images."""
    device = next(vae.parameters()).device
    z, x = torch.randn(2, 10, device=device), torch.rand(2, 1, 28, 28, device=device).round()
    options = DECODERS[decoder] | {"backend": "reference"}
    exact = InfoVAE.from_config((1, 28, 28), 10, decoder=options).decoder.to(device).double()
    exact.load_state_dict(getattr(vae.decoder, "decoder", vae.decoder).state_dict())
    return relative(decoder, vae.decoder(z, x), exact(z.to(dtype).double(), x.double()), dtype)


@torch.no_grad()
def plus_plus_error(decoder: PixelCNNPlusPlus, x: Tensor) -> float:
    """Of the params of two images, without dropout."""
    exact = deepcopy(decoder).double().eval()
    exact.backend = "reference"
    dtype = next(decoder.parameters()).dtype
    error = relative("PixelCNN++", decoder.eval()(None, x[:2].to(dtype)), exact(None, x[:2].double()), dtype)
    decoder.train()
    return error


@torch.no_grad()
def redrawn(sampler: PixelSampler, z: Tensor | None, n: int) -> float:
    """The share of the numbers of n samples that a pass of the decoder over them draws otherwise."""
    x = sampler.sample(z, n, seed=0, strategy="cached")
    again = sampler.likelihood.draw(sampler.decoder(z, x), sampler.uniforms(n))
    if not (found := (again != x).float().mean().item()) <= MOST_DIFFERENT:
        raise Inaccurate(f"samples: {found:.0%} of their numbers are drawn otherwise: not timed")
    return found


def train(module: nn.Module, loss: Callable[[], Tensor], graph: bool) -> Run:
    with torch.no_grad():
        first = loss().item()
    adam = torch.optim.Adam(module.parameters(), 1e-4, fused=True, capturable=graph)

    def step() -> Tensor:
        adam.zero_grad()
        value = loss()
        value.backward()
        adam.step()
        return value.detach()

    run = captured(step) if graph else step
    for _ in range(LEARNING):
        last = run()
    if not last.item() < first:
        raise Inaccurate(f"training: the loss went from {first:g} to {last.item():g}: not timed")
    return run


def graphs(device: str) -> dict[str, bool]:
    return {OURS: False} | ({f"{OURS} graph": True} if device == "cuda" else {})


def train_case(decoder: str, batch: int, device: str, dtype: torch.dtype) -> Runs:
    runs: Runs = {}
    for name, graph in graphs(device).items():
        vae, x = model(decoder, device, dtype), torch.rand(batch, 1, 28, 28, device=device).round()
        error = decoder_error(vae, decoder, dtype)
        runs[name] = train(vae, lambda vae=vae, x=x: vae.loss(x).loss, graph), 1, error
    return runs


def epoch_case(batch: int, images: int, device: str, dtype: torch.dtype) -> Runs:
    vae, grey = model("R64", device, dtype), torch.rand(images, 1, 28, 28, device=device)
    error, x = decoder_error(vae, "R64", dtype), grey[:batch].round()
    step = train(vae, lambda: vae.loss(x).loss, device == "cuda")

    def epoch() -> Any:
        order = torch.randperm(images, device=device)
        for some in order[: images // batch * batch].view(-1, batch):
            x.copy_(torch.bernoulli(grey[some]))
            step()

    return {OURS: (epoch, 1, error)}


def sample_case(n: int, device: str) -> Runs:
    sampler, z = PixelSampler(model("paper", device).eval()), torch.randn(n, 10, device=device)
    return {OURS: (lambda: sampler.sample(z), 1, redrawn(sampler, z[:100], min(n, 100)))}


def likelihood_case(n: int, device: str, dtype: torch.dtype) -> Runs:
    vae, x = model("paper", device, dtype).eval(), torch.rand(100, 1, 28, 28, device=device).round()
    error = decoder_error(vae, "paper", dtype)
    chunk = 20 if dtype == torch.float32 else 100  # where nothing between the layers is in memory
    return {OURS: (lambda: vae.log_likelihood(x, n // len(x), chunk=chunk, proposal="prior"), 1, error)}


def plus_plus(device: str, dtype: torch.dtype) -> tuple[PixelCNNPlusPlus, DiscretizedLogisticMixture]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {key: value for key, value in PIXELCNN_PP.items() if key != "name"}
    likelihood = DiscretizedLogisticMixture()
    decoder = PixelCNNPlusPlus(0, (likelihood.channels(3), 32, 32), 3, **sizes).to(device)
    decoder.initialise(None, torch.rand(16, 3, 32, 32, device=device))
    return decoder.to(dtype), likelihood


def pp_train_case(batch: int, device: str, dtype: torch.dtype) -> Runs:
    runs: Runs = {}
    for name, graph in graphs(device).items():
        decoder, likelihood = plus_plus(device, dtype)
        x = torch.randint(256, (batch, 3, 32, 32), device=device) / 255

        def loss(decoder: Any = decoder, likelihood: Any = likelihood, x: Tensor = x) -> Tensor:
            return likelihood.nll(decoder(None, x.to(dtype)).float(), x).mean()

        error = plus_plus_error(decoder, x)
        runs[name] = train(decoder, loss, graph), 1, error
    return runs


def pp_sample_case(n: int, device: str) -> Runs:
    decoder, likelihood = plus_plus(device, torch.float32)
    sampler, x = PixelSampler(decoder.eval(), likelihood), torch.rand(n, 3, 32, 32, device=device)

    @torch.no_grad()
    def naive() -> Tensor:
        return likelihood.draw(decoder(None, x), sampler.uniforms(n))

    run = partial(sampler.sample, n=n, strategy="cached")
    return {OURS: (run, 1, redrawn(sampler, None, n)), "naive": (naive, 32 * 32, None)}


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


def bench(what: dict[str, Any], runs: Runs, rounds: int, device: str) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run, _, _ in runs.values():
        run()
    for _ in range(rounds):
        for name, (run, repeated, _) in runs.items():
            times[name].append(measure(run, device)[1] * repeated)
    rows = []
    for name, taken in times.items():
        low, *_, high = quantiles(taken, n=5) if len(taken) > 1 else taken * 2
        row = {"implementation": name, "median_s": median(taken), "p20_s": low, "p80_s": high, "rounds": rounds}
        if (error := runs[name][2]) is not None:
            row["error"] = error
        rows.append(what | row)
        case = f"{what['what']:<18} N={what['n']:<6} {what['dtype']:<8}"
        shown = f"  error {row['error']:.1e}" if "error" in row else ""
        print(f"{case} {name:<18} {row['median_s']:10.6f} s{shown}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help="cases with one of these in their name and dtype: train,epoch bfloat16"
    )
    options = options_of(parser)
    torch.backends.cudnn.allow_tf32 = False
    results, every = Results(options), cases(options.device)
    names = [f"{what['what']} {what['dtype']}" for what, _, _ in every]
    chosen = [any(part in name for part in options.only.split(",")) for name in names]
    if not any(chosen):
        parser.error(f"--only: got {options.only!r}; accepted: parts of {', '.join(names)}")
    for what, case, rounds in (case for case, wanted in zip(every, chosen, strict=True) if wanted):
        if results.has(what):
            continue
        try:
            results.add(bench(what, case(), rounds, options.device))
        except Inaccurate as why:
            results.refuse(f"{what['what']} {what['dtype']}", why)
    sys.exit(results.refused)


if __name__ == "__main__":
    main()
