"""The contact sheet: its pictures and its texts."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from engine.errors import UserError
from photos.contact_sheet import (
    CAPTION,
    COLUMNS,
    GAP,
    HEADER,
    MARGIN,
    PAIR,
    SIDE,
    draw_sheet,
    elide,
    picture,
    typeface,
    write_sheet,
)
from photos.predictions import Predictions
from reporting.figure_style import BLUE, ORANGE, PALE


def test_pictures_are_upright_whole_and_square(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter: the white left half becomes the top
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    shown = np.asarray(picture(tmp_path / "turned.png").convert("L")).astype(int)
    assert shown.shape == (SIDE, SIDE)
    assert shown[10, SIDE // 2] > 250 and shown[-10, SIDE // 2] < 5
    assert 5 < shown[SIDE // 2, 5] < 250  # the empty border


@pytest.mark.parametrize("text", ["a", "a class of a very long name indeed", "猫" * 50, "", "two\nlines of text here"])
@pytest.mark.parametrize("keep_end", [True, False])
def test_elided_text_fits(text, keep_end):
    font = typeface(12)
    cut = elide(text, font, 60, keep_end)
    assert font.getlength(cut) <= 60
    assert cut == " ".join(text.split()) or (cut.startswith("…") if keep_end else cut.endswith("…"))


@pytest.fixture
def predictions(tmp_path):
    """Six grey queries, the last of them labelled wrongly, and a grey support image of each of two classes."""
    for name in ("a", "b", *(f"q{i}" for i in range(6))):
        Image.new("RGB", (20, 20), (128, 128, 128)).save(tmp_path / f"{name}.png")
    probabilities = torch.tensor([[0.9, 0.1]] * 6)
    return Predictions(
        files=[f"q{i}.png" for i in range(6)],
        paths=[tmp_path / f"q{i}.png" for i in range(6)],
        class_names=["heron", "tern"],
        probabilities=probabilities,
        finetuned=probabilities,
        nearest=[tmp_path / "a.png"] * 6,
        nearest_label=[0] * 6,
        truth=[0, 0, 0, 0, 0, 1],
        related={},
        n_support=[1, 1],
    )


def frame(sheet, i):
    """The colour of the frame around query i."""
    cell_w, cell_h = PAIR + MARGIN, SIDE + CAPTION + MARGIN
    x, y = MARGIN + i % COLUMNS * cell_w, HEADER + i // COLUMNS * cell_h
    return sheet.getpixel((x - 2, y - 2))


def test_a_sheet_has_a_cell_a_query_and_marks_the_wrong_labels(predictions):
    sheet = draw_sheet(predictions, 100)
    assert sheet.size == (MARGIN + COLUMNS * (PAIR + MARGIN), HEADER + 2 * (SIDE + CAPTION + MARGIN))
    blue, orange = ImageColor.getrgb(BLUE), ImageColor.getrgb(ORANGE)
    assert [frame(sheet, i) for i in range(6)] == [blue] * 5 + [orange]
    unknown = dataclasses.replace(predictions, truth=[None] * 6)  # nothing is wrong that nobody has labelled
    assert {frame(draw_sheet(unknown, 6), i) for i in range(6)} == {blue}


@pytest.mark.parametrize("n, rows", [(1, 1), (COLUMNS, 1), (COLUMNS + 1, 2)])
def test_a_sheet_holds_as_many_queries_as_asked(predictions, n, rows):
    assert draw_sheet(predictions, n).height == HEADER + rows * (SIDE + CAPTION + MARGIN)


def test_a_sheet_is_written_as_a_png_and_nothing_is_left_beside_it(predictions, tmp_path):
    write_sheet(tmp_path / "out" / "sheet.png", predictions, 2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sheet.png"]
    with Image.open(tmp_path / "out" / "sheet.png") as image:
        assert image.format == "PNG" and image.size == draw_sheet(predictions, 2).size
    predictions.paths[1].unlink()
    with pytest.raises(UserError, match="q1.png"):
        write_sheet(tmp_path / "out" / "other.png", predictions, 2)


def test_the_place_of_an_example_that_is_gone_is_empty(predictions, tmp_path):
    """Those of a kept classifier are names, or paths of where it was made."""
    (tmp_path / "folder").mkdir()
    for example in (tmp_path / "gone.png", tmp_path / "folder", Path("heron/0.png")):
        sheet = draw_sheet(dataclasses.replace(predictions, nearest=[example] * 6), 1)
        x, y = MARGIN + SIDE + GAP + SIDE // 2, HEADER + SIDE // 2
        assert sheet.getpixel((x, y)) == ImageColor.getrgb(PALE)
