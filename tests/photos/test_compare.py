"""The comparison of classifiers on the same episodes: its table, and its bad inputs."""

import re

import pytest
import torch

from args_parser import args_parser, from_flags
from methods.alignment import AlignmentSetting
from photos.compare import Comparison, calibration_error
from tests.helpers import CHECKPOINT, call

SMALL = [
    "--dataset",
    "tiny",
    "--n_way",
    3,
    "--n_query",
    3,
    "--n_episodes",
    4,
    "--n_calibrated",
    2,
    "--n_val",
    2,
    "--quiet",
]


def compare(root, *flags):
    where = ["--benchmarks_dir", root / "benchmarks", "--cache_dir", root / "cache"]
    checkpoint = ["--checkpoint", root / "results" / "models" / CHECKPOINT]
    return call("photos.compare", *checkpoint, *where, *SMALL, "--n_B", 2, "--aug_size", 4, *flags)


def test_the_table_has_a_row_a_classifier_and_what_the_temperature_does(workspace):
    pytest.importorskip("sklearn")
    outcome = compare(workspace, "--n_shot", 1, 2)
    assert outcome.status == 0, outcome.err
    for n_shot in ("1 image each", "2 images each"):
        assert f"3 classes, {n_shot}, 4 novel episodes" in outcome.out
    assert len(re.findall(r"aligned is better by -?[\d.]+ ± ", outcome.out)) == 6
    assert len(re.findall(r"calibration error [\d.]+ % before, [\d.]+ % after", outcome.out)) == 2
    assert len(re.findall(r"--reject 0.\d: [\d.]+ % kept", outcome.out)) == 6


@pytest.mark.parametrize("i, base", [(0, []), (1, ["--base", "b"])])
def test_the_heads_are_those_of_predict(i, base):
    args = args_parser("predict", ["--support", "s", "--query", "q", "--checkpoint", "c", *base])
    assert Comparison().settings[i] == from_flags(AlignmentSetting, args)


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy():
    p = torch.tensor([[0.9, 0.1]] * 4 + [[0.4, 0.6]] * 2)
    assert calibration_error(p, torch.tensor([0, 0, 0, 1, 1, 1])) == pytest.approx((4 * 0.15 + 2 * 0.4) / 6, abs=1e-6)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--n_way", 1], "--n_way 2"),
        (["--n_episodes", 0], "at least 1"),
        (["--dataset", "absent"], "no base split of 'absent'"),
        (["--checkpoint", "absent.tar"], "no checkpoint absent.tar"),
        (["--n_way", 99], "99"),
    ],
)
def test_bad_inputs_are_one_line(workspace, flags, message):
    outcome = compare(workspace, *flags)
    assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1, outcome.err
