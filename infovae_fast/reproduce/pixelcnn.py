"""A decoder that could do without z: which objectives still put the image into it, and match q(z) to the prior?

The question of section 5.2 of Zhao, Song and Ermon (arXiv 1706.02262v3; figure 6 and table 1), asked of real 8x8 digits
instead of MNIST. A PixelCNN can draw digits by itself. ELBO-VAE, MMD-VAE, Stein-VAE, an adversarial autoencoder and one
that nothing ties to the prior train the same networks; then

    I_q(x; z)                   nats that a code tells of its image
    error of an SVM             of test images, on codes z ~ q(z|x), by 100 labels
    MMD^2(q(z), p(z))           unbiased, of the training set
    log det Cov[q(z)]           0 is right
    KL(c || c^)                 c the shares of the ten digits in the training set, c^ among 1,000 generated images
    log p(x)                    of the test set

    python -m infovae_fast.reproduce.pixelcnn --out pixelcnn

trains into OUT/runs and writes OUT/report.html; see `runs` for what happens when it is started again.
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

SEEDS, EPOCHS = (0, 1), 100
QUICK: dict[str, Any] = {"seeds": (0,), "epochs": 1, "train_size": 200}
COMPARED: dict[str, dict[str, Any]] = {
    "elbo": {},
    "mmd_vae": {"lambda_": 1000.0},
    "stein_vae": {"lambda_": 1000.0},
    "aae": {"lambda_": 100.0},
    "unregularized": {},
}
COMMON: dict[str, Any] = {
    "data": "digits",
    "latent_dim": 5,
    "encoder": {"name": "mlp", "hidden": [256, 256], "batch_norm": True},
    "decoder": {"name": "pixelcnn", "layers": 5, "maps": 32},
    "likelihood": "bernoulli",
    "binarize": "dynamic",
    "batch_size": 100,
    "lr": 1e-3,
}
TITLE = "InfoVAE with a PixelCNN on digits"
SHOWN = {  # heading in the table, digits after the point
    ("train", "mutual_information"): ("I(x; z)\ntraining set", 2),
    ("test", "svm_error"): ("SVM error\n100 labels", 2),
    ("train", "full_set_mmd"): ("MMD²(q(z), p(z))\ntraining set", 4),
    ("train", "log_det_covariance"): ("log det Cov[q(z)]\ntraining set", 2),
    ("generated", "class_divergence"): ("classes\nKL(c ‖ ĉ)", 3),
    ("test", "log_likelihood"): ("log p(x)\ntest set", 1),
    ("test", "effective_samples"): ("effective\nsamples", 1),
}
NOTE = """<p class="note">Means over the seeds, in brackets the value for each seed. The classes of generated images
are told by a classifier that errs on {:.0f} % of the test set. log p(x) is estimated by importance sampling, which is
far too low where the effective number of samples is near 1.</p>
"""
EXPERIMENT = """Section 5.2 of the paper claims that with a PixelCNN as decoder the ELBO leaves z unused, since the
decoder needs none to draw digits, and that MMD-VAE and Stein-VAE use it and keep q(z) at the prior. Here all
objectives train the same networks (encoder: an MLP with hidden layers of {hidden} and batch normalisation; a gated
PixelCNN of {layers} layers of {maps} maps; z of {latent_dim} dimensions) on 8x8 digits, binarised anew for every
batch, for {epochs} epochs of Adam (learning rate {lr:g}, {batch_size} images a step). {weights}. A seed chooses the
first weights and the noise. The paper has MNIST and 12 layers; in its authors' code the ELBO's KL weighs 784 / D times
what it weighs in the ELBO, and the adversary is WGAN-GP."""


def plan(
    out: Path, seeds: Sequence[int] = SEEDS, epochs: int = EPOCHS, train_size: int | None = None
) -> list[dict[str, Any]]:
    """The arguments of `train` for every run."""
    length = {"epochs": epochs, "evaluate_every": max(1, epochs // 20), "train_size": train_size}
    return [
        COMMON | options | length | {"preset": preset, "seed": seed, "out": str(out / f"{preset}-seed{seed}")}
        for seed in seeds
        for preset, options in COMPARED.items()
    ]


def comparison(runs: list[Run]) -> Section:
    """What came out, as sentences, a picture and a table."""
    groups = {preset: [run for run in runs if run.config["preset"] == preset] for preset in COMPARED}
    values = {
        preset: {key: [run.metrics[key[0]][key[1]] for run in members] for key in SHOWN}
        for preset, members in groups.items()
    }
    rows = [
        [OBJECTIVES[preset][0], *(cell(values[preset][key], SHOWN[key][1]) for key in SHOWN)] for preset in COMPARED
    ]
    found = verdict(values)
    wrong = mean(run.metrics["generated"]["classifier_error"] for run in runs)
    text = f"<p>{html.escape(_experiment(runs))}</p>\n<p><b>{html.escape(found)}</b></p>\n"
    text += table(["objective", *(heading for heading, _ in SHOWN.values())], rows)
    text += NOTE.format(100 * wrong)
    numbers = [
        {"preset": preset, "seeds": [run.config["seed"] for run in groups[preset]]}
        | {f"{part}_{name}": some for (part, name), some in of_group.items()}
        for preset, of_group in values.items()
    ]
    png = figure_png((9, 4.6), lambda figure: _plot(figure, values))
    picture = Picture("comparison", "Each objective, a dot for each seed", png)
    return Section("Who uses z?", text, [picture], {"comparison": numbers, "verdict": found})


Values = dict[str, dict[tuple[str, str], list[float]]]


def verdict(values: Values) -> str:
    """What the numbers say of the paper's claims."""
    information = {preset: mean(of[("train", "mutual_information")]) for preset, of in values.items()}
    error = {preset: mean(of[("test", "svm_error")]) for preset, of in values.items()}
    far = {  # q(z) from the prior
        "MMD²": {preset: mean(of[("train", "full_set_mmd")]) for preset, of in values.items()},
        "log det Cov": {preset: mean(map(abs, of[("train", "log_det_covariance")])) for preset, of in values.items()},
    }
    told = ", ".join(f"{number(information[p])} ({OBJECTIVES[p][0]})" for p in ("elbo", "mmd_vae", "stein_vae"))
    wrong = ", ".join(f"{number(error[p])} ({OBJECTIVES[p][0]})" for p in ("elbo", "mmd_vae", "stein_vae"))
    used = all(information[p] > information["elbo"] and error[p] < error["elbo"] for p in ("mmd_vae", "stein_vae"))
    matched = " and ".join(
        f"{'holds' if max(by['mmd_vae'], by['stein_vae']) < by['aae'] else 'fails'} here by {name}"
        for name, by in far.items()
    )
    return (
        f"Of its image a code tells {told} nats; an SVM on the codes errs on {wrong} of the test images. That "
        f"{'agrees with' if used else 'contradicts'} the paper's claim that the ELBO lets a PixelCNN do without z, "
        "where MMD-VAE and Stein-VAE put the image into it. Its claim that these match q(z) to the prior better than "
        f"an adversary does {matched}."
    )


