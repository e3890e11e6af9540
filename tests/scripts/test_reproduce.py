"""Reproducing the paper's tables: the commands of each row, what is skipped, the table, and every way to stop."""

import json
import os
import re
import shlex
import sys

import pytest

import reproduce
from args_parser import STAGES, args_parser
from engine.errors import UserError
from persistence.results import controls_of, interval
from reporting.paper_tables import SCRIPTS, TABLES
from tests.helpers import call, make_benchmark

STAGE_OF = {script: stage for stage, (script, _, _) in STAGES.items()}
# All rows of all stages on a few 16-pixel images.
FEW = [
    *("--dataset", "tiny", "--img_size", 16, "--n_query", 3, "--n_epoch", 2, "--batch_size", 16, "--val_episodes", 4),
    *("--n_episodes", 3, "--ft_n_epoch", 5, "--align_iters", 2, "--aug_size", 4, "--n_B", 2, "--quiet"),
    *("--episodes_per_epoch", 2, "--train_n_query", 2, "--n_way", 3, "--precision", "auto"),
]


def places(root):
    return [
        *("--benchmarks_dir", root / "benchmarks", "--cache_dir", root / "cache"),
        *("--results_dir", root / "results", "--shots", 2, "--backbones", "Conv4"),
    ]


def commands(*flags):
    """The lines of a dry run: stage and parsed flags of each."""
    outcome = call("reproduce", *flags, "--dry_run")
    assert outcome.status == 0, outcome.err
    lines = []
    for line in outcome.out.splitlines():
        words = shlex.split(line)
        script = next(i for i, word in enumerate(words) if word in STAGE_OF)
        lines.append((STAGE_OF[words[script]], args_parser(STAGE_OF[words[script]], words[script + 1 :])))
    return lines


def steps(lines):
    return [(stage, args.method, *([args.alignment] if stage == "alignment" else [])) for stage, args in lines]


MAIN = [("transfer", head) for head in ("softMax", "cosMax", "arcMax")]
MAIN += [("meta", learner) for learner in ("ProtoNet", "MatchingNet", "RelationNet", "RelationNet_softmax")]
ALIGNED = [("alignment", "arcMax", alignment) for alignment in ("head", "naive", "centroid", "adversarial")]
MAIN += ALIGNED


def test_the_main_table_is_every_method_at_each_backbone_and_shot():
    lines = commands("--table", "main")
    assert steps(lines) == MAIN * 6
    assert [(args.backbone, args.n_shot) for _, args in lines[::11]] == [
        (backbone, shot) for backbone in ("Conv4", "ResNet18", "WideResNet") for shot in (1, 5)
    ]
    bare = {stage: args_parser(stage, []) for stage in SCRIPTS}
    own = {"method", "backbone", "n_shot", "alignment", "episodes_file", "resume", "img_size"}
    for stage, args in lines:  # the published protocol, but for the epochs of meta-learners at 1 shot
        allowed = own | ({"n_epoch"} if stage == "meta" and args.n_shot == 1 else set())
        allowed |= {"align_lr"} if getattr(args, "alignment", "") == "adversarial" else set()
        allowed |= {"align_blocks"} if getattr(args, "alignment", "") == "head" else set()
        assert {k for k, v in vars(args).items() if v != vars(bare[stage])[k]} <= allowed
        assert args.resume


def test_crossdomain_trains_once_and_tests_that_model_elsewhere():
    lines = commands("--table", "crossdomain", "--n_epoch", 7)
    assert steps(lines) == [MAIN[2], MAIN[2], *ALIGNED]
    assert [args.novel_dataset for _, args in lines] == ["miniImagenet", *["CUB"] * 5]
    assert [args.backbone for _, args in lines] == ["ResNet18"] * 6
    assert [args.n_epoch for _, args in lines[:2]] == [7, 0]  # what is passed on trains, and never a test
    assert lines[1][1].init_from.name == "5way_5shot_miniImagenet_arcMax_ResNet18_bestModel.tar"
    assert [args.n_query for _, args in lines] == [None, *[15] * 5]  # classes of CUB may have 41 images


