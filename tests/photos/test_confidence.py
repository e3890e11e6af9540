"""How sure a classifier may be: folds, intervals, the temperature, and what is unlike the support."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from data.episodes import Task
from engine.run import Run
from methods.alignment import AlignmentSetting
from methods.features import feature_source
from methods.novel_finetune import HeadFit
from photos.classifier import mean_head
from photos.confidence import (
    FAR,
    MAX_FOLDS,
    Confidence,
    bags,
    cross_validate,
    first_copies,
    fit_temperature,
    fitted_heads,
    folds,
    in_two_classes,
    least_cosine,
    left_out_logits,
    nearest,
    wilson_interval,
)
from tests.helpers import make_split


def labels(counts):
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


@given(st.lists(st.integers(1, 45), min_size=2, max_size=5), st.integers(0, 9))
def test_each_image_that_is_not_alone_is_left_out_once_and_every_class_stays(counts, seed):
    y = labels(counts)[torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed))]
    made = folds(y)
    out = sorted(i for task in made for i in task.query.tolist())
    assert out == [i for i in range(len(y)) if counts[y[i]] > 1]
    assert len(made) <= MAX_FOLDS
    for task in made:
        assert sorted([*task.support.tolist(), *task.query.tolist()]) == list(range(len(y)))
        assert torch.equal(task.y_support, y[task.support])
        assert set(task.y_support.tolist()) == set(range(len(counts)))


def test_a_fold_leaves_out_one_image_of_each_class():
    assert [labels([3, 3])[task.query].tolist() for task in folds(labels([3, 3]))] == [[0, 1]] * 3
    assert folds(labels([1, 1])) == []


def test_copies_of_an_image_are_left_out_together_and_tell_nothing():
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(12, 64, generator=generator).repeat(2, 1), labels([4, 4, 4]).repeat(2)
    setting, split = AlignmentSetting("none", HeadFit(ft_init="prototypes")), make_split((24,), side=1)
    guessed = cross_validate(feature_source(z, split), y, None, setting, Run())
    assert guessed.n == 24 and guessed.n_right < 16
    first = first_copies(z, y)
    assert first.tolist() == [*range(12), *range(12)]
    for task in folds(y, first):
        assert not set(first[task.query].tolist()) & set(first[task.support].tolist())
    assert folds(labels([2, 2]), torch.tensor([0, 0, 2, 2])) == []


def test_one_image_in_two_classes_is_found_and_copies_in_one_class_are_not():
    z = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    z[5], z[2] = z[0], z[1]
    assert in_two_classes(z, labels([3, 3])) == [(0, 5)]


@pytest.mark.parametrize("n_right, n", [(0, 5), (5, 5), (23, 25), (50, 100), (1, 2)])
def test_the_interval_is_that_of_wilson(n_right, n):
    expected = binomtest(n_right, n).proportion_ci(method="wilson")
    assert wilson_interval(n_right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_the_temperature_that_made_the_answers_is_found_again():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20000, 4, generator=generator)
    y = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    for scale in (0.2, 1.0, 7.0):
        assert fit_temperature(scale * logits, y) == pytest.approx(scale, rel=0.05)


def test_a_few_right_answers_do_not_make_sure():
    logits = torch.eye(2).repeat(2, 1)
    p = (logits / fit_temperature(logits, torch.tensor([0, 1, 0, 1]))).softmax(1).max(1).values
    assert 0.9 < p.min() and p.max() < 0.99


def test_the_accuracy_counts_every_tested_class_alike():
    confidence = Confidence(tested=[0, 2, 20], right=[0, 1, 20], n_folds=20, temperature=1.0)
    assert (confidence.n, confidence.n_right, confidence.accuracy) == (22, 21, 0.75)
    low, high = confidence.interval
    expected = binomtest(21, 22).proportion_ci(method="wilson")
    assert low < expected.low - 0.3 and high > 0.75  # two images of one class say little
    even = Confidence([5, 5], [4, 5], 5, 1.0)
    assert even.interval == pytest.approx(wilson_interval(0.9, 10))


def test_the_temperature_counts_every_class_alike():
    y = torch.tensor([0] * 3 + [1] * 30)
    logits = torch.eye(2)[y]
    logits[:3] = logits[:3].flip(1)  # the small class is always wrong
    assert fit_temperature(logits, y) > 10 * fit_temperature(logits[3:], y[3:])


def test_bags_have_as_many_images_of_every_class_and_share_out_those_of_the_large_ones():
    task = Task(torch.arange(10, 19), torch.tensor([1, 0, 2, 1, 2, 2, 2, 1, 0]), torch.tensor([3]))
    made = bags(task, 8)
    assert len(made) == 2 and all(torch.bincount(bag.y_support).tolist() == [2, 2, 2] for bag in made)
    label = dict(zip(task.support.tolist(), task.y_support.tolist(), strict=True))
    assert all(label[i] == y for bag in made for i, y in zip(bag.support.tolist(), bag.y_support.tolist(), strict=True))
    assert {i for bag in made for i in bag.support.tolist()} == set(range(10, 19))
    assert len(bags(task, 1)) == 1 and made[0].query.tolist() == [3]


@pytest.mark.parametrize("method", ["softMax", "cosMax", "arcMax"])
def test_a_class_of_one_image_keeps_its_queries_beside_classes_of_many(method):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 64, generator=generator)
    y = labels([1, 25, 25])
    z = centres[y] + 1.5 * torch.randn(51, 64, generator=generator)
    z_query = centres[labels([40] * 3)] + 1.5 * torch.randn(120, 64, generator=generator)
    source, task = feature_source(z, make_split((1, 25, 25), side=1)), Task(torch.arange(51), y, torch.arange(51))
    setting = AlignmentSetting("none", HeadFit(method, ft_init="prototypes"))
    recall = {}
    for name, parts in (("bags", bags(task, 32)), ("one", [task])):
        head = mean_head(fitted_heads(parts, source, setting, Run()), 64, 3, setting.fit)
        heads = fitted_heads(parts, source, setting, Run())
        torch.testing.assert_close(head(z_query), heads(z_query).mean(0), atol=1e-5, rtol=1e-4)
        recall[name] = (head(z_query).argmax(1).view(3, 40) == torch.arange(3).unsqueeze(1)).float().mean(1)
    assert recall["bags"][0] > recall["one"][0] + 0.05 and recall["bags"].mean() > recall["one"].mean() - 0.03


def test_the_examples_that_are_put_elsewhere_are_kept_the_surest_first():
    support, _ = features(3)
    y = support.split.labels.clone()
    y[2], y[7] = 1, 2  # wrong labels
    setting = AlignmentSetting("none", HeadFit(ft_n_epoch=100, ft_lr=0.01, ft_init="prototypes"))
    known = cross_validate(support, y, None, setting, Run())
    certainty = [max(row) for _, row in known.wrong]
    assert {2, 7} <= {i for i, _ in known.wrong} and certainty == sorted(certainty, reverse=True)
    assert len(known.wrong) == known.n - known.n_right and all(row[y[i]] < max(row) for i, row in known.wrong)


def features(seed, n_base=8):
    """Support features of three classes, five each, in directions of their own, and a base set near them."""
    split = make_split((5, 5, 5), seed=seed)
    base = make_split((6,) * n_base, seed=seed + 1, split="base")
    flat = (s.images.flatten(1).float()[:, :64] - 128 for s in (split, base))
    return [feature_source(z, s) for z, s in zip(flat, (split, base), strict=True)]


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("method", ["softMax", "cosMax", "arcMax"])
def test_heads_of_all_folds_together_are_those_fitted_one_by_one(with_base, method):
    support, base = features(0)
    setting = AlignmentSetting("head" if with_base else "none", HeadFit(method, ft_n_epoch=30), align_iters=5)
    tasks = folds(support.split.labels)
    together = left_out_logits(tasks, support, base if with_base else None, setting, Run())[1]
    first = left_out_logits(tasks[:1], support, base if with_base else None, setting, Run())[1]
    torch.testing.assert_close(together[: len(first)], first, atol=1e-4, rtol=1e-4)


def test_classes_that_differ_are_told_apart_and_shuffled_labels_are_not():
    support, _ = features(3)
    setting = AlignmentSetting("none", HeadFit(ft_n_epoch=100, ft_lr=0.01))
    known = cross_validate(support, support.split.labels, None, setting, Run())
    assert (known.n, known.n_right, known.n_folds) == (15, 15, 5) and known.accuracy == 1.0
    assert known.tested == known.right == [5, 5, 5]
    noise = feature_source(torch.randn(15, 64, generator=torch.Generator().manual_seed(1)), support.split)
    guessed = cross_validate(noise, support.split.labels, None, setting, Run())
    assert guessed.n_right < 12 and guessed.interval[0] < known.interval[0]
    assert cross_validate(support, torch.arange(15), None, setting, Run()) is None


def test_what_points_elsewhere_is_unlike_the_support():
    support, _ = features(0)
    z = support.features
    least = least_cosine(z)
    cosine, index = nearest(torch.cat([z, -z]), z)
    assert index[:15].tolist() == list(range(15)) and (cosine[:15] > least).all() and (cosine[15:] < least).all()
    z = torch.nn.functional.normalize(z, dim=1)
    others = (z @ z.T).fill_diagonal_(-1).max(1).values
    assert least == pytest.approx(1 - FAR * (1 - others.min().item()), abs=1e-5)
