"""The choice of a setting on val episodes: on made features, where what helps is known; and by the script."""

import dataclasses
import json
import shutil

import pytest
import torch

from data.episodes import EpisodeShape, sample_episodes
from engine.run import Run
from methods import setting_choice
from methods.alignment import AlignmentSetting
from methods.feature_alignment import align_features
from methods.features import Source, feature_source, trainable_blocks
from methods.intervals import mean_and_ci95
from methods.novel_finetune import HeadFit
from methods.related_base import RelatedSetting
from methods.setting_choice import (
    BLOCK_SETTINGS,
    FINE_TUNING,
    SETTINGS,
    Offered,
    SettingGain,
    candidates,
    compare_settings,
    flags_text,
    winner,
)
from models.conv4 import Conv4
from persistence import chosen_setting as kept
from tests.helpers import RUN, TINY, call, folders, make_split, result

D, N_VAL, N_EACH = 32, 10, 24
SHAPE = EpisodeShape(5, 1, 15)
SETTING = AlignmentSetting(fit=HeadFit(ft_n_epoch=100), related=RelatedSetting(aug_size=10))
NONE = flags_text(FINE_TUNING)
FROZEN = trainable_blocks(Conv4(16, 8), 0)


def made(base_like_val: bool) -> tuple[Source, Source]:
    """Val features around a centre a class, and base features around the same centres but tighter, or pure noise."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(N_VAL, D, generator=g)
    val, base = (make_split((N_EACH,) * n, side=1, split=split) for split, n in (("val", N_VAL), ("base", 4 * N_VAL)))
    z_val = centres[val.labels] + 1.2 * torch.randn(len(val.labels), D, generator=g)
    z_base = torch.randn(len(base.labels), D, generator=g)
    if base_like_val:
        z_base = centres[base.labels % N_VAL] + 0.5 * z_base
    return feature_source(z_val, val), feature_source(z_base, base)


@pytest.fixture
def small_choice(monkeypatch):
    """Fewer episodes and candidates, for tests of what is kept and not of what is chosen."""
    monkeypatch.setattr(kept, "N_EPISODES", 8)
    monkeypatch.setattr(setting_choice, "SETTINGS", [{**SETTINGS[0], "align_iters": n} for n in (3, 6)])
    monkeypatch.setattr(setting_choice, "BLOCK_SETTINGS", [{**flags, "align_iters": 3} for flags in BLOCK_SETTINGS])


def choose(base_like_val: bool, seed: int = 0) -> tuple[list[SettingGain], str]:
    """The choice with heads fitted to the end: else more steps on the support are a gain, whatever the base classes."""
    val, base = made(base_like_val)
    setting = dataclasses.replace(SETTING, fit=HeadFit(ft_n_epoch=1000, ft_lr=0.02))
    episodes = sample_episodes(val.split, SHAPE, 40, seed)
    rows = compare_settings([Offered(FROZEN, val, base)], episodes, candidates(setting), Run(seed=seed))
    return rows, winner(rows)


@pytest.mark.parametrize("seed", [0, 1])
def test_base_classes_that_are_noise_give_fine_tuning(seed):
    rows, chosen = choose(base_like_val=False, seed=seed)
    assert chosen == NONE
    assert all(row.gain < row.gain_ci95 for row in rows[1:])
    assert rows[0].gain == rows[0].gain_ci95 == 0


def test_base_classes_like_those_of_val_give_a_setting_in_feature_space_of_the_largest_gain():
    rows, chosen = choose(base_like_val=True)
    assert chosen != NONE
    best = next(row for row in rows if row.flags == chosen)
    assert best.gain > best.gain_ci95 > 0 and best.gain == max(row.gain for row in rows)


def test_only_a_gain_with_its_interval_above_zero_wins():
    rows = [
        SettingGain(NONE, 60, 0, 0, 1),
        SettingGain("a", 63, 3, 3, 1),
        SettingGain("b", 61, 1, 0.5, 1),
        SettingGain("c", 62, 2, 0.9, 1),
    ]
    assert winner(rows) == "c"
    assert winner(rows[:2]) == NONE


def test_what_gains_on_a_few_classes_alone_is_not_clear(monkeypatch):
    """Every episode of one class gains 10 points: that is sure of other episodes, and not of other classes."""
    val, base = made(base_like_val=True)
    episodes = sample_episodes(val.split, SHAPE, 60, 0)
    assert (without := int((episodes.classes != 0).all(1).sum())) >= 10 and without <= 50
    right = torch.full((60, 2, 5), 8)
    right[(episodes.classes == 0).any(1), 1] += 2
    counts = torch.diag_embed(right) + torch.diag_embed(20 - right[..., :4], 1)
    counts[..., 4, 0] = 20 - right[..., 4]
    monkeypatch.setattr(setting_choice, "paired_counts", lambda *_: counts)
    head = dataclasses.replace(SETTING, alignment="head")
    (row,) = compare_settings([Offered(FROZEN, val, base)], episodes, {"a": head}, Run())
    over_episodes = mean_and_ci95(100 * (right[:, 1, 0] - right[:, 0, 0]) / 20)[1]
    assert row.gain > over_episodes > 0 and row.gain_ci95 > row.gain and winner([row]) == NONE


def test_a_row_is_the_gain_of_alignment_over_fine_tuning_in_whatever_chunks(monkeypatch):
    val, base = made(base_like_val=True)
    episodes = sample_episodes(val.split, SHAPE, 7, 0)
    flags, setting = list(candidates(SETTING).items())[1]
    together = align_features([episodes.task(i) for i in range(7)], val, base, setting, Run(), 0)
    y = torch.arange(5).repeat_interleave(15)
    scores = [torch.stack([getattr(each, name) for each in together]) for name in ("finetuned", "aligned")]
    right = [100 * (of_way.argmax(-1) == y).double().mean().item() for of_way in scores]
    monkeypatch.setattr(setting_choice, "episodes_per_chunk", lambda *_: 3)
    (row,) = compare_settings([Offered(FROZEN, val, base)], episodes, {flags: setting}, Run())
    assert (row.flags, row.accuracy) == (flags, pytest.approx(right[1], abs=1e-3))
    assert row.gain == pytest.approx(right[1] - right[0], abs=1e-3)


def test_the_candidates_are_what_their_flags_say_and_fine_tuning_is_first():
    named = candidates(SETTING)
    assert list(named)[0] == NONE and len(named) == 1 + len(SETTINGS)
    tight = named["--align_s 5 --n_B 5 --align_iters 50"]
    assert (tight.align_s, tight.related.n_B, tight.align_iters, tight.alignment) == (5, 5, 50, "head")
    assert tight.fit == SETTING.fit and tight.related.aug_size == 10
    for rate in ("support_lr", "related_lr"):
        assert [getattr(each, rate) for each in named.values()].count(0.0) == 1


@pytest.mark.parametrize(
    ("kept_classes", "words"),
    [(0, ["val holds no class folders"]), (2, ["val split of 'tiny' has 2 classes", "smaller way or add classes"])],
)
def test_without_enough_val_classes_auto_is_one_line(workspace, kept_classes, words):
    for folder in sorted((workspace / "benchmarks" / "tiny" / "val").iterdir())[kept_classes:]:
        shutil.rmtree(folder)
    outcome = call("associative_alignment", *TINY, *folders(workspace), "--align_preset", "auto")
    assert outcome.status == 2 and len(outcome.err.splitlines()) == 1, outcome
    assert all(word in outcome.err for word in words), outcome.err


def test_the_last_block_is_a_candidate_where_its_episodes_are_aligned_together():
    fewer, more = candidates(SETTING), candidates(SETTING, last_block=True)
    assert list(more)[: len(fewer)] == list(fewer) and len(more) == len(fewer) + len(BLOCK_SETTINGS)
    centroid = more["--alignment centroid --align_bn train"]
    assert (centroid.alignment, centroid.align_bn, centroid.align_iters) == ("centroid", "train", SETTING.align_iters)


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.usefixtures("small_choice")
def test_the_script_chooses_names_it_in_the_result_and_its_flags_give_the_same_numbers(workspace, monkeypatch, blocks):
    monkeypatch.setattr(kept, "winner", lambda rows: rows[-1 if blocks else 1].flags)
    protocol = [*TINY, "--n_episodes", 3, "--ft_n_epoch", 20, *folders(workspace)]
    auto = [*protocol, "--align_preset", "auto", "--aug_size", 4]
    outcome = call("associative_alignment", *auto)
    assert outcome.status == 0, outcome.err
    record = result(workspace, f"associative_alignment_{RUN}_auto")
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("chosen: ")]
    assert line.endswith(record["align_preset_auto"]["flags"]) and f"--align_blocks {blocks} " in line
    assert all(row["flags"] in outcome.out for row in record["align_preset_auto"]["rows"])

    again = call("associative_alignment", *auto, "--overwrite")
    assert again.status == 0 and line in again.out
    words = line.removeprefix("chosen: ").split()
    by_flags = call("associative_alignment", *protocol, *words, "--results_dir", workspace / "by_flags")
    assert by_flags.status == 0, by_flags.err
    (other,) = (workspace / "by_flags" / "tables").glob("*.json")
    assert json.loads(other.read_text())["accuracy_per_episode"] == record["accuracy_per_episode"]


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("associative_alignment", ["--n_B", 3], "auto chooses --n_B itself"),
        ("associative_alignment", ["--align_blocks", 1], "auto chooses --align_blocks itself: give 0"),
        ("associative_alignment", ["--alignment", "centroid"], "auto chooses --alignment itself"),
        ("associative_alignment", ["--test_split", "val"], "give novel"),
        ("predict", ["--support", "s", "--query", "q", "--checkpoint", "c"], "--alignment auto"),
    ],
)
def test_auto_beside_a_flag_that_it_chooses_is_one_line(script, flags, words):
    outcome = call(script, "--align_preset", "auto", *flags)
    assert outcome.status == 2 and words in outcome.err and len(outcome.err.splitlines()) == 1
