"""Few training images: does the ELBO over-estimate the variance of q(z), and does MMD-VAE do better?

The question of section 5.1 of Zhao, Song and Ermon (arXiv 1706.02262v3), asked of real 8x8 digits instead of MNIST.
ELBO-VAE and MMD-VAE train the same networks for as many steps on training sets of several sizes; then

    log det Cov[q(z)],   z ~ q(z|x), x from the training or the test set,

is compared with that of the prior N(0, I), which is 0.

    python -m infovae_fast.reproduce.small_data --out demo

trains into OUT/runs and writes OUT/report.html. Started again, it keeps the runs that are finished and continues those
that are not.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from infovae_fast.pictures import OBJECTIVES, figure_png
from infovae_fast.report import Picture, Run, Section, number, table
from infovae_fast.reproduce.runs import Experiment, cell, run_experiment

SIZES, SEEDS, STEPS, BATCH = (100, 400, 1437), (0, 1), 1000, 100
QUICK: dict[str, Any] = {"sizes": (100, 200), "seeds": (0,), "steps": 4}
COMPARED: dict[str, dict[str, Any]] = {"elbo": {}, "mmd_vae": {"lambda_": 500.0}}
MLP: dict[str, Any] = {"name": "mlp", "hidden": [256, 256]}
COMMON = {"data": "digits", "latent_dim": 2, "encoder": MLP, "decoder": MLP, "likelihood": "gaussian"}
COMMON |= {"batch_size": BATCH, "lr": 1e-3}
TITLE = "ELBO-VAE and MMD-VAE on few digits"
CLAIM = "the ELBO makes q(z) wider than the prior, and MMD-VAE stays closer to it"
SHOWN = {  # heading in the table, digits after the point
    ("train", "log_det_covariance"): ("log det Cov[q(z)]\ntraining set", 2),
    ("test", "log_det_covariance"): ("log det Cov[q(z)]\ntest set", 2),
    ("train", "full_set_mmd"): ("MMD²(q(z), p(z))\ntraining set", 4),
    ("test", "log_likelihood"): ("log p(x)\ntest set", 1),
    ("test", "effective_samples"): ("effective\nsamples", 1),
}


def plan(out: Path, sizes: Sequence[int] = SIZES, seeds: Sequence[int] = SEEDS, steps: int = STEPS) -> list[Any]:
    """The arguments of `train` for every run; the steps are rounded to whole epochs."""
    runs = []
    for seed in seeds:
        for size in sizes:
            epochs = max(1, round(steps / (size // BATCH)))
            # An epoch can be one step: a validation and a checkpoint after each would cost more than the training.
            length = {"epochs": epochs, "evaluate_every": max(1, epochs // 20)}
            for preset, options in COMPARED.items():
                run = {
                    "preset": preset,
                    "train_size": size,
                    "seed": seed,
                    "out": str(out / f"{preset}-{size}-seed{seed}"),
                }
                runs.append(COMMON | options | length | run)
    return runs


def comparison(runs: list[Run]) -> Section:
    """What came out, as a sentence, a picture and a table."""
    sizes = sorted({run.train_size for run in runs})
    groups = {
        (size, preset): [run for run in runs if (run.train_size, run.config["preset"]) == (size, preset)]
        for size in sizes
        for preset in COMPARED
    }
    values = {
        group: {key: [run.metrics[key[0]][key[1]] for run in members] for key in SHOWN}
        for group, members in groups.items()
    }
    log_det = {size: [values[size, preset]["train", "log_det_covariance"] for preset in COMPARED] for size in sizes}
    rows = [
        [str(size), OBJECTIVES[preset][0], *(cell(values[size, preset][key], SHOWN[key][1]) for key in SHOWN)]
        for size, preset in values
    ]
    header = ["training\nimages", "objective", *(heading for heading, _ in SHOWN.values())]
    text = f"<p>{html.escape(_experiment(runs))}</p>\n<p><b>{html.escape(verdict(log_det))}</b></p>\n"
    text += table(header, rows) + '<p class="note">Means over the seeds, in brackets the value for each seed.</p>\n'
    png = figure_png((6, 4.3), lambda figure: _plot(figure.subplots(), sizes, values))
    numbers = [
        {"train_images": size, "preset": preset, "seeds": [run.config["seed"] for run in groups[size, preset]]}
        | {f"{part}_{name}": numbers for (part, name), numbers in of_group.items()}
        for (size, preset), of_group in values.items()
    ]
    picture = Picture(
        "comparison", "log det Cov[q(z)] by number of training images: mean, lowest and highest of the seeds", png
    )
    return Section(
        "The width of q(z) on few images", text, [picture], {"comparison": numbers, "verdict": verdict(log_det)}
    )


def verdict(log_det: dict[int, list[list[float]]]) -> str:
    """What log det Cov[q(z)] of the training set, {images: [ELBO's of the seeds, MMD's]}, says of the paper's claim."""
    first, *more = ((size, [mean(seeds) for seeds in both]) for size, both in log_det.items())
    texts = [f"{_signed(first[1][0])} (ELBO-VAE) and {_signed(first[1][1])} (MMD-VAE) with {first[0]} images"]
    texts += [f"{_signed(elbo)} and {_signed(mmd)} with {size}" for size, (elbo, mmd) in more]
    holds = {size: mean(elbo) > 0 and mean(map(abs, mmd)) < mean(elbo) for size, (elbo, mmd) in log_det.items()}
    true, false = (", ".join(str(size) for size in holds if holds[size] is value) for value in (True, False))
    if not false:
        result = f"In these runs, as in the paper, {CLAIM}, at every size."
    elif not true:
        result = f"This contradicts the paper's claim that {CLAIM}."
    else:
        result = f"The paper's claim that {CLAIM}, holds here with {true} images, but not with {false}."
    return f"log det Cov is 0 for the prior; for q(z) of the training set it is {', '.join(texts)}. {result}"


