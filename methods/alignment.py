"""Stage 3: align one novel episode with its related base samples (Algorithms 1 and 2 of the paper).

Per episode: fit the head on frozen support features; find the related base samples with it; then alternate the three
updates of `Updates`. The backbone starts each episode from the checkpoint's weights, kept in memory. The alignment
loss is centroid (Algorithm 1) or adversarial (Algorithm 2); `naive` is the ablation without one, and `none` stops at
the fitted head. Beyond the paper, the updates may be of the backbone's last blocks alone, what enters them being
computed once for all episodes, or of none of it: in `head`, the head alone learns (see feature_alignment.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Generator, Tensor, nn

from data.episodes import Task
from engine.precision import Losses, Precision
from engine.run import Run, move
from methods.adversarial_alignment import AdversarialAlignment, CriticSetting
from methods.centroid_alignment import centroid_alignment_loss
from methods.features import INPUT_ROWS, Source, TrainableBlocks, updated_features
from methods.novel_finetune import HeadFit, fit_heads
from methods.related_base import RelatedBase, RelatedSetting, draw_related, drawn_per_class, related_base_of_head
from models.heads import Head

# (z_support (k, d), y_support (k,), z_related (n, d), y_related (n,)) -> scalar.
AlignmentLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AlignmentSetting:
    """The numbers of one episode of stage 3; each is explained at the flag of the same name."""

    alignment: str = "centroid"
    fit: HeadFit = HeadFit(ft_m=0.001)
    related: RelatedSetting = field(default_factory=RelatedSetting)
    critic: CriticSetting = field(default_factory=CriticSetting)
    align_s: float = 15.0
    align_m: float = 0.001
    align_iters: int = 150
    align_lr: float = 1e-3
    related_lr: float = 1e-3
    support_lr: float = 1e-3
    align_bn: str = "train"
    record_curve: int = 0


def adversarial(
    d: int, n_way: int, setting: AlignmentSetting, generator: Generator, device: torch.device
) -> AlignmentLoss:
    """The adversarial loss of an episode, whose critic is new."""
    return AdversarialAlignment(d, n_way, setting.critic, generator, device)


# By name, what makes the alignment loss of an episode: a loss that has nothing of its own is the same for all.
ALIGNMENTS: dict[str, Callable[..., AlignmentLoss | None]] = {
    "none": lambda *_: None,
    "naive": lambda *_: None,
    "head": lambda *_: None,
    "centroid": lambda d, n_way, *_: partial(centroid_alignment_loss, n_way=n_way),
    "adversarial": adversarial,
}


@dataclass(frozen=True)
class Labelled:
    """What the updated blocks take, x (n, ...), and labels y (n,)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class AlignedEpisode:
    """What one episode gave: the head as it ended, and the scores (q, n_way) of its queries, by fine-tuning and after
    alignment.

    n_drawn: related samples a novel class in an iteration; losses: those of the three updates, a row an iteration;
    curve: scores as `aligned`, after every record_curve iterations. Without alignment the first two are the same.
    """

    head: Head
    finetuned: Tensor
    aligned: Tensor
    related: RelatedBase
    n_drawn: int
    losses: list[tuple[float, ...]]
    curve: list[Tensor]


