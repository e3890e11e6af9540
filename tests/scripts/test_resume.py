"""A run that is killed at any moment and resumed ends with the numbers of one that never was; nothing is lost."""

import json
import os
import random
import re
import shutil
import signal
import time
from functools import partial

import pytest
import torch

from persistence.checkpoints import load_checkpoint
from tests.helpers import TINY, Processes, call, folders, make_benchmark, numbers, wait_until

pytest.importorskip("resource")  # fork and limits are POSIX's

COMMANDS = {
    "transferLearning": [*TINY, "--n_epoch", 8, "--batch_size", 16, "--val_episodes", 4, "--ft_n_epoch", 20]
    + ["--n_episodes", 6],
    "metaLearning": [*TINY, "--n_epoch", 8, "--episodes_per_epoch", 3, "--n_way", 3, "--train_n_query", 4]
    + ["--method", "RelationNet", "--val_episodes", 4, "--n_episodes", 6],
    "associative_alignment": [*TINY, "--n_episodes", 17, "--align_iters", 2, "--aug_size", 4, "--n_B", 2]
    + ["--ft_n_epoch", 10, "--record_curve", 1],
}
LAST = {
    "transferLearning": "models/*arcMax*_last.tar",
    "metaLearning": "models/*RelationNet*_last.tar",
    "associative_alignment": "logs/*_last.tar",
}
KILLS = 8  # of each stage


@pytest.fixture(scope="module")
def processes():
    running = Processes()
    yield running
    running.server.stdin.close()
    running.server.wait(20)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, processes):
    """A folder with a benchmark, its caches, and an uninterrupted run of each stage; and how long each took."""
    root = tmp_path_factory.mktemp("finished")
    make_benchmark(root / "benchmarks" / "tiny")
    seconds = {}
    for script, flags in COMMANDS.items():
        began = time.monotonic()
        assert processes.run(script, [*flags, *folders(root)], root / "out") == 0, (root / "out").read_text()
        seconds[script] = time.monotonic() - began
    return root, seconds


def new_root(finished, tmp_path, script):
    """A folder with the finished run's data, and, for stage 3, its checkpoint."""
    root = tmp_path / "killed"
    shutil.copytree(finished / "cache", root / "cache")
    (root / "benchmarks").symlink_to(finished / "benchmarks")
    if script == "associative_alignment":
        (root / "results" / "models").mkdir(parents=True)
        for model in (finished / "results" / "models").glob("*arcMax*_bestModel.tar"):
            shutil.copy(model, root / "results" / "models")
    return root


def half_written(root):
    """Files that a process is writing, or was writing when it was killed."""
    folders = [root / "results" / name for name in ("models", "logs") if (root / "results" / name).is_dir()]
    return [path for folder in folders for path in folder.iterdir() if path.suffix == ".tmp"]


def saved_states(root):
    """The states of runs that are saved below a folder."""
    return list(root.rglob("*_last.tar"))


@pytest.mark.parametrize("script", COMMANDS)
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(finished, tmp_path, processes, script):
    """Half of the kills at a random moment of the run, half of them while a checkpoint is being written."""
    finished, seconds = finished
    root = new_root(finished, tmp_path, script)
    dice = random.Random(script)
    n_killed, n_while_writing, n_finished = 0, 0, 0
    flags = [*COMMANDS[script], *folders(root), "--resume"]
    while n_killed < KILLS or (n_while_writing == 0 and n_killed < 4 * KILLS):
        pid = processes.start(script, flags, root / "out")
        if dice.random() < 0.5:
            time.sleep(dice.uniform(0, seconds[script]))
        else:
            n_writes, deadline = dice.randrange(3), time.monotonic() + 10 * seconds[script]
            while n_writes >= 0 and not list(root.glob("results/tables/*.json")) and time.monotonic() < deadline:
                seen = half_written(root)
                n_writes -= bool(seen)
                while n_writes >= 0 and seen and seen[0].exists():
                    pass
        os.kill(pid, signal.SIGKILL)
        status = processes.wait()
        assert status in (0, -signal.SIGKILL), (root / "out").read_text()
        n_killed += status != 0
        n_while_writing += status != 0 and bool(half_written(root))
        if status == 0:  # it was done: from the beginning again
            n_finished += 1
            assert numbers(root, script) == numbers(finished, script)
            shutil.rmtree(root / "results" / "tables")
            for path in (*root.rglob("*_last.tar"), *root.rglob("metrics.jsonl")):
                path.unlink()
            if script != "associative_alignment":
                shutil.rmtree(root / "results" / "models")
    assert processes.run(script, flags, root / "out") == 0, (root / "out").read_text()
    assert numbers(root, script) == numbers(finished, script)
    assert not half_written(root)
    print(f"{script}: {n_killed} kills, {n_while_writing} of them while writing; {n_finished} earlier runs finished")
    assert n_while_writing > 0


