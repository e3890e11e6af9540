"""Related base detection of one episode: a head on cached features, against embedding the chosen classes again.

Both sides have the features of the base images, which the published code caches as well. The reference is timed on a
few of the n_way * n_B chosen classes and scaled up to all: each has as many images.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.episodes import EpisodeShape, sample_episodes
from engine.generators import make_generator
from methods.features import Source, embed, trainable_blocks
from methods.novel_finetune import HeadFit, fit_heads
from methods.related_base import RelatedSetting, related_base_of_head
from models.backbone import Backbone
from models.heads import Head
from persistence.feature_cache import FeatureCache
from speed import reference_loops as plain
from speed.common import Bench, Measured, Setting, count_flops, load, new_conv4, timed

WORK = "related base detection of an episode"
N_WAY, N_SHOT = 5, 2
FIT = HeadFit(ft_m=0.001)
N_B = {"tiny": 1, "full": 10}
TIMED_CLASSES = {"tiny": 5, "full": 3}


@dataclass(frozen=True)
class Work:
    """The base split, its features and a head fitted on an episode of the novel split."""

    base: Source
    paths: list[Path]
    backbone: Backbone
    head: Head


def work(setting: Setting) -> Work:
    """The features come from a cache on disk: all repeats find the same ones."""
    base, paths = load(setting, "base")
    novel, _ = load(setting, "novel")
    backbone = new_conv4(setting, base)
    cache = FeatureCache(setting.folder / "cache", setting.run)
    source = cache.source(backbone, trainable_blocks(backbone, None), base)
    task = sample_episodes(novel, EpisodeShape(N_WAY, N_SHOT, 1), 1, seed=0).task(0)
    head = FIT.new_head(backbone.feature_dim, N_WAY, make_generator(0, "head", 0)).to(setting.run.device)
    z_support = embed(backbone, novel.images[task.support], setting.run)
    fit_heads(head, z_support, task.y_support.to(z_support.device), FIT.ft_n_epoch, FIT.ft_lr)
    return Work(source, paths, backbone, head)


def answer(score: Tensor, classes: list[list[int]], kept: Tensor) -> dict[str, Tensor]:
    """kept (n_way, N): which base images each novel class keeps, of the classes that the reference is timed on."""
    return {"score": score, "classes": torch.tensor(classes).float(), "samples": kept}


def timed_classes(setting: Setting, classes: list[list[int]]) -> list[tuple[int, int]]:
    """The first pairs of novel and chosen base class."""
    pairs = [(w, b) for w, chosen in enumerate(classes) for b in chosen]
    return pairs[: TIMED_CLASSES[setting.scale]]


def reference(setting: Setting) -> dict[str, Measured]:
    """Scores from the cached features, then the images of the chosen classes from their files."""
    t = work(setting)
    backbone, head = plain.conv4(t.backbone), plain.ArcMax(t.head.weight, FIT.ft_s, FIT.ft_m)
    members = t.base.split.members
    z_of_class = [t.base.features[index] for index in members]

    def choose() -> tuple[Tensor, list[list[int]]]:
        score = plain.related_base_score(head, z_of_class, N_WAY)
        return score, plain.choose_classes(score, N_B[setting.scale])

    choice_seconds, (score, classes) = timed(choose)
    pairs = timed_classes(setting, classes)
    kept = torch.zeros(N_WAY, len(t.paths))

    def keep() -> None:
        for w, b in pairs:
            files = [t.paths[i] for i in members[b]]
            kept[w, members[b]] = torch.tensor(plain.keep_predicted(backbone, head, files, w, setting.img_size)).float()

    keep_seconds, _ = timed(keep)
    n_chosen = sum(map(len, classes))
    return {WORK: Measured(choice_seconds + keep_seconds * n_chosen / len(pairs), answer(score, classes, kept))}


def ours(setting: Setting) -> dict[str, Measured]:
    """related_base_of_head, as align_episode calls it."""
    t, related_setting = work(setting), RelatedSetting(N_B[setting.scale])
    at_least = 0.0 if setting.tiny else 1.0
    seconds, related = timed(lambda: related_base_of_head(t.head, t.base, related_setting), at_least)
    kept = torch.zeros(N_WAY, len(t.paths))
    for w, b in timed_classes(setting, related.classes):
        samples = related.samples[w]
        kept[w, samples[torch.isin(samples, t.base.split.members[b])]] = 1.0
    return {WORK: Measured(seconds, answer(related.score, related.classes, kept))}


def flops(setting: Setting) -> dict[str, float]:
    """Operations of the scores of all base features."""
    t = work(setting)
    return {WORK: count_flops(lambda: related_base_of_head(t.head, t.base, RelatedSetting(N_B[setting.scale])))}


TARGETS = {WORK: {"fp32": 1000.0}}
TOLERANCES = {
    "score": {"fp32": 0.01, "bf16": 0.01},
    "classes": {"fp32": 0.0, "bf16": 0.0},
    # The root of the share of samples that only one side keeps.
    "samples": {"fp32": 0.05, "bf16": 0.3},
}
BENCH = Bench(TARGETS, reference, ours, flops, TOLERANCES)
