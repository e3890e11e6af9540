"""The page of predictions: every query image with its label and probabilities, and the support images."""

from pathlib import Path

from photos.images import list_support
from photos.table import Predictions
from reporting.page import html_page, write_page
from reporting.page_episodes import EpisodeView, Query, episode_section

MAX_EXAMPLES = 10  # support images shown per class, besides those that are nearest to a query


def prediction_view(predictions: Predictions, support: Path | None) -> EpisodeView:
    """Predictions as an episode, with the examples of the support folder, if there is one, that queries are near to."""
    names, paths, labels = list_support(support) if support else (predictions.class_names, [], [])
    shown: list[list[int]] = [[] for _ in names]
    indices = predictions.answers.nearest.tolist()
    nearest = set(indices)
    for i, label in enumerate(labels):
        if len(shown[label]) < MAX_EXAMPLES or i in nearest:
            shown[label].append(i)
    place = {i: n for n, i in enumerate(i for row in shown for i in row)}
    before, after = predictions.answers.finetuned.tolist(), predictions.answers.probabilities.tolist()
    columns = zip(predictions.files, predictions.paths, predictions.truth, before, after, strict=True)
    near = ([place[i]] if i in place else [] for i in indices)
    return EpisodeView(
        title=f"{len(after)} images, labelled from {sum(predictions.n_support)} examples",
        class_names=names,
        support=[[paths[i] for i in row] for row in shown],
        related=[[{"name": related} for related in predictions.fitted.related.get(name, [])] for name in names],
        queries=[Query(*column, nearest) for column, nearest in zip(columns, near, strict=True)],
    )


def write_predictions(path: Path, predictions: Predictions, support: Path | None) -> None:
    """Write the page of predictions, with the examples of a support folder, if there is one.

    Raises UserError when it cannot be written or an image is gone.
    """
    lead = f"labelled from the examples in {support.resolve().name}" if support else "labelled by a kept classifier"
    section = episode_section(prediction_view(predictions, support), is_open=True)
    write_page(path, html_page("Predictions", lead, {"Images": section}))
