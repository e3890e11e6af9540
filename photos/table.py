"""Predictions of query images, and what is written and printed of them: a csv, a record, a summary."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.files import atomic_file
from photos.classifier import Answers, Classifier, Fitted
from photos.images import folder_truth

UNSURE = "unsure"  # the label of an image whose largest probability is below --reject
N_LEAST_SURE = 5
N_SHOWN = 10  # classes in a line


@dataclass(frozen=True)
class Predictions:
    """What a fitted classifier says of q query images.

    files: their names below the query folder, and paths, where they are. answers: probabilities and nearest examples.
    notes: what a user should know. reject: the least probability of a label, below which a query is `unsure`. review:
    whether the examples that look wrong are listed.
    """

    fitted: Fitted
    files: list[str]
    paths: list[Path]
    answers: Answers
    notes: list[str] = field(default_factory=list)
    reject: float = 0.0
    review: bool = False

    @property
    def class_names(self) -> list[str]:
        """The n_way classes."""
        return self.fitted.classifier.class_names

    @property
    def n_support(self) -> list[int]:
        """Support images per class."""
        return self.fitted.classifier.n_support

    @property
    def best(self) -> list[int]:
        """For each query the index of the most probable class."""
        return self.answers.probabilities.argmax(1).tolist()

    @property
    def sure(self) -> list[bool]:
        """Whether the largest probability of each query is at least `reject`."""
        return (self.answers.probabilities.max(1).values >= self.reject).tolist()

    @property
    def labels(self) -> list[str]:
        """For each query the name of the most probable class, or `unsure`."""
        return [self.class_names[c] if sure else UNSURE for c, sure in zip(self.best, self.sure, strict=True)]

    @property
    def unlike(self) -> list[bool]:
        """Whether each query's largest cosine to the support is far below the cosines within the support."""
        return (self.answers.cosine < self.fitted.classifier.least_cosine).tolist()

    @property
    def truth(self) -> list[int | None]:
        """For each query the index of the class that its folder is named as, or None."""
        return folder_truth(self.files, self.class_names)

    @property
    def n_right(self) -> int | None:
        """Correct predictions, the unsure ones included; None unless every query lies in a class's folder."""
        truth = self.truth
        return None if None in truth else sum(p == c for p, c in zip(self.best, truth, strict=True))


def write_csv(path: Path, predictions: Predictions) -> None:
    """Write a row per query, UTF-8, atomically: file, label, the probability of every class, and the mark `unlike`.

    After them stand the examples to review, as what leave-one-out makes of them, with the mark `example of CLASS`.
    """
    p, probabilities = predictions, predictions.answers.probabilities.tolist()
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", *p.class_names, "mark"])
        for name, label, row, unlike in zip(p.files, p.labels, probabilities, p.unlike, strict=True):
            writer.writerow([name, label, *(f"{each:.6f}" for each in row), "unlike" if unlike else ""])
        for name, own, label, row in to_review(p.fitted.classifier) if p.review else ():
            writer.writerow([name, label, *(f"{each:.6f}" for each in row), f"example of {own}"])


def to_review(classifier: Classifier) -> list[tuple[str, str, str, list[float]]]:
    """The examples that leave-one-out puts into another class, most certain first, which is where labels are wrong: the
    name, its class, that other class, the probability of every class."""
    names, y = classifier.class_names, classifier.y_support.tolist()
    wrong = classifier.confidence.wrong if classifier.confidence else []
    return [(classifier.examples[i], names[y[i]], names[row.index(max(row))], row) for i, row in wrong]


def review_lines(classifier: Classifier) -> list[str]:
    """The examples to review, one a line."""
    rows = to_review(classifier)
    if not rows:
        known = "puts each example into its own class" if classifier.confidence else "tested no example"
        return [f"nothing to review: leave-one-out {known}"]
    lines = [f"  {name} of {own}: {other} {max(row):.2f}" for name, own, other, row in rows]
    return ["review the labels of these examples, which leave-one-out puts into another class", *lines]


def per_class_summary(predictions: Predictions) -> dict[str, dict[str, Any]]:
    """For each class its support images, the queries that got its label, and the mean of their probabilities."""
    confidence, label = predictions.answers.probabilities.max(1)
    label[confidence < predictions.reject] = -1  # unsure
    summary = {}
    for c, (name, n_support) in enumerate(zip(predictions.class_names, predictions.n_support, strict=True)):
        own = confidence[label == c]
        mean = own.mean().item() if len(own) else None
        summary[name] = {"n_support": n_support, "n_query": len(own), "mean_confidence": mean}
    return summary


def least_sure(predictions: Predictions) -> list[dict[str, Any]]:
    """The queries whose label has the smallest probability, the least sure first, with their second best class."""
    names, best = predictions.class_names, predictions.answers.probabilities.topk(2)
    rows = []
    for i in best.values[:, 0].argsort(stable=True)[:N_LEAST_SURE].tolist():
        (p, p_then), (label, then) = best.values[i].tolist(), best.indices[i].tolist()
        row = {"file": predictions.files[i], "label": names[label], "probability": p}
        rows.append(row | {"then": names[then], "probability_then": p_then})
    return rows


def confidence_record(classifier: Classifier) -> dict[str, Any] | None:
    """What is known of the confidence, accuracies in %; of classes that were not tested, nothing."""
    confidence, n = classifier.confidence, classifier.n_support
    if confidence is None:
        return None
    low, high = confidence.interval
    percent = {"accuracy": confidence.accuracy, "low": low, "high": high}
    numbers = {name: round(100 * value, 3) for name, value in percent.items()}
    numbers |= {"chance": round(100 / len(n), 3), "majority": round(100 * max(n) / sum(n), 3)}
    classes = {name: {"n": tested, "n_right": right} for name, (tested, right) in tested_classes(classifier).items()}
    counts = {"n": confidence.n, "n_right": confidence.n_right, "classes": classes}
    return {**counts, **numbers, "temperature": confidence.temperature}


