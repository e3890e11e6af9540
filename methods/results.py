"""Result records: what was measured, on which episodes, and how it was made, as JSON beside a readable line."""

from typing import Any

import torch
from torch import Tensor

from data.benchmarks import Split
from data.episodes import Episodes
from methods.engine import provenance
from methods.evaluation import EpisodeScores, accuracy_per_class, mean_and_ci95


def percent(mean: float, ci95: float) -> str:
    """`71.45 ± 0.72` from shares of 1."""
    return f"{100 * mean:.2f} ± {100 * ci95:.2f}"


def accuracy_record(scores: EpisodeScores, episodes: Episodes, class_names: list[str]) -> dict[str, Any]:
    """Accuracy and interval (%) pooled over all episodes, each episode's accuracy (%), and each class's."""
    mean, ci95 = mean_and_ci95(scores.accuracy)
    return {
        "accuracy": round(100 * mean, 3),
        "ci95": round(100 * ci95, 3) if len(episodes) > 1 else None,
        "accuracy_per_class": accuracy_per_class(scores, episodes, class_names),
        "accuracy_per_episode": [round(100 * a, 3) for a in scores.accuracy.tolist()],
    }


def run_record(
    stage: str, config: dict[str, Any], novel: Split, episodes: Episodes, seconds: float, device: torch.device
) -> dict[str, Any]:
    """The part of a result that says what was run: protocol, data, config, versions, commit."""
    return {
        "stage": stage,
        "dataset": novel.benchmark,
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


def paired_difference(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean of after - before over the same episodes, (E,) each, and its paired 95% interval."""
    return mean_and_ci95(after.double() - before.double())
