"""Fitting heads on frozen features against the published numbers, together or alone."""

import pytest
import torch

from methods.novel_finetune import class_weights, fit_heads, uneven
from models import HEADS, build_head
from models.heads import arcMax
from tests.helpers import golden

MANY_STEPS = {"rtol": 2e-3, "atol": 2e-4}
CASES = {"softMax": ("softMax", 0.0, 0.0), "cosMax_s5": ("cosMax", 5.0, 0.0), "arcMax_s5_m0.01": ("arcMax", 5.0, 0.01)}
ALL_HEADS = pytest.mark.parametrize("method", HEADS)


def golden_head(g, case):
    method, s, m = CASES[case]
    head = build_head(method, g["weight_init"].shape[1], g["weight_init"].shape[0], s, m)
    head.weight.data = g["weight_init"].clone()
    if method == "softMax":
        head.bias.data = g["bias_init"].clone()
    return head


@pytest.mark.device
@pytest.mark.usefixtures("default_device")
@pytest.mark.parametrize("case", CASES)
def test_a_fitted_head_is_the_published_one(case):
    g = golden("novel_finetune")
    head = golden_head(g, case)
    fit_heads(head, g["z_support"], g["y_support"], int(g["steps"]), float(g["lr"]))
    torch.testing.assert_close(head.weight.detach(), g[f"{case}.weight_final"], **MANY_STEPS)
    torch.testing.assert_close(head(g["z_query"]).detach(), g[f"{case}.query_scores"], **MANY_STEPS)


@pytest.mark.device
@pytest.mark.usefixtures("default_device")
@pytest.mark.parametrize("n_steps", [0, 1, 50, 199])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_along_the_fit_is_the_published_one(case, n_steps):
    g = golden("novel_finetune")
    head = golden_head(g, case)
    fit_heads(head, g["z_support"], g["y_support"], n_steps, float(g["lr"]))
    loss = head.loss(head(g["z_support"]), g["y_support"]).detach()
    torch.testing.assert_close(loss, g[f"{case}.losses"][n_steps], **MANY_STEPS)


@pytest.mark.device
@pytest.mark.usefixtures("default_device")
def test_fitting_a_head_sends_no_gradient_into_the_features():
    g = golden("novel_finetune")
    z = g["z_support"].requires_grad_()
    fit_heads(golden_head(g, "cosMax_s5"), z, g["y_support"], 2, 1e-3)
    assert z.grad is None


class PlainArcMax(arcMax):
    """arcMax as the contract has it, without a written gradient."""


@pytest.mark.parametrize("n_together", [None, 3])
def test_a_head_without_a_written_gradient_is_fitted_by_autograd_to_the_same_weights(n_together):
    size = () if n_together is None else (n_together,)
    z, y = torch.randn(*size, 12, 16, generator=torch.Generator().manual_seed(0)), torch.arange(4).repeat(*size, 3)
    weights = []
    for make in (PlainArcMax, arcMax):
        generators = [torch.Generator().manual_seed(i) for i in range(n_together or 1)]
        head = make(16, 4, 5.0, 0.1, generators if n_together else generators[0])
        initial = head.weight.detach().clone()
        fit_heads(head, z, y, 100, 1e-2)
        weights.append(head.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)
    assert weights[0].shape == (*size, 4, 16) and (weights[0] - initial).abs().max() > 0.1


def test_classes_of_unequal_supports_count_alike():
    y = torch.tensor([2, 0, 0, 0, 2, 0])
    weight = class_weights(y)
    torch.testing.assert_close(weight, torch.tensor([0.25, 0.125, 0.125, 0.125, 0.25, 0.125]))
    assert torch.equal(uneven(weight), weight) and uneven(class_weights(torch.tensor([0, 1, 1, 0]))) is None


@ALL_HEADS
@pytest.mark.parametrize("n_together", [None, 2])
def test_from_prototypes_a_permutation_of_the_classes_permutes_the_answers(method, n_together):
    size = () if n_together is None else (n_together,)
    z, z_query = torch.randn(*size, 30, 16, generator=torch.Generator().manual_seed(0)).split([9, 21], -2)
    y = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3]).expand(*size, 9)
    weight = class_weights(y.reshape(-1, 9)[0]).expand(*size, 9)
    permutation = torch.tensor([2, 0, 3, 1])
    scores = {}
    for init in ("prototypes", "random"):
        for labels in (y, permutation[y]):
            generators = [torch.Generator().manual_seed(i) for i in range(n_together or 1)]
            head = build_head(method, 16, 4, 5.0, 0.001, generators if n_together else generators[0])
            fit_heads(head, z, labels, 20, 1e-3, weight, init)
            scores.setdefault(init, []).append(head(z_query).detach())
    torch.testing.assert_close(scores["prototypes"][1][..., permutation], scores["prototypes"][0], atol=1e-5, rtol=1e-5)
    assert (scores["random"][1][..., permutation] - scores["random"][0]).abs().max() > 0.1
