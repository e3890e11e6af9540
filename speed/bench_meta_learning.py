"""100 episodes of each meta-learner, training and evaluation, against one episode after another from files.

Both sides are timed on a few training episodes, and the reference on a few episodes of evaluation, and scaled up to
100: each costs the same. Our evaluation embeds the whole novel split, as metaLearning.py does.

python -m speed.bench_meta_learning
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.benchmarks import Split
from data.episodes import Episodes, EpisodeShape, class_major_labels, sample_episodes
from data.transforms import Augmentation, training_images
from engine.generators import make_generator, seeded
from engine.script import run_script
from methods.episodic_training import evaluate_meta_learner, train_one_epoch
from methods.features import embed
from methods.meta_learner import MetaLearner
from methods.meta_learners import META_LEARNERS, build_meta_learner, uses_maps
from models import Model
from models.backbone import Backbone
from speed import reference_loops as plain
from speed.common import (
    Bench,
    Measured,
    Setting,
    clones,
    count_flops,
    difference,
    example_backbone,
    for_ours,
    load,
    run,
    timed,
)

N_EPISODES, SEED, LR = 100, 0, 1e-3
AUGMENTATION = Augmentation()
TIMED_TRAINING = {"tiny": 1, "full": 4}
TIMED_EVALUATION = {"tiny": 2, "full": 2}


def training(method: str) -> str:
    return f"{method}: training, 100 episodes"


def evaluation(method: str) -> str:
    return f"{method}: evaluation, 100 episodes"


@dataclass(frozen=True)
class Work:
    """The splits, their episodes and the model of one method."""

    base: Split
    base_paths: list[Path]
    novel: Split
    novel_paths: list[Path]
    train_episodes: Episodes
    novel_episodes: Episodes
    backbone: Backbone
    learner: MetaLearner


def work_of(setting: Setting, method: str) -> Work:
    base, base_paths = load(setting, "base")
    novel, novel_paths = load(setting, "novel")
    n_shot, n_train_query, n_query = (2, 3, 4) if setting.tiny else (5, 16, 50)
    n_evaluated = TIMED_EVALUATION["tiny"] if setting.tiny else N_EPISODES
    backbone = example_backbone(setting, base, relation=uses_maps(method))
    with seeded(SEED, "meta-learner"):
        learner = build_meta_learner(method, backbone)
    return Work(
        base,
        base_paths,
        novel,
        novel_paths,
        sample_episodes(base, EpisodeShape(5, n_shot, n_train_query), TIMED_TRAINING[setting.scale], SEED),
        sample_episodes(novel, EpisodeShape(5, n_shot, n_query), n_evaluated, SEED),
        backbone,
        learner,
    )


def embedded(backbone: nn.Module, learner: MetaLearner, x: Tensor, index: Tensor) -> Tensor:
    """Features, or maps, of an episode: (n_way, n_shot + n_query, ...)."""
    z = backbone(x)
    return (z if learner.uses_maps else z.flatten(1)).unflatten(0, tuple(index.shape))


def reference_training(
    setting: Setting, t: Work, backbone: nn.Module, learner: MetaLearner, augmentation: Augmentation | None
) -> float:
    """A step an episode, all its images from their files; the mean loss. The draws are those of train_one_epoch."""
    optimizer = torch.optim.Adam([*backbone.parameters(), *learner.parameters()], lr=LR)
    y_query = class_major_labels(5, t.train_episodes.query.shape[2])
    backbone.train()
    learner.train()
    losses = []
    for k, index in enumerate(t.train_episodes.index):
        files = [t.base_paths[i] for i in index.flatten()]
        if augmentation:
            generator = make_generator(SEED, "episodic training", 0, k)
            draws = plain.draw_augmentation(t.base.train_sizes[index.flatten()], augmentation, generator)
            x = torch.stack([plain.training_input(f, d, setting.img_size) for f, d in zip(files, draws, strict=True)])
        else:
            x = plain.evaluation_inputs(files, setting.img_size)
        scores = plain.meta_scores(learner, embedded(backbone, learner, x, index), t.train_episodes.n_shot)
        loss = plain.meta_loss(learner, scores, y_query)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def reference_evaluation(setting: Setting, t: Work, backbone: nn.Module, learner: MetaLearner) -> Tensor:
    """Accuracy of the first episodes, one after another."""
    backbone.eval()
    learner.eval()
    accuracy = []
    for index in t.novel_episodes.index[: TIMED_EVALUATION[setting.scale]]:
        x = plain.evaluation_inputs([t.novel_paths[i] for i in index.flatten()], setting.img_size)
        scores = plain.meta_scores(learner, embedded(backbone, learner, x, index), t.novel_episodes.n_shot)
        accuracy.append(plain.share_right(scores, 5).mean())
    return torch.stack(accuracy)


def reference(setting: Setting) -> dict[str, Measured]:
    """Training and evaluation of each method."""
    measured: dict[str, Measured] = {}
    for method in META_LEARNERS:
        t = work_of(setting, method)
        backbone, learner = plain.conv4(t.backbone), copy.deepcopy(t.learner)
        evaluate_seconds, accuracy = timed(lambda: reference_evaluation(setting, t, backbone, learner))  # noqa: B023
        train_seconds, loss = timed(lambda: reference_training(setting, t, backbone, learner, AUGMENTATION))  # noqa: B023
        backbone, learner = plain.conv4(t.backbone), copy.deepcopy(t.learner)
        before, learner_before = clones(backbone), clones(learner)
        plain_loss = reference_training(setting, t, backbone, learner, None)
        measured |= rows(
            setting, method, train_seconds, evaluate_seconds * len(t.novel_episodes) / len(accuracy),
            loss, plain_loss, difference(backbone, before), difference(learner, learner_before), accuracy,
        )  # fmt: skip
    return measured


def rows(
    setting: Setting,
    method: str,
    train_seconds: float,
    evaluate_seconds: float,
    loss: float,
    plain_loss: float,
    update: Tensor,
    learner_update: Tensor,
    accuracy: Tensor,
) -> dict[str, Measured]:
    """Both works of a method; train_seconds are those of the timed episodes."""
    answer = {
        "loss": torch.tensor(loss),
        "loss without augmentation": torch.tensor(plain_loss),
        "update without augmentation": torch.cat([update, learner_update]),
    }
    return {
        training(method): Measured(train_seconds * N_EPISODES / TIMED_TRAINING[setting.scale], answer),
        evaluation(method): Measured(evaluate_seconds, {"accuracy": accuracy}),
    }


def our_training(setting: Setting, t: Work, augmentation: Augmentation | None) -> float:
    """train_one_epoch as metaLearning.py calls it."""
    images = training_images(t.base, augmentation, setting.run.device)
    loss, _ = train_one_epoch(Model(t.backbone, t.learner, LR), images, t.train_episodes, 0, setting.run)
    return loss


def our_evaluation(setting: Setting, t: Work) -> Tensor:
    """Accuracy of all episodes, from the images."""
    z_novel = embed(t.backbone, t.novel.images, setting.run, maps=t.learner.uses_maps)
    return evaluate_meta_learner(t.learner, z_novel, t.novel_episodes, setting.run).accuracy


def ours(setting: Setting) -> dict[str, Measured]:
    """Training and evaluation of each method."""
    measured: dict[str, Measured] = {}
    for method in META_LEARNERS:
        t = work_of(setting, method)
        for_ours(t.backbone)
        before, learner_before = clones(t.backbone), clones(t.learner)
        evaluate_seconds, accuracy = timed(lambda: our_evaluation(setting, t))  # noqa: B023
        train_seconds, loss = timed(lambda: our_training(setting, t, AUGMENTATION))  # noqa: B023
        t.backbone.load_state_dict(before)
        t.learner.load_state_dict(learner_before)
        plain_loss = our_training(setting, t, None)
        measured |= rows(
            setting, method, train_seconds, evaluate_seconds, loss, plain_loss,
            difference(t.backbone, before), difference(t.learner, learner_before),
            accuracy[: TIMED_EVALUATION[setting.scale]],
        )  # fmt: skip
    return measured


def flops(setting: Setting) -> dict[str, float]:
    """One training episode, and one episode of evaluation plus the embedding of one image, scaled up."""
    counted: dict[str, float] = {}
    for method in META_LEARNERS:
        t = work_of(setting, method)
        for_ours(t.backbone)
        per_image = count_flops(
            lambda: embed(t.backbone, t.novel.images[:1], setting.run)  # noqa: B023
        )
        z = embed(t.backbone, t.novel.images[:64], setting.run, maps=t.learner.uses_maps)
        some = Episodes(t.novel_episodes.index[:1] % len(z), t.novel_episodes.classes[:1], t.novel_episodes.n_shot)
        per_episode = count_flops(lambda: evaluate_meta_learner(t.learner, z, some, setting.run))  # noqa: B023
        counted[evaluation(method)] = per_image * len(t.novel.labels) + per_episode * len(t.novel_episodes)
        trained = count_flops(lambda: our_training(setting, t, AUGMENTATION))  # noqa: B023
        counted[training(method)] = trained * N_EPISODES / TIMED_TRAINING[setting.scale]
    return counted


BENCH = Bench(
    name="meta_learning",
    targets={
        work(method): {"fp32": ratio}
        for method in META_LEARNERS
        for work, ratio in ((training, 1.5), (evaluation, 5.0))
    },
    reference=reference,
    ours=ours,
    flops=flops,
    tolerances={
        # PIL rounds the augmented images to whole grey levels.
        "loss": {"fp32": 0.05, "bf16": 0.1},
        # Four steps of Adam magnify rounding: in channels-last memory MatchingNet's reference is 0.007 in its loss and
        # 0.15 in its update from what it gives in contiguous memory.
        "loss without augmentation": {"fp32": 0.02, "bf16": 0.1},
        "update without augmentation": {"fp32": 0.3, "bf16": 0.7},
        "accuracy": {"fp32": 0.02, "bf16": 0.05},
    },
)

if __name__ == "__main__":
    run_script(lambda: run([BENCH], "python -m speed.bench_meta_learning", __doc__))
