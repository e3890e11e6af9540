"""Draw result files: python -m reporting.figures results

Into results/figures/, each if there is what it shows:
training.png       loss, base and validation accuracy by epoch
curve.png          accuracy and gain against alignment iterations
confusion.png      which novel classes are taken for which
projection.png     features of one episode before and after alignment
related_base.png   the related base classes of that episode
The last three are of the newest result, or of the one that --result names.
"""

import argparse
import glob
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from engine.errors import OneLineParser, UserError
from engine.files import atomic_file
from engine.script import run_script
from persistence.saved_episode import read_episode
from reporting.episode_figures import projection_figure, related_base_figure
from reporting.report import is_result, read_record, read_results, training_logs
from reporting.result_figures import confusion_figure, curve_figure, training_figure

STAGE_3 = "associative_alignment.py"


def newest(folder: Path, name: str, holds: Callable[[Path], bool]) -> Path | None:
    """The file written last of those in `folder`, named as the pattern `name`, that hold what is drawn, if any."""
    return max(filter(holds, folder.glob(name)), key=lambda file: file.stat().st_mtime, default=None)


def has_confusion(file: Path) -> bool:
    """Whether a table is a result with a confusion matrix; those of earlier versions have none."""
    record = read_record(file)
    return is_result(file, record) and "confusion" in record


def draw_all(results_dir: Path, result: str | None, projection: str) -> None:
    """Draw what there is, a line each; what there is not, in a line that says what would make it."""
    logs = training_logs(results_dir)
    curves = [record for record in read_results(results_dir) if record.get("curve")]
    stem = glob.escape(Path(result).name.removesuffix(".json")) if result else "*"
    table = newest(results_dir / "tables", f"{stem}.json", has_confusion)
    tested = read_record(table) if table else {}
    saved = newest(results_dir / "episodes", f"{stem}.pt", Path.is_file)
    if result and not (table or saved):
        raise UserError(f"--result {result}: no such file in {results_dir / 'tables'}: name one")
    episode = read_episode(saved) if saved else {}
    stage = f"run {STAGE_3}"
    figures: dict[str, tuple[Any, Callable[[], Figure], str]] = {
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
    parser.add_argument("--result", metavar="NAME", help="draw this result, a file of tables/, with or without .json")
    args = parser.parse_args()
    draw_all(args.results_dir, args.result, args.projection)


if __name__ == "__main__":
    run_script(main)
