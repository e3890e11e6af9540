"""One episode of stage 3 in a file, to be drawn: its features before and after alignment, its related base classes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from data.benchmarks import Split
from data.episodes import Episodes
from engine.errors import UserError
from engine.files import fits, read_record
from engine.precision import Precision
from engine.run import Run
from methods.alignment import AlignedEpisode
from methods.features import Source, UpdatedBlocks, updated_features
from methods.related_base import draw_related

EPISODE_FORMAT = "associative-alignment-episode/1"
FEATURES = {"before": Tensor, "after": Tensor, "labels": Tensor}
RELATED = {"name": str, "score": float, "images": Tensor}
EPISODE = {
    **{"episode": int, "class_names": list[str], "support": FEATURES, "query": FEATURES, "related": FEATURES},
    **{"support_images": Tensor, "related_classes": list[list[Any]]},
}
N_SAMPLES = 2  # images kept of each related base class
MAX_SIDE = 84  # pixels, of the images kept


def first_draw(episode: AlignedEpisode, generator: Generator) -> tuple[Tensor, Tensor]:
    """The related images, and their labels, that an episode took in the first iteration: (n,), (n,), perhaps none.

    generator: a new one of the episode's draws.
    """
    if not episode.n_drawn:
        return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    return draw_related(episode.related.samples, episode.n_drawn, generator)


def before_and_after(
    source: Source, index: Tensor, labels: Tensor, blocks: UpdatedBlocks, precision: Precision
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


def related_classes(episode: AlignedEpisode, base: Split) -> list[list[dict[str, Any]]]:
    """For each novel class its related base classes, best first: name, score, and images (k, 3, s, s) aligned with."""
    rows = []
    for w, (chosen, samples) in enumerate(zip(episode.related.classes, episode.related.samples, strict=True)):
        samples = samples.cpu()
        rows.append(
            [
                {
                    "name": base.class_names[b],
                    "score": episode.related.score[b, w].item(),
                    "images": thumbnails(base.images[samples[base.labels[samples] == b][:N_SAMPLES]]),
                }
                for b in chosen
            ]
        )
    return rows


def gather_episode(
    episodes: Episodes, i: int, episode: AlignedEpisode, novel: Source, base: Source, blocks: UpdatedBlocks, run: Run
) -> dict[str, Any]:
    """What the figures need of episode i, as tensors and plain values; the blocks are as alignment left them.

    The weights of the blocks stay as they are.
    """
    if episode.adapter is not None:
        blocks = replace(blocks, updated=episode.adapter)
    support, query = episodes.support[i], episodes.query[i]
    ways = torch.arange(episodes.n_way)
    novel_features = {
        name: before_and_after(novel, index.flatten(), ways.repeat_interleave(index.shape[1]), blocks, run.precision)
        for name, index in (("support", support), ("query", query))
    }
    drawn = first_draw(episode, run.generator("related draws", i))
    return {
        "format": EPISODE_FORMAT,
        "episode": i,
        "class_names": [novel.split.class_names[c] for c in episodes.classes[i].tolist()],
        **novel_features,
        "related": before_and_after(base, *drawn, blocks, run.precision),
        "support_images": thumbnails(novel.split.images[support[:, 0]]),
        "related_classes": related_classes(episode, base.split),
    }


def read_episode(path: Path) -> dict[str, Any]:
    """The content of a file of gather_episode, and the file's name as `result`, running nothing of it.

    Raises UserError when it is no such file.
    """
    remedy = "delete it and run its stage again"
    record = read_record(path, EPISODE_FORMAT, EPISODE, "saved episode", remedy)
    n_way = len(record["class_names"])
    kinds = [record[kind] for kind in ("support", "query", "related")]
    d = record["support"]["before"].shape[-1:]
    if not (
        all(
            z.is_floating_point() and z.shape == k["labels"].shape + d for k in kinds for z in (k["before"], k["after"])
        )
        and all(
            not k["labels"].is_floating_point() and ((0 <= k["labels"]) & (k["labels"] < n_way)).all() for k in kinds
        )
        and record["support_images"].shape[:2] == (n_way, 3)
        and len(record["related_classes"]) == n_way
        and all(fits(related, RELATED) for row in record["related_classes"] for related in row)
    ):
        raise UserError(f"{path} is a damaged saved episode: {remedy}")
    return record | {"result": path.stem}
