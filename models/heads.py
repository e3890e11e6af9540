"""The contract of a head, and the heads of the paper: softMax, cosMax and arcMax (ArcFace, Deng et al., CVPR 2019).

A head maps features to scores, `head(z) -> scores`, and scores to a loss, `head.loss(scores, y)`. The same formulas
serve one head, weight (n_class, d) on z (n, d), and E heads of E episodes, weight (E, n_class, d) on z (E, n, d).
`project` does not depend on the weight; on frozen features it is computed once. Initial weights come from generators,
one per head, so that the head of an episode depends on that episode alone.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

# Below this norm a feature counts as zero: it scores 0 against every class, with finite gradients.
NORM_EPS = 1e-6
# 1 - cos^2 is not resolved below this in float32; the bound keeps the gradient of the sine finite at cos = +-1.
SINE_EPS = 1e-7

# One generator makes one head; a list of them as many heads, fitted together.
Generators = Generator | Sequence[Generator] | None


class Head(nn.Module):
    """A classifier of d features, or E of them together; made as Head(d, n_class, s, m, generators).

    s and m: scale and margin (radians), where it has them. One generator, or None, makes one head; a list as many.
    weight: (n_class, d), or (E, n_class, d). scalars: its attributes that are plain numbers, saved with its state.
    directions: whether it sees unit features, and its scores are linear in them, so that the norm may be divided by
    after the product.
    """

    weight: nn.Parameter
    unit_rows: float
    scalars: ClassVar[tuple[str, ...]] = ()
    directions: ClassVar[bool] = False

    def project(self, z: Tensor) -> Tensor:
        """Features as the head sees them, in float32: (..., n, d) -> (..., n, d)."""
        return unit(z) if self.directions else z.float()

    @abstractmethod
    def scores(self, projected: Tensor) -> Tensor:
        """Projected features (..., n, d) -> scores (..., n, n_class), of which the largest is the prediction."""

    def forward(self, z: Tensor) -> Tensor:
        """Features (..., n, d) -> scores (..., n, n_class)."""
        return self.scores(self.project(z))

    def logits(self, scores: Tensor) -> Tensor:
        """Inputs of the softmax of a prediction: the scores themselves, unless a head says otherwise."""
        return scores

    def rescale(self, s: float, m: float) -> None:
        """Go on with another scale s and margin m, where the head has them among its scalars."""
        for name, value in (("s", s), ("m", m)):
            if name in self.scalars:
                setattr(self, name, value)

    @torch.no_grad()
    def become_mean(self, heads: "Head") -> None:
        """Take the scalars of E heads together, or of one, and weights by which the scores are the mean of theirs."""
        for name in self.scalars:
            setattr(self, name, getattr(heads, name))
        n = heads.weight.shape[:-2].numel()
        state = {name: value.view(n, *self.state_dict()[name].shape) for name, value in heads.state_dict().items()}
        if "unit_rows" in self.scalars and n > 1:
            state["weight"], self.unit_rows = unit(state["weight"]), 0.0
        self.load_state_dict({name: value.mean(0) for name, value in state.items()})

    def loss(self, scores: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Cross-entropy of scores (..., n, n_class) against y (..., n), summed over the heads: scalar.

        weight (..., n): of each sample in the sum; None: the mean over the samples of a head.
        """
        return mean_cross_entropy(self.logits(scores), y, weight)


def product(z: Tensor, weight: Tensor) -> Tensor:
    """Features (..., n, d) times weights (..., n_class, d): (..., n, n_class).

    Features (n, d) that E heads, (E, n_class, d), are all to score take one product of matrices instead of E.
    """
    if z.ndim == 2 and weight.ndim == 3:
        return (z @ weight.flatten(0, 1).T).unflatten(-1, weight.shape[:2]).transpose(0, 1)
    return z @ weight.mT


def unit(z: Tensor) -> Tensor:
    """L2-normalise the last axis in float32: (..., d) -> (..., d)."""
    return F.normalize(z.float(), dim=-1, eps=NORM_EPS)


def cosine_rows(head: Head) -> Tensor:
    """The rows whose products with unit features are the cosines: of length 1, but in the mean of several heads."""
    return unit(head.weight) if head.unit_rows else head.weight


