"""Choose the setting of alignment for a backbone and a protocol on episodes of val classes, never of novel ones.

The candidates are fine-tuning, the last block of Conv4 without an alignment loss and with the centroid loss, batch norm
in train mode, and a few settings in feature space: heads of either scale and number of related base
classes, few iterations or many, update (2) alone, and update (3) alone, which uses no base image: it shows how much
comes of more steps on the support, where a head is not fitted to convergence. A setting is chosen only if its paired
gain over fine-tuning is clear, for other classes too; the interval is not widened for the number of candidates.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.episodes import Episodes
from engine.distributed import gather_rows
from engine.run import Run
from methods.alignment import AlignmentSetting
from methods.block_alignment import STACKED
from methods.evaluation import EpisodeScores, count_predictions
from methods.feature_alignment import align_episodes, episodes_per_chunk
from methods.features import Source, TrainableBlocks
from methods.intervals import ci95_over_classes, mean_and_ci95

N_EPISODES = 100
FINE_TUNING = {"alignment": "none"}
PUBLISHED_NUMBERS = {"align_s": 15.0, "n_B": 10, "align_iters": 150}
SMALL = {"align_s": 5.0, "n_B": 5, "align_iters": 150}
# By flag, what each setting of `head` alignment changes, beside --align_blocks 0.
SETTINGS: list[dict[str, Any]] = [
    *({**numbers, "align_iters": n} for numbers in (PUBLISHED_NUMBERS, SMALL) for n in (50, 150)),
    PUBLISHED_NUMBERS | {"support_lr": 0.0},
    PUBLISHED_NUMBERS | {"related_lr": 0.0},
]
# Of the last block, beside --align_blocks 1, where its episodes are aligned together: else they would take too long.
BLOCK_SETTINGS: list[dict[str, Any]] = [{"alignment": alignment, "align_bn": "train"} for alignment in STACKED]
# Flags that a user must not give beside the choice.
CHOSEN_FLAGS = list(dict.fromkeys(name for flags in (FINE_TUNING, *SETTINGS, *BLOCK_SETTINGS) for name in flags))
# Episodes of the last block, which takes ten times as long: the first of all; and those aligned before a bar moves on.
N_BLOCK_EPISODES = 30
BLOCK_STEP = 8


class Offered(NamedTuple):
    """What settings are compared on: trainable blocks, and both sources as those take them."""

    blocks: TrainableBlocks
    val: Source
    base: Source


@dataclass(frozen=True)
class SettingGain:
    """A setting on the val episodes, in %: accuracy, and gain over fine-tuning with its paired 95 % interval, over
    classes where that can be told, else over episodes; and the seconds that they took."""

    flags: str
    accuracy: float
    gain: float
    gain_ci95: float
    seconds: float


def flags_text(flags: dict[str, Any]) -> str:
    """Flags as on a command line."""
    shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in flags.items()}
    return " ".join(f"--{name} {value}" for name, value in shown.items())


def n_blocks(setting: AlignmentSetting) -> int:
    """What --align_blocks is in one of the candidates."""
    return 0 if setting.alignment in ("none", "head") else 1


def candidates(setting: AlignmentSetting, last_block: bool = False) -> dict[str, AlignmentSetting]:
    """The settings to choose among, by their flags, fine-tuning first; the rest of each is as in `setting`."""
    made = {}
    for flags in (FINE_TUNING, *SETTINGS, *(BLOCK_SETTINGS if last_block else [])):
        changes: dict[str, Any] = {"alignment": "head"} | flags
        related = replace(setting.related, n_B=changes.pop("n_B", setting.related.n_B))
        made[flags_text(flags)] = replace(setting, related=related, **changes)
    return made


def paired_counts(on: Offered, episodes: Episodes, setting: AlignmentSetting, run: Run) -> Tensor:
    """Predictions (E, 2, n_way, n_way) of the val episodes, by fine-tuning and after alignment.

    Of the last block, E is N_BLOCK_EPISODES.
    """
    parts, n_way, (blocks, val, base) = [], episodes.n_way, on
    setting, in_features = replace(setting, record_curve=0), blocks.in_feature_space
    d = val.features.shape[1]
    step = episodes_per_chunk(d, n_way, setting, run.device) if in_features else BLOCK_STEP
    n_episodes = len(episodes) if in_features else min(len(episodes), N_BLOCK_EPISODES)
    for first in run.ranks.share(range(0, n_episodes, step)):
        numbers = range(first, min(first + step, n_episodes))
        for _, episode in align_episodes(blocks, episodes, val, base, setting, run, numbers):
            scores = torch.stack([episode.finetuned, episode.aligned])
            parts.append(count_predictions(scores, n_way).unsqueeze(0).cpu())
    return gather_rows(parts, run.ranks)


def winner(rows: Sequence[SettingGain]) -> str:
    """The flags of the largest mean gain whose interval lies above zero; those of fine-tuning when none does."""
    clear = [row for row in rows if row.gain - row.gain_ci95 > 0]
    return max(clear, key=lambda row: row.gain).flags if clear else flags_text(FINE_TUNING)


def compare_settings(
    offered: Sequence[Offered], episodes: Episodes, settings: dict[str, AlignmentSetting], run: Run
) -> list[SettingGain]:
    """A row for each of the candidates, by their flags, on the same val episodes; offered: by the number of blocks."""
    rows = []
    for flags, setting in run.bar(list(settings.items()), "choose on val", "setting"):
        start = time.perf_counter()
        counts = paired_counts(offered[n_blocks(setting)], episodes, setting, run)
        before, after = (EpisodeScores(each).accuracy for each in counts.unbind(1))
        difference = after.double() - before.double()
        gain, ci95 = mean_and_ci95(difference)
        over_classes = ci95_over_classes(difference, episodes.classes[: len(difference)])
        half = ci95 if math.isnan(over_classes) else over_classes
        seconds = time.perf_counter() - start
        rows.append(SettingGain(flags, 100 * after.mean().item(), 100 * gain, 100 * half, seconds))
    return rows
