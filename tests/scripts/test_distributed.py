"""Under torchrun, with 1, 2 and 3 processes that talk by gloo: the same numbers, one writer, and no lost work."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from persistence import chosen_setting
from persistence.checkpoints import load_checkpoint
from tests.helpers import FEW_EPISODES, ROOT, TINY, call, folders, make_benchmark, numbers

fcntl = pytest.importorskip("fcntl")

SHOWN = [*(flag for flag in TINY if flag != "--quiet"), "--ft_n_epoch", 10]  # not quiet, but for later ranks
# 48 base images: the last batch has two, so that of three ranks one has none.
TRAIN = [*SHOWN, "--batch_size", 23, "--val_episodes", 40, "--n_episodes", 40]
ALIGN = [*SHOWN, "--n_episodes", 33, "--align_iters", 2, "--aug_size", 4, "--n_B", 2, "--record_curve", 1]
ALIGN += ["--save_episode", 6]  # which the first of several ranks does not align
COMMANDS = {
    "own_bn": ("transferLearning", [*TRAIN, "--n_epoch", 1]),
    "curve": (
        "transferLearning",
        [*TRAIN, "--n_epoch", 3, "--backbone", "custom:tests.helpers:net_without_norms"],
    ),
    "test": ("transferLearning", [*TRAIN, "--n_epoch", 0]),
    "meta": (
        "metaLearning",
        [*SHOWN, "--method", "RelationNet", "--n_way", 3, "--train_n_query", 4, "--episodes_per_epoch", 3]
        + ["--n_epoch", 2, "--val_episodes", 9, "--n_episodes", 40],
    ),
    "align": ("associative_alignment", ALIGN),
    "align_last": ("associative_alignment", [*ALIGN, "--align_blocks", 1]),
    "align_features": ("associative_alignment", [*ALIGN, "--align_blocks", 0]),
    "align_auto": ("associative_alignment", [*SHOWN, "--n_episodes", 33, "--aug_size", 4, "--align_preset", "auto"]),
}
SAME = ("test", "meta", "align", "align_last", "align_features", "align_auto")  # bit for bit, with any number of ranks


def command(finished, name, root):
    """Script and flags of a command whose files lie below root, and whose benchmark and checkpoint are `finished`'s."""
    script, flags = COMMANDS[name]
    flags = [*flags, *folders(root), "--benchmarks_dir", finished / "benchmarks"]
    if name == "test":
        flags += ["--episodes_file", root / "episodes.json"]
    if name == "align_auto":  # its choice is kept beside the checkpoint
        root.mkdir(parents=True)
        flags += ["--init_from", shutil.copy(finished / "start.tar", root)]
    elif name == "test" or name.startswith("align"):
        flags += ["--init_from", finished / "start.tar"]
    return script, list(map(str, flags))


def torchrun(n, folder, runs, fails=None):
    """Run scripts one after another in n ranks, each of which checks more: see rank_checks."""
    folder.mkdir(exist_ok=True)
    job = folder / "job.json"
    job.write_text(json.dumps({"runs": runs, "root": str(folder), "fails": fails}))
    return launch(n, "-m", "tests.rank_checks", str(job))


def launch(n, *what):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), *what],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def outcome(root, name):
    """The numbers of a command, but for the number of processes."""
    found = numbers(root / name, COMMANDS[name][0]) if name != "test" else test_numbers(root / name)
    assert found.pop("n_processes") in (1, 2, 3)
    return found


def test_numbers(root):
    (table,) = (root / "results" / "tables").glob("*.json")
    record = json.loads(table.read_text())
    return {key: record[key] for key in ("accuracy_per_episode", "accuracy_per_class", "ci95", "n_processes")}


