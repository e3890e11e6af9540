"""A classifier in the manner of scikit-learn, whose clone and cross_val_score take it."""

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from engine.distributed import ALONE
from engine.errors import UserError
from engine.run import Run, start_run
from photos.classifier import Fitted
from photos.classifier_file import load_classifier, save_classifier
from photos.fitting import Examples, FitFlags, fit_examples
from photos.growing import grow
from photos.labelling import label_images
from photos.table import fitted_lines

E = TypeVar("E", bound="Estimator")


@contextlib.contextmanager
def naming_arguments() -> Iterator[None]:
    """A block whose UserErrors name arguments of Python, and not the flags of predict.py."""
    try:
        yield
    except UserError as error:
        text = re.sub(r" \([^()]* --help explains the flags\)$", "", str(error))
        raise UserError(re.sub(r"--(?=\w)", "", text)) from error


def labelled_images(images: Sequence[Any], labels: Sequence[Any], first: int = 0) -> tuple[Examples, np.ndarray]:
    """Images and their labels as examples, and the labels that differ, in order. first: number of the first example.

    Raises UserError when there are not as many of each.
    """
    images = list(images)
    if len(images) != len(labels):
        raise UserError(f"{len(images)} images and {len(labels)} labels: give as many of each")
    classes, y = np.unique(np.asarray(labels), return_inverse=True)
    names = [str(image) if isinstance(image, str | Path) else f"{i}" for i, image in enumerate(images, first)]
    return Examples([str(c) for c in classes], images, names, y.tolist()), classes


class Estimator(ABC):
    """FewShotClassifier without the meaning of its flags, which predict.py knows.

    After fit: classes_, the labels in order, and confidence_, what is known of the accuracy, or None.
    """

    def __init__(self, backbone: str | Path | None = None, base: str | Path | None = None, **flags: Any):
        self.backbone, self.base, self.flags = backbone, base, flags

    @abstractmethod
    def read_flags(self) -> tuple[FitFlags, Run]:
        """What the flags ask for. Raises UserError when one is wrong."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """What it was made with, by name."""
        return {"backbone": self.backbone, "base": self.base, **self.flags}

    def set_params(self: E, **params: Any) -> E:
        """Change some of what it was made with."""
        self.backbone, self.base = params.pop("backbone", self.backbone), params.pop("base", self.base)
        self.flags = self.flags | params
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, Tags, TargetTags  # only scikit-learn calls this

        return Tags("classifier", TargetTags(required=True), classifier_tags=ClassifierTags())

    def check_is_fitted(self) -> None:
        """Raise UserError when it is not fitted."""
        if not hasattr(self, "fitted_"):
            raise UserError("this classifier is not fitted: call fit, or load a saved one")

    def fit(self: E, images: Sequence[Any], labels: Sequence[Any]) -> E:
        """Fit to images and their labels, two or more different ones."""
        with naming_arguments():
            flags, run = self.read_flags()
            examples, classes = labelled_images(images, labels)
            if len(classes) < 2:
                raise UserError(f"the labels are of {len(classes)} class: give images of 2 or more")
            return self._take(fit_examples(examples, [], flags, run), classes, run)

    def partial_fit(self: E, images: Sequence[Any], labels: Sequence[Any]) -> E:
        """Fit again, to the features of all examples so far and to more images, of its classes or of new ones.

        An example that is one of the images takes its new label.
        """
        self.check_is_fitted()
        with naming_arguments():
            examples, classes = labelled_images(images, labels, first=len(self.fitted_.classifier.examples))
            fitted = grow(self.fitted_, examples, self.read_flags()[0], self.run_)
            labels_by_name = {str(c): c for c in [*classes.tolist(), *self.classes_.tolist()]}
            ordered = [labels_by_name[name] for name in fitted.classifier.class_names]
            return self._take(fitted, np.asarray(ordered), self.run_)

    def predict_proba(self, images: Any) -> np.ndarray:
        """The probability of each of classes_, calibrated where that is known: of one image (n_way,), a path, an image
        of PIL or an array (h, w, 3); of a list of images, or an array (n, h, w, 3), (n, n_way)."""
        self.check_is_fitted()
        one = isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim in (2, 3))
        with naming_arguments():
            listed = [images] if one else list(images)
            answers = label_images(self.fitted_, listed, num_workers=4, skip_bad=False, run=self.run_)[2]
        return answers.probabilities.numpy()[0 if one else slice(None)]

    def predict(self, images: Any) -> Any:
        """The most probable of classes_ for one image, or for each of a list: (n,); see predict_proba."""
        best = self.predict_proba(images).argmax(-1)
        return self.classes_[best]

    def score(self, images: Sequence[Any], labels: Sequence[Any]) -> float:
        """The share of the images that get their label."""
        return float((self.predict(images) == np.asarray(labels)).mean())

    def __repr__(self) -> str:
        params = ", ".join(f"{name}={value!r}" for name, value in self.get_params().items() if value is not None)
        lines = fitted_lines(self.fitted_) if hasattr(self, "fitted_") else ["not fitted"]
        return "\n  ".join([f"{type(self).__name__}({params})", *lines])

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Keep the fitted classifier in a file, which predict.py --classifier takes too.

        Raises UserError when there is one already, unless it is to be overwritten.
        """
        self.check_is_fitted()
        if Path(path).exists() and not overwrite:
            raise UserError(f"{path} is there already: give overwrite=True to replace it, or another path")
        save_classifier(Path(path), self.fitted_, self.classes_.tolist())

    @classmethod
    def load(cls: type[E], path: str | Path, backbone: str | None = None, device: str = "auto") -> E:
        """The classifier of a file; the backbone is to be named if it is of a user's own code, which is then run."""
        with naming_arguments():
            run = start_run(ALONE, device, "fp32", seed=0, quiet=True, no_keep_memory=False)
            fitted = load_classifier(Path(path), backbone, run.device)
        labels = fitted.facts.get("labels", fitted.classifier.class_names)
        return cls(backbone, device=device)._take(fitted, np.asarray(labels), run)

    def _take(self: E, fitted: Fitted, classes: np.ndarray, run: Run) -> E:
        self.fitted_, self.classes_, self.confidence_, self.run_ = fitted, classes, fitted.classifier.confidence, run
        return self
