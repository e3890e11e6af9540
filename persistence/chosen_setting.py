"""What --align_preset auto chooses on the val episodes of a backbone, and what a result and a user are told of it."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

from data.benchmarks import Split
from data.episodes import EpisodeShape, sample_episodes
from engine.errors import UserError
from methods.alignment import AlignmentSetting
from methods.features import Source, trainable_blocks
from methods.setting_choice import FINE_TUNING, N_EPISODES, candidates, compare_settings, flags_text, winner
from models.backbone import Backbone
from persistence.feature_cache import FeatureCache


class Choice(NamedTuple):
    """What was chosen, its flags and the rows that they were chosen by, as a result records them, and what to say."""

    setting: AlignmentSetting
    record: dict[str, Any]
    lines: list[str]


def choose_setting(
    backbone: Backbone,
    load_val: Callable[[], Split],
    base: Source,
    cache: FeatureCache,
    shape: EpisodeShape,
    setting: AlignmentSetting,
) -> Choice:
    """The setting chosen on val episodes of this shape; fine-tuning when there is no val split, or too small a one."""
    run, settings = cache.run, candidates(setting)
    try:
        val = load_val()
        episodes = sample_episodes(val, shape, N_EPISODES, run.seed)
    except UserError as error:
        flags = flags_text(FINE_TUNING)
        line = f"note: --align_preset auto cannot choose on val, so it is fine-tuning: {error}"
        return Choice(settings[flags], {"flags": flags, "rows": []}, [line])
    rows = compare_settings(cache.source(backbone, trainable_blocks(backbone, 0), val), base, episodes, settings, run)
    flags = winner(rows)
    task = f"{shape.n_way}-way {shape.n_shot}-shot, {N_EPISODES} val episodes"
    lines = [f"--align_preset auto, {task}: accuracy, and gain over fine-tuning"]
    lines += [f"  {row.flags:<80} {row.accuracy:6.2f} %  {row.gain:+.2f} ± {row.gain_ci95:.2f}" for row in rows]
    lines.append(f"chosen: --align_blocks 0 --aug_size {setting.related.aug_size} {flags}")
    return Choice(settings[flags], {"flags": flags, "rows": [asdict(row) for row in rows]}, lines)
