"""The built-in benchmark: what is rendered, that it is what it says, and that a killed render leaves nothing."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import glyphs
from data.glyphs import CHARACTERS, VERSION, character_tiles, class_name, provide_glyphs, render_glyphs
from engine.errors import UserError


def files_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.jpg"))}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("glyphs") / "glyphs"
    render_glyphs(root, seed=3, n_images=4, n_class=(3, 2, 2))
    return root


@pytest.fixture(scope="module")
def tiles() -> dict[str, list[Image.Image]]:
    return {character: character_tiles(character) for character in CHARACTERS}


def test_folders_and_images(small):
    assert {path.name for path in small.iterdir()} == {"base", "val", "novel", "prepared.json"}
    assert json.loads((small / "prepared.json").read_text()) == {"benchmark": "glyphs", "seed": 3, "version": VERSION}
    assert [len(list((small / split).iterdir())) for split in ("base", "val", "novel")] == [3, 2, 2]
    assert (small / "base" / class_name(CHARACTERS[0])).is_dir()
    assert len(files_of(small)) == 7 * 4
    for path in small.rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (84, 84))


def test_class_names_can_be_read_and_are_folders_anywhere():
    names = [class_name(character) for character in CHARACTERS]
    assert [class_name(c) for c in "@aβΣЖ7"] == [
        "at-sign", "latin-small-a", "greek-beta", "greek-capital-sigma", "cyrillic-capital-zhe", "digit-seven"
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z]+(-[a-z]+)*", name) for name in names), names


@pytest.mark.parametrize("version", [1, VERSION, VERSION + 1])
def test_a_rendering_of_another_version_is_refused_in_one_line(small, tmp_path, version):
    out = shutil.copytree(small, tmp_path / "glyphs")
    (out / "prepared.json").write_text(json.dumps({"benchmark": "glyphs", "seed": 3, "version": version}))
    if version == VERSION:
        assert not provide_glyphs(out)
    else:
        with pytest.raises(UserError, match="' is version .* of glyphs, which is now 2: delete it"):
            provide_glyphs(out)
    assert files_of(out) == files_of(small)


def test_a_folder_of_the_user_called_glyphs_is_left_alone(tmp_path):
    mine = tmp_path / "glyphs" / "base" / "mine" / "a.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert not provide_glyphs(tmp_path / "glyphs")
    (tmp_path / "glyphs" / "prepared.json").write_text('{"benchmark": "folder", "img_size": null}')
    assert not provide_glyphs(tmp_path / "glyphs")
    assert mine.read_text() == "mine"


def test_quiet_shows_no_bar(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    render_glyphs(tmp_path / "loud", n_images=1, n_class=(1, 0, 0))
    assert "rendering loud" in capfd.readouterr().err
    render_glyphs(tmp_path / "silent", n_images=1, n_class=(1, 0, 0), quiet=True)
    assert capfd.readouterr().err == ""


def test_an_image_depends_on_seed_and_character_alone(small, tmp_path):
    render_glyphs(tmp_path / "fewer", seed=3, n_images=2, n_class=(1, 2, 0))
    render_glyphs(tmp_path / "other", seed=4, n_images=2, n_class=(1, 2, 0))
    whole, fewer, other = files_of(small), files_of(tmp_path / "fewer"), files_of(tmp_path / "other")
    by_class = {name.split("/", 1)[1]: content for name, content in whole.items()}
    assert len(fewer) == 6
    assert all(by_class[name.split("/", 1)[1]] == content for name, content in fewer.items())
    assert all(other[name] != content for name, content in fewer.items())


def test_images_of_a_class_differ(small):
    assert len(set(files_of(small).values())) == 7 * 4


def test_every_class_has_many_typefaces_and_no_blank(tiles):
    for character, of_typefaces in tiles.items():
        assert len(of_typefaces) >= 14, character
        for tile in of_typefaces:
            left, top, right, bottom = tile.getbbox()
            assert max(right - left, bottom - top) == pytest.approx(glyphs.EXTENT, abs=4), character


def test_a_typeface_without_the_character_is_left_out():
    # U+FFFE is no character: every typeface draws nothing, or its box for what it lacks.
    assert character_tiles("\ufffe") == []


def test_classes_differ_in_shape_whatever_the_size(tiles):
    """In DejaVu Sans, no character covers another once both are scaled to one size."""
    assert len(set(CHARACTERS)) == len(CHARACTERS) == 100
    first = np.stack([np.asarray(tiles[c][0].resize((40, 40)), dtype=np.float32).ravel() / 255 for c in CHARACTERS])
    overlap = np.stack([np.minimum(row, first).sum(1) / np.maximum(row, first).sum(1) for row in first])
    np.fill_diagonal(overlap, 0)
    i, j = np.unravel_index(overlap.argmax(), overlap.shape)
    assert overlap.max() < 0.85, CHARACTERS[i] + CHARACTERS[j]


def test_an_interrupted_render_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(glyphs, "render_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        render_glyphs(tmp_path / "glyphs", n_images=1)
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_end_with_one_whole_benchmark(small, tmp_path, monkeypatch):
    rename, out = glyphs.os.rename, tmp_path / "glyphs"

    def rename_after_another(source, target):
        monkeypatch.setattr(glyphs.os, "rename", rename)
        render_glyphs(out, seed=3, n_images=4, n_class=(3, 2, 2))
        rename(source, target)

    monkeypatch.setattr(glyphs.os, "rename", rename_after_another)
    render_glyphs(out, seed=3, n_images=4, n_class=(3, 2, 2))
    assert files_of(out) == files_of(small)
    assert list(tmp_path.iterdir()) == [out]
