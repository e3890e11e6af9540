"""Decode every image once, in parallel, into uint8 arrays that later runs map into memory.

A split has up to two arrays, written in one pass over the files:
- `eval` (N, 3, s, s): the published evaluation view, resize to int(1.15 s) square and centre crop;
- `train`, for the base split of a training: what augmentation crops from. Images that share one small size are kept as
  they are; others are reduced, their aspect kept, to as many pixels as leave s x s of them to the smallest crop.
  `sizes` (N, 2) keeps their original (height, width), in which crops are drawn.

Training images are pixels, not JPEG: decoding takes 0.5 to 1 ms of a core an image, more than a GPU's training step,
and a crop of mapped pixels reads only what it needs; 300 x 225 pixels are 0.2 MB of disk an image.

A cache is keyed by the names, sizes, modification times and inodes of its source files, and by the bytes of at most
SAMPLE of them: changed images are decoded anew. What is not noticed is an image outside of that sample that is written
over in place, to the same size, its time set back; --rebuild_cache decodes all in any case.
A cache never lies beside the user's images, which may be read-only.
"""

import contextlib
import glob
import hashlib
import io
import json
import math
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from engine.budget import check_disk, check_memory
from engine.errors import UserError
from engine.files import check_regular, matches_schema, read_json
from engine.lock import held, is_free
from engine.run import progress_bar

S = TypeVar("S")
T = TypeVar("T")

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
# The decoders that may see a file, whatever its name: others, such as that of EPS, hand it on to an interpreter.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
# A file that claims more pixels is a decompression bomb: 120 million of RGB are more than a telephone's 108, and take
# 480 MB. Of another kind fewer are allowed: BYTES is what decoding a pixel and making it RGB takes, 12 where not named.
MAX_PIXELS = 120_000_000
BYTES = {"RGB": 4, "L": 5, "1": 5, "CMYK": 8, "RGBA": 8, "I": 20, "I;16": 20, "F": 20}
# Images of one common size are kept as they are up to this many pixels each.
MAX_NATIVE_PIXELS = 256 * 256
# Others are reduced to this many at most, enough for 224 px and crops of 0.08 of an image.
MAX_TRAIN_PIXELS = 800 * 800
# Images decoded ahead of the writer: bounds the memory of a pass over any number of images.
CHUNK = 64
# Source files of a split whose bytes are looked at before its cache is trusted.
SAMPLE = 256

# Pillow's, of large and of odd images: what comes of them is said in one line.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class ImageFiles:
    """The N files of one split: a readable name of it such as `glyphs_base`, their paths and their `class/file` names.

    min_crop: the least area of a crop, as a share of its image, where augmentation is to crop from them.
    """

    label: str
    paths: list[Path]
    names: list[str]
    min_crop: float | None


@dataclass(frozen=True)
class UnequalImages:
    """b uint8 images (3, h, w) of `sizes` (b, 2), each in `pixels` from its place in `starts` (b,) on.

    `device` is where what is cut out of them goes.
    """

    pixels: Tensor
    sizes: Tensor
    starts: Tensor
    device: torch.device

    def __getitem__(self, index: Tensor) -> "UnequalImages":
        index = index.cpu()
        return replace(self, sizes=self.sizes[index], starts=self.starts[index])

    def __iter__(self) -> Iterator[Tensor]:
        for (height, width), start in zip(self.sizes.tolist(), self.starts.tolist(), strict=True):
            yield self.pixels[start : start + 3 * height * width].view(3, height, width)

    def to(self, device: torch.device) -> "UnequalImages":
        return replace(self, device=device)