@pytest.mark.parametrize("flags", [["--align_blocks", 0], ["--align_preset", "auto", "--align_blocks", 0]])
def test_a_run_killed_in_feature_space_ends_with_the_same_bytes(finished, tmp_path, processes, flags):
    script, flags = "associative_alignment", [*TINY, "--n_episodes", 300, "--ft_n_epoch", 20, "--aug_size", 4, *flags]
    whole, killed = (new_root(finished[0], tmp_path / name, script) for name in ("whole", "killed"))
    assert processes.run(script, [*flags, *folders(whole)], whole / "out") == 0, (whole / "out").read_text()
    pid = processes.start(script, [*flags, *folders(killed)], killed / "out")
    wait_until(partial(saved_states, killed), killed / "out")
    os.kill(pid, signal.SIGKILL)
    assert processes.wait() == -signal.SIGKILL
    assert processes.run(script, [*flags, *folders(killed), "--resume"], killed / "out") == 0
    n_done = int(re.search(r"resumed after (\d+) episodes", (killed / "out").read_text())[1])
    assert 0 < n_done < 300
    assert numbers(killed, script) == numbers(whole, script)


@pytest.mark.parametrize("script", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_cleanly_and_says_how_to_go_on(finished, tmp_path, processes, script, number):
    for attempt in range(5):  # on a busy machine a run may end before the signal reaches it
        root = new_root(finished[0], tmp_path / str(attempt), script)
        flags = [*COMMANDS[script], *folders(root)]
        pid = processes.start(script, flags, root / "out")
        wait_until(partial(saved_states, root), root / "out")
        os.kill(pid, number)
        status = processes.wait()
        if status != 0:
            break
    assert status == 130
    said = (root / "out").read_text().splitlines()[-1]
    assert said.startswith("interrupted; --resume") and "_last.tar" in said
    assert "Traceback" not in (root / "out").read_text()
    refused = call(script, *flags)
    assert refused.status == 2 and "unfinished" in refused.err and "--resume" in refused.err
    assert processes.run(script, [*flags, "--resume"], root / "out") == 0
    assert numbers(root, script) == numbers(finished[0], script)


def longer(script, by):
    """A command with `by` more epochs or episodes."""
    flag = "--n_episodes" if script == "associative_alignment" else "--n_epoch"
    flags = list(COMMANDS[script])
    flags[flags.index(flag) + 1] += by
    return flags


@pytest.mark.parametrize("script", COMMANDS)
def test_a_full_disk_leaves_the_last_state_and_the_best_model(finished, tmp_path, processes, script):
    """A limit on the size of files does to a write what a full disk does."""
    root = new_root(finished[0], tmp_path, script)
    short = longer(script, -4 if script != "associative_alignment" else -10)
    assert processes.run(script, [*short, *folders(root)], root / "out") == 0
    kept = {path: path.read_bytes() for path in (root / "results").rglob("*.tar")}
    flags = [*COMMANDS[script], *folders(root), "--resume"]
    limit = min(len(content) for path, content in kept.items() if "_last" in path.name) // 2
    assert processes.run(script, flags, root / "out", max_bytes=limit) == 2
    said = (root / "out").read_text().splitlines()[-1]
    assert said.startswith("error: ") and "cannot be written" in said and "--resume goes on from" in said
    for path, content in kept.items():  # the best model may be a better one by now, but a whole one
        assert path.read_bytes() == content or load_checkpoint(path).epoch == 4
    assert not half_written(root)
    assert processes.run(script, flags, root / "out") == 0, (root / "out").read_text()
    assert numbers(root, script) == numbers(finished[0], script)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished runs that a test may spoil."""
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


def files(root):
    found = [path for path in (root / "results").rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: path.read_bytes() for path in found}


@pytest.mark.parametrize("script", COMMANDS)
def test_a_run_of_other_flags_is_not_replaced_unless_told(copy, script):
    before = files(copy)
    flags = [*COMMANDS[script], *folders(copy), "--ft_n_epoch", 5, "--ft_lr", 0.01]
    refused = call(script, *flags)
    assert refused.status == 2 and refused.err.count("\n") == 1
    for part in ("--ft_n_epoch 5 (was ", "--ft_lr 0.01 (was 0.001)", "--resume", "--overwrite"):
        assert part in refused.err
    resumed = call(script, *flags, "--resume")
    assert resumed.status == 2 and "--ft_n_epoch 5 (was " in resumed.err and "--overwrite" in resumed.err
    assert files(copy) == before
    assert call(script, *flags, "--overwrite").status == 0
    assert files(copy) != before


@pytest.mark.parametrize("script", COMMANDS)
def test_a_finished_run_may_be_run_again_says_so_and_keeps_its_model(copy, finished, script):
    before = {path: content for path, content in files(copy).items() if path.parent.name in ("models", "episodes")}
    again = [*COMMANDS[script], *folders(copy), "--num_workers", 0]
    outcome = call(script, *again)
    assert outcome.status == 0 and "this run has finished" in outcome.out and "--overwrite starts again" in outcome.out
    assert before.items() <= files(copy).items() and numbers(copy, script) == numbers(finished[0], script)
    resumed = call(script, *again, "--resume")
    assert resumed.status == 0 and "resumed after" in resumed.out
    assert numbers(copy, script) == numbers(finished[0], script)


def test_a_finished_run_that_is_overwritten_and_interrupted_leaves_no_result_of_another_model(copy):
    flags = [*COMMANDS["transferLearning"], *folders(copy)]
    (table,) = copy.rglob("tables/transferLearning_*.json")
    assert call("transferLearning", *flags, "--overwrite", "--lr", 1e30, "--method", "arcMax").status == 2
    assert not table.exists() and not list(copy.rglob("models/*arcMax*_last.tar"))


@pytest.mark.parametrize("script", COMMANDS)
def test_of_two_runs_at_once_the_second_names_the_first_and_changes_nothing(finished, tmp_path, processes, script):
    root = new_root(finished[0], tmp_path, script)
    flags = [*COMMANDS[script], *folders(root)]
    pid = processes.start(script, flags, root / "out")
    locks = partial(root.rglob, "tables/.*.lock")
    wait_until(lambda: any(f"process {pid} on " in lock.read_text() for lock in locks()), root / "out")
    os.kill(pid, signal.SIGSTOP)
    try:
        for more in (["--resume"], ["--overwrite", "--ft_lr", 0.01], []):
            second = call(script, *flags, *more)
            assert second.status == 2 and f"process {pid} on " in second.err and second.err.count("\n") == 1, second
    finally:
        os.kill(pid, signal.SIGCONT)
    assert processes.wait() == 0, (root / "out").read_text()
    assert numbers(root, script) == numbers(finished[0], script)


def test_an_alignment_is_not_resumed_with_other_episodes(copy, tmp_path):
    episodes = tmp_path / "episodes.json"
    flags = [*COMMANDS["associative_alignment"], *folders(copy), "--results_dir", tmp_path, "--episodes_file", episodes]
    assert call("associative_alignment", *flags).status == 0
    record = json.loads(episodes.read_text())
    episodes.write_text(json.dumps(record | {"episodes": record["episodes"][::-1]}))
    for again in ([], ["--resume"]):
        refused = call("associative_alignment", *flags, *again)
        assert refused.status == 2 and "the episodes have changed since" in refused.err and "--overwrite" in refused.err
    episodes.write_text(json.dumps(record | {"episodes": record["episodes"] * 2}))
    longer = [*flags, "--n_episodes", 20, "--resume"]
    resumed = call("associative_alignment", *longer)
    assert resumed.status == 0 and "resumed after 17 episodes" in resumed.out


def test_a_model_without_a_state_is_not_replaced_either(copy):
    for path in copy.rglob("*_last.tar"):
        path.unlink()
    for path in copy.rglob("tables/*.json"):
        path.unlink()
    refused = call("transferLearning", *COMMANDS["transferLearning"], *folders(copy), "--lr", 0.1)
    assert refused.status == 2 and "bestModel.tar" in refused.err and "--lr 0.1 (was 0.001)" in refused.err


def test_a_test_of_a_checkpoint_does_not_replace_the_result_of_its_training(copy):
    before = files(copy)
    best = next(copy.rglob("*arcMax*_bestModel.tar"))
    flags = [*COMMANDS["transferLearning"], *folders(copy), "--n_epoch", 0, "--init_from", best]
    refused = call("transferLearning", *flags)
    assert refused.status == 2 and "--n_epoch 0 (was 8)" in refused.err
    assert files(copy) == before


@pytest.mark.parametrize("script", COMMANDS)
def test_what_a_state_follows_from_must_not_change(copy, script):
    for path in copy.rglob("tables/*.json"):
        path.unlink()
    image = next((copy / "benchmarks" / "tiny" / "base" / "class00").iterdir())
    shutil.copy(image, image.with_name("again.png"))
    refused = call(script, *COMMANDS[script], *folders(copy), "--resume")
    assert refused.status == 2 and "base images" in refused.err and "--overwrite" in refused.err


def test_a_damaged_state_is_one_line_and_may_be_overwritten(copy):
    last = next((copy / "results" / "models").glob("*arcMax*_last.tar"))
    last.write_bytes(last.read_bytes()[:5000])
    for flags in ([], ["--resume"]):
        refused = call("transferLearning", *COMMANDS["transferLearning"], *folders(copy), *flags)
        assert refused.status == 2 and str(last) in refused.err and refused.err.count("\n") == 1
    assert call("transferLearning", *COMMANDS["transferLearning"], *folders(copy), "--overwrite").status == 0


def test_a_metrics_file_that_was_removed_or_cut_short_is_whole_again(copy, finished):
    flags = [*COMMANDS["transferLearning"], *folders(copy), "--resume"]
    (log,) = copy.rglob("*arcMax*_bestModel/metrics.jsonl")
    for spoil in (log.unlink, lambda: log.write_text(log.read_text()[:100])):
        spoil()
        assert call("transferLearning", *flags).status == 0
        assert numbers(copy, "transferLearning") == numbers(finished[0], "transferLearning")
    (last,) = copy.rglob(LAST["transferLearning"])
    state = torch.load(last, weights_only=True)
    for rows in ([], [{"epoch": "0"}] * 8):
        torch.save(state | {"rows": rows}, last)
        outcome = call("transferLearning", *flags)
        assert outcome.status == 2 and outcome.err.count("\n") == 1


def without_a_value(state, name):
    del state[name]


def of_another_type(state, name):
    state[name] = 5 if isinstance(state[name], torch.Tensor | dict) else "five"


def of_another_shape(state, name):
    value = state[name]
    if isinstance(value, torch.Tensor):
        state[name] = torch.zeros(len(value), 7)
    elif isinstance(value, dict) and value.keys() & {"state", "scale"}:
        state[name] = value | {"state": {0: {"step": torch.zeros(3)}}}
    elif isinstance(value, dict):
        state[name] = dict.fromkeys(value, torch.zeros(3, 3))


@pytest.mark.parametrize("script", COMMANDS)
@pytest.mark.parametrize("spoil", [without_a_value, of_another_type, of_another_shape])
def test_a_state_that_does_not_fit_is_one_line(copy, script, spoil):
    (last,) = copy.rglob(LAST[script])
    kept = torch.load(last, weights_only=True)
    parts = set(kept) - {"n_done", "best", "seconds", "config", "made_from", "scaler", "format", "episodes", "rows"}
    for name in parts if spoil is of_another_shape else kept.keys() - {"episodes", "rows"}:
        state = dict(kept)
        spoil(state, name)
        torch.save(state, last)
        before = files(copy)
        refused = call(script, *COMMANDS[script], *folders(copy), "--resume")
        assert refused.status == 2 and str(last) in refused.err and "--overwrite" in refused.err, (name, refused)
        assert refused.err.count("\n") == 1 and files(copy) == before


def test_a_diverging_loss_names_where_and_the_last_good_checkpoint(finished, tmp_path):
    root = new_root(finished[0], tmp_path, "transferLearning")
    flags = [*COMMANDS["transferLearning"], *folders(root), "--method", "softMax"]
    outcome = call("transferLearning", *flags, "--lr", 1e30)
    assert outcome.status == 2
    for part in ("epoch 1, batch 1", "--lr", "there is no state yet"):
        assert part in outcome.err
    outcome = call("transferLearning", *flags, "--lr", 1e30, "--batch_size", 1000, "--n_query", 2)
    assert outcome.status == 2 and "epoch 2, batch 0" in outcome.err
    assert "--resume goes on from" in outcome.err and "softMax_Conv4_last.tar" in outcome.err
