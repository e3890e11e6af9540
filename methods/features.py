"""Images to features: a whole split by a frozen backbone, or a few images by the trainable blocks of alignment."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from data.benchmarks import Split
from data.transforms import network_input
from engine.budget import check_memory
from engine.distributed import gather_rows
from engine.errors import UserError
from engine.precision import Precision
from engine.run import Run, move
from models.backbone import Backbone, split_backbone
from models.heads import NORM_EPS

# Images per forward pass: no more than a training batch, so that this does not set the peak of memory.
BATCH = 64
# Images whose inputs are prepared together: a folder of them may be larger than memory.
INPUT_ROWS = 512
# Elements of features above which they may be kept in half precision and mapped from disk: 256 MB of them.
MAPPED = 2**26
# Part of the name of whatever a cache keeps of embedded images: raise it when the numbers of embed, network_input or a
# backbone change, so that changed code does not read old numbers.
EMBED_VERSION = 1


@torch.no_grad()
def outputs(network: Callable[[Tensor], Tensor], batches: Iterable[Tensor], precision: Precision) -> Iterator[Tensor]:
    """Outputs of a network for each batch, in float32, without gradients; the caller sets train or eval mode."""
    for x in batches:
        with precision.autocast():
            z = network(x).float()
        yield z


@torch.no_grad()
def embed(backbone: Backbone, images: Tensor, run: Run, bar: str = "", maps: bool = False) -> Tensor:
    """Features of uint8 images (N, 3, s, s) by the backbone in eval mode: (N, d) float32 on the run's device.

    `bar` names a progress bar; empty shows none. With `maps` the result is the feature maps, (N, c, h, w). The batches
    are shared out over the ranks, which all get all features.
    """
    shape = backbone.map_shape if maps else (backbone.feature_dim,)
    d = math.prod(shape)
    less = "give a smaller --img_size or another --backbone"
    check_memory(f"keeping {d} features of each of {len(images)} images", 4 * d * len(images), less, run.device)
    backbone.eval()
    shares = run.ranks.share(range(0, len(images), BATCH))
    starts = run.bar(shares, bar, "batch")
    batches = (network_input(images[start : start + BATCH], run.device, backbone.normalisation) for start in starts)
    network = backbone.feature_map if maps else backbone
    # Filled batch by batch: a list to be concatenated would be a second copy in memory.
    n_mine, form = sum(min(BATCH, len(images) - start) for start in shares), torch.contiguous_format
    mine = torch.empty(n_mine, *shape, device=run.device, memory_format=torch.channels_last if maps else form)
    for first, z in zip(range(0, n_mine, BATCH), outputs(network, batches, run.precision), strict=True):
        mine[first : first + BATCH] = z
    return gather_rows([mine] if n_mine else [], run.ranks, run.device)


@dataclass(frozen=True)
class TrainableBlocks:
    """A backbone in two parts: `below`, frozen (None if all blocks are trainable), and `updated`, trainable.

    initial: the state of `updated` at the start of every episode. In feature space `updated` is nn.Identity.
    """

    below: nn.Sequential | None
    updated: nn.Module
    initial: dict[str, Tensor]

    @property
    def in_feature_space(self) -> bool:
        """Whether the whole backbone is frozen."""
        return isinstance(self.updated, nn.Identity)

    def restore(self) -> None:
        """Reset the trainable blocks to their initial state."""
        self.updated.load_state_dict(self.initial)


def check_blocks(backbone: Backbone, asked: int | None, flag: str) -> None:
    """Raise UserError when a flag asks for more blocks than a backbone has."""
    n_blocks = len(backbone.blocks())
    if asked is not None and asked > n_blocks:
        raise UserError(f"{flag} {asked}, but the backbone has {n_blocks} blocks: give fewer")


def trainable_blocks(backbone: Backbone, align_blocks: int | None) -> TrainableBlocks:
    """Freeze all but the last align_blocks blocks (None: all, 0: none). Raises UserError when there are fewer."""
    check_blocks(backbone, align_blocks, "--align_blocks")
    if align_blocks == 0:
        return TrainableBlocks(None, nn.Identity(), {})
    below: nn.Sequential | None = None
    updated: nn.Module = backbone
    if align_blocks not in (None, len(backbone.blocks())):
        below, updated = split_backbone(backbone, align_blocks)
        learning = {id(p) for p in updated.parameters()}
        for p in backbone.parameters():  # those below, and of what a library's model has behind its blocks
            p.requires_grad_(p.requires_grad and id(p) in learning)
    return TrainableBlocks(below, updated, {name: value.clone() for name, value in updated.state_dict().items()})


@dataclass(frozen=True)
class Source:
    """A split that episodes take images from: features (N, d) before alignment, and inputs of the trainable blocks.

    block_inputs: index (n,) of images -> what the trainable blocks take, channels-last, on the run's device.
    """

    features: Tensor
    block_inputs: Callable[[Tensor], Tensor]
    split: Split

    @cached_property
    def norms(self) -> Tensor:
        """Norms (N,) of the features, by which `unit` divides them, computed once."""
        blocks = self.features.split(INPUT_ROWS)
        return torch.cat([torch.linalg.vector_norm(z.float(), dim=-1).clamp_min_(NORM_EPS) for z in blocks])


def image_source(backbone: Backbone, blocks: TrainableBlocks, split: Split, run: Run, bar: str = "") -> Source:
    """The source of a split without a cache: inputs of the trainable blocks are computed when they are asked for."""

    def block_inputs(index: Tensor) -> Tensor:
        parts = (split.images[part] for part in index.cpu().split(BATCH))
        batches = (network_input(part, run.device, backbone.normalisation) for part in parts)
        if blocks.below is None:
            return torch.cat(list(batches))
        blocks.below.eval()
        entering = torch.cat(list(outputs(blocks.below, batches, run.precision)))
        return entering.contiguous(memory_format=torch.channels_last)

    features = embed(backbone, split.images, run, bar)
    return feature_source(features, split) if blocks.in_feature_space else Source(features, block_inputs, split)


def feature_source(features: Tensor, split: Split) -> Source:
    """The source of a split in feature space, where the inputs of nn.Identity are the features (N, d) themselves."""
    return Source(features, lambda index: features[move(index, features.device)], split)


@torch.no_grad()
def updated_features(blocks: TrainableBlocks, source: Source, index: Tensor, precision: Precision) -> Tensor:
    """Features (n, d) of the images at `index` (n,) by the current blocks in eval mode."""
    blocks.updated.eval()
    batches = (x for part in index.split(INPUT_ROWS) for x in source.block_inputs(part).split(BATCH))
    return torch.cat(list(outputs(blocks.updated, batches, precision)))
