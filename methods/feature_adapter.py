"""Update (1) in feature space: a residual linear map of an episode's features, taught by the alignment losses.

Beyond the paper: where Algorithms 1 and 2 move the backbone f, here f stands still and z = f(x) becomes z + z A, with
a matrix A of each episode's own that starts at zero. Equations 4-8 act on these features. All is computed for E
episodes together, whose samples are padded to the same number and weighted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from engine.run import move
from methods.adversarial_alignment import CRITIC_BETAS, CriticSetting
from methods.alignment import AlignmentSetting
from models.critic import Critic
from models.heads import mean_cross_entropy, one_hot_of

FULL = "full"
# Of update (1) when it moves an adapter: as good as lower rates and better than higher ones on val classes.
ADAPTER_LR = 1e-4


@dataclass(frozen=True)
class Samples:
    """n samples of each of E episodes: features z (E, n, d), labels y (E, n), and what each counts, weight (E, n).

    The weights of an episode are 1 in sum, or all 0 if it has no samples; those of padding are 0.
    """

    z: Tensor
    y: Tensor
    weight: Tensor


class Adapter(nn.Module):
    """The map z -> z + z A of the features of E episodes, one A for each; A starts at zero.

    A = U V of a rank, with U (E, d, rank) and V (E, rank, d), or A = V (E, d, d) without a U; without the E, of one.
    """

    def __init__(self, U: Tensor | None, V: Tensor):
        super().__init__()
        self.U = None if U is None else nn.Parameter(U)
        self.V = nn.Parameter(V)

    def of_episode(self, e: int) -> "Adapter":
        """The map of one of the episodes: (n, d) -> (n, d)."""
        return Adapter(None if self.U is None else self.U.detach()[e], self.V.detach()[e])

    def forward(self, z: Tensor) -> Tensor:
        """z + z A: (E, n, d) -> (E, n, d)."""
        return z + (z if self.U is None else z @ self.U) @ self.V


def new_adapter(d: int, rank: int | str, generators: Sequence[Generator]) -> Adapter:
    """An adapter with A zero; the U of a rank is drawn from one generator an episode, and "full" has none."""
    if rank == FULL:
        return Adapter(None, torch.zeros(len(generators), d, d))
    bound = 1.0 / math.sqrt(d)
    U = torch.stack([torch.empty(d, int(rank)).uniform_(-bound, bound, generator=g) for g in generators])
    return Adapter(U, torch.zeros(len(generators), int(rank), d))


# (support, related) -> the alignment losses of E episodes, summed: scalar.
FeatureLoss = Callable[[Samples, Samples], Tensor]


def centroid_loss(support: Samples, related: Samples, n_way: int) -> Tensor:
    """The centroid alignment loss of each episode, summed: scalar. Equations 4-5; see centroid_alignment_loss."""
    member = one_hot_of(support.y, n_way) * (support.weight > 0).unsqueeze(-1)
    centroids = (member / member.sum(1, keepdim=True)).mT @ support.z
    # Of -|z - mu|^2, the part -|z|^2 is the same for all classes.
    logits = 2.0 * related.z @ centroids.mT - centroids.square().sum(-1).unsqueeze(1)
    return mean_cross_entropy(logits, related.y, related.weight)


class Critics:
    """The adversarial alignment loss of E episodes, each with a critic that learns along; see AdversarialAlignment.

    One generator an episode gives the critic's initial weights and what the gradient penalty draws.
    """

    def __init__(
        self, d: int, n_way: int, setting: CriticSetting, generators: Sequence[Generator], device: torch.device
    ):
        self.setting = setting
        self.generators = generators
        critics = [Critic(d, n_way, setting.critic_hidden, generator=g).to(device) for g in generators]
        self.weights, _ = torch.func.stack_module_state(critics)
        self.scores = torch.vmap(lambda weights, z, y: torch.func.functional_call(critics[0], weights, (z, y)))
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=setting.critic_lr, betas=CRITIC_BETAS, fused=True)

    def __call__(self, support: Samples, related: Samples) -> Tensor:
        """The loss after critic_steps steps of the critics on these features, summed: scalar. Equations 6-8.

        A novel class without related samples takes no part.
        """
        has_related = (same_label(support, related) & (related.weight > 0).unsqueeze(1)).any(2)
        weight = support.weight * has_related
        weight = weight / weight.sum(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        novel = replace(support, weight=weight)
        for _ in range(self.setting.critic_steps):
            self.critic_step(replace(novel, z=novel.z.detach()), replace(related, z=related.z.detach()))
        return self.distance(novel, related)

    def distance(self, novel: Samples, related: Samples) -> Tensor:
        """Mean score of the related samples minus that of the novel ones, summed over the episodes: scalar."""
        of_related, of_novel = ((self.scores(self.weights, s.z, s.y) * s.weight).sum() for s in (related, novel))
        return of_related - of_novel

    def critic_step(self, novel: Samples, related: Samples) -> None:
        """One step of the critics on fixed features, under their constraint."""
        setting, loss = self.setting, -self.distance(novel, related)
        if setting.critic_constraint == "gp":
            loss = loss + setting.critic_gp_weight * self.gradient_penalty(novel, related)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if setting.critic_constraint == "clip":
            with torch.no_grad():
                for weight in self.weights.values():
                    weight.clamp_(-setting.critic_clip, setting.critic_clip)

    def gradient_penalty(self, novel: Samples, related: Samples) -> Tensor:
        """Mean of max(0, |grad_z h([z, y])| - 1)^2, z between a related and a random novel sample of its label."""
        n, k = related.z.shape[1], novel.z.shape[1]
        random = torch.stack([torch.rand(n, k + 1, generator=g) for g in self.generators])
        random = move(random, novel.z.device)
        partners = same_label(related, novel) & (novel.weight > 0).unsqueeze(1)
        partner = (random[..., 1:] * partners).argmax(2, keepdim=True).expand_as(related.z)
        z = torch.lerp(related.z, novel.z.gather(1, partner), random[..., :1]).requires_grad_()
        (gradient,) = torch.autograd.grad(self.scores(self.weights, z, related.y).sum(), z, create_graph=True)
        return (F.relu(gradient.norm(dim=2) - 1.0).square() * related.weight).sum()


def same_label(first: Samples, second: Samples) -> Tensor:
    """Which of (E, n) and (E, k) samples have the same label: (E, n, k)."""
    return first.y.unsqueeze(2) == second.y.unsqueeze(1)


# By the name of an alignment, what makes its loss in feature space, of as many episodes as generators.
FEATURE_LOSSES: dict[str, Callable[..., FeatureLoss]] = {
    "centroid": lambda d, n_way, *_: partial(centroid_loss, n_way=n_way),
    "adversarial": lambda d, n_way, setting, *drawn_on: Critics(d, n_way, setting.critic, *drawn_on),
}


def feature_loss(
    d: int, n_way: int, setting: AlignmentSetting, generators: Sequence[Generator], device: torch.device
) -> FeatureLoss:
    """The alignment loss that a setting names, of as many episodes as generators. Raises KeyError for another."""
    return FEATURE_LOSSES[setting.alignment](d, n_way, setting, generators, device)
