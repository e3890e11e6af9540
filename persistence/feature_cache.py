"""Features of whole splits, and the inputs of the trainable blocks, kept between runs in a folder.

A file's name holds a hash of all that its numbers follow from: weights and statistics, images, normalisation,
precision, kind of device, and the version of the code that computes them.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.benchmarks import Split
from data.image_cache import VERSIONS
from data.transforms import network_input
from engine.budget import check_disk
from engine.distributed import rank_0_first
from engine.files import atomic_file, weights_digest
from engine.normalisation import Normalisation
from engine.run import Run, move, move_if_fits
from methods.features import BATCH, EMBED_VERSION, Source, TrainableBlocks, feature_source, outputs
from models.backbone import Backbone

OTHER_FOLDER = "give another --cache_dir"
# What a file holds for each type of mapped rows: NumPy has no bf16, of which it keeps the bits.
FILE_TYPES = {torch.float32: torch.float32, torch.float16: torch.float16, torch.bfloat16: torch.int16}


class FeatureCache:
    """Features and activations of whole splits, computed once and kept in `folder`."""

    def __init__(self, folder: Path, run: Run):
        self.folder = folder
        self.run = run
        self.dtype = torch.bfloat16 if run.precision.name == "bf16" else torch.float32

    def source(self, backbone: Backbone, blocks: TrainableBlocks, split: Split) -> Source:
        """The source of a split: its features, and what the trainable blocks take, kept if frozen blocks are below."""
        run, features, by = self.run, self.features(backbone, split), backbone.normalisation
        if blocks.in_feature_space:
            return feature_source(features, split)
        if blocks.below is None:
            images = move_if_fits(split.images, run.device)
            return Source(features, lambda i: network_input(images[move(i, images.device)], run.device, by), split)
        with rank_0_first(run.ranks):
            kept = self.kept(f"activations_nhwc{len(blocks.below)}", blocks.below, split, by, self.dtype)
            activations = move_if_fits(kept, run.device)

        def block_inputs(index: Tensor) -> Tensor:
            return move(activations.index_select(0, move(index, activations.device)), run.device).permute(0, 3, 1, 2)

        return Source(features, block_inputs, split)

    def features(self, backbone: Backbone, split: Split) -> Tensor:
        """Features of a whole split (N, d), on the run's device: in bf16 where computed in it, else float32."""
        with rank_0_first(self.run.ranks):
            z = self.kept(f"features{backbone.feature_dim}", backbone, split, backbone.normalisation, self.dtype)
        return z.to(self.run.device)

    def half_features(self, backbone: Backbone, split: Split) -> Tensor:
        """Features of a whole split (N, d) in half precision, mapped from their file: they may exceed the memory."""
        return self.kept(f"half{backbone.feature_dim}", backbone, split, backbone.normalisation, torch.float16)

    @torch.no_grad()
    def kept(self, kind: str, network: nn.Module, split: Split, by: Normalisation, dtype: torch.dtype) -> Tensor:
        """Outputs of a network in eval mode on a whole split, mapped from a file that is written batch by batch.

        Maps are kept channels-last, (N, h, w, c).
        """
        n, run = len(split.images), self.run
        made_by = (split.rule, by, run.precision.name, run.device.type, EMBED_VERSION, *VERSIONS)
        digest = weights_digest(network, split.fingerprint, tuple(split.images.shape), *made_by)
        path = self.folder / f"{kind}_{split.benchmark}_{split.split}_{digest}.npy"
        with contextlib.suppress(Exception):  # not there, or damaged, of which numpy raises nearly any
            return map_rows(path, n, dtype)
        network.eval()
        largest = torch.finfo(dtype).max
        starts = run.bar(range(0, n, BATCH), f"embed {split.split}", "batch")
        batches = (network_input(split.images[start : start + BATCH], run.device, by) for start in starts)
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            for i, z in enumerate(outputs(network, batches, run.precision)):
                z = z.permute(0, 2, 3, 1) if z.dim() == 4 else z
                array = z.clamp(-largest, largest).to(dtype).cpu().contiguous().view(FILE_TYPES[dtype]).numpy()
                if i == 0:
                    check_disk(f"keeping the features of {path.name}", n * array[0].nbytes, self.folder, OTHER_FOLDER)
                    header = {"descr": array.dtype.str, "fortran_order": False, "shape": (n, *array.shape[1:])}
                    np.lib.format.write_array_header_2_0(file, header)
                array.tofile(file)
        return map_rows(path, n, dtype)


def map_rows(path: Path, n: int, dtype: torch.dtype) -> Tensor:
    """The array of n rows in a file of numpy, mapped, copy-on-write. Raises ValueError when it is another.

    Its size is checked, but its numbers are not read: there may be more of them than memory.
    """
    array = np.lib.format.open_memmap(path, mode="c")
    rows = torch.from_numpy(array)
    if rows.dtype != FILE_TYPES[dtype] or len(rows) != n or array.offset + array.nbytes != path.stat().st_size:
        raise ValueError("it is cut or of another shape")
    return rows.view(dtype)
