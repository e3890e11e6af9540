"""The study of images of other classes: its table, and its bad inputs."""

import pytest

from tests.helpers import CHECKPOINT, call


def outsiders(root, *flags):
    where = ["--benchmarks_dir", root / "benchmarks", "--cache_dir", root / "cache", "--dataset", "tiny", "--quiet"]
    checkpoint = ["--checkpoint", root / "results" / "models" / CHECKPOINT]
    return call("docs.outsiders", *checkpoint, *where, "--n_episodes", 3, "--n_way", 2, *flags)


def test_the_table_has_a_row_per_rule(workspace):
    outcome = outsiders(workspace, "--n_shot", 1, 2, "--n_query", 2)
    assert outcome.status == 0, outcome.err
    rows = [line for line in outcome.out.splitlines() if " %" in line]
    assert len(rows) == 20 and sum("(today)" in row for row in rows) == 2
    assert all(("±" in row) != ("(today)" in row) for row in rows)


@pytest.mark.parametrize("flags, message", [(["--n_way", 1], "--n_way 2"), (["--split", "base"], "invalid choice")])
def test_bad_inputs_are_one_line(workspace, flags, message):
    outcome = outsiders(workspace, *flags)
    assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1, outcome.err
