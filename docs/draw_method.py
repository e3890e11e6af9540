"""Draw docs/method.png, the idea of the paper in three panels: python docs/draw_method.py"""

import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from PIL import Image

# Okabe & Ito's palette, which colour-blind readers can tell apart; marker shapes say the same once more.
WOLF, TRUCK, OTHER, CRITIC, INK = "#D55E00", "#0072B2", "#999999", "#007A5A", "#222222"
SUPPORT = {
    "wolf": np.array([[2.1, 6.95], [3.3, 6.65], [2.4, 5.8]]),
    "pick-up": np.array([[7.15, 3.6], [8.3, 3.3], [7.45, 2.45]]),
}
BASE = {  # centre, novel class that it is related to
    "husky": ((1.35, 8.75), "wolf"),
    "collie": ((5.1, 8.65), "wolf"),
    "bus": ((8.8, 6.0), "pick-up"),
    "van": ((4.75, 1.75), "pick-up"),
    "piano": ((8.6, 8.85), None),
    "jellyfish": ((1.5, 2.3), None),
}
COLOURS = {"wolf": WOLF, "pick-up": TRUCK, None: OTHER}
N_POINTS = 9  # of a base class


def sunflower(centre: tuple[float, float] | np.ndarray, n: int, radius: float, turn: float = 0.0) -> np.ndarray:
    """n points spread evenly over a disc, (n, 2), so that none hides another."""
    k = np.arange(n)
    angle, distance = 2.39996 * k + turn, radius * np.sqrt((k + 0.5) / n)
    return np.array(centre) + np.stack([distance * np.cos(angle), distance * np.sin(angle)], 1)


def cloud(name: str) -> np.ndarray:
    """The images of a base class."""
    return sunflower(BASE[name][0], N_POINTS, 0.68, turn=len(name))


def dots(ax: Axes, points: np.ndarray, colour: str, alpha: float = 0.8) -> None:
    ax.scatter(*points.T, s=26, c=colour, alpha=alpha, edgecolors="white", linewidths=0.5, zorder=3)


def stars(ax: Axes, points: np.ndarray, colour: str) -> None:
    ax.scatter(*points.T, s=200, marker="*", c=colour, edgecolors=INK, linewidths=0.8, zorder=5)


def arrow(ax: Axes, start: np.ndarray, end: np.ndarray, colour: str, head: str = "-|>", **style: float) -> None:
    drawn = {"lw": 1.2, "alpha": 0.7, "mutation_scale": 10, "shrinkA": 4, "shrinkB": 2} | style
    ax.add_patch(FancyArrowPatch(tuple(start), tuple(end), arrowstyle=head, color=colour, zorder=4, **drawn))


def text(ax: Axes, x: float, y: float, words: str, colour: str = INK, size: float = 10, **style: Any) -> None:
    ax.text(x, y, words, color=colour, fontsize=size, **({"ha": "center", "va": "center", "zorder": 7} | style))


def panel(ax: Axes, title: str, caption: str) -> None:
    ax.set(xlim=(0, 10), ylim=(0.3, 10), xticks=[], yticks=[], aspect="equal")
    ax.set_title(title, fontsize=12.5, fontweight="bold", color=INK, pad=8)
    ax.set_xlabel(caption, fontsize=10, color=INK, labelpad=8)
    for side in ax.spines.values():
        side.set(color="#BBBBBB", linewidth=1)


def draw_related(ax: Axes) -> None:
    """Base classes, the few images of two novel classes, and which base classes are related to which."""
    for name, ((x, y), novel) in BASE.items():
        dots(ax, cloud(name), COLOURS[novel])
        text(ax, x, y - 1.12, name, COLOURS[novel] if novel else "#666666")
        if novel:
            ax.add_patch(Circle((x, y), 0.82, fill=False, ls="--", lw=1.2, ec=COLOURS[novel], zorder=2))
    for name, points in SUPPORT.items():
        stars(ax, points, COLOURS[name])
    text(ax, 2.6, 5.15, "wolf", WOLF, 12, fontweight="bold")
    text(ax, 7.65, 1.72, "pick-up", TRUCK, 12, fontweight="bold")
    ax.plot([0.3, 9.7], [3.3, 7.7], color=INK, lw=1, ls=":", zorder=1)
    text(ax, 5.05, 5.1, "classifier of the stars", INK, 9.5, rotation=25.1)