def mean_cross_entropy(logits: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy, averaged over the samples of a head and summed over the heads (independent gradients).

    logits (..., n, n_class), y (..., n) -> scalar. With a weight (..., n), the weighted sum instead of the mean.
    """
    loss = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)
    return loss.mean(-1).sum() if weight is None else (loss * weight).sum()


def initial_weight(n_class: int, d: int, bound: float, generators: Generators) -> nn.Parameter:
    """Weights uniform in +-bound: (n_class, d) of one generator or None, (E, n_class, d) of a list of E."""
    if isinstance(generators, Sequence):
        return nn.Parameter(torch.stack([initial_weight(n_class, d, bound, g).detach() for g in generators]))
    return nn.Parameter(torch.empty(n_class, d).uniform_(-bound, bound, generator=generators))


def one_hot_of(y: Tensor, n_class: int) -> Tensor:
    """Labels (..., n) as (..., n, n_class) of 0 and 1, lying as (..., n_class, n).

    F.one_hot scatters, and for that a GPU that is to repeat itself takes dozens of operations.
    """
    return (torch.arange(n_class, device=y.device).unsqueeze(-1) == y.unsqueeze(-2)).float().mT


class softMax(Head):
    """A linear layer with bias and the cross-entropy; without scale and margin."""

    def __init__(self, d: int, n_class: int, s: float = 1.0, m: float = 0.0, generators: Generators = None):
        super().__init__()
        bound = 1.0 / math.sqrt(d)
        self.weight = initial_weight(n_class, d, bound, generators)
        self.bias = nn.Parameter(initial_weight(1, n_class, bound, generators).squeeze(-2).detach())

    def scores(self, projected: Tensor) -> Tensor:
        """(..., n, d) -> logits (..., n, n_class)."""
        return product(projected, self.weight) + self.bias.unsqueeze(-2)


class cosMax(Head):
    """Scaled cosine similarity, s cos(theta), without a margin and without a bias."""

    scalars = ("s", "unit_rows")
    unit_rows = 1.0
    directions = True

    def __init__(self, d: int, n_class: int, s: float, m: float = 0.0, generators: Generators = None):
        super().__init__()
        self.weight = initial_weight(n_class, d, math.sqrt(6.0 / (d + n_class)), generators)
        self.s = s

    def scores(self, projected: Tensor) -> Tensor:
        """Unit features (..., n, d) -> s cos(theta) (..., n, n_class)."""
        return self.s * product(projected, cosine_rows(self))


class arcMax(Head):
    """Cosine similarity with an additive angular margin m (radians) on the true class, scaled by s in the loss.

    The scores are cos(theta), without scale or margin: they are what predicts.
    """

    scalars = ("s", "m", "unit_rows")
    unit_rows = 1.0
    directions = True

    def __init__(self, d: int, n_class: int, s: float, m: float, generators: Generators = None):
        super().__init__()
        self.weight = initial_weight(n_class, d, math.sqrt(6.0 / (d + n_class)), generators)
        self.s = s
        self.m = m

    def scores(self, projected: Tensor) -> Tensor:
        """Unit features (..., n, d) -> cos(theta) (..., n, n_class)."""
        return product(projected, cosine_rows(self))

    def logits(self, scores: Tensor) -> Tensor:
        """Inputs of the softmax of a prediction: s cos(theta)."""
        return self.s * scores

    def loss(self, scores: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Cross-entropy of s cos(theta + m) on scores = cos(theta) (..., n, n_class) against y (..., n)."""
        return mean_cross_entropy(self.s * add_arc_margin(scores, y, self.m), y, weight)


def arc_margin(true: Tensor, m: float) -> tuple[Tensor, Tensor]:
    """cos(theta + m) of the cosine of a true class where that is positive (the easy margin), and its slope.

    The slope is d cos(theta + m) / d cos(theta) = cos m + sin m cos(theta) / sin(theta); where the margin does not
    apply it is 1, and where the sine is bounded, cos m. ArcFace, eq. 3, with m in radians.
    """
    square = 1.0 - true * true
    sine = square.clamp_min(SINE_EPS).sqrt_()
    slope = math.cos(m) + math.sin(m) * true / sine * (square > SINE_EPS)
    applies = true > 0
    with_margin = torch.where(applies, true * math.cos(m) - sine * math.sin(m), true)
    return with_margin, torch.where(applies, slope, 1.0)


def add_arc_margin(cosine: Tensor, y: Tensor, m: float) -> Tensor:
    """Cosines (..., n, n_class), of which those of the true class, y (..., n), are replaced by cos(theta + m)."""
    return torch.where(one_hot_of(y, cosine.shape[-1]) > 0, arc_margin(cosine, m)[0], cosine)
