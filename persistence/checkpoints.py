"""Checkpoints: tensors and plain values only, written atomically, loaded without running any code of the file.

A checkpoint describes itself: backbone and head can be rebuilt from it alone. Its keys are those of `Checkpoint`.
"""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import get_type_hints

import torch
from torch import Tensor, nn

from data.benchmarks import Split, median_size
from data.glyphs import VERSION as GLYPHS_VERSION
from engine.errors import UserError, one_line
from engine.files import FLAGS, cpu_state, read_record, save_atomically
from engine.generators import seeded
from engine.normalisation import IMAGENET, Normalisation
from engine.records import to_json
from engine.resizing import PUBLISHED
from engine.run import Run
from models import build_backbone, build_head
from models.backbone import Backbone
from persistence.imported import Imported, read_imported

FORMAT = "associative-alignment/1"
REMEDY = (
    "train one with 'python transferLearning.py' and the same --dataset, --method, --backbone, --n_shot and "
    "--test_n_way, or name one with --init_from"
)


@dataclass(frozen=True)
class Checkpoint:
    """A trained backbone and its head, with what is needed to use them and to know where they come from.

    normalisation: of the images that the backbone takes; older files have none, and were trained with ImageNet's.
    eval_resize: the rule by which they are resized; median_size: height and width of those that it was trained on, or
    []. glyphs_version: of the rendering of the built-in benchmark then; 1 in files that do not say.
    """

    stage: str
    dataset: str
    method: str
    backbone: str
    img_size: int
    class_names: list[str]
    backbone_state: dict[str, Tensor]
    head_state: dict[str, Tensor]
    epoch: int
    val_accuracy: float
    config: FLAGS
    format: str = FORMAT
    normalisation: Normalisation = IMAGENET
    glyphs_version: int = 1
    eval_resize: str = PUBLISHED
    median_size: list[int] = field(default_factory=list)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically, its tensors on the CPU and contiguous, its config as plain values."""
    content = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
    for states in ("backbone_state", "head_state"):
        content[states] = cpu_state(content[states])
    content["config"] = to_json(content["config"])
    content["normalisation"] = [list(part) for part in content["normalisation"]]
    save_atomically(path, content)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of ours, or of another repository that is known (see peers.py), running nothing of it.

    Raises UserError when it is missing or is not one.
    """
    kinds = get_type_hints(Checkpoint) | {"normalisation": list[list[float]]}
    later = {f.name for f in fields(Checkpoint) if f.default is not MISSING or f.default_factory is not MISSING}
    schema = {f"{name}?" if name in later else name: kind for name, kind in kinds.items()}
    try:
        content = read_record(path, FORMAT, schema, "checkpoint", REMEDY)
    except UserError as not_ours:
        if not path.is_file():
            raise
        try:
            return imported_checkpoint(path, read_imported(path), "", [])
        except ValueError:  # it is damaged
            raise not_ours from None
    try:
        content["normalisation"] = Normalisation.of(*content.get("normalisation", IMAGENET))
    except (TypeError, ValueError) as error:
        raise UserError(f"checkpoint {path} has no usable normalisation ({error}): {REMEDY}") from error
    return Checkpoint(**{name: content[name] for name in kinds if name in content})


def imported_checkpoint(path: Path, imported: Imported, dataset: str, class_names: list[str]) -> Checkpoint:
    """A file of another repository as a checkpoint; dataset "" and no class_names where they are not known."""
    peer = imported.peer
    backbone = create_backbone(peer.backbone, peer.img_size, seed=0)
    load_state(backbone, backbone.state_dict() | imported.state, path)
    head_state: dict[str, Tensor] = {}
    if imported.head_state and class_names:
        head = build_head(imported.method, backbone.feature_dim, len(class_names), imported.s, imported.m)
        load_state(head, imported.head_state, path)
        head_state = head.state_dict()
    return Checkpoint(
        stage="transferLearning" if head_state else "imported",
        dataset=dataset,
        method=imported.method,
        backbone=peer.backbone,
        img_size=peer.img_size,
        class_names=class_names,
        backbone_state=backbone.state_dict(),
        head_state=head_state,
        epoch=imported.epoch,
        val_accuracy=imported.accuracy,
        config={"imported_from": path.name, "repository": imported.repository, "s": imported.s, "m": imported.m},
        normalisation=peer.normalisation,
        eval_resize=peer.resize,
    )


