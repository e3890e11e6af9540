"""The benchmarks' own claim: our path gives the answers of a plain loop of the published code. No time is asserted."""

import dataclasses
import json

import pytest
import torch

from engine.errors import UserError
from reporting.report import read_results
from speed import bench_alignment, bench_base_training, bench_related_base, common
from speed.__main__ import BENCHES
from speed.common import Bench, Measured, Setting, check, compare, markdown, measure, profile, run_child, spread, timed


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting("tiny", "fp32", 0, tmp_path_factory.mktemp("speed"))


@pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: bench.first_work)
def test_our_path_gives_the_answers_of_the_reference_loop(setting, bench):
    errors = check(bench, setting)
    assert {name.split(": ")[-1] for name in errors} == bench.tolerances.keys()


@pytest.mark.parametrize("name", ["base_training", "alignment"])
def test_half_precision_stays_near_the_reference_loop(setting, name):
    (bench,) = (bench for bench in BENCHES if bench.name == name)
    check(bench, dataclasses.replace(setting, precision="bf16"))


def test_a_wrong_answer_is_refused():
    def side(value):
        return {"work": Measured(1.0, {"loss": torch.tensor([1.0, value])})}

    bench = Bench("toy", {"work": {}}, None, None, None, {"loss": {"fp32": 1e-3}})
    assert compare(bench, "fp32", side(1.0), side(1.0001)) == pytest.approx({"work: loss": 7.1e-5}, rel=0.1)
    for wrong in (1.01, float("nan")):
        with pytest.raises(AssertionError, match="work: loss is off by"):
            compare(bench, "fp32", side(1.0), side(wrong))
    with pytest.raises(AssertionError):
        compare(bench, "fp32", side(1.0), {"work": Measured(1.0, {})})


def test_another_learning_rate_would_be_noticed(setting, monkeypatch):
    """The tolerances are tighter than a mistake: half the rate in our training alone."""
    adam = torch.optim.Adam
    original = bench_base_training.our_epoch

    def half_rate(*arguments, **keywords):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim, "Adam", lambda parameters, lr, **named: adam(parameters, lr=lr / 2, **named))
            return original(*arguments, **keywords)

    monkeypatch.setattr(bench_base_training, "our_epoch", half_rate)
    with pytest.raises(AssertionError, match="on the same inputs is off"):
        check(bench_base_training.BENCH, setting)


@pytest.mark.parametrize("rate", ["align_lr", "support_lr"])
def test_another_rate_of_alignment_would_be_noticed(setting, monkeypatch, rate):
    align = bench_alignment.align_episode

    def half_rate(blocks, task, novel, base, algorithm, *arguments):
        slower = dataclasses.replace(algorithm, **{rate: getattr(algorithm, rate) / 2})
        return align(blocks, task, novel, base, slower, *arguments)

    monkeypatch.setattr(bench_alignment, "align_episode", half_rate)
    with pytest.raises(AssertionError, match="is off by"):
        check(bench_alignment.BENCH, setting)


@pytest.mark.parametrize("bench", [bench_related_base.BENCH, BENCHES[-1]], ids=lambda bench: bench.first_work)
def test_a_side_runs_in_a_process_of_its_own_and_hands_back_its_peak_of_memory(setting, bench):
    side, peak = run_child(bench, setting, "ours")
    assert 50 * 2**20 < peak < 8 * 2**30
    assert side.keys() == bench.targets.keys() and side[bench.first_work].seconds > 0
    compare(bench, "fp32", bench.reference(setting), side)


def test_a_wrong_answer_ends_the_command_and_leaves_the_other_rows(monkeypatch, tmp_path, capsys):
    def measured(bench, setting, repeats):
        assert bench.name == "right", "loss is off"
        return []

    monkeypatch.setattr(common, "measure", measured)
    monkeypatch.setattr("sys.argv", ["speed", "--output", str(tmp_path / "speed.json")])
    benches = [Bench(name, {}, None, None, None, {}) for name in ("wrong", "right")]
    with pytest.raises(SystemExit, match="wrong answer: loss is off"):
        common.run(benches, "")
    assert json.loads((tmp_path / "speed.json").read_text())["rows"] == []
    assert "| work |" in capsys.readouterr().out


def test_the_profile_names_the_costly_operations(setting):
    assert "convolution" in profile(bench_base_training.BENCH, setting)


def test_the_table_holds_medians_ratios_and_the_limit(setting, monkeypatch):
    seconds = {"reference": iter([8.0, 3.0, 4.0]), "ours": iter([1.0, 1.0, 2.0]), "limit": iter([0.25])}

    def child(bench, setting, side):
        return {"work": Measured(next(seconds[side]), {"loss": torch.ones(1)}, side)}, 2**20

    monkeypatch.setattr(common, "run_child", child)
    bench = Bench("toy", {"work": {"fp32": 5.0}}, None, None, None, {"loss": {"fp32": 0.0}})
    (row,) = measure(bench, setting, repeats=3)
    assert (row["ratio"], row["ratio_to_limit"], row["target"]) == (4.0, 4.0, 5.0)
    header, line, cells = markdown([row]).splitlines()
    assert header.count("|") == line.count("|") == cells.count("|")
    assert cells == "| work | 4 | 1 | 4.0x | 5x, missed | 0.25 | 4.0 | 1 -> 1, met | ours |"


def test_a_speed_table_is_not_taken_for_a_result(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "speed.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(UserError, match="no result files"):
        read_results(tmp_path)


def test_timing_repeats_short_work_and_leaves_long_work_alone():
    calls = []
    assert timed(lambda: calls.append(1))[0] < 0.1 and len(calls) == 1
    timed(lambda: calls.append(1), at_least=0.01)
    assert len(calls) > 3


def test_on_a_gpu_the_second_of_two_runs_counts_between_two_events(monkeypatch, tmp_path):
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("event")

        def elapsed_time(self, end):
            return 2500.0

    def side(setting):
        assert setting.run.device == torch.device("cuda")
        return {"work": Measured(timed(lambda: calls.append("work"))[0], {})}

    for name, fake in (("is_initialized", lambda: True), ("Event", Event), ("max_memory_allocated", lambda: 7)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("warm"))
    setting = Setting("tiny", "fp32", 0, tmp_path, "cuda")
    common.run_side(Bench("toy", {}, side, side, None, {}), setting, "reference", tmp_path / "answer.pt")
    once = ["wait", "event", "work", "event", "wait"]
    assert calls == [*once, "warm", *once]
    found = torch.load(tmp_path / "answer.pt", weights_only=True)
    assert (found["measured"]["work"]["seconds"], found["peak_memory"]) == (2.5, 7)


def test_without_a_gpu_its_benchmarks_end_with_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["speed", "--device", "cuda"])
    with pytest.raises(UserError, match="--device cuda is not available on this machine"):
        common.run([], "")


def test_spread_indices_are_distinct_and_reach_both_ends():
    assert spread(10, 4).tolist() == [0, 2, 5, 7] and spread(3, 8).tolist() == [0, 1, 2]
    assert common.count_flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5
