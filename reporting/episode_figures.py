"""A figure of a saved episode: features in two dimensions before and after alignment, and the margins of queries."""

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from models import HEADS
from reporting.figure_style import GREY, INK, colour, label_text

# Each kind of sample; related ones lie below, the few support ones on top.
KINDS: dict[str, dict[str, Any]] = {
    "related": {"marker": "x", "s": 26, "linewidths": 1.1, "zorder": 1},
    "query": {"marker": "o", "s": 20, "linewidths": 0.4, "edgecolors": "white", "zorder": 2},
    "support": {"marker": "*", "s": 260, "linewidths": 0.9, "edgecolors": INK, "zorder": 3},
}


def pca(z: Tensor) -> tuple[Tensor, list[float]]:
    """Features (n, d) on their two directions of largest variance, (n, 2), and the share of variance of each.

    The sign, which is arbitrary, makes the largest weight of a direction positive. One dimension leaves zeros.
    """
    centred = z.double() - z.double().mean(0)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    y = centred @ (directions * largest.sign())[:2].T
    share = singular.square() / singular.square().sum().clamp_min(1e-30)
    return torch.nn.functional.pad(y, (0, 2 - y.shape[1])), share[:2].tolist()


def seen_by_head(z: Tensor, record: dict[str, Any]) -> Tensor:
    """Features (n, d) as the head of an episode takes them: unit ones, if it compares by cosine."""
    head = HEADS.get(record["method"])
    return head(z.shape[1], 1, 1.0, 0.0, torch.Generator()).project(z) if head else z


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of a query's own class minus the largest other, (n, n_way) and (n,) -> (n,): above 0 it is right."""
    own = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
    return logits[own] - logits.masked_fill(own, -torch.inf).amax(1)


def draw_margins(axes: Axes, record: dict[str, Any]) -> None:
    """The margin of each query before and after alignment; larger marks where its sign changed."""
    labels = record["query"]["labels"]
    before, after = (margins(record["logits"][when].float(), labels) for when in ("before", "after"))
    changed = (before > 0) != (after > 0)
    edges = [0.9 * put for put in changed.tolist()]
    colours = [colour(label) for label in labels.tolist()]
    axes.scatter(before, after, torch.where(changed, 44, 14), colours, edgecolors=INK, linewidths=edges, zorder=2)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.axvline(0, color=GREY, linewidth=0.8)
    right, wrong = int((changed & (after > 0)).sum()), int((changed & (before > 0)).sum())
    axes.text(0.02, 0.98, f"{right} put right", ha="left", va="top", transform=axes.transAxes)
    axes.text(0.98, 0.02, f"{wrong} put wrong", ha="right", va="bottom", transform=axes.transAxes)
    axes.set(title="margin of each query", xlabel="logit of its class minus the best other, before", ylabel="after")


def projection_figure(record: dict[str, Any]) -> Figure:
    """Support, query and related base samples before and after alignment, each panel a projection of its own.

    record: see gather_episode. The feature spaces before and after differ, and so do the axes. A third panel has the
    margins of the queries.
    """
    kinds = {kind: record[kind]["labels"] for kind in KINDS}
    figure = Figure(figsize=(15, 5.4), layout="constrained")
    *panels, last = figure.subplots(1, 3)
    draw_margins(last, record)
    for axes, when in zip(panels, ("before", "after"), strict=True):
        z = seen_by_head(torch.cat([record[kind][when] for kind in KINDS]), record)
        y, share = pca(z)
        for part, (kind, labels) in zip(y.split([*map(len, kinds.values())]), kinds.items(), strict=True):
            axes.scatter(*part.T, c=[colour(label) for label in labels.tolist()], **KINDS[kind])
        axes.set(xlabel=f"PC 1, {100 * share[0]:.0f} % of variance", ylabel=f"PC 2, {100 * share[-1]:.0f} %")
        axes.set(xticks=[], yticks=[], title=f"{when} alignment")
    handles = [
        Line2D([], [], linestyle="", marker="s", color=colour(w), label=label_text(name))
        for w, name in enumerate(record["class_names"])
    ]
    handles += [
        Line2D([], [], linestyle="", marker=style["marker"], color=GREY, label=f"{kind} ({len(kinds[kind])})")
        for kind, style in KINDS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"episode {record['episode']}: {label_text(record['result'], 90)}", fontsize=10)
    return figure
