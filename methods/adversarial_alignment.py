"""Adversarial alignment (equations 6-8 of Afrasiyabi et al., ECCV 2020) and its update of Algorithm 2.

A critic that sees feature and label learns to score related base samples above novel ones; the mean difference
of its scores estimates, up to a factor, the Wasserstein-1 distance between the two, class by class. The
backbone is updated to lower that difference, so that the related base samples become like novel samples.

Our choices, where the paper's text leaves them open: five critic steps, the clip of 0.01, a low rate of the
backbone's step (docs/tuning.md) and the gradient penalty as the other way to bound the critic's slope. The penalty is
one-sided (Petzka et al., ICLR 2018): the two-sided one of Gulrajani et al. (NeurIPS 2017) also rewards slope 1 in the
wrong direction, and there most small critics stayed when we measured two Gaussians apart. It mixes a related and a
novel sample of the same label. The features are computed once for all critic steps and the backbone's step, as the
backbone stands still in between. A novel class without related samples takes no part: its label alone would tell the
critic where it comes from.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from engine.precision import Precision
from models.critic import Critic

CONSTRAINTS = ("clip", "gp")


def adversarial_alignment_loss(
    critic: Critic, z_related: Tensor, y_related: Tensor, z_novel: Tensor, y_novel: Tensor
) -> Tensor:
    """Mean score of the related samples minus that of the novel ones, which the backbone minimises.

    z_related (n, d), y_related (n,), z_novel (k, d), y_novel (k,) -> scalar, in float32. The gradient flows through
    both. At the best critic of slope 1 it is the Wasserstein-1 distance.
    """
    return critic(z_related.float(), y_related).mean() - critic(z_novel.float(), y_novel).mean()


def critic_loss(critic: Critic, z_related: Tensor, y_related: Tensor, z_novel: Tensor, y_novel: Tensor) -> Tensor:
    """What the critic minimises: minus the estimate of the Wasserstein distance; arguments as above."""
    return -adversarial_alignment_loss(critic, z_related, y_related, z_novel, y_novel)


def gradient_penalty(
    critic: Critic,
    z_related: Tensor,
    y_related: Tensor,
    z_novel: Tensor,
    y_novel: Tensor,
    generator: Generator,
) -> Tensor:
    """Mean of max(0, |grad_z h([z, y])| - 1)^2 at random points z between a related and a novel sample -> scalar.

    Each related sample is paired with a random novel sample, of its own label if the critic sees labels; every
    label of y_related must then occur in y_novel.
    """
    partners = y_related.unsqueeze(1) == y_novel if critic.conditional else torch.ones(len(y_related), len(y_novel))
    partner = torch.multinomial(partners.float().to(generator.device), 1, generator=generator).squeeze(1)
    mix = torch.rand(len(z_related), 1, generator=generator, device=generator.device).to(z_related)
    z = torch.lerp(z_related.detach(), z_novel.detach()[partner.to(z_novel.device)], mix).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(z, y_related).sum(), z, create_graph=True)
    return F.relu(gradient.norm(dim=1) - 1.0).square().mean()


@torch.no_grad()
def clip_weights(critic: Critic, clip: float) -> None:
    """Clamp every weight and bias of the critic to [-clip, clip], which bounds its slope."""
    for parameter in critic.parameters():
        parameter.clamp_(-clip, clip)


def critic_step(
    critic: Critic,
    optimizer: torch.optim.Optimizer,
    z_related: Tensor,
    y_related: Tensor,
    z_novel: Tensor,
    y_novel: Tensor,
    constraint: str,
    clip: float,
    gp_weight: float,
    generator: Generator,
) -> float:
    """One step of the critic on fixed features; returns its estimate before the step.

    constraint 'clip' clamps the weights to +-clip after the step; 'gp' adds gp_weight times the gradient penalty.
    Raises ValueError for any other.
    """
    if constraint not in CONSTRAINTS:
        raise ValueError(f"unknown critic constraint {constraint!r}: choose one of {', '.join(CONSTRAINTS)}")
    z_related, z_novel = z_related.detach().float(), z_novel.detach().float()
    loss = critic_loss(critic, z_related, y_related, z_novel, y_novel)
    estimate = -loss.item()
    if constraint == "gp":
        penalty = gradient_penalty(critic, z_related, y_related, z_novel, y_novel, generator)
        loss = loss + gp_weight * penalty
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if constraint == "clip":
        clip_weights(critic, clip)
    return estimate


def adversarial_alignment_step(
    backbone: nn.Module,
    optimizer: torch.optim.Optimizer,
    critic: Critic,
    critic_optimizer: torch.optim.Optimizer,
    x_support: Tensor,
    y_support: Tensor,
    x_related: Tensor,
    y_related: Tensor,
    n_critic: int,
    constraint: str,
    clip: float,
    gp_weight: float,
    generator: Generator,
    precision: Precision,
) -> float:
    """Update (1) of Algorithm 2: n_critic steps of the critic, then one of the backbone against it.

    x_support (n_way * n_shot, 3, h, w), x_related (n, 3, h, w) and their labels. The backbone, which the caller
    has put in train mode, sees the related and the support images in two forward passes, so that each has its own
    batch statistics.
    Returns the critic's estimate that the backbone's step lowers.
    """
    with precision.autocast():
        z_related, z_support = backbone(x_related), backbone(x_support)
    has_related = torch.isin(y_support, y_related)
    z_novel, y_novel = z_support[has_related], y_support[has_related]
    for _ in range(n_critic):
        critic_step(
            critic,
            critic_optimizer,
            z_related,
            y_related,
            z_novel,
            y_novel,
            constraint,
            clip,
            gp_weight,
            generator,
        )
    loss = adversarial_alignment_loss(critic, z_related, y_related, z_novel, y_novel)
    # The gradients that this leaves on the critic are dropped by its next step.
    optimizer.zero_grad()
    precision.backward_and_step(loss, optimizer)
    return loss.item()
