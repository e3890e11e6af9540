"""The four meta-learners of stage 2 by their published names.

Each is an nn.Module `learner(support, query) -> scores` with `learner.loss(scores, y_query)`. It works on the
backbone's maps, `backbone.feature_map(x)`, where `learner.uses_maps`, and on its features otherwise.
"""

from typing import Protocol

from methods.matchingnet import MatchingNet
from methods.protonet import ProtoNet
from methods.relationnet import RelationNet

META_LEARNERS = ("ProtoNet", "MatchingNet", "RelationNet", "RelationNet_softmax")
MetaLearner = ProtoNet | MatchingNet | RelationNet


class HasShapes(Protocol):
    """What is asked of a backbone here."""

    feature_dim: int
    map_shape: tuple[int, int, int]


def build_meta_learner(method: str, backbone: HasShapes) -> MetaLearner:
    """A fresh meta-learner for the features, or the maps, of a backbone. Raises ValueError if unknown."""
    if method == "ProtoNet":
        return ProtoNet()
    if method == "MatchingNet":
        return MatchingNet(backbone.feature_dim)
    if method == "RelationNet":
        return RelationNet(backbone.map_shape, "mse")
    if method == "RelationNet_softmax":
        return RelationNet(backbone.map_shape, "softmax")
    raise ValueError(f"unknown meta-learner {method!r}: choose one of {', '.join(META_LEARNERS)}")
