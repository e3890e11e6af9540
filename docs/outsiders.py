"""How many images of other classes a rule finds that loses 5 % of the right classes' images.

python -m docs.outsiders --checkpoint FILE --dataset typefaces --split val
python -m docs.outsiders --backbone custom:lite0:network --dataset mini_100 --novel_dataset groceries

The table of docs/photos.md. An episode has n_way classes with examples, and as many others: queries of both are scored.
One threshold serves all episodes, for a user has nothing to fit one to; the gain is over today's rule.
"""

from dataclasses import replace

import torch
from torch import Tensor

from data.episodes import EpisodeShape, Task, class_major_labels, sample_episodes
from docs.compare_classifiers import load_sources, source_parser
from engine.run import Run
from engine.script import run_script
from methods.alignment import AlignmentSetting
from methods.features import Source
from methods.intervals import mean_record
from methods.novel_finetune import HeadFit
from models.heads import Head, unit
from persistence.results import interval
from photos.confidence import fitted_heads

LOST = 0.05
SHRINKAGE = 0.1  # of the base covariance, to a multiple of the identity


def whitening(base: Tensor) -> Tensor:
    """A matrix (d, d) after which base features (N, d) of unit length have about the identity as covariance."""
    z = unit(base.float())
    covariance = (z - z.mean(0)).T @ (z - z.mean(0)) / len(z)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.diagonal().mean() * torch.eye(z.shape[1])
    values, vectors = torch.linalg.eigh(covariance)
    return vectors / values.sqrt()


def means(z: Tensor, y: Tensor) -> Tensor:
    """The means (n_way, d) of the classes of features (k, d) with labels y (k,)."""
    return torch.stack([z[y == w].mean(0) for w in range(int(y.max()) + 1)])


def unlikeness(z: Tensor, z_query: Tensor, y: Tensor, head: Head, white: Tensor) -> dict[str, Tensor]:
    """By rule, how unlike every class queries (q, d) are, of examples (k, d) with labels y (k,); larger is more so."""
    u, q = unit(z), unit(z_query)
    own = 1 - (u @ u.T).fill_diagonal_(-1).max(1).values  # of each example, the distance to the nearest other
    to_examples = 1 - q @ u.T
    near, few = to_examples.min(1), to_examples.topk(min(3, len(z)), largest=False)
    whitened, w_query = unit(z) @ white, unit(z_query) @ white
    of_class = torch.cdist(w_query, means(whitened, y)).min(1).values
    between = torch.cdist(whitened, whitened).topk(2, largest=False).values[:, 1].mean()
    logits = head.logits(head(z_query))
    return {
        "nearest, to the farthest example's (today)": near.values / own.max(),
        "nearest, to the mean example's": near.values / own.mean(),
        "nearest, to that example's own": near.values / own[near.indices],
        "mean of the 3 nearest, to the examples'": few.values.mean(1) / own.mean(),
        "nearest, as it is": near.values,
        "nearest class mean": (1 - q @ unit(means(u, y)).T).min(1).values,
        "energy of the head": -logits.logsumexp(1),
        "largest probability": -logits.softmax(1).max(1).values,
        "Mahalanobis": of_class,
        "Mahalanobis, to the examples'": of_class / between,
    }


def outsider_lines(sources: dict[str, Source], split: str, shape: EpisodeShape, n_episodes: int, run: Run) -> list[str]:
    """The table of one number of examples, in lines."""
    source, white = sources[split], whitening(sources["base"].features)
    n_way, n_shot, twice = shape.n_way, shape.n_shot, replace(shape, n_way=2 * shape.n_way)
    episodes = sample_episodes(source.split, twice, n_episodes, run.seed)
    setting, y = AlignmentSetting("none", HeadFit(ft_init="prototypes")), class_major_labels(n_way, n_shot)
    found: dict[str, list[Tensor]] = {}
    for i in run.bar(range(len(episodes)), "outsiders", "episode"):
        support, query = episodes.support[i, :n_way].flatten(), episodes.query[i].flatten()
        heads = fitted_heads([Task(support, y, query)], source, setting, run, i)
        head = setting.fit.new_head(source.features.shape[1], n_way, None)
        head.become_mean(heads)
        with torch.no_grad():
            scores = unlikeness(source.features[support], source.features[query], y, head, white)
        for name, values in scores.items():
            found.setdefault(name, []).append(values)
    lines = [f"{n_way} classes and {n_way} others, {n_shot} examples each, {len(episodes)} {split} episodes"]
    today = None
    for name, parts in found.items():
        right, others = torch.stack(parts).chunk(2, 1)
        least = right.flatten().quantile(1 - LOST)
        caught = (others > least).double().mean(1)
        today = caught if today is None else today
        gain = "" if caught is today else f"   {interval(mean_record(caught - today, episodes.classes))}"
        lines.append(f"  {name:<44} {100 * caught.mean():5.1f} % above {least:.2f}{gain}")
    return lines


def main() -> None:
    parser = source_parser("docs.outsiders", __doc__ or "")
    parser.add_argument("--split", choices=["val", "novel"], default="novel", help="of the episodes (default: novel)")
    parser.add_argument("--n_way", type=int, default=5, help="classes with examples (default: 5)")
    parser.add_argument("--n_query", type=int, default=10, help="queries per class (default: 10)")
    parser.add_argument("--n_episodes", type=int, default=200, help="(default: 200)")
    args = parser.parse_args()
    if min(args.n_way, *args.n_shot, args.n_query, args.n_episodes) < 1 or args.n_way < 2:
        parser.error("the numbers are to be at least 1, and --n_way 2")
    run = Run(quiet=args.quiet)
    sources = load_sources(args, run)
    for n_shot in args.n_shot:
        shape = EpisodeShape(args.n_way, n_shot, args.n_query)
        lines = outsider_lines(sources, args.split, shape, args.n_episodes, run)
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    run_script(main)
