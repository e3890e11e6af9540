"""A lock on the files of a run: who holds it is said, and it ends with its process."""

import os
import platform
import signal
import subprocess
import sys

import pytest

from engine import lock
from engine.errors import UserError
from tests.helpers import ROOT

pytest.importorskip("fcntl")
HOLD = "import sys, engine.lock as lock; owner = set(); lock.hold(lock.Path(sys.argv[1]), owner); print('held')\n"
HOLD += "sys.stdout.flush(); sys.stdin.read()"


class Owner:
    """What a lock is held for."""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock at tmp_path / 'lock'."""
    command = [sys.executable, "-c", HOLD.replace("set()", "type('Owner', (), {})()"), str(tmp_path / "lock")]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait(20)
    process.stdout.close()


def test_the_second_is_told_who_the_first_is_until_that_has_ended(tmp_path, other):
    path, owner = tmp_path / "lock", Owner()
    with pytest.raises(UserError, match="another run is at work on these files") as error:
        lock.hold(path, owner)
    who = f"process {other.pid} on {platform.node()} since 20"
    assert who in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    other.stdin.close()
    other.wait(20)
    assert not path.exists()
    lock.hold(path, owner)
    assert f"process {os.getpid()} on" in path.read_text()


def test_a_killed_process_holds_nothing(tmp_path, other, capsys):
    other.send_signal(signal.SIGKILL)
    other.wait(20)
    assert (tmp_path / "lock").exists()
    owner = Owner()
    lock.hold(tmp_path / "lock", owner)
    assert capsys.readouterr().out == ""  # it was of this machine, so that it is known to have ended
    del owner
    assert not (tmp_path / "lock").exists()


def test_a_lock_whose_file_was_removed_while_it_was_taken_keeps_nobody_out(tmp_path, monkeypatch):
    """The holder before releases between our opening of the file and our locking of it."""
    path, flock, first = tmp_path / "lock", lock.flock, Owner()
    lock.hold(path, first)
    held = [first]
    del first

    def release_and_lock(file, how):
        held.clear()
        flock(file, how)

    monkeypatch.setattr(lock, "flock", release_and_lock)
    owner = Owner()
    lock.hold(path, owner)
    assert f"process {os.getpid()} on" in path.read_text()


def test_where_it_cannot_be_known_it_is_said(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(95, "Operation not supported")

    path, owner = tmp_path / "lock", Owner()
    path.write_text("process 1 on elsewhere since 2026-01-02 03:04:05\n")
    lock.hold(path, owner)
    said = capsys.readouterr().out
    assert "cannot be known" in said and "process 1 on elsewhere since 2026-01-02" in said and said.count("\n") == 1
    for flock, part in ((fail, "not supported"), (None, "no locks")):
        monkeypatch.setattr(lock, "flock", flock)
        lock.hold(tmp_path / "other", Owner())
        said = capsys.readouterr().out
        assert "cannot be known" in said and part in said and said.count("\n") == 1


def test_a_signal_while_a_lock_is_released_is_late(tmp_path, monkeypatch, capfd):
    path, owner, unlink = tmp_path / "lock", Owner(), lock.Path.unlink

    def interrupted(self):
        monkeypatch.setattr(lock.Path, "unlink", unlink)
        raise KeyboardInterrupt

    lock.hold(path, owner)
    monkeypatch.setattr(lock.Path, "unlink", interrupted)
    del owner
    assert not path.exists() and capfd.readouterr().err == ""
