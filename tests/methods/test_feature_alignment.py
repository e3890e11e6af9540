"""Alignment in feature space against a plain loop of one episode, by automatic differentiation."""

import dataclasses
import types

import pytest
import torch
from torch import Tensor

from data.episodes import Task, class_major_labels
from engine.run import Run
from methods.alignment import AlignedEpisode, AlignmentSetting, Batch
from methods.feature_alignment import HeadUpdates, align_episodes, align_features, episodes_per_chunk
from methods.features import Source, TrainableBlocks, feature_source
from methods.novel_finetune import HeadFit, fit_heads
from methods.related_base import RelatedSetting, draw_related, drawn_per_class, related_base_of_head
from models import HEADS
from tests.helpers import make_split

D = 16
SETTING = AlignmentSetting(
    fit=HeadFit(ft_m=0.001, ft_n_epoch=30),
    related=RelatedSetting(n_B=2, aug_size=6),
    align_iters=5,
)


def source(split: str, n_class: int, seed: int, n_each: int = 12) -> Source:
    """Features (n_class * n_each, D) around a centre a class; what blocks take of them are the features themselves."""
    g = torch.Generator().manual_seed(seed)
    labels = make_split((n_each,) * n_class, side=1, split=split)
    z = torch.randn(n_class, D, generator=g)[labels.labels] + torch.randn(n_class * n_each, D, generator=g)
    return Source(z, lambda index: z[index], labels)


NOVEL, BASE = source("novel", 12, 1), source("base", 24, 2)


def tasks(n_way: int, shots: list[int] | int, n: int = 4, n_query: int = 3) -> list[Task]:
    """n episodes of n_way classes; shots: of every class, or of each episode."""
    made = []
    for i, shot in enumerate(shots if isinstance(shots, list) else [shots] * n):
        g = torch.Generator().manual_seed(100 + i)
        members = [NOVEL.split.members[c][torch.randperm(12, generator=g)] for c in torch.randperm(12, generator=g)]
        support = [m[: shot + (w == 0)] for w, m in enumerate(members[:n_way])]  # one more of the first class
        labels = torch.cat([torch.full((len(s),), w) for w, s in enumerate(support)])
        made.append(Task(torch.cat(support), labels, torch.cat([m[-n_query:] for m in members[:n_way]])))
    return made


def change(setting: AlignmentSetting, method: str = "arcMax", **changes) -> AlignmentSetting:
    return dataclasses.replace(setting, fit=dataclasses.replace(setting.fit, method=method), **changes)


def plain_episode(task: Task, i: int, setting: AlignmentSetting, base: Source = BASE):
    """Scores of episode i's queries by fine-tuning and after every iteration, its related base, and n_drawn."""
    run, d, n_way = Run(), D, task.n_way
    z, y, z_query = NOVEL.features[task.support], task.y_support, NOVEL.features[task.query]
    weight = torch.stack([1 / (n_way * (y == label).sum()) for label in y])  # every class counts alike

    def step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    head = setting.fit.new_head(d, n_way, run.generator("head", i))
    fitted = torch.optim.Adam(head.parameters(), lr=setting.fit.ft_lr)
    for _ in range(setting.fit.ft_n_epoch):
        step(head.loss(head(z), y, weight), fitted)
    scores = [head(z_query).detach()]
    related = related_base_of_head(head, base, setting.related)
    n_drawn = drawn_per_class(related.samples, setting.related.aug_size)
    head.rescale(setting.align_s, setting.align_m)
    of_support = torch.optim.Adam(head.parameters(), lr=setting.support_lr)
    fitted.param_groups[0]["lr"] = setting.related_lr
    generator = run.generator("related draws", i)
    for _ in range(setting.align_iters):
        if n_drawn:
            (picks,) = draw_related(related.samples, setting.related.aug_size, 1, generator)
            y_related = (picks >= 0).nonzero()[:, 0]
            step(head.loss(head(base.features[picks[picks >= 0]]), y_related), fitted)
        step(head.loss(head(z), y, weight), of_support)
        scores.append(head(z_query).detach())
    return scores, related, n_drawn


def check_against_plain(
    together: list[AlignedEpisode], given: list[Task], setting: AlignmentSetting, base: Source = BASE
):
    for i, (episode, task) in enumerate(zip(together, given, strict=True), 3):
        scores, related, n_drawn = plain_episode(task, i, setting, base)
        found = (episode.finetuned, *episode.curve, episode.aligned)
        every = setting.record_curve or setting.align_iters
        recorded = scores[every::every] if setting.record_curve else []
        for ours, theirs in zip(found, (scores[0], *recorded, scores[-1]), strict=True):
            torch.testing.assert_close(ours[: len(task.query)], theirs, rtol=1e-5, atol=1e-5)
        assert episode.n_drawn == n_drawn
        assert episode.related.classes == related.classes
        assert all(map(torch.equal, episode.related.samples, related.samples))


@pytest.mark.parametrize("n_way", [5, 11])
@pytest.mark.parametrize("shot", [1, 5])
@pytest.mark.parametrize("method", HEADS)
def test_episodes_together_are_each_as_in_a_plain_loop(method, shot, n_way):
    setting = change(SETTING, method, record_curve=2)
    given = tasks(n_way, shot)
    together = align_features(given, NOVEL, BASE, setting, Run(), 3)
    assert not any(torch.allclose(episode.finetuned, episode.aligned) for episode in together)
    check_against_plain(together, given, setting)


