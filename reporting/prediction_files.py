"""What predict.py writes and prints of its predictions: a csv, a record, a summary."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

from engine.files import atomic_file
from methods.prediction import Predictions

N_LEAST_SURE = 5


def write_csv(path: Path, predictions: Predictions) -> None:
    """One row a query: file, label, and the probability of every class; UTF-8, written atomically."""
    rows = zip(predictions.files, predictions.labels, predictions.probabilities.tolist(), strict=True)
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", *predictions.class_names])
        writer.writerows([name, label, *(f"{p:.6f}" for p in row)] for name, label, row in rows)


def per_class_summary(predictions: Predictions) -> dict[str, dict[str, Any]]:
    """For each class its support images, the queries that got its label, and the mean of their probabilities."""
    confidence, label = predictions.probabilities.max(1)
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


def prediction_record(predictions: Predictions) -> dict[str, Any]:
    """The part of the result file that says what was found."""
    n_right, n_query = predictions.n_right, len(predictions.files)
    return {
        **predictions.facts,
        "n_query": n_query,
        "accuracy": None if n_right is None else round(100 * n_right / n_query, 3),
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
    lines.append("least sure")
    for row in least_sure(predictions, N_LEAST_SURE):
        best, then = (f"{row[a]} {row[b]:.2f}" for a, b in (("label", "probability"), ("then", "probability_then")))
        lines.append(f"  {row['file']}: {best}, then {then}")
    n_known = sum(c is not None for c in predictions.truth)
    if predictions.n_right is not None:
        right = f"{100 * predictions.n_right / n:.2f} % ({predictions.n_right} of {n})"
        lines.append(f"accuracy {right}: every image lies in a folder named as a class")
    elif n_known:
        lines.append(f"no accuracy: only {n_known} of {n} images lie in a folder named as a class")
    return lines
