"""A benchmark is three splits of classes, base, val and novel, as image folders or as published json lists.

fs_benchmarks/<dataset>/{base,val,novel}/<class>/<image>      or {train,val,test}
fs_benchmarks/<dataset>/{base,val,novel}.json      with label_names, image_names, image_labels
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from data.converters import CONVERTERS
from data.converters.mini_imagenet import list_published
from data.glyphs import provide_glyphs
from data.image_cache import ImageFiles, load_images
from data.listing import (
    FEW_CLASSES,
    SPLIT_FOLDERS,
    Listing,
    described,
    image_names,
    list_folder,
    list_json,
    shared_by,
    split_folders,
    subfolders,
)
from engine.errors import UserError
from engine.files import folder_name
from engine.resizing import PUBLISHED, check_rule, resized_size


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
    eval_resize: str | None = None  # None: the network's own, else published

    def for_network(self, rule: str) -> "DataOptions":
        """The options for a network whose own resize rule is this, unless another is asked for."""
        return replace(self, eval_resize=self.eval_resize or rule)


@dataclass(frozen=True)
class Split:
    """One split: N images of len(class_names) classes.

    labels (N,), images (N, 3, s, s) uint8 in the evaluation view; train_images, uint8, what augmentation crops from,
    (N, 3, H, W): the base split alone has them, where it is trained on; train_sizes (N, 2), the original
    (height, width) of the images; rule: by which `images` were resized. Images that do not count have the label
    len(class_names). image_names are `class/file`; fingerprint is a hash of the names and bytes of all images.
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
    rule: str = PUBLISHED

    @property
    def summary(self) -> str:
        """The split in a few words."""
        return f"{self.benchmark}: {len(self.class_names)} {self.split} classes of {len(self.labels)} images"

    @cached_property
    def members(self) -> list[Tensor]:
        """The indices of each class's images, in order."""
        return [torch.nonzero(self.labels == c).squeeze(1) for c in range(len(self.class_names))]


def load_split(options: DataOptions, dataset: str, split: str) -> Split:
    """Load one split (`base`, `val` or `novel`) of a benchmark; images are decoded once and cached.

    `glyphs` is rendered when it is missing. Raises UserError when the data is missing, malformed or cannot be decoded.
    """
    return load_listed(options, dataset, split, list_split(options, dataset, split))


def list_split(options: DataOptions, dataset: str, split: str) -> Listing:
    """The images of one split of a benchmark; the class folders of miniImagenet are dealt by the published lists.

    Raises UserError when they are missing or badly listed, or the folders of the splits share a class.
    """
    root = options.benchmarks_dir / folder_name(dataset)
    file = root / f"{split}.json"
    if dataset == "glyphs":
        provide_glyphs(root, quiet=options.quiet)
    folders = split_folders(root)
    shared = shared_by(folders)
    is_split = not shared and all((root / own).is_dir() or (root / f"{own}.json").is_file() for own in SPLIT_FOLDERS)
    if dataset == "miniImagenet" and not is_split and (published := list_published(root, split)):
        return published
    if shared:
        raise UserError(
            f"{root}: {' and '.join(folder.name for folder in folders.values())} share the class {shared[0]!r}, but "
            f"the splits of a benchmark share none: {instead(root, dataset)}"
        )
    if split in folders:
        return list_folder(folders[split])
    if file.is_file():
        return list_json(file, options.image_root)
    here = f", which holds {described(root)}" if root.is_dir() else ""
    raise UserError(
        f"no {split} split of {dataset!r} in {root}{here}: expected {root / split}/<class>/<image> or {file}; "
        f"{instead(root, dataset)}, or try the built-in benchmark with --dataset glyphs"
    )


def instead(root: Path, dataset: str) -> str:
    """What to do with a folder that is no benchmark."""
    folders = list(split_folders(root).values())
    classes = {path.name for place in folders or [root] for path in subfolders(place)}
    if dataset not in CONVERTERS and 0 < len(classes) < 3:
        return FEW_CLASSES.format(n=len(classes), support=folders[0] if folders else root)
    other = f"folder --name {dataset}{'_split' if classes else ''}"
    prepared_as = dataset if dataset in CONVERTERS else other
    return f"prepare it with 'python -m data.prepare {prepared_as} --source {root if classes else 'PATH'}'"


def load_listed(options: DataOptions, dataset: str, split: str, listing: Listing) -> Split:
    """The split of these images, decoded once and cached under its name; a base split is to be augmented as well.

    Raises UserError when a class has two images of one name, or an image cannot be decoded.
    """
    class_names, paths, labels = listing
    names = image_names(listing)
    if len(set(names)) < len(names):  # an image in the support and in the query; two images of one name in a file
        twice = next(name for name, count in Counter(names).items() if count > 1)
        file = options.benchmarks_dir / dataset / f"{split}.json"
        raise UserError(f"{file} lists image {twice!r} twice: give each image of a class once, by a name of its own")
    min_crop = options.crop_scale[0] if options.crop_scale and split == "base" else None
    rule = options.eval_resize or PUBLISHED
    check_rule(rule, options.img_size)
    files = ImageFiles(f"{dataset}_{split}", paths, names, min_crop, rule)
    arrays = load_images(files, options.img_size, options.cache_dir, options.num_workers, options.quiet)
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
        rule=rule,
    )


def median_size(split: Split) -> list[int]:
    """The median height and width of a split's original images."""
    return [int(side) for side in split.train_sizes.median(0).values]


def enlarged_notes(split: Split) -> list[str]:
    """A line where the rule enlarges most images of a split before their centre is taken; else none."""
    height, width = median_size(split)
    to_width, to_height = resized_size(split.rule, (width, height), split.images.shape[-1])
    if to_width * to_height <= width * height:
        return []
    left = "" if split.rule == "none" else "; --eval_resize none leaves images of the network's size as they are"
    return [
        f"{split.split} images of {split.benchmark} ({width}x{height} pixels) are enlarged to {to_width}x{to_height} "
        f"by the rule {split.rule!r}: the network sees no more detail than they have{left}"
    ]
