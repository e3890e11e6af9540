"""Result files: what JSON holds, that a failing write loses nothing, and how a result was made."""

import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from engine import records
from engine.errors import UserError
from engine.records import duration, git_commit, provenance, write_json
from engine.run import Run


def test_json_holds_null_for_nan_and_text_for_paths(tmp_path):
    record = {"ci95": math.nan, "list": [math.inf, 1.5, (Path("a") / "b", None)], 5: {"deep": -math.inf}, "ok": True}
    write_json(tmp_path / "tables" / "result.json", record)
    text = (tmp_path / "tables" / "result.json").read_text()
    expected = {"ci95": None, "list": [None, 1.5, [str(Path("a") / "b"), None]], "5": {"deep": None}, "ok": True}
    assert json.loads(text, parse_constant=pytest.fail) == expected


def test_a_duration_is_in_a_unit_that_reads_well():
    assert [duration(seconds) for seconds in (0.4, 42, 725, 12600)] == ["0 s", "42 s", "12 min", "3.5 h"]


def test_a_failing_write_leaves_the_previous_result_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"accuracy": 1})

    def replace(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match=r"result\.json cannot be written"):
        write_json(path, {"accuracy": 2})
    assert json.loads(path.read_text()) == {"accuracy": 1} and list(tmp_path.iterdir()) == [path]


def test_a_result_says_how_it_was_made(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/transferLearning.py", "--n_shot", "1"])
    record = provenance({"n_shot": 1, "method": "arcMax"}, Run(seed=4))
    assert record["command"] == "python transferLearning.py --n_shot 1"
    assert record["seed"] == 4 and record["config"]["method"] == "arcMax" and record["device"].startswith("cpu")
    assert record["versions"]["torch"] == torch.__version__
    json.dumps(record)


def test_the_commit_is_a_hash_or_unknown(tmp_path, monkeypatch):
    assert re.fullmatch(r"[0-9a-f]{12,40}(-dirty)?|unknown", git_commit())
    monkeypatch.setattr(records, "REPOSITORY", tmp_path)
    assert git_commit() == "unknown"


def test_the_commit_is_found_without_a_write_to_the_repository(tmp_path, monkeypatch):
    who = ["-c", "user.name=a", "-c", "user.email=a"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "first"]):
        (tmp_path / "x").write_text("1")
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(records, "REPOSITORY", tmp_path)
    os.utime(tmp_path / "x", (1, 1))
    before = (tmp_path / ".git" / "index").read_bytes()
    commit = git_commit()
    (tmp_path / "x").write_text("2")
    assert re.fullmatch("[0-9a-f]{12}", commit) and git_commit() == f"{commit}-dirty"
    assert (tmp_path / ".git" / "index").read_bytes() == before
