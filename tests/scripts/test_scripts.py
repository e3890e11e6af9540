"""The scripts end to end on a tiny benchmark, as a user runs them: results, determinism, and every user error."""

import json
import shutil

import pytest
import torch

from args_parser import args_parser
from engine.run import Run
from persistence.checkpoints import load_checkpoint
from persistence.saved_episode import read_saved_episodes
from tests.helpers import ALIGN, CHECKPOINT, CURVE, ROOT, TINY, TRAIN, call, folders, make_benchmark, result, run


def test_stage_1_keeps_the_best_model_and_writes_a_full_result(trained):
    checkpoint = load_checkpoint(trained / "results" / "models" / CHECKPOINT)
    assert checkpoint.backbone == "Conv4" and checkpoint.img_size == 16 and len(checkpoint.class_names) == 6
    log = trained / "results" / "logs" / CHECKPOINT.removesuffix(".tar") / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    best = max(rows, key=lambda row: row["val_accuracy"])
    assert checkpoint.epoch == best["epoch"] and checkpoint.val_accuracy == pytest.approx(best["val_accuracy"])
    record = result(trained, "transferLearning_3way_2shot_tiny_arcMax_Conv4")
    assert record["n_episodes"] == len(record["accuracy_per_episode"]) == 6
    assert record["accuracy"] == pytest.approx(sum(record["accuracy_per_episode"]) / 6, abs=0.01)
    for key in ("command", "seed", "commit", "dataset_fingerprint", "accuracy_per_class", "versions", "config", "ci95"):
        assert record[key] is not None, key


def test_stage_3_reports_fine_tuning_alignment_and_their_paired_difference(trained, tmp_path):
    outcome = call("associative_alignment", *ALIGN, *folders(trained), "--results_dir", tmp_path)
    assert outcome.status == 0, outcome.err
    record = json.loads(
        (tmp_path / "tables" / "associative_alignment_3way_2shot_tiny_arcMax_Conv4_centroid.json").read_text()
    )
    gains = [
        a - b
        for a, b in zip(record["accuracy_per_episode"], record["fine_tuning"]["accuracy_per_episode"], strict=True)
    ]
    assert len(gains) == 3
    assert record["difference"]["accuracy"] == pytest.approx(sum(gains) / 3, abs=0.01)
    assert record["difference"]["ci95"] == pytest.approx(4.3027 * torch.tensor(gains).std().item() / 3**0.5, abs=0.01)
    assert "paired difference" in outcome.out


@pytest.mark.parametrize("method", ["softMax", "cosMax"])
def test_the_other_heads_run_through_both_stages(workspace, method):
    for script, flags in (("transferLearning", TRAIN), ("associative_alignment", ALIGN)):
        outcome = call(script, *flags, *folders(workspace), "--method", method)
        assert outcome.status == 0, outcome.err


@pytest.mark.parametrize(
    "flags",
    [
        ["naive"],
        ["adversarial"],
        ["adversarial", "--critic_constraint", "gp"],
        *(["centroid", "--align_blocks", k] for k in (1, 4)),
        ["head", "--align_blocks", 0],
    ],
)
def test_every_kind_of_alignment_changes_the_backbone_and_records_its_curve(trained, tmp_path, flags):
    curve = ["--record_curve", 1, "--lr", 0.01, "--align_iters", 4, "--results_dir", tmp_path]
    outcome = call("associative_alignment", *ALIGN, *folders(trained), *curve, "--alignment", *flags)
    assert outcome.status == 0, outcome.err
    record = json.loads(next((tmp_path / "tables").glob(f"*_{flags[0]}.json")).read_text())
    assert [row["iteration"] for row in record["curve"]] == [0, 1, 2, 3, 4]
    assert record["curve"][0]["accuracy"] == pytest.approx(record["fine_tuning"]["accuracy"], abs=0.01)
    assert record["curve"][-1]["accuracy"] == pytest.approx(record["accuracy"], abs=0.01)
    assert record["curve"][-1]["gain"] == pytest.approx(record["difference"]["accuracy"], abs=0.01)


