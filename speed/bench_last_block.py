"""An episode that updates the last block of Conv4, of several together, against autograd on one after another.

The reference is `align_episode`, which any backbone takes, in float32; ours `align_blocks`. Both have the inputs of the
block, computed before, and fit heads and find related base samples in their time.
"""

from dataclasses import replace
from functools import partial

import torch

from data.episodes import EpisodeShape, Task, sample_episodes
from methods.alignment import AlignedEpisode, AlignmentSetting, align_episode
from methods.block_alignment import align_blocks
from methods.features import Source, TrainableBlocks, trainable_blocks
from methods.related_base import RelatedSetting
from persistence.feature_cache import FeatureCache
from speed.common import Bench, Measured, Setting, count_flops, load, new_conv4, timed

WORK = {name: f"an alignment episode of the last block, {name}, of 8 together" for name in ("centroid", "naive")}
ITERATIONS = {"tiny": 4, "full": 150}
N_TIMED = {"tiny": (2, 4), "full": (1, 8)}  # episodes of the reference, and ours
CHECKED_ITERATIONS = 2

Work = tuple[TrainableBlocks, list[Task], Source, Source]


def work_of(setting: Setting) -> Work:
    """The blocks, the tasks of the novel split, and both splits as the blocks take them.

    Their features are those of float32 in every precision: others would have other related samples drawn.
    """
    base, novel = (load(setting, split)[0] for split in ("base", "novel"))
    backbone = new_conv4(setting, base)
    blocks, folder = trainable_blocks(backbone, 1), setting.folder / "cache"
    cache, in_fp32 = (FeatureCache(folder, each.run) for each in (setting, replace(setting, precision="fp32")))
    shape, n = EpisodeShape(5, 2, 5) if setting.tiny else EpisodeShape(5, 5, 15), N_TIMED[setting.scale][1]
    episodes = sample_episodes(novel, shape, n, 0)
    sources = (
        replace(cache.source(backbone, blocks, split), features=in_fp32.features(backbone, split))
        for split in (novel, base)
    )
    return blocks, [episodes.task(i) for i in range(n)], *sources


def algorithm(setting: Setting, alignment: str, iterations: int) -> AlignmentSetting:
    """The published numbers, with 20 related images per class; fewer at tiny scale."""
    related = RelatedSetting(n_B=1, aug_size=4) if setting.tiny else RelatedSetting(aug_size=20)
    return AlignmentSetting(alignment, related=related, align_iters=iterations)


def separate(setting: Setting, work: Work, numbers: AlignmentSetting, n: int) -> list[AlignedEpisode]:
    """The first n episodes, one after another."""
    blocks, tasks, *sources = work
    return [align_episode(blocks, task, *sources, numbers, setting.run, i) for i, task in enumerate(tasks[:n])]


def together(setting: Setting, work: Work, numbers: AlignmentSetting, n: int) -> list[AlignedEpisode]:
    """The first n episodes together."""
    blocks, tasks, *sources = work
    return list(align_blocks(blocks, tasks[:n], *sources, numbers, setting.run, 0))


def side(setting: Setting, ours: bool) -> dict[str, Measured]:
    """One of the two on both works."""
    work, align = work_of(setting), together if ours else separate
    n_reference, n = N_TIMED[setting.scale]
    measured = {}
    for alignment, name in WORK.items():
        n_timed = n if ours else n_reference
        seconds, _ = timed(
            partial(align, setting, work, algorithm(setting, alignment, ITERATIONS[setting.scale]), n_timed)
        )
        checked = align(setting, work, algorithm(setting, alignment, CHECKED_ITERATIONS), n_reference)
        scores = torch.stack([episode.aligned for episode in checked])
        measured[name] = Measured(seconds / n_timed, {"scores": scores})
    return measured


def flops(setting: Setting) -> dict[str, float]:
    """Operations of an episode: of two iterations less those of one, times the iterations, and of what comes once."""
    work, counted = work_of(setting), {}
    for alignment, name in WORK.items():
        run = partial(separate, setting, work, n=1)
        one, two = (count_flops(partial(run, algorithm(setting, alignment, n))) for n in (1, 2))
        counted[name] = one + (two - one) * (ITERATIONS[setting.scale] - 1)
    return counted


TARGETS = {name: {"fp32": 1.0, "bf16": 4.0} for name in WORK.values()}
# Adam makes steps of the rate also where a gradient is near rounding.
TOLERANCES = {"scores": {"fp32": 0.01, "bf16": 0.05}}
BENCH = Bench(TARGETS, partial(side, ours=False), partial(side, ours=True), flops, TOLERANCES)
