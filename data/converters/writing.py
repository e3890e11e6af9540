"""Write the images that a converter hands over one by one, resume, count, say what is missing."""

import hashlib
import json
import os
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data.converters.converter import SPLITS, Conversion, ImageItem, whose_classes
from data.decode import decode
from data.listing import some_of
from engine.errors import UserError
from engine.files import atomic_file, is_text, read_json, write_text

SETTINGS = "prepared.json"


def write_benchmark(
    conversion: Conversion, folder: Path, benchmark: str, skip_bad: bool, allow_incomplete: bool
) -> None:
    """Write `folder/{base,val,novel}/<class>/<file>`: encoded images byte for byte, pixels as PNG.

    A first run works in a hidden folder beside `folder` and moves it there when all is well, so that an unfinished
    benchmark is never trained on; the same command goes on where an earlier one stopped.

    Raises UserError when `folder` was made otherwise, when images cannot be decoded (unless skip_bad), and when
    classes or images are missing (unless allow_incomplete).
    """
    work = folder if folder.exists() else folder.with_name(f".{folder.name}.partial")
    _check_settings(work, {"benchmark": benchmark} | conversion.settings)
    unreadable, missing = [], []
    expected = set().union(*conversion.class_counts.values())
    for item in tqdm(conversion.items, total=conversion.n_images, desc=f"preparing {folder.name}", unit="image"):
        for part in (item.class_name, item.file_name):
            if part in ("", ".", "..") or set(part) & {"/", "\\", "\0"} or not is_text(part):
                raise UserError(f"the source names an image {item.name!r}, which is not a plain class/file name")
        if expected and item.class_name not in expected:
            some = ", ".join(sorted(expected)[:3])
            raise UserError(
                f"the source has the class {item.class_name!r}, none of {benchmark}'s {len(expected)} ({some}, ...)"
                f"{whose_classes([item.class_name])}; for your own classes: python -m data.prepare folder"
            )
        try:
            _write_image(item, work / item.split / item.class_name / item.file_name)
        except FileNotFoundError:
            missing.append(item.name)
        except ValueError as error:
            unreadable.append(f"{item.name} ({error})")
            tqdm.write(f"unreadable: {unreadable[-1]}")
    if unreadable and not skip_bad:
        raise UserError(
            f"{len(unreadable)} images cannot be read: {some_of(unreadable)}; repair them or give --skip_bad"
        )
    problems = _count_problems(count_images(work), conversion, len(unreadable))
    problems += [f"not in the source: {some_of(missing)}"] if missing else []
    if not any(count_images(work).values()):
        raise UserError(f"the source holds no image of {folder.name}: {some_of(problems)}; nothing is written")
    if problems and not allow_incomplete:
        raise UserError(f"{folder.name} is not complete: {some_of(problems)}; complete it, or give --allow_incomplete")
    if work != folder:
        os.rename(work, folder)


def count_images(folder: Path) -> dict[str, dict[str, int]]:
    """{split: {class: number of images}} of a benchmark's folder."""
    counts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for path in sorted(folder.glob("*/*")):
        if path.is_dir() and path.parent.name in counts:
            counts[path.parent.name][path.name] = sum(not name.startswith(".") for name in os.listdir(path))
    return counts


def _count_problems(counts: dict[str, dict[str, int]], expected: Conversion, n_left_out: int) -> list[str]:
    """Every difference between the counts and the expected ones, less the images left out, a phrase each."""
    problems = []
    for split, found in counts.items():
        named = expected.class_counts.get(split, {})
        absent = [name for name in named if name not in found]
        if len(found) != expected.n_classes[split] or absent:
            names = f" (missing {some_of(absent)})" if absent else ""
            problems.append(f"{split} has {len(found)} of {expected.n_classes[split]} classes{names}")
        for name, count in found.items():
            if count != named.get(name, count):
                problems.append(f"{split} class '{name}' has {count} of {named[name]} images")
    n_images = sum(sum(found.values()) for found in counts.values())
    if n_images < expected.n_images - n_left_out:
        problems.append(f"there are {n_images} of {expected.n_images} images")
    return problems


def _check_settings(work: Path, settings: dict[str, object]) -> None:
    """Start `work`, or make sure that it was started with the same settings; a dict is recorded as its hash."""
    for key, value in settings.items():
        if isinstance(value, dict):
            settings[key] = hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
    file = work / SETTINGS
    if file.exists():
        try:
            earlier = dict(read_json(file))
        except (ValueError, TypeError):
            raise UserError(f"'{file}' is damaged: delete '{work}', or give another folder with --out") from None
        if different := [key for key in settings if earlier.get(key) != settings[key]]:
            raise UserError(f"'{work}' has another {', '.join(different)}: delete it or give another folder with --out")
    elif work.exists() and any(not path.name.startswith(".") for path in work.iterdir()):
        raise UserError(f"'{work}' exists and was not made by this command: give another folder with --out")
    else:
        write_text(file, json.dumps(settings))


def _write_image(item: ImageItem, target: Path) -> None:
    """Write one image, unless it is there already. Raises ValueError when it cannot be decoded."""
    if target.exists():
        return
    content = item.read()
    if isinstance(content, bytes):
        decode(content)  # whole, so that a truncated one is found now
    with atomic_file(target) as temporary:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            Image.fromarray(content).save(temporary, format="PNG")
