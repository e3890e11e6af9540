"""The one argparse config of the stages and of predict.py: edit the defaults here, or give flags on the command line.

Defaults are the published protocol but for those that `--preset published_code` gives. Where the paper and its
published code differ, the help says which is followed. `--preset laptop` swaps in the demo's scale. Flags given beside
a preset still win, as beside --align_preset tuned.
"""

import argparse
import dataclasses
import difflib
import inspect
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from data.benchmarks import DataOptions, list_split
from engine.distributed import join_ranks, rank_0_first
from engine.errors import OneLineParser
from engine.resizing import RULE, USAGE
from engine.run import Run, start_run
from methods.alignment import ALIGNMENTS
from methods.meta_learners import META_LEARNERS
from methods.setting_choice import CHOSEN_FLAGS
from models import BACKBONES, HEADS, OTHERS, OTHERS_USAGE, native_img_size
from persistence.run_files import Folders, RunFiles, RunName, best_model, training_files

T = TypeVar("T")


def number(kind: type[float], low: float, high: float = math.inf, open_low: bool = False) -> Callable[[str], float]:
    """An argparse type: an int or a float from `low` (excluded if open_low) to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low < value if open_low else low <= value) or value > high or not math.isfinite(value):
            least = f"{'above' if open_low else 'at least'} {low:g}"
            most = f", at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range: expected {least}{most}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def flag_value(text: str) -> bool:
    """An argparse type for `--data_aug True` or `--data_aug False`."""
    if text.lower() not in ("true", "yes", "1", "false", "no", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "yes", "1")


def backbone_name(text: str) -> str:
    """An argparse type: a backbone of ours, of a library or of the user's own."""
    if text in BACKBONES or OTHERS.fullmatch(text):
        return text
    choices = f"{', '.join(BACKBONES)}, {OTHERS_USAGE}, such as torchvision:resnet50"
    raise argparse.ArgumentTypeError(f"unknown backbone {text!r}: choose {choices}")


