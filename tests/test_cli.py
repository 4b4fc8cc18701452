"""The command line as a user types it."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch

from infovae_fast import cli
from infovae_fast.files import check_writable

TRAIN = ["train", "--epochs=2", "--train_size=40", "--batch_size=20", "--latent_dim=2", "--progress=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cli.main([*TRAIN, "--data=digits", "--preset=mmd_vae", "--lambda_=50", f"--out={folder}"])
    torch.set_num_threads(threads)
    return folder


def fails(*args, code=1):
    """The message with which a command ends."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    assert stop.value.code not in (0, None)
    return str(stop.value.code)


def test_metrics_are_json_where_a_number_is_infinite(run, monkeypatch, capsys):
    from infovae_fast import evaluation

    def summary(*args, **options):
        return {"test": {"log_likelihood": -math.inf, "each": [1.5, math.nan, (2, math.inf)]}, "name": "inf"}

    monkeypatch.setattr(evaluation, "summarize", summary)
    before = (run / "metrics.json").read_bytes() if (run / "metrics.json").exists() else None
    cli.main(["evaluate", str(run)])
    wanted = {"test": {"log_likelihood": None, "each": [1.5, None, [2, None]]}, "name": "inf"}
    for text in (capsys.readouterr().out, (run / "metrics.json").read_text()):
        assert json.loads(text, parse_constant=pytest.fail) == wanted
    (run / "metrics.json").unlink() if before is None else (run / "metrics.json").write_bytes(before)


def test_what_cannot_be_written_is_told_before_the_computation(run, tmp_path, monkeypatch):
    for name in (
        "infovae_fast.report.summarize",  # first: this imports it, and from `evaluation`
        "infovae_fast.evaluation.summarize",
        "infovae_fast.models.InfoVAE.sample",
    ):
        monkeypatch.setattr(name, lambda *args, **options: pytest.fail("computed"))
    (tmp_path / "file").write_text("")
    assert "IsADirectoryError" in fails("sample", run, f"--out={tmp_path}")
    for command in (
        ("sample", run, f"--out={tmp_path / 'file' / 'a.png'}"),
        ("report", f"[{run}]", f"--out={tmp_path / 'file'}"),
    ):
        assert re.search(r"(NotADirectory|FileExists)Error: .*file", fails(*command))
    metrics = run / "metrics.json"
    metrics.unlink(missing_ok=True)
    metrics.mkdir()
    assert "IsADirectoryError" in fails("evaluate", run)
    metrics.rmdir()
    check_writable(tmp_path / "new" / "folder" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_train_evaluate_sample_report(run, tmp_path, capsys):
    assert json.loads((run / "config.json").read_text())["lambda_"] == 50
    cli.main(["evaluate", str(run), "--n_samples=3"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((run / "metrics.json").read_text()) and printed["test"]["images"] == 360
    cli.main(["sample", str(run), "--n=9", f"--out={tmp_path / 'nine.png'}"])
    assert (tmp_path / "nine.png").read_bytes()[:4] == b"\x89PNG"
    first = (tmp_path / "nine.png").read_bytes()
    cli.main(["sample", str(run), "--n=9", f"--out={tmp_path / 'nine.png'}"])
    assert (tmp_path / "nine.png").read_bytes() == first
    cli.main(["report", json.dumps([str(run)]), f"--out={tmp_path / 'report'}"])
    assert (tmp_path / "report" / "report.html").exists()


def test_config_file_with_overrides(run, tmp_path):
    cli.main(
        ["train", f"--config={run / 'config.json'}", "--seed=7", "--progress=false", f"--out={tmp_path / 'again'}"]
    )
    again, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", run))
    assert again == before | {"seed": 7, "out": str(tmp_path / "again")}


def test_nested_options(tmp_path):
    kernel = '{"kernel": {"name": "imq", "bandwidth": [0.5, 2.0]}}'
    cli.main([*TRAIN, f"--objective={kernel}", '--encoder={"name": "mlp", "hidden": [8]}', f"--out={tmp_path / 'run'}"])
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["objective"]["kernel"] == {"name": "imq", "bandwidth": [0.5, 2.0]}
    assert config["encoder"] == {"name": "mlp", "hidden": [8]}


def test_errors_are_one_line(run, tmp_path):
    assert fails(*TRAIN, f"--out={run}").startswith("ValueError: ") and "--resume" in fails(*TRAIN, f"--out={run}")
    assert "mnist" in fails(*TRAIN, "--data=minst", f"--out={tmp_path / 'x'}")
    assert "accepted: 'elbo', 'beta_vae'" in fails(*TRAIN, "--preset=mmd", f"--out={tmp_path / 'x'}")
    assert "config.json is missing; expected the folder of a run" in fails("evaluate", tmp_path)
    assert "n: got 0" in fails("sample", run, "--n=0")
    for option in ("--lr=0.001", "--latent_dim=10"):  # what they are by default, and not in this run
        assert f"only --epochs and --progress may be given with it, got {option[:4]}" in fails(
            "train", f"--res={run}", option
        )
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text((run / "config.json").read_text())
    assert f"continue it with train --resume {unfinished}" in fails("evaluate", unfinished)
    config = json.loads((run / "config.json").read_text())
    for change, says in (({"preset": "vae"}, "got preset 'vae'; accepted: 'elbo'"), ({}, "it has no key 'binarize'")):
        changed = {key: value for key, value in config.items() if key != "binarize" or change} | change
        (unfinished / "config.json").write_text(json.dumps(changed))
        assert says in fails("evaluate", unfinished) and says in fails("report", json.dumps([str(unfinished)]))


def test_a_report_takes_folders_one_by_one(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr("infovae_fast.report.write_report", lambda runs, out, n_samples: given.append((runs, out)))
    cli.main(["report", "runs/a", "--out", "there", "runs/b, c"])
    cli.main(["report", "runs/a"])
    cli.main(["report", "[runs/a, runs/b]", "--out=there"])
    cli.main(["report", "--out", "there", "--", "runs/a", "-b"])
    config = tmp_path / "c.yaml"
    config.write_text("runs: [x1, x2]\nout: elsewhere\n")
    cli.main(["report", "--config", str(config), "y1"])
    wanted = [(["runs/a", "runs/b, c"], "there"), (["runs/a"], "report"), (["runs/a", "runs/b"], "there")]
    wanted += [(["runs/a", "-b"], "there"), (["y1"], "elsewhere")]
    assert [(list(runs), out) for runs, out in given] == wanted


def test_bad_options_and_config_keys(tmp_path, capsys):
    for args in (["train", "--lamda=3"], ["train", "--epochs=many"], ["trian"], ["train", "--binarize=often"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(args)
        assert stop.value.code == 2
        assert "error" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("epochs: 1\nlernrate: 3\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", f"--config={tmp_path / 'c.yaml'}"])
    assert stop.value.code == 2 and "lernrate" in capsys.readouterr().err


def test_help(capsys):
    for args in (["--help"], ["train", "--help"], ["report", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(args)
        assert stop.value.code == 0
    assert "folder of the report" in capsys.readouterr().out


def test_missing_packages_are_named():
    code = "import sys; sys.modules['jsonargparse'] = None; from infovae_fast.cli import main; main(['train'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'infovae_fast[train]'" in done.stderr
