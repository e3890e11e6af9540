"""Charts of the page as inline SVG, in its style sheet's colours: they need no library and nothing to be fetched."""

import math
from html import escape

# x, y and the half width of its 95% interval; what is not known or not finite is not drawn.
Point = tuple[float, float | None, float | None]
WIDTH, HEIGHT = 350, 210  # of a line chart, in units of its own: the page scales it
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 12, 34
N_COLOURS = 7


def nice_ticks(low: float, high: float, n: int = 5) -> list[float]:
    """About n round numbers, at least two, from low or just below to high or just above."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / n))
    step = next(power * k for k in (1, 2, 5, 10) if span / (power * k) <= n)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * k, 10) for k in range(first, max(last, first + 1) + 1)]


def interval_mark(mean: float, half: float, low: float, high: float) -> str:
    """A mean as a dot and its 95% interval as a line, on a scale from low to high."""
    x, left, right = (100 * (v - low) / (high - low) for v in (mean, mean - half, mean + half))
    return (
        '<svg class="mark" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        '<line class="rule" x1="0" x2="100" y1="6" y2="6"/>'
        f'<line class="whisker" x1="{left:.2f}" x2="{right:.2f}" y1="6" y2="6"/>'
        f'<line class="dot" x1="{x:.2f}" x2="{x:.2f}" y1="6" y2="6"/></svg>'
    )


def gain_bar(mean: float, half: float, low: float, high: float) -> str:
    """A gain as a bar from zero, with its 95% interval, on a scale from low to high that holds zero.

    A gain that its interval does not tell from zero is pale.
    """
    zero, end, left, right = (100 * (v - low) / (high - low) for v in (0, mean, mean - half, mean + half))
    sure = "up" if mean - half > 0 else "down" if mean + half < 0 else "unsure"
    return (
        f'<svg class="mark {sure}" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="bar" x="{min(zero, end):.2f}" y="2" width="{abs(end - zero):.2f}" height="8"/>'
        f'<line class="whisker" x1="{left:.2f}" x2="{right:.2f}" y1="6" y2="6"/>'
        f'<line class="zero" x1="{zero:.2f}" x2="{zero:.2f}" y1="0" y2="12"/></svg>'
    )


def axes(x_ticks: list[float], y_ticks: list[float], x_name: str) -> str:
    """Grid lines, their numbers and the name of the x axis."""
    parts = []
    for y in y_ticks:
        v = place(y, y_ticks, HEIGHT - BOTTOM, TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{v:.1f}" y2="{v:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{v + 3.5:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        u = place(x, x_ticks, LEFT, WIDTH - RIGHT)
        parts.append(f'<text x="{u:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{x:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_name)}</text>')
    return "".join(parts)


def place(value: float, ticks: list[float], start: float, end: float) -> float:
    """Where a value lies between start and end, of an axis from the first tick to the last."""
    return start + (end - start) * (value - ticks[0]) / ((ticks[-1] - ticks[0]) or 1.0)


def drawable(line: list[Point]) -> list[tuple[float, float, float]]:
    """The points that are known and finite; without a known interval it is 0."""
    numbers = [(x, math.nan if y is None else y, half) for x, y, half in line]
    return [(x, y, half if half and math.isfinite(half) else 0.0) for x, y, half in numbers if math.isfinite(y)]


def line_chart(title: str, x_name: str, lines: dict[str, list[Point]]) -> str:
    """Lines by name, with their intervals as bands; nothing when no point is known."""
    points = {name: drawable(line) for name, line in lines.items()}
    every = [point for line in points.values() for point in line]
    if not every:
        return ""
    x_ticks = nice_ticks(min(x for x, _, _ in every), max(x for x, _, _ in every))
    y_ticks = nice_ticks(min(y - half for _, y, half in every), max(y + half for _, y, half in every))

    def path(line: list[tuple[float, float, float]], sign: int) -> str:
        return " ".join(
            f"{place(x, x_ticks, LEFT, WIDTH - RIGHT):.1f},{place(y + sign * half, y_ticks, HEIGHT - BOTTOM, TOP):.1f}"
            for x, y, half in line
        )

    drawn = [axes(x_ticks, y_ticks, x_name)]
    for i, (name, line) in enumerate(points.items()):
        look = f"c{i % N_COLOURS} d{i // N_COLOURS % 3}"
        if any(half for _, _, half in line):
            drawn.append(f'<polygon class="band {look}" points="{path(line, 1)} {path(line[::-1], -1)}"/>')
        drawn.append(f'<polyline class="{look}" points="{path(line, 0)}"><title>{escape(name)}</title></polyline>')
    label = escape(f"{title}: {', '.join(points)}", quote=True)
    svg = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def legend(names: list[str]) -> str:
    """The names of the lines of charts, beside a piece of each line."""
    keys = "".join(
        f'<li><svg viewBox="0 0 26 8" aria-hidden="true"><polyline class="c{i % N_COLOURS} d{i // N_COLOURS % 3}" '
        f'points="0,4 26,4"/></svg>{escape(name)}</li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{keys}</ul>'
