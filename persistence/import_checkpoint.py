"""Turn a checkpoint of another repository into ours: python -m persistence.import_checkpoint FILE OUT [--from rfs]

Stages and predict.py take such a file at once, too, where its tensors say what it is; `--from` tells networks apart
whose tensors have the same names. Nothing of the file is run.
"""

from dataclasses import replace
from pathlib import Path

from data.converters.converter import SPLIT_FILES, read_split_file
from data.listing import list_folder
from engine.errors import OneLineParser, UserError
from engine.script import run_script
from persistence.checkpoints import imported_checkpoint, save_checkpoint
from persistence.imported import read_imported, turned_round
from persistence.peers import PEERS

# They feed their networks the npz of tieredImageNet as it is, in BGR order, with means in RGB order.
BGR_READERS = ("feat", "rfs", "metaoptnet")


def base_class_names(n_class: int, base: Path | None) -> list[str]:
    """Names of the rows of a base head: the class folders of `base`, or else miniImagenet's, both sorted.

    Sorted is the order in which the published code, which reads folders, numbers classes. Raises UserError when
    there are not n_class of them.
    """
    names = list_folder(base)[0] if base else sorted(read_split_file(SPLIT_FILES / "miniImagenet.json")["base"])
    if len(names) != n_class:
        where = base or "the split of miniImagenet"
        raise UserError(
            f"the checkpoint has {n_class} base classes, {where} has {len(names)}: give their --base FOLDER"
        )
    return names


def main() -> None:
    parser = OneLineParser(
        prog="python -m persistence.import_checkpoint",
        description="Turn a checkpoint of another repository into one of this project, running nothing of it.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the checkpoint, a file of torch.save")
    parser.add_argument("out", type=Path, metavar="OUT", help="where ours is written; it must not exist")
    parser.add_argument("--from", dest="repository", choices=list(PEERS), help="the repository that it is of")
    parser.add_argument("--dataset", default="miniImagenet", help="the benchmark that it was trained on")
    parser.add_argument("--img_size", type=int, help="image side that it was trained at, pixels, if not the usual one")
    parser.add_argument(
        "--base", type=Path, metavar="FOLDER", help="folder of its base classes' folders, if not miniImagenet's"
    )
    args = parser.parse_args()
    if args.base and not args.base.is_dir():
        raise UserError(f"--base {args.base} is not a folder: give the folder of the base classes' folders")
    if args.out.exists():
        raise UserError(f"{args.out} exists already: delete it, or give another file to write")
    try:
        imported = read_imported(args.file, args.repository)
    except ValueError as error:
        raise UserError(f"{args.file} cannot be imported ({error}): give a file of weights, whole") from None
    if args.img_size:
        imported = replace(imported, peer=replace(imported.peer, img_size=args.img_size))
    if args.dataset == "tieredImageNet" and imported.repository in BGR_READERS:
        print(f"note: {imported.repository} reads tieredImageNet in BGR order: the first convolution is turned round")
        imported = turned_round(imported)
    n_class = len(imported.head_state["weight"]) if imported.head_state else 0
    names = base_class_names(n_class, args.base) if n_class else list_folder(args.base)[0] if args.base else []
    checkpoint = imported_checkpoint(args.file, imported, args.dataset, names)
    save_checkpoint(args.out, checkpoint)
    head = f"{checkpoint.method} of {len(names)} classes" if n_class else "without its head"
    accuracy = f", validation accuracy {checkpoint.val_accuracy:.2f} %" if n_class else ""
    print(f"{args.out}: {checkpoint.backbone} of {imported.repository}, {head}, epoch {checkpoint.epoch}{accuracy}")
    mean, std = ([round(v, 4) for v in part] for part in checkpoint.normalisation)
    print(f"images of {checkpoint.img_size} px, resized by {checkpoint.eval_resize!r}, mean {mean}, std {std}")


if __name__ == "__main__":
    run_script(main)
