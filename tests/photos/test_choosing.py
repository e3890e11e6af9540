"""Whether to align: what is measured, and that a stopped run goes on."""

import pytest
import torch

from engine.errors import UserError
from engine.run import Run
from methods.alignment import AlignmentSetting
from methods.features import feature_source
from methods.novel_finetune import HeadFit
from photos import choosing, confidence
from photos.choosing import choose_alignment, episodes_of, new_classes, own_examples
from tests.helpers import make_split

SETTING = AlignmentSetting("auto", HeadFit(ft_n_epoch=5, ft_init="prototypes"), align_iters=2)


def source(counts, seed, split="novel"):
    made = make_split(counts, seed=seed, split=split)
    return feature_source(made.images.flatten(1).float()[:, :32] - 128, made)


def no_val():
    raise UserError("none")


def test_every_query_has_the_label_of_its_class(monkeypatch):
    monkeypatch.setattr(choosing, "N_EPISODES", 4)
    novel, base = source((3, 3, 2), 0), source((6,) * 8, 1, "base")
    found = [own_examples(novel, base), episodes_of(base, base, 3, "val classes", Run())]
    found.append(new_classes(base, ["other"], 3, Run()))
    for evidence in found:
        y, truth = evidence.source.split.labels, evidence.truth.split([len(task.query) for task in evidence.tasks])
        for task, labels in zip(evidence.tasks, truth, strict=True):
            by_class = dict(zip(task.y_support.tolist(), y[task.support].tolist(), strict=True))
            assert [by_class[w] for w in labels.tolist()] == y[task.query].tolist()
    drawn, rest = set(found[2].source.split.class_names), set(found[2].base.split.class_names)
    assert len(drawn) == 4 and not drawn & rest and drawn | rest == set(base.split.class_names)
    with pytest.raises(UserError, match="one example"):
        own_examples(source((1, 3), 0), base)
    for trained_on in ([], base.split.class_names):  # not known, and all known
        with pytest.raises(UserError, match="too few"):
            new_classes(base, trained_on, 3, Run())


@pytest.mark.parametrize("better", [0, 1])
def test_what_answers_more_right_is_chosen_and_nothing_measured_is_fine_tuning(monkeypatch, tmp_path, better):
    novel, base = source((3, 3), 0), source((6,) * 8, 1, "base")
    right = torch.eye(2)[torch.tensor([0, 1] * 3)]
    both = (right, 1 - right) if better == 0 else (1 - right, right)
    monkeypatch.setattr(choosing, "left_out_logits", lambda *_: both)
    setting, why = choose_alignment(novel, base, no_val, [], SETTING, tmp_path, Run())
    assert setting.alignment == ("none", "head")[better] and f"{6 * better} right aligned" in why
    setting, why = choose_alignment(source((1, 3), 0), base, no_val, [], SETTING, tmp_path, Run())
    assert setting.alignment == "none" and "a class has one example" in why


def test_a_gain_that_chance_can_make_is_not_clear():
    one, none = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
    for gained, lost, clear in [(4, 0, True), (3, 0, False), (60, 40, True), (58, 42, False), (0, 9, False)]:
        after = torch.cat([one.repeat(gained), none.repeat(lost), one.repeat(50)])
        before = torch.cat([none.repeat(gained), one.repeat(lost), one.repeat(50)])
        assert choosing.clearly_more(after, before) == clear


def test_a_stopped_choice_goes_on_with_what_it_has_measured(monkeypatch, tmp_path):
    novel, base = source((5, 5, 5), 0), source((6,) * 8, 1, "base")
    monkeypatch.setattr(confidence, "MAX_FOLDS", 2)
    expected = choose_alignment(novel, base, no_val, [], SETTING, tmp_path / "whole", Run())
    whole, done = confidence.fold_logits, []

    def stopping(*arguments):
        if len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(1)
        return whole(*arguments)

    monkeypatch.setattr(confidence, "fold_logits", stopping)
    monkeypatch.setattr(confidence, "episodes_per_chunk", lambda *_: 1)
    stop_after = 1
    with pytest.raises(KeyboardInterrupt):
        choose_alignment(novel, base, no_val, [], SETTING, tmp_path / "kept", Run())
    kept = list((tmp_path / "kept").iterdir())
    assert len(kept) == 1
    stop_after = 2  # one more, for the rest is kept
    assert choose_alignment(novel, base, no_val, [], SETTING, tmp_path / "kept", Run()) == expected
    kept[0].write_bytes(b"damaged")
    stop_after = 3
    assert choose_alignment(novel, base, no_val, [], SETTING, tmp_path / "kept", Run()) == expected
