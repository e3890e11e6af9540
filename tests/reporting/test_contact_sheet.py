"""The contact sheet: its pictures and its texts."""

import numpy as np
import pytest
from PIL import Image

from reporting.contact_sheet import SIDE, elide, picture, typeface


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
