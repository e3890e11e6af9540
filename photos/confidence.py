"""How sure a classifier may be: what it makes of support images that its head was not fitted on.

Each support image is left out in turn, one of each class at a time, and the heads of these folds are fitted, and
aligned in feature space, together. Their predictions give an estimate of the accuracy and a temperature by which the
logits are divided. All of it holds for images from where the support comes from, and for no others.
"""

import hashlib
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from data.episodes import Task
from engine.files import load_kept, save_atomically
from engine.run import Run
from methods.alignment import AlignmentSetting
from methods.feature_alignment import CHUNK_ELEMENTS, align_features, episodes_per_chunk, padded, padded_support
from methods.features import Source
from methods.novel_finetune import class_weights, fit_heads, uneven
from models.heads import Head, unit

# Folds, and so heads that are fitted: up to as many images per class, each is left out alone among those of its class.
MAX_FOLDS = 20
# Heads of a classifier of unequal classes, and of a fold of it, each fitted to as many examples per class.
MAX_BAGS, MAX_FOLD_BAGS = 32, 8
# Features of a larger cosine are of one image, embedded twice.
SAME = 1 - 1e-6
# Chosen on val episodes, for the calibration error of heads and of aligned heads.
DOUBT = 0.25
# An image is unlike every class when it is more than this many times as far from its nearest support image, by
# 1 - cosine, as any support image is from its own nearest.
FAR = 1.1