def _experiment(runs: list[Run]) -> str:
    config, objectives = runs[0].config, {run.config["preset"]: run.model.objective for run in runs}
    steps = [run.config["epochs"] * (run.train_size // BATCH) for run in runs]
    length = " to ".join(f"{n:,}" for n in sorted({min(steps), max(steps)}))
    weights = "; ".join(f"{OBJECTIVES[name][0]} α = {o.alpha:g}, λ = {o.lambda_:g}" for name, o in objectives.items())
    return (
        "Section 5.1 of the paper claims that on few images the ELBO over-estimates the variance of q(z), since it "
        "pushes the posteriors of different images apart, and that MMD-VAE does not. Here both train the same networks "
        f"(MLPs with hidden layers of {' and '.join(map(str, MLP['hidden']))}, z of {config['latent_dim']} dimensions, "
        f"p(x|z) Gaussian with a learned deviation for each pixel) on 8x8 digits for {length} steps of Adam (learning "
        f"rate {config['lr']:g}, {config['batch_size']} images a step). {weights}, MMD with an RBF kernel of bandwidth "
        "√2. A seed chooses the training images, the first weights and the noise. The paper has MNIST, larger "
        "networks, more steps, and in its text α = 0."
    )


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


def _plot(axes: Any, sizes: list[int], values: dict[tuple[int, str], dict[tuple[str, str], list[float]]]) -> None:
    axes.axhline(0, color="black", linewidth=1)
    axes.annotate("prior", (0.27, 0), xycoords=("axes fraction", "data"), ha="center", va="top")
    sets = {"train": ("training set", "-", "o", "full"), "test": ("test set", ":", "s", "none")}
    for preset in COMPARED:
        name, color = OBJECTIVES[preset]
        for shift, (part, (text, line, marker, fill)) in zip((0.985, 1.015), sets.items(), strict=True):
            seeds = [values[size, preset][part, "log_det_covariance"] for size in sizes]
            x, style = [size * shift for size in sizes], {"color": color, "linestyle": line}  # side by side: bars
            axes.plot(x, list(map(mean, seeds)), marker=marker, fillstyle=fill, label=f"{name}, {text}", **style)
            axes.vlines(x, list(map(min, seeds)), list(map(max, seeds)), color=color, linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel="training images", ylabel="log det Cov[q(z)]  [nats]")
    axes.legend(frameon=False, fontsize=10)


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point."""
    run_experiment(
        argv,
        Experiment(
            "Train ELBO-VAE and MMD-VAE on few and on many digits, and compare them.",
            "demo",
            TITLE,
            plan,
            QUICK,
            comparison,
        ),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in the workers, so that the numbers do not depend on how many there are
    main()
