"""How an image of any size becomes the square that a network takes: a property of the network, as its normalisation is.

A rule is `published` (both sides to int(1.15 s)), `none` (both sides to s itself, so that an image of that size is left
as it is), `short:N` (the shorter side to N, the aspect kept) or `both:N` (both sides to N), the last two by bilinear
interpolation or, with `:bicubic`, by bicubic; then the s x s pixels in the centre are taken.
"""

import re
from collections.abc import Callable
from typing import cast

import torch

from engine.errors import UserError

PUBLISHED = "published"
RULE = re.compile(r"published|none|(short|both):([1-9]\d{0,4})(:bicubic)?")
MAX_ASPECT = 64  # a thinner image is squeezed: a line of 1 x 65,535 pixels would take gigabytes
USAGE = "published, none, short:N or both:N, such as short:92 or both:96:bicubic"


def check_rule(rule: str, img_size: int) -> None:
    """Raise UserError when a rule is none, or makes an image smaller than the s x s pixels that are taken."""
    found = RULE.fullmatch(rule)
    if not found:
        raise UserError(f"--eval_resize {rule!r} is no resize rule: expected {USAGE}")
    if found[2] and int(found[2]) < img_size:
        raise UserError(
            f"--eval_resize {rule} leaves {found[2]} pixels, but {img_size} are taken: give --img_size {found[2]}"
        )


def resized_size(rule: str, size: tuple[int, int], img_size: int) -> tuple[int, int]:
    """The (width, height) that a rule resizes an image of `size` to, before the centre is taken."""
    found = RULE.fullmatch(rule)
    if not found or not found[2]:
        side = int(1.15 * img_size) if rule == PUBLISHED else img_size
        return side, side
    side = int(found[2])
    if found[1] == "both":
        return side, side
    width, height = size
    smaller = cast(Callable[[int, int], int], torch.sym_min)  # of the sizes that torch.export follows, too
    shorter, most = smaller(width, height), MAX_ASPECT * side
    return smaller(side * width // shorter, most), smaller(side * height // shorter, most)
