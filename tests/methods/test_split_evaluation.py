"""Class by class, the same scores as with the whole split in memory."""

import pytest
import torch

from data.episodes import EpisodeShape, sample_episodes
from engine.run import Run
from methods import split_evaluation
from methods.meta_learners import META_LEARNERS, build_meta_learner
from methods.split_evaluation import evaluate_on_split
from models import build_backbone
from tests.helpers import DEVICE, make_split

SPLIT = make_split((14,) * 5)
EPISODES = sample_episodes(SPLIT, EpisodeShape(3, 4, 8), 9, 0)
RUN = Run(device=DEVICE)


def model(method):
    torch.manual_seed(0)
    backbone = build_backbone("Conv4", 16, "Relation" in method).to(memory_format=torch.channels_last)
    learner = build_meta_learner(method, backbone)
    for norm in (module for module in learner.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.running_var.fill_(0.1)
    return learner.to(DEVICE), backbone.to(DEVICE)


@pytest.mark.device
@pytest.mark.parametrize("chunk", [1, 2**23])
@pytest.mark.parametrize("method", META_LEARNERS)
def test_the_scores_of_a_split_that_is_too_large_are_those_of_one_that_is_kept(method, chunk, monkeypatch):
    learner, backbone = model(method)
    kept = evaluate_on_split(learner, backbone, SPLIT, EPISODES, RUN)
    monkeypatch.setattr(split_evaluation, "MAPPED", 0)
    monkeypatch.setattr(split_evaluation, "EVALUATED_ELEMENTS", chunk)
    monkeypatch.setattr(split_evaluation, "INPUT_ROWS", 7)
    found = evaluate_on_split(learner, backbone, SPLIT, EPISODES, RUN)
    assert kept.counts.sum() == 9 * 3 * 8 and kept.counts.sum((0, 1)).min() > 0
    assert torch.equal(found.counts, kept.counts)


def test_only_a_learner_that_takes_means_goes_class_by_class(monkeypatch):
    monkeypatch.setattr(split_evaluation, "MAPPED", 0)
    by_class = []
    monkeypatch.setattr(split_evaluation, "evaluate_class_by_class", lambda learner, *_: by_class.append(learner))
    for method in META_LEARNERS:
        evaluate_on_split(*model(method), SPLIT, EPISODES, RUN)
    assert {learner.kind for learner in by_class} == {"mse", "softmax"} and len(by_class) == 2
