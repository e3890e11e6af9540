"""Stage 2: training and testing meta-learners, the chain of the three stages, and a user's errors."""

import importlib
import json
import re

import pytest
import torch

from args_parser import args_parser
from data.benchmarks import DataOptions, load_split
from data.episodes import EpisodeShape, sample_episodes
from data.transforms import normalise
from methods.meta_learners import META_LEARNERS
from persistence.checkpoints import load_backbone, load_checkpoint
from tests.helpers import TINY, call, folders, make_benchmark, metrics, numbers, result

TEST = [*TINY, "--n_episodes", 6]
STAGE_1 = [*TEST, "--n_epoch", 1, "--val_episodes", 2, "--ft_n_epoch", 10]
META = [*TEST, "--n_way", 4, "--train_n_query", 5, "--n_epoch", 3, "--episodes_per_epoch", 3, "--val_episodes", 5]
ALIGN = [*TINY, "--n_episodes", 2, "--align_iters", 1, "--aug_size", 4, "--n_B", 2, "--ft_n_epoch", 10]


def name(method):
    return f"3way_2shot_tiny_{method}_Conv4_bestModel"


def run_name(method):
    """What the result files of such a run end with."""
    return name(method).removesuffix("_bestModel")


def model(root, method, results="results"):
    return root / results / "models" / f"{name(method)}.tar"


def succeed(script, *flags):
    outcome = call(script, *flags)
    assert outcome.status == 0, outcome.err
    return outcome


@pytest.fixture(scope="module")
def meta_trained(tmp_path_factory):
    """A folder with a tiny benchmark, a stage-1 checkpoint and one of each meta-learner. Tests must not write to it."""
    root = tmp_path_factory.mktemp("meta")
    make_benchmark(root / "benchmarks" / "tiny")
    succeed("transferLearning", *STAGE_1, *folders(root))
    for method in META_LEARNERS:
        succeed("metaLearning", *META, *folders(root), "--method", method)
    return root


@pytest.mark.parametrize("method", META_LEARNERS)
def test_the_best_model_is_kept_and_tested_with_a_full_result(meta_trained, tmp_path, method):
    checkpoint = load_checkpoint(model(meta_trained, method))
    assert (checkpoint.stage, checkpoint.method, checkpoint.img_size) == ("metaLearning", method, 16)
    assert checkpoint.class_names == [f"class{c:02d}" for c in range(6)]
    assert bool(checkpoint.head_state) == (method != "ProtoNet")
    log = meta_trained / "results" / "logs" / name(method) / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    best = max(rows, key=lambda row: row["val_accuracy"])
    assert checkpoint.epoch == best["epoch"] and checkpoint.val_accuracy == pytest.approx(best["val_accuracy"])
    record = result(meta_trained, f"metaLearning_{run_name(method)}")
    stage_1 = result(meta_trained, f"transferLearning_{run_name('arcMax')}")
    assert record.keys() == stage_1.keys()
    assert len(record["accuracy_per_episode"]) == 6
    # The test was that of the checkpoint, with the meta-learner's own module: it can be had again.
    again = [*TEST, *folders(meta_trained), "--results_dir", tmp_path, "--method", method, "--n_epoch", 0]
    succeed("metaLearning", *again, "--init_from", model(meta_trained, method))
    tested = json.loads((tmp_path / "tables" / f"metaLearning_{run_name(method)}.json").read_text())
    assert tested["accuracy_per_episode"] == record["accuracy_per_episode"]


@pytest.mark.parametrize("method", META_LEARNERS)
def test_the_same_command_gives_the_same_numbers(meta_trained, tmp_path, method):
    (tmp_path / "benchmarks").symlink_to(meta_trained / "benchmarks")
    succeed("metaLearning", *META, *folders(tmp_path), "--method", method, "--num_workers", 0)
    first, again = load_checkpoint(model(meta_trained, method)), load_checkpoint(model(tmp_path, method))
    for states in ("backbone_state", "head_state"):
        for key, value in getattr(first, states).items():
            assert torch.equal(getattr(again, states)[key], value), key
    accuracies = [
        result(root, f"metaLearning_{run_name(method)}")["accuracy_per_episode"] for root in (meta_trained, tmp_path)
    ]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("method", ["ProtoNet", "RelationNet"])
