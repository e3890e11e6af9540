"""Print result files as one Markdown table: python -m methods.report results"""

import json
from pathlib import Path
from typing import Any

from data.errors import OneLineParser, UserError
from methods.engine import run_script

# What a result holds that is reported or drawn; of stage 3 also the second row.
KEYS = "dataset method backbone img_size n_way n_shot n_episodes seconds accuracy ci95 accuracy_per_episode".split()
ALIGNMENT_KEYS = ("fine_tuning", "difference")


def read_results(results_dir: Path) -> list[dict[str, Any]]:
    """The results of stages among results_dir/tables/*.json, by file name; other tables, as of speed, are left out.

    Raises UserError when there is none or a bad one.
    """
    records = []
    for file in sorted((results_dir / "tables").glob("*.json")):
        try:
            record = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"result file {file} is damaged ({error}): delete it and run its stage again") from error
        if isinstance(record, dict) and "stage" in record:
            missing = [key for key in (*KEYS, *(ALIGNMENT_KEYS if "alignment" in record else ())) if key not in record]
            if missing:
                raise UserError(f"result file {file} lacks {missing[0]!r}: delete it and run its stage again")
            records.append(record)
    if not records:
        raise UserError(f"no result files in {results_dir / 'tables'}: run a stage first, or name its --results_dir")
    return records


def interval(record: dict[str, Any]) -> str:
    """`71.45 ± 0.72`, or the mean alone when one episode gives no interval."""
    mean, ci95 = record["accuracy"], record["ci95"]
    return f"{mean:.2f}" if ci95 is None else f"{mean:.2f} ± {ci95:.2f}"


def variant(record: dict[str, Any]) -> str:
    """What tells an alignment from the published one: its preset, or that it moves the last blocks alone."""
    config = record.get("config", {})
    if config.get("align_preset", "paper") != "paper":
        return f", {config['align_preset']}"
    blocks = config.get("align_blocks")
    return f", last {blocks} block{'s' * (blocks > 1)}" if blocks else ""


def table_rows(record: dict[str, Any]) -> list[list[str]]:
    """The rows of one result: fine-tuning and alignment of the same episodes are two."""
    protocol = [
        record["dataset"],
        f"{record['backbone']}, {record['img_size']} px",
        f"{record['n_way']}-way {record['n_shot']}-shot",
    ]
    cost = [str(record["n_episodes"]), f"{record['seconds']:.0f}"]
    if "alignment" not in record:
        return [[*protocol, record["method"], interval(record), "", *cost]]
    return [
        [*protocol, f"{record['method']}, fine-tuning", interval(record["fine_tuning"]), "", cost[0], ""],
        [
            *protocol,
            f"{record['method']}, {record['alignment']} alignment{variant(record)}",
            interval(record),
            f"{record['difference']['accuracy']:+.2f} ± {record['difference']['ci95'] or float('nan'):.2f}",
            *cost,
        ],
    ]


def markdown_table(records: list[dict[str, Any]]) -> str:
    """Method by shots: accuracy % and paired difference with 95% intervals, episodes, seconds of the whole run."""
    header = ["dataset", "backbone", "task", "method", "accuracy %", "paired gain", "episodes", "seconds"]
    order = sorted(
        records, key=lambda r: (r["dataset"], r["backbone"], r["n_way"], r["n_shot"], r["stage"] != "transferLearning")
    )
    rows = [header, ["---"] * len(header)] + [row for record in order for row in table_rows(record)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = OneLineParser(prog="python -m methods.report", description=__doc__)
    parser.add_argument("results_dir", type=Path, nargs="?", default=Path("results"))
    print(markdown_table(read_results(parser.parse_args().results_dir)))


if __name__ == "__main__":
    run_script(main)
