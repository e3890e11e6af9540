"""The comparison of classifiers on the same episodes: its table, and its bad inputs."""

import re

import pytest
import torch

from args_parser import args_parser, from_flags
from docs.compare_classifiers import Comparison
from methods.alignment import AlignmentSetting
from tests.helpers import CHECKPOINT, call, make_benchmark

SMALL = ["--dataset", "tiny", "--n_way", 3, "--n_query", 3, "--n_episodes", 4, "--n_val", 2, "--quiet"]


@pytest.fixture(autouse=True)
def few_episodes(monkeypatch):
    monkeypatch.setattr("photos.choosing.N_EPISODES", 3)


def compare(root, *flags):
    where = ["--benchmarks_dir", root / "benchmarks", "--cache_dir", root / "cache"]
    checkpoint = ["--checkpoint", root / "results" / "models" / CHECKPOINT]
    return call("docs.compare_classifiers", *checkpoint, *where, *SMALL, "--n_B", 2, "--aug_size", 4, *flags)


def test_the_table_has_a_row_per_classifier(workspace):
    outcome = compare(workspace, "--n_shot", 1, 2)
    assert outcome.status == 0, outcome.err
    for n_shot in ("1 image each", "2 images each"):
        assert f"3 classes, {n_shot}, 4 novel episodes" in outcome.out
    assert len(re.findall(r"auto is better by -?[\d.]+ ± ", outcome.out)) == 8
    assert outcome.out.count("auto, which aligned ") == 2


def network():
    """A network of a user's own."""
    return torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten())


def test_a_network_of_ones_own_and_novel_classes_of_another_benchmark(workspace):
    where = ["--benchmarks_dir", workspace / "benchmarks", "--cache_dir", workspace / "cache"]
    own = ["--backbone", f"custom:{__name__}:network", "--novel_dataset", "tiny"]
    outcome = call("docs.compare_classifiers", *own, *where, *SMALL, "--n_shot", 1)
    assert outcome.status == 0 and "auto, which aligned" in outcome.out, outcome.err


def test_of_more_ways_than_there_are_val_classes_c_is_chosen_on_all_of_these(workspace, tmp_path):
    make_benchmark(tmp_path / "many", (6, 3, 6))
    outcome = compare(workspace, "--benchmarks_dir", tmp_path, "--dataset", "many", "--n_way", 5, "--n_shot", 1)
    assert outcome.status == 0 and "5 classes, 1 image each" in outcome.out, outcome.err


@pytest.mark.parametrize("i, base", [(0, []), (1, ["--base", "b", "--alignment", "head"])])
def test_the_heads_are_those_of_predict(i, base):
    args = args_parser("predict", ["--support", "s", "--query", "q", "--checkpoint", "c", *base])
    assert Comparison().settings[i] == from_flags(AlignmentSetting, args)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--n_way", 1], "--n_way 2"),
        (["--n_episodes", 0], "at least 1"),
        (["--dataset", "absent"], "no base split of 'absent'"),
        (["--checkpoint", "absent.tar"], "no checkpoint absent.tar"),
        (["--n_way", 99], "99"),
        (["--backbone", "custom:a:b"], "not allowed with"),
        (["--novel_dataset", "absent"], "no novel split of 'absent'"),
    ],
)
def test_bad_inputs_are_one_line(workspace, flags, message):
    outcome = compare(workspace, *flags)
    assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1, outcome.err
