"""Print result files as one Markdown table, the paired difference of two results, or one result over several trainings.

python -m reporting.report results
python -m reporting.report --pair fp32.json bf16.json
python -m reporting.report --trainings seed0.json seed1.json seed2.json
"""

import math
from pathlib import Path
from typing import Any

import torch

from engine.errors import OneLineParser, UserError
from engine.files import FLAGS, Schema, matches_schema, misfit, read_json
from engine.script import run_script
from methods.evaluation import mean_and_ci95
from persistence.results import paired_difference, percent

# What a result holds that is reported or drawn; of stage 3 also the second row.
ACCURACY: Schema = {"accuracy": float, "ci95": float | None, "accuracy_per_episode": list[float]}
RESULT: Schema = ACCURACY | {
    **{"stage": str, "dataset": str, "method": str, "backbone": str, "img_size": int, "n_way": int, "n_shot": int},
    **{"n_episodes": int, "seconds": float, "seed": int, "config": FLAGS},
}
ALIGNMENT: Schema = RESULT | {
    **{"alignment": str, "fine_tuning": ACCURACY, "difference": {"accuracy": float, "ci95": float | None}},
}
# What older results lack: of stage 3's controls that fit nothing, its curve, and which classes are taken for which.
CONTROL = ACCURACY | {"difference": {"accuracy": float, "ci95": float | None}}
CURVE = {"iteration": int, "accuracy": float, "ci95": float | None, "gain": float, "gain_ci95": float | None}
LATER: Schema = {
    **{"nearest_mean": {"Euclidean": CONTROL, "cosine": CONTROL}, "curve": [CURVE]},
    **{"confusion": dict[str, dict[str, int]], "novel_dataset": str},
}
EPOCH: Schema = {"epoch": int} | dict.fromkeys(("loss", "base_accuracy", "val_accuracy", "val_ci95"), float | None)
HEADER = "dataset,backbone,task,method,accuracy %,paired gain,over nearest mean,episodes,seconds".split(",")
# What two results of the same episodes have in common.
PAIR_KEYS = ("dataset_fingerprint", "n_way", "n_shot", "n_query")


def read_record(file: Path) -> Any:
    """What a JSON file holds. Raises UserError when it is missing or damaged."""
    try:
        return read_json(file)
    except FileNotFoundError as error:
        raise UserError(f"no result file {file}: run its stage first, or name a file of results/tables") from error
    except ValueError as error:
        raise UserError(f"result file {file} is damaged ({error}): delete it and run its stage again") from error


def is_result(file: Path, record: Any) -> bool:
    """Whether a record is a stage's result. Raises UserError when it is one, and lacks something."""
    if not (isinstance(record, dict) and "stage" in record):
        return False
    schema = ALIGNMENT if "alignment" in record else RESULT
    wrong = misfit(record, schema | {key: kind for key, kind in LATER.items() if key in record})
    if not wrong and "alignment" in record:
        wrong = misfit(record["fine_tuning"], {"confusion": LATER["confusion"]} if "confusion" in record else {})
        n_before, n_after = (len(part["accuracy_per_episode"]) for part in (record["fine_tuning"], record))
        wrong = wrong or (f"{n_before} episodes before alignment, {n_after} after" if n_before != n_after else "")
    if wrong:
        raise UserError(f"result file {file} is damaged ({wrong}): delete it and run its stage again")
    return True


def stage_result(file: Path) -> dict[str, Any]:
    """The result of a stage in a file. Raises UserError when it holds none, or it is missing or damaged."""
    record = read_record(file)
    if not is_result(file, record):
        raise UserError(f"{file} is not the result of a stage: name a file of results/tables")
    return dict(record)


def read_results(results_dir: Path) -> list[dict[str, Any]]:
    """The results of stages among results_dir/tables/*.json, by file name; other tables, as of speed, are left out.

    Raises UserError when there is none or a bad one.
    """
    found = [(file, read_record(file)) for file in sorted((results_dir / "tables").glob("*.json"))]
    records = [record for file, record in found if is_result(file, record)]
    if not records:
        raise UserError(f"no result files in {results_dir / 'tables'}: run a stage first, or name its --results_dir")
    return records


