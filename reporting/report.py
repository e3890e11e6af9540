"""Print result files as one table, or the paired differences of results of the same episodes.

python -m reporting.report results
python -m reporting.report results --format latex > table.tex
python -m reporting.report --compare head.json naive.json centroid.json
"""

from collections.abc import Sequence
from pathlib import Path
from types import GenericAlias
from typing import Any

import torch
from torch import Tensor

from engine.errors import OneLineParser, UserError
from engine.files import FLAGS, Schema, matches_schema, misfit, read_json
from engine.script import run_script
from methods.intervals import mean_record
from persistence.results import interval
from reporting.result_table import MEAN, TABLE_FORMATS, markdown_table, measured, result_rows, tested_on

# What a result holds that is reported or drawn; what ends in "?" results of earlier versions lack.
DIFFERENCE: Schema = {"accuracy": float, "ci95": float | None, "ci95_classes?": float | None}
ACCURACY: Schema = DIFFERENCE | {"accuracy_per_episode": list[float], "confusion?": dict[str, dict[str, int]]}
CONTROLS = GenericAlias(dict, (str, ACCURACY | {"difference": DIFFERENCE}))
CURVE: Schema = DIFFERENCE | {"iteration": int, "gain": float, "gain_ci95": float | None}
RESULT: Schema = ACCURACY | {
    **{"stage": str, "dataset": str, "method": str, "backbone": str, "img_size": int, "n_way": int, "n_shot": int},
    **{"n_episodes": int, "seconds": float, "seed": int, "config": FLAGS, "novel_dataset?": str, "n_images?": int},
    **{"checkpoint_epoch?": int | None, "epochs_trained?": int | None, "checkpoint_digest?": str},
    **{"classes_per_episode?": list[list[int]], "curve?": [CURVE], "nearest_mean?": CONTROLS, "controls?": CONTROLS},
}
ALIGNED: Schema = RESULT | {"alignment": str, "fine_tuning": ACCURACY, "difference": DIFFERENCE}
EPOCH: Schema = {"epoch": int} | dict.fromkeys(("loss", "base_accuracy", "val_accuracy", "val_ci95"), float | None)
# What results of the same episodes have in common.
PAIR_KEYS = ("dataset_fingerprint", "n_way", "n_shot", "n_query", "episodes")


def newest_first(folder: Path, pattern: str) -> list[Path]:
    """The files in a folder whose names match a pattern, last written first."""
    return sorted(folder.glob(pattern), key=lambda file: file.stat().st_mtime, reverse=True)


def result_in(file: Path) -> dict[str, Any] | None:
    """The result of a stage in a JSON file, or None for another table. Raises UserError when missing or damaged."""
    try:
        record = read_json(file)
        if not (isinstance(record, dict) and "stage" in record):
            return None
        if wrong := misfit(record, ALIGNED if "alignment" in record else RESULT):
            raise ValueError(wrong)
        return record
    except FileNotFoundError as error:
        raise UserError(f"no result file {file}: run its stage first, or name a file of results/tables") from error
    except ValueError as error:
        raise UserError(f"result file {file} is damaged ({error}): delete it and run its stage again") from error


def stage_result(file: Path) -> dict[str, Any]:
    """The result of a stage in a JSON file. Raises UserError when it holds none, is missing or damaged."""
    if record := result_in(file):
        return record
    raise UserError(f"{file} is not the result of a stage: name a file of results/tables")


def read_results(results_dir: Path) -> list[dict[str, Any]]:
    """Results of stages in results_dir/tables, by dataset, backbone, way and shots, those of stage 1 first.

    Raises UserError when there is none or one is damaged.
    """
    found = [result_in(file) for file in sorted((results_dir / "tables").glob("*.json"))]
    if not (records := [record for record in found if record]):
        raise UserError(f"no result files in {results_dir / 'tables'}: run a stage first, or name its --results_dir")
    keys = "backbone", "n_way", "n_shot"
    return sorted(records, key=lambda r: (tested_on(r), *(r[key] for key in keys), r["stage"] != "transferLearning"))


def training_logs(results_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of metrics.jsonl of each training, by the run's name. Raises UserError when a metrics file is damaged."""
    logs = {}
    for file in sorted((results_dir / "logs").glob("*/metrics.jsonl")):
        try:
            rows = read_json(file, lines=True)
            if rows and not matches_schema(rows[0], {"episode": int}):  # a row of stage 3
                if not matches_schema(rows, [EPOCH]):
                    raise ValueError("it has a line that is not of an epoch")
                logs[file.parent.name.removesuffix("_bestModel").replace("_", " ")] = rows
        except ValueError as error:
            raise UserError(f"metrics file {file} is damaged ({error}): delete it or run its stage again") from error
    return logs


def same_episodes(files: Sequence[Path]) -> tuple[list[dict[str, Any]], Tensor | None]:
    """Results of the same episodes, cut to those that all have, and their classes (E, n_way), where they are named.

    A shorter list is the beginning of a longer one. Raises UserError when one is no result, or of other episodes.
    """
    records = [stage_result(file) for file in files]
    for file, record in zip(files, records, strict=True):
        drawn = record["config"].get("episodes_file")
        record["episodes"] = f"in {Path(str(drawn)).name}" if drawn else f"of seed {record['seed']}"
        if other := next((key for key in PAIR_KEYS if records[0].get(key) != record.get(key)), None):
            both = f"{files[0]} has {other} {records[0].get(other)}, {file} {record.get(other)}"
            raise UserError(f"{both}: give both the same episodes, --episodes_file")
    n = min(len(record["accuracy_per_episode"]) for record in records)
    named = all("classes_per_episode" in record for record in records)
    for record in records:
        for numbers in measured(record).values():
            numbers["values"] = torch.tensor(numbers["accuracy_per_episode"][:n]).double() / 100
    return records, torch.tensor(records[0]["classes_per_episode"][:n]) if named else None


def comparison_table(files: Sequence[Path]) -> str:
    """Results of the same episodes and their controls: accuracy, and the paired difference of a row and each above."""
    records, classes = same_episodes(files)
    rows: dict[str, Tensor] = {}
    for file, record in zip(files, records, strict=True):
        for name, numbers in measured(record).items():
            is_new = name not in rows or (numbers is not record and torch.equal(rows[name], numbers["values"]))
            rows[name if is_new else f"{name} ({file})"] = numbers["values"]
    cells = []
    for i, (name, values) in enumerate(rows.items()):
        above = [interval(mean_record(values - other, classes), "+") for other in [*rows.values()][:i]]
        cells.append([f"{i + 1}. {name}", interval(mean_record(values, classes)), *above, *[""] * (len(rows) - 1 - i)])
    columns = [f"method, {len(values)} episodes", MEAN, *(f"minus {i}" for i in range(1, len(rows)))]
    return markdown_table(columns, cells)


def main() -> None:
    parser = OneLineParser(prog="python -m reporting.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results_dir", type=Path, nargs="?", default=Path("results"))
    what = parser.add_mutually_exclusive_group()
    table = "the table of all results as markdown (default), a LaTeX table (booktabs) with its caption, or csv"
    what.add_argument("--format", choices=list(TABLE_FORMATS), default="markdown", help=table)
    compare = "print the paired differences of results of the same episodes, and of their controls, instead"
    what.add_argument("--compare", type=Path, nargs="+", metavar="RESULT.json", help=compare)
    args = parser.parse_args()
    if args.compare:
        print(comparison_table(args.compare))
    else:
        print(TABLE_FORMATS[args.format](result_rows(read_results(args.results_dir))))


if __name__ == "__main__":
    run_script(main)
