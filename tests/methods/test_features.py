"""Features of a split, and a backbone in two."""

import copy

import pytest
import torch
from torch import nn

from data.transforms import network_input, normalise
from engine.distributed import ALONE, gather_rows
from engine.errors import UserError
from engine.precision import Precision
from engine.run import Run
from methods import features
from methods.features import embed, outputs, trainable_blocks
from models import build_backbone
from models.conv4 import Conv4
from persistence.checkpoints import create_backbone
from tests.helpers import make_split

FP32, BF16 = Run(), Run(precision=Precision("bf16"))


@pytest.fixture
def backbone():
    """A Conv4 whose batch statistics are not the initial ones."""
    net = create_backbone("Conv4", 16, seed=0)
    with torch.no_grad():
        net(normalise(make_split(side=16, seed=1).images))
    return net


def test_embedding_does_not_depend_on_the_batch_size_and_ends_in_eval_mode(backbone, monkeypatch):
    images = make_split(side=16).images
    backbone.train()
    reference = embed(backbone, images, FP32)
    assert not backbone.training and not any(module.training for module in backbone.modules())
    assert reference.shape == (len(images), backbone.feature_dim) and not reference.requires_grad
    torch.testing.assert_close(reference, backbone(normalise(images)).detach())
    for batch_size in (1, 7, len(images)):
        monkeypatch.setattr(features, "BATCH", batch_size)
        again = embed(backbone, images, FP32)
        torch.testing.assert_close(again, reference, rtol=1e-5, atol=1e-6)


class WithTail(Conv4):
    """A Conv4 that has a layer behind its blocks, as some models of libraries have."""

    def __init__(self):
        super().__init__(16, width=4)
        self.tail = nn.Linear(4, 4)

    def pool_and_flatten(self, feature_map):
        return self.tail(feature_map.flatten(1))


def test_only_the_last_blocks_get_a_gradient_and_not_what_is_behind_them():
    backbone = WithTail()
    backbone.layers[3].bn.weight.requires_grad_(False)  # by the user's own wish
    blocks = trainable_blocks(backbone, 1)
    blocks.updated(torch.rand(2, 4, 2, 2)).sum().backward()
    with_gradient = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert with_gradient == {"layers.3.conv.weight", "layers.3.conv.bias", "layers.3.bn.bias"}


def test_embedding_changes_no_weight_and_no_statistic(backbone):
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    embed(backbone.train(), make_split(side=16).images, FP32)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_features_in_bf16_are_close_and_float32(backbone):
    images = make_split(side=16).images
    half, exact = embed(backbone, images, BF16), embed(backbone, images, FP32)
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    assert (half - exact).norm() < 0.05 * exact.norm()


def test_maps_are_embedded_as_features_are(monkeypatch):
    monkeypatch.setattr(features, "BATCH", 2)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    backbone = build_backbone("ResNet12", 16)
    maps = embed(backbone, images, FP32, maps=True)
    assert maps.shape == (5, *backbone.map_shape)
    torch.testing.assert_close(maps.mean((2, 3)), embed(backbone, images, FP32))


# The batch loop.


def test_outputs_leaves_grad_mode_and_autocast_to_who_takes_them_and_is_in_its_own_within():
    layer, within = nn.Linear(3, 2), []

    def network(x):
        within.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return layer(x)

    for z in outputs(network, torch.ones(2, 4, 3), Precision("bf16")):
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        assert z.dtype == torch.float32 and z.shape == (4, 2) and not z.requires_grad
        assert layer(torch.ones(1, 3)).requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in outputs(network, torch.ones(2, 4, 3), Precision()):
            assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    assert within[:2] == [(False, True)] * 2


# A backbone in two, and the ways into it.


def test_restore_gives_the_updated_blocks_their_initial_state_and_no_other(backbone):
    blocks = trainable_blocks(backbone, 2)
    before = copy.deepcopy(backbone.state_dict())
    with torch.no_grad():
        for value in backbone.state_dict().values():
            value += 1
    blocks.restore()
    for name, value in backbone.state_dict().items():
        is_updated = name.startswith(("layers.2.", "layers.3."))
        assert torch.equal(value, before[name] if is_updated else before[name] + 1), name


def test_the_blocks_to_update_are_the_last_ones_or_the_backbone_itself(backbone):
    for all_of_them in (None, 4):
        blocks = trainable_blocks(backbone, all_of_them)
        assert blocks.below is None and blocks.updated is backbone
    blocks = trainable_blocks(backbone, 1)
    assert [*blocks.below, *blocks.updated.blocks] == backbone.blocks() and len(blocks.below) == 3
    with pytest.raises(UserError, match="--align_blocks 5, but the backbone has 4 blocks: give fewer"):
        trainable_blocks(backbone, 5)


def test_maps_of_a_split_are_in_one_piece_channels_last():
    backbone = create_backbone("Conv4", 32, seed=0).to(memory_format=torch.channels_last)
    images = make_split(side=32).images.repeat(3, 1, 1, 1)
    found = embed(backbone, images, FP32, maps=True)
    batches = [network_input(part, FP32.device) for part in images.split(features.BATCH)]
    parts = torch.cat(list(outputs(backbone.feature_map, batches, FP32.precision)))
    assert len(batches) > 1
    assert torch.equal(found, parts) and found.stride() == parts.stride()
    assert gather_rows([found], ALONE) is found  # they are large: no copy