def test_in_feature_space_a_run_goes_on_where_it_stopped_and_its_episode_is_kept(trained, tmp_path):
    flags = [*CURVE, *folders(trained), "--align_blocks", 0, "--save_episode", 1]
    for root, n_episodes in (("whole", [5]), ("parts", [2, 5])):
        for n in n_episodes:
            more = ["--n_episodes", n, "--results_dir", tmp_path / root, "--resume"]
            outcome = call("associative_alignment", *flags, *more)
            assert outcome.status == 0, outcome.err
    whole, parts = (next((tmp_path / root / "tables").glob("*.json")) for root in ("whole", "parts"))
    records = [json.loads(path.read_text()) for path in (whole, parts)]
    for key in ("accuracy_per_episode", "fine_tuning", "curve", "confusion"):
        assert records[0][key] == records[1][key], key
    episode = read_saved_episodes(tmp_path / "whole" / "episodes" / f"{whole.stem}.pt")[0]
    assert torch.equal(episode["query"]["before"], episode["query"]["after"])


def test_without_alignment_the_result_is_fine_tuning(trained, tmp_path):
    flags = ["--alignment", "none", "--test_split", "val", "--results_dir", tmp_path]
    assert call("associative_alignment", *ALIGN, *folders(trained), *flags).status == 0
    record = json.loads(next((tmp_path / "tables").glob("*_none.json")).read_text())
    assert record["accuracy_per_episode"] == record["fine_tuning"]["accuracy_per_episode"]
    assert set(record["accuracy_per_class"]) <= {f"class{c:02d}" for c in range(6, 12)}  # the val classes


@pytest.mark.parametrize("n_way", [2, 6])
def test_any_way_works_and_base_classes_are_shared_out_when_short(trained, tmp_path, n_way):
    flags = [*ALIGN, *folders(trained), "--results_dir", tmp_path, "--test_n_way", n_way, "--n_B", 10]
    init = ["--init_from", trained / "results" / "models" / CHECKPOINT]
    outcome = call("associative_alignment", *flags, *init)
    assert outcome.status == 0, outcome.err
    assert f"{6 // n_way} related base classes per class" in outcome.out


def test_the_same_command_gives_the_same_numbers_with_any_number_of_workers(trained, tmp_path):
    shutil.copytree(trained / "benchmarks", tmp_path / "benchmarks")
    name = "associative_alignment_3way_2shot_tiny_arcMax_Conv4_centroid"
    for workers in (0, 2):
        again = [*folders(tmp_path, f"results{workers}"), "--cache_dir", tmp_path / f"cache{workers}"]
        for script, flags in (("transferLearning", TRAIN), ("associative_alignment", ALIGN)):
            outcome = call(script, *flags, *again, "--num_workers", workers)
            assert outcome.status == 0, outcome.err
        ours = load_checkpoint(tmp_path / f"results{workers}" / "models" / CHECKPOINT)
        first = load_checkpoint(trained / "results" / "models" / CHECKPOINT)
        for key, value in first.backbone_state.items():
            assert torch.equal(ours.backbone_state[key], value), key
    records = [result(tmp_path, name, f"results{workers}") for workers in (0, 2)]
    assert records[0]["accuracy_per_episode"] == records[1]["accuracy_per_episode"]


def test_another_seed_gives_other_episodes_unless_a_file_fixes_them(trained, tmp_path):
    def accuracies(results, *flags):
        init = ["--init_from", trained / "results" / "models" / CHECKPOINT, "--n_epoch", 0, "--ft_n_epoch", 20]
        every = [*TINY, "--n_episodes", 6, *folders(trained), "--results_dir", tmp_path / results, *init, *flags]
        outcome = call("transferLearning", *every)
        assert outcome.status == 0, outcome.err
        (table,) = (tmp_path / results / "tables").glob("transferLearning_*.json")
        return json.loads(table.read_text())["accuracy_per_class"]

    file = ["--episodes_file", tmp_path / "episodes.json"]
    written = accuracies("a", *file, "--seed", 1)
    assert accuracies("b", "--seed", 1) == written
    assert accuracies("c", "--seed", 2) != written
    record = json.loads(file[1].read_text())
    assert record["n_way"] == 3 and len(record["episodes"]) == 6
    assert accuracies("d", *file, "--seed", 2).keys() == written.keys()


def test_testing_epochs_pool_their_episodes(trained, tmp_path):
    flags = [*ALIGN, *folders(trained), "--results_dir", tmp_path, "--testing_epochs", 2, "--align_iters", 0]
    assert call("associative_alignment", *flags).status == 0
    record = json.loads(next((tmp_path / "tables").glob("*.json")).read_text())
    assert record["n_episodes"] == 6
    assert record["accuracy"] == record["fine_tuning"]["accuracy"]  # no iteration, no change