def test_stage_2_starts_from_stage_1_and_stage_3_from_stage_2(meta_trained, tmp_path, method):
    first = load_checkpoint(model(meta_trained, "arcMax"))
    backbone, _ = load_backbone(model(meta_trained, "arcMax"), "Conv4", 16, relation=method == "RelationNet")
    assert backbone.map_shape == ((64, 2, 2) if method == "RelationNet" else (64, 1, 1))
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, first.backbone_state[key])
    (tmp_path / "benchmarks").symlink_to(meta_trained / "benchmarks")
    flags = [*folders(tmp_path), "--init_from"]
    succeed("metaLearning", *META, "--lr", 1e-9, "--method", method, *flags, model(meta_trained, "arcMax"))
    second = load_checkpoint(model(tmp_path, method))
    for key, value in second.backbone_state.items():
        if key.endswith("weight"):  # training went on from stage 1's weights, at a rate that hardly moves them
            torch.testing.assert_close(value, first.backbone_state[key], rtol=1e-4, atol=1e-6)
    for script, rest in (("associative_alignment", ALIGN), ("transferLearning", [*TEST, "--n_epoch", 0])):
        succeed(script, *rest, *flags, model(tmp_path, method), "--method", "arcMax")
    aligned = json.loads(next((tmp_path / "results" / "tables").glob("associative*.json")).read_text())
    assert aligned["checkpoint"] == str(model(tmp_path, method)) and aligned["checkpoint_epoch"] == second.epoch


@pytest.mark.parametrize(("script", "method"), [("metaLearning", "MatchingNet"), ("transferLearning", "arcMax")])
def test_a_model_to_start_from_competes(meta_trained, tmp_path, monkeypatch, script, method):
    """Training makes it worse here; an interrupted and resumed run gives what one run gives."""
    epoch_function = "train_episodic_epoch" if script == "metaLearning" else "train_base_epoch"
    train_one_epoch = getattr(importlib.import_module(script), epoch_function)
    # The epochs of a whole run; then one is interrupted in its first epoch, the next in its second, and the third ends.
    ends_well = iter([True, True, True, False, True, False, True, True])

    def train_badly(trained, *given):
        if not next(ends_well):
            raise KeyboardInterrupt
        figures = train_one_epoch(trained, *given)
        torch.nn.init.zeros_(trained.backbone.layers[-1].bn.weight)
        torch.nn.init.ones_(trained.backbone.layers[-1].bn.bias)
        return figures

    monkeypatch.setattr(f"{script}.{epoch_function}", train_badly)
    (tmp_path / "benchmarks").symlink_to(meta_trained / "benchmarks")
    start = model(meta_trained, "arcMax")
    flags = [*(META if script == "metaLearning" else STAGE_1), "--n_epoch", 3, "--method", method]
    flags += ["--val_episodes", 9, "--ft_n_epoch", 200, "--init_from", start, *folders(tmp_path), "--resume"]
    outcome = succeed(script, *flags)
    assert re.search(r"^before training  val .*  best ", outcome.out, re.MULTILINE)
    rows = metrics(tmp_path, name(method))
    assert [row["epoch"] for row in rows] == [-1, 0, 1, 2] and rows[0]["loss"] is None
    best, began = load_checkpoint(model(tmp_path, method)), load_checkpoint(start)
    assert best.epoch == -1 and best.val_accuracy == rows[0]["val_accuracy"] > rows[-1]["val_accuracy"]
    for key, value in best.backbone_state.items():
        assert torch.equal(value, began.backbone_state[key])

    whole = numbers(tmp_path, script)
    (tmp_path / "results").rename(tmp_path / "whole")
    first, second, third = (call(script, *flags) for _ in range(3))
    assert (first.status, second.status, third.status) == (130, 130, 0)
    assert "before training" in second.out and "before training" not in third.out
    assert numbers(tmp_path, script) == whole


