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

    y (..., n) and one_hot (..., n, n_way) are the same labels.
    """
    n = scores.shape[-2]
    if not isinstance(head, arcMax):
        return (scores.softmax(-1) - one_hot) / n
    logits = head.s * add_arc_margin(scores, y, head.m)
    gradient = (logits.softmax(-1) - one_hot) * (head.s / n)
    # d cos(theta + m) / d cos(theta), where the margin applies; where the sine is bounded its slope is zero.
    true = scores.gather(-1, y.unsqueeze(-1))
    square = 1.0 - true.square()
    slope = math.cos(head.m) + math.sin(head.m) * true * square.clamp_min(SINE_EPS).rsqrt() * (square > SINE_EPS)
    return gradient * torch.where(true > 0, one_hot * (slope - 1.0) + 1.0, 1.0)


def set_gradients(head: Head, projected: Tensor, y: Tensor, one_hot: Tensor) -> None:
    """Give the parameters of `head` the gradient of its loss on projected features (..., n, d); labels as above."""
    if not isinstance(head, softMax | cosMax | arcMax):
        head.zero_grad()
        with torch.enable_grad():
            head.loss(head.scores(projected), y).backward()
        return
    scores = head.scores(projected)
    gradient = score_gradient(head, scores, y, one_hot)
    if isinstance(head, softMax):
        head.weight.grad = gradient.transpose(-1, -2) @ projected
        head.bias.grad = gradient.sum(-2)
        return
    # The scores are k cos(theta): only what is orthogonal to a row of the weight changes them.
    k = head.s if isinstance(head, cosMax) else 1.0
    norm = torch.linalg.vector_norm(head.weight, dim=-1, keepdim=True).clamp_min(NORM_EPS)
    along = (gradient * scores).sum(-2).unsqueeze(-1)
    across = (gradient.transpose(-1, -2) * (k / norm)) @ projected
    head.weight.grad = across.addcmul_(head.weight, along / norm.square(), value=-1.0)


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
