"""Pictures of a saved episode: features in two dimensions before and after alignment, margins, related base classes."""

import importlib
import textwrap
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from engine.errors import UserError
from models.heads import unit
from reporting.figure_style import GREY, INK, colour, label_text

# Marker, size and z-order of each kind of sample; related ones lie below, the few support ones on top.
KINDS = {"related": ("x", 26, 1), "query": ("o", 20, 2), "support": ("*", 260, 3)}
MAX_RELATED = 10  # related base classes drawn of each novel class
N_SAMPLES = 2  # images drawn of each of them


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


def tsne(z: Tensor) -> Tensor:
    """t-SNE of features, (n, d) -> (n, 2), by scikit-learn. Raises UserError when that is not installed."""
    try:
        manifold = importlib.import_module("sklearn.manifold")
    except ImportError as error:
        raise UserError(
            "--projection tsne needs a package that is not installed: pip install scikit-learn, or give pca"
        ) from error
    perplexity = max(1.0, min(30.0, (len(z) - 1) / 3))
    model = manifold.TSNE(2, perplexity=perplexity, init="pca", random_state=0)
    return torch.from_numpy(model.fit_transform(z.numpy()))


def draw_projection(axes: Axes, y: Tensor, kinds: dict[str, Tensor]) -> None:
    """Points y (n, 2), those of each kind after another: kinds holds the labels (n_kind,) of each."""
    parts = y.split([len(labels) for labels in kinds.values()])
    for (kind, labels), part in zip(kinds.items(), parts, strict=True):
        marker, size, order = KINDS[kind]
        edge = {"edgecolors": INK, "linewidths": 0.9} if kind == "support" else {"linewidths": 1.1}
        colours = [colour(label) for label in labels.tolist()]
        if kind == "query":
            edge = {"edgecolors": "white", "linewidths": 0.4}
        axes.scatter(part[:, 0], part[:, 1], s=size, marker=marker, c=colours, zorder=order, **edge)
    axes.set(xticks=[], yticks=[])


def seen_by_head(z: Tensor, record: dict[str, Any]) -> Tensor:
    """Features (n, d) as the head of the episode takes them: unit ones, if it compares by cosine."""
    return unit(z) if record.get("method") in ("cosMax", "arcMax") else z


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of a query's own class minus the largest other, (n, n_way) and (n,) -> (n,): above 0 it is right."""
    own = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
    return logits[own] - logits.masked_fill(own, -torch.inf).amax(1)


def draw_margins(axes: Axes, record: dict[str, Any]) -> None:
    """Each query's margin before alignment and after; those that alignment put right or wrong have larger marks."""
    labels = record["query"]["labels"]
    before, after = (margins(record["logits"][when].float(), labels) for when in ("before", "after"))
    changed = (before > 0) != (after > 0)
    for part, size in ((~changed, 14), (changed, 44)):
        colours = [colour(label) for label in labels[part].tolist()]
        edge: dict[str, Any] = {"edgecolors": INK, "linewidths": 0.9 if size > 14 else 0.0}
        axes.scatter(before[part], after[part], s=size, c=colours, zorder=2, **edge)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.axvline(0, color=GREY, linewidth=0.8)
    right, wrong = int(((before <= 0) & (after > 0)).sum()), int(((before > 0) & (after <= 0)).sum())
    corner: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 9, "color": INK}
    axes.text(0.02, 0.98, f"{right} put right", ha="left", va="top", **corner)
    axes.text(0.98, 0.02, f"{wrong} put wrong", ha="right", va="bottom", **corner)
    axes.set(title="margin of each query", xlabel="logit of its class minus the best other, before", ylabel="after")


def projection_figure(record: dict[str, Any], projection: str) -> Figure:
    """Support, query and related base samples before and after alignment, each panel a projection of its own.

    record: see gather_episode. projection: pca or tsne. The feature spaces before and after differ, and so do the axes.
    A third panel has the margins of the queries, if the record has their logits.
    """
    kinds = {kind: record[kind]["labels"] for kind in KINDS}
    panels = 3 if "logits" in record else 2
    figure = Figure(figsize=(5 * panels, 5.4), layout="constrained")
    subplots = figure.subplots(1, panels)
    if "logits" in record:
        draw_margins(subplots[2], record)
    for axes, when in zip(subplots, ("before", "after"), strict=False):
        z = seen_by_head(torch.cat([record[kind][when] for kind in KINDS]), record)
        if projection == "pca":
            y, share = pca(z)
            axes.set(xlabel=f"PC 1, {100 * share[0]:.0f} % of variance", ylabel=f"PC 2, {100 * share[-1]:.0f} %")
        else:
            y = tsne(z)
            axes.set(xlabel="t-SNE 1", ylabel="t-SNE 2")
        draw_projection(axes, y, kinds)
        axes.set_title(f"{when} alignment")
    handles = [
        Line2D([], [], linestyle="", marker="s", color=colour(w), label=label_text(name))
        for w, name in enumerate(record["class_names"])
    ]
    handles += [
        Line2D([], [], linestyle="", marker=marker, color=GREY, markersize=size**0.5 * 0.75, label=f"{kind} ({n})")
        for (kind, (marker, size, _)), n in zip(KINDS.items(), map(len, kinds.values()), strict=True)
    ]
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), 8, int((5 * panels - 0.5) / (0.6 + 0.085 * longest)))  # inches
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.suptitle(f"episode {record['episode']}: {label_text(record['result'], 90)}", fontsize=10)
    return figure


def two_lines(name: str, width: int) -> str:
    """A name as a label of at most two lines of `width` characters, broken at its spaces and underscores if it can."""
    lines = textwrap.wrap(name.replace("_", " "), width)
    if len(lines) > 2:
        lines = [lines[0], lines[1][: width - 1] + "…"]
    return "\n".join(label_text(line) for line in lines)


def draw_images(axes: Axes, images: list[Tensor], name: str, **style: Any) -> None:
    """uint8 images (3, s, s) below each other, and a name below them; nothing but the name without images."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_xlabel(name, **style)
    if images:
        axes.imshow(torch.cat(images, 1).permute(1, 2, 0).numpy(), interpolation="nearest")


def related_base_figure(record: dict[str, Any]) -> Figure:
    """A row for each novel class: a support image, then samples of its related base classes with their scores."""
    rows = record["related_classes"]
    n_B = max(1, min(MAX_RELATED, max(len(row) for row in rows)))
    figure = Figure(figsize=(0.8 * n_B + 1.8, 2.0 * len(rows) + 0.4), layout="constrained")
    grid = figure.subplots(len(rows), n_B + 1, squeeze=False, width_ratios=[2, *[1] * n_B])
    for w, (name, row) in enumerate(zip(record["class_names"], rows, strict=True)):
        support = {"fontsize": 8.5, "color": colour(w), "weight": "bold"}
        draw_images(grid[w, 0], [record["support_images"][w]], two_lines(name, 15), **support)
        for b, axes in enumerate(grid[w, 1:]):
            related = row[b] if b < len(row) else {"images": [], "name": "", "score": None}
            score = f"{related['score']:.2f}\n" if b < len(row) else ""
            images = list(related["images"][:N_SAMPLES])
            draw_images(axes, images, score + two_lines(related["name"], 11), fontsize=6.5, color=INK)
    first = f", the first {n_B} of {len(rows[0])}" if len(rows[0]) > n_B else ""
    figure.suptitle(f"support image, then its related base classes\nby score{first}", fontsize=9)
    return figure
