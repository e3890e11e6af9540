"""Label your own images from a few examples a class.

python predict.py --support my_classes --query my_images --checkpoint results/models/..._bestModel.tar
python predict.py --support my_classes --query my_images --backbone torchvision:resnet18 --weights DEFAULT
python predict.py ... --base fs_benchmarks/miniImagenet       # also align with related images, of any folder of classes
python predict.py --support my_classes --checkpoint ... --save my.classifier
python predict.py --classifier my.classifier --query my_images

my_classes holds a subfolder a class, my_images any images, subfolders included. In Python, without any output:
from predict import few_shot_predict; predictions = few_shot_predict("my_classes", "my_images", checkpoint="...")
from predict import FewShotClassifier; classifier = FewShotClassifier("..._bestModel.tar").fit(images, labels)
"""

import argparse
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from args_parser import args_parser, from_flags
from data.benchmarks import DataOptions, Split, load_split
from engine.distributed import ALONE
from engine.errors import RaisingParser, UserError
from engine.files import atomic_file
from engine.records import provenance, write_json
from engine.run import Run, move_if_fits, start_run
from engine.script import run_script
from methods.alignment import AlignmentSetting
from methods.features import MAPPED, Source, feature_source, trainable_blocks
from models import BACKBONES, OTHERS
from models.backbone import Backbone
from persistence.checkpoints import create_backbone, load_backbone
from persistence.chosen_setting import choose_for_support
from persistence.feature_cache import FeatureCache
from photos.base import load_base, shared_classes, without_classes
from photos.classifier import Classifier, fit_classifier
from photos.classifier_file import load_classifier, save_classifier
from photos.contact_sheet import write_sheet
from photos.images import decode_views, folder_truth, list_queries, list_support, other_files
from photos.labelling import Part, Parts, label_all, label_images
from photos.predictions import UNSURE, Predictions, alignment_notes, least_sure_first, user_split
from photos.predictions_page import write_predictions
from photos.table import PartialTable, confidence_lines, prediction_record, summary_lines, write_csv


@dataclass
class Fitted:
    """A classifier, and what was found while it was made or read.

    examples: the paths of the support images, or what is known of them; related: for each class the base classes that
    it was aligned with.
    """

    classifier: Classifier
    facts: dict[str, Any]
    examples: list[Path]
    related: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def few_shot_predict(
    support: str | Path | None = None,
    query: str | Path | None = None,
    checkpoint: str | Path | None = None,
    base: str | Path | None = None,
    alignment: str | None = None,
    **flags: Any,
) -> Predictions:
    """Label the images of `query` from the examples of `support`: see Predictions for what comes back.

    `flags` are those of predict.py, by name and with the same defaults, such as align_blocks=2 or skip_bad=True.
    Nothing is printed, nor written but the caches of a base set. Raises UserError when something given is wrong.
    """
    given = {"support": support, "query": query, "checkpoint": checkpoint, "base": base, "alignment": alignment}
    args = arguments(given | flags)
    fitted, run = fitted_or_kept(args)
    return predict(args, fitted, run)


def arguments(given: dict[str, Any]) -> argparse.Namespace:
    """The flags of predict.py, of which some are given by name; no value, or False, leaves one out."""
    chosen = {
        name: value for name, value in ({"quiet": True} | given).items() if value is not None and value is not False
    }
    return args_parser("predict", [f"--{n}" if v is True else f"--{n}={v}" for n, v in chosen.items()], RaisingParser)


def fitted_or_kept(args: argparse.Namespace) -> tuple[Fitted, Run]:
    """The classifier that the flags ask for, on the device of the run."""
    run = start_run(ALONE, args.device, args.precision, args.seed, args.quiet, args.no_keep_memory)
    if args.classifier:
        classifier, facts = load_classifier(args.classifier, args.backbone)
        return Fitted(classifier.to(run.device), facts, [Path(name) for name in classifier.examples]), run
    class_names, paths, labels = list_support(args.support)
    queries = list_queries(args.query)[0] if args.query else []
    names = [f"{path.parent.name}/{path.name}" for path in paths]
    fitted = fit(args, run, class_names, paths, names, labels, queries)
    fitted.notes += ignored_notes(args.support, paths)
    return fitted, run


