"""Write results/report.html, one file to look into that fetches nothing: python -m reporting.page results

The results as a table, learning curves, what alignment gained, and the episodes that stage 3 kept (--save_episode).
"""

import argparse
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from engine.errors import OneLineParser
from engine.files import atomic_file
from engine.script import run_script
from persistence.saved_episode import read_episodes
from reporting.page_charts import Point, gain_bar, interval_mark, legend, line_chart, nice_ticks
from reporting.page_episodes import episode_section, view_of
from reporting.report import in_order, interval, read_results, signed, table_rows, training_logs

MAX_BYTES = 2_800_000  # of a page: episodes that would exceed it are left out
MAX_POINTS = 300  # of a line
MAX_EXAMPLES = 10  # support images shown of a class, besides those that are nearest to a query


def html_page(title: str, lead: str, sections: dict[str, str]) -> str:
    """A page of sections by title; those that are empty are left out."""
    folder = Path(__file__).parent
    sections = {name: body for name, body in sections.items() if body}
    ids = {name: name.lower().replace(" ", "-") for name in sections}
    links = "".join(f'<li><a href="#{ids[name]}">{name}</a></li>' for name in sections)
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        lead=escape(lead),
        nav=f'<nav aria-label="sections"><ul>{links}</ul></nav>' if len(sections) > 1 else "",
        css=(folder / "page.css").read_text(encoding="utf-8"),
        js=(folder / "page.js").read_text(encoding="utf-8"),
        body="".join(f'<section id="{ids[name]}"><h2>{name}</h2>{body}</section>' for name, body in sections.items()),
    )


def write_page(path: Path, page: str) -> None:
    """Write a page, atomically. Raises UserError when it cannot be written."""
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def header(name: str, numeric: bool, look: str = "") -> str:
    """The head of a column, a button that sorts by it."""
    kind = "number" if numeric else "text"
    return f'<th scope="col" aria-sort="none" data-type="{kind}" class="{look}"><button type="button">{name}</button>'


def cell(key: object, shown: str, look: str = "", name: str = "") -> str:
    """A cell: what it is sorted by and what it shows; on a narrow screen also what it is, `name`."""
    return f'<td data-key="{escape(str(key))}" data-name="{name}" class="{look if shown else f"{look} none"}">{shown}'


def result_rows(records: list[dict[str, Any]]) -> list[tuple[list[str], dict[str, Any], dict[str, Any] | None]]:
    """For each row of the table its cells as text, what holds its accuracy, and its paired gain, if it has one."""
    rows = []
    for record in in_order(records):
        measured: list[tuple[dict[str, Any], dict[str, Any] | None]] = [(record, None)]
        if "alignment" in record:
            controls = [record["fine_tuning"], *record.get("nearest_mean", {}).values()]
            measured = [*((control, None) for control in controls), (record, record["difference"])]
        rows += [(text, *numbers) for text, numbers in zip(table_rows(record), measured, strict=True)]
    return rows


def results_table(records: list[dict[str, Any]]) -> str:
    """A row a result, fine-tuning and alignment of the same episodes apart, with intervals and gains drawn."""
    rows = result_rows(records)
    low, *_, high = nice_ticks(
        min(r["accuracy"] - (r["ci95"] or 0) for _, r, _ in rows),
        max(r["accuracy"] + (r["ci95"] or 0) for _, r, _ in rows),
    )
    gains = [(gain["accuracy"], gain["ci95"] or 0.0) for _, _, gain in rows if gain]
    worst = min((mean - half for mean, half in gains), default=0.0)
    most = max((mean + half for mean, half in gains), default=0.0)
    scale = min(worst, 0.0), max(most, 0.0) or 1.0
    best: dict[tuple[str, str], float] = {}
    for (dataset, _, task, *_), measured, _ in rows:
        best[dataset, task] = max(best.get((dataset, task), 0.0), measured["accuracy"])
    lines = []
    for (dataset, backbone, task, method, _, _, _, episodes, seconds), measured, gain in rows:
        mean, half = measured["accuracy"], measured["ci95"] or 0.0
        strong = " best" if mean == best[dataset, task] else ""
        accuracy = f"<span>{interval(measured)}</span>{interval_mark(mean, half, low, high)}"
        drawn = ""
        if gain:
            bar = gain_bar(gain["accuracy"], gain["ci95"] or 0.0, *scale)
            drawn = f'<div class="measure"><span>{signed(gain["accuracy"], gain["ci95"])}</span>{bar}</div>'
        lines.append(
            "<tr>"
            + cell(f"{dataset} {task}", f'{escape(dataset)}<br><span class="soft">{task}</span>', "task")
            + cell(method, escape(method), f"method{strong}")
            + cell(backbone, escape(backbone), "soft")
            + cell(mean, f'<div class="measure{strong}">{accuracy}</div>')
            + cell(gain["accuracy"] if gain else "", drawn)
            + cell(episodes, episodes, "count small", "episodes")
            + cell(seconds, seconds, "count small", "seconds")
        )
    heads = [("task", False, ""), ("method", False, ""), ("backbone", False, ""), ("accuracy, %", True, "")]
    heads += [("paired gain", True, ""), ("episodes", True, "count"), ("seconds", True, "count")]
    note = (
        "Accuracy on novel classes, or on val ones where it says so, with its 95% interval, drawn from "
        f"{low:g} to {high:g} %; bold is the best of its task. The paired gain is that of alignment over fine-tuning "
        "of the same episodes; it is grey where its interval holds zero. A column's name sorts by it."
    )
    return (
        f'<p class="note">{note}</p><table class="results"><caption class="hidden">results</caption>'
        f"<thead><tr>{''.join(header(*head) for head in heads)}<tbody>{''.join(lines)}</table>"
    )


