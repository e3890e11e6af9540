"""The one argparse config of the stages and of predict.py: edit the defaults here, or give flags on the command line.

Defaults are the published protocol but for those that `--preset published_code` gives. Where the paper and its
published code differ, the help says which is followed. `--preset laptop` swaps in the demo's scale. Flags given beside
a preset still win, as beside --align_preset tuned.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from engine.distributed import join_ranks
from engine.errors import OneLineParser
from engine.run import Run, start_run
from methods.alignment import ALIGNMENTS
from methods.meta_learners import META_LEARNERS
from methods.setting_choice import CHOSEN_FLAGS
from models import BACKBONES, HEADS, OTHERS, OTHERS_USAGE, native_img_size
from persistence.run_files import Folders, RunFiles, RunName, training_files

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


# 1e30 keeps any arithmetic on a rate or a scale within float32.
POSITIVE, NOT_NEGATIVE = number(float, 0, 1e30, open_low=True), number(float, 0, 1e30)
COUNT, COUNT_OR_0, WAY = number(int, 1), number(int, 0), number(int, 2)
SHARE, MARGIN = number(float, 0, 1, open_low=True), number(float, 0)
SWITCH, REQUIRED, EITHER = "no value: given or not", "no default: must be given", "one of the flags that follow"

Flag = tuple[list[str], dict[str, Any]]  # names, and the other arguments of argparse's add_argument
Table = list[str | Flag]  # a string begins a group of that title


def flag(usage: str, kind: Any, default: Any, text: str, **options: Any) -> Flag:
    """A row of a table: names and metavars; a type, list of choices or SWITCH; a default or REQUIRED; the help."""
    names = [word for word in usage.split() if word.startswith("--")]
    metavars = usage.split()[len(names) :]
    hidden = default is None or default is False or default is REQUIRED
    options["help"] = text if hidden else f"{text} (default: %(default)s)"
    if kind is SWITCH:
        return names, options | {"action": "store_true"}
    options |= {"choices" if isinstance(kind, list) else "type": kind}
    options |= {"required": True} if default is REQUIRED else {"default": default}
    if metavars:
        options["metavar"] = metavars[0] if len(metavars) == 1 else tuple(metavars)
    return names, options


# fmt: off
# What a laptop does in minutes: the built-in benchmark, small images, fewer epochs and episodes.
LAPTOP: dict[str, dict[str, Any]] = {
    "all":         {"dataset": "glyphs", "img_size": 42, "no_flip": True, "crop_scale": [0.5, 1.0],
                    "n_epoch": 10, "val_episodes": 100, "n_shot": 1, "n_query": 15, "precision": "auto"},
    "transfer":    {"n_episodes": 600},
    "meta":        {"n_episodes": 600, "episodes_per_epoch": 60},
    "ProtoNet":    {"temperature": 64.0},
    "MatchingNet": {"temperature": 10.0},
    "RelationNet": {"warm_up_epochs": 2},
    "RelationNet_softmax": {"warm_up_epochs": 2},
    "alignment":   {"n_episodes": 600, "align_blocks": 0, "aug_size": 20, "record_curve": 10},
}

# What the published code does where our defaults differ.
PUBLISHED_CODE: dict[str, dict[str, Any]] = {
    "all":         {"n_shot": 1, "testing_epochs": 10, "seed": 10},
    "meta":        {"data_aug": False, "episodes_per_epoch": 150, "n_epoch": 600},
}
PRESETS = {"laptop": LAPTOP, "published_code": PUBLISHED_CODE}

# Chosen on the val classes of a fine-grained benchmark, the cheaper of settings about as good: see docs/tuning.md.
TUNED: dict[str, dict[str, Any]] = {
    "all":         {"align_blocks": 1, "aug_size": 20},
    "centroid":    {"align_bn": "eval"},
    "adversarial": {"critic_steps": 1},
}

# Of the backbone's step against the critic, which the paper leaves open. Adam's steps do not shrink with the critic's
# scores: at 1e-3, the rate of the other updates, 150 of them destroy the features (docs/tuning.md).
ADVERSARIAL_LR = 1e-5

NATIVE_SIZES = ", ".join(f"{name} {native_img_size(name)}" for name in BACKBONES)
TUNED_FLAGS = "; ".join(" ".join([name, *(f"--{f} {v}" for f, v in flags.items())]) for name, flags in TUNED.items())

DECODING = [
    flag("--image_root",           Path,                            None,
         "folder of the images that a json benchmark lists, when the paths in it are those of another machine"),
    flag("--cache_dir",            Path,                            None,
         "where decoded images and features are kept between runs (default: fs_benchmarks/.cache)"),
    flag("--rebuild_cache",        SWITCH,                          False,
         "decode all images anew, though the cache has them: after a change that their sizes and times do not show"),
    flag("--img_size",             number(int, 8),                  None,
         f"side of the square input, pixels (default: the backbone's own, {NATIVE_SIZES}, or what its library says)"),
    flag("--num_workers",          COUNT_OR_0,                      4,
         "threads that decode images, once; the results do not depend on it"),
]

FITTING = [
    flag("--ft_n_epoch",           COUNT,                           200,
         "full-batch Adam steps that fit a head on a support set"),
    flag("--ft_lr",                POSITIVE,                        1e-3,
         "learning rate of those steps"),
    flag("--ft_s",                 POSITIVE,                        5.0,
         "scale of cosMax and arcMax on a support set"),
]

MACHINE = [
    flag("--seed",                 COUNT_OR_0,                      0,
         "every random number follows from it; published code: 10"),
    flag("--device",               ["auto", "cpu", "cuda", "mps"],  "auto",
         "what to compute on; auto is cuda, else mps, else cpu"),
    flag("--precision",            ["fp32", "bf16", "fp16", "auto"], "fp32",
         "of the backbone's forward and backward pass; heads and losses stay in fp32; auto is bf16 where the processor "
         "or GPU has units for it, else fp32"),
    flag("--no_keep_memory",       SWITCH,                          False,
         "let the C library return freed memory to the system at once: slower on a CPU, smaller between batches"),
    flag("--quiet",                SWITCH,                          False,
         "no progress bars"),
]

SHARED: Table = [
    "data",
    flag("--dataset",              str,                             "miniImagenet",
         "folder name of the benchmark in --benchmarks_dir; 'glyphs' is built in and rendered when missing"),
    flag("--novel_dataset",        str,                             None,
         "benchmark of the novel classes when it is not --dataset: the cross-domain experiment, such as CUB"),
    flag("--benchmarks_dir",       Path,                            Path("./fs_benchmarks"),
         "where benchmarks live, as <dataset>/{base,val,novel}/<class>/<image> or <dataset>/{base,val,novel}.json"),
    *DECODING,

    "model",
    flag("--backbone",             backbone_name,                   "Conv4",
         f"{', '.join(BACKBONES)}; any image model of a library without its classifier, torchvision:resnet50, "
         "timm:vit_small_patch16_224 (pip install timm); or custom:MODULE:FUNCTION, what FUNCTION() of your own module "
         "makes: that code is run, and no checkpoint runs it unasked"),
    flag("--checkpoint_dir",       Path,                            Path("./results/models"),
         "where checkpoints are written by one stage and looked for by the next"),
    flag("--init_from CHECKPOINT", Path,                            None,
         "start from this checkpoint instead of the one that the other flags name"),

    "episodes",
    flag("--test_n_way",           WAY,                             5,
         "classes in a validation or test episode"),
    flag("--n_shot",               COUNT,                           5,
         "support images a class; published code: 1"),
    flag("--n_query",              COUNT,                           50,
         "query images a class"),
    flag("--n_episodes",           COUNT,                           600,
         "test episodes in a testing epoch"),
    flag("--testing_epochs",       COUNT,                           1,
         "testing epochs, whose testing_epochs x n_episodes episodes are pooled into one interval; published code: 10"),
    flag("--val_episodes",         COUNT,                           400,
         "validation episodes, the same ones after each epoch; published code draws them anew, which no flag does"),
    flag("--episodes_file",        Path,                            None,
         "read the novel episodes from this file, or write it when missing: to compare methods on the same episodes"),
    *FITTING,

    "run",
    *MACHINE,
    flag("--results_dir",          Path,                            Path("./results"),
         "where tables/ and logs/ are written"),
    flag("--tensorboard",          SWITCH,                          False,
         "write the numbers of metrics.jsonl for TensorBoard too, beside that file: needs pip install tensorboard"),
    EITHER,
    flag("--resume",               SWITCH,                          False,
         "go on from the last state of this run, if there is one; the result is bit for bit that of one run"),
    flag("--overwrite",            SWITCH,                          False,
         "replace an earlier run of the same name"),

    "scale",
    flag("--preset",               list(PRESETS),                   None,
         "laptop: the demo's scale, built-in benchmark, 42 pixels, minutes on a CPU; published_code: what the "
         "published code does where these defaults differ, but for the validation episodes that it draws anew"),
]

WEIGHTS: Table = [
    "initial weights",
    flag("--weights PATH|DEFAULT|none", str,                        "none",
         "of a torchvision: or timm: backbone: a state dict file, the library's own (DEFAULT, downloaded) or random"),
]

TRAINING: Table = [
    *WEIGHTS,
    "augmentation",
    flag("--data_aug",             flag_value,                      True,
         "augment the base images while training; published code: False in stage 2", nargs="?", const=True),
    flag("--no_flip",              SWITCH,                          False,
         "no horizontal flip, for classes that a mirror changes, such as letters"),
    flag("--crop_scale MIN MAX",   SHARE,                           [0.08, 1.0],
         "area of the random crop, as a share of the image", nargs=2),
]

TRANSFER: Table = [
    *SHARED, *TRAINING,
    "base training",
    flag("--method",               list(HEADS),                     "arcMax",
         "head: a linear layer (softMax), scaled cosine (cosMax) or cosine with an angular margin (arcMax)"),
    flag("--n_epoch",              COUNT_OR_0,                      600,
         "epochs over the base classes; 0 tests --init_from, or --weights, as it is"),
    flag("--batch_size",           COUNT,                           64,
         "images in a step, of all processes together if there are several"),
    flag("--sync_bn",              SWITCH,                          False,
         "with several processes: batch norm over the whole batch, as one process has it, not over each one's part"),
    flag("--lr",                   POSITIVE,                        1e-3,
         "learning rate of Adam, constant"),
    flag("--n_base_class",         COUNT,                           None,
         "number of base classes; found from the data, and checked against it when given"),
    flag("--s",                    POSITIVE,                        20.0,
         "scale of cosMax and arcMax on the base classes"),
    flag("--m",                    MARGIN,                          0.01,
         "angular margin of arcMax on the base classes, radians"),
    flag("--ft_m",                 MARGIN,                          0.01,
         "margin of arcMax on a support set"),
    flag("--train_blocks K",       COUNT_OR_0,                      None,
         "train only the last K blocks of a trained backbone, the others frozen, in eval mode; 0: the head alone, on "
         "features that --cache_dir keeps, without augmentation (default: all, published)"),
]

META: Table = [
    *SHARED, *TRAINING,
    "episodic training",
    flag("--method",               list(META_LEARNERS),             "ProtoNet",
         "the meta-learner"),
    flag("--train_n_way --n_way",  WAY,                             5,
         "classes in a training episode"),
    flag("--train_n_query",        COUNT,                           16,
         "query images a class in a training episode; --n_query is for validation and test"),
    flag("--n_epoch",              COUNT_OR_0,                      400,
         "epochs (Chen et al., ICLR 2019: 600 at 1 shot, 400 at 5; published code: 600); 0 tests --init_from as it is"),
    flag("--episodes_per_epoch",   COUNT,                           100,
         "training episodes in an epoch; published code: 150"),
    flag("--lr",                   POSITIVE,                        1e-3,
         "learning rate of Adam, constant"),
    flag("--temperature",          POSITIVE,                        1.0,
         "divides the learner's logits, such as ProtoNet's squared distances; published: 1"),
    flag("--warm_up_epochs",       COUNT_OR_0,                      0,
         "with --init_from: the first epochs, in which the backbone stands still and the learner's own module learns; "
         "published: 0"),
]

UPDATES: Table = [  # of Algorithms 1 and 2
    flag("--align_preset",         ["paper", "tuned", "auto"],      "paper",
         f"numbers of the updates: as published; chosen once on val classes (tuned, docs/tuning.md: {TUNED_FLAGS}); or "
         "chosen for this backbone on val episodes, in feature space, fine-tuning if none helps (auto)"),
    flag("--n_B",                  COUNT,                           10,
         "related base classes a novel class; if n_way * n_B are too many, shared out evenly (published code fails)"),
    flag("--related_score",        ["vote", "soft"],                "vote",
         "share of base images predicted as the novel class (vote: published code) or mean probability (soft: paper)"),
    flag("--align_iters",          COUNT_OR_0,                      150,
         "iterations of the updates"),
    flag("--aug_size",             COUNT,                           50,
         "related images a novel class in an iteration"),
    flag("--lr",                   POSITIVE,                        1e-3,
         "learning rate of the three updates, unless given below"),
    flag("--align_lr",             NOT_NEGATIVE,                    None,
         f"learning rate of update (1), the alignment loss (default: --lr; adversarial: {ADVERSARIAL_LR:g})"),
    flag("--related_lr",           NOT_NEGATIVE,                    None,
         "learning rate of update (2), the head (default: --lr)"),
    flag("--support_lr",           NOT_NEGATIVE,                    None,
         "learning rate of update (3), the support (default: --lr)"),
    flag("--align_bn",             ["train", "eval"],               "train",
         "mode of batch norm in updates (1) and (3)"),
    flag("--align_blocks K",       COUNT_OR_0,                      None,
         "update only the last K blocks, whose inputs --cache_dir keeps; 0: feature space (default: all, published)"),
    flag("--ft_m",                 MARGIN,                          0.001,
         "margin of arcMax when fitted on the support before alignment"),
    flag("--align_s",              POSITIVE,                        15.0,
         "scale of cosMax and arcMax during alignment"),
    flag("--align_m",              MARGIN,                          0.001,
         "margin of arcMax during alignment"),

    "critic of adversarial alignment: constants that the paper leaves open",
    flag("--critic_hidden",        COUNT,                           1024,
         "hidden units of the critic"),
    flag("--critic_steps",         COUNT,                           5,
         "critic steps before each backbone step"),
    flag("--critic_lr",            POSITIVE,                        1e-3,
         "learning rate of the critic's Adam"),
    flag("--critic_constraint",    ["clip", "gp"],                  "clip",
         "what bounds the critic's slope: weight clipping or a gradient penalty"),
    flag("--critic_clip",          POSITIVE,                        0.01,
         "largest absolute weight under clip"),
    flag("--critic_gp_weight",     POSITIVE,                        10.0,
         "weight of the penalty under gp"),
]

ALIGNMENT: Table = [
    *SHARED,
    "alignment",
    flag("--method",               list(HEADS),                     "arcMax",
         "head: of stage 1's checkpoint and of the novel episodes"),
    flag("--alignment",            list(ALIGNMENTS),                "centroid",
         "loss: centroid (Algorithm 1), adversarial (2), naive (updates without), head (with --align_blocks 0), none"),
    flag("--test_split",           ["novel", "val"],                "novel",
         "classes of the episodes; settings are tuned on val, never on novel"),
    flag("--record_curve K",       COUNT_OR_0,                      0,
         "record the query accuracy after every K iterations, to see whether more help or hurt; 0 does not"),
    flag("--save_episode I",       COUNT_OR_0,                      [0],
         "the episodes whose images, features and related base images are kept in episodes/, to be looked into in "
         "report.html; the figures draw the first", nargs="+"),
    *UPDATES,
]

PREDICT: Table = [
    "images",
    flag("--support FOLDER",       Path,                            None,
         "the examples: a subfolder a class, named as the class, with 1 or more images each, in any number"),
    flag("--query",                Path,                            None,
         "the images to label: a folder, subfolders included, or one image"),
    flag("--skip_bad",             SWITCH,                          False,
         "leave out query images that cannot be decoded, and say which"),
    flag("--base FOLDER",          Path,                            None,
         "benchmark, or any folder of class/image: alignment takes related images from it, but of no class that the "
         "support has too, or that shares an image with support or query"),
    *DECODING,

    "model",
    flag("--checkpoint FILE",      Path,                            None,
         "trained backbone: of stage 1 or 2, or imported"),
    flag("--backbone",             backbone_name,                   None,
         "instead of a checkpoint, in which it is found: torchvision:NAME or timm:NAME with --weights DEFAULT or a "
         "file, or custom:MODULE:FUNCTION, code of your own, which is run"),
    *WEIGHTS,

    "classifier",
    flag("--save FILE",            Path,                            None,
         "keep the classifier, with all that it needs to label images, in this new file"),
    flag("--classifier FILE",      Path,                            None,
         "label with a classifier of --save, instead of --support, --base and all that it was made with"),
    flag("--method",               list(HEADS),                     "arcMax",
         "head that is fitted on the examples"),
    flag("--alignment",            list(ALIGNMENTS),                None,
         "alignment with related base images (default: with --base head, in feature space, else none); centroid, "
         "adversarial and naive move the blocks of --align_blocks"),
    *FITTING, *UPDATES,

    "output",
    flag("--reject P",             number(float, 0, 1),             0.0,
         "label images whose probability is below P as 'unsure'"),
    flag("--sort",                 ["name", "sure"],                "name",
         "order of the csv and the contact sheet: by file name, or the least sure first"),
    flag("--copy_to FOLDER",       Path,                            None,
         "copy each image into FOLDER/LABEL, a new or empty folder"),
    flag("--out",                  Path,                            Path("./results/predictions"),
         "folder of predictions.csv, predictions.json, predictions.html and contact_sheet.png"),
    flag("--max_sheet",            COUNT,                           48,
         "query images on the contact sheet, in the order of the csv"),
    EITHER,
    flag("--resume",               SWITCH,                          False,
         "go on with the predictions in --out that were stopped"),
    flag("--overwrite",            SWITCH,                          False,
         "replace the predictions that --out holds, and the file of --save"),

    "run",
    *MACHINE,
]
# What --classifier does not go with: it brings all of this.
BROUGHT = ["support", "base", "save", "checkpoint", "weights", "img_size"]
# fmt: on

STAGES = {
    "transfer": ("transferLearning.py", TRANSFER, "Stage 1: train a backbone on the base classes."),
    "meta": ("metaLearning.py", META, "Stage 2: train a backbone episode by episode on the base classes."),
    "alignment": ("associative_alignment.py", ALIGNMENT, "Stage 3: align novel episodes with related base classes."),
    "predict": ("predict.py", PREDICT, "Label your own images from a few examples a class."),
}


def stage_parser(stage: str, parser_class: type[OneLineParser] = OneLineParser) -> OneLineParser:
    """The parser of a stage's flags."""
    prog, table, description = STAGES[stage]
    parser = parser_class(prog=prog, description=description, allow_abbrev=False)
    group: argparse._ActionsContainer = parser
    for row in table:
        if isinstance(row, str):
            group = group.add_mutually_exclusive_group() if row is EITHER else parser.add_argument_group(row)
        else:
            group.add_argument(*row[0], **row[1])
    return parser


