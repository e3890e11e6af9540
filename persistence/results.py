"""Result records: what was measured, on which episodes, and how it was made, as JSON beside a readable line."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from data.benchmarks import Split
from data.episodes import Episodes, classes_that_fit
from engine.records import provenance, write_json
from engine.run import Run
from engine.script import print_notes
from methods.controls import score_controls
from methods.evaluation import EpisodeScores, confusion_record, per_class_accuracy
from methods.features import Source
from methods.intervals import LEAST_WITHOUT, mean_and_ci95, mean_record
from persistence.aligned_episodes import AlignedEpisodes
from persistence.checkpoints import Checkpoint
from persistence.run_files import RunFiles


def interval(record: dict[str, Any], sign: str = "") -> str:
    """`71.45 ± 0.72 (3.10)`: the mean, its interval over episodes, if there are several, and in brackets over classes.

    The last is `?` where it cannot be told, and left out for results of earlier versions. sign: "+" for a difference.
    """
    ci95, over_classes = (record.get(name, math.nan) for name in ("ci95", "ci95_classes"))
    if ci95 is None and not sign:
        return f"{record['accuracy']:.2f}"
    text = f"{record['accuracy']:{sign}.2f} ± {math.nan if ci95 is None else ci95:.2f}"
    if over_classes is None:
        return f"{text} (?)"
    return text if math.isnan(over_classes) else f"{text} ({over_classes:.2f})"


def controls_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What alignment is compared with besides fine-tuning, by name, each with its difference; of stage 3 alone."""
    nearest = {f"nearest mean, {name}": control for name, control in record.get("nearest_mean", {}).items()}
    return nearest | record.get("controls", {})


def class_notes(episodes: Episodes) -> list[str]:
    """A line where too few episodes are without one of the classes for an interval over classes; else none."""
    missing = len(episodes) - int(episodes.classes.flatten().bincount().max())
    line = f"what other classes would give cannot be told, (?), where one is missing from {missing} episodes alone"
    return [line] if missing < LEAST_WITHOUT else []


def accuracy_record(scores: EpisodeScores, episodes: Episodes, class_names: list[str]) -> dict[str, Any]:
    """Accuracy and intervals (%) pooled over all episodes, each class's and each episode's (%), and the confusion."""
    numbers = mean_record(scores.accuracy, episodes.classes)
    return {
        **{name: None if number is None else round(number, 3) for name, number in numbers.items()},
        "accuracy_per_class": per_class_accuracy(scores, episodes, class_names),
        "accuracy_per_episode": [round(100 * a, 3) for a in scores.accuracy.tolist()],
        "confusion": confusion_record(scores.counts, episodes, class_names),
    }


def task_text(novel: Split, episodes: Episodes) -> str:
    """`5-way 1-shot, 600 novel episodes`, and of how many classes where some have too few images."""
    n_class, n_all = len(classes_that_fit(novel, episodes.shape)), len(novel.class_names)
    of = f" of {n_class} of the {n_all} classes" if n_class < n_all else ""
    return f"{episodes.n_way}-way {episodes.n_shot}-shot, {len(episodes)} {novel.split} episodes{of}"


def training_record(path: Path | str, checkpoint: Checkpoint | None, digest: str) -> dict[str, Any]:
    """What was trained before a test: its file, the epoch that it is of, counted from 0 with -1 for the model before
    training, of how many, and the beginning of a digest of its weights; checkpoint: None for a library's weights."""
    epochs = checkpoint.config.get("n_epoch") if checkpoint else None
    chosen = {"checkpoint": path, "checkpoint_epoch": checkpoint.epoch if checkpoint else None}
    return chosen | {"epochs_trained": epochs if isinstance(epochs, int) else None, "checkpoint_digest": digest[:8]}


def run_record(files: RunFiles, novel: Split, episodes: Episodes, run: Run) -> dict[str, Any]:
    """The part of a result that says what was run: protocol, data, config, versions, commit."""
    return {
        "stage": files.stage,
        "dataset": files.name.dataset,
        "novel_dataset": novel.benchmark,
        "dataset_fingerprint": novel.fingerprint,
        "method": files.name.method,
        "backbone": files.name.backbone,
        "img_size": novel.images.shape[-1],
        "eval_resize": novel.rule,
        "n_class": len(classes_that_fit(novel, episodes.shape)),
        "n_images": len(novel.labels),
        **asdict(episodes.shape),
        "n_episodes": len(episodes),
        "classes_per_episode": episodes.classes.tolist(),
        "seconds": round(time.time() - files.began, 2),
        **provenance(files.config, run),
    }


