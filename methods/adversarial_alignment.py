"""Adversarial alignment: equations 6-8 of Afrasiyabi et al., ECCV 2020, and the critic of Algorithm 2.

A critic that sees feature and label learns to score related base samples above novel ones; the mean difference of its
scores estimates, up to a factor, the Wasserstein-1 distance between the two, class by class. The backbone is updated to
lower that difference, so that the features of related base samples become like those of novel samples.

Our choices, where the paper leaves them open: five critic steps, the clip of 0.01, a low learning rate of the backbone
(docs/tuning.md), and the gradient penalty as the other bound on the critic's slope. The penalty is one-sided (Petzka et
al., ICLR 2018): the two-sided one (Gulrajani et al., NeurIPS 2017) also rewards slope 1 in the wrong direction, where
most small critics stayed when we measured two Gaussians. The features are computed once for the steps of the critic and
of the backbone, which is frozen in between. A novel class without related samples takes no part: its label alone would
tell the critic where a sample comes from.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from engine.run import move
from models.critic import Critic

# A short memory of the critic's gradients, as the features change in every step.
CRITIC_BETAS = (0.5, 0.9)


@dataclass(frozen=True)
class CriticSetting:
    """The critic and how it learns; each field is explained at the flag of the same name."""

    critic_hidden: int = 1024
    critic_steps: int = 5
    critic_lr: float = 1e-3
    critic_constraint: str = "clip"
    critic_clip: float = 0.01
    critic_gp_weight: float = 10.0


def adversarial_alignment_loss(
    critic: Critic, z_related: Tensor, y_related: Tensor, z_novel: Tensor, y_novel: Tensor
) -> Tensor:
    """Mean score of the related samples minus the mean score of the novel ones, which the backbone minimises.

    z_related (n, d), y_related (n,), z_novel (k, d), y_novel (k,) -> scalar, in float32; gradient flows through both.
    """
    return critic(z_related.float(), y_related).mean() - critic(z_novel.float(), y_novel).mean()


def gradient_penalty(
    critic: Critic, z_related: Tensor, y_related: Tensor, z_novel: Tensor, y_novel: Tensor, generator: Generator
) -> Tensor:
    """Mean of max(0, |grad_z h([z, y])| - 1)^2 at random points z between a related and a novel sample -> scalar.

    Each related sample is paired with a random novel sample of its label; every label must occur among the novel ones.
    """
    # As torch.multinomial draws, for which the labels would have to come to the generator's device.
    times = move(torch.empty(len(z_related), len(z_novel)).exponential_(generator=generator), z_novel.device)
    partner = ((y_related.unsqueeze(1) == y_novel) / times).argmax(1)
    mix = move(torch.rand(len(z_related), 1, generator=generator), z_related.device)
    z = torch.lerp(z_related.detach(), z_novel.detach()[partner], mix).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(z, y_related).sum(), z, create_graph=True)
    return F.relu(gradient.norm(dim=1) - 1.0).square().mean()


class AdversarialAlignment:
    """The adversarial alignment loss of one episode, with the critic that learns along with the backbone.

    d: size of the features; the critic's initial weights, and the draws of the penalty, come from `generator`.
    """

    def __init__(self, d: int, n_way: int, setting: CriticSetting, generator: Generator, device: torch.device):
        self.setting = setting
        self.generator = generator
        self.critic = Critic(d, n_way, setting.critic_hidden, generator).to(device)
        self.with_related: Tensor | None = None
        parameters = self.critic.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=setting.critic_lr, betas=CRITIC_BETAS, fused=True)

    def __call__(self, z_support: Tensor, y_support: Tensor, z_related: Tensor, y_related: Tensor) -> Tensor:
        """The loss of the backbone's step in Algorithm 2, after critic_steps steps of the critic on these features.

        z_support (k, d), z_related (n, d) and their labels -> scalar. The same classes have related samples in all
        calls.
        """
        if self.with_related is None:  # once per episode, as a GPU waits for it
            self.with_related = torch.isin(y_support, y_related).nonzero().squeeze(1)
        z_novel, y_novel = z_support[self.with_related], y_support[self.with_related]
        for _ in range(self.setting.critic_steps):
            self.critic_step(z_related.detach().float(), y_related, z_novel.detach().float(), y_novel)
        # The gradients that the backbone's step leaves on the critic are dropped by its next step.
        return adversarial_alignment_loss(self.critic, z_related, y_related, z_novel, y_novel)

    def critic_step(self, z_related: Tensor, y_related: Tensor, z_novel: Tensor, y_novel: Tensor) -> None:
        """One step of the critic on fixed features, its slope bounded by clipped weights or by the gradient penalty."""
        setting, labelled = self.setting, (z_related, y_related, z_novel, y_novel)
        loss = -adversarial_alignment_loss(self.critic, *labelled)
        if setting.critic_constraint == "gp":
            loss = loss + setting.critic_gp_weight * gradient_penalty(self.critic, *labelled, self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if setting.critic_constraint == "clip":
            for parameter in self.critic.parameters():
                parameter.detach().clamp_(-setting.critic_clip, setting.critic_clip)