def given_flags(names: Sequence[str], argv: Sequence[str]) -> list[str]:
    """Those of the names which are on the command line, as flags."""
    given = {text.split("=")[0] for text in argv}
    return [f"--{name}" for name in names if f"--{name}" in given]


def flag_names(*tables: Table) -> list[str]:
    """The names of the flags of tables, without the dashes."""
    return [row[0][0].removeprefix("--") for table in tables for row in table if not isinstance(row, str)]


def check_classifier(args: argparse.Namespace, parser: OneLineParser, argv: Sequence[str]) -> None:
    """An error when --classifier is given beside what it brings, or without a query."""
    names = [*BROUGHT, "method", "alignment", *flag_names([*FITTING], UPDATES)]
    both = given_flags(names, argv)
    if both:
        parser.error(f"argument --classifier: it was made with its own {', '.join(both)}: leave that out")
    if not args.query:
        parser.error("argument --classifier: name the images that it is to label with --query")


def complete_predict(args: argparse.Namespace, parser: OneLineParser) -> None:
    """Fill in what the flags of predict.py leave open; an error when they name no trained backbone or no base set."""
    args.record_curve = 0
    if args.classifier:
        return
    if not args.support:
        parser.error("name the examples with --support FOLDER, or a kept classifier with --classifier FILE")
    if not (args.query or args.save):
        parser.error("name the images to label with --query, or a file to keep the classifier in with --save FILE")
    if not args.checkpoint and args.weights == "none" and not (args.backbone or "").startswith("custom:"):
        parser.error(
            "no trained backbone: give --checkpoint FILE (made by 'make demo', by transferLearning.py, or by "
            "'python -m persistence.import_published FILE OUT' of a published file), or torchvision's ImageNet "
            "weights, --backbone torchvision:resnet18 --weights DEFAULT"
        )
    args.alignment = args.alignment or ("centroid" if args.base else "none")
    if args.alignment != "none" and not args.base:
        parser.error(
            f"argument --alignment: {args.alignment} takes related images from a base set: name it with --base, "
            "such as fs_benchmarks/miniImagenet or any folder of class/image, or give --alignment none"
        )


