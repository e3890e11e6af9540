"""Generators, device, precision, result files and exit statuses."""

import json
import math
import os
import platform
import re
from pathlib import Path

import pytest
import torch

from engine import run as engine
from engine.errors import UserError
from engine.generators import make_generator, seeded
from engine.precision import Precision, check_finite
from engine.records import append_jsonl, git_commit, provenance, write_json
from engine.run import n_parameters, on_device, select_device, start
from engine.script import run_script

# Generators.


def draws(generator, n=8):
    return torch.randint(2**31, (n,), generator=generator).tolist()


def test_a_generator_follows_from_seed_and_keys_alone():
    torch.manual_seed(0)
    first = draws(make_generator(3, "episode", 7))
    torch.manual_seed(1)
    assert draws(make_generator(3, "episode", 7)) == first


def test_generators_of_other_seeds_or_keys_are_others():
    keys = [("base head",), ("backbone",), ("novel", "episode", 0), ("val", "episode", 0), ("head", 0), ("align", 0)]
    keys += [("novel", "episode", i) for i in range(1, 200)] + [("head", i) for i in range(1, 200)]
    found = {tuple(draws(make_generator(seed, *key))) for seed in (0, 1, 2, 2**32 + 1) for key in keys}
    assert len(found) == 4 * len(keys)


def test_generators_of_neighbouring_keys_are_unrelated():
    values = torch.stack([torch.rand(200, generator=make_generator(0, "episode", i)) for i in range(100)])
    correlation = torch.corrcoef(values) - torch.eye(100)
    assert correlation.abs().max() < 0.4  # 5.6 standard deviations of 1 / sqrt(200)


def test_the_numbers_of_a_seed_are_the_same_in_every_version():
    """Changing these changes every published number of the project."""
    assert draws(make_generator(0, "episode", 1), 3) == [2031574948, 188553834, 1233636359]


def test_inside_seeded_draws_are_reproducible_and_outside_nothing_changes():
    torch.manual_seed(5)
    expected = [torch.rand(3), torch.rand(3)]
    torch.manual_seed(5)
    found = [torch.rand(3)]
    with seeded(0, "dropout", 1):
        first = torch.rand(4)
    found.append(torch.rand(3))
    assert torch.equal(torch.stack(found), torch.stack(expected))
    with seeded(0, "dropout", 1):
        assert torch.equal(torch.rand(4), first)
    with seeded(0, "dropout", 2):
        assert not torch.equal(torch.rand(4), first)


def test_an_error_inside_seeded_does_not_leak_its_state():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded(0):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), state)


# Device, memory and precision.


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


@pytest.mark.parametrize("no_keep_memory", [False, True])
def test_starting_on_a_cpu_keeps_memory_unless_told_not_to(monkeypatch, no_keep_memory):
    calls = []
    monkeypatch.setattr(engine, "keep_memory", lambda: calls.append(1))
    device, precision = start("cpu", "bf16", no_keep_memory)
    assert device.type == "cpu" and precision.name == "bf16" and len(calls) == (not no_keep_memory)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_kept_memory_is_used_again_without_page_faults():
    import resource

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(2**22)  # 16 MiB, 4096 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    engine.keep_memory()
    faults()
    assert faults() < 4096


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_is_that_of_the_forward_pass_and_weights_stay_float32(name, dtype):
    layer = torch.nn.Linear(4, 2)
    with Precision(name, "cpu").autocast():
        assert layer(torch.randn(3, 4)).dtype == dtype
    assert layer(torch.randn(3, 4)).dtype == torch.float32 and layer.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_a_step_is_the_optimisers_own(name):
    def step(backward_and_step):
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        backward_and_step((weight**2).sum(), optimizer)
        return weight.detach()

    def plain_step(loss, optimizer):
        loss.backward()
        optimizer.step()

    torch.testing.assert_close(step(Precision(name, "cpu").backward_and_step), step(plain_step))


