"""Validation: a split embedded once and many heads fitted together, against one episode after another from files.

The reference is timed on a few episodes and scaled up to all: each costs the same.

python -m speed.bench_validation --precision bf16
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.episodes import Episodes, EpisodeShape, class_major_labels, sample_episodes
from engine.generators import make_generator
from engine.script import run_script
from methods.evaluation import evaluate_heads
from methods.features import embed
from methods.novel_finetune import HeadFit, fit_heads
from speed import reference_loops as plain
from speed.common import Bench, Measured, Setting, count_flops, example_backbone, for_ours, load, run, timed

VALIDATION, FITTING = "validation: 400 episodes of 5-way 5-shot", "fitting the heads of 400 episodes"
SEED = 0
HEADS_CHECKED = 2


@dataclass(frozen=True)
class Sizes:
    """Of the protocol, and how many episodes the reference is timed on."""

    n_shot: int
    n_query: int
    n_episodes: int
    n_steps: int
    timed_episodes: int
    timed_heads: int


# The head, and Adam's steps on it, are the protocol's.
FIT = HeadFit()
SIZES = {"tiny": Sizes(2, 5, 4, 20, 4, 4), "full": Sizes(5, 50, 400, 200, 4, 20)}


def toy_features(episodes: Episodes, labels: Tensor, d: int) -> Tensor:
    """Positive features (N, d), a direction a class and noise, for the fitting alone."""
    generator = make_generator(SEED, "features")
    centre = torch.rand(int(labels.max()) + 1, d, generator=generator)
    return (centre[labels] + torch.randn(len(labels), d, generator=generator)).clamp_min(0.0)


def initial_weight(d: int, n_way: int, episode: int) -> Tensor:
    """The head that evaluate_heads starts episode `episode` with."""
    return FIT.new_head(d, n_way, make_generator(SEED, "head", episode)).weight


def reference(setting: Setting) -> dict[str, Measured]:
    """Both works, one episode after another."""
    size = SIZES[setting.scale]
    val, paths = load(setting, "val")
    base, _ = load(setting, "base")
    episodes = sample_episodes(val, EpisodeShape(5, size.n_shot, size.n_query), size.n_episodes, SEED)
    ours = example_backbone(setting, base)
    backbone, d = plain.conv4(ours), ours.feature_dim

    def head(i: int) -> plain.ArcMax:
        return plain.ArcMax(initial_weight(d, 5, i), FIT.ft_s, FIT.ft_m)

    def validate() -> Tensor:
        scores = []
        for i in range(size.timed_episodes):
            files = [[paths[j] for j in row] for row in episodes.index[i].tolist()]
            scores.append(
                plain.validate_episode(backbone, head(i), files, size.n_shot, setting.img_size, size.n_steps, FIT.ft_lr)
            )
        return torch.stack(scores)

    features = toy_features(episodes, val.labels, d)
    y = class_major_labels(5, size.n_shot)

    def fit() -> Tensor:
        scores = []
        for i in range(size.timed_heads):
            fitted = head(i)
            plain.fit_head(fitted, features[episodes.support[i].flatten()], y, size.n_steps, FIT.ft_lr)
            with torch.no_grad():
                scores.append(plain.share_right(fitted(features[episodes.query[i].flatten()]), 5))
        return torch.stack(scores)

    seconds, shares = timed(validate)
    fit_seconds, fit_shares = timed(fit)
    weights = []
    for i in range(HEADS_CHECKED):
        fitted = head(i)
        plain.fit_head(fitted, features[episodes.support[i].flatten()], y, size.n_steps, FIT.ft_lr)
        weights.append(fitted.weight.detach() - initial_weight(d, 5, i).detach())
    return {
        VALIDATION: Measured(seconds * size.n_episodes / size.timed_episodes, {"accuracy": shares.mean(1)}),
        FITTING: Measured(
            fit_seconds * size.n_episodes / size.timed_heads,
            {"accuracy": fit_shares.mean(1), "weights": torch.stack(weights)},
        ),
    }


def ours(setting: Setting) -> dict[str, Measured]:
    """Both works as transferLearning.py does them after an epoch; the images were decoded when the run began."""
    size = SIZES[setting.scale]
    val, _ = load(setting, "val")
    base, _ = load(setting, "base")
    episodes = sample_episodes(val, EpisodeShape(5, size.n_shot, size.n_query), size.n_episodes, SEED)
    backbone = for_ours(example_backbone(setting, base))
    d = backbone.feature_dim

    def score(features: Tensor) -> Tensor:
        return evaluate_heads(features, episodes, replace(FIT, ft_n_epoch=size.n_steps), setting.run).accuracy

    features = toy_features(episodes, val.labels, d)
    fit_seconds, fit_accuracy = timed(lambda: score(features))
    embed_seconds, z_val = timed(lambda: embed(backbone, val.images, setting.run))
    score_seconds, accuracy = timed(lambda: score(z_val))

    generators = [make_generator(SEED, "head", i) for i in range(HEADS_CHECKED)]
    heads = FIT.new_head(d, 5, generators)
    before = heads.weight.detach().clone()
    support = features[episodes.support[:HEADS_CHECKED].flatten(1)]
    fit_heads(heads, support, class_major_labels(5, size.n_shot).expand(HEADS_CHECKED, -1), size.n_steps, FIT.ft_lr)
    return {
        VALIDATION: Measured(
            embed_seconds + score_seconds,
            {"accuracy": accuracy[: size.timed_episodes]},
            f"{embed_seconds:.1f} s of it embed {len(val.labels)} images",
        ),
        FITTING: Measured(
            fit_seconds,
            {"accuracy": fit_accuracy[: size.timed_heads], "weights": heads.weight.detach() - before},
        ),
    }


def flops(setting: Setting) -> dict[str, float]:
    """The embedding of one batch and the fitting of one chunk, scaled up."""
    size = SIZES[setting.scale]
    val, _ = load(setting, "val")
    base, _ = load(setting, "base")
    episodes = sample_episodes(val, EpisodeShape(5, size.n_shot, size.n_query), 1, SEED)
    backbone = for_ours(example_backbone(setting, base))
    features = toy_features(episodes, val.labels, backbone.feature_dim)
    embedding = count_flops(lambda: embed(backbone, val.images[:1], setting.run)) * len(val.labels)
    fitting = size.n_episodes * count_flops(
        lambda: evaluate_heads(features, episodes, replace(FIT, ft_n_epoch=size.n_steps), setting.run)
    )
    return {VALIDATION: embedding + fitting, FITTING: fitting}


BENCH = Bench(
    name="validation",
    targets={VALIDATION: {"fp32": 30, "bf16": 50}, FITTING: {"fp32": 20, "bf16": 20}},
    reference=reference,
    ours=ours,
    flops=flops,
    tolerances={
        # A query near the boundary may fall on its other side: one in 250 of an episode.
        "accuracy": {"fp32": 0.01, "bf16": 0.02},
        "weights": {"fp32": 1e-2, "bf16": 1e-2},
    },
)

if __name__ == "__main__":
    run_script(lambda: run([BENCH], "python -m speed.bench_validation", __doc__))
