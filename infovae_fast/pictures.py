"""Pictures as PNG: images side by side, latent spaces, loss curves. matplotlib without its global state (pyplot)."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infovae_fast.files import write_bytes

# One colour an objective, in every picture: Okabe and Ito's, told apart with any kind of colour vision.
OBJECTIVES = {
    "elbo": ("ELBO-VAE", "#0072B2"),
    "beta_vae": ("beta-VAE", "#56B4E9"),
    "mmd_vae": ("MMD-VAE", "#D55E00"),
    "stein_vae": ("Stein-VAE", "#009E73"),
    "aae": ("Adversarial autoencoder", "#CC79A7"),
    "wae": ("WAE-MMD", "#E69F00"),
    "unregularized": ("Unregularised autoencoder", "#555555"),
}
# Petroff's colours (arXiv 2107.02270), told apart with any kind of colour vision, but black for his second grey.
CLASS_COLORS = (
    *("#3f90da", "#bd1f01", "#832db6", "#e76300", "#717581"),
    *("#a96b59", "#ffa90e", "#000000", "#b9ac70", "#92dadd"),
)
TERMS = {
    "loss": "loss [nats per image]",
    "reconstruction": "−log p(x|z) [nats per image]",
    "kl": "KL(q(z|x) ‖ p(z)) [nats per image]",
    "mmd": "MMD² of a batch",
}


def image_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Images [n, C, H, W] in rows, [C, H', W']: clipped to [0, 1], with one white pixel between two.

    Args:
        columns: images in a row; default as square as can be.
    """
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"images: got shape {tuple(images.shape)}; accepted: [n, C, H, W], not empty")
    _refuse_integers("images", images)
    n, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns: got {columns}; accepted: 1 or more")
    rows = math.ceil(n / columns)
    cells = images.new_ones(rows * columns, channels, height + 1, width + 1)
    cells[:n, :, :-1, :-1] = images.clamp(0, 1)
    grid = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return grid[:, :-1, :-1]


def _refuse_integers(name: str, pixels: Tensor) -> None:
    if not pixels.is_floating_point():
        raise TypeError(
            f"{name}: got {pixels.dtype}; accepted: floating point in [0, 1], as data.to_unit makes it of bytes"
        )


def image_png(image: Tensor) -> bytes:
    """The PNG of an image [1 or 3, H, W], clipped to [0, 1]; small ones are enlarged to about 640 pixels."""
    from PIL import Image

    if image.ndim != 3 or image.shape[0] not in (1, 3) or image.numel() == 0:
        raise ValueError(f"image: got shape {tuple(image.shape)}; accepted: [1 or 3, H, W]")
    _refuse_integers("image", image)
    factor = max(1, round(640 / max(image.shape[1:])))
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(1, 2, 0)
    content = io.BytesIO()
    Image.fromarray(pixels.squeeze(2).numpy()).save(content, "PNG")
    return content.getvalue()


def save_png(path: str | Path, image: Tensor) -> None:
    """Writes `image_png(image)`, whole or not at all."""
    write_bytes(Path(path), image_png(image))


def figure_png(size: tuple[float, float], draw: Callable[[Any], None]) -> bytes:
    """The PNG of a matplotlib figure of `size` inches that `draw(figure)` has filled."""
    import matplotlib
    from matplotlib.figure import Figure

    content = io.BytesIO()
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(size, layout="constrained")
        draw(figure)
        figure.savefig(content, format="png", dpi=160)
    return content.getvalue()


