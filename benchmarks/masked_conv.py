"""Time masked convolutions, a training step, sampling and the mixture likelihood against what people write.

    python -m benchmarks.masked_conv --out benchmarks/results/NAME.jsonl          (--compile adds torch.compile)

On a GPU (--device cuda) batches are larger, layers and steps are timed in float32 without TF32 and in bfloat16, the
backend "triton" stands beside "cuda", which "auto" takes, and ours and the cropped one are replayed as CUDA graphs too,
which no host holds up.

* conv: forward and gradients of one layer, 28x28. "dense" is conv2d(x, weight * mask); "cropped" leaves the rows below
  out (a kernel of r + 1 rows on an image padded above): the fastest plain form. Both channels-last.
* step: forward and backward pass of the decoder R64 (7 gated layers of 64 maps), bits, batch 32; the plain one has
  cropped convolutions, channels-last.
* sample: R64, 28x28 bits. "plain cached" computes every number once, in PyTorch; "naive" is the plain network's time
  for one pass times 784.
* nll: the discretised logistic mixture of PixelCNN++, 10 components, 3x32x32, in both memory layouts of the params;
  "eager" is the reference.

"error" is the largest of outputs and gradients against the reference in float64 on the same inputs, relative to the
largest component. A case where ours is above `LARGEST_ERROR` (a step: ten times that, its many products pass errors
on), and above twice the error of what people write, is not timed; neither is one where samples differ.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.clock import captured, measure
from benchmarks.rows import Inaccurate, Results, options_of
from infovae_fast import Bernoulli, GatedPixelCNN, PixelSampler, discretized_logistic_mixture_nll
from infovae_fast.masked_conv import MaskedConv2d, from_dense, gated, masked_conv2d, to_dense
from infovae_fast.models.pixelcnn import R64

LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
OURS = ("infovae_fast", "triton", "infovae_fast graph")
MOST_DIFFERENT = 0.02  # share of sampled images
ROUNDS = 9

Step = Callable[[], Any]
Where = tuple[str, torch.dtype]  # the device and the type of the numbers


class Implementation(NamedTuple):
    run: Step
    error: float | None = None


def begin() -> None:
    """The same numbers every time; float32 means float32."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # of its convolutions the fastest


def cropped(conv: MaskedConv2d) -> tuple[Tensor, tuple[int, int, int, int]]:
    """The dense kernel without what the window never reads, and the padding (left, right, top, bottom) it needs."""
    dense = to_dense(conv.weight.detach(), **conv.mask._asdict())  # [Cout, Cin, k, k]
    r, dys, dxs = conv.mask.kernel_size // 2, *([t[axis] for t in conv.mask.taps] for axis in (0, 1))
    kernel = dense[:, :, r + min(dys) : r + max(dys) + 1, r + min(dxs) : r + max(dxs) + 1]
    return kernel.contiguous(), (-min(dxs), max(dxs), -min(dys), max(dys))


class Plain(nn.Module):
    """`GatedPixelCNN` (variant "gated", z global) in cropped convolutions: its windows are rectangles."""

    def __init__(self, model: GatedPixelCNN) -> None:
        super().__init__()
        self.model, self.pads = model, []
        weights = []
        for conv in self.convs(model):
            kernel, pad = cropped(conv)
            weights.append(nn.Parameter(kernel.to(memory_format=torch.channels_last)))
            self.pads.append(pad)
        self.weights = nn.ParameterList(weights)

    @staticmethod
    def convs(model: GatedPixelCNN) -> list[MaskedConv2d]:
        layers = [c for layer in model.layers for c in (layer.vertical, layer.link, layer.horizontal, layer.out)]
        return layers + [m for m in model.head if isinstance(m, MaskedConv2d)]

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        convs, number = self.convs(self.model), iter(range(len(self.weights)))

        def conv(f: Tensor) -> Tensor:
            k = next(number)
            return F.conv2d(F.pad(f, self.pads[k]), self.weights[k], convs[k].bias)

        v = h = (2 * x - 1).to(memory_format=torch.channels_last)
        skip: Tensor | float = 0.0
        for layer, (above, beside) in zip(self.model.layers, self.model.conditions(z), strict=True):
            below = conv(v) + above[:, :, None, None]
            link = conv(below)
            o = gated(conv(h) + link + beside[:, :, None, None], "tanh")
            out = conv(o)
            if layer.last:
                skip = skip + out
                break
            step, more = out.chunk(2, 1)
            v, h, skip = gated(below, "tanh"), step if layer.first else h + step, skip + more
        return conv(F.relu(conv(F.relu(skip))))


