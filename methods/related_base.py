"""Related base detection: which base classes, and which of their samples, align with a novel class.

A head fitted on the support of an episode predicts every base sample as one of the novel classes. The score of base
class b for novel class w is the share of its samples predicted as w (`vote`, the published code) or their mean
probability of w (`soft`, the paper's text). Each novel class, in order, takes its n_B best base classes that are
not yet taken, and keeps those of their samples that are predicted as w.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from engine.run import move
from methods.features import Source
from models.heads import Head

# Base features scored together.
BASE_ROWS = 512
GPU_BASE_ROWS = 2**14  # a GPU has a step of its own for each block
# Elements of the sets that related samples are drawn from together: 8 MB of them.
DRAWN_TOGETHER = 2**21


@dataclass(frozen=True)
class RelatedSetting:
    """How related base samples are found and drawn; each field is explained at the flag of the same name."""

    n_B: int = 10
    aug_size: int = 50
    related_score: str = "vote"
    related_draws: str = "fewest"


@dataclass(frozen=True)
class RelatedBase:
    """score (n_base_class, n_way); per novel class, base classes, best first, and sample indices (k_w,) on the CPU."""

    score: Tensor
    classes: list[list[int]]
    samples: list[Tensor]


def choose_related_base(score: Tensor, n_B: int) -> list[list[int]]:
    """Disjoint base classes per novel class, best first: n_way lists of n_B indices; ties keep the lower index.

    Fewer than n_way * n_B base classes are shared out evenly: n_base_class // n_way each.
    """
    n_base_class, n_way = score.shape
    score = score.cpu()
    n_B = min(n_B, n_base_class // n_way)
    taken = torch.zeros(n_base_class, dtype=torch.bool)
    chosen: list[list[int]] = []
    for w in range(n_way):
        free = score[:, w].masked_fill(taken, -1.0)
        best = free.sort(descending=True, stable=True).indices[:n_B]
        taken[best] = True
        chosen.append(best.tolist())
    return chosen


def related_samples(score: Tensor, predicted: Tensor, members: list[Tensor], n_B: int) -> RelatedBase:
    """Choose base classes by score (n_base_class, n_way); keep the samples predicted (N,) as the class chosen for."""
    classes = choose_related_base(score, n_B)
    samples = []
    for w, chosen in enumerate(classes):
        candidates = torch.cat([members[b] for b in chosen]) if chosen else torch.empty(0, dtype=torch.long)
        samples.append(candidates[predicted[candidates] == w])
    return RelatedBase(score, classes, samples)


@torch.no_grad()
def related_base_of_heads(head: Head, base: Source, setting: RelatedSetting) -> list[RelatedBase]:
    """Related base classes and samples by each of E heads fitted together, weight (E, n_way, d), or by one (n_way, d).

    The base features may be in half precision and mapped from disk: they are read a block at a time.
    """
    n_way, members, device = head.weight.shape[-2], base.split.members, head.weight.device
    rows = BASE_ROWS if device.type == "cpu" else GPU_BASE_ROWS
    # The last class is of samples that do not count.
    y_base, n_class = move(base.split.labels, device), len(members) + 1
    n_head = head.weight.shape[:-2].numel()
    total = torch.zeros(n_head, n_class, n_way, device=device)
    predicted = []
    for z, norm, y in zip(base.features.split(rows), base.norms.split(rows), y_base.split(rows), strict=True):
        z = move(z, device).float()
        scores = head.scores(z) / move(norm, device).unsqueeze(1) if head.directions else head(z)
        logits = head.logits(scores).view(-1, len(z), n_way)
        if setting.related_score == "soft":
            total.index_add_(1, y, logits.softmax(-1))
        predicted.append(logits.argmax(-1).short())  # of all heads at once: a quarter of the memory
    prediction = torch.cat(predicted, 1)
    if setting.related_score == "vote":
        cell = torch.arange(n_head, device=device).unsqueeze(1) * n_class + y_base
        votes = torch.bincount((cell * n_way + prediction).flatten(), minlength=total.numel())
        total += votes.view_as(total)
    score = total / torch.bincount(y_base, minlength=n_class).clamp_min(1).unsqueeze(1)
    heads = zip(score[:, : len(members)], prediction.cpu(), strict=True)
    return [related_samples(of_head, predicted_by, members, setting.n_B) for of_head, predicted_by in heads]


def related_base_of_head(head: Head, base: Source | None, setting: RelatedSetting) -> RelatedBase:
    """Related base classes and samples by a fitted head, weight (n_way, d); none without a base set."""
    if base is None:
        n_way = len(head.weight)
        return RelatedBase(torch.empty(0, n_way), [[]] * n_way, [torch.empty(0, dtype=torch.long)] * n_way)
    return related_base_of_heads(head, base, setting)[0]


def drawn_per_class(samples: list[Tensor], aug_size: int) -> int:
    """Related samples drawn per novel class and iteration: min(aug_size, smallest related set that is not empty)."""
    return min(aug_size, min((len(s) for s in samples if len(s)), default=0))


def draw_related(samples: list[Tensor], aug_size: int, n_iterations: int, generator: Generator) -> Tensor:
    """Draw related samples for each iteration and novel class: indices (n_iterations, n_way, aug_size).

    samples: n_way index tensors; drawn_per_class of each are drawn without replacement, and the rest is -1.
    """
    a = drawn_per_class(samples, aug_size)
    picks = torch.full((n_iterations, len(samples), aug_size), -1)
    filled = [w for w, s in enumerate(samples) if len(s)]
    sizes = [len(samples[w]) for w in filled]
    step = max(1, DRAWN_TOGETHER // max(1, sum(sizes)))
    for first in range(0, n_iterations if filled else 0, step):
        orders = first_of_randperms(sizes, a, min(step, n_iterations - first), generator)
        for w, order in zip(filled, orders.unbind(1), strict=True):
            picks[first : first + step, w, :a] = samples[w][order]
    return picks


def draw_by_setting(samples: list[Tensor], setting: RelatedSetting, n_iterations: int, generator: Generator) -> Tensor:
    """Related samples for each iteration, as draw_related; `each`: aug_size of every class, repeated if it has fewer.

    One class with few related samples then leaves the others theirs, and all count alike.
    """
    if setting.related_draws == "fewest":
        return draw_related(samples, setting.aug_size, n_iterations, generator)
    filled = [own.repeat(math.ceil(setting.aug_size / max(1, len(own)))) for own in samples]
    return torch.cat([draw_related([own], setting.aug_size, n_iterations, generator) for own in filled], 1)


def first_of_randperms(sizes: list[int], a: int, n: int, generator: Generator) -> Tensor:
    """The first a <= min(sizes) of torch.randperm(size), for n times all sizes: (n, len(sizes), a).

    Leaves the generator as torch.randperm would, whose step i swaps position i with one of those from i on, by a random
    number of 32 bits modulo their number. Here all take their first steps together; the other numbers are passed over.
    """
    size, i = torch.tensor(sizes), torch.arange(a)
    n_words = n * int((size - 1).sum())
    pairs = torch.empty(n_words // 2 + 1, dtype=torch.int64)
    words = pairs.view(torch.int32)  # of a pair, the upper half is the first number
    pairs[: n_words // 2].random_(-(2**63), None, generator=generator)
    words[n_words : n_words + n_words % 2].random_(generator=generator)  # its lower 31 bits: they are used modulo 2
    size = size.repeat(n).unsqueeze(1)
    starts = (size - 1).cumsum(0) - (size - 1)
    number = words[(starts + i) ^ 1].long() & 0xFFFFFFFF  # where randperm takes no step, the number is used modulo 1
    order = torch.arange(max(sizes), dtype=torch.int32).repeat(len(size), 1)
    drawn = []
    for step, partner in enumerate((i + number % (size - i)).split(1, 1)):
        drawn.append(order.gather(1, partner))
        order.scatter_(1, partner, order[:, step : step + 1].clone())
    return torch.cat(drawn, 1).long().view(n, len(sizes), a)


def exceeding_notes(n_way: int, n_B: int, n_base_class: int) -> list[str]:
    """A line where n_way * n_B exceed the base classes, which are then shared out; else none."""
    per_class = n_base_class // n_way
    shared_out = f"{n_way} classes x n_B {n_B} exceed the {n_base_class} base classes: {per_class} related base classes"
    return [f"{shared_out} per class"] if n_B > per_class else []


def empty_notes(related: RelatedBase, class_names: list[str]) -> list[str]:
    """A line that names the classes (n_way) whose related set is empty, if there are any."""
    empty = [name for name, samples in zip(class_names, related.samples, strict=True) if not len(samples)]
    return [f"no base image is predicted as {', '.join(map(repr, empty))}: aligned with nothing"] if empty else []
