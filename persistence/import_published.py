"""Turn a published checkpoint into ours: python -m persistence.import_published FILE OUT

The published files of base training hold a Conv4's weights under other names and, as objects of classes that are not
ours, the head, its loss and the optimiser. torch.load reads them with weights_only=True, which runs nothing of a file:
for those classes it is given stand-ins that do nothing, and a file that asks for anything else is refused.
"""

import argparse
import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.converters.converter import SPLIT_FILES, read_split_file
from data.converters.safe_pickle import NumberType
from data.listing import list_folder
from engine.errors import OneLineParser, UserError
from engine.files import LEGACY_START, load_tensors, read_tensors
from engine.script import run_script
from models import build_head
from persistence.checkpoints import Checkpoint, create_backbone, load_state, save_checkpoint

PUBLISHED_KEY = re.compile(r"nConvBlock\.(\d)\.convBlock\.([01])\.(\w+)")
PUBLISHED_HEADS = ("softMax", "cosMax", "arcMax")


class Inert:
    """What an object of a foreign class becomes: its state, and nothing that it could do."""

    state: dict[str, Any]

    def __setstate__(self, state: object) -> None:
        """Keep the state, which every object of these classes has as a dictionary."""
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("it has an object whose state is no dictionary")
        self.state = state


def plain_dict(_: object) -> dict[Any, Any]:
    """A defaultdict, without what it would make for a missing key: the optimiser's state."""
    return {}


def plain_number(kind: object, data: object) -> Any:
    """A numpy scalar as a Python number: the accuracy."""
    if not isinstance(kind, NumberType) or not isinstance(data, bytes) or len(data) != kind.dtype.itemsize:
        raise pickle.UnpicklingError("it has a numpy scalar that is not a number")
    return np.frombuffer(data, kind.dtype)[0].item()


def class_alone(_: object, found: object, __: object, ___: object) -> object:
    """The class of ('module', class, file, source): see call_for_classes."""
    return found


def stand_ins() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What torch.load takes for the names that a published file asks for beyond tensors and plain values."""
    inert = [f"methods.transferLearning_clfHeads.{name}" for name in PUBLISHED_HEADS]
    inert += ["torch.nn.modules.loss.CrossEntropyLoss", "torch.optim.adam.Adam"]
    return [
        *((type(name.rpartition(".")[2], (Inert,), {}), name) for name in inert),
        (plain_dict, "collections.defaultdict"),
        (dict, "builtins.dict"),
        (plain_number, "numpy.core.multiarray.scalar"),
        (plain_number, "numpy._core.multiarray.scalar"),
        (NumberType, "numpy.dtype"),
        (class_alone, "published.class_alone"),
    ]


def call_for_classes(content: bytes) -> bytes:
    """A file of torch before 1.6 in a form that weights_only=True takes, without reading its pickles as objects.

    torch.save wrote a class as a reference outside the pickle, ('module', class, file, source), and weights_only=True
    refuses any but those of tensors. Here the reference becomes a call: class_alone('module', class, file, source).
    Raises ValueError when the pickles cannot be told apart.
    """
    file, edited, kept = io.BytesIO(content), b"", 0
    words: set[int] = set()  # where the memo has the word 'module'
    start: int | None = None  # of the last tuple, when that is its first word
    for _ in range(3):  # magic number, version and machine
        list(pickletools.genops(file))
    operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(file)
    for (before, said, at), (opcode, argument, place) in pairwise(operations):
        if said == "module" and opcode.name.endswith("BINPUT"):
            words.add(argument)
        if before.name == "MARK":
            remembered = opcode.name.endswith("BINGET") and argument in words
            start = at if remembered or argument == "module" else None
        elif opcode.name == "BINPERSID" and start is not None:
            edited += content[kept:start] + b"cpublished\nclass_alone\n" + content[start:place] + pickle.REDUCE
            kept, start = place + 1, None
    return edited + content[kept:]


def read_published(path: Path) -> Any:
    """What a published file holds, foreign objects as Inert, running nothing of it. Raises UserError when it cannot."""
    if not path.is_file():
        raise UserError(f"no file {path}: give the path of the downloaded checkpoint")
    content = path.read_bytes()
    try:
        with torch.serialization.safe_globals(stand_ins()):
            if content.startswith(LEGACY_START):
                return read_tensors(io.BytesIO(call_for_classes(content)), "cpu")
            return load_tensors(path, "cpu")
    except ValueError as error:
        raise UserError(f"{path} is no published checkpoint ({error}): get it from where it was published") from None


def load_published_state(module: nn.Module, state: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Load `state` into `module` and return the module's state dict, whose values are finite.

    Raises UserError when it is not of float32 tensors, batch norm's counters apart, or does not fit the module.
    """
    for name, value in state.items():
        expected = torch.int64 if str(name).endswith("num_batches_tracked") else torch.float32
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not isinstance(name, str) or not plain or found != expected:
            raise UserError(f"{path} holds {name!r} as {found}: a name and a tensor of {expected} are expected")
    load_state(module, state, path)
    for name, value in module.state_dict().items():
        if not torch.isfinite(value).all():
            raise UserError(f"{path} holds {name!r} with numbers that are not finite: get the file again")
    return module.state_dict()


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


