"""A classifier of a user's classes: a backbone, a head fitted on a few examples, and what alignment made of both.

Fitted once, it labels any number of images, batch by batch; it needs neither the examples nor a base set again.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from data.benchmarks import Split
from data.episodes import Task
from engine.files import weights_digest
from engine.run import Run
from methods.alignment import AlignedEpisode, AlignmentSetting, align_episode
from methods.feature_alignment import align_features
from methods.features import Source, TrainableBlocks, embed, image_source
from methods.novel_finetune import HeadFit, fit_heads
from models.backbone import Backbone
from models.heads import Head
from photos.confidence import Confidence, cross_validate, least_cosine, nearest


@dataclass(frozen=True)
class Classifier:
    """What labels images as one of n_way classes.

    backbone: as it was before alignment, and aligned: after, the same one where no block was moved. finetuned and head:
    the heads before and after.
    z_support (k, d): features of the examples, before alignment, y_support (k,) their labels and examples their names.
    confidence: None when it is not known. least_cosine: below it, an image is unlike every class.
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
    def temperature(self) -> float:
        """What the logits are divided by: 1 when nothing is known of the confidence."""
        return self.confidence.temperature if self.confidence else 1.0

    def to(self, device: torch.device) -> "Classifier":
        """Move what computes to a device; the features of the examples stay on the CPU."""
        for module in (self.backbone, self.aligned, self.finetuned, self.head):
            module.to(device)
        self.backbone.to(memory_format=torch.channels_last)
        self.aligned.to(memory_format=torch.channels_last)
        return self

    @property
    def digest(self) -> str:
        """A hash of all that the labels follow from."""
        parts = torch.nn.ModuleList([self.aligned, self.finetuned, self.head])
        scales = [[getattr(head, name) for name in head.scalars] for head in (self.finetuned, self.head)]
        return weights_digest(
            parts, self.aligned.normalisation, self.class_names, self.temperature, self.least_cosine, scales
        )


@dataclass(frozen=True)
class Answers:
    """What a classifier says of q images: probabilities (q, n_way), and finetuned (q, n_way), those before alignment,
    both by its temperature; cosine (q,): the largest to an example, and nearest (q,), the index of that example."""

    probabilities: Tensor
    finetuned: Tensor
    cosine: Tensor
    nearest: Tensor


def fitted_head(z: Tensor, y: Tensor, fit: HeadFit, run: Run) -> Head:
    """The head of fine-tuning: fitted on support features z (k, d) and labels y (k,), as in every episode 0."""
    head = fit.new_head(z.shape[1], int(y.max()) + 1, run.generator("head", 0)).to(run.device)
    fit_heads(head, z, y.to(run.device), fit.ft_n_epoch, fit.ft_lr)
    return head


def aligned_episode(
    blocks: TrainableBlocks, novel: Source, y: Tensor, base: Source | None, setting: AlignmentSetting, run: Run
) -> AlignedEpisode:
    """The episode whose support is all of `novel`, of labels y (k,); without a base set, setting.alignment is none."""
    everything = torch.arange(len(y))
    task = Task(everything, y, everything)
    if blocks.in_feature_space and base:
        return align_features([task], novel, base, setting, run, 0).episode(0)
    return align_episode(blocks, task, novel, base, setting, run, 0, f"{setting.alignment} alignment")


def alone(head: Head, d: int, setting: AlignmentSetting, run: Run) -> Head:
    """The head of an episode that was aligned by itself, in feature space among others: weight (n_way, d)."""
    single = setting.fit.new_head(d, head.weight.shape[-2], None).to(run.device)
    state = {
        name: value[0] if value.dim() > single.state_dict()[name].dim() else value
        for name, value in head.state_dict().items()
    }
    single.load_state_dict(state)
    for name in head.scalars:
        setattr(single, name, getattr(head, name))
    return single.requires_grad_(False)


def fit_classifier(
    backbone: Backbone, blocks: TrainableBlocks, user: Split, base: Source | None, setting: AlignmentSetting, run: Run
) -> tuple[Classifier, AlignedEpisode]:
    """The classifier of a support, given as a split, and the episode that made it. The backbone moves in alignment.

    Without a base set, setting.alignment is `none`. Where blocks are moved, the folds of a confidence would take as
    many alignments: it is then left open.
    """
    in_feature_space = blocks.in_feature_space or base is None
    before = backbone if in_feature_space else copy.deepcopy(backbone)
    novel = image_source(backbone, blocks, user, run, "embed")
    episode = aligned_episode(blocks, novel, user.labels, base, setting, run)
    confidence = cross_validate(novel, user.labels, base, setting, run) if in_feature_space else None
    z = novel.features
    classifier = Classifier(
        backbone=before,
        aligned=backbone,
        finetuned=fitted_head(z, user.labels, setting.fit, run).requires_grad_(False),
        head=alone(episode.head, z.shape[1], setting, run),
        class_names=user.class_names,
        z_support=z.cpu(),
        y_support=user.labels,
        examples=user.image_names,
        confidence=confidence,
        least_cosine=least_cosine(z.cpu()),
    )
    return classifier, episode


@torch.no_grad()
def classify(classifier: Classifier, images: Tensor, run: Run) -> Answers:
    """The answers to uint8 images (q, 3, s, s), on the CPU; no image sees another."""
    z = embed(classifier.backbone, images, run)
    z_aligned = z if classifier.aligned is classifier.backbone else embed(classifier.aligned, images, run)
    head, finetuned = classifier.head, classifier.finetuned
    logits = (head.logits(head(z_aligned)), finetuned.logits(finetuned(z)))
    after, before = ((each / classifier.temperature).softmax(1).cpu() for each in logits)
    return Answers(after, before, *nearest(z.cpu(), classifier.z_support))
