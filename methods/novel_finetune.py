"""Fit the head of an episode on frozen features, or the heads of many episodes together.

Published protocol: a new head, 200 full-batch Adam steps at 1e-3, features of the backbone in eval mode. The heads of E
episodes are one weight (E, n_way, d): their losses are summed, and each head is trained exactly as it would be alone.
Beyond it, a head may start from the prototypes of its classes, and classes of unequal supports count alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from models import build_head
from models.head_gradients import set_gradients
from models.heads import Generators, Head, one_hot_of, unit

PUBLISHED_SCALE = 5.0


@dataclass(frozen=True)
class HeadFit:
    """How the head of a novel episode is made and fitted; each field is explained at the flag of the same name.

    ft_s: None leaves the scale to whoever knows the number of examples; without a choice it is the published one.
    """

    method: str = "arcMax"
    ft_s: float | None = PUBLISHED_SCALE
    ft_m: float = 0.001  # of stage 3 and predict.py; stage 1's flag is 0.01
    ft_n_epoch: int = 200
    ft_lr: float = 1e-3
    ft_init: str = "random"

    @property
    def scale(self) -> float:
        """The scale of a head that is fitted."""
        return self.ft_s or PUBLISHED_SCALE

    def new_head(self, d: int, n_way: int, generators: Generators) -> Head:
        """A head to be fitted; of a list of generators, as many, fitted together."""
        return build_head(self.method, d, n_way, self.scale, self.ft_m, generators)


def class_weights(y: Tensor) -> Tensor:
    """What each sample counts where every class counts alike: labels y (n,) -> (n,) that sum to 1."""
    count = torch.bincount(y)
    return 1.0 / (count[y] * (count > 0).sum())


def uneven(weight: Tensor) -> Tensor | None:
    """The weights of samples, or None when all count alike, for which there is less arithmetic."""
    return weight if weight.min() < weight.max() else None


@torch.no_grad()
def start_from_prototypes(head: Head, z_support: Tensor, y_support: Tensor, weight: Tensor | None) -> None:
    """Give a head the means of its classes' unit features as rows, as long as its random rows are, and no bias.

    Its answers then do not depend on the order of the classes. Shapes and weight: see fit_heads.
    """
    member = one_hot_of(y_support, head.weight.shape[-2]).mT
    means = (member if weight is None else member * weight.unsqueeze(-2)) @ unit(z_support)
    length = head.weight.norm(dim=-1, keepdim=True).mean(-2, keepdim=True)
    for name, parameter in head.named_parameters():
        parameter.copy_(length * unit(means) if name == "weight" else torch.zeros_like(parameter))


@torch.no_grad()
def fit_heads(
    head: Head,
    z_support: Tensor,
    y_support: Tensor,
    n_steps: int,
    lr: float,
    weight: Tensor | None = None,
    init: str = "random",
) -> torch.optim.Adam:
    """Fit `head` in place on support features, and return its optimiser, whose moments alignment goes on with.

    z_support (n, d) and y_support (n,) for one head; (E, n, d) and (E, n) for E heads, whose supports may be padded:
    weight is then what each sample counts, 0 for padding; None: all alike. init: from the head's random weights, or
    from prototypes.
    """
    if init == "prototypes":
        start_from_prototypes(head, z_support, y_support, weight)
    optimizer = torch.optim.Adam(head.parameters(), lr=lr, fused=True)
    projected = head.project(z_support)
    one_hot = one_hot_of(y_support, head.weight.shape[-2])
    for _ in range(n_steps):
        set_gradients(head, projected, y_support, one_hot, weight)
        adam_step(optimizer)
    return optimizer


def adam_step(optimizer: torch.optim.Optimizer) -> None:
    """The step of a torch.optim.Adam, same numbers, without what it checks and records around its kernel each time.

    That takes longer than the kernel does on a few heads.
    """
    (group,) = optimizer.param_groups
    states = [optimizer.state[p] for p in group["params"]]
    if not all(states):  # the first step makes them
        optimizer.step()
        return
    gradients = [p.grad for p in group["params"]]
    first, second, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    (beta1, beta2), names = group["betas"], ("fused", "amsgrad", "lr", "weight_decay", "eps", "maximize")
    options = {name: group[name] for name in names}
    adam(group["params"], gradients, first, second, [], steps, beta1=beta1, beta2=beta2, **options)
