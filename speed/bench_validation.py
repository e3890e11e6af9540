"""Validation: a split embedded once and many heads fitted together, against one episode after another from files.

The reference is timed on a few episodes and scaled up to all: each costs the same.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.benchmarks import Split
from data.episodes import Episodes, EpisodeShape, class_major_labels, sample_episodes
from engine.generators import make_generator
from methods.evaluation import evaluate_heads
from methods.features import embed
from methods.novel_finetune import HeadFit, fit_heads
from models.backbone import Backbone
from speed import reference_loops as plain
from speed.common import Bench, Measured, Setting, count_flops, load, new_conv4, timed

VALIDATION, FITTING = "validation: 400 episodes of 5-way 5-shot", "fitting the heads of 400 episodes"
SEED = 0
HEADS_CHECKED = 2


@dataclass(frozen=True)
class Sizes:
    """Of the protocol, and how many episodes the reference is timed on."""

    n_shot: int
    n_query: int
    n_episodes: int
    fit: HeadFit
    timed_episodes: int
    timed_heads: int


M = 0.01  # stage 1's margin; stage 3 has another
SIZES = {
    "tiny": Sizes(2, 5, 4, HeadFit(ft_m=M, ft_n_epoch=20), 4, 4),
    "full": Sizes(5, 50, 400, HeadFit(ft_m=M), 4, 20),
}


@dataclass(frozen=True)
class Work:
    """The validation split, its files and episodes, the backbone, and features for the fitting alone."""

    size: Sizes
    val: Split
    paths: list[Path]
    episodes: Episodes
    backbone: Backbone
    features: Tensor


def work(setting: Setting) -> Work:
    """The same on both sides."""
    size = SIZES[setting.scale]
    val, paths = load(setting, "val")
    episodes = sample_episodes(val, EpisodeShape(5, size.n_shot, size.n_query), size.n_episodes, SEED)
    backbone = new_conv4(setting, load(setting, "base")[0])
    features = toy_features(val.labels, backbone.feature_dim).to(setting.run.device)
    return Work(size, val, paths, episodes, backbone, features)


def toy_features(labels: Tensor, d: int) -> Tensor:
    """Positive features (N, d): one direction per class, and noise."""
    generator = make_generator(SEED, "features")
    centre = torch.rand(int(labels.max()) + 1, d, generator=generator)
    return (centre[labels] + torch.randn(len(labels), d, generator=generator)).clamp_min(0.0)


def initial_weight(features: Tensor, n_way: int, episode: int) -> Tensor:
    """The head that evaluate_heads starts episode `episode` with, for these features (N, d)."""
    head = HeadFit().new_head(features.shape[1], n_way, make_generator(SEED, "head", episode))
    return head.weight.detach().to(features.device)


def reference(setting: Setting) -> dict[str, Measured]:
    """Both works, one episode after another."""
    t = work(setting)
    size, fit, episodes, backbone = t.size, t.size.fit, t.episodes, plain.conv4(t.backbone)
    y = class_major_labels(5, size.n_shot, t.features.device)

    def head(i: int) -> plain.ArcMax:
        return plain.ArcMax(initial_weight(t.features, 5, i), fit.ft_s, fit.ft_m)

    def validate_one(i: int) -> Tensor:
        files = [[t.paths[j] for j in row] for row in episodes.index[i].tolist()]
        return plain.validate_episode(
            backbone, head(i), files, size.n_shot, setting.img_size, fit.ft_n_epoch, fit.ft_lr
        ).mean()

    def fit_one(i: int) -> tuple[Tensor, Tensor]:
        fitted = head(i)
        plain.fit_head(fitted, t.features[episodes.support[i].flatten()], y, fit.ft_n_epoch, fit.ft_lr)
        with torch.no_grad():
            shares = plain.share_right(fitted(t.features[episodes.query[i].flatten()]), 5)
        return shares.mean(), fitted.weight.detach()

    seconds, accuracy = timed(lambda: [validate_one(i) for i in range(size.timed_episodes)])
    fit_seconds, fitted = timed(lambda: [fit_one(i) for i in range(size.timed_heads)])
    updates = [fitted[i][1] - initial_weight(t.features, 5, i) for i in range(HEADS_CHECKED)]
    answer = {"accuracy": torch.stack([each for each, _ in fitted]), "weights": torch.stack(updates)}
    return {
        VALIDATION: Measured(seconds * size.n_episodes / size.timed_episodes, {"accuracy": torch.stack(accuracy)}),
        FITTING: Measured(fit_seconds * size.n_episodes / size.timed_heads, answer),
    }


def score(t: Work, features: Tensor, episodes: Episodes, setting: Setting) -> Tensor:
    """Accuracy of each episode, as transferLearning.py finds it."""
    return evaluate_heads(features, episodes, t.size.fit, setting.run).accuracy


def ours(setting: Setting) -> dict[str, Measured]:
    """Both works as transferLearning.py does them after an epoch; the images were decoded when the run began."""
    t = work(setting)
    size, fit, episodes = t.size, t.size.fit, t.episodes
    fit_seconds, fit_accuracy = timed(lambda: score(t, t.features, episodes, setting))
    embed_seconds, z_val = timed(lambda: embed(t.backbone, t.val.images, setting.run))
    score_seconds, accuracy = timed(lambda: score(t, z_val, episodes, setting))

    generators = [make_generator(SEED, "head", i) for i in range(HEADS_CHECKED)]
    heads = fit.new_head(t.backbone.feature_dim, 5, generators).to(t.features.device)
    before = heads.weight.detach().clone()
    support = t.features[episodes.support[:HEADS_CHECKED].flatten(1)]
    y = class_major_labels(5, size.n_shot, support.device).expand(HEADS_CHECKED, -1)
    fit_heads(heads, support, y, fit.ft_n_epoch, fit.ft_lr)
    note = f"{embed_seconds:.1f} s of it embed {len(t.val.labels)} images"
    answer = {"accuracy": fit_accuracy[: size.timed_heads], "weights": heads.weight.detach() - before}
    return {
        VALIDATION: Measured(embed_seconds + score_seconds, {"accuracy": accuracy[: size.timed_episodes]}, note),
        FITTING: Measured(fit_seconds, answer),
    }


def flops(setting: Setting) -> dict[str, float]:
    """The embedding of one image and the fitting of one head, scaled up."""
    t = work(setting)
    one = sample_episodes(t.val, EpisodeShape(5, t.size.n_shot, t.size.n_query), 1, SEED)
    embedding = count_flops(lambda: embed(t.backbone, t.val.images[:1], setting.run)) * len(t.val.labels)
    fitting = count_flops(lambda: score(t, t.features, one, setting)) * t.size.n_episodes
    return {VALIDATION: embedding + fitting, FITTING: fitting}


TARGETS = {VALIDATION: {"fp32": 30.0, "bf16": 50.0}, FITTING: {"fp32": 20.0, "bf16": 20.0}}
TOLERANCES = {
    # A query near the boundary may fall on its other side: one in 250 of an episode.
    "accuracy": {"fp32": 0.01, "bf16": 0.02},
    "weights": {"fp32": 1e-2, "bf16": 1e-2},
}
BENCH = Bench(TARGETS, reference, ours, flops, TOLERANCES)
