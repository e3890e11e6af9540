"""Stage 2: episodic training on the base classes, and evaluation of a meta-learner on any number of episodes.

Vinyals et al., Matching Networks for One Shot Learning, NeurIPS 2016: train as you test. Each step is an episode of
base classes, and its loss is on the queries, given the support. One forward pass takes support and query images, so
that batch norm, in train mode, sees the whole episode; evaluation is in eval mode, where no query sees another. As in
Chen et al., A Closer Look at Few-shot Classification (ICLR 2019), each image of an episode is augmented by itself.
"""

from typing import cast

import torch
from torch import Tensor

from data.episodes import Episodes, class_major_labels
from data.transforms import TrainingImages
from engine.distributed import gather_rows
from engine.errors import UserError
from engine.precision import Losses
from engine.run import Run
from methods.evaluation import EpisodeScores, count_predictions, share_right
from methods.meta_learner import MetaLearner
from models import Model, n_parameters

# Elements of the largest tensor of the episodes evaluated together, of which a few are in memory: 32 MiB.
EVALUATED_ELEMENTS = 2**23


def train_episodic_epoch(
    model: Model,
    images: TrainingImages,
    episodes: Episodes,
    epoch: int,
    run: Run,
    warm_up: bool = False,
    n_left: int = 1,
) -> tuple[float, float]:
    """One optimiser step per episode; returns the mean loss and the mean query accuracy in 0..1.

    In a warm-up the backbone is frozen, in eval mode. `episodes` index the images. Augmentation and dropout of episode
    k depend on (seed, epoch, k) alone. The bar is of the n_left epochs that are left, this one included. Raises
    UserError when the loss is no longer finite, or when a learner without parameters is to warm up.
    """
    if warm_up and not n_parameters(model.head):
        raise UserError(f"{type(model.head).__name__} has no module of its own to warm up: give --warm_up_epochs 0")
    backbone, learner = model.backbone.train(not warm_up), cast(MetaLearner, model.head).train()
    network = backbone.feature_map if learner.uses_maps else backbone
    y_query = class_major_labels(episodes.n_way, episodes.query.shape[2], run.device)
    losses = Losses(f"epoch {epoch + 1}, episode")
    name, total = f"epoch {epoch + 1} and on", len(episodes) * n_left
    bar = run.bar(range(len(episodes)), name, "episode", leave=False, total=total)
    for k in bar:
        index = episodes.index[k]
        x = images.batch(index.flatten(), run.generator("episodic training", epoch, k))
        with run.precision.autocast(), run.seeded("dropout", epoch, k), torch.set_grad_enabled(not warm_up):
            z = network(x)
        z = z.float().unflatten(0, tuple(index.shape))
        scores = learner(z[:, : episodes.n_shot], z[:, episodes.n_shot :].flatten(0, 1))
        loss = learner.loss(scores, y_query)
        run.precision.backward_and_step(loss, model.optimizer)
        if losses.add(loss, share_right(count_predictions(scores, episodes.n_way)).mean()):
            mean_loss, accuracy = means(losses)
            bar.set_postfix_str(f"loss {mean_loss:.3f}, accuracy {100 * accuracy:.1f}", refresh=False)
    return means(losses)


def means(losses: Losses) -> tuple[float, float]:
    """Mean loss and accuracy of the episodes so far."""
    loss_sum = accuracy_sum = 0.0
    for loss, accuracy in losses.read():
        loss_sum, accuracy_sum = loss_sum + loss, accuracy_sum + accuracy
    return loss_sum / len(losses.rows), accuracy_sum / len(losses.rows)


@torch.no_grad()
def evaluate_meta_learner(
    learner: MetaLearner, features: Tensor, episodes: Episodes, run: Run, bar: str = ""
) -> EpisodeScores:
    """Score the queries of all episodes with the learner in eval mode, many episodes together.

    features: the embedded split that `episodes` index, (N, d), or its maps (N, c, h, w) if learner.uses_maps. `bar`
    names a progress bar. The chunks are shared out over the ranks, which all get all scores.
    """
    learner.eval()
    # A map for each pair of query and class, or the four gates of MatchingNet's LSTM.
    per_image = (episodes.n_way if learner.uses_maps else 4) * features[0].numel()
    episodes_per_chunk = max(1, EVALUATED_ELEMENTS // (episodes.index[0].numel() * per_image))
    counts: list[Tensor] = []
    with run.bar(None, bar, "episode", total=len(episodes)) as progress:
        for first in run.ranks.share(range(0, len(episodes), episodes_per_chunk)):
            part = episodes.slice(first, first + episodes_per_chunk)
            support = features[part.support.to(features.device)]
            query = features[part.query.flatten(1).to(features.device)]
            counts.append(count_predictions(learner(support, query), part.n_way).cpu())
            progress.update(len(part))
            accuracy = EpisodeScores(torch.cat(counts)).accuracy.mean().item()
            progress.set_postfix_str(f"accuracy {100 * accuracy:.2f}", refresh=False)
    return EpisodeScores(gather_rows(counts, run.ranks))
