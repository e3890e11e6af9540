"""Compare classifiers of a few images a class on the same novel episodes: accuracies, paired intervals, calibration.

python -m photos.compare --checkpoint results/models/..._bestModel.tar --dataset typefaces

On the features of one backbone: scikit-learn's logistic regression (its C chosen on val episodes), the nearest mean,
the head as fitted, and the head aligned in feature space with the base classes. Of the heads also the expected
calibration error, before and after the temperature of leave-one-out, and the accuracy of what is kept above a
probability.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.benchmarks import DataOptions, load_split
from data.episodes import Episodes, EpisodeShape, class_major_labels, sample_episodes
from engine.errors import OneLineParser, UserError
from engine.run import Run
from engine.script import run_script
from methods.alignment import AlignmentSetting
from methods.evaluation import mean_and_ci95, nearest_mean
from methods.features import Source, feature_source, trainable_blocks
from methods.related_base import RelatedSetting
from models.heads import unit
from persistence.checkpoints import load_backbone
from persistence.feature_cache import FeatureCache
from persistence.results import percent
from photos.confidence import calibration_error, cross_validate, left_out_logits

# Inverse strengths of the regularisation of logistic regression among which val episodes choose.
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
KEPT_ABOVE = (0.5, 0.7, 0.9)

# (z_support (k, d), y_support (k,), z_query (q, d)) -> predicted labels (q,).
Labels = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Comparison:
    """What is compared on: so many episodes of n_way classes and n_query queries a class, of which n_calibrated are
    calibrated, and n_val episodes that choose C; alignment takes these related images."""

    n_way: int
    n_query: int
    n_episodes: int
    n_calibrated: int
    n_val: int
    related: RelatedSetting


@dataclass(frozen=True)
class Answered:
    """What a head said in E episodes, of which all queries: accuracy (E,), probabilities (E q, n_way), as they are and
    calibrated, and the true labels (E q,)."""

    accuracy: Tensor
    raw: Tensor
    calibrated: Tensor
    y: Tensor


def logistic_regression(strength: float) -> Labels:
    """scikit-learn's, on features of unit length. Raises UserError when it is not installed."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError("the comparison needs scikit-learn: pip install scikit-learn") from error

    def predict(z_support: Tensor, y_support: Tensor, z_query: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = LogisticRegression(C=strength, max_iter=1000).fit(unit(z_support).numpy(), y_support.numpy())
        return torch.from_numpy(fitted.predict(unit(z_query).numpy()))

    return predict


def accuracies(predict: Labels, source: Source, episodes: Episodes) -> Tensor:
    """The accuracy (E,) of each episode."""
    rows = []
    for task in (episodes.task(i) for i in range(len(episodes))):
        z, y = source.features, class_major_labels(task.n_way, len(task.query) // task.n_way)
        rows.append((predict(z[task.support], task.y_support, z[task.query]) == y).double().mean())
    return torch.stack(rows)


def answers(
    source: Source, base: Source | None, episodes: Episodes, n_calibrated: int, setting: AlignmentSetting, run: Run
) -> Answered:
    """What our head says in each episode, aligned in feature space with a base set; the first are calibrated too."""
    tasks = [episodes.task(i) for i in range(len(episodes))]
    y = class_major_labels(episodes.n_way, len(tasks[0].query) // episodes.n_way)
    logits = left_out_logits(tasks, source, base, setting, run).view(len(tasks), -1, episodes.n_way)
    calibrated = []
    for task, row in run.bar(list(zip(tasks, logits, strict=True))[:n_calibrated], "leave one out", "episode"):
        support = feature_source(source.features[task.support], source.split)
        confidence = cross_validate(support, task.y_support, base, setting, run)
        calibrated.append((row / (confidence.temperature if confidence else 1.0)).softmax(1))
    accuracy = (logits.argmax(2) == y).double().mean(1)
    raw = logits[:n_calibrated].flatten(0, 1).softmax(1)
    return Answered(accuracy, raw, torch.cat(calibrated), y.repeat(len(calibrated)))


def calibration_lines(name: str, answered: Answered) -> list[str]:
    """The calibration error before and after, and what is right among what is kept above a probability."""
    before, after = (calibration_error(p, answered.y) for p in (answered.raw, answered.calibrated))
    lines = [f"{name}: calibration error {100 * before:.1f} % before, {100 * after:.1f} % after the temperature"]
    confidence, predicted = answered.calibrated.max(1)
    for least in KEPT_ABOVE:
        kept = confidence >= least
        right = 100 * (predicted == answered.y)[kept].double().mean().item()
        lines.append(f"  --reject {least}: {100 * kept.double().mean().item():.1f} % kept, {right:.2f} % of them right")
    return lines


def compare(sources: dict[str, Source], n_shot: int, on: Comparison, run: Run) -> list[str]:
    """The lines of a number of images a class."""
    shape, novel = EpisodeShape(on.n_way, n_shot, on.n_query), sources["novel"]
    val = sample_episodes(sources["val"].split, shape, on.n_val, run.seed)
    strength = max(STRENGTHS, key=lambda c: accuracies(logistic_regression(c), sources["val"], val).mean().item())
    episodes = sample_episodes(novel.split, shape, on.n_episodes, run.seed)
    plain, aligned = AlignmentSetting("none"), AlignmentSetting("head", related=on.related)
    n_calibrated = on.n_calibrated if n_shot > 1 else 0
    ours = answers(novel, None, episodes, max(1, n_calibrated), plain, run)
    ours_aligned = answers(novel, sources["base"], episodes, max(1, n_calibrated), aligned, run)
    rows = {
        f"logistic regression, C {strength:g}": accuracies(logistic_regression(strength), novel, episodes),
        "nearest mean": nearest_mean(novel.features, episodes)["cosine"].accuracy.double(),
        "our head": ours.accuracy,
        "our head, aligned": ours_aligned.accuracy,
    }
    lines = [f"{on.n_way} classes, {n_shot} image{'s' * (n_shot > 1)} each, {len(episodes)} novel episodes"]
    for name, accuracy in rows.items():
        gain = percent(*mean_and_ci95(ours_aligned.accuracy - accuracy))
        less = "" if name == "our head, aligned" else f"   aligned is better by {gain}"
        lines.append(f"  {name:<32} {percent(*mean_and_ci95(accuracy))} %{less}")
    if n_calibrated:
        lines += calibration_lines("our head", ours) + calibration_lines("our head, aligned", ours_aligned)
    return lines


NUMBERS = (
    ("n_way", 5, "classes in an episode"),
    ("n_query", 15, "query images a class"),
    ("n_episodes", 600, "novel episodes of each comparison"),
    ("n_calibrated", 200, "of which so many are calibrated"),
    ("n_val", 100, "val episodes that choose C"),
    ("n_B", 10, "related base classes a class"),
    ("aug_size", 50, "related images a class in an iteration"),
)


def main() -> None:
    parser = OneLineParser(prog="python -m photos.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="backbone of stage 1")
    parser.add_argument("--dataset", default="typefaces")
    parser.add_argument("--benchmarks_dir", type=Path, default=Path("fs_benchmarks"))
    parser.add_argument("--cache_dir", type=Path, default=Path("fs_benchmarks/.cache"))
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--n_shot", type=int, nargs="+", default=[1, 5], help="images a class (default: 1 5)")
    for name, default, text in NUMBERS:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    args = parser.parse_args()
    if min(getattr(args, name) for name, _, _ in NUMBERS) < 1 or min(args.n_shot) < 1 or args.n_way < 2:
        parser.error("the numbers are to be at least 1, and --n_way 2")
    related = RelatedSetting(args.n_B, args.aug_size)
    on = Comparison(args.n_way, args.n_query, args.n_episodes, args.n_calibrated, args.n_val, related)
    run = Run(quiet=args.quiet)
    backbone, checkpoint = load_backbone(args.checkpoint, None, None)
    backbone = backbone.to(memory_format=torch.channels_last)
    options, cache = (
        DataOptions(args.benchmarks_dir, checkpoint.img_size, args.cache_dir),
        FeatureCache(args.cache_dir, run),
    )
    splits = {split: load_split(options, args.dataset, split) for split in ("base", "val", "novel")}
    sources = {name: cache.source(backbone, trainable_blocks(backbone, 0), split) for name, split in splits.items()}
    for n_shot in args.n_shot:
        print("\n".join(compare(sources, n_shot, on, run)), flush=True)


if __name__ == "__main__":
    run_script(main)