def save_result(
    files: RunFiles, novel: Split, episodes: Episodes, scores: EpisodeScores, run: Run, training: dict[str, Any]
) -> None:
    """Write the result of stage 1 or 2, and print its accuracy; the first rank does. training: a training_record."""
    if not run.ranks.first:
        return
    record = run_record(files, novel, episodes, run) | training
    record |= accuracy_record(scores, episodes, novel.class_names)
    write_json(files.table, record)
    print(f"{files.name.method} on {novel.benchmark}, {task_text(novel, episodes)}: {interval(record)} %")
    print_notes(class_notes(episodes))
    print(f"checkpoint {record['checkpoint']}, result {files.table}")


def save_alignment_result(
    done: AlignedEpisodes, novel: Source, base: Source, training: dict[str, Any], chosen: dict[str, Any] | None
) -> None:
    """Write the result of all episodes, alignment against fine-tuning and the other controls, and print it.

    training: a training_record. chosen: the record of --align_preset auto.
    """
    files, episodes, setting, columns = done.files, done.episodes, done.setting, done.tensors()
    split, names = novel.split, novel.split.class_names
    n_small = int((columns["n_drawn"] < setting.related.aug_size).sum())
    if n_small and setting.alignment != "none":
        print(
            f"note: in {n_small} of {len(done)} episodes a novel class has fewer related images than --aug_size "
            f"{setting.related.aug_size}, so that fewer were drawn of every class: give a larger --n_B for more, "
            "or a smaller --aug_size to draw as many in all episodes"
        )
    before, after = done.scores("finetuned"), done.scores("aligned")
    controls = {
        name: accuracy_record(scores, episodes, names)
        | {"difference": difference_record(scores, after, episodes.classes)}
        for name, scores in score_controls(novel.features, base.features, episodes, done.run).items()
    }
    gain = difference_record(before, after, episodes.classes)
    record = run_record(files, split, episodes, done.run) | accuracy_record(after, episodes, names)
    record |= {
        "alignment": setting.alignment,
        **training,
        "fine_tuning": accuracy_record(before, episodes, names),
        "difference": gain,
        "nearest_mean": {name: controls.pop(f"nearest mean, {name}") for name in ("Euclidean", "cosine")},
        "controls": controls,
        "curve": curve_record(columns["curve"], setting.record_curve),
        "n_empty_related_sets": int(columns["n_empty"].sum()),
        "n_episodes_below_aug_size": n_small,
    }
    if chosen:
        record["align_preset_auto"] = chosen
    write_json(files.table, record)
    task = f"{files.name.method} on {split.benchmark}, {task_text(split, episodes)}"
    print(f"{task}: accuracy in %, and alignment's paired difference")
    rows = {f"{setting.alignment} alignment": record, "fine-tuning": record["fine_tuning"] | {"difference": gain}}
    for name, numbers in (rows | controls_of(record)).items():
        above = "" if numbers is record else interval(numbers["difference"], "+")
        print(f"  {name:<26}{interval(numbers):<24}{above}".rstrip())
    print_notes(class_notes(episodes))
    print(f"result {files.table}")


def difference_record(before: EpisodeScores, after: EpisodeScores, classes: Tensor) -> dict[str, float | None]:
    """The paired difference of two ways to predict the same queries, and its intervals, in points."""
    return mean_record(after.accuracy.double() - before.accuracy.double(), classes)


def curve_record(accuracy: Tensor, every: int) -> list[dict[str, float]]:
    """Mean accuracy (%), and its paired difference from iteration 0, over iterations 0, every, 2 every, ..., each with
    its 95% interval.

    accuracy (E, k): the share of right queries of each episode at those iterations; the first is fine-tuning.
    """
    rows = []
    for k in range(accuracy.shape[1] if every else 0):
        gain, gain_ci95 = mean_and_ci95(accuracy[:, k].double() - accuracy[:, 0].double())
        _, ci95 = mean_and_ci95(accuracy[:, k])
        row = {"iteration": k * every, "accuracy": 100 * accuracy[:, k].mean().item(), "ci95": 100 * ci95}
        rows.append(row | {"gain": 100 * gain, "gain_ci95": 100 * gain_ci95})
    return rows
