"""What --align_preset auto chooses on the val episodes of a backbone, and what a result and a user are told of it."""

import time
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from data.benchmarks import Split
from data.episodes import EpisodeShape, sample_episodes
from methods.alignment import AlignmentSetting
from methods.block_alignment import last_conv_block
from methods.features import Source, trainable_blocks
from methods.setting_choice import N_BLOCK_EPISODES, N_EPISODES, Offered, candidates, compare_settings, n_blocks, winner
from models.backbone import Backbone
from persistence.feature_cache import FeatureCache


class Choice(NamedTuple):
    """What was chosen, with how many trainable blocks; its flags and the rows that they were chosen by, as a result
    records them; what to say."""

    setting: AlignmentSetting
    align_blocks: int
    record: dict[str, Any]
    lines: list[str]


def choose_setting(
    backbone: Backbone,
    val: Split,
    base: Source,
    cache: FeatureCache,
    shape: EpisodeShape,
    setting: AlignmentSetting,
    last_block: bool = False,
) -> Choice:
    """The setting chosen on val episodes of this shape. Raises UserError when the val split is too small for one.

    last_block: whether its alignment is a candidate, where its episodes can be aligned together.
    """
    run, start = cache.run, time.perf_counter()
    blocks = trainable_blocks(backbone, min(1, len(backbone.blocks()) - 1)) if last_block else None
    with_block = blocks is not None and last_conv_block(blocks, replace(setting, alignment="naive"), run) is not None
    settings = candidates(setting, with_block)
    episodes = sample_episodes(val, shape, N_EPISODES, run.seed)
    frozen = trainable_blocks(backbone, 0)
    offered = [Offered(frozen, cache.source(backbone, frozen, val), base)]
    if blocks is not None and with_block:
        offered.append(Offered(blocks, *(cache.source(backbone, blocks, split) for split in (val, base.split))))
    rows = compare_settings(offered, episodes, settings, run)
    for of_blocks in offered:
        of_blocks.blocks.restore()
    flags = winner(rows)
    task = f"{shape.n_way}-way {shape.n_shot}-shot, {N_EPISODES} val episodes"
    task += f" ({N_BLOCK_EPISODES} of the last block)" if with_block else ""
    lines = [f"--align_preset auto, {task}: accuracy, gain over fine-tuning, seconds"]
    lines += [
        f"  {row.flags:<80} {row.accuracy:6.2f} %  {row.gain:+.2f} ± {row.gain_ci95:.2f}  {row.seconds:.1f}"
        for row in rows
    ]
    n = n_blocks(settings[flags])
    lines.append(f"chosen in {time.perf_counter() - start:.0f} s")
    lines.append(f"chosen: --align_blocks {n} --aug_size {setting.related.aug_size} {flags}")
    # Without seconds, which differ between machines.
    kept = [{name: value for name, value in asdict(row).items() if name != "seconds"} for row in rows]
    return Choice(settings[flags], n, {"flags": flags, "rows": kept}, lines)
