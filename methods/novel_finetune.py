"""Fit the head of an episode on frozen features, or the heads of many episodes together.

Published protocol: a new head, 200 full-batch Adam steps at 1e-3, features of the backbone in eval mode. The heads
of E episodes are one weight (E, n_way, d): Adam works element by element and the losses are summed over the
episodes, so that each head moves exactly as it would alone.

The gradient is written out, because automatic differentiation of so small a problem costs several times the problem
itself. It is the gradient of `head.loss`, to rounding. A head that is not one of ours is differentiated automatically.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.heads import NORM_EPS, SINE_EPS, Head, add_arc_margin, arcMax, cosMax, softMax


def score_gradient(head: Head, scores: Tensor, y: Tensor, one_hot: Tensor) -> Tensor:
    """Gradient of head.loss(scores, y) to the scores: (..., n, n_way) -> (..., n, n_way).

    (softmax(scores) - one_hot) / n; for arcMax, with logits s cos(theta + m), times s and, for the true class, times
    d cos(theta + m) / d cos(theta) = cos m + sin m cos(theta) / sin(theta). y (..., n) and one_hot (..., n, n_way) are
    the same labels.
    """
    n = scores.shape[-2]
    if not isinstance(head, arcMax):
        return probabilities(scores).sub_(one_hot).div_(n)
    gradient = probabilities(head.s * add_arc_margin(scores, y, head.m)).sub_(one_hot).mul_(head.s / n)
    # The margin applies where the cosine is positive; where the sine is bounded its slope is zero.
    index = y.unsqueeze(-1)
    true = scores.gather(-1, index)
    square = 1.0 - true.square()
    slope = math.cos(head.m) + math.sin(head.m) * true * square.clamp_min(SINE_EPS).rsqrt() * (square > SINE_EPS)
    return gradient.scatter_(-1, index, gradient.gather(-1, index) * torch.where(true > 0, slope, 1.0))


def probabilities(logits: Tensor) -> Tensor:
    """Softmax of (..., n, n_way) that lie in memory as (..., n_way, n): over so few ways, that takes a tenth."""
    return logits.mT.softmax(-2).mT


def set_gradients(head: Head, projected: Tensor, y: Tensor, one_hot: Tensor) -> None:
    """Give the parameters of `head` the gradient of its loss on projected features (..., n, d); labels as above.

    A gradient that is there already is overwritten in place: fresh memory a step would cost more than the arithmetic.
    """
    if not isinstance(head, softMax | cosMax | arcMax):
        head.zero_grad()
        with torch.enable_grad():
            head.loss(head.scores(projected), y).backward()
        return
    weight, out = head.weight.detach(), head.weight.grad
    # The faster order of the product, laid out anew as probabilities() likes it.
    scores = (projected @ weight.mT).mT.contiguous().mT
    if isinstance(head, softMax):
        gradient = score_gradient(head, scores.add_(head.bias.unsqueeze(-2)), y, one_hot)
        head.bias.grad = gradient.sum(-2)
        head.weight.grad = torch.matmul(gradient.mT, projected, out=out)
        return
    # The scores are k cos(theta): only what is orthogonal to a row of the weight changes them.
    k = head.s if isinstance(head, cosMax) else 1.0
    norm = torch.linalg.vector_norm(weight, dim=-1).clamp_min(NORM_EPS).unsqueeze(-2)
    gradient = score_gradient(head, scores.mul_(k / norm), y, one_hot)
    along = ((gradient * scores).sum(-2, keepdim=True) / norm.square()).mT
    across = torch.matmul(gradient.mul_(k / norm).mT, projected, out=out)
    head.weight.grad = across.addcmul_(weight, along, value=-1.0)


@torch.no_grad()
def fit_heads(head: Head, z_support: Tensor, y_support: Tensor, n_steps: int, lr: float) -> torch.optim.Adam:
    """Fit `head` in place on support features, and return its optimiser, whose moments alignment goes on with.

    z_support (n, d) and y_support (n,) for one head; (E, n, d) and (E, n) for E heads.
    """
    optimizer = torch.optim.Adam(head.parameters(), lr=lr, fused=True)
    projected = head.project(z_support)
    one_hot = F.one_hot(y_support, head.weight.shape[-2]).to(projected.dtype)
    for _ in range(n_steps):
        set_gradients(head, projected, y_support, one_hot)
        optimizer.step()
    return optimizer
