"""Episodes aligned in feature space, many together, against one after another by automatic differentiation.

Both have the features already: random ones around a centre per class, of as many classes and images as the glyphs have,
and with values that bf16 holds. Fitting heads and finding related base samples are in the time of both.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from data.benchmarks import Split
from data.episodes import Episodes, EpisodeShape, Task, sample_episodes
from methods.alignment import AlignedEpisode, AlignmentSetting
from methods.feature_alignment import align_episodes, episodes_per_chunk
from methods.features import Source, TrainableBlocks, feature_source
from methods.related_base import RelatedSetting, draw_related
from speed import reference_loops as plain
from speed.common import Bench, Measured, Setting, load, timed

WORK = {d: f"an episode in feature space, {d} features" for d in (1600, 640, 256)}
N_WAY = 5
N_EPISODES = {"tiny": 3, "full": 40}
N_REFERENCE = 1
ITERATIONS = {"tiny": 3, "full": 150}

Work = tuple[Episodes, Source, Source]


def features(split: Split, d: int, seed: int) -> Tensor:
    """Features (N, d) of a split, positive as those that leave a ReLU."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(len(split.members), d, generator=g)
    z = torch.randn(len(split.labels), d, generator=g).mul_(2.0).add_(centre[split.labels]).relu_()
    return z.bfloat16()


def work_of(setting: Setting, d: int) -> Work:
    """The episodes of the novel split, and both splits; in float32 unless the setting is of bf16."""
    base, novel = (load(setting, name)[0] for name in ("base", "novel"))
    shape = EpisodeShape(N_WAY, 2, 5) if setting.tiny else EpisodeShape(N_WAY, 5, 15)
    kept = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    sources = [feature_source(features(split, d, i).to(kept), split) for i, split in enumerate((base, novel))]
    return sample_episodes(novel, shape, N_EPISODES[setting.scale], 0), *sources


def algorithm(setting: Setting) -> AlignmentSetting:
    """The published numbers; fewer related images at tiny scale."""
    related = RelatedSetting(n_B=1, aug_size=4) if setting.tiny else RelatedSetting()
    return AlignmentSetting(related=related, align_iters=ITERATIONS[setting.scale])


def plain_episode(setting: Setting, task: Task, i: int, base: Source, novel: Source) -> Tensor:
    """Scores of the queries of one episode after the updates of the head on related samples and on the support."""
    numbers, run = algorithm(setting), setting.run
    fit, members, d = numbers.fit, base.split.members, base.features.shape[1]
    weight = fit.new_head(d, N_WAY, run.generator("head", i)).weight
    head, z_support = plain.ArcMax(weight, fit.ft_s, fit.ft_m), novel.features[task.support]
    optimizer = plain.fit_head(head, z_support, task.y_support, fit.ft_n_epoch, fit.ft_lr)
    score = plain.related_base_score(head, [base.features[index] for index in members], N_WAY)
    samples = []
    for w, chosen in enumerate(plain.choose_classes(score, numbers.related.n_B)):
        index = torch.cat([members[b] for b in chosen])
        with torch.no_grad():
            samples.append(index[head(base.features[index]).argmax(1) == w])
    head.s, head.m = numbers.align_s, numbers.align_m
    joint = torch.optim.Adam(head.parameters(), lr=numbers.support_lr)
    generator = run.generator("related draws", i)
    for picks in draw_related(samples, numbers.related.aug_size, numbers.align_iters, generator):
        y_related = (picks >= 0).nonzero()[:, 0]
        if len(y_related):
            plain.step(head.loss(head(base.features[picks[picks >= 0]]), y_related), optimizer)
        plain.step(head.loss(head(z_support), task.y_support), joint)
    with torch.no_grad():
        return head(novel.features[task.query])


def separate(setting: Setting, work: Work) -> Tensor:
    """Scores of the first episodes, aligned one after another."""
    episodes, *sources = work
    return torch.stack([plain_episode(setting, episodes.task(i), i, *sources) for i in range(N_REFERENCE)])


def reference(setting: Setting) -> dict[str, Measured]:
    """The first episodes, in float32."""
    measured, setting = {}, replace(setting, precision="fp32")
    for d, name in WORK.items():
        seconds, scores = timed(partial(separate, setting, work_of(setting, d)))
        measured[name] = Measured(seconds / N_REFERENCE, {"scores": scores})
    return measured


def together(setting: Setting, work: Work) -> list[AlignedEpisode]:
    """All episodes, as associative_alignment.py aligns them."""
    episodes, base, novel = work
    blocks, numbers, n = TrainableBlocks(None, nn.Identity(), {}), algorithm(setting), len(episodes)
    step, aligned = episodes_per_chunk(base.features.shape[1], N_WAY, numbers, setting.run.device), []
    for first in range(0, n, step):
        part = range(first, min(n, first + step))
        aligned += [e for _, e in align_episodes(blocks, episodes, novel, base, numbers, setting.run, part)]
    return aligned


def ours(setting: Setting) -> dict[str, Measured]:
    """All episodes, and the scores of the first."""
    measured = {}
    for d, name in WORK.items():
        work = work_of(setting, d)
        seconds, aligned = timed(partial(together, setting, work))
        scores = torch.stack([episode.aligned for episode in aligned[:N_REFERENCE]])
        measured[name] = Measured(seconds / len(aligned), {"scores": scores}, f"{len(aligned)} episodes")
    return measured


def flops(setting: Setting) -> dict[str, float]:
    """Operations of the products of an episode: scores and gradient of each step, and scores of the base samples."""
    numbers = algorithm(setting)
    n_support, n_base = N_WAY * (2 if setting.tiny else 5), len(load(setting, "base")[0].labels)
    n_steps = numbers.fit.ft_n_epoch + numbers.align_iters
    rows = 2 * (n_support * n_steps + N_WAY * numbers.related.aug_size * numbers.align_iters) + n_base
    return {name: 2.0 * d * N_WAY * rows for d, name in WORK.items()}


# Three times the build before threads and bf16, at 1600 features.
TARGETS = {name: {"fp32": 17.0, "bf16": 17.0} for name in WORK.values()}
TOLERANCES = {"scores": {"fp32": 0.001, "bf16": 0.05}}
BENCH = Bench(TARGETS, reference, ours, flops, TOLERANCES)
