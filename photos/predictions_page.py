"""The page of predictions: what is known of the classifier, its classes, and every image with its label to correct."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from data.decode import Reading, open_rgb
from engine.files import write_text
from engine.run import Run
from photos.images import list_support
from photos.table import Predictions, accuracy_lines, confidence_lines, per_class_summary, review_lines, to_review
from reporting.html import html_page

SIDE = 160  # pixels, the longer side of an image in the page
QUALITY = 75
MAX_EXAMPLES = 10  # support images shown per class, besides those that are nearest to an image
MAX_EMBEDDED = 5000  # images in the page itself, about 9 kB each; it shows the files of those beyond


def thumbnail(path: Path, reading: Reading) -> str:
    """A whole image, reduced, as the source of an element. Raises UserError when the file cannot be read."""
    buffer, image = io.BytesIO(), open_rgb(path, reading)
    width, height = (max(1, round(SIDE * side / max(image.size))) for side in image.size)
    image.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "webp", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def table_of(titles: list[str], rows: str, kind: str) -> str:
    """A table of rows of HTML, which scrolls where it is too wide."""
    head = "".join(f'<th scope="col">{title}' for title in titles)
    body = f"<thead><tr>{head}<tbody>{rows}"
    return f'<div class="wide" tabindex="0"><table class="results {kind}">{body}</table></div>'


def review_table(predictions: Predictions, files: dict[str, Path]) -> str:
    """The examples to review, with their pictures where their files are known, as a table."""
    classifier, reading = predictions.fitted.classifier, predictions.fitted.view.reading
    rows, lines = "", review_lines(classifier)
    for name, own, other, row in to_review(classifier):
        picture = f'<img src="{thumbnail(files[name], reading)}" alt="{escape(name)}">' if files else ""
        cells = (f'<div class="shots">{picture}</div>{escape(name)}', escape(own), escape(other), f"{max(row):.2f}")
        rows += f"<tr>{''.join(f'<td>{cell}' for cell in cells)}"
    titles = ["example", "its class", "left out, it is labelled", "probability"]
    return f'<p class="note">{lines[0]}</p>{table_of(titles, rows, "review classes") if rows else ""}'


def class_table(predictions: Predictions, files: dict[str, Path]) -> str:
    """For each class its examples, with their pictures where their files are known, and what got its label."""
    classifier, reading = predictions.fitted.classifier, predictions.fitted.view.reading
    nearest, shown = set(predictions.answers.nearest.tolist()), dict.fromkeys(classifier.class_names, "")
    for i, (example, label) in enumerate(zip(classifier.examples, classifier.y_support.tolist(), strict=True)):
        name = classifier.class_names[label]
        if files and (shown[name].count("<img") < MAX_EXAMPLES or i in nearest):
            picture, alt = thumbnail(files[example], reading), escape(f"example of {name}")
            shown[name] += f'<img id="example{i}" src="{picture}" alt="{alt}">'
    rows = ""
    for name, row in per_class_summary(predictions).items():
        mean = "" if row["mean_confidence"] is None else f"{row['mean_confidence']:.2f}"
        related = ", ".join(predictions.fitted.related.get(name, []))
        examples = f'{row["n_support"]}<div class="shots">{shown[name]}</div>'
        cells = (examples, row["n_query"], mean, *([escape(related)] if predictions.fitted.related else []))
        rows += f'<tr><th scope="row">{escape(name)}{"".join(f"<td>{cell}" for cell in cells)}'
    titles = ["label", "examples", "images", "mean probability", "related base classes"][: 1 + len(cells)]
    return table_of(titles, rows, "classes")


def marks_of(predictions: Predictions) -> list[list[str]]:
    """For each image why to look at it: it is unsure, unlike every class, or in the folder of another class."""
    p, found = predictions, []
    for sure, unlike, truth, best in zip(p.sure, p.unlike, p.truth, p.best, strict=True):
        folder = f"in a folder {p.class_names[truth or 0]}"
        marks = {"unsure": not sure, "unlike every class": unlike, folder: truth not in (None, best)}
        found.append([mark for mark, holds in marks.items() if holds])
    return found


def page_data(predictions: Predictions, pictures: list[str]) -> dict[str, Any]:
    """What the page shows of the images, in the order of the predictions. pictures: sources of their elements; the
    browser lays those that are files on the background."""
    p, answers, classifier = predictions, predictions.answers, predictions.fitted.classifier
    after, before = (each.double().round(decimals=6).tolist() for each in (answers.probabilities, answers.finetuned))
    columns = {
        "file": p.files,
        "label": p.labels,
        "probabilities": after,
        "marks": marks_of(p),
        "nearest": answers.nearest.tolist(),
        "picture": pictures,
    }
    columns |= {"before": before} if before != after else {}
    images = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    background = p.fitted.view.reading.background
    return {"classes": p.class_names, "examples": classifier.examples, "background": background, "images": images}


def write_predictions(path: Path, predictions: Predictions, support: Path | None, num_workers: int, run: Run) -> None:
    """Write the page of predictions, with the examples of a support folder, if there is one.

    Raises UserError when it cannot be written or an image is gone.
    """
    paths, classifier = predictions.paths, predictions.fitted.classifier
    reading = predictions.fitted.view.of_folder(paths, num_workers).reading
    files = dict(zip(classifier.examples, list_support(support)[1], strict=True)) if support else {}
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        made = pool.map(partial(thumbnail, reading=reading), paths[:MAX_EMBEDDED])
        pictures = list(run.bar(made, "page", "img", total=min(len(paths), MAX_EMBEDDED)))
    pictures += [each.resolve().as_uri() for each in paths[MAX_EMBEDDED:]]
    facts = [*confidence_lines(classifier), *accuracy_lines(predictions), *predictions.notes]
    lines = "".join(f"<li>{escape(line)}" for line in facts)
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    images = template.replace("$data", json.dumps(page_data(predictions, pictures)).replace("<", "\\u003c"))
    lead = f"{len(paths)} images, labelled from {sum(predictions.n_support)} examples"
    sections = {"Classes": f'<ul class="facts">{lines}</ul>{class_table(predictions, files)}'}
    sections |= {"Examples to review": review_table(predictions, files)} if predictions.review else {}
    write_text(path, html_page("Predictions", lead, sections | {"Images": images}))
