"""Predictions of query images, and what is written and printed of them: a csv, a record, a summary."""

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.files import atomic_file
from photos.classifier import Classifier
from photos.confidence import Confidence

UNSURE = "unsure"  # the label of an image whose largest probability is below --reject
N_LEAST_SURE = 5


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of q query images.

    files: their names below the query folder, and paths, where they are; class_names (n_way); probabilities (q, n_way),
    and finetuned (q, n_way), those before alignment. nearest: for each query the index of the support image whose
    feature has the largest cosine to its own, and unlike: whether that is far below those within the support. truth:
    the index of the class that each query's folder is named as, or None. related: for each class the base classes that
    it was aligned with, best first. n_support: support images of each class. notes: what a user should know. facts:
    what a record says of the classifier. reject: the least probability of a label, below which a query is `unsure`.
    """

    files: list[str]
    paths: list[Path]
    class_names: list[str]
    probabilities: Tensor
    finetuned: Tensor
    nearest: list[int]
    unlike: list[bool]
    truth: list[int | None]
    related: dict[str, list[str]]
    n_support: list[int]
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    confidence: Confidence | None = None
    reject: float = 0.0

    @property
    def best(self) -> list[int]:
        """For each query the index of the most probable class."""
        return self.probabilities.argmax(1).tolist()

    @property
    def sure(self) -> list[bool]:
        """Whether the largest probability of each query is at least `reject`."""
        return (self.probabilities.max(1).values >= self.reject).tolist()

    @property
    def labels(self) -> list[str]:
        """For each query the name of the most probable class, or `unsure`."""
        return [self.class_names[c] if sure else UNSURE for c, sure in zip(self.best, self.sure, strict=True)]

    @property
    def n_right(self) -> int | None:
        """How many queries have the class of their folder as the most probable one, the unsure ones included; None
        unless every query lies in a class's folder."""
        if None in self.truth:
            return None
        return sum(p == c for p, c in zip(self.best, self.truth, strict=True))


def prediction_rows(predictions: Predictions) -> Iterator[list[str]]:
    """A header, and a row per query: file, label, the probability of every class, and the mark `unlike`, or nothing."""
    p = predictions
    yield ["file", "label", *p.class_names, "mark"]
    for name, label, row, unlike in zip(p.files, p.labels, p.probabilities.tolist(), p.unlike, strict=True):
        yield [name, label, *(f"{probability:.6f}" for probability in row), "unlike" if unlike else ""]


