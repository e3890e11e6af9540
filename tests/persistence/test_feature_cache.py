"""Files that keep the features of a split."""

import dataclasses

import pytest
import torch
from torch import nn

from data.benchmarks import DataOptions, load_split
from data.transforms import normalise
from engine.normalisation import IMAGENET
from engine.precision import Precision
from engine.run import Run
from methods.features import embed, image_source, trainable_blocks, updated_features
from models.conv4 import Conv4
from persistence import feature_cache
from persistence.checkpoints import create_backbone
from persistence.feature_cache import FeatureCache
from tests.helpers import make_benchmark, make_split

FP32, BF16 = Run(), Run(precision=Precision("bf16"))


@pytest.fixture
def backbone():
    """A Conv4 whose batch statistics are not the initial ones."""
    net = create_backbone("Conv4", 16, seed=0)
    with torch.no_grad():
        net(normalise(make_split(side=16, seed=1).images))
    return net


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


def change_code(backbone, split):
    feature_cache.EMBED_VERSION += 1
    return split, FP32


@pytest.mark.parametrize(
    "change", [change_weight, change_statistic, change_images, change_img_size, change_precision, change_code]
)
def test_features_are_computed_again_when_anything_changes_that_they_follow_from(
    counting, tmp_path, monkeypatch, change
):
    monkeypatch.setattr(feature_cache, "EMBED_VERSION", 1)
    split = make_split()
    features_of(counting, split, tmp_path)
    changed, run = change(counting, split)
    counting.n_seen = 0
    again = features_of(counting, changed, tmp_path, run)
    assert counting.n_seen == len(split.images)
    torch.testing.assert_close(again.float(), embed(counting, changed.images, run))


def test_two_backbones_of_the_same_weights_do_not_share_features(tmp_path):
    plain, of_relationnet = (create_backbone("Conv4", 16, seed=0, relation=relation) for relation in (False, True))
    of_relationnet.load_state_dict(plain.state_dict())
    split = make_split(side=16)
    assert features_of(plain, split, tmp_path).shape[1] == plain.feature_dim
    assert features_of(of_relationnet, split, tmp_path).shape[1] == of_relationnet.feature_dim


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99], ids=["empty", "first bytes", "half", "all but the end"])
def test_a_damaged_feature_file_is_written_anew(counting, tmp_path, keep):
    split = make_split()
    first = features_of(counting, split, tmp_path).clone()
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.unlink()  # what is mapped stays as it is
    file.write_bytes(content[: keep if keep in (0, 10) else int(keep * len(content))])
    assert torch.equal(features_of(counting, split, tmp_path), first)
    counting.n_seen = 0
    assert torch.equal(features_of(counting, split, tmp_path), first) and counting.n_seen == 0


def test_stored_activations_are_read_again_and_those_damaged_or_of_other_weights_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "BATCH", 4)
    net = Conv4(img_size=16, width=8)
    make_benchmark(tmp_path / "small", n_class=(2, 2, 2), n_images=3)
    split = load_split(DataOptions(tmp_path, 16, tmp_path / "cache"), "small", "base")
    blocks = trainable_blocks(net, 2)

    def cached():
        source = FeatureCache(tmp_path / "cache", FP32).source(net, blocks, split)
        return source.block_inputs(torch.arange(len(split.images)))

    first = cached().clone()
    with torch.no_grad():
        torch.testing.assert_close(first, blocks.below.eval()(normalise(split.images)))
    (path,) = (tmp_path / "cache").glob("activations_nhwc2_*.npy")
    made = path.stat().st_mtime_ns
    assert torch.equal(cached(), first) and path.stat().st_mtime_ns == made
    content = path.read_bytes()
    path.unlink()  # what is mapped stays as it is
    path.write_bytes(content[:-7])
    assert torch.equal(cached(), first) and path.stat().st_mtime_ns != made
    net.layers[0].bn.bias.data += 1
    assert not torch.equal(cached(), first)


def test_in_bf16_the_inputs_of_the_blocks_are_kept_in_the_half_precision_that_they_are_computed_in(backbone, tmp_path):
    split, blocks = make_split(side=16), trainable_blocks(backbone, 1)
    made, index = image_source(backbone, blocks, split, BF16), torch.tensor([40, 3, 17])
    for _ in range(2):  # written, then read
        kept = FeatureCache(tmp_path, BF16).source(backbone, blocks, split).block_inputs(index)
        assert kept.dtype == torch.bfloat16 and torch.equal(kept.float(), made.block_inputs(index))


def test_in_bf16_the_features_of_conv4_are_kept_in_it_without_rounding(backbone, tmp_path):
    split = make_split(side=16)
    kept = features_of(backbone, split, tmp_path, BF16)
    assert kept.dtype == torch.bfloat16 and torch.equal(kept.float(), embed(backbone, split.images, BF16))


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
