"""Decode every image once, in parallel, into uint8 arrays that later runs map into memory.

A split has up to two arrays, written in one pass over the files:
- `eval` (N, 3, s, s): the evaluation view, resized by the network's rule (see engine/resizing.py), its centre;
- `train` (N, 3, H, W), for the base split of a training: what augmentation crops from. Images of one small size are
  kept as they are; others are resized, whatever their aspect, to one size of as many pixels as leave s x s of them to
  the smallest crop. `sizes` (N, 2) keeps their original (height, width), in which crops are drawn.

A cache is keyed by the names, sizes, modification times and inodes of its source files, by the bytes of at most SAMPLE
of them, and by the versions of the code. What is not noticed is an image outside of that sample that is written over
in place, to the same size, its time set back: then remove the cache folder.
"""

import glob
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.decode import DECODE_VERSION, decode, image_bytes, image_size, naming_image
from engine.budget import check_disk, check_memory
from engine.errors import UserError
from engine.files import is_gone, matches_schema, read_json
from engine.resizing import PUBLISHED, resized_size
from engine.run import Run

S = TypeVar("S")
T = TypeVar("T")

MAX_NATIVE_PIXELS = 256 * 256  # images of one common size are kept as they are up to this many pixels each
MAX_TRAIN_PIXELS = 800 * 800  # others are reduced to this many at most, enough for 224 px and crops of 0.08
CHUNK = 128  # images decoded ahead of the writer: bounds the memory
GROUP = 8  # of them handed to a thread at once: small ones take little longer than to hand over
SAMPLE = 256  # source files of a split whose bytes are compared before its cache is trusted
# Folders in which processes of this machine build caches; the id of the process follows.
BUILDING = f".building.{platform.node()}."


@dataclass(frozen=True)
class ImageFiles:
    """The N files of one split: a readable name of it such as `glyphs_base`, their paths and their `class/file` names.

    min_crop: the least area of a crop, as a share of its image, where augmentation is to crop from them. rule: by which
    the evaluation views are resized.
    """

    label: str
    paths: list[Path]
    names: list[str]
    min_crop: float | None
    rule: str = PUBLISHED


@dataclass(frozen=True)
class ImageArrays:
    """The arrays of one split, uint8: eval (N, 3, s, s) and train (N, 3, H, W) or None; sizes (N, 2)."""

    eval: Tensor
    train: Tensor | None
    sizes: Tensor
    fingerprint: str


EVAL_VIEW_VERSION = 1  # raise it with any change of eval_view


def eval_view(image: Image.Image, img_size: int, rule: str = PUBLISHED) -> np.ndarray:
    """An RGB image resized by a rule (see engine/resizing.py), its centre: (3, s, s)."""
    width, height = resized_size(rule, image.size, img_size)
    left, top = round((width - img_size) / 2), round((height - img_size) / 2)
    by = Image.Resampling.BICUBIC if rule.endswith(":bicubic") else Image.Resampling.BILINEAR
    return hwc_to_chw(image.resize((width, height), by).crop((left, top, left + img_size, top + img_size)))


def hwc_to_chw(image: Image.Image) -> np.ndarray:
    """An RGB image as a uint8 array (3, h, w)."""
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


TRAIN_VIEW_VERSION = 1  # raise it with any change of what train.bin holds


def stored_size(sizes: np.ndarray, n_pixels: int) -> list[int]:
    """The (height, width) at which training images of original `sizes` (N, 2) are kept, all of them."""
    largest = sizes.max(0)
    area = largest.prod()
    if (sizes == largest).all() and area <= MAX_NATIVE_PIXELS:
        return largest.tolist()
    return np.maximum(np.rint(largest * np.sqrt(n_pixels / area).clip(max=1.0)), 1).astype(np.int64).tolist()


VERSIONS = [DECODE_VERSION, EVAL_VIEW_VERSION, TRAIN_VIEW_VERSION]


