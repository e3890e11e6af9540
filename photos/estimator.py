"""A classifier in the manner of scikit-learn, whose clone and cross_val_score take it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from engine.distributed import ALONE
from engine.errors import UserError
from engine.run import Run, start_run
from photos.classifier import Fitted
from photos.classifier_file import load_classifier, save_classifier
from photos.fitting import Examples, FitFlags, fit_examples
from photos.labelling import label_images

E = TypeVar("E", bound="Estimator")


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
        images, (flags, run) = list(images), self.read_flags()
        if len(images) != len(labels):
            raise UserError(f"{len(images)} images and {len(labels)} labels: give as many of each")
        classes, y = np.unique(np.asarray(labels), return_inverse=True)
        if len(classes) < 2:
            raise UserError(f"the labels are of {len(classes)} class: give images of 2 or more")
        names = [str(image) if isinstance(image, str | Path) else f"{i}" for i, image in enumerate(images)]
        examples = Examples([str(c) for c in classes], images, names, y.tolist())
        return self._take(fit_examples(examples, [], flags, run), classes, run)

    def predict_proba(self, images: Sequence[Any]) -> np.ndarray:
        """The probability of each of classes_ for each image, calibrated where that is known: (n, n_way)."""
        self.check_is_fitted()
        answers = label_images(self.fitted_, list(images), num_workers=4, skip_bad=False, run=self.run_)[2]
        return answers.probabilities.numpy()

    def predict(self, images: Sequence[Any]) -> np.ndarray:
        """The most probable of classes_ for each image: (n,)."""
        best = self.predict_proba(images).argmax(1)
        return self.classes_[best]

    def score(self, images: Sequence[Any], labels: Sequence[Any]) -> float:
        """The share of the images that get their label."""
        return float((self.predict(images) == np.asarray(labels)).mean())

    def save(self, path: str | Path) -> None:
        """Keep the fitted classifier in a file, which predict.py --classifier takes too."""
        self.check_is_fitted()
        save_classifier(Path(path), self.fitted_, self.classes_.tolist())

    @classmethod
    def load(cls: type[E], path: str | Path, backbone: str | None = None, device: str = "auto") -> E:
        """The classifier of a file; the backbone is to be named if it is of a user's own code, which is then run."""
        run = start_run(ALONE, device, "fp32", seed=0, quiet=True, no_keep_memory=False)
        fitted = load_classifier(Path(path), backbone, run.device)
        labels = fitted.facts.get("labels", fitted.classifier.class_names)
        return cls(backbone, device=device)._take(fitted, np.asarray(labels), run)

    def _take(self: E, fitted: Fitted, classes: np.ndarray, run: Run) -> E:
        self.fitted_, self.classes_, self.confidence_, self.run_ = fitted, classes, fitted.classifier.confidence, run
        return self
