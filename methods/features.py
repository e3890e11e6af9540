"""Images to features: a whole split, by a backbone that stands still; a few, by the blocks that alignment moves.

What a backbone makes of a split is kept between runs, as is what enters its last blocks when those alone are updated.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.benchmarks import Split
from data.transforms import network_input
from engine.budget import check_disk, check_memory
from engine.distributed import gather_objects, gather_rows, rank_0_first
from engine.errors import UserError
from engine.files import atomic_file, load_tensors, matches_schema, save_atomically, weights_digest
from engine.normalisation import IMAGENET, Normalisation
from engine.precision import Precision
from engine.run import Run, move, move_if_fits
from models.backbone import Backbone, split_backbone

# Images that go through a network together: no more than a training batch, so that this does not set the peak of
# memory.
BATCH = 64
# Images whose inputs are made together: a folder of them may be larger than memory.
INPUT_ROWS = 512
# Numbers of features above which they may be kept in half precision and mapped from disk: 256 MB of them.
MAPPED = 2**26


@torch.no_grad()
def outputs(network: Callable[[Tensor], Tensor], batches: Iterable[Tensor], precision: Precision) -> Iterator[Tensor]:
    """What a network makes of each batch, in float32, without gradients; its mode is the caller's affair."""
    for x in batches:
        with precision.autocast():
            z = network(x).float()
        yield z


def joined(parts: Iterable[Tensor], n: int) -> Tensor:
    """The n rows of all parts (n_i, ...), as torch.cat, without a moment at which they take their memory twice."""
    rows, end = torch.empty(0), 0
    for part in parts:
        if not end:
            is_nhwc = part.is_contiguous(memory_format=torch.channels_last) and not part.is_contiguous()
            form = torch.channels_last if is_nhwc else torch.contiguous_format
            rows = torch.empty(n, *part.shape[1:], dtype=part.dtype, device=part.device, memory_format=form)
        rows[end : end + len(part)] = part
        end += len(part)
    return rows


@torch.no_grad()
def embed(backbone: Backbone, images: Tensor, run: Run, bar: str = "", maps: bool = False) -> Tensor:
    """Features of uint8 images (N, 3, s, s) by the backbone in eval mode: (N, d) float32 on the run's device.

    `bar` names a progress bar; empty shows none. With `maps` the result is the feature maps, (N, c, h, w). The batches
    are shared out over the ranks, which all get all features.
    """
    d = math.prod(backbone.map_shape) if maps else backbone.feature_dim
    less = "give a smaller --img_size or another --backbone"
    check_memory(f"keeping {d} features of each of {len(images)} images", 4 * d * len(images), less, run.device)
    backbone.eval()
    shares = run.ranks.share(range(0, len(images), BATCH))
    starts = run.bar(shares, bar, "batch")
    batches = (network_input(images[start : start + BATCH], run.device, backbone.normalisation) for start in starts)
    network = backbone.feature_map if maps else backbone
    n_mine = sum(min(BATCH, len(images) - start) for start in shares)
    mine = joined(outputs(network, batches, run.precision), n_mine)
    return gather_rows([mine] if n_mine else [], run.ranks, run.device)


@dataclass(frozen=True)
class TrainableBlocks:
    """A backbone in two: `below`, which stands still (None if nothing does), and `updated`, which alignment moves.

    initial: the state that `updated` starts every episode from. In feature space the whole backbone stands still,
    and `updated`, the identity, takes features.
    """

    below: nn.Sequential | None
    updated: nn.Module
    initial: dict[str, Tensor]

    @property
    def in_feature_space(self) -> bool:
        """Whether nothing of the backbone moves."""
        return isinstance(self.updated, nn.Identity)

    def restore(self) -> None:
        """Give the updated blocks their initial state."""
        self.updated.load_state_dict(self.initial)


def check_blocks(backbone: Backbone, asked: int | None, flag: str) -> None:
    """Raise UserError when a flag asks for more blocks than a backbone has."""
    n_blocks = len(backbone.blocks())
    if asked is not None and asked > n_blocks:
        raise UserError(f"{flag} {asked}, but the backbone has {n_blocks} blocks: give fewer")


def trainable_blocks(backbone: Backbone, align_blocks: int | None) -> TrainableBlocks:
    """The last align_blocks blocks of a backbone, or all, as what alignment updates; 0 are none, in feature space.

    Raises UserError when the backbone has fewer.
    """
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
    """A split that episodes take images from: features (N, d) by the backbone before alignment, and a way in again.

    block_inputs: images at an index (n,) -> what the updated blocks take of them, channels-last, on the run's device.
    """

    features: Tensor
    block_inputs: Callable[[Tensor], Tensor]
    split: Split


def image_source(backbone: Backbone, blocks: TrainableBlocks, split: Split, run: Run, bar: str = "") -> Source:
    """The source of a split of which nothing is kept on disk; what the blocks take is made when it is asked for."""

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
    """The source of a split in feature space: what is updated takes the features (N, d) themselves."""
    return Source(features, lambda index: features[move(index, features.device)], split)


@torch.no_grad()
def updated_features(blocks: TrainableBlocks, source: Source, index: Tensor, precision: Precision) -> Tensor:
    """Features (n, d) of the images at `index` (n,) by the blocks as they are now, in eval mode: no image sees
    another."""
    blocks.updated.eval()
    batches = (x for part in index.split(INPUT_ROWS) for x in source.block_inputs(part).split(BATCH))
    return torch.cat(list(outputs(blocks.updated, batches, precision)))


