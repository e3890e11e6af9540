"""The benchmarks' own claim: our path gives the answers of a plain loop of the published code. No time is asserted."""

import dataclasses
import json
import re

import pytest
import torch

from data.transforms import normalise
from engine.errors import UserError
from reporting.report import read_results
from speed import bench_alignment, bench_base_training, bench_data, bench_related_base, bench_start, common
from speed.__main__ import BENCHES
from speed.common import (
    Bench,
    Measured,
    Setting,
    check,
    compare,
    in_child,
    markdown,
    measure,
    measure_side,
    profile,
    row,
    spread,
    timed,
)
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting("tiny", "fp32", 0, tmp_path_factory.mktemp("speed"))


def cases():
    """Each bench in each precision in which it is timed."""
    settings = {name: bench.settings(Setting("tiny", "", 0, None)) for name, bench in BENCHES.items()}
    return [(name, each.precision) for name, of_bench in settings.items() for each in of_bench]


@pytest.mark.parametrize(("name", "precision"), cases())
def test_our_path_gives_the_answers_of_the_reference_loop(setting, name, precision):
    errors = check(BENCHES[name], dataclasses.replace(setting, precision=precision))
    assert {error.split(": ")[-1] for error in errors} == BENCHES[name].tolerances.keys()


def test_a_wrong_answer_is_refused():
    def side(value):
        return {"work": Measured(1.0, {"loss": torch.tensor([1.0, value])})}

    bench = Bench({"work": {}}, None, None, None, {"loss": {"fp32": 1e-3}})
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


def test_a_side_runs_in_a_process_of_its_own_and_hands_back_its_peak_of_memory(setting):
    bench = bench_related_base.BENCH
    side, peak = in_child(measure_side, bench, setting, "ours")
    assert 50 * 2**20 < peak < 8 * 2**30
    assert side.keys() == bench.targets.keys() and side[bench.first_work].seconds > 0
    compare(bench, "fp32", bench.reference(setting), side)


def test_a_wrong_answer_ends_the_command_and_leaves_the_other_rows(monkeypatch, tmp_path, capsys):
    def measured(bench, setting, repeats):
        assert bench.first_work == "right", "loss is off"
        return [row("right", 2.0, 1.0)]

    monkeypatch.setattr(common, "measure", measured)
    monkeypatch.setattr("sys.argv", ["speed", "--output", str(tmp_path / "speed.json")])
    benches = {name: Bench({name: {}}, None, None, None, {}) for name in ("wrong", "right")}
    with pytest.raises(SystemExit, match="wrong answer: loss is off"):
        common.run(benches, {}, "")
    assert [r["work"] for r in json.loads((tmp_path / "speed.json").read_text())["rows"]] == ["right"]
    assert "| right | 2 | 1 | 2x |" in capsys.readouterr().out


def test_the_profile_names_the_costly_operations(setting):
    assert "convolution" in profile(bench_base_training.BENCH, setting)


def test_the_table_holds_medians_ratios_and_the_limit(setting, monkeypatch):
    seconds = {"reference": iter([8.0, 3.0, 4.0]), "fp32": iter([1.0, 1.0, 2.0]), "bf16": iter([2.0, 1.0, 2.0])}

    def child(function, bench, setting, side):
        took = 0.25 if side == "limit" else next(seconds[setting.precision if side == "ours" else side])
        return {"work": Measured(took, {"loss": torch.ones(1)}, side)}, 2**20

    monkeypatch.setattr(common, "in_child", child)
    bench = Bench({"work": {"fp32": 5.0, "bf16": 1.0}}, None, None, None, {"loss": {"fp32": 0.0, "bf16": 0.0}})
    fp32, bf16 = measure(bench, setting, repeats=3)
    assert (fp32["ratio"], fp32["ratio_to_limit"], fp32["target"]) == (4.0, 4.0, 5.0)
    header, line, *cells = markdown([fp32, bf16, row("toy", 1.0, 2.0, note="a note")]).splitlines()
    assert {row.count("|") for row in (line, *cells)} == {header.count("|")}
    assert cells == [
        "| work, fp32 | 4 | 1 | 4x | 5x, missed | 4.0 | 1 -> 1 | ours |",
        "| work, bf16 | 4 | 2 | 2x | 1x, met | 8.0 | 1 -> 1 | ours |",
        "| toy | 1 | 2 | 0.5x |  |  |  | a note |",
    ]


def test_both_sides_of_the_data_see_the_same_images(tmp_path):
    bench_data.link_base(tmp_path, None, 100)
    split = bench_data.load_base(tmp_path, 1)
    by_loader = torch.cat([x for x, _ in bench_data.loader(tmp_path / "base", False, 0)])
    assert split.train_images.shape == (100, 3, 84, 84) and len(split.class_names) == 64
    assert (by_loader - normalise(split.images)).abs().max() < 0.03


def test_a_folder_of_classes_is_thinned_and_a_cache_of_holes_is_read(tmp_path):
    bench_data.link_base(tmp_path, None, 100)
    work, note = tmp_path / "work", r"of 0.0 GiB; -?\d+ MiB of its own, \d+ MiB of pages of files"
    bench_data.link_base(work, tmp_path / "base", 10)
    assert len(bench_data.load_base(work, 1).labels) == 10
    seconds, found = bench_data.mapped(tmp_path / "mapped", 400)
    assert seconds > 0 and re.fullmatch(note, found)


def test_the_start_of_every_script_is_timed_beside_the_import_of_torch(monkeypatch):
    commands = []
    monkeypatch.setattr(bench_start, "seconds_of", lambda command: commands.append(command) or float(len(command)))
    *helps, labelling = bench_start.rows(None, 2)
    scripts = {path.name for path in ROOT.glob("*.py")} - {"args_parser.py"}
    assert {r["work"] for r in helps} == {f"{name} --help" for name in scripts}
    assert (labelling["reference_seconds"], labelling["ours_seconds"], labelling["note"]) == (2.0, 8.0, "4.00 times it")


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
    found, peak = measure_side(Bench({}, side, side, None, {}), setting, "reference")
    once = ["wait", "event", "work", "event", "wait"]
    assert calls == [*once, "warm", *once]
    assert (found["work"].seconds, peak) == (2.5, 7)


def test_without_a_gpu_its_benchmarks_end_with_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["speed", "--device", "cuda"])
    with pytest.raises(UserError, match="--device cuda is not available on this machine"):
        common.run({}, {}, "")


def test_spread_indices_are_distinct_and_reach_both_ends():
    assert spread(10, 4).tolist() == [0, 2, 5, 7] and spread(3, 8).tolist() == [0, 1, 2]
    assert common.count_flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5
