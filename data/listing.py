"""How the images of a split are found: in folders, one a class, or in a published json list."""

from pathlib import Path
from typing import Any

from data.decode import IMAGE_SUFFIXES
from engine.errors import UserError
from engine.files import matches_schema, misfit, read_json

# A published json list: names are those of classes, and of images with their folders.
LIST = {"label_names": list[str], "image_names": list[str], "image_labels": list[Any]}


def list_folder(root: Path) -> tuple[list[str], list[Path], list[int]]:
    """Class names, image paths and labels of `root/<class>/<image>`, sorted by name, hidden files left out."""
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise UserError(f"{root} holds no class folders: expected {root}/<class>/<image>")
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        images = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != ".")
        if not images:
            raise UserError(
                f"class folder {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}): fill or remove it"
            )
        paths += images
        labels += [label] * len(images)
    return [p.name for p in folders], paths, labels


def list_json(file: Path, image_root: Path | None) -> tuple[list[str], list[Path], list[int]]:
    """Class names, image paths and labels of a published json file.

    Relative image names resolve against the folder of the file. `image_root` re-roots absolute ones, which are of
    somebody else's machine: the longest tail of the first name that exists below image_root tells how many of the
    last path components to keep.
    """
    try:
        record = read_json(file)
        if not isinstance(record, dict):
            raise ValueError("it is none")
        if wrong := misfit(record, LIST):
            raise ValueError(wrong)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is not a json object of label_names, image_names and image_labels ({error}): write it anew"
        ) from error
    label_names, names, raw_labels = (record[key] for key in LIST)
    if not names or len(names) != len(raw_labels):
        raise UserError(
            f"{file} has {len(names)} image_names and {len(raw_labels)} image_labels: expected as many of each"
        )
    if not matches_schema(raw_labels, list[int]) or min(raw_labels) < 0:
        raise UserError(f"{file} has image_labels that are not whole numbers from 0: number the classes from 0")
    if len(set(label_names)) < len(label_names):
        twice = next(name for name in label_names if label_names.count(name) > 1)
        raise UserError(f"{file} names class {twice!r} twice in label_names: give every class a name of its own")
    used = sorted(set(raw_labels))
    if used[-1] < len(label_names):  # labels index label_names, some of which belong to other splits
        class_names = [label_names[label] for label in used]
    elif len(used) == len(label_names):  # labels are numbered over all splits, label_names hold this split's alone
        class_names = list(label_names)
    else:
        raise UserError(f"{file} has image_labels up to {used[-1]} but {len(label_names)} label_names")
    rank = {label: i for i, label in enumerate(used)}
    if image_root is None:
        paths = [file.parent / name for name in names]
    else:
        parts = Path(names[0]).relative_to(Path(names[0]).anchor).parts
        kept = next((k for k in range(len(parts), 0, -1) if (image_root / Path(*parts[-k:])).is_file()), None)
        if kept is None:
            raise UserError(
                f"no tail of {names[0]!r} ({file}) exists below --image_root {image_root}: "
                f"give the folder that holds it"
            )
        paths = [image_root.joinpath(*Path(name).parts[-kept:]) for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{file} lists {len(missing)} images that do not exist, the first {missing[0]}: "
            f"give the folder that holds them with --image_root"
        )
    return class_names, paths, [rank[label] for label in raw_labels]