test_numbers.__test__ = False


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a benchmark, and all commands run by one process without torchrun."""
    root = tmp_path_factory.mktemp("one")
    make_benchmark(root / "benchmarks" / "tiny")
    for name in COMMANDS:
        script, flags = command(root, name, root / name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chosen_setting, "N_EPISODES", FEW_EPISODES)
            done = call(script, *flags)
        assert done.status == 0, done.err
        if name == "own_bn":
            shutil.copy(next((root / name).rglob("*_bestModel.tar")), root / "start.tar")
    return root


@pytest.fixture(scope="module")
def died(finished, tmp_path_factory):
    """A folder with what is left of the first and the last stage, of two ranks, when one of them has failed or died."""
    root = tmp_path_factory.mktemp("died")
    for name, module, function, n, how in (
        ("curve", "transferLearning", "train_base_epoch", 3, "UserError"),
        ("align", "methods.block_alignment", "align_episode", 10, "killed"),
    ):
        script, flags = command(finished, name, root / name)
        ended = torchrun(2, root, [(script, flags)], fails=[module, function, n, how])
        assert ended.returncode != 0 and f"exitcode  : {9 if how == 'killed' else 2}" in ended.stderr, ended.stderr
        if how == "UserError":
            lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1 and "rank 1 alone; --resume goes on from" in lines[0], ended.stderr
            assert ended.stderr.count("Traceback") == 1, ended.stderr  # torchrun's own
        assert not list((root / name).rglob("tables/*.json"))
    return root


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks_run(request, finished, died, tmp_path_factory):
    """The number of ranks, and a folder with all commands run by so many, and those that had died resumed."""
    root = tmp_path_factory.mktemp(f"ranks{request.param}")
    runs = [command(finished, name, root / name) for name in COMMANDS]
    for name in ("curve", "align"):
        shutil.copytree(died / name, root / "resumed" / name)
        script, flags = command(finished, name, root / "resumed" / name)
        runs.append((script, [*flags, "--resume"]))
    done = torchrun(request.param, root, runs)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, root, done


@pytest.mark.parametrize("name", SAME)
def test_episodic_results_do_not_depend_on_the_number_of_ranks(finished, ranks_run, name):
    _, root, _ = ranks_run
    assert outcome(root, name) == outcome(finished, name)
    if name.startswith("align") and name != "align_auto":
        ours, other = (next((folder / name).rglob("episodes/*.pt")) for folder in (root, finished))
        ours, other = (torch.load(file, weights_only=True) for file in (ours, other))
        assert torch.equal(ours["query"]["after"], other["query"]["after"]) and ours["episode"] == 6
        rows, others = (next((folder / name).rglob("metrics.jsonl")).read_text() for folder in (root, finished))
        assert rows == others
    if name == "test":
        assert (root / name / "episodes.json").read_bytes() == (finished / name / "episodes.json").read_bytes()


def check_same_curve(found, expected):
    for row, other in zip(found["metrics"], expected["metrics"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert row["base_accuracy"] == pytest.approx(other["base_accuracy"], abs=2.1)  # of 48 images, one
        assert row["val_accuracy"] == pytest.approx(other["val_accuracy"], abs=2)


def last_state(root):
    return torch.load(next(root.rglob("*_last.tar")), weights_only=True)


def test_the_same_global_batch_gives_the_same_learning_curve(finished, ranks_run):
    n, root, _ = ranks_run
    check_same_curve(outcome(root, "curve"), outcome(finished, "curve"))
    assert load_checkpoint(next((root / "own_bn").rglob("*_bestModel.tar"))).backbone == "Conv4"
    losses = [outcome(folder, "own_bn")["metrics"][0]["loss"] for folder in (root, finished)]
    assert (losses[0] == losses[1]) == (n == 1)  # batch norm over a part is another training


def test_a_run_of_which_a_rank_died_goes_on_with_any_number_of_ranks(finished, died, ranks_run):
    _, root, done = ranks_run
    n_saved = len(last_state(died / "align")["aligned"])  # what the first rank had done when torchrun ended it as well
    assert last_state(died / "curve")["n_done"] == 2 and 16 <= n_saved <= 23
    assert "resumed after epoch 2" in done.stdout and f"resumed after {n_saved} episodes" in done.stdout
    check_same_curve(outcome(root / "resumed", "curve"), outcome(finished, "curve"))
    assert outcome(root / "resumed", "align") == outcome(finished, "align")


def test_the_first_rank_alone_prints_and_writes(ranks_run):
    """That the others open no file to write is checked by themselves."""
    n, root, done = ranks_run
    assert done.stdout.count("paired difference") == 5
    assert done.stdout.count("epoch   1 ") == 3  # the resumed one has only epoch 2 to do
    assert done.stdout.count("resumed after") == 2
    record = json.loads(next((root / "align").rglob("tables/*.json")).read_text())
    assert record["n_processes"] == n
    assert not [path for path in root.rglob("*.tmp")]
    assert done.stdout.count("; result: ") == len(COMMANDS) + 2  # the first line of each, and of the two resumed


@pytest.fixture
def long_run(finished, tmp_path):
    """A stage 1 of two ranks that takes long: torchrun's process, that of the first rank, and the flags."""
    flags = [*TRAIN, "--n_epoch", 500, *folders(tmp_path), "--benchmarks_dir", finished / "benchmarks"]
    command = ["transferLearning.py", *map(str, flags)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "err", "w") as err:
        launcher = subprocess.Popen(torchrun, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=err)
    while not list(tmp_path.rglob("*_last.tar")) and launcher.poll() is None:
        time.sleep(0.05)
    (lock,) = tmp_path.rglob("tables/.*.lock")
    first = int(lock.read_text().split()[1])
    yield launcher, first, flags
    launcher.kill()
    launcher.wait()


def ended(root):
    """Wait until no process holds a run's lock."""
    for lock in root.rglob(".*.lock"):
        with contextlib.suppress(FileNotFoundError), open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX)


def test_ranks_whose_launcher_was_killed_end_and_let_the_next_run_go_on(long_run, tmp_path):
    launcher, first, flags = long_run
    launcher.kill()
    refused = call("transferLearning", *flags, "--resume")
    assert refused.status == 2 and f"process {first} on " in refused.err and refused.err.count("\n") == 1
    ended(tmp_path)
    n_done = last_state(tmp_path)["n_done"]
    said, deadline = "interrupted; --resume goes on from", time.monotonic() + 60
    while said not in (tmp_path / "err").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert said in (tmp_path / "err").read_text()
    resumed = call("transferLearning", *flags, "--resume", "--n_epoch", n_done + 1)
    assert resumed.status == 0 and f"resumed after epoch {n_done}" in resumed.out
    rows = next(tmp_path.rglob("metrics.jsonl")).read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == list(range(n_done + 1))


def test_a_launcher_that_is_told_to_end_says_how_to_go_on(long_run, tmp_path):
    launcher, _, _ = long_run
    launcher.terminate()
    assert launcher.wait(60) != 0
    said = [line for line in (tmp_path / "err").read_text().splitlines() if "interrupted" in line]
    assert len(said) == 1 and "--resume goes on from" in said[0]


def test_what_the_user_can_mend_is_one_line_of_all_ranks():
    ended = launch(2, "transferLearning.py", "--lr", "nonsense")
    assert ended.returncode != 0 and "exitcode  : 2" in ended.stderr
    assert [line for line in ended.stderr.splitlines() if "error: " in line and "--lr" in line] == [
        "error: argument --lr: invalid number value: 'nonsense' (python transferLearning.py --help explains the flags)"
    ]
    assert ended.stdout == "" and 'transferLearning.py", line' not in ended.stderr
