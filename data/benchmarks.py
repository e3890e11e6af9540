"""A benchmark is three splits of classes, base, val and novel, as image folders or as published json lists.

fs_benchmarks/<dataset>/{base,val,novel}/<class>/<image>
fs_benchmarks/<dataset>/{base,val,novel}.json      with label_names, image_names, image_labels
"""

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from data.glyphs import render_glyphs
from data.image_cache import IMAGE_SUFFIXES, load_images
from engine.errors import UserError

# What `python -m data.prepare` knows by name; anything else is a folder of the user's own.
PREPARED = {"miniImagenet", "tieredImageNet", "CUB", "FC100", "CIFAR-FS"}


@dataclass(frozen=True)
class DataOptions:
    """How any split is found and decoded; each field is explained at the flag of the same name."""

    benchmarks_dir: Path
    img_size: int
    cache_dir: Path
    image_root: Path | None = None
    num_workers: int = 2
    quiet: bool = True


@dataclass(frozen=True)
class Split:
    """One split: N images of len(class_names) classes.

    labels (N,), images (N, 3, s, s) uint8 in the evaluation view; train_images (N, 3, H, W) uint8, what
    augmentation crops from, and train_sizes (N, 2), their original (height, width): the base split alone has them.
    image_names are `class/file`; fingerprint is a hash of the names and bytes of all images.
    """

    benchmark: str
    split: str
    class_names: list[str]
    image_names: list[str]
    labels: Tensor
    images: Tensor
    train_images: Tensor | None
    train_sizes: Tensor
    fingerprint: str

    @property
    def summary(self) -> str:
        """The split in a few words."""
        return f"{self.benchmark}: {len(self.class_names)} {self.split} classes of {len(self.labels)} images"

    @cached_property
    def members(self) -> list[Tensor]:
        """The indices of each class's images, in order."""
        return [torch.nonzero(self.labels == c).squeeze(1) for c in range(len(self.class_names))]


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
        record = json.loads(file.read_text())
        label_names, names, raw_labels = record["label_names"], record["image_names"], record["image_labels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not a json object of label_names, image_names and image_labels ({error})"
        ) from error
    if not names or len(names) != len(raw_labels):
        raise UserError(
            f"{file} has {len(names)} image_names and {len(raw_labels)} image_labels: expected as many of each"
        )
    if not all(isinstance(label, int) and label >= 0 for label in raw_labels):
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


def load_split(options: DataOptions, dataset: str, split: str) -> Split:
    """Load one split (`base`, `val` or `novel`) of a benchmark; images are decoded once and cached.

    The built-in benchmark `glyphs` is rendered when it is missing. Raises UserError when the data is missing,
    malformed or cannot be decoded.
    """
    root = options.benchmarks_dir / dataset
    folder, file = root / split, root / f"{split}.json"
    if dataset == "glyphs" and not root.exists():
        render_glyphs(root, quiet=options.quiet)
    if folder.is_dir():
        class_names, paths, labels = list_folder(folder)
    elif file.is_file():
        class_names, paths, labels = list_json(file, options.image_root)
    else:
        prepared_as = dataset if dataset in PREPARED else f"folder --name {dataset}"
        raise UserError(
            f"no {split} split of {dataset!r} in {root}: expected {folder}/<class>/<image> or {file}; "
            f"prepare it with 'python -m data.prepare {prepared_as} --source PATH', "
            f"or try the built-in benchmark with --dataset glyphs"
        )
    names = [f"{class_names[label]}/{path.name}" for label, path in zip(labels, paths, strict=True)]
    if len(set(names)) < len(names):  # an image in the support and in the query; two images of one name in a file
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"{file} lists image {twice!r} twice: give each image of a class once, by a name of its own")
    where = (options.cache_dir, f"{dataset}_{split}", split == "base")
    arrays = load_images(paths, names, options.img_size, *where, options.num_workers, options.quiet)
    return Split(
        benchmark=dataset,
        split=split,
        class_names=class_names,
        image_names=names,
        labels=torch.tensor(labels),
        images=arrays.eval,
        train_images=arrays.train,
        train_sizes=arrays.sizes,
        fingerprint=arrays.fingerprint,
    )
