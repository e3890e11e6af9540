"""Stage 3: align one novel episode with its related base samples (Algorithms 1 and 2 of the paper).

Per episode: fit the head on frozen support features; find the related base samples with it; then alternate the three
updates of `Updates`. Each episode starts from the checkpoint's weights. The alignment loss is centroid (Algorithm 1) or
adversarial (Algorithm 2); `naive` is the ablation without one, and `none` stops at the fitted head. Beyond the paper,
only the backbone's last blocks may be trainable, or none: in `head`, the head alone learns (see feature_alignment.py).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor, nn

from data.episodes import Task
from engine.graphs import Step, graphed
from engine.precision import Losses, Precision
from engine.run import Run, move
from methods.adversarial_alignment import AdversarialAlignment, CriticSetting
from methods.centroid_alignment import centroid_alignment_loss
from methods.evaluation import count_predictions, share_right
from methods.features import Source, TrainableBlocks, updated_features
from methods.novel_finetune import HeadFit, class_weights, fit_heads, uneven
from methods.related_base import RelatedBase, RelatedSetting, draw_by_setting, drawn_per_class, related_base_of_head
from models.heads import Head

# (z_support (k, d), y_support (k,), z_related (n, d), y_related (n,)) -> scalar.
AlignmentLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AlignmentSetting:
    """The numbers of one episode of stage 3; each is explained at the flag of the same name."""

    alignment: str = "centroid"
    fit: HeadFit = HeadFit()
    related: RelatedSetting = RelatedSetting()
    critic: CriticSetting = CriticSetting()
    align_s: float = 15.0
    align_m: float = 0.001
    align_iters: int = 150
    align_lr: float = 1e-3
    related_lr: float = 1e-3
    support_lr: float = 1e-3
    align_bn: str = "train"
    record_curve: int = 0


# By name, a function (d, n_way, setting, generator, device) that makes the alignment loss of an episode.
ALIGNMENTS: dict[str, Callable[..., AlignmentLoss | None]] = {
    "none": lambda *_: None,
    "naive": lambda *_: None,
    "head": lambda *_: None,
    "centroid": lambda d, n_way, *_: partial(centroid_alignment_loss, n_way=n_way),
    "adversarial": lambda d, n_way, setting, *rest: AdversarialAlignment(d, n_way, setting.critic, *rest),
}


@dataclass(frozen=True)
class Batch:
    """Inputs x of what an update trains, labels y, and weights of the samples in the loss (None: all alike).

    One episode: x (n, ...) and y (n,). E episodes in feature space: x (E, n, d), y and weight (E, n); the weights of an
    episode sum to 1, or are all 0 if it has no samples, and those of padding are 0. x are then as the head projects
    them, or as they are if their norm (E, n) is there.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None = None
    norm: Tensor | None = None


@dataclass(frozen=True)
class AlignedEpisode:
    """One episode: its head after alignment, and the scores (q, n_way) of its queries by fine-tuning and alignment.

    n_drawn: related samples per novel class in an iteration; losses: of the three updates, a row per iteration, NaN for
    an update that was left out; curve: scores after every record_curve iterations. Of episodes aligned together, `head`
    is all heads, weight (E, n_way, d), and losses are of the last iteration alone, or none in feature space.
    """

    head: Head
    finetuned: Tensor
    aligned: Tensor
    related: RelatedBase
    n_drawn: int
    losses: list[tuple[float, ...]]
    curve: list[Tensor]


