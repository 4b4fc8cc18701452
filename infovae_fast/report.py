"""The report of finished runs, in one folder:

    report.html     one page that needs nothing else: its pictures are embedded, it has no scripts and loads nothing
    *.png           the same pictures
    metrics.json    every number of the page with the settings, seeds and versions that belong to it

Every file appears whole or not at all, report.html last.
"""

import base64
import csv
import html
import io
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import infovae_fast
from infovae_fast.data import ImageData, to_unit
from infovae_fast.evaluation import encode_all, summarize
from infovae_fast.models import InfoVAE, StandardNormal
from infovae_fast.training import read_run, run_data, write_json

NAMES = {
    "elbo": "ELBO-VAE",
    "beta_vae": "beta-VAE",
    "mmd_vae": "MMD-VAE",
    "stein_vae": "Stein-VAE",
    "aae": "adversarial autoencoder",
    "wae": "WAE-MMD",
    "unregularized": "unregularised autoencoder",
}
# Okabe and Ito's palette: told apart by readers with any kind of colour vision. One colour an objective, everywhere.
COLORS = dict(zip(NAMES, ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#555555"), strict=True))
# Petroff's ten colours (arXiv 2107.02270), made for the same readers; classes are also told apart by their markers.
CLASS_COLORS = "#3f90da #bd1f01 #832db6 #e76300 #717581 #a96b59 #ffa90e #94a4a2 #b9ac70 #92dadd".split()
TERMS = {
    "loss": "loss [nats per image]",
    "reconstruction": "reconstruction, −log p(x|z) [nats per image]",
    "kl": "KL(q(z|x) ‖ p(z)) [nats per image]",
    "mmd": "MMD² of a batch",
    "stein_surrogate": "Stein surrogate (not a divergence)",
    "adversarial_js": "critic's Jensen-Shannon estimate",
    "wasserstein": "critic's Wasserstein estimate",
}
SHOWN = 2000  # points of a latent space: more hide each other
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 0 auto; padding: 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem }
.formula { text-align: center; font-family: serif; font-size: 1.1rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: bottom }
td { white-space: nowrap } th:first-child, td:first-child { text-align: left; padding-left: 0 }
.gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem }
figure { margin: 0 } figcaption { font-weight: 600; font-size: .9rem; margin-bottom: .3rem }
img { width: 100%; height: auto } img.pixels { image-rendering: pixelated }
.note { color: #555; font-size: .85rem } details { font-size: .85rem }
"""
EXPLANATION = """
<p>A variational autoencoder learns an encoder <i>q(z|x)</i>, a decoder <i>p(x|z)</i>, and with them a distribution of
codes <i>q(z)</i>, the mean of <i>q(z|x)</i> over the images, which should match the prior <i>p(z)</i>. The InfoVAE
family (Zhao, Song and Ermon, arXiv 1706.02262) trains them to maximise</p>
<p class="formula"><i>E</i><sub><i>q</i></sub>[log <i>p(x|z)</i>] − (1 − α) <i>E</i> KL(<i>q(z|x)</i> ‖ <i>p(z)</i>) −
(α + λ − 1) <i>D</i>(<i>q(z)</i> ‖ <i>p(z)</i>) &emsp; (Eq. 6)</p>
<p>with any divergence <i>D</i>. α = 0, λ = 1 is the ELBO; α = 1 with MMD as <i>D</i> is the MMD-VAE.</p>
"""
COLUMNS_NOTE = """<p class="note">Where a cell has two numbers, the first is for the training set and the second for the
test set. Nats per image; log det Cov[q(z)] is 0 where q(z) is as wide as N(0, I), positive where it is wider; MMD² is
unbiased, between one code for each image and as many draws from the prior. The log-likelihood is an
importance-sampling estimate, a lower bound on average, with the standard error of the mean over the test images; where
the effective number of samples is near 1 it is far too low.</p>"""


@dataclass(frozen=True)
class Run:
    """A finished run and its metrics."""

    folder: Path
    config: dict[str, Any]
    model: InfoVAE
    data: ImageData
    metrics: dict[str, Any]

    @property
    def label(self) -> str:
        weight = self.model.objective.divergence_weight
        name = NAMES[self.config["preset"]] + (f" (λ = {self.model.objective.lambda_:g})" if weight else "")
        return f"{name}, {len(self.data.train_images)} images, seed {self.config['seed']}"


class Picture(NamedTuple):
    """A file of the report, `name`.png."""

    name: str
    caption: str
    png: bytes
    pixels: bool = False  # enlarge it without smoothing


class Section(NamedTuple):
    """A part of the report: HTML, then pictures. `numbers` goes to metrics.json."""

    title: str
    html: str
    pictures: Sequence[Picture] = ()
    numbers: dict[str, Any] | None = None


def image_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Images [n, C, H, W] side by side, row by row, [C, H', W']: clipped to [0, 1], one white pixel between them.

    Args:
        columns: images in a row; default as square as can be.
    """
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"images: got shape {tuple(images.shape)}; accepted: [n, C, H, W], not empty")
    n, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns: got {columns}; accepted: 1 or more")
    rows = math.ceil(n / columns)
    cells = images.new_ones(rows * columns, channels, height + 1, width + 1)
    cells[:n, :, :-1, :-1] = images.clamp(0, 1)
    grid = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)
    return grid[:, :-1, :-1]