@dataclass(frozen=True)
class ImageArrays:
    """The arrays of one split, uint8: eval (N, 3, s, s) and train (N, 3, H, W), unequal, or None; sizes (N, 2)."""

    eval: Tensor
    train: Tensor | UnequalImages | None
    sizes: Tensor
    fingerprint: str


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as upright 8-bit RGB: EXIF rotation applied, palettes and CMYK converted, 16 bits scaled to 8."""
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError("it holds NaN or infinite pixels")
        # 16-bit and 32-bit greyscale files hold 0..65535; PIL's own conversion would clip them at 255.
        scale = 257.0 if values.max(initial=0) > 255 else 1.0
        image = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
    if image.mode in ("P", "LA", "PA"):
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


@contextlib.contextmanager
def decodable(file: Path | IO[bytes], header: bool = False) -> Iterator[Image.Image]:
    """An image, its pixels not decoded yet, from a path or an open file; with `header` its pixels do not matter.

    Raises ValueError, with the reason in one line, when it is no regular file, of none of FORMATS, a bomb, not what its
    checksums are of, or when the block cannot decode it.
    """
    try:
        if isinstance(file, Path):
            check_regular(file)
        with Image.open(file, formats=FORMATS) as image:
            limit = MAX_PIXELS * BYTES["RGB"] // BYTES.get(image.mode, 12)
            if image.width * image.height > limit:
                raise ValueError(f"{image.width}x{image.height} pixels is more than the limit of {limit}")
            if image.format == "PNG" and not header:  # decoding it compares no checksum of the pixels
                with Image.open(file, formats=("PNG",)) as again:
                    again.verify()
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # on damaged bytes PIL raises also struct.error, TypeError, ...
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


@contextlib.contextmanager
def opened(path: Path, content: bytes | None = None, header: bool = False) -> Iterator[Image.Image]:
    """The same of an image file, or of its content where that is read already, with a UserError that names the file."""
    try:
        with decodable(path if content is None else io.BytesIO(content), header) as image:
            yield image
    except ValueError as error:
        raise undecodable(path, error) from error


def undecodable(path: Path, reason: Exception) -> UserError:
    """What is said of an image file that cannot be decoded."""
    return UserError(f"image {path} cannot be decoded ({reason}): repair it or take it out of the folder")


def regular_bytes(path: Path) -> bytes:
    """The content of a file. Raises ValueError when it is no regular file, OSError when it cannot be read."""
    check_regular(path)
    return path.read_bytes()


def image_bytes(path: Path) -> bytes:
    """The content of an image file. Raises UserError, naming it, when it cannot be read or is no regular file."""
    try:
        return regular_bytes(path)
    except (OSError, ValueError) as error:
        raise undecodable(path, error) from error


def open_rgb(path: Path) -> Image.Image:
    """Decode one file to RGB. Raises UserError, naming the file, when it cannot be decoded or is a bomb."""
    with opened(path) as image:
        return to_rgb(image)


def eval_view(image: Image.Image, img_size: int) -> np.ndarray:
    """The published evaluation transform: resize to int(1.15 s) square, aspect not kept, centre crop: (3, s, s)."""
    side = int(1.15 * img_size)
    offset = round((side - img_size) / 2)
    resized = image.resize((side, side), Image.Resampling.BILINEAR)
    return hwc_to_chw(resized.crop((offset, offset, offset + img_size, offset + img_size)))


def hwc_to_chw(image: Image.Image) -> np.ndarray:
    """An RGB image as a uint8 array (3, h, w)."""
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


def header_size(path: Path) -> tuple[int, int]:
    """(height, width) of an upright image, from its header alone."""
    with opened(path, header=True) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def listing_signature(files: ImageFiles) -> str:
    """A hash that changes with the source files: see the top of this file for what of them it notices.

    Raises UserError for an image that is missing, or whose name is no text.
    """
    digest, step = hashlib.sha256(), math.ceil(len(files.paths) / SAMPLE)
    for i, (path, name) in enumerate(zip(files.paths, files.names, strict=True)):
        try:
            stat = path.stat()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}\n".encode())
        except OSError as error:
            raise UserError(f"image {path} is missing: restore it or take it out of the list") from error
        except UnicodeEncodeError as error:
            raise UserError(f"image {path} has a name that is not UTF-8: rename it, or its folder") from error
        if i % step == 0:
            digest.update(image_bytes(path))
    return digest.hexdigest()


def load_images(
    files: ImageFiles, img_size: int, cache_dir: Path, num_workers: int, quiet: bool, rebuild: bool = False
) -> ImageArrays:
    """The arrays of a split, from the cache or, the first time or to rebuild it, by decoding with num_workers threads.

    Raises UserError when an image cannot be decoded or the cache folder cannot be written.
    """
    signature = listing_signature(files)
    n_pixels = train_pixels(img_size, files.min_crop) if files.min_crop else 0
    label, key = f"{files.label}_{img_size}px", signature[:16]
    folder = cache_dir / (f"{label}_train{n_pixels}_{key}" if n_pixels else f"{label}_{key}")
    shape = [len(files.paths), 3, img_size, img_size]
    remove_abandoned(cache_dir)
    if not n_pixels and not rebuild:  # the evaluation views are the same in the caches of trainings
        others = cache_dir.glob(f"{glob.escape(label)}_*{key}")
        folder = next((other for other in others if is_complete(other, shape, 0)), folder)
    if rebuild or not is_complete(folder, shape, n_pixels):
        check_room(len(files.paths), img_size, cache_dir, num_workers)
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with hidden_folder(folder) as building:
                decode_all(files, img_size, n_pixels, building, num_workers, quiet)
                if rebuild or not is_complete(folder, shape, n_pixels):  # else another process has just built it
                    stale = cache_dir.glob(f"{glob.escape(files.label)}_*px_*{key}") if rebuild else [folder]
                    for each in stale:  # of whatever size
                        shutil.rmtree(each, ignore_errors=True)
                    os.replace(building, folder)
        except OSError as error:
            if not is_complete(folder, shape, n_pixels):
                raise UserError(
                    f"cache folder {folder} cannot be written ({error}): give another --cache_dir"
                ) from error
    sizes = original_sizes(folder)
    return ImageArrays(
        eval=map_array(folder / "eval.bin", shape),
        train=map_train(folder / "train.bin", stored_sizes(sizes, n_pixels)) if n_pixels else None,
        sizes=torch.from_numpy(sizes),
        fingerprint=read_json(folder / "meta.json")["fingerprint"],
    )


def check_room(n_images: int, img_size: int, cache_dir: Path, num_workers: int) -> None:
    """Raise UserError when the evaluation views do not fit on the disk, or those that are decoded at once in memory."""
    what, smaller = f"decoding to {img_size} x {img_size} pixels", "give a smaller --img_size"
    check_memory(
        what, 4 * int(1.15 * img_size) ** 2 * min(max(1, num_workers), n_images), f"{smaller} or --num_workers"
    )
    check_disk(what, 3 * n_images * img_size**2, cache_dir, f"{smaller}, or another --cache_dir")


@contextlib.contextmanager
def hidden_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, hidden, and gone at the end; it is there only while a lock beside it is."""
    hidden = folder.with_name(f".{folder.name}_{uuid.uuid4().hex[:8]}")
    with held(hidden.with_name(f"{hidden.name}.lock")):
        try:
            hidden.mkdir()
            yield hidden
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def remove_abandoned(cache_dir: Path) -> None:
    """Remove the hidden folders, and their locks, of caches whose builder was killed."""
    for lock in cache_dir.glob(".*.lock"):
        if is_free(lock):
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)