def first_of(texts: list[str]) -> str:
    """The first few of some texts, in a line."""
    return ", ".join(texts[:N_SHOWN] + [f"and {len(texts) - N_SHOWN} more"] * (len(texts) > N_SHOWN))


def tested_classes(classifier: Classifier) -> dict[str, tuple[int, int]]:
    """For each class that leave-one-out tested, how many examples, and how many were right; of older files none."""
    names, confidence = classifier.class_names, classifier.confidence
    if confidence is None or len(confidence.tested) < len(names):
        return {}
    rows = zip(names, confidence.tested, confidence.right, strict=True)
    return {name: (n, right) for name, n, right in rows if n}


def confidence_lines(classifier: Classifier) -> list[str]:
    """What is known of a classifier before it labels anything."""
    n, names, confidence = classifier.n_support, classifier.class_names, classifier.confidence
    lines = [f"{sum(n)} examples of {len(n)} classes"]
    if confidence is None:
        why = "blocks were aligned" if classifier.aligned is not classifier.backbone else "no class has 2 examples"
        return [*lines, f"accuracy not known, probabilities not calibrated: {why}"]
    accuracy, low, high = (100 * share for share in (confidence.accuracy, *confidence.interval))
    of = f"{confidence.n_right} of {confidence.n} examples, left out in turn, were labelled right"
    alike = ", and every class counts alike" if min(n) < max(n) else ""
    lines.append(f"accuracy {accuracy:.0f} % ({low:.0f} to {high:.0f} %), 95 % interval: {of}{alike}")
    largest = f"the largest class has {100 * max(n) / sum(n):.0f} % of the examples"
    lines.append(f"chance is {100 / len(n):.0f} %, {largest}")
    if low <= 100 / len(n):
        lines.append("not clearly better than chance: give more examples, or a backbone trained on images like these")
    tested = sorted((right / n, f"{name} {right} of {n}") for name, (n, right) in tested_classes(classifier).items())
    if tested:
        lines.append(f"right by class, the worst first: {first_of([text for _, text in tested])}")
    if untested := [name for name, own in zip(names, n, strict=True) if own == 1]:
        lines.append(f"not tested, with one example: {', '.join(untested)}")
    return [*lines, f"temperature {confidence.temperature:.2f}, which calibrates the probabilities"]


def fitted_lines(fitted: Fitted) -> list[str]:
    """What a classifier is, and what is known of it."""
    facts = fitted.facts
    aligned = facts["alignment"] != "none" and "base" in facts
    alignment = f"{facts['alignment']} alignment with {facts['base']}" if aligned else "no alignment"
    return [f"{facts['method']} head on {facts['backbone']}, {alignment}", *confidence_lines(fitted.classifier)]


def prediction_record(predictions: Predictions) -> dict[str, Any]:
    """The part of the result file that says what was found."""
    n_right, n_query = predictions.n_right, len(predictions.files)
    return {
        **predictions.fitted.facts,
        "n_query": n_query,
        "accuracy": None if n_right is None else round(100 * n_right / n_query, 3),
        "confidence": confidence_record(predictions.fitted.classifier),
        "n_unsure": predictions.sure.count(False),
        "n_unlike": predictions.unlike.count(True),
        "classes": per_class_summary(predictions),
        "least_sure": least_sure(predictions),
        "related_base_classes": predictions.fitted.related,
        "notes": predictions.notes,
    }


def accuracy_lines(predictions: Predictions) -> list[str]:
    """The accuracy where every query lies in a class's folder, or how many do."""
    n, n_known, n_right = len(predictions.files), sum(c is not None for c in predictions.truth), predictions.n_right
    if n_right is not None:
        return [f"accuracy {100 * n_right / n:.2f} % ({n_right} of {n}): every image lies in a folder named as a class"]
    return [f"no accuracy: only {n_known} of {n} images lie in a folder named as a class"] if n_known else []


def summary_lines(predictions: Predictions) -> list[str]:
    """How many images got each label and how surely, which to look at first, and the accuracy where it is known."""
    n, names = len(predictions.files), predictions.class_names
    lines = [f"{n} images labelled from {sum(predictions.n_support)} examples of {len(names)} classes"]
    if predictions.fitted.related:
        changed = (predictions.answers.probabilities.argmax(1) != predictions.answers.finetuned.argmax(1)).sum().item()
        lines.append(f"alignment changed {changed} of {n} labels")
    width = max(len(name) for name in ["label", *names])
    lines.append(f"  {'label':{width}}  examples  images  mean probability")
    for name, row in per_class_summary(predictions).items():
        confidence = "" if row["mean_confidence"] is None else f"{row['mean_confidence']:.2f}"
        lines.append(f"  {name:{width}}  {row['n_support']:8d}  {row['n_query']:6d}  {confidence:>16}".rstrip())
    if n_unsure := predictions.sure.count(False):
        lines.append(f"  {UNSURE}: {n_unsure} images, of a probability below {predictions.reject:g}")
    if any(predictions.unlike):
        lines.append(f"images unlike every class: {predictions.unlike.count(True)}, marked in the table")
    lines.append("least sure")
    for row in least_sure(predictions):
        best, then = (f"{row[a]} {row[b]:.2f}" for a, b in (("label", "probability"), ("then", "probability_then")))
        lines.append(f"  {row['file']}: {best}, then {then}")
    return lines + accuracy_lines(predictions)
