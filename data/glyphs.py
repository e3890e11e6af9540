"""The built-in benchmark: images of characters, rendered offline from the typefaces that come with the install.

A class is one character. An image is that character in one of the typefaces that Pillow and matplotlib ship, with
its own colours, background, clutter, noise, position, scale, slant and rotation. The characters are chosen so that
no two have the same shape at another size (no Latin A and Greek Alpha, no o and O). A mirrored character may well be
another one, so train without horizontal flips.
"""

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

from engine.errors import UserError

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


def render_glyphs(
    out: Path,
    seed: int = 0,
    n_images: int = 100,
    n_base: int = 64,
    n_val: int = 16,
    n_novel: int = 20,
    quiet: bool = False,
) -> None:
    """Render `out/{base,val,novel}/<class>/<i>.jpg`: 84x84 images, `n_images` a class; a class folder is like `u0041`.

    A class's images depend on (seed, character) alone, so fewer images or classes are the first of the full benchmark.
    Everything is rendered beside `out` and moved there at the end: `out` is never a half-finished benchmark. `quiet`
    shows no progress bar.
    Raises UserError when `out` exists already or more than 100 classes are asked for.
    """
    if n_base + n_val + n_novel > len(CHARACTERS):
        raise UserError(
            f"glyphs has {len(CHARACTERS)} classes, but {n_base} base + {n_val} val + {n_novel} novel were asked for; "
            "ask for fewer"
        )
    if out.exists():
        raise UserError(f"'{out}' exists already; delete it to render it again, or give another folder")
    splits = ["base"] * n_base + ["val"] * n_val + ["novel"] * n_novel
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        unfinished = Path(temporary) / out.name
        bar = tqdm(splits, desc=f"rendering {out.name}", disable=quiet)
        for split, character in zip(bar, CHARACTERS, strict=False):
            folder = unfinished / split / f"u{ord(character):04x}"
            folder.mkdir(parents=True)
            tiles = character_tiles(character)
            generator = torch.Generator().manual_seed(seed * 0x110000 + ord(character))
            for i in range(n_images):
                render_image(tiles, generator).save(folder / f"{i:04d}.jpg", quality=90)
        try:
            os.rename(unfinished, out)
        except OSError:
            if not out.is_dir():
                raise  # otherwise another process has just finished the same benchmark: its folder serves


def character_tiles(character: str) -> list[Image.Image]:
    """One greyscale tile (TILE x TILE, mode L) per typeface that has `character`: white on black, centred, EXTENT long.

    A typeface without the character draws nothing, or the box that it draws for any character it lacks: neither is
    kept.
    """
    fonts_folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = DEJAVU_AND_STIX + (COMPUTER_MODERN if character.isascii() and character.isalnum() else [])
    fonts = [ImageFont.truetype(str(fonts_folder / f"{name}.ttf"), EXTENT) for name in names]
    default = ImageFont.load_default(EXTENT)  # Pillow's own typeface (a bitmap font without FreeType: left out)
    if isinstance(default, ImageFont.FreeTypeFont):
        fonts.append(default)
    tiles = []
    for font in fonts:
        drawn, missing = _draw(font, character), _draw(font, "\uffff")  # no typeface has U+FFFF
        box = drawn.getbbox()
        if box is not None and drawn.tobytes() != missing.tobytes():
            glyph = drawn.crop(box)
            scale = EXTENT / max(glyph.size)
            width, height = (max(1, round(side * scale)) for side in glyph.size)
            tile = Image.new("L", (TILE, TILE))
            glyph = glyph.resize((width, height), Image.Resampling.BICUBIC)
            tile.paste(glyph, ((TILE - width) // 2, (TILE - height) // 2))
            tiles.append(tile)
    return tiles


def render_image(tiles: list[Image.Image], generator: torch.Generator) -> Image.Image:
    """One RGB image (SIZE x SIZE) of the character that `tiles` shows, everything about it drawn from `generator`."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    tile = tiles[int(torch.randint(len(tiles), (), generator=generator))]
    glyph = np.asarray(_place(tile, uniform), dtype=np.float32)[..., None] / 255

    # Two background colours, and the character's: lighter than both or darker than both, by 40/255 at least.
    lightness = torch.tensor([0.3, 0.59, 0.11])
    while True:
        colours = torch.rand((3, 3), generator=generator)
        first, second, own = (colours @ lightness * 255).tolist()
        if own < min(first, second) - 40 or own > max(first, second) + 40:
            break
    start, end, ink = (colour.numpy() * 255 for colour in colours)

    angle = uniform(0, 2 * math.pi)
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j].astype(np.float32)
    ramp = (np.clip(x * math.cos(angle) + y * math.sin(angle), -1, 1)[..., None] + 1) / 2
    pixels = start + (end - start) * ramp
    # Clutter: strokes of the character's own colour, half transparent, behind it and across it.
    strokes = np.asarray(_strokes(uniform), dtype=np.float32)[..., None] / 255
    pixels += (ink - pixels) * strokes * uniform(0.2, 0.5)
    pixels += (ink - pixels) * glyph

    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    blurred = image.filter(ImageFilter.GaussianBlur(uniform(0, 1.2)))
    noise = torch.randn((SIZE, SIZE, 3), generator=generator).numpy() * uniform(0, 20)
    return Image.fromarray(np.clip(np.asarray(blurred, dtype=np.float32) + noise, 0, 255).astype(np.uint8))


def _draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """`character` in white on a black canvas large enough for any of our typefaces."""
    canvas = Image.new("L", (3 * EXTENT, 3 * EXTENT))
    ImageDraw.Draw(canvas).text((1.5 * EXTENT, 1.5 * EXTENT), character, font=font, fill=255, anchor="mm")
    return canvas


def _place(tile: Image.Image, uniform: Callable[[float, float], float]) -> Image.Image:
    """The tile's character at a random place of a SIZE x SIZE image, scaled, slanted, stretched and turned."""
    length = uniform(34, 66)  # longer side, in pixels, before the slant
    scale_x, scale_y = length / EXTENT * uniform(0.8, 1.0), length / EXTENT
    slant, turn = uniform(-0.3, 0.3), math.radians(uniform(-25, 25))
    free = (SIZE - length) / 2
    centre_x, centre_y = SIZE / 2 + uniform(-free, free), SIZE / 2 + uniform(-free, free)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    # Drawn at twice the size and averaged: Pillow maps an image pixel to one tile point, which alone would alias.
    (a, b), (d, e) = np.linalg.inv(2 * rotation @ np.array([[scale_x, slant * scale_y], [0, scale_y]]))
    x, y = 2 * centre_x, 2 * centre_y
    coefficients = (a, b, TILE / 2 - a * x - b * y, d, e, TILE / 2 - d * x - e * y)
    doubled = tile.transform((2 * SIZE, 2 * SIZE), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return doubled.reduce(2)


def _strokes(uniform: Callable[[float, float], float]) -> Image.Image:
    """Random lines and arcs, white on black, SIZE x SIZE (mode L)."""
    canvas = Image.new("L", (2 * SIZE, 2 * SIZE))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(uniform(1, 6))):
        x, y = uniform(0, 2 * SIZE), uniform(0, 2 * SIZE)
        width = int(uniform(2, 9))
        if uniform(0, 1) < 0.5:
            draw.line((x, y, uniform(0, 2 * SIZE), uniform(0, 2 * SIZE)), fill=255, width=width)
        else:
            radius, start = uniform(10, 60), uniform(0, 360)
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.arc(box, start, start + uniform(60, 300), fill=255, width=width)
    return canvas.reduce(2)