def test_the_tuned_preset_swaps_defaults_by_alignment_and_flags_beside_it_win():
    def of(*flags):
        return args_parser("alignment", ["--align_preset", "tuned", *flags])

    centroid, adversarial = of("--aug_size", "7"), of("--alignment", "adversarial", "--preset", "laptop")
    assert (centroid.align_blocks, centroid.align_bn, centroid.aug_size, centroid.align_lr) == (1, "eval", 7, 1e-3)
    assert (adversarial.align_blocks, adversarial.align_bn, adversarial.aug_size) == (1, "train", 20)
    assert (adversarial.align_lr, adversarial.support_lr, adversarial.critic_steps) == (1e-5, 1e-3, 1)
    assert args_parser("alignment", []).align_blocks is None
    assert args_parser("alignment", []).align_lr == 1e-3
    plain = args_parser("alignment", ["--alignment", "adversarial", "--lr", "1e-4"])
    assert (plain.align_lr, plain.related_lr, plain.critic_steps) == (1e-5, 1e-4, 5)
    assert args_parser("alignment", ["--alignment", "adversarial", "--align_lr", "1e-3"]).align_lr == 1e-3
    # predict.py fills in its alignment from --base: the preset is that alignment's all the same.
    predict = ["--support", "s", "--query", "q", "--checkpoint", "c", "--base", "b", "--align_preset", "tuned"]
    assert args_parser("predict", predict).align_bn == "eval"
    assert args_parser("predict", [*predict, "--alignment", "adversarial"]).align_bn == "train"


def test_the_tuned_result_lies_beside_the_published_one_and_is_told_from_it(workspace):
    for flags in ([], ["--align_preset", "tuned"]):
        outcome = call("associative_alignment", *ALIGN, *folders(workspace), *flags)
        assert outcome.status == 0, outcome.err
    report = call("reporting.report", workspace / "results").out
    assert "arcMax, centroid alignment |" in report and "arcMax, centroid alignment, tuned |" in report


def test_report_and_figure_are_made_from_result_files(workspace):
    assert call("associative_alignment", *ALIGN, *folders(workspace)).status == 0
    report = call("reporting.report", workspace / "results")
    assert "arcMax, centroid alignment" in report.out and "3-way 2-shot" in report.out
    assert call("reporting.figures", workspace / "results").status == 0
    assert (workspace / "results" / "figures" / "training.png").stat().st_size > 10_000


def test_a_preset_yields_to_flags():

    args = args_parser("transfer", ["--preset", "laptop", "--n_epoch", "7"])
    assert (args.dataset, args.n_epoch, args.no_flip) == ("glyphs", 7, True)
    assert args_parser("transfer", []).n_epoch == 600


def test_a_bare_clone_says_where_it_looked_and_what_to_do(tmp_path):
    """In a process of its own, the way a newcomer meets it."""
    outcome = run("associative_alignment.py", "--method", "arcMax", "--benchmarks_dir", tmp_path, check=False)
    assert outcome.returncode == 2 and not outcome.stdout
    assert outcome.stderr.count("\n") == 1
    for part in (str(tmp_path / "miniImagenet"), "<class>/<image>", "data.prepare miniImagenet", "--dataset glyphs"):
        assert part in outcome.stderr


def spoil_checkpoint(root):
    (root / "results" / "models" / CHECKPOINT).write_bytes(b"not a checkpoint")


def rename_base_class(root):
    folder = root / "benchmarks" / "tiny" / "base" / "class00"
    folder.rename(folder.with_name("other"))


def empty_class(root):
    (root / "benchmarks" / "tiny" / "novel" / "empty").mkdir()


def block_results(root):
    (root / "results" / "tables").rename(root / "results" / "kept")
    (root / "results" / "tables").write_text("a file where a folder is needed")


def nothing(root):
    pass


