"""What predict.py finds: the probability of each class for each query image, how sure it is, and what a user should
know of it."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.benchmarks import Split
from methods.alignment import AlignedEpisode, AlignmentSetting
from methods.related_base import empty_notes, exceeding_notes
from photos.confidence import Confidence

UNSURE = "unsure"


@dataclass(frozen=True)
class Predictions:
    """What few_shot_predict found for q query images and n_way classes.

    files: the queries' names below the query folder, and paths, where they are; class_names (n_way); probabilities
    (q, n_way), and finetuned (q, n_way), those before alignment. nearest: for each query the support image whose
    feature, before alignment, has the largest cosine with its own, and nearest_label that image's class.
    truth: the index of the class that each query's folder is named as, or None. related: for each class the base
    classes that it was aligned with, best first. n_support: support images of each class. notes: what a user should
    know. facts: what a record says of the backbone and the images. confidence: the accuracy on support images that were
    left out, and the temperature that calibrates the probabilities, if they are known. cosine (q): that of the query to
    its nearest support image, and unlike (q): whether it is far below those within the support. reject: the least
    probability of a label, below which a query is `unsure`.
    """

    files: list[str]
    paths: list[Path]
    class_names: list[str]
    probabilities: Tensor
    finetuned: Tensor
    nearest: list[Path]
    nearest_label: list[int]
    truth: list[int | None]
    related: dict[str, list[str]]
    n_support: list[int]
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    confidence: Confidence | None = None
    cosine: list[float] = field(default_factory=list)
    unlike: list[bool] = field(default_factory=list)
    reject: float = 0.0

    @property
    def sure(self) -> list[bool]:
        """Whether the largest probability of each query is at least `reject`."""
        return (self.probabilities.max(1).values >= self.reject).tolist()

    @property
    def labels(self) -> list[str]:
        """For each query the name of the class of the largest probability, or `unsure`."""
        best = zip(self.probabilities.argmax(1).tolist(), self.sure, strict=True)
        return [self.class_names[c] if sure else UNSURE for c, sure in best]

    @property
    def n_right(self) -> int | None:
        """How many queries have the class of their folder as the most probable one, the unsure ones included; None
        unless every query lies in a class's folder."""
        if any(c is None for c in self.truth):
            return None
        return sum(p == c for p, c in zip(self.probabilities.argmax(1).tolist(), self.truth, strict=True))


def least_sure_first(predictions: Predictions) -> Predictions:
    """The same predictions, in the order of the probability of their label."""
    order = predictions.probabilities.max(1).values.argsort(stable=True)
    lists = ("files", "paths", "nearest", "nearest_label", "truth", "cosine", "unlike")
    columns: dict[str, Any] = {name: [getattr(predictions, name)[i] for i in order.tolist()] for name in lists}
    columns |= {name: getattr(predictions, name)[order] for name in ("probabilities", "finetuned")}
    return replace(predictions, **columns)


def user_split(class_names: list[str], names: list[str], labels: Tensor, images: Tensor) -> Split:
    """The user's examples as a split: labels (k,), names of the files, images (k, 3, s, s), uint8."""
    sizes = torch.tensor(images.shape[2:]).expand(len(images), -1)
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    return Split("", "user", class_names, names, labels, images, None, sizes, digest)


def alignment_notes(
    episode: AlignedEpisode, setting: AlignmentSetting, class_names: list[str], n_base_class: int
) -> list[str]:
    """What a user should know of the related base images that alignment had."""
    notes = exceeding_notes(len(class_names), setting.related.n_B, n_base_class)
    notes += empty_notes(episode.related, class_names)
    if 0 < episode.n_drawn < setting.related.aug_size:
        notes.append(
            f"the smallest related set holds fewer than --aug_size {setting.related.aug_size} images: "
            f"{episode.n_drawn} were drawn of each class"
        )
    return notes
