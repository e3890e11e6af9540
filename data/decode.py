"""An image file, whatever its format and colours, as upright 8-bit RGB; what cannot be read is named in one line."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from engine.errors import UserError, one_line
from engine.files import check_regular

# Raise it with any change of the pixels that come of a file, by which the image cache is keyed.
DECODE_VERSION = 2
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
# The decoders that may see a file, whatever its name: others, such as EPS's, hand it on to an interpreter.
FORMATS = ["JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM"]
if "avif" in features.get_supported():  # since Pillow 11.3, where it was built with it
    IMAGE_SUFFIXES |= {".avif"}
    FORMATS += ["AVIF"]
# A file that claims more pixels is reduced while it is decoded, where it is a JPEG, or refused as a decompression bomb:
# 120 million of RGB are more than a telephone's 108, and take 480 MB. Of another kind fewer are allowed: BYTES is what
# decoding a pixel and making it RGB takes, 12 where not named.
MAX_PIXELS = 120_000_000
BYTES = {"RGB": 4, "L": 5, "1": 5, "CMYK": 8, "RGBA": 8, "I": 20, "I;16": 20, "F": 20}

# Values that greys of more than 8 bits have where they are white: of floats, and of 8, 10, 12, 14 and 16 bits.
WHITES = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)

# Pillow's, of large and of odd images: what comes of them is said in one line.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Reading:
    """How pixels that are not 8-bit colours become such; by default as the published code reads benchmarks.

    background: the colour, as Pillow names it, that transparent images are laid on; None drops the transparency.
    white: the value that is white in greys of more than 8 bits; None: 65535 in an image that exceeds 255, else 255.
    """

    background: str | None = None
    white: float | None = None


PUBLISHED_READING = Reading()


def is_deep(image: Image.Image) -> bool:
    """Whether an image is of greys of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def to_rgb(image: Image.Image, reading: Reading = PUBLISHED_READING) -> Image.Image:
    """Any PIL image as upright 8-bit RGB: EXIF rotation applied, palettes and CMYK converted, deep greys scaled to 8
    bits, also of a TIFF whose zero is white, and transparency laid on a background."""
    image.load()
    # Of a TIFF whose zero is white, Pillow (13) gives the negative, but where it has 8 bits or fewer.
    zero_is_white = getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if is_deep(image):
        values = np.asarray(image, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError("it holds NaN or infinite pixels")
        # PIL's own conversion would clip the values at 255.
        white = reading.white or (65535.0 if values.max(initial=0) > 255 else 255.0)
        pixels = (values / (white / 255)).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(255 - pixels if zero_is_white else pixels)
    if reading.background and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, reading.background), image)
    if image.mode in ("P", "LA", "PA"):
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def deep_maximum(file: Path) -> float:
    """The largest value of a file of greys of more than 8 bits; 0 for any other, and for one that cannot be decoded."""
    with contextlib.suppress(OSError, ValueError):
        check_regular(file)
        with opened_image(file) as image:
            return float(np.nanmax(np.asarray(image, dtype=np.float32), initial=0)) if is_deep(image) else 0.0
    return 0.0


def white_of(largest: float) -> float | None:
    """The least of WHITES that a folder's largest deep grey does not exceed by 5 %, or itself; None where it is 0."""
    return next((white for white in WHITES if largest <= 1.05 * white), largest) if largest > 0 else None


@contextlib.contextmanager
def opened_image(file: Path | IO[bytes]) -> Iterator[Image.Image]:
    """An image whose pixels are not decoded yet; a JPEG with too many is decoded at half its size, or less.

    Raises ValueError, with the reason in one line, when it is none of FORMATS, a bomb, or when the block fails.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            limit = MAX_PIXELS * BYTES["RGB"] // BYTES.get(image.mode, 12)
            if image.width * image.height > limit:
                image.draft(None, (image.width // 2, image.height // 2))  # does nothing but to a JPEG
            if image.width * image.height > limit:
                raise ValueError(f"{image.width}x{image.height} pixels is more than the limit of {limit}")
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # on damaged bytes PIL raises also struct.error, TypeError, ...
        raise ValueError(one_line(error)) from error


def decode(content: bytes, reading: Reading = PUBLISHED_READING) -> Image.Image:
    """The RGB image of an encoded file. Raises ValueError, with the reason in one line, when it cannot be decoded."""
    with opened_image(io.BytesIO(content)) as image:
        if image.format == "PNG":  # decoding it compares no checksum of the pixels
            with Image.open(io.BytesIO(content), formats=("PNG",)) as again:
                again.verify()
        return to_rgb(image, reading)


def regular_bytes(path: Path) -> bytes:
    """The content of a file. Raises ValueError when it is no regular file, OSError when it cannot be read."""
    check_regular(path)
    return path.read_bytes()


@contextlib.contextmanager
def naming_image(path: Path) -> Iterator[None]:
    """A block that reads an image file; what is wrong with it becomes a UserError that names it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"image {path} cannot be decoded ({error}): repair it or take it out of the folder") from error


def image_bytes(path: Path) -> bytes:
    """The content of an image file. Raises UserError, naming it, when it cannot be read or is no regular file."""
    with naming_image(path):
        return regular_bytes(path)


def open_rgb(path: Path, reading: Reading = PUBLISHED_READING) -> Image.Image:
    """Decode one file to RGB. Raises UserError, naming the file, when it cannot be decoded or is a bomb."""
    with naming_image(path):
        return decode(regular_bytes(path), reading)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an upright image, from its header alone. Raises UserError, naming the file, as open_rgb."""
    with naming_image(path):
        check_regular(path)
        with opened_image(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
