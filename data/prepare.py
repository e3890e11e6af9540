"""Make a benchmark's image folders, fs_benchmarks/NAME/{base,val,novel}/<class>/<image>, from the files people have.

    python -m data.prepare glyphs
    python -m data.prepare miniImagenet --source ~/mini-imagenet
    python -m data.prepare CUB --source ~/CUB_200_2011.tgz --crop_bbox
    python -m data.prepare CIFAR-FS
    python -m data.prepare folder --source ~/photos --name photos --split 0.6,0.2,0.2

A command that was interrupted continues where it stopped when it is run again. fs_benchmarks/README.md says which file
to get for each benchmark.
"""

import argparse
from pathlib import Path

from data.converters import CONVERTERS
from data.converters.writing import count_images, write_benchmark
from data.glyphs import provide_glyphs
from engine.errors import OneLineParser, UserError
from engine.files import folder_name
from engine.script import run_script


def prepare_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand per benchmark, with the flags that make sense for it."""
    parser = OneLineParser(
        prog="python -m data.prepare", description="Make a benchmark's image folders from the files that people have."
    )
    out = OneLineParser(add_help=False)
    out.add_argument(
        "--out", type=Path, default=Path("fs_benchmarks"), help="folder of benchmarks; images go to OUT/NAME"
    )
    common = OneLineParser(add_help=False, parents=[out])
    common.add_argument("--skip_bad", action="store_true", help="leave out images that cannot be read")
    common.add_argument("--allow_incomplete", action="store_true", help="accept missing classes and images")

    names = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    glyphs = names.add_parser("glyphs", parents=[out], help="100 characters, rendered offline")
    glyphs.add_argument("--seed", type=int, default=0, help="another seed renders other images of the same characters")
    for name, converter in CONVERTERS.items():
        command = names.add_parser(name, parents=[common], help=converter.help)
        for flag, options in converter.flags.items():
            command.add_argument(f"--{flag}", **options)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises UserError for what the user can mend."""
    args = prepare_parser().parse_args(argv)
    if args.benchmark == "glyphs":
        folder = args.out / "glyphs"
        if not provide_glyphs(folder, args.seed):
            print(f"'{folder}' is there already; delete it to render it again")
    else:
        converter = CONVERTERS[args.benchmark]
        flags = {flag: getattr(args, flag) for flag in converter.flags}
        if converter.download and args.source is None:
            flags["source"] = converter.download(args.out / ".downloads")
        elif not args.source.exists():
            raise UserError(f"--source '{args.source}' does not exist")
        conversion = converter.convert(**flags)
        folder = args.out / folder_name(conversion.title or args.benchmark)
        with conversion.opened:
            write_benchmark(conversion, folder, args.benchmark, args.skip_bad, args.allow_incomplete)
    counts = {split: classes.values() for split, classes in count_images(folder).items()}
    parts = [f"{split} {len(classes)} classes, {sum(classes)} images" for split, classes in counts.items()]
    print(f"{folder}: {'; '.join(parts)}")


if __name__ == "__main__":
    run_script(main)
