"""Figures of results: training curves, accuracy against alignment iterations, and the confusion of novel classes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from methods.meta_learners import META_LEARNERS
from reporting.figure_style import GREY, colour, label_text, line_style
from reporting.result_table import MEAN, ResultRow, tested_on

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


def shots_figure(rows: Sequence[ResultRow]) -> Figure | None:
    """Accuracy against shots of each method, with both intervals; None where no method has results of several shots.

    The band is over episodes, or between seeds; thin bars are over classes.
    """
    lines: dict[str, list[ResultRow]] = {}
    for row in rows:
        name = ", ".join(row.cells[part] for part in ("method", "dataset", "backbone"))
        lines.setdefault(f"{name}, {row.record['n_way']}-way", []).append(row)
    lines = {name: same for name, same in lines.items() if len({row.record["n_shot"] for row in same}) > 1}
    if not lines:
        return None
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, same) in enumerate(lines.items()):
        points = sorted(
            ({"n_shot": row.record["n_shot"]} | row.numbers[MEAN] for row in same), key=lambda p: p["n_shot"]
        )
        draw_band(axes, points, ("n_shot", "accuracy", "ci95"), line_style(i) | {"label": label_text(name, 90)})
        over_classes = [point.get("ci95_classes") or 0.0 for point in points]
        x, y = ([point[key] for point in points] for key in ("n_shot", "accuracy"))
        axes.errorbar(x, y, over_classes, fmt="none", ecolor=colour(i), elinewidth=0.8, capsize=2)
    shots = sorted({row.record["n_shot"] for same in lines.values() for row in same})
    axes.set(xscale="log", xlabel="images per class in the support", ylabel="accuracy, %")
    axes.set_xticks(shots, [str(n) for n in shots])
    axes.minorticks_off()
    axes.set_title("95% intervals: band over episodes or between seeds, bars over classes", fontsize=10)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=8)
    return figure


def loss_kind(name: str) -> tuple[str, str]:
    """The loss of a training, and what its training accuracy is of, from the run's name."""
    longest_first = sorted(META_LEARNERS, key=len, reverse=True)
    learner = next((each for each in longest_first if f" {each.replace('_', ' ')} " in name), None)
    if learner is None:
        return "cross-entropy over all base classes", "base images, among all base classes"
    return ("squared error" if learner == "RelationNet" else "cross-entropy") + " of episodes", "training episodes"


def training_figure(logs: dict[str, Rows]) -> Figure:
    """Loss, training accuracy and validation accuracy by epoch: rows of metrics.jsonl of each run, by name.

    Each kind of loss has a row of panels. Epochs are counted from 1; a mark at 0 is the model before training.
    """
    kinds = list(dict.fromkeys(map(loss_kind, logs)))
    figure = Figure(figsize=(13, 0.8 + 3.4 * len(kinds)), layout="constrained")
    panels = dict(zip(kinds, figure.subplots(len(kinds), 3, squeeze=False), strict=True))
    for kind, (loss, base, val) in panels.items():
        loss.set(title=f"Loss: {kind[0]}", ylabel="loss")
        base.set(title=f"Accuracy: {kind[1]}", ylabel="%")
        val.set(title="Accuracy: val episodes", ylabel="% (95% interval)")
        for axes in (loss, base, val):
            axes.set(xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
    for i, (name, rows) in enumerate(logs.items()):
        loss, base, val = panels[loss_kind(name)]
        counted = [row | {"epoch": row["epoch"] + 1} for row in rows]
        trained = [row for row in counted if row["epoch"]]
        x = [row["epoch"] for row in trained]
        loss.plot(x, [row["loss"] for row in trained], label=label_text(name, 60), **line_style(i))
        base.plot(x, [row["base_accuracy"] for row in trained], **line_style(i))
        draw_band(val, trained, ("epoch", "val_accuracy", "val_ci95"), line_style(i))
        for row in counted[: len(counted) - len(trained)]:
            style = {"fmt": "D", "color": colour(i), "markerfacecolor": "white", "capsize": 3}
            val.errorbar(0, row["val_accuracy"], row["val_ci95"] or 0.0, **style)
            val.annotate("before training", (0, row["val_accuracy"]), (8, -3), textcoords="offset points", fontsize=7)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def share_matrix(confusion: dict[str, dict[str, int]], names: list[str]) -> Tensor:
    """A confusion_record as (C, C), rows true: each row in % of the queries of its class."""
    counts = torch.tensor([[confusion.get(true, {}).get(name, 0) for name in names] for true in names])
    return 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)


def draw_matrix(axes: Axes, names: list[str], values: Tensor, is_difference: bool) -> Any:
    """Shares of queries in %, or differences of them in points, (C, C), rows true; returns the image."""
    largest = max(1.0, values.abs().max().item())
    if is_difference:
        image = axes.imshow(values.numpy(), cmap="PuOr", vmin=-largest, vmax=largest, interpolation="nearest")
    else:  # the root shows the small shares that confusions are
        image = axes.imshow(values.numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    shown = range(0, len(names), -(-len(names) // MAX_LABELS))  # every second one of 41 to 80
    labels = [label_text(names[i], 30) for i in shown]
    axes.set_xticks(shown, labels, rotation=90, fontsize=7)
    axes.set_yticks(shown, labels, fontsize=7)
    if len(names) <= MAX_NUMBERS:
        strong = 0.7 * largest if is_difference else 40
        for i, j in torch.nonzero(values.abs() >= 0.5).tolist():
            text = f"{values[i, j]:{'+' if is_difference else ''}.0f}"
            ink = "white" if values[i, j].abs() > strong else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color=ink)
    axes.set(xlabel="predicted class", ylabel="true class")
    return image


def confusion_figure(record: dict[str, Any]) -> Figure:
    """Confusion over all episodes of a result; of stage 3 also what alignment has changed of fine-tuning's."""
    of_control = record.get("fine_tuning", {}).get("confusion", {})
    rows = [*record["confusion"].items(), *of_control.items()]
    names = sorted({name for true, predicted in rows for name in (true, *predicted)})
    shares = share_matrix(record["confusion"], names)
    panels = {f"{run_name(record).split(',')[0]}, {record['accuracy']:.1f} %": shares}
    if of_control:
        gain = record["difference"]["accuracy"]
        panels[f"minus fine-tuning, {gain:+.1f} points"] = shares - share_matrix(of_control, names)
    side = 1.8 + max(3.2, 0.17 * min(MAX_LABELS, len(names)))
    figure = Figure(figsize=((side + 0.6) * len(panels), side + 0.3), layout="constrained")
    subplots = figure.subplots(1, len(panels), squeeze=False)[0]
    for i, (axes, (title, values)) in enumerate(zip(subplots, panels.items(), strict=True)):
        image = draw_matrix(axes, names, values, is_difference=i > 0)
        axes.set_title(title)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=None if i else [0, 1, 5, 20, 50, 100])
        bar.set_label("points" if i else "% of the queries of a class")
    figure.suptitle(label_text(f"{run_name(record)}, {record['n_episodes']} episodes", 90), fontsize=10)
    return figure
