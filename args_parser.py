"""The one argparse config of the stages and of predict.py: edit the defaults here, or give flags on the command line.

Defaults are the published protocol. Where the paper and its published code differ, the help text says which is
followed. `--preset laptop` swaps in the demo's scale; flags given beside it still win,
as beside `--align_preset tuned`.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.errors import OneLineParser
from methods.meta_learners import META_LEARNERS
from models import BACKBONES, HEADS, TORCHVISION, native_img_size

# What a laptop does in minutes: the built-in benchmark, small images, fewer epochs and episodes.
LAPTOP = {
    "all": {
        "dataset": "glyphs",
        "img_size": 42,
        "no_flip": True,
        "crop_scale": [0.3, 1.0],
        "n_epoch": 30,
        "val_episodes": 100,
        "n_shot": 1,
        "n_query": 15,
    },
    "transfer": {"n_episodes": 600},
    "meta": {"n_epoch": 10, "episodes_per_epoch": 60, "n_episodes": 600},
    "alignment": {"n_episodes": 60, "aug_size": 10, "align_iters": 100, "record_curve": 10},
}

# Chosen on the val classes of a fine-grained benchmark, the cheaper of settings that did about as well:
# docs/tuning.md has the measurements.
TUNED = {
    "all": {"align_blocks": 1, "aug_size": 20},
    "centroid": {"align_bn": "eval"},
    "adversarial": {"critic_steps": 1},
}

# Of the backbone's step against the critic, which the paper leaves open. Adam's steps do not shrink with the critic's
# scores: at 1e-3, the rate of the other updates, 150 of them destroy the features (docs/tuning.md).
ADVERSARIAL_LR = 1e-5


def number(kind: type, low: float, high: float = float("inf"), open_low: bool = False) -> Callable[[str], float]:
    """An argparse type: an int or a float from `low` (excluded if open_low) to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low < value if open_low else low <= value) or value > high or not math.isfinite(value):
            bound = f"{'above' if open_low else 'at least'} {low:g}" + (
                "" if high == float("inf") else f", at most {high:g}"
            )
            raise argparse.ArgumentTypeError(f"{text} is out of range: expected {bound}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def flag_value(text: str) -> bool:
    """An argparse type for `--data_aug True` or `--data_aug False`."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def backbone_name(text: str) -> str:
    """An argparse type: a backbone of ours, or torchvision:NAME."""
    if text in BACKBONES or (text.startswith(TORCHVISION) and text != TORCHVISION):
        return text
    raise argparse.ArgumentTypeError(
        f"unknown backbone {text!r}: choose {', '.join(BACKBONES)} or {TORCHVISION}NAME, such as {TORCHVISION}resnet50"
    )


# 1e30 keeps any arithmetic on a rate or a scale within float32.
COUNT, COUNT_OR_0, POSITIVE = number(int, 1), number(int, 0), number(float, 0, 1e30, open_low=True)

ALIGNMENTS = ("none", "naive", "centroid", "adversarial")


def shown(flags: dict[str, Any]) -> str:
    """Flags and their values as one gives them."""
    return " ".join(f"--{flag} {value}" for flag, value in flags.items())


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows the defaults worth showing: not None, and not False of a flag that is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def decoding_flags(data: argparse._ArgumentGroup) -> None:
    """How images are found and decoded."""
    data.add_argument(
        "--image_root",
        type=Path,
        help="folder that holds the images a json benchmark lists, when the paths in it are those of another machine",
    )
    data.add_argument(
        "--cache_dir",
        type=Path,
        help="where decoded images and features are kept between runs (default: fs_benchmarks/.cache)",
    )
    data.add_argument(
        "--img_size",
        type=number(int, 8),
        help="side of the square input, pixels (default: the "
        f"backbone's own, {', '.join(f'{b} {native_img_size(b)}' for b in [*BACKBONES, TORCHVISION + 'NAME'])})",
    )
    data.add_argument(
        "--num_workers",
        type=COUNT_OR_0,
        default=4,
        help="threads that decode images, once; the results do not depend on it",
    )


def fitting_flags(group: argparse._ArgumentGroup) -> None:
    """How a head is fitted on a support set."""
    group.add_argument(
        "--ft_n_epoch", type=COUNT, default=200, help="full-batch Adam steps that fit a head on a support set"
    )
    group.add_argument("--ft_lr", type=POSITIVE, default=1e-3, help="learning rate of those steps")
    group.add_argument("--ft_s", type=POSITIVE, default=5.0, help="scale of cosMax and arcMax on a support set")


def machine_flags(run: argparse._ArgumentGroup) -> None:
    """Seed, device and what a run prints."""
    run.add_argument("--seed", type=COUNT_OR_0, default=0, help="every random number follows from it")
    run.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    run.add_argument(
        "--precision",
        choices=["fp32", "bf16", "fp16"],
        default="fp32",
        help="of the backbone's forward and backward pass; heads and losses stay in fp32",
    )
    run.add_argument(
        "--no_keep_memory",
        action="store_true",
        help="let the C library return freed memory to the system at once: slower on a CPU, smaller between batches",
    )
    run.add_argument("--quiet", action="store_true", help="no progress bars")


def shared_flags() -> argparse.ArgumentParser:
    """The flags of every stage."""
    p = argparse.ArgumentParser(add_help=False)
    data = p.add_argument_group("data")
    data.add_argument(
        "--dataset",
        default="miniImagenet",
        help="folder name of the benchmark in --benchmarks_dir; 'glyphs' is built in and rendered when missing",
    )
    data.add_argument(
        "--novel_dataset",
        help="benchmark of the novel classes when it is not --dataset: the cross-domain experiment, such as "
        "--dataset miniImagenet --novel_dataset CUB",
    )
    data.add_argument(
        "--benchmarks_dir",
        type=Path,
        default=Path("./fs_benchmarks"),
        help="where benchmarks live, as <dataset>/{base,val,novel}/<class>/<image> or <dataset>/{base,val,novel}.json",
    )
    decoding_flags(data)
    model = p.add_argument_group("model")
    model.add_argument(
        "--backbone",
        type=backbone_name,
        default="Conv4",
        help=f"{', '.join(BACKBONES)}, or {TORCHVISION}NAME: any classification model of torchvision, such as "
        f"{TORCHVISION}resnet50, its classifier removed",
    )
    model.add_argument(
        "--checkpoint_dir",
        type=Path,
        default=Path("./results/models"),
        help="where checkpoints are written by one stage and looked for by the next",
    )
    model.add_argument(
        "--init_from",
        type=Path,
        metavar="CHECKPOINT",
        help="start from this checkpoint instead of the one that the other flags name",
    )
    episodes = p.add_argument_group("episodes")
    episodes.add_argument(
        "--test_n_way", type=number(int, 2), default=5, help="classes in a validation or test episode"
    )
    episodes.add_argument("--n_shot", type=COUNT, default=5, help="support images a class")
    episodes.add_argument("--n_query", type=COUNT, default=50, help="query images a class")
    episodes.add_argument("--n_episodes", type=COUNT, default=600, help="test episodes in a testing epoch")
    episodes.add_argument(
        "--testing_epochs",
        type=COUNT,
        default=1,
        help="testing epochs; testing_epochs x n_episodes episodes are pooled into one mean and interval",
    )
    episodes.add_argument("--val_episodes", type=COUNT, default=400, help="validation episodes after each epoch")
    episodes.add_argument(
        "--episodes_file",
        type=Path,
        help="read the novel episodes from this file, or write them to "
        "it when it does not exist, to compare methods on the same episodes",
    )
    fitting_flags(episodes)
    run = p.add_argument_group("run")
    machine_flags(run)
    run.add_argument("--results_dir", type=Path, default=Path("./results"), help="where tables/ and logs/ are written")
    run.add_argument(
        "--tensorboard",
        action="store_true",
        help="write the numbers of metrics.jsonl for TensorBoard too, beside that file: needs pip install tensorboard",
    )
    again = run.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last state of this run, if there is one; the result is bit for bit that of one run",
    )
    again.add_argument("--overwrite", action="store_true", help="replace an earlier run of the same name")
    run.add_argument(
        "--preset",
        choices=["laptop"],
        help="the demo's scale instead of the published protocol: built-in benchmark, 42 pixels, minutes on a CPU",
    )
    return p


def augmentation_flags(p: argparse.ArgumentParser) -> None:
    """The flags of the stages that train on augmented base images."""
    group = p.add_argument_group("augmentation")
    group.add_argument(
        "--data_aug",
        type=flag_value,
        nargs="?",
        const=True,
        default=True,
        help="augment the base images while training (default: True)",
    )
    group.add_argument(
        "--no_flip", action="store_true", help="no horizontal flip, for classes that a mirror changes, such as letters"
    )
    group.add_argument(
        "--crop_scale",
        type=number(float, 0, 1, open_low=True),
        nargs=2,
        default=[0.08, 1.0],
        metavar=("MIN", "MAX"),
        help="area of the random crop, as a share of the image",
    )


def weights_flag(p: argparse.ArgumentParser) -> None:
    """The flag of the stages that may start from a new backbone."""
    p.add_argument_group("initial weights").add_argument(
        "--weights",
        default="none",
        metavar="PATH|DEFAULT|none",
        help=f"of a {TORCHVISION}NAME backbone: a state dict file, torchvision's own (DEFAULT, downloaded) or random",
    )


def transfer_flags(p: argparse.ArgumentParser) -> None:
    """The flags of stage 1."""
    weights_flag(p)
    augmentation_flags(p)
    group = p.add_argument_group("base training")
    group.add_argument(
        "--method",
        choices=HEADS,
        default="arcMax",
        help="head: a linear layer (softMax), scaled cosine (cosMax) or cosine with an angular margin (arcMax)",
    )
    group.add_argument(
        "--n_epoch", type=COUNT_OR_0, default=600, help="epochs over the base classes; 0 tests --init_from as it is"
    )
    group.add_argument(
        "--batch_size",
        type=COUNT,
        default=64,
        help="images in a step, of all processes together if there are several",
    )
    group.add_argument(
        "--sync_bn",
        action="store_true",
        help="with several processes: batch norm over the whole batch, as one process has it, not over each one's part",
    )
    group.add_argument("--lr", type=POSITIVE, default=1e-3, help="learning rate of Adam, constant")
    group.add_argument(
        "--n_base_class",
        type=COUNT,
        help="number of base classes; found from the data, and checked against it when given",
    )
    group.add_argument("--s", type=POSITIVE, default=20.0, help="scale of cosMax and arcMax on the base classes")
    group.add_argument(
        "--m", type=number(float, 0), default=0.01, help="angular margin of arcMax on the base classes, radians"
    )
    group.add_argument("--ft_m", type=number(float, 0), default=0.01, help="margin of arcMax on a support set")


def meta_flags(p: argparse.ArgumentParser) -> None:
    """The flags of stage 2."""
    weights_flag(p)
    augmentation_flags(p)
    group = p.add_argument_group("episodic training")
    group.add_argument("--method", choices=META_LEARNERS, default="ProtoNet", help="the meta-learner")
    group.add_argument("--train_n_way", "--n_way", type=number(int, 2), default=5, help="classes in a training episode")
    group.add_argument(
        "--train_n_query",
        type=COUNT,
        default=16,
        help="query images a class in a training episode; --n_query is for validation and test",
    )
    group.add_argument(
        "--n_epoch",
        type=COUNT_OR_0,
        default=400,
        help="epochs (Chen et al., ICLR 2019: 600 for 1 shot, 400 for 5); 0 tests --init_from as it is",
    )
    group.add_argument("--episodes_per_epoch", type=COUNT, default=100, help="training episodes in an epoch")
    group.add_argument("--lr", type=POSITIVE, default=1e-3, help="learning rate of Adam, constant")


def update_flags(p: argparse.ArgumentParser, group: argparse._ArgumentGroup) -> None:
    """The constants of Algorithms 1 and 2."""
    group.add_argument(
        "--align_preset",
        choices=["paper", "tuned"],
        default="paper",
        help="numbers of the updates: as published (paper), or chosen on val classes (tuned, see "
        f"docs/tuning.md: {shown(TUNED['all'])}; centroid also {shown(TUNED['centroid'])}, adversarial "
        f"{shown(TUNED['adversarial'])})",
    )
    group.add_argument(
        "--n_B",
        type=COUNT,
        default=10,
        help="related base classes a novel class; when n_way * n_B "
        "exceeds the base classes they are shared out evenly (the published code fails)",
    )
    group.add_argument(
        "--related_score",
        choices=["vote", "soft"],
        default="vote",
        help="score of a base class for a "
        "novel class: share of its images predicted as it (vote: the published code) or their mean "
        "probability (soft: the paper's text)",
    )
    group.add_argument("--align_iters", type=COUNT_OR_0, default=150, help="iterations of the updates")
    group.add_argument("--aug_size", type=COUNT, default=50, help="related images a novel class in an iteration")
    group.add_argument(
        "--lr", type=POSITIVE, default=1e-3, help="learning rate of the three updates, unless given below"
    )
    for flag, what in (
        ("align", "(1), the alignment loss"),
        ("related", "(2), the head"),
        ("support", "(3), the support"),
    ):
        group.add_argument(
            f"--{flag}_lr",
            type=number(float, 0, 1e30),
            help=f"learning rate of update {what} (default: --lr"
            + (f"; adversarial: {ADVERSARIAL_LR:g})" if flag == "align" else ")"),
        )
    group.add_argument(
        "--align_bn", choices=["train", "eval"], default="train", help="mode of batch norm in updates (1) and (3)"
    )
    group.add_argument(
        "--align_blocks",
        type=COUNT,
        metavar="K",
        help="update only the last K blocks of the backbone, and compute what enters them once for all episodes, into "
        "--cache_dir: much faster (default: all blocks, as published)",
    )
    group.add_argument(
        "--ft_m",
        type=number(float, 0),
        default=0.001,
        help="margin of arcMax when fitted on the support before alignment",
    )
    group.add_argument("--align_s", type=POSITIVE, default=15.0, help="scale of cosMax and arcMax during alignment")
    group.add_argument("--align_m", type=number(float, 0), default=0.001, help="margin of arcMax during alignment")
    critic = p.add_argument_group(
        "critic of adversarial alignment", "the paper leaves these constants open: the defaults are our choices"
    )
    critic.add_argument("--critic_hidden", type=COUNT, default=1024, help="hidden units of the critic")
    critic.add_argument("--critic_steps", type=COUNT, default=5, help="critic steps before each backbone step")
    critic.add_argument("--critic_lr", type=POSITIVE, default=1e-3, help="learning rate of the critic's Adam")
    critic.add_argument(
        "--critic_constraint",
        choices=["clip", "gp"],
        default="clip",
        help="what bounds the critic's slope: weight clipping or a gradient penalty",
    )
    critic.add_argument("--critic_clip", type=POSITIVE, default=0.01, help="largest absolute weight under clip")
    critic.add_argument("--critic_gp_weight", type=POSITIVE, default=10.0, help="weight of the penalty under gp")


def alignment_flags(p: argparse.ArgumentParser) -> None:
    """The flags of stage 3."""
    group = p.add_argument_group("alignment")
    group.add_argument(
        "--method", choices=HEADS, default="arcMax", help="head: of stage 1's checkpoint and of the novel episodes"
    )
    group.add_argument(
        "--alignment",
        choices=ALIGNMENTS,
        default="centroid",
        help="alignment loss: centroid (Algorithm 1), adversarial (Algorithm 2), naive (the same updates without an "
        "alignment loss) or none (fine-tuning of the head alone)",
    )
    group.add_argument(
        "--test_split",
        choices=["novel", "val"],
        default="novel",
        help="classes of the episodes; settings are tuned on val, never on novel",
    )
    group.add_argument(
        "--record_curve",
        type=COUNT_OR_0,
        default=0,
        metavar="K",
        help="record the query accuracy after every K iterations, to see whether more help or hurt; 0 does not",
    )
    group.add_argument(
        "--save_episode",
        type=COUNT_OR_0,
        default=0,
        metavar="I",
        help="the episode whose features and related base images are kept in episodes/, for reporting.figures to draw",
    )
    update_flags(p, group)


def predict_flags(p: argparse.ArgumentParser) -> None:
    """The flags of predict.py: the user's folders, a backbone, and the constants of stage 3."""
    data = p.add_argument_group("images")
    data.add_argument(
        "--support",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the examples: a subfolder a class, named as the class, with 1 or more images each, in any number",
    )
    data.add_argument(
        "--query", type=Path, required=True, help="the images to label: a folder, subfolders included, or one image"
    )
    data.add_argument(
        "--skip_bad", action="store_true", help="leave out query images that cannot be decoded, and say which"
    )
    data.add_argument(
        "--base",
        type=Path,
        metavar="FOLDER",
        help="benchmark whose base classes the checkpoint was trained on, such as fs_benchmarks/miniImagenet: "
        "alignment takes its related images from them",
    )
    decoding_flags(data)
    model = p.add_argument_group("model")
    model.add_argument("--checkpoint", type=Path, metavar="FILE", help="trained backbone: of stage 1 or 2, or imported")
    model.add_argument(
        "--backbone",
        type=backbone_name,
        help=f"instead of a checkpoint, {TORCHVISION}NAME with --weights DEFAULT or a file; "
        "the backbone of a checkpoint is found in it",
    )
    weights_flag(p)
    group = p.add_argument_group("classifier")
    group.add_argument("--method", choices=HEADS, default="arcMax", help="head that is fitted on the examples")
    group.add_argument(
        "--alignment",
        choices=ALIGNMENTS,
        help="alignment of the backbone with related base images (default: centroid with --base, else none)",
    )
    fitting_flags(group)
    update_flags(p, group)
    p.set_defaults(record_curve=0)
    out = p.add_argument_group("output")
    out.add_argument(
        "--out",
        type=Path,
        default=Path("./results/predictions"),
        help="folder of predictions.csv, predictions.json and contact_sheet.png",
    )
    out.add_argument("--overwrite", action="store_true", help="replace the predictions that --out holds")
    out.add_argument(
        "--max_sheet", type=COUNT, default=48, help="query images on the contact sheet, in the order of the csv"
    )
    machine_flags(p.add_argument_group("run"))


STAGES: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], str]] = {
    "transfer": ("transferLearning.py", transfer_flags, "Stage 1: train a backbone on the base classes."),
    "meta": ("metaLearning.py", meta_flags, "Stage 2: train a backbone episode by episode on the base classes."),
    "alignment": (
        "associative_alignment.py",
        alignment_flags,
        "Stage 3: align novel episodes with related base classes.",
    ),
    "predict": ("predict.py", predict_flags, "Label your own images from a few examples a class."),
}


