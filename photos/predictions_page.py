"""The page of predictions: every query image with its label and probabilities, and the support images."""

from functools import partial
from pathlib import Path

from PIL import Image, ImageOps

from data.decode import open_rgb
from persistence.saved_episode import MAX_SIDE
from photos.images import list_support
from photos.predictions import Predictions
from reporting.page import html_page, write_page
from reporting.page_episodes import EpisodeView, Picture, Query, Related, episode_section, picture

MAX_EXAMPLES = 10  # support images shown per class, besides those that are nearest to a query


def thumbnail(path: Path, alt: str) -> Picture:
    """An image file, upright and small."""
    return picture(ImageOps.contain(open_rgb(path), (MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC), alt)


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
            partial(thumbnail, path, predictions.files[i]),
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
        support=[
            [thumbnail(path, f"example of {name}") for path in row] for name, row in zip(names, shown, strict=True)
        ],
        related=[[Related(name) for name in predictions.related.get(name, [])] for name in names],
        queries=queries,
        aligned=bool(predictions.related),
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
            {"Images": episode_section(view, "p", is_open=True)},
        ),
    )
