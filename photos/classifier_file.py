"""A classifier in one file: tensors and plain values only, written atomically, read without running anything of it.

The file holds the weights of the backbone as well, so it labels images anywhere: it needs no example, no base set and
no checkpoint. Of what the user gave it holds the names of classes and examples, and features of these, but no image.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError, one_line
from engine.files import Schema, cpu_state, read_record, save_atomically, weights_digest
from engine.normalisation import Normalisation
from engine.records import to_json
from engine.resizing import PUBLISHED
from methods.adversarial_alignment import CriticSetting
from methods.alignment import AlignmentSetting
from methods.novel_finetune import HeadFit
from methods.related_base import RelatedSetting
from models import build_head
from models.backbone import Backbone
from models.heads import Head
from persistence.checkpoints import create_backbone, load_state
from photos.classifier import Classifier, Fitted
from photos.confidence import Confidence

FORMAT = "associative-alignment/classifier/1"
REMEDY = "make one with python predict.py --support FOLDER ... --save FILE"
FACTS: Schema = {"backbone": str, "img_size": int, "alignment": str, "method": str}
HEAD: Schema = {"method": str, "s": float, "m": float, "state": dict[str, Tensor]}
CLASSIFIER: Schema = {
    "facts": FACTS,
    "class_names": list[str],
    "examples": list[str],
    "normalisation": list[list[float]],
    "backbone_state": dict[str, Tensor],
    "aligned_state": dict[str, Tensor],
    "finetuned": HEAD,
    "head": HEAD,
    "z_support": Tensor,
    "y_support": Tensor,
    "confidence": dict[str, object] | None,
    "least_cosine": float,
}
CUSTOM = "custom:"  # a backbone of a user's own code, which a file must not have run


def head_record(head: Head) -> dict[str, Any]:
    """A head as plain values: its name, state and scalars, of which scale and margin are 1 and 0 where it has none."""
    scalars = {name: getattr(head, name) for name in head.scalars}
    return {"method": type(head).__name__, "s": 1.0, "m": 0.0, "state": cpu_state(head.state_dict())} | scalars


def save_classifier(path: Path, fitted: Fitted, labels: list[Any] | None = None) -> None:
    """Write a classifier. labels: what its classes are called in Python, if not by their names.

    Raises UserError when the file cannot be written.
    """
    classifier = fitted.classifier
    before, aligned = (cpu_state(net.state_dict()) for net in (classifier.backbone, classifier.aligned))
    content = {
        "format": FORMAT,
        "facts": to_json(fitted.facts | ({"labels": labels} if labels else {})),
        "backbone_digest": weights_digest(classifier.backbone),
        "backbone_state": before,
        "aligned_state": {name: v for name, v in aligned.items() if not torch.equal(v, before[name])},
        "normalisation": [list(part) for part in classifier.backbone.normalisation],
        "finetuned": head_record(classifier.finetuned),
        "head": head_record(classifier.head),
        "class_names": list(classifier.class_names),
        "z_support": classifier.z_support,
        "y_support": classifier.y_support,
        "examples": list(classifier.examples),
        "confidence": asdict(classifier.confidence) if classifier.confidence else None,
        "least_cosine": classifier.least_cosine,
    }
    save_atomically(path, content)


def load_head(record: dict[str, Any], d: int, n_way: int, path: Path) -> Head:
    """The head of a head_record, for d features and n_way classes."""
    head = build_head(record["method"], d, n_way, float(record["s"]), float(record["m"]))
    for name in head.scalars:
        setattr(head, name, float(record.get(name, getattr(head, name))))  # older files lack those of a custom head
    load_state(head, record["state"], path)
    return head.requires_grad_(False)


def setting_of(record: dict[str, Any]) -> AlignmentSetting:
    """The setting of which a file holds the fields. Raises UserError when they are of another version."""
    parts = {"fit": HeadFit, "related": RelatedSetting, "critic": CriticSetting}
    try:
        return AlignmentSetting(**record | {name: part(**record[name]) for name, part in parts.items()})
    except (TypeError, KeyError) as error:
        raise UserError(f"the classifier was fitted by another version ({error}): {REMEDY}") from error


def load_networks(content: dict[str, Any], path: Path, asked: str | None) -> tuple[Backbone, Backbone]:
    """The backbone before and after alignment. Raises UserError when it is of a user's own code that nobody named."""
    name, img_size = content["facts"]["backbone"], content["facts"]["img_size"]
    if name.startswith(CUSTOM) and name != asked:
        raise UserError(
            f"classifier {path} is of {name}, code that would be run: give --backbone {name} if you trust it"
        )
    if asked not in (None, name):
        raise UserError(f"classifier {path} has backbone {name}, not {asked}: leave out --backbone")

    def network(state: dict[str, Tensor]) -> Backbone:
        backbone = create_backbone(name, img_size, seed=0)
        load_state(backbone, state, path)
        backbone.normalisation = Normalisation.of(*content["normalisation"])
        backbone.eval_resize = content["facts"].get("eval_resize", PUBLISHED)  # which older files lack
        return backbone.eval()

    before, moved = network(content["backbone_state"]), content["aligned_state"]
    return before, network(content["backbone_state"] | moved) if moved else before


def load_confidence(record: dict[str, Any]) -> Confidence:
    """The confidence of a record; older files have it of all classes together."""
    tested, right = (record.get(name, [record.get(older)]) for name, older in (("tested", "n"), ("right", "n_right")))
    counts = list(map(int, tested)), list(map(int, right)), record["n_folds"]
    return Confidence(*counts, record["temperature"], record.get("wrong", []))


def load_classifier(path: Path, backbone: str | None, device: torch.device) -> Fitted:
    """The classifier of a file, on a device. Raises UserError when there is none or it is damaged.

    backbone: the name of the backbone that is asked for, if any; one of a user's own code must be.
    """
    content = read_record(path, FORMAT, CLASSIFIER, "classifier", REMEDY)
    try:
        if content.get("adapter"):
            raise ValueError("it was aligned with a feature adapter, which an earlier version had")
        before, aligned = load_networks(content, path, backbone)
        d, names, confidence = before.feature_dim, content["class_names"], content["confidence"]
        classifier = Classifier(
            backbone=before,
            aligned=aligned,
            finetuned=load_head(content["finetuned"], d, len(names), path),
            head=load_head(content["head"], d, len(names), path),
            class_names=names,
            z_support=content["z_support"],
            y_support=content["y_support"],
            examples=content["examples"],
            confidence=load_confidence(confidence) if confidence else None,
            least_cosine=content["least_cosine"],
        )
    except UserError:
        raise
    except Exception as error:  # a damaged file may hold anything
        reason = one_line(error, 120)
        raise UserError(f"{path} is not a classifier of this project, or is damaged ({reason}): {REMEDY}") from error
    return Fitted(classifier.to(device), content["facts"])
