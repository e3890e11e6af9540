"""The four meta-learners of stage 2 by their published names; a new one is one class and one entry."""

from typing import Any

from methods.matchingnet import MatchingNet
from methods.meta_learner import MetaLearner
from methods.protonet import ProtoNet
from methods.relationnet import RelationNet
from models.backbone import Backbone

META_LEARNERS: dict[str, tuple[type[MetaLearner], dict[str, Any]]] = {
    "ProtoNet": (ProtoNet, {}),
    "MatchingNet": (MatchingNet, {}),
    "RelationNet": (RelationNet, {"kind": "mse"}),
    "RelationNet_softmax": (RelationNet, {"kind": "softmax"}),
}


def build_meta_learner(method: str, backbone: Backbone, temperature: float = 1.0) -> MetaLearner:
    """A new meta-learner for the features, or the maps, of a backbone."""
    cls, options = META_LEARNERS[method]
    learner = cls(backbone.feature_dim, backbone.map_shape, **options)
    learner.temperature = temperature
    return learner
