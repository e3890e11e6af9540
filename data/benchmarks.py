"""A benchmark is three splits of classes, base, val and novel, as image folders or as published json lists.

fs_benchmarks/<dataset>/{base,val,novel}/<class>/<image>
fs_benchmarks/<dataset>/{base,val,novel}.json      with label_names, image_names, image_labels
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from data.converters import CONVERTERS
from data.glyphs import provide_glyphs
from data.image_cache import ImageFiles, UnequalImages, load_images
from data.listing import list_folder, list_json
from engine.errors import UserError
from engine.files import folder_name


@dataclass(frozen=True)
class DataOptions:
    """How any split is found and decoded; each field is explained at the flag of the same name."""

    benchmarks_dir: Path
    img_size: int
    cache_dir: Path
    image_root: Path | None = None
    num_workers: int = 4
    quiet: bool = True
    crop_scale: Sequence[float] | None = None  # None: nothing is to be augmented
    rebuild_cache: bool = False


@dataclass(frozen=True)
class Split:
    """One split: N images of len(class_names) classes.

    labels (N,), images (N, 3, s, s) uint8 in the evaluation view; train_images, uint8, what augmentation crops from,
    (N, 3, H, W) or unequal: the base split alone has them, where it is trained on; train_sizes (N, 2), the original
    (height, width) of the images. Images that do not count have the label len(class_names).
    image_names are `class/file`; fingerprint is a hash of the names and bytes of all images.
    """

    benchmark: str
    split: str
    class_names: list[str]
    image_names: list[str]
    labels: Tensor
    images: Tensor
    train_images: Tensor | UnequalImages | None
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


Listing = tuple[list[str], list[Path], list[int]]  # class names; the path and the label of each image


def load_split(options: DataOptions, dataset: str, split: str) -> Split:
    """Load one split (`base`, `val` or `novel`) of a benchmark; images are decoded once and cached.

    The built-in benchmark `glyphs` is rendered when it is missing. Raises UserError when the
    data is missing, malformed or cannot be decoded.
    """
    return load_listed(options, dataset, split, list_split(options, dataset, split))


def list_split(options: DataOptions, dataset: str, split: str) -> Listing:
    """The images of one split of a benchmark. Raises UserError when they are missing or badly listed."""
    root = options.benchmarks_dir / folder_name(dataset)
    folder, file = root / split, root / f"{split}.json"
    if dataset == "glyphs":
        provide_glyphs(root, quiet=options.quiet)
    if folder.is_dir():
        return list_folder(folder)
    if file.is_file():
        return list_json(file, options.image_root)
    prepared_as = dataset if dataset in CONVERTERS else f"folder --name {dataset}"
    raise UserError(
        f"no {split} split of {dataset!r} in {root}: expected {folder}/<class>/<image> or {file}; "
        f"prepare it with 'python -m data.prepare {prepared_as} --source PATH', "
        f"or try the built-in benchmark with --dataset glyphs"
    )


def load_listed(options: DataOptions, dataset: str, split: str, listing: Listing) -> Split:
    """The split of these images, decoded once and cached under its name; a base split is to be augmented as well.

    Raises UserError when a class has two images of one name, or an image cannot be decoded.
    """
    class_names, paths, labels = listing
    names = [f"{class_names[label]}/{path.name}" for label, path in zip(labels, paths, strict=True)]
    if len(set(names)) < len(names):  # an image in the support and in the query; two images of one name in a file
        twice = next(name for name, count in Counter(names).items() if count > 1)
        file = options.benchmarks_dir / folder_name(dataset) / f"{split}.json"
        raise UserError(f"{file} lists image {twice!r} twice: give each image of a class once, by a name of its own")
    min_crop = options.crop_scale[0] if options.crop_scale and split == "base" else None
    files = ImageFiles(f"{dataset}_{split}", paths, names, min_crop)
    how = (options.img_size, options.cache_dir, options.num_workers, options.quiet, options.rebuild_cache)
    arrays = load_images(files, *how)
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


def count_classes(base: Split, expected: int | None, at_least: int) -> int:
    """The number of base classes. Raises UserError when it is not the one that --n_base_class gives, or too small."""
    n_class = len(base.class_names)
    if expected not in (None, n_class):
        raise UserError(f"--n_base_class {expected}, but {base.benchmark!r} has {n_class} base classes: drop it")
    if n_class < at_least:
        raise UserError(f"the base split of {base.benchmark!r} has 1 class: training needs at least 2, so add classes")
    return n_class