def complete_predict(args: argparse.Namespace, parser: OneLineParser) -> None:
    """Fill in what the flags of predict.py leave open; an error when they name no trained backbone or no base set."""
    if not args.checkpoint and args.weights == "none":
        parser.error(
            "no trained backbone: give --checkpoint FILE (made by 'make demo', by transferLearning.py, or by "
            "'python -m persistence.import_published' of a published file), or torchvision's ImageNet "
            f"weights, --backbone {TORCHVISION}resnet18 --weights DEFAULT"
        )
    args.alignment = args.alignment or ("centroid" if args.base else "none")
    if args.alignment != "none" and not args.base:
        parser.error(
            f"argument --alignment: {args.alignment} takes related images from a benchmark's base classes: name it "
            "with --base, such as fs_benchmarks/miniImagenet, or give --alignment none"
        )


def args_parser(
    stage: str, argv: Sequence[str] | None = None, parser_class: type[OneLineParser] = OneLineParser
) -> argparse.Namespace:
    """Parse the command line of a stage; a value out of range ends the process with one line and status 2."""
    prog, add_flags, description = STAGES[stage]
    parser = parser_class(
        prog=prog,
        description=description,
        parents=[] if stage == "predict" else [shared_flags()],
        allow_abbrev=False,
        formatter_class=DefaultsFormatter,
    )
    add_flags(parser)
    chosen = parser.parse_known_args(argv)[0]
    if getattr(chosen, "preset", None) == "laptop":
        known = {action.dest for action in parser._actions}
        parser.set_defaults(**{k: v for k, v in (LAPTOP["all"] | LAPTOP.get(stage, {})).items() if k in known})
    if getattr(chosen, "align_preset", None) == "tuned":
        # predict.py leaves the alignment open until it knows of a base set, with which it is centroid.
        parser.set_defaults(**TUNED["all"], **TUNED.get(chosen.alignment or "centroid", {}))
    args = parser.parse_args(argv)
    if "crop_scale" in args and args.crop_scale[0] > args.crop_scale[1]:
        parser.error(f"argument --crop_scale: {args.crop_scale[0]:g} {args.crop_scale[1]:g} is not in order")
    if "weights" in args and args.weights != "none":
        checkpoint = "checkpoint" if stage == "predict" else "init_from"
        if getattr(args, checkpoint):
            parser.error(f"argument --weights: --{checkpoint} brings its own weights, so give only one of the two")
        if not args.backbone:
            parser.error(f"argument --weights: name the model too, such as --backbone {TORCHVISION}resnet18")
        if not args.backbone.startswith(TORCHVISION):
            parser.error(f"argument --weights: it is for {TORCHVISION}NAME backbones, not for {args.backbone}")
    if stage in ("alignment", "predict"):
        if args.align_lr is None and args.alignment == "adversarial":
            args.align_lr = ADVERSARIAL_LR
        for rate in ("align_lr", "related_lr", "support_lr"):
            setattr(args, rate, args.lr if getattr(args, rate) is None else getattr(args, rate))
    args.cache_dir = args.cache_dir or Path("./fs_benchmarks/.cache")
    if stage == "predict":
        complete_predict(args, parser)
        return args
    args.novel_dataset = args.novel_dataset or args.dataset
    args.img_size = args.img_size or native_img_size(args.backbone)
    return args


def data_options(args: argparse.Namespace) -> dict[str, Any]:
    """How any split is loaded: the flags of that name, as the arguments of load_split."""
    names = ("benchmarks_dir", "img_size", "cache_dir", "image_root", "num_workers", "quiet")
    return {name: getattr(args, name) for name in names}