def conv_case(
    window: str, kernel: int, batch: int, backward: bool, where: Where, channels: int = 64
) -> dict[str, Implementation]:
    begin()
    layer = MaskedConv2d(channels, channels, kernel, window=window, bias=False).to(*where)
    x = torch.randn(batch, channels, 28, 28).to(*where, memory_format=torch.channels_last).requires_grad_(backward)
    upstream = torch.randn_like(x)
    options = layer.mask._asdict()
    dense = to_dense(layer.weight.detach(), **options).to(memory_format=torch.channels_last)
    mask, (kernel_cropped, pad) = (dense != 0).to(dense), cropped(layer)
    kernel_cropped = kernel_cropped.to(memory_format=torch.channels_last)
    r = kernel // 2

    def step(f: Callable[[Tensor, Tensor], Tensor], weight: Tensor, dtype: torch.dtype = where[1]) -> Step:
        image, g = x.detach().to(dtype).requires_grad_(backward), upstream.to(dtype)
        weight = weight.detach().to(dtype).requires_grad_(backward)

        def run() -> Any:
            out = f(image, weight)
            return (out, *torch.autograd.grad(out, (image, weight), g)) if backward else (out,)

        return run

    def ours() -> Step:
        return step(lambda x, w: masked_conv2d(x, w, **options), layer.weight)

    def plain() -> Step:
        return step(lambda x, w: F.conv2d(F.pad(x, pad), w), kernel_cropped)

    steps = {"infovae_fast": ours()}
    if where[0] == "cuda":
        steps["triton"] = step(partial(masked_conv2d, backend="triton", **options), layer.weight)
    steps |= {"dense": step(lambda x, w: F.conv2d(x, w * mask, padding=r), dense), "cropped": plain()}
    if where[0] == "cuda":
        steps |= {"infovae_fast graph": captured(ours()), "cropped graph": captured(plain())}
    compact = {name: [t.detach() for t in run()] for name, run in steps.items()}
    if backward:  # the gradients to weight, as ours
        left, _, top, _ = pad
        height, width = kernel_cropped.shape[2:]
        whole = (r - left, 2 * r + 1 - width - (r - left), r - top, 2 * r + 1 - height - (r - top))
        layout = {name: value for name, value in options.items() if name != "kernel_size"}
        compact["dense"][2] = from_dense(compact["dense"][2], **layout)
        for name in {"cropped", "cropped graph"} & set(compact):
            compact[name][2] = from_dense(F.pad(compact[name][2], whole), **layout)
    truth = step(partial(masked_conv2d, backend="reference", **options), layer.weight, torch.float64)
    return held(f"conv {window} {kernel}", steps, compact, truth(), LARGEST_ERROR[where[1]])


def model(where: Where, backend: str = "auto") -> GatedPixelCNN:
    begin()
    sizes: dict[str, Any] = {k: v for k, v in R64.items() if k != "name"}
    return GatedPixelCNN(10, (1, 28, 28), **sizes, backend=backend).to(*where)


