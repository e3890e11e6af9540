"""Fit a classifier to a few examples per class, with what it takes from a base set."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.benchmarks import DataOptions, Split, load_split
from data.decode import Reading
from data.listing import image_names
from engine.errors import UserError
from engine.resizing import check_rule
from engine.run import Run, move_if_fits
from methods.alignment import AlignmentSetting
from methods.features import MAPPED, Source, TrainableBlocks, feature_source, image_source, trainable_blocks
from methods.related_base import empty_notes, exceeding_notes
from models.backbone import Backbone
from persistence.checkpoints import create_backbone, load_backbone
from persistence.feature_cache import FeatureCache
from photos.base import base_without
from photos.choosing import choose_alignment
from photos.classifier import Fitted, fit_classifier, with_scale
from photos.confidence import in_two_classes
from photos.images import View, decode_views, ignored_notes, list_support, printable
from photos.table import first_of


@dataclass(frozen=True)
class FitFlags:
    """What a classifier is fitted by; each field is explained at the flag of the same name."""

    checkpoint: Path | None
    backbone: str | None
    weights: str
    img_size: int | None
    eval_resize: str | None
    background: str
    base: Path | None
    image_root: Path | None
    cache_dir: Path
    num_workers: int
    align_blocks: int | None
    setting: AlignmentSetting


@dataclass(frozen=True)
class Examples:
    """k support images (see open_image), their names and labels, 0 to n_way - 1, of n_way classes."""

    class_names: list[str]
    images: Sequence[Any]
    names: list[str]
    labels: list[int]


def fit_folder(support: Path, queries: Sequence[Path], flags: FitFlags, run: Run) -> Fitted:
    """A classifier fitted to the images of a support folder. Raises UserError when something given is wrong."""
    examples = folder_examples(support)
    fitted = fit_examples(examples, queries, flags, run)
    fitted.notes.extend(ignored_notes(support, list(examples.images)))
    return fitted


def folder_examples(folder: Path, least: int = 2) -> Examples:
    """The examples of a folder of one subfolder per class. Raises UserError when it has fewer classes than `least`."""
    class_names, paths, labels = list_support(folder, least)
    names = [printable(name) for name in image_names((class_names, paths, labels))]
    return Examples(class_names, paths, names, labels)


def fit_examples(examples: Examples, queries: Sequence[Path], flags: FitFlags, run: Run) -> Fitted:
    """A classifier fitted to examples; base classes that hold one of them, or of the queries, are left out."""
    backbone, img_size, facts, trained_on = trained_backbone(flags, run)
    blocks = trainable_blocks(backbone, flags.align_blocks)
    view = View(img_size, backbone.eval_resize, Reading(flags.background)).of_folder(examples.images, flags.num_workers)
    user = user_split(examples, view, flags.num_workers)
    facts |= {"background": flags.background, "white": view.reading.white, "images_sha256": user.fingerprint}
    novel = image_source(backbone, blocks, user, run, "embed")
    files = [Path(image) for image in (*examples.images, *queries) if isinstance(image, str | Path)]
    fitted = fit_source(novel, backbone, blocks, files, facts, flags, run, trained_on)
    if view.reading.white:
        fitted.notes.append(f"{view.reading.white:g} is white in greys of more than 8 bits")
    return fitted


def fit_source(
    novel: Source,
    backbone: Backbone,
    blocks: TrainableBlocks,
    files: Sequence[Path],
    facts: dict[str, Any],
    flags: FitFlags,
    run: Run,
    trained_on: Sequence[str] = (),
) -> Fitted:
    """A classifier of the examples of a source; base classes that hold one of the files are left out.

    trained_on: the classes of the backbone, where they are known.
    """
    user, notes = novel.split, list[str]()
    setting = with_scale(flags.setting, user.labels)
    base: Source | None = None
    if flags.base is None or setting.alignment == "none":
        why = f"--base {flags.base} is not used, for --alignment none" if flags.base else "it takes base images, --base"
        notes.append(f"no alignment: {why}")
    else:
        parent, found_by = Path(os.path.abspath(flags.base)).parent, (flags.image_root, flags.num_workers, run.quiet)
        options = DataOptions(parent, facts["img_size"], flags.cache_dir, *found_by, eval_resize=backbone.eval_resize)
        split, notes = base_without(flags.base, options, user.class_names, files)
        facts |= {"base": split.benchmark, "base_fingerprint": split.fingerprint}
        cache = FeatureCache(flags.cache_dir, run)
        if blocks.in_feature_space and len(split.labels) * backbone.feature_dim > MAPPED:
            base = feature_source(move_if_fits(cache.half_features(backbone, split), run.device), split)
        else:
            base = cache.source(backbone, blocks, split)
        if setting.alignment == "auto":

            def load_val() -> Source:
                return cache.source(backbone, blocks, load_split(options, split.benchmark, "val"))

            setting, why = choose_alignment(novel, base, load_val, trained_on, setting, flags.cache_dir, run)
            notes.append(why)
    aligned_with = None if setting.alignment == "none" else base
    kept = flags.cache_dir if flags.setting.alignment == "auto" else None
    classifier, related = fit_classifier(backbone, blocks, novel, aligned_with, setting, run, kept)
    facts = facts | {"alignment": setting.alignment, "method": setting.fit.method, "setting": asdict(flags.setting)}
    facts |= {"base_folder": os.path.abspath(flags.base) if flags.base and base else None}
    if twice := in_two_classes(classifier.z_support, user.labels):
        pairs_named = [f"{user.image_names[i]} is {user.image_names[j]}" for i, j in twice]
        notes.append(f"one image in two classes, so that one of them is wrong: {first_of(pairs_named)}")
    fitted = Fitted(classifier, facts, notes=notes)
    if base is not None and related:
        names = base.split.class_names
        notes += exceeding_notes(len(user.class_names), setting.related.n_B, len(names))
        notes += empty_notes(related, user.class_names)
        pairs = zip(user.class_names, related.classes, strict=True)
        fitted.related.update({name: [names[b] for b in classes] for name, classes in pairs})
    return fitted


def trained_backbone(flags: FitFlags, run: Run) -> tuple[Backbone, int, dict[str, Any], list[str]]:
    """The backbone on the run's device, its image size, what a record says of it, and its classes if they are known."""
    trained_on: list[str] = []
    if not flags.checkpoint:
        name, img_size = str(flags.backbone), flags.img_size or 0
        backbone = create_backbone(name, img_size, run.seed, weights=flags.weights)
        facts: dict[str, Any] = {}
    elif not flags.checkpoint.is_file():
        raise UserError(
            f"no checkpoint {flags.checkpoint}: give the path of a *_bestModel.tar; 'make demo' or transferLearning.py "
            "writes one to results/models"
        )
    else:
        backbone, checkpoint = load_backbone(flags.checkpoint, flags.backbone, flags.img_size)
        name, img_size, trained_on = checkpoint.backbone, checkpoint.img_size, checkpoint.class_names
        facts = {"checkpoint_stage": checkpoint.stage, "checkpoint_dataset": checkpoint.dataset}
    backbone.eval_resize = flags.eval_resize or backbone.eval_resize
    check_rule(backbone.eval_resize, img_size)
    facts |= {"backbone": name, "img_size": img_size, "eval_resize": backbone.eval_resize}
    return backbone.to(run.device).to(memory_format=torch.channels_last), img_size, facts, trained_on


def user_split(examples: Examples, view: View, num_workers: int) -> Split:
    """The examples as a split, decoded to a view."""
    images, _, _ = decode_views(examples.images, view, num_workers)
    sizes = torch.tensor(images.shape[2:]).expand(len(images), -1)
    digest, labels = hashlib.sha256(images.numpy().tobytes()).hexdigest(), torch.tensor(examples.labels)
    return Split("", "user", examples.class_names, examples.names, labels, images, None, sizes, digest, view.rule)
