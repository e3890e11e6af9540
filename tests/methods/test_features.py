"""Features of a split, and the files that keep them."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from data.benchmarks import DataOptions, load_split
from data.transforms import normalise
from engine.distributed import ALONE, gather_rows
from engine.errors import UserError
from engine.normalisation import IMAGENET
from engine.precision import Precision
from engine.run import Run
from methods import features
from methods.features import FeatureCache, embed, image_source, joined, outputs, trainable_blocks, updated_features
from models import build_backbone
from models.backbone import split_backbone
from models.conv4 import Conv4
from persistence.checkpoints import create_backbone
from tests.helpers import make_benchmark, make_split

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


class CountingBackbone(nn.Module):
    """Counts the images it has embedded."""

    def __init__(self):
        super().__init__()
        self.feature_dim, self.normalisation = 2, IMAGENET
        self.layer = nn.Linear(3, 2)
        self.register_buffer("statistic", torch.zeros(1))
        self.n_seen = 0

    def forward(self, x):
        self.n_seen += len(x)
        return self.layer(x.mean((2, 3))) + self.statistic


@pytest.fixture
def counting():
    torch.manual_seed(0)
    return CountingBackbone()


def features_of(backbone, split, cache_dir, run=FP32):
    return FeatureCache(cache_dir, run).features(backbone, split)


def test_features_are_computed_once(counting, tmp_path):
    split = make_split()
    first = features_of(counting, split, tmp_path)
    torch.testing.assert_close(first, embed(counting, split.images, FP32))
    counting.n_seen = 0
    assert torch.equal(features_of(counting, split, tmp_path), first) and counting.n_seen == 0


def change_weight(backbone, split):
    backbone.layer.weight.data[0, 0] += 1e-6
    return split, FP32


def change_statistic(backbone, split):
    backbone.statistic += 1.0
    return split, FP32


def change_images(backbone, split):
    return dataclasses.replace(split, images=split.images.flip(0), fingerprint="another"), FP32


def change_img_size(backbone, split):
    return dataclasses.replace(split, images=split.images[..., :8, :8]), FP32


def change_precision(backbone, split):
    return split, BF16


@pytest.mark.parametrize("change", [change_weight, change_statistic, change_images, change_img_size, change_precision])
def test_features_are_computed_anew_when_anything_changes_that_they_follow_from(counting, tmp_path, change):
    split = make_split()
    features_of(counting, split, tmp_path)
    changed, run = change(counting, split)
    counting.n_seen = 0
    again = features_of(counting, changed, tmp_path, run)
    assert counting.n_seen == len(split.images)
    torch.testing.assert_close(again, embed(counting, changed.images, run))


def test_two_backbones_of_the_same_weights_do_not_share_features(tmp_path):
    plain, of_relationnet = (create_backbone("Conv4", 16, seed=0, relation=relation) for relation in (False, True))
    of_relationnet.load_state_dict(plain.state_dict())
    split = make_split(side=16)
    assert features_of(plain, split, tmp_path).shape[1] == plain.feature_dim
    assert features_of(of_relationnet, split, tmp_path).shape[1] == of_relationnet.feature_dim


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99], ids=["empty", "first bytes", "half", "all but the end"])
def test_a_damaged_feature_file_is_written_anew(counting, tmp_path, keep):
    split = make_split()
    first = features_of(counting, split, tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: keep if keep in (0, 10) else int(keep * len(content))])
    assert torch.equal(features_of(counting, split, tmp_path), first)
    counting.n_seen = 0
    assert torch.equal(features_of(counting, split, tmp_path), first) and counting.n_seen == 0


def test_stored_activations_are_read_again_and_those_damaged_or_of_other_weights_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 4)
    net = Conv4(img_size=16, width=8)
    make_benchmark(tmp_path / "small", n_class=(2, 2, 2), n_images=3)
    split = load_split(DataOptions(tmp_path, 16, tmp_path / "cache"), "small", "base")
    below, _ = split_backbone(net, 2)

    def cached():
        return FeatureCache(tmp_path / "cache", FP32).activations(below, split)

    first = cached().clone()
    with torch.no_grad():
        torch.testing.assert_close(first, below.eval()(normalise(split.images)))
    (path,) = (tmp_path / "cache").glob("activations2_*.npy")
    made = path.stat().st_mtime_ns
    assert torch.equal(cached(), first) and path.stat().st_mtime_ns == made
    content = path.read_bytes()
    path.unlink()  # what is mapped stays as it is
    path.write_bytes(content[:-7])
    assert torch.equal(cached(), first) and path.stat().st_mtime_ns != made
    net.layers[0].bn.bias.data += 1
    assert not torch.equal(cached(), first)


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


@pytest.mark.parametrize("align_blocks", [None, 1])
def test_a_kept_source_and_one_of_images_are_the_same(backbone, tmp_path, align_blocks):
    split, blocks = make_split(side=16), trainable_blocks(backbone, align_blocks)
    kept = FeatureCache(tmp_path, FP32).source(backbone, blocks, split)
    again = FeatureCache(tmp_path, FP32).source(backbone, blocks, split)
    made = image_source(backbone, blocks, split, FP32)
    index = torch.tensor([40, 3, 3, 17, 0])
    for source in (again, made):
        assert source.split is split
        torch.testing.assert_close(source.features, kept.features)
        torch.testing.assert_close(source.block_inputs(index), kept.block_inputs(index))
        assert source.block_inputs(index).is_contiguous(memory_format=torch.channels_last)
    # What enters the blocks leaves them as the features, in whatever mode they were.
    backbone.train()
    torch.testing.assert_close(updated_features(blocks, made, index, FP32.precision), kept.features[index])


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_joined_parts_are_their_concatenation_in_one_piece(form):
    parts = [torch.randn(n, 3, 4, 5).contiguous(memory_format=form) for n in (2, 2, 1)]
    found = joined(iter(parts), 5)
    assert torch.equal(found, torch.cat(parts)) and found.stride() == torch.cat(parts).stride()
    assert gather_rows([found], ALONE) is found  # a split's maps are large: no copy
    sliced = torch.randn(4, 6)[:, ::2]
    assert torch.equal(joined([sliced], 4), sliced)
