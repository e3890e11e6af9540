"""What predict.py writes and prints of its predictions: a csv, a record, a summary."""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.files import atomic_file
from photos.classifier import Classifier
from photos.confidence import Confidence
from photos.predictions import UNSURE, Predictions

N_LEAST_SURE = 5


MARK = "mark"  # the last column: `unlike`, or nothing


def table_rows(
    files: Sequence[str], probabilities: Tensor, unlike: Sequence[bool], class_names: Sequence[str], reject: float
) -> Iterator[list[str]]:
    """A row a query: file, label, or `unsure` below the probability `reject`, that of every class, and the mark."""
    best = probabilities.max(1)
    columns = zip(
        files, best.indices.tolist(), (best.values >= reject).tolist(), probabilities.tolist(), unlike, strict=True
    )
    for name, label, sure, row, is_unlike in columns:
        yield [name, class_names[label] if sure else UNSURE, *(f"{p:.6f}" for p in row), "unlike" if is_unlike else ""]


def write_csv(path: Path, predictions: Predictions) -> None:
    """The header and the table_rows of all queries; UTF-8, written atomically."""
    p = predictions
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", *p.class_names, MARK])
        writer.writerows(table_rows(p.files, p.probabilities, p.unlike, p.class_names, p.reject))


class PartialTable:
    """The table as it grows, for who does not want to wait: an open file, in a block of `with`."""

    def __init__(self, path: Path, class_names: list[str], reject: float):
        self.path, self.class_names, self.reject = path, class_names, reject

    def __enter__(self) -> "PartialTable":
        self.file = open(self.path, "w", encoding="utf-8", newline="")
        csv.writer(self.file).writerow(["file", "label", *self.class_names, MARK])
        return self

    def add(self, files: list[str], probabilities: Tensor, unlike: list[bool]) -> None:
        """Write the rows of some queries, at once."""
        csv.writer(self.file).writerows(table_rows(files, probabilities, unlike, self.class_names, self.reject))
        self.file.flush()

    def __exit__(self, *error: object) -> None:
        self.file.close()


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


def least_sure(predictions: Predictions, n: int) -> list[dict[str, Any]]:
    """The n queries whose label has the smallest probability, the least sure first, with their second best class."""
    names, best = predictions.class_names, predictions.probabilities.topk(2)
    rows = []
    for i in best.values[:, 0].argsort(stable=True)[:n].tolist():
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


def estimate(confidence: Confidence) -> str:
    """`92 % (75 to 98 %)`: the accuracy on support images that were left out, and its interval."""
    low, high = confidence.interval
    return f"{100 * confidence.accuracy:.0f} % ({100 * low:.0f} to {100 * high:.0f} %)"


def confidence_lines(classifier: Classifier) -> list[str]:
    """What is known of a classifier before it labels anything."""
    n, n_way, confidence = len(classifier.y_support), len(classifier.class_names), classifier.confidence
    lines = [f"{n} examples of {n_way} classes"]
    if confidence is None:
        why = "blocks were aligned" if classifier.aligned is not classifier.backbone else "no class has 2 examples"
        return [*lines, f"accuracy not known, probabilities not calibrated: {why}"]
    of = f"{confidence.n_right} of {confidence.n} examples, left out in turn, were labelled right"
    lines.append(f"accuracy {estimate(confidence)}, 95 % interval: {of}")
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
        "least_sure": least_sure(predictions, N_LEAST_SURE),
        "related_base_classes": predictions.related,
        "notes": predictions.notes,
    }


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
    if not all(predictions.sure):
        lines.append(
            f"  {UNSURE}: {predictions.sure.count(False)} images, of a probability below {predictions.reject:g}"
        )
    if any(predictions.unlike):
        lines.append(f"unlike every class: {predictions.unlike.count(True)} images, marked in the table")
    lines.append("least sure")
    for row in least_sure(predictions, N_LEAST_SURE):
        best, then = (f"{row[a]} {row[b]:.2f}" for a, b in (("label", "probability"), ("then", "probability_then")))
        lines.append(f"  {row['file']}: {best}, then {then}")
    n_known = sum(c is not None for c in predictions.truth)
    if predictions.n_right is not None:
        right = f"{100 * predictions.n_right / n:.2f} % ({predictions.n_right} of {n})"
        lines.append(f"accuracy {right}: every image lies in a folder named as a class")
        most_probable = predictions.probabilities.argmax(1).tolist()
        kept = [p == t for p, t, sure in zip(most_probable, predictions.truth, predictions.sure, strict=True) if sure]
        if 0 < len(kept) < n:
            lines.append(f"accuracy of those kept {100 * sum(kept) / len(kept):.2f} % ({sum(kept)} of {len(kept)})")
    elif n_known:
        lines.append(f"no accuracy: only {n_known} of {n} images lie in a folder named as a class")
    return lines