def check_feature_space(args: argparse.Namespace, parser: OneLineParser) -> None:
    """An error when flags of feature space and of blocks contradict each other."""
    if args.alignment == "head" and args.align_blocks != 0:
        parser.error("argument --alignment: in head nothing but the head moves: give --align_blocks 0 as well")
    if args.align_blocks == 0 and args.alignment not in ("head", "none", None):
        parser.error(
            f"argument --alignment: {args.alignment} moves blocks: give --align_blocks 1 or more, or --alignment head"
        )


def check_weights(stage: str, args: argparse.Namespace, parser: OneLineParser) -> None:
    """An error when weights are of no library, or a backbone is to be frozen or tested that has not been trained."""
    if "weights" in args and args.weights != "none":
        checkpoint = "checkpoint" if stage == "predict" else "init_from"
        if getattr(args, checkpoint):
            parser.error(f"argument --weights: --{checkpoint} brings its own weights, so give only one of the two")
        if not args.backbone:
            parser.error("argument --weights: name the model too, such as --backbone torchvision:resnet18")
        if not args.backbone.startswith(("torchvision:", "timm:")):
            parser.error(f"argument --weights: it is for torchvision:NAME and timm:NAME, not for {args.backbone}")
    if "train_blocks" in args:
        is_new = args.weights == "none" and not args.init_from and not args.backbone.startswith("custom:")
        if args.train_blocks is not None and is_new:
            parser.error("argument --train_blocks: needs a trained backbone: give --init_from or --weights")
        if not args.n_epoch and is_new:
            parser.error("argument --n_epoch: 0 tests a trained backbone: give --init_from or --weights")


