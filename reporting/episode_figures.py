"""A figure of a saved episode: features, directions of the head before and after alignment, and margins of queries."""

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from models import HEADS
from reporting.figure_style import GREY, INK, colour, label_text
from reporting.page_episodes import standing_text

# Each kind of sample; related ones lie below, the few support ones on top.
MARKERS: dict[str, dict[str, Any]] = {
    "related": {"marker": "x", "s": 26, "linewidths": 1.1, "zorder": 1},
    "query": {"marker": "o", "s": 20, "linewidths": 0.4, "edgecolors": "white", "zorder": 2},
    "support": {"marker": "*", "s": 260, "linewidths": 0.9, "edgecolors": INK, "zorder": 3},
}

# The head's directions.
DIRECTIONS: dict[str, dict[str, Any]] = {
    "before": {"linestyle": ":", "marker": "D", "markersize": 5, "markevery": [1], "markerfacecolor": "white"},
    "after": {"linestyle": "-", "marker": "D", "markersize": 5, "markevery": [1]},
}


def principal_axes(z: Tensor) -> tuple[Tensor, list[float]]:
    """The two directions of largest variance of features (n, d), as columns (d, 2), and the share of variance of each.

    The sign, which is arbitrary, makes the largest weight of a direction positive. Of one dimension the second is zero.
    """
    centred = z.double() - z.double().mean(0)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    axes = (directions * largest.sign())[:2].T
    share = singular.square() / singular.square().sum().clamp_min(1e-30)
    return torch.nn.functional.pad(axes, (0, 2 - axes.shape[1])), share[:2].tolist()


def head_directions(y: Tensor, scores: Tensor) -> Tensor:
    """The direction of each class's weight in a head, (n_way, 2), along the principal axes of queries.

    y (q, 2): their coordinates, whose mean is 0; scores (q, n_way): of the head. As the coordinates are uncorrelated,
    the slope of the scores along an axis is exactly what the weight has there.
    """
    return scores.double().T @ y / y.square().sum(0).clamp_min(1e-30)


def seen_by_head(z: Tensor, record: dict[str, Any]) -> Tensor:
    """Features (n, d) as the head of an episode takes them: unit ones, if it compares by cosine."""
    head = HEADS.get(record["method"])
    return head(z.shape[1], 1, 1.0, 0.0, torch.Generator()).project(z) if head else z


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of a query's own class minus the largest other, (n, n_way) and (n,) -> (n,): above 0 it is right."""
    own = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
    return logits[own] - logits.masked_fill(own, -torch.inf).amax(1)


def scores_of(record: dict[str, Any]) -> dict[str, Tensor]:
    """Scores (q, n_way) of the queries before and after alignment, on one scale: cosines, or the logits of softMax."""
    scale = record.get("scale", {"before": 1.0, "after": 1.0})
    return {when: record["logits"][when].float() / scale[when] for when in ("before", "after")}


def draw_margins(axes: Axes, record: dict[str, Any]) -> None:
    """The margin of each query before and after alignment; larger marks where its sign changed."""
    labels = record["query"]["labels"]
    before, after = (margins(scores, labels) for scores in scores_of(record).values())
    changed = (before > 0) != (after > 0)
    edges = [0.9 * put for put in changed.tolist()]
    colours = [colour(label) for label in labels.tolist()]
    axes.scatter(before, after, torch.where(changed, 44, 14), colours, edgecolors=INK, linewidths=edges, zorder=2)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.axline((0, 0), slope=1, color=GREY, linewidth=0.8, linestyle=":")
    right, wrong = int((changed & (after > 0)).sum()), int((changed & (before > 0)).sum())
    axes.text(0.02, 0.98, f"{right} put right", ha="left", va="top", transform=axes.transAxes)
    axes.text(0.98, 0.02, f"{wrong} put wrong", ha="right", va="bottom", transform=axes.transAxes)
    ends = torch.cat([before, after, torch.zeros(1)])
    low, high = ends.min().item(), ends.max().item()
    room = 0.05 * (high - low) or 1.0
    limits = (low - room, high + room)
    axes.set(title="margin of each query", xlim=limits, ylim=limits, aspect="equal")
    axes.set(xlabel="score of its class minus the best other, before", ylabel="after (above the dotted line: grown)")


def draw_directions(axes: Axes, y: Tensor, scores: dict[str, Tensor]) -> None:
    """The head's direction of each class among queries y (q, 2): dotted before alignment, solid after it."""
    tips = {when: head_directions(y, of_time) for when, of_time in scores.items()}
    longest = max(tip.norm(dim=1).max().item() for tip in tips.values()) or 1.0
    length = y.norm(dim=1).max().item() / longest
    for when, tip in tips.items():
        for way, (x_tip, y_tip) in enumerate((length * tip).tolist()):
            axes.plot([0, x_tip], [0, y_tip], color=colour(way), **DIRECTIONS[when])


def projection_figure(record: dict[str, Any]) -> Figure:
    """Support, query and related base samples on the principal axes of the queries, with the head's directions.

    record: see gather_episode. Where alignment has moved the features there is a panel before and one after it, each
    with axes of its own; in feature space, where it moves the head alone, one panel. The last has the queries' margins.
    """
    kinds = {kind: record[kind]["labels"] for kind in MARKERS}
    moved = not torch.equal(record["query"]["before"], record["query"]["after"])
    times = ("before", "after") if moved else ("after",)
    figure = Figure(figsize=(5.2 * (len(times) + 1), 5.6), layout="constrained")
    *panels, last = figure.subplots(1, len(times) + 1)
    draw_margins(last, record)
    for axes, when in zip(panels, times, strict=True):
        z = {kind: seen_by_head(record[kind][when], record) for kind in MARKERS}
        directions, share = principal_axes(z["query"])
        y = {kind: (part.double() - z["query"].double().mean(0)) @ directions for kind, part in z.items()}
        for kind, labels in kinds.items():
            axes.scatter(*y[kind].T, c=[colour(label) for label in labels.tolist()], **MARKERS[kind])
        scores = scores_of(record)
        draw_directions(axes, y["query"], {when: scores[when]} if moved else scores)
        axes.set(xlabel=f"PC 1, {100 * share[0]:.0f} % of variance", ylabel=f"PC 2, {100 * share[-1]:.0f} %")
        axes.set(xticks=[], yticks=[], title=f"{when} alignment" if moved else "the features, which stay, and the head")
    handles = [
        Line2D([], [], linestyle="", marker="s", color=colour(w), label=label_text(name))
        for w, name in enumerate(record["class_names"])
    ]
    handles += [
        Line2D([], [], linestyle="", marker=style["marker"], color=GREY, label=f"{kind} ({len(kinds[kind])})")
        for kind, style in MARKERS.items()
    ]
    handles += [Line2D([], [], color=GREY, label=f"head {when} alignment", **DIRECTIONS[when]) for when in DIRECTIONS]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    lines = [f"episode {record['episode']}: {record['title']}", standing_text(record)]
    figure.suptitle("\n".join(label_text(line, 110) for line in lines if line), fontsize=10)
    return figure