@pytest.mark.parametrize("scale", ["full", "laptop"])
@pytest.mark.parametrize("table", TABLES)
def test_rows_share_episodes_and_start_from_what_an_earlier_row_wrote(table, scale):
    made, files = set(), {}
    for stage, args in commands("--table", table, "--scale", scale, "--backbones", "Conv4"):
        name = f"{args.test_n_way}way_{args.n_shot}shot_{args.dataset}_{args.method}_Conv4_bestModel.tar"
        if stage == "alignment" or not args.n_epoch:
            assert str(args.init_from or args.checkpoint_dir / name) in made
        else:
            made.add(str(args.checkpoint_dir / name))
        task = (args.novel_dataset, args.test_n_way, args.n_shot)
        assert files.setdefault(args.episodes_file, task) == task
    assert len(set(files.values())) == len(files)


def test_the_main_table_of_a_laptop_keeps_off_the_demo():
    lines = commands("--table", "main", "--scale", "laptop")
    assert steps(lines) == MAIN * 2
    assert {args.dataset for _, args in lines} == {"glyphs"} and {args.img_size for _, args in lines} == {42}
    assert all(str(args.checkpoint_dir) == os.path.join("results", "laptop", "models") for _, args in lines)


def test_at_the_scale_of_two_cores_all_rows_are_of_one_training(monkeypatch):
    lines = commands("--table", "main", "--scale", "two_cores", "--n_episodes", 70)
    (_, trained), *others = lines
    assert (trained.n_epoch, trained.n_shot, trained.eval_resize, trained.precision) == (80, 5, "none", "auto")
    best = trained.checkpoint_dir / "5way_5shot_miniImagenet_arcMax_Conv4_bestModel.tar"
    assert {args.init_from for _, args in others} == {best}
    of_a_shot = [("head", "paper"), ("centroid", "auto")]
    of_a_shot += [(loss, preset) for preset in ("tuned", "paper") for loss in ("naive", "centroid")]
    found = [(args.n_shot, args.alignment, args.align_preset) for stage, args in others if stage == "alignment"]
    assert found == [(shot, *each) for shot in (1, 5) for each in of_a_shot]
    assert [(a.n_shot, a.n_epoch) for stage, a in others if stage == "meta"] == [(1, 10), (5, 10)]
    assert [(a.n_shot, a.n_epoch) for stage, a in others if stage == "transfer"] == [(1, 0)]
    assert {args.n_query for _, args in lines} == {15} and {args.n_episodes for _, args in lines} == {70}
    bare = commands("--table", "main", "--scale", "two_cores", "--shots", 5)
    assert [args.n_episodes for _, args in bare] == [600, 600, 600, 200, 200, 50, 50, 600]

    monkeypatch.setattr(reproduce, "run_command", lambda command: 130)
    outcome = call("reproduce", "--table", "main", "--scale", "two_cores", "--results_dir", "nowhere")
    hours = float(re.search(r"16 of 16 rows to run, about ([\d.]+) hours", outcome.out).group(1))
    assert 7 < hours < 9 and outcome.status == 130
    fewer = call("reproduce", "--table", "main", "--scale", "two_cores", "--results_dir", "nowhere", "--n_epoch", 3)
    assert float(re.search(r"about ([\d.]+) hours", fewer.out).group(1)) < hours - 2


