"""The page of predictions: every query image with its label and probabilities, and the support images."""

from pathlib import Path

from photos.images import list_support
from photos.predictions import Predictions
from reporting.page import html_page, write_page
from reporting.page_episodes import EpisodeView, Query, episode_section

MAX_EXAMPLES = 10  # support images shown per class, besides those that are nearest to a query


def prediction_view(predictions: Predictions, support: Path | None) -> EpisodeView:
    """Predictions as an episode, with the examples of the support folder, if there is one, that queries are near to."""
    names, paths, labels = list_support(support) if support else (predictions.class_names, [], [])
    shown: list[list[Path]] = [[] for _ in names]
    nearest = {*predictions.nearest}
    for path, label in zip(paths, labels, strict=True):
        if len(shown[label]) < MAX_EXAMPLES or path in nearest:
            shown[label].append(path)
    order = {path: n for n, path in enumerate(path for row in shown for path in row)}
    probabilities, finetuned = predictions.probabilities.tolist(), predictions.finetuned.tolist()
    queries = [
        Query(
            predictions.files[i],
            path,
            predictions.truth[i],
            finetuned[i],
            probabilities[i],
            [order[predictions.nearest[i]]] if predictions.nearest[i] in order else [],
        )
        for i, path in enumerate(predictions.paths)
    ]
    return EpisodeView(
        title=f"{len(queries)} images, labelled from {sum(predictions.n_support)} examples",
        class_names=names,
        support=shown,
        related=[[{"name": related} for related in predictions.related.get(name, [])] for name in names],
        queries=queries,
    )


def write_predictions(path: Path, predictions: Predictions, support: Path | None) -> None:
    """Write the page of predictions, with the examples of a support folder, if there is one.

    Raises UserError when it cannot be written or an image is gone.
    """
    view = prediction_view(predictions, support)
    write_page(
        path,
        html_page(
            "Predictions",
            f"labelled from the examples in {support.resolve().name}" if support else "labelled by a kept classifier",
            {"Images": episode_section(view, is_open=True)},
        ),
    )
