"""Make a benchmark's image folders, fs_benchmarks/NAME/{base,val,novel}/<class>/<image>, from the files people have.

    python -m data.prepare glyphs
    python -m data.prepare miniImagenet --source ~/mini-imagenet
    python -m data.prepare CUB --source ~/CUB_200_2011.tgz --crop_bbox
    python -m data.prepare CIFAR-FS
    python -m data.prepare folder --source ~/photos --name photos --split 0.6,0.2,0.2

A command that was interrupted continues where it stopped when it is run again. fs_benchmarks/README.md says which file
to get for each benchmark.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from data.converters.cifar100 import convert_cifar100
from data.converters.cub import convert_cub
from data.converters.folder import convert_folder
from data.converters.mini_imagenet import convert_mini_imagenet
from data.converters.tiered_imagenet import convert_tiered_imagenet
from data.converters.writing import SPLITS, Conversion, count_images, write_benchmark
from data.glyphs import render_glyphs
from engine.errors import OneLineParser, UserError

SPLIT_FILES = Path(__file__).parents[1] / "fs_benchmarks" / "splits"


def prepare_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand a benchmark, with the options that make sense for it."""
    parser = OneLineParser(
        prog="python -m data.prepare", description="Make a benchmark's image folders from the files that people have."
    )
    out = OneLineParser(add_help=False)
    out.add_argument(
        "--out", type=Path, default=Path("fs_benchmarks"), help="folder of benchmarks; images go to OUT/NAME"
    )
    common = OneLineParser(add_help=False, parents=[out])
    common.add_argument("--img_size", type=_size, help="resize every image to IMG_SIZE x IMG_SIZE and write it as PNG")
    common.add_argument("--skip_bad", action="store_true", help="leave out images that cannot be read")
    common.add_argument("--allow_incomplete", action="store_true", help="accept missing classes and images")
    source = OneLineParser(add_help=False)
    source.add_argument("--source", type=Path, required=True, help="the file or folder that you have")
    split_file = OneLineParser(add_help=False)
    split_file.add_argument("--split_file", type=Path, help="JSON of the classes of base, val and novel")

    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    glyphs = names.add_parser("glyphs", parents=[out], help="100 characters, rendered offline")
    glyphs.add_argument("--seed", type=int, default=0, help="another seed renders other images of the same characters")
    mini = names.add_parser(
        "miniImagenet", parents=[common, source, split_file], help="from ILSVRC, csv files, pickles or json lists"
    )
    mini.add_argument("--image_root", type=Path, help="folder of the images that base/val/novel.json name")
    names.add_parser("tieredImageNet", parents=[common, source], help="from its authors' pkl or npz files")
    cub = names.add_parser("CUB", parents=[common, source], help="from the folder CUB_200_2011 or its tgz")
    cub.add_argument("--crop_bbox", action="store_true", help="crop each image to its bounding box")
    for name in ("FC100", "CIFAR-FS"):
        cifar = names.add_parser(name, parents=[common, split_file], help="from CIFAR-100, downloaded unless given")
        cifar.add_argument("--source", type=Path, help="cifar-100-python.tar.gz or its folder; default: download it")
    folder = names.add_parser("folder", parents=[common, source, split_file], help="from your own class/image folders")
    folder.add_argument("--name", dest="title", help="what to call the benchmark; default: the source folder's name")
    folder.add_argument(
        "--split", type=_fractions, default=[0.64, 0.16, 0.2], help="fractions of classes: 0.64,0.16,0.2 (the default)"
    )
    folder.add_argument("--seed", type=int, default=0, help="which classes --split deals to which split")
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Make the benchmark that the command line names and print its counts. Raises UserError when it cannot be made."""
    if getattr(args, "source", None) and not args.source.exists():
        raise UserError(f"--source '{args.source}' does not exist")
    title = args.name
    settings: dict[str, object] = {"benchmark": args.name}
    conversion: AbstractContextManager[Conversion]
    if args.name == "glyphs":
        if (args.out / title).exists():
            print(f"'{args.out / title}' is there already; delete it to render it again")
        else:
            render_glyphs(args.out / title, args.seed)
        _report(args.out / title)
        return
    if args.name == "miniImagenet":
        positions = read_split_file(args.split_file or SPLIT_FILES / "miniImagenet.json")
        settings["split_file"] = _digest(positions)
        conversion = convert_mini_imagenet(args.source, positions, args.image_root)
    elif args.name == "tieredImageNet":
        conversion = convert_tiered_imagenet(args.source)
    elif args.name == "CUB":
        settings["crop_bbox"] = args.crop_bbox
        conversion = convert_cub(args.source, args.crop_bbox)
    elif args.name == "folder":
        title = args.title or args.source.resolve().name
        class_lists = read_split_file(args.split_file) if args.split_file else None
        settings |= {"split_file": _digest(class_lists)} if class_lists else {"split": args.split, "seed": args.seed}
        conversion = convert_folder(args.source, class_lists, args.split, args.seed)
    else:
        class_lists = read_split_file(args.split_file or SPLIT_FILES / f"{args.name}.json")
        settings["split_file"] = _digest(class_lists)
        conversion = convert_cifar100(args.source, class_lists, args.out / ".downloads")
    with conversion as images:
        write_benchmark(images, args.out / title, settings, args.img_size, args.skip_bad, args.allow_incomplete)
    _report(args.out / title)


def read_split_file(path: Path) -> dict[str, Any]:
    """A JSON of {base, val, novel: classes}, where classes is a list or a dictionary by class name.

    The three may lie under a key `coarse_labels`. Raises UserError when the file has another form, or a class twice.
    """
    try:
        content = json.loads(path.read_text())
        lists = content.get("coarse_labels", content)
        names = [name for split in SPLITS for name in lists[split]]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"--split_file '{path}' is not a JSON of base, val and novel classes ({error!r})") from None
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--split_file '{path}' lists {', '.join(twice)} twice; splits must not share classes")
    return dict(content)


def _digest(split: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(split).encode()).hexdigest()[:12]


def _report(folder: Path) -> None:
    counts = count_images(folder)
    parts = [f"{split} {len(counts[split])} classes, {sum(counts[split].values())} images" for split in SPLITS]
    print(f"{folder}: {'; '.join(parts)}")


def _size(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of pixels")
    return int(text)


def _fractions(text: str) -> list[float]:
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError:
        fractions = []
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"'{text}' is not three fractions of sum 1, such as 0.64,0.16,0.2")
    return fractions


def main(argv: list[str] | None = None) -> None:
    """Run the command line; what the user can mend ends it with one line and exit status 2."""
    try:
        prepare(prepare_parser().parse_args(argv))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command continues from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