class Updates:
    """The three updates of Algorithms 1 and 2, each with an optimiser of its own.

    fitted: the optimiser that fitted the head. alignment_loss: None in the ablation without update (1).
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
        # With a loss scaler of its own: in fp16 it adapts to past losses, and an episode depends on none before it.
        self.precision = Precision(precision.name, precision.device_type)
        both = [*backbone.parameters(), *head.parameters()]
        # (1) the backbone; (2) the head, by the optimiser that fitted it, moments included; (3) both.
        self.align_optimizer = torch.optim.Adam(backbone.parameters(), lr=setting.align_lr, fused=True)
        self.related_optimizer = with_rate(fitted, setting.related_lr)
        self.support_optimizer = torch.optim.Adam(both, lr=setting.support_lr, fused=True)

    def align(self, support: Batch, related: Batch) -> Tensor | None:
        """(1): one step of the backbone on the alignment loss, if there is one.

        Related and support images take a forward pass each: in train mode, each has its own batch statistics.
        """
        if self.alignment_loss is None:
            return None
        self.backbone.train(self.batch_statistics)
        with self.precision.autocast():
            z_related, z_support = self.backbone(related.x), self.backbone(support.x)
        loss = self.alignment_loss(z_support, support.y, z_related, related.y)
        return self.precision.backward_and_step(loss, self.align_optimizer)

    def train_head(self, related: Batch) -> Tensor:
        """(2): one step of the head on related samples; the backbone is frozen, in eval mode."""
        self.backbone.eval()
        with torch.no_grad(), self.precision.autocast():
            z_related = self.backbone(related.x)
        return self.precision.backward_and_step(self.head.loss(self.head(z_related), related.y), self.related_optimizer)

    def train_on_support(self, support: Batch) -> Tensor:
        """(3): one step of backbone and head on the support."""
        self.backbone.train(self.batch_statistics)
        with self.precision.autocast():
            z_support = self.backbone(support.x)
        return self.precision.backward_and_step(
            self.head.loss(self.head(z_support), support.y, support.weight), self.support_optimizer
        )

    def iteration(self, support: Batch, by_graph: bool) -> Step:
        """The three updates as one step: x (n, ...) and y (n,) of related samples, or nothing -> a sum of losses to be
        checked, and the losses of the updates, NaN where one is left out. by_graph: whether it becomes a CUDA graph.
        """

        def step(*xy: Tensor) -> tuple[Tensor, ...]:
            related = Batch(*xy) if xy else None
            align_loss = self.align(support, related) if related else None
            related_loss = self.train_head(related) if related else None
            support_loss = self.train_on_support(support)
            checked = support_loss if related_loss is None else support_loss + related_loss
            left_out = torch.full_like(support_loss, math.nan)
            return checked, *(left_out if loss is None else loss for loss in (align_loss, related_loss, support_loss))

        optimizers = (self.align_optimizer, self.related_optimizer, self.support_optimizer)
        return graphed(step, optimizers) if by_graph else step


def with_rate(optimizer: torch.optim.Optimizer, lr: float) -> torch.optim.Optimizer:
    """The optimiser with its moments, set to another learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer


def related_batches(
    samples: list[Tensor], base: Source | None, setting: AlignmentSetting, generator: Generator, device: torch.device
) -> Iterator[Batch | None]:
    """The related samples of each iteration, class-major; None where no class has any, as without a base set."""
    for picks in draw_by_setting(samples, setting.related, setting.align_iters, generator):
        drawn = picks >= 0
        if base is None or not drawn.any():
            yield None
        else:
            yield Batch(base.block_inputs(picks[drawn]), move(drawn.nonzero()[:, 0], device))


@dataclass(frozen=True)
class FittedHead:
    """The start of an episode: its head and the optimiser that fitted it, the scores (q, n_way) of its queries, its
    related base samples, and how many are drawn per novel class."""

    head: Head
    optimizer: torch.optim.Adam
    finetuned: Tensor
    related: RelatedBase
    n_drawn: int


def support_weights(task: Task, run: Run) -> Tensor | None:
    """What each support image counts (k,), on the run's device: every class alike; None if all images do."""
    return uneven(class_weights(task.y_support).to(run.device))


