"""Gradients of `head.loss`, written out for the inner loops that fit heads on frozen features, where autograd costs
several times the arithmetic. A head without an entry in WRITTEN_OUT takes autograd."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.heads import NORM_EPS, Head, arc_margin, arcMax, cosMax, softMax

Weight = Tensor | None  # of each sample (..., n)


def set_gradients(
    head: Head, z: Tensor, y: Tensor, one_hot: Tensor, weight: Tensor | None = None, norm: Tensor | None = None
) -> None:
    """Give the parameters of a head the gradient of its loss on features z (..., n, d).

    y (..., n) and one_hot (..., n, n_class) are the same labels; weight (..., n): of each sample, as in `head.loss`.
    norm (..., n): of the features, for a head of `directions`; without it, z are projected already.
    """
    if written_out := WRITTEN_OUT.get(type(head)):
        return written_out(head, z, y, one_hot, weight, norm)
    head.zero_grad()
    with torch.enable_grad():
        projected = z if norm is None else z / norm.unsqueeze(-1)
        head.loss(head.scores(projected), y, weight).backward()


def set_softmax_gradients(head: softMax, z: Tensor, y: Tensor, one_hot: Tensor, weight: Weight, norm: None) -> None:
    """softMax: the gradient of the logits z W^T + b, taken on to weight and bias."""
    logits = products(z, head.weight.detach()).add_(head.bias.detach().unsqueeze(-2))
    gradient = cross_entropy_gradient(logits, one_hot, weight)
    head.bias.grad = gradient.sum(-2)
    head.weight.grad = torch.matmul(gradient.mT, z, out=head.weight.grad)


def set_cosmax_gradients(head: cosMax, z: Tensor, y: Tensor, one_hot: Tensor, weight: Weight, norm: Weight) -> None:
    """cosMax: the gradient of the scores s cos(theta), which are the logits, taken on to the weight."""
    gradient = partial(cross_entropy_gradient, one_hot=one_hot, weight=weight)
    set_cosine_gradient(head.weight, z, norm, head.s, gradient)


def set_arcmax_gradients(head: arcMax, z: Tensor, y: Tensor, one_hot: Tensor, weight: Weight, norm: Weight) -> None:
    """arcMax: the gradient of the logits s cos(theta + m), times s and, for the true class, the slope of the margin."""

    def of_scores(cosine: Tensor) -> Tensor:
        # As products with one_hot: over so few classes, they take a third of the time of `where` or `scatter`.
        true = (cosine * one_hot).sum(-1, keepdim=True)
        with_margin, slope = arc_margin(true, head.m)
        logits = torch.addcmul(cosine, one_hot, with_margin.sub_(true)).mul_(head.s)
        gradient = probabilities(logits).sub_(one_hot)
        of_true = (gradient * one_hot).sum(-1, keepdim=True)
        gradient.addcmul_(one_hot, of_true.mul_(slope.sub_(1.0)))
        return gradient.mul_(head.s / cosine.shape[-2] if weight is None else head.s * weight.unsqueeze(-1))

    set_cosine_gradient(head.weight, z, norm, 1.0, of_scores)


WRITTEN_OUT: dict[type[Head], Callable[..., Any]] = {
    softMax: set_softmax_gradients,
    cosMax: set_cosmax_gradients,
    arcMax: set_arcmax_gradients,
}


def probabilities(logits: Tensor) -> Tensor:
    """Softmax of (..., n, n_class) that lie in memory as (..., n_class, n): over so few classes, that takes a tenth."""
    return logits.mT.softmax(-2).mT


def products(z: Tensor, weight: Tensor) -> Tensor:
    """Features (..., n, d) times weights (..., n_class, d): (..., n, n_class), lying as (..., n_class, n).

    Features in bf16 are multiplied in it; the result is float32.
    """
    return (weight.to(z.dtype) @ z.mT).float().mT


def cross_entropy_gradient(logits: Tensor, one_hot: Tensor, weight: Tensor | None = None) -> Tensor:
    """Gradient of the mean cross-entropy to the logits: (..., n, n_class).

    (softmax(logits) - one_hot) / n, or times weight (..., n).
    """
    gradient = probabilities(logits).sub_(one_hot)
    return gradient.div_(logits.shape[-2]) if weight is None else gradient.mul_(weight.unsqueeze(-1))


def set_cosine_gradient(
    weight: nn.Parameter, z: Tensor, norm: Weight, k: float, gradient: Callable[[Tensor], Tensor]
) -> None:
    """Give a weight (..., n_class, d) the gradient of a loss on scores k cos(theta) of features (..., n, d).

    norm (..., n): of the features; None: they have unit length. gradient: scores -> gradient of the loss to them,
    (..., n, n_class). Only the component orthogonal to a row of the weight changes its scores. An existing gradient is
    overwritten in place, as an allocation per step is slow.
    """
    w = weight.detach()
    length = torch.linalg.vector_norm(w, dim=-1).clamp_min(NORM_EPS).unsqueeze(-1)
    factor = (k / (length if norm is None else length * norm.unsqueeze(-2))).mT
    scores = products(z, w).mul_(factor)
    of_scores = gradient(scores)
    along = (of_scores * scores).sum(-2).unsqueeze(-1) / length.square()
    of_products = of_scores.mul_(factor).mT
    if z.dtype == torch.float32:
        across = torch.matmul(of_products, z, out=weight.grad)
    else:
        across = (of_products.to(z.dtype) @ z).float()
    weight.grad = across.addcmul_(w, along, value=-1.0)
