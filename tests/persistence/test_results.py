"""Result records: their accuracies and confusion agree, in every stage."""

import json

import pytest
import torch

from data.episodes import Episodes
from methods.evaluation import EpisodeScores
from methods.intervals import ci95_over_classes
from persistence.results import accuracy_record, class_notes, curve_record, difference_record, interval
from tests.helpers import CHECKPOINT, STAGE_1, STAGE_3, TINY, call, folders, result


def check_confusion(record, n_queries):
    rows = record["confusion"]
    assert sum(sum(row.values()) for row in rows.values()) == n_queries
    right = sum(row.get(name, 0) for name, row in rows.items())
    assert 100 * right / n_queries == pytest.approx(record["accuracy"], abs=0.01)
    for name, row in record["confusion"].items():
        share = 100 * row.get(name, 0) / sum(row.values())
        assert share == pytest.approx(record["accuracy_per_class"][name], abs=0.01)


def test_the_confusion_of_every_stage_matches_its_accuracies(aligned, tmp_path):
    check_confusion(result(aligned, STAGE_1), 6 * 3 * 3)
    record = result(aligned, STAGE_3)
    check_confusion(record, 3 * 3 * 3)
    check_confusion(record["fine_tuning"], 3 * 3 * 3)
    trained = aligned / "results" / "models" / CHECKPOINT
    meta = [*TINY, "--method", "ProtoNet", "--n_epoch", 0, "--n_episodes", 6, "--init_from", trained]
    outcome = call("metaLearning", *meta, *folders(aligned), "--results_dir", tmp_path)
    assert outcome.status == 0, outcome.err
    check_confusion(json.loads(next((tmp_path / "tables").glob("*.json")).read_text()), 6 * 3 * 3)


def test_accuracies_are_percent_pooled_and_of_each_episode_and_class():
    """Two episodes of 2 ways, 4 queries each: 3 of 4 and 4 of 4 right, then 2 of 4 and 1 of 4."""
    scores = EpisodeScores(torch.tensor([[[3, 1], [0, 4]], [[2, 2], [3, 1]]]))
    episodes = Episodes(torch.zeros(2, 2, 5, dtype=torch.long), torch.tensor([[0, 1], [2, 0]]), 1)
    record = accuracy_record(scores, episodes, ["ant", "bee", "cat"])
    assert record["accuracy_per_episode"] == [87.5, 37.5] and record["accuracy"] == 62.5
    assert record["ci95"] == pytest.approx(12.7062 * 25, abs=0.01)  # standard error: half the distance of two values
    assert record["accuracy_per_class"] == {"ant": 50.0, "bee": 100.0, "cat": 50.0}
    assert record["confusion"]["ant"] == {"ant": 4, "bee": 1, "cat": 3}
    check_confusion(record, 16)
    assert accuracy_record(EpisodeScores(scores.counts[:1]), episodes.slice(0, 1), ["ant", "bee"])["ci95"] is None
    assert interval({"accuracy": 71.45, "ci95": 0.72}) == "71.45 ± 0.72"  # of an earlier version


def right(*percent):
    """Scores of 2-way episodes of 100 queries per class, of which so many are right."""
    return EpisodeScores(torch.tensor([[[n, 100 - n], [100 - n, n]] for n in percent]))


def test_a_paired_difference_has_the_interval_of_the_differences():
    before, after, classes = right(20, 80, 20, 80), right(21, 83, 21, 83), torch.arange(8).view(4, 2)
    found = difference_record(before, after, classes)
    assert found["accuracy"] == pytest.approx(2)
    assert found["ci95"] == pytest.approx(3.1824 * (4 / 3) ** 0.5 / 2, rel=1e-4)
    assert found["ci95_classes"] is None  # four episodes tell nothing of other classes
    assert difference_record(after, before, classes)["accuracy"] == pytest.approx(-2)


def test_the_intervals_over_classes_are_those_of_the_differences():
    """Half of the classes gain 30 points and half 10; each episode's accuracy is another."""
    classes = torch.rand(80, 12, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :2]
    gain, before = 10 + 10 * (classes < 6).sum(1), torch.arange(80) % 60
    first, second = right(*before.tolist()), right(*(before + gain).tolist())
    found, episodes = difference_record(first, second, classes), Episodes(torch.zeros(80, 2, 3), classes, 1)
    assert found["ci95_classes"] == pytest.approx(ci95_over_classes(gain, classes))
    assert 1 < found["ci95"] < 2 < found["ci95_classes"] < 10
    record = accuracy_record(first, episodes, [f"c{i}" for i in range(12)])
    assert record["ci95_classes"] == round(100 * ci95_over_classes(first.accuracy, classes), 3)
    assert interval({"accuracy": 30, "ci95": 2, "ci95_classes": 5.0}) == "30.00 ± 2.00 (5.00)"
    assert not class_notes(episodes) and "is missing from 7 episodes alone" in class_notes(episodes.slice(0, 10))[0]


def test_a_curve_is_accuracy_and_gain_at_every_recorded_iteration():
    accuracy = torch.tensor([[0.2, 0.4, 0.3], [0.6, 0.8, 0.9]])
    rows = curve_record(accuracy, 5)
    assert [row["iteration"] for row in rows] == [0, 5, 10]
    assert [row["accuracy"] for row in rows] == pytest.approx([40, 60, 60])
    assert [row["gain"] for row in rows] == pytest.approx([0, 20, 20])
    assert [row["gain_ci95"] for row in rows] == pytest.approx([0, 0, 12.7062 * 10], abs=1e-4)
    assert rows[1]["ci95"] == pytest.approx(12.7062 * 20)
    assert curve_record(accuracy, 0) == []
