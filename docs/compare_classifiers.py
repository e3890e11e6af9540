"""Compare classifiers of a few images per class on the same novel episodes: accuracies, paired intervals.

python -m docs.compare_classifiers --checkpoint results/models/..._bestModel.tar --dataset typefaces
python -m docs.compare_classifiers --backbone custom:lite0:network --dataset mini_100 --novel_dataset groceries

On the features of one backbone: logistic regression (its C chosen on val episodes, or on episodes of base classes where
there is no val split), the nearest mean, and the heads of predict.py: as fitted, aligned in feature space with the base
classes, and the one of these that `--alignment auto` chooses. At one image per class it chooses once for all episodes;
at more, by leave-one-out, for each.
"""

import argparse
import contextlib
import tempfile
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

from args_parser import backbone_name
from data.benchmarks import DataOptions, load_split
from data.episodes import EpisodeShape, Task, class_major_labels, sample_episodes
from engine.errors import OneLineParser, UserError
from engine.run import Run
from engine.script import run_script
from methods.alignment import AlignmentSetting
from methods.controls import Scorer, logistic_regression, nearest_mean_cosine, score_episodes
from methods.features import Source, feature_source, trainable_blocks
from methods.intervals import mean_record
from methods.novel_finetune import HeadFit
from methods.related_base import RelatedSetting
from models import native_img_size
from persistence.checkpoints import create_backbone, load_backbone
from persistence.feature_cache import FeatureCache
from persistence.results import interval
from photos.choosing import choose_alignment
from photos.classifier import with_scale
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
        fitted = AlignmentSetting("none", HeadFit(ft_s=None, ft_init="prototypes"), related)
        return fitted, replace(fitted, alignment="head")


def episode_source(source: Source, task: Task) -> Source:
    """The support of an episode as the examples of a user, a source of its own."""
    names = [f"{w}" for w in range(task.n_way)]
    split = replace(source.split, class_names=names, labels=task.y_support, fingerprint="")
    return feature_source(source.features[task.support], split)


def chosen_for(tasks: list[Task], sources: dict[str, Source], setting: AlignmentSetting, run: Run) -> list[bool]:
    """Whether `auto` aligns, in each episode; with the val classes of the benchmark, where it has any."""

    def load_val() -> Source:
        if "val" not in sources:
            raise UserError("no val classes")
        return sources["val"]

    def aligns(task: Task) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            novel, kept = episode_source(sources["novel"], task), Path(folder)
            return choose_alignment(novel, sources["base"], load_val, (), setting, kept, run)[0].alignment == "head"

    if len(tasks[0].support) == tasks[0].n_way:
        return [aligns(tasks[0])] * len(tasks)
    return [aligns(task) for task in run.bar(tasks, "auto", "episode")]


def comparison_lines(sources: dict[str, Source], n_shot: int, on: Comparison, run: Run) -> list[str]:
    """The table of n_shot images per class, in lines."""
    shape, novel = EpisodeShape(on.n_way, n_shot, on.n_query), sources["novel"]
    others = sources.get("val", sources["base"])
    fewer = replace(shape, n_way=min(on.n_way, len(others.split.class_names)))
    val = sample_episodes(others.split, fewer, on.n_val, run.seed)
    regression: dict[float, Scorer] = {c: partial(logistic_regression, strength=c) for c in STRENGTHS}
    on_val = {c: score_episodes(others.features, val, regression[c], run).accuracy.mean() for c in STRENGTHS}
    strength = max(STRENGTHS, key=on_val.__getitem__)
    episodes = sample_episodes(novel.split, shape, on.n_episodes, run.seed)
    tasks, y = list(map(episodes.task, range(len(episodes)))), class_major_labels(on.n_way, on.n_query)
    scorers = {f"logistic regression, C {strength:g}": regression[strength], "nearest mean": nearest_mean_cosine}
    rows = {name: score_episodes(novel.features, episodes, s, run).accuracy.double() for name, s in scorers.items()}
    setting = with_scale(on.settings[1], tasks[0].y_support)
    both = left_out_logits(tasks, novel, sources["base"], setting, run)
    right = [(logits.view(len(tasks), -1, on.n_way).argmax(2) == y).double().mean(1) for logits in both]
    rows |= dict(zip(("our head", "our head, aligned"), right, strict=True))
    aligns = torch.tensor(chosen_for(tasks, sources, setting, run))
    rows["auto"] = torch.where(aligns, right[1], right[0])
    share = f"auto, which aligned {100 * aligns.double().mean():.0f} %"
    lines = [f"{on.n_way} classes, {n_shot} image{'s' * (n_shot > 1)} each, {len(episodes)} novel episodes"]
    for name, accuracy in rows.items():
        gain = interval(mean_record(rows["auto"] - accuracy, episodes.classes))
        own, less = (share, "") if name == "auto" else (name, f"   auto is better by {gain}")
        lines.append(f"  {own:<32} {interval(mean_record(accuracy, episodes.classes))} %{less}")
    return lines