def write_csv(path: Path, predictions: Predictions) -> None:
    """Write the prediction_rows, UTF-8, atomically."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(prediction_rows(predictions))


def per_class_summary(predictions: Predictions) -> dict[str, dict[str, Any]]:
    """For each class its support images, the queries that got its label, and the mean of their probabilities."""
    confidence, label = predictions.probabilities.max(1)
    label[confidence < predictions.reject] = -1  # unsure
    counts = Counter(label.tolist())
    return {
        name: {
            "n_support": predictions.n_support[c],
            "n_query": counts[c],
            "mean_confidence": confidence[label == c].mean().item() if counts[c] else None,
        }
        for c, name in enumerate(predictions.class_names)
    }


def least_sure(predictions: Predictions) -> list[dict[str, Any]]:
    """The queries whose label has the smallest probability, the least sure first, with their second best class."""
    names, best = predictions.class_names, predictions.probabilities.topk(2)
    rows = []
    for i in best.values[:, 0].argsort(stable=True)[:N_LEAST_SURE].tolist():
        (p, p_then), (label, then) = best.values[i].tolist(), best.indices[i].tolist()
        row = {"file": predictions.files[i], "label": names[label], "probability": p}
        rows.append(row | {"then": names[then], "probability_then": p_then})
    return rows


def confidence_record(confidence: Confidence | None) -> dict[str, Any] | None:
    """What is known of the confidence, the accuracy in %."""
    if confidence is None:
        return None
    low, high = confidence.interval
    percent = {"accuracy": confidence.accuracy, "low": low, "high": high}
    numbers = {name: round(100 * value, 3) for name, value in percent.items()}
    return {"n": confidence.n, "n_right": confidence.n_right, **numbers, "temperature": confidence.temperature}


def confidence_lines(classifier: Classifier) -> list[str]:
    """What is known of a classifier before it labels anything."""
    n, n_way, confidence = len(classifier.y_support), len(classifier.class_names), classifier.confidence
    lines = [f"{n} examples of {n_way} classes"]
    if confidence is None:
        why = "blocks were aligned" if classifier.aligned is not classifier.backbone else "no class has 2 examples"
        return [*lines, f"accuracy not known, probabilities not calibrated: {why}"]
    accuracy, low, high = (100 * share for share in (confidence.accuracy, *confidence.interval))
    of = f"{confidence.n_right} of {confidence.n} examples, left out in turn, were labelled right"
    lines.append(f"accuracy {accuracy:.0f} % ({low:.0f} to {high:.0f} %), 95 % interval: {of}")
    return [*lines, f"temperature {confidence.temperature:.2f}, which calibrates the probabilities"]


def prediction_record(predictions: Predictions) -> dict[str, Any]:
    """The part of the result file that says what was found."""
    n_right, n_query = predictions.n_right, len(predictions.files)
    return {
        **predictions.facts,
        "n_query": n_query,
        "accuracy": None if n_right is None else round(100 * n_right / n_query, 3),
        "confidence": confidence_record(predictions.confidence),
        "n_unsure": predictions.sure.count(False),
        "n_unlike": predictions.unlike.count(True),
        "classes": per_class_summary(predictions),
        "least_sure": least_sure(predictions),
        "related_base_classes": predictions.related,
        "notes": predictions.notes,
    }


def accuracy_lines(predictions: Predictions) -> list[str]:
    """The accuracy where every query lies in a class's folder, and that of the queries that are not `unsure`."""
    n, n_known = len(predictions.files), sum(c is not None for c in predictions.truth)
    if predictions.n_right is None:
        return [f"no accuracy: only {n_known} of {n} images lie in a folder named as a class"] if n_known else []
    right = f"{100 * predictions.n_right / n:.2f} % ({predictions.n_right} of {n})"
    lines = [f"accuracy {right}: every image lies in a folder named as a class"]
    columns = zip(predictions.best, predictions.truth, predictions.sure, strict=True)
    kept = [best == truth for best, truth, sure in columns if sure]
    if 0 < len(kept) < n:
        lines.append(f"accuracy of those kept {100 * sum(kept) / len(kept):.2f} % ({sum(kept)} of {len(kept)})")
    return lines


def summary_lines(predictions: Predictions) -> list[str]:
    """How many images got each label and how surely, which to look at first, and the accuracy where it is known."""
    n, names = len(predictions.files), predictions.class_names
    lines = [f"{n} images labelled from {sum(predictions.n_support)} examples of {len(names)} classes"]
    if predictions.related:
        changed = (predictions.probabilities.argmax(1) != predictions.finetuned.argmax(1)).sum().item()
        lines.append(f"alignment changed {changed} of {n} labels")
    width = max(len(name) for name in ["label", *names])
    lines.append(f"  {'label':{width}}  examples  images  mean probability")
    for name, row in per_class_summary(predictions).items():
        confidence = "" if row["mean_confidence"] is None else f"{row['mean_confidence']:.2f}"
        lines.append(f"  {name:{width}}  {row['n_support']:8d}  {row['n_query']:6d}  {confidence:>16}".rstrip())
    if n_unsure := predictions.sure.count(False):
        lines.append(f"  {UNSURE}: {n_unsure} images, of a probability below {predictions.reject:g}")
    if any(predictions.unlike):
        lines.append(f"unlike every class: {predictions.unlike.count(True)} images, marked in the table")
    lines.append("least sure")
    for row in least_sure(predictions):
        best, then = (f"{row[a]} {row[b]:.2f}" for a, b in (("label", "probability"), ("then", "probability_then")))
        lines.append(f"  {row['file']}: {best}, then {then}")
    return lines + accuracy_lines(predictions)