def train_pixels(img_size: int, min_crop: float) -> int:
    """The pixels to keep of an image, so that a crop of min_crop of it, or of 0.15 if that is less, has img_size^2.

    With fewer, larger crops are reduced twice by nearly the same: 1.4 grey levels off torchvision's, not 0.7.
    """
    return min(int(img_size**2 / min(min_crop, 0.15)), MAX_TRAIN_PIXELS)


def stored_sizes(sizes: np.ndarray, n_pixels: int) -> np.ndarray:
    """(height, width) (N, 2) at which training images of `sizes` (N, 2) are kept: see the top of this file."""
    area = sizes.prod(1, keepdims=True)
    if (sizes == sizes[0]).all() and area[0] <= MAX_NATIVE_PIXELS:
        return sizes
    return np.maximum(np.rint(sizes * np.sqrt(n_pixels / area).clip(max=1.0)), 1).astype(np.int64)


def original_sizes(folder: Path) -> np.ndarray:
    """The original (height, width) (N, 2) of the images of a cache folder. Raises OSError or ValueError if damaged."""
    sizes = np.fromfile(folder / "sizes.bin", dtype=np.int64).reshape(-1, 2)
    if sizes.min(initial=1) < 1:
        raise ValueError("it holds a size below 1")
    return sizes