def fit(
    args: argparse.Namespace,
    run: Run,
    class_names: list[str],
    examples: Sequence[Any],
    names: list[str],
    labels: list[int],
    queries: Sequence[Path],
) -> Fitted:
    """Fit a classifier to examples (see open_image), with what it takes from a base set that shares none of them."""
    backbone, img_size, facts = trained_backbone(args)
    backbone = backbone.to(run.device).to(memory_format=torch.channels_last)
    blocks = trainable_blocks(backbone, args.align_blocks)
    images, _, _ = decode_views(examples, len(examples), img_size, args.num_workers, args.quiet)
    user = user_split(class_names, names, torch.tensor(labels), images)
    setting, base, notes = from_flags(AlignmentSetting, args), None, []
    facts |= {"images_sha256": user.fingerprint}
    if args.alignment == "none":
        why = f"--base {args.base} is not used, for --alignment none" if args.base else "it takes base images, --base"
        notes.append(f"no alignment: {why}")
    else:
        options = base_options(args, img_size)
        split, base_paths = load_base(args.base, options)
        files = [Path(example) for example in (*examples, *queries) if isinstance(example, str | Path)]
        shared = shared_classes(split, base_paths, args.cache_dir, class_names, files)
        notes += [f"base class {split.class_names[c]!r} {why}: it is left out" for c, why in shared.items()]
        cache = FeatureCache(args.cache_dir, run)
        base = source_without(cache, backbone, args.align_blocks, split, list(shared))
        if len(base.split.class_names) < len(class_names):
            raise UserError(
                f"--base {args.base} has {len(base.split.class_names)} classes that are not the user's, fewer than the "
                f"{len(class_names)} of the support: give a larger base set, or none"
            )
        facts |= {"base": split.benchmark, "base_fingerprint": split.fingerprint}
        if args.align_preset == "auto":
            load_val = partial(load_split, options, split.benchmark, "val")
            n_support = torch.bincount(torch.tensor(labels)).tolist()
            choice = choose_for_support(load_val, backbone, base, cache, n_support, setting)
            setting, notes = choice.setting, notes + [line.removeprefix("note: ") for line in choice.lines]
    classifier, episode = fit_classifier(backbone, blocks, user, base, setting, run)
    related: dict[str, list[str]] = {}
    if base is not None and setting.alignment != "none":
        notes += alignment_notes(episode, setting, class_names, len(base.split.class_names))
        pairs = zip(class_names, episode.related.classes, strict=True)
        related = {name: [base.split.class_names[b] for b in classes] for name, classes in pairs}
    paths = [
        Path(example) if isinstance(example, str | Path) else Path(n)
        for example, n in zip(examples, names, strict=True)
    ]
    return Fitted(classifier, facts | {"alignment": setting.alignment, "method": args.method}, paths, related, notes)


def trained_backbone(args: argparse.Namespace) -> tuple[Backbone, int, dict[str, Any]]:
    """The backbone, its image size, and what a record says of it."""
    if not args.checkpoint:
        name, img_size = args.backbone, args.img_size
        backbone = create_backbone(name, img_size, args.seed, weights=args.weights)
        return backbone, img_size, {"backbone": name, "img_size": img_size}
    if not args.checkpoint.is_file():
        raise UserError(
            f"no checkpoint {args.checkpoint}: give the path of a *_bestModel.tar; 'make demo' or transferLearning.py "
            "writes one to results/models"
        )
    backbone, checkpoint = load_backbone(args.checkpoint, args.backbone, args.img_size)
    facts: dict[str, Any] = {"checkpoint_stage": checkpoint.stage, "checkpoint_dataset": checkpoint.dataset}
    facts |= {"backbone": checkpoint.backbone, "img_size": checkpoint.img_size}
    return backbone, checkpoint.img_size, facts


def base_options(args: argparse.Namespace, img_size: int) -> DataOptions:
    """How the images of the base set are found and decoded."""
    root = Path(os.path.abspath(args.base)).parent
    return DataOptions(
        root, img_size, args.cache_dir, args.image_root, args.num_workers, args.quiet, None, args.rebuild_cache
    )


def source_without(
    cache: FeatureCache, backbone: Backbone, align_blocks: int | None, split: Split, left_out: list[int]
) -> Source:
    """The source of a base set, without some of its classes; large features of it are mapped from disk."""
    counted = without_classes(split, left_out) if left_out else split
    if align_blocks == 0 and len(split.labels) * backbone.feature_dim > MAPPED:
        half = move_if_fits(cache.half_features(backbone, split), cache.run.device)
        return feature_source(half, counted)
    return cache.source(backbone, trainable_blocks(backbone, align_blocks), counted)


