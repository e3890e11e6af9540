"""The table of results: each row with what it was made with where rows differ, means over seeds, in three formats.

One row is best where it is better, over the same episodes and by the same training, than each other: its paired
difference from them has an interval above zero.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from methods.intervals import mean_and_ci95
from persistence.results import controls_of, interval

ALWAYS = ("dataset", "backbone", "task", "method", "accuracy % (± over classes)", "paired gain", "over nearest mean")
WHERE_THEY_DIFFER = ("seed", "of each seed", "epoch", "checkpoint", "classes", "images", "episodes")
OF_ONE_SEED = {"seed", "of each seed", "epoch", "checkpoint", "seconds"}
MEAN, GAIN, OVER_NEAREST = ALWAYS[-3:]
LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


@dataclass(frozen=True)
class ResultRow:
    """A row: cells by column; numbers: by column, the accuracy and differences with their intervals that it shows.

    values: of which its accuracy is the mean, over episodes or seeds. paired: what rows have in common whose values are
    those of the same episodes by the same training.
    """

    cells: dict[str, str]
    numbers: dict[str, dict[str, Any]]
    values: list[float]
    paired: tuple[Any, ...]
    record: dict[str, Any]


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


def measured(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a result by name: before an alignment stand its controls on the same episodes."""
    method = record["method"]
    if "alignment" not in record:
        return {f"{method}, fine-tuning" if record["stage"] == "transferLearning" else method: record}
    controls = {f"{method}, fine-tuning": record["fine_tuning"]}
    controls |= {f"{method}, {name}": control for name, control in controls_of(record).items()}
    return controls | {f"{method}, {record['alignment']} alignment{variant(record)}": record}


def epoch_text(record: dict[str, Any]) -> str:
    """The epoch that a checkpoint is of, counted from 1, of how many; `before training` for none."""
    epoch, total = record.get("checkpoint_epoch"), record.get("epochs_trained")
    if epoch is None or epoch < 0:
        return "" if epoch is None else "before training"
    return f"{epoch + 1} of {total}" if total else f"{epoch + 1}"


def facts_of(record: dict[str, Any]) -> dict[str, str]:
    """What a result was made on and with, by column."""
    return {
        "dataset": tested_on(record),
        "backbone": f"{record['backbone']}, {record['img_size']} px",
        "task": f"{record['n_way']}-way {record['n_shot']}-shot",
        "seed": str(record["seed"]),
        "of each seed": "",
        "epoch": epoch_text(record),
        "checkpoint": record.get("checkpoint_digest", ""),
        "classes": str(record.get("n_class", "")),
        "images": str(record.get("n_images", "")),
        "episodes": str(record["n_episodes"]),
    }


def result_rows(records: Sequence[dict[str, Any]]) -> list[ResultRow]:
    """The rows of all results, equal ones once, and instead of those of several seeds their mean.

    Fine-tuning by stage 3 stands for stage 1's test of the same checkpoint on the same episodes.
    """
    rows: dict[tuple[Any, ...], ResultRow] = {}
    for record in records:
        facts, nearest = facts_of(record), record.get("nearest_mean", {})
        best: dict[str, Any] = max(nearest.values(), key=lambda control: control["accuracy"], default={})
        training = facts["checkpoint"] or record.get("checkpoint", record["stage"])  # no digest in earlier versions
        episodes = record.get("dataset_fingerprint"), record["config"].get("episodes_file"), record.get("n_query")
        paired = (training, *episodes, *(facts[name] for name in ("dataset", "backbone", "task", "seed", "episodes")))
        for name, part in measured(record).items():
            own = part is record
            gains = {GAIN: record.get("difference"), OVER_NEAREST: best.get("difference")} if own else {}
            numbers = {MEAN: part} | {column: gain for column, gain in gains.items() if gain}
            cells = facts | {"method": name, "seconds": f"{record['seconds']:.0f}" if own else ""}
            row = ResultRow(cells, numbers, part["accuracy_per_episode"], paired, record)
            rows.setdefault((paired, name, interval(part)), row)
    of_stage_3 = {(row.paired, row.cells["method"]) for row in rows.values() if "alignment" in row.record}
    alone = (
        row for row in rows.values() if "alignment" in row.record or (row.paired, row.cells["method"]) not in of_stage_3
    )
    return with_means([*alone])