def source_parser(module: str, text: str) -> OneLineParser:
    """A parser of the flags that name a backbone and its sources."""
    parser = OneLineParser(prog=f"python -m {module}", description=text.splitlines()[0])
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--checkpoint", type=Path, help="backbone of stage 1")
    network.add_argument("--backbone", type=backbone_name, help="custom:MODULE:FUNCTION, which is run")
    parser.add_argument("--eval_resize", help="how images are resized (default: the backbone's own rule)")
    parser.add_argument("--dataset", default="typefaces", help="of the base and val classes")
    parser.add_argument("--novel_dataset", help="of the novel classes (default: --dataset)")
    parser.add_argument("--benchmarks_dir", type=Path, default=Path("fs_benchmarks"))
    parser.add_argument("--cache_dir", type=Path, default=Path("fs_benchmarks/.cache"))
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--n_shot", type=int, nargs="+", default=[1, 5], help="images per class (default: 1 5)")
    return parser


def load_sources(args: argparse.Namespace, run: Run) -> dict[str, Source]:
    """The features of the base and novel classes, and of val classes where there are some, by split."""
    if args.backbone:
        img_size = native_img_size(args.backbone)
        backbone = create_backbone(args.backbone, img_size, run.seed)
    else:
        backbone, checkpoint = load_backbone(args.checkpoint, None, None)
        img_size = checkpoint.img_size
    backbone.eval_resize = args.eval_resize or backbone.eval_resize
    backbone, blocks = backbone.to(memory_format=torch.channels_last), trainable_blocks(backbone, 0)
    options = DataOptions(args.benchmarks_dir, img_size, args.cache_dir, eval_resize=backbone.eval_resize)
    benchmarks = {"base": args.dataset, "novel": args.novel_dataset or args.dataset}
    splits = {split: load_split(options, dataset, split) for split, dataset in benchmarks.items()}
    with contextlib.suppress(UserError):  # it has none
        splits["val"] = load_split(options, args.dataset, "val")
    cache = FeatureCache(args.cache_dir, run)
    return {name: cache.source(backbone, blocks, split) for name, split in splits.items()}


def main() -> None:
    parser = source_parser("docs.compare_classifiers", __doc__ or "")
    for field in fields(Comparison):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help=f"(default: {field.default})")
    args = parser.parse_args()
    on = Comparison(**{field.name: getattr(args, field.name) for field in fields(Comparison)})
    if min(*vars(on).values(), *args.n_shot) < 1 or on.n_way < 2:
        parser.error("the numbers are to be at least 1, and --n_way 2")
    run = Run(quiet=args.quiet)
    sources = load_sources(args, run)
    for n_shot in args.n_shot:
        print("\n".join(comparison_lines(sources, n_shot, on, run)), flush=True)


if __name__ == "__main__":
    run_script(main)
