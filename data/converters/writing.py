"""Write the images that a converter hands over one by one, resume, count, say what is missing."""

import hashlib
import io
import json
import os
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data.converters.converter import CLASSES, SPLITS, Conversion, ImageItem
from data.image_cache import decodable, to_rgb
from engine.errors import UserError
from engine.files import atomic_file, is_text, read_json

SETTINGS = "prepared.json"
SHOWN = 5  # names in an error line; the rest is counted
NAMES = {CLASSES: "set of classes"}  # of settings, where an error line does not name a flag


def write_benchmark(
    conversion: Conversion,
    folder: Path,
    benchmark: str,
    img_size: int | None,
    skip_bad: bool,
    allow_incomplete: bool,
) -> None:
    """Write `folder/{base,val,novel}/<class>/<file>`.

    Encoded images are copied byte for byte; those that come as pixels, are cropped, or are resized (to
    img_size x img_size) are written as PNG, losslessly. A first run works in a hidden folder beside `folder` and moves
    it there when all is well, so an unfinished benchmark is never trained on; the same command continues where an
    earlier one stopped, and keeps every image that is already there.

    Raises UserError when `folder` was made otherwise, when images cannot be decoded (unless skip_bad), and when
    classes or images are missing (unless allow_incomplete).
    """
    work = folder if folder.exists() else folder.with_name(f".{folder.name}.partial")
    _check_settings(work, {"benchmark": benchmark} | conversion.settings | {"img_size": img_size})
    _check_classes(work, conversion.settings.get(CLASSES))
    unreadable: list[str] = []
    missing: list[str] = []
    for item in tqdm(conversion.items, total=conversion.n_items, desc=f"preparing {folder.name}", unit="image"):
        for part in (item.class_name, item.file_name):
            if part in ("", ".", "..") or set(part) & {"/", "\\", "\0"} or not is_text(part):
                raise UserError(f"the source names an image {item.name!r}, which is not a plain class/file name")
        target = work / item.split / item.class_name / item.file_name
        try:
            _write_image(item, target, img_size)
        except FileNotFoundError:
            missing.append(item.name)
        except _UnreadableImageError as error:
            unreadable.append(f"{item.name} ({error})")
            tqdm.write(f"unreadable: {unreadable[-1]}")
    if unreadable and not skip_bad:
        raise UserError(
            f"{len(unreadable)} image(s) cannot be read: {_some(unreadable)}; "
            "repair them, or leave them out with --skip_bad"
        )
    problems = count_problems(count_images(work), conversion)
    if missing:
        problems.append(f"not in the source: {_some(missing)}")
    if problems and not allow_incomplete:
        raise UserError(
            f"{folder.name} is not complete: {_some(problems)}; run the same command with the missing images in place, "
            "or accept it as it is with --allow_incomplete"
        )
    if work != folder:
        os.rename(work, folder)


def count_images(folder: Path) -> dict[str, dict[str, int]]:
    """{split: {class: number of images}} of a benchmark's folder."""
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        classes = sorted((folder / split).iterdir()) if (folder / split).is_dir() else []
        counts[split] = {
            path.name: sum(not name.startswith(".") for name in os.listdir(path)) for path in classes if path.is_dir()
        }
    return counts


def count_problems(counts: dict[str, dict[str, int]], expected: Conversion) -> list[str]:
    """Every difference between the counts and the expected ones, a phrase each."""
    problems = []
    for split in SPLITS:
        found, named = counts[split], expected.class_counts.get(split, {})
        absent = [name for name in named if name not in found]
        if len(found) != expected.n_classes[split] or absent:
            names = f" (missing {_some(absent)})" if absent else ""
            problems.append(f"{split} has {len(found)} of {expected.n_classes[split]} classes{names}")
        for name, count in found.items():
            if count != named.get(name, count):
                problems.append(f"{split} class '{name}' has {count} of {named[name]} images")
        count = sum(found.values())
        if count != expected.n_images.get(split, count):
            problems.append(f"{split} has {count} of {expected.n_images[split]} images")
    n_images = sum(sum(found.values()) for found in counts.values())
    if expected.total not in (None, n_images):
        problems.append(f"there are {n_images} of {expected.total} images")
    return problems


class _UnreadableImageError(Exception):
    """The image cannot be decoded; the message is the reason."""


def _check_settings(work: Path, settings: dict[str, object]) -> None:
    """Start `work`, or make sure that it was started with the same settings; a dict is recorded as its hash."""
    settings = {key: _digest(value) if isinstance(value, dict) else value for key, value in settings.items()}
    file = work / SETTINGS
    if file.exists():
        try:
            earlier = read_json(file)
        except ValueError:
            earlier = None
        if not isinstance(earlier, dict):
            raise UserError(f"'{file}' is damaged: delete '{work}', or give another folder with --out")
        # An earlier version recorded no classes.
        compared = [key for key in settings if key != CLASSES or key in earlier]
        different = [NAMES.get(key, key) for key in compared if earlier.get(key) != settings[key]]
        if different:
            raise UserError(
                f"'{work}' was prepared with another {', '.join(different)}: delete it, or give another folder "
                "with --out"
            )
    elif work.exists() and any(not path.name.startswith(".") for path in work.iterdir()):
        raise UserError(f"'{work}' exists and was not made by this command: give another folder with --out")
    else:
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps(settings), encoding="utf-8")


def _check_classes(work: Path, dealt: object) -> None:
    """Make sure that no class of a split at random, {split: [class]}, is in another split of `work` already.

    That is so where an earlier version, which recorded no classes, has made it of other ones.
    """
    for split, class_names in dealt.items() if isinstance(dealt, dict) else ():
        for other in SPLITS:
            twice = [name for name in class_names if other != split and (work / other / name).is_dir()]
            if twice:
                raise UserError(
                    f"'{work}' has {_some(twice)} in {other}, now dealt to {split}: the source has other classes than "
                    "it had; delete it, or give another folder with --out"
                )


def _digest(content: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _write_image(item: ImageItem, target: Path, img_size: int | None) -> None:
    """Write one image, unless it is there already."""
    as_it_is = img_size is None and item.box is None
    if not as_it_is:
        target = target.with_name(f"{target.stem}.png")
    if target.exists():
        return
    try:
        content = item.read()
        if isinstance(content, bytes):
            with decodable(io.BytesIO(content)) as encoded:
                image = to_rgb(encoded)  # decodes it whole, so a truncated file is found now
        else:
            image = Image.fromarray(content)
    except ValueError as error:
        raise _UnreadableImageError(error) from None
    if as_it_is and isinstance(content, bytes):
        with atomic_file(target) as temporary:
            temporary.write_bytes(content)
        return
    if item.box is not None:
        left, top, right, bottom = (round(side) for side in item.box)
        image = image.crop((max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)))
        if 0 in image.size:
            raise _UnreadableImageError("its bounding box is empty")
    if img_size is not None:
        image = image.resize((img_size, img_size), Image.Resampling.LANCZOS)
    with atomic_file(target) as temporary:
        image.save(temporary, format="PNG")


def _some(names: list[str]) -> str:
    """The first few names and the number of the others."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
