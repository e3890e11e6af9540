"""A contact sheet: query images with their label and its probability, each beside the support image most like it."""

from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.decode import open_rgb
from engine.files import atomic_file
from photos.images import printable
from photos.predictions import UNSURE, Predictions
from photos.table import estimate
from reporting.figure_style import BLUE, GREY, INK, ORANGE, PALE, PAPER

SIDE, GAP, MARGIN = 112, 4, 20  # pixels: side of a picture, between the two of a cell, around cells
PAIR = 2 * SIDE + GAP
HEADER, CAPTION = 62, 66  # pixels: above all cells, below the pictures of one
COLUMNS = 4


def typeface(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships: Latin, Greek, Cyrillic, Arabic, Hebrew and more."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def elide(text: str, font: ImageFont.FreeTypeFont, width: float, keep_end: bool = False) -> str:
    """The text, its end (its beginning, if keep_end) replaced by an ellipsis where it exceeds `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    lengths = range(len(text) - 1, 0, -1)
    cuts = ("…" + text[-n:] if keep_end else text[:n].rstrip() + "…" for n in lengths)
    return next((cut for cut in cuts if font.getlength(cut) <= width), "…")


def picture(path: Path) -> Image.Image:
    """An upright image on a square of SIDE pixels, its aspect kept; a small one is enlarged."""
    image = ImageOps.contain(open_rgb(path), (SIDE, SIDE), Image.Resampling.BICUBIC)
    return ImageOps.pad(image, (SIDE, SIDE), color=PALE)


def draw_cell(sheet: Image.Image, x: int, y: int, predictions: Predictions, i: int) -> None:
    """Query i, its label and probability, and the support image most like it, with its top left corner at (x, y)."""
    draw = ImageDraw.Draw(sheet)
    large, small = typeface(14, bold=True), typeface(11)
    names = predictions.class_names
    best = predictions.probabilities[i].topk(2)
    (p, p_then), (label, then) = best.values.tolist(), best.indices.tolist()
    nearest, truth = predictions.nearest_label[i], predictions.truth[i]
    wrong = predictions.n_right is not None and truth is not None and truth != label
    colour = ORANGE if wrong else BLUE

    sheet.paste(picture(predictions.paths[i]), (x, y))
    example = predictions.nearest[i]  # of a kept classifier, a name or a path that may be gone
    known = example.is_file()
    sheet.paste(picture(example) if known else Image.new("RGB", (SIDE, SIDE), PALE), (x + SIDE + GAP, y))
    draw.rectangle((x - 2, y - 2, x + SIDE + 1, y + SIDE + 1), outline=colour, width=2)

    percent = f"{100 * p:.0f} %" if p < 0.995 else "> 99 %"
    room = PAIR - large.getlength(percent) - 8
    top = y + SIDE + 6
    shown = names[label] if predictions.sure[i] else f"{UNSURE}: {names[label]}"
    draw.text((x, top), elide(shown, large, room), font=large, fill=INK)
    draw.text((x + PAIR, top), percent, font=large, fill=INK, anchor="ra")
    bar = top + 20
    draw.rectangle((x, bar, x + PAIR - 1, bar + 3), fill=PALE)
    draw.rectangle((x, bar, x + max(1, round(PAIR * p)) - 1, bar + 3), fill=colour)

    half = SIDE - 4
    left = f"then {100 * p_then:.0f} % {names[then]}" if p_then >= 0.005 else ""
    if predictions.unlike and predictions.unlike[i]:
        left = "unlike every class"
    if wrong and truth is not None:
        left = f"is {names[truth]}"
    lines = [(left, ORANGE if wrong else GREY, False)] if left else []
    for row, (text, ink, keep_end) in enumerate([*lines, (predictions.files[i], GREY, True)]):
        draw.text((x, bar + 8 + 15 * row), elide(text, small, half, keep_end), font=small, fill=ink)
    right, file = x + SIDE + GAP, printable(predictions.nearest[i].name)
    like = elide(f"like {names[nearest]}", small, half)
    draw.text((right, bar + 8), like, font=small, fill=INK if nearest == label else GREY)
    draw.text((right, bar + 23), elide(file, small, half, keep_end=True), font=small, fill=GREY)


def draw_sheet(predictions: Predictions, n: int) -> Image.Image:
    """The sheet of the first n queries; raises UserError when an image is gone since it was read."""
    n = min(n, len(predictions.files))
    columns = min(COLUMNS, n)
    cell_w, cell_h = PAIR + MARGIN, SIDE + CAPTION + MARGIN
    rows = -(-n // columns)
    width = max(MARGIN + columns * cell_w, 2 * (MARGIN + cell_w))  # the header needs two columns
    sheet = Image.new("RGB", (width, HEADER + rows * cell_h), PAPER)
    draw = ImageDraw.Draw(sheet)
    support = f"{sum(predictions.n_support)} examples of {len(predictions.class_names)} classes"
    shown = f"{n} of {len(predictions.files)} images" if n < len(predictions.files) else f"{n} images"
    title, room = typeface(16, bold=True), width - 2 * MARGIN
    expected = f", accuracy {estimate(predictions.confidence)} by those" if predictions.confidence else ""
    draw.text((MARGIN, 12), elide(f"{shown}, labelled from {support}{expected}", title, room), font=title, fill=INK)
    orange = "; orange: its folder is another class" if predictions.n_right is not None else ""
    legend = f"left: the image, its label and probability{orange}. Right: the example most like it, and its class"
    draw.text((MARGIN, 36), elide(legend, typeface(11), room), font=typeface(11), fill=GREY)
    for i in range(n):
        draw_cell(sheet, MARGIN + (i % columns) * cell_w, HEADER + (i // columns) * cell_h, predictions, i)
    return sheet


def write_sheet(path: Path, predictions: Predictions, n: int) -> None:
    """Write draw_sheet as a PNG, atomically."""
    sheet = draw_sheet(predictions, n)
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="png", optimize=True)
