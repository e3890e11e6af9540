"""Checkpoints: tensors and plain values only, written atomically, loaded without running any code of the file.

A checkpoint describes itself: backbone and head can be rebuilt from it alone. Its keys are those of `Checkpoint`.
"""

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import UserError
from methods.engine import plain, seeded
from models import build_backbone

FORMAT = "associative-alignment/1"


@dataclass(frozen=True)
class Checkpoint:
    """A trained backbone and its head, with what is needed to use them and to know where they come from."""

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
    config: dict[str, Any]
    format: str = FORMAT


def best_model_path(folder: Path, n_way: int, n_shot: int, dataset: str, method: str, backbone: str) -> Path:
    """The published file name of a best model."""
    return folder / f"{n_way}way_{n_shot}shot_{dataset}_{method}_{backbone}_bestModel.tar"


def save_atomically(path: Path, content: dict[str, Any] | Tensor) -> None:
    """Write `content` so that the file is either the old one or the new one, never half of one.

    Raises UserError when it cannot be written; the file that was there before is then intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error}): free some space or give another folder") from error


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically, its tensors on the CPU and contiguous, its config as plain values."""
    content = {field: getattr(checkpoint, field) for field in checkpoint.__dataclass_fields__}
    for states in ("backbone_state", "head_state"):
        content[states] = {k: v.detach().cpu().contiguous() for k, v in content[states].items()}
    content["config"] = plain(content["config"])
    save_atomically(path, content)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of ours, running nothing of it. Raises UserError when it is missing or is not one."""
    if not path.is_file():
        raise UserError(
            f"no checkpoint {path}: train one with 'python transferLearning.py' and the same --dataset, --method, "
            f"--backbone, --n_shot and --test_n_way, or name one with --init_from"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is not a checkpoint of this project, or is damaged ({str(error).splitlines()[0][:120]}): "
            f"train one with transferLearning.py"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a checkpoint of this project (no format {FORMAT!r}): train one with transferLearning.py"
        )
    return Checkpoint(**content)


def create_backbone(name: str, img_size: int, seed: int) -> nn.Module:
    """A new backbone, its initial weights drawn from `seed`. Raises UserError when the image size is too small."""
    try:
        with seeded(seed, "backbone"):
            return build_backbone(name, img_size)
    except ValueError as error:
        raise UserError(str(error)) from error


def load_backbone(path: Path, backbone: str, img_size: int) -> tuple[nn.Module, Checkpoint]:
    """The backbone of a checkpoint. Raises UserError when it is not of the name and image size asked for."""
    checkpoint = load_checkpoint(path)
    found = {"backbone": checkpoint.backbone, "img_size": checkpoint.img_size}
    for flag, asked in (("backbone", backbone), ("img_size", img_size)):
        if asked != found[flag]:
            raise UserError(
                f"checkpoint {path} has {flag} {found[flag]}, not {asked}: "
                f"give --{flag} {found[flag]} or another checkpoint"
            )
    net = create_backbone(backbone, img_size, seed=0)
    load_state(net, checkpoint.backbone_state, path)
    return net, checkpoint


def load_state(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict, with one clear line (UserError) when its names or shapes are not the module's."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the weights of {path} do not fit {type(module).__name__} ({reason})") from error
