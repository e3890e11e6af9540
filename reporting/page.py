"""Write results/report.html, one file to look into that fetches nothing: python -m reporting.page results

The results as a table, the figures of reporting.figures, and the episodes that stage 3 kept (--save_episode).
"""

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engine.errors import OneLineParser
from engine.files import write_text
from engine.script import run_script
from persistence.results import interval
from persistence.saved_episode import read_saved_episodes
from reporting.figures import FIGURES, draw_figures
from reporting.html import html_page
from reporting.page_episodes import episode_section, img, queries_of
from reporting.report import newest_first, read_results
from reporting.result_table import ALWAYS, GAIN, MEAN, best_rows, columns_of, result_rows

MAX_BYTES = 2_800_000  # of a page: episodes that would exceed it are left out
PAGE_COLUMNS = ("task", "method", "backbone", "accuracy, %", "paired gain")
INTERVALS = ("ci95", "ci95_classes")
NOTE = (
    "Accuracy on novel classes, or on val ones where it says so, with its 95% interval over episodes of these classes "
    "(bar) and, in brackets, over other classes (line; '?' where too few episodes or classes tell). The paired gain is "
    "alignment's over fine-tuning on the same episodes, grey where an interval holds zero. Bold: better than "
    "each row of the same training and episodes, by the interval of their paired difference."
)


def interval_bounds(parts: list[dict[str, Any]], names: Sequence[str] = INTERVALS) -> tuple[float, float]:
    """The least and the largest end of the 95% intervals, of these names, of accuracies or differences."""
    halves = [max(part.get(name) or 0.0 for name in names) for part in parts]
    ends = [part["accuracy"] + sign * half for part, half in zip(parts, halves, strict=True) for sign in (-1, 1)]
    return min(ends), max(ends)


def measure(part: dict[str, Any], shown: str, low: float, high: float) -> str:
    """An accuracy or difference as text, then its intervals as a bar, and over classes a line, from low to high."""
    least, most = interval_bounds([part])
    sign, bars = "up" if least > 0 else "down" if most < 0 else "unsure", ""
    for name in INTERVALS[: 2 if part.get("ci95_classes") else 1]:
        left, right = interval_bounds([part], [name])
        start, width = (100 * x / ((high - low) or 1) for x in (left - low, right - left))
        bars += f'<i class="{sign} {name}" style="left:{start:.2f}%;width:{width:.2f}%"></i>'
    if low < 0 < high:
        bars += f'<b style="left:{-100 * low / (high - low):.2f}%"></b>'
    return f'<div class="measure"><span>{shown}</span><span class="scale">{bars}</span></div>'


def axis(low: float, high: float) -> str:
    """The axis of the bars from low to high: round numbers at their places."""
    ticks = [tick for tick in MaxNLocator(3).tick_values(low, high) if low <= tick <= high]
    marks = (f'<b style="left:{100 * (tick - low) / ((high - low) or 1):.2f}%">{tick:g}</b>' for tick in ticks)
    return f'<div class="measure"><span></span><span class="axis">{"".join(marks)}</span></div>'


def results_table(records: list[dict[str, Any]]) -> str:
    """The rows of the results, with intervals and gains drawn."""
    rows = result_rows(records)
    scale = interval_bounds([row.numbers[MEAN] for row in rows])
    gains = [row.numbers[GAIN] for row in rows if GAIN in row.numbers]
    gain_scale = interval_bounds([{"accuracy": 0.0, "ci95": 0.0}, *gains])
    more = [column for column in columns_of(rows) if column not in ALWAYS]
    lines, best = [], best_rows(rows)
    for i, row in enumerate(rows):
        cells, gain = {name: escape(text) for name, text in row.cells.items()}, row.numbers.get(GAIN)
        of_task = f'{cells["dataset"]}<br><span class="soft">{cells["task"]}</span>'
        shown_accuracy = interval(row.numbers[MEAN])
        accuracy = measure(row.numbers[MEAN], f"<b>{shown_accuracy}</b>" if i in best else shown_accuracy, *scale)
        shown_gain = measure(gain, interval(gain, "+"), *gain_scale) if gain else ""
        shown = [of_task, cells["method"], cells["backbone"], accuracy, shown_gain, *(cells[name] for name in more)]
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in shown)}")
    axes = {"accuracy, %": axis(*scale), "paired gain": axis(*gain_scale)}
    heads = "".join(f'<th scope="col">{name}{axes.get(name, "")}' for name in (*PAGE_COLUMNS, *more))
    return (
        f'<p class="note">{NOTE}</p><div class="wide" tabindex="0"><table class="results" aria-label="results">'
        f"<thead><tr>{heads}<tbody>{''.join(lines)}</table></div>"
    )


def figure_svg(figure: Figure, about: str) -> str:
    """A figure as an image in the page. about: what it shows, in words."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "page"}):  # the same figure gives the same page
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = img("svg+xml", buffer.getvalue(), about)
    return f'<figure><figcaption>{about}</figcaption><div class="wide chart" tabindex="0">{drawn}</div></figure>'


def episodes_part(results_dir: Path, budget: int) -> str:
    """The saved episodes, those of the newest result first, as many as have at most `budget` bytes."""
    kept, left_out = "", 0
    for file in newest_first(results_dir / "episodes", "*.pt"):
        for record in read_saved_episodes(file):
            section = episode_section(record, queries_of(record), is_open=not kept)
            if left_out or len(kept) + len(section) > budget:
                left_out += 1
            else:
                kept += section
    return kept + f'<p class="note">{left_out} more would make this file too large.</p>' * bool(left_out)


def report_page(results_dir: Path) -> str:
    """The page of a results folder. Raises UserError when it has no results, or one that is damaged."""
    records = read_results(results_dir)
    figures = "".join(figure_svg(figure, FIGURES[name][0]) for name, figure in draw_figures(results_dir).items())
    table = results_table(records)
    episodes = episodes_part(results_dir, MAX_BYTES - len(table) - len(figures))
    sections = {"Results": table, "Figures": figures, "Episodes": episodes}
    lead = f"{len(records)} results in {results_dir.resolve().name}"
    return html_page("Few-shot results", lead, {name: body for name, body in sections.items() if body})


def main() -> None:
    parser = OneLineParser(prog="python -m reporting.page", description=__doc__)
    parser.add_argument("results_dir", type=Path, nargs="?", default=Path("results"))
    results_dir = parser.parse_args().results_dir
    path = results_dir / "report.html"
    write_text(path, report_page(results_dir))
    print(f"page {path}")


if __name__ == "__main__":
    run_script(main)