def listing_signature(files: ImageFiles) -> str:
    """A hash of names, sizes, times and inodes of the source files, and of the bytes of SAMPLE of them.

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


def load_images(files: ImageFiles, img_size: int, cache_dir: Path, num_workers: int, quiet: bool) -> ImageArrays:
    """The arrays of a split, from the cache or, the first time, by decoding with num_workers threads.

    Raises UserError when an image cannot be decoded or the cache folder cannot be written.
    """
    signature = listing_signature(files)
    # Of a training image so many, that the smallest crop, or one of 0.15 if that is smaller, has s x s of them.
    n_pixels = min(int(img_size**2 / min(files.min_crop, 0.15)), MAX_TRAIN_PIXELS) if files.min_crop else 0
    unusual = "" if files.rule == PUBLISHED else f"{files.rule.replace(':', '-')}_"
    label, key = f"{files.label}_{unusual}{img_size}px", signature[:16]
    folder = cache_dir / (f"{label}_train{n_pixels}_{key}" if n_pixels else f"{label}_{key}")
    shape = (len(files.paths), 3, img_size, img_size)
    others = [] if n_pixels else cache_dir.glob(f"{glob.escape(label)}_*{key}")  # of trainings: the same views
    for candidate in [folder, *others]:
        if arrays := read_cache(candidate, shape, n_pixels):
            return arrays
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        for abandoned in cache_dir.glob(f"{glob.escape(BUILDING)}*"):
            if is_gone(abandoned.name.removeprefix(BUILDING).partition(".")[0]):
                shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f"{BUILDING}{os.getpid()}.", dir=cache_dir) as hidden:
            building = Path(hidden) / folder.name
            building.mkdir()
            decode_all(files, img_size, n_pixels, building, num_workers, quiet)
            if not read_cache(folder, shape, n_pixels):  # else another process has just built it
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(building, folder)
        failure = "it is not what was written"
    except OSError as error:
        failure = str(error)
    if arrays := read_cache(folder, shape, n_pixels):
        return arrays
    raise UserError(f"cache folder {folder} cannot be written ({failure}): give another --cache_dir")


def read_cache(folder: Path, shape: tuple[int, ...], n_pixels: int) -> ImageArrays | None:
    """The arrays of a cache folder, with evaluation views of a shape and training images of n_pixels if any, mapped.

    None when the folder is missing, damaged, or of another version of the code.
    """
    try:
        meta = read_json(folder / "meta.json")
        sizes = np.fromfile(folder / "sizes.bin", dtype=np.int64).reshape(shape[0], 2)
        known = matches_schema(meta, {"versions": list, "fingerprint": str}) and meta["versions"] == VERSIONS
        if not known or sizes.min() < 1:
            return None
        train_shape = len(sizes), 3, *stored_size(sizes, n_pixels)
        train = map_array(folder / "train.bin", train_shape) if n_pixels else None
        return ImageArrays(map_array(folder / "eval.bin", shape), train, torch.from_numpy(sizes), meta["fingerprint"])
    except (OSError, ValueError):
        return None


def map_array(path: Path, shape: Sequence[int]) -> Tensor:
    """A uint8 file as a tensor mapped copy-on-write. Raises ValueError when the file is of another size."""
    if path.stat().st_size != math.prod(shape):
        raise ValueError(f"{path} is damaged")
    return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c", shape=tuple(shape)))


def decode_all(files: ImageFiles, img_size: int, n_pixels: int, folder: Path, num_workers: int, quiet: bool) -> None:
    """Write eval.bin, train.bin (of n_pixels per image, if any), sizes.bin and meta.json of all images into `folder`.

    Raises UserError when an image cannot be decoded, or they do not fit in memory or on the disk.
    """
    what, smaller = f"decoding to {img_size} x {img_size} pixels", "give a smaller --img_size"
    n_threads = min(max(1, num_workers), len(files.paths))
    check_memory(what, 4 * int(1.15 * img_size) ** 2 * n_threads, f"{smaller} or --num_workers")
    with ThreadPoolExecutor(n_threads) as pool:
        paths, n_kept = files.paths, 3 * img_size**2
        stored: list[int] = []
        if n_pixels:
            sizes = original_sizes(pool, paths[:: math.ceil(len(paths) / SAMPLE)])
            if (sizes != sizes[0]).any():  # else all are taken to be of one size, and each file is opened once
                sizes = original_sizes(pool, paths)
            stored = stored_size(sizes, n_pixels)
            n_kept += 3 * math.prod(stored)
        check_disk(what, n_kept * len(paths), folder.parents[1], f"{smaller}, or another --cache_dir")
        sizes, fingerprint = write_views(pool, files, img_size, stored, folder, quiet)
        if stored and stored != (right := stored_size(sizes, n_pixels)):
            write_views(pool, files, img_size, right, folder, quiet)
    sizes.tofile(folder / "sizes.bin")
    (folder / "meta.json").write_text(json.dumps({"versions": VERSIONS, "fingerprint": fingerprint}), encoding="utf-8")


def original_sizes(pool: ThreadPoolExecutor, paths: list[Path]) -> np.ndarray:
    """The (height, width) of image files (n, 2), from their headers."""
    return np.array(list(map_in_chunks(pool, image_size, paths)), dtype=np.int64)


def write_views(
    pool: ThreadPoolExecutor, files: ImageFiles, img_size: int, stored: list[int], folder: Path, quiet: bool
) -> tuple[np.ndarray, str]:
    """Write eval.bin and train.bin, of images resized to `stored` if it is given; their original sizes (N, 2) and
    fingerprint."""

    def decode_one(i: int) -> tuple[tuple[int, int], bytes, bytes, bytes]:
        content = image_bytes(files.paths[i])
        with naming_image(files.paths[i]):
            image = decode(content)
        view, train = eval_view(image, img_size, files.rule).tobytes(), b""
        if stored:  # by a sharp filter, because its crops are filtered again
            train = hwc_to_chw(image.resize(stored[::-1], Image.Resampling.LANCZOS)).tobytes()
        return (image.height, image.width), hashlib.sha256(content).digest(), view, train

    sizes, fingerprint = [], hashlib.sha256()
    bar = Run(quiet=quiet).bar(None, f"decode {files.label}", "img", total=len(files.paths))
    # Plain sequential writes: pages of a written memory map would count as resident memory.
    with bar, open(folder / "eval.bin", "wb") as eval_file, open(folder / "train.bin", "wb") as train_file:
        decoded = map_in_chunks(pool, decode_one, range(len(files.paths)))
        for name, (size, content, view, train) in zip(files.names, decoded, strict=True):
            sizes.append(size)
            fingerprint.update(name.encode() + b"\0" + content)
            eval_file.write(view)
            train_file.write(train)
            bar.update()
    return np.array(sizes, dtype=np.int64), fingerprint.hexdigest()[:16]


def map_in_chunks(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """The function of each item, in order, computed by the pool in groups, at most CHUNK items ahead."""
    for start in range(0, len(items), CHUNK):
        ahead = items[start : start + CHUNK]
        groups = [ahead[i : i + GROUP] for i in range(0, len(ahead), GROUP)]
        for done in pool.map(lambda group: [function(item) for item in group], groups):
            yield from done
