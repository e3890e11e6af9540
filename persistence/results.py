"""Result records: what was measured, on which episodes, and how it was made, as JSON beside a readable line."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.benchmarks import Split
from data.episodes import Episodes
from engine.metrics import MetricsLog
from engine.records import provenance, write_json
from methods.confusion import confusion_record
from methods.evaluation import EpisodeScores, accuracy_per_class, mean_and_ci95


def result_path(
    results_dir: Path, stage: str, best_model: Path, dataset: str, novel_dataset: str, alignment: str = ""
) -> Path:
    """Where a result is written: named as the run's best model, the alignment and another novel benchmark appended."""
    parts = [stage, best_model.stem.removesuffix("_bestModel"), alignment]
    parts.append(f"to_{novel_dataset}" if novel_dataset != dataset else "")
    return results_dir / "tables" / f"{'_'.join(part for part in parts if part)}.json"


def percent(mean: float, ci95: float) -> str:
    """`71.45 ± 0.72` from shares of 1."""
    return f"{100 * mean:.2f} ± {100 * ci95:.2f}"


def accuracy_record(scores: EpisodeScores, episodes: Episodes, class_names: list[str]) -> dict[str, Any]:
    """Accuracy and interval (%) pooled over all episodes, each class's and each episode's (%), and the confusion."""
    mean, ci95 = mean_and_ci95(scores.accuracy)
    return {
        "accuracy": round(100 * mean, 3),
        "ci95": round(100 * ci95, 3) if len(episodes) > 1 else None,
        "accuracy_per_class": accuracy_per_class(scores, episodes, class_names),
        "accuracy_per_episode": [round(100 * a, 3) for a in scores.accuracy.tolist()],
        "confusion": confusion_record(scores.counts, episodes, class_names),
    }


def run_record(
    stage: str, config: dict[str, Any], novel: Split, episodes: Episodes, seconds: float, device: torch.device
) -> dict[str, Any]:
    """The part of a result that says what was run: protocol, data, config, versions, commit."""
    return {
        "stage": stage,
        "dataset": config["dataset"],
        "novel_dataset": novel.benchmark,
        "dataset_fingerprint": novel.fingerprint,
        "method": config["method"],
        "backbone": config["backbone"],
        "img_size": config["img_size"],
        "n_way": episodes.n_way,
        "n_shot": episodes.n_shot,
        "n_query": episodes.query.shape[2],
        "n_episodes": len(episodes),
        "seconds": round(seconds, 2),
        **provenance(config, device),
    }


def log_epoch(
    metrics: MetricsLog, epoch: int, loss: float, base_accuracy: float, val: EpisodeScores, best: float, began: float
) -> None:
    """Print a line on an epoch that began at time `began`, and write its row to the metrics; epoch 0 starts them anew.

    base_accuracy and best, the highest validation accuracy so far, are shares of 1.
    """
    val_accuracy, val_ci95 = mean_and_ci95(val.accuracy)
    seconds = time.time() - began
    print(
        f"epoch {epoch:3d}  loss {loss:.3f}  base accuracy {100 * base_accuracy:.1f}  "
        f"val {percent(val_accuracy, val_ci95)}  best {100 * best:.2f}  {seconds:.1f} s"
    )
    row = {"epoch": epoch, "loss": loss, "base_accuracy": 100 * base_accuracy}
    metrics.write(epoch, row | {"val_accuracy": 100 * val_accuracy, "val_ci95": 100 * val_ci95, "seconds": seconds})


def save_result(
    table: Path,
    stage: str,
    config: dict[str, Any],
    novel: Split,
    episodes: Episodes,
    scores: EpisodeScores,
    began: float,
    device: torch.device,
) -> None:
    """Write the result of a run that began at time `began` to the file `table`, and print its accuracy."""
    record = run_record(stage, config, novel, episodes, time.time() - began, device)
    write_json(table, record | accuracy_record(scores, episodes, novel.class_names))
    print(
        f"{config['method']} on {novel.benchmark}, {episodes.n_way}-way {episodes.n_shot}-shot, {len(episodes)} "
        f"{novel.split} episodes: {percent(*mean_and_ci95(scores.accuracy))} %"
    )


def paired_difference(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean of after - before over the same episodes, (E,) each, and its paired 95% interval."""
    return mean_and_ci95(after.double() - before.double())


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
