"""Pictures of a saved episode: its features in two dimensions before and after alignment, its related base classes."""

import importlib
import textwrap
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from engine.errors import UserError
from reporting.figure_style import GREY, INK, PALE, colour, label_text

# Marker, size and z-order of each kind of sample; related ones lie below, the few support ones on top.
KINDS = {"related": ("x", 26, 1), "query": ("o", 20, 2), "support": ("*", 260, 3)}
MAX_RELATED = 10  # related base classes drawn of each novel class
COLUMN, ROW = 1.16, 3.1  # image sides: from one related class to the next, from one novel class to the next


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


def projection_figure(record: dict[str, Any], projection: str) -> Figure:
    """Support, query and related base samples before and after alignment, each panel a projection of its own.

    record: see gather_episode. projection: pca or tsne. The feature spaces before and after differ, and so do the axes.
    """
    kinds = {kind: record[kind]["labels"] for kind in KINDS}
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    for axes, when in zip(figure.subplots(1, 2), ("before", "after"), strict=True):
        z = torch.cat([record[kind][when] for kind in KINDS])
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
    columns = min(len(handles), 8, int(9.5 / (0.6 + 0.085 * longest)))  # inches
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.suptitle(f"episode {record['episode']}: {label_text(record['result'], 90)}", fontsize=10)
    return figure


def place_image(axes: Axes, image: Tensor, x: float, y: float, side: float) -> None:
    """A uint8 image (3, s, s), its top left corner at (x, y), `side` wide."""
    axes.imshow(image.permute(1, 2, 0).numpy(), extent=(x, x + side, y + side, y), interpolation="nearest", zorder=2)


def two_lines(name: str, width: int) -> str:
    """A name as a label of at most two lines of `width` characters, broken at its spaces and underscores if it can."""
    lines = textwrap.wrap(name.replace("_", " "), width)
    if len(lines) > 2:
        lines = [lines[0], lines[1][: width - 1] + "…"]
    return "\n".join(label_text(line) for line in lines)


def place_related(axes: Axes, related: dict[str, Any], x: float, y: float) -> None:
    """One related base class: its samples below each other, then its name and score."""
    for k in range(2):
        if k < len(related["images"]):
            place_image(axes, related["images"][k], x, y + 1.04 * k, 1.0)
        else:
            axes.fill([x, x + 1, x + 1, x], [y + 1.04 * k] * 2 + [y + 1.04 * k + 1] * 2, color=PALE, zorder=1)
    axes.text(x + 0.5, y + 2.1, f"{related['score']:.2f}", ha="center", va="top", fontsize=6.5, color=GREY)
    axes.text(x + 0.5, y + 2.36, two_lines(related["name"], 11), ha="center", va="top", fontsize=6.5, color=INK)


def related_base_figure(record: dict[str, Any]) -> Figure:
    """A row for each novel class: a support image, then samples of its related base classes with their scores."""
    rows = record["related_classes"]
    n_B = max(1, min(MAX_RELATED, max(len(row) for row in rows)))
    width, height = max(7.0, 2.6 + COLUMN * n_B), ROW * len(rows)
    figure = Figure(figsize=(0.62 * width, 0.62 * height + 0.3), layout="constrained")
    axes = figure.subplots()
    for w, (name, row) in enumerate(zip(record["class_names"], rows, strict=True)):
        y = ROW * w
        place_image(axes, record["support_images"][w], 0.0, y, 2.04)
        axes.text(
            1.02, y + 2.14, two_lines(name, 15), ha="center", va="top", fontsize=8.5, color=colour(w), weight="bold"
        )
        for b, related in enumerate(row[:n_B]):
            place_related(axes, related, 2.6 + COLUMN * b, y)
    axes.set(xlim=(-0.05, width), ylim=(height - 0.25, -0.05), aspect="equal")
    axes.set_axis_off()
    first = f", the first {n_B} of {len(rows[0])}" if len(rows[0]) > n_B else ""
    axes.set_title(f"support image, then its related base classes\nby score{first}", fontsize=9)
    return figure
