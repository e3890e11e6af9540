"""Result records: their accuracies and confusion agree, in every stage."""

import json

import pytest

from reporting.result_figures import as_matrix
from tests.helpers import CHECKPOINT, STAGE_1, STAGE_3, TINY, call, folders, result


def check_confusion(record, n_queries):
    _, counts = as_matrix(record["confusion"])
    assert counts.sum() == n_queries
    assert 100 * counts.diagonal().sum().item() / n_queries == pytest.approx(record["accuracy"], abs=0.01)
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
    check_confusion(json.loads(next((tmp_path / "tables").iterdir()).read_text()), 6 * 3 * 3)