def is_complete(folder: Path, shape: list[int], n_pixels: int) -> bool:
    """Whether a cache folder holds evaluation views of this shape and, of n_pixels if any, all training images."""
    try:
        meta, sizes = read_json(folder / "meta.json"), original_sizes(folder)
        known = matches_schema(meta, {"eval_shape": list[int], "fingerprint": str}) and meta["eval_shape"] == shape
        if not known or len(sizes) != shape[0]:
            return False
        n_bytes = {"eval.bin": math.prod(shape)}
        if n_pixels:
            n_bytes["train.bin"] = 3 * int(stored_sizes(sizes, n_pixels).prod(1).sum())
        return all((folder / name).stat().st_size == n for name, n in n_bytes.items())
    except (OSError, ValueError):
        return False


def map_array(path: Path, shape: list[int]) -> Tensor:
    """A uint8 file as a tensor mapped into memory, copy-on-write: the file itself never changes."""
    return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c", shape=tuple(shape)))


def map_train(path: Path, stored: np.ndarray) -> Tensor | UnequalImages:
    """The training images (3, h, w) of sizes `stored` (N, 2) in a file, as one tensor where they are of one size."""
    if (stored == stored[0]).all():
        return map_array(path, [len(stored), 3, *stored[0].tolist()])
    ends = 3 * torch.from_numpy(stored).prod(1).cumsum(0)
    pixels = map_array(path, [int(ends[-1])])
    return UnequalImages(pixels, torch.from_numpy(stored), ends - ends.diff(prepend=ends.new_zeros(1)), pixels.device)


def decode_all(files: ImageFiles, img_size: int, n_pixels: int, folder: Path, num_workers: int, quiet: bool) -> None:
    """Write eval.bin, train.bin (of n_pixels an image, if any), sizes.bin and meta.json of all images into `folder`."""
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        sizes = np.array(list(map_in_chunks(pool, header_size, files.paths)), dtype=np.int64)
        stored = stored_sizes(sizes, n_pixels)
        if n_pixels:
            n_bytes = 3 * (len(sizes) * img_size**2 + int(stored.prod(1).sum()))
            check_disk(
                "keeping images to train on", n_bytes, folder, "give a smaller --img_size or another --cache_dir"
            )

        def decode(i: int) -> tuple[bytes, bytes, bytes]:
            path = files.paths[i]
            content = image_bytes(path)
            with opened(path, content) as encoded:
                image = to_rgb(encoded)
            digest, view = hashlib.sha256(content).digest(), eval_view(image, img_size).tobytes()
            if not n_pixels:
                return digest, view, b""
            height, width = stored[i].tolist()
            # A sharp filter, because the crop is filtered again; an image of this size already is kept as it is.
            return digest, view, hwc_to_chw(image.resize((width, height), Image.Resampling.LANCZOS)).tobytes()

        fingerprint = hashlib.sha256()
        bar = progress_bar(None, f"decode {files.label}", "img", quiet, total=len(files.paths))
        # Plain sequential writes: pages of a written memory map would count as resident memory.
        train = folder / "train.bin" if n_pixels else os.devnull
        with bar, open(folder / "eval.bin", "wb") as eval_file, open(train, "wb") as train_file:
            decoded = map_in_chunks(pool, decode, range(len(files.paths)))
            for name, (content, view, kept) in zip(files.names, decoded, strict=True):
                fingerprint.update(name.encode() + b"\0" + content)
                eval_file.write(view)
                train_file.write(kept)
                bar.update()
    sizes.tofile(folder / "sizes.bin")
    meta: dict[str, object] = {
        "eval_shape": [len(sizes), 3, img_size, img_size],
        "fingerprint": fingerprint.hexdigest()[:16],
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def map_in_chunks(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """The function of each item, in order, computed by the pool at most CHUNK items ahead."""
    for start in range(0, len(items), CHUNK):
        yield from pool.map(function, items[start : start + CHUNK])
