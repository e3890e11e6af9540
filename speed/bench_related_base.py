"""Related base detection of one episode: a head on cached features, against embedding the chosen classes again.

Both sides have the features of the base images, which the published code caches as well. The reference is timed on a
few of the n_way * n_B chosen classes and scaled up to all: each has as many images.

python -m speed.bench_related_base
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.benchmarks import Split
from data.episodes import class_major_labels, sample_episodes
from engine.generators import make_generator
from engine.script import run_script
from methods.alignment import related_base_of_head
from methods.evaluation import cached_features, embed
from methods.novel_finetune import fit_heads
from models import build_head
from models.backbone import Backbone
from models.heads import arcMax
from speed import reference_loops as plain
from speed.common import CPU, Bench, Measured, Setting, count_flops, example_backbone, for_ours, load, run, timed

WORK = "related base detection of an episode"
N_WAY, N_SHOT = 5, 2
N_B = {"tiny": 1, "full": 10}
TIMED_CLASSES = {"tiny": 5, "full": 3}


@dataclass(frozen=True)
class Task:
    """The base split, its features and a head fitted on an episode of the novel split."""

    base: Split
    paths: list[Path]
    members: list[Tensor]
    z_base: Tensor
    backbone: Backbone
    head: arcMax


def task(setting: Setting) -> Task:
    """The features come from a cache on disk: all repeats find the same ones."""
    base, paths = load(setting, "base")
    novel, _ = load(setting, "novel")
    backbone = for_ours(example_backbone(setting, base))
    precision = setting.engine_precision
    z_base = cached_features(backbone, base, setting.folder / "cache", CPU, precision, quiet=True)
    support = sample_episodes(novel, N_WAY, N_SHOT, 1, 1, seed=0).support.flatten()
    z_support = embed(backbone, novel.images[support], CPU, precision)
    head = build_head("arcMax", backbone.feature_dim, N_WAY, 5.0, 0.001, [make_generator(0, "head", 0)])
    assert isinstance(head, arcMax)
    fit_heads(head, z_support, class_major_labels(N_WAY, N_SHOT), 200, 1e-3)
    members = [torch.nonzero(base.labels == b).squeeze(1) for b in range(len(base.class_names))]
    return Task(base, paths, members, z_base, backbone, head)


def answer(score: Tensor, classes: list[list[int]], kept: Tensor) -> dict[str, Tensor]:
    """kept (n_way, N): which base images each novel class keeps, of the classes that the reference is timed on."""
    return {"score": score, "classes": torch.tensor(classes).float(), "samples": kept}


def timed_classes(setting: Setting, classes: list[list[int]]) -> list[tuple[int, int]]:
    """The first pairs of novel and chosen base class."""
    pairs = [(w, b) for w, chosen in enumerate(classes) for b in chosen]
    return pairs[: TIMED_CLASSES[setting.scale]]


def reference(setting: Setting) -> dict[str, Measured]:
    """Scores from the cached features, then the images of the chosen classes from their files."""
    t = task(setting)
    backbone, head = plain.conv4(t.backbone), plain.ArcMax(t.head.weight, t.head.s, t.head.m)
    z_of_class = [t.z_base[members] for members in t.members]

    def choose() -> tuple[Tensor, list[list[int]]]:
        score = plain.related_base_score(head, z_of_class, N_WAY)
        return score, plain.choose_classes(score, N_B[setting.scale])

    choice_seconds, (score, classes) = timed(choose)
    pairs = timed_classes(setting, classes)
    kept = torch.zeros(N_WAY, len(t.paths))

    def keep() -> None:
        for w, b in pairs:
            files = [t.paths[i] for i in t.members[b]]
            kept[w, t.members[b]] = torch.tensor(
                plain.keep_predicted(backbone, head, files, w, setting.img_size)
            ).float()

    keep_seconds, _ = timed(keep)
    n_chosen = sum(map(len, classes))
    return {WORK: Measured(choice_seconds + keep_seconds * n_chosen / len(pairs), answer(score, classes, kept))}


def ours(setting: Setting) -> dict[str, Measured]:
    """What align_episode calls."""
    t = task(setting)
    seconds, related = timed(
        lambda: related_base_of_head(t.head, t.z_base, t.base.labels, t.members, N_B[setting.scale], "vote"),
        at_least=0.0 if setting.tiny else 1.0,
    )
    kept = torch.zeros(N_WAY, len(t.paths))
    for w, b in timed_classes(setting, related.classes):
        samples = related.samples[w]
        kept[w, samples[torch.isin(samples, t.members[b])]] = 1.0
    return {WORK: Measured(seconds, answer(related.score, related.classes, kept))}


def flops(setting: Setting) -> dict[str, float]:
    t = task(setting)
    return {
        WORK: count_flops(
            lambda: related_base_of_head(t.head, t.z_base, t.base.labels, t.members, N_B[setting.scale], "vote")
        )
    }


BENCH = Bench(
    name="related_base",
    targets={WORK: {"fp32": 1000}},
    reference=reference,
    ours=ours,
    flops=flops,
    tolerances={
        "score": {"fp32": 0.01, "bf16": 0.01},
        "classes": {"fp32": 0.0, "bf16": 0.0},
        # The root of the share of samples that only one side keeps.
        "samples": {"fp32": 0.05, "bf16": 0.3},
    },
)

if __name__ == "__main__":
    run_script(lambda: run([BENCH], "python -m speed.bench_related_base", __doc__))
