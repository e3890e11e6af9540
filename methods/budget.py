"""What the stages take of memory, estimated from flags, splits and the network before they begin.

The steps are run on the meta device, whose tensors have shapes and no numbers: what autograd would keep of them is
counted at no cost. What is there already, such as the imports, and files mapped into memory are left out. A GPU's
own memory is not looked at.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from data.benchmarks import Split
from data.episodes import Episodes, EpisodeShape, check_episodes_fit
from engine.budget import check_memory
from engine.run import Run
from methods.alignment import AlignmentSetting
from methods.episodic_training import CHUNK_NUMBERS, episode_numbers
from methods.evaluation import HEAD_CHUNK
from methods.feature_alignment import n_together, numbers_together
from methods.features import BATCH, UpdatedBlocks
from methods.meta_learner import MetaLearner
from models import Model
from models.backbone import Backbone

FLOAT, LONG = 4, 8  # bytes
LIVE = 4  # tensors as large as the largest that live at a time when a meta-learner scores
SPARE = 150 * 10**6  # what PyTorch itself takes when it first computes


@dataclass(frozen=True)
class Step:
    """Bytes of a training step: what autograd keeps of its forward pass, and the largest tensor of that."""

    kept: int
    largest: int

    @property
    def n_bytes(self) -> int:
        """At the peak of the step, with one gradient on the way."""
        return self.kept + self.largest


def without_numbers(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device, in train mode; the module's own numbers are not copied on the way."""
    memo: dict[int, object] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    memo |= {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    return copy.deepcopy(module, memo).train()


def step_of(module: nn.Module, forward: Callable[[nn.Module, Tensor], object], *shape: int) -> Step:
    """What a training step of a module takes on an input of this shape: nothing, where only numbers would tell."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = forward(without_numbers(module), torch.empty(shape, device="meta"))
    except Exception:  # a network of the user's own may do anything with numbers
        return Step(0, 0)
    del result
    return Step(sum(kept.values()), max(kept.values(), default=0))


def of_images(network: nn.Module, n: int, *shape: int) -> Step:
    """The step of a network on n images, or of what enters it, of this shape."""
    return step_of(network, lambda net, x: net(x), n, *shape)


@torch.no_grad()
def outcome(network: nn.Module, img_size: int) -> tuple[int, ...]:
    """The shape of what a network makes of an image; of an image itself where only numbers would tell."""
    try:
        return tuple(without_numbers(network).eval()(torch.empty(1, 3, img_size, img_size, device="meta")).shape[1:])
    except Exception:  # see step_of
        return 3, img_size, img_size


def moments(*modules: nn.Module, copies: int = 3) -> int:
    """Bytes that learning adds to parameters: the gradient and Adam's two moments."""
    return sum(copies * p.nbytes for module in modules for p in module.parameters() if p.requires_grad)


def embedding(network: nn.Module, img_size: int) -> int:
    """Bytes of a batch that is embedded: three maps of the largest layer, and the images on the way."""
    return 3 * of_images(network, BATCH, 3, img_size, img_size).largest + inputs(BATCH, img_size)


def inputs(n: int, img_size: int) -> int:
    """Bytes of n images on their way into a network."""
    return 2 * FLOAT * n * 3 * img_size**2


def check(what: str, n_bytes: int, flags: str, run: Run) -> None:
    """Raise UserError, naming the flags that would help, when work on the CPU takes more memory than is free."""
    if run.device.type == "cpu":
        check_memory(what, SPARE + n_bytes, f"give {flags}")


def n_images(shape: EpisodeShape) -> int:
    """The images of an episode."""
    return shape.n_way * (shape.n_shot + shape.n_query)


def check_base_training(
    model: Model, splits: Sequence[Split], batch_size: int, shape: EpisodeShape, frozen: bool, run: Run
) -> None:
    """Raise UserError when stage 1 takes more memory than is free.

    splits: base, val and novel; batch_size: 0 without training; shape: of a test episode.
    """
    (base, *tests), d, side = splits, model.backbone.feature_dim, splits[0].images.shape[-1]
    batch = min(batch_size, len(base.labels))
    features = FLOAT * d * (max(len(split.labels) for split in tests) + frozen * len(base.labels))
    step = 3 * FLOAT * batch * d
    if batch and not frozen:
        step = of_images(model.backbone, batch, 3, side, side).n_bytes + inputs(batch, side)
    heads = 2 * FLOAT * HEAD_CHUNK * n_images(shape) * d
    n_bytes = features + max(step + moments(model.backbone, model.head), heads, embedding(model.backbone, side))
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
        step = step_of(nn.ModuleList([backbone, learner]), forward, n, 3, side, side).n_bytes + inputs(n, side)
        step, what = step + moments(backbone, learner), f"training on episodes of {n} images"
    of_image = math.prod(backbone.map_shape) if learner.uses_maps else backbone.feature_dim
    of_episode = episode_numbers(learner, episodes, of_image)
    together = min(max(CHUNK_NUMBERS, of_episode), len(episodes) * of_episode)
    n_bytes = max(step, LIVE * FLOAT * together, embedding(backbone, side))
    n_bytes += FLOAT * of_image * max(len(split.labels) for split in tests)
    check(what, n_bytes, "a smaller --train_n_query, --n_query or --img_size", run)


def episode_scores(modules: nn.Module, x: Tensor, shape: EpisodeShape) -> Tensor:
    """The forward pass of a training episode, by a backbone and a meta-learner."""
    backbone, learner = cast(tuple[Backbone, MetaLearner], tuple(modules.children()))
    z = (backbone.feature_map if learner.uses_maps else backbone)(x).unflatten(0, (shape.n_way, -1))
    scores: Tensor = learner(z[:, : shape.n_shot], z[:, shape.n_shot :].flatten(0, 1))
    return scores


def check_alignment(
    blocks: UpdatedBlocks,
    backbone: Backbone,
    splits: Sequence[Split],
    shape: EpisodeShape,
    setting: AlignmentSetting,
    run: Run,
) -> None:
    """Raise UserError when stage 3 takes more memory than is free. splits: base and novel; shape: of an episode."""
    d, side, aug_size = backbone.feature_dim, splits[0].images.shape[-1], setting.related.aug_size
    n_split, flags = sum(len(split.labels) for split in splits), "a smaller --aug_size"
    kept = FLOAT * d * n_split
    entering: tuple[int, ...] = (3, side, side)
    if blocks.below is not None:
        entering = outcome(blocks.below, side)
    n_shown = shape.n_way * (aug_size + shape.n_shot)  # to a critic: its parameters and moments, and activations
    critic = FLOAT * setting.critic.critic_hidden * (4 * d + 3 * n_shown) * (setting.alignment == "adversarial")
    if blocks.in_feature_space:
        n = n_together(d, shape.n_way, setting)
        step = n * (FLOAT * numbers_together(d, shape.n_way, setting) + critic)
        step += 2 * LONG * n * shape.n_way * aug_size * setting.align_iters + 2 * n * len(splits[0].labels)
    else:
        drawn = shape.n_way * min(aug_size, setting.related.n_B * max(map(len, splits[0].members)))
        n = drawn + shape.n_way * shape.n_shot
        step = of_images(blocks.updated, n, *entering).n_bytes + 2 * FLOAT * n * math.prod(entering) + critic
        step += moments(blocks.updated, copies=5)  # two Adams and a gradient
        flags += ", fewer --align_blocks"
    if critic:
        flags += ", a smaller --critic_hidden"
    check("alignment", kept + max(step, embedding(backbone, side)), flags, run)