def create_backbone(name: str, img_size: int, seed: int, relation: bool = False, weights: str = "none") -> Backbone:
    """A new backbone (see build_backbone), its initial weights drawn from `seed` where none are given.

    Raises UserError when the backbone or the weights cannot be had, or the image size is not one that it takes.
    """
    try:
        with seeded(seed, "backbone"):
            backbone = build_backbone(name, img_size, relation, weights)
    except ValueError as error:
        raise UserError(str(error)) from error
    check_weights(backbone, name if weights in ("none", "DEFAULT") else weights)
    return backbone


def load_backbone(
    path: Path, backbone: str | None, img_size: int | None, relation: bool = False
) -> tuple[Backbone, Checkpoint]:
    """The backbone of a checkpoint. Raises UserError when it is not of the name and image size asked for, if any.

    `relation` makes a Conv4 the one of RelationNet, whose parameters are the same: a checkpoint of either is taken.
    Code of the user's own, custom:..., is run only when asked for by name: no file has it imported.
    """
    checkpoint = load_checkpoint(path)
    if str(checkpoint.backbone).startswith("custom:") and backbone is None:
        raise UserError(f"{path} is of code of a user, which is run only if you give --backbone {checkpoint.backbone}")
    found = {"backbone": checkpoint.backbone, "img_size": checkpoint.img_size}
    for flag, asked in (("backbone", backbone), ("img_size", img_size)):
        if asked not in (None, found[flag]):
            raise UserError(f"checkpoint {path} has {flag} {found[flag]}, not {asked}: give --{flag} {found[flag]}")
    net = create_backbone(checkpoint.backbone, checkpoint.img_size, seed=0, relation=relation)
    load_state(net, checkpoint.backbone_state, path)
    net.normalisation, net.eval_resize = checkpoint.normalisation, checkpoint.eval_resize
    return net, checkpoint


def check_base_classes(path: Path, checkpoint: Checkpoint, dataset: str, class_names: list[str]) -> None:
    """Raise UserError when a checkpoint was trained on other base classes than a benchmark has, or on another version
    of glyphs."""
    version = checkpoint.glyphs_version
    if checkpoint.dataset == "glyphs" and version != GLYPHS_VERSION:
        made_with = f"checkpoint {path} was trained on version {version} of 'glyphs', which is now {GLYPHS_VERSION}"
        raise UserError(f"{made_with}: train it again with --overwrite")
    if not checkpoint.class_names:
        print(f"note: {path} does not name the classes that it was trained on: see that none of them is novel here")
    elif set(checkpoint.class_names) != set(class_names):
        raise UserError(
            f"checkpoint {path} was trained on {len(checkpoint.class_names)} base classes of {checkpoint.dataset!r} "
            f"that are not the {len(class_names)} of {dataset!r}: give the benchmark that it was trained on"
        )


def detail_notes(checkpoint: Checkpoint | None, split: Split) -> list[str]:
    """A line where a split's images have less than half the pixels of those that a checkpoint was trained on."""
    (height, width), (h, w) = median_size(split), (checkpoint and checkpoint.median_size) or (0, 0)
    if 2 * height * width >= h * w:
        return []
    return [
        f"{split.split} images of {split.benchmark} have {width}x{height} pixels, those that the checkpoint was "
        f"trained on {w}x{h}: it looks for detail that they lack"
    ]


def initial_backbone(
    name: str, img_size: int, weights: str, init_from: Path | None, run: Run, relation: bool = False
) -> tuple[Backbone, Checkpoint | None]:
    """What training starts from, on the run's device: the backbone of a checkpoint, if one is named, or a new one.

    relation: see load_backbone. Raises UserError as load_backbone and create_backbone do.
    """
    checkpoint: Checkpoint | None = None
    if init_from:
        net, checkpoint = load_backbone(init_from, name, img_size, relation)
    else:
        net = create_backbone(name, img_size, run.seed, relation, weights)
    return net.to(run.device).to(memory_format=torch.channels_last), checkpoint


def load_state(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict, with one clear line (UserError) when its names or shapes are not the module's, or are NaN."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        reason = one_line(error, 200)
        raise UserError(f"the weights of {path} do not fit {type(module).__name__} ({reason})") from error
    check_weights(module, path)


def check_weights(module: nn.Module, source: str | Path) -> None:
    """Raise UserError, naming where they are from, when weights or statistics of a module are NaN or infinite."""
    for name, value in module.state_dict().items():
        if not value.isfinite().all():
            raise UserError(
                f"the weights of {source} are not finite, the first in {name}: it diverged in training or is damaged, "
                "so give another"
            )
