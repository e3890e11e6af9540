"""100 episodes of each meta-learner, training and evaluation, against one episode after another from files.

Both sides are timed on a few training episodes, and the reference on a few episodes of evaluation, and scaled up to
100: each costs the same. Our evaluation embeds the whole novel split, as metaLearning.py does, the maps of RelationNet
a class at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from data.benchmarks import Split
from data.episodes import Episodes, EpisodeShape, class_major_labels, sample_episodes
from data.transforms import Augmentation, training_images
from engine.generators import make_generator, seeded
from methods.episodic_training import evaluate_meta_learner, train_episodic_epoch
from methods.features import embed
from methods.meta_learner import MetaLearner
from methods.meta_learners import META_LEARNERS, build_meta_learner
from methods.split_evaluation import evaluate_on_split, is_kept
from models import Model
from models.backbone import Backbone
from speed import reference_loops as plain
from speed.common import Bench, Measured, Setting, clones, count_flops, difference, load, new_conv4, timed

T = TypeVar("T")
N_EPISODES, SEED, LR = 100, 0, 1e-3
AUGMENTATION = Augmentation()
TIMED_TRAINING = {"tiny": 1, "full": 4}
TIMED_EVALUATION = {"tiny": 2, "full": 2}


def training(method: str) -> str:
    """The name of a method's training as a work."""
    return f"{method}: training, 100 episodes"


def evaluation(method: str) -> str:
    """The name of a method's evaluation as a work."""
    return f"{method}: evaluation, 100 episodes"


@dataclass(frozen=True)
class Work:
    """The splits, their episodes and the model of one method; of the backbone, one for each side."""

    method: str
    base: Split
    base_paths: list[Path]
    novel: Split
    novel_paths: list[Path]
    train_episodes: Episodes
    novel_episodes: Episodes
    backbone: Backbone
    plain_backbone: nn.Sequential
    learner: MetaLearner


def work_of(setting: Setting, method: str) -> Work:
    """The same on both sides."""
    base, base_paths = load(setting, "base")
    novel, novel_paths = load(setting, "novel")
    n_shot, n_train_query, n_query = (2, 3, 4) if setting.tiny else (5, 16, 50)
    n_evaluated = TIMED_EVALUATION["tiny"] if setting.tiny else N_EPISODES
    backbone = new_conv4(setting, base, relation=META_LEARNERS[method][0].uses_maps)
    with seeded(SEED, "meta-learner"):
        learner = build_meta_learner(method, backbone).to(setting.run.device)
    train = sample_episodes(base, EpisodeShape(5, n_shot, n_train_query), TIMED_TRAINING[setting.scale], SEED)
    evaluated = sample_episodes(novel, EpisodeShape(5, n_shot, n_query), n_evaluated, SEED)
    plain_backbone = plain.conv4(backbone)
    return Work(method, base, base_paths, novel, novel_paths, train, evaluated, backbone, plain_backbone, learner)


def reference_scores(t: Work, x: Tensor, index: Tensor, n_shot: int) -> Tensor:
    """Scores of the queries of an episode: index (n_way, n_shot + n_query), of its images x."""
    z = t.plain_backbone(x)
    z = (z if t.learner.uses_maps else z.flatten(1)).unflatten(0, tuple(index.shape))
    return plain.meta_scores(t.learner, z, n_shot)


def reference_training(setting: Setting, t: Work, augmentation: Augmentation | None) -> float:
    """One step per episode, with all images from files and the random draws of train_episodic_epoch; the mean loss."""
    optimizer = torch.optim.Adam([*t.plain_backbone.parameters(), *t.learner.parameters()], lr=LR)
    device = setting.run.device
    y_query = class_major_labels(5, t.train_episodes.query.shape[2], device)
    t.plain_backbone.train()
    t.learner.train()
    losses = []
    for k, index in enumerate(t.train_episodes.index):
        files = [t.base_paths[i] for i in index.flatten()]
        if augmentation:
            generator = make_generator(SEED, "episodic training", 0, k)
            draws = plain.draw_augmentation(t.base.train_sizes[index.flatten()], augmentation, generator)
            each = zip(files, draws, strict=True)
            x = torch.stack([plain.training_input(f, d, setting.img_size) for f, d in each]).to(device)
        else:
            x = plain.evaluation_inputs(files, setting.img_size, device)
        scores = reference_scores(t, x, index, t.train_episodes.n_shot)
        losses.append(plain.step(plain.meta_loss(t.learner, scores, y_query), optimizer))
    return sum(losses) / len(losses)