def step_case(batch: int, compiled: bool, where: Where) -> dict[str, Implementation]:
    ours = model(where)
    plain = Plain(ours)
    z, x = torch.randn(batch, 10).to(*where), torch.rand(batch, 1, 28, 28).round().to(*where)

    def step(network: nn.Module) -> Step:
        weights = [p for p in network.parameters() if p.requires_grad]

        def run() -> Any:
            given = z.to(weights[0]), x.to(weights[0])
            loss = F.binary_cross_entropy_with_logits(network(*given), given[1], reduction="sum")
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            # Of the weights that both have, the biases and z's: they hear of every gradient in between.
            return (loss.detach(), *(g for p, g in zip(weights, gradients, strict=True) if id(p) in shared))

        return run

    backends = {name: model(where, name) for name in (("triton",) if where[0] == "cuda" else ())}
    exact, limit = model(where, "reference").double(), LARGEST_ERROR[where[1]]
    every = [p for network in (ours, exact, *backends.values()) for p in network.named_parameters()]
    shared = {id(p) for name, p in every if name.endswith("bias") or name.startswith("condition")}
    found = {"infovae_fast": step(ours), **{name: step(m) for name, m in backends.items()}, "cropped": step(plain)}
    if where[0] == "cuda":  # before autograd meets their leaves
        found |= {f"{name} graph": captured(found[name]) for name in ("infovae_fast", "cropped")}
    found |= {"torch.compile": step(torch.compile(plain))} if compiled else {}
    return held("step R64", found, {name: run() for name, run in found.items()}, step(exact)(), 10 * limit)


def sample_case(batch: int, where: Where) -> dict[str, Implementation]:
    ours = model(where)
    z, likelihood = torch.randn(batch, 10).to(*where), Bernoulli()
    plain, uniforms = Plain(ours), PixelSampler(ours, likelihood).uniforms(batch)

    def cached(backend: str) -> Step:
        return lambda: (
            PixelSampler(ours, likelihood, backend=backend).sample(z, uniforms=uniforms, strategy="cached"),
        )

    x = cached("auto")()[0]

    @torch.no_grad()
    def naive() -> Any:  # one of 784 passes; the samples are right if the last of them gives them again
        return (likelihood.draw(plain(z, x), uniforms),)

    steps = {"infovae_fast": cached("auto"), "plain cached": cached("reference"), "naive": naive}
    for name, run in steps.items():  # a uniform within rounding of its probability changes an image
        if (differ := (run()[0] != x).flatten(1).any(1).float().mean().item()) > MOST_DIFFERENT:
            raise Inaccurate(f"sample R64, batch {batch}: {name} differs in {differ:.0%} of the images: not timed")
    return {name: Implementation(run) for name, run in steps.items()}


def nll_case(layout: torch.memory_format, batch: int, compiled: bool, where: Where) -> dict[str, Implementation]:
    begin()
    params = torch.randn(batch, 100, 32, 32).to(*where, memory_format=layout).requires_grad_()
    x = (torch.randint(256, (batch, 3, 32, 32)) / 255).to(*where)

    def reference(params: Tensor, x: Tensor) -> Tensor:
        return discretized_logistic_mixture_nll(params, x, backend="reference")

    def step(f: Callable[[Tensor, Tensor], Tensor], params: Tensor = params, x: Tensor = x) -> Step:
        def run() -> Any:
            nll = f(params, x)
            return nll.detach(), *torch.autograd.grad(nll.sum(), params)

        return run

    steps = {"infovae_fast": step(discretized_logistic_mixture_nll), "eager": step(reference)}
    if where[0] == "cuda":
        steps |= {f"{name} graph": captured(run) for name, run in steps.items()}
    steps |= {"torch.compile": step(torch.compile(reference))} if compiled else {}
    truth = step(reference, params.detach().double().requires_grad_(), x.double())
    return held("nll", steps, {name: run() for name, run in steps.items()}, truth(), LARGEST_ERROR[where[1]])


