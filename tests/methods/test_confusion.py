"""Predictions counted by true and predicted class."""

import torch

from data.episodes import Episodes
from methods.confusion import confusion_matrix, confusion_record, count_predictions
from methods.evaluation import score_queries
from reporting.result_figures import as_matrix


def test_predictions_are_counted_by_true_and_predicted_class():
    scores = torch.tensor([[3.0, 1, 0], [0, 3, 1], [0, 2, 1], [0, 2, 1], [0, 0, 1], [5, 1, 0]])
    counts = count_predictions(scores, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert score_queries(scores, 3).tolist() == [0.5, 1.0, 0.5]
    assert torch.equal(count_predictions(scores.expand(4, 2, 6, 3), 3), counts.expand(4, 2, 3, 3))


def test_counts_are_summed_by_class_over_episodes():
    counts = torch.tensor([[[3, 1], [2, 2]], [[4, 0], [1, 3]]])
    classes = torch.tensor([[2, 0], [0, 3]])
    total = confusion_matrix(counts, classes, 4)
    assert total.tolist() == [[6, 0, 2, 0], [0, 0, 0, 0], [1, 0, 3, 0], [1, 0, 0, 3]]
    record = confusion_record(counts, Episodes(torch.zeros(2, 2, 5), classes, 1), ["ant", "bee", "cat", "dog"])
    assert record == {"ant": {"ant": 6, "cat": 2}, "cat": {"ant": 1, "cat": 3}, "dog": {"ant": 1, "dog": 3}}
    names, matrix = as_matrix(record)
    assert names == ["ant", "cat", "dog"] and torch.equal(matrix, total[[0, 2, 3]][:, [0, 2, 3]])
