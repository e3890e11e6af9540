"""Properties of heads, episodes, related base and intervals that hold for any input; hypothesis looks for one."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.benchmarks import DataOptions, load_split
from data.episodes import EpisodeShape, class_major_labels, read_episodes, sample_episodes, write_episodes
from data.transforms import draw_crops
from engine.records import to_json
from methods import related_base
from methods.adversarial_alignment import adversarial_alignment_loss
from methods.centroid_alignment import centroid_alignment_loss
from methods.features import Source
from methods.intervals import mean_and_ci95
from methods.novel_finetune import fit_heads
from methods.protonet import protonet_scores
from methods.related_base import (
    RelatedSetting,
    choose_related_base,
    draw_related,
    drawn_per_class,
    related_base_of_head,
)
from models import HEADS, build_head
from models.critic import Critic
from models.heads import NORM_EPS
from persistence.run_files import differences
from tests.helpers import make_benchmark, make_split, related_by_logits

SEEDS = st.integers(0, 2**31)
METHODS = st.sampled_from(list(HEADS))


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Heads.


def loss_by_definition(method, z, weight, bias, y, s, m):
    """The loss of a head in float64, as its paper defines it, a sample at a time."""
    z, weight, bias = z.double(), weight.double(), bias.double()
    losses = []
    for x, label in zip(z, y.tolist(), strict=True):
        if method == "softMax":
            logits = weight @ x + bias
        else:
            unit_weight = weight / weight.norm(dim=1, keepdim=True).clamp_min(NORM_EPS)
            logits = unit_weight @ (x / x.norm().clamp_min(NORM_EPS))
            if method == "arcMax" and logits[label] > 0:
                logits[label] = torch.cos(torch.arccos(logits[label].clamp(-1, 1)) + m)
            logits = s * logits
        losses.append(torch.logsumexp(logits, 0) - logits[label])
    return torch.stack(losses).mean()


@given(
    method=METHODS,
    seed=SEEDS,
    n=st.integers(1, 6),
    d=st.integers(2, 20),
    n_class=st.integers(2, 6),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    s=st.sampled_from([1.0, 20.0, 64.0]),
    m=st.sampled_from([0.0, 0.01, 0.5]),
    special=st.sampled_from(["none", "zero", "parallel", "opposite"]),
)
def test_the_loss_of_a_head_is_its_definition_and_its_gradients_are_finite(
    method, seed, n, d, n_class, scale, s, m, special
):
    """On random and extreme inputs: zero vectors, cos = +-1, one sample, small and large features."""
    head = build_head(method, d, n_class, s, m, torch.Generator().manual_seed(seed))
    z = scale * normal(seed, n, d)
    y = torch.randint(n_class, (n,), generator=torch.Generator().manual_seed(seed))
    if special != "none":
        z[0] = {"zero": 0.0, "parallel": scale, "opposite": -scale}[special] * head.weight.data[y[0]]
    z.requires_grad_()
    loss = head.loss(head(z), y)
    loss.backward()
    assert torch.isfinite(z.grad).all() and all(torch.isfinite(p.grad).all() for p in head.parameters())
    bias = head.bias.data if method == "softMax" else torch.zeros(n_class)
    expected = loss_by_definition(method, z.detach(), head.weight.data, bias, y, s, m).item()
    # Close to cos = 1 the sine, and with it the margin, is resolved to the root of float32's precision.
    sine_error = 5e-4 * s * math.sin(m) if method == "arcMax" else 0.0
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5 * (1 + s) + sine_error)


@settings(max_examples=25)
@given(METHODS, SEEDS, st.integers(1, 7), st.integers(2, 5), st.integers(1, 3), st.integers(2, 16))
def test_heads_fitted_together_are_heads_fitted_one_by_one(method, seed, n_together, n_way, n_shot, d):
    z, y = normal(seed, n_together, n_way * n_shot, d), class_major_labels(n_way, n_shot)

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(n_together)]

    together = build_head(method, d, n_way, 5.0, 0.01, generators())
    fit_heads(together, z, y.expand(n_together, -1), 15, 1e-2)
    for i, generator in enumerate(generators()):
        alone = build_head(method, d, n_way, 5.0, 0.01, generator)
        fit_heads(alone, z[i], y, 15, 1e-2)
        torch.testing.assert_close(together.weight[i], alone.weight, rtol=1e-3, atol=1e-4)


@given(SEEDS, st.integers(1, 4), st.integers(2, 6), st.integers(1, 4), st.sampled_from([1e-3, 1.0, 1e2]))
def test_protonet_scores_are_minus_squared_distances_to_the_means(seed, n_episodes, n_way, n_shot, scale):
    support, query = (scale * normal(seed + k, n_episodes, *shape, 9) for k, shape in ((0, (n_way, n_shot)), (1, (7,))))
    exact = -(query.double().unsqueeze(2) - support.double().mean(2).unsqueeze(1)).square().sum(-1)
    torch.testing.assert_close(protonet_scores(support, query).double(), exact, rtol=1e-4, atol=1e-4 * scale**2)


@given(SEEDS, st.integers(2, 5), st.integers(1, 3), st.integers(1, 12), st.sampled_from([1e-3, 1.0, 30.0]))
def test_the_centroid_loss_is_its_definition_with_finite_gradients(seed, n_way, n_shot, n, scale):
    z_support = (scale * normal(seed, n_way, n_shot, 8)).requires_grad_()
    z_related = (scale * normal(seed + 1, n, 8)).requires_grad_()
    y = torch.randint(n_way, (n,), generator=torch.Generator().manual_seed(seed))
    loss = centroid_alignment_loss(z_support.flatten(0, 1), class_major_labels(n_way, n_shot), z_related, y, n_way)
    loss.backward()
    distance = torch.cdist(z_related.detach().double(), z_support.detach().double().mean(1)).square()
    expected = (distance[torch.arange(n), y] + torch.logsumexp(-distance, 1)).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert torch.isfinite(z_support.grad).all() and torch.isfinite(z_related.grad).all()


@given(SEEDS, st.integers(1, 9), st.integers(1, 9))
def test_the_adversarial_loss_of_a_set_against_itself_is_zero_and_changes_sign(seed, n, k):
    critic = Critic(6, 3, 10, generator=torch.Generator().manual_seed(seed))
    z, other = normal(seed, n, 6), normal(seed + 1, k, 6)
    y, y_other = torch.arange(n) % 3, torch.arange(k) % 3
    assert adversarial_alignment_loss(critic, z, y, z, y).item() == pytest.approx(0.0, abs=1e-6)
    forth = adversarial_alignment_loss(critic, z, y, other, y_other).item()
    assert forth == pytest.approx(-adversarial_alignment_loss(critic, other, y_other, z, y).item(), abs=1e-6)


# Episodes.

COUNTS = st.lists(st.integers(4, 12), min_size=3, max_size=9)


@given(COUNTS, st.integers(2, 9), st.integers(1, 3), SEEDS)
def test_no_image_is_twice_in_an_episode_and_every_one_is_of_its_class(counts, n_way, n_shot, seed):
    split, n_way = make_split(counts, side=1), min(n_way, len(counts))
    episodes = sample_episodes(split, EpisodeShape(n_way, n_shot, 4 - n_shot), 6, seed)
    for index, classes in zip(episodes.index, episodes.classes, strict=True):
        assert len(set(index.flatten().tolist())) == index.numel() and len(set(classes.tolist())) == n_way
        assert torch.equal(split.labels[index], classes.unsqueeze(1).expand_as(index))
    support, query = ({*part.flatten().tolist()} for part in (episodes.support[0], episodes.query[0]))
    assert not support & query


@given(COUNTS, SEEDS, st.integers(0, 6), st.integers(0, 6))
def test_any_part_of_the_episodes_is_drawn_as_in_the_whole(counts, seed, start, n):
    split = make_split(counts, side=1)
    shape = EpisodeShape(3, 1, 2)
    whole = sample_episodes(split, shape, 12, seed)
    assert torch.equal(sample_episodes(split, shape, n, seed, start).index, whole.index[start : start + n])


@settings(max_examples=6)
@given(SEEDS)
def test_classes_are_drawn_uniformly(seed):
    stats = pytest.importorskip("scipy.stats")
    episodes = sample_episodes(make_split((5,) * 7, side=1), EpisodeShape(3, 1, 2), 800, seed)
    for way in range(3):
        counts = torch.bincount(episodes.classes[:, way], minlength=7)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    pairs = episodes.classes[:, 0] * 7 + episodes.classes[:, 1]  # 42 ordered pairs of different classes
    counts = torch.bincount(pairs, minlength=49)[~torch.eye(7, dtype=torch.bool).flatten()]
    assert counts.sum() == 800 and stats.chisquare(counts.numpy()).pvalue > 1e-4


@settings(max_examples=20)
@given(COUNTS, SEEDS, st.integers(1, 5))
def test_episodes_come_back_from_their_file(tmp_path_factory, counts, seed, n):
    path, split = tmp_path_factory.mktemp("episodes") / "episodes.json", make_split(counts, side=1)
    shape = EpisodeShape(3, 1, 3)
    episodes = sample_episodes(split, shape, n, seed)
    write_episodes(path, split, episodes)
    found = read_episodes(path, split, shape, n)
    assert torch.equal(found.index, episodes.index) and torch.equal(found.classes, episodes.classes)


# Intervals.


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_the_interval_is_scipys(values):
    stats = pytest.importorskip("scipy.stats")
    mean, ci95 = mean_and_ci95(torch.tensor(values, dtype=torch.double))
    error = stats.sem(values)
    law = stats.t(len(values) - 1) if len(values) < 30 else stats.norm
    low, high = (sum(values) / len(values) + error * law.ppf(tail) for tail in (0.025, 0.975))
    assert (mean - ci95, mean + ci95) == pytest.approx((low, high), abs=2e-4 * error + 1e-9)


# Related base detection.


@given(SEEDS, st.integers(1, 30), st.integers(2, 7), st.integers(1, 12))
def test_related_classes_are_disjoint_best_first_and_of_equal_number(seed, n_base_class, n_way, n_B):
    score = (normal(seed, n_base_class, n_way) * 2).round().clamp_min(0)  # with ties
    chosen = choose_related_base(score, n_B)
    every = [b for classes in chosen for b in classes]
    assert len(set(every)) == len(every)
    assert [len(classes) for classes in chosen] == [min(n_B, n_base_class // n_way)] * n_way
    taken = set()
    for w, classes in enumerate(chosen):
        free = [b for b in range(n_base_class) if b not in taken]
        best = sorted(free, key=lambda b: (-score[b, w].item(), b))[: len(classes)]  # noqa: B023
        assert classes == best
        taken |= set(classes)


@given(SEEDS, st.integers(1, 9), st.integers(2, 5), st.sampled_from(["vote", "soft"]))
def test_related_samples_are_of_the_chosen_classes_and_predicted_as_theirs(seed, n_base_class, n_way, kind):
    y = torch.arange(60) % n_base_class
    logits = normal(seed, 60, n_way)
    members = [torch.nonzero(y == b).squeeze(1) for b in range(n_base_class)]
    related = related_by_logits(logits, y, n_base_class, RelatedSetting(2, related_score=kind))
    torch.testing.assert_close(related.score.sum(1), torch.ones(n_base_class))
    for w, (classes, samples) in enumerate(zip(related.classes, related.samples, strict=True)):
        expected = [i for b in classes for i in members[b].tolist() if logits[i].argmax() == w]
        assert samples.tolist() == expected


@settings(max_examples=20)
@given(METHODS, SEEDS, st.integers(1, 70))
def test_related_sets_do_not_depend_on_how_many_rows_are_scored_together(method, seed, rows):
    head = build_head(method, 6, 3, 5.0, 0.01, torch.Generator().manual_seed(seed))
    base = replace(make_split((6,) * 10, side=1), labels=torch.arange(60) % 10)
    z = normal(seed, 60, 6)
    whole = related_base_of_head(head, Source(z, None, base), RelatedSetting(n_B=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(related_base, "BASE_ROWS", rows)
        parts = related_base_of_head(head, Source(z, None, base), RelatedSetting(n_B=2))
    assert parts.classes == whole.classes
    assert all(torch.equal(a, b) for a, b in zip(parts.samples, whole.samples, strict=True))


@given(SEEDS, st.lists(st.integers(0, 20), min_size=2, max_size=5), st.integers(1, 25))
def test_draws_of_related_images_are_without_replacement_and_as_many_of_each_class(seed, sizes, aug_size):
    samples = [100 * w + torch.arange(size) for w, size in enumerate(sizes)]
    n_each = drawn_per_class(samples, aug_size)
    assert n_each == min([aug_size, *(size for size in sizes if size)]) * any(sizes)
    if n_each:
        (drawn,) = draw_related(samples, aug_size, 1, torch.Generator().manual_seed(seed))
        picks, labels = drawn[drawn >= 0], (drawn >= 0).nonzero()[:, 0]
        assert len(set(picks.tolist())) == len(picks) and torch.equal(picks // 100, labels)
        assert torch.bincount(labels, minlength=len(sizes)).tolist() == [n_each * bool(size) for size in sizes]


@given(SEEDS, st.integers(1, 8), st.integers(2, 5))
def test_the_score_is_the_mean_over_a_base_class(seed, n_base_class, n_way):
    y = torch.randint(n_base_class, (40,), generator=torch.Generator().manual_seed(seed))
    logits = normal(seed, 40, n_way)
    prediction = logits.softmax(1)
    score = related_by_logits(logits, y, n_base_class, RelatedSetting(2, related_score="soft")).score
    for b in range(n_base_class):
        expected = prediction[y == b].double().mean(0) if (y == b).any() else torch.zeros(n_way).double()
        torch.testing.assert_close(score[b].double(), expected, rtol=1e-5, atol=1e-6)


# Images, records, flags.


@given(SEEDS, st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 1.0))
def test_a_random_crop_lies_within_its_image(seed, height, width, low):
    sizes = torch.tensor([[height, width]] * 8)
    top, left, h, w = draw_crops(sizes, (low, 1.0), (3 / 4, 4 / 3), torch.Generator().manual_seed(seed)).T
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def test_images_are_the_same_with_any_number_of_workers(tmp_path):
    make_benchmark(tmp_path / "tiny", n_class=(3, 1, 1), n_images=30)
    splits = [
        load_split(DataOptions(tmp_path, 16, tmp_path / f"{n}", num_workers=n, crop_scale=(0.08, 1.0)), "tiny", "base")
        for n in (0, 1, 4)
    ]
    for split in splits[1:]:
        assert torch.equal(split.images, splits[0].images) and torch.equal(split.train_images, splits[0].train_images)
        assert split.fingerprint == splits[0].fingerprint and split.image_names == splits[0].image_names


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_any_record_is_valid_json_and_comes_back(value):
    text = json.dumps(to_json(value), allow_nan=False)
    assert json.loads(text) == to_json(value)


@given(st.dictionaries(st.sampled_from(["lr", "seed", "n_B", "quiet", "method"]), VALUES, min_size=1))
def test_flags_never_differ_from_themselves_and_always_from_others(config):
    earlier = json.loads(json.dumps(to_json(config)))
    assert differences(config, earlier) == ""
    changed = earlier | {"lr": ["another"]}
    assert "--lr 0.1" in differences({**config, "lr": 0.1}, changed)
