"""The device and the memory that a run has."""

import os
import platform
import sys

import pytest
import torch
from tqdm import tqdm

from engine import run
from engine.distributed import ALONE, Ranks
from engine.errors import UserError
from engine.run import Run, move_if_fits, on_own_threads, select_device, start_run


def with_accelerators(monkeypatch, cuda, mps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize("cuda, mps, expected", [(1, 1, "cuda"), (1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_auto_takes_the_best_device_there_is(monkeypatch, cuda, mps, expected):
    with_accelerators(monkeypatch, cuda, mps)
    assert select_device("auto") == torch.device(expected)
    assert select_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name, there", [("cuda", "mps, cpu"), ("mps", "cuda, cpu")])
def test_a_device_that_is_not_there_is_a_user_error(monkeypatch, name, there):
    with_accelerators(monkeypatch, name != "cuda", name != "mps")
    with pytest.raises(UserError, match=f"--device {name} is not available.*auto or one of {there}"):
        select_device(name)


def test_starting_on_a_gpu_asks_for_operations_that_repeat_themselves(monkeypatch):
    asked = []
    with_accelerators(monkeypatch, True, False)
    monkeypatch.setattr(run.torch, "use_deterministic_algorithms", lambda mode, warn_only: asked.append(warn_only))
    monkeypatch.setattr(run.torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for device in ("cpu", "cuda"):
        assert start_run(ALONE, device, "fp32", 0, True, True).device.type == device
        assert asked == [True] * (device == "cuda")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("no_keep_memory", [False, True])
def test_starting_on_a_cpu_keeps_memory_unless_told_not_to(monkeypatch, no_keep_memory):
    calls = []
    monkeypatch.setattr(run, "keep_memory", lambda: calls.append(1))
    found = start_run(ALONE, "cpu", "bf16", 3, False, no_keep_memory)
    assert found.device.type == "cpu" and found.precision.name == "bf16" and len(calls) == (not no_keep_memory)
    assert (found.ranks, found.seed, found.quiet) == (ALONE, 3, False)


@pytest.mark.parametrize(("device", "precision"), [("cpu", "fp32"), ("cuda", "fp16")])
def test_cuda_graphs_are_refused_where_they_cannot_be_recorded(monkeypatch, device, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="--cuda_graphs is for one process on a CUDA GPU, in fp32 or bf16"):
        start_run(ALONE, device, precision, 0, True, True, cuda_graphs=True)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_kept_memory_is_used_again_without_page_faults():
    import resource

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(2**22)  # 16 MiB, 4096 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    run.keep_memory()
    faults()
    assert faults() < 4096


def test_on_a_cpu_images_stay_mapped():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert move_if_fits(images, torch.device("cpu")) is images


def test_ranks_have_a_gpu_each_or_share_the_cpu(monkeypatch):
    with_accelerators(monkeypatch, True, True)
    assert start_run(Ranks(1, 2, 1), "cpu", "fp32", 0, True, True).device == torch.device("cpu")
    with pytest.raises(UserError, match="mps is for one process"):
        select_device("mps", Ranks(0, 2, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert select_device("auto", Ranks(5, 8, 1)) == torch.device("cuda", 1) and chosen == [1]
    with pytest.raises(UserError, match="2 CUDA GPUs here: give a smaller --nproc_per_node"):
        select_device("cuda", Ranks(2, 4, 2))


def log_of(monkeypatch, capsys, seconds, **options):
    """What a loop of 10 items writes into a log, when each takes so many seconds."""
    now = [0.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    bar = Run(quiet=False).bar(range(10), "novel episodes", "episode", **options)
    bar._time = lambda: now[0]
    bar.start_t = bar.last_print_t = 0.0
    for _ in bar:
        now[0] += seconds
        bar.set_postfix_str("accuracy 50", refresh=False)
    return capsys.readouterr().err


def test_a_log_has_a_line_every_30_seconds_of_a_long_loop(monkeypatch, capsys):
    lines = log_of(monkeypatch, capsys, seconds=10).splitlines()
    assert [line.split(",")[0] for line in lines] == [f"novel episodes: {n} of 10 (episode)" for n in (3, 6, 9, 10)]
    assert lines[0].endswith("accuracy 50") and "\r" not in "".join(lines)
    assert log_of(monkeypatch, capsys, seconds=1) == ""
    assert log_of(monkeypatch, capsys, seconds=10, leave=False) == ""  # such as that of an epoch, which has its line


def test_bars_are_for_terminals_and_not_for_quiet_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for quiet, name, seen in ((False, "epoch 1", True), (True, "epoch 1", False), (False, "", False)):
        assert list(Run(quiet=quiet).bar(range(3), name, "batch")) == [0, 1, 2]
        assert ("100%" in capsys.readouterr().err) == seen


@pytest.mark.parametrize("n, most, sizes", [(7, 10, {4, 3}), (7, 2, {2, 1}), (1, 10, {1}), (0, 10, set())])
def test_numbers_are_worked_on_in_order_a_part_per_thread(n, most, sizes):
    n_threads, seen = torch.get_num_threads(), []

    def work(part):
        seen.append((len(part), torch.get_num_threads()))
        return (10 * i for i in part)

    torch.set_num_threads(2)
    assert list(on_own_threads(work, range(3, 3 + n), most)) == [10 * i for i in range(3, 3 + n)]
    assert torch.get_num_threads() == 2 and {size for size, _ in seen} == sizes and {t for _, t in seen} <= {1}
    torch.set_num_threads(n_threads)
