"""A classifier in one file: tensors and plain values only, written atomically, read without running anything of it.

The file holds the weights of the backbone as well, so it labels images anywhere: it needs no example, no base set and
no checkpoint. Of what the user gave it holds the names of classes and examples, and features of these, but no image.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.files import Schema, misfit, read_record, save_atomically, weights_digest
from engine.normalisation import Normalisation
from engine.records import to_json
from models import build_head
from models.backbone import Backbone
from models.heads import Head
from persistence.checkpoints import create_backbone, load_state
from photos.classifier import Classifier
from photos.confidence import Confidence

FORMAT = "associative-alignment/classifier/1"
REMEDY = "make one with predict.py --save"
# What a file must hold; that it goes together is checked as it is taken over.
HEAD: Schema = {"method": str, "s": float, "m": float, "state": dict[str, Tensor]}
CLASSIFIER: Schema = {
    **{
        "facts": dict[str, str | float | bool | None | list[str | float | bool]],
        "class_names": list[str],
        "examples": list[str],
        "normalisation": list[list[float]],
    },
    **{"backbone_digest": str, "backbone_state": dict[str, Tensor], "aligned_state": dict[str, Tensor]},
    **{"finetuned": HEAD, "head": HEAD, "z_support": Tensor, "y_support": Tensor},
    **{"confidence": dict[str, float] | None, "least_cosine": float},
}
FACTS: Schema = {"backbone": str, "img_size": int, "alignment": str, "method": str}
CUSTOM = "custom:"  # a backbone of a user's own code, which a file must not have run


def head_record(head: Head) -> dict[str, Any]:
    """A head as plain values: its name, state and scalars, of which scale and margin are 1 and 0 where it has none."""
    state = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    scalars = {name: getattr(head, name) for name in head.scalars}
    return {"method": type(head).__name__, "s": 1.0, "m": 0.0, "state": state} | scalars


def moved(before: Backbone, after: Backbone) -> dict[str, Tensor]:
    """What alignment changed of the weights and statistics of a backbone."""
    if before is after:
        return {}
    old = before.state_dict()
    return {name: value.cpu() for name, value in after.state_dict().items() if not torch.equal(value, old[name])}


def save_classifier(path: Path, classifier: Classifier, facts: dict[str, Any]) -> None:
    """Write a classifier; facts: plain values, of which `backbone` and `img_size` say how to build the backbone.

    Raises UserError when the file cannot be written.
    """
    backbone, confidence = classifier.backbone, classifier.confidence
    content = {
        "format": FORMAT,
        "facts": to_json(facts),
        "backbone_digest": weights_digest(backbone),
        "backbone_state": {name: value.cpu().contiguous() for name, value in backbone.state_dict().items()},
        "aligned_state": moved(backbone, classifier.aligned),
        "normalisation": [list(part) for part in backbone.normalisation],
        "finetuned": head_record(classifier.finetuned),
        "head": head_record(classifier.head),
        "class_names": list(classifier.class_names),
        "z_support": classifier.z_support,
        "y_support": classifier.y_support,
        "examples": list(classifier.examples),
        "confidence": asdict(confidence) if confidence else None,
        "least_cosine": classifier.least_cosine,
    }
    save_atomically(path, content)


def load_head(record: dict[str, Any], d: int, n_way: int, path: Path) -> Head:
    """A head of a head_record, for d features and n_way classes."""
    head = build_head(record["method"], d, n_way, float(record["s"]), float(record["m"]))
    for name in head.scalars:
        setattr(head, name, float(record[name]))
    load_state(head, record["state"], path)
    if not all(value.isfinite().all() for value in head.state_dict().values()):
        raise ValueError("its head holds numbers that are not finite")
    return head.requires_grad_(False)


def load_networks(content: dict[str, Any], path: Path, asked: str | None) -> tuple[Backbone, Backbone]:
    """The backbone before and after alignment. Raises UserError when it is of a user's own code that nobody named."""
    facts = content["facts"]
    name = str(facts["backbone"])
    if name.startswith(CUSTOM) and name != asked:
        raise UserError(
            f"classifier {path} is of {name}, code that would be run: give --backbone {name} if you trust it"
        )
    if asked not in (None, name):
        raise UserError(f"classifier {path} has backbone {name}, not {asked}: leave out --backbone")
    backbone = create_backbone(name, int(facts["img_size"]), seed=0)
    load_state(backbone, content["backbone_state"], path)
    if weights_digest(backbone) != content["backbone_digest"]:
        raise ValueError("the weights of its backbone are not those that it was saved with")
    backbone.normalisation = Normalisation.of(*content["normalisation"])
    if not content["aligned_state"]:
        return backbone, backbone
    aligned = create_backbone(name, int(facts["img_size"]), seed=0)
    load_state(aligned, content["backbone_state"] | content["aligned_state"], path)
    aligned.normalisation = backbone.normalisation
    return backbone, aligned


def checked_names(content: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The names of classes and examples. Raises ValueError when they are no text or not as many as they should be."""
    names, examples = content["class_names"], content["examples"]
    if not all(isinstance(name, str) for name in (*names, *examples)) or len(set(names)) < max(2, len(names)):
        raise ValueError("its class names are not 2 or more different texts")
    y, z = content["y_support"], content["z_support"]
    if not (len(examples) == len(y) == len(z) and z.dim() == 2 and z.isfinite().all()):
        raise ValueError("its examples are not as many as their features")
    if y.dtype != torch.long or not 0 <= int(y.min()) <= int(y.max()) < len(names):
        raise ValueError("its labels are not those of its classes")
    return list(names), list(examples)


def load_classifier(path: Path, backbone: str | None = None) -> tuple[Classifier, dict[str, Any]]:
    """The classifier of a file and its facts. Raises UserError when there is none or it is damaged.

    backbone: the name of the backbone that is asked for, if any; one of a user's own code must be.
    """
    if not path.is_file():
        raise UserError(f"no classifier {path}: make one with 'python predict.py --support FOLDER ... --save {path}'")
    content = read_record(path, FORMAT, CLASSIFIER, "classifier", REMEDY)
    if content.get("adapter"):
        raise UserError(f"classifier {path} has an adapter of an earlier version, which this one cannot read: {REMEDY}")
    try:
        if wrong := misfit(content["facts"], FACTS):
            raise ValueError(wrong)
        names, examples = checked_names(content)
        before, aligned = load_networks(content, path, backbone)
        z, d = content["z_support"], before.feature_dim
        if z.shape[1] != d:
            raise ValueError(f"its examples have {z.shape[1]} features, its backbone {d}")
        confidence = Confidence(**content["confidence"]) if content["confidence"] else None
        if confidence and not (0 <= confidence.n_right <= confidence.n and 0 < confidence.temperature < 1e6):
            raise ValueError("its confidence is out of range")
        classifier = Classifier(
            backbone=before.eval(),
            aligned=aligned.eval(),
            finetuned=load_head(content["finetuned"], d, len(names), path),
            head=load_head(content["head"], d, len(names), path),
            class_names=names,
            z_support=z,
            y_support=content["y_support"],
            examples=examples,
            confidence=confidence,
            least_cosine=float(content["least_cosine"]),
        )
        return classifier, dict(content["facts"])
    except UserError:
        raise
    except Exception as error:  # a damaged file may hold anything
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is not a classifier of this project, or is damaged ({reason}): {REMEDY}") from error