def training_logs(results_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of metrics.jsonl of each training, by the run's name. Raises UserError when a metrics file is damaged."""
    logs = {}
    for file in sorted((results_dir / "logs").glob("*/metrics.jsonl")):
        try:
            rows = read_json(file, lines=True)
            if rows and not matches_schema(rows[0], {"episode": int}):  # those of stage 3 are of episodes
                if not matches_schema(rows, [EPOCH]):
                    raise ValueError("it has a line that is not of an epoch")
                name = file.parent.name.removesuffix("_bestModel").replace("_", " ")
                logs[name] = [{key: row[key] for key in EPOCH} for row in rows]
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
    """What tells an alignment from the published one: its preset, or that it moves the last blocks alone."""
    config = record.get("config", {})
    if config.get("align_preset", "paper") != "paper":
        return f", {config['align_preset']}"
    blocks = config.get("align_blocks")
    return f", last {blocks} block{'s' * (blocks > 1)}" if isinstance(blocks, int) and blocks else ""


def tested_on(record: dict[str, Any]) -> str:
    """What a result is of: `CUB`, `miniImagenet to CUB` of classes of another benchmark, `CUB, val` of val classes."""
    dataset = record["dataset"]
    novel = record.get("novel_dataset", dataset)
    name = dataset if novel == dataset else f"{dataset} to {novel}"
    return f"{name}, val" if record.get("config", {}).get("test_split") == "val" else name


def table_rows(record: dict[str, Any]) -> list[list[str]]:
    """The rows of one result: of alignment, its controls of the same episodes too.

    They are fine-tuning and, unless the result is older, the nearest mean; alignment is compared with the better of
    the two distances.
    """
    protocol = [
        tested_on(record),
        f"{record['backbone']}, {record['img_size']} px",
        f"{record['n_way']}-way {record['n_shot']}-shot",
    ]
    cost = [str(record["n_episodes"]), f"{record['seconds']:.0f}"]
    if "alignment" not in record:
        return [[*protocol, record["method"], interval(record), "", "", *cost]]
    nearest: dict[str, Any] = record.get("nearest_mean", {})
    best = max(nearest.values(), key=lambda control: control["accuracy"], default=None)
    gains = record["difference"], best and best["difference"]
    controls = {"fine-tuning": record["fine_tuning"]}
    controls |= {f"nearest mean, {name}": control for name, control in nearest.items()}
    return [
        *(
            [*protocol, f"{record['method']}, {name}", interval(control), "", "", cost[0], ""]
            for name, control in controls.items()
        ),
        [
            *protocol,
            f"{record['method']}, {record['alignment']} alignment{variant(record)}",
            interval(record),
            *(signed(gain["accuracy"], gain["ci95"]) if gain else "" for gain in gains),
            *cost,
        ],
    ]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Rows of cells below a header, as Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def in_order(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results by dataset (its own novel classes first), backbone, way and shots, those of stage 1 first."""
    return sorted(  # a bare name comes before one that goes on
        records,
        key=lambda r: (
            *(r["dataset"], tested_on(r), r["backbone"]),
            *(r["n_way"], r["n_shot"], r["stage"] != "transferLearning"),
        ),
    )


def paired_line(before: Path, after: Path) -> str:
    """Both accuracies of two results of the same episodes, and the paired difference with its 95% interval.

    When one has more episodes, its first ones are taken: a shorter list is the beginning of a longer one. Raises
    UserError when one is no result, or the episodes are not the same ones.
    """
    first, second = records = [stage_result(file) for file in (before, after)]
    for key in PAIR_KEYS:
        if first.get(key) != second.get(key):
            raise UserError(
                f"{before} has {key} {first.get(key)}, {after} {second.get(key)}: only results of the same episodes "
                "are paired, so run both with the same flags and --episodes_file"
            )
    if episodes_of(first) != episodes_of(second):
        raise UserError(
            f"{before} is of {episodes_of(first)}, {after} of {episodes_of(second)}: "
            "run both with the same --episodes_file"
        )
    n = min(len(record["accuracy_per_episode"]) for record in records)
    accuracies = [torch.tensor(record["accuracy_per_episode"][:n]).double() / 100 for record in records]
    difference = paired_difference(*accuracies)
    lines = [f"{percent(*mean_and_ci95(a))} %  {file}" for a, file in zip(accuracies, (before, after), strict=True)]
    return "\n".join([*lines, f"paired difference {percent(*difference)} points, {n} episodes"])


def trainings_lines(files: list[Path]) -> list[str]:
    """Means of one result over several trainings, each with its 95% interval between trainings.

    Each training counts as one value, so that the interval is Student's t of so few. Raises UserError when one is no
    result, or they are of different methods, backbones or protocols.
    """
    records = [stage_result(file) for file in files]
    for file, record in zip(files, records, strict=True):
        for key in (*PAIR_KEYS, "stage", "dataset", "backbone", "img_size", "method", "alignment"):
            if record.get(key) != records[0].get(key):
                found = f"{file} has {key} {record.get(key)}, {files[0]} {records[0].get(key)}"
                raise UserError(f"{found}: name results of one method, backbone and protocol")
    values = {"accuracy": [record["accuracy"] for record in records]}
    if "alignment" in records[0]:
        values["fine-tuning"] = [record["fine_tuning"]["accuracy"] for record in records]
        values["gain over it"] = [record["difference"]["accuracy"] for record in records]
    if all("nearest_mean" in record for record in records):
        for name in ("Euclidean", "cosine"):
            differences = [record["nearest_mean"][name]["difference"]["accuracy"] for record in records]
            values[f"gain over nearest mean, {name}"] = differences
    return [
        f"{name:<33} {mean:6.2f} ± {ci95:.2f} over {len(files)} trainings: {', '.join(f'{v:.2f}' for v in numbers)}"
        for name, numbers in values.items()
        for mean, ci95 in [mean_and_ci95(torch.tensor(numbers))]
    ]


def episodes_of(record: dict[str, Any]) -> str:
    """Where the episodes of a result come from, in words."""
    file = record["config"].get("episodes_file")
    return f"the episodes in {Path(str(file)).name}" if file else f"the episodes of seed {record['seed']}"


def main() -> None:
    parser = OneLineParser(prog="python -m reporting.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results_dir", type=Path, nargs="?", default=Path("results"))
    parser.add_argument(
        "--pair",
        type=Path,
        nargs=2,
        metavar=("BEFORE.json", "AFTER.json"),
        help="print the paired difference AFTER - BEFORE of two results of the same episodes instead",
    )
    parser.add_argument(
        "--trainings",
        type=Path,
        nargs="+",
        metavar="RESULT.json",
        help="print the means of one result over several trainings, with the interval between trainings, instead",
    )
    args = parser.parse_args()
    if args.pair:
        print(paired_line(*args.pair))
    elif args.trainings:
        print("\n".join(trainings_lines(args.trainings)))
    else:
        rows = [tuple(row) for record in in_order(read_results(args.results_dir)) for row in table_rows(record)]
        print(markdown_table(HEADER, [list(row) for row in dict.fromkeys(rows)]))  # a control of several, once


if __name__ == "__main__":
    run_script(main)
