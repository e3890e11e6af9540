"""What the stages take of memory, estimated from flags, splits and the network before they begin.

The steps are run on the meta device, whose tensors have shapes and no numbers: what lives of them at the peak, forward
and backward, is counted at no cost. What is there already, such as the imports, and files mapped into memory are left
out. On a GPU Conv4, which pools later there, takes more than is counted.
"""

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.benchmarks import Split
from data.episodes import Episodes, EpisodeShape, check_episodes_fit
from engine.budget import check_memory, has_room
from engine.run import Run
from methods.alignment import AlignmentSetting
from methods.episodic_training import CHUNK_NUMBERS, episode_numbers
from methods.evaluation import heads_together
from methods.feature_alignment import n_together, numbers_together
from methods.features import BATCH, FeatureCache, TrainableBlocks
from methods.meta_learner import MetaLearner
from methods.split_evaluation import image_shape, is_kept
from models import Model
from models.backbone import Backbone

HALF, FLOAT, LONG = 2, 4, 8  # bytes
MANY = 10**9  # episodes: as many as there may be
SPARE = 40 * 10**6  # what PyTorch itself takes when it first computes
HOLES = 1.5  # what a heap grows to, by what lives in it: freed memory lies in pieces


class Live(TorchDispatchMode):
    """A block that counts the bytes of the tensors that are made in it and live: now, and most, at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, given: Any = (), named: dict[str, Any] | None = None
    ) -> Any:
        self.known.update(storages((given, named)))  # those from outside are no part of it
        result = function(*given, **(named or {}))
        for storage in storages(result):
            if storage not in self.known:
                self.known.add(storage)
                self.count(storage.nbytes())
                weakref.finalize(storage, self.count, -storage.nbytes())
        return result

    def count(self, n_bytes: int) -> None:
        """So many bytes more, or less, live."""
        self.now += n_bytes
        self.most = max(self.most, self.now)


def storages(values: object) -> Iterator[torch.UntypedStorage]:
    """The memory of all tensors in nested containers."""
    return (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))


def without_numbers(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device, in train mode; the module's own numbers are not copied on the way."""
    memo: dict[int, object] = {}
    # The last blocks of a backbone bring a method of it along, and so the whole of it.
    owners = [getattr(getattr(m, "pool_and_flatten", None), "__self__", m) for m in module.modules()]
    for owner in {id(o): o for o in (module, *owners)}.values():
        for p in owner.parameters():
            memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        memo |= {id(b): torch.empty_like(b, device="meta") for b in owner.buffers()}
    return copy.deepcopy(module, memo).train()


def peak(work: Callable[[], object]) -> int:
    """Bytes that work on the meta device takes at its peak: nothing, where only numbers would tell."""
    try:
        with Live() as live:
            work()
    except Exception:  # a network of the user's own may do anything with numbers
        return 0
    return int(HOLES * live.most)


def of_step(module: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor], shape: Sequence[int], run: Run) -> int:
    """Bytes of a training step of a module on an input of this shape, while the gradients of the step before live."""
    dtype = torch.float32 if run.precision.name == "fp32" else torch.bfloat16  # as large as fp16
    net = without_numbers(module).to(dtype)

    def steps() -> None:
        x = torch.empty(shape, device="meta", dtype=dtype)
        for _ in range(2):
            total = forward(net, x).sum()
            net.zero_grad()
            total.backward()

    return peak(steps)


@torch.no_grad()
def of_pass(network: nn.Module, *shapes: Sequence[int]) -> int:
    """Bytes of what a network makes, in eval mode and without gradients, of inputs of these shapes."""
    net = without_numbers(network).eval()
    return peak(lambda: net(*[torch.empty(shape, device="meta") for shape in shapes]))


@torch.no_grad()
def outcome(network: nn.Module, img_size: int) -> tuple[int, ...]:
    """The shape of what a network makes of an image; of an image itself where only numbers would tell."""
    try:
        return tuple(without_numbers(network).eval()(torch.empty(1, 3, img_size, img_size, device="meta")).shape[1:])
    except Exception:  # see peak
        return 3, img_size, img_size


