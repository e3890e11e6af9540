"""Evaluation of a meta-learner on a split, which is embedded once, or, where its maps are too large, class by class.

A learner that takes only the mean of each class's support can score the queries of one class after another: first the
means of all episodes, then each class is embedded and its queries scored in all episodes that have it. Only one class
is in memory at a time, and support images are embedded twice. The scores are the same but for rounding.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from data.benchmarks import Split
from data.episodes import Episodes
from engine.distributed import ALONE, gather_objects
from engine.run import Run, move
from methods.episodic_training import EVALUATED_ELEMENTS, evaluate_meta_learner
from methods.evaluation import EpisodeScores, count_predictions
from methods.features import INPUT_ROWS, MAPPED, embed
from methods.meta_learner import MetaLearner
from models.backbone import Backbone


def evaluate_on_split(
    learner: MetaLearner, backbone: Backbone, split: Split, episodes: Episodes, run: Run, bar: str = ""
) -> EpisodeScores:
    """Score the queries of all episodes of a split, in eval mode. `bar` names the progress bars; empty shows none."""
    if learner.takes_means and len(split.labels) * math.prod(backbone.map_shape) > MAPPED:
        return evaluate_class_by_class(learner, backbone, split, episodes, run, bar)
    features = embed(backbone, split.images, run, bar and f"embed {bar}", learner.uses_maps)
    return evaluate_meta_learner(learner, features, episodes, run, bar and f"{bar} episodes")


@torch.no_grad()
def support_means(learner: MetaLearner, backbone: Backbone, split: Split, episodes: Episodes, run: Run) -> Tensor:
    """The mean of each support: (E, n_way, d), or (E, n_way, c, h, w) of maps. The ranks share out the images."""
    shape = backbone.map_shape if learner.uses_maps else (backbone.feature_dim,)
    support, order = episodes.support.flatten().sort(stable=True)
    sums = torch.zeros(len(order) // episodes.n_shot, *shape, device=run.device)
    for image, row in zip(*(each.split(INPUT_ROWS) for each in (support, order // episodes.n_shot)), strict=True):
        once, index = image.unique(return_inverse=True)
        z = embed(backbone, split.images[once], run, maps=learner.uses_maps)
        sums.index_add_(0, move(row, run.device), z[move(index, run.device)])
    return sums.div_(episodes.n_shot).unflatten(0, (-1, episodes.n_way))


@torch.no_grad()
def evaluate_class_by_class(
    learner: MetaLearner, backbone: Backbone, split: Split, episodes: Episodes, run: Run, bar: str = ""
) -> EpisodeScores:
    """The scores of evaluate_on_split, with the maps of one class in memory. The ranks share out the classes."""
    learner.eval()
    alone, (n_way, n_query) = replace(run, ranks=ALONE), episodes.query.shape[1:]
    means = support_means(learner, backbone, split, episodes, run)
    chunk = max(1, EVALUATED_ELEMENTS // (n_way * n_query * means[0, 0].numel()))
    counts = torch.zeros(len(episodes), n_way, n_way, dtype=torch.long)
    for c in run.bar(run.ranks.share(range(len(split.class_names))), bar, "class"):
        at = (episodes.classes == c).nonzero()
        if not len(at):
            continue
        images, index = episodes.query[at[:, 0], at[:, 1]].unique(return_inverse=True)
        z = embed(backbone, split.images[images], alone, maps=learner.uses_maps)
        for part, query in zip(at.split(chunk), index.split(chunk), strict=True):
            e, way = part.unbind(1)
            scores = learner(means[move(e, run.device)].unsqueeze(2), z[move(query, run.device)])
            counts[e, way] = count_predictions(scores.flatten(0, 1), len(part)).cpu()
    return EpisodeScores(torch.stack(gather_objects(counts, run.ranks)).sum(0))
