"""Print result files as one Markdown table, or the paired difference of two results.

python -m reporting.report results
python -m reporting.report --pair fp32.json bf16.json
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.errors import OneLineParser, UserError
from engine.files import FLAGS, Schema, matches_schema, misfit, read_json
from engine.script import run_script
from methods.evaluation import mean_and_ci95
from persistence.results import paired_difference, percent

# What a result holds that is reported or drawn; of stage 3 also what alignment is compared with.
DIFFERENCE: Schema = {"accuracy": float, "ci95": float | None}
ACCURACY: Schema = DIFFERENCE | {"accuracy_per_episode": list[float]}
RESULT: Schema = ACCURACY | {
    **{"stage": str, "dataset": str, "method": str, "backbone": str, "img_size": int, "n_way": int, "n_shot": int},
    **{"n_episodes": int, "seconds": float, "seed": int, "config": FLAGS},
}
ALIGNMENT: Schema = {"alignment": str, "fine_tuning": ACCURACY, "difference": DIFFERENCE}
# What results of earlier versions lack.
CURVE = DIFFERENCE | {"iteration": int, "gain": float, "gain_ci95": float | None}
CONFUSION: Schema = {"confusion": dict[str, dict[str, int]]}
NEAREST = dict.fromkeys(("Euclidean", "cosine"), ACCURACY | {"difference": DIFFERENCE})
LATER: Schema = CONFUSION | {"nearest_mean": NEAREST, "curve": [CURVE], "novel_dataset": str}
EPOCH: Schema = {"epoch": int} | dict.fromkeys(("loss", "base_accuracy", "val_accuracy", "val_ci95"), float | None)
HEADER = "dataset,backbone,task,method,accuracy %,paired gain,over nearest mean,episodes,seconds".split(",")
# What two results of the same episodes have in common.
PAIR_KEYS = ("dataset_fingerprint", "n_way", "n_shot", "n_query", "episodes")
# The cells of a row below HEADER, the record that holds its accuracy, and of alignment the paired gain.
ResultRow = tuple[tuple[str, ...], dict[str, Any], dict[str, Any] | None]


def newest_first(folder: Path, pattern: str) -> list[Path]:
    """The files in a folder whose names match a pattern, last written first."""
    return sorted(folder.glob(pattern), key=lambda file: file.stat().st_mtime, reverse=True)


def result_in(file: Path) -> dict[str, Any] | None:
    """The result of a stage in a JSON file, or None for another table. Raises UserError when missing or damaged."""
    try:
        record = read_json(file)
        if not (isinstance(record, dict) and "stage" in record):
            return None
        schema = RESULT | {key: kind for key, kind in LATER.items() if key in record}
        if "alignment" in record:
            schema |= ALIGNMENT | ({"fine_tuning": ACCURACY | CONFUSION} if "confusion" in record else {})
        if wrong := misfit(record, schema):
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


def interval(record: dict[str, Any]) -> str:
    """`71.45 ± 0.72`, or the mean alone when one episode gives no interval."""
    mean, ci95 = record["accuracy"], record["ci95"]
    return f"{mean:.2f}" if ci95 is None else f"{mean:.2f} ± {ci95:.2f}"


def signed(accuracy: float, ci95: float | None) -> str:
    """`+0.12 ± 0.98`; the interval of a single episode is nan."""
    return f"{accuracy:+.2f} ± {math.nan if ci95 is None else ci95:.2f}"


def variant(record: dict[str, Any]) -> str:
    """How an alignment differs from the published one: its preset, or the number of blocks that it trains."""
    config = record["config"]
    if config.get("align_preset", "paper") != "paper":
        return f", {config['align_preset']}"
    blocks = config.get("align_blocks")
    return f", last {blocks} block{'s' * (blocks > 1)}" if isinstance(blocks, int) and blocks else ""


def tested_on(record: dict[str, Any]) -> str:
    """The classes of the episodes: `CUB`, `miniImagenet to CUB` across benchmarks, `CUB, val` of the val split."""
    dataset = record["dataset"]
    novel = record.get("novel_dataset", dataset)
    name = dataset if novel == dataset else f"{dataset} to {novel}"
    return f"{name}, val" if record["config"].get("test_split") == "val" else name


def result_rows(records: list[dict[str, Any]]) -> list[ResultRow]:
    """The rows of the table of results, equal ones once.

    Before an alignment stand its controls on the same episodes: fine-tuning and, unless the result is of an earlier
    version, the nearest means, the better of which the column `over nearest mean` compares it with.
    """
    rows: dict[tuple[str, ...], ResultRow] = {}
    for record in records:
        method = record["method"]
        task = f"{record['n_way']}-way {record['n_shot']}-shot"
        protocol = (tested_on(record), f"{record['backbone']}, {record['img_size']} px", task)
        nearest: dict[str, Any] = record.get("nearest_mean", {})
        measured = {method: record}
        if "alignment" in record:
            measured = {f"{method}, fine-tuning": record["fine_tuning"]}
            measured |= {f"{method}, nearest mean, {name}": control for name, control in nearest.items()}
            measured |= {f"{method}, {record['alignment']} alignment{variant(record)}": record}
        best: dict[str, Any] = max(nearest.values(), key=lambda control: control["accuracy"], default={})
        gains = record.get("difference"), best.get("difference")
        for name, numbers in measured.items():
            own = numbers is record
            over = [signed(gain["accuracy"], gain["ci95"]) if own and gain else "" for gain in gains]
            cost = str(record["n_episodes"]), f"{record['seconds']:.0f}" if own else ""
            cells = (*protocol, name, interval(numbers), *over, *cost)
            rows.setdefault(cells, (cells, numbers, gains[0] if own else None))
    return list(rows.values())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells below a header, as Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def paired_lines(before: Path, after: Path) -> list[str]:
    """Both accuracies of two results of the same episodes, and the paired difference with its 95% interval.

    When one has more episodes, its first ones are taken: a shorter list is the beginning of a longer one. Raises
    UserError when one is no result, or the episodes are not the same ones.
    """
    records = stage_result(before), stage_result(after)
    for record in records:
        file = record["config"].get("episodes_file")
        record["episodes"] = f"in {Path(str(file)).name}" if file else f"of seed {record['seed']}"
    if other := next((key for key in PAIR_KEYS if records[0].get(key) != records[1].get(key)), None):
        first, second = (record.get(other) for record in records)
        raise UserError(f"{before} has {other} {first}, {after} {second}: give both the same episodes, --episodes_file")
    n = min(len(record["accuracy_per_episode"]) for record in records)
    accuracies = [torch.tensor(record["accuracy_per_episode"][:n]).double() / 100 for record in records]
    lines = [f"{percent(*mean_and_ci95(a))} %  {file}" for a, file in zip(accuracies, (before, after), strict=True)]
    return [*lines, f"paired difference {percent(*paired_difference(*accuracies))} points, {n} episodes"]


def main() -> None:
    parser = OneLineParser(prog="python -m reporting.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results_dir", type=Path, nargs="?", default=Path("results"))
    pair = "print the paired difference AFTER - BEFORE of two results of the same episodes instead"
    parser.add_argument("--pair", type=Path, nargs=2, metavar=("BEFORE.json", "AFTER.json"), help=pair)
    args = parser.parse_args()
    if args.pair:
        lines = paired_lines(*args.pair)
    else:
        lines = [markdown_table(HEADER, [cells for cells, *_ in result_rows(read_results(args.results_dir))])]
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main)
