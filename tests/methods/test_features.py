"""Features of a split, and the files that keep them."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn

from data.benchmarks import load_split
from data.transforms import normalise
from engine.precision import Precision
from methods.evaluation import cached_activations, cached_features, embed
from models import build_backbone
from models.backbone import split_backbone
from models.conv4 import Conv4
from persistence.checkpoints import create_backbone
from tests.helpers import make_benchmark, make_split

CPU = torch.device("cpu")
FP32 = Precision("fp32", "cpu")


@pytest.fixture
def backbone():
    """A Conv4 whose batch statistics are not the initial ones."""
    net = create_backbone("Conv4", 16, seed=0)
    with torch.no_grad():
        net(normalise(make_split(side=16, seed=1).images))
    return net


def test_embedding_does_not_depend_on_the_batch_size_and_ends_in_eval_mode(backbone):
    images = make_split(side=16).images
    backbone.train()
    reference = embed(backbone, images, CPU, FP32)
    assert not backbone.training and not any(module.training for module in backbone.modules())
    assert reference.shape == (len(images), backbone.feature_dim) and not reference.requires_grad
    torch.testing.assert_close(reference, backbone(normalise(images)).detach())
    for batch_size in (1, 7, len(images)):
        again = embed(backbone, images, CPU, FP32, batch_size)
        torch.testing.assert_close(again, reference, rtol=1e-5, atol=1e-6)


def test_embedding_changes_no_weight_and_no_statistic(backbone):
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    embed(backbone.train(), make_split(side=16).images, CPU, FP32)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_features_in_bf16_are_close_and_float32(backbone):
    images = make_split(side=16).images
    features = embed(backbone, images, CPU, Precision("bf16", "cpu"))
    exact = embed(backbone, images, CPU, FP32)
    assert features.dtype == torch.float32 and not torch.equal(features, exact)
    assert (features - exact).norm() < 0.05 * exact.norm()


class CountingBackbone(nn.Module):
    """Counts the images it has embedded."""

    def __init__(self):
        super().__init__()
        self.feature_dim = 2
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


def features_of(backbone, split, cache_dir, precision=FP32):
    return cached_features(backbone, split, cache_dir, CPU, precision, quiet=True)


def test_features_are_computed_once(counting, tmp_path):
    split = make_split()
    first = features_of(counting, split, tmp_path)
    torch.testing.assert_close(first, embed(counting, split.images, CPU, FP32))
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
    return split, Precision("bf16", "cpu")


@pytest.mark.parametrize("change", [change_weight, change_statistic, change_images, change_img_size, change_precision])
def test_features_are_computed_anew_when_anything_changes_that_they_follow_from(counting, tmp_path, change):
    split = make_split()
    features_of(counting, split, tmp_path)
    changed, precision = change(counting, split)
    counting.n_seen = 0
    again = features_of(counting, changed, tmp_path, precision)
    assert counting.n_seen == len(split.images)
    torch.testing.assert_close(again, embed(counting, changed.images, CPU, precision))


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


def test_stored_activations_are_read_again_and_those_damaged_or_of_other_weights_made_anew(tmp_path):
    net = Conv4(img_size=16, width=8)
    make_benchmark(tmp_path / "small", n_class=(2, 2, 2), n_images=3)
    split = load_split(tmp_path, "small", "base", 16, tmp_path / "cache")
    below, _ = split_backbone(net, 2)
    cached = partial(
        cached_activations, below, split, tmp_path / "cache", torch.device("cpu"), FP32, quiet=True, batch_size=4
    )
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


def test_maps_are_embedded_as_features_are():
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    backbone = build_backbone("ResNet12", 16)
    maps = embed(backbone, images, CPU, FP32, batch_size=2, maps=True)
    assert maps.shape == (5, *backbone.map_shape)
    torch.testing.assert_close(maps.mean((2, 3)), embed(backbone, images, CPU, FP32))