def episode_choice(text: str) -> int | str:
    """An argparse type: the number of an episode, or median or worst."""
    if text in ("median", "worst"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of an episode nor median or worst")
    return int(text)


def matching(pattern: str, otherwise: str) -> Callable[[str], str]:
    """An argparse type: a text of a pattern; `otherwise` says what any other is."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is {otherwise}")
        return text

    return parse


# 1e30 keeps any arithmetic on a rate or a scale within float32.
POSITIVE, NOT_NEGATIVE = number(float, 0, 1e30, open_low=True), number(float, 0, 1e30)
COUNT, COUNT_OR_0, WAY = number(int, 1), number(int, 0), number(int, 2)
SHARE, MARGIN = number(float, 0, 1, open_low=True), number(float, 0)
RESIZE_RULE = matching(RULE.pattern, f"no resize rule: expected {USAGE}")
COLOUR = matching(r"black|white|#[0-9a-fA-F]{6}", "no colour: expected black, white or #rrggbb, such as #808080")
SWITCH = "no value: given or not"

N_QUERY = 50  # the published number

Flags = dict[str, Any]  # values by name, without dashes
Flag = tuple[list[str], Any, dict[str, Any]]  # names without dashes, default, other arguments of add_argument
Table = list[str | Flag]  # a string begins a group of that title


def flag(usage: str, kind: Any, default: Any, text: str, **options: Any) -> Flag:
    """A row of a table: names and metavars; a type, list of choices or SWITCH; a default; the help."""
    names = [word.removeprefix("--") for word in usage.split() if word.startswith("--")]
    metavars = usage.split()[len(names) :]
    options["help"] = text
    if kind is SWITCH:
        return names, default, options | {"action": "store_true"}
    options["choices" if isinstance(kind, list) else "type"] = kind
    if metavars:
        options["metavar"] = metavars[0] if len(metavars) == 1 else tuple(metavars)
    return names, default, options


def defaults(table: Table) -> Flags:
    """The default of every flag of a table."""
    return {row[0][0]: row[1] for row in table if not isinstance(row, str)}


def with_defaults(table: Table, **others: Any) -> Table:
    """A table whose flags of these names have other defaults."""
    return [row if isinstance(row, str) else (row[0], others.get(row[0][0], row[1]), row[2]) for row in table]


# fmt: off
# By preset, the flags that it changes for all, for a stage, and for a method or an alignment.
PRESETS: dict[str, dict[str, Flags]] = {
    "laptop": {  # what a laptop does in minutes: the built-in benchmark, small images, fewer epochs and episodes
        "all":         {"dataset": "glyphs", "img_size": 42, "no_flip": True, "crop_scale": [0.5, 1.0], "n_epoch": 10,
                        "val_episodes": 100, "n_episodes": 600, "n_shot": 1, "n_query": 15, "precision": "auto"},
        "meta":        {"episodes_per_epoch": 60},
        "ProtoNet":    {"temperature": 64.0},
        "MatchingNet": {"temperature": 10.0},
        "RelationNet": {"warm_up_epochs": 2},
        "RelationNet_softmax": {"warm_up_epochs": 2},
        "alignment":   {"align_blocks": 0, "aug_size": 20, "record_curve": 10},
    },
    "published_code": {  # what the published code does where our defaults differ
        "all":         {"n_shot": 1, "testing_epochs": 10, "seed": 10},
        "meta":        {"data_aug": False, "episodes_per_epoch": 150, "n_epoch": 600},
    },
    "tuned": {  # chosen on val classes of a fine-grained benchmark: docs/tuning.md
        "all":         {"align_blocks": 1, "aug_size": 20},
        "centroid":    {"align_bn": "eval"},
        "adversarial": {"critic_steps": 1},
    },
    "auto":            {"all": {"aug_size": 20}},  # beside what it chooses
}

# Of update (1) against the critic, which the paper leaves open. Adam's steps do not shrink with the critic's scores: at
# 1e-3, the rate of the other updates, 150 of them destroy the features (docs/tuning.md).
ADVERSARIAL_LR = 1e-5

DECODING: Table = [
    flag("--image_root", Path, None, "folder of a json benchmark's images, when its paths are of another machine"),
    flag("--cache_dir", Path, Path("./fs_benchmarks/.cache"), "decoded images and features, kept between runs"),
    flag("--img_size", number(int, 8), None, "side of the square input, pixels (default: the backbone's own)"),
    flag("--eval_resize", RESIZE_RULE, None,
         "resize images before their centre is taken: published (both sides to 1.15 x --img_size), none, short:N or "
         "both:N, with :bicubic to interpolate so (default: the checkpoint's or backbone's own, else published)"),
    flag("--num_workers", COUNT_OR_0, 4, "threads that decode images, once; the results do not depend on it"),
]

FITTING: Table = [
    flag("--ft_n_epoch", COUNT, 200, "full-batch Adam steps that fit a head on a support set"),
    flag("--ft_lr", POSITIVE, 1e-3, "learning rate of those steps"),
    flag("--ft_s", POSITIVE, 5.0,
         "scale of cosMax and arcMax on a support set (predict.py: 10 where every class has 5 examples, else 5)"),
    flag("--ft_init", ["random", "prototypes"], "random",
         "rows of the head before those steps: random (published) or the means of the classes' unit features"),
]

MACHINE: Table = [
    flag("--device", ["auto", "cpu", "cuda", "mps"], "auto", "what to compute on; auto is cuda, else mps, else cpu"),
    flag("--precision", ["fp32", "bf16", "fp16", "auto"], "fp32",
         "of the backbone; heads and losses stay in fp32; auto is bf16 where the processor or GPU has it, else fp32"),
    flag("--no_keep_memory", SWITCH, False, "return freed memory to the system at once: slower on a CPU, but smaller"),
    flag("--quiet", SWITCH, False, "no progress bars"),
]

SHARED: Table = [
    "data",
    flag("--dataset", str, "miniImagenet", "benchmark, a folder of --benchmarks_dir; glyphs is rendered if missing"),
    flag("--novel_dataset", str, None, "benchmark of the novel classes, if another: cross-domain, such as CUB"),
    flag("--benchmarks_dir", Path, Path("./fs_benchmarks"),
         "where benchmarks live, as <dataset>/{base,val,novel}/<class>/<image> or <dataset>/{base,val,novel}.json"),
    *DECODING,

    "model",
    flag("--backbone", backbone_name, "Conv4", f"{', '.join(BACKBONES)}, {OTHERS_USAGE}, your own code, which is run"),
    flag("--checkpoint_dir", Path, Path("./results/models"), "where stages write checkpoints and look for them"),
    flag("--init_from CHECKPOINT", Path, None, "start from this one, not from the one that the other flags name"),

    "episodes",
    flag("--test_n_way", WAY, 5,
         "classes in a validation or test episode; several: validated on the first, tested on all", nargs="+"),
    flag("--n_shot", COUNT, 5,
         "support images per class, several as --test_n_way; published code: 1", nargs="+"),
    flag("--n_query", COUNT, None,
         f"query images per class (default: {N_QUERY}, as published, or what the smallest class allows)"),
    flag("--n_episodes", COUNT, 600, "test episodes in a testing epoch"),
    flag("--testing_epochs", COUNT, 1, "testing epochs, pooled into one interval; published code: 10"),
    flag("--val_episodes", COUNT, 400, "validation episodes, the same in every epoch; published code draws new ones"),
    flag("--strict_classes", SWITCH, False,
         "refuse classes with fewer images than an episode takes, which are else left out of episodes"),
    flag("--episodes_file", Path, None, "read the novel episodes from this file, or write it when missing"),
    *FITTING,

    "run",
    flag("--seed", COUNT_OR_0, 0,
         "every random number follows from it; several: a run for each; published code: 10", nargs="+"),
    *MACHINE,
    flag("--results_dir", Path, Path("./results"), "where tables/ and logs/ are written"),
    flag("--tensorboard", SWITCH, False, "log for TensorBoard, too: needs pip install tensorboard"),
    flag("--resume", SWITCH, False, "go on from the last state of this run; the result is the same bit for bit"),
    flag("--overwrite", SWITCH, False, "replace an earlier run of the same name"),

    "scale",
    flag("--preset", ["laptop", "published_code"], None,
         "laptop: the demo's scale, minutes on a CPU; published_code: what that does where these defaults differ"),
]

WEIGHTS: Table = [
    "initial weights",
    flag("--weights PATH|DEFAULT|none", str, "none",
         "of a torchvision: or timm: backbone: a state dict file, the library's own (DEFAULT, downloaded) or random"),
]

TRAINING: Table = [
    *WEIGHTS,
    "augmentation",
    flag("--data_aug", flag_value, True,
         "augment the base images in training; published code: False in stage 2", nargs="?", const=True),
    flag("--no_flip", SWITCH, False, "no horizontal flip, for classes that a mirror changes, such as letters"),
    flag("--crop_scale MIN MAX", SHARE, [0.08, 1.0], "area of the random crop, as a share of the image", nargs=2),
]

GRAPHS = flag("--cuda_graphs", SWITCH, False, "on one CUDA GPU: replay each step as one graph; not tried on a GPU yet")

TRANSFER: Table = [
    *SHARED, *TRAINING,
    "base training",
    flag("--method", list(HEADS), "arcMax", "head: linear (softMax), cosine (cosMax), cosine with a margin (arcMax)"),
    flag("--n_epoch", COUNT_OR_0, 600, "epochs over the base classes; 0 tests --init_from, or --weights, as it is"),
    flag("--batch_size", COUNT, 64, "images in a batch, of all processes together if there are several"),
    flag("--sync_bn", SWITCH, False, "on several GPUs: batch norm over the whole batch (PyTorch's SyncBatchNorm)"),
    GRAPHS,
    flag("--lr", POSITIVE, 1e-3, "learning rate of Adam, constant"),
    flag("--s", POSITIVE, 20.0, "scale of cosMax and arcMax on the base classes"),
    flag("--m", MARGIN, 0.01, "angular margin of arcMax on the base classes, radians"),
    flag("--ft_m", MARGIN, 0.01, "angular margin of arcMax on a support set"),
    flag("--train_blocks K", COUNT_OR_0, None,
         "train only the last K blocks, the others frozen, in eval mode; 0: the head, not augmented (default: all)"),
]

META: Table = [
    *SHARED, *TRAINING,
    "episodic training",
    flag("--method", list(META_LEARNERS), "ProtoNet", "the meta-learner"),
    flag("--train_n_way --n_way", WAY, 5, "classes in a training episode"),
    flag("--train_n_query", COUNT, 16, "query images per class in a training episode; --n_query is of the tests"),
    flag("--n_epoch", COUNT_OR_0, 400,
         "epochs (Chen et al., ICLR 2019: 600 at 1 shot, 400 at 5; published code: 600); 0 tests --init_from as it is"),
    flag("--episodes_per_epoch", COUNT, 100, "training episodes in an epoch; published code: 150"),
    flag("--lr", POSITIVE, 1e-3, "learning rate of Adam, constant"),
    flag("--temperature", POSITIVE, 1.0, "divides the learner's logits, such as ProtoNet's squared distances"),
    flag("--warm_up_epochs", COUNT_OR_0, 0, "with --init_from: first epochs, in which the backbone is frozen"),
]

UPDATES: Table = [  # of Algorithms 1 and 2
    flag("--align_preset", ["paper", "tuned", "auto"], "paper",
         "paper: as published; tuned: chosen on val classes, docs/tuning.md; auto: chosen on val for this backbone"),
    flag("--n_B", COUNT, 10, "related base classes per novel class; fewer where n_way * n_B are too many"),
    flag("--related_score", ["vote", "soft"], "vote",
         "share of base images predicted as the novel class (vote: published code) or mean probability (soft: paper)"),
    flag("--align_iters", COUNT_OR_0, 150, "iterations of the updates"),
    flag("--aug_size", COUNT, 50, "related images per novel class in an iteration"),
    flag("--related_draws", ["fewest", "each"], "fewest",
         "how many of them: as the class with the fewest has (fewest: published), or all, repeated where few (each)"),
    flag("--lr", POSITIVE, 1e-3, "learning rate of the three updates, unless given below"),
    flag("--align_lr", NOT_NEGATIVE, None,
         f"learning rate of update (1), the alignment loss (default: --lr; adversarial: {ADVERSARIAL_LR:g})"),
    flag("--related_lr", NOT_NEGATIVE, None, "learning rate of update (2), the head (default: --lr)"),
    flag("--support_lr", NOT_NEGATIVE, None, "learning rate of update (3), the support (default: --lr)"),
    flag("--align_bn", ["train", "eval"], "train", "mode of batch norm in updates (1) and (3)"),
    flag("--align_blocks K", COUNT_OR_0, None,
         "update only the last K blocks, whose inputs --cache_dir keeps; 0: feature space (default: all, published)"),
    flag("--ft_m", MARGIN, 0.001, "angular margin of arcMax when fitted on the support before alignment"),
    flag("--align_s", POSITIVE, 15.0, "scale of cosMax and arcMax during alignment"),
    flag("--align_m", MARGIN, 0.001, "angular margin of arcMax during alignment"),

    "critic of adversarial alignment: constants that the paper leaves open",
    flag("--critic_hidden", COUNT, 1024, "hidden units of the critic"),
    flag("--critic_steps", COUNT, 5, "critic steps before each backbone step"),
    flag("--critic_lr", POSITIVE, 1e-3, "learning rate of the critic's Adam"),
    flag("--critic_constraint", ["clip", "gp"], "clip", "weight clipping or a gradient penalty"),
    flag("--critic_clip", POSITIVE, 0.01, "largest absolute weight under clip"),
    flag("--critic_gp_weight", POSITIVE, 10.0, "weight of the penalty under gp"),
]

ALIGNMENT: Table = [
    *SHARED,
    "alignment",
    flag("--method", list(HEADS), "arcMax", "head: of stage 1's checkpoint and of the novel episodes"),
    flag("--alignment", list(ALIGNMENTS), "centroid",
         "loss: centroid (Algorithm 1), adversarial (2), naive (updates without), head (with --align_blocks 0), none"),
    flag("--test_split", ["novel", "val"], "novel", "classes of the episodes; tune settings on val, never on novel"),
    flag("--record_curve K", COUNT_OR_0, 0, "record the query accuracy after every K iterations; 0 does not"),
    flag("--save_episode I", episode_choice, [0],
         "episodes whose images and features report.html shows: numbers, or median and worst by gain", nargs="+"),
    GRAPHS,
    *UPDATES,
]

PREDICT: Table = [
    "images",
    flag("--support FOLDER", Path, None, "the examples: a subfolder per class, named as the class"),
    flag("--query", Path, None, "the images to label: a folder, subfolders included, or one image"),
    flag("--skip_bad", SWITCH, False, "leave out query images that cannot be decoded, and say which"),
    flag("--background", COLOUR, "white", "what transparent images are laid on: black, white or #rrggbb"),
    flag("--base FOLDER", Path, None,
         "benchmark, or any folder of class/image, of related images; its classes that are yours, too, are left out"),
    *DECODING,

    "model",
    flag("--checkpoint FILE", Path, None, "trained backbone: of stage 1 or 2, or imported"),
    flag("--backbone", backbone_name, None,
         "instead of a checkpoint: torchvision:NAME or timm:NAME with --weights, or custom:MODULE:FUNCTION, own code"),
    *WEIGHTS,

    "classifier",
    flag("--save FILE", Path, None, "keep the classifier, with all that it needs to label images, in this new file"),
    flag("--classifier FILE", Path, None, "label with a classifier of --save, instead of making one"),
    flag("--add FOLDER", Path, None, "more examples of --classifier's classes, or of new ones: a subfolder per class"),
    flag("--correct FILE", Path, None,
         "labels of images in --query, as the page of predictions gives them, or its table, changed: more examples"),
    flag("--export FILE", Path, None, "the classifier as a program that runs without this repository: .onnx or .pt2"),
    flag("--method", list(HEADS), "arcMax", "head that is fitted on the examples"),
    flag("--alignment", ["auto", *ALIGNMENTS], None,
         "default: auto with --base, which chooses head or none by leave-one-out or by other classes, else none; the "
         "others train blocks"),
    *with_defaults([*FITTING, *UPDATES], ft_s=None, ft_init="prototypes", related_draws="each"),

    "output",
    flag("--reject P", number(float, 0, 1), 0.0, "label images whose probability is below P as 'unsure'"),
    flag("--sort", ["name", "sure"], "name", "order of the output: by file name, or the least sure first"),
    flag("--review", SWITCH, False,
         "list the examples that leave-one-out puts into another class, most certain first: wrong labels are there"),
    flag("--copy_to FOLDER", Path, None, "copy each image into FOLDER/LABEL, a new folder"),
    flag("--out", Path, Path("./results/predictions"), "folder of predictions.csv, .json and .html"),
    flag("--resume", SWITCH, False, "go on with the predictions in --out that were stopped"),
    flag("--overwrite", SWITCH, False, "replace what --out holds, and the files of --save and --export"),

    "run",
    flag("--seed", COUNT_OR_0, 0, "every random number follows from it"),
    *MACHINE,
]
# fmt: on
# What `predict.py --help` shows.
EVERYDAY = ["support", "query", "base", "checkpoint", "backbone", "weights", "save", "classifier", "add", "correct"]
EVERYDAY += ["export", "reject", "sort", "review", "copy_to", "out", "overwrite", "device", "quiet"]
# What --classifier does not go with: it brings all of this.
BROUGHT = ["support", "checkpoint", "weights", "img_size", "background", "method", "alignment"]
BROUGHT += [*defaults(FITTING), *defaults(UPDATES)]

STAGES = {
    "transfer": ("transferLearning.py", TRANSFER, "Stage 1: train a backbone on the base classes."),
    "meta": ("metaLearning.py", META, "Stage 2: train a backbone episode by episode on the base classes."),
    "alignment": ("associative_alignment.py", ALIGNMENT, "Stage 3: align novel episodes with related base classes."),
    "predict": ("predict.py", PREDICT, "Label your own images from a few examples per class."),
}


def named(names: Iterable[str], given: Flags) -> str:
    """Those of the names that were given, as flags."""
    return ", ".join(f"--{name}" for name in names if name in given)


def is_new(backbone: str | None, weights: str, checkpoint: Path | None) -> bool:
    """Whether a backbone has random weights."""
    return weights == "none" and not checkpoint and not (backbone or "").startswith("custom:")


# Flags of a stage that take several values, each of which is a run.
SEVERAL = ("seed", "test_n_way", "n_shot")


def several(flags: Flags, *names: str) -> list[tuple[int, ...]]:
    """Every combination of the values of these flags, each once."""
    values = [flags[name] if isinstance(flags[name], list) else [flags[name]] for name in names]
    return list(dict.fromkeys(itertools.product(*values)))


# fmt: off
# What flags may not be, and the line that says so. A condition takes flags by name, and those `given`; it is left out
# for a stage that has not all of them, and what it returns is {found} in the line.
CONDITIONS: list[tuple[Callable[..., Any], str]] = [
    (lambda crop_scale: crop_scale and crop_scale[0] > crop_scale[1],
     "argument --crop_scale: {crop_scale[0]:g} {crop_scale[1]:g} is not in order"),
    (lambda classifier, given: classifier and named(BROUGHT, given),
     "argument --classifier: it was made with its own {found}: leave that out"),
    (lambda classifier, add, correct, given: classifier and not add and not correct and named(("base", "save"), given),
     "argument --classifier: it was made with its own {found}: leave that out, or let it grow by --add or --correct"),
    (lambda classifier, add, correct, given: not classifier and named(("add", "correct"), given),
     "argument {found}: name the classifier that is to grow with --classifier"),
    (lambda correct, query: correct and not query,
     "argument --correct: name the folder of the images that it corrects with --query"),
    (lambda classifier, support: not classifier and not support,
     "name the examples with --support FOLDER, or a kept classifier with --classifier FILE"),
    (lambda query, save, export: not query and not save and not export,
     "name the images to label with --query, or a file to write the classifier to with --save or --export"),
    (lambda query, copy_to: copy_to and not query, "argument --copy_to: name the images to copy with --query"),
    (lambda resume, overwrite: resume and overwrite, "argument --overwrite: not allowed with argument --resume"),
    (lambda weights, given: weights != "none" and named(("init_from", "checkpoint"), given),
     "argument --weights: {found} brings its own weights, so give only one of the two"),
    (lambda weights, backbone: weights != "none" and not (backbone or "").startswith(("torchvision:", "timm:")),
     "argument --weights: of --backbone torchvision:NAME or timm:NAME alone, not of {backbone}"),
    (lambda train_blocks, n_epoch, backbone, weights, init_from:
        (train_blocks is not None or n_epoch == 0) and is_new(backbone, weights, init_from),
     "--train_blocks and --n_epoch 0 take a trained backbone: give --init_from or --weights"),
    (lambda backbone, weights, checkpoint, classifier: is_new(backbone, weights, checkpoint or classifier),
     "no trained backbone: give --checkpoint FILE (made by 'make demo', by transferLearning.py, or by 'python -m "
     "persistence.import_checkpoint FILE OUT' of a published file), or torchvision's ImageNet weights, --backbone "
     "torchvision:resnet18 --weights DEFAULT"),
    (lambda episodes_file, test_n_way, n_shot: episodes_file and len(several(
        {"test_n_way": test_n_way, "n_shot": n_shot}, "test_n_way", "n_shot")) > 1,
     "argument --episodes_file: it holds episodes of one way and shot: give one --test_n_way and --n_shot"),
    (lambda align_preset, support: align_preset == "auto",
     "argument --align_preset: auto is of associative_alignment.py; here --alignment auto chooses"),
    (lambda align_preset, test_split: align_preset == "auto" and test_split == "val",
     "argument --align_preset: auto chooses on val classes, so it is not tested on them: give novel"),
    (lambda align_preset, given: align_preset == "auto" and given.get("align_blocks"),
     "argument --align_preset: auto chooses --align_blocks itself: give 0, for feature space alone, or leave it out"),
    (lambda align_preset, given: align_preset == "auto" and named(CHOSEN_FLAGS, given),
     "argument --align_preset: auto chooses {found} itself: give only one of the two"),
    (lambda alignment, base: alignment not in ("none", None) and not base,
     "argument --alignment: {alignment} takes related images from a base set: name it with --base, such as "
     "fs_benchmarks/miniImagenet or any folder of class/image, or give --alignment none"),
    (lambda alignment, align_blocks: alignment in ("head", "auto") and align_blocks != 0,
     "argument --alignment: in {alignment} nothing but the head moves: give --align_blocks 0 as well"),
    (lambda alignment, align_blocks: alignment not in ("head", "auto", "none", None) and align_blocks == 0,
     "argument --alignment: {alignment} moves blocks: give --align_blocks 1 or more, or --alignment head"),
]
# fmt: on


def stage_parser(stage: str, help_all: bool = True) -> OneLineParser:
    """The parser of a stage, whose namespace holds what was given; help_all: predict's help shows all flags."""
    prog, table, description = STAGES[stage]
    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if stage == "predict":
        parser.add_argument("--help_all", action="help", help="show all flags, not only these, and exit")
    group: argparse._ActionsContainer = parser
    for row in table:
        if isinstance(row, str):
            group = parser.add_argument_group(row)
        else:
            names, default, options = row
            shown = help_all or stage != "predict" or names[0] in EVERYDAY
            said = "" if default is None or default is False else f" (default: {default})"
            text = options["help"] + said if shown else argparse.SUPPRESS
            group.add_argument(*(f"--{name}" for name in names), **options | {"help": text})
    return parser


def refuse(words: Sequence[str], stage: str, parser: OneLineParser) -> None:
    """An error for words that are no flags of a stage: whose they are, or which flag was meant."""
    name = words[0].split("=")[0]
    scripts = [script for script, table, _ in STAGES.values() if name in [f"--{own}" for own in defaults(table)]]
    if scripts:
        parser.error(f"{name} belongs to {' and '.join(scripts)}")
    near = difflib.get_close_matches(name, [f"--{own}" for own in defaults(STAGES[stage][1])], 1)
    parser.error(f"{name}: did you mean {near[0]}?" if near else f"unrecognized arguments: {' '.join(words)}")


def preset_flags(flags: Flags, preset: str | None, *parts: str) -> Flags:
    """Those flags which a preset changes for all, or for these parts: a stage, a method, an alignment."""
    changes = PRESETS.get(preset or "", {})
    return {name: value for part in ("all", *parts) for name, value in changes.get(part, {}).items() if name in flags}


def feature_space_flags(stage: str, flags: Flags) -> Flags:
    """In feature space the default is `head`, or `auto` of predict.py, which aligns there unless blocks are named."""
    if not flags.get("base", stage == "alignment"):
        return {}
    names_blocks = flags["align_blocks"] is not None or flags["alignment"] not in (None, "head", "auto")
    in_feature_space = flags["align_blocks"] == 0 or (stage == "predict" and not names_blocks)
    return {"align_blocks": 0, "alignment": "auto" if stage == "predict" else "head"} if in_feature_space else {}


def complete(stage: str, flags: Flags) -> None:
    """Fill in what follows from other flags, and what a stage leaves out that all have."""
    if stage == "meta" and not flags["init_from"]:
        flags["warm_up_epochs"] = 0  # a new backbone has nothing to keep
    flags.setdefault("crop_scale", None)  # nothing is augmented
    if "align_lr" in flags:
        common = {"align_lr": ADVERSARIAL_LR if flags["alignment"] == "adversarial" else flags["lr"]}
        common |= dict.fromkeys(("related_lr", "support_lr"), flags["lr"])
        flags |= {rate: value for rate, value in common.items() if flags[rate] is None}
    if stage == "predict":
        flags["record_curve"] = 0
        if not flags["classifier"]:
            flags["alignment"] = flags["alignment"] or ("centroid" if flags["base"] else "none")
    else:
        flags["novel_dataset"] = flags["novel_dataset"] or flags["dataset"]


def stage_runs(stage: str, argv: Sequence[str] | None = None) -> Iterator[argparse.Namespace]:
    """The runs that a command line asks for, in order: of each seed one, and one more for each other way or shot.

    Those take the backbone of the first: they test what stage 1 or 2 has trained, or align the same checkpoint. Raises
    UserError as parse_flags does.
    """
    flags = parse_flags(stage, argv)
    if stage == "predict":
        yield argparse.Namespace(**flags)
        return
    runs = several(flags, *SEVERAL)
    first = runs[0][1:]
    for seed, *task in runs:
        one = argparse.Namespace(**flags | dict(zip(SEVERAL, (seed, *task), strict=True)))
        trains = stage != "alignment" and one.n_epoch
        if tuple(task) != first and (trains or (stage == "alignment" and not one.init_from)):
            name = dataclasses.replace(from_flags(RunName, one), test_n_way=first[0], n_shot=first[1])
            one.init_from = best_model(name, one.checkpoint_dir)
            if trains:
                one.n_epoch, one.weights = 0, "none"
        yield one


def args_parser(stage: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of the first run that a command line asks for. Raises UserError as parse_flags does."""
    return next(stage_runs(stage, argv))


def parse_flags(stage: str, argv: Sequence[str] | None = None) -> Flags:
    """Parse the command line of a stage: defaults, then --preset, then --align_preset, then what was given.

    Raises UserError for an unknown flag, a value out of range, or flags that do not go together.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = stage_parser(stage, "--help_all" in argv)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse(unknown, stage, parser)
    given = vars(namespace)
    flags = defaults(STAGES[stage][1]) | given
    flags |= preset_flags(flags, flags.get("preset"), stage, flags["method"]) | given
    flags |= preset_flags(flags, flags.get("align_preset"), flags.get("alignment") or "centroid") | given
    flags |= feature_space_flags(stage, flags) | given
    complete(stage, flags)
    values = flags | {"given": given}
    for condition, line in CONDITIONS:
        names = inspect.signature(condition).parameters
        if values.keys() >= names.keys() and (found := condition(**{name: values[name] for name in names})):
            parser.error(line.format(**values, found=found))
    if not flags["img_size"] and not (flags.get("checkpoint") or flags.get("classifier")):  # which know theirs
        try:
            flags["img_size"] = native_img_size(flags["backbone"])
        except ValueError as error:
            parser.error(f"argument --backbone: {error}")
    return flags


def choose_n_query(args: argparse.Namespace) -> None:
    """Fill in --n_query where it is not given: as published, or what the smallest class of the episodes allows.

    A class without any image beside its support does not count. Raises UserError when a split is missing.
    """
    options, tested = from_flags(DataOptions, args), [(args.novel_dataset, getattr(args, "test_split", "novel"))]
    tested += [(args.dataset, "val")] if getattr(args, "n_epoch", 0) else []
    list_split(options, args.dataset, "base")  # if it is missing, that is said first
    listed = [(split, list_split(options, dataset, split)) for dataset, split in tested]
    counts = [(n, f"class {names[c]!r} of {split}") for split, (names, _, y) in listed for c, n in Counter(y).items()]
    n, smallest = min((each for each in counts if each[0] > args.n_shot), default=(N_QUERY + args.n_shot, ""))
    args.n_query = min(N_QUERY, n - args.n_shot)
    if args.n_query < N_QUERY:
        print(f"note: --n_query {args.n_query}, fewer than the published {N_QUERY}: {smallest} has {n} images")


def run_stage(stage: str, main: Callable[[argparse.Namespace, Run], None]) -> None:
    """Run the main of a stage once for each run that the command line asks for, of this rank among those of torchrun.

    The flags name the precision that `auto` has become.
    """
    ranks = join_ranks()
    for args in stage_runs(stage):
        args.quiet |= not ranks.first
        graphs = getattr(args, "cuda_graphs", False)
        run = start_run(ranks, args.device, args.precision, args.seed, args.quiet, args.no_keep_memory, graphs)
        args.precision = run.precision.name
        if args.n_query is None:
            with rank_0_first(ranks):
                choose_n_query(args)
        main(args, run)


def stage_files(stage: str, args: argparse.Namespace) -> RunFiles:
    """The files of stage 1 or 2."""
    script, name, folders = STAGES[stage][0], from_flags(RunName, args), from_flags(Folders, args)
    return training_files(script.removesuffix(".py"), name, folders, vars(args), trains=args.n_epoch > 0)


def from_flags(cls: type[T], args: argparse.Namespace) -> T:
    """A dataclass, and those in its fields, filled from flags of the same names. Every field must be one."""
    values: Flags = {}
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            values[name] = from_flags(kind, args)  # type: ignore[arg-type]
        else:
            value = getattr(args, name)
            values[name] = tuple(value) if get_origin(kind) is tuple else value
    return cls(**values)
