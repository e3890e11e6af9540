"""The linear map that is a convolution on some CPUs, against F.linear."""

import pytest
import torch
import torch.nn.functional as F

from models.linear import linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (0, 5), (5,)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_a_linear_layer(shape, dtype, with_bias):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator, dtype=dtype) for s in (shape, (4, 5), (4,)))
    inputs = [v.requires_grad_() for v in (x, weight, bias)[: 2 + with_bias]]
    found, expected = linear(*inputs), F.linear(*inputs)
    torch.testing.assert_close(found, expected)
    direction = torch.randn(expected.shape, generator=generator, dtype=dtype)
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, direction) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_under_autocast_it_is_in_half_precision():
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.ones(2, 3), torch.ones(4, 3)).dtype == torch.bfloat16