@torch.no_grad()
def reference_evaluation(setting: Setting, t: Work) -> Tensor:
    """Accuracy of the first episodes, one after another."""
    t.plain_backbone.eval()
    t.learner.eval()
    accuracy = []
    for index in t.novel_episodes.index[: TIMED_EVALUATION[setting.scale]]:
        files = [t.novel_paths[i] for i in index.flatten()]
        x = plain.evaluation_inputs(files, setting.img_size, setting.run.device)
        scores = reference_scores(t, x, index, t.novel_episodes.n_shot)
        accuracy.append(plain.share_right(scores, 5).mean())
    return torch.stack(accuracy)


def both_works(
    setting: Setting, t: Work, backbone: nn.Module, train: Callable[..., float], evaluate: Callable[..., Tensor]
) -> dict[str, Measured]:
    """Evaluation, training, and training again without augmentation, of one side on its backbone.

    train(setting, t, augmentation) gives the mean loss of the timed episodes; evaluate(setting, t) the accuracy of at
    least TIMED_EVALUATION episodes.
    """
    trained = nn.ModuleList([backbone, t.learner])
    before = clones(trained)
    evaluate_seconds, accuracy = timed(lambda: evaluate(setting, t))
    train_seconds, loss = timed(lambda: train(setting, t, AUGMENTATION))
    trained.load_state_dict(before)
    plain_loss = train(setting, t, None)
    answer = {
        "loss": torch.tensor(loss),
        "loss without augmentation": torch.tensor(plain_loss),
        "update without augmentation": difference(trained, before),
    }
    evaluate_seconds *= len(t.novel_episodes) / len(accuracy)
    return {
        training(t.method): Measured(train_seconds * N_EPISODES / TIMED_TRAINING[setting.scale], answer),
        evaluation(t.method): Measured(evaluate_seconds, {"accuracy": accuracy[: TIMED_EVALUATION[setting.scale]]}),
    }


def reference(setting: Setting, t: Work) -> dict[str, Measured]:
    """Both works by the plain loop."""
    return both_works(setting, t, t.plain_backbone, reference_training, reference_evaluation)


def our_training(setting: Setting, t: Work, augmentation: Augmentation | None) -> float:
    """train_episodic_epoch as metaLearning.py calls it."""
    images = training_images(t.base, augmentation, setting.run.device)
    loss, _ = train_episodic_epoch(Model(t.backbone, t.learner, LR), images, t.train_episodes, 0, setting.run)
    return loss


def our_evaluation(setting: Setting, t: Work) -> Tensor:
    """Accuracy of all episodes, from the images."""
    return evaluate_on_split(t.learner, t.backbone, t.novel, t.novel_episodes, setting.run).accuracy


def ours(setting: Setting, t: Work) -> dict[str, Measured]:
    """Both works as metaLearning.py does them."""
    return both_works(setting, t, t.backbone, our_training, our_evaluation)


def flops(setting: Setting, t: Work) -> dict[str, float]:
    """One training episode, and one episode of evaluation plus the embedding of one image, scaled up."""
    per_image = count_flops(lambda: embed(t.backbone, t.novel.images[:1], setting.run))
    z = embed(t.backbone, t.novel.images[:64], setting.run, maps=t.learner.uses_maps)
    some = Episodes(t.novel_episodes.index[:1] % len(z), t.novel_episodes.classes[:1], t.novel_episodes.n_shot)
    per_episode = count_flops(lambda: evaluate_meta_learner(t.learner, z, some, setting.run))
    trained = count_flops(lambda: our_training(setting, t, AUGMENTATION))
    n_images = len(t.novel.labels)
    if not is_kept(t.backbone, t.learner, n_images):  # support images are embedded twice
        n_images += len(t.novel_episodes.support.unique())
    return {
        evaluation(t.method): per_image * n_images + per_episode * len(t.novel_episodes),
        training(t.method): trained * N_EPISODES / TIMED_TRAINING[setting.scale],
    }


TOLERANCES = {
    # PIL rounds the augmented images to whole grey levels.
    "loss": {"fp32": 0.05, "bf16": 0.1},
    # Four steps of Adam magnify rounding: in channels-last memory MatchingNet's reference is 0.007 in its loss and
    # 0.15 in its update from what it gives in contiguous memory.
    "loss without augmentation": {"fp32": 0.02, "bf16": 0.1},
    "update without augmentation": {"fp32": 0.3, "bf16": 0.7},
    "accuracy": {"fp32": 0.02, "bf16": 0.05},
}


def bench_of(method: str) -> Bench:
    """The benchmark of one method, which has processes of its own, as in metaLearning.py."""

    def side(of: Callable[[Setting, Work], dict[str, T]]) -> Callable[[Setting], dict[str, T]]:
        return lambda setting: of(setting, work_of(setting, method))

    targets = {training(method): {"fp32": 1.5}, evaluation(method): {"fp32": 5.0}}
    return Bench("meta_learning", targets, side(reference), side(ours), side(flops), TOLERANCES)


BENCHES = [bench_of(method) for method in META_LEARNERS]
