"""The three classification heads: softMax, cosMax and arcMax (ArcFace, Deng et al., CVPR 2019).

A head maps features to scores, `head(z) -> scores`, and scores to a loss, `head.loss(scores, y)`. The same
formulas serve one head, weight (n_class, d) on z (n, d), and E heads of E episodes at once, weight
(E, n_class, d) on z (E, n, d): everything before the class axis broadcasts. `project` is the part of a head
that does not depend on its weight; on frozen features it is computed once, before the steps of the optimiser.

Initial weights come from generators, one a head, so that the head of an episode depends on that episode alone.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

# Below this norm a feature counts as zero: it scores 0 against every class, with finite gradients.
NORM_EPS = 1e-6
# 1 - cos^2 is not resolved below this in float32; the bound keeps the gradient of the sine finite at cos = +-1.
SINE_EPS = 1e-7


def unit(z: Tensor) -> Tensor:
    """L2-normalise the last axis in float32: (..., d) -> (..., d)."""
    return F.normalize(z.float(), dim=-1, eps=NORM_EPS)


def add_arc_margin(cosine: Tensor, y: Tensor, m: float) -> Tensor:
    """Replace cos(theta) of the true class by cos(theta + m), where cos(theta) > 0 (the easy margin).

    cosine (..., n, n_class), y (..., n) -> (..., n, n_class). ArcFace, eq. 3, with m in radians.
    """
    true = cosine.gather(-1, y.unsqueeze(-1))
    sine = (1.0 - true.square()).clamp_min(SINE_EPS).sqrt()
    with_margin = true * math.cos(m) - sine * math.sin(m)
    return cosine.scatter(-1, y.unsqueeze(-1), torch.where(true > 0, with_margin, true))


def mean_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, averaged over the samples of a head and summed over the heads (independent gradients).

    logits (..., n, n_class), y (..., n) -> scalar.
    """
    loss = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
    return loss.view(y.shape).mean(-1).sum()


def initial_weight(
    n_class: int, d: int, bound: float, generators: Sequence[Generator | None], batched: bool
) -> nn.Parameter:
    """Weights uniform in +-bound, (n_class, d) or, if `batched`, (E, n_class, d), one generator a head."""
    weights = [torch.empty(n_class, d).uniform_(-bound, bound, generator=g) for g in generators]
    return nn.Parameter(torch.stack(weights) if batched else weights[0])


class softMax(nn.Module):
    """A linear layer with bias and the cross-entropy."""

    def __init__(self, d: int, n_class: int, generators: Sequence[Generator | None] = (None,), batched: bool = False):
        super().__init__()
        bound = 1.0 / math.sqrt(d)
        self.weight = initial_weight(n_class, d, bound, generators, batched)
        self.bias = nn.Parameter(initial_weight(1, n_class, bound, generators, batched).squeeze(-2).detach())

    def project(self, z: Tensor) -> Tensor:
        """Features in float32, unchanged."""
        return z.float()

    def scores(self, projected: Tensor) -> Tensor:
        """(..., n, d) -> logits (..., n, n_class)."""
        return projected @ self.weight.transpose(-1, -2) + self.bias.unsqueeze(-2)

    def forward(self, z: Tensor) -> Tensor:
        return self.scores(self.project(z))

    def logits(self, scores: Tensor) -> Tensor:
        """What the softmax of a prediction is taken of: the scores themselves."""
        return scores

    def rescale(self, s: float, m: float) -> None:
        """A linear layer has neither scale nor margin: nothing changes."""

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of scores (..., n, n_class) against y (..., n)."""
        return mean_cross_entropy(scores, y)


class cosMax(nn.Module):
    """Scaled cosine similarity, s cos(theta), without a margin and without a bias."""

    def __init__(
        self,
        d: int,
        n_class: int,
        s: float,
        generators: Sequence[Generator | None] = (None,),
        batched: bool = False,
    ):
        super().__init__()
        self.weight = initial_weight(n_class, d, math.sqrt(6.0 / (d + n_class)), generators, batched)
        self.s = s

    def project(self, z: Tensor) -> Tensor:
        """Unit features."""
        return unit(z)

    def scores(self, projected: Tensor) -> Tensor:
        """Unit features (..., n, d) -> s cos(theta) (..., n, n_class)."""
        return self.s * (projected @ unit(self.weight).transpose(-1, -2))

    def forward(self, z: Tensor) -> Tensor:
        return self.scores(self.project(z))

    def logits(self, scores: Tensor) -> Tensor:
        """What the softmax of a prediction is taken of: the scores themselves."""
        return scores

    def rescale(self, s: float, m: float) -> None:
        """Go on with another scale s; there is no margin."""
        self.s = s

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of scores (..., n, n_class) against y (..., n)."""
        return mean_cross_entropy(scores, y)


class arcMax(nn.Module):
    """Cosine similarity with an additive angular margin m (radians) on the true class, scaled by s in the loss.

    The scores are cos(theta), without scale or margin: they are what predicts.
    """

    def __init__(
        self,
        d: int,
        n_class: int,
        s: float,
        m: float,
        generators: Sequence[Generator | None] = (None,),
        batched: bool = False,
    ):
        super().__init__()
        self.weight = initial_weight(n_class, d, math.sqrt(6.0 / (d + n_class)), generators, batched)
        self.s = s
        self.m = m

    def project(self, z: Tensor) -> Tensor:
        """Unit features."""
        return unit(z)

    def scores(self, projected: Tensor) -> Tensor:
        """Unit features (..., n, d) -> cos(theta) (..., n, n_class)."""
        return projected @ unit(self.weight).transpose(-1, -2)

    def forward(self, z: Tensor) -> Tensor:
        return self.scores(self.project(z))

    def logits(self, scores: Tensor) -> Tensor:
        """What the softmax of a prediction is taken of: s cos(theta)."""
        return self.s * scores

    def rescale(self, s: float, m: float) -> None:
        """Go on with another scale s and margin m."""
        self.s, self.m = s, m

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of s cos(theta + m) on scores = cos(theta) (..., n, n_class) against y (..., n)."""
        return mean_cross_entropy(self.s * add_arc_margin(scores, y, self.m), y)


Head = softMax | cosMax | arcMax
