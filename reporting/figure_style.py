"""Colours and labels of all figures.

Colours: Okabe and Ito, Color Universal Design, 2008 (jfly.uni-koeln.de/color), told apart by colour-blind readers.
"""

from typing import Any

INK, GREY = "#222222", "#666666"
# Of lines and classes, repeated after the last. In this order the first 4, 5 or 6 are those that are farthest apart (in
# CIELAB, under simulated deuteranopia, protanopia and tritanopia). Okabe and Ito's yellow is too pale for a line.
CYCLE = ("#0072B2", "#D55E00", "#56B4E9", INK, "#CC79A7", "#E69F00", "#009E73")
MARKERS = ("", "o", "s", "^")  # tell lines of one colour apart


def colour(i: int) -> str:
    """The colour of line or class i."""
    return CYCLE[i % len(CYCLE)]


def line_style(i: int) -> dict[str, Any]:
    """Colour and marker of line i: 28 of them differ."""
    return {"color": colour(i), "marker": MARKERS[i // len(CYCLE) % len(MARKERS)], "markersize": 4}


def label_text(name: str, n: int = 24) -> str:
    """A name as a label of at most n characters, none of which matplotlib takes for a formula or a hidden label."""
    text = name if len(name) <= n else name[: n - 1] + "…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")