def fit_and_detect(
    task: Task, novel: Source, base: Source | None, setting: AlignmentSetting, run: Run, i: int
) -> FittedHead:
    """Fit the head of episode i on its support, and find the related base samples with it."""
    fit = setting.fit
    head = fit.new_head(novel.features.shape[1], task.n_way, run.generator("head", i)).to(run.device)
    z_support, y_support = novel.features[task.support.to(run.device)], task.y_support.to(run.device)
    weight = support_weights(task, run)
    optimizer = fit_heads(head, z_support, y_support, fit.ft_n_epoch, fit.ft_lr, weight, fit.ft_init)
    with torch.no_grad():
        finetuned = head(novel.features[task.query.to(run.device)])
    related = related_base_of_head(head, base, setting.related)
    return FittedHead(head, optimizer, finetuned, related, drawn_per_class(related.samples, setting.related.aug_size))


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

    The blocks start from their initial state, and are left as alignment has trained them. Updates (1) and (2) are left
    out when no class has related samples. `bar` names a progress bar; empty shows none. Raises UserError when the loss
    is no longer finite.
    """
    blocks.restore()
    start = fit_and_detect(task, novel, base, setting, run, i)
    head = start.head
    if setting.alignment == "none" or not setting.align_iters:
        return AlignedEpisode(head, start.finetuned, start.finetuned, start.related, start.n_drawn, [], [])

    head.rescale(setting.align_s, setting.align_m)
    sizes = (novel.features.shape[1], task.n_way)
    alignment_loss = ALIGNMENTS[setting.alignment](*sizes, setting, run.generator("critic", i), run.device)
    updates = Updates(blocks.updated, head, start.optimizer, alignment_loss, setting, run.precision)
    y_support = task.y_support.to(run.device)
    support = Batch(novel.block_inputs(task.support), y_support, support_weights(task, run))
    batches = related_batches(start.related.samples, base, setting, run.generator("related draws", i), run.device)
    by_graph = run.graphs and setting.critic.critic_constraint != "gp"  # whose penalty draws on the CPU in each step
    step = updates.iteration(support, by_graph)
    losses, curve = Losses(f"episode {i}, iteration"), []
    with run.seeded("dropout", i):
        for iteration, related in enumerate(run.bar(batches, bar, "iteration", total=setting.align_iters), 1):
            losses.add(*(step(related.x, related.y) if related else step()))
            if setting.record_curve and iteration % setting.record_curve == 0:
                curve.append(query_scores(blocks, head, novel, task, run))
    aligned = query_scores(blocks, head, novel, task, run)
    rows = [row[1:] for row in losses.read()]
    return AlignedEpisode(head, start.finetuned, aligned, start.related, start.n_drawn, rows, curve)


@torch.no_grad()
def query_scores(blocks: TrainableBlocks, head: Head, novel: Source, task: Task, run: Run) -> Tensor:
    """Scores (q, n_way) of the queries by the current blocks and head, in eval mode."""
    return head(updated_features(blocks, novel, task.query, run.precision))


def episode_record(episode: AlignedEpisode) -> dict[str, Tensor]:
    """An episode in numbers: finetuned and aligned (n_way, n_way), queries by true and predicted class; curve (k,), the
    accuracy at iterations; losses (3,) of the last one; n_related, n_empty and n_drawn, scalars."""
    scored = (episode.finetuned, episode.aligned, *episode.curve)
    finetuned, aligned, *curve = (count_predictions(scores, scores.shape[1]).cpu() for scores in scored)
    n_related = torch.tensor([len(samples) for samples in episode.related.samples])
    return {
        "finetuned": finetuned,
        "aligned": aligned,
        "curve": torch.stack([share_right(counts).mean() for counts in (finetuned, *curve)]),
        "losses": torch.tensor(episode.losses[-1] if episode.losses else (math.nan,) * 3),
        "n_related": n_related.sum(),
        "n_empty": (n_related == 0).sum(),
        "n_drawn": torch.tensor(episode.n_drawn),
    }