def check_auto(args: argparse.Namespace, parser: OneLineParser, argv: Sequence[str]) -> None:
    """An error when --align_preset auto is given where it cannot choose, or beside a flag that it chooses."""
    if not getattr(args, "base", args):
        parser.error("argument --align_preset: auto chooses on val episodes of a benchmark: name it with --base")
    if getattr(args, "test_split", "") == "val":
        parser.error("argument --align_preset: auto chooses on val classes, so it is not tested on them: give novel")
    both = given_flags(CHOSEN_FLAGS, argv)
    if both:
        parser.error(f"argument --align_preset: auto chooses {', '.join(both)} itself: give only one of the two")


def default_to_feature_space(stage: str, chosen: argparse.Namespace, parser: OneLineParser) -> None:
    """Let predict.py align in feature space unless an alignment of blocks is named; there, `head` is the default."""
    if stage == "predict" and chosen.base and chosen.align_blocks is None:
        if chosen.alignment in (None, "head"):
            parser.set_defaults(align_blocks=0)
            chosen.align_blocks = 0
    in_feature_space = "align_blocks" in chosen and chosen.align_blocks == 0
    if in_feature_space and (stage != "predict" or chosen.base):
        parser.set_defaults(alignment="head")


def args_parser(
    stage: str, argv: Sequence[str] | None = None, parser_class: type[OneLineParser] = OneLineParser
) -> argparse.Namespace:
    """Parse the command line of a stage; a value out of range ends the process with one line and status 2."""
    parser, argv = stage_parser(stage, parser_class), sys.argv[1:] if argv is None else argv
    chosen, _ = parser.parse_known_args(argv)
    if "preset" in chosen and chosen.preset:
        preset = PRESETS[chosen.preset]
        preset = preset["all"] | preset.get(stage, {}) | preset.get(chosen.method, {})
        parser.set_defaults(**{name: value for name, value in preset.items() if name in chosen})
    if "align_preset" in chosen and chosen.align_preset == "tuned":
        # predict.py leaves the alignment open until it knows of a base set, with which it is centroid.
        parser.set_defaults(**TUNED["all"], **TUNED.get(chosen.alignment or "centroid", {}))
    if "align_preset" in chosen and chosen.align_preset == "auto":
        check_auto(chosen, parser, argv)
        parser.set_defaults(align_blocks=0, aug_size=20)  # which it leaves as they are
    chosen, _ = parser.parse_known_args(argv)
    default_to_feature_space(stage, chosen, parser)
    args = parser.parse_args(argv)

    if "crop_scale" in args and args.crop_scale[0] > args.crop_scale[1]:
        parser.error(f"argument --crop_scale: {args.crop_scale[0]:g} {args.crop_scale[1]:g} is not in order")
    check_weights(stage, args, parser)
    if "warm_up_epochs" in args and not args.init_from:
        args.warm_up_epochs = 0  # a new backbone has nothing to keep
    if "crop_scale" not in args:
        args.crop_scale = None  # this stage augments nothing
    args.cache_dir = args.cache_dir or Path("./fs_benchmarks/.cache")
    if "align_lr" in args:
        check_feature_space(args, parser)
        if args.align_lr is None and args.alignment == "adversarial":
            args.align_lr = ADVERSARIAL_LR
        for rate in ("align_lr", "related_lr", "support_lr"):
            setattr(args, rate, args.lr if getattr(args, rate) is None else getattr(args, rate))
    if stage == "predict":
        if args.classifier:
            check_classifier(args, parser, argv)
        complete_predict(args, parser)
    else:
        args.novel_dataset = args.novel_dataset or args.dataset
    if not args.img_size and not (stage == "predict" and (args.checkpoint or args.classifier)):  # which know theirs
        try:
            args.img_size = native_img_size(args.backbone)
        except ValueError as error:
            parser.error(f"argument --backbone: {error}")
    return args


