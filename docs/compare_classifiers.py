"""Compare classifiers of a few images per class on the same novel episodes: accuracies, paired intervals.

python -m docs.compare_classifiers --checkpoint results/models/..._bestModel.tar --dataset typefaces

On the features of one backbone: logistic regression (its C chosen on val episodes), the nearest mean,
the head as fitted, and the head aligned in feature space with the base classes, with the defaults of predict.py.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

from data.benchmarks import DataOptions, load_split
from data.episodes import EpisodeShape, class_major_labels, sample_episodes
from engine.errors import OneLineParser
from engine.run import Run
from engine.script import run_script
from methods.alignment import AlignmentSetting
from methods.controls import Scorer, logistic_regression, nearest_mean_cosine, score_episodes
from methods.features import Source, trainable_blocks
from methods.intervals import mean_record
from methods.novel_finetune import HeadFit
from methods.related_base import RelatedSetting
from persistence.checkpoints import load_backbone
from persistence.feature_cache import FeatureCache
from persistence.results import interval
from photos.confidence import left_out_logits

# Inverse strengths of the regularisation of logistic regression among which val episodes choose.
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class Comparison:
    """What is compared on: novel episodes, and val episodes that choose C; n_B related base classes per novel class,
    and aug_size related images of them in an iteration."""

    n_way: int = 5
    n_query: int = 15
    n_episodes: int = 600
    n_val: int = 100
    n_B: int = 10
    aug_size: int = 50

    @property
    def settings(self) -> tuple[AlignmentSetting, AlignmentSetting]:
        """The settings of the head as fitted, and of the aligned head, with the defaults of predict.py."""
        related = RelatedSetting(self.n_B, self.aug_size, related_draws="each")
        fitted = AlignmentSetting("none", HeadFit(ft_init="prototypes"), related)
        return fitted, replace(fitted, alignment="head")


def comparison_lines(sources: dict[str, Source], n_shot: int, on: Comparison, run: Run) -> list[str]:
    """The table of n_shot images per class, in lines."""
    shape, novel = EpisodeShape(on.n_way, n_shot, on.n_query), sources["novel"]
    val = sample_episodes(sources["val"].split, shape, on.n_val, run.seed)
    regression: dict[float, Scorer] = {c: partial(logistic_regression, strength=c) for c in STRENGTHS}
    on_val = {c: score_episodes(sources["val"].features, val, regression[c], run).accuracy.mean() for c in STRENGTHS}
    strength = max(STRENGTHS, key=on_val.__getitem__)
    episodes = sample_episodes(novel.split, shape, on.n_episodes, run.seed)
    tasks, y = list(map(episodes.task, range(len(episodes)))), class_major_labels(on.n_way, on.n_query)
    fitted, aligned = on.settings
    heads = {"our head": (None, fitted), "our head, aligned": (sources["base"], aligned)}
    scorers = {f"logistic regression, C {strength:g}": regression[strength], "nearest mean": nearest_mean_cosine}
    rows = {name: score_episodes(novel.features, episodes, s, run).accuracy.double() for name, s in scorers.items()}
    for name, head in heads.items():
        logits = left_out_logits(tasks, novel, *head, run).view(len(tasks), -1, on.n_way)
        rows[name] = (logits.argmax(2) == y).double().mean(1)
    lines = [f"{on.n_way} classes, {n_shot} image{'s' * (n_shot > 1)} each, {len(episodes)} novel episodes"]
    for name, accuracy in rows.items():
        gain = interval(mean_record(rows["our head, aligned"] - accuracy, episodes.classes))
        less = "" if name == "our head, aligned" else f"   aligned is better by {gain}"
        lines.append(f"  {name:<32} {interval(mean_record(accuracy, episodes.classes))} %{less}")
    return lines


def main() -> None:
    parser = OneLineParser(prog="python -m docs.compare_classifiers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="backbone of stage 1")
    parser.add_argument("--dataset", default="typefaces")
    parser.add_argument("--benchmarks_dir", type=Path, default=Path("fs_benchmarks"))
    parser.add_argument("--cache_dir", type=Path, default=Path("fs_benchmarks/.cache"))
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--n_shot", type=int, nargs="+", default=[1, 5], help="images per class (default: 1 5)")
    for field in fields(Comparison):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help=f"(default: {field.default})")
    args = parser.parse_args()
    on = Comparison(**{field.name: getattr(args, field.name) for field in fields(Comparison)})
    if min(*vars(on).values(), *args.n_shot) < 1 or on.n_way < 2:
        parser.error("the numbers are to be at least 1, and --n_way 2")
    run = Run(quiet=args.quiet)
    backbone, checkpoint = load_backbone(args.checkpoint, None, None)
    backbone, blocks = backbone.to(memory_format=torch.channels_last), trainable_blocks(backbone, 0)
    options = DataOptions(args.benchmarks_dir, checkpoint.img_size, args.cache_dir, eval_resize=backbone.eval_resize)
    cache = FeatureCache(args.cache_dir, run)
    splits = {split: load_split(options, args.dataset, split) for split in ("base", "val", "novel")}
    sources = {name: cache.source(backbone, blocks, split) for name, split in splits.items()}
    for n_shot in args.n_shot:
        print("\n".join(comparison_lines(sources, n_shot, on, run)), flush=True)


if __name__ == "__main__":
    run_script(main)
