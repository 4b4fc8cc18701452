"""The speed table of the README from measured rows: `python -m benchmarks.report benchmarks/results/NAME.jsonl`.

Replaces what stands between the markers `<!-- speed -->` and `<!-- /speed -->` of README.md, and draws docs/speed.png.
A cell is a ratio of medians of one run; the newest rows of a case and kind of malloc count.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = "infovae_fast cpp"
COLUMNS = (  # title, implementation, malloc
    ("eager, expanded", "eager expanded", "default"),
    ("eager, `cdist`", "eager cdist", "default"),
    ("eager, expanded, tuned malloc", "eager expanded", "tuned"),
    ("`torch.compile`, tuned malloc", "torch.compile", "tuned"),
    ("KeOps", "KeOps", "default"),
)
NAMES = {"rbf": "RBF", "imq": "IMQ", "imq7": "seven-scale IMQ", "stein": "Stein direction"}

Case = tuple[str, int, int]


def table(rows: dict[tuple[Case, str, str], dict[str, Any]]) -> str:
    head = ["value and gradient to x", "ours", *(title for title, _, _ in COLUMNS), "gradient error: ours, eager"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in dict.fromkeys(case for case, _, _ in rows):
        cells = []
        for _, name, malloc in COLUMNS:
            other, ours = rows.get((case, name, malloc)), rows.get((case, OURS, malloc))
            cells.append(f"{other['median_s'] / ours['median_s']:.1f}x" if other and ours else "–")
        ours = rows.get((case, OURS, "default")) or rows[case, OURS, "tuned"]
        errors = [ours, rows.get((case, "eager expanded", "default")) or rows.get((case, "eager expanded", "tuned"))]
        what, n, d = case
        name = f"{NAMES[what]}, N = {n:,}" + ("" if what == "stein" else f" = M, D = {d}")
        seconds = ours["median_s"]
        time = f"{seconds:.2f} s" if seconds >= 0.5 else f"{seconds * 1e3:.3g} ms"
        lines.append(
            f"| {name} | {time} | "
            + " | ".join(cells)
            + " | "
            + ", ".join(f"{row['error']:.0e}" for row in errors if row)
            + " |"
        )
    return "\n".join(lines)


def plot(rows: dict[tuple[Case, str, str], dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = [case for case in dict.fromkeys(case for case, _, _ in rows) if (case, "eager expanded", "tuned") in rows]
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    names = ["eager expanded", "eager cdist", "KeOps", "torch.compile"]
    for k, name in enumerate(names):
        ratios = [
            rows[case, name, "tuned"]["median_s"] / rows[case, OURS, "tuned"]["median_s"]
            if (case, name, "tuned") in rows
            else 0
            for case in cases
        ]
        axes.bar([i + 0.2 * (k - 1.5) for i in range(len(cases))], ratios, 0.19, label=name)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_yscale("log")
    axes.set_xticks(range(len(cases)), [f"{NAMES[what]}\nN={n}, D={d}" for what, n, d in cases], fontsize=8)
    axes.set_ylabel("time, in units of ours")
    axes.legend(fontsize=8, ncols=4, frameon=False, loc="upper left")
    axes.set_ylim(0.8, 300)
    axes.set_title("Value and gradient on two cores, tuned malloc", fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    rows = {}
    for line in Path(sys.argv[1]).read_text().splitlines():
        row = json.loads(line)
        if row.get("gradient", True):
            rows[(row["what"], row["n"], row["d"]), row["implementation"], row["malloc"]] = row
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition("<!-- speed -->\n")
    _, _, after = rest.partition("<!-- /speed -->")
    readme.write_text(f"{before}<!-- speed -->\n{table(rows)}\n<!-- /speed -->{after}")
    plot(rows, ROOT / "docs" / "speed.png")


if __name__ == "__main__":
    main()