def predict(
    args: argparse.Namespace,
    fitted: Fitted,
    run: Run,
    parts: Path | None = None,
    each: Callable[[Part], None] | None = None,
) -> Predictions:
    """What a classifier says of the query images; what is done is kept in the folder `parts`, if one is given."""
    paths, names = list_queries(args.query)
    classifier = fitted.classifier
    check_labels(classifier.class_names, args)
    sizes = [(name, path.stat().st_size) for name, path in zip(names, paths, strict=True)] if parts else []
    key = Parts(parts, f"{classifier.digest} {len(names)} {args.precision} {hash_of(sizes)}")
    stream = label_images(classifier, paths, fitted.facts["img_size"], args.num_workers, args.skip_bad, key, run)
    part = label_all(stream, each)
    if not part.kept:
        raise UserError(f"no image of {args.query} can be decoded, the first: {part.reasons[0]}")
    answers, kept = part.answers, part.kept
    nearest, y = answers.nearest.tolist(), classifier.y_support
    names = [names[i] for i in kept]
    notes = [f"skipped: {reason}" for reason in part.reasons] + [*ignored_notes(args.query, paths), *fitted.notes]
    if args.reject and classifier.confidence is None:
        notes.append("the probabilities are not calibrated, so --reject is of the head's own")
    return Predictions(
        files=names,
        paths=[paths[i] for i in kept],
        class_names=classifier.class_names,
        probabilities=answers.probabilities,
        finetuned=answers.finetuned,
        nearest=[fitted.examples[i] for i in nearest],
        nearest_label=y[nearest].tolist(),
        truth=folder_truth(names, classifier.class_names),
        related=fitted.related,
        n_support=torch.bincount(y, minlength=len(classifier.class_names)).tolist(),
        notes=notes,
        facts=fitted.facts,
        confidence=classifier.confidence,
        cosine=answers.cosine.tolist(),
        unlike=(answers.cosine < classifier.least_cosine).tolist(),
        reject=args.reject,
    )


def hash_of(value: object) -> str:
    """A hash of what a value is written as."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def ignored_notes(folder: Path, used: list[Path]) -> Iterator[str]:
    """What was left out of a folder of the user's, if anything."""
    ignored = other_files(folder, used) if folder.is_dir() else ""
    if ignored:
        yield f"of {folder}, {len(used)} images were read{ignored}"


