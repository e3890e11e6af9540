"""The built-in benchmark: images of characters, rendered offline from the typefaces that come with the install.

A class is one character. An image is that character in one of the typefaces that Pillow and matplotlib ship, scratched
and cluttered, with its own colours, noise, position, scale, slant and rotation. No two characters have the same shape
at another size (no Latin A and Greek Alpha); a mirrored one may be another, so train without horizontal flips.
"""

import contextlib
import json
import math
import os
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from data.converters.converter import SPLITS
from data.converters.writing import SETTINGS
from engine.errors import UserError
from engine.files import matches_schema, read_json
from engine.run import Run

VERSION = 2  # raise it with any change of the images: older folders and checkpoints are refused
# In a fixed mixed order: the first n_base are the base classes, the next n_val the val classes, then n_novel novel.
CHARACTERS = "ΣyωΞEVæKL&7t+Δ÷£БR%mZΠ€∫σFδЫ2$Y∞gЭa√h8U>5Ж±WHД9?MG4<§ЦT#Чε6λXPr¶Ωe∂Φd©BИЮC=3OЯfn¥A!Ψ{DμNb~@ζβξQiJ∀ШS"
SIZE = 84  # side of an image, in pixels
TILE, EXTENT = 160, 100  # a character is drawn on a tile of this side, its longer side this long, then mapped down
DEJAVU_AND_STIX = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique "
    "DejaVuSansMono DejaVuSansMono-Bold DejaVuSansMono-Oblique DejaVuSansMono-BoldOblique "
    "DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSerif-BoldItalic "
    "STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta"
).split()
# TeX's encoding: only letters and digits are where Unicode has them ('<' is another sign there).
COMPUTER_MODERN = "cmr10 cmb10 cmss10 cmti10 cmtt10".split()


def class_name(character: str) -> str:
    """The class folder of a character, from its Unicode name: `at-sign`, `digit-seven`, `greek-beta`."""
    name = unicodedata.name(character).lower()
    for long, short in (" letter", ""), ("greek small", "greek"), ("lamda", "lambda"), ("commercial at", "at sign"):
        name = name.replace(long, short)
    return name.replace(" ", "-")


def provide_glyphs(folder: Path, seed: int = 0, quiet: bool = False) -> bool:
    """Render the benchmark if it is missing; True if it was. Raises UserError when it is of another version."""
    if not folder.exists():
        render_glyphs(folder, seed, quiet=quiet)
        return True
    with contextlib.suppress(OSError, ValueError):  # what was not rendered here is left as it is
        settings = read_json(folder / SETTINGS)
        rendered = matches_schema(settings, {"benchmark": str, "version": int}) and settings["benchmark"] == "glyphs"
        if rendered and settings["version"] != VERSION:
            found = f"'{folder}' is version {settings['version']} of glyphs, which is now {VERSION}"
            raise UserError(f"{found}: delete it to have it rendered again")
    return False


