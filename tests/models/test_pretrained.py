"""Networks of timm and of a user's own as backbones: features, blocks, weights, normalisation; damaged and hostile."""

import argparse
import sys

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from engine.normalisation import IMAGENET
from models import build_backbone, native_img_size, sync_batch_norm
from models.backbone import split_backbone
from models.pretrained import timm_network

SIDE = 64
# A residual net, one whose last layers follow the pooling, a transformer of class tokens, one of the mean of tokens,
# one of maps of channels last, one whose blocks take more than the tokens, and one that gives no single tensor.
MODELS = {
    "test_resnet": (7, "map", 64),
    "mobilenetv3_small_050": (7, "map", SIDE),
    "test_vit": (7, "tokens", SIDE),
    "test_vit4": (10, "tokens", SIDE),
    "swin_tiny_patch4_window7_224": (5, "map", 224),
    "eva02_tiny_patch14_224": (1, "tokens", 56),
    "crossvit_tiny_240": (1, "feature", 240),
}


def images(n, side=SIDE, seed=0):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def same_weights_every_run():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MODELS)
def test_features_blocks_and_shapes_are_those_of_the_model(name, tmp_path):
    n_blocks, kind, side = MODELS[name]
    model = timm_network(name, False, side).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    net = build_backbone(f"timm:{name}", side, weights=str(tmp_path / "weights.pth")).eval()
    x = images(2, side)
    with torch.no_grad():
        expected, feature_map = model(x), net.feature_map(x)
        assert torch.equal(net(x), expected) and expected.shape == (2, net.feature_dim)
        assert feature_map.shape == (2, *net.map_shape)
        assert (net.map_shape[1] == net.map_shape[2]) == (kind != "tokens") and len(net.blocks()) == n_blocks
        for n_last in range(1, n_blocks):
            below, last = split_backbone(net, n_last)
            entering = below(x).contiguous(memory_format=torch.channels_last)
            assert entering.dim() == 4
            torch.testing.assert_close(last(entering), expected, rtol=1e-4, atol=1e-5)
    again = build_backbone(f"timm:{name}", side).eval()
    again.load_state_dict({key: value.clone() for key, value in net.state_dict().items()})
    assert torch.equal(again(x), expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_last_blocks_learn_alone_and_the_whole_learns(name):
    net = build_backbone(f"timm:{name}", SIDE)
    below, last = split_backbone(net, 2)
    last(below(images(4)).detach()).square().sum().backward()
    learnt = {key for key, p in net.named_parameters() if p.grad is not None}
    assert learnt and learnt == {key for key, p in net.named_parameters() if any(p is q for q in last.parameters())}
    net(images(4)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_class_token_or_the_mean_of_tokens_as_the_model_pools():
    for name, pooled in (("test_vit", lambda z: z[:, 0]), ("test_vit4", None)):
        net = build_backbone(f"timm:{name}", SIDE).eval()
        tokens = net.feature_map(images(2)).flatten(2).mT
        model = net.tail
        expected = pooled(tokens) if pooled else model.fc_norm(model.pool(tokens))
        torch.testing.assert_close(net.pool_and_flatten(net.feature_map(images(2))), expected)


def test_size_and_normalisation_are_the_models_own():
    for name, size, mean in [
        ("timm:test_vit", 160, (0.5, 0.5, 0.5)),
        ("timm:eva02_tiny_patch14_224", 224, (0.48145466, 0.4578275, 0.40821073)),
        ("timm:resnet10t", 176, IMAGENET.mean),
        ("torchvision:inception_v3", 299, IMAGENET.mean),
        ("torchvision:efficientnet_v2_l", 480, (0.5, 0.5, 0.5)),
    ]:
        assert native_img_size(name) == size
        if name != "torchvision:efficientnet_v2_l":
            assert build_backbone(name, 224 if "eva" in name else 128).normalisation.mean == pytest.approx(mean)


def test_batch_norms_of_timm_keep_their_activation_over_processes():
    net = build_backbone("timm:mobilenetv3_small_050", SIDE).eval()
    with torch.no_grad():
        expected = net(images(2))
        net = sync_batch_norm(net)
        torch.testing.assert_close(net.eval()(images(2)), expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


class Hostile:
    """Its unpickling prints."""

    def __reduce__(self):
        return (print, ("run",))


def test_weights_of_a_file_as_timm_publishes_them_and_damaged_ones(tmp_path, monkeypatch, capsys):
    whole = timm.create_model("test_resnet", num_classes=7).eval()
    safetensors.torch.save_file(whole.state_dict(), tmp_path / "model.safetensors")
    net = build_backbone("timm:test_resnet", SIDE, weights=str(tmp_path / "model.safetensors")).eval()
    with torch.no_grad():
        features = whole.forward_head(whole.forward_features(images(2)), pre_logits=True)
        assert torch.equal(net(images(2)), features)
    trained = {"args": argparse.Namespace(lr=0.1), "epoch": 3}
    trained["state_dict"] = {f"module.backbone.{key}": value for key, value in whole.state_dict().items()}
    torch.save(trained, tmp_path / "trained.pth")
    same = build_backbone("timm:test_resnet", SIDE, weights=str(tmp_path / "trained.pth")).eval()
    with torch.no_grad():
        assert torch.equal(same(images(2)), features)
    torch.save({"model": torchvision.models.resnet18().state_dict()}, tmp_path / "resnet18.pth")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    torch.save(whole.state_dict() | {"conv1.0.weight": Hostile()}, tmp_path / "hostile.pth")
    torch.save(timm_network("test_vit", False, 32).state_dict(), tmp_path / "vit32.pth")

    def no_network(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", no_network)
    for name, weights, words in [
        ("timm:test_resnet", "half.safetensors", "half.safetensors cannot be read as a state dict of test_resnet"),
        ("timm:test_resnet", "hostile.pth", "hostile.pth cannot be read .*it asks for"),
        ("timm:test_resnet", "resnet18.pth", "the file has conv1.weight, .* and looks like torchvision:resnet18"),
        (
            "timm:test_vit",
            "vit32.pth",
            "not a state dict of test_vit: 77 of its 78 tensors fit, not .pos_embed.",
        ),
        ("timm:test_resnet", "DEFAULT", "no download of test_resnet .*no route to host"),
        ("timm:test_resnet", "absent.pth", "absent.pth cannot be read"),
    ]:
        path = weights if weights == "DEFAULT" else str(tmp_path / weights)
        with pytest.raises(ValueError, match=words) as failure:
            build_backbone(name, SIDE, weights=path)
        assert "\n" not in str(failure.value) and len(str(failure.value)) < 600
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "side", "words"),
    [
        ("timm:test_resnett", SIDE, "timm has no classification model 'test_resnett': try .*test_resnet"),
        ("timm:test_vit.no_such_tag", SIDE, "timm has no classification model 'test_vit.no_such_tag'"),
        ("timm:test_vit", 8, "test_vit cannot take images of 8 pixels"),
        ("timm:../../x", SIDE, "unknown backbone"),
        ("timm:hf_hub:someone/net", SIDE, "unknown backbone"),
        ("custom:no_such_module:make", SIDE, "cannot be made .*No module named 'no_such_module'"),
        ("custom:my_nets:absent", SIDE, "cannot be made .*absent"),
        ("custom:my_nets:broken", SIDE, "cannot be made .*RuntimeError: two"),
        ("custom:my_nets:text", SIDE, "gives a str: expected a torch.nn.Module"),
        ("custom:my_nets:maps", SIDE, "cannot take images of 64 pixels .*it gives .* of one image, not"),
        ("custom:my_nets:grey", SIDE, "std .* are not 3 numbers each"),
        ("custom:my_nets", SIDE, "unknown backbone"),
    ],
)
def test_what_is_no_backbone_is_one_clear_line(name, side, words, my_nets):
    with pytest.raises(ValueError, match=words) as failure:
        build_backbone(name, side)
    assert "\n" not in str(failure.value)


def test_without_timm_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="--backbone timm:resnet18 needs timm: pip install timm"):
        native_img_size("timm:resnet18")


def test_without_safetensors_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="--weights .*x.safetensors needs safetensors: pip install safetensors"):
        build_backbone("timm:test_resnet", SIDE, weights=str(tmp_path / "x.safetensors"))


NETS = """
import torch
from torch import nn

def make():
    net = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.img_size, net.mean, net.std = 40, [0.1, 0.2, 0.3], (0.5, 0.5, 0.5)
    return net

def plain():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(5))

def broken():
    raise RuntimeError("two\\nlines")

def text():
    return "net"

def maps():
    return nn.Conv2d(3, 4, 8, 8)

def grey():
    net = make()
    net.std = [0.0]
    return net
"""


@pytest.fixture
def my_nets(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)


def test_a_network_of_ones_own_is_one_block_with_its_size_and_normalisation(my_nets):
    net = build_backbone("custom:my_nets:make", 40).eval()
    assert native_img_size("custom:my_nets:make") == 40 and native_img_size("custom:my_nets:plain") == 224
    assert net.normalisation == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5)) and net.feature_dim == 4
    assert len(net.blocks()) == 1 and net.map_shape == (4, 1, 1) and net(images(2, 40)).shape == (2, 4)
    assert build_backbone("custom:my_nets:plain", 16).normalisation == IMAGENET
