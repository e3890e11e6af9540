"""Episodes on features, together or alone, and what is reported of them."""

import pytest
import torch

from data.episodes import Episodes, EpisodeShape, class_major_labels, sample_episodes
from engine.generators import make_generator
from engine.run import Run
from methods import evaluation
from methods.evaluation import (
    EpisodeScores,
    confusion_record,
    count_predictions,
    evaluate_heads,
    per_class_accuracy,
    share_right,
)
from methods.novel_finetune import HeadFit, fit_heads
from models import HEADS, build_head
from tests.helpers import make_split, toy_features

ALL_HEADS = pytest.mark.parametrize("method", HEADS)


# Episodes on features.


@pytest.fixture(scope="module")
def toy():
    split = make_split(counts=(10,) * 7, side=1)
    return toy_features(split), sample_episodes(split, EpisodeShape(5, 2, 4), 21, seed=3)


def evaluate(features, episodes, method="arcMax", n_steps=40, seed=0):
    return evaluate_heads(features, episodes, HeadFit(method, 5.0, 0.01, n_steps, 1e-2), Run(seed=seed))


@ALL_HEADS
def test_scores_do_not_depend_on_how_many_episodes_are_fitted_together(toy, monkeypatch, method):
    reference = evaluate(*toy, method)
    assert reference.correct.shape == (21, 5) and 0.3 < reference.accuracy.mean() < 1.0
    for chunk in (1, 4, 100):
        monkeypatch.setattr(evaluation, "HEAD_CHUNK", chunk)
        assert torch.equal(evaluate(*toy, method).correct, reference.correct)


def test_the_first_episodes_score_as_they_do_in_the_whole(toy):
    features, episodes = toy
    whole = evaluate(features, episodes, n_steps=3).correct
    part = evaluate(features, episodes.slice(0, 6), n_steps=3).correct
    assert torch.equal(part, whole[:6])
    other = evaluate(features, episodes.slice(0, 6), n_steps=3, seed=1).correct
    assert not torch.equal(other, part)  # another seed, other initial heads: three steps do not hide it


@ALL_HEADS
def test_scores_are_those_of_a_plain_loop_over_episodes(toy, method):
    features, episodes = toy
    scores = evaluate(features, episodes, method)
    for i in range(0, len(episodes), 5):
        head = build_head(method, features.shape[1], 5, 5.0, 0.01, make_generator(0, "head", i))
        fit_heads(head, features[episodes.support[i].flatten()], class_major_labels(5, 2), 40, 1e-2)
        for way in range(5):
            predicted = head(features[episodes.query[i, way]]).argmax(1)
            assert scores.correct[i, way].item() == pytest.approx((predicted == way).float().mean().item())


def test_a_querys_score_does_not_depend_on_the_other_queries(toy):
    """The queries of an episode are right together as often as they are one by one, in any order."""
    features, episodes = toy
    alone = [
        evaluate(features, Episodes(torch.cat([episodes.support, query], 2), episodes.classes, 2)).correct
        for query in episodes.query.split(1, dim=2)
    ]
    assert set(torch.cat(alone).flatten().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(evaluate(features, episodes).correct, torch.stack(alone).mean(0))


def test_separable_classes_are_all_recognised_and_unrelated_features_are_at_chance():
    split = make_split(counts=(20,) * 6, side=1)
    episodes = sample_episodes(split, EpisodeShape(5, 5, 10), 40, seed=0)
    for method in HEADS:
        assert evaluate(toy_features(split, 32, 0.01), episodes, method).accuracy.mean() == 1.0
        chance = torch.randn(120, 32, generator=torch.Generator().manual_seed(1))
        assert abs(evaluate(chance, episodes, method).accuracy.mean() - 0.2) < 0.05


# What is reported.


def test_accuracy_per_class_pools_the_episodes_that_a_class_was_part_of():
    classes = torch.tensor([[0, 2], [2, 1], [0, 2]])
    # 20 queries a class; rows are the true classes, columns the predicted ones.
    counts = torch.tensor([[[20, 0], [10, 10]], [[0, 20], [15, 5]], [[10, 10], [18, 2]]])
    scores = EpisodeScores(counts)
    episodes = Episodes(torch.zeros(3, 2, 2, dtype=torch.long), classes, 1)
    table = per_class_accuracy(scores, episodes, ["ant", "bee", "cat", "never drawn"])
    assert table == {"ant": 75.0, "bee": 25.0, "cat": 20.0}


def test_predictions_are_counted_by_true_and_predicted_class():
    scores = torch.tensor([[3.0, 1, 0], [0, 3, 1], [0, 2, 1], [0, 2, 1], [0, 0, 1], [5, 1, 0]])
    counts = count_predictions(scores, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert share_right(counts).tolist() == [0.5, 1.0, 0.5]
    assert torch.equal(count_predictions(scores.expand(4, 2, 6, 3), 3), counts.expand(4, 2, 3, 3))


def test_counts_are_summed_by_class_over_episodes():
    counts = torch.tensor([[[3, 1], [2, 2]], [[4, 0], [1, 3]]])
    classes = torch.tensor([[2, 0], [0, 3]])
    record = confusion_record(counts, Episodes(torch.zeros(2, 2, 5), classes, 1), ["ant", "bee", "cat", "dog"])
    assert record == {"ant": {"ant": 6, "cat": 2}, "cat": {"ant": 1, "cat": 3}, "dog": {"ant": 1, "dog": 3}}
