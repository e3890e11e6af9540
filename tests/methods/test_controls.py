"""The standard classifiers that alignment is compared with, against plain loops and scikit-learn."""

import pytest
import torch
import torch.nn.functional as F

from data.episodes import EpisodeShape, class_major_labels, sample_episodes
from engine.run import Run
from methods import controls
from methods.controls import (
    N_RELATED,
    logistic_regression,
    nearest_mean_cosine,
    related_prototype,
    score_controls,
    score_episodes,
    simple_shot,
)
from methods.protonet import protonet_scores
from tests.helpers import make_split, toy_features

SCORERS = {"Euclidean": protonet_scores, "cosine": nearest_mean_cosine}


@pytest.fixture(scope="module")
def toy():
    split = make_split(counts=(10,) * 7, side=1)
    return toy_features(split), sample_episodes(split, EpisodeShape(5, 2, 4), 21, seed=3)


def support_and_query(n_episodes=3, n_way=4, n_shot=2, n_query=6, d=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(n_episodes, n_way, 1, d, generator=generator)
    both = centre + torch.randn(n_episodes, n_way, n_shot + n_query, d, generator=generator)
    return both[:, :, :n_shot], both[:, :, n_shot:].flatten(1, 2)


def test_the_nearest_means_are_those_of_a_plain_loop_over_queries(toy, monkeypatch):
    monkeypatch.setattr(controls, "HEAD_CHUNK", 4)
    features, episodes = toy
    found = {name: score_episodes(features, episodes, scorer, Run()) for name, scorer in SCORERS.items()}
    for i in range(0, len(episodes), 5):
        z_support = features[episodes.support[i]]
        means, unit_means = z_support.mean(1), (z_support / z_support.norm(dim=2, keepdim=True)).mean(1)
        for way in range(5):
            z = features[episodes.query[i, way]]
            euclidean = torch.stack([(means - x).norm(dim=1).argmin() for x in z])
            cosine = torch.stack([torch.cosine_similarity(unit_means, x[None]).argmax() for x in z])
            assert torch.equal(found["Euclidean"].counts[i, way], torch.bincount(euclidean, minlength=5))
            assert torch.equal(found["cosine"].counts[i, way], torch.bincount(cosine, minlength=5))


def test_the_controls_are_scored_on_the_same_episodes_however_many_together(toy, monkeypatch):
    features, episodes = toy
    z_base = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    whole = score_controls(features, z_base, episodes, Run())
    assert list(whole) == [
        "nearest mean, Euclidean",
        "nearest mean, cosine",
        "SimpleShot",
        "logistic regression",
        "related prototype",
    ]
    monkeypatch.setattr(controls, "HEAD_CHUNK", 4)
    monkeypatch.setattr(controls, "BASE_ROWS", 7)
    for name, scores in score_controls(features, z_base, episodes, Run()).items():
        assert torch.equal(scores.counts, whole[name].counts) and 0.5 < scores.accuracy.mean() < 1.0
    of_one = score_episodes(features, episodes.slice(3, 4), logistic_regression, Run())
    assert torch.equal(of_one.counts, whole["logistic regression"].counts[3:4])


def test_simple_shot_is_the_nearest_mean_after_centring_and_normalising():
    z_support, z_query = support_and_query()
    centre = torch.full((10,), 0.5)
    scores = simple_shot(z_support, z_query, centre)
    means = F.normalize(z_support - 0.5, dim=-1).mean(2)
    distance = torch.cdist(F.normalize(z_query - 0.5, dim=-1), means).square()
    torch.testing.assert_close(scores, -distance, atol=1e-5, rtol=1e-4)


def test_a_related_prototype_moves_halfway_to_the_mean_of_its_nearest_base_features():
    z_support, z_query = support_and_query()
    z_base = torch.randn(300, 10, generator=torch.Generator().manual_seed(5))
    scores = related_prototype(z_support, z_query, z_base)
    base = F.normalize(z_base, dim=1)
    for e in range(3):
        moved = []
        for of_class in z_support[e]:
            prototype = F.normalize(F.normalize(of_class, dim=1).mean(0), dim=0)
            nearest = (base @ prototype).argsort(descending=True)[:N_RELATED]
            moved.append(prototype + 0.5 * base[nearest].mean(0))
        expected = torch.cosine_similarity(z_query[e].unsqueeze(1), torch.stack(moved), dim=2)
        torch.testing.assert_close(scores[e], expected, atol=1e-5, rtol=1e-4)
    few = related_prototype(z_support, z_query, z_base[:3])  # fewer than N_RELATED are all taken
    assert few.shape == scores.shape and not torch.equal(few, scores)


@pytest.mark.parametrize(
    ("n_way", "n_shot", "strength"), [(4, 1, 1.0), (4, 5, 1.0), (4, 5, 30.0), (2, 1, 1.0), (2, 5, 30.0)]
)
def test_logistic_regression_is_scikit_learns(n_way, n_shot, strength):
    linear_model = pytest.importorskip("sklearn.linear_model")
    z_support, z_query = support_and_query(n_way=n_way, n_shot=n_shot, d=40)
    C = 2 * strength if n_way == 2 else strength  # one weight vector, and a sigmoid: twice as strongly regularised
    found = logistic_regression(z_support, z_query, strength).softmax(-1)
    for e in range(3):
        z = F.normalize(z_support[e].flatten(0, 1), dim=1).numpy()
        fitted = linear_model.LogisticRegression(C=C, tol=1e-8, max_iter=5000)
        fitted.fit(z, class_major_labels(n_way, n_shot).numpy())
        expected = torch.from_numpy(fitted.predict_proba(F.normalize(z_query[e], dim=1).numpy()))
        torch.testing.assert_close(found[e].double(), expected.double(), atol=2e-3, rtol=0)


def test_more_support_images_than_features_are_fitted_as_well():
    z_support, z_query = support_and_query(n_shot=9, d=6)
    y = class_major_labels(4, 6)
    assert (logistic_regression(z_support, z_query).argmax(-1) == y).float().mean() > 0.6
    assert (nearest_mean_cosine(z_support, z_query).argmax(-1) == y).float().mean() > 0.6