def thinned(line: list[Any]) -> list[Any]:
    """At most MAX_POINTS of a line, evenly."""
    return line[:: -(-len(line) // MAX_POINTS)] if line else line


def charts(figures: list[tuple[str, str, dict[str, list[Point]]]]) -> str:
    """Charts of the same lines, each with its title, x axis and lines, and one legend."""
    names = list(dict.fromkeys(name for _, _, lines in figures for name in lines))
    drawn = "".join(
        line_chart(title, x_name, {name: thinned(line) for name, line in lines.items()})
        for title, x_name, lines in figures
    )
    return f'<div class="charts">{drawn}</div>{legend(names)}' if drawn else ""


def training_charts(logs: dict[str, list[dict[str, Any]]]) -> str:
    """Validation accuracy, accuracy in training and loss of each training, by epoch."""
    titles = {
        "val_accuracy": "Validation accuracy, % (band: 95% interval)",
        "base_accuracy": "Accuracy in training, %",
        "loss": "Training loss",
    }
    half = {"val_accuracy": "val_ci95"}  # of those that have an interval
    return charts(
        [
            (
                title,
                "epoch",
                {name: [(r["epoch"], r[key], r.get(half.get(key, ""))) for r in rows] for name, rows in logs.items()},
            )
            for key, title in titles.items()
        ]
    )


def alignment_charts(records: list[dict[str, Any]]) -> str:
    """The gain of alignment by iteration, of the results that recorded it, and episode by episode."""
    by_iteration: dict[str, list[Point]] = {}
    by_episode: dict[str, list[Point]] = {}
    for record in in_order(records):
        dataset, backbone, task, method, *_ = table_rows(record)[-1]
        if "alignment" in record:
            name = f"{method}, {backbone}, {dataset} {task}"
            pairs = zip(record["accuracy_per_episode"], record["fine_tuning"]["accuracy_per_episode"], strict=True)
            gains = sorted(after - before for after, before in pairs)
            by_episode[name] = [(100 * (i + 0.5) / len(gains), gain, None) for i, gain in enumerate(gains)]
            by_iteration[name] = [(r["iteration"], r["gain"], r["gain_ci95"]) for r in record.get("curve") or []]
    return charts(
        [
            ("Gain over fine-tuning, points (band: paired 95% interval)", "alignment iterations", by_iteration),
            ("Gain of each episode, points, in order of the gain", "episodes, %", by_episode),
        ]
    )


def episodes_part(results_dir: Path, budget: int) -> str:
    """The saved episodes, those of the newest result first, as many as have at most `budget` bytes."""
    files = sorted((results_dir / "episodes").glob("*.pt"), key=lambda file: file.stat().st_mtime, reverse=True)
    kept: list[str] = []
    left_out = 0
    for file in files:
        name = file.stem.removeprefix("associative_alignment_").replace("_", " ")
        for record in read_episodes(file):
            view = view_of(record, f"Episode {record['episode']}: {name}")
            section = episode_section(view, f"e{len(kept)}", is_open=not kept)
            left_out += len(section) > budget
            if len(section) <= budget:
                kept.append(section)
                budget -= len(section)
    note = f'<p class="note">{left_out} more would make this file too large.</p>' if left_out else ""
    return "".join(kept) + note


def report_page(results_dir: Path) -> str:
    """The page of a results folder. Raises UserError when it has no results, or one that is damaged."""
    records, logs = read_results(results_dir), training_logs(results_dir)
    sections = {
        "Results": results_table(records),
        "Learning curves": training_charts(logs),
        "Alignment": alignment_charts(records),
    }
    lead = f"{len(records)} results and {len(logs)} trainings in {results_dir.resolve().name}"
    page = html_page("Few-shot results", lead, sections)
    sections["Episodes"] = episodes_part(results_dir, MAX_BYTES - len(page))
    return html_page("Few-shot results", lead, sections)


def main() -> None:
    parser = OneLineParser(
        prog="python -m reporting.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results_dir", type=Path, nargs="?", default=Path("results"))
    results_dir = parser.parse_args().results_dir
    path = results_dir / "report.html"
    write_page(path, report_page(results_dir))
    print(f"page {path}")


if __name__ == "__main__":
    run_script(main)
