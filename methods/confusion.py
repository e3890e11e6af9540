"""Confusion over episodes: which class the queries of each class are taken for.

Within an episode only its own classes can be confused; counts are summed over episodes by class, so that classes which
never met in one have no count.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.episodes import Episodes


def count_predictions(scores: Tensor, n_way: int) -> Tensor:
    """Queries of each true class by predicted class: class-major scores (..., n_way * n_query, n_way) ->
    (..., n_way, n_way), rows true, columns predicted."""
    predicted = scores.argmax(-1).unflatten(-1, (n_way, -1))
    return F.one_hot(predicted, n_way).sum(-2)


def confusion_matrix(counts: Tensor, classes: Tensor, n_class: int) -> Tensor:
    """Counts (E, n_way, n_way) of E episodes of the classes (E, n_way), summed by class: (n_class, n_class)."""
    true, predicted = classes.unsqueeze(2).expand_as(counts), classes.unsqueeze(1).expand_as(counts)
    total = torch.zeros(n_class * n_class, dtype=torch.long)
    total.index_add_(0, (true * n_class + predicted).flatten(), counts.flatten())
    return total.view(n_class, n_class)


def confusion_record(counts: Tensor, episodes: Episodes, class_names: list[str]) -> dict[str, dict[str, int]]:
    """The confusion matrix by class name, true then predicted; classes without a query and counts of 0 are left out."""
    total = confusion_matrix(counts, episodes.classes, len(class_names)).tolist()
    rows = {name: dict(zip(class_names, row, strict=True)) for name, row in zip(class_names, total, strict=True)}
    rows = {true: {name: count for name, count in row.items() if count} for true, row in rows.items()}
    return {true: row for true, row in rows.items() if row}