def start_stage(stage: str) -> tuple[argparse.Namespace, Run]:
    """The flags that a stage is given, and the run that they ask for, of this rank among those of torchrun.

    The flags name the precision that `auto` has become.
    """
    ranks = join_ranks()
    args = args_parser(stage)
    args.quiet |= not ranks.first
    args.rebuild_cache &= ranks.first  # the others come after, to what the first has made
    run = start_run(ranks, args.device, args.precision, args.seed, args.quiet, args.no_keep_memory)
    args.precision = run.precision.name
    return args, run


def start_training(stage: str) -> tuple[argparse.Namespace, Run, RunFiles]:
    """The same for stage 1 or 2, and its files."""
    args, run = start_stage(stage)
    script, name, folders = STAGES[stage][0], from_flags(RunName, args), from_flags(Folders, args)
    files = training_files(script.removesuffix(".py"), name, folders, vars(args), writes=args.n_epoch > 0)
    return args, run, files


def from_flags(cls: type[T], args: argparse.Namespace) -> T:
    """A dataclass, and those in its fields, filled from flags of the same names. Every field must be one."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind = get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(kind):
            values[field.name] = from_flags(kind, args)  # type: ignore[arg-type]
        else:
            value = getattr(args, field.name)
            values[field.name] = tuple(value) if get_origin(kind) is tuple else value
    return cls(**values)
