"""All backbones: sizes against the literature, learning, checkpoints, eval mode, and torchvision's models."""

import urllib.error
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import BACKBONES, build_backbone, n_parameters, native_img_size, sync_batch_norm
from models.backbone import Backbone, PartlyFrozen, split_backbone
from models.basic_resnet import BasicResNet
from models.conv4 import Conv4
from models.pretrained import PretrainedBackbone
from models.resnet12 import ResNet12
from models.resnet18 import ResNet18


def torchvision_mobilenet(img_size=224):
    return PretrainedBackbone("torchvision:mobilenet_v3_small", img_size)


# Backbone, parameters, feature size and feature map at the native size.
PUBLISHED = {
    "Conv4": (Conv4, 113_088, 1600, (64, 5, 5), 84),
    "ResNet12": (ResNet12, 12_424_320, 640, (640, 5, 5), 84),
    "ResNet18": (ResNet18, 11_176_512, 512, (512, 7, 7), 224),
    "WideResNet": (BasicResNet, 36_579_360, 640, (640, 10, 10), 80),
    "torchvision": (torchvision_mobilenet, 1_517_856, 1024, (576, 7, 7), 224),
}
ALL = pytest.mark.parametrize("build", [row[0] for row in PUBLISHED.values()], ids=PUBLISHED.keys())


def images(n, side, seed=0):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def same_weights_every_run():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_shapes_are_those_of_the_literature(name):
    build, n_parameters, d, map_shape, native = PUBLISHED[name]
    backbone = build(native).eval()
    assert sum(p.numel() for p in backbone.parameters()) == n_parameters
    assert native_img_size("torchvision:mobilenet_v3_small" if name == "torchvision" else name) == native
    assert (backbone.feature_dim, backbone.map_shape) == (d, map_shape)
    with torch.no_grad():
        feature_map = backbone.feature_map(images(1, native))
        assert feature_map.shape[1:] == map_shape
        assert backbone.pool_and_flatten(feature_map).shape == (1, d)


@ALL
@pytest.mark.parametrize("side", [32, 45])
def test_declared_shapes_hold_at_other_sizes(build, side):
    backbone = build(side).eval()
    with torch.no_grad():
        assert backbone.feature_map(images(2, side)).shape == (2, *backbone.map_shape)
        assert backbone(images(2, side)).shape == (2, backbone.feature_dim)


@ALL
def test_a_backbone_in_two_is_the_backbone_and_its_blocks_hold_every_parameter(build):
    backbone = build(32).eval()
    x = images(2, 32)
    assert len(backbone.blocks()) >= 4
    with torch.no_grad():
        for n_last in range(1, len(backbone.blocks())):
            below, last = split_backbone(backbone, n_last)
            torch.testing.assert_close(last(below(x)), backbone(x), rtol=0, atol=0)
    in_blocks = {p for block in backbone.blocks() for p in block.parameters()}
    # Only torchvision's tails have parameters of their own.
    assert in_blocks == set(backbone.parameters()) or isinstance(backbone, PretrainedBackbone)


@ALL
def test_one_optimiser_step_lowers_the_loss(build):
    backbone = build(32)
    head = torch.nn.Linear(backbone.feature_dim, 4)
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the two losses must be of the same function
    x, y = images(8, 32), torch.arange(4).repeat(2)
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=1e-4)
    before = F.cross_entropy(head(backbone(x)), y)
    before.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())
    optimizer.step()
    assert F.cross_entropy(head(backbone(x)), y) < before


@ALL
def test_eval_is_deterministic_and_no_image_sees_another(build):
    backbone = build(32).eval()
    x = images(4, 32)
    with torch.no_grad():
        z = backbone(x)
        assert torch.equal(backbone(x), z)
        # Another batch size may take another kernel, whose sums round differently.
        torch.testing.assert_close(backbone(x[1:2]), z[1:2], rtol=1e-4, atol=1e-4 * z.abs().max().item())


def test_an_image_too_small_is_refused_with_its_size():
    with pytest.raises(ValueError, match="ResNet12 needs images of at least 16 pixels, not 15"):
        ResNet12(15)


