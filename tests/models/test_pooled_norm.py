"""The pooled batch norm of Conv4 against its three plain layers."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from models.conv4 import ConvBlock
from models.pooled_norm import CACHE_ROWS, pooled_norm


def block(dtype=torch.float32):
    """A block whose batch norm has weights of both signs."""
    torch.manual_seed(0)
    b = ConvBlock(3, 6).to(dtype)
    with torch.no_grad():
        b.bn.weight.copy_(torch.tensor([1.5, -0.7, 0.3, -2.0, 0.0, 1.0]))
        b.bn.bias.normal_()
    return b.to(memory_format=torch.channels_last)


def plain(b):
    """The same layers in the published order."""
    return nn.Sequential(b.conv, b.bn, nn.ReLU(), nn.MaxPool2d(2))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("side", [8, 9])
def test_outputs_gradients_and_statistics_are_those_of_the_plain_layers(side, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    ours = block().to(memory_format=layout)
    theirs = copy.deepcopy(ours)
    x = torch.randn(CACHE_ROWS + 3, 3, side, side).to(memory_format=layout)
    x2 = x.clone().requires_grad_()
    found, expected = ours(x.requires_grad_()), plain(theirs)(x2)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    found.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=name)
    for (name, p), q in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), plain(theirs)(x))
    with torch.no_grad():  # where the batch norm is part of the convolution
        torch.testing.assert_close(ours(x), plain(theirs)(x), rtol=1e-5, atol=1e-5)


def test_half_precision_is_as_near_to_single_as_the_plain_layers():
    x = torch.randn(16, 3, 16, 16)
    gradients = []
    for half, layers in ((False, plain), (True, plain), (True, lambda b: b)):
        b = block()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            z = layers(b)(x)
        assert z.dtype == (torch.bfloat16 if half else torch.float32)
        z.float().square().sum().backward()
        gradients.append(b.conv.weight.grad)
    exact, of_plain, ours = gradients
    assert (ours - exact).norm() < 1.2 * (of_plain - exact).norm() < 0.1 * exact.norm()


def test_it_runs_under_torch_func():
    b, x = block(), torch.randn(4, 3, 8, 8)
    parameters = {name: p.detach() for name, p in b.named_parameters()}
    buffers = {name: v.clone() for name, v in b.named_buffers()}
    found = grad(lambda p, v: functional_call(b, (p, v), (x,)).square().sum())(parameters, buffers)
    b(x).square().sum().backward()
    for name, p in b.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-3, msg=name)


def test_a_second_backward_pass_is_an_error_and_not_a_wrong_number():
    z = block()(torch.randn(4, 3, 8, 8)).sum()
    z.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


def test_one_value_a_channel_has_no_statistics():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        pooled_norm(torch.randn(1, 6, 1, 1), torch.zeros(6), block().bn)


def outputs(x, layers):
    """What layers make of x, its gradient, those of the batch norm and its statistics; some gradients are zero."""
    b, x = block(), x.clone().requires_grad_()
    z = layers(b, x.clone())
    direction = torch.randint(-2, 3, z.shape, generator=torch.Generator().manual_seed(1)).to(z.dtype)
    z.backward(direction)
    return [z.detach(), x.grad, b.bn.weight.grad, b.bn.bias.grad, b.bn.running_mean, b.bn.running_var]


def pooled(b, x):
    return pooled_norm(x, torch.zeros(6), b.bn)


def separate(b, x):
    return nn.Sequential(b.bn, nn.ReLU(), nn.MaxPool2d(2))(x)


def maps(*shape, dtype=torch.float32):
    """Random maps of whole numbers, among which many maxima are equal."""
    x = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(0))
    return x.to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [2, 7, 10])
def test_of_equal_values_the_first_takes_the_gradient(side, dtype):
    x = maps(5, 6, side, side, dtype=dtype)
    # Normalised first, values of a small weight would be rounded to equal ones in half precision.
    expected = outputs(x.float(), separate)
    rounding = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    for found, right in zip(outputs(x, pooled), expected, strict=True):
        torch.testing.assert_close(found.float(), right, **rounding)


def test_the_variance_is_right_where_the_mean_is_large():
    x = torch.randn(6, 6, 12, 12, generator=torch.Generator().manual_seed(0))
    x = (x + torch.tensor([0.0, 1e3, -1e3, 1e4, 10, 1]).view(-1, 1, 1)).to(memory_format=torch.channels_last)
    x[0, 4, 0, 0] = 1e4  # the first value is no guide to the others
    variance = outputs(x, pooled)[-1] * 10 - 9  # of momentum 0.1, from 1
    expected = x.double().transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(variance.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_nan(dtype):
    x = maps(3, 6, 8, 8, dtype=dtype)
    x[1, 2, 7, 3] = torch.nan
    z, gradient = outputs(x, pooled)[:2]
    for values in (z, gradient):
        assert values[:, 2].isnan().all() and not values[:, [0, 1, 3, 4, 5]].isnan().any()