def test_torchrun_is_put_before_the_script():
    outcome = call("reproduce", "--table", "crossdomain", "--nproc_per_node", 2, "--dry_run")
    for line in outcome.out.splitlines():
        words = shlex.split(line)
        assert words[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        assert words[6] in STAGE_OF


def test_the_commands_are_printed_where_their_device_is_not(monkeypatch):
    def absent(name):
        raise UserError(f"no device {name}")

    monkeypatch.setattr(reproduce, "select_device", absent)
    assert {args.device for _, args in commands("--table", "crossdomain", "--device", "cuda")} == {"cuda"}
    outcome = call("reproduce", "--table", "crossdomain", "--device", "cuda")
    assert outcome.status == 2 and "no device cuda" in outcome.err


def test_a_flag_goes_to_the_stages_that_know_it():
    flags = ["--crop_scale", "0.5", "1", "--aug_size=7", "--", "--seed", 3]
    for stage, args in commands("--table", "main", "--backbones", "Conv4", *flags):
        assert args.seed == 3
        assert args.aug_size == 7 if stage == "alignment" else args.crop_scale == [0.5, 1.0]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--table", "other"], ["--table", "main"]),
        (["--n_shots", 1], ["--n_shots", "any stage"]),
        (["--n_shot", 1], ["--n_shot", "--shots"]),
        (["--overwrite"], ["--overwrite", "--results_dir"]),
        (["--checkpoint_dir", "models"], ["--checkpoint_dir", "--results_dir"]),
        (["--align_preset", "tuned"], ["--align_preset", "the rows set it"]),
        (["stray"], ["stray"]),
        (["--n_epoch", "many"], ["--n_epoch", "many"]),
        (["--novel_dataset", "CUB"], ["--novel_dataset", "crossdomain"]),
        (["--table", "crossdomain", "--dataset", "CUB"], ["--novel_dataset", "CUB"]),
        (["--table", "crossdomain", "--scale", "two_cores"], ["--scale", "main table"]),
        (["--test_n_way", 10], ["--test_n_way", "the rows set it"]),
    ],
)
def test_a_wrong_flag_is_one_line(flags, expected):
    outcome = call("reproduce", "--table", "main", *flags, "--dry_run")
    assert outcome.status == 2 and outcome.out == ""
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert all(part in outcome.err for part in expected), outcome.err


class Runner:
    """Stands in for run_command: a stage runs in this process, which spares the seconds of importing torch."""

    def __init__(self):
        self.ran = []
        self.errors = ""

    def __call__(self, command):
        assert command[0] == sys.executable
        self.ran.append(command)
        outcome = call(command[1].removesuffix(".py"), *command[2:])
        self.errors += outcome.err
        return outcome.status


@pytest.fixture
def runner(monkeypatch):
    runner = Runner()
    monkeypatch.setattr(reproduce, "run_command", runner)
    return runner


