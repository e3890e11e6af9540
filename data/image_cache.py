"""Decode every image once, in parallel, into uint8 arrays that later runs map into memory.

A split has up to two arrays, written in one pass over the files:
- `eval` (N, 3, s, s): the published evaluation view, resize to int(1.15 s) square and centre crop;
- `train` (N, 3, H, W), for the base split: what augmentation crops from. Images that share one small size are kept as
  they are; others are resized to int(1.15 s) square. `sizes` (N, 2) keeps their original (height, width), in
  which crops are drawn, so that stretching changes the resolution and not the distribution of the crops.

A cache is keyed by the names, sizes and modification times of its source files: changed images are decoded anew.
It never lies beside the user's images, which may be read-only.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from engine.errors import UserError

P = TypeVar("P")
T = TypeVar("T")

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
# Larger than any photograph; a file that claims more pixels is a decompression bomb.
MAX_PIXELS = 178_956_970
# Images of one common size are kept as they are up to this many pixels each.
MAX_NATIVE_PIXELS = 256 * 256
# Images decoded ahead of the writer: bounds the memory of a pass over any number of images.
CHUNK = 256


@dataclass(frozen=True)
class ImageFiles:
    """The N files of one split: a readable name of it such as `glyphs_base`, their paths and their `class/file` names.

    with_train: whether augmentation is to crop from them.
    """

    label: str
    paths: list[Path]
    names: list[str]
    with_train: bool


@dataclass(frozen=True)
class ImageArrays:
    """The arrays of one split: eval (N, 3, s, s) and train (N, 3, H, W) or None, uint8; sizes (N, 2)."""

    eval: Tensor
    train: Tensor | None
    sizes: Tensor
    fingerprint: str


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as upright 8-bit RGB: EXIF rotation applied, palettes and CMYK converted, 16 bits scaled to 8."""
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
    return image.convert("RGB")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file, its pixels not decoded yet.

    Raises UserError, naming the file, when it is a bomb or when the block cannot decode it.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels is more than the limit of {MAX_PIXELS}")
            yield image
    except Exception as error:  # on damaged bytes PIL raises also struct.error, TypeError, ...
        reason = " ".join(str(error).split())
        raise UserError(f"image {path} cannot be decoded ({reason}): repair it or take it out of the folder") from error


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
    with opened(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def listing_signature(files: ImageFiles) -> str:
    """A hash of the names, byte sizes and modification times of the source files: cheap, and changes when they do."""
    digest = hashlib.sha256()
    for path, name in zip(files.paths, files.names, strict=True):
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"image {path} is missing: restore it or take it out of the list") from error
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def load_images(files: ImageFiles, img_size: int, cache_dir: Path, num_workers: int, quiet: bool) -> ImageArrays:
    """The arrays of a split, from the cache or, the first time, by decoding its files with num_workers threads.

    Raises UserError when an image cannot be decoded or the cache folder cannot be written.
    """
    signature = listing_signature(files)
    folder = cache_dir / f"{files.label}_{img_size}px_{'train_' if files.with_train else ''}{signature[:16]}"
    if not is_complete(folder):
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=f".{folder.name}_", dir=cache_dir))
            building.chmod(0o755)  # mkdtemp's folders are for their maker alone; others may share a cache
        except OSError as error:
            raise UserError(
                f"cache folder {cache_dir} cannot be written ({error}): give another --cache_dir"
            ) from error
        try:
            decode_all(files, img_size, building, num_workers, quiet)
            if not is_complete(folder):  # else another process has just built the same cache
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(building, folder)
        except OSError as error:
            if not is_complete(folder):
                raise UserError(
                    f"cache folder {folder} cannot be written ({error}): give another --cache_dir"
                ) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
    meta = json.loads((folder / "meta.json").read_text())
    return ImageArrays(
        eval=map_array(folder / "eval.bin", meta["eval_shape"]),
        train=map_array(folder / "train.bin", meta["train_shape"]) if files.with_train else None,
        sizes=torch.from_numpy(np.fromfile(folder / "sizes.bin", dtype=np.int64).reshape(-1, 2)),
        fingerprint=meta["fingerprint"],
    )


def is_complete(folder: Path) -> bool:
    """Whether a cache folder holds all that its meta.json says; a truncated one is decoded anew."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        n_bytes = {"eval.bin": math.prod(meta["eval_shape"]), "sizes.bin": 2 * 8 * meta["eval_shape"][0]}
        if meta["train_shape"]:
            n_bytes["train.bin"] = math.prod(meta["train_shape"])
        return "fingerprint" in meta and all((folder / name).stat().st_size == n for name, n in n_bytes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def map_array(path: Path, shape: list[int]) -> Tensor:
    """A uint8 file as a tensor mapped into memory, copy-on-write: the file itself never changes."""
    return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c", shape=tuple(shape)))


def decode_all(files: ImageFiles, img_size: int, folder: Path, num_workers: int, quiet: bool) -> None:
    """Write eval.bin, train.bin (if asked for), sizes.bin and meta.json of all images into `folder`."""
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        sizes = list(map_in_chunks(pool, header_size, files.paths))
        native = len(set(sizes)) == 1 and sizes[0][0] * sizes[0][1] <= MAX_NATIVE_PIXELS
        side = int(1.15 * img_size)
        stored = sizes[0] if native else (side, side)

        def decode(path: Path) -> tuple[bytes, bytes, bytes]:
            content = hashlib.sha256(path.read_bytes()).digest()
            image = open_rgb(path)
            view = eval_view(image, img_size).tobytes()
            if not files.with_train:
                return content, view, b""
            kept = image if native else image.resize((side, side), Image.Resampling.BILINEAR)
            return content, view, hwc_to_chw(kept).tobytes()

        fingerprint = hashlib.sha256()
        bar = tqdm(total=len(files.paths), desc=f"decode {files.label}", unit="img", disable=quiet)
        # Plain sequential writes: pages of a written memory map would count as resident memory.
        with bar, open(folder / "eval.bin", "wb") as eval_file, open(folder / "train.bin", "wb") as train_file:
            decoded = map_in_chunks(pool, decode, files.paths)
            for name, (content, view, kept) in zip(files.names, decoded, strict=True):
                fingerprint.update(name.encode() + b"\0" + content)
                eval_file.write(view)
                train_file.write(kept)
                bar.update()
    np.array(sizes, dtype=np.int64).tofile(folder / "sizes.bin")
    meta = {
        "eval_shape": [len(sizes), 3, img_size, img_size],
        "train_shape": [len(sizes), 3, *stored] if files.with_train else None,
        "fingerprint": fingerprint.hexdigest()[:16],
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def map_in_chunks(pool: ThreadPoolExecutor, function: Callable[[P], T], paths: Sequence[P]) -> Iterator[T]:
    """The function of each path, in order, computed by the pool at most CHUNK paths ahead."""
    for start in range(0, len(paths), CHUNK):
        yield from pool.map(function, paths[start : start + CHUNK])
