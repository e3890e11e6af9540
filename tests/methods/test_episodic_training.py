"""Episodic training and the evaluation of meta-learners."""

import pytest
import torch
import torch.nn.functional as F

from data.episodes import Episodes
from data.transforms import Augmentation, TrainingImages, normalise
from engine.errors import UserError
from engine.run import Run
from methods import episodic_training
from methods.episodic_training import evaluate_meta_learner, train_episodic_epoch
from methods.meta_learners import META_LEARNERS, build_meta_learner
from models import Model, build_backbone


def train_recording_inputs(epoch, n_episodes=3, augmentation=None, lr=0.0, method="ProtoNet", warm_up=False):
    """Train on random images; returns the mean loss and accuracy, and each batch that the backbone was given."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=generator)
    index = torch.stack([torch.randperm(40, generator=generator)[:12].view(3, 4) for _ in range(n_episodes)])
    episodes = Episodes(index, torch.zeros(n_episodes, 3, dtype=torch.long), n_shot=1)
    torch.manual_seed(0)
    backbone = build_backbone("Conv4", 16)
    learner = build_meta_learner(method, backbone)
    inputs = []
    backbone.register_forward_pre_hook(lambda module, given: inputs.append((module.training, given[0].clone())))
    sizes, labels, cpu = torch.full((40, 2), 16), torch.zeros(40, dtype=torch.long), torch.device("cpu")
    training = TrainingImages(images, sizes, labels, 16, augmentation, cpu)
    figures = train_episodic_epoch(Model(backbone, learner, lr), training, episodes, epoch, Run(), warm_up)
    return *figures, inputs, (images, episodes, backbone, learner)


def test_an_episode_is_one_batch_in_train_mode_and_its_loss_that_of_the_queries():
    loss, accuracy, inputs, (images, episodes, backbone, _) = train_recording_inputs(epoch=0)
    assert [training for training, _ in inputs] == [True] * 3
    losses, right = [], []
    for index, (_, x) in zip(episodes.index, list(inputs), strict=True):
        torch.testing.assert_close(x, normalise(images[index.flatten()]))
        z = backbone(x).view(3, 4, -1)
        distances = [(z[w, q] - z[:, 0]).square().sum(1) for w in range(3) for q in (1, 2, 3)]
        y = torch.arange(3).repeat_interleave(3)
        losses.append(F.cross_entropy(-torch.stack(distances), y))
        right.append((torch.stack(distances).argmin(1) == y).float().mean())
    assert loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert accuracy == pytest.approx(torch.stack(right).mean().item())


def test_the_augmentation_of_an_episode_depends_on_its_epoch_and_number_alone():
    def batches(**run):
        return [x for _, x in train_recording_inputs(augmentation=Augmentation(), **run)[2]]

    first = batches(epoch=1)
    for x, same in zip(first, batches(epoch=1, n_episodes=2, lr=0.1), strict=False):
        assert torch.equal(x, same)
    for x, other in zip(first, batches(epoch=2), strict=True):
        assert not torch.equal(x, other)


@pytest.mark.parametrize("method", ["MatchingNet", "RelationNet"])
def test_in_a_warm_up_the_backbone_stands_still_and_the_module_learns(method):
    def trained(**run):
        *_, (_, _, backbone, learner) = train_recording_inputs(0, method=method, **run)
        return backbone.state_dict(), dict(learner.named_parameters())

    backbone, learner = trained(lr=0.1, warm_up=True)
    still, untrained = trained(lr=0.0, warm_up=True)
    assert all(torch.equal(backbone[name], still[name]) for name in still)
    assert still["layers.0.bn.running_mean"].abs().sum() == 0
    assert not any(torch.equal(learner[name], untrained[name]) for name in untrained if "weight" in name)
    moved, _ = trained(lr=0.1)
    assert not torch.equal(moved["layers.0.conv.weight"], still["layers.0.conv.weight"])


def test_a_learner_without_a_module_cannot_warm_up():
    with pytest.raises(UserError, match="ProtoNet has no module of its own to warm up: give --warm_up_epochs 0"):
        train_recording_inputs(0, warm_up=True)


@pytest.mark.parametrize("method", META_LEARNERS)
def test_scores_do_not_depend_on_how_many_episodes_are_evaluated_together(method, monkeypatch):
    torch.manual_seed(0)
    backbone = build_backbone("Conv4", 16, relation=method.startswith("RelationNet"))
    learner = build_meta_learner(method, backbone)
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(30, generator=generator)[:25].view(5, 5) for _ in range(7)])
    episodes = Episodes(index, index[:, :, 0], n_shot=2)
    features = torch.randn(30, *(backbone.map_shape if learner.uses_maps else (64,)), generator=generator)
    together = evaluate_meta_learner(learner, features, episodes, Run())
    assert together.correct.shape == (7, 5) and 0 < together.accuracy.mean() < 1
    for elements in (1, 3 * 4 * 25 * 64, 3 * 5 * 25 * 256):  # one at a time, and about three
        monkeypatch.setattr(episodic_training, "EVALUATED_ELEMENTS", elements)
        scores = evaluate_meta_learner(learner, features, episodes, Run())
        assert torch.equal(scores.correct, together.correct)
