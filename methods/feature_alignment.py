"""Alignment in feature space: Algorithms 1 and 2 with a frozen backbone, E episodes together.

The features are computed once, and update (1) has no backbone to train: an iteration is update (2), the head on related
samples, and (3), the head on the support. The heads of E episodes are one weight (E, n_way, d), and their gradients are
written out. Each episode draws its own number of related samples, padded with samples of weight 0, so that it does not
depend on the others.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from data.episodes import Episodes, Task, class_major_labels
from engine.budget import cache_bytes
from engine.precision import check_finite
from engine.run import Run, move, on_own_threads
from methods.alignment import AlignedEpisode, AlignmentSetting, Batch, with_rate
from methods.block_alignment import align_blocks
from methods.features import Source, TrainableBlocks
from methods.novel_finetune import adam_step, class_weights, fit_heads, uneven
from methods.related_base import RelatedBase, draw_by_setting, drawn_per_class, related_base_of_heads
from models.head_gradients import set_gradients
from models.heads import Head, one_hot_of

# Episodes aligned together: on a CPU, over its threads, as many as hold CACHES times its second-level caches of related
# samples, so that calls cost little beside their work, and no more than a stopped run may lose; on a GPU, elements
# of related samples and their copies: 256 MB of them.
CACHES = 8
MOST_TOGETHER = 40
CHUNK_ELEMENTS = 2**26


def episodes_per_chunk(d: int, n_way: int, setting: AlignmentSetting, device: torch.device) -> int:
    """How many episodes of features of size d to align together; see CACHES."""
    elements_per_episode = n_way * setting.related.aug_size * d
    if device.type == "cpu":
        return max(1, min(MOST_TOGETHER, CACHES * cache_bytes() // (4 * elements_per_episode)))
    return max(1, CHUNK_ELEMENTS // (4 * elements_per_episode))


def padded_related_batches(
    related_base: list[RelatedBase],
    head: Head,
    base: Source,
    setting: AlignmentSetting,
    generators: list[Generator],
    device: torch.device,
) -> Iterator[Batch]:
    """The related samples of E episodes in each iteration, n_way * aug_size per episode with padding, on `device`.

    A batch overwrites the one before it.
    """
    each, aug_size, n_iters = zip(related_base, generators, strict=True), setting.related.aug_size, setting.align_iters
    picks = torch.stack([draw_by_setting(found.samples, setting.related, n_iters, g) for found, g in each], 1)
    n_way, picks = picks.shape[2], picks.flatten(2)
    drawn = (picks[0] >= 0).float()
    weight = move(drawn / drawn.sum(1, keepdim=True).clamp_min(1.0), device)
    y = class_major_labels(n_way, aug_size, device).expand_as(weight)
    rows = base.features.new_empty(picks[0].numel(), base.features.shape[1])  # an allocation per iteration is slow
    for index in move(picks.clamp_min_(0), base.features.device):
        torch.index_select(base.features, 0, index.flatten(), out=rows)
        z = move(rows, device).view(*index.shape, -1)  # a base set may have no room on a GPU
        z = z if z.dtype == torch.bfloat16 else z.float()
        norm = move(base.norms[index], device)
        yield Batch(z, y, weight, norm) if head.directions else Batch(head.project(z), y, weight)


def padded(parts: list[Tensor], device: torch.device) -> Tensor:
    """Pad the indices, labels or weights (n_i,) of E episodes with 0 to (E, n)."""
    return pad_sequence(parts, batch_first=True).to(device)


def padded_support(tasks: list[Task], z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The supports of E episodes padded to n: features (E, n, d), of z (N, d), labels (E, n), and weights (E, n) by
    which the classes of an episode count alike."""
    index = padded([task.support for task in tasks], z.device)
    y = padded([task.y_support for task in tasks], z.device)
    return z[index], y, padded([class_weights(task.y_support) for task in tasks], z.device)


