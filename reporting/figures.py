"""Draw result files: python -m reporting.figures results

Each of these into results/figures/, if there is what it shows; the page of reporting.page holds them, too. The last two
are of the newest result, or of the one that --result names.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from engine.errors import OneLineParser, UserError
from engine.files import atomic_file
from engine.script import run_script
from persistence.saved_episode import read_saved_episodes
from reporting.episode_figures import projection_figure
from reporting.report import newest_first, read_results, result_in, training_logs
from reporting.result_figures import confusion_figure, curve_figure, shots_figure, training_figure
from reporting.result_table import result_rows

# What each figure shows, and what to run to have that.
FIGURES = {
    "training": ("loss, training and validation accuracy by epoch", "run transferLearning.py or metaLearning.py"),
    "shots": ("accuracy against shots, with intervals over episodes and over classes", "give --n_shot several values"),
    "curve": ("accuracy and gain against alignment iterations", "run associative_alignment.py --record_curve 10"),
    "confusion": ("which novel classes are taken for which, and what alignment changes in that", "run a stage again"),
    "projection": (
        "features, head and margins of one episode before and after alignment",
        "run associative_alignment.py",
    ),
}


def draw_figures(results_dir: Path, result: str | None = None) -> dict[str, Figure]:
    """The figures by name of a results folder, those without a source left out.

    result: name of the one whose confusion and episode are drawn (default: the newest). Raises UserError when there is
    no result, `result` is not among them, or a file is damaged.
    """
    figures = {}
    if logs := training_logs(results_dir):
        figures["training"] = training_figure(logs)
    records = read_results(results_dir)
    if shots := shots_figure(result_rows(records)):
        figures["shots"] = shots
    if curves := [record for record in records if record.get("curve")]:
        figures["curve"] = curve_figure(curves)
    tables, episodes = newest_first(results_dir / "tables", "*.json"), newest_first(results_dir / "episodes", "*.pt")
    if result:
        stem = Path(result).name.removesuffix(".json")
        tables, episodes = ([file for file in files if file.stem == stem] for files in (tables, episodes))
    if not (tables or episodes):
        raise UserError(f"--result {result}: no such file in {results_dir / 'tables'}: name one")
    tested = (record for file in tables if (record := result_in(file)) and "confusion" in record)
    if newest := next(tested, None):
        figures["confusion"] = confusion_figure(newest)
    if episodes:
        figures["projection"] = projection_figure(read_saved_episodes(episodes[0])[0])
    return figures


def main() -> None:
    described = "\n".join([str(__doc__), *(f"{name}.png: {about}" for name, (about, _) in FIGURES.items())])
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog="python -m reporting.figures", description=described, formatter_class=raw)
    parser.add_argument("results_dir", type=Path, nargs="?", default=Path("results"))
    parser.add_argument("--result", metavar="NAME", help="draw this result, a file of tables/, with or without .json")
    args = parser.parse_args()
    figures = draw_figures(args.results_dir, args.result)
    for name, (_, source) in FIGURES.items():
        path = args.results_dir / "figures" / f"{name}.png"
        if name in figures:
            with atomic_file(path) as temporary:
                figures[name].savefig(temporary, dpi=110, format="png")
        print(f"figure {path}" if name in figures else f"skipped {path.name}: {source} to have it")


if __name__ == "__main__":
    run_script(main)
