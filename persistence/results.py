"""Result records: what was measured, on which episodes, and how it was made, as JSON beside a readable line."""

import time
from typing import Any

from torch import Tensor

from data.benchmarks import Split
from data.episodes import Episodes, EpisodeShape, classes_that_fit
from engine.records import provenance, write_json
from engine.run import Run
from methods.evaluation import EpisodeScores, confusion_record, mean_and_ci95, per_class_accuracy
from persistence.run_files import RunFiles


def percent(mean: float, ci95: float) -> str:
    """`71.45 ± 0.72` from shares of 1."""
    return f"{100 * mean:.2f} ± {100 * ci95:.2f}"


def accuracy_record(scores: EpisodeScores, episodes: Episodes, class_names: list[str]) -> dict[str, Any]:
    """Accuracy and interval (%) pooled over all episodes, each class's and each episode's (%), and the confusion."""
    mean, ci95 = mean_and_ci95(scores.accuracy)
    return {
        "accuracy": round(100 * mean, 3),
        "ci95": round(100 * ci95, 3) if len(episodes) > 1 else None,
        "accuracy_per_class": per_class_accuracy(scores, episodes, class_names),
        "accuracy_per_episode": [round(100 * a, 3) for a in scores.accuracy.tolist()],
        "confusion": confusion_record(scores.counts, episodes, class_names),
    }


def n_classes_of(novel: Split, episodes: Episodes) -> int:
    """The number of classes that episodes are drawn from: those with enough images."""
    return len(classes_that_fit(novel, EpisodeShape(episodes.n_way, episodes.n_shot, episodes.query.shape[2])))


def task_text(novel: Split, episodes: Episodes) -> str:
    """`5-way 1-shot, 600 novel episodes`, and of how many classes where some have too few images."""
    n_class, n_all = n_classes_of(novel, episodes), len(novel.class_names)
    of = f" of {n_class} of the {n_all} classes" if n_class < n_all else ""
    return f"{episodes.n_way}-way {episodes.n_shot}-shot, {len(episodes)} {novel.split} episodes{of}"


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
        "n_class": n_classes_of(novel, episodes),
        "n_way": episodes.n_way,
        "n_shot": episodes.n_shot,
        "n_query": episodes.query.shape[2],
        "n_episodes": len(episodes),
        "seconds": round(time.time() - files.began, 2),
        **provenance(files.config, run),
    }


def save_result(files: RunFiles, novel: Split, episodes: Episodes, scores: EpisodeScores, run: Run) -> None:
    """Write the result of stage 1 or 2, and print its accuracy; the first rank does."""
    if not run.ranks.first:
        return
    record = run_record(files, novel, episodes, run) | accuracy_record(scores, episodes, novel.class_names)
    write_json(files.table, record)
    print(
        f"{files.name.method} on {novel.benchmark}, {task_text(novel, episodes)}: "
        f"{percent(*mean_and_ci95(scores.accuracy))} %"
    )


def paired_difference(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean of after - before over the same episodes, (E,) each, and its paired 95% interval."""
    return mean_and_ci95(after.double() - before.double())


def difference_record(before: EpisodeScores, after: EpisodeScores) -> dict[str, float]:
    """The paired difference of two ways to predict the same queries, and its interval, in points."""
    difference, ci95 = paired_difference(before.accuracy, after.accuracy)
    return {"accuracy": 100 * difference, "ci95": 100 * ci95}


def curve_record(accuracy: Tensor, every: int) -> list[dict[str, float]]:
    """Mean accuracy (%), and its paired difference from iteration 0, over iterations 0, every, 2 every, ..., each with
    its 95% interval.

    accuracy (E, k): the share of right queries of each episode at those iterations; the first is fine-tuning.
    """
    rows = []
    for k in range(accuracy.shape[1] if every else 0):
        gain, gain_ci95 = paired_difference(accuracy[:, 0], accuracy[:, k])
        _, ci95 = mean_and_ci95(accuracy[:, k])
        row = {"iteration": k * every, "accuracy": 100 * accuracy[:, k].mean().item(), "ci95": 100 * ci95}
        rows.append(row | {"gain": 100 * gain, "gain_ci95": 100 * gain_ci95})
    return rows
