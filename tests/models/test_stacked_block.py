"""Stacked copies of the last block of Conv4 against as many blocks and autograd."""

import copy

import pytest
import torch
from torch import nn

from models.conv4 import ConvBlock
from models.stacked_block import StackedBlock

E = 3


def made_block():
    """A block whose batch norm has weights of both signs and statistics that are not the initial ones."""
    torch.manual_seed(0)
    block = ConvBlock(4, 8).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for values in (block.bn.weight, block.bn.bias, block.bn.running_mean, block.conv.bias):
            values.normal_()
        block.bn.running_var.uniform_(0.5, 2)
    return block


def inputs(n):
    """Inputs (E, n, 4, 9, 9), those of a copy channels-last."""
    x = torch.randn(E * n, 4, 9, 9).to(memory_format=torch.channels_last)
    return x.unflatten(0, (E, n))


@pytest.mark.parametrize("train", [True, False])
def test_features_gradients_and_statistics_are_those_of_separate_blocks_by_autograd(train):
    block = made_block()
    stacked = StackedBlock(block, E, torch.float32).train(train)
    first, second = inputs(5), inputs(3)
    passes = [stacked(first), stacked(second)]
    found = [done.z.clone() for done in passes]
    directions = [torch.randn_like(z) for z in found]
    for done, direction in zip(passes, directions, strict=True):
        stacked.add_gradient(done, direction)
    for e in range(E):
        one = copy.deepcopy(block).train(train)
        layers = nn.Sequential(one.conv, one.bn, nn.ReLU(), nn.MaxPool2d(2))
        expected = [layers(x[e]).flatten(1) for x in (first, second)]
        for z, right in zip(found, expected, strict=True):
            torch.testing.assert_close(z[e], right)
        sum((z * direction[e]).sum() for z, direction in zip(expected, directions, strict=True)).backward()
        ours = {"conv.weight": stacked.weight, "bn.weight": stacked.gamma, "bn.bias": stacked.beta}
        if not train:  # where batch norm does not take the bias out again
            ours["conv.bias"] = stacked.bias
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter.grad[e], one.get_parameter(name).grad, rtol=1e-4, atol=1e-4, msg=name)
        for name, value in stacked.state(e).items():
            if "num_batches" not in name:
                torch.testing.assert_close(value, one.state_dict()[name], msg=name)
    assert train == (stacked.bias.grad is None)


def test_half_precision_is_as_near_to_single_as_autograd_in_half_precision():
    block, x = made_block(), inputs(16)
    exact, half = (StackedBlock(block, E, dtype) for dtype in (torch.float32, torch.bfloat16))
    for stacked in (exact, half):
        done = stacked(x)
        stacked.add_gradient(done, done.z.clone())
    one = copy.deepcopy(block)
    with torch.autocast("cpu", torch.bfloat16):
        z = one(x[0]).float()
    z.square().sum().div(2).backward()
    expected = exact.weight.grad[0]
    by_autograd, ours = ((grad - expected).norm() for grad in (one.conv.weight.grad, half.weight.grad[0]))
    assert ours < 1.2 * by_autograd < 0.1 * expected.norm()
