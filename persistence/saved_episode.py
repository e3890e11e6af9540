"""Episodes of stage 3 in a file, to be drawn: features and logits before and after alignment, images, related classes.

The first of them is the file's content, and the others are a list in it, `more`.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from data.benchmarks import Split
from data.episodes import Episodes
from engine.files import read_record
from engine.precision import Precision
from engine.run import Run
from methods.alignment import AlignedEpisode, AlignmentSetting
from methods.features import Source, TrainableBlocks, updated_features
from methods.related_base import draw_related
from models.heads import unit

EPISODE_FORMAT = "associative-alignment-episode/1"
FEATURES = {"before": Tensor, "after": Tensor, "labels": Tensor}
RELATED = {"name": str, "score": float, "images": Tensor}
EPISODE = {
    **{"episode": int, "class_names": list[str], "support": FEATURES, "query": FEATURES, "related": FEATURES},
    **{"support_images": Tensor, "related_classes": [[RELATED]], "method": str, "nearest": Tensor},
    **{"images": {"support": Tensor, "query": Tensor}, "logits": {"before": Tensor, "after": Tensor}},
}
N_SAMPLES = 4  # images kept of each related base class
N_NEAREST = 3  # of them, those kept as the nearest of each query
MAX_SIDE = 84  # pixels, of the images kept


def first_draw(episode: AlignedEpisode, generator: Generator) -> tuple[Tensor, Tensor]:
    """The related images, and their labels, that an episode took in the first iteration: (n,), (n,), perhaps none.

    generator: a new one of the episode's draws.
    """
    if not episode.n_drawn:
        return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    (picks,) = draw_related(episode.related.samples, episode.n_drawn, 1, generator)
    return picks[picks >= 0], (picks >= 0).nonzero()[:, 0]


def before_and_after(
    source: Source, index: Tensor, labels: Tensor, blocks: TrainableBlocks, precision: Precision
) -> dict[str, Tensor]:
    """Features (n, d) of the images at index (n,) before alignment, and by the blocks as alignment left them."""
    before = source.features[index.to(source.features.device)].cpu()
    after = updated_features(blocks, source, index, precision).cpu() if len(index) else before.clone()
    return {"before": before, "after": after, "labels": labels.cpu()}


def thumbnails(images: Tensor) -> Tensor:
    """uint8 images (n, 3, s, s), made MAX_SIDE pixels if they are larger."""
    if images.shape[-1] <= MAX_SIDE or not len(images):
        return images.cpu().clone()
    return F.interpolate(images.cpu().float(), MAX_SIDE, mode="area").round().to(torch.uint8)


def kept_samples(episode: AlignedEpisode, base: Split) -> list[list[Tensor]]:
    """For each novel class, for each of its related base classes, best first: the indices (k,) of images to keep."""
    return [
        [samples.cpu()[base.labels[samples.cpu()] == b][:N_SAMPLES] for b in chosen]
        for chosen, samples in zip(episode.related.classes, episode.related.samples, strict=True)
    ]


def related_classes(episode: AlignedEpisode, base: Split, kept: list[list[Tensor]]) -> list[list[dict[str, Any]]]:
    """For each novel class its related base classes, best first: name, score, and images (k, 3, s, s) aligned with."""
    return [
        [
            {
                "name": base.class_names[b],
                "score": episode.related.score[b, w].item(),
                "images": thumbnails(base.images[samples]),
            }
            for b, samples in zip(chosen, kept[w], strict=True)
        ]
        for w, chosen in enumerate(episode.related.classes)
    ]


def logits_of(episode: AlignedEpisode, setting: AlignmentSetting) -> tuple[Tensor, Tensor]:
    """Logits (q, n_way) of the queries by fine-tuning, and after alignment.

    The logits of a cosine head are s cos(theta), with the s in force when the scores were made, which the head is set
    to.
    """
    episode.head.rescale(setting.fit.ft_s, setting.fit.ft_m)
    before = episode.head.logits(episode.finetuned).cpu()
    if setting.alignment != "none" and setting.align_iters:
        episode.head.rescale(setting.align_s, setting.align_m)
    return before, episode.head.logits(episode.aligned).cpu()


def gather_episode(
    episodes: Episodes,
    i: int,
    episode: AlignedEpisode,
    novel: Source,
    base: Source,
    blocks: TrainableBlocks,
    setting: AlignmentSetting,
    run: Run,
) -> dict[str, Any]:
    """What the figures need of episode i, as tensors and plain values; the blocks are as alignment left them.

    nearest (q, N_NEAREST): the images of related_classes, counted through, that are most like each query after
    alignment, by cosine. The weights of the blocks stay as they are.
    """
    support, query = episodes.support[i], episodes.query[i]
    ways = torch.arange(episodes.n_way)
    novel_features = {
        name: before_and_after(novel, index.flatten(), ways.repeat_interleave(index.shape[1]), blocks, run.precision)
        for name, index in (("support", support), ("query", query))
    }
    drawn = first_draw(episode, run.generator("related draws", i))
    kept = kept_samples(episode, base.split)
    index = torch.cat([samples for row in kept for samples in row] or [torch.empty(0, dtype=torch.long)])
    related = before_and_after(base, index, torch.zeros_like(index), blocks, run.precision)["after"]
    cosine = unit(novel_features["query"]["after"]) @ unit(related).T
    images = {name: novel.split.images[index.flatten()] for name, index in (("support", support), ("query", query))}
    return {
        "format": EPISODE_FORMAT,
        "episode": i,
        "class_names": [novel.split.class_names[c] for c in episodes.classes[i].tolist()],
        **novel_features,
        "related": before_and_after(base, *drawn, blocks, run.precision),
        "support_images": thumbnails(novel.split.images[support[:, 0]]),
        "related_classes": related_classes(episode, base.split, kept),
        "method": setting.fit.method,
        "images": {name: thumbnails(of_kind) for name, of_kind in images.items()},
        "logits": dict(zip(("before", "after"), logits_of(episode, setting), strict=True)),
        "nearest": cosine.topk(min(N_NEAREST, len(index)), 1).indices,
    }


def read_saved_episodes(path: Path) -> list[dict[str, Any]]:
    """The episodes of a file, as gather_episode made them, and the file's name as `result` of each, running nothing.

    Raises UserError when it is no such file.
    """
    schema = EPISODE | {"more": [EPISODE]}
    first = read_record(path, EPISODE_FORMAT, schema, "saved episode", "delete it and run its stage again")
    more = first.pop("more")
    return [record | {"result": path.stem} for record in (first, *more)]
