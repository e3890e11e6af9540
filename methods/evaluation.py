"""Evaluation of episodes on the features of a split: counts of predictions, and accuracy."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data.episodes import Episodes, class_major_labels
from engine.distributed import gather_rows
from engine.run import Run
from methods.novel_finetune import HeadFit, fit_heads

# Episodes whose heads are fitted together on a CPU, where more spend less time between operations and fewer stay in the
# cache; on a GPU, which they would not fill, elements of the features of all that are: 512 MB of them.
HEAD_CHUNK = 50
GPU_ELEMENTS = 2**27


@dataclass(frozen=True)
class EpisodeScores:
    """Predictions of the queries of E episodes: counts (E, n_way, n_way), rows true and columns predicted.

    correct (E, n_way): accuracy per class; accuracy (E,): per episode, in 0..1.
    """

    counts: Tensor

    @property
    def correct(self) -> Tensor:
        return share_right(self.counts)

    @property
    def accuracy(self) -> Tensor:
        return self.correct.mean(1)


def count_predictions(scores: Tensor, n_way: int) -> Tensor:
    """Count class-major scores (..., n_way * n_query, n_class) by true and predicted class: (..., n_way, n_class)."""
    predicted = scores.argmax(-1).unflatten(-1, (n_way, -1))
    return F.one_hot(predicted, scores.shape[-1]).sum(-2)


def share_right(counts: Tensor) -> Tensor:
    """Accuracy per class from counts, rows true: (..., n_way, n_way) -> (..., n_way)."""
    return counts.diagonal(dim1=-2, dim2=-1).float() / counts.sum(-1)


@torch.no_grad()
def evaluate_heads(features: Tensor, episodes: Episodes, fit: HeadFit, run: Run, bar: str = "") -> EpisodeScores:
    """Fit a new head on the support of each episode and score its queries, many episodes together.

    features (N, d): the embedded split that `episodes` index. The initial head of episode i depends on (seed, i) alone.
    The chunks are shared out over the ranks, which all get all scores.
    """
    counts, d, device = [], features.shape[1], features.device
    # Once for all episodes, as an image is a query of many.
    projected = fit.new_head(d, episodes.n_way, run.generator("head", 0)).to(device).project(features)
    chunk, elements_per_episode = HEAD_CHUNK, episodes.index[0].numel() * d
    if run.device.type == "cuda":
        chunk = max(1, min(math.ceil(len(episodes) / run.ranks.n), GPU_ELEMENTS // elements_per_episode))
    for first in run.bar(run.ranks.share(range(0, len(episodes), chunk)), bar, f"x{chunk} episodes"):
        part = episodes.slice(first, first + chunk)
        y = class_major_labels(part.n_way, part.n_shot, device).expand(len(part), -1)
        generators = [run.generator("head", first + i) for i in range(len(part))]
        head = fit.new_head(d, part.n_way, generators).to(device)
        fit_heads(head, features[part.support.flatten(1).to(device)], y, fit.ft_n_epoch, fit.ft_lr, init=fit.ft_init)
        scores = head.scores(projected[part.query.flatten(1).to(device)])
        counts.append(count_predictions(scores, part.n_way).cpu())
    return EpisodeScores(gather_rows(counts, run.ranks))


def per_class_accuracy(scores: EpisodeScores, episodes: Episodes, class_names: list[str]) -> dict[str, float]:
    """Mean accuracy (%) per class over the episodes that it was part of."""
    classes, correct = episodes.classes.flatten(), scores.correct.flatten().double()
    total = torch.zeros(len(class_names), dtype=torch.double).index_add_(0, classes, correct)
    count = torch.bincount(classes, minlength=len(class_names))
    return {name: round(100.0 * (total[c] / count[c]).item(), 2) for c, name in enumerate(class_names) if count[c] > 0}


def confusion_record(counts: Tensor, episodes: Episodes, class_names: list[str]) -> dict[str, dict[str, int]]:
    """The confusion matrix of counts (E, n_way, n_way) by class name, true then predicted; counts of 0 are left out."""
    n_class, classes = len(class_names), episodes.classes
    cell = classes.unsqueeze(2) * n_class + classes.unsqueeze(1)
    total = torch.zeros(n_class * n_class, dtype=torch.long).index_add_(0, cell.flatten(), counts.flatten())
    record: dict[str, dict[str, int]] = {}
    for true, predicted in total.view(n_class, n_class).nonzero().tolist():
        record.setdefault(class_names[true], {})[class_names[predicted]] = int(total[true * n_class + predicted])
    return record
