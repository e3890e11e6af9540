"""Other repositories' networks: features equal to those of their own code, or a refusal; and back again by export."""

import json
import math
import zlib

import numpy as np
import pytest
import torch

from engine.resizing import check_rule
from models import build_backbone
from persistence.peers import PEERS, our_state, recognised
from tests.helpers import ROOT

NETWORKS = json.loads((ROOT / "tests" / "golden" / "peers.json").read_text())
# The repository of each network, where names and shapes alone leave several, and whether it is refused.
REPOSITORIES = {"metabaseline": "meta-baseline"}
AMBIGUOUS = {
    **dict.fromkeys(
        ("metaoptnet_resnet12", "deepemd_pretrained", "easyfsl_feat_resnet12"),
        {"rfs", "metaoptnet", "deepemd", "libfewshot", "easyfsl"},
    ),
    **dict.fromkeys(("feat_convnet", "metabaseline_convnet4"), {"feat", "meta-baseline"}),
}


def tensor(name, shape):
    """The tensor of a name, by the formula of the golden numbers."""
    n = math.prod(shape)
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1)
    v = np.sin(12.9898 * np.arange(1, n + 1) + zlib.crc32(name.encode()) % 1000) * 43758.5453
    u = v - np.floor(v)
    if len(shape) >= 2:
        values = (2 * u - 1) * math.sqrt(6 / (n / shape[0]))
    elif name.endswith("running_var"):
        values = 0.5 + u
    else:
        values = 0.4 + 0.4 * u if name.endswith("weight") else 0.2 * (u - 0.5)
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def file_of(network):
    """The tensors of a network's file. CloserLook's Conv4 holds each twice: the second name counts."""
    second = {".C.": ".trunk.0.", ".BN.": ".trunk.1."}
    names = {}
    for name in NETWORKS[network]["tensors"]:
        alias = name
        for first, other in second.items():
            alias = alias.replace(first, other) if network == "closerlook_conv4" else alias
        names[name] = alias
    return {name: tensor(alias, NETWORKS[network]["tensors"][name]) for name, alias in names.items()}


def image(side):
    channel, row, column = np.ogrid[:3, :side, :side]
    return torch.from_numpy(np.sin(0.1 * row + 0.07 * column * (channel + 1)).astype(np.float32))[None]


@pytest.mark.parametrize("network", NETWORKS)
def test_features_are_those_of_the_peers_own_network(network):
    state = file_of(network)
    name = network.split("_")[0]
    name = REPOSITORIES.get(name, name)
    assert {found[0] for found in recognised(state, "")} == AMBIGUOUS.get(network, {name})
    ((_, peer, prefix),) = recognised(state, "", name)
    if name == "deepbdc":
        assert "covariances" in peer.refused
        return
    backbone = build_backbone(peer.backbone, NETWORKS[network]["img_size"]).eval()
    ours = our_state(peer, prefix, state)
    backbone.load_state_dict(backbone.state_dict() | ours)
    with np.load(ROOT / "tests" / "golden" / "peers.npz") as golden, torch.no_grad():
        expected = torch.from_numpy(golden[network])
        error = (backbone(image(NETWORKS[network]["img_size"]))[0] - expected).norm() / expected.norm()
    assert error < 1e-4 and not peer.refused


def test_a_key_of_the_file_tells_networks_of_the_same_names_apart():
    state = {name: torch.empty(shape, device="meta") for name, shape in NETWORKS["feat_convnet"]["tensors"].items()}
    assert [found[0] for found in recognised(state, "params")] == ["feat"]
    assert [found[0] for found in recognised(state, "model_sd")] == ["meta-baseline"]
    assert recognised(state | {"encoder.more.weight": torch.zeros(3)}, "params") == []


@pytest.mark.parametrize("name", PEERS)
def test_names_are_one_to_one_and_the_image_size_goes_with_the_rule(name):
    for peer in PEERS[name]:
        with torch.device("meta"):
            ours = build_backbone(peer.backbone, peer.img_size).state_dict()
        assert len({peer.names(key) for key in ours}) == len(ours)
        check_rule(peer.resize, peer.img_size)  # its own rule leaves as many pixels as it takes
