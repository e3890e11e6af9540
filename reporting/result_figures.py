"""Figures of results: training curves, accuracy against alignment iterations, and the confusion of novel classes."""

import math
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from reporting.figure_style import GREY, INK, colour, label_text, line_style
from reporting.report import tested_on

Rows = list[dict[str, Any]]
MAX_LABELS = 40  # classes named at each side of a confusion matrix
MAX_NUMBERS = 10  # classes up to which its cells hold numbers


def draw_band(axes: Axes, rows: Rows, keys: tuple[str, str, str], style: dict[str, Any]) -> None:
    """A line of the mean, with its 95% interval as a band where there is one. keys: x, mean and interval in rows."""
    x, mean, half = ([math.nan if row[key] is None else row[key] for row in rows] for key in keys)
    axes.plot(x, mean, **style)
    low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)


def run_name(record: dict[str, Any]) -> str:
    """A result in words: method, alignment and task."""
    alignment = f" {record['alignment']}" if "alignment" in record else ""
    return f"{record['method']}{alignment}, {tested_on(record)} {record['n_way']}-way {record['n_shot']}-shot"


def curve_figure(records: list[dict[str, Any]]) -> Figure:
    """Accuracy, and its paired gain over fine-tuning, against alignment iterations, with 95% intervals."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    accuracy, gain = figure.subplots(1, 2)
    for i, record in enumerate(records):
        rows = record["curve"]
        style = {"color": colour(i), "marker": "o", "markersize": 3.5}
        label = label_text(run_name(record), 60)
        draw_band(accuracy, rows, ("iteration", "accuracy", "ci95"), style | {"label": label})
        accuracy.axhline(rows[0]["accuracy"], color=colour(i), linestyle=":", linewidth=1)
        draw_band(gain, rows, ("iteration", "gain", "gain_ci95"), style)
    gain.axhline(0, color=GREY, linewidth=0.8)
    x_name = "alignment iterations (0: fine-tuning)"
    accuracy.set(title="Query accuracy", ylabel="accuracy, % (95% interval)", xlabel=x_name)
    gain.set(title="Gain over fine-tuning, the same episodes", ylabel="points (paired 95% interval)", xlabel=x_name)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def training_figure(logs: dict[str, Rows]) -> Figure:
    """Loss, and base and validation accuracy, by epoch: rows of metrics.jsonl of each run, by name."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for i, (name, rows) in enumerate(logs.items()):
        x = [row["epoch"] for row in rows]
        loss.plot(x, [row["loss"] for row in rows], label=label_text(name, 60), **line_style(i))
        accuracy.plot(x, [row["base_accuracy"] for row in rows], color=colour(i), linestyle="--")
        draw_band(accuracy, rows, ("epoch", "val_accuracy", "val_ci95"), line_style(i))
    loss.set(title="Training loss", xlabel="epoch", ylabel="loss")
    accuracy.set(title="Accuracy", xlabel="epoch", ylabel="% (validation: 95% interval)")
    lines = Line2D([], [], color=INK, label="validation"), Line2D([], [], color=INK, linestyle="--", label="base")
    accuracy.legend(handles=lines, frameon=False)
    for axes in (loss, accuracy):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def as_matrix(confusion: dict[str, dict[str, int]]) -> tuple[list[str], Tensor]:
    """Class names (C,), sorted, and the counts (C, C) of a confusion_record, rows true."""
    names = sorted({*confusion, *(name for row in confusion.values() for name in row)})
    counts = [[confusion.get(true, {}).get(name, 0) for name in names] for true in names]
    return names, torch.tensor(counts)


def draw_confusion(axes: Axes, confusion: dict[str, dict[str, int]], title: str) -> Any:
    """The counts of a confusion_record, each row in % of its queries; returns the image, for a colour bar."""
    names, counts = as_matrix(confusion)
    share = 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)
    # The root shows the small shares that confusions are.
    image = axes.imshow(share.numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    shown = range(0, len(names), -(-len(names) // MAX_LABELS))  # every second one of 41 to 80
    labels = [label_text(names[i], 18) for i in shown]
    axes.set_xticks(shown, labels, rotation=90, fontsize=7)
    axes.set_yticks(shown, labels, fontsize=7)
    if len(names) <= MAX_NUMBERS:
        for i, j in torch.nonzero(share >= 0.5).tolist():
            ink = "white" if share[i, j] > 40 else "black"
            axes.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    return image


def confusion_figure(record: dict[str, Any]) -> Figure:
    """Confusion over all episodes of a result; of stage 3 by fine-tuning and after alignment."""
    panels = {record["method"]: record}
    if "alignment" in record:
        panels = {"fine-tuning": record["fine_tuning"], f"{record['alignment']} alignment": record}
    side = 1.6 + max(3.2, 0.17 * min(MAX_LABELS, len(record["confusion"])))
    figure = Figure(figsize=(side * len(panels) + 0.8, side + 0.3), layout="constrained")
    subplots = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, part) in zip(subplots, panels.items(), strict=True):
        image = draw_confusion(axes, part["confusion"], f"{name}, {part['accuracy']:.1f} %")
    bar = figure.colorbar(image, ax=list(subplots), shrink=0.8, ticks=[0, 1, 5, 20, 50, 100])
    bar.set_label("% of the queries of a class")
    figure.suptitle(label_text(f"{run_name(record)}, {record['n_episodes']} episodes", 90), fontsize=10)
    return figure
