"""How well both intervals cover: python -m docs.interval_coverage --checkpoint FILE --dataset NAME

The table of docs/intervals.md. The val and novel classes are split at random into two halves, again and again, and
episodes drawn from each half. Of two intervals that hold in 95 of 100 cases, the root of the sum of squares holds the
difference of the halves as often.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from data.benchmarks import DataOptions, load_split
from data.episodes import Episodes
from engine.run import Run
from engine.script import run_script
from methods.controls import nearest_mean_cosine, simple_shot
from methods.evaluation import HEAD_CHUNK, EpisodeScores, count_predictions
from methods.features import trainable_blocks
from methods.intervals import ci95_over_classes, mean_and_ci95
from methods.protonet import protonet_scores
from persistence.checkpoints import load_backbone
from persistence.feature_cache import FeatureCache

N_WAY, N_QUERY = 5, 15


def plain_jackknife(values: Tensor, classes: Tensor) -> float:
    """Half-width of the 95% interval over classes (E, n_way) of the jackknife without the correction for noise."""
    kept = classes.unique()
    without = torch.stack([values[(classes != c).all(1)].mean() for c in kept])
    variance = (len(kept) - 1) / len(kept) * (without - without.mean()).square().sum().item()
    return 2.1098 * math.sqrt(variance)  # Student's t of 17 degrees of freedom: halves of 36 classes


def draw(members: list[Tensor], among: Tensor, n_shot: int, n: int, generator: torch.Generator) -> Episodes:
    """n episodes of the classes `among`."""
    classes = among[torch.rand(n, len(among), generator=generator).argsort(1)[:, :N_WAY]]
    index = torch.empty(n, N_WAY, n_shot + N_QUERY, dtype=torch.long)
    for e, of_episode in enumerate(classes.tolist()):
        for w, c in enumerate(of_episode):
            index[e, w] = members[c][torch.randperm(len(members[c]), generator=generator)[: n_shot + N_QUERY]]
    return Episodes(index, classes, n_shot)


def measured(z: Tensor, centre: Tensor, episodes: Episodes) -> dict[str, Tensor]:
    """By name the accuracy of each episode by nearest mean, and two gains, (E,) each."""
    counts: list[list[Tensor]] = [[], [], []]
    for first in range(0, len(episodes), HEAD_CHUNK):  # score_episodes would gather the same features three times
        part = episodes.slice(first, first + HEAD_CHUNK)
        features = z[part.support], z[part.query.flatten(1)]
        scores = protonet_scores(*features), nearest_mean_cosine(*features), simple_shot(*features, centre)
        for kept, each in zip(counts, scores, strict=True):
            kept.append(count_predictions(each, N_WAY))
    euclidean, cosine, centred = (EpisodeScores(torch.cat(kept)).accuracy.double() for kept in counts)
    return {
        "accuracy, nearest mean, cosine": cosine,
        "gain of cosine over Euclidean": cosine - euclidean,
        "gain of SimpleShot over cosine": centred - cosine,
    }


def coverage_rows(z: Tensor, labels: Tensor, centre: Tensor, n_shot: int, args: argparse.Namespace) -> list[str]:
    """A row of the table per quantity: spread of the halves, each interval, and how often it covers."""
    members = [(labels == c).nonzero().squeeze(1) for c in range(int(labels.max()) + 1)]
    generator = torch.Generator().manual_seed(args.seed)
    found: dict[str, list[list[tuple[float, ...]]]] = {}
    for _ in Run(quiet=False).bar(range(args.splits), f"{n_shot}-shot", "split"):
        halves: dict[str, list[tuple[float, ...]]] = {}
        for among in torch.randperm(len(members), generator=generator).chunk(2):
            episodes = draw(members, among, n_shot, args.n_episodes, generator)
            for name, values in measured(z, centre, episodes).items():
                over_classes = (of(values, episodes.classes) for of in (ci95_over_classes, plain_jackknife))
                halves.setdefault(name, []).append((*mean_and_ci95(values), *over_classes))
        for name, both in halves.items():
            found.setdefault(name, []).append(both)
    rows = []
    for name, splits in found.items():
        mean, *intervals = (100 * torch.tensor(splits)).unbind(2)
        difference = (mean[:, 0] - mean[:, 1]).abs()
        spread = 1.96 * difference.square().mean().sqrt().item() / math.sqrt(2)
        cells = [f"{mean.mean():.2f}", f"{spread:.2f}"]
        for half in intervals:
            covered = (difference <= half.square().sum(1).sqrt()).double().mean().item()
            cells.append(f"± {half.mean():.2f}, {100 * covered:.0f} %")
        rows.append(f"| {args.dataset}, {n_shot}-shot: {name} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--benchmarks_dir", type=Path, default=Path("fs_benchmarks"))
    parser.add_argument("--cache_dir", type=Path, default=Path("fs_benchmarks/.cache"))
    parser.add_argument("--n_shot", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--splits", type=int, default=300)
    parser.add_argument("--n_episodes", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run = Run(quiet=False)
    backbone, checkpoint = load_backbone(args.checkpoint, None, None)
    backbone, blocks = backbone.to(memory_format=torch.channels_last), trainable_blocks(backbone, 0)
    options = DataOptions(args.benchmarks_dir, checkpoint.img_size, args.cache_dir, eval_resize=backbone.eval_resize)
    cache = FeatureCache(args.cache_dir, run)
    base, val, novel = (
        cache.source(backbone, blocks, load_split(options, args.dataset, split)) for split in ("base", "val", "novel")
    )
    z = torch.cat([val.features, novel.features])
    labels = torch.cat([val.split.labels, novel.split.labels + len(val.split.class_names)])
    print("| | mean | spread | over episodes | over classes | plain jackknife |\n|---|---|---|---|---|---|")
    for n_shot in args.n_shot:
        print("\n".join(coverage_rows(z, labels, base.features.mean(0), n_shot, args)), flush=True)


if __name__ == "__main__":
    run_script(main)
