"""Choose the setting of alignment for a backbone and a protocol on episodes of val classes, never of novel ones.

The candidates are fine-tuning and a few settings in feature space: heads of either scale and number of related base
classes, few iterations or many, update (2) alone, and update (3) alone, which uses no base image: it shows how much
comes of more steps on the support, where a head is not fitted to convergence. A setting is chosen only if its paired
gain over fine-tuning is clear; the interval is not widened for the number of candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data.episodes import Episodes
from engine.distributed import gather_rows
from engine.run import Run
from methods.alignment import AlignmentSetting
from methods.evaluation import EpisodeScores, count_predictions
from methods.feature_alignment import align_features, episodes_per_chunk
from methods.features import Source
from methods.intervals import mean_and_ci95

N_EPISODES = 100
FINE_TUNING = {"alignment": "none"}
PUBLISHED = {"align_s": 15.0, "n_B": 10, "align_iters": 150}
SMALL = {"align_s": 5.0, "n_B": 5, "align_iters": 150}
# By flag, what each setting of `head` alignment changes, beside --align_blocks 0.
SETTINGS: list[dict[str, Any]] = [
    *({**numbers, "align_iters": n} for numbers in (PUBLISHED, SMALL) for n in (50, 150)),
    PUBLISHED | {"support_lr": 0.0},
    PUBLISHED | {"related_lr": 0.0},
]
# Flags that a user must not give beside the choice.
CHOSEN_FLAGS = ["align_blocks", *dict.fromkeys(name for flags in (FINE_TUNING, *SETTINGS) for name in flags)]


@dataclass(frozen=True)
class SettingGain:
    """A setting on the val episodes, in %: accuracy, and gain over fine-tuning with its paired 95 % interval."""

    flags: str
    accuracy: float
    gain: float
    gain_ci95: float


def flags_text(flags: dict[str, Any]) -> str:
    """Flags as on a command line."""
    shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in flags.items()}
    return " ".join(f"--{name} {value}" for name, value in shown.items())


def candidates(setting: AlignmentSetting) -> dict[str, AlignmentSetting]:
    """The settings to choose among, by their flags, fine-tuning first; the rest of each is as in `setting`."""
    made = {}
    for flags in (FINE_TUNING, *SETTINGS):
        changes: dict[str, Any] = {"alignment": "head"} | flags
        related = replace(setting.related, n_B=changes.pop("n_B", setting.related.n_B))
        made[flags_text(flags)] = replace(setting, related=related, **changes)
    return made


def paired_counts(val: Source, base: Source, episodes: Episodes, setting: AlignmentSetting, run: Run) -> Tensor:
    """Predictions (E, 2, n_way, n_way) of the val episodes, by fine-tuning and after alignment in feature space."""
    parts, n_way = [], episodes.n_way
    step = episodes_per_chunk(val.features.shape[1], n_way, setting, run.device)
    for first in run.ranks.share(range(0, len(episodes), step)):
        tasks = [episodes.task(i) for i in range(first, min(first + step, len(episodes)))]
        aligned = align_features(tasks, val, base, replace(setting, record_curve=0), run, first)
        scores = torch.stack([torch.stack([episode.finetuned, episode.aligned]) for episode in aligned])
        parts.append(count_predictions(scores, n_way).cpu())
    return gather_rows(parts, run.ranks)


def winner(rows: Sequence[SettingGain]) -> str:
    """The flags of the largest mean gain whose interval lies above zero; those of fine-tuning when none does."""
    clear = [row for row in rows if row.gain - row.gain_ci95 > 0]
    return max(clear, key=lambda row: row.gain).flags if clear else flags_text(FINE_TUNING)


def compare_settings(
    val: Source, base: Source, episodes: Episodes, settings: dict[str, AlignmentSetting], run: Run
) -> list[SettingGain]:
    """A row for each of the candidates, by their flags, on the same val episodes."""
    rows = []
    for flags, setting in run.bar(list(settings.items()), "choose on val", "setting"):
        counts = paired_counts(val, base, episodes, setting, run)
        before, after = (EpisodeScores(each).accuracy for each in counts.unbind(1))
        gain, ci95 = mean_and_ci95(after.double() - before.double())
        rows.append(SettingGain(flags, 100 * after.mean().item(), 100 * gain, 100 * ci95))
    return rows
