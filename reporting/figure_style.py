"""What all figures share: Okabe and Ito's colours, told apart by colour-blind readers, and class names as labels.

Okabe and Ito, Color Universal Design, 2008: jfly.uni-koeln.de/color.
"""

from typing import Any

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER = "#56B4E9", "#E69F00"
INK, GREY, PALE, PAPER = "#222222", "#666666", "#E4E4E4", "#FFFFFF"
# For lines and classes; after the last it begins anew. In this order the first 4, 5 or 6 are those that are farthest
# apart (in CIELAB, under simulated deuteranopia, protanopia and tritanopia). Their yellow is too pale for a line.
CYCLE = (BLUE, ORANGE, SKY, INK, PINK, AMBER, GREEN)
MARKERS = ("", "o", "s", "^")  # tell lines apart whose colours are the same


def colour(i: int) -> str:
    """The colour of line or class i."""
    return CYCLE[i % len(CYCLE)]


def line_style(i: int) -> dict[str, Any]:
    """Colour and marker of line i: 28 of them differ."""
    return {"color": colour(i), "marker": MARKERS[i // len(CYCLE) % len(MARKERS)], "markersize": 4}


def label_text(name: str, n: int = 24) -> str:
    """A name as a label of at most n characters, which matplotlib takes neither for a formula nor for a hidden one."""
    text = name if len(name) <= n else name[: n - 1] + "…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")