def test_resnet18_is_torchvisions_by_name_and_number():
    published, backbone = torchvision.models.resnet18(weights=None).eval(), ResNet18(64).eval()
    state = {key: value for key, value in published.state_dict().items() if not key.startswith("fc.")}
    backbone.load_state_dict(state)
    published.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(backbone(images(2, 64)), published(images(2, 64)))


@pytest.mark.parametrize(
    "name", ["resnet18", "shufflenet_v2_x0_5", "regnet_y_400mf", "mnasnet0_5", "efficientnet_b0", "swin_t", "googlenet"]
)
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_torchvision_features_are_what_the_classifier_is_fed(name, tmp_path):
    side = 64
    published = torchvision.models.get_model(name, weights=None).eval()
    fed = []
    last_linear = [m for m in published.modules() if isinstance(m, torch.nn.Linear)][-1]
    last_linear.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    backbone = PretrainedBackbone(f"torchvision:{name}", side, str(tmp_path / "weights.pth")).eval()
    if name == "googlenet":  # its published weights, and so any that are given, want inputs in [-1, 1]
        published.transform_input = True
    with torch.no_grad():
        published(images(2, side))
        feature_map = backbone.feature_map(images(2, side))
        torch.testing.assert_close(backbone.pool_and_flatten(feature_map), fed[0].flatten(1))
        assert feature_map.shape[1:] == backbone.map_shape
        # Swin keeps its maps channels-last inside; all of ours are (b, c, h', w').
        assert backbone.map_shape[1] == backbone.map_shape[2]
    assert backbone.train()(images(2, side)).shape == (2, backbone.feature_dim)
    backbone.load_state_dict({key: value.clone() for key, value in backbone.state_dict().items()})


def test_torchvision_weights_from_a_file_with_another_number_of_classes(tmp_path):
    published = torchvision.models.mobilenet_v3_small(weights=None, num_classes=7).eval()
    torch.save(published.state_dict(), tmp_path / "seven.pth")
    backbone = PretrainedBackbone("torchvision:mobilenet_v3_small", 64, str(tmp_path / "seven.pth")).eval()
    published.classifier[-1] = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(backbone(images(2, 64)), published(images(2, 64)))


