"""The speed tables from measured rows: `python -m benchmarks.report benchmarks/results/NAME.jsonl ...`.

Replaces what stands between the markers `<!-- NAME -->` and `<!-- /NAME -->` of README.md and docs/speed.md:

    speed                        `pairwise` on a CPU, which it names: all rows of a CPU must be of one
    speed masked_conv            layers, steps, samples and the nll of PixelCNNs there
    speed on a GPU               `pairwise` on a GPU; `speed on a GPU, in short` has some of its rows
    speed masked_conv on a GPU   layers and the nll there
    speed models on a GPU        whole models

and draws docs/speed.png: the cases of the first table, and time against N. A cell is a ratio of medians of one run; the
newest rows of a case and a malloc count. Columns without a row are left out, and tables. A table of a GPU is of the
last file that has rows for it, but the rates of the bound may be of another.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import pairwise
from benchmarks.bound import bound
from benchmarks.rows import OURS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "speed.md")
COLUMNS = (  # title, implementation, malloc
    ("eager, expanded", "eager expanded", "default"),
    ("eager, `cdist`", "eager cdist", "default"),
    ("eager, expanded, tuned malloc", "eager expanded", "tuned"),
    ("`torch.compile`, tuned malloc", "torch.compile", "tuned"),
    ("KeOps", "KeOps", "default"),
    ("GeomLoss", "GeomLoss", "default"),
)
NAMES = {"rbf": "RBF", "imq": "IMQ", "imq7": "seven-scale IMQ", "stein": "Stein direction"}

LINES = {  # in both pictures, by colour
    OURS: "black",
    "eager expanded": "tab:blue",
    "eager cdist": "tab:cyan",
    "KeOps": "tab:green",
    "GeomLoss": "tab:orange",
    "GeomLoss KeOps": "tab:olive",
    "torch.compile": "tab:red",
}

SHORTEST_BOUND_S = 1e-6  # below it the launches decide
ALONE = f"{OURS} alone"  # benchmarks/*_alone.cu
Case = tuple[str, int, int]
Rows = dict[tuple[Case, str, str], dict[str, Any]]  # of case, implementation, malloc
README: list[Case] = [(case.what, case.n, case.d) for case in pairwise.README]


def device_of(rows: Iterable[dict[str, Any]]) -> str:
    devices = {row["device"] for row in rows}
    if len(devices) > 1:
        raise SystemExit(f"rows of several devices: got {', '.join(sorted(devices))}; accepted: files of one of them")
    return devices.pop()


def table(rows: Rows) -> str:
    columns = [column for column in COLUMNS if any((case, *column[1:]) in rows for case in README)]
    head = [
        f"value and gradient to x ({device_of(rows.values())})",
        "ours",
        *(title for title, _, _ in columns),
        "gradient error: ours, eager",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in README:
        if (case, OURS, "default") not in rows and (case, OURS, "tuned") not in rows:
            continue
        cells = []
        for _, name, malloc in columns:
            other, ours = rows.get((case, name, malloc)), rows.get((case, OURS, malloc))
            cells.append(f"{other['median_s'] / ours['median_s']:.1f}x" if other and ours else "–")
        ours = rows.get((case, OURS, "default")) or rows[case, OURS, "tuned"]
        errors = [ours, rows.get((case, "eager expanded", "default")) or rows.get((case, "eager expanded", "tuned"))]
        what, n, d = case
        name = f"{NAMES[what]}, N = {'' if what == 'stein' else 'M = '}{n:,}, D = {d}"
        lines.append(
            f"| {name} | {duration(ours)} | "
            + " | ".join(cells)
            + " | "
            + ", ".join(f"{row['error']:.0e}" for row in errors if row)
            + " |"
        )
    return "\n".join(lines)


def conv_table(rows: list[dict[str, Any]]) -> str:
    """One line for each case of benchmarks/masked_conv.py, the newest rows of each."""
    titles = {"dense": "dense, masked", "cropped": "cropped", "eager": "eager", "torch.compile": "`torch.compile`"}
    titles |= {"plain cached": "cached, in PyTorch", "naive": "naive"}
    device = device_of(rows)
    cases: dict[tuple[str, int, bool], dict[str, float]] = {}
    for row in rows:
        if row.get("dtype", "float32") != "float32":
            continue
        case = row["what"], row["n"], row["gradient"]
        if row["implementation"] == "infovae_fast":  # the first of its run
            cases[case] = {}
        cases[case][row["implementation"]] = row["median_s"]
    lines = [f"| {device} | ours | " + " | ".join(titles.values()) + " |", "|" + "---|" * (len(titles) + 2)]
    for (what, n, gradient), times in cases.items():
        ours = times["infovae_fast"]
        ratios = [times[name] / ours if name in times else None for name in titles]
        cells = ["–" if r is None else f"{r:,.{2 if r < 10 else 1 if r < 100 else 0}f}x" for r in ratios]
        pass_ = "" if what.startswith("sample") else ", forward and gradients" if gradient else ", forward"
        lines.append(f"| {what}, batch {n}{pass_} | {ours * 1e3:.3g} ms | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def newest(rows: list[dict[str, Any]]) -> dict[Any, dict[str, dict[str, Any]]]:
    """By case the rows of its last run, by implementation; ours is the first of a run. ALONE has runs of its own."""
    cases: dict[Any, dict[str, dict[str, Any]]] = {}
    for row in rows:
        case = row["what"], row["n"], row["d"], row["gradient"], row.get("dtype", "float32")
        if row["implementation"] == OURS:
            cases[case] = {name: kept for name, kept in cases.get(case, {}).items() if name == ALONE}
        cases.setdefault(case, {})[row["implementation"]] = row
    return cases


def duration(row: dict[str, Any] | None) -> str:
    seconds = row["median_s"] if row else 0.0
    return "–" if not row else f"{seconds:.2f} s" if seconds >= 0.5 else f"{seconds * 1e3:.3g} ms"


def ratio(row: dict[str, Any] | None, to: dict[str, Any] | None) -> str:
    if not (row and to):
        return "–"
    times = row["median_s"] / to["median_s"]
    return f"{times:,.{2 if times < 10 else 0}f}x"


def lines_of(head: list[str], cells: list[list[str]]) -> str:
    """Without the columns that have nothing but dashes."""
    kept = [k for k in range(len(head)) if any(row[k] != "–" for row in cells)]
    lines = [[row[k] for k in kept] for row in (head, ["---"] * len(head), *cells)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gpu_table(rows: list[dict[str, Any]], rates: dict[str, float] | None, cases: list[pairwise.Case]) -> str:
    found, graph = newest(rows), f"{OURS} graph"
    head = [device_of(rows), "ours", "as a CUDA graph", "kernels alone", "bound, reached", "eager, expanded"]
    head += ["`torch.compile`", "KeOps", "graph: eager to ours", "gradient error: ours, alone, eager"]
    table = []
    for case in cases:
        by = found.get((case.what, case.n, case.d, case.gradient, case.dtype), {})
        if OURS not in by:
            continue
        name = f"{NAMES[case.what]}, N = {'' if case.what == 'stein' else 'M = '}{case.n:,}, D = {case.d}"
        name += ("" if case.gradient else ", value alone") + ("" if case.dtype == "float32" else f", {case.dtype}")
        known = [by.get(k, {}).get("error") for k in (OURS, ALONE, "eager expanded")]
        errors = ", ".join("–" if e is None else f"{e:.0e}" for e in known)
        cells = [duration(by[OURS]), duration(by.get(graph)), duration(by.get(ALONE))]
        best = min(by[name]["median_s"] for name in (OURS, graph, ALONE) if name in by)
        least = bound(case, rates, "cuda") if rates and case.what in ("rbf", "stein") else None
        known = least is not None and least > SHORTEST_BOUND_S
        cells.append(f"{duration({'median_s': least})}, {least / best:.0%}" if known else "–")
        cells += [ratio(by.get(k), by[OURS]) for k in ("eager expanded", "torch.compile", "KeOps")]
        cells += [ratio(by.get("eager expanded graph"), by.get(graph)), errors]
        table.append([name, *cells])
    return lines_of(head, table)


def gpu_conv_table(rows: list[dict[str, Any]]) -> str:
    head = [
        device_of(rows),
        "ours",
        "as a CUDA graph",
        "cropped",
        "graph: cropped or eager to ours",
        "`torch.compile`",
        "eager",
    ]
    head += ["cached, in PyTorch", "naive", "error: ours, cropped"]
    table = []
    for (what, n, _, gradient, dtype), by in newest(rows).items():
        pass_ = "" if what.startswith("sample") else ", forward and gradients" if gradient else ", forward"
        ours, graph = by.get(OURS), by.get(f"{OURS} graph") or by.get(ALONE)
        cells = [duration(ours), duration(graph), ratio(by.get("cropped"), ours)]
        cells += [ratio(by.get("cropped graph") or by.get("eager graph"), graph)]
        cells += [ratio(by.get(k), ours) for k in ("torch.compile", "eager", "plain cached", "naive")]
        cells += [
            ", ".join(f"{by[k]['error']:.0e}" for k in (OURS, ALONE, "cropped") if "error" in by.get(k, {})) or "–"
        ]
        table.append([f"{what}, batch {n}, {dtype}{pass_}", *cells])
    return lines_of(head, table)


def models_table(rows: list[dict[str, Any]]) -> str:
    head, table = [device_of(rows), "ours", "as a CUDA graph", "naive", "error"], []
    for (what, n, _, _, dtype), by in newest(rows).items():
        cells = [duration(by[OURS]), duration(by.get(f"{OURS} graph")), ratio(by.get("naive"), by[OURS])]
        cells.append(f"{by[OURS]['error']:.0e}" if "error" in by[OURS] else "–")
        table.append([f"{what}, N = {n:,}, {dtype}", *cells])
    return lines_of(head, table)


def put(tables: dict[str, str]) -> None:
    """Every table into the pages that have its markers."""
    missing, texts = set(tables), {page: page.read_text() for page in PAGES}
    for page in PAGES:
        for name, table in tables.items():
            before, start, rest = texts[page].partition(f"<!-- {name} -->\n")
            _, end, after = rest.partition(f"<!-- /{name} -->")
            if start and end:
                texts[page] = f"{before}{start}{table}\n{end}{after}"
                missing.discard(name)
    if missing:
        raise SystemExit(f"no page has <!-- {' --> or <!-- '.join(sorted(missing))} --> and its end")
    for page, text in texts.items():
        page.write_text(text)


def plot(rows: Rows, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    malloc = "tuned" if any(key[2] == "tuned" for key in rows) else "default"  # the one that flatters us less
    figure, (bars, lines) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(3, 2), layout="constrained")
    cases = [case for case in README if (case, "eager expanded", malloc) in rows]
    others = [name for name in LINES if name != OURS and any((case, name, malloc) in rows for case in cases)]
    width = 0.8 / max(1, len(others))
    for k, name in enumerate(others):
        have = [(i, case) for i, case in enumerate(cases) if (case, name, malloc) in rows]
        places = [i + width * (k - (len(others) - 1) / 2) for i, _ in have]
        ratios = [rows[c, name, malloc]["median_s"] / rows[c, OURS, malloc]["median_s"] for _, c in have]
        bars.bar(places, ratios, 0.95 * width, label=name, color=LINES[name])
    bars.axhline(1, color="black", linewidth=1)
    bars.set(yscale="log", ylim=(0.8, 400), ylabel="time, in units of ours")
    bars.set_xticks(range(len(cases)), [f"{NAMES[what]}\nN={n}, D={d}" for what, n, d in cases], fontsize=7)
    bars.legend(fontsize=8, ncols=3, frameon=False, loc="upper left")

    for name, colour in LINES.items():
        found = sorted(
            (n, row["median_s"])
            for ((what, n, d), *other), row in rows.items()
            if (what, d, *other) == ("rbf", 10, name, malloc)
        )
        if found:
            lines.plot(*zip(*found, strict=True), "o-", label=name, color=colour, markersize=3)
    lines.set(xscale="log", yscale="log", xlabel="N = M", ylabel="seconds, RBF, D = 10")
    lines.legend(fontsize=8, frameon=False)
    threads = max((row["threads"] for row in rows.values()), default=0)
    figure.suptitle(f"Value and gradient, {threads} threads, {malloc} malloc", fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    names = sys.argv[1:]
    if missing := [name for name in names if not Path(name).is_file()] or ([] if names else ["no file"]):
        sys.exit(f"got {', '.join(missing)}; accepted: files of rows, as {sorted(map(str, RESULTS.glob('*.jsonl')))}")
    files = [[json.loads(line) for line in Path(name).read_text().splitlines()] for name in names]
    every = [row for file in files for row in file if "cuda" not in row]

    def on_gpu(*ops: str) -> list[dict[str, Any]]:
        found = [[row for row in file if "cuda" in row and row["op"] in ops] for file in files]
        return next((rows for rows in reversed(found) if rows), [])

    rows: Rows = {}
    for row in every:
        if row["op"] != "pairwise" or not row.get("gradient", True):
            continue
        case, name, malloc = (row["what"], row["n"], row["d"]), row["implementation"], row["malloc"]
        if name == OURS:  # the first of a run: ratios are of one run
            rows = {key: old for key, old in rows.items() if (key[0], key[2]) != (case, malloc)}
        rows[case, name, malloc] = row
    convs = [row for row in every if row["op"] in ("masked_conv", "logistic_mixture")]
    tables = {}
    if rows:
        tables["speed"] = table(rows)
        plot(rows, ROOT / "docs" / "speed.png")
    if convs:
        tables["speed masked_conv"] = conv_table(convs)
    if some := on_gpu("pairwise"):
        rates = next((row["rates"] for row in on_gpu("bound")[::-1]), None)
        tables["speed on a GPU"] = gpu_table(some, rates, pairwise.GPU_CASES)
        tables["speed on a GPU, in short"] = gpu_table(some, rates, pairwise.GPU_README)
    if some := on_gpu("masked_conv", "logistic_mixture"):
        tables["speed masked_conv on a GPU"] = gpu_conv_table(some)
    if some := on_gpu("models"):
        tables["speed models on a GPU"] = models_table(some)
    put(tables)


if __name__ == "__main__":
    main()
