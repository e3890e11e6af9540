"""Decoding once: the published evaluation view, every kind of image, and a cache that is never stale or half there."""

import errno
import io
import os
import shutil
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from data import decode, image_cache
from data.decode import open_rgb
from data.image_cache import ImageFiles, decode_all, load_images
from engine.errors import UserError


def random_image(width, height, seed=0, mode="RGB"):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray(np.asarray(image) ^ rng.integers(0, 8, (height, width, 3), dtype=np.uint8)).convert(mode)


def write_images(folder, sizes, suffix="png"):
    """Images folder/class/<i>.png of the given (width, height)."""
    (folder / "class").mkdir(parents=True, exist_ok=True)
    paths = [folder / "class" / f"{i}.{suffix}" for i in range(len(sizes))]
    for i, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        random_image(*size, seed=i).save(path)
    return paths


def load(paths, cache_dir, img_size=16, with_train=True, num_workers=2):
    names = [f"{path.parent.name}/{path.name}" for path in paths]
    files = ImageFiles("toy_base", paths, names, 0.08 if with_train else None)
    return load_images(files, img_size, cache_dir, num_workers, quiet=True)


def chw(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def assert_same(a, b):
    assert torch.equal(a.eval, b.eval) and torch.equal(a.train, b.train) and torch.equal(a.sizes, b.sizes)
    assert a.fingerprint == b.fingerprint


@pytest.fixture
def no_decoding(monkeypatch):
    """A function after whose call nothing can be decoded."""

    def fail(*_):
        raise AssertionError("decoded again")

    return lambda: monkeypatch.setattr(image_cache, "decode_all", fail)


@pytest.mark.parametrize("img_size", [16, 21, 42, 84])
def test_eval_view_is_torchvisions_resize_and_centre_crop(tmp_path, img_size):
    paths = write_images(tmp_path, [(20, 33), (100, 60), (96, 96), (1, 7), (21, 21)])
    arrays = load(paths, tmp_path / "cache", img_size, with_train=False)
    assert arrays.train is None and arrays.eval.dtype == torch.uint8
    side = int(1.15 * img_size)
    for path, view in zip(paths, arrays.eval, strict=True):
        resized = Resize((side, side), InterpolationMode.BILINEAR)(Image.open(path).convert("RGB"))
        assert torch.equal(view, chw(CenterCrop(img_size)(resized)))


def test_arrays_do_not_depend_on_workers_or_chunks(tmp_path, monkeypatch):
    paths = write_images(tmp_path, [(20 + i, 30 - i) for i in range(11)], suffix="jpg")
    alone = load(paths, tmp_path / "cache0", num_workers=0)
    assert_same(alone, load(paths, tmp_path / "cache1", num_workers=1))
    monkeypatch.setattr(image_cache, "CHUNK", 3)
    assert_same(alone, load(paths, tmp_path / "cache4", num_workers=4))


def test_images_of_one_small_size_are_kept_as_they_are(tmp_path):
    paths = write_images(tmp_path, [(24, 18)] * 3)
    arrays = load(paths, tmp_path / "cache")
    assert arrays.sizes.tolist() == [[18, 24]] * 3
    for path, kept in zip(paths, arrays.train, strict=True):
        assert torch.equal(kept, chw(Image.open(path)))


@pytest.mark.parametrize(
    "sizes, stored",
    [
        ([(24, 18), (24, 18), (18, 24), (20, 60)], (24, 60)),
        ([(240, 180), (180, 240)], (71, 71)),
        ([(300, 290)] * 2, (72, 70)),
        ([(9000, 2), (8000, 2)], (4743, 1)),
    ],
    ids=["unequal", "unequal and large", "large", "long"],
)
def test_other_images_are_kept_at_one_size_of_no_more_pixels_than_the_smallest_crop_needs(tmp_path, sizes, stored):
    paths = write_images(tmp_path, sizes)
    arrays = load(paths, tmp_path / "cache", img_size=20)  # 20 x 20 pixels of 0.08 of an image: 5000 in all
    assert arrays.sizes.tolist() == [[height, width] for width, height in sizes]
    for path, kept in zip(paths, arrays.train, strict=True):
        assert torch.equal(kept, chw(Image.open(path).resize(stored, Image.Resampling.LANCZOS)))


def test_no_crop_scale_keeps_more_than_the_limit_of_an_image(tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "MAX_TRAIN_PIXELS", 30 * 30)
    monkeypatch.setattr(image_cache, "MAX_NATIVE_PIXELS", 0)
    (kept,) = load(write_images(tmp_path, [(60, 60)]), tmp_path / "cache").train
    assert kept.shape == (3, 30, 30)


def test_image_sizes_and_smallest_crops_have_caches_of_their_own(tmp_path, no_decoding):
    paths = write_images(tmp_path, [(120, 120), (90, 120)])
    names = [path.name for path in paths]
    stored = {(16, None): None, (16, 0.08): 57, (24, 0.08): 85, (16, 0.5): 41}
    for _ in range(2):
        for (img_size, min_crop), side in stored.items():
            files = ImageFiles("toy_base", paths, names, min_crop)
            arrays = load_images(files, img_size, tmp_path / "cache", 1, quiet=True)
            assert arrays.eval.shape == (2, 3, img_size, img_size)
            assert side == (None if arrays.train is None else arrays.train.shape[2])
        no_decoding()
    assert len(list((tmp_path / "cache").iterdir())) == len(stored)


def test_evaluation_takes_the_cache_of_a_training(tmp_path, no_decoding):
    paths = write_images(tmp_path, [(20, 20), (30, 20)])
    trained = load(paths, tmp_path / "cache")
    no_decoding()
    evaluated = load(paths, tmp_path / "cache", with_train=False)
    assert torch.equal(evaluated.eval, trained.eval) and evaluated.train is None
    assert evaluated.fingerprint == trained.fingerprint


def test_a_changed_image_is_decoded_anew(tmp_path):
    paths = write_images(tmp_path, [(20, 20)] * 3, suffix="bmp")
    before = load(paths, tmp_path / "cache")
    saved_at, n_bytes = paths[1].stat().st_mtime_ns, paths[1].stat().st_size
    random_image(20, 20, seed=9).save(paths[1])
    assert paths[1].stat().st_size == n_bytes
    os.utime(paths[1], ns=(saved_at + 1, saved_at + 1))
    after = load(paths, tmp_path / "cache")
    assert torch.equal(after.train[1], chw(Image.open(paths[1])))
    assert torch.equal(after.train[::2], before.train[::2])
    assert after.fingerprint != before.fingerprint


def test_the_fingerprint_tells_names_and_bytes_and_nothing_else(tmp_path):
    paths = write_images(tmp_path / "a", [(20, 20)] * 3)
    fingerprint = load(paths, tmp_path / "cache").fingerprint
    copies = [shutil.copy(path, tmp_path / path.name) for path in paths]
    names = [f"class/{path.name}" for path in paths]
    same = ImageFiles("other", copies, names, min_crop=None)
    assert load_images(same, 42, tmp_path / "other_cache", 1, quiet=True).fingerprint == fingerprint
    renamed = ImageFiles("other", copies, ["class/x", *names[1:]], min_crop=None)
    assert load_images(renamed, 42, tmp_path / "other_cache", 1, quiet=True).fingerprint != fingerprint


@pytest.mark.parametrize("file", ["eval.bin", "train.bin", "sizes.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_damaged_cache_is_decoded_anew(tmp_path, file, damage):
    paths = write_images(tmp_path, [(20, 20), (30, 20)])
    first = load(paths, tmp_path / "cache")
    expected = [tensor.clone() for tensor in (first.eval, first.train, first.sizes)]
    (target,) = (tmp_path / "cache").glob(f"*/{file}")
    content = target.read_bytes()
    target.unlink()
    if damage != "missing":
        target.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    again = load(paths, tmp_path / "cache")
    for tensor, value in zip((again.eval, again.train, again.sizes), expected, strict=True):
        assert torch.equal(tensor, value)
    assert target.read_bytes() == content


@pytest.mark.parametrize("content", ["null", "[]", "{}", '{"versions": 1, "fingerprint": null}'])
def test_a_cache_description_of_another_form_is_written_anew(tmp_path, content):
    paths = write_images(tmp_path, [(20, 20)])
    first = load(paths, tmp_path / "cache")
    (meta,) = (tmp_path / "cache").glob("*/meta.json")
    meta.write_text(content)
    assert_same(first, load(paths, tmp_path / "cache"))


def test_the_users_folder_is_left_as_it_is_and_may_be_read_only(tmp_path):
    source = tmp_path / "source"
    paths = write_images(source, [(20, 20), (30, 20)])

    def state():
        return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in source.rglob("*")}

    before = state()
    for path in [*paths, source / "class", source]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        arrays = load(paths, tmp_path / "cache")
        arrays.train.zero_()
        arrays.eval.zero_()
    finally:
        for path in [source, source / "class", *paths]:
            path.chmod(0o755)
    assert state() == before


def test_two_processes_that_build_the_same_cache_do_not_disturb_each_other(tmp_path, monkeypatch):
    paths = write_images(tmp_path, [(20, 20), (30, 20)])
    winners = []

    def overtaken(*args):
        monkeypatch.setattr(image_cache, "decode_all", decode_all)
        winners.append(load(paths, tmp_path / "cache"))
        winners.append((next((tmp_path / "cache").glob("*/meta.json"))).stat().st_ino)
        decode_all(*args)

    monkeypatch.setattr(image_cache, "decode_all", overtaken)
    late = load(paths, tmp_path / "cache")
    assert_same(late, winners[0])
    (folder,) = (tmp_path / "cache").iterdir()
    assert (folder / "meta.json").stat().st_ino == winners[1]  # the winner's files, which it may be mapping


# Every kind of file that people have. Each is made from, and must come back as, the RGB image `colours`.


def colours():
    return random_image(14, 11, seed=3)


def greys():
    return colours().convert("L").convert("RGB")


def few_colours():
    return colours().quantize(8).convert("RGB")


def saved(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    file.seek(0)
    return file.read()


def sixteen_bits(dtype):
    return Image.fromarray(np.asarray(colours().convert("L")).astype(dtype) * 257)


def with_alpha(mode):
    image = colours().convert("L" if mode == "LA" else "RGB")
    image.putalpha(colours().convert("L").point(lambda v: 255 - v // 2))
    return image


KINDS = {
    "rgb png": (lambda: saved(colours(), "PNG"), colours),
    "rgb bmp": (lambda: saved(colours(), "BMP"), colours),
    "rgb webp": (lambda: saved(colours(), "WEBP", lossless=True), colours),
    "palette png": (lambda: saved(colours().quantize(8), "PNG"), few_colours),
    "palette png with a transparent colour": (lambda: saved(colours().quantize(8), "PNG", transparency=2), few_colours),
    "palette png with alphas": (lambda: saved(colours().quantize(8), "PNG", transparency=b"\x00\x80"), few_colours),
    "palette gif": (lambda: saved(colours().quantize(8), "GIF"), few_colours),
    "rgba png": (lambda: saved(with_alpha("RGBA"), "PNG"), colours),
    "grey and alpha png": (lambda: saved(with_alpha("LA"), "PNG"), greys),
    "grey png": (lambda: saved(colours().convert("L"), "PNG"), greys),
    "16-bit grey png": (lambda: saved(sixteen_bits(np.uint16), "PNG"), greys),
    "16-bit grey tiff": (lambda: saved(sixteen_bits(np.uint16), "TIFF"), greys),
    "32-bit integer tiff": (lambda: saved(sixteen_bits(np.int32), "TIFF"), greys),
    "float tiff of 0..65535": (lambda: saved(sixteen_bits(np.float32), "TIFF"), greys),
    "float tiff of 0..255": (
        lambda: saved(Image.fromarray(np.asarray(colours().convert("L"), np.float32)), "TIFF"),
        greys,
    ),
    "black and white png": (
        lambda: saved(colours().convert("1"), "PNG"),
        lambda: colours().convert("1").convert("RGB"),
    ),
    "cmyk tiff": (lambda: saved(colours().convert("CMYK"), "TIFF"), colours),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_becomes_upright_8_bit_rgb(tmp_path, kind):
    make, expected = KINDS[kind]
    (tmp_path / "image").write_bytes(make())
    image = open_rgb(tmp_path / "image")
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, int) - np.asarray(expected(), int)).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_every_mode_become_rgb(tmp_path, mode):
    (tmp_path / "image.jpg").write_bytes(saved(colours().convert(mode), "JPEG", quality=100, subsampling=0))
    expected = greys() if mode == "L" else colours()
    image = open_rgb(tmp_path / "image.jpg")
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).mean() < 3


# How an image must be stored so that a viewer that follows its EXIF orientation shows it upright.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
    9: None,  # no such orientation: to be ignored
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_followed_in_the_image_and_in_its_size(tmp_path, orientation):
    turn = STORED[orientation]
    stored = colours() if turn is None else colours().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "class").mkdir()
    path = tmp_path / "class" / "photo.png"
    path.write_bytes(saved(stored, "PNG", exif=exif))
    arrays = load([path], tmp_path / "cache")
    assert arrays.sizes.tolist() == [[11, 14]]
    assert torch.equal(arrays.train[0], chw(colours()))


# Files that cannot be used: one clear line that names the file, and no cache left behind.


def png_header(width, height):
    """A PNG that claims width x height pixels and holds a few bytes."""

    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"\0" * 64)) + part(b"IEND", b"")