class Hostile:
    """Its unpickling makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_torchvision_weights_that_cannot_be_had_are_one_clear_line(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    (tmp_path / "text.pth").write_text("these are not weights\n")
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "squeezenet.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    name = "mobilenet_v3_small"
    state = torchvision.models.get_model(name, weights=None).state_dict()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(state, tmp_path / "whole.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:100_000])
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save(state | {"features.0.0.weight": 3}, tmp_path / "number.pth")
    torch.save(state | {"features.0.0.weight": Hostile(tmp_path / "marker")}, tmp_path / "hostile.pth")
    for weights, words in [
        ("DEFAULT", f"no download of {name} .*no route to host.*--weights PATH"),
        (str(tmp_path / "absent.pth"), "absent.pth cannot be read"),
        (str(tmp_path / "text.pth"), "text.pth cannot be read"),
        (str(tmp_path / "squeezenet.pth"), f"not a state dict of {name}: 0 of its .* tensors fit, .* and looks like"),
        (str(tmp_path / "tensor.pth"), "tensor.pth cannot be read as a state dict of .*Tensor"),
        (str(tmp_path / "empty.pth"), "empty.pth cannot be read .*no file of torch.save"),
        (str(tmp_path / "half.pth"), "half.pth cannot be read"),
        (
            str(tmp_path / "number.pth"),
            f"not a state dict of {name}: 207 of its 208 tensors fit, not 'features.0.0.weight",
        ),
        (str(tmp_path / "hostile.pth"), "hostile.pth cannot be read .*it asks for getattr;"),
    ]:
        with pytest.raises(ValueError, match=words) as failure:
            PretrainedBackbone(f"torchvision:{name}", 64, weights)
        assert "\n" not in str(failure.value) and len(str(failure.value)) < 600
    PretrainedBackbone(f"torchvision:{name}", 64, str(tmp_path / "old.pth"))  # a file of torch before 1.6
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("name", "side", "words"),
    [
        ("resnet5O", 64, "no classification model 'resnet5O': try .*resnet50"),
        ("fasterrcnn_resnet50_fpn", 64, "no classification model"),
        ("alexnet", 32, "alexnet cannot take images of 32 pixels .*give another --img_size"),
    ],
)
def test_torchvision_models_and_sizes_that_do_not_exist_are_refused(name, side, words):
    with pytest.raises(ValueError, match=words):
        PretrainedBackbone(f"torchvision:{name}", side)


def test_frozen_parameters_are_not_counted():
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert n_parameters(layer) == 6


@pytest.mark.parametrize("name", ["Conv4", "ResNet12", "WideResNet", "ResNet18", "torchvision:resnet18"])
def test_a_rank_without_images_has_a_gradient_of_zero(name):
    net = build_backbone(name, 64)
    net(torch.empty(0, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in net.parameters())


@pytest.mark.parametrize("name", ["Conv4", "ResNet12", "torchvision:mobilenet_v3_small", "timm:test_vit"])
def test_all_but_the_last_blocks_stand_still_in_any_mode(name):
    net, x = build_backbone(name, 32).eval(), images(4, 32)
    partly = PartlyFrozen(net, 1)
    with torch.no_grad():
        torch.testing.assert_close(partly(x), net(x), rtol=0, atol=0)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    partly.train()
    assert not any(module.training for module in partly.below.modules())
    assert all(module.training for module in partly.last.modules())
    learning = [p for p in net.parameters() if p.requires_grad]
    assert 0 < len(learning) < len(list(net.parameters()))
    partly(x).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    torch.optim.SGD(learning, lr=0.1).step()
    still = {key for key, value in net.state_dict().items() if torch.equal(value, before[key])}
    below = {id(value) for value in partly.below.state_dict(keep_vars=True).values()}
    assert {key for key, value in net.state_dict(keep_vars=True).items() if id(value) in below} <= still


# The contract.


@pytest.mark.parametrize("name", [*BACKBONES, "torchvision:resnet18"])
def test_every_backbone_has_a_form_for_relationnet(name):
    net = build_backbone(name, 32, relation=True).eval()
    assert isinstance(net, Backbone)
    with torch.no_grad():
        assert net(images(2, 32)).shape == (2, net.feature_dim)
        assert net.feature_map(images(2, 32)).shape == (2, *net.map_shape)
    other = build_backbone(name, 32)
    other.load_state_dict(net.state_dict())  # the form for RelationNet has the same parameters


class Halves(Backbone):
    """A backbone of the one thing that every backbone must write."""

    def __init__(self, img_size):
        super().__init__()
        self.layer, self.pool = torch.nn.Conv2d(3, 5, 1), torch.nn.AvgPool2d(2)
        self.feature_dim, self.map_shape = 5, (5, img_size // 2, img_size // 2)

    def blocks(self):
        return [self.layer, self.pool]


def test_a_backbone_needs_to_write_its_blocks_alone():
    net, x = Halves(8), images(2, 8)
    torch.testing.assert_close(net.feature_map(x), net.pool(net.layer(x)), rtol=0, atol=0)
    torch.testing.assert_close(net(x), net.layer(x).mean((2, 3)))
    below, last = split_backbone(net, 1)
    torch.testing.assert_close(last(below(x)), net(x), rtol=0, atol=0)
    assert set(net.state_dict()) == {"layer.weight", "layer.bias"}


def test_unknown_names_are_refused():
    words = "unknown backbone 'Conv5': choose one of Conv4, .*, torchvision:NAME, timm:NAME or custom:"
    with pytest.raises(ValueError, match=words):
        build_backbone("Conv5", 32)


@pytest.mark.parametrize("name", ["Conv4", "ResNet12", "WideResNet", "torchvision:resnet18"])
def test_batch_norm_over_processes_keeps_the_keys_the_parameters_and_the_features(name):
    net, x = build_backbone(name, 64).eval(), images(2, 64)
    before, expected = {key: value.data_ptr() for key, value in net.state_dict().items()}, net(x)
    net = sync_batch_norm(net)
    assert {key: value.data_ptr() for key, value in net.state_dict().items()} == before
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    torch.testing.assert_close(net(x), expected)
