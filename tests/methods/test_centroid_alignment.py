"""The centroid loss against the published numbers."""

import pytest
import torch

from data.episodes import class_major_labels
from methods.centroid_alignment import centroid_alignment_loss
from tests.helpers import DEVICE, golden


@pytest.mark.device
@pytest.mark.usefixtures("default_device")
@pytest.mark.parametrize("shot", [1, 5])
def test_centroid_loss_and_gradients_are_the_published_ones(shot):
    g = golden("centroid_alignment")
    z_support = g[f"shot{shot}.z_support"].requires_grad_()
    z_related = g[f"shot{shot}.z_related"].requires_grad_()
    y_support, y_related = (class_major_labels(5, n, DEVICE) for n in (shot, len(z_related) // 5))
    loss = centroid_alignment_loss(z_support, y_support, z_related, y_related, 5)
    loss.backward()
    torch.testing.assert_close(loss.detach(), g[f"shot{shot}.loss"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z_related.grad, g[f"shot{shot}.grad_related"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z_support.grad, g[f"shot{shot}.grad_support"], rtol=1e-4, atol=1e-5)
