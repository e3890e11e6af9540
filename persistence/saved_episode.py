"""Episodes of stage 3 in a file, to be drawn: features and logits before and after alignment, images, related classes.

The first of them is the file's content, and the others are a list in it, `more`.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.episodes import Episodes
from engine.files import Schema, read_record
from engine.precision import Precision
from engine.run import Run
from methods.alignment import AlignedEpisode, AlignmentSetting
from methods.features import Source, TrainableBlocks, updated_features
from methods.related_base import draw_related
from models.heads import unit

EPISODE_FORMAT = "associative-alignment-episode/1"
FEATURES = {"before": Tensor, "after": Tensor, "labels": Tensor}
RELATED = {"name": str, "score": float, "images": Tensor}
EPISODE: Schema = {
    **{"episode": int, "class_names": list[str], "support": FEATURES, "query": FEATURES, "related": FEATURES},
    **{"related_classes": [[RELATED]], "method": str, "nearest": Tensor},
    **{"images": {"support": Tensor, "query": Tensor}, "logits": {"before": Tensor, "after": Tensor}},
    # What files of earlier versions lack. scale: of the logits, by which cosines are multiplied.
    **{"scale?": {"before": float, "after": float}, "title?": str},
    "standing?": {"gain": float, "mean": float, "better_than": float},
}
N_SAMPLES = 4  # images kept of each related base class
N_NEAREST = 3  # of them, those kept as the nearest of each query
MAX_SIDE = 84  # pixels, of the images kept


def before_and_after(
    source: Source, index: Tensor, labels: Tensor, blocks: TrainableBlocks, precision: Precision
) -> dict[str, Tensor]:
    """Features (n, d) of the images at index (n,) before alignment, and by the aligned blocks."""
    before = source.features[index.to(source.features.device)].float().cpu()
    after = updated_features(blocks, source, index, precision).cpu() if len(index) else before.clone()
    return {"before": before, "after": after, "labels": labels.cpu()}


def thumbnails(images: Tensor) -> Tensor:
    """uint8 images (n, 3, s, s), reduced to MAX_SIDE pixels if they are larger."""
    if images.shape[-1] <= MAX_SIDE or not len(images):
        return images.cpu().clone()
    return F.interpolate(images.cpu().float(), MAX_SIDE, mode="area").round().to(torch.uint8)


def logits_before_and_after(episode: AlignedEpisode, setting: AlignmentSetting) -> dict[str, dict[str, Any]]:
    """Logits (q, n_way) of the queries by fine-tuning, and after alignment, and the scale s that each was made with."""
    head, fit = episode.head, setting.fit
    is_aligned = setting.alignment != "none" and setting.align_iters
    made_with = {"before": (fit.scale, fit.ft_m, episode.finetuned)}
    made_with["after"] = (setting.align_s, setting.align_m, episode.aligned) if is_aligned else made_with["before"]
    logits, scale = {}, {}
    for when, (s, m, scores) in made_with.items():
        head.rescale(s, m)
        logits[when], scale[when] = head.logits(scores).cpu(), s if "s" in head.scalars else 1.0
    return {"logits": logits, "scale": scale}


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
    """What the figures need of episode i, as tensors and plain values; `blocks` hold their aligned weights.

    related_classes: for each novel class its related base classes, best first: name, score, images (k, 3, s, s).
    nearest (q, N_NEAREST): those of the images, counted through, nearest to each query after alignment, by cosine.
    """
    novel_images = {"support": episodes.support[i], "query": episodes.query[i]}
    ways, empty = torch.arange(episodes.n_way), torch.empty(0, dtype=torch.long)
    novel_features = {
        name: before_and_after(novel, index.flatten(), ways.repeat_interleave(index.shape[1]), blocks, run.precision)
        for name, index in novel_images.items()
    }
    drawn, y_drawn = empty, empty
    if episode.n_drawn:  # those of the first iteration
        (picks,) = draw_related(episode.related.samples, episode.n_drawn, 1, run.generator("related draws", i))
        drawn, y_drawn = picks[picks >= 0], (picks >= 0).nonzero()[:, 0]
    related_classes, kept = [], [empty]
    for way, (classes, samples) in enumerate(zip(episode.related.classes, episode.related.samples, strict=True)):
        labels = base.split.labels[samples.cpu()]
        of_classes = [samples.cpu()[labels == b][:N_SAMPLES] for b in classes]
        names, scores = [base.split.class_names[b] for b in classes], episode.related.score[classes, way].tolist()
        rows = zip(names, scores, (thumbnails(base.split.images[index]) for index in of_classes), strict=True)
        related_classes.append([dict(zip(RELATED, row, strict=True)) for row in rows])
        kept += of_classes
    index = torch.cat(kept)
    related = before_and_after(base, index, torch.zeros_like(index), blocks, run.precision)["after"]
    cosine = unit(novel_features["query"]["after"]) @ unit(related).T
    return {
        "format": EPISODE_FORMAT,
        "episode": i,
        "class_names": [novel.split.class_names[c] for c in episodes.classes[i].tolist()],
        **novel_features,
        "related": before_and_after(base, drawn, y_drawn, blocks, run.precision),
        "related_classes": related_classes,
        "method": setting.fit.method,
        "images": {name: thumbnails(novel.split.images[index.flatten()]) for name, index in novel_images.items()},
        **logits_before_and_after(episode, setting),
        "nearest": cosine.topk(min(N_NEAREST, len(index)), 1).indices,
    }


def read_saved_episodes(path: Path) -> list[dict[str, Any]]:
    """The episodes of a file; its name is the title of one of earlier versions. Raises UserError when it is none."""
    schema, remedy = EPISODE | {"more": [EPISODE]}, "delete it and run its stage again"
    first = read_record(path, EPISODE_FORMAT, schema, "saved episode", remedy)
    more = first.pop("more")
    return [record | {"title": record.get("title", path.stem.replace("_", " "))} for record in (first, *more)]