def render_glyphs(
    out: Path, seed: int = 0, n_images: int = 100, n_class: tuple[int, int, int] = (64, 16, 20), quiet: bool = False
) -> None:
    """Render `out/{base,val,novel}/<class>/<i>.jpg`: 84x84 images, `n_images` per class, and SETTINGS, the version.

    n_class: the numbers of base, val and novel classes. The images of a class depend on (seed, character) alone, so
    fewer images or classes are the first of the full benchmark. Everything is rendered beside `out` and moved there at
    the end: `out` is never a half-finished benchmark.
    """
    splits = [split for split, n in zip(SPLITS, n_class, strict=True) for _ in range(n)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        unfinished = Path(temporary) / out.name
        bar = Run(quiet=quiet).bar(splits, f"rendering {out.name}", "class")
        for split, character in zip(bar, CHARACTERS, strict=False):
            folder = unfinished / split / class_name(character)
            folder.mkdir(parents=True)
            tiles = character_tiles(character)
            generator = torch.Generator().manual_seed(seed * 0x110000 + ord(character))
            for i in range(n_images):
                render_image(tiles, generator).save(folder / f"{i:04d}.jpg", quality=90)
        settings = {"benchmark": "glyphs", "seed": seed, "version": VERSION}
        (unfinished / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
        try:
            os.rename(unfinished, out)
        except OSError:
            if not (out / SETTINGS).is_file():
                raise  # otherwise another process has just finished the same benchmark: its folder serves


def character_tiles(character: str) -> list[Image.Image]:
    """One greyscale tile (TILE x TILE, mode L) per typeface that has `character`: white on black, centred, EXTENT long.

    A typeface that lacks it draws nothing, or the same box as for U+FFFF, which none has.
    """
    import matplotlib  # whose import takes half a second

    fonts_folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = DEJAVU_AND_STIX + (COMPUTER_MODERN if character.isascii() and character.isalnum() else [])
    fonts = [ImageFont.truetype(str(fonts_folder / f"{name}.ttf"), EXTENT) for name in names]
    tiles = []
    for font in [*fonts, ImageFont.load_default(EXTENT)]:  # the last is Pillow's own
        drawn, missing = _draw(font, character), _draw(font, "\uffff")
        box = drawn.getbbox()
        if box is not None and drawn != missing:
            glyph = ImageOps.contain(drawn.crop(box), (EXTENT, EXTENT), Image.Resampling.BICUBIC)
            tile = Image.new("L", (TILE, TILE))
            tile.paste(glyph, ((TILE - glyph.width) // 2, (TILE - glyph.height) // 2))
            tiles.append(tile)
    return tiles


def render_image(tiles: list[Image.Image], generator: torch.Generator) -> Image.Image:
    """One RGB image (SIZE x SIZE) of the character that `tiles` shows, everything about it drawn from `generator`."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    tile = tiles[int(torch.randint(len(tiles), (), generator=generator))]
    glyph = _shares(_place(tile, uniform))
    # Scratches: stripes in which the character is missing, so that no image shows the whole of it.
    glyph *= 1 - _shares(_strokes(uniform, count=(3, 6), width=(6, 18)))

    def tint(level: float) -> np.ndarray:
        return level + 30 * (2 * torch.rand(3, generator=generator).numpy() - 1)

    ink, start = tint(uniform(0, 70)), tint(uniform(180, 255))
    end = start + 10 * (2 * torch.rand(3, generator=generator).numpy() - 1)
    angle = uniform(0, 2 * math.pi)
    along = np.linspace(-1, 1, SIZE, dtype=np.float32)
    ramp = (np.clip(along * math.cos(angle) + along[:, None] * math.sin(angle), -1, 1)[..., None] + 1) / 2
    pixels = start + (end - start) * ramp
    # Clutter: strokes of the character's own colour, more or less transparent, behind it and across it.
    pixels += (ink - pixels) * _shares(_strokes(uniform, count=(3, 7), width=(2, 7))) * uniform(0.5, 1)
    pixels += (ink - pixels) * glyph

    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    blurred = image.filter(ImageFilter.GaussianBlur(uniform(0, 1.5)))
    noise = torch.randn((SIZE, SIZE, 3), generator=generator).numpy() * uniform(0, 40)
    return Image.fromarray(np.clip(np.asarray(blurred, dtype=np.float32) + noise, 0, 255).astype(np.uint8))


def _draw(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, character: str) -> Image.Image:
    """`character` in white on a black canvas large enough for any of our typefaces."""
    canvas = Image.new("L", (3 * EXTENT, 3 * EXTENT))
    ImageDraw.Draw(canvas).text((1.5 * EXTENT, 1.5 * EXTENT), character, font=font, fill=255, anchor="mm")
    return canvas


def _place(tile: Image.Image, uniform: Callable[[float, float], float]) -> Image.Image:
    """The tile's character near the middle of a SIZE x SIZE image, scaled, slanted, stretched and turned."""
    length = uniform(56, 66)  # longer side, in pixels, before the slant
    scale_x, scale_y = length / EXTENT * uniform(0.8, 1.0), length / EXTENT
    slant, turn = uniform(-0.25, 0.25), math.radians(uniform(-15, 15))
    free = 0.1 * (SIZE - length) / 2
    centre_x, centre_y = SIZE / 2 + uniform(-free, free), SIZE / 2 + uniform(-free, free)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    # Drawn at twice the size and averaged: Pillow maps an image pixel to one tile point, which alone would alias.
    (a, b), (d, e) = np.linalg.inv(2 * rotation @ np.array([[scale_x, slant * scale_y], [0, scale_y]]))
    x, y = 2 * centre_x, 2 * centre_y
    coefficients = (a, b, TILE / 2 - a * x - b * y, d, e, TILE / 2 - d * x - e * y)
    doubled = tile.transform((2 * SIZE, 2 * SIZE), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return doubled.reduce(2)


def _shares(image: Image.Image) -> np.ndarray:
    """A greyscale image as float32 (h, w, 1) in 0..1."""
    return np.asarray(image, dtype=np.float32)[..., None] / 255


def _strokes(uniform: Callable[[float, float], float], count: tuple[int, int], width: tuple[int, int]) -> Image.Image:
    """Random lines and arcs, white on black, SIZE x SIZE (mode L); how many, and how wide in half pixels."""
    canvas = Image.new("L", (2 * SIZE, 2 * SIZE))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(uniform(count[0], count[1] + 1))):
        x, y = uniform(0, 2 * SIZE), uniform(0, 2 * SIZE)
        thick = int(uniform(*width))
        if uniform(0, 1) < 0.5:
            draw.line((x, y, uniform(0, 2 * SIZE), uniform(0, 2 * SIZE)), fill=255, width=thick)
        else:
            radius, start = uniform(10, 60), uniform(0, 360)
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.arc(box, start, start + uniform(60, 300), fill=255, width=thick)
    return canvas.reduce(2)
