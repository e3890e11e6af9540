"""Detection of the related base against the published numbers, and the draws from it."""

import pytest
import torch

from methods.features import Source
from methods.related_base import (
    RelatedSetting,
    choose_related_base,
    draw_by_setting,
    draw_related,
    drawn_per_class,
    related_base_of_head,
)
from models import build_head
from tests.helpers import golden, make_split, related_by_logits


def related_base_of_golden(n_B: int):
    g = golden("related_base")
    n_class, per_class, _ = g["z_base"].shape
    head = build_head("arcMax", 64, 5, 5.0, 0.001)
    head.weight.data = g["weight"]
    base = Source(g["z_base"].flatten(0, 1), None, make_split((per_class,) * n_class, side=1))
    return g, related_base_of_head(head, base, RelatedSetting(n_B))


@pytest.mark.device
def test_related_base_is_the_published_one():
    g, related = related_base_of_golden(int(golden("related_base")["n_B"]))
    torch.testing.assert_close(related.score, g["score"].float())
    for w in range(5):
        ours = torch.stack([related.samples[w] // 30, related.samples[w] % 30], 1)
        assert torch.equal(ours, g[f"related_{w}"].cpu())


@pytest.mark.device
def test_related_base_classes_are_disjoint_and_shared_out_evenly_when_short():
    _, related = related_base_of_golden(n_B=10)
    chosen = [b for classes in related.classes for b in classes]
    assert len(chosen) == len(set(chosen)) == 5 * (24 // 5)
    assert {len(classes) for classes in related.classes} == {4}


def test_ties_keep_the_lower_base_class():
    assert choose_related_base(torch.full((6, 2), 0.5), 2) == [[0, 1], [2, 3]]


def test_soft_scores_are_mean_probabilities():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    related = related_by_logits(logits, torch.tensor([0, 0, 1]), 2, RelatedSetting(1, related_score="soft"))
    torch.testing.assert_close(related.score[0], logits[:2].softmax(1).mean(0))
    assert related.classes == [[1], [0]]


def test_draws_take_as_many_of_each_class_as_the_smallest_set_and_skip_empty_ones():
    samples = [torch.arange(10), torch.empty(0, dtype=torch.long), torch.arange(20, 24)]
    (drawn,) = draw_related(samples, 50, 1, torch.Generator().manual_seed(0))
    picks, labels = drawn[drawn >= 0], (drawn >= 0).nonzero()[:, 0]
    assert labels.tolist() == [0] * 4 + [2] * 4
    assert sorted(picks[4:].tolist()) == [20, 21, 22, 23] and len(set(picks[:4].tolist())) == 4
    assert drawn_per_class([samples[1]], 50) == 0


def test_each_class_draws_all_that_it_may_and_a_poor_one_repeats_its_own():
    samples = [torch.arange(90), torch.empty(0, dtype=torch.long), torch.tensor([90, 91])]
    setting = RelatedSetting(aug_size=8, related_draws="each")
    picks = draw_by_setting(samples, setting, 3, torch.Generator().manual_seed(0))
    assert picks.shape == (3, 3, 8) and (picks[:, 1] == -1).all()
    assert [len(set(row.tolist())) for row in picks[:, 0]] == [8, 8, 8] and picks[:, 0].max() < 90
    assert [row.tolist().count(90) for row in picks[:, 2]] == [4, 4, 4] and picks[:, 2].min() == 90
    assert not torch.equal(picks[0, 0], picks[1, 0])
    fewest = draw_by_setting(samples, RelatedSetting(aug_size=8), 3, torch.Generator().manual_seed(0))
    assert torch.equal(fewest, draw_related(samples, 8, 3, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("sizes", "aug_size"), [((7, 40, 1), 50), ((300, 0, 51, 60), 50), ((1, 1), 3), ((9, 9, 2), 2)])
def test_draws_are_those_of_one_randperm_after_another(sizes, aug_size, monkeypatch):
    samples = [100 * w + torch.arange(n) for w, n in enumerate(sizes)]
    a = drawn_per_class(samples, aug_size)
    for together in (1, sum(sizes) * 3, 2**22):
        monkeypatch.setattr("methods.related_base.DRAWN_TOGETHER", together)
        generator, plain = (torch.Generator().manual_seed(4) for _ in range(2))
        picks = draw_related(samples, aug_size, 4, generator)
        for drawn in picks:
            for way, of_way in enumerate(drawn):
                order = torch.randperm(sizes[way], generator=plain)[:a]
                assert of_way[: len(order)].tolist() == samples[way][order].tolist()
                assert (of_way[len(order) :] == -1).all()
        assert torch.equal(generator.get_state(), plain.get_state())
