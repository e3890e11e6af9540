"""The critic: what its scores depend on."""

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