def test_a_table_is_run_once_and_goes_on_after_a_row_that_failed(tmp_path, runner):
    make_benchmark(tmp_path / "benchmarks" / "tiny")
    table = ["--table", "main", *FEW, *places(tmp_path)]
    broken = tmp_path / "results" / "tables" / "metaLearning_5way_2shot_tiny_RelationNet_Conv4.json"
    broken.mkdir(parents=True)  # where the result of the sixth row goes

    outcome = call("reproduce", *table)
    assert outcome.status == 2 and len(runner.ran) == 6
    assert outcome.err.startswith("error: RelationNet, Conv4, 5-way 2-shot on tiny ended with status 2")
    assert outcome.err.count("\n") == 1 and shlex.join(runner.ran[-1][1:]) in outcome.err
    summary = tmp_path / "results" / "tables" / "reproduce_main_tiny.json"
    assert sum(row["ours"] is not None for row in json.loads(summary.read_text())["rows"]) == 5

    broken.rmdir()
    outcome = call("reproduce", *table)
    assert outcome.status == 0, runner.errors
    assert len(runner.ran) == 6 + 6 and "6 of 11 rows to run" in outcome.out

    record = json.loads(summary.read_text())
    assert (record["table"], record["dataset"], record["scale"]) == ("main", "tiny", "full")
    for row in record["rows"]:
        result = json.loads(open(row["result"]).read())
        assert (row["ours"]["accuracy"], row["ours"]["n_episodes"]) == (result["accuracy"], 3)
        assert row["ours"]["n_epoch"] == 2  # of alignment too: those of the checkpoint that it aligns
        assert row["paper"] is None
    aligned = result_of(tmp_path, "centroid")
    assert record["rows"][-2]["gain"] == aligned["difference"]
    text = summary.with_suffix(".md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    controls = [cells for cells in rows if re.search("nearest|Simple|logistic|related", cells[0])]
    assert [cells[4] for cells in controls] == [
        interval(each) for each in controls_of(result_of(tmp_path, "head")).values()
    ]
    rows = [cells for cells in rows if cells not in controls]
    assert len(rows) == 2 + 11 and len(controls) == 5 and {len(cells) for cells in rows + controls} == {11}
    assert all(cells[5] == "not known here" and cells[6] == "" for cells in rows[2:])
    assert text in outcome.out

    before = text, summary.read_text()
    assert call("reproduce", *table).status == 0 and len(runner.ran) == 12  # nothing was left to run
    assert (summary.with_suffix(".md").read_text(), summary.read_text()) == before


def result_of(root, alignment):
    name = f"associative_alignment_5way_2shot_tiny_arcMax_Conv4_{alignment}.json"
    return json.loads((root / "results" / "tables" / name).read_text())


def test_a_table_shares_what_another_has_made_and_replaces_nothing(tmp_path, runner):
    make_benchmark(tmp_path / "benchmarks" / "tiny")
    make_benchmark(tmp_path / "benchmarks" / "other", seed=1)
    cross = ["--table", "crossdomain", *FEW, *places(tmp_path), "--novel_dataset", "other"]
    assert call("reproduce", *cross).status == 0, runner.errors
    assert len(runner.ran) == 6
    record = json.loads((tmp_path / "results" / "tables" / "reproduce_crossdomain_tiny_to_other.json").read_text())
    assert [row["ours"]["n_epoch"] for row in record["rows"]] == [2] * 6

    # A result older than its checkpoint is made again.
    checkpoint = next((tmp_path / "results" / "models").glob("*_bestModel.tar"))
    result = max((tmp_path / "results" / "tables").glob("[at]*.json"), key=lambda p: p.stat().st_mtime)
    os.utime(checkpoint, (result.stat().st_mtime + 1,) * 2)
    assert call("reproduce", *cross).status == 0, runner.errors
    assert len(runner.ran) == 6 + 6

    # The main table has the row that trains; what is there of other flags is never replaced.
    outcome = call("reproduce", "--table", "main", *FEW, *places(tmp_path), "--batch_size", 9)
    assert outcome.status == 2 and len(runner.ran) == 12 + 3 and "--batch_size 9 (was " in runner.errors

    os.utime(checkpoint, (0, 0))  # older than its result again
    # Another seed has files of its own, and the mean of both is a row.
    outcome = call("reproduce", *cross, "--seeds", 0, 1)
    assert outcome.status == 0, runner.errors
    assert len(runner.ran) == 15 + 6
    record = json.loads((tmp_path / "results" / "tables" / "reproduce_crossdomain_tiny_to_other.json").read_text())
    assert [row["seed"] for row in record["rows"]] == [0] * 6 + [1] * 6 and len(record["means"]) == 6
    for mean, first, second in zip(record["means"], record["rows"][:6], record["rows"][6:], strict=True):
        pair = first["ours"]["accuracy"], second["ours"]["accuracy"]
        assert mean["ours"]["accuracy"] == pytest.approx(sum(pair) / 2, abs=1e-3)
        assert mean["ours"]["ci95"] == pytest.approx(12.7062 * abs(pair[0] - pair[1]) / 2, abs=1e-2)
    assert ", mean of 2 seeds | " in outcome.out


def test_a_row_runs_in_a_process_of_its_own_and_its_error_is_shown(tmp_path, capfd):
    outcome = call("reproduce", "--table", "crossdomain", "--dataset", "absent", "--results_dir", tmp_path)
    assert outcome.status == 2
    assert "no base split of 'absent'" in capfd.readouterr().err
    assert "transferLearning.py --dataset absent" in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.parametrize(("status", "ends"), [(1, 1), (-9, 1), (2, 2), (130, 130)])
def test_how_a_row_ends_is_how_the_run_ends(tmp_path, monkeypatch, status, ends):
    monkeypatch.setattr(reproduce, "run_command", lambda command: status)
    outcome = call("reproduce", "--table", "crossdomain", "--results_dir", tmp_path)
    assert outcome.status == ends and outcome.err.count("\n") == 1
    assert "the same" in outcome.err and ("signal 9" in outcome.err) == (status == -9)
