"""The critic measures what it should, and the backbone's step lowers what the critic measures."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from data.episodes import class_major_labels
from engine.precision import Precision
from methods.adversarial_alignment import (
    AdversarialAlignment,
    CriticSetting,
    adversarial_alignment_loss,
    gradient_penalty,
)
from methods.alignment import AlignmentSetting, Batch, Updates
from models import build_head
from models.critic import Critic

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(mean, std, n=200):
    """n equally likely values of a normal distribution, (n, 1): its quantiles, so that nothing is random."""
    probability = (torch.arange(n) + 0.5) / n
    return (mean + std * 2**0.5 * torch.erfinv(2 * probability - 1)).unsqueeze(1)


def trained_estimate(z_related, y_related, z_novel, y_novel, n_way=1, n_steps=300):
    """The estimates of a fresh critic with gradient penalty: (before training, after it)."""
    g = generator()
    d, setting = z_related.shape[1], CriticSetting(64, critic_constraint="gp", critic_gp_weight=10.0)
    adversarial = AdversarialAlignment(d, n_way, setting, generator(), CPU)
    adversarial.critic, adversarial.generator = Critic(d, n_way, 64, g), g
    adversarial.optimizer = torch.optim.Adam(adversarial.critic.parameters(), lr=3e-3)
    data = (z_related, y_related, z_novel, y_novel)
    with torch.no_grad():
        before = adversarial_alignment_loss(adversarial.critic, *data).item()
    for _ in range(n_steps):
        adversarial.critic_step(*data)
    with torch.no_grad():
        return before, adversarial_alignment_loss(adversarial.critic, *data).item()


# Clipping bounds the critic's slope by a number that is not known, so its estimate is a distance only up to a factor.
# The gradient penalty holds the slope near 1. Against a shift D it settles where the gain D * slope and the penalty
# 10 * (slope - 1)^2 balance, D^2 / 20 above the distance: 5% for D = 1.
@pytest.mark.parametrize(
    ("related", "novel"), [((1.0, 1.0), (0.0, 1.0)), ((-1.0, 0.5), (0.0, 0.5)), ((1, 0.5), (0, 1.5))]
)
def test_critic_finds_the_wasserstein_distance_of_two_gaussians(related, novel):
    z_related, z_novel = gaussian(*related), gaussian(*novel)
    y = torch.zeros(len(z_related), dtype=torch.long)
    distance = (z_related - z_novel).abs().mean().item()  # in one dimension: the mean distance of equal quantiles
    before, after = trained_estimate(z_related, y, z_novel, y, n_steps=400)
    assert abs(before) < 0.5 * distance
    assert after == pytest.approx(distance, rel=0.1)


def test_the_critic_separates_swapped_classes_by_their_labels():
    low, high = gaussian(-1.0, 0.3, 50), gaussian(1.0, 0.3, 50)
    y = class_major_labels(2, 50)
    related, novel = torch.cat([low, high]), torch.cat([high, low])
    _, estimate = trained_estimate(related, y, novel, y, n_way=2)
    assert estimate > 1.5  # the distance of each class is 2


def test_clipped_critic_stays_inside_the_clip_and_prefers_related_samples():
    g = generator()
    adversarial = AdversarialAlignment(3, 2, CriticSetting(16, critic_constraint="clip", critic_clip=0.05), g, CPU)
    adversarial.optimizer = torch.optim.RMSprop(adversarial.critic.parameters(), lr=1e-3)
    y = class_major_labels(2, 20)
    z_related, z_novel = torch.randn(40, 3, generator=g) + 2, torch.randn(40, 3, generator=g) - 2
    estimates = []
    for _ in range(50):
        adversarial.critic_step(z_related, y, z_novel, y)
        estimates.append(adversarial_alignment_loss(adversarial.critic, z_related, y, z_novel, y))
    assert max(p.abs().max().item() for p in adversarial.critic.parameters()) <= 0.05 + 1e-6
    assert estimates[-1] > max(estimates[0], 0.0)


def test_loss_is_the_difference_of_mean_scores_with_gradient_to_both_streams():
    g = generator()
    critic = Critic(4, 2, 16, generator=g)
    z_related = torch.randn(6, 4, generator=g).requires_grad_()
    z_novel = torch.randn(2, 4, generator=g).requires_grad_()
    data = (z_related, class_major_labels(2, 3), z_novel, class_major_labels(2, 1))
    loss = adversarial_alignment_loss(critic, *data)
    scores = [critic(z, y).mean() for z, y in (data[:2], data[2:])]
    torch.testing.assert_close(loss, scores[0] - scores[1])
    loss.backward()
    assert (z_related.grad.abs().sum(1) > 0).all() and (z_novel.grad.abs().sum(1) > 0).all()


def test_gradient_penalty_is_the_squared_excess_of_the_slope_over_1():
    class Slope(nn.Module):
        def forward(self, z, y):
            return z @ torch.tensor([3.0, 4.0]) * torch.tensor([0.1, 1.0])[y]  # slopes 0.5 and 5

    z_related, z_novel = torch.randn(4, 2, generator=generator()), torch.randn(2, 2, generator=generator(1))
    y_related, y_novel = class_major_labels(2, 2), class_major_labels(2, 1)
    penalty = gradient_penalty(Slope(), z_related, y_related, z_novel, y_novel, generator())
    assert penalty.item() == pytest.approx((0.0 + 4.0**2) / 2)


def test_gradient_penalty_mixes_samples_of_one_label():
    seen = []

    class Recorder(nn.Module):
        def forward(self, z, y):
            seen.append((z.detach(), y))
            return z.square().sum(1)

    z_related, y_related = torch.tensor([[0.0], [0.0], [10.0], [10.0], [10.0]]), torch.tensor([0, 0, 1, 1, 1])
    z_novel, y_novel = torch.tensor([[11.0], [1.0], [1.0]]), torch.tensor([1, 0, 0])
    gradient_penalty(Recorder(), z_related, y_related, z_novel, y_novel, generator())
    z, y = seen[0]
    assert torch.equal(y, y_related)
    assert ((z >= 10 * y.unsqueeze(1)) & (z <= 10 * y.unsqueeze(1) + 1)).all()
    assert len(z.unique()) == len(z)


class Toy:
    """A small backbone, a critic, and 2-way 5-shot images of classes that related images show with a shift."""

    def __init__(self, constraint="clip", lr=1e-3):
        g = generator()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
        setting = CriticSetting(
            64, critic_lr=3e-3, critic_constraint=constraint, critic_clip=0.1, critic_gp_weight=10.0
        )
        self.adversarial = AdversarialAlignment(4, 2, setting, g, CPU)
        self.adversarial.generator = generator(1)
        self.critic = self.adversarial.critic
        self.y_support, self.y_related = class_major_labels(2, 5), class_major_labels(2, 20)
        class_image, shift = torch.randn(2, 2, 3, 4, 4, generator=g)
        self.x_support = class_image[self.y_support] + 0.3 * torch.randn(10, 3, 4, 4, generator=g)
        self.x_related = (class_image + shift)[self.y_related] + 0.3 * torch.randn(40, 3, 4, 4, generator=g)
        head = build_head("arcMax", 4, 2, 5.0, 0.01, generator())
        fitted = torch.optim.Adam(head.parameters())
        self.updates = Updates(
            self.backbone, head, fitted, self.adversarial, AlignmentSetting(align_lr=lr), Precision()
        )

    def step(self, n_critic=5):
        """Update (1), with so many steps of the critic."""
        self.adversarial.setting = dataclasses.replace(self.adversarial.setting, critic_steps=n_critic)
        support, related = Batch(self.x_support, self.y_support), Batch(self.x_related, self.y_related)
        return self.updates.align(support, related)

    @torch.no_grad()
    def raw_features(self):
        """Features and labels of the related and of the novel images."""
        return self.backbone(self.x_related), self.y_related, self.backbone(self.x_support), self.y_support

    def features(self):
        """The same, scaled so that the novel classes are at a distance of 1: shrinking everything does not count."""
        z_related, _, z_novel, _ = self.raw_features()
        scale = (z_novel[self.y_support == 0].mean(0) - z_novel[self.y_support == 1].mean(0)).norm()
        return z_related / scale, self.y_related, z_novel / scale, self.y_support

    def centroid_distances(self):
        """Distances of the related and the novel centroid of a class, (2,)."""
        z_related, y_related, z_novel, y_novel = self.features()
        return torch.stack([(z_related[y_related == w].mean(0) - z_novel[y_novel == w].mean(0)).norm() for w in (0, 1)])


def test_backbone_step_lowers_the_estimate_of_the_critic():
    toy = Toy()
    toy.step()
    critic = copy.deepcopy(toy.critic)
    estimates = [toy.step(n_critic=0) for _ in range(3)]
    assert estimates[0] > estimates[1] > estimates[2]
    for name, weight in toy.critic.state_dict().items():
        assert torch.equal(weight, critic.state_dict()[name])  # the backbone's step leaves the critic alone


@pytest.mark.parametrize("constraint", ["clip", "gp"])
def test_alignment_brings_distributions_and_class_centroids_together(constraint):
    toy = Toy(constraint)
    far, (_, estimate) = toy.centroid_distances(), trained_estimate(*toy.features(), n_way=2)
    distances = []
    for _ in range(150):
        toy.step()
        distances.append(toy.centroid_distances())
    near, (_, estimate_after) = torch.stack(distances[-50:]).mean(0), trained_estimate(*toy.features(), n_way=2)
    assert (near < 0.5 * far).all()  # critic and backbone chase each other, so one iteration's distance says little
    assert estimate_after < 0.5 * estimate


def test_step_is_n_critic_steps_on_fixed_features_then_one_of_the_backbone():
    toy, twin = Toy(), Toy()
    data = twin.raw_features()
    for _ in range(3):
        twin.adversarial.critic_step(*data)
    expected = adversarial_alignment_loss(twin.critic, *data).item()
    before = copy.deepcopy(toy.backbone.state_dict())
    toy.backbone.eval()  # the update must see to the mode itself
    assert toy.step(n_critic=3) == pytest.approx(expected)
    assert all(torch.equal(a, b) for a, b in zip(toy.critic.parameters(), twin.critic.parameters(), strict=True))
    assert not torch.equal(toy.backbone[1].weight, before["1.weight"])
    assert toy.backbone.training and toy.backbone[2].num_batches_tracked == 2  # related and support apart


def test_a_class_without_related_samples_takes_no_part():
    toy, twin = Toy("gp"), Toy("gp")
    toy.x_related, toy.y_related = toy.x_related[20:], toy.y_related[20:]
    twin.x_related, twin.y_related = toy.x_related, toy.y_related
    z_related, _, z_support, _ = twin.raw_features()
    data = (z_related, twin.y_related, z_support[5:], twin.y_support[5:])
    twin.adversarial.critic_step(*data)
    expected = adversarial_alignment_loss(twin.critic, *data).item()
    assert toy.step(n_critic=1) == pytest.approx(expected)