USER_ERRORS = {
    "missing dataset": ("transferLearning", nothing, ["--dataset", "absent"], ["absent", "data.prepare", "glyphs"]),
    "empty class": ("transferLearning", empty_class, [], ["empty", "no images"]),
    "image too small for Conv4": (
        "transferLearning",
        nothing,
        ["--img_size", 8, "--overwrite"],
        ["16 pixels", "--img_size"],
    ),
    "diverging loss": ("transferLearning", nothing, ["--lr", 1e30, "--method", "softMax"], ["epoch", "batch", "--lr"]),
    "no such device": ("transferLearning", nothing, ["--device", "mps"], ["mps", "cpu"]),
    "way of 1": ("transferLearning", nothing, ["--test_n_way", 1], ["--test_n_way", "at least 2"]),
    "crop scale out of order": ("transferLearning", nothing, ["--crop_scale", 1, 0.5], ["--crop_scale", "order"]),
    "unknown flag": ("transferLearning", nothing, ["--n_shots", 5], ["--n_shots", "--help"]),
    "no checkpoint": ("associative_alignment", nothing, ["--n_shot", 1], ["1shot", "transferLearning.py"]),
    "init_from is missing": ("associative_alignment", nothing, ["--init_from", "absent.tar"], ["absent.tar"]),
    "not a checkpoint": ("associative_alignment", spoil_checkpoint, [], [CHECKPOINT, "not a checkpoint"]),
    "too many blocks": ("associative_alignment", nothing, ["--align_blocks", 5], ["--align_blocks 5", "4 blocks"]),
    "other base classes": ("associative_alignment", rename_base_class, [], ["base classes", "trained on"]),
    "unwritable results": ("associative_alignment", block_results, [], ["tables", "cannot be written"]),
    "unwritable cache": (
        "associative_alignment",
        nothing,
        ["--cache_dir", "/dev/null/cache"],
        ["/dev/null/cache", "--cache_dir"],
    ),
    "no results to report": ("reporting.report", nothing, ["absent"], ["absent", "run a stage"]),
}


def kept_files(workspace):
    found = [path for path in (workspace / "results").rglob("*") if path.suffix not in (".jsonl", ".lock")]
    return {path: path.read_bytes() for path in found if path.is_file()}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_a_user_error_is_one_clear_line_and_overwrites_nothing(workspace, case):
    script, spoil, flags, expected = USER_ERRORS[case]
    spoil(workspace)
    stage = {"transferLearning": TRAIN, "associative_alignment": ALIGN, "reporting.report": []}[script]
    before = kept_files(workspace)
    outcome = call(script, *stage, *(folders(workspace) if stage else []), *flags)
    assert outcome.status == 2, outcome.err
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for part in expected:
        assert part in outcome.err
    assert kept_files(workspace) == before


def test_the_readme_names_every_script():
    readme = (ROOT / "README.md").read_text()
    for name in ("transferLearning.py", "associative_alignment.py", "args_parser.py", "make demo", "make test"):
        assert name in readme


def test_a_model_of_one_benchmark_is_tested_and_aligned_on_the_novel_classes_of_another(workspace):
    make_benchmark(workspace / "benchmarks" / "other", seed=1)
    cross = ["--novel_dataset", "other", *folders(workspace)]
    init = ["--n_epoch", 0, "--init_from", workspace / "results" / "models" / CHECKPOINT]
    for script, flags in (("transferLearning", [*TRAIN, *init]), ("associative_alignment", ALIGN)):
        outcome = call(script, *flags, *cross)
        assert outcome.status == 0, outcome.err
    record = result(workspace, "associative_alignment_3way_2shot_tiny_arcMax_Conv4_centroid_to_other")
    assert (record["dataset"], record["novel_dataset"]) == ("tiny", "other")
    within = result(workspace, "transferLearning_3way_2shot_tiny_arcMax_Conv4")
    assert record["dataset_fingerprint"] != within["dataset_fingerprint"]


@pytest.mark.parametrize(
    ("script", "per_epoch", "flags"),
    [("transferLearning", 3, []), ("metaLearning", 2, ["--episodes_per_epoch", 2, "--n_way", 3, "--train_n_query", 2])],
)
def test_the_bar_of_an_epoch_is_of_all_that_are_left(tmp_path, monkeypatch, script, per_epoch, flags):
    """So that the first says how long the whole training will take."""
    make_benchmark(tmp_path / "benchmarks" / "tiny")
    totals, bar = [], Run.bar

    def seen(run, items, name, unit, **options):
        totals.extend([options.get("total")] * name.endswith(" and on"))
        return bar(run, items, name, unit, **options)

    monkeypatch.setattr(Run, "bar", seen)
    flags = [*TINY, *flags, "--n_epoch", 3, "--val_episodes", 2, "--n_episodes", 2, "--ft_n_epoch", 2]
    flags += ["--batch_size", 16] if script == "transferLearning" else []
    outcome = call(script, *flags, *folders(tmp_path))
    assert outcome.status == 0, outcome.err
    assert totals == [3 * per_epoch, 2 * per_epoch, per_epoch]
