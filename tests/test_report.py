"""Pictures, reports of runs, and the main job in its quick form."""

import base64
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from infovae_fast.pictures import figure_png, image_png, latent_png, loss_curves
from infovae_fast.report import METRICS, image_grid, number, save_png, write_report
from infovae_fast.reproduce import pixelcnn, small_data
from infovae_fast.reproduce import runs as runs_module
from infovae_fast.training import train


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes of the main job; with more, sums may differ by rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def demo(one_thread, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    small_data.main(["--out", str(out), "--quick", "--workers", "1"])
    return out


@pytest.fixture(scope="module")
def quick_run(demo):
    return demo / "quick-runs" / "mmd_vae-100-seed0"


class Page(HTMLParser):
    """The tags, images and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.images, self.tags, self.text = [], set(), ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.images += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def test_quick_demo_writes_every_picture_once_as_a_file_and_once_in_the_page(demo):
    runs = [f"{preset}-{size}-seed0" for preset in ("elbo", "mmd_vae") for size in (100, 200)]
    kinds = ("reconstructions", "samples", "latent", "losses")
    expected = {"comparison.png"} | {f"{kind}-{run}.png" for kind in kinds for run in runs}
    files = {path.name for path in demo.iterdir()}
    assert files == expected | {"report.html", "metrics.json", "quick-runs"}
    for name in expected:
        assert len(np.unique(pixels((demo / name).read_bytes()))) > 1, name
    sources = Page(demo / "report.html").images
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    embedded = {base64.b64decode(source.split(",")[1]) for source in sources}
    assert embedded == {(demo / name).read_bytes() for name in expected}


def test_page_is_self_contained_and_fits_a_phone(demo):
    page = Page(demo / "report.html")
    assert not page.tags & {"script", "link", "iframe", "object"}
    source = (demo / "report.html").read_text()
    assert not re.search(r"https?:|url\(|@import", source)
    assert 'name="viewport"' in source
    assert "(Eq. 6)" in page.text


def test_every_number_of_the_page_is_in_metrics_json(demo):
    metrics = json.loads((demo / "metrics.json").read_text())
    text = Page(demo / "report.html").text
    assert set(metrics["versions"]) == {"infovae_fast", "torch", "python"}
    assert metrics["verdict"] in text
    assert len(metrics["runs"]) == len(metrics["comparison"]) == 4
    for run in metrics["runs"]:
        assert run["settings"]["seed"] == 0
        for part in ("train", "test"):
            assert all(math.isfinite(value) for value in run[part].values())
            for name, (_, digits) in METRICS.items():
                assert number(run[part][name], digits) in text
        assert number(run["test"]["log_likelihood"], 1) in text
    for group in metrics["comparison"]:
        same = [r for r in metrics["runs"] if r["settings"]["preset"] == group["preset"]]
        [run] = [r for r in same if r["train"]["images"] == group["train_images"]]
        assert group["train_log_det_covariance"] == [run["train"]["log_det_covariance"]]
        assert group["test_log_likelihood"] == [run["test"]["log_likelihood"]]


def test_demo_started_again_keeps_finished_and_continues_unfinished_runs(quick_run, tmp_path):
    copies = tmp_path / "runs"
    shutil.copytree(quick_run.parent, copies)
    unfinished = copies / quick_run.name / "model"
    weights = (unfinished / "model.safetensors").read_bytes()
    (unfinished / "config.json").unlink()  # as if killed just before the end
    done = dict(runs_module.run_all(small_data.plan(copies, **small_data.QUICK), workers=1))
    assert re.fullmatch(r"continued in \d+ s", done.pop(str(unfinished.parent)))
    assert list(done.values()) == ["finished before"] * 3
    assert (unfinished / "model.safetensors").read_bytes() == weights


def test_demo_refuses_a_run_with_other_settings(demo, quick_run):
    [settings] = small_data.plan(quick_run.parent, (100,), (0,), steps=5)[1:]
    with pytest.raises(ValueError, match=r"mmd_vae-100-seed0 holds a run with another epochs: delete .*quick-runs"):
        runs_module.run_one(settings)


def test_demo_ends_with_one_line_where_the_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"Error: .*file"):
        small_data.main(["--out", str(tmp_path / "file"), "--quick", "--workers", "1"])


def test_demo_trains_in_another_process_as_in_this_one(quick_run, tmp_path):
    [settings] = small_data.plan(tmp_path, (100,), (0,), steps=4)[1:]
    [(folder, _)] = runs_module.run_all([settings], workers=2)
    here, there = (load_file(Path(run) / "model" / "model.safetensors") for run in (quick_run, folder))
    assert all(torch.equal(there[name], value) for name, value in here.items())


def test_main_job_has_as_many_steps_for_every_size():
    runs = small_data.plan(Path("out"))
    steps = [run["epochs"] * (run["train_size"] // run["batch_size"]) for run in runs]
    assert all(abs(n - small_data.STEPS) < 14 for n in steps)
    assert len({run["out"] for run in runs}) == len(runs) == 12


@pytest.mark.parametrize(
    "elbo, mmd, says",
    [
        (2.0, 0.8, "as in the paper, the ELBO makes"),
        (2.0, -0.8, "as in the paper"),
        (0.5, 0.8, "contradicts the paper's claim"),
        (-0.5, 0.1, "contradicts the paper's claim"),
    ],
)
def test_verdict_says_what_the_numbers_say(elbo, mmd, says):
    sentence = small_data.verdict({100: [[elbo, elbo], [mmd]], 1437: [[elbo], [mmd, mmd]]})
    assert says in sentence
    assert f"{elbo:+.2f} (ELBO-VAE) and {mmd:+.2f} (MMD-VAE) with 100 images".replace("-0", "−0") in sentence


def test_verdict_names_the_sizes_that_disagree():
    sentence = small_data.verdict({100: [[2.0], [0.5]], 400: [[1.0], [0.5]], 1437: [[1.0], [1.5, -1.5]]})
    assert "holds here with 100, 400 images, but not with 1437" in sentence


@pytest.fixture(scope="module")
def with_a_pixelcnn(one_thread, tmp_path_factory):
    out = tmp_path_factory.mktemp("pixelcnn")
    pixelcnn.main(["--out", str(out), "--quick", "--workers", "1"])
    return out


def test_the_experiment_with_a_pixelcnn_reports_every_objective(with_a_pixelcnn):
    metrics = json.loads((with_a_pixelcnn / "metrics.json").read_text())
    text = Page(with_a_pixelcnn / "report.html").text
    assert metrics["verdict"] in text and "z of 5 dimensions) on 8x8" in text and "α = 1, λ = 1000" in text
    assert [group["preset"] for group in metrics["comparison"]] == list(pixelcnn.COMPARED)
    for run, group in zip(metrics["runs"], metrics["comparison"], strict=True):
        assert group["test_svm_error"] == [run["test"]["svm_error"]]
        assert run["generated"]["images"] == 1000 and 0 < run["generated"]["classifier_error"] < 0.5
        assert number(run["test"]["svm_error"]) in text
    assert "SVM\nerror" in text and "classes\nKL(c ‖ ĉ)" in text and "by 100 labels of the training set" in text
    assert (with_a_pixelcnn / "comparison.png").is_file() and (with_a_pixelcnn / "inpainting-elbo-seed0.png").is_file()


def _values(information, error, mmd, width):
    """Of objectives in the order of `pixelcnn.COMPARED`."""
    names = ("train", "mutual_information"), ("test", "svm_error"), ("train", "full_set_mmd")
    keys = (*names, ("train", "log_det_covariance"))
    rows = zip(pixelcnn.COMPARED, information, error, mmd, width, strict=True)
    return {preset: {key: [value, value] for key, value in zip(keys, row, strict=True)} for preset, *row in rows}


def test_the_verdict_on_a_pixelcnn_says_what_the_numbers_say():
    information, error = [0.5, 5, 4, 3, 6], [0.9, 0.3, 0.4, 0.5, 0.2]
    mmd, width = [0, 0.01, 0.02, 0.03, 0.5], [0.1, -0.5, 0.4, -3, 9]
    says = pixelcnn.verdict(_values(information, error, mmd, width))
    assert "0.50 (ELBO-VAE), 5.00 (MMD-VAE), 4.00 (Stein-VAE) nats" in says and "agrees with the paper's claim" in says
    assert says.endswith("an adversary does holds here by MMD² and holds here by log det Cov.")
    assert "contradicts" in pixelcnn.verdict(_values([0.5, 5, 0.4, 3, 6], error, mmd, width))
    assert "contradicts" in pixelcnn.verdict(_values(information, [0.3, 0.2, 0.4, 0.5, 0.2], mmd, width))
    says = pixelcnn.verdict(_values(information, error, [0, 0.04, 0.02, 0.03, 0.5], [0.1, -5, 0.4, -3, 9]))
    assert "fails here by MMD² and fails here by log det Cov" in says


def test_report_of_runs_on_different_data_without_labels_and_with_strange_names(quick_run, tmp_path):
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "colour.npz", generator.integers(0, 256, (30, 12, 10, 3), dtype=np.uint8))
    settings = {"data": str(tmp_path / "colour.npz"), "epochs": 1, "batch_size": 9, "progress": False}
    runs = [
        train(**settings, latent_dim=3, out=str(tmp_path / "a <b> & c")),
        train(**settings, latent_dim=1, preset="elbo", out=str(tmp_path / "one")),
        train(**settings, latent_dim=2, prior="uniform", preset="wae", out=str(tmp_path / "sub" / "one")),
        quick_run,
        shutil.copytree(quick_run, tmp_path / "other-seed"),
    ]
    config = json.loads((runs[-1] / "config.json").read_text())
    (runs[-1] / "config.json").write_text(json.dumps(config | {"seed": 7, "out": str(runs[-1])}))
    page = Page(write_report(runs, tmp_path / "report", title="<i>"))
    assert "b" not in page.tags
    assert "<i>" in page.text
    assert "a <b> & c" in page.text
    names = {path.name for path in (tmp_path / "report").glob("latent-*")}  # none for a run that differs by its seed
    assert names == {"latent-a-b-c.png", "latent-one.png", "latent-one-2.png", "latent-mmd_vae-100-seed0.png"}
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert [run["test"]["kl"] is None for run in metrics["runs"]] == [False, False, True, False, False]


def test_report_errors_say_what_to_do_and_leave_no_file(quick_run, tmp_path, monkeypatch):
    for runs in ([], str(quick_run)):
        with pytest.raises(ValueError, match="accepted: a list of folders"):
            write_report(runs, tmp_path / "report")
    with pytest.raises(FileNotFoundError, match=r"nowhere.config\.json is missing"):
        write_report([quick_run, tmp_path / "nowhere"], tmp_path / "report")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(quick_run, unfinished, ignore=shutil.ignore_patterns("model"))
    with pytest.raises(FileNotFoundError, match=r"unfinished has not finished; continue it with .*--resume"):
        write_report([quick_run, unfinished], tmp_path / "report")
    monkeypatch.setattr("infovae_fast.report._reconstructions", lambda shown: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report([quick_run], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_loss_curves_of_a_resumed_run_take_the_later_version(tmp_path):
    logs = {
        "version_0": "epoch,step,train_loss,val_loss\n0,0,1.0,\n0,0,,1.5\n1,1,2.0,\n2,2,3.0,\n",
        "version_2": "epoch,step,train_loss,val_loss\n1,1,20.0,\n1,1,,25.0\n2,2,30.0,\n3,3,40.0,\n4,4,5",
        "version_10": "epoch,step,train_loss\n3,3,400.0\n",
    }
    for version, text in logs.items():
        (tmp_path / "logs" / version).mkdir(parents=True)
        (tmp_path / "logs" / version / "metrics.csv").write_text(text)
    assert loss_curves(tmp_path) == {
        "train_loss": [(1, 1.0), (2, 20.0), (3, 30.0), (4, 400.0)],
        "val_loss": [(1, 1.5), (2, 25.0)],
    }


def test_loss_curves_of_a_real_run(quick_run):
    curves = loss_curves(quick_run)
    terms = ("loss", "reconstruction", "kl", "mmd")
    assert set(curves) == {f"{stage}_{term}" for stage in ("train", "val") for term in terms}
    assert all([epoch for epoch, _ in curve] == [1, 2, 3, 4] for curve in curves.values())


def test_image_grid_places_clips_and_separates():
    images = torch.tensor([0.25, -1.0, 2.0])[:, None, None, None].expand(3, 1, 2, 3)
    grid = image_grid(images, columns=2)
    assert grid.shape == (1, 5, 7)
    assert torch.equal(grid[0, :2, :3], torch.full((2, 3), 0.25))
    assert torch.equal(grid[0, :2, 4:], torch.zeros(2, 3))
    assert bool((grid[0, 3:] == 1).all())  # the third image is white, and so is what is empty
    assert bool((grid[0, 2] == 1).all() and (grid[0, :, 3] == 1).all())
    assert image_grid(torch.rand(10, 3, 4, 5)).shape == (3, 3 * 5 - 1, 4 * 6 - 1)


def test_save_png_enlarges_by_a_whole_factor(tmp_path):
    image = torch.rand(3, 8, 8)
    save_png(tmp_path / "new" / "image.png", image)
    saved = pixels((tmp_path / "new" / "image.png").read_bytes())
    assert saved.shape == (640, 640, 3)
    assert np.array_equal(saved[40::80, 40::80], (image * 255).round().byte().permute(1, 2, 0).numpy())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["image.png"]


@pytest.mark.parametrize("shape", [(8, 8), (2, 8, 8), (1, 0, 8), (1, 1, 8, 8)])
def test_save_png_refuses_other_shapes(tmp_path, shape):
    with pytest.raises(ValueError, match=re.escape("accepted: [1 or 3, H, W]")):
        save_png(tmp_path / "image.png", torch.rand(shape))


def test_image_grid_refuses_what_it_cannot_show():
    for images in (torch.rand(1, 8, 8), torch.rand(0, 1, 8, 8)):
        with pytest.raises(ValueError, match="accepted: \\[n, C, H, W\\]"):
            image_grid(images)
    with pytest.raises(ValueError, match="columns: got 0; accepted: 1 or more"):
        image_grid(torch.rand(2, 1, 8, 8), columns=0)
    for show, shape in ((image_grid, (2, 1, 8, 8)), (image_png, (1, 8, 8))):
        with pytest.raises(TypeError, match=r"got torch\.uint8; accepted: floating point in"):
            show(torch.ones(shape, dtype=torch.uint8))


def test_figures_leave_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure_png((2, 2), lambda figure: figure.subplots().plot([1, 2]))
    latent_png(torch.randn(50, 2), torch.arange(50), None, 3.0)  # more classes than colours
    assert dict(matplotlib.rcParams) == before
