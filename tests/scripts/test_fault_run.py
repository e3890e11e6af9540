"""The long fault run, for some seconds of it: python -m tests.fault_run."""

import random
import subprocess

import pytest

from tests.helpers import run

pytest.importorskip("resource")  # fork and limits are POSIX's
fault_run = pytest.importorskip("tests.fault_run")


def test_runs_under_faults_end_as_those_without(tmp_path):
    flags = ["--sequence", 0, "--seed", 10, "--max_ranks", 1, "--folder", tmp_path]
    done = run("-m", "tests.fault_run", *flags, check=False)
    assert "SIGKILL at a cache " in done.stdout
    assert done.returncode == 0 and " as without faults, 0 not" in done.stdout, done
    assert not list(tmp_path.iterdir())


def test_a_signal_to_a_run_that_has_ended_is_too_late(tmp_path):
    class Ended:
        def start(self, script, flags, output, max_bytes):
            output.touch()
            self.process = subprocess.Popen(["true"])
            return self.process.pid

        def wait(self):
            return self.process.wait()

    case = fault_run.Case(tmp_path, "base", 1, random.Random(0), [Ended()])
    assert fault_run.signalled(case, "SIGKILL") == "too late" and not case.moment and not case.wrong


def test_what_no_run_owns_or_no_fault_explains_is_seen(tmp_path):
    case = fault_run.Case(tmp_path, "base", 1, random.Random(0), [])
    (tmp_path / "results" / "models").mkdir(parents=True)
    before = fault_run.left(case)
    (tmp_path / "results" / "models" / ".x_last.tar.17.tmp").write_bytes(b"")
    assert fault_run.left(case).keys() - before.keys() == {"results/models/.x_last.tar.17.tmp"}
    for status, said in ((0, "Traceback (most recent call last):"), (2, "error: one\nerror: two"), (-9, ""), (1, "")):
        (tmp_path / "out").write_text(said)
        assert case.outcome(status, "full disk") == "wrong"
    (tmp_path / "out").write_text("error: one line")
    assert case.outcome(2, "full disk") == "one line" and len(case.wrong) == 4
