"""Intervals of a mean over episodes: for other episodes of these classes, and for other classes."""

import itertools
import math
import statistics

import pytest
import torch

from methods.intervals import LEAST_WITHOUT, T_975, ci95_over_classes, mean_and_ci95, mean_record, t_975

# Over episodes.


@pytest.mark.parametrize(("n", "t"), [(5, 2.7764), (29, 2.0484), (30, 1.96), (600, 1.96)])
def test_the_interval_is_1_96_standard_errors_and_students_t_of_few_values(n, t):
    values = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.double).tolist()
    mean, ci95 = mean_and_ci95(torch.tensor(values, dtype=torch.double))
    assert mean == pytest.approx(statistics.mean(values))
    assert ci95 == pytest.approx(t * statistics.stdev(values) / math.sqrt(n))


def test_the_table_of_students_t_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    assert T_975 == pytest.approx([stats.t.ppf(0.975, degrees) for degrees in range(1, 29)], abs=5e-5)


@pytest.mark.parametrize("n", [3, 10, 100])
def test_the_interval_covers_the_true_mean_95_times_in_100(n):
    draws = torch.randn(4000, n, generator=torch.Generator().manual_seed(n))
    covered = sum(abs(mean) <= ci95 for mean, ci95 in map(mean_and_ci95, draws))
    assert 0.94 < covered / 4000 < 0.96


def test_a_single_value_has_no_interval():
    mean, ci95 = mean_and_ci95(torch.tensor([0.25]))
    assert mean == 0.25 and math.isnan(ci95)


# Over classes.


def every_episode(n_class, n_way, times=1):
    """Every set of n_way of the classes, as often: (E, n_way)."""
    return torch.tensor([*itertools.combinations(range(n_class), n_way)] * times)


def drawn_episodes(n_episodes, n_class, n_way, generator):
    return torch.rand(n_episodes, n_class, generator=generator).argsort(1)[:, :n_way]


def test_where_classes_alone_differ_it_is_the_interval_of_the_mean_of_classes():
    """Episodes of all sets of classes, each as accurate as its classes are on average."""
    of_class = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    classes = every_episode(12, 5, times=40)
    found = mean_record(of_class[classes].mean(1), classes)
    assert found["accuracy"] == pytest.approx(100 * of_class.mean().item())
    assert found["ci95_classes"] == pytest.approx(100 * mean_and_ci95(of_class)[1], rel=2e-3)
    assert found["ci95"] < found["ci95_classes"] / 50
    assert mean_record(of_class[classes].mean(1), None)["ci95_classes"] is None


def test_without_noise_and_interactions_the_plain_jackknife_bounds_it():
    """One pass over all sets: the episodes of a class have little noise, which is subtracted."""
    generator = torch.Generator().manual_seed(1)
    of_class, classes = torch.rand(8, generator=generator, dtype=torch.double), every_episode(8, 3)
    values = of_class[classes].mean(1)
    without = torch.stack([values[(classes != c).all(1)].mean() for c in range(8)])
    plain = t_975(7) * math.sqrt(7 / 8 * (without - values.mean()).square().sum().item())
    found = ci95_over_classes(values, classes)
    assert 0.8 * plain < found <= plain * (1 + 1e-9)
    assert found == pytest.approx(mean_and_ci95(of_class)[1], rel=0.1)


@pytest.mark.parametrize(
    ("n_class", "n_episodes", "of_classes", "of_episodes"),
    [(20, 600, 10.0, 5.0), (20, 600, 2.0, 5.0), (64, 100, 3.0, 5.0), (10, 300, 10.0, 5.0)],
)
def test_it_covers_what_other_classes_give_95_times_in_100(n_class, n_episodes, of_classes, of_episodes):
    """5-way episodes of classes that are drawn anew each time; the mean over all classes there are is 0."""
    generator, n = torch.Generator().manual_seed(n_class), 600
    covered = only_episodes = 0
    for _ in range(n):
        classes = drawn_episodes(n_episodes, n_class, 5, generator)
        effect = of_classes * torch.randn(n_class, generator=generator)
        values = effect[classes].mean(1) + of_episodes * torch.randn(n_episodes, generator=generator)
        (mean, ci95), ci95_classes = mean_and_ci95(values), ci95_over_classes(values, classes)
        covered += abs(mean) <= ci95_classes
        only_episodes += abs(mean) <= ci95
        assert ci95_classes >= ci95
    assert 0.93 < covered / n < 0.97
    assert only_episodes / n < 0.93


def test_what_classes_do_to_each_other_leaves_it_wide_enough():
    """Pairs of classes that are confused count as much as classes do: a jackknife then covers more than 95%."""
    generator, n = torch.Generator().manual_seed(3), 400
    covered = 0
    for _ in range(n):
        classes = drawn_episodes(300, 16, 5, generator)
        effect, pair = (torch.randn(16, 16, generator=generator) for _ in range(2))
        pair = (pair + pair.T).fill_diagonal_(0.0)
        values = 5.0 * effect[0][classes].mean(1) + pair[classes.unsqueeze(2), classes.unsqueeze(1)].sum((1, 2)) / 5
        covered += abs(values.double().mean().item()) <= ci95_over_classes(values, classes)
    assert covered / n > 0.93


def test_too_few_episodes_without_a_class_tell_nothing():
    generator = torch.Generator().manual_seed(0)
    all_classes = drawn_episodes(600, 5, 5, generator)  # no episode lacks any
    assert math.isnan(ci95_over_classes(torch.rand(600, generator=generator), all_classes))
    few = every_episode(6, 5, times=LEAST_WITHOUT - 1)  # each class is missing from one in six
    values = torch.rand(len(few) + 6, generator=generator)
    assert math.isnan(ci95_over_classes(values[:-6], few))
    assert ci95_over_classes(values, every_episode(6, 5, times=LEAST_WITHOUT)) > 0.0


def test_equal_values_have_no_width():
    assert ci95_over_classes(torch.full((90,), 0.5), every_episode(10, 8, times=2)) == 0.0