def map_rows(path: Path, n: int, dtype: torch.dtype) -> Tensor:
    """The array of n rows in a file of numpy, mapped, copy-on-write. Raises ValueError when it is another.

    Its size is looked at, but not its numbers: there may be more of them than memory.
    """
    array = np.lib.format.open_memmap(path, mode="c")
    rows = torch.from_numpy(array)
    if rows.dtype != dtype or len(rows) != n or array.offset + array.nbytes != path.stat().st_size:
        raise ValueError("it is cut or of another shape")
    return rows


class FeatureCache:
    """Features and activations of whole splits, kept in `folder` between runs under a hash of all they follow from."""

    def __init__(self, folder: Path, run: Run):
        self.folder = folder
        self.run = run

    def source(self, backbone: Backbone, blocks: TrainableBlocks, split: Split) -> Source:
        """The source of a split, its features, and what enters the updated blocks if others are below, kept here."""
        run, features, by = self.run, self.features(backbone, split), backbone.normalisation
        if blocks.in_feature_space:
            return feature_source(features, split)
        if blocks.below is None:
            images = move_if_fits(split.images, run.device)
            return Source(features, lambda i: network_input(images[move(i, images.device)], run.device, by), split)
        with rank_0_first(run.ranks):
            activations = move_if_fits(self.activations(blocks.below, split, by), run.device)

        def block_inputs(index: Tensor) -> Tensor:
            x = move(activations[move(index, activations.device)], run.device)
            return x.contiguous(memory_format=torch.channels_last)

        return Source(features, block_inputs, split)

    def features(self, backbone: Backbone, split: Split) -> Tensor:
        """Features of a whole split (N, d)."""
        features: Tensor | None = None
        path = self.features_path(backbone, split)
        if path.is_file():
            with contextlib.suppress(OSError, ValueError):  # damaged: embed anew
                kept, shape = load_tensors(path, self.run.device), (len(split.images), backbone.feature_dim)
                features = (
                    kept
                    if matches_schema(kept, Tensor) and kept.shape == shape and kept.dtype == torch.float32
                    else None
                )
        found = all(gather_objects(features is not None, self.run.ranks))
        if found and features is not None:
            return features
        self.check_room(split.split, 4 * len(split.images) * backbone.feature_dim)
        features = embed(backbone, split.images, self.run, f"embed {split.split}")
        if self.run.ranks.first:
            save_atomically(path, features.cpu())
        return features

    def check_room(self, what: str, n_bytes: int) -> None:
        """Raise UserError when what is to be kept does not fit on the disk."""
        check_disk(f"keeping the features of {what}", n_bytes, self.folder, "give another --cache_dir")

    def half_features(self, backbone: Backbone, split: Split) -> Tensor:
        """Features of a whole split (N, d) in half precision, mapped from their file: there may be more than memory."""
        by = backbone.normalisation
        path = self.path(f"half{backbone.feature_dim}", backbone, split, by).with_suffix(".npy")
        batches = self.batches(split, by, f"embed {split.split}")
        return self.mapped(path, backbone, batches, len(split.images), torch.float16)

    def activations(self, below: nn.Sequential, split: Split, by: Normalisation = IMAGENET) -> Tensor:
        """What the blocks `below`, in eval mode, make of a whole split: (N, c, h, w) float32, mapped from its file."""
        path = self.activations_path(below, split, by)
        batches = self.batches(split, by, f"activations {split.split}")
        return self.mapped(path, below, batches, len(split.images), torch.float32)

    def batches(self, split: Split, by: Normalisation, bar: str) -> Iterator[Tensor]:
        """The images of a split as a network takes them, under a bar."""
        for start in self.run.bar(range(0, len(split.images), BATCH), bar, "batch"):
            yield network_input(split.images[start : start + BATCH], self.run.device, by)

    @torch.no_grad()
    def mapped(self, path: Path, network: nn.Module, batches: Iterator[Tensor], n: int, dtype: torch.dtype) -> Tensor:
        """What a network, in eval mode, makes of batches of n images, mapped from its file, which is written batch by
        batch, for it may be larger than memory."""
        with contextlib.suppress(Exception):  # not there or damaged, of which numpy raises nearly any: compute it
            return map_rows(path, n, dtype)
        network.eval()
        largest = torch.finfo(dtype).max
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            for i, a in enumerate(outputs(network, batches, self.run.precision)):
                array = a.clamp(-largest, largest).to(dtype).cpu().contiguous().numpy()
                if i == 0:
                    shape = (n, *array.shape[1:])
                    self.check_room(path.name, n * array[0].nbytes)
                    header = {"descr": array.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_2_0(file, header)
                array.tofile(file)
        return map_rows(path, n, dtype)

    def features_path(self, backbone: Backbone, split: Split) -> Path:
        """Where the features of a split are kept."""
        kind = f"features{backbone.feature_dim}"
        return self.path(kind, backbone, split, backbone.normalisation).with_suffix(".pt")

    def activations_path(self, below: nn.Sequential, split: Split, by: Normalisation) -> Path:
        """Where what the blocks `below` make of a split is kept."""
        return self.path(f"activations{len(below)}", below, split, by).with_suffix(".npy")

    def path(self, kind: str, module: nn.Module, split: Split, by: Normalisation) -> Path:
        """Where what this module made of this split is kept, its suffix left open: another weight, another name."""
        run, shape = self.run, tuple(split.images.shape)
        unusual = [by] if by != IMAGENET else []
        digest = weights_digest(module, split.fingerprint, shape, run.precision.name, run.device.type, *unusual)
        return self.folder / f"{kind}_{split.benchmark}_{split.split}_{digest}"
