"""Print result files as one Markdown table: python -m methods.report results"""

import argparse
import json
from pathlib import Path
from typing import Any

from data.errors import UserError
from methods.engine import run_script


def read_results(results_dir: Path) -> list[dict[str, Any]]:
    """All records of results_dir/tables/*.json, by file name. Raises UserError when there is none or a bad one."""
    files = sorted((results_dir / "tables").glob("*.json"))
    if not files:
        raise UserError(f"no result files in {results_dir / 'tables'}: run a stage first, or name its --results_dir")
    records = []
    for file in files:
        try:
            records.append(json.loads(file.read_text()))
        except ValueError as error:
            raise UserError(f"result file {file} is damaged ({error}): delete it and run its stage again") from error
    return records


def interval(record: dict[str, Any]) -> str:
    """`71.45 ± 0.72`, or the mean alone when one episode gives no interval."""
    mean, ci95 = record["accuracy"], record["ci95"]
    return f"{mean:.2f}" if ci95 is None else f"{mean:.2f} ± {ci95:.2f}"


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
            f"{record['method']}, {record['alignment']} alignment",
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
    parser = argparse.ArgumentParser(prog="python -m methods.report", description=__doc__)
    parser.add_argument("results_dir", type=Path, nargs="?", default=Path("results"))
    print(markdown_table(read_results(parser.parse_args().results_dir)))


if __name__ == "__main__":
    run_script(main)