class Updates:
    """The three updates of an iteration of Algorithms 1 and 2, each with an optimiser of its own.

    fitted: the optimiser that fitted the head. The alignment loss is None in the ablation without update (1).
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        fitted: torch.optim.Optimizer,
        alignment_loss: AlignmentLoss | None,
        setting: AlignmentSetting,
        precision: Precision,
    ):
        self.backbone = backbone
        self.head = head
        self.alignment_loss = alignment_loss
        self.batch_statistics = setting.align_bn == "train"
        self.precision = precision
        # (1) the backbone; (2) the head, by the optimiser that fitted it, moments included; (3) both.
        self.align_optimizer = torch.optim.Adam(backbone.parameters(), lr=setting.align_lr, fused=True)
        self.related_optimizer = with_rate(fitted, setting.related_lr)
        both = [*backbone.parameters(), *head.parameters()]
        self.support_optimizer = torch.optim.Adam(both, lr=setting.support_lr, fused=True)

    def align(self, support: Labelled, related: Labelled) -> Tensor:
        """(1): one step of the backbone on the alignment loss; NaN without one.

        Related and support images go through it apart, so that in train mode each has its own batch statistics.
        """
        if self.alignment_loss is None:
            return torch.full((), math.nan, device=support.y.device)
        self.backbone.train(self.batch_statistics)
        with self.precision.autocast():
            z_related, z_support = self.backbone(related.x), self.backbone(support.x)
        loss = self.alignment_loss(z_support, support.y, z_related, related.y)
        return self.precision.backward_and_step(loss, self.align_optimizer)

    def train_head(self, related: Labelled) -> Tensor:
        """(2): one step of the head on related samples; the backbone, in eval mode, needs no gradient."""
        self.backbone.eval()
        with torch.no_grad(), self.precision.autocast():
            z_related = self.backbone(related.x)
        return self.precision.backward_and_step(self.head.loss(self.head(z_related), related.y), self.related_optimizer)

    def train_on_support(self, support: Labelled) -> Tensor:
        """(3): one step of backbone and head on the support."""
        self.backbone.train(self.batch_statistics)
        with self.precision.autocast():
            z_support = self.backbone(support.x)
        return self.precision.backward_and_step(self.head.loss(self.head(z_support), support.y), self.support_optimizer)


def with_rate(optimizer: torch.optim.Optimizer, lr: float) -> torch.optim.Optimizer:
    """The optimiser, going on with another learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer


def align_episode(
    blocks: TrainableBlocks,
    task: Task,
    novel: Source,
    base: Source | None,
    setting: AlignmentSetting,
    run: Run,
    i: int,
    bar: str = "",
) -> AlignedEpisode:
    """Run episode i of stage 3; the result depends on (seed, i), the weights and the images alone.

    The blocks start from their initial state, and are left as alignment has moved them. A novel class without related
    samples takes no part in updates (1) and (2); they are left out when no class has any, as without a base set. `bar`
    names a progress bar over the iterations; empty shows none.
    """
    fit, d, n_way = setting.fit, novel.features.shape[1], task.n_way
    blocks.restore()
    y_support = task.y_support.to(run.device)
    head = fit.new_head(d, n_way, run.generator("head", i)).to(run.device)
    fitted = fit_heads(head, novel.features[task.support.to(run.device)], y_support, fit.ft_n_epoch, fit.ft_lr)
    with torch.no_grad():
        finetuned = head(novel.features[task.query.to(run.device)])
    related = related_base_of_head(head, base, setting.related)
    n_drawn = drawn_per_class(related.samples, setting.related.aug_size)
    if setting.alignment == "none" or not setting.align_iters:
        return AlignedEpisode(head, finetuned, finetuned, related, n_drawn, [], [])

    def score_queries() -> Tensor:
        parts = task.query.split(INPUT_ROWS)
        with torch.no_grad():
            return torch.cat([head(updated_features(blocks, novel, part, run.precision)) for part in parts])

    head.rescale(setting.align_s, setting.align_m)
    alignment_loss = ALIGNMENTS[setting.alignment](d, n_way, setting, run.generator("critic", i), run.device)
    # With a scaler of its own: that of fp16 remembers, and an episode depends on none before it.
    precision = Precision(run.precision.name, run.precision.device_type)
    updates = Updates(blocks.updated, head, fitted, alignment_loss, setting, precision)
    support = Labelled(novel.block_inputs(task.support), y_support)
    generator = run.generator("related draws", i)
    losses, curve = Losses(f"episode {i}, iteration"), []
    no_loss = torch.full((), math.nan, device=run.device)
    with run.seeded("dropout", i):
        for iteration in run.bar(range(setting.align_iters), bar, "iteration"):
            align_loss = related_loss = no_loss
            if base is not None and n_drawn:
                picks, y_related = draw_related(related.samples, setting.related.aug_size, generator)
                drawn = Labelled(base.block_inputs(picks), move(y_related, run.device))
                align_loss = updates.align(support, drawn)
                related_loss = updates.train_head(drawn)
            support_loss = updates.train_on_support(support)
            checked = support_loss + related_loss if n_drawn else support_loss
            losses.add(checked, align_loss, related_loss, support_loss)
            if setting.record_curve and (iteration + 1) % setting.record_curve == 0:
                curve.append(score_queries())
    rows = [row[1:] for row in losses.read()]
    return AlignedEpisode(head, finetuned, score_queries(), related, n_drawn, rows, curve)