def moments(*modules: nn.Module, optimizers: int = 1) -> int:
    """Bytes that learning adds to parameters, beside their gradient: the two moments of each Adam."""
    return sum(2 * optimizers * p.nbytes for module in modules for p in module.parameters() if p.requires_grad)


def of_batch(network: nn.Module, split: Split) -> int:
    """Bytes of a batch of images of a split that is embedded."""
    return of_pass(network, (min(BATCH, len(split.labels)), *split.images.shape[1:]))


def check(what: str, n_bytes: int, flags: str, run: Run) -> None:
    """Raise UserError, naming the flags that would help, when work takes more memory than is free on its device."""
    check_memory(what, SPARE + n_bytes, f"give {flags}", run.device)


def n_images(shape: EpisodeShape) -> int:
    """The images of an episode."""
    return shape.n_way * (shape.n_shot + shape.n_query)


def check_base_training(
    model: Model, net: nn.Module, splits: Sequence[Split], batch_size: int, shape: EpisodeShape, run: Run
) -> None:
    """Raise UserError when stage 1 takes more memory than is free.

    net: what the steps train of the backbone (see last_blocks); splits: base, val and novel; batch_size: 0 without
    training; shape: of a test episode.
    """
    (base, *tests), d, side = splits, model.backbone.feature_dim, splits[0].images.shape[-1]
    batch, frozen = min(batch_size, len(base.labels)), isinstance(net, nn.Identity)
    # Each rank has a GPU of its own; on a CPU they share the memory.
    mine = math.ceil(batch / run.ranks.n) if run.device.type == "cuda" else batch
    numbers, n_largest = n_images(shape) * d, max(len(split.labels) for split in tests)
    features = FLOAT * d * (n_largest + frozen * len(base.labels))
    shown = (mine, d) if frozen else (mine, 3, side, side)
    step = of_step(nn.Sequential(net, model.head), lambda both, x: both(x), shown, run) if batch else 0
    heads = FLOAT * (heads_together(MANY, numbers, run) * numbers + n_largest * d)
    n_bytes = features + moments(model.backbone, model.head) + max(step, heads, of_batch(model.backbone, base))
    check(
        f"training in batches of {batch} images" if batch else "testing",
        n_bytes,
        "a smaller --batch_size or --img_size",
        run,
    )