class FewShotClassifier:
    """predict.py in the manner of scikit-learn, whose clone and cross_val_score take it.

    backbone: a checkpoint, or the name of a backbone whose weights= are given; base: a folder of related images.
    `flags` are the others of predict.py, by name and with the same defaults, such as alignment="none". Images are
    paths, images of PIL or uint8 arrays (h, w, 3). Nothing is printed. Raises UserError when something given is wrong.
    After fit: classes_, the labels in order, and confidence_, what is known of the accuracy, or None.
    """

    _estimator_type = "classifier"

    def __init__(self, backbone: str | Path | None = None, base: str | Path | None = None, **flags: Any):
        self.backbone, self.base, self.flags = backbone, base, flags

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """What it was made with, by name."""
        return {"backbone": self.backbone, "base": self.base, **self.flags}

    def set_params(self, **params: Any) -> "FewShotClassifier":
        """Change some of what it was made with."""
        self.backbone, self.base = params.pop("backbone", self.backbone), params.pop("base", self.base)
        self.flags = self.flags | params
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags  # only scikit-learn calls this

        target, inputs = TargetTags(required=True), InputTags(two_d_array=False)
        return Tags(
            estimator_type="classifier", target_tags=target, classifier_tags=ClassifierTags(), input_tags=inputs
        )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "classes_")

    def arguments(self) -> argparse.Namespace:
        """The flags of predict.py, for images that are no folders."""
        name = str(self.backbone)
        named = self.backbone is not None and (name in BACKBONES or OTHERS.fullmatch(name) is not None)
        given = {"support": "images", "query": "images", "backbone" if named else "checkpoint": self.backbone}
        return arguments(given | {"base": self.base} | self.flags)

    def fit(self, images: Sequence[Any], labels: Sequence[Any]) -> "FewShotClassifier":
        """Fit to images and their labels, two or more different ones."""
        images, args = list(images), self.arguments()
        if len(images) != len(labels):
            raise UserError(f"{len(images)} images and {len(labels)} labels: give as many of each")
        classes, y = np.unique(np.asarray(labels), return_inverse=True)
        if len(classes) < 2:
            raise UserError(f"the labels are of {len(classes)} class: give images of 2 or more")
        run = self._run(args)
        names = [str(image) if isinstance(image, str | Path) else f"{i}" for i, image in enumerate(images)]
        fitted = fit(args, run, [str(c) for c in classes], images, names, y.tolist(), [])
        return self._take(fitted, classes)

    def predict_proba(self, images: Sequence[Any]) -> np.ndarray:
        """The probability of each of classes_ for each image, calibrated where that is known: (n, n_way)."""
        if not self.__sklearn_is_fitted__():
            raise UserError("this classifier is not fitted: call fit, or load a saved one")
        images, args = list(images), self.fitted_.facts
        if not images:
            raise UserError("no images to label: give one or more")
        parts = label_images(self.fitted_.classifier, images, args["img_size"], 4, False, Parts(None, ""), self.run_)
        return label_all(parts).answers.probabilities.numpy()

    def predict(self, images: Sequence[Any]) -> np.ndarray:
        """The most probable of classes_ for each image: (n,)."""
        best = self.predict_proba(images).argmax(1)
        return self.classes_[best]

    def score(self, images: Sequence[Any], labels: Sequence[Any]) -> float:
        """The share of the images that get their label."""
        return float((self.predict(images) == np.asarray(labels)).mean())

    def save(self, path: str | Path) -> None:
        """Keep the fitted classifier in a file, which predict.py --classifier takes too."""
        if not self.__sklearn_is_fitted__():
            raise UserError("this classifier is not fitted: call fit before save")
        save_classifier(Path(path), self.fitted_.classifier, self.fitted_.facts | {"labels": self.classes_.tolist()})

    @classmethod
    def load(cls, path: str | Path, backbone: str | None = None, device: str = "auto") -> "FewShotClassifier":
        """The classifier of a file; the backbone is to be named if it is of a user's own code, which is then run."""
        classifier, facts = load_classifier(Path(path), backbone)
        made = cls(backbone, device=device)
        made.run_ = start_run(ALONE, device, "fp32", 0, True, False)
        fitted = Fitted(classifier.to(made.run_.device), facts, [Path(name) for name in classifier.examples])
        labels = facts.get("labels", classifier.class_names)
        if [str(label) for label in labels] != classifier.class_names:
            raise UserError(f"{path} is damaged: its labels are not the names of its classes")
        return made._take(fitted, np.asarray(labels))

    def _run(self, args: argparse.Namespace) -> Run:
        self.run_ = start_run(ALONE, args.device, args.precision, args.seed, True, args.no_keep_memory)
        return self.run_

    def _take(self, fitted: Fitted, classes: np.ndarray) -> "FewShotClassifier":
        self.fitted_, self.classes_, self.confidence_ = fitted, classes, fitted.classifier.confidence
        return self


def prepare_out(args: argparse.Namespace) -> Path:
    """Make the output folder, and say where parts are kept in it. Raises UserError, before any work, when it cannot be
    written or holds predictions, or when what is to be written elsewhere is there."""
    out, parts = args.out, args.out / "predictions.parts"
    if args.query and not args.overwrite:
        stopped = parts.exists()
        if (out / "predictions.csv").exists() and not (args.resume and stopped):
            raise UserError(f"{out} holds predictions already: give --overwrite to replace them, or another --out")
        if stopped and not args.resume:
            raise UserError(f"{out} holds predictions that were stopped: give --resume to go on, or --overwrite")
    if args.save and args.save.exists() and not (args.overwrite or args.resume):
        raise UserError(f"{args.save} is there already: give --overwrite to replace it, or another --save")
    if args.copy_to:
        check_copies(args)
    if args.save:
        check_writable(args.save.absolute().parent, "--save")
    if args.query:
        check_writable(out, "--out")
    if args.overwrite:
        shutil.rmtree(parts, ignore_errors=True)
    return parts


def keep_classifier(args: argparse.Namespace, fitted: Fitted) -> None:
    """Write the classifier to --save; with --resume one that is there stays. Raises UserError when it is another."""
    if not (args.resume and args.save.exists()):
        save_classifier(args.save, fitted.classifier, fitted.facts)
        return
    try:
        digest = load_classifier(args.save, args.backbone)[0].digest
    except UserError:  # of another backbone, or damaged
        digest = ""
    if digest != fitted.classifier.digest:
        raise UserError(f"{args.save} is of another classifier: give --overwrite to replace it, or another --save")