def image_png(image: Tensor) -> bytes:
    """A PNG of an image [1 or 3, H, W] in [0, 1]; small ones are enlarged by a whole factor to about 640 pixels."""
    from PIL import Image

    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image: got shape {tuple(image.shape)}; accepted: [1 or 3, H, W]")
    factor = max(1, round(640 / max(image.shape[1:])))
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(1, 2, 0).squeeze(2)
    content = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(content, "PNG")
    return content.getvalue()


def save_png(path: str | Path, image: Tensor) -> None:
    """Writes an image [1 or 3, H, W] in [0, 1] as a PNG, whole or not at all; see `image_png`."""
    _write(Path(path), image_png(image))


def figure_png(size: tuple[float, float], draw: Callable[[Any], None]) -> bytes:
    """A PNG of the matplotlib figure, `size` in inches, that `draw(figure)` fills."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
    content = io.BytesIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(content, format="png", dpi=160)
    return content.getvalue()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of plain text."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def number(value: float | None, digits: int = 2) -> str:
    """A number as the report shows it; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def read_run_folder(folder: str | Path) -> Run:
    """A finished run, with its metrics computed anew.

    Raises:
        FileNotFoundError: there is no run, or it has not finished. ValueError: a file is damaged.
    """
    folder = Path(folder)
    config = read_run(folder)
    if not (folder / "model" / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: the run has not finished; continue it with infovae-fast train --resume {folder}"
        )
    model, data = InfoVAE.from_pretrained(folder / "model"), run_data(config)
    return Run(folder, config, model, data, summarize(model, data))


def loss_curves(folder: str | Path) -> dict[str, dict[int, tuple[int, float]]]:
    """{"train_loss": {step: (epoch, value)}, ...} from logs/version_*/metrics.csv of a run.

    A run that was killed and resumed has several versions, whose steps overlap: the later version counts.
    """
    curves: dict[str, dict[int, tuple[int, float]]] = {}
    versions = Path(folder).glob("logs/version_*/metrics.csv")
    for path in sorted(versions, key=lambda path: int(path.parent.name.removeprefix("version_"))):
        lines = path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
        for row in csv.DictReader(whole):
            for name, value in row.items():
                if value and name not in ("epoch", "step"):
                    curves.setdefault(name, {})[int(row["step"])] = int(row["epoch"]), float(value)
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    title: str = "InfoVAE: a report of training runs",
    opening: Callable[[list[Run]], Section] | None = None,
) -> Path:
    """Compute all metrics of finished runs and write the report into the folder `out`.

    Args:
        runs: folders of the runs. Of runs that differ in the seed alone, the first one is shown in pictures.
        title: heading of the page.
        opening: makes a section that comes first, from the runs.

    Returns:
        the path of report.html.

    Raises:
        ValueError: no runs. FileNotFoundError: a run is missing or not finished.
    """
    if isinstance(runs, str | Path) or not runs:
        raise ValueError(f"runs: got {runs!r}; accepted: a list of folders, as infovae-fast train writes them")
    opened = [read_run_folder(folder) for folder in runs]
    shown = list({json.dumps(run.config | {"seed": 0, "out": ""}): run for run in reversed(opened)}.values())[::-1]
    names = _names(shown)
    sections = [opening(opened)] if opening is not None else []
    sections += [_runs_section(opened), _reconstructions(names), _samples(names), _latent_spaces(names), _losses(names)]
    numbers: dict[str, Any] = {"versions": _versions(), "runs": [_numbers(run) for run in opened]}
    for section in sections:
        numbers |= section.numbers or {}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for picture in (picture for section in sections for picture in section.pictures):
        _write(out / f"{picture.name}.png", picture.png)
    write_json(out / "metrics.json", numbers)
    _write(out / "report.html", _page(title, sections).encode())
    return out / "report.html"