def held(
    what: str, steps: dict[str, Step], results: dict[str, Any], truth: Any, limit: float
) -> dict[str, Implementation]:
    """The implementations with their errors, or `Inaccurate`."""
    errors = {name: error(result, truth) for name, result in results.items()}
    allowed = max(limit, *(2 * e for name, e in errors.items() if name not in OURS))
    if wrong := [f"{name} {errors[name]:.1e}" for name in OURS if not errors.get(name, 0.0) <= allowed]:
        every = ", ".join(f"{name} {e:.1e}" for name, e in errors.items())
        raise Inaccurate(f"{what}: error of {', '.join(wrong)}, allowed {allowed:.1e}, of all {every}: not timed")
    return {name: Implementation(run, errors[name]) for name, run in steps.items()}


def error(result: Any, truth: Any) -> float:
    """The largest, relative to the largest component of the same tensor."""
    each = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(result, truth, strict=True)]
    return torch.stack(each).max().item()


def bench(
    what: dict[str, Any], implementations: dict[str, Implementation], scale: dict[str, int], device: str = "cpu"
) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for implementation in implementations.values():
        implementation.run()
    times: dict[str, list[float]] = {name: [] for name in implementations}
    for _ in range(ROUNDS):
        for name, implementation in implementations.items():
            times[name].append(measure(implementation.run, device)[1] * scale.get(name, 1))
    for name, taken in times.items():
        low, *_, high = quantiles(taken, n=5)
        rows[name] = {"median_s": median(taken), "p20_s": low, "p80_s": high, "rounds": ROUNDS}
        if implementations[name].error is not None:
            rows[name]["error"] = implementations[name].error
    return [what | {"implementation": name} | row for name, row in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="also the step and the nll by torch.compile (minutes)")
    parser.add_argument("--only", choices=("conv", "step", "sample", "nll"), help="these cases alone")
    options = options_of(parser)
    device = options.device
    dtypes = (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16)
    layers, step, samples = (64, 32, (1, 16, 128)) if device == "cpu" else (128, 128, (16, 128, 1024))  # batches
    cases: list[tuple[dict[str, Any], Callable[[], dict[str, Implementation]]]] = []

    def add(what: str, n: int, backward: bool, dtype: torch.dtype, case: Callable[..., Any], *args: Any) -> None:
        name = {"op": "masked_conv", "what": what, "n": n, "d": 64, "gradient": backward}
        cases.append((name | {"dtype": str(dtype).removeprefix("torch.")}, partial(case, *args, where=(device, dtype))))

    for dtype in dtypes:
        for window, k in (("B", 7), ("B", 3), ("V", 3), ("H", 3)):
            for backward in (False, True):
                add(f"conv {window} {k}x{k}", layers, backward, dtype, conv_case, window, k, layers, backward)
        add("step R64", step, True, dtype, step_case, step, options.compile)
    for n in samples:
        add("sample R64", n, False, torch.float32, sample_case, n)
    for what, layout in (("nll", torch.contiguous_format), ("nll channels-last", torch.channels_last)):
        add(what, step, True, torch.float32, nll_case, layout, step, options.compile)
        cases[-1][0].update(op="logistic_mixture", d=10)
    results = Results(options)
    for what, case in cases:
        also = ["torch.compile"] if options.compile and what["what"].startswith(("step", "nll")) else []
        if (options.only and not what["what"].startswith(options.only)) or results.has(what, ["infovae_fast", *also]):
            continue
        try:
            rows = bench(what, case(), {"naive": 28 * 28} if what["what"] == "sample R64" else {}, device)
        except Inaccurate as why:
            results.refuse(what["dtype"], why)
            continue
        ours = rows[0]["median_s"]
        for row in rows:
            mode = "forward + gradients" if row["gradient"] else "forward"
            time_taken = f"{row['median_s'] * 1e3:10.3f} ms  {row['median_s'] / ours:7.2f}x"
            name = f"{row['what']:<17} N={row['n']:<4} {row['dtype']:<8} {mode:<20} {row['implementation']:<14}"
            error_found = f"  error {row['error']:.1e}" if "error" in row else ""
            print(f"{name} {time_taken}{error_found}", flush=True)
        results.add(rows)
    sys.exit(results.refused)


if __name__ == "__main__":
    main()
