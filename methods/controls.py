"""What alignment has to beat: standard classifiers on the features of a frozen backbone, on the same episodes.

Each takes the support features of E episodes, z_support (E, n_way, n_shot, d), and those of their queries, z_query
(E, q, d), and gives scores (E, q, n_way).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from data.episodes import Episodes, class_major_labels
from engine.run import Run, move
from methods.evaluation import HEAD_CHUNK, EpisodeScores, count_predictions
from methods.protonet import protonet_scores
from models.heads import unit

N_RELATED, RELATED_WEIGHT = 100, 0.5  # chosen on val classes of mini-ImageNet
BASE_ROWS = 4096  # base features compared together, whose normalised copy is then small
FIT_STEPS = 1000  # of L-BFGS at most: at a strength of 1 it converges in twenty

Scorer = Callable[[Tensor, Tensor], Tensor]


def nearest_mean_cosine(z_support: Tensor, z_query: Tensor) -> Tensor:
    """Cosines to the prototypes, the means of the normalised support features."""
    return unit(z_query) @ unit(unit(z_support).mean(2)).mT


def simple_shot(z_support: Tensor, z_query: Tensor, centre: Tensor) -> Tensor:
    """Minus squared distances to the prototypes of features that are centred, then normalised.

    CL2N of Wang et al., SimpleShot, 2019. centre (d,): the mean of the base features.
    """
    return protonet_scores(unit(z_support - centre), unit(z_query - centre))


def related_prototype(z_support: Tensor, z_query: Tensor, z_base: Tensor) -> Tensor:
    """Cosines to prototypes, to each of which RELATED_WEIGHT times the mean of its N_RELATED nearest base features is
    added: related base images without any training. z_base (N, d), which may be on another device."""
    prototypes = unit(unit(z_support).mean(2))
    blocks = (unit(move(z, prototypes.device)).T for z in z_base.split(BASE_ROWS))
    found = [(prototypes @ block).topk(min(N_RELATED, block.shape[1])) for block in blocks]
    index = torch.cat([part.indices + i * BASE_ROWS for i, part in enumerate(found)], -1)
    best = torch.cat([part.values for part in found], -1).topk(min(N_RELATED, len(z_base))).indices
    nearest = index.gather(-1, best).flatten(0, 1).to(z_base.device)
    related = torch.stack([unit(z_base[i]).mean(0) for i in nearest])
    moved = prototypes + RELATED_WEIGHT * move(related, prototypes.device).view_as(prototypes)
    return unit(z_query) @ unit(moved).mT


def logistic_regression(z_support: Tensor, z_query: Tensor, strength: float = 1.0) -> Tensor:
    """Logits of multinomial logistic regression on unit features, as of Tian et al., Rethinking Few-shot, 2020.

    The loss is strength times the sum of cross-entropies, plus half the squared norm of the weights: scikit-learn's C,
    or half of it for two classes, to which scikit-learn, since 1.8, can only fit a sigmoid (docs/running.md).
    All lies in the span of the support, in an orthonormal basis of which the episodes are fitted, together.
    """
    n_episodes, n_way, n_shot, _ = z_support.shape
    of_episodes = unit(z_support).flatten(1, 2).mT.cpu()  # not every device has a QR decomposition
    basis, coordinates = (part.to(z_support.device) for part in torch.linalg.qr(of_episodes))
    y = class_major_labels(n_way, n_shot, z_support.device).repeat(n_episodes)
    weight = coordinates.new_zeros(n_episodes, n_way, coordinates.shape[1]).requires_grad_()
    bias = weight.new_zeros(n_episodes, 1, n_way).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = (coordinates.mT @ weight.mT + bias).flatten(0, 1)
        value = strength * F.cross_entropy(logits, y, reduction="sum") + weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return (unit(z_query) @ basis @ weight.mT + bias).detach()


def score_episodes(features: Tensor, episodes: Episodes, scorer: Scorer, run: Run, bar: str = "") -> EpisodeScores:
    """Score the queries of all episodes, HEAD_CHUNK of them together. features (N, d): those that episodes index."""
    counts = []
    for first in run.bar(range(0, len(episodes), HEAD_CHUNK), bar, f"x{HEAD_CHUNK} episodes", leave=False):
        part = episodes.slice(first, first + HEAD_CHUNK)
        index = (part.support, part.query.flatten(1))
        z_support, z_query = (features[of_part.to(features.device)].float() for of_part in index)
        counts.append(count_predictions(scorer(z_support, z_query), part.n_way).cpu())
    return EpisodeScores(torch.cat(counts))


def score_controls(features: Tensor, z_base: Tensor, episodes: Episodes, run: Run) -> dict[str, EpisodeScores]:
    """Scores of all controls by name. features (N, d): those that episodes index; z_base (M, d): those of the base."""
    scorers: dict[str, Scorer] = {
        "nearest mean, Euclidean": protonet_scores,
        "nearest mean, cosine": nearest_mean_cosine,
        "SimpleShot": partial(simple_shot, centre=move(z_base.mean(0, dtype=torch.float32), features.device)),
        "logistic regression": logistic_regression,
        "related prototype": partial(related_prototype, z_base=z_base),
    }
    return {name: score_episodes(features, episodes, scorer, run, name) for name, scorer in scorers.items()}
