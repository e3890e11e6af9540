"""Fit a head on the frozen support features of an episode, or the heads of many episodes together.

Published protocol: a new head, 200 full-batch Adam steps at 1e-3, features of the backbone in eval mode. The heads
of E episodes are one weight (E, n_way, d): Adam works element by element and the losses are summed over the
episodes, so that each head moves exactly as it would alone.
"""

import torch
from torch import Tensor

from models.heads import Head


def fit_heads(head: Head, z_support: Tensor, y_support: Tensor, n_steps: int, lr: float) -> torch.optim.Adam:
    """Fit `head` in place on support features, and return its optimiser, whose moments alignment goes on with.

    z_support (n, d) and y_support (n,) for one head; (E, n, d) and (E, n) for E heads.
    """
    optimizer = torch.optim.Adam(head.parameters(), lr=lr, foreach=True)
    projected = head.project(z_support.detach())
    for _ in range(n_steps):
        loss = head.loss(head.scores(projected), y_support)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer
