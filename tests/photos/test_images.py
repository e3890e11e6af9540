"""The user's own folders: which files count, what they are called, and what happens to images that are damaged."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import decode
from data.decode import Reading, open_rgb
from data.image_cache import eval_view
from engine.errors import UserError
from engine.resizing import PUBLISHED
from photos.images import View, decode_views, folder_truth, list_queries, list_support, printable

VIEW = View(16, PUBLISHED, Reading("white"))


def touch(root: Path, *names: str) -> list[Path]:
    """Empty files below `root`."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return [root / name for name in names]


def colours(root: Path, n: int) -> list[Path]:
    """Images root/<i>.png, each of another colour and size."""
    paths = touch(root, *(f"{i}.png" for i in range(n)))
    for i, path in enumerate(paths):
        Image.new("RGB", (20 + i, 30 - i), (10 * i, 200, 5)).save(path)
    return paths


def touch_bytes(root: Path, name: bytes) -> None:
    """An empty file whose name need not be text, where the file system takes such names."""
    path = os.path.join(os.fsencode(root), name)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "wb").close()
    except OSError:
        pytest.skip("file names are text here")


# The support folder.


def test_support_classes_are_the_subfolders_by_name_with_any_number_of_images(tmp_path):
    paths = touch(tmp_path, "bee/2.JPG", "ant/b.png", "ant/a.webp", "ant/c.tiff")
    touch(tmp_path, "notes.txt", "ant/notes.txt", "ant/.d.png", "bee/Thumbs.db", ".git/1.png")
    names, found, labels = list_support(tmp_path)
    assert names == ["ant", "bee"]
    assert found == [paths[2], paths[1], paths[3], paths[0]] and labels == [0, 0, 0, 1]


def test_class_names_are_printable(tmp_path):
    touch(tmp_path, "tea/1.png")
    touch_bytes(tmp_path, b"caf\xe9/1.png")
    names, paths, _ = list_support(tmp_path)
    assert names == [r"caf\xe9", "tea"] and all(path.is_file() for path in paths)


@pytest.mark.parametrize(
    "files, given, message",
    [
        ([], "missing", "missing is not a folder: give a folder of one subfolder per class"),
        (["file"], "file", "file is not a folder: give a folder"),
        (["1.png"], ".", "holds no class folders"),
        (["ant/1.png"], ".", "holds a single class, 'ant': give at least 2 subfolders"),
        (["ant/1.png", "bee/notes.txt"], ".", "bee holds no images .*: remove it"),
    ],
    ids=["missing", "a file", "no class folders", "one class", "an empty class"],
)
def test_support_folders_that_cannot_serve_are_one_clear_line(tmp_path, files, given, message):
    touch(tmp_path, *files)
    with pytest.raises(UserError, match=message) as error:
        list_support(tmp_path / given)
    assert "\n" not in str(error.value)


# The query images.


def test_a_single_image_is_a_query(tmp_path):
    (path,) = touch(tmp_path, "photo.jpeg")
    assert list_queries(path) == ([path], ["photo.jpeg"])


def test_queries_are_all_images_below_a_folder_by_path_named_from_it(tmp_path):
    touch(tmp_path, "b.png", "a/z.jpg", "a/deep/er/y.GIF", "c/x.bmp", "a/notes.txt")
    paths, names = list_queries(tmp_path)
    assert names == ["a/deep/er/y.GIF", "a/z.jpg", "b.png", "c/x.bmp"]
    assert paths == [tmp_path / name for name in names]


def test_hidden_files_and_folders_are_no_queries_and_links_to_folders_are_not_followed(tmp_path):
    touch(tmp_path / "elsewhere", "1.png")
    touch(tmp_path / "query", "1.png", ".2.png", "._1.png", ".cache/3.png", "a/.git/4.png")
    (tmp_path / "query" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "query" / "loop").symlink_to(tmp_path / "query")
    assert list_queries(tmp_path / "query")[1] == ["1.png"]


def test_query_names_are_printable_and_their_paths_still_open(tmp_path):
    touch_bytes(tmp_path, b"caf\xe9.png")
    paths, names = list_queries(tmp_path)
    assert names == [r"caf\xe9.png"] and paths[0].read_bytes() == b""


def test_queries_that_are_missing_or_hold_no_images_say_what_is_there(tmp_path):
    with pytest.raises(UserError, match="query .*missing does not exist"):
        list_queries(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no images \(.*.bmp, .*\): put the images to label there"):
        list_queries(tmp_path / "empty")
    touch(tmp_path / "phone", "1.heic", "2.HEIC", "a/3.mov", ".4.txt")
    with pytest.raises(
        UserError, match=r"phone holds no images \(.*\) besides 2 .heic \(convert .*\), 1 .mov: put the"
    ):
        list_queries(tmp_path / "phone")


# Names.


def test_printable_keeps_any_text_and_replaces_bytes_that_are_none():
    assert printable("große Füchse 狐.png") == "große Füchse 狐.png"
    assert printable(os.fsdecode(b"caf\xe9.png")) == r"caf\xe9.png"


def test_the_truth_of_a_query_is_the_class_that_its_folder_is_named_as():
    names = ["bee/1.png", "x/ant/2.png", "ant/x/3.png", "4.png", "ant.png", "Ant/5.png"]
    assert folder_truth(names, ["ant", "bee"]) == [1, 0, None, None, None, None]


# Decoding.


@pytest.mark.parametrize("num_workers", [0, 3])
def test_views_are_those_of_a_benchmark_in_order_and_nothing_is_written(tmp_path, num_workers):
    paths = colours(tmp_path, 5)
    before = set(tmp_path.rglob("*"))
    views, kept, reasons = decode_views(paths, VIEW, num_workers)
    assert views.shape == (5, 3, 16, 16) and views.dtype == torch.uint8
    for path, view in zip(paths, views, strict=True):
        assert torch.equal(view, torch.from_numpy(eval_view(open_rgb(path), 16).copy()))
    assert kept == [0, 1, 2, 3, 4] and reasons == []
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("bad", [[0], [3, 1]])
def test_a_bad_image_is_named(tmp_path, bad):
    paths = colours(tmp_path, 5)
    for i in bad:
        paths[i].write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=rf"{min(bad)}\.png cannot be decoded"):
        decode_views(paths, VIEW, 2)


def test_bad_images_are_left_out_and_said_when_asked(tmp_path):
    paths = colours(tmp_path, 6)
    whole, _, _ = decode_views(paths, VIEW, 2)
    for i in (2, 5):
        paths[i].write_bytes(paths[i].read_bytes()[:40])
    views, kept, reasons = decode_views(paths, VIEW, 2, skip_bad=True)
    assert kept == [0, 1, 3, 4] and torch.equal(views, whole[kept])
    assert [str(paths[i]) in reason for i, reason in zip((2, 5), reasons, strict=True)] == [True, True]
    views, kept, reasons = decode_views(paths[2:3], VIEW, 2, skip_bad=True)
    assert views.shape == (0, 3, 16, 16) and kept == [] and len(reasons) == 1


# What images of other kinds than 8-bit colour are read as.


def greys(root: Path, white: int, dtype: type, suffix: str) -> list[Path]:
    """Three gradients, of which the darkest has an eighth of the brightest's range, with `white` as their white."""
    root.mkdir()
    paths = [root / f"{i}{suffix}" for i in range(3)]
    for path, share in zip(paths, (0.125, 0.5, 0.9), strict=True):
        Image.fromarray((np.linspace(0, share, 256).reshape(16, 16) * white).astype(dtype)).save(path)
    return paths


@pytest.mark.parametrize(
    "white, dtype, suffix",
    [(1, np.float32, ".tif"), (1023, np.uint16, ".tif"), (4095, np.uint16, ".png"), (65535, np.uint16, ".png")],
)
def test_deep_greys_are_read_by_one_rule_per_folder_as_their_8_bit_copies(tmp_path, white, dtype, suffix):
    deep, plain = greys(tmp_path / "deep", white, dtype, suffix), greys(tmp_path / "plain", 255, np.uint8, ".png")
    view = VIEW.of_folder(deep, 2)
    assert view.reading.white == white and VIEW.of_folder(plain, 2) == VIEW
    views, of_plain = (decode_views(paths, view, 2)[0].int() for paths in (deep, plain))
    assert (views - of_plain).abs().max() <= 2
    # A darker folder that the same camera fills later is read as the first one.
    assert view.of_folder(deep[:1], 2) == view


@pytest.mark.parametrize("white, dtype", [(255, np.uint8), (4095, np.uint16), (65535, np.uint16), (1, np.float32)])
def test_tiffs_whose_zero_is_white_are_read_as_positives_at_any_depth(tmp_path, white, dtype):
    values = np.linspace(0, 1, 256).reshape(16, 16) * white
    Image.fromarray(values.astype(dtype)).save(tmp_path / "black.tif")
    content = bytearray((tmp_path / "black.tif").read_bytes())
    tag = content.index(struct.pack("<HHIH", 262, 3, 1, 1))  # PhotometricInterpretation: one short, 1 for black is zero
    content[tag + 8] = 0
    (tmp_path / "white.tif").write_bytes(content)
    paths = [tmp_path / "black.tif", tmp_path / "white.tif"]
    view = VIEW.of_folder(paths, 2)
    black, white_is_zero = decode_views(paths, view, 2)[0].int()
    assert (255 - white_is_zero - black).abs().max() <= 2 and black[0, 0, 0] < white_is_zero[0, 0, 0]


def test_transparency_is_laid_on_the_background_and_a_benchmarks_is_dropped(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0], pixels[:, 4:, 3] = 200, 255  # red, of which the left half is transparent
    rgba = Image.fromarray(pixels)
    for name, image in (("rgba.png", rgba), ("palette.png", rgba.quantize(8)), ("grey.png", rgba.convert("LA"))):
        image.save(tmp_path / name)
        for background, left in (("white", (255,) * 3), ("#102030", (16, 32, 48))):
            assert open_rgb(tmp_path / name, Reading(background)).getpixel((0, 0)) == left
        opaque = open_rgb(tmp_path / name, Reading("black")).getpixel((7, 0))
        assert opaque == open_rgb(tmp_path / name).getpixel((7, 0)) != (0, 0, 0)
    assert open_rgb(tmp_path / "rgba.png").getpixel((0, 0)) == (200, 0, 0)


def test_a_jpeg_with_too_many_pixels_is_reduced_while_it_is_decoded(tmp_path, monkeypatch):
    image = Image.linear_gradient("L").resize((400, 300)).convert("RGB")
    for suffix in ("jpg", "png"):
        image.save(tmp_path / f"scan.{suffix}")
    monkeypatch.setattr(decode, "MAX_PIXELS", 40_000)
    reduced = open_rgb(tmp_path / "scan.jpg")
    assert reduced.size == (200, 150) and decode.image_size(tmp_path / "scan.jpg") == (150, 200)
    difference = np.asarray(reduced, int) - np.asarray(image.resize((200, 150)), int)
    assert abs(difference).max() < 6
    with pytest.raises(UserError, match="scan.png cannot be decoded .400x300 pixels is more than the limit of 40000"):
        open_rgb(tmp_path / "scan.png")