@pytest.mark.parametrize("method", HEADS)
@pytest.mark.parametrize("rates", [{"support_lr": 0.0}, {"related_lr": 0.0}])
def test_a_rate_of_nothing_leaves_its_update_out(method, rates):
    setting = change(SETTING, method, **rates)
    together = align_features(tasks(5, 2), NOVEL, BASE, setting, Run(), 3)
    check_against_plain(together, tasks(5, 2), setting)


@pytest.mark.parametrize("method", HEADS)
def test_supports_of_unequal_number_are_padded_without_effect(method):
    given = tasks(5, [1, 5, 2])
    setting = change(SETTING, method)
    check_against_plain(align_features(given, NOVEL, BASE, setting, Run(), 3), given, setting)


def test_classes_without_related_samples_and_sets_of_different_size():
    # All base samples lie near two points: most novel classes get none, and the smallest set differs by episode.
    point = torch.arange(len(BASE.features)) % 12 < 2
    z = torch.where(point.unsqueeze(1), BASE.features[:1], BASE.features[1:2]) + 0.5 * BASE.features
    base = Source(z, lambda index: z[index], BASE.split)
    related = RelatedSetting(n_B=3, aug_size=8)
    setting = change(SETTING, related=related)
    given = tasks(5, 1, n=8)
    together = align_features(given, NOVEL, base, setting, Run(), 3)
    assert any(not len(samples) for episode in together for samples in episode.related.samples)
    assert len({episode.n_drawn for episode in together}) > 1
    check_against_plain(together, given, setting, base)


def test_without_any_related_sample_only_the_support_is_learned():
    base = source("base", 3, 2)  # fewer base classes than ways
    together = align_features(tasks(5, 2), NOVEL, base, SETTING, Run(), 3)
    assert [episode.n_drawn for episode in together] == [0] * 4
    check_against_plain(together, tasks(5, 2), SETTING, base)


def test_an_episode_without_related_samples_is_left_alone_by_update_2():
    given, n = tasks(5, 2, n=2), 20
    z = NOVEL.features[torch.stack([task.support for task in given])]
    y = torch.stack([task.y_support for task in given])
    generators = [Run().generator("head", i) for i in range(2)]
    head = SETTING.fit.new_head(D, 5, generators)
    fitted = fit_heads(head, z, y, 10, 1e-2)
    before = head.weight.detach().clone()
    updates = HeadUpdates(head, fitted, SETTING, idle=torch.tensor([False, True]))
    weight = torch.tensor([[1 / n], [0.0]]).expand(2, n)
    related = Batch(BASE.features[: 2 * n].view(2, n, D), class_major_labels(5, 4).expand(2, n), weight)
    for _ in range(3):
        updates.train_head(related)
    assert torch.equal(before[1], head.weight[1]) and not torch.equal(before[0], head.weight[0])


@pytest.mark.parametrize("method", HEADS)
def test_features_kept_in_bf16_align_to_nearly_the_same_heads(method):
    setting, given, z = change(SETTING, method), tasks(5, 2), BASE.features.bfloat16()
    found, same = (
        align_features(given, NOVEL, feature_source(of, BASE.split), setting, Run(), 3) for of in (z, z.float())
    )
    for episode, other in zip(found, same, strict=True):
        assert all(map(torch.equal, episode.related.samples, other.related.samples))
        torch.testing.assert_close(episode.aligned, other.aligned, rtol=0.0, atol=0.01)


def test_episodes_on_threads_are_those_of_one_thread():
    given, blocks = tasks(5, 2, n=5), TrainableBlocks(None, torch.nn.Identity(), {})
    episodes = types.SimpleNamespace(task=lambda i: given[i - 3])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    found = list(align_episodes(blocks, episodes, NOVEL, BASE, SETTING, Run(), range(3, 8)))
    assert torch.get_num_threads() == 2 and [i for i, _ in found] == list(range(3, 8))
    torch.set_num_threads(before)
    check_against_plain([episode for _, episode in found], given, SETTING)


def test_an_episode_does_not_depend_on_those_beside_it():
    setting = change(SETTING, related=RelatedSetting(n_B=2, aug_size=12))
    given = tasks(5, 2, n=6)
    together = align_features(given, NOVEL, BASE, setting, Run(), 3)
    assert len({episode.n_drawn for episode in together}) > 1
    parts = [align_features(given[a:b], NOVEL, BASE, setting, Run(), 3 + a) for a, b in ((0, 1), (1, 4), (4, 6))]
    for episode, same in zip(sum(parts, []), together, strict=True):
        torch.testing.assert_close(episode.aligned, same.aligned, rtol=1e-5, atol=1e-6)


def test_as_many_episodes_go_together_as_the_caches_hold(monkeypatch):
    monkeypatch.setattr("methods.feature_alignment.cache_bytes", lambda: 2**22)
    cpu, gpu = torch.device("cpu"), torch.device("meta")
    counts = [episodes_per_chunk(d, 5, AlignmentSetting(), cpu) for d in (256, 1600, 10**7)]
    assert counts == [40, 20, 1]
    assert episodes_per_chunk(256, 5, AlignmentSetting(), gpu) > 40


def test_without_any_rate_alignment_is_fine_tuning_to_the_bit():
    setting = change(SETTING, related_lr=0.0, support_lr=0.0, record_curve=5)
    for episode in align_features(tasks(5, 2), NOVEL, BASE, setting, Run(), 3):
        assert torch.equal(episode.finetuned, episode.aligned)
        assert torch.equal(episode.finetuned, episode.curve[-1])
