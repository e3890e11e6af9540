"""The metrics of a run, line by line, and the same in TensorBoard."""

import sys

import pytest

from tests.helpers import RUN, STAGE_3, TRAIN, align, call, folders, metrics, result

TENSORBOARD = "torch.utils.tensorboard"


def test_stage_3_writes_a_line_an_episode(aligned):
    rows, record = metrics(aligned), result(aligned, STAGE_3)
    assert [row["episode"] for row in rows] == [0, 1, 2]
    assert [row["alignment"] for row in rows] == pytest.approx(record["accuracy_per_episode"], abs=0.01)
    assert [row["fine_tuning"] for row in rows] == pytest.approx(
        record["fine_tuning"]["accuracy_per_episode"], abs=0.01
    )
    for row in rows:
        assert row["align_loss"] >= 0 and row["related_loss"] > 0 and row["support_loss"] > 0
        assert 0 < row["n_drawn"] <= 4 and row["n_related"] >= row["n_drawn"] and 0 <= row["n_empty"] < 3


@pytest.mark.parametrize("left", ["nothing", "half a line", "a row too many"])
def test_a_resumed_run_mends_the_metrics(aligned_copy, aligned, left):
    """They follow from the state, whatever the killed run has left of them."""
    align(aligned_copy, "--n_episodes", 2, results="short")
    path = aligned_copy / "short" / "logs" / STAGE_3 / "metrics.jsonl"
    text = path.read_text()
    path.write_text({"nothing": "", "half a line": text[: len(text) // 3], "a row too many": text + text}[left])
    align(aligned_copy, "--resume", results="short")
    assert metrics(aligned_copy, results="short") == metrics(aligned)


def shown(root, run=STAGE_3, results="results"):
    """What TensorBoard reads of a run: {(name, step): value}."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(root / results / "logs" / run)).Reload()
    return {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}


def scalars(rows, step):
    return pytest.approx({(key, row[step]): value for row in rows for key, value in row.items()})


def test_tensorboard_shows_the_numbers_of_the_metrics(aligned_copy):
    stale = aligned_copy / "results" / "logs" / STAGE_3 / "events.out.tfevents.1.x"
    stale.write_text("of an earlier run")
    align(aligned_copy, "--tensorboard", "--overwrite")
    assert shown(aligned_copy) == scalars(metrics(aligned_copy), "episode") and not stale.exists()
    outcome = call("transferLearning", *TRAIN, *folders(aligned_copy), "--tensorboard", "--overwrite")
    assert outcome.status == 0, outcome.err
    run = f"{RUN}_bestModel"
    assert shown(aligned_copy, run) == scalars(metrics(aligned_copy, run), "epoch")


def test_tensorboard_goes_on_where_a_resumed_run_does(aligned_copy):
    align(aligned_copy, "--n_episodes", 2, "--tensorboard", results="short")
    assert {step for _, step in shown(aligned_copy, results="short")} == {0, 1}
    align(aligned_copy, "--resume", "--tensorboard", results="short")
    assert shown(aligned_copy, results="short") == scalars(metrics(aligned_copy, results="short"), "episode")


@pytest.mark.parametrize("script", ["transferLearning", "metaLearning", "associative_alignment"])
def test_tensorboard_that_is_not_installed_is_one_clear_line(tmp_path, monkeypatch, script):
    monkeypatch.setitem(sys.modules, TENSORBOARD, None)
    outcome = call(script, "--dataset", "tiny", "--n_query", 3, *folders(tmp_path), "--tensorboard")
    assert outcome.status == 2 and "pip install tensorboard" in outcome.err and outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
