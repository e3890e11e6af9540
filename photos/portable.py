"""A classifier as one file that labels images without this repository, for ONNX or for torch.export."""

import contextlib
import copy
import importlib.util
import io
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from data.transforms import normalise
from engine.errors import UserError
from engine.files import atomic_file
from engine.resizing import resized_size
from photos.classifier import Fitted

MAX_SIDE = 65535  # pixels, of an image to label


def pillow_weights(n: int, size: int, n_taken: int, bicubic: bool) -> Tensor:
    """The weights (n_taken, n) by which Pillow resizes n pixels to `size`, of which those in the centre are taken.

    A triangle, or the cubic of Keys (1981) with a = -0.5, scaled to the smaller image's pixels; to 22 binary places.
    """
    margin = size - n_taken
    scale = torch.full((), n, dtype=torch.double) / size  # a tensor: ONNX would divide the numbers in single precision
    first = margin // 2 + margin % 2 * (margin // 2 % 2)  # margin / 2, its half rounded to even
    centre = (torch.arange(n_taken, dtype=torch.double) + first + 0.5) * scale
    x = (torch.arange(n, dtype=torch.double) + 0.5 - centre.unsqueeze(1)).abs() / scale.clamp_min(1)
    weights = (1 - x).clamp_min(0)
    if bicubic:
        outer = ((2.5 - 0.5 * x) * x - 4) * x + 2
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, outer, 0.0))
    return (weights / weights.sum(1, keepdim=True) * 2**22).round() / 2**22


def eval_pixels(image: Tensor, img_size: int, rule: str) -> Tensor:
    """The pixels (3, s, s) that eval_view takes of an RGB image, uint8 (h, w, 3): the same as Pillow's, by products."""
    height, width, _ = image.shape
    new_width, new_height = resized_size(rule, (width, height), img_size)
    across = pillow_weights(width, new_width, img_size, rule.endswith(":bicubic"))
    down = pillow_weights(height, new_height, img_size, rule.endswith(":bicubic"))
    x = image.permute(2, 0, 1).double()
    # Pillow rounds after each axis; since version 13 it begins with the height where that shrinks by far more.
    across_first, down_first = rounded(down @ rounded(x @ across.T)), rounded(rounded(down @ x) @ across.T)
    less_high, less_wide = torch.full((), height - new_height), torch.full((), width - new_width)
    return torch.where(less_high > (2 * less_wide).clamp_min(0), down_first, across_first)


def rounded(x: Tensor) -> Tensor:
    """Values as whole numbers of 8 bits, halves rounded up."""
    return (x + 0.5).floor().clamp(0, 255)


class Portable(nn.Module):
    """A classifier of one upright RGB image, uint8 (h, w, 3): the index of its class, and probabilities (n_way,)."""

    def __init__(self, fitted: Fitted):
        super().__init__()
        classifier = copy.deepcopy(fitted.classifier).to(torch.device("cpu"))
        self.backbone, self.head, self.temperature = classifier.aligned.eval(), classifier.head, classifier.temperature
        self.img_size, self.rule = fitted.view.img_size, fitted.view.rule

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        pixels = eval_pixels(image, self.img_size, self.rule).unsqueeze(0)
        x = normalise(pixels, self.backbone.normalisation)
        probabilities = (self.head.logits(self.head(self.backbone(x))) / self.temperature).softmax(1).squeeze(0)
        return probabilities.argmax(), probabilities


def check_export(path: Path) -> None:
    """Raise UserError when a file is of no known kind, or what writes that kind is missing."""
    if path.suffix not in (".onnx", ".pt2"):
        raise UserError(f"--export {path}: expected a file named .onnx, or .pt2 for torch.export")
    if path.suffix == ".onnx" and not importlib.util.find_spec("onnxscript"):
        raise UserError(f"--export {path} needs onnxscript, which brings onnx: pip install onnxscript")


@torch.no_grad()
def export_classifier(path: Path, fitted: Fitted) -> None:
    """Write a classifier as a program, .onnx or .pt2, that holds its class names as JSON.

    Raises UserError when it cannot be written, or the network is one that torch.export cannot follow.
    """
    names = json.dumps(fitted.classifier.class_names, ensure_ascii=False)
    sides = {i: torch.export.Dim(side, min=1, max=MAX_SIDE) for i, side in enumerate(("height", "width"))}
    image = torch.zeros(48, 64, 3, dtype=torch.uint8)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # of which torch prints much
            warnings.simplefilter("ignore")
            program = torch.export.export(Portable(fitted).eval(), (image,), dynamic_shapes=(sides,))
            with atomic_file(path) as temporary:
                if path.suffix == ".pt2":
                    with open(temporary, "wb") as file:
                        torch.export.save(program, file, extra_files={"class_names.json": names})
                else:
                    outputs = ["label", "probabilities"]
                    onnx = torch.onnx.export(program, input_names=["image"], output_names=outputs, verbose=False)
                    assert onnx is not None
                    onnx.model.metadata_props["class_names"] = names
                    onnx.save(temporary)
    except UserError:
        raise
    except Exception as error:  # of whatever kind torch raises on a network that it cannot follow
        reason = str(error).splitlines()[0]
        raise UserError(f"--export: torch cannot export {fitted.facts['backbone']} ({reason})") from error
