"""Turn a published checkpoint into ours: python -m persistence.checkpoints import-published FILE OUT

The published files of base training hold a Conv4's weights under other names, and the head as a pickled object of a
class that is not ours. They are read without running anything of them (see inert_pickle).
"""

import argparse
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.benchmarks import list_folder
from data.converters.converter import SPLIT_FILES, read_split_file
from engine.errors import OneLineParser, UserError
from models import HEADS, build_head
from persistence.checkpoints import Checkpoint, create_backbone, load_state, save_checkpoint
from persistence.inert_pickle import Inert, read_torch_file

PUBLISHED_KEY = re.compile(r"nConvBlock\.(\d)\.convBlock\.([01])\.(\w+)")


def read_tensors(path: Path, tensors: dict[str, Any], storages: dict[str, bytes]) -> dict[str, Tensor]:
    """The tensors of a state, all of them finite float32 but for batch norm's counters. Raises UserError otherwise."""
    state = {}
    for name, stored in tensors.items():
        try:
            value = stored.read(storages)
        except (AttributeError, pickle.UnpicklingError) as error:
            raise UserError(f"{path} holds no tensor as {name!r} ({error}): get the file again") from None
        expected = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
        if value.dtype != expected or not torch.isfinite(value).all():
            raise UserError(
                f"{path} holds {name!r} as {value.dtype}, or with numbers that are not finite: "
                f"finite {expected} is expected, so get the file again"
            )
        state[name] = value
    return state


def base_class_names(n_class: int, base: Path | None) -> list[str]:
    """Names of the rows of the base head: the class folders of `base`, or else miniImagenet's, both sorted.

    Sorted is the order in which the published code, which reads folders, numbers classes. Raises UserError when
    there are not n_class of them.
    """
    names = list_folder(base)[0] if base else sorted(read_split_file(SPLIT_FILES / "miniImagenet.json")["base"])
    if len(names) != n_class:
        where = base or "the split of miniImagenet"
        raise UserError(
            f"the checkpoint has {n_class} base classes and {where} has {len(names)}: "
            f"give --base FOLDER, the folder of the class folders that it was trained on"
        )
    return names


def import_published(path: Path, dataset: str, img_size: int, base: Path | None) -> Checkpoint:
    """The checkpoint that a published file of base training holds, a Conv4 and its head.

    Raises UserError when the file is not one, or does not fit img_size or `base`.
    """
    content, storages = read_torch_file(path)
    if not isinstance(content, dict) or not isinstance(content.get("state"), dict):
        raise UserError(f"{path} has no dictionary 'state' of weights: give a published checkpoint of base training")
    renamed = {}
    for key, stored in content["state"].items():
        found = PUBLISHED_KEY.fullmatch(str(key))
        if not found:
            raise UserError(f"{path} has weights {str(key)[:60]!r}, which no published Conv4 has: only Conv4 is known")
        renamed[f"layers.{found[1]}.{('conv', 'bn')[int(found[2])]}.{found[3]}"] = stored
    backbone = create_backbone("Conv4", img_size, seed=0)
    backbone_state = read_tensors(path, renamed, storages)
    load_state(backbone, backbone_state, path)

    published_head = content.get("base_clf")
    method = published_head.name.rpartition(".")[2] if isinstance(published_head, Inert) else None
    record = published_head.state if isinstance(published_head, Inert) else None
    parameters = record.get("_parameters") if isinstance(record, dict) else None
    if method not in HEADS or not isinstance(record, dict) or not isinstance(parameters, dict):
        raise UserError(f"{path} has no base head 'base_clf' of {', '.join(HEADS)}: give a checkpoint of base training")
    head_state = read_tensors(path, parameters, storages)
    weight = head_state.get("weight", torch.empty(0))
    if weight.ndim != 2 or weight.shape[1] != backbone.feature_dim:
        raise UserError(
            f"{path} has a head weight {tuple(weight.shape)}, but at {img_size} px Conv4 has {backbone.feature_dim} "
            f"features: give the --img_size that it was trained at"
        )
    s, m = (record.get(key) for key in ("s", "margin"))
    s, m = (float(x) if isinstance(x, int | float) else 0.0 for x in (s, m))
    load_state(build_head(method, backbone.feature_dim, len(weight), s, m), head_state, path)
    epoch, accuracy = content.get("epoch"), content.get("max_acc")
    return Checkpoint(
        stage="transferLearning",
        dataset=dataset,
        method=method,
        backbone="Conv4",
        img_size=img_size,
        class_names=base_class_names(len(weight), base),
        backbone_state=backbone_state,
        head_state=head_state,
        epoch=epoch if isinstance(epoch, int) else -1,
        val_accuracy=float(accuracy) if isinstance(accuracy, int | float) else math.nan,
        config={"imported_from": path.name, "s": s, "m": m},
    )


def main() -> None:
    parser = OneLineParser(prog="python -m persistence.checkpoints", description="Import a published checkpoint.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "import-published",
        help="turn a published checkpoint into one of this project, running nothing of it",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("file", type=Path, metavar="FILE", help="the published checkpoint, a .tar of torch.save")
    command.add_argument("out", type=Path, metavar="OUT", help="where ours is written; it must not exist")
    command.add_argument("--dataset", default="miniImagenet", help="the benchmark that it was trained on")
    command.add_argument("--img_size", type=int, default=84, help="image side that it was trained at, pixels")
    command.add_argument(
        "--base", type=Path, metavar="FOLDER", help="folder of its base classes' folders, if not miniImagenet's"
    )
    args = parser.parse_args()
    if args.base and not args.base.is_dir():
        raise UserError(f"--base {args.base} is not a folder: give the folder of the base classes' folders")
    if args.out.exists():
        raise UserError(f"{args.out} exists already: delete it, or give another file to write")
    checkpoint = import_published(args.file, args.dataset, args.img_size, args.base)
    save_checkpoint(args.out, checkpoint)
    print(
        f"{args.out}: {checkpoint.backbone}, {checkpoint.method} of {len(checkpoint.class_names)} classes, epoch "
        f"{checkpoint.epoch}, validation accuracy {checkpoint.val_accuracy:.2f} %"
    )
