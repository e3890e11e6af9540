"""Label any number of images in parts of bounded memory; what is done is kept, so that a stopped run can go on."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import UserError
from engine.files import atomic_file, folder_name, load_kept, save_atomically
from engine.records import write_json
from engine.run import Run
from photos.classifier import Answers, Fitted, classify
from photos.confidence import SAME
from photos.images import decode_views, ignored_notes, list_queries
from photos.portable import check_export
from photos.predictions_page import write_predictions
from photos.table import UNSURE, Predictions, first_of, prediction_record, write_csv

PART = 512  # images decoded and labelled together


@dataclass(frozen=True)
class LabelFlags:
    """What is labelled and where it is written; each field is explained at the flag of the same name."""

    support: Path | None
    query: Path | None
    out: Path
    save: Path | None
    export: Path | None
    copy_to: Path | None
    resume: bool
    overwrite: bool
    skip_bad: bool
    reject: float
    sort: str
    review: bool
    num_workers: int

    @property
    def table(self) -> Path:
        """Where the table of predictions is written."""
        return self.out / "predictions.csv"

    @property
    def parts(self) -> Path:
        """The folder of the parts that are done, until all are."""
        return self.out / "predictions.parts"


def check_outputs(flags: LabelFlags) -> None:
    """Raise UserError, before any work, when files would be replaced or copies mix with images; make the folders."""
    if flags.query and not flags.overwrite:
        if flags.parts.exists() and not flags.resume:
            raise UserError(f"{flags.out} holds predictions that were stopped: give --resume to go on, or --overwrite")
        if flags.table.exists() and not flags.parts.exists():
            raise UserError(f"{flags.out} holds predictions already: give --overwrite, or another --out")
    for file, name in ((flags.save, "--save"), (flags.export, "--export")):
        if file and file.exists() and not flags.overwrite:
            raise UserError(f"{file} is there already: give --overwrite to replace it, or another {name}")
    if flags.export:
        check_export(flags.export)
    if flags.copy_to:
        parents = (flags.copy_to.resolve(), *flags.copy_to.resolve().parents)
        if any(own and own.resolve() in parents for own in (flags.query, flags.support)):
            raise UserError(f"--copy_to {flags.copy_to} lies among images that are read: give a folder elsewhere")
        if flags.copy_to.exists() and not flags.resume:
            raise UserError(f"{flags.copy_to} is there already: give another --copy_to, for nothing is overwritten")
    for folder in (flags.save and flags.save.parent, flags.export and flags.export.parent, flags.query and flags.out):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    if flags.overwrite:
        shutil.rmtree(flags.parts, ignore_errors=True)


def label_images(
    fitted: Fitted, images: Sequence[Any], num_workers: int, skip_bad: bool, run: Run, folder: Path | None = None
) -> tuple[list[int], list[str], Answers]:
    """The indices of the images (see open_image) that could be decoded, reasons for the others, and the answers.

    Parts of them are kept in `folder`, if one is given, and not labelled again. Raises UserError for an image that
    cannot be decoded, unless skip_bad leaves it out, and when there is no other.
    """
    parts: list[dict[str, Any]] = []
    view = fitted.view.of_folder(images, num_workers)
    with run.bar(None, "label", "img", total=len(images)) as bar:
        for start in range(0, len(images), PART):
            chunk = images[start : start + PART]
            path, part = None, None
            if folder:  # a part is kept under a hash of all that its answers follow from
                files = [(file, file.stat().st_size) for file in chunk]
                follows_from = repr((fitted.classifier.digest, view, run.precision.name, files))
                path = folder / f"{hashlib.sha256(follows_from.encode()).hexdigest()[:32]}.pt"
                part = load_kept(path)
            if part is None:
                views, kept, reasons = decode_views(chunk, view, num_workers, skip_bad)
                answers = classify(fitted.classifier, views, run)._asdict() if kept else None
                part = {"kept": [start + i for i in kept], "reasons": reasons, "answers": answers}
                if path and kept:
                    save_atomically(path, part)
            parts.append(part)
            bar.update(len(chunk))
    kept, reasons = ([item for part in parts for item in part[name]] for name in ("kept", "reasons"))
    if not kept:
        raise UserError(": ".join(["no image can be decoded", *reasons[:1]]))
    columns = zip(*(Answers(**part["answers"]) for part in parts if part["answers"]), strict=True)
    return kept, reasons, Answers(*map(torch.cat, columns))


def label_folder(fitted: Fitted, query: Path, flags: LabelFlags, run: Run) -> Predictions:
    """What a classifier says of the query images, in the order of --sort."""
    classifier = fitted.classifier
    if UNSURE in classifier.class_names and flags.reject:
        raise UserError(f"argument --reject: a class is named {UNSURE!r} itself: rename its folder")
    for name in classifier.class_names if flags.copy_to else ():
        folder_name(name)
    paths, names = list_queries(query)
    try:
        kept, reasons, answers = label_images(fitted, paths, flags.num_workers, flags.skip_bad, run, flags.parts)
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt("interrupted: the same command with --resume goes on") from stopped
    if flags.sort == "sure":
        order = answers.probabilities.max(1).values.argsort(stable=True)
        kept, answers = [kept[i] for i in order.tolist()], Answers(*(column[order] for column in answers))
    names = [names[i] for i in kept]
    notes = [f"skipped: {reason}" for reason in reasons] + ignored_notes(query, paths) + fitted.notes
    nearest = zip(names, answers.cosine.tolist(), [classifier.examples[i] for i in answers.nearest], strict=True)
    same = [(name, example) for name, cosine, example in nearest if cosine > SAME]
    if found := [name if name == example else f"{name} is {example}" for name, example in same]:
        notes.append(f"images that are examples, and tell nothing of others: {len(found)}, {first_of(found)}")
    if flags.reject and classifier.confidence is None:
        notes.append("the probabilities are not calibrated, so --reject is of the head's own")
    return Predictions(fitted, names, [paths[i] for i in kept], answers, notes, flags.reject, flags.review)


def write_outputs(predictions: Predictions, flags: LabelFlags, about: dict[str, Any], run: Run) -> None:
    """Write record, table and page of predictions, and the copies. about: how they were made, for the record."""
    write_json(flags.out / "predictions.json", {"stage": "predict", **prediction_record(predictions), **about})
    write_csv(flags.table, predictions)
    write_predictions(flags.out / "predictions.html", predictions, flags.support, flags.num_workers, run)
    if flags.copy_to:
        copy_images(predictions, flags.copy_to, run)
    shutil.rmtree(flags.parts, ignore_errors=True)


def copy_images(predictions: Predictions, folder: Path, run: Run) -> None:
    """Copy each image into folder/LABEL, below its own folders; copies that are there stay as they are."""
    rows = list(zip(predictions.paths, predictions.files, predictions.labels, strict=True))
    for path, name, label in run.bar(rows, "copy", "img"):
        target = folder / label / name
        if not target.exists():
            with atomic_file(target) as temporary:
                shutil.copy2(path, temporary)
