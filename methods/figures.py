"""Draw result files: python -m methods.figures results

One figure, results/figures/overview.png: validation accuracy of base training by epoch, accuracy of every result
with its 95% interval, and the gain of alignment over fine-tuning, episode by episode.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.errors import OneLineParser, UserError
from data.files import atomic_file
from methods.engine import run_script
from methods.report import read_results

# Okabe and Ito's colours, told apart by colour-blind readers.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


def draw_training(axes: Axes, logs: list[Path]) -> None:
    """Validation accuracy of each run by epoch. Raises UserError when a metrics file is damaged."""
    for colour, log in zip([BLUE, ORANGE, GREEN, GREY] * len(logs), logs, strict=False):
        try:
            rows = [json.loads(line) for line in log.read_text().splitlines()]
            curve = [r["epoch"] for r in rows], [r["val_accuracy"] for r in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"metrics file {log} is damaged ({error}): delete it or run its stage again") from error
        label = log.parent.name.removesuffix("_bestModel").replace("_", " ")
        axes.plot(*curve, color=colour, label=label)
    axes.set(title="Training", xlabel="epoch", ylabel="validation accuracy, %")
    axes.legend(fontsize=7, frameon=False)


def draw_accuracies(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Accuracy and interval of each result, a line each; fine-tuning of the same episodes beside alignment."""
    rows = []
    for r in records:
        task = f"{r['dataset']}, {r['n_way']}-way {r['n_shot']}-shot"
        if "alignment" in r:
            rows.append((f"{r['method']} fine-tuning\n{task}", r["fine_tuning"], BLUE))
            rows.append((f"{r['method']} {r['alignment']}\n{task}", r, ORANGE))
        else:
            rows.append((f"{r['method']}\n{task}", r, GREY))
    for y, (_, record, colour) in enumerate(rows):
        axes.errorbar(record["accuracy"], y, xerr=record["ci95"] or 0, fmt="o", color=colour, capsize=3)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(title="Novel classes", xlabel="accuracy, % (95% interval)")


def draw_gains(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Sorted gain of alignment over fine-tuning, one point an episode."""
    for colour, r in zip([ORANGE, GREEN, BLUE, GREY] * len(records), records, strict=False):
        pairs = zip(r["accuracy_per_episode"], r["fine_tuning"]["accuracy_per_episode"], strict=True)
        gains = sorted(after - before for after, before in pairs)
        label = f"{r['alignment']}, {r['n_shot']}-shot: mean {r['difference']['accuracy']:+.2f}"
        axes.plot([100 * (i + 0.5) / len(gains) for i in range(len(gains))], gains, ".", color=colour, label=label)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(title="Alignment minus fine-tuning", xlabel="episodes, sorted, %", ylabel="points")
    if records:
        axes.legend(fontsize=7, frameon=False)


def main() -> None:
    parser = OneLineParser(prog="python -m methods.figures", description=__doc__)
    parser.add_argument("results_dir", type=Path, nargs="?", default=Path("results"))
    results_dir = parser.parse_args().results_dir
    records = read_results(results_dir)
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    training, accuracies, gains = figure.subplots(1, 3)
    draw_training(training, sorted((results_dir / "logs").glob("*/metrics.jsonl")))
    draw_accuracies(accuracies, records)
    draw_gains(gains, [r for r in records if "alignment" in r])
    path = results_dir / "figures" / "overview.png"
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    print(f"figure {path}")


if __name__ == "__main__":
    run_script(main)