def test_without_a_model_to_start_from_nothing_is_validated_first(meta_trained):
    assert [row["epoch"] for row in metrics(meta_trained, name("ProtoNet"))] == [0, 1, 2]


def test_a_warm_up_leaves_the_backbone_of_stage_1_as_it_is(meta_trained, tmp_path):
    (tmp_path / "benchmarks").symlink_to(meta_trained / "benchmarks")
    flags = [*META, *folders(tmp_path), "--method", "RelationNet", "--init_from", model(meta_trained, "arcMax")]
    succeed("metaLearning", *flags, "--n_epoch", 2, "--warm_up_epochs", 2)
    last = torch.load(tmp_path / "results" / "models" / f"{run_name('RelationNet')}_last.tar", weights_only=True)
    for key, value in load_checkpoint(model(meta_trained, "arcMax")).backbone_state.items():
        assert torch.equal(last["backbone"][key], value), key
    succeed("metaLearning", *flags, "--n_epoch", 3, "--warm_up_epochs", 2, "--resume")
    moved = torch.load(tmp_path / "results" / "models" / f"{run_name('RelationNet')}_last.tar", weights_only=True)
    assert not torch.equal(moved["backbone"]["layers.0.conv.weight"], last["backbone"]["layers.0.conv.weight"])


@pytest.mark.parametrize(("supported", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_result_says_what_auto_precision_became(meta_trained, tmp_path, monkeypatch, supported, precision):
    (tmp_path / "cpuinfo").write_text("amx_bf16" if supported else "")
    monkeypatch.setattr("engine.precision.CPUINFO", tmp_path / "cpuinfo")
    flags = [*TEST, *folders(meta_trained), "--results_dir", tmp_path, "--n_epoch", 0, "--precision", "auto"]
    outcome = succeed("metaLearning", *flags, "--init_from", model(meta_trained, "arcMax"))
    record = json.loads((tmp_path / "tables" / f"metaLearning_{run_name('ProtoNet')}.json").read_text())
    assert record["config"]["precision"] == precision and f", {precision}\n" in outcome.out


def test_the_first_line_says_what_a_run_does(meta_trained, tmp_path):
    flags = [flag for flag in [*TEST, *folders(meta_trained)] if flag != "--quiet"]
    flags += ["--results_dir", tmp_path, "--n_epoch", 0, "--init_from", model(meta_trained, "arcMax")]
    table = tmp_path / "tables" / f"metaLearning_{run_name('ProtoNet')}.json"
    line = "metaLearning: ProtoNet, Conv4, tiny: 0 epochs of 100 episodes, then 6 test episodes"
    outcome = succeed("metaLearning", *flags)
    assert outcome.out.startswith(f"{line}; result: {table}\n")
    assert outcome.err == ""  # no bar outside a terminal
    assert "metaLearning: " not in succeed("metaLearning", *flags, "--quiet").out


def test_protonet_of_a_stage_1_backbone_is_the_nearest_class_mean(meta_trained, tmp_path):
    flags = [*TEST, *folders(meta_trained), "--results_dir", tmp_path, "--n_epoch", 0]
    succeed("metaLearning", *flags, "--init_from", model(meta_trained, "arcMax"))
    record = json.loads((tmp_path / "tables" / f"metaLearning_{run_name('ProtoNet')}.json").read_text())
    novel = load_split(DataOptions(meta_trained / "benchmarks", 16, meta_trained / "cache"), "tiny", "novel")
    z = load_backbone(model(meta_trained, "arcMax"), "Conv4", 16)[0].eval()(normalise(novel.images))
    for index, accuracy in zip(
        sample_episodes(novel, EpisodeShape(3, 2, 3), 6, seed=0).index, record["accuracy_per_episode"], strict=True
    ):
        means = torch.stack([z[support].mean(0) for support in index[:, :2]])
        right = [torch.cdist(z[q][None], means).argmin().item() == w for w in range(3) for q in index[w, 2:]]
        assert accuracy == pytest.approx(100 * sum(right) / 9, abs=0.01)


def test_an_untrained_module_is_pointed_out(meta_trained, tmp_path):
    flags = [*TEST, *folders(meta_trained), "--results_dir", tmp_path, "--n_epoch", 0, "--method", "MatchingNet"]
    outcome = succeed("metaLearning", *flags, "--init_from", model(meta_trained, "ProtoNet"))
    assert "MatchingNet is tested untrained" in outcome.out


def test_flags_have_the_published_names_and_the_preset_yields_to_them():
    assert args_parser("meta", ["--n_way", "7"]).train_n_way == args_parser("meta", ["--train_n_way", "7"]).train_n_way
    args = args_parser("meta", [])
    assert (args.train_n_way, args.train_n_query, args.n_epoch, args.episodes_per_epoch) == (5, 16, 400, 100)
    args = args_parser("meta", ["--preset", "laptop", "--n_epoch", "4"])
    assert (args.dataset, args.img_size, args.n_epoch, args.episodes_per_epoch) == ("glyphs", 42, 4, 60)


INIT = "--init_from"
USER_ERRORS = {
    "a head as the method": (["--method", "arcMax"], ["--method", "arcMax", "ProtoNet"]),
    "one training way": (["--n_way", 1], ["--train_n_way", "at least 2"]),
    "no training queries": (["--train_n_query", 0], ["--train_n_query", "at least 1"]),
    "a flag of stage 3": (["--n_B", 3], ["--n_B"]),
    "more training ways than base classes": (["--train_n_way", 7], ["base split", "6 classes", "7 ways"]),
    "base class too small": (["--train_n_query", 7], ["class00", "base split", "8 images", "9 are needed"]),
    "diverging loss": (["--lr", 1e30], ["epoch", "episode", "--lr"]),
    "other backbone": ([INIT, "stage 1", "--backbone", "ResNet12"], ["backbone Conv4, not ResNet12", "--backbone"]),
    "other image size": ([INIT, "stage 1", "--img_size", 32], ["img_size 16, not 32", "--img_size 16"]),
    "missing checkpoint": ([INIT, "absent.tar"], ["absent.tar"]),
    "unknown backbone": (["--backbone", "Conv5"], ["Conv5", "ResNet12", "torchvision:NAME"]),
    "unknown torchvision model": (["--backbone", "torchvision:resnet5O"], ["resnet5O", "try", "resnet50"]),
    "weights of our backbone": (["--weights", "DEFAULT"], ["--weights", "torchvision:NAME", "Conv4"]),
    "weights and checkpoint": (
        [INIT, "stage 1", "--weights", "DEFAULT", "--backbone", "torchvision:resnet18"],
        ["--weights", "--init_from", "one of the two"],
    ),
    "weights that are none": (
        ["--backbone", "torchvision:squeezenet1_1", "--weights", __file__],
        ["--weights", __file__, "state dict"],
    ),
}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_a_user_error_is_one_clear_line_and_leaves_nothing(meta_trained, tmp_path, case):
    flags, expected = USER_ERRORS[case]
    flags = [model(meta_trained, "arcMax") if flag == "stage 1" else flag for flag in flags]
    results = ["--results_dir", tmp_path, "--checkpoint_dir", tmp_path / "models"]
    outcome = call("metaLearning", *META, *folders(meta_trained), *results, *flags)
    assert outcome.status == 2, outcome.err
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for part in expected:
        assert part in outcome.err
    assert not list(tmp_path.rglob("*.tar"))