def check_writable(folder: Path, flag: str) -> None:
    """Make a folder. Raises UserError when nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".writable.{os.getpid()}").touch()
        (folder / f".writable.{os.getpid()}").unlink()
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be written ({error.strerror}): give another {flag}") from error


def check_copies(args: argparse.Namespace) -> None:
    """Raise UserError when copies would come among the user's images or other files, or there is nothing to copy."""
    folder, target = args.copy_to, args.copy_to.resolve()
    if not args.query:
        raise UserError("argument --copy_to: name the images that are to be labelled and copied with --query")
    for own in (args.query, args.support):
        if own and (own.resolve() in (target, *target.parents) or target in own.resolve().parents):
            raise UserError(f"--copy_to {folder} holds or lies in {own}, images that are read: give a folder elsewhere")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not args.resume:
        raise UserError(f"--copy_to {folder} is not an empty folder: give a new one, for nothing is overwritten")


def check_labels(class_names: list[str], args: argparse.Namespace) -> None:
    """Raise UserError when a class has a name that --reject or --copy_to cannot do with."""
    if UNSURE in class_names and args.reject:
        raise UserError(f"argument --reject: a class is named {UNSURE!r} itself: rename its folder")
    for name in class_names if args.copy_to else ():
        if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
            raise UserError(f"argument --copy_to: class {name!r} cannot be the name of a folder: leave it out")


def copy_images(predictions: Predictions, folder: Path, run: Run) -> None:
    """Copy each image into folder/LABEL, below its own folders; copies that are there stay as they are."""
    rows = list(zip(predictions.paths, predictions.files, predictions.labels, strict=True))
    for path, name, label in run.bar(rows, "copy", "img"):
        target = folder / label / name
        if not target.exists():
            with atomic_file(target) as temporary:
                shutil.copy2(path, temporary)


def write_outputs(args: argparse.Namespace, fitted: Fitted, run: Run, parts: Path, began: float) -> None:
    """Label the query images, write what was found of them, and say so."""
    names = list_queries(args.query)[1]
    class_names, out = fitted.classifier.class_names, args.out
    partial = PartialTable(out / "predictions.partial.csv", class_names, args.reject)

    def add(part: Part) -> None:
        unlike = (part.answers.cosine < fitted.classifier.least_cosine).tolist()
        partial.add([names[i] for i in part.kept], part.answers.probabilities, unlike)

    try:
        with partial:
            predictions = predict(args, fitted, run, parts, add)
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt("interrupted: the same command with --resume goes on") from stopped
    finally:
        if not parts.exists():  # of no image is there anything to go on with
            partial.path.unlink(missing_ok=True)
    if args.sort == "sure":
        predictions = least_sure_first(predictions)
    n_sheet = min(args.max_sheet, len(predictions.files))
    table, sheet = out / "predictions.csv", out / "contact_sheet.png"
    write_sheet(sheet, predictions, n_sheet)
    record = {"stage": "predict", **prediction_record(predictions)}
    record |= {"seconds": round(time.time() - began, 2), **provenance(vars(args), run)}
    write_json(out / "predictions.json", record)
    write_csv(table, predictions)
    write_predictions(out / "predictions.html", predictions, args.support)
    if args.copy_to:
        copy_images(predictions, args.copy_to, run)
    partial.path.unlink(missing_ok=True)
    shutil.rmtree(parts, ignore_errors=True)

    print_classifier(fitted, predictions.notes)
    print("\n".join(summary_lines(predictions)))
    print(f"predictions {table}")
    first = f", the first {n_sheet} images (--max_sheet)" if n_sheet < len(predictions.files) else ""
    print(f"contact sheet {sheet}{first}")
    print(f"page {out / 'predictions.html'}")
    if args.copy_to:
        print(f"copies {args.copy_to}, in a folder a label")


def print_classifier(fitted: Fitted, notes: list[str]) -> None:
    """Say what is known of a classifier."""
    for note in notes:
        print(f"note: {note}")
    facts = fitted.facts
    aligned = facts["alignment"] != "none" and "base" in facts
    alignment = f"{facts['alignment']} alignment with {facts['base']}" if aligned else "no alignment"
    print(f"{facts['method']} head on {facts['backbone']}, {alignment}")
    print("\n".join(confidence_lines(fitted.classifier)))


def main() -> None:
    args = args_parser("predict")
    began = time.time()
    parts = prepare_out(args)
    fitted, run = fitted_or_kept(args)
    if args.save:
        keep_classifier(args, fitted)
    if args.query:
        write_outputs(args, fitted, run, parts, began)
    else:
        print_classifier(fitted, fitted.notes)
    if args.save:
        print(f"classifier {args.save}, {args.save.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main, "--aug_size, --align_blocks, --critic_hidden or --img_size")