def test_fp16_skips_a_step_whose_gradients_overflow():
    precision = Precision("fp16", "cpu")
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision.backward_and_step((weight * math.inf).sum(), optimizer)
    assert weight.item() == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_says_where_and_what_to_do(value):
    with pytest.raises(UserError, match=rf"the loss became {value} at epoch 3, batch 8: lower --lr"):
        check_finite(torch.tensor(value), "epoch 3, batch 8")
    check_finite(torch.tensor(1e30), "epoch 3, batch 8")


def test_on_a_cpu_images_stay_mapped():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert on_device(images, torch.device("cpu")) is images


def test_frozen_parameters_are_not_counted():
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert n_parameters(layer) == 6


# Result files.


def test_json_holds_null_for_nan_and_text_for_paths(tmp_path):
    record = {"ci95": math.nan, "list": [math.inf, 1.5, (Path("a") / "b", None)], 5: {"deep": -math.inf}, "ok": True}
    write_json(tmp_path / "tables" / "result.json", record)
    text = (tmp_path / "tables" / "result.json").read_text()
    expected = {"ci95": None, "list": [None, 1.5, [str(Path("a") / "b"), None]], "5": {"deep": None}, "ok": True}
    assert json.loads(text, parse_constant=pytest.fail) == expected


def test_a_failing_write_leaves_the_previous_result_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"accuracy": 1})

    def replace(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(UserError, match=r"result\.json cannot be written"):
            write_json(path, {"accuracy": 2})
    assert json.loads(path.read_text()) == {"accuracy": 1} and list(tmp_path.iterdir()) == [path]
    write_json(path, {"accuracy": 3})
    assert json.loads(path.read_text()) == {"accuracy": 3} and list(tmp_path.iterdir()) == [path]


def test_a_record_that_json_cannot_hold_leaves_the_previous_result(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"accuracy": 1})
    with pytest.raises(TypeError):
        write_json(path, {"accuracy": torch.zeros(1)})
    assert json.loads(path.read_text()) == {"accuracy": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [write_json, append_jsonl])
def test_a_results_folder_that_cannot_be_made_is_named(tmp_path, write):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "logs" / "result.json"
    with pytest.raises(UserError, match="cannot be written.*another folder") as error:
        write(path, {"a": 1})
    assert str(path) in str(error.value)


def test_metrics_are_appended_a_line_each(tmp_path):
    path = tmp_path / "logs" / "metrics.jsonl"
    append_jsonl(path, {"epoch": 0, "loss": 1.5})
    append_jsonl(path, {"epoch": 1, "loss": math.nan})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"epoch": 0, "loss": 1.5}, {"epoch": 1, "loss": None}]


def test_a_result_says_how_it_was_made(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/transferLearning.py", "--n_shot", "1"])
    record = provenance({"seed": 4, "method": "arcMax"}, torch.device("cpu"))
    assert record["command"] == "python transferLearning.py --n_shot 1"
    assert record["seed"] == 4 and record["config"]["method"] == "arcMax" and record["device"].startswith("cpu")
    assert record["versions"]["torch"] == torch.__version__
    json.dumps(record)


def test_the_commit_is_a_hash_or_unknown(tmp_path, monkeypatch):
    assert re.fullmatch(r"[0-9a-f]{12,40}(-dirty)?|unknown", git_commit())
    monkeypatch.setattr(engine, "REPOSITORY", tmp_path)
    assert git_commit() == "unknown"


# Exit statuses.


def status_of(main, capsys):
    with pytest.raises(SystemExit) as end:
        run_script(main)
    out, err = capsys.readouterr()
    assert out == ""
    return end.value.code, err


def test_a_user_error_is_one_line_and_status_2(capsys):
    def main():
        raise UserError("class 'heron' has 12 images")

    assert status_of(main, capsys) == (2, "error: class 'heron' has 12 images\n")


def test_ctrl_c_is_one_line_and_status_130(capsys):
    def main():
        raise KeyboardInterrupt

    assert status_of(main, capsys) == (130, "interrupted\n")


def test_success_exits_normally_and_a_bug_keeps_its_traceback():
    ran = []
    run_script(lambda: ran.append(1))
    assert ran == [1]
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)