class HeadUpdates:
    """Updates (2) and (3) of an iteration, of E episodes together, each with an optimiser of its own.

    fitted: the optimiser that fitted the heads. An update of learning rate 0 is left out. idle (E,): the episodes
    without related samples, whose heads (2) does not train.
    """

    def __init__(self, head: Head, fitted: torch.optim.Optimizer, setting: AlignmentSetting, idle: Tensor):
        self.head, self.setting = head, setting
        self.related_optimizer = with_rate(fitted, setting.related_lr)
        self.support_optimizer = torch.optim.Adam(head.parameters(), lr=setting.support_lr, fused=True)
        # An idle head has no gradient in (2); without the momentum of the fit, Adam leaves it unchanged.
        for moments in fitted.state.values():
            moments["exp_avg"][idle] = 0.0

    def train_head(self, related: Batch) -> None:
        """(2): one step of the heads on related samples."""
        if self.setting.related_lr:
            self.step(related, self.related_optimizer)

    def train_on_support(self, support: Batch) -> None:
        """(3): one step of the heads on the support."""
        if self.setting.support_lr:
            self.step(support, self.support_optimizer)

    @torch.no_grad()
    def step(self, samples: Batch, optimizer: torch.optim.Optimizer) -> None:
        """One step of the heads by the written-out gradient of their loss."""
        one_hot = one_hot_of(samples.y, self.head.weight.shape[-2])
        set_gradients(self.head, samples.x, samples.y, one_hot, samples.weight, samples.norm)
        adam_step(optimizer)


@torch.no_grad()
def align_features(
    tasks: list[Task], novel: Source, base: Source, setting: AlignmentSetting, run: Run, first: int
) -> list[AlignedEpisode]:
    """Run episodes first, first + 1, ... of stage 3 together, with a frozen backbone; all tasks have as many ways.

    Supports, and queries, of unequal number are padded to the longest; so are the scores of the queries. Raises
    UserError when the scores are no longer finite.
    """
    fit, d, n_way, device = setting.fit, novel.features.shape[1], tasks[0].n_way, novel.features.device
    numbers = range(first, first + len(tasks))
    z_support, y_support, weight = padded_support(tasks, novel.features)
    z_query = novel.features[padded([task.query for task in tasks], device)]

    head = fit.new_head(d, n_way, [run.generator("head", i) for i in numbers]).to(device)
    fitted = fit_heads(head, z_support, y_support, fit.ft_n_epoch, fit.ft_lr, uneven(weight), fit.ft_init)
    finetuned = head(z_query)
    related_base = related_base_of_heads(head, base, setting.related)
    n_drawn = [drawn_per_class(related.samples, setting.related.aug_size) for related in related_base]
    aligned, curve = finetuned, []
    if setting.alignment != "none" and setting.align_iters:
        head.rescale(setting.align_s, setting.align_m)
        support = Batch(head.project(z_support), y_support, weight)
        updates = HeadUpdates(head, fitted, setting, idle=torch.tensor(n_drawn, device=device) == 0)
        generators = [run.generator("related draws", i) for i in numbers]
        batches = padded_related_batches(related_base, head, base, setting, generators, device)
        for iteration, related in enumerate(batches, 1):
            updates.train_head(related)
            updates.train_on_support(support)
            if setting.record_curve and iteration % setting.record_curve == 0:
                curve.append(head(z_query))
        aligned = head(z_query)
        check_finite(aligned.sum(), f"episodes {first} to {numbers[-1]}")
    each = enumerate(zip(finetuned, aligned, related_base, n_drawn, strict=True))
    return [AlignedEpisode(head, *of_one, [], [scores[e] for scores in curve]) for e, of_one in each]


def align_episodes(
    blocks: TrainableBlocks,
    episodes: Episodes,
    novel: Source,
    base: Source,
    setting: AlignmentSetting,
    run: Run,
    numbers: range,
) -> Iterator[tuple[int, AlignedEpisode]]:
    """The aligned episodes of these consecutive numbers, in feature space all together, on a CPU a part per thread."""
    if not numbers:
        return

    def align(part: range) -> Iterable[AlignedEpisode]:
        tasks = [episodes.task(i) for i in part]
        if blocks.in_feature_space:
            return align_features(tasks, novel, base, setting, run, part[0])
        return align_blocks(blocks, tasks, novel, base, setting, run, part[0])

    on_threads = blocks.in_feature_space and run.device.type == "cpu" and len(numbers) > 1
    yield from zip(numbers, on_own_threads(align, numbers, len(numbers)) if on_threads else align(numbers), strict=True)