def number_or(value: object, otherwise: float) -> float:
    """A number of the file as a float; `otherwise` when it is none."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e9 else otherwise


def import_published(path: Path, dataset: str, img_size: int, base: Path | None) -> Checkpoint:
    """The checkpoint that a published file of base training holds, a Conv4 and its head.

    Raises UserError when the file is not one, or does not fit img_size or `base`.
    """
    content = read_published(path)
    if not isinstance(content, dict) or not isinstance(content.get("state"), dict):
        raise UserError(f"{path} has no dictionary 'state' of weights: give a published checkpoint of base training")
    renamed = {}
    for key, value in content["state"].items():
        found = PUBLISHED_KEY.fullmatch(str(key))
        if not found:
            raise UserError(f"{path} has weights {str(key)[:60]!r}, which no published Conv4 has: only Conv4 is known")
        renamed[f"layers.{found[1]}.{('conv', 'bn')[int(found[2])]}.{found[3]}"] = value
    backbone = create_backbone("Conv4", img_size, seed=0)
    backbone_state = load_published_state(backbone, renamed, path)

    published_head = content.get("base_clf")
    method = type(published_head).__name__
    record = getattr(published_head, "state", {}) if isinstance(published_head, Inert) else {}
    parameters = record.get("_parameters")
    if method not in PUBLISHED_HEADS or not isinstance(parameters, dict):
        heads = ", ".join(PUBLISHED_HEADS)
        raise UserError(f"{path} has no base head 'base_clf' of {heads}: give a checkpoint of base training")
    weight = parameters.get("weight")
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    if len(shape) != 2 or shape[1] != backbone.feature_dim:
        raise UserError(
            f"{path} has a head weight {shape}, but at {img_size} px Conv4 has {backbone.feature_dim} "
            f"features: give the --img_size that it was trained at"
        )
    class_names = base_class_names(shape[0], base)
    s, m = number_or(record.get("s"), 0.0), number_or(record.get("margin"), 0.0)
    head = build_head(method, backbone.feature_dim, len(class_names), s, m)
    epoch = content.get("epoch")
    return Checkpoint(
        stage="transferLearning",
        dataset=dataset,
        method=method,
        backbone="Conv4",
        img_size=img_size,
        class_names=class_names,
        backbone_state=backbone_state,
        head_state=load_published_state(head, parameters, path),
        epoch=epoch if isinstance(epoch, int) else -1,
        val_accuracy=number_or(content.get("max_acc"), math.nan),
        config={"imported_from": path.name, "s": s, "m": m},
    )


def main() -> None:
    parser = OneLineParser(
        prog="python -m persistence.import_published",
        description="Turn a published checkpoint into one of this project, running nothing of it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the published checkpoint, a .tar of torch.save")
    parser.add_argument("out", type=Path, metavar="OUT", help="where ours is written; it must not exist")
    parser.add_argument("--dataset", default="miniImagenet", help="the benchmark that it was trained on")
    parser.add_argument("--img_size", type=int, default=84, help="image side that it was trained at, pixels")
    parser.add_argument(
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


if __name__ == "__main__":
    run_script(main)
