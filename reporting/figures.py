"""Draw result files: python -m reporting.figures results

Into results/figures/, each if there is what it shows:
overview.png       validation accuracy by epoch, accuracy of every result, gain of alignment episode by episode
training.png       loss, base and validation accuracy by epoch
curve.png          accuracy and gain against alignment iterations
confusion.png      which novel classes are taken for which
projection.png     features of one episode before and after alignment
related_base.png   the related base classes of that episode
The last three are of the newest result, or of the one that --result names.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.errors import OneLineParser, UserError
from engine.files import atomic_file
from engine.script import run_script
from persistence.saved_episode import read_episode
from reporting.episode_figures import projection_figure, related_base_figure
from reporting.figure_style import BLUE, GREY, ORANGE, colour, line_style
from reporting.report import is_result, read_record, read_results
from reporting.result_figures import confusion_figure, curve_figure, training_figure

STAGE_3 = "associative_alignment.py"
# A legend below its axes: many runs would cover the lines.
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "fontsize": 7, "frameon": False}


def training_logs(results_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of metrics.jsonl of each training, by the run's name. Raises UserError when a metrics file is damaged."""
    logs = {}
    for file in sorted((results_dir / "logs").glob("*/metrics.jsonl")):
        try:
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            if rows and "episode" not in rows[0]:  # those of stage 3 are of episodes
                keys = ("epoch", "loss", "base_accuracy", "val_accuracy", "val_ci95")
                name = file.parent.name.removesuffix("_bestModel").replace("_", " ")
                logs[name] = [{key: row[key] for key in keys} for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"metrics file {file} is damaged ({error}): delete it or run its stage again") from error
    return logs


def draw_training(axes: Axes, logs: dict[str, list[dict[str, Any]]]) -> None:
    """Validation accuracy of each run by epoch."""
    for i, (name, rows) in enumerate(logs.items()):
        axes.plot([r["epoch"] for r in rows], [r["val_accuracy"] for r in rows], label=name, **line_style(i))
    axes.set(title="Training", xlabel="epoch", ylabel="validation accuracy, %")
    if logs:
        axes.legend(**BELOW)


def draw_accuracies(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Accuracy and interval of each result, a line each; fine-tuning of the same episodes beside alignment."""
    rows = []
    for r in records:
        task = f"{r['dataset']}, {r['n_way']}-way {r['n_shot']}-shot"
        if "alignment" in r:
            rows.append((f"{r['method']} fine-tuning, {task}", r["fine_tuning"], BLUE))
            rows.append((f"{r['method']} {r['alignment']}, {task}", r, ORANGE))
        else:
            rows.append((f"{r['method']}, {task}", r, GREY))
    for y, (_, record, ink) in enumerate(rows):
        axes.errorbar(record["accuracy"], y, xerr=record["ci95"] or 0, fmt="o", color=ink, capsize=3)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(title="Novel classes", xlabel="accuracy, % (95% interval)")


def draw_gains(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Sorted gain of alignment over fine-tuning, one point an episode."""
    for k, r in enumerate(records):
        pairs = zip(r["accuracy_per_episode"], r["fine_tuning"]["accuracy_per_episode"], strict=True)
        gains = sorted(after - before for after, before in pairs)
        label = f"{r['alignment']}, {r['n_shot']}-shot: mean {r['difference']['accuracy']:+.2f}"
        axes.plot([100 * (i + 0.5) / len(gains) for i in range(len(gains))], gains, ".", color=colour(k), label=label)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(title="Alignment minus fine-tuning", xlabel="episodes, sorted, %", ylabel="points")
    if records:
        axes.legend(**BELOW)


def overview_figure(records: list[dict[str, Any]], logs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Training, all accuracies and the gains of alignment, side by side."""
    n_rows = len(records) + sum("alignment" in r for r in records)
    height = max(4.6, 0.25 * n_rows + 1.0) + 0.15 * len(logs)
    figure = Figure(figsize=(15, height), layout="constrained")
    training, accuracies, gains = figure.subplots(1, 3)
    draw_training(training, logs)
    draw_accuracies(accuracies, records)
    draw_gains(gains, [r for r in records if "alignment" in r])
    return figure


def newest(folder: Path, name: str, holds: Callable[[Path], bool]) -> Path | None:
    """The file written last of those in `folder`, named as the pattern `name`, that hold what is drawn, if any."""
    return max(filter(holds, folder.glob(name)), key=lambda file: file.stat().st_mtime, default=None)


def has_confusion(file: Path) -> bool:
    """Whether a table is a result with a confusion matrix; those of earlier versions have none."""
    record = read_record(file)
    return is_result(file, record) and "confusion" in record


def draw_all(results_dir: Path, result: str | None, projection: str) -> None:
    """Draw what there is, a line each; what there is not, in a line that says what would make it."""
    records, logs = read_results(results_dir), training_logs(results_dir)
    curves = [record for record in records if record.get("curve")]
    table = newest(results_dir / "tables", f"{result or '*'}.json", has_confusion)
    tested = read_record(table) if table else {}
    saved = newest(results_dir / "episodes", f"{result or '*'}.pt", Path.is_file)
    if result and not (table or saved):
        raise UserError(f"--result {result}: no such file in {results_dir / 'tables'}: name one, without .json")
    episode = read_episode(saved) if saved else {}
    stage = f"run {STAGE_3}"
    figures: dict[str, tuple[Any, Callable[[], Figure], str]] = {
        "overview": (records, lambda: overview_figure(records, logs), "run a stage"),
        "training": (logs, lambda: training_figure(logs), "train with transferLearning.py or metaLearning.py"),
        "curve": (curves, lambda: curve_figure(curves), f"{stage} --record_curve 10"),
        "confusion": (tested, lambda: confusion_figure(tested), "run a stage again"),
        "projection": (episode, lambda: projection_figure(episode, projection), stage),
        "related_base": (episode, lambda: related_base_figure(episode), stage),
    }
    for name, (data, draw, how) in figures.items():
        path = results_dir / "figures" / f"{name}.png"
        if not data:
            print(f"skipped {name}.png: {how} to have it")
            continue
        figure = draw()
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
        print(f"figure {path}")


def main() -> None:
    parser = OneLineParser(
        prog="python -m reporting.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results_dir", type=Path, nargs="?", default=Path("results"))
    parser.add_argument("--projection", choices=["pca", "tsne"], default="pca", help="tsne needs scikit-learn")
    parser.add_argument("--result", metavar="NAME", help="draw this result, a file of tables/ without .json")
    args = parser.parse_args()
    draw_all(args.results_dir, args.result, args.projection)


if __name__ == "__main__":
    run_script(main)