def _experiment(runs: list[Run]) -> str:
    config, objectives = runs[0].config, {run.config["preset"]: run.model.objective for run in runs}
    weights = "; ".join(f"{OBJECTIVES[name][0]} α = {o.alpha:g}, λ = {o.lambda_:g}" for name, o in objectives.items())
    hidden = " and ".join(map(str, config["encoder"]["hidden"]))
    return EXPERIMENT.format(**config | config["decoder"] | {"hidden": hidden, "weights": weights}).replace("\n", " ")


def _plot(figure: Any, values: Values) -> None:
    panels = figure.subplots(1, 4, sharey=True)
    keys = [key for key in SHOWN if key[1] in ("mutual_information", "svm_error", "full_set_mmd", "log_det_covariance")]
    for axes, key in zip(panels, keys, strict=True):
        for row, (preset, of) in enumerate(values.items()):
            axes.plot(of[key], [row] * len(of[key]), "o", color=OBJECTIVES[preset][1])
        axes.set_title(SHOWN[key][0], fontsize=10)
        axes.grid(axis="y", color="#dddddd")
        axes.margins(x=0.15)
        if key[1] in ("full_set_mmd", "log_det_covariance"):
            axes.axvline(0, color="black", linewidth=1)
            if key[1] == "full_set_mmd":
                axes.set_xscale("symlog", linthresh=0.01)
                axes.set(xlim=(-0.01, max(0.5, 2 * max(max(of[key]) for of in values.values()))))
                axes.set_xticks([0, 0.01, 0.1], ["0", "0.01", "0.1"])
                axes.minorticks_off()
        else:
            axes.set_xlim(left=0)
    panels[0].set_yticks(range(len(values)), [OBJECTIVES[preset][0] for preset in values])
    panels[0].invert_yaxis()


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point."""
    description = "Train the InfoVAE family with a PixelCNN as decoder on digits, and compare what z holds."
    run_experiment(argv, Experiment(description, "pixelcnn", TITLE, plan, QUICK, comparison))


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in the workers, so that the numbers do not depend on how many there are
    main()
