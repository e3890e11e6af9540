"""Files are written whole or not at all, and read without running anything of them."""

import io
import os
import pickle
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from engine import files
from engine.errors import UserError
from engine.files import (
    FLAGS,
    atomic_file,
    folder_name,
    load_tensors,
    matches_schema,
    read_json,
    read_record,
    save_atomically,
    weights_digest,
)
from tests.helpers import ROOT


def test_what_is_saved_comes_back_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "new" / "state.tar"
    for content in ({"weight": torch.zeros(2)}, {"weight": torch.arange(3.0), "epoch": 4, "best": [0.5, None]}):
        save_atomically(path, content)
        found = load_tensors(path)
        assert found.keys() == content.keys() and torch.equal(found.pop("weight"), content.pop("weight"))
        assert found == content
    assert [file.name for file in path.parent.iterdir()] == ["state.tar"]


def test_an_error_inside_leaves_the_file_that_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    full, memory = OSError("disk is\nfull"), RuntimeError("out of memory")
    for error, raised in ((ZeroDivisionError(), ZeroDivisionError), (full, UserError), (memory, RuntimeError)):
        with pytest.raises(raised), atomic_file(path) as temporary:
            temporary.write_text("half")
            raise error
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="whether a process lives is known on POSIX alone")
def test_an_interruption_of_a_write_is_one(tmp_path, monkeypatch):
    class Interrupted(io.FileIO):
        def write(self, content):
            if self.tell() > 1000:
                raise KeyboardInterrupt
            return super().write(content)

    save_atomically(tmp_path / "x.tar", {"x": 1})
    before = (tmp_path / "x.tar").read_bytes()
    monkeypatch.setattr(files, "open", lambda path, mode: Interrupted(path, "w"), raising=False)
    with pytest.raises(KeyboardInterrupt):
        save_atomically(tmp_path / "x.tar", {"x": torch.zeros(9999)})
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_what_a_killed_process_left_of_a_file_is_removed_and_nothing_of_others(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    here, path = platform.node(), tmp_path / "table[1].csv"
    left, *others = (
        tmp_path / f".{name}.tmp"
        for name in (f"{path.name}.{here}.{dead.pid}", f"{path.name}.{here}.1", f"{path.name}.else.{dead.pid}")
    )
    for file in (left, *others):
        file.write_text("half")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
    assert {*tmp_path.iterdir()} == {path, *others}


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"weight": 1})])
def test_what_is_no_file_of_ours_is_not_unpickled(tmp_path, content):
    (tmp_path / "state.tar").write_bytes(content)
    with pytest.raises(ValueError, match="no file of torch.save"):
        load_tensors(tmp_path / "state.tar")


SCHEMA = {"epoch": int, "state": dict[str, torch.Tensor]}
CONFIG = {"lr": 1e-3, "flip": True, "file": None, "crop": [0.1, 1], "name": "x"}
RECORD = {"format": "ours/1", "epoch": 3, "state": {"weight": torch.zeros(2)}}


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda record: [record], "it has no format 'ours/1'"),
        (lambda record: record | {"format": "other"}, "it has no format 'ours/1'"),
        (lambda record: record | {"format": torch.zeros(2)}, "it has no format 'ours/1'"),
        (lambda record: {"format": "ours/1", "epoch": 3}, "it lacks 'state'"),
        (lambda record: record | {"epoch": "3"}, "its 'epoch' is of another type"),
    ],
)
def test_a_record_that_is_not_of_its_schema_is_one_line(tmp_path, change, reason):
    path = tmp_path / "state.tar"
    save_atomically(path, RECORD | {"more": None})
    assert read_record(path, "ours/1", SCHEMA, "state", "start anew")["epoch"] == 3
    torch.save(change(RECORD), path)
    with pytest.raises(UserError) as error:
        read_record(path, "ours/1", SCHEMA, "state", "start anew")
    assert str(error.value) == f"{path} is not a state of this project, or is damaged ({reason}): start anew"


