"""The report of finished runs, in one folder:

    report.html     one page that needs nothing else: its pictures are embedded, it has no scripts and loads nothing
    *.png           the same pictures
    metrics.json    every number of the page (null where it is infinite or none), with the settings, seeds and versions
                    that belong to it

Every file appears whole or not at all, report.html last.
"""

import base64
import html
import json
import math
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infovae_fast import __version__
from infovae_fast.backends import best_device
from infovae_fast.data import ImageData, some_places, to_unit
from infovae_fast.evaluation import encode_all, summarize
from infovae_fast.evaluation.summary import GENERATED, KNOWN_LABELS
from infovae_fast.files import check_writable, write_bytes
from infovae_fast.likelihoods import Bernoulli
from infovae_fast.models import InfoVAE, PixelSampler, StandardNormal
from infovae_fast.models.networks import like
from infovae_fast.pictures import (
    OBJECTIVES,
    image_grid,
    image_png,
    latent_png,
    loss_curves,
    losses_png,
    save_png,
)
from infovae_fast.training import read_run, run_data, without_inf, write_json

__all__ = ["Picture", "Run", "Section", "image_grid", "save_png", "table", "write_report"]

METRICS = {  # heading in a table, digits after the point
    "reconstruction": ("−log p(x|z)", 2),
    "kl": ("KL(q(z|x)\n‖ p(z))", 2),
    "log_det_covariance": ("log det\nCov[q(z)]", 2),
    "full_set_mmd": ("MMD²(q(z),\np(z))", 4),
    "mutual_information": ("I(x; z)", 2),
}
CLASSES = {  # of images with labels
    ("test", "svm_error"): ("SVM\nerror", 2),
    ("generated", "class_divergence"): ("classes\nKL(c ‖ ĉ)", 3),
}
LIKELIHOOD = ("log_likelihood", "log_likelihood_standard_error")
CODES = 2000  # shown of a latent space: more hide each other
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 0 auto; padding: 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1.2rem }
.formula { text-align: center; font-family: serif; font-size: 1.1rem } .note, details { color: #555; font-size: .85rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .82rem; margin: 1rem 0 }
th, td { white-space: pre; padding: .3rem .45rem; border-bottom: 1px solid #ddd; text-align: right }
td { vertical-align: top; font-variant-numeric: tabular-nums }
:is(th, td):first-child { text-align: left; padding-left: 0 }
.gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem }
figure { margin: 0; max-width: 46rem } figcaption { font-weight: 600; font-size: .9rem; margin-bottom: .3rem }
img { display: block; width: 100% } .pixels { image-rendering: pixelated }
"""
INTRODUCTION = """<p>A variational autoencoder learns an encoder <i>q(z|x)</i>, a decoder <i>p(x|z)</i> and with them a
distribution of codes: <i>q(z)</i>, the mean of <i>q(z|x)</i> over the images, which should match the prior <i>p(z)</i>.
The InfoVAE family (Zhao, Song and Ermon, arXiv 1706.02262) trains them to maximise</p>
<p class="formula"><i>E</i><sub><i>q</i></sub> log <i>p(x|z)</i> − (1 − <i>α</i>) <i>E</i> KL(<i>q(z|x)</i> ‖
<i>p(z)</i>) − (<i>α</i> + <i>λ</i> − 1) <i>D</i>(<i>q(z)</i> ‖ <i>p(z)</i>) &emsp;(Eq. 6)</p>
<p>with any divergence <i>D</i>. <i>α</i> = 0 and <i>λ</i> = 1 give the ELBO of the usual VAE, <i>α</i> = 1 with the
maximum mean discrepancy as <i>D</i> the MMD-VAE.</p>"""
NOTE = """<p class="note">Upper numbers are for the training set, lower ones for the test set; nats per image. log det
Cov[q(z)] of codes z ~ q(z|x) is 0 where q(z) is as wide as a prior N(0, I), positive where it is wider. MMD² is
unbiased, between one code for each image and as many draws from the prior. I(x; z), from the images of its set, is at
most the logarithm of their number: {ceilings}. log p(x) is estimated by importance sampling
with {n_samples} draws from q(z|x), on average a lower bound, ± the standard error of its mean over the images; it is
far too low where the effective number of samples (the median over the images) is near 1.{grey}</p>"""
CLASS_NOTE = f"""<p class="note">SVM error: the share of test images that a support vector machine on their codes gets
wrong, by {KNOWN_LABELS} labels of the training set. KL(c ‖ ĉ), in nats: c the shares of the classes in the training
set, ĉ among {GENERATED:,} generated images as a classifier tells them; a perfect model has (classes − 1) /
{2 * GENERATED:,} on average, and more where the classifier errs.</p>"""
GREY = """ Runs on grey values with a Bernoulli decoder have cross-entropies in place of −log p(x|z), and what is made
of them is no log-likelihood: such runs compare with each other only."""


@dataclass(frozen=True)
class Run:
    """A finished run and its metrics."""

    folder: Path
    config: dict[str, Any]
    model: InfoVAE
    data: ImageData
    metrics: dict[str, Any]

    @property
    def train_size(self) -> int:
        return len(self.data.train_images)

    @property
    def label(self) -> str:
        name, objective = OBJECTIVES[self.config["preset"]][0], self.model.objective
        weight = f" (λ = {objective.lambda_:g})" if objective.divergence_weight else ""
        return f"{name}{weight}, {self.train_size} images, seed {self.config['seed']}"


class Picture(NamedTuple):
    name: str  # of the file, without .png
    caption: str
    png: bytes
    pixels: bool = False  # a browser enlarges it without smoothing


class Section(NamedTuple):
    """A part of the page: HTML, then pictures. `numbers` go to metrics.json."""

    title: str
    html: str
    pictures: Sequence[Picture] = ()
    numbers: dict[str, Any] | None = None


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    title: str = "InfoVAE: training runs",
    n_samples: int = 100,
    opening: Callable[[list[Run]], Section] | None = None,
) -> Path:
    """Compute all metrics of finished runs and write the report into the folder `out`.

    Args:
        runs: folders of the runs. Of those that differ in the seed alone, the first one is shown in pictures.
        title: heading of the page.
        n_samples: importance samples for the log-likelihood of each test image.
        opening: makes a section that comes first, from the runs.

    Returns:
        the path of report.html.

    Raises:
        ValueError: no runs. FileNotFoundError: a run is missing or not finished. OSError: `out` cannot be written.
    """
    if isinstance(runs, str | Path) or not runs:
        raise ValueError(f"runs: got {runs!r}; accepted: a list of folders, as infovae-fast train writes them")
    configs, out = [_finished(Path(folder)) for folder in runs], Path(out)  # all, before the long computation
    check_writable(out / "report.html")
    opened = [_open(Path(folder), config, n_samples) for folder, config in zip(runs, configs, strict=True)]
    shown = _shown(opened)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sections = [opening(opened)] if opening is not None else []
        sections.append(_table_of_runs(opened, n_samples))
        sections += [_reconstructions(shown), _samples(shown)]
        if drawn := {name: run for name, run in shown.items() if run.model.autoregressive}:
            sections.append(_inpainting(drawn))
        sections += [_latent_spaces(shown), _losses(shown)]
    versions = {"infovae_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}
    numbers: dict[str, Any] = {"versions": versions, "runs": [_numbers(run) for run in opened]}
    for section in sections:
        numbers |= section.numbers or {}
        for picture in section.pictures:
            write_bytes(out / f"{picture.name}.png", picture.png)
    write_json(out / "metrics.json", without_inf(numbers))
    write_bytes(out / "report.html", _page(title, sections, numbers["versions"]).encode())
    return out / "report.html"


def _finished(folder: Path) -> dict[str, Any]:
    config = read_run(folder)
    if not (folder / "model" / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has not finished; continue it with infovae-fast train --resume {folder}")
    return config


def _open(folder: Path, config: dict[str, Any], n_samples: int) -> Run:
    model, data = InfoVAE.from_pretrained(folder / "model"), run_data(config)
    metrics = summarize(model.to(best_device()), data, n_samples=n_samples)  # nearly all of the time
    return Run(folder, config, model.cpu(), data, metrics)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of plain text."""
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    return '<div class="scroll"><table>\n<tr>' + "</tr>\n<tr>".join([head, *lines]) + "</tr>\n</table></div>\n"


def number(value: float | None, digits: int = 2) -> str:
    """A number as the report shows it; a dash where there is none."""
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")  # no -0.00


def _shown(runs: list[Run]) -> dict[str, Run]:
    """The runs for the pictures, by a part of a file name; those with the same data and latent space together."""
    alike: dict[str, Run] = {}
    for run in runs:
        alike.setdefault(json.dumps(run.config | {"seed": 0, "out": ""}), run)
    named: dict[str, Run] = {}
    for run in sorted(alike.values(), key=lambda run: (run.data.name, run.model.latent_dim, run.train_size)):
        name = re.sub(r"[^\w.-]+", "-", run.folder.resolve().name)
        while name in named:
            name += "-2"
        named[name] = run
    return named


def _numbers(run: Run) -> dict[str, Any]:
    objective = run.model.objective
    weights = {"alpha": objective.alpha, "lambda": objective.lambda_, "divergence": objective.divergence_name}
    return {"run": str(run.folder), "label": run.label, **weights, "settings": run.config, **run.metrics}


def _table_of_runs(runs: list[Run], n_samples: int) -> Section:
    def cells(run: Run) -> list[str]:
        objective, train, test = run.model.objective, run.metrics["train"], run.metrics["test"]
        return [
            OBJECTIVES[run.config["preset"]][0],
            f"{run.train_size} {run.data.name}",
            *(f"{value:g}" for value in (run.model.latent_dim, objective.alpha, objective.lambda_)),
            str(run.config["seed"]),
            "train\ntest",
            *(f"{number(train[name], digits)}\n{number(test[name], digits)}" for name, (_, digits) in METRICS.items()),
            "\n" + " ± ".join(number(test[name], 1) for name in LIKELIHOOD if test[name] is not None),
            "\n" + number(test["effective_samples"], 1),
            *(
                "\n" + number(run.metrics.get(part, {}).get(name), digits)
                for (part, name), (_, digits) in classes.items()
            ),
        ]

    labelled = any("generated" in run.metrics for run in runs)
    classes = CLASSES if labelled else {}

    header = ["objective", "training\nimages", "dim\nz", "α", "λ", "seed", ""]
    header += [*(name for name, _ in METRICS.values()), "log p(x)", "effective\nsamples"]
    header += [name for name, _ in classes.values()]
    settings = [[f"{key} {json.dumps(value)}" for key, value in run.config.items() if key != "out"] for run in runs]
    common = [text for text in settings[0] if all(text in others for others in settings)]
    lines = [f"All runs: {', '.join(common)}."]
    for run, texts in zip(runs, settings, strict=True):
        lines.append(f"{run.folder}: {', '.join(text for text in texts if text not in common)}")
    items = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    details = f"<details><summary>Settings of the runs</summary>{items}</details>"
    sizes = sorted({run.metrics[part]["images"] for run in runs for part in ("train", "test")})
    ceilings = ", ".join(f"{math.log(size):.2f} of {size:,}" for size in sizes)
    grey = GREY * any(isinstance(run.model.likelihood, Bernoulli) and run.data.levels > 2 for run in runs)
    note = NOTE.format(n_samples=n_samples, ceilings=ceilings, grey=grey) + CLASS_NOTE * labelled
    return Section("All runs", table(header, map(cells, runs)) + note + details)


def _gallery(kind: str, shown: dict[str, Run], draw: Callable[[Run], bytes], pixels: bool = False) -> list[Picture]:
    """A picture of each run, which does not depend on what else is shown."""
    labels, pictures = [run.label for run in shown.values()], []
    for name, run in shown.items():
        torch.manual_seed(0)
        title = run.label + f" ({name})" * (labels.count(run.label) > 1)
        pictures.append(Picture(f"{kind}-{name}", title, draw(run), pixels))
    return pictures


PIXELWISE = """ A PixelCNN draws pixel by pixel: shown is the mean of each pixel given the ones that were drawn before
it."""


def _test_images(run: Run) -> Tensor:
    """Up to ten images of the test set: one each of as many classes as there are, or the first."""
    images, labels = run.data.test_images, run.data.test_labels
    one_each = [] if labels is None else [int((labels == label).nonzero()[0]) for label in labels.unique()]
    some = images[one_each[:10]] if len(one_each) > 1 else images[:10]
    return to_unit(some, run.data.levels).to(like(run.model.encoder))


def _pixelwise(shown: dict[str, Run]) -> str:
    return PIXELWISE * any(run.model.autoregressive for run in shown.values())


def _reconstructions(shown: dict[str, Run]) -> Section:
    def draw(run: Run) -> bytes:
        x = _test_images(run)
        return image_png(image_grid(torch.cat([x, run.model.reconstruct(x)]), columns=len(x)))

    text = "<p>Above: images of the test set. Below each: the mean of p(x|z) at the mean of q(z|x)."
    text += _pixelwise(shown) + "</p>"
    return Section("Reconstructions", text, _gallery("reconstructions", shown, draw, pixels=True))


def _samples(shown: dict[str, Run]) -> Section:
    text = f"<p>The mean of p(x|z) for each of 60 codes z drawn from the prior.{_pixelwise(shown)}</p>"
    pictures = _gallery("samples", shown, lambda run: image_png(image_grid(run.model.sample(60), 12)), pixels=True)
    return Section("Samples from the prior", text, pictures)


def _inpainting(drawn: dict[str, Run]) -> Section:
    def draw(run: Run) -> bytes:
        x, model = _test_images(run), run.model
        mask = torch.zeros(x.shape[1:], dtype=torch.bool)
        mask[:, : x.shape[2] // 2] = True
        codes = model.encode(x).mu, model.prior.sample(len(x))
        completed = [PixelSampler(model).sample(z, known=x, known_mask=mask[None], seed=0) for z in codes]
        return image_png(image_grid(torch.cat([x, *completed]), columns=len(x)))

    text = """<p>Above: images of the test set. Below each, its upper half was given and the lower one drawn pixel by
pixel from p(x|z): with the code of the whole image, the mean of q(z|x), then with a code drawn from the prior, so that
only the pixels above tell what is to come.</p>"""
    return Section("In-painting", text, _gallery("inpainting", drawn, draw, pixels=True))


def _latent_spaces(shown: dict[str, Run]) -> Section:
    codes, priors, limits = {}, {}, dict[int, float]()
    for run in shown.values():
        torch.manual_seed(0)
        dim, prior = run.model.latent_dim, run.model.prior
        images = run.data.test_images
        x = to_unit(images[some_places(len(images), CODES)], run.data.levels).to(like(run.model.encoder))
        z = encode_all(run.model, x)[1]
        axes = (
            torch.eye(dim) if dim <= 2 else torch.linalg.eigh(torch.cov(z.T, correction=0)).eigenvectors.flip(1)[:, :2]
        )
        codes[run.folder] = z @ axes
        priors[run.folder] = None if isinstance(prior, StandardNormal) else prior.sample(CODES) @ axes
        # The same frame for all latent spaces of one dimension, so that one sees which q(z) is wider.
        for points in (codes[run.folder], priors[run.folder]):
            reach = 3.4 if points is None else points.abs().quantile(0.995).item()  # 3.4: to see three deviations
            limits[dim] = max(reach, limits.get(dim, 0))

    def draw(run: Run) -> bytes:
        dim, labels = run.model.latent_dim, run.data.test_labels
        labels = None if labels is None else labels[some_places(len(labels), CODES)]
        names = ("z₁", "z₂") if dim == 2 else ("principal axis 1", "principal axis 2")
        return latent_png(codes[run.folder], labels, priors[run.folder], limits[dim], names)

    text = f"""<p>One code z ~ q(z|x) for each image of the test set, or for {CODES:,} of more, drawn as the
number of its class. Circles: 1, 2 and 3 standard deviations of the prior N(0, I); draws from any other prior are grey.
More than two dimensions are seen along the first two principal axes of the codes. In each map at most 0.5 % of the
coordinates are outside the frame.</p>"""
    return Section("Latent space", text, _gallery("latent", shown, draw))


def _losses(shown: dict[str, Run]) -> Section:
    def draw(run: Run) -> bytes:
        return losses_png(loss_curves(run.folder), OBJECTIVES[run.config["preset"]][1])

    text = "<p>The loss and the terms of Eq. 6 that it is made of, each without its weight.</p>"
    return Section("Loss curves", text, _gallery("losses", shown, draw))


def _page(title: str, sections: Sequence[Section], versions: dict[str, str]) -> str:
    def figure(picture: Picture) -> str:
        source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
        caption, css = html.escape(picture.caption), ' class="pixels"' if picture.pixels else ""
        return f'<figure><figcaption>{caption}</figcaption><img{css} alt="{caption}" src="{source}"></figure>'

    made_with, body = ", ".join(f"{name} {version}" for name, version in versions.items()), ""
    for section in sections:
        pictures = "\n".join(map(figure, section.pictures))
        body += f'<h2>{html.escape(section.title)}</h2>\n{section.html}\n<div class="gallery">\n{pictures}\n</div>\n'
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
{INTRODUCTION}
{body}
<p class="note">{html.escape(made_with)}. Beside this page: all numbers in metrics.json, all pictures as PNG files.</p>
</body>
</html>
"""
