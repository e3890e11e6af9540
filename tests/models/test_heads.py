"""The three heads against the published numbers, and where the formulas are delicate."""

import numpy as np
import pytest
import torch

from data.episodes import class_major_labels
from engine.generators import make_generator
from models import HEADS, build_head
from models.heads import Head, add_arc_margin
from tests.helpers import golden

CASES = {
    "softMax": ("softMax", 0.0, 0.0),
    "cosMax_s20": ("cosMax", 20.0, 0.0),
    "arcMax_s20_m0.01": ("arcMax", 20.0, 0.01),
    "arcMax_s15_m0.001": ("arcMax", 15.0, 0.001),
    "arcMax_s30_m0.5": ("arcMax", 30.0, 0.5),
}


def head_with(method, s, m, weight, bias=None):
    head = build_head(method, weight.shape[1], weight.shape[0], s, m)
    head.weight.data = weight.clone()
    if method == "softMax":
        head.bias.data = bias.clone()
    return head


@pytest.mark.device
@pytest.mark.usefixtures("default_device")
@pytest.mark.parametrize("case", CASES)
def test_head_reproduces_published_scores_loss_and_gradients(case):
    g = golden("heads")
    method, s, m = CASES[case]
    head = head_with(method, s, m, g["weight"], g["bias"])
    z = g["z"].requires_grad_()
    scores = head(z)
    loss = head.loss(scores, g["y"])
    loss.backward()
    for name, ours in [("forward", scores), ("loss", loss), ("grad_z", z.grad), ("grad_weight", head.weight.grad)]:
        torch.testing.assert_close(ours.detach(), g[f"{case}.{name}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", HEADS)
def test_heads_of_many_episodes_equal_heads_one_by_one(method):
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(3, 10, 16, generator=g), torch.randint(0, 4, (3, 10), generator=g)
    together = build_head(method, 16, 4, 5.0, 0.1, [torch.Generator().manual_seed(i) for i in range(3)])
    together.loss(together(z), y).backward()
    for i in range(3):
        alone = build_head(method, 16, 4, 5.0, 0.1, torch.Generator().manual_seed(i))
        alone.loss(alone(z[i]), y[i]).backward()
        torch.testing.assert_close(together(z)[i], alone(z[i]))
        torch.testing.assert_close(together.weight.grad[i], alone.weight.grad)


@pytest.mark.parametrize("cosine", [1.0, -1.0])
@pytest.mark.parametrize("method", ["cosMax", "arcMax"])
def test_gradients_are_finite_where_feature_and_weight_are_parallel(cosine, method):
    weight = torch.eye(4)
    head = head_with(method, 20.0, 0.01, weight)
    z = (cosine * torch.eye(4)).requires_grad_()
    head.loss(head(z), torch.arange(4)).backward()
    assert torch.isfinite(z.grad).all() and torch.isfinite(head.weight.grad).all()


@pytest.mark.parametrize("method", HEADS)
def test_a_zero_feature_has_finite_loss_and_gradients(method):
    head = build_head(method, 8, 3, 20.0, 0.01)
    z = torch.zeros(2, 8, requires_grad=True)
    loss = head.loss(head(z), torch.tensor([0, 1]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(z.grad).all() and torch.isfinite(head.weight.grad).all()


def test_margin_is_applied_to_the_true_class_where_its_cosine_is_positive():
    cosine = torch.tensor([[0.6, 0.2], [-0.6, 0.2]])
    with_margin = add_arc_margin(cosine, torch.tensor([0, 0]), 0.3)
    assert with_margin[0, 0] == pytest.approx(np.cos(np.arccos(0.6) + 0.3), abs=1e-6)
    assert with_margin[1, 0] == cosine[1, 0]
    assert torch.equal(with_margin[:, 1], cosine[:, 1])


# The contract.


@pytest.mark.parametrize("method", HEADS)
def test_every_head_is_one_of_the_contract_and_runs(method):
    head = build_head(method, 8, 3, 5.0, 0.1, torch.Generator().manual_seed(0))
    assert type(head).__bases__ == (Head,) and head.weight.shape == (3, 8)
    z, y = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.arange(3).repeat(2)
    scores = head(z)
    assert scores.shape == head.logits(scores).shape == (6, 3)
    assert torch.equal(scores, head.scores(head.project(z)))
    at_5 = head.loss(head(z), y)
    head.rescale(10.0, 0.1)
    assert torch.equal(head.loss(head(z), y), at_5) == (method == "softMax")


@pytest.mark.parametrize("method", HEADS)
def test_samples_of_weight_0_are_not_there(method):
    heads = [build_head(method, 8, 3, 5.0, 0.1, make_generator(0)) for _ in range(2)]
    z, y = torch.randn(9, 8, generator=make_generator(1)), class_major_labels(3, 3)
    weight = torch.tensor([0.2] * 5 + [0.0] * 4)
    losses = [heads[0].loss(heads[0](z), y, weight), heads[1].loss(heads[1](z[:5]), y[:5])]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(head.weight.grad for head in heads))
