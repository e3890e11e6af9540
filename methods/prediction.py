"""Label query images from a few support images a class: one episode of stage 3, on images without a benchmark.

The head is fitted on the support features; with a base set, the backbone is then aligned with the related base images
(see methods/alignment.py). What is asked here is not an accuracy but the probability of each class for each query.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.benchmarks import Split
from data.episodes import Task
from engine.run import Run
from methods.alignment import AlignedEpisode, AlignmentSetting, align_episode
from methods.feature_alignment import align_features
from methods.features import FeatureCache, UpdatedBlocks, image_source
from methods.related_base import empty_notes, exceeding_notes
from models.backbone import Backbone
from models.heads import unit


@dataclass(frozen=True)
class Predictions:
    """What few_shot_predict found for q query images and n_way classes.

    files: the queries' names below the query folder, and paths, where they are; class_names (n_way); probabilities
    (q, n_way), and finetuned (q, n_way), those before alignment. nearest: for each query the support image whose
    feature, before alignment, has the largest cosine with its own, and nearest_label that image's class.
    truth: the index of the class that each query's folder is named as, or None. related: for each class the base
    classes that it was aligned with, best first. n_support: support images of each class. notes: what a user should
    know. facts: what a record says of the backbone and the images.
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

    @property
    def labels(self) -> list[str]:
        """The class of the largest probability, by name, for each query."""
        return [self.class_names[c] for c in self.probabilities.argmax(1).tolist()]

    @property
    def n_right(self) -> int | None:
        """How many labels are those of the queries' folders; None unless every query lies in a class's folder."""
        if any(c is None for c in self.truth):
            return None
        return sum(p == c for p, c in zip(self.probabilities.argmax(1).tolist(), self.truth, strict=True))


def user_split(class_names: list[str], names: list[str], y_support: Tensor, images: Tensor) -> Split:
    """The user's images as a split, the support first: k labels, y_support (k,), then -1 for the queries.

    names (k + q) of the files; images (k + q, 3, s, s), uint8.
    """
    labels = torch.cat([y_support, y_support.new_full((len(images) - len(y_support),), -1)])
    sizes = torch.tensor(images.shape[2:]).expand(len(images), -1)
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    return Split("", "user", class_names, names, labels, images, None, sizes, digest)


def run_episode(
    backbone: Backbone,
    blocks: UpdatedBlocks,
    user: Split,
    base: Split | None,
    cache_dir: Path,
    setting: AlignmentSetting,
    run: Run,
) -> tuple[AlignedEpisode, Tensor]:
    """The episode of a user_split, and the features (k + q, d) of its images before alignment.

    Without `base`, setting.alignment is `none`.
    """
    novel = image_source(backbone, blocks, user, run, "embed")
    base_source = FeatureCache(cache_dir, run).source(backbone, blocks, base) if base else None
    support, query = (torch.nonzero(known).squeeze(1) for known in (user.labels >= 0, user.labels < 0))
    task = Task(support, user.labels[support], query)
    if blocks.in_feature_space and base_source:
        return align_features([task], novel, base_source, setting, run, 0).episode(0), novel.features
    bar = f"{setting.alignment} alignment"
    return align_episode(blocks, task, novel, base_source, setting, run, 0, bar), novel.features


def logits_of(episode: AlignedEpisode, setting: AlignmentSetting) -> tuple[Tensor, Tensor]:
    """Logits (q, n_way) of the queries by fine-tuning, and after alignment.

    The logits of a cosine head are s cos(theta), with the s in force when the scores were made, which the head is set
    to.
    """
    episode.head.rescale(setting.fit.ft_s, setting.fit.ft_m)
    before = episode.head.logits(episode.finetuned).cpu()
    if setting.alignment != "none" and setting.align_iters:
        episode.head.rescale(setting.align_s, setting.align_m)
    return before, episode.head.logits(episode.aligned).cpu()


def probabilities_of(episode: AlignedEpisode, setting: AlignmentSetting) -> tuple[Tensor, Tensor]:
    """Probabilities (q, n_way) of the queries after alignment, and by fine-tuning: softmax of the head's logits."""
    before, after = logits_of(episode, setting)
    return after.softmax(1), before.softmax(1)


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


def nearest_support(z: Tensor, k: int) -> list[int]:
    """The index of the support image of largest cosine, for each query: features (k + q, d), the support first."""
    return (unit(z[k:]) @ unit(z[:k]).T).argmax(1).tolist()
