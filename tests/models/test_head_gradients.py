"""The written-out gradients against automatic differentiation."""

import pytest
import torch

from data.episodes import class_major_labels
from engine.generators import make_generator
from models import HEADS, build_head
from models.head_gradients import set_gradients


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("method", HEADS)
@pytest.mark.parametrize("m", [0.01, 0.5])
def test_the_written_out_gradient_of_a_head_is_that_of_its_loss(method, together, m, weighted):
    """On random features, with a sample that lies on the weight of its class and one opposite to it."""
    n_way, n_shot, d = 4, 3, 6
    head = build_head(
        method, d, n_way, 5.0, m, [make_generator(0, i) for i in range(3)] if together else make_generator(0, 0)
    )
    y = class_major_labels(n_way, n_shot)
    z = torch.randn(*((3,) if together else ()), n_way * n_shot, d, generator=make_generator(1))
    z[..., 0, :], z[..., 1, :] = head.weight.detach()[..., 0, :], -head.weight.detach()[..., 0, :]
    y = y.expand(z.shape[:-1])
    weight = torch.rand(y.shape, generator=make_generator(2)) if weighted else None
    head.loss(head(z), y, weight).backward()
    expected = {name: p.grad.clone() for name, p in head.named_parameters()}
    one_hot = torch.nn.functional.one_hot(y, n_way).float()
    with torch.no_grad():
        set_gradients(head, head.project(z), y, one_hot, weight)
    for name, p in head.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [name for name, head in HEADS.items() if head.directions])
def test_features_of_known_norm_need_not_be_projected(method):
    head = build_head(method, 6, 4, 5.0, 0.1, [make_generator(0, i) for i in range(3)])
    z, y = 9.0 * torch.randn(3, 12, 6, generator=make_generator(1)), class_major_labels(4, 3).expand(3, 12)
    one_hot = torch.nn.functional.one_hot(y, 4).float()
    with torch.no_grad():
        set_gradients(head, head.project(z), y, one_hot)
        expected = head.weight.grad.clone()
        set_gradients(head, z, y, one_hot, None, z.norm(dim=-1))
    torch.testing.assert_close(head.weight.grad, expected, rtol=1e-4, atol=1e-6)


def test_features_in_bf16_are_multiplied_in_it():
    head = build_head("arcMax", 64, 4, 5.0, 0.1, [make_generator(0, i) for i in range(3)])
    z, y = torch.randn(3, 12, 64, generator=make_generator(1)).bfloat16(), class_major_labels(4, 3).expand(3, 12)
    norm, one_hot = z.float().norm(dim=-1), torch.nn.functional.one_hot(y, 4).float()
    with torch.no_grad():
        set_gradients(head, z.float(), y, one_hot, None, norm)
        expected = head.weight.grad.clone()
        set_gradients(head, z, y, one_hot, None, norm)
    error = (head.weight.grad - expected).norm() / expected.norm()
    assert head.weight.grad.dtype == torch.float32 and 0 < error < 0.01
