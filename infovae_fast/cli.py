"""The command line: train, evaluate, sample, report. `infovae-fast COMMAND --help` lists the options of each."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MISSING = "the command line needs more packages ({}): pip install 'infovae_fast[train]'"


def evaluate(run: str, *, n_samples: int = 100, seed: int = 0) -> dict[str, Any]:
    """Compute every metric of a finished run on its training and test set, and write RUN/metrics.json.

    A number that is infinite or not a number is null there.

    Args:
        run: folder of the run.
        n_samples: importance samples for the log-likelihood of each test image.
        seed: of the draws.
    """
    from infovae_fast.evaluation import summarize
    from infovae_fast.files import check_writable
    from infovae_fast.training import read_run, run_data, without_inf, write_json

    model, path = load_model(run), Path(run) / "metrics.json"
    check_writable(path)
    metrics = without_inf(summarize(model, run_data(read_run(run)), n_samples=n_samples, seed=seed))
    write_json(path, metrics)  # before anything is printed: who reads may have gone
    print(json.dumps(metrics, indent=1))
    return metrics


def sample(
    run: str,
    n: int = 64,
    *,
    out: str | None = None,
    seed: int = 0,
    mean: bool = True,
    progress: bool | None = None,
) -> Path:
    """Draw images from the model of a finished run and write them as one PNG.

    Args:
        run: folder of the run.
        n: number of images.
        out: the PNG; default RUN/samples.png.
        seed: of the draws.
        mean: show the mean of p(x|z); false draws from it.
        progress: show a bar of the rows that a PixelCNN has drawn; default: if standard error is a terminal.
    """
    import torch

    from infovae_fast.arguments import check_seed
    from infovae_fast.files import check_writable
    from infovae_fast.report import image_grid, save_png

    if n < 1:
        raise ValueError(f"n: got {n}; accepted: 1 or more")
    check_seed("seed", seed)
    model, path = load_model(run), Path(out or Path(run) / "samples.png")
    check_writable(path)
    torch.manual_seed(seed)
    callback = row_progress() if (sys.stderr.isatty() if progress is None else progress) else None
    save_png(path, image_grid(model.sample(n, mean=mean, callback=callback).cpu()))
    print(path)
    return path


def row_progress() -> Callable[[int, int], None]:
    """A callback(rows drawn, all rows) that shows a bar on standard error from its first call on."""
    from tqdm import tqdm

    bars: list[Any] = []

    def callback(done: int, rows: int) -> None:
        if not bars:
            bars.append(tqdm(total=rows, desc="sample", unit="row", mininterval=0))
        bars[0].update(done - bars[0].n)
        if done == rows:
            bars[0].close()

    return callback


def report(runs: Sequence[str], *, out: str = "report", n_samples: int = 100) -> Path:
    """Write a self-contained report.html with its pictures and metrics.json, comparing finished runs.

    Args:
        runs: folders of the runs.
        out: folder of the report.
        n_samples: importance samples for the log-likelihood of each test image; most of the time, with a PixelCNN.
    """
    from infovae_fast.report import write_report

    path = write_report(runs, out, n_samples=n_samples)
    print(path)
    return path


def load_model(run: str) -> Any:
    """The trained model of a run, on the GPU if there is one.

    Raises:
        FileNotFoundError: no such run, or its training is not finished.
    """
    from infovae_fast.backends import best_device
    from infovae_fast.models import InfoVAE
    from infovae_fast.training import read_run

    read_run(run)
    folder = Path(run) / "model"
    if not (folder / "config.json").exists():  # written last
        raise FileNotFoundError(f"{folder} is missing: the run has not finished; continue it with train --resume {run}")
    return InfoVAE.from_pretrained(folder).to(best_device())


def _refuse_beside_resume(args: Sequence[str]) -> None:
    """Options that a resumed run would not take, although they may be given as they are by default."""
    names = [arg.partition("=")[0] for arg in args if arg.startswith("--")]  # perhaps only how they begin
    allowed = ("--resume", "--epochs", "--progress", "--config", "--print_config", "--help")
    others = [name for name in names if not any(option.startswith(name) for option in allowed)]
    if args[:1] == ["train"] and others and any("--resume".startswith(name) for name in names):
        raise ValueError(f"--resume: only --epochs and --progress may be given with it, got {', '.join(others)}")


def _one_list(args: Sequence[str]) -> list[str]:
    """`report a b` as `report '["a", "b"]'`, which stands where the first of them did."""
    command, *rest = args or [""]
    folders, found = list[str](), [command]
    place = None
    while command == "report" and rest:
        arg = rest.pop(0)
        if arg.startswith("-") and arg != "--":
            found.append(arg)
            if rest and "=" not in arg and arg not in ("-h", "--help", "--print_config"):
                found.append(rest.pop(0))
            continue
        place = len(found) if place is None else place
        folders += [arg] if arg != "--" else rest
        rest = [] if arg == "--" else rest
    if place is None or (len(folders) == 1 and folders[0].startswith("[")):
        return list(args)
    return [*found[:place], json.dumps(folders), *found[place:]]


def main(args: Sequence[str] | None = None) -> None:
    """The entry point: errors a user can mend end with one line and exit code 2 (bad options) or 1."""
    try:
        from jsonargparse import auto_cli

        from infovae_fast.training import train
    except ImportError as error:
        sys.exit(MISSING.format(error.name))
    args = sys.argv[1:] if args is None else list(args)
    try:
        _refuse_beside_resume(args)
        auto_cli(
            [train, evaluate, sample, report],
            args=_one_list(args),
            prog="infovae-fast",
            description=__doc__,
            as_positional=True,
        )
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(str(stop) or "interrupted")


if __name__ == "__main__":
    main()
