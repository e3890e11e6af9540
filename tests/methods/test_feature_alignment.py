"""Alignment in feature space against the code with blocks, one episode at a time and by automatic differentiation."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from data.episodes import Task, class_major_labels
from engine.run import Run
from methods.adversarial_alignment import CriticSetting
from methods.alignment import AlignedEpisode, AlignmentSetting, align_episode
from methods.evaluation import HEAD_CHUNK
from methods.feature_adapter import FULL, Critics, Samples, feature_loss, new_adapter
from methods.feature_alignment import AlignedFeatures, FeatureUpdates, align_features, n_together
from methods.features import Source, UpdatedBlocks
from methods.novel_finetune import HeadFit, fit_heads
from methods.related_base import RelatedSetting, draw_iterations, draw_related, related_base_of_head
from models import HEADS
from tests.helpers import make_split

CPU = torch.device("cpu")
D = 16
SETTING = AlignmentSetting(
    fit=HeadFit(ft_m=0.001, ft_n_epoch=30),
    related=RelatedSetting(n_B=2, aug_size=6),
    critic=CriticSetting(critic_hidden=8, critic_steps=2),
    align_iters=5,
)


class OneAdapter(nn.Module):
    """z + z A for one episode, as blocks that alignment may move; without a rank, a network that does nothing."""

    def __init__(self, rank: int | str, generator: torch.Generator):
        super().__init__()
        self.rank = rank
        if rank and rank != FULL:
            self.U = nn.Parameter(new_adapter(D, rank, [generator]).U[0].detach().clone())
        self.V = nn.Parameter(torch.zeros(D if rank == FULL else int(rank), D))

    def forward(self, z: Tensor) -> Tensor:
        if not self.rank:
            return z
        return z + z @ (self.V if self.rank == FULL else self.U @ self.V)


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


def with_blocks(task: Task, i: int, setting: AlignmentSetting, base: Source = BASE) -> AlignedEpisode:
    """Episode i by the code with blocks: the adapter is the network, features are its images."""
    network = OneAdapter(setting.align_adapter, Run().generator("adapter", i))
    initial = {name: value.clone() for name, value in network.state_dict().items()}
    if not setting.align_adapter:
        setting = dataclasses.replace(setting, alignment="naive")
    return align_episode(UpdatedBlocks(None, network, initial), task, NOVEL, base, setting, Run(), i)


def check_against_blocks(together: AlignedFeatures, given: list[Task], setting: AlignmentSetting, base: Source = BASE):
    for e, task in enumerate(given):
        alone = with_blocks(task, 3 + e, setting, base)
        n_query = len(task.query)
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(together.finetuned[e, :n_query], alone.finetuned, **close)
        torch.testing.assert_close(together.aligned[e, :n_query], alone.aligned, **close)
        for ours, theirs in zip(together.curve, alone.curve, strict=True):
            torch.testing.assert_close(ours[e, :n_query], theirs, **close)
        assert together.n_drawn[e] == alone.n_drawn
        assert together.related[e].classes == alone.related.classes
        assert all(map(torch.equal, together.related[e].samples, alone.related.samples))


@pytest.mark.parametrize("n_way", [5, 10])
@pytest.mark.parametrize("shot", [1, 5])
@pytest.mark.parametrize("method", HEADS)
def test_episodes_together_are_each_as_with_blocks_that_stand_still(method, shot, n_way):
    setting = change(SETTING, method, record_curve=2)
    given = tasks(n_way, shot)
    together = align_features(given, NOVEL, BASE, setting, Run(), 3)
    assert not torch.allclose(together.finetuned, together.aligned)
    check_against_blocks(together, given, setting)


@pytest.mark.parametrize("method", HEADS)
@pytest.mark.parametrize("rates", [{"support_lr": 0.0}, {"related_lr": 0.0}])
def test_a_rate_of_nothing_leaves_its_update_out(method, rates):
    setting = change(SETTING, method, **rates)
    together = align_features(tasks(5, 2), NOVEL, BASE, setting, Run(), 3)
    check_against_blocks(together, tasks(5, 2), setting)


@pytest.mark.parametrize("method", HEADS)
@pytest.mark.parametrize("rank", [0, 3])
def test_supports_of_unequal_number_are_padded_without_effect(method, rank):
    given = tasks(5, [1, 5, 2])
    setting = change(SETTING, method, align_adapter=rank)
    check_against_blocks(align_features(given, NOVEL, BASE, setting, Run(), 3), given, setting)


@pytest.mark.parametrize(("rank", "alignment"), [(0, "naive"), (3, "centroid"), (3, "adversarial")])
def test_classes_without_related_samples_and_sets_of_different_size(rank, alignment):
    # All base samples lie near two points: most novel classes get none, and the smallest set differs by episode.
    point = torch.arange(len(BASE.features)) % 12 < 2
    z = torch.where(point.unsqueeze(1), BASE.features[:1], BASE.features[1:2]) + 0.5 * BASE.features
    base = Source(z, lambda index: z[index], BASE.split)
    related = RelatedSetting(n_B=3, aug_size=8)
    setting = change(SETTING, related=related, align_adapter=rank, alignment=alignment)
    given = tasks(5, 1, n=8)
    together = align_features(given, NOVEL, base, setting, Run(), 3)
    assert any(not len(s) for related in together.related for s in related.samples)
    assert len(set(together.n_drawn)) > 1
    check_against_blocks(together, given, setting, base)


@pytest.mark.parametrize("rank", [0, 3])
def test_without_any_related_sample_only_the_support_is_learned(rank):
    base = source("base", 3, 2)  # fewer base classes than ways
    setting = change(SETTING, align_adapter=rank)
    together = align_features(tasks(5, 2), NOVEL, base, setting, Run(), 3)
    assert together.n_drawn == [0] * 4
    check_against_blocks(together, tasks(5, 2), setting, base)


@pytest.mark.parametrize("alignment", ["centroid", "adversarial"])
def test_an_episode_without_related_samples_is_left_alone_by_updates_1_and_2(alignment):
    given, setting, n = tasks(5, 2, n=2), change(SETTING, alignment=alignment, align_adapter=3), 20
    z = NOVEL.features[torch.stack([task.support for task in given])]
    y = torch.stack([task.y_support for task in given])
    generators = [Run().generator("head", i) for i in range(2)]
    head, adapter = setting.fit.new_head(D, 5, generators), new_adapter(D, 3, generators)
    fitted = fit_heads(head, z, y, 10, 1e-2)
    before = [p.detach().clone() for p in (head.weight, *adapter.parameters())]
    loss = feature_loss(D, 5, setting, generators, CPU)
    updates = FeatureUpdates(head, fitted, adapter, loss, setting, idle=torch.tensor([False, True]))
    weight = torch.tensor([[1 / n], [0.0]]).expand(2, n)
    related = Samples(BASE.features[: 2 * n].view(2, n, D), class_major_labels(5, 4).expand(2, n), weight)
    for _ in range(3):
        updates.align(Samples(z, y, torch.full(y.shape, 1 / y.shape[1])), related)
        updates.train_head(related)
    for old, new in zip(before, (head.weight, *adapter.parameters()), strict=True):
        assert torch.equal(old[1], new[1]) and not torch.equal(old[0], new[0])


@pytest.mark.parametrize("changes", [{}, {"align_adapter": 3}, {"align_adapter": 3, "alignment": "adversarial"}])
def test_an_episode_does_not_depend_on_those_beside_it(changes):
    setting = change(SETTING, related=RelatedSetting(n_B=2, aug_size=12), **changes)
    given = tasks(5, 2, n=6)
    together = align_features(given, NOVEL, BASE, setting, Run(), 3)
    assert len(set(together.n_drawn)) > 1
    parts = [align_features(given[a:b], NOVEL, BASE, setting, Run(), 3 + a) for a, b in ((0, 1), (1, 4), (4, 6))]
    torch.testing.assert_close(torch.cat([part.aligned for part in parts]), together.aligned, rtol=1e-5, atol=1e-6)


def test_fewer_episodes_go_together_when_each_holds_much():
    assert n_together(256, 5, SETTING) == n_together(1600, 5, AlignmentSetting()) == HEAD_CHUNK
    full = change(SETTING, align_adapter=FULL)
    assert n_together(256, 5, full) == HEAD_CHUNK and 1 <= n_together(1600, 5, full) * 6 * 1600**2 <= 2**26
    assert n_together(10**5, 5, full) == 1
    assert n_together(1600, 5, change(AlignmentSetting(), align_adapter=16, alignment="adversarial")) < HEAD_CHUNK


def test_draws_are_those_of_the_code_with_blocks():
    samples = [torch.arange(40, 70), torch.empty(0, dtype=torch.long), torch.arange(9), torch.arange(100, 300)]
    for aug_size in (5, 20):
        picks = draw_iterations(samples, aug_size, 4, torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        for of_iteration in picks:
            drawn, labels = draw_related(samples, aug_size, generator)
            assert torch.equal(of_iteration[of_iteration >= 0], drawn)
            assert torch.equal((of_iteration >= 0).nonzero()[:, 0], labels)


@pytest.mark.parametrize("score", ["vote", "soft"])
def test_related_base_of_heads_together_is_that_of_each(score):
    setting = RelatedSetting(n_B=3, related_score=score)
    given = tasks(5, 1, n=5)
    fit = change(SETTING, related=setting, alignment="none")
    together = align_features(given, NOVEL, BASE, fit, Run(), 0)
    assert torch.equal(together.finetuned, together.aligned)
    for e in range(5):
        alone = fit.fit.new_head(D, 5, None)
        alone.weight.data = together.head.weight.data[e]
        related = related_base_of_head(alone, BASE, setting)
        torch.testing.assert_close(together.related[e].score, related.score)
        assert together.related[e].classes == related.classes
        assert all(map(torch.equal, together.related[e].samples, related.samples))


@pytest.mark.parametrize("alignment", ["centroid", "adversarial"])
@pytest.mark.parametrize("rank", [3, FULL])
def test_an_adapter_that_has_not_moved_is_fine_tuning_to_the_bit(rank, alignment):
    still = {"align_lr": 0.0, "related_lr": 0.0, "support_lr": 0.0}
    setting = change(SETTING, alignment=alignment, align_adapter=rank, record_curve=5, **still)
    together = align_features(tasks(5, 2), NOVEL, BASE, setting, Run(), 3)
    assert torch.equal(together.finetuned, together.aligned)
    assert torch.equal(together.finetuned, together.curve[-1])


@pytest.mark.parametrize("alignment", ["naive", "centroid", "adversarial"])
@pytest.mark.parametrize("rank", [3, FULL])
@pytest.mark.parametrize("method", HEADS)
def test_an_adapter_learns_as_blocks_do(method, rank, alignment):
    setting = change(SETTING, method, alignment=alignment, align_adapter=rank, record_curve=1)
    given = tasks(5, 2)
    check_against_blocks(align_features(given, NOVEL, BASE, setting, Run(), 3), given, setting)


def test_the_gradient_penalty_is_that_of_each_critic():
    n_way, n = 3, 12
    g = torch.Generator().manual_seed(0)
    related = Samples(torch.randn(2, n, D, generator=g), class_major_labels(n_way, 4).expand(2, n), torch.rand(2, n))
    novel = Samples(torch.randn(2, n_way, D, generator=g), torch.arange(n_way).expand(2, -1), torch.ones(2, n_way))
    critics = Critics(D, n_way, CriticSetting(critic_hidden=8), [Run().generator("critic", e) for e in range(2)], CPU)
    for weight in critics.weights.values():
        weight.data *= 5.0  # so that slopes exceed 1
    mixes = [torch.rand(n, n_way + 1, generator=g.clone_state())[:, :1] for g in critics.generators]
    expected = torch.zeros(())
    for e, mix in enumerate(mixes):
        hidden, out = (
            {k: critics.weights[f"{layer}.{k}"][e] for k in ("weight", "bias")} for layer in ("hidden", "out")
        )
        z = torch.lerp(related.z[e], novel.z[e][related.y[e]], mix)
        active = (z @ hidden["weight"][:, :D].T + hidden["weight"][:, D:].T[related.y[e]] + hidden["bias"] > 0).float()
        slope = (active * out["weight"]) @ hidden["weight"][:, :D]
        expected = expected + ((slope.norm(dim=1) - 1).clamp_min(0).square() * related.weight[e]).sum()
    assert expected > 0.1
    torch.testing.assert_close(critics.gradient_penalty(novel, related), expected)


def test_critics_under_a_penalty_learn_to_tell_related_from_novel():
    setting = CriticSetting(critic_hidden=16, critic_steps=100, critic_lr=1e-2, critic_constraint="gp")
    critics = Critics(D, 5, setting, [Run().generator("critic", 0)], CPU)
    y = class_major_labels(5, 4).unsqueeze(0)
    weight = torch.full((1, 20), 1 / 20)
    support = Samples(torch.zeros(1, 20, D), y, weight)
    related = Samples(torch.ones(1, 20, D, requires_grad=True), y, weight)
    distance = critics(support, related)
    assert distance.item() == pytest.approx(D**0.5, rel=0.25)  # Wasserstein-1, which a slope of 1 measures
    distance.backward()
    assert (related.z.grad.sum(2) > 0).all()