def test_a_record_that_is_missing_or_no_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no state .*state\.tar: start anew"):
        read_record(tmp_path / "state.tar", "ours/1", SCHEMA, "state", "start anew")
    os.mkfifo(tmp_path / "state.tar")
    with pytest.raises(UserError, match="it is no regular file"):
        read_record(tmp_path / "state.tar", "ours/1", SCHEMA, "state", "start anew")


@pytest.mark.parametrize(
    "value, kind, fits",
    [
        (CONFIG, FLAGS, True),
        (CONFIG | {"lr": torch.zeros(2)}, FLAGS, False),
        (CONFIG | {"crop": [[1]]}, FLAGS, False),
        (CONFIG | {1: 2}, FLAGS, False),
        ([], FLAGS, False),
        (3, float, True),
        (True, float, False),
        (3.0, int, False),
        (2**63, int, False),
        ("x", str | None, True),
        ("\ud800", str, False),
        (torch.zeros(1).expand(10**12), torch.Tensor, False),
        (torch.eye(2).to_sparse(), torch.Tensor, False),
        (torch.zeros(3, device="meta"), torch.Tensor, False),
        (torch.zeros(2, 3).T, torch.Tensor, True),
        (torch.zeros(2), float, False),
        ({"a": {"b": [1, 2]}}, {"a": {"b": list[int]}}, True),
        ({"a": {"b": [1.5]}}, {"a": {"b": list[int]}}, False),
        ({"a": []}, {"a": {"b": list[int]}}, False),
        ([{"a": 1}], [{"a": int}], True),
    ],
)
def test_types_are_those_of_plain_values(value, kind, fits):
    assert matches_schema(value, kind) == fits


@pytest.mark.parametrize(
    "content, reason",
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("{", "line 1"),
        (b"\xff", "utf-8"),
    ],
    ids=["lists", "objects", "half", "no text"],
)
def test_json_that_is_none_is_a_line(tmp_path, content, reason):
    path = tmp_path / "result.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for lines in (False, True):
        with pytest.raises(ValueError, match=reason) as error:
            read_json(path, lines)
        assert "\n" not in str(error.value)


def test_json_is_read_whole_by_lines_and_from_files_alone(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n[2]\n')
    assert read_json(tmp_path / "rows.jsonl", lines=True) == [{"a": 1}, [2]]
    (tmp_path / "one.json").write_text('{"a":\n1}')
    assert read_json(tmp_path / "one.json") == {"a": 1}
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="no regular file"):
        read_json(tmp_path / "pipe.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/", "a\\b", "a\nb", "a\x00", "\udcff"])
def test_a_name_that_is_not_one_folder_is_refused(name):
    for good in ("miniImagenet", "FC100", "..x", ".hidden", "cät", "my photos"):
        assert folder_name(good) == good
    with pytest.raises(UserError, match="is not the name of one folder") as error:
        folder_name(name)
    assert "\n" not in str(error.value)


def test_a_digest_follows_from_names_weights_statistics_and_facts():
    layers = [nn.BatchNorm1d(3) for _ in range(3)]
    layers[1].weight.data[1] += 1e-6
    layers[2].running_mean[2] = 1.0
    digests = {weights_digest(layer) for layer in layers}
    assert weights_digest(nn.BatchNorm1d(3)) in digests and {len(digest) for digest in digests} == {16}
    digests |= {weights_digest(nn.Sequential(layers[0])), weights_digest(layers[0], "map")}
    assert len(digests) == 5


def test_json_is_read_as_utf_8_whatever_the_locale(tmp_path):
    (tmp_path / "result.json").write_text('{"class": "kümmel"}', encoding="utf-8")
    code = "import sys, pathlib, engine.files as f; print(ascii(f.read_json(pathlib.Path(sys.argv[1]))))"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "result.json"],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout == "{'class': 'k\\xfcmmel'}\n", done.stderr[-1000:]
