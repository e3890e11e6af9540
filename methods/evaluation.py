"""Embed a split once; run any number of episodes on its features; a mean and its 95% interval."""

import contextlib
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.benchmarks import Split
from data.episodes import Episodes, class_major_labels
from data.transforms import normalise
from engine.distributed import ALONE, Ranks, gather_objects, gather_rows
from engine.files import atomic_file, load_tensors, save_atomically
from engine.generators import make_generator
from engine.precision import Precision
from methods.confusion import count_predictions
from methods.novel_finetune import fit_heads
from models import Backbone, build_head

# Heads fitted together: more of them spend less time between operations, fewer stay in a nearer cache.
HEAD_CHUNK = 32


@dataclass(frozen=True)
class EpisodeScores:
    """How the queries of E episodes were predicted: counts (E, n_way, n_way), rows true and columns predicted.

    correct (E, n_way): the share of each class's queries that were right; accuracy (E,): of all, in 0..1.
    """

    counts: Tensor

    @property
    def correct(self) -> Tensor:
        return share_right(self.counts)

    @property
    def accuracy(self) -> Tensor:
        return self.correct.mean(1)


def mean_and_ci95(values: Tensor) -> tuple[float, float]:
    """Mean and 1.96 std / sqrt(n) of n values; the interval of a single value is NaN."""
    values = values.double()
    if len(values) < 2:
        return values.mean().item(), math.nan
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values))


@torch.no_grad()
def embed(
    backbone: Backbone,
    images: Tensor,
    device: torch.device,
    precision: Precision,
    batch_size: int = 64,
    bar: str = "",
    maps: bool = False,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Features of uint8 images (N, 3, s, s) by the backbone in eval mode: (N, d) float32 on `device`.

    batch_size images go together: no more than a training batch, so that embedding does not set the peak of memory.
    `bar` names a progress bar; empty shows none. With `maps` the result is the feature maps, (N, c, h, w). The batches
    are shared out over the ranks, which all get all features.
    """
    backbone.eval()
    network = backbone.feature_map if maps else backbone
    features = []
    starts = range(0, len(images), batch_size)
    for start in tqdm(ranks.share(starts), desc=bar, disable=not bar, unit="batch"):
        x = normalise(images[start : start + batch_size].to(device))
        with precision.autocast():
            features.append(network(x.contiguous(memory_format=torch.channels_last)).float())
    return gather_rows(features, ranks, device)


def cache_path(
    kind: str, module: nn.Module, split: Split, cache_dir: Path, device: torch.device, precision: Precision
) -> Path:
    """Where what this module made of this split is kept, its suffix left open: another weight, another name."""
    digest = hashlib.sha256(str((split.fingerprint, tuple(split.images.shape), precision.name, device.type)).encode())
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return cache_dir / f"{kind}_{split.benchmark}_{split.split}_{digest.hexdigest()[:16]}"


def cached_features(
    backbone: Backbone,
    split: Split,
    cache_dir: Path,
    device: torch.device,
    precision: Precision,
    quiet: bool = False,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Features of a whole split (N, d), from cache_dir when these weights have embedded these images before."""
    features: Tensor | None = None
    path = cache_path(f"features{backbone.feature_dim}", backbone, split, cache_dir, device, precision)
    path = path.with_suffix(".pt")
    if path.is_file():
        with contextlib.suppress(Exception):  # damaged: embed anew
            features = load_tensors(path, device)
    found = all(gather_objects(features is not None, ranks))
    if found and features is not None:
        return features
    features = embed(
        backbone, split.images, device, precision, bar="" if quiet else f"embed {split.split}", ranks=ranks
    )
    if ranks.first:
        save_atomically(path, features.cpu())
    return features


@torch.no_grad()
def cached_activations(
    below: nn.Sequential,
    split: Split,
    cache_dir: Path,
    device: torch.device,
    precision: Precision,
    quiet: bool = False,
    batch_size: int = 64,
) -> Tensor:
    """What the blocks `below`, in eval mode, make of a whole split: (N, c, h, w) float32, mapped from cache_dir.

    Written batch by batch, for it may be larger than memory.
    """
    path = cache_path(f"activations{len(below)}", below, split, cache_dir, device, precision).with_suffix(".npy")
    with contextlib.suppress(OSError, ValueError):  # not there or damaged: compute it
        return torch.from_numpy(np.load(path, mmap_mode="c"))
    below.eval()
    starts = range(0, len(split.images), batch_size)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        for start in tqdm(starts, desc=f"activations {split.split}", disable=quiet, unit="batch"):
            x = normalise(split.images[start : start + batch_size].to(device))
            with precision.autocast():
                a = below(x.contiguous(memory_format=torch.channels_last)).float().cpu().contiguous().numpy()
            if start == 0:
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(split.images), *a.shape[1:])}
                np.lib.format.write_array_header_2_0(file, header)
            a.tofile(file)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def score_queries(scores: Tensor, n_way: int) -> Tensor:
    """Share of right predictions of each class: class-major scores (..., n_way * n_query, n_way) -> (..., n_way)."""
    return share_right(count_predictions(scores, n_way))


def share_right(counts: Tensor) -> Tensor:
    """The same of counts by true and predicted class: (..., n_way, n_way) -> (..., n_way)."""
    return counts.diagonal(dim1=-2, dim2=-1).float() / counts.sum(-1)


def evaluate_heads(
    features: Tensor,
    episodes: Episodes,
    method: str,
    s: float,
    m: float,
    n_steps: int,
    lr: float,
    seed: int,
    start: int = 0,
    bar: str = "",
    ranks: Ranks = ALONE,
) -> EpisodeScores:
    """Fit a new head on the support of each episode and score its queries, HEAD_CHUNK episodes together.

    features (N, d): the embedded split that `episodes` index. The initial head of the i-th of them is drawn from
    (seed, start + i). The chunks are shared out over the ranks, which all get all scores.
    """
    counts = []
    chunks = range(0, len(episodes), HEAD_CHUNK)
    for first in tqdm(ranks.share(chunks), desc=bar, disable=not bar, unit=f"x{HEAD_CHUNK} episodes"):
        part = episodes.slice(first, first + HEAD_CHUNK)
        z_support = features[part.support.flatten(1).to(features.device)]
        z_query = features[part.query.flatten(1).to(features.device)]
        y = class_major_labels(part.n_way, part.n_shot, features.device).expand(len(part), -1)
        generators = [make_generator(seed, "head", start + first + i) for i in range(len(part))]
        head = build_head(method, features.shape[1], part.n_way, s, m, generators, batched=True).to(features.device)
        fit_heads(head, z_support, y, n_steps, lr)
        with torch.no_grad():
            counts.append(count_predictions(head(z_query), part.n_way).cpu())
    return EpisodeScores(gather_rows(counts, ranks))


def accuracy_per_class(scores: EpisodeScores, episodes: Episodes, class_names: list[str]) -> dict[str, float]:
    """Mean accuracy (%) of each class over the episodes that it was part of."""
    classes, correct = episodes.classes.flatten(), scores.correct.flatten().double()
    total = torch.zeros(len(class_names), dtype=torch.double).index_add_(0, classes, correct)
    count = torch.bincount(classes, minlength=len(class_names))
    return {name: round(100.0 * (total[c] / count[c]).item(), 2) for c, name in enumerate(class_names) if count[c] > 0}