def truncated(data):
    return data[: len(data) // 2]


def not_a_number():
    values = np.ones((5, 5), np.float32)
    values[2, 2] = np.nan
    return saved(Image.fromarray(values), "TIFF")


BAD = {
    "truncated jpeg": lambda: truncated(saved(random_image(90, 90), "JPEG")),
    "truncated png": lambda: truncated(saved(random_image(90, 90), "PNG")),
    "empty file": lambda: b"",
    "text": lambda: b"<html>404</html>",
    "NaN pixels": not_a_number,
    "bomb": lambda: png_header(60_000, 60_000),
    "no pixels": lambda: (
        b"BM" + struct.pack("<IIIIiiHHIIIIII", 58, 0, 54, 40, 0, 1, 1, 24, 0, 4, 1, 1, 0, 0) + b"\0" * 4
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_cannot_be_decoded_is_named_and_leaves_no_cache(tmp_path, kind):
    paths = write_images(tmp_path, [(20, 20)] * 3, suffix="jpg")
    paths[1].write_bytes(BAD[kind]())
    with pytest.raises(UserError, match="cannot be decoded.*take it out") as error:
        load(paths, tmp_path / "cache")
    assert str(paths[1]) in str(error.value) and "\n" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_image_above_the_pixel_limit_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    (path,) = write_images(tmp_path, [(40, 30)])
    monkeypatch.setattr(decode, "MAX_PIXELS", 40 * 30)
    assert open_rgb(path).size == (40, 30)
    monkeypatch.setattr(decode, "MAX_PIXELS", 40 * 30 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    for read in (decode.image_size, open_rgb):
        with pytest.raises(UserError, match=r"0\.png cannot be decoded \(40x30 pixels is more than the limit of 1199"):
            read(path)


@pytest.mark.parametrize("raised", [struct.error("bad"), TypeError("bad"), IndexError("bad"), EOFError("bad\nfile")])
def test_whatever_the_decoder_raises_is_one_line_that_names_the_file(tmp_path, monkeypatch, raised):
    (path,) = write_images(tmp_path, [(20, 20)])

    def to_rgb(image, reading):
        raise raised

    monkeypatch.setattr(decode, "to_rgb", to_rgb)
    with pytest.raises(UserError, match=r"0\.png cannot be decoded \(bad") as error:
        open_rgb(path)
    assert "\n" not in str(error.value)


def test_a_missing_image_is_named(tmp_path):
    paths = write_images(tmp_path, [(20, 20)] * 2)
    paths[1].unlink()
    with pytest.raises(UserError, match=r"1\.png is missing"):
        load(paths, tmp_path / "cache")


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path):
    paths = write_images(tmp_path, [(20, 20)])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache_dir") as error:
        load(paths, tmp_path / "file" / "cache")
    assert str(tmp_path / "file" / "cache") in str(error.value)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    paths = write_images(tmp_path, [(20, 20)])

    def fill(*args):
        decode_all(*args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(image_cache, "decode_all", fill)
    with pytest.raises(UserError, match="No space left on device.*--cache_dir"):
        load(paths, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# What nobody would call an image, and images that change under a cache.


def test_an_image_of_another_format_is_refused_whatever_its_name(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(saved(colours(), "EPS"))
    with pytest.raises(UserError, match="it is none of JPEG, PNG"):
        open_rgb(path)


@pytest.mark.parametrize("link", [False, True])
def test_a_pipe_is_no_image_and_nobody_waits_for_it(tmp_path, link):
    (path,) = write_images(tmp_path, [(20, 20)])
    path.unlink()
    os.mkfifo(tmp_path / "pipe" if link else path)
    if link:
        path.symlink_to(tmp_path / "pipe")
    with pytest.raises(UserError, match="class/0.png cannot be decoded .it is no regular file"):
        load([path], tmp_path / "cache")


@pytest.mark.parametrize("in_place", [False, True])
def test_images_of_the_same_size_and_time_are_noticed(tmp_path, in_place):
    (path,) = write_images(tmp_path, [(20, 20)], suffix="bmp")
    load([path], tmp_path / "cache")
    before = path.stat()
    if not in_place:
        path.rename(tmp_path / "kept.bmp")
    random_image(20, 20, seed=9).save(path)
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert torch.equal(load([path], tmp_path / "cache").train[0], chw(Image.open(path)))


def test_the_folder_of_a_killed_builder_is_removed_and_that_of_a_living_one_stays(tmp_path):
    cache, gone = tmp_path / "cache", subprocess.Popen(["true"])
    gone.wait()
    living, dead = (cache / f"{image_cache.BUILDING}{pid}.x" for pid in (os.getpid(), gone.pid))
    for folder in (living, dead):
        folder.mkdir(parents=True)
    load(write_images(tmp_path, [(20, 20)]), cache)
    assert [path for path in cache.iterdir() if path.name.startswith(".")] == [living]


@pytest.mark.parametrize("place", range(3))
def test_arrays_of_another_version_of_the_code_are_computed_again(tmp_path, monkeypatch, place):
    paths = write_images(tmp_path, [(20, 20)])
    before = load(paths, tmp_path / "cache").eval.clone()
    versions = [version + (i == place) for i, version in enumerate(image_cache.VERSIONS)]
    monkeypatch.setattr(image_cache, "VERSIONS", versions)
    view = image_cache.eval_view
    monkeypatch.setattr(image_cache, "eval_view", lambda *given: 255 - view(*given))
    for _ in range(2):
        assert torch.equal(load(paths, tmp_path / "cache").eval, 255 - before)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_an_image_that_goes_while_images_are_decoded_is_named(tmp_path, monkeypatch):
    paths = write_images(tmp_path, [(20, 20)] * 2)
    sizes = image_cache.stored_size
    monkeypatch.setattr(image_cache, "stored_size", lambda *given: paths[1].unlink() or sizes(*given))
    with pytest.raises(UserError, match="image .*class/1.png cannot be decoded .*No such file"):
        load(paths, tmp_path / "cache")


def test_a_name_that_is_no_text_is_one_line(tmp_path):
    (path,) = write_images(tmp_path, [(20, 20)])
    path = path.rename(path.with_name(os.fsdecode(b"\xff.png")))
    with pytest.raises(UserError, match="not UTF-8: rename it"):
        load([path], tmp_path / "cache")


def test_an_image_of_another_size_that_no_sample_shows_counts(tmp_path, monkeypatch):
    paths = write_images(tmp_path, [(20, 20), (20, 20), (20, 20), (30, 20)])
    whole = load(paths, tmp_path / "whole")
    monkeypatch.setattr(image_cache, "SAMPLE", 2)
    sampled = load(paths, tmp_path / "sampled")
    assert_same(sampled, whole)
    assert sampled.sizes.tolist() == [[20, 20]] * 3 + [[20, 30]]
