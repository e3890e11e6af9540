"""Label any number of images part by part: what is done is kept, so a stopped run goes on, and memory stays bounded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import UserError
from engine.files import Schema, load_tensors, matches_schema, save_atomically
from engine.run import Run
from photos.classifier import Answers, Classifier, classify
from photos.images import decode_views

# Images of a part: their views are all that is held of images.
PART = 512
PART_FILE: Schema = {"key": str, "kept": list[int], "reasons": list[str], "answers": dict[str, Tensor]}


@dataclass(frozen=True)
class Part:
    """What was found of some of the images, in their order: kept, the indices of those that could be decoded, the
    answers to them, and for each of the others a reason."""

    kept: list[int]
    answers: Answers
    reasons: list[str]


@dataclass(frozen=True)
class Parts:
    """Parts in files of a folder, each with the key of all that it follows from; a folder of None keeps nothing."""

    folder: Path | None
    key: str

    def load(self, start: int, n_way: int) -> Part | None:
        """The part whose first image is `start`, if it is kept. Raises UserError when it is of another run."""
        path = self.path(start)
        if path is None or not path.is_file():
            return None
        try:
            content = load_tensors(path, "cpu")
        except ValueError:  # damaged: made anew
            return None
        if not matches_schema(content, PART_FILE):
            return None
        n, answers = len(content["kept"]), content["answers"]
        shapes = {"probabilities": (n, n_way), "finetuned": (n, n_way), "cosine": (n,), "nearest": (n,)}
        if {name: tuple(value.shape) for name, value in answers.items()} != shapes:
            return None
        if content["key"] != self.key:
            raise UserError(
                f"{self.folder} is of another classifier, other images or flags: give --overwrite to begin anew, or "
                "another --out"
            )
        return Part(content["kept"], Answers(**answers), content["reasons"])

    def save(self, start: int, part: Part) -> None:
        """Keep a part."""
        path = self.path(start)
        if path is not None:
            answers = asdict(part.answers)
            save_atomically(path, {"key": self.key, "kept": part.kept, "reasons": part.reasons, "answers": answers})

    def path(self, start: int) -> Path | None:
        """Where a part is kept."""
        return self.folder / f"{start:09d}.pt" if self.folder else None


def label_part(
    classifier: Classifier, images: Sequence[object], first: int, img_size: int, num_workers: int, run: Run
) -> Part:
    """The part of images (see open_image) that are numbered from `first`."""
    views, kept, reasons = decode_views(images, 0, img_size, num_workers, quiet=True)
    n_way, nothing = len(classifier.class_names), torch.empty(0)
    empty = Answers(nothing.view(0, n_way), nothing.view(0, n_way), nothing, nothing.long())
    return Part([first + i for i in kept], classify(classifier, views, run) if kept else empty, reasons)


def label_images(
    classifier: Classifier,
    images: Sequence[object],
    img_size: int,
    num_workers: int,
    skip_bad: bool,
    parts: Parts,
    run: Run,
) -> Iterator[Part]:
    """The parts of all images, one after another, under a bar with the rate; those that are kept are not made again.

    Raises UserError for an image that cannot be decoded, unless they are to be skipped.
    """
    with run.bar(None, "label", "img", total=len(images)) as bar:
        for start in range(0, len(images), PART):
            chunk = images[start : start + PART]
            part = parts.load(start, len(classifier.class_names))
            if part is None:
                part = label_part(classifier, chunk, start, img_size, num_workers, run)
                if part.reasons and not skip_bad:
                    raise UserError(part.reasons[0])
                if part.kept:
                    parts.save(start, part)
            yield part
            bar.update(len(chunk))


def label_all(parts: Iterator[Part], each: Callable[[Part], None] | None = None) -> Part:
    """All parts as one; `each`, if there is one, is given every part as it comes."""
    kept: list[int] = []
    reasons: list[str] = []
    answers: list[Answers] = []
    for part in parts:
        if each:
            each(part)
        kept += part.kept
        reasons += part.reasons
        answers.append(part.answers)
    columns = ([getattr(a, name) for a in answers] for name in ("probabilities", "finetuned", "cosine", "nearest"))
    return Part(kept, Answers(*(torch.cat(column) for column in columns)), reasons)