def with_means(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """The rows, those that differ in their seed alone as one: their mean, with Student's t between the seeds."""
    alike: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in rows:
        common = (value for column, value in row.cells.items() if column not in OF_ONE_SEED)
        alike.setdefault((*common, row.record.get("epochs_trained")), []).append(row)
    means: list[ResultRow] = []
    for same in alike.values():
        is_of_seeds = len({row.cells["seed"] for row in same}) == len(same) > 1
        means += [mean_row(same)] if is_of_seeds else same
    return means


def mean_over_seeds(numbers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of accuracies, or of differences, and the half-width of its 95% interval by Student's t."""
    mean, ci95 = mean_and_ci95(torch.tensor([each["accuracy"] for each in numbers]))
    return {"accuracy": mean, "ci95": ci95}


def mean_row(rows: Sequence[ResultRow]) -> ResultRow:
    """The mean of rows of several seeds; its values are the seeds' accuracies."""
    numbers = {column: mean_over_seeds([row.numbers[column] for row in rows]) for column in rows[0].numbers}
    values = [row.numbers[MEAN]["accuracy"] for row in rows]
    seeds = {"seed": f"mean of {len(rows)}", "of each seed": ", ".join(f"{value:.2f}" for value in values)}
    cells = rows[0].cells | dict.fromkeys(OF_ONE_SEED, "") | seeds
    return ResultRow(cells, numbers, values, tuple(row.paired for row in rows), rows[0].record)


def best_rows(rows: Sequence[ResultRow]) -> set[int]:
    """The rows that are better than each other one that they are paired with, by the interval of the difference."""
    best = set()
    for paired in {row.paired for row in rows}:
        own = (i for i, row in enumerate(rows) if row.paired == paired)
        first, *others = sorted(own, key=lambda i: -rows[i].numbers[MEAN]["accuracy"])
        above = (torch.tensor(rows[first].values) - torch.tensor(rows[other].values) for other in others)
        differences = [mean_and_ci95(difference) for difference in above]
        if differences and all(mean > ci95 for mean, ci95 in differences):
            best.add(first)
    return best


def columns_of(rows: Sequence[ResultRow]) -> list[str]:
    """The columns of a table: those of every table, and those in which its rows differ."""
    return [*ALWAYS, *(name for name in WHERE_THEY_DIFFER if len({row.cells[name] for row in rows}) > 1), "seconds"]


def shown_cells(row: ResultRow, columns: Sequence[str]) -> list[str]:
    """The cells of a row, its numbers as text."""
    texts = {name: interval(part, "" if name == MEAN else "+") for name, part in row.numbers.items()}
    return [(row.cells | texts).get(column, "") for column in columns]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells below a header, as Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def markdown_rows(rows: Sequence[ResultRow]) -> str:
    """The rows as a table of Markdown, the best in bold."""
    columns, best = columns_of(rows), best_rows(rows)
    lines = [shown_cells(row, columns) for row in rows]
    for i in best:
        lines[i][columns.index(MEAN)] = f"**{lines[i][columns.index(MEAN)]}**"
    return markdown_table(columns, lines)


def latex_text(text: str) -> str:
    """A text as LaTeX shows it."""
    return "".join(LATEX.get(character, character) for character in text)


def caption(rows: Sequence[ResultRow], constant: dict[str, str]) -> str:
    """What a paper says of the table: the protocol, the intervals and the commit; constant: columns left out."""
    records = [row.record for row in rows]
    numbers = {
        name: " or ".join(str(value) for value in sorted({record.get(name, "unknown") for record in records}, key=str))
        for name in ("n_episodes", "n_query", "commit")
    }
    seeds = "; of several seeds, Student's t between them" * any("mean" in row.cells["seed"] for row in rows)
    return (
        f"Accuracy on {', '.join(constant.values()) or 'several data sets'}: {numbers['n_episodes']} episodes with "
        f"{numbers['n_query']} queries per class. ±: 95% interval over episodes, in brackets over classes{seeds}. "
        f"Bold: better than every row of the same training and episodes, by the interval of the paired difference. "
        f"Commit {numbers['commit']}."
    )


def latex_rows(rows: Sequence[ResultRow]) -> str:
    """The rows as a table of LaTeX, of the package booktabs, with a caption; what all rows share is in the caption."""
    shared = {name: rows[0].cells[name] for name in ("dataset", "backbone", "task")}
    constant = {name: value for name, value in shared.items() if all(row.cells[name] == value for row in rows)}
    filled = [name for name in columns_of(rows) if any(shown_cells(row, [name])[0] for row in rows)]
    columns, best = [name for name in filled if name not in constant and name != "seconds"], best_rows(rows)
    lines = [[latex_text(cell) for cell in cells] for cells in [columns, *(shown_cells(row, columns) for row in rows)]]
    for i in best:
        lines[i + 1][columns.index(MEAN)] = rf"\textbf{{{lines[i + 1][columns.index(MEAN)]}}}"
    head, *body = [" & ".join(cells) + r" \\" for cells in lines]
    return "\n".join(
        [r"\begin{table}", r"\centering", rf"\caption{{{latex_text(caption(rows, constant))}}}"]
        + [rf"\begin{{tabular}}{{{'l' * len(columns)}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        + [r"\end{tabular}", r"\end{table}"]
    )


def csv_rows(rows: Sequence[ResultRow]) -> str:
    """The rows as csv, with every column, means and half-widths of intervals as numbers."""
    file, names = io.StringIO(), {MEAN: "accuracy", GAIN: "paired gain", OVER_NEAREST: "over nearest mean"}
    columns = [name for name in (*ALWAYS, *WHERE_THEY_DIFFER, "seconds") if name not in names]
    parts = [(name, part) for name in names for part in ("accuracy", "ci95", "ci95_classes")]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*columns, *(f"{names[name]} {part}".removesuffix(" accuracy") for name, part in parts)])
    for row in rows:
        numbers = [row.numbers.get(name, {}).get(part) for name, part in parts]
        writer.writerow([*(row.cells[name] for name in columns), *("" if n is None else f"{n:.3f}" for n in numbers)])
    return file.getvalue().rstrip("\n")


TABLE_FORMATS = {"markdown": markdown_rows, "latex": latex_rows, "csv": csv_rows}
