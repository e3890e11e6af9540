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
HOLD = "import sys, engine.lock as lock; file = lock.hold(lock.Path(sys.argv[1])); print('held')\n"
HOLD += "sys.stdout.flush(); sys.stdin.read()"


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock at tmp_path / 'lock'."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait(20)
    process.stdout.close()


def test_the_second_is_told_who_the_first_is_until_that_has_ended(tmp_path, other):
    path = tmp_path / "lock"
    with pytest.raises(UserError, match="another run .process") as error:
        lock.hold(path)
    who = f"process {other.pid} on {platform.node()} since 20"
    assert who in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    other.stdin.close()
    other.wait(20)
    with lock.hold(path):
        assert path.read_text().startswith(f"process {os.getpid()} on ")


def test_a_killed_process_holds_nothing_and_one_process_may_hold_a_lock_twice(tmp_path, other, capsys):
    other.send_signal(signal.SIGKILL)
    other.wait(20)
    lock.hold(tmp_path / "lock").close()
    with lock.hold(tmp_path / "lock"), lock.hold(tmp_path / "lock"):
        pass
    assert (tmp_path / "lock").read_text().count("process") == 1 and capsys.readouterr().out == ""


def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(95, "Operation not supported")

    for flock, part in ((fail, "not supported"), (None, "no flock")):
        monkeypatch.setattr(lock, "flock", flock)
        lock.hold(tmp_path / "lock").close()
        said = capsys.readouterr().out
        assert "cannot be known" in said and part in said and said.count("\n") == 1