def draw_alignment(ax: Axes, radius: float) -> None:
    """Related images, from where they were, faint, to a disc of this radius around the centroid of the novel class."""
    for novel, points in SUPPORT.items():
        centroid, colour = points.mean(0), COLOURS[novel]
        related = [name for name, (_, of) in BASE.items() if of == novel]
        after = sunflower(centroid, N_POINTS * len(related), radius, turn=0.6)
        clear = np.linalg.norm(after[:, None] - points[None], axis=2).min(1) > 0.3
        dots(ax, after[clear], colour)
        stars(ax, points, colour)
        ax.add_patch(Circle(tuple(centroid), radius + 0.25, fc=colour, alpha=0.1, zorder=1))
        for name in related:
            before = cloud(name)
            dots(ax, before, colour, 0.2)
            shift = -1.05 if name == "van" else 0.98
            text(ax, before[:, 0].mean(), BASE[name][0][1] + shift, name, colour, 9.5, alpha=0.75)
            way = centroid - BASE[name][0]
            way /= np.linalg.norm(way)
            side = np.array([-way[1], way[0]])
            for shift in (-0.4, 0.0, 0.4):
                start = BASE[name][0] + 0.62 * way + shift * side
                arrow(ax, start, centroid - (radius + 0.1) * way + 0.6 * shift * side, colour)


def draw_centroid(ax: Axes) -> None:
    """The related images crowd around the centroid of the few."""
    draw_alignment(ax, 1.05)
    for novel, points in SUPPORT.items():
        ax.scatter(*points.mean(0), s=115, marker="X", c="white", edgecolors=INK, linewidths=1.4, zorder=6)
        x, y = points.mean(0) + ((-1.35, -1.95) if novel == "wolf" else (0.7, -2.0))
        text(ax, x, y, f"centroid of\nthe {novel} stars", COLOURS[novel], 9.5)
        ax.plot([x, points.mean(0)[0]], [y + 0.45, points.mean(0)[1] - 0.2], color=INK, lw=0.8, zorder=4)


def draw_adversarial(ax: Axes) -> None:
    """Related and novel images mix, and the critic between cannot tell one from the other."""
    draw_alignment(ax, 1.25)
    middle = np.mean([points.mean(0) for points in SUPPORT.values()], axis=0)
    width, height = 1.95, 0.95
    corner = tuple(middle - (width / 2, height / 2))
    ax.add_patch(
        FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.08", fc="white", ec=CRITIC, lw=2, zorder=6)
    )
    text(ax, middle[0], middle[1] + 0.24, "critic", CRITIC, 12, fontweight="bold")
    text(ax, middle[0], middle[1] - 0.24, "dot or star?", CRITIC, 9)
    for points in SUPPORT.values():
        way = points.mean(0) - middle
        arrow(ax, middle + 0.27 * way, middle + 0.56 * way, CRITIC, "<|-|>", lw=1.8, alpha=1, mutation_scale=13)
    text(
        ax,
        2.05,
        2.6,
        "the critic learns to tell\ndots from stars; the\nbackbone learns to\nleave no difference",
        CRITIC,
        9.5,
    )


def main() -> None:
    plt.rcParams["font.family"] = "DejaVu Sans"
    figure, axes = plt.subplots(1, 3, figsize=(13.2, 5.3))
    panel(
        axes[0],
        "1. Find related base classes",
        "the classifier of the few novel images says “wolf”\nof most huskies: they are related",
    )
    draw_related(axes[0])
    panel(axes[1], "2a. Centroid alignment", "the backbone pulls related images\nto the centroid of their novel class")
    draw_centroid(axes[1])
    panel(
        axes[2],
        "2b. Adversarial alignment",
        "the backbone makes the related and novel images\nof a class alike to a critic",
    )
    draw_adversarial(axes[2])
    star = {"marker": "*", "ls": "", "markersize": 14, "markeredgecolor": INK, "markerfacecolor": "white"}
    dot = {"marker": "o", "ls": "", "markersize": 7, "markeredgecolor": "white"}
    handles = [
        Line2D([], [], label="image of a novel class (one or a few)", **star),
        Line2D(
            [], [], label="related base image (many), in the colour of its novel class", markerfacecolor=WOLF, **dot
        ),
        Line2D([], [], label="other base image", markerfacecolor=OTHER, **dot),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=10)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.93, bottom=0.19, wspace=0.04)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    palette = Image.open(drawn).convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE)
    palette.save(Path(__file__).with_name("method.png"), optimize=True)


if __name__ == "__main__":
    main()
