"""Fitting heads on frozen features against the published numbers, episodes together or alone, and what is reported."""

import dataclasses
import math
import statistics

import pytest
import torch
from torch import nn

from data.episodes import Episodes, class_major_labels, sample_episodes
from data.transforms import normalise
from engine.generators import make_generator
from engine.precision import Precision
from methods import evaluation
from methods.evaluation import (
    EpisodeScores,
    accuracy_per_class,
    cached_features,
    embed,
    evaluate_heads,
    mean_and_ci95,
    score_queries,
)
from methods.novel_finetune import fit_heads
from models import HEADS, build_head
from persistence.checkpoints import create_backbone
from tests.helpers import golden, make_split

CPU = torch.device("cpu")
FP32 = Precision("fp32", "cpu")
MANY_STEPS = {"rtol": 2e-3, "atol": 2e-4}
CASES = {"softMax": ("softMax", 0.0, 0.0), "cosMax_s5": ("cosMax", 5.0, 0.0), "arcMax_s5_m0.01": ("arcMax", 5.0, 0.01)}
ALL_HEADS = pytest.mark.parametrize("method", HEADS)


# Fitting heads.


def golden_head(g, case):
    method, s, m = CASES[case]
    head = build_head(method, g["weight_init"].shape[1], g["weight_init"].shape[0], s, m)
    head.weight.data = g["weight_init"].clone()
    if method == "softMax":
        head.bias.data = g["bias_init"].clone()
    return head


@pytest.mark.parametrize("case", CASES)
def test_a_fitted_head_is_the_published_one(case):
    g = golden("novel_finetune")
    head = golden_head(g, case)
    fit_heads(head, g["z_support"], g["y_support"], int(g["steps"]), float(g["lr"]))
    torch.testing.assert_close(head.weight.detach(), g[f"{case}.weight_final"], **MANY_STEPS)
    torch.testing.assert_close(head(g["z_query"]).detach(), g[f"{case}.query_scores"], **MANY_STEPS)


@pytest.mark.parametrize("n_steps", [0, 1, 50, 199])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_along_the_fit_is_the_published_one(case, n_steps):
    g = golden("novel_finetune")
    head = golden_head(g, case)
    fit_heads(head, g["z_support"], g["y_support"], n_steps, float(g["lr"]))
    loss = head.loss(head(g["z_support"]), g["y_support"]).detach()
    torch.testing.assert_close(loss, g[f"{case}.losses"][n_steps], **MANY_STEPS)


def test_the_optimiser_that_fitted_a_head_keeps_its_moments():
    g = golden("novel_finetune")
    head = golden_head(g, "arcMax_s5_m0.01")
    optimizer = fit_heads(head, g["z_support"], g["y_support"], 3, 1e-3)
    (state,) = optimizer.state.values()
    assert state["step"] == 3 and state["exp_avg"].shape == head.weight.shape and state["exp_avg"].abs().sum() > 0


def test_fitting_a_head_sends_no_gradient_into_the_features():
    g = golden("novel_finetune")
    z = g["z_support"].requires_grad_()
    fit_heads(golden_head(g, "cosMax_s5"), z, g["y_support"], 2, 1e-3)
    assert z.grad is None


@pytest.mark.parametrize("n_together", [1, 3, 16])
@ALL_HEADS
def test_heads_fitted_together_equal_heads_fitted_one_by_one(method, n_together):
    n_way, n_shot, d = 4, 3, 24
    z = torch.randn(n_together, n_way * n_shot, d, generator=torch.Generator().manual_seed(0))
    y = class_major_labels(n_way, n_shot)
    together = build_head(method, d, n_way, 5.0, 0.01, [make_generator(0, i) for i in range(n_together)], batched=True)
    fit_heads(together, z, y.expand(n_together, -1), 60, 1e-2)
    for i in range(n_together):
        alone = build_head(method, d, n_way, 5.0, 0.01, [make_generator(0, i)])
        fit_heads(alone, z[i], y, 60, 1e-2)
        torch.testing.assert_close(together.weight[i], alone.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together(z)[i], alone(z[i]), rtol=1e-4, atol=1e-5)


# Episodes on features.


