"""Alignment of the last block of Conv4 on a CPU, several episodes together: Algorithm 1, and the ablation `naive`.

What enters the block is frozen. Episodes that draw equally many related samples are updated together, with weights of
their own, and each group on one thread: the operations are too small to be shared out. The updates are those of
`Updates`, with the gradient of the block written out (see StackedBlock).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from data.episodes import Task
from engine.precision import check_finite
from engine.run import Run, on_own_threads
from methods.alignment import (
    ALIGNMENTS,
    AlignedEpisode,
    AlignmentSetting,
    Batch,
    FittedHead,
    align_episode,
    fit_and_detect,
    with_rate,
)
from methods.features import Source, TrainableBlocks
from methods.related_base import draw_by_setting
from models.backbone import LastBlocks
from models.conv4 import ConvBlock
from models.head_gradients import set_gradients
from models.heads import Head, one_hot_of
from models.stacked_block import BlockPass, StackedBlock

STACKED = ("naive", "centroid")
N_TOGETHER = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# An episode, and the state of its block after alignment.
Aligned = tuple[AlignedEpisode, dict[str, Tensor]]


def last_conv_block(blocks: TrainableBlocks, setting: AlignmentSetting, run: Run) -> ConvBlock | None:
    """The trainable block, if it is the last one of Conv4 and nothing is asked for that is not written out here."""
    updated, written_out = blocks.updated, setting.alignment in STACKED and setting.align_iters
    if not isinstance(updated, LastBlocks) or len(updated.blocks) > 1 or not updated.only_flattens:
        return None
    if not written_out or run.precision.name not in DTYPES or run.device.type != "cpu":
        return None
    block = updated.blocks[0]
    if not isinstance(block, ConvBlock) or not isinstance(block.pool, nn.MaxPool2d):
        return None
    return block if isinstance(block.bn, nn.BatchNorm2d) else None


def stacked_heads(starts: Sequence[FittedHead], setting: AlignmentSetting) -> tuple[Head, torch.optim.Adam]:
    """One head, weight (E, n_way, d), of the fitted heads of E episodes, and its optimiser with their moments."""
    n_way, d = starts[0].head.weight.shape
    head = setting.fit.new_head(d, n_way, [torch.Generator() for _ in starts])
    states = [start.head.state_dict() for start in starts]
    head.load_state_dict({name: torch.stack([state[name] for state in states]) for name in states[0]})
    head.rescale(setting.align_s, setting.align_m)
    optimizer = torch.optim.Adam(head.parameters(), fused=True)
    for name, parameter in head.named_parameters():
        of_each = [start.optimizer.state[start.head.get_parameter(name)] for start in starts]
        moments = {key: torch.stack([state[key] for state in of_each]) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = moments | {"step": of_each[0]["step"].clone()}
    return head, optimizer


class StackedUpdates:
    """The three updates of Algorithm 1 on E episodes together; where asked, they return the losses (E,) of before.

    fitted: the optimiser that fitted the heads. An alignment without a loss has no update (1).
    """

    def __init__(self, block: StackedBlock, head: Head, fitted: torch.optim.Optimizer, setting: AlignmentSetting):
        self.block, self.head = block, head
        self.alignment_loss = ALIGNMENTS[setting.alignment](0, head.weight.shape[-2], setting)
        self.batch_statistics = setting.align_bn == "train"
        both = [*block.parameters(), *head.parameters()]
        self.align_optimizer = torch.optim.Adam(block.parameters(), lr=setting.align_lr, fused=True)
        self.related_optimizer = with_rate(fitted, setting.related_lr)
        self.support_optimizer = torch.optim.Adam(both, lr=setting.support_lr, fused=True)

    def align(self, support: Batch, related: Batch, report: bool) -> Tensor | None:
        """(1): one step of the blocks on the alignment loss, if there is one."""
        if self.alignment_loss is None:
            return None
        self.block.train(self.batch_statistics)
        passes = [self.block(related.x), self.block(support.x)]
        z_related, z_support = (done.z.requires_grad_() for done in passes)
        values = (z_support, support.y, z_related, related.y)
        self.alignment_loss(*values).backward()
        self.step_block(passes, self.align_optimizer)
        return each(self.alignment_loss, *values) if report else None

    @torch.no_grad()
    def train_head(self, related: Batch, report: bool) -> Tensor | None:
        """(2): one step of the heads on related samples; the blocks are frozen, in eval mode."""
        projected = self.head.project(self.block.eval()(related.x).z)
        losses = each(self.head.loss, self.head.scores(projected), related.y) if report else None
        set_gradients(self.head, projected, related.y, one_hot_of(related.y, self.head.weight.shape[-2]))
        self.related_optimizer.step()
        return losses

    def train_on_support(self, support: Batch, report: bool) -> Tensor | None:
        """(3): one step of blocks and heads on the support."""
        done = self.block.train(self.batch_statistics)(support.x)
        self.head.zero_grad()
        scores = self.head(done.z.requires_grad_())
        self.head.loss(scores, support.y).backward()
        self.step_block([done], self.support_optimizer)
        return each(self.head.loss, scores, support.y) if report else None

    def step_block(self, passes: list[BlockPass], optimizer: torch.optim.Optimizer) -> None:
        """One step, for which the gradient of the blocks follows from the gradient of the features in these passes."""
        self.block.zero_grad()
        for done in passes:
            self.block.add_gradient(done, cast(Tensor, done.z.grad))
        optimizer.step()


@torch.no_grad()
def each(loss: Callable[..., Tensor], *stacked: Tensor) -> Tensor:
    """The loss of each of E episodes (E,), given what it takes of all of them."""
    return torch.stack([loss(*of_one) for of_one in zip(*stacked, strict=True)])


def align_stacked(
    block: ConvBlock,
    parts: list[tuple[Task, FittedHead, Tensor]],
    y_related: Tensor,
    novel: Source,
    base: Source | None,
    setting: AlignmentSetting,
    run: Run,
) -> list[Aligned]:
    """Align E episodes together, given the task, start and draws of each: indices (align_iters, n) of base images.

    y_related (n,): the classes that these are drawn for, the same in all episodes.
    """
    (tasks, starts, drawn), n = zip(*parts, strict=True), len(parts)
    head, fitted = stacked_heads(starts, setting)
    stacked = StackedBlock(block, n, DTYPES[run.precision.name])
    updates = StackedUpdates(stacked, head, fitted, setting)

    def inputs(source: Source, index: Sequence[Tensor]) -> Tensor:
        return source.block_inputs(torch.cat(list(index))).unflatten(0, (n, -1))

    @torch.no_grad()
    def query_scores() -> Tensor:
        return cast(Tensor, head(stacked.eval()(x_query).z))

    support = Batch(inputs(novel, [task.support for task in tasks]), torch.stack([task.y_support for task in tasks]))
    x_query = inputs(novel, [task.query for task in tasks])
    y_related = y_related.expand(n, -1)
    curve: list[Tensor] = []
    losses: list[Tensor | None] = []
    for iteration in range(1, setting.align_iters + 1):
        losses, last = [None, None], iteration == setting.align_iters
        if base is not None and y_related.numel():
            related = Batch(inputs(base, [picks[iteration - 1] for picks in drawn]), y_related)
            losses = [updates.align(support, related, last), updates.train_head(related, last)]
        losses.append(updates.train_on_support(support, last))
        if setting.record_curve and iteration % setting.record_curve == 0:
            curve.append(query_scores())
    aligned, left_out = query_scores(), torch.full((n,), torch.nan)
    rows = torch.stack([left_out if of_update is None else of_update for of_update in losses], 1).tolist()
    done = []
    for e, start in enumerate(starts):
        scores = (start.finetuned, aligned[e])
        counts = (start.related, start.n_drawn)
        episode = AlignedEpisode(head, *scores, *counts, [tuple(rows[e])], [of_all[e] for of_all in curve])
        done.append((episode, stacked.state(e)))
    return done


def align_together(
    block: ConvBlock,
    tasks: list[Task],
    novel: Source,
    base: Source | None,
    setting: AlignmentSetting,
    run: Run,
    first: int,
) -> list[Aligned]:
    """Align episodes first, first + 1, ..., those of them together that draw equally many related samples."""
    groups: dict[tuple[int, ...], dict[int, tuple[Task, FittedHead, Tensor]]] = {}
    for k, task in enumerate(tasks):
        start = fit_and_detect(task, novel, base, setting, run, first + k)
        samples, generator = start.related.samples, run.generator("related draws", first + k)
        picks = draw_by_setting(samples, setting.related, setting.align_iters, generator)
        n_drawn = tuple((picks[0] >= 0).sum(1).tolist())
        groups.setdefault(n_drawn, {})[k] = (task, start, picks[picks >= 0].view(setting.align_iters, -1))
    done: dict[int, Aligned] = {}
    for n_drawn, parts in groups.items():
        y_related = torch.arange(len(n_drawn)).repeat_interleave(torch.tensor(n_drawn))
        aligned = align_stacked(block, list(parts.values()), y_related, novel, base, setting, run)
        done |= zip(parts, aligned, strict=True)
    return [done[k] for k in range(len(tasks))]


def align_blocks(
    blocks: TrainableBlocks,
    tasks: list[Task],
    novel: Source,
    base: Source | None,
    setting: AlignmentSetting,
    run: Run,
    first: int,
) -> Iterator[AlignedEpisode]:
    """Episodes first, first + 1, ... with trainable blocks, which are left, with each, as alignment has trained them.

    All have as many support images of every class. Several together where last_conv_block allows it, else one after
    another. Raises UserError when a loss or a score is no longer finite.
    """
    blocks.restore()
    block = last_conv_block(blocks, setting, run)
    if block is None:
        yield from (align_episode(blocks, task, novel, base, setting, run, first + k) for k, task in enumerate(tasks))
        return
    initial, numbers = copy.deepcopy(block), range(first, first + len(tasks))

    def align(part: range) -> list[Aligned]:
        return align_together(initial, [tasks[i - first] for i in part], novel, base, setting, run, part[0])

    for i, (episode, state) in zip(numbers, on_own_threads(align, numbers, N_TOGETHER), strict=True):
        check_finite(episode.aligned.sum(), f"episode {i}")
        block.load_state_dict(state)
        yield episode