def check_episodic_training(
    model: Model, splits: Sequence[Split], train_shape: EpisodeShape | None, episodes: Episodes, run: Run
) -> None:
    """Raise UserError when stage 2 takes more memory than is free, or the base split is too small for its episodes.

    splits: base, val and novel; train_shape: None without training; episodes: those of the test.
    """
    (base, *tests), backbone, learner = splits, model.backbone, cast(MetaLearner, model.head)
    side, what, step = base.images.shape[-1], "testing", 0
    if train_shape:
        check_episodes_fit(base, train_shape)
        n = n_images(train_shape)
        forward = partial(episode_scores, shape=train_shape)
        step = of_step(nn.ModuleList([backbone, learner]), forward, (n, 3, side, side), run)
        step, what = step + moments(backbone, learner), f"training on episodes of {n} images"
    image = image_shape(backbone, learner)
    of_image, n_query = math.prod(image), episodes.query[0].numel()
    together = min(len(episodes), max(1, CHUNK_NUMBERS // episode_numbers(learner, episodes, of_image)))
    scores = of_pass(learner, (together, episodes.n_way, episodes.n_shot, *image), (together, n_query, *image))
    n_bytes = max(step, scores, of_batch(backbone, base)) + max(
        FLOAT * of_image * len(split.labels)
        if is_kept(backbone, learner, len(split.labels))
        else FLOAT * of_image * (len(episodes) * episodes.n_way + 2 * max(len(images) for images in split.members))
        for split in tests
    )
    check(what, n_bytes, "a smaller --train_n_query, --n_query or --img_size", run)


def episode_scores(modules: nn.Module, x: Tensor, shape: EpisodeShape) -> Tensor:
    """The forward pass of a training episode, by a backbone and a meta-learner."""
    backbone, learner = cast(tuple[Backbone, MetaLearner], tuple(modules.children()))
    z = (backbone.feature_map if learner.uses_maps else backbone)(x).unflatten(0, (shape.n_way, -1))
    scores: Tensor = learner(z[:, : shape.n_shot], z[:, shape.n_shot :].flatten(0, 1))
    return scores


def check_alignment(
    blocks: TrainableBlocks,
    backbone: Backbone,
    splits: Sequence[Split],
    episodes: Episodes,
    settings: Sequence[AlignmentSetting],
    cache: FeatureCache,
) -> None:
    """Raise UserError when stage 3 takes more memory than is free.

    splits: base and novel, and val where a setting is chosen; settings: all those that are tried.
    """
    d, base, run = backbone.feature_dim, splits[0], cache.run
    shape = EpisodeShape(episodes.n_way, episodes.n_shot, episodes.query.shape[2])
    kept = FLOAT * d * sum(len(split.labels) for split in splits)
    work = [0] if all(cache.holds(backbone, blocks, split) for split in splits) else [of_batch(backbone, base)]
    for setting in settings:
        if blocks.in_feature_space:
            n = n_together(d, shape.n_way, setting)
            work.append(features_aligned(d, base, shape, setting, n if len(settings) > 1 else min(n, len(episodes))))
        else:
            work.append(blocks_aligned(blocks, backbone, base, shape, setting, run))
    check("alignment", kept + on_gpu(blocks, splits, run) + max(work), alignment_flags(blocks, settings), run)


def critic_bytes(d: int, n_shown: int, setting: AlignmentSetting) -> int:
    """Bytes of a critic that n_shown features go through: its parameters and their moments, and activations."""
    return FLOAT * setting.critic.critic_hidden * (4 * d + 3 * n_shown) * (setting.alignment == "adversarial")


def features_aligned(d: int, base: Split | None, shape: EpisodeShape, setting: AlignmentSetting, n: int) -> int:
    """Bytes of n episodes that are aligned together in feature space."""
    n_way, aug_size = shape.n_way, setting.related.aug_size
    heads = 2 * FLOAT * n_images(shape) * d + 2 * (len(base.labels) if base else 0)  # predictions are int16
    if setting.alignment == "none":
        return n * heads
    draws = 2 * LONG * n_way * aug_size * setting.align_iters
    related = FLOAT * numbers_together(d, n_way, setting) + critic_bytes(d, n_way * (aug_size + shape.n_shot), setting)
    return n * (heads + draws + related)


def blocks_aligned(
    blocks: TrainableBlocks, backbone: Backbone, base: Split, shape: EpisodeShape, setting: AlignmentSetting, run: Run
) -> int:
    """Bytes of an episode whose alignment moves blocks."""
    n_related = min(setting.related.n_B, len(base.members) // shape.n_way) * max(map(len, base.members))
    n = shape.n_way * (min(setting.related.aug_size, n_related) + shape.n_shot)
    step = of_step(blocks.updated, lambda net, x: net(x), (n, *entering(blocks, base)), run)
    return step + moments(blocks.updated, optimizers=2) + critic_bytes(backbone.feature_dim, n, setting)


def entering(blocks: TrainableBlocks, split: Split) -> tuple[int, ...]:
    """The shape of what enters the updated blocks of an image."""
    side = split.images.shape[-1]
    return (3, side, side) if blocks.below is None else outcome(blocks.below, side)


def on_gpu(blocks: TrainableBlocks, splits: Sequence[Split], run: Run) -> int:
    """Bytes of what enters the updated blocks of whole splits, where that is moved to a GPU (see move_if_fits)."""
    moved = 0
    if run.device.type == "cuda" and not blocks.in_feature_space:
        for split in splits:
            of_image = math.prod(entering(blocks, split)) * (1 if blocks.below is None else FLOAT)
            n_bytes = of_image * len(split.labels)
            moved += n_bytes if has_room(n_bytes, run.device, moved) else 0
    return moved


def alignment_flags(blocks: TrainableBlocks, settings: Sequence[AlignmentSetting]) -> str:
    """The flags that make alignment take less memory."""
    flags = ["a smaller --aug_size"]
    flags += [] if blocks.in_feature_space else ["fewer --align_blocks"]
    return ", ".join(flags + ["a smaller --critic_hidden"] * any(s.alignment == "adversarial" for s in settings))