@dataclass(frozen=True)
class Confidence:
    """What the folds gave: of each class the support images that were left out, and those of them predicted right; the
    temperature. A class with one support image is not tested.

    wrong: the support images that were predicted as another class, with the probability of every class; surest first.
    """

    tested: list[int]
    right: list[int]
    n_folds: int
    temperature: float
    wrong: list[tuple[int, list[float]]] = field(default_factory=list)

    @property
    def n(self) -> int:
        """Support images that were left out."""
        return sum(self.tested)

    @property
    def n_right(self) -> int:
        """Those of them that were predicted right."""
        return sum(self.right)

    @property
    def accuracy(self) -> float:
        """The share that was right, in 0..1, as the mean over the classes that were tested."""
        shares = [right / n for right, n in zip(self.right, self.tested, strict=True) if n]
        return sum(shares) / len(shares)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy, by as many images as classes of equal numbers would take for it."""
        inverse = [1 / n for n in self.tested if n]
        return wilson_interval(self.accuracy, len(inverse) ** 2 / sum(inverse))


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """The 95% interval of a share among n (Wilson, 1927), which stays within 0..1 and is never empty."""
    z2 = 1.96**2
    centre = (n * share + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * (n * share * (1 - share) + z2 / 4)) / (n + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def same_images(z: Tensor, others: Tensor) -> Tensor:
    """Whether images are the same (n, m), by their features z (n, d) and others (m, d)."""
    return unit(z) @ unit(others).T > SAME


def first_copies(z: Tensor, y: Tensor) -> Tensor:
    """For each image, of features z (k, d) and label y (k,), the first image (k,) of its class that has these features.

    That is itself, unless it is a copy of another.
    """
    first = torch.arange(len(y))
    for members in (torch.nonzero(y == label).squeeze(1) for label in y.unique()):
        first[members] = members[same_images(z[members], z[members]).int().argmax(1)]
    return first


def in_two_classes(z: Tensor, y: Tensor) -> list[tuple[int, int]]:
    """Pairs of images, of features z (k, d) and labels y (k,), that are one image but not of one class."""
    return [(i, j) for i, j in (same_images(z, z) & (y.unsqueeze(1) < y)).nonzero().tolist()]


def folds(y: Tensor, first: Tensor | None = None) -> list[Task]:
    """Episodes on k support images of labels y (k,): the query of each is left out of its support.

    A fold leaves out one image of each class, so that the head does not lean to the other classes; of more than
    MAX_FOLDS images per class, several. The only image of a class is left out of no fold; without others there is none.
    first (k,): the first copy of each image (see first_copies), with which it is left out; None: there are no copies.
    """
    first = torch.arange(len(y)) if first is None else first
    distinct = first == torch.arange(len(y))
    counts, rank, place = torch.bincount(y[distinct]), torch.empty_like(y), distinct.nonzero().squeeze(1)
    rank[place[y[distinct].argsort(stable=True)]] = torch.cat([torch.arange(int(n)) for n in counts])
    rank = rank[first]
    n_folds = min(int(counts.max()), MAX_FOLDS)
    made = []
    for fold in range(n_folds if n_folds > 1 else 0):
        out = (rank % n_folds == fold) & (counts[y] > 1)
        kept, query = (mask.nonzero().squeeze(1) for mask in (~out, out))
        made.append(Task(kept, y[kept], query))
    return made


def bags(task: Task, most: int) -> list[Task]:
    """Episodes with as many support images per class as the smallest class has, which share out those of the others.

    A class of many images has a truer direction than one of few, whatever each image counts, and takes its queries; the
    mean score of heads that are fitted to equal numbers does not lean to it, and still is of all images.
    """
    counts = torch.bincount(task.y_support)
    k, members = int(counts.min()), [(task.y_support == w).nonzero().squeeze(1) for w in range(len(counts))]
    made = []
    for first in range(0, int(counts.max()), k)[:most]:
        kept = torch.cat([own[(first + torch.arange(k)) % len(own)] for own in members])
        made.append(Task(task.support[kept], task.y_support[kept], task.query))
    return made


@torch.no_grad()
def fitted_heads(tasks: list[Task], novel: Source, setting: AlignmentSetting, run: Run, first: int = 0) -> Head:
    """Heads fitted on the supports of E tasks, weight (E, n_way, d), the first of them the one of this number."""
    fit, (z_support, y_support, weight) = setting.fit, padded_support(tasks, novel.features)
    generators = [run.generator("head", first + i) for i in range(len(tasks))]
    head = fit.new_head(z_support.shape[-1], tasks[0].n_way, generators).to(run.device)
    fit_heads(head, z_support, y_support, fit.ft_n_epoch, fit.ft_lr, weight, fit.ft_init)
    return head


@torch.no_grad()
def left_out_logits(
    tasks: list[Task],
    novel: Source,
    base: Source | None,
    setting: AlignmentSetting,
    run: Run,
    kept: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (n, n_way) of the queries of all folds, in their order, each by the head of its fold: as it is fitted, and
    after alignment in feature space, where there is a base set.

    As many are fitted together as CHUNK_ELEMENTS allow. kept: a folder that keeps what is done, for a run that is
    stopped.
    """
    (k, d), n_way = novel.features.shape, tasks[0].n_way
    of_fold = [bags(task, MAX_FOLD_BAGS) for task in tasks]
    flat, scores = [bag for each in of_fold for bag in each], list[Tensor]()
    step = max(1, min(MAX_FOLDS, CHUNK_ELEMENTS // (4 * k * d), episodes_per_chunk(d, n_way, setting, run.device)))
    for first in run.bar(range(0, len(flat), step), "leave out", f"x{step} folds", leave=False):
        part = flat[first : first + step]
        path = kept and kept / f"left_out_{fold_digest(part, novel, base, (setting, first, run.seed))}.pt"
        both = load_kept(path) if path else None
        if both is None:
            both = fold_logits(part, novel, base, setting, run, first)
            if path:
                save_atomically(path, both)
        scores += [both[:, e, : len(task.query)] for e, task in enumerate(part)]
    ends = torch.tensor([0, *map(len, of_fold)]).cumsum(0).tolist()
    before, after = torch.cat([torch.stack(scores[a:b]).mean(0) for a, b in itertools.pairwise(ends)], 1)
    return before, after


def fold_logits(
    tasks: list[Task], novel: Source, base: Source | None, setting: AlignmentSetting, run: Run, first: int
) -> Tensor:
    """Logits (2, E, q, n_way) of the queries of E folds, padded to q: by heads as fitted, and aligned."""
    if base is None:
        head = fitted_heads(tasks, novel, setting, run, first)
        scores = head(novel.features[padded([task.query for task in tasks], run.device)])
        return head.logits(scores).expand(2, *scores.shape).cpu()
    aligned = align_features(tasks, novel, base, setting, run, first)
    before, after = (torch.stack([getattr(e, name) for e in aligned]) for name in ("finetuned", "aligned"))
    fitted = setting.fit.new_head(novel.features.shape[1], tasks[0].n_way, None)
    return torch.stack([fitted.logits(before), aligned[0].head.logits(after)]).cpu()


def fold_digest(tasks: list[Task], novel: Source, base: Source | None, rest: object) -> str:
    """A hash of all that the logits of folds follow from."""
    digest = hashlib.sha256(repr((rest, base and (base.split.fingerprint, base.split.class_names))).encode())
    for task in tasks:
        digest.update(novel.features[torch.cat([task.support, task.query])].cpu().numpy().tobytes())
        digest.update(task.y_support.numpy().tobytes())
    return digest.hexdigest()[:32]


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """The T that minimises the cross-entropy of softmax(logits / T), logits (n, n_way), against y (n,), in which every
    class counts alike.

    As in Platt's scaling the targets are not 0 and 1: DOUBT of a prediction, equal over all classes, counts beside
    the n. Without it, a few predictions that are all right would have a T of 0 and every probability would be 1.
    """
    n, n_way = logits.shape
    target = torch.full((n, n_way), DOUBT / n_way).scatter_add_(1, y.unsqueeze(1), torch.full((n, 1), float(n)))
    target /= n + DOUBT
    if (weight := uneven(class_weights(y))) is not None:
        target *= n * weight.unsqueeze(1)
    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(60):  # golden-section search of log(1 / T), in which the loss has one minimum
        a, b = high - 0.618034 * (high - low), low + 0.618034 * (high - low)
        losses = [-(target * (math.exp(x) * logits).log_softmax(1)).sum().item() for x in (a, b)]
        low, high = (low, b) if losses[0] < losses[1] else (a, high)
    return math.exp(-(low + high) / 2)


def cross_validate(
    novel: Source, y: Tensor, base: Source | None, setting: AlignmentSetting, run: Run, kept: Path | None = None
) -> Confidence | None:
    """The confidence of a classifier that `setting` makes of support features (k, d) and labels y (k,).

    None when no class has two different images. kept: as in left_out_logits.
    """
    tasks = folds(y, first_copies(novel.features.cpu(), y))
    if not tasks:
        return None
    logits = left_out_logits(tasks, novel, base, setting, run, kept)[1]
    left_out = torch.cat([task.query for task in tasks])
    y_left_out, n_way = y[left_out], logits.shape[1]
    is_right = logits.argmax(1) == y_left_out
    tested, n_right = (
        torch.bincount(labels, minlength=n_way).tolist() for labels in (y_left_out, y_left_out[is_right])
    )
    temperature = fit_temperature(logits, y_left_out)
    wrong = zip(left_out[~is_right].tolist(), (logits[~is_right] / temperature).softmax(1).tolist(), strict=True)
    by_certainty = sorted(wrong, key=lambda each: -max(each[1]))
    return Confidence(tested, n_right, len(tasks), temperature, by_certainty)


def nearest(z: Tensor, z_support: Tensor) -> tuple[Tensor, Tensor]:
    """The largest cosine (n,) of features z (n, d) to support features (k, d), and the index (n,) of that image."""
    best = (unit(z) @ unit(z_support).T).max(1)
    return best.values, best.indices


def least_cosine(z_support: Tensor) -> float:
    """The largest cosine to the support (k, d) below which an image is unlike every class.

    By 1 - cosine, it is FAR times as far as any support image is from the nearest other one.
    """
    z = unit(z_support)
    to_others = (z @ z.T).topk(2).values[:, 1].min().item()  # the largest is to itself
    return 1.0 - FAR * (1.0 - to_others)
