"""The table and figure of docs/when_it_helps.md from results of stage 3: python -m docs.when_it_helps FOLDER ...

A row per base classes, novel classes, backbone and shot, from the results of `--alignment head --align_blocks 0` and of
`--align_preset auto` in the results folders that are named. What predicts a gain is the related prototype's: it says,
without any training, how much base images near the support tell of the novel classes.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from engine.script import run_script
from methods.intervals import mean_record
from persistence.results import controls_of, interval
from reporting.figure_style import GREY, colour
from reporting.report import read_results
from reporting.result_table import markdown_table

HEADER = ["results", "base to novel classes", "backbone", "shots", "fine-tuning", "related prototype over nearest mean"]
HEADER += ["head over fine-tuning", "over nearest mean", "over logistic regression", "auto over fine-tuning", "chosen"]


def related_gain(record: dict[str, Any]) -> dict[str, float | None]:
    """The paired gain of the related prototype over the nearest mean by cosine, neither of which is trained."""
    controls = controls_of(record)
    names = ("related prototype", "nearest mean, cosine")
    after, before = (torch.tensor(controls[name]["accuracy_per_episode"], dtype=torch.float64) for name in names)
    return mean_record((after - before) / 100, torch.tensor(record["classes_per_episode"]))


def table_row(folder: Path, head: dict[str, Any], auto: dict[str, Any] | None) -> list[str]:
    """The cells of one row of results in a folder."""
    names = list(dict.fromkeys((head["dataset"], head["novel_dataset"])))
    controls = controls_of(head)
    over = [controls[name]["difference"] for name in ("nearest mean, cosine", "logistic regression")]
    gains = [interval(gain, "+") for gain in (related_gain(head), head["difference"], *over)]
    chosen = ["", ""]
    if auto:
        flags = auto["align_preset_auto"]["flags"]
        chosen = [interval(auto["difference"], "+"), "fine-tuning" if flags == "--alignment none" else f"`{flags}`"]
    about = [folder.name, " to ".join(names), head["backbone"].split(":")[-1], str(head["n_shot"])]
    return [*about, interval(head["fine_tuning"]), *gains, *chosen]


def gain_figure(heads: list[dict[str, Any]]) -> Figure:
    """The gain of the aligned head over the nearest mean and over fine-tuning against the related prototype's."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    shots, markers = sorted({head["n_shot"] for head in heads}), "os^Dv"
    for axes, name in zip(figure.subplots(1, 2), ("fine-tuning", "nearest mean, cosine"), strict=True):
        for head in heads:
            gain = head["difference"] if name == "fine-tuning" else controls_of(head)[name]["difference"]
            x, i = related_gain(head), shots.index(head["n_shot"])
            bars = {"xerr": x["ci95"], "yerr": gain["ci95"], "elinewidth": 0.8}
            axes.errorbar(x["accuracy"], gain["accuracy"], **bars, color=colour(i), marker=markers[i])
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set(title=f"Aligned head over {name}", xlabel="related prototype over nearest mean, points")
        axes.set_ylabel("points (paired 95% interval over episodes)")
    for i, n_shot in enumerate(shots):
        axes.plot([], [], color=colour(i), marker=markers[i], linestyle="", label=f"{n_shot}-shot")
    axes.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results_dir", type=Path, nargs="+")
    parser.add_argument("--figure", type=Path, help="where the figure is written")
    args = parser.parse_args()
    heads, autos = [], {}
    for folder in args.results_dir:
        for record in read_results(folder):
            key = (folder, record["novel_dataset"], record["n_shot"])
            if "align_preset_auto" in record:
                autos[key] = record
            elif record.get("alignment") == "head":
                heads.append((key, record))
    print(markdown_table(HEADER, [table_row(key[0], head, autos.get(key)) for key, head in heads]))
    if args.figure:
        gain_figure([head for _, head in heads]).savefig(args.figure, dpi=110)


if __name__ == "__main__":
    run_script(main)
