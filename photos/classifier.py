"""A classifier of a user's classes: a backbone, a head fitted on a few examples, and both after alignment.

Fitted once, it labels any number of images, batch by batch; it needs neither the examples nor a base set again.
"""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data.decode import Reading
from data.episodes import Task
from engine.files import weights_digest
from engine.run import Run
from methods.alignment import AlignmentSetting, align_episode
from methods.feature_alignment import align_features, episodes_per_chunk
from methods.features import Source, TrainableBlocks, embed
from methods.novel_finetune import HeadFit
from methods.related_base import RelatedBase
from models.backbone import Backbone
from models.heads import Head
from photos.confidence import MAX_BAGS, Confidence, bags, cross_validate, fitted_heads, least_cosine, nearest
from photos.images import View

# Examples of every class from which on a head is fitted at another scale than the published one: docs/photos.md.
MANY, MANY_SCALE = 5, 10.0


@dataclass(frozen=True)
class Classifier:
    """What labels images as one of n_way classes.

    backbone: before alignment, and aligned: after, the same one when it is frozen. finetuned and head: the heads before
    and after. z_support (k, d): features of the examples before alignment, y_support (k,) their labels and examples
    their names. confidence: None when it is not known. least_cosine: below it, an image is unlike every class.
    """

    backbone: Backbone
    aligned: Backbone
    finetuned: Head
    head: Head
    class_names: list[str]
    z_support: Tensor
    y_support: Tensor
    examples: list[str]
    confidence: Confidence | None
    least_cosine: float

    @property
    def n_support(self) -> list[int]:
        """Examples per class."""
        return torch.bincount(self.y_support, minlength=len(self.class_names)).tolist()

    @property
    def temperature(self) -> float:
        """What the logits are divided by: 1 when nothing is known of the confidence."""
        return self.confidence.temperature if self.confidence else 1.0

    def to(self, device: torch.device) -> "Classifier":
        """Move the networks to a device; the features of the examples stay on the CPU."""
        for network in (self.backbone, self.aligned):
            network.to(device).to(memory_format=torch.channels_last)
        for head in (self.finetuned, self.head):
            head.to(device)
        return self

    @property
    def digest(self) -> str:
        """A hash of all that the labels follow from."""
        parts = nn.ModuleList([self.aligned, self.finetuned, self.head])
        scales = [[getattr(head, name) for name in head.scalars] for head in (self.finetuned, self.head)]
        return weights_digest(
            parts,
            self.aligned.normalisation,
            self.aligned.eval_resize,
            self.class_names,
            self.temperature,
            self.least_cosine,
            scales,
        )


@dataclass(frozen=True)
class Fitted:
    """A classifier and how it was made.

    facts: plain values for a record; `backbone` and `img_size` say how to build the backbone. related: for each class
    the base classes that it was aligned with, best first. notes: what a user should know.
    """

    classifier: Classifier
    facts: dict[str, Any]
    related: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def view(self) -> View:
        """How the images that it takes are read and resized."""
        reading = Reading(self.facts.get("background"), self.facts.get("white"))  # which older files lack
        return View(self.facts["img_size"], self.classifier.backbone.eval_resize, reading)


class Answers(NamedTuple):
    """What a classifier says of q images: probabilities (q, n_way), and finetuned (q, n_way), those before alignment,
    both by its temperature; cosine (q,): the largest to an example, and nearest (q,), the index of that example."""

    probabilities: Tensor
    finetuned: Tensor
    cosine: Tensor
    nearest: Tensor


def mean_head(heads: Head, d: int, n_way: int, fit: HeadFit) -> Head:
    """One head whose scores are the mean of those of E heads together, or of one."""
    single = fit.new_head(d, n_way, None).to(heads.weight.device)
    single.become_mean(heads)
    return single.requires_grad_(False)


def with_scale(setting: AlignmentSetting, y: Tensor) -> AlignmentSetting:
    """The setting with a scale of the fit, if none is given: MANY_SCALE where each class of labels y (k,) has MANY
    examples, for which the published scale leaves the head too soft, most of all among many classes."""
    if setting.fit.ft_s or torch.bincount(y).min() < MANY:
        return setting
    return replace(setting, fit=replace(setting.fit, ft_s=MANY_SCALE))


def fit_classifier(
    backbone: Backbone,
    blocks: TrainableBlocks,
    novel: Source,
    base: Source | None,
    setting: AlignmentSetting,
    run: Run,
    kept: Path | None = None,
) -> tuple[Classifier, RelatedBase | None]:
    """The classifier of a support, all of a source, and the related base that it was aligned with, if it was.
    Alignment of blocks changes the backbone.

    Without a base set, setting.alignment is `none`. The confidence is not known where blocks are aligned: its folds
    would take as many alignments. kept: a folder where what is left out was measured before.
    """
    frozen = blocks.in_feature_space or base is None
    before = backbone if frozen else copy.deepcopy(backbone)
    user, y = novel.split, novel.split.labels
    (_, d), n_way = novel.features.shape, len(user.class_names)
    everything = torch.arange(len(y))
    task = Task(everything, y, everything)
    parts = bags(task, min(MAX_BAGS, episodes_per_chunk(d, n_way, setting, run.device)))
    confidence = cross_validate(novel, y, base, setting, run, kept) if frozen else None
    fitted, related = fitted_heads(parts, novel, setting, run), None
    heads = fitted
    if base and frozen:
        episode = align_features(parts, novel, base, setting, run, 0)[0]
        heads, related = episode.head, episode.related
    elif base:
        episode = align_episode(blocks, task, novel, base, setting, run, 0, f"{setting.alignment} alignment")
        heads, related = episode.head, episode.related
    z_support = novel.features.cpu()
    classifier = Classifier(
        backbone=before,
        aligned=backbone,
        finetuned=mean_head(fitted, d, n_way, setting.fit),
        head=mean_head(heads, d, n_way, setting.fit),
        class_names=user.class_names,
        z_support=z_support,
        y_support=y,
        examples=user.image_names,
        confidence=confidence,
        least_cosine=least_cosine(z_support),
    )
    return classifier, related


@torch.no_grad()
def classify(classifier: Classifier, images: Tensor, run: Run) -> Answers:
    """The answers to uint8 images (q, 3, s, s), on the CPU; no image sees another."""
    z = embed(classifier.backbone, images, run)
    z_aligned = z if classifier.aligned is classifier.backbone else embed(classifier.aligned, images, run)
    head, finetuned = classifier.head, classifier.finetuned
    logits = (head.logits(head(z_aligned)), finetuned.logits(finetuned(z)))
    after, before = ((each / classifier.temperature).softmax(1).cpu() for each in logits)
    return Answers(after, before, *nearest(z.cpu(), classifier.z_support))
