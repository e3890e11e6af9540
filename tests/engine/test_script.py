"""How a script ends: exit statuses, and Ctrl-C while a stage runs."""

import os
import signal
import sys
import threading

import pytest
import torch

from engine.errors import UserError
from engine.script import run_command, run_script, script_command


def status_of(main, capsys, *memory_flags):
    with pytest.raises(SystemExit) as end:
        run_script(main, *memory_flags)
    out, err = capsys.readouterr()
    assert out == ""
    return end.value.code, err


def test_a_user_error_is_one_line_and_status_2(capsys):
    def main():
        raise UserError("class 'heron' has 12 images")

    assert status_of(main, capsys) == (2, "error: class 'heron' has 12 images\n")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 TiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB\nsee the documentation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes"),
    ],
)
def test_out_of_memory_is_one_line_that_names_the_flags(capsys, error):
    def main():
        raise error

    reason = str(error).splitlines()[0]
    said = f"error: out of memory ({reason}): give a smaller --batch_size or --img_size\n"
    assert status_of(main, capsys, "--batch_size or --img_size") == (2, said)


def test_ctrl_c_is_one_line_and_status_130(capsys):
    def main():
        raise KeyboardInterrupt

    assert status_of(main, capsys) == (130, "interrupted\n")


def test_sigterm_does_what_ctrl_c_does_and_a_second_signal_does_not_disturb_what_saves(capsys):
    saved = []

    def main():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.wait(5)
        except KeyboardInterrupt:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            saved.append(1)
            raise KeyboardInterrupt("interrupted: saved") from None

    ended, before = threading.Event(), signal.getsignal(signal.SIGTERM)
    assert status_of(main, capsys) == (130, "interrupted: saved\n")
    assert saved == [1] and signal.getsignal(signal.SIGTERM) == before


def test_after_a_signal_that_python_drops_in_a_finalizer_the_next_one_interrupts(capsys):
    class Last:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    def main():
        Last()
        os.kill(os.getpid(), signal.SIGTERM)
        ended.wait(5)

    ended, hook = threading.Event(), sys.unraisablehook
    assert status_of(main, capsys) == (130, "interrupted\n")
    assert sys.unraisablehook is hook


def test_control_characters_of_a_path_or_name_are_shown_as_escapes(capsys):
    def main():
        raise UserError("no file a\nb\x1b[31m\udcffé")

    assert status_of(main, capsys) == (2, "error: no file a\\nb\\x1b[31m\\udcffé\n")


def test_success_exits_normally_and_a_bug_keeps_its_traceback():
    ran = []
    run_script(lambda: ran.append(1))
    assert ran == [1]
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


@pytest.mark.parametrize("both", [True, False], ids=["a terminal's Ctrl-C", "a signal to this process alone"])
def test_ctrl_c_waits_until_the_stage_has_saved_its_state(tmp_path, both):
    stage = tmp_path / "stage.py"
    stage.write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n"
        "    pathlib.Path(sys.argv[1], 'started').write_text(str(__import__('os').getpid()))\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(0.5)\n"
        "    pathlib.Path(sys.argv[1], 'saved').touch()\n"
    )

    def interrupt():
        while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
            ended.wait(0.02)
        for pid in [int((tmp_path / "started").read_text())] * both + [os.getpid()]:
            os.kill(pid, signal.SIGINT)

    ended, before = threading.Event(), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run_command(script_command(str(stage), [str(tmp_path)]), 5.0 if both else 0.1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "saved").exists()
