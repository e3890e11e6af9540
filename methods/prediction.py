"""Label query images from a few support images a class: one episode of stage 3, on images without a benchmark.

The head is fitted on the support features; with a base set, the backbone is then aligned with the related base images
(see methods/alignment.py). What is asked here is not an accuracy but the probability of each class for each query.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.benchmarks import Split
from engine.precision import Precision
from engine.run import on_device
from methods.alignment import (
    AlignedEpisode,
    AlignmentSetting,
    align_episode,
    blocks_to_update,
    computed_input,
    network_input,
    stored_input,
)
from methods.evaluation import cached_activations, cached_features, embed
from models import Backbone
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


def run_episode(
    backbone: Backbone,
    images: Tensor,
    y_support: Tensor,
    base: Split | None,
    setting: AlignmentSetting,
    align_blocks: int | None,
    cache_dir: Path,
    seed: int,
    device: torch.device,
    precision: Precision,
    quiet: bool,
) -> tuple[AlignedEpisode, Tensor]:
    """The episode of images (k + q, 3, s, s), uint8, the support first, and their features (k + q, d).

    y_support (k,) holds every class from 0 to n_way - 1, in any number. Without `base`, setting.alignment is `none`.
    """
    z = embed(backbone, images, device, precision, bar="" if quiet else "embed")
    z_base, y_base = z.new_empty(0, z.shape[1]), torch.empty(0, dtype=torch.long)
    members: list[Tensor] = []
    novel_input = base_input = partial(network_input, images, device=device)
    below, updated = blocks_to_update(backbone, align_blocks)
    if base is not None:
        cached: dict[str, Any] = {"cache_dir": cache_dir, "device": device, "precision": precision, "quiet": quiet}
        z_base, y_base = cached_features(backbone, base, **cached), base.labels
        members = [torch.nonzero(y_base == b).squeeze(1) for b in range(len(base.class_names))]
        if below is None:
            base_input = partial(network_input, on_device(base.images, device), device=device)
        else:
            novel_input = partial(computed_input, below, images, device=device, precision=precision)
            activations = cached_activations(below, base, **cached)
            base_input = partial(stored_input, on_device(activations, device), device=device)
    episode = align_episode(
        updated,
        {name: value.clone() for name, value in updated.state_dict().items()},
        setting,
        torch.arange(len(y_support)),
        y_support,
        torch.arange(len(y_support), len(images)),
        z,
        novel_input,
        z_base,
        y_base,
        members,
        base_input,
        seed,
        0,
        device,
        precision,
        bar="" if quiet else f"{setting.alignment} alignment",
    )
    return episode, z


def probabilities_of(episode: AlignedEpisode, setting: AlignmentSetting) -> tuple[Tensor, Tensor]:
    """Probabilities (q, n_way) of the queries after alignment, and by fine-tuning: softmax of the head's logits.

    The logits of a cosine head are s cos(theta), with the s in force when the scores were made: the head ends with
    that of alignment, and is set back to that of fine-tuning for the others.
    """
    aligned = episode.head.logits(episode.aligned).softmax(1)
    episode.head.rescale(setting.ft_s, setting.ft_m)
    return aligned.cpu(), episode.head.logits(episode.finetuned).softmax(1).cpu()


def alignment_notes(
    episode: AlignedEpisode, setting: AlignmentSetting, class_names: list[str], n_base_class: int
) -> list[str]:
    """What a user should know of the related base images that alignment had."""
    notes = []
    per_class = n_base_class // len(class_names)
    if setting.n_B > per_class:
        notes.append(
            f"{len(class_names)} classes x n_B {setting.n_B} exceed the {n_base_class} base classes: "
            f"{per_class} related base classes a class"
        )
    empty = [name for name, samples in zip(class_names, episode.related.samples, strict=True) if not len(samples)]
    if empty:
        notes.append(f"no base image is predicted as {', '.join(map(repr, empty))}: aligned with nothing")
    if 0 < episode.n_drawn < setting.aug_size:
        notes.append(
            f"the smallest related set holds fewer than --aug_size {setting.aug_size} images: "
            f"{episode.n_drawn} were drawn of each class"
        )
    return notes


def nearest_support(z: Tensor, k: int) -> list[int]:
    """The index of the support image of largest cosine, for each query: features (k + q, d), the support first."""
    return (unit(z[k:]) @ unit(z[:k]).T).argmax(1).tolist()