def latent_png(
    z: Tensor, labels: Tensor | None, prior: Tensor | None, limit: float, names: tuple[str, str] = ("z₁", "z₂")
) -> bytes:
    """Codes in one or two dimensions before their prior.

    Args:
        z: [N, 2], a map where each code is the number of its class, or [N, 1], a histogram.
        labels: [N], or None.
        prior: draws from it, [M, 1 or 2]; None for N(0, I), whose contours are known.
        limit: the frame of the map reaches from -limit to limit.
        names: of the axes.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        if z.shape[1] == 1:
            clouds = [z[:, 0].numpy(), (torch.randn(2000) if prior is None else prior[:, 0]).numpy()]
            axes.hist(clouds, bins=30, density=True, label=["q(z)", "p(z)"], color=["#0072B2", "#bbbbbb"])
            axes.set(xlabel="z", ylabel="density")
            axes.legend(frameon=False)
            return
        if prior is not None:
            axes.plot(*prior.T.numpy(), ".", color="#cccccc", markersize=3)
        if labels is None:
            axes.plot(*z.T.numpy(), ".", color="#0072B2", markersize=4)
        else:
            _classes(axes, z, labels)
        if prior is None:
            _normal_contours(axes)
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), xlabel=names[0], ylabel=names[1], aspect="equal")

    return figure_png((4.6, 4.9), draw)


def _classes(axes: Any, z: Tensor, labels: Tensor) -> None:
    classes = labels.unique().tolist()
    for k, label in enumerate(classes):
        style = {"marker": f"${label}$", "color": CLASS_COLORS[k % len(CLASS_COLORS)], "label": str(label)}
        axes.plot(*z[labels == label].T.numpy(), linestyle="none", markersize=5, markeredgewidth=0.3, **style)
    if len(classes) <= 20:
        close = {"ncols": 10, "columnspacing": 0.6, "handletextpad": 0.0, "markerscale": 1.4, "fontsize": 9}
        axes.figure.legend(loc="outside lower center", frameon=False, **close)


def _normal_contours(axes: Any) -> None:
    from matplotlib.patches import Circle

    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"}
    for radius in (1, 2, 3):
        axes.add_patch(Circle((0, 0), radius, fill=False, color="#777777", linewidth=1))
        axes.text(0, -radius, f"{radius}σ", color="#444444", fontsize=9, ha="center", va="center", bbox=box)


def loss_curves(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """{"train_loss": [(epoch, value), ...], ...} from logs/version_*/metrics.csv of a run, epochs counted from 1.

    A run that was killed and resumed has several versions, whose steps overlap: the later version counts.
    """
    curves: dict[str, dict[int, tuple[int, float]]] = {}  # by name and step
    versions = Path(folder).glob("logs/version_*/metrics.csv")
    for path in sorted(versions, key=lambda path: int(path.parent.name.removeprefix("version_"))):
        lines = path.read_text().splitlines(keepends=True)
        for row in csv.DictReader(line for line in lines if line.endswith("\n")):  # a kill can cut the last one
            for name, value in row.items():
                if value and name not in ("epoch", "step"):
                    curves.setdefault(name, {})[int(row["step"])] = int(row["epoch"]) + 1, float(value)
    return {name: [curve[step] for step in sorted(curve)] for name, curve in curves.items()}


def losses_png(curves: Mapping[str, Sequence[tuple[int, float]]], color: str) -> bytes:
    """A panel for each term of the loss.

    Args:
        curves: "train_TERM" and "val_TERM" -> [(epoch, value), ...]
    """
    known = [name for name, curve in curves.items() if any(math.isfinite(value) for _, value in curve)]
    terms = [name.removeprefix("train_") for name in known if name.startswith("train_")]
    terms.sort(key=lambda term: (term not in TERMS, [*TERMS, term].index(term)))

    def draw(figure: Any) -> None:
        panels = figure.subplots(2, math.ceil(len(terms) / 2) or 1, squeeze=False).flat
        for axes, term in zip(panels, terms, strict=False):
            for stage, style in (
                ("train", {"color": color, "linewidth": 1.0, "label": "training set"}),
                ("val", {"color": "black", "linewidth": 1.5, "linestyle": "--", "label": "test set"}),
            ):
                if curve := curves.get(f"{stage}_{term}"):
                    axes.plot(*zip(*curve, strict=True), **style)
            axes.set_title(TERMS.get(term, term.replace("_", " ")), fontsize=10)
        for axes in panels[len(terms) :]:
            axes.set_visible(False)
        figure.supxlabel("epoch", fontsize=11)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)

    return figure_png((5.6, 4.8), draw)
