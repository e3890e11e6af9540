"""The critic: one score a feature, of the feature and of its label, and weights from its generator alone."""

import torch

from models.critic import Critic


def test_critic_depends_on_its_generator_alone():
    torch.manual_seed(1)
    first = Critic(4, 3, 8, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    second = Critic(4, 3, 8, generator=torch.Generator().manual_seed(5))
    other = Critic(4, 3, 8, generator=torch.Generator().manual_seed(6))
    z, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.equal(first(z, y), second(z, y))
    assert not torch.equal(first(z, y), other(z, y))


def test_a_score_is_of_a_feature_and_its_label_alone():
    critic = Critic(4, 3, 8, generator=torch.Generator().manual_seed(0))
    z, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1, 2])
    scores = critic(z, y)
    assert scores.shape == (6,)
    torch.testing.assert_close(torch.cat([critic(z[i : i + 1], y[i : i + 1]) for i in range(6)]), scores)
    weight = critic.hidden.weight
    hidden = (z @ weight[:, :4].T + weight[:, 4 + y].T + critic.hidden.bias).relu()
    torch.testing.assert_close((hidden @ critic.out.weight.T + critic.out.bias).squeeze(1), scores)