def toy_features(split, d=12, spread=1.2, seed=0):
    """Features (N, d): a direction a class, and noise."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(len(split.class_names), d, generator=generator)
    return centre[split.labels] + spread * torch.randn(len(split.labels), d, generator=generator)


@pytest.fixture(scope="module")
def toy():
    split = make_split(counts=(10,) * 7, side=1)
    return toy_features(split), sample_episodes(split, 5, 2, 4, 21, seed=3)


def evaluate(features, episodes, method="arcMax", n_steps=40, seed=0, start=0):
    return evaluate_heads(features, episodes, method, 5.0, 0.01, n_steps, 1e-2, seed, start)


@ALL_HEADS
def test_scores_do_not_depend_on_how_many_episodes_are_fitted_together(toy, monkeypatch, method):
    reference = evaluate(*toy, method)
    assert reference.correct.shape == (21, 5) and 0.3 < reference.accuracy.mean() < 1.0
    for chunk in (1, 4, 100):
        monkeypatch.setattr(evaluation, "HEAD_CHUNK", chunk)
        assert torch.equal(evaluate(*toy, method).correct, reference.correct)


def test_a_part_of_the_episodes_scores_as_it_does_in_the_whole(toy):
    features, episodes = toy
    whole = evaluate(features, episodes, n_steps=3).correct
    part = evaluate(features, episodes.slice(9, 15), n_steps=3, start=9).correct
    assert torch.equal(part, whole[9:15])
    other = evaluate(features, episodes.slice(9, 15), n_steps=3, seed=1, start=9).correct
    assert not torch.equal(other, part)  # another seed, other initial heads: three steps do not hide it


@ALL_HEADS
def test_scores_are_those_of_a_plain_loop_over_episodes(toy, method):
    features, episodes = toy
    scores = evaluate(features, episodes, method)
    for i in range(0, len(episodes), 5):
        head = build_head(method, features.shape[1], 5, 5.0, 0.01, [make_generator(0, "head", i)])
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
    episodes = sample_episodes(split, 5, 5, 10, 40, seed=0)
    for method in HEADS:
        assert evaluate(toy_features(split, 32, 0.01), episodes, method).accuracy.mean() == 1.0
        chance = torch.randn(120, 32, generator=torch.Generator().manual_seed(1))
        assert abs(evaluate(chance, episodes, method).accuracy.mean() - 0.2) < 0.05


def test_score_queries_gives_the_share_of_each_class():
    scores = torch.eye(3)[[0, 0, 1, 1, 0, 2]]  # two queries each of three classes
    assert score_queries(scores, 3).tolist() == [1.0, 1.0, 0.5]
    batch = torch.stack([scores, torch.eye(3)[[1, 1, 0, 0, 0, 0]]])
    assert score_queries(batch, 3).tolist() == [[1.0, 1.0, 0.5], [0.0, 0.0, 0.0]]


# What is reported.


def test_the_interval_is_1_96_standard_errors():
    values = [0.2, 0.5, 0.9, 0.4, 0.6]
    mean, ci95 = mean_and_ci95(torch.tensor(values))
    assert mean == pytest.approx(statistics.mean(values))
    assert ci95 == pytest.approx(1.96 * statistics.stdev(values) / math.sqrt(5))


def test_the_interval_covers_the_true_mean_95_times_in_100():
    draws = torch.rand(2000, 100, generator=torch.Generator().manual_seed(0))
    covered = sum(abs(mean - 0.5) <= ci95 for mean, ci95 in map(mean_and_ci95, draws))
    assert 0.935 < covered / 2000 < 0.965


def test_a_single_value_has_no_interval():
    mean, ci95 = mean_and_ci95(torch.tensor([0.25]))
    assert mean == 0.25 and math.isnan(ci95)


def test_accuracy_per_class_pools_the_episodes_that_a_class_was_part_of():
    classes = torch.tensor([[0, 2], [2, 1], [0, 2]])
    # 20 queries a class; rows are the true classes, columns the predicted ones.
    counts = torch.tensor([[[20, 0], [10, 10]], [[0, 20], [15, 5]], [[10, 10], [18, 2]]])
    scores = EpisodeScores(counts)
    episodes = Episodes(torch.zeros(3, 2, 2, dtype=torch.long), classes, 1)
    table = accuracy_per_class(scores, episodes, ["ant", "bee", "cat", "never drawn"])
    assert table == {"ant": 75.0, "bee": 25.0, "cat": 20.0}


# Features.


@pytest.fixture
def backbone():
    """A Conv4 whose batch statistics are not the initial ones."""
    net = create_backbone("Conv4", 16, seed=0)
    with torch.no_grad():
        net(normalise(make_split(side=16, seed=1).images))
    return net


def test_embedding_does_not_depend_on_the_batch_size_and_ends_in_eval_mode(backbone):
    images = make_split(side=16).images
    backbone.train()
    reference = embed(backbone, images, CPU, FP32)
    assert not backbone.training and not any(module.training for module in backbone.modules())
    assert reference.shape == (len(images), backbone.feature_dim) and not reference.requires_grad
    torch.testing.assert_close(reference, backbone(normalise(images)).detach())
    for batch_size in (1, 7, len(images)):
        again = embed(backbone, images, CPU, FP32, batch_size)
        torch.testing.assert_close(again, reference, rtol=1e-5, atol=1e-6)


def test_embedding_changes_no_weight_and_no_statistic(backbone):
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    embed(backbone.train(), make_split(side=16).images, CPU, FP32)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_features_in_bf16_are_close_and_float32(backbone):
    images = make_split(side=16).images
    features = embed(backbone, images, CPU, Precision("bf16", "cpu"))
    exact = embed(backbone, images, CPU, FP32)
    assert features.dtype == torch.float32 and not torch.equal(features, exact)
    assert (features - exact).norm() < 0.05 * exact.norm()


class CountingBackbone(nn.Module):
    """Counts the images it has embedded."""

    def __init__(self):
        super().__init__()
        self.feature_dim = 2
        self.layer = nn.Linear(3, 2)
        self.register_buffer("statistic", torch.zeros(1))
        self.n_seen = 0

    def forward(self, x):
        self.n_seen += len(x)
        return self.layer(x.mean((2, 3))) + self.statistic


@pytest.fixture
def counting():
    torch.manual_seed(0)
    return CountingBackbone()


def features_of(backbone, split, cache_dir, precision=FP32):
    return cached_features(backbone, split, cache_dir, CPU, precision, quiet=True)


def test_features_are_computed_once(counting, tmp_path):
    split = make_split()
    first = features_of(counting, split, tmp_path)
    torch.testing.assert_close(first, embed(counting, split.images, CPU, FP32))
    counting.n_seen = 0
    assert torch.equal(features_of(counting, split, tmp_path), first) and counting.n_seen == 0


def change_weight(backbone, split):
    backbone.layer.weight.data[0, 0] += 1e-6
    return split, FP32


def change_statistic(backbone, split):
    backbone.statistic += 1.0
    return split, FP32


def change_images(backbone, split):
    return dataclasses.replace(split, images=split.images.flip(0), fingerprint="another"), FP32


def change_img_size(backbone, split):
    return dataclasses.replace(split, images=split.images[..., :8, :8]), FP32


def change_precision(backbone, split):
    return split, Precision("bf16", "cpu")


@pytest.mark.parametrize("change", [change_weight, change_statistic, change_images, change_img_size, change_precision])
def test_features_are_computed_anew_when_anything_changes_that_they_follow_from(counting, tmp_path, change):
    split = make_split()
    features_of(counting, split, tmp_path)
    changed, precision = change(counting, split)
    counting.n_seen = 0
    again = features_of(counting, changed, tmp_path, precision)
    assert counting.n_seen == len(split.images)
    torch.testing.assert_close(again, embed(counting, changed.images, CPU, precision))


def test_two_backbones_of_the_same_weights_do_not_share_features(tmp_path):
    plain, of_relationnet = (create_backbone("Conv4", 16, seed=0, relation=relation) for relation in (False, True))
    of_relationnet.load_state_dict(plain.state_dict())
    split = make_split(side=16)
    assert features_of(plain, split, tmp_path).shape[1] == plain.feature_dim
    assert features_of(of_relationnet, split, tmp_path).shape[1] == of_relationnet.feature_dim


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99], ids=["empty", "first bytes", "half", "all but the end"])
def test_a_damaged_feature_file_is_written_anew(counting, tmp_path, keep):
    split = make_split()
    first = features_of(counting, split, tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: keep if keep in (0, 10) else int(keep * len(content))])
    assert torch.equal(features_of(counting, split, tmp_path), first)
    counting.n_seen = 0
    assert torch.equal(features_of(counting, split, tmp_path), first) and counting.n_seen == 0
