"""Batch norm over all ranks: that of one process, and in every backbone."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from models import build_backbone
from models.global_batch_norm import GlobalBatchNorm, use_global_batch_norm


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_global_batch_norm_of_one_process_is_batch_norm(group_of_one, momentum):
    theirs, layer = nn.BatchNorm2d(4, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)
    for norm in (theirs, layer):
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
            norm.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 2.0]))
    ours = GlobalBatchNorm(layer)
    for step in range(3):
        x = (3 * torch.randn(5, 4, 3, 2, generator=torch.Generator().manual_seed(step)) + 10).requires_grad_()
        y = x.detach().clone().requires_grad_()
        out, expected = ours(x), theirs(y)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        for value in (out, expected):
            (value.sin() ** 2).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(y))
    half = ours.train()(x.bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["Conv4", "ResNet12", "WideResNet", "torchvision:resnet18"])
def test_global_batch_norm_keeps_the_keys_and_the_parameters_of_a_backbone(name):
    net = build_backbone(name, 64)
    before = {key: value.data_ptr() for key, value in net.state_dict().items()}
    use_global_batch_norm(net)
    assert {key: value.data_ptr() for key, value in net.state_dict().items()} == before
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
