"""The metrics of a run, line by line, and the same in TensorBoard."""

import sys
import types

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


class Writer:
    """What a SummaryWriter was given."""

    made: list["Writer"] = []

    def __init__(self, log_dir, purge_step):
        self.log_dir, self.purge_step, self.scalars = log_dir, purge_step, {}
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value

    def flush(self):
        pass


@pytest.fixture
def writers(monkeypatch):
    """The SummaryWriters made, by a TensorBoard that is installed for the test."""
    monkeypatch.setattr(Writer, "made", [])
    monkeypatch.setitem(sys.modules, TENSORBOARD, types.SimpleNamespace(SummaryWriter=Writer))
    return Writer.made


def scalars(rows, step):
    return {(key, row[step]): value for row in rows for key, value in row.items()}


def test_tensorboard_gets_the_numbers_of_the_metrics(aligned_copy, writers):
    stale = aligned_copy / "results" / "logs" / STAGE_3 / "events.out.tfevents.1.x"
    stale.write_text("of an earlier run")
    align(aligned_copy, "--tensorboard", "--overwrite")
    (writer,) = writers
    assert writer.log_dir == str(stale.parent) and writer.purge_step == 0 and not stale.exists()
    assert writer.scalars == scalars(metrics(aligned_copy), "episode")
    outcome = call("transferLearning", *TRAIN, *folders(aligned_copy), "--tensorboard", "--overwrite")
    assert outcome.status == 0, outcome.err
    assert writers[1].scalars == scalars(metrics(aligned_copy, f"{RUN}_bestModel"), "epoch")


def test_tensorboard_goes_on_where_a_resumed_run_does(aligned_copy, writers):
    align(aligned_copy, "--n_episodes", 2, "--tensorboard", results="short")
    align(aligned_copy, "--resume", "--tensorboard", results="short")
    assert [writer.purge_step for writer in writers] == [0, 2]
    assert {step for _, step in writers[1].scalars} == {2}


@pytest.mark.parametrize("script", ["transferLearning", "metaLearning", "associative_alignment"])
def test_tensorboard_that_is_not_installed_is_one_clear_line(tmp_path, monkeypatch, script):
    monkeypatch.setitem(sys.modules, TENSORBOARD, None)
    outcome = call(script, "--dataset", "tiny", *folders(tmp_path), "--tensorboard")
    assert outcome.status == 2 and "pip install tensorboard" in outcome.err and outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
