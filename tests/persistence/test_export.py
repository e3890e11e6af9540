"""A backbone as other repositories read it: what is written comes back as it was, under their names."""

from dataclasses import replace

import pytest
import torch

from data.transforms import normalise
from engine.normalisation import Normalisation
from persistence.checkpoints import Checkpoint, create_backbone, load_backbone, load_checkpoint, save_checkpoint
from persistence.imported import read_imported
from tests.helpers import call

# Repository, backbone, a name that it reads, and the key under which it looks for it.
FILES = [
    ("feat", "ResNet12", "encoder.layer1.0.conv1.weight", "params"),
    ("rfs", "ResNet12", "layer4.0.downsample.1.running_var", "model"),
    ("easyfsl", "ResNet12", "layer2.0.bn3.num_batches_tracked", ""),
    ("libfewshot", "ResNet12", "emb_func.layer3.0.conv2.weight", ""),
    ("libfewshot", "Conv4", "emb_func.layer1.0.bias", ""),
    ("rfs", "Conv4_mean", "layer4.1.running_mean", "model"),
    ("feat", "Conv4_max", "encoder.encoder.3.1.weight", "params"),
]


def checkpoint(path, name):
    net = create_backbone(name, 84, seed=0)
    made = Checkpoint("transferLearning", "toy", "arcMax", name, 84, ["a"], net.state_dict(), {}, 0, 0.0, {})
    save_checkpoint(path, replace(made, normalisation=Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))))
    return net.state_dict()


@pytest.mark.parametrize(("repository", "backbone", "name", "key"), FILES)
def test_what_is_exported_is_read_back(tmp_path, repository, backbone, name, key):
    state = checkpoint(tmp_path / "ours.tar", backbone)
    outcome = call("persistence.export", tmp_path / "ours.tar", tmp_path / "theirs.pth", "--to", repository)
    assert outcome.status == 0 and "mean (0.1, 0.2, 0.3)" in outcome.out, outcome
    content = torch.load(tmp_path / "theirs.pth", weights_only=True)
    assert name in (content[key] if key else content)
    imported = read_imported(tmp_path / "theirs.pth", repository)
    assert imported.peer.backbone == backbone
    assert all(torch.equal(imported.state[key], value) for key, value in state.items() if "tracked" not in key)


def test_a_state_dict_has_our_names_and_nothing_is_overwritten(tmp_path):
    state = checkpoint(tmp_path / "ours.tar", "Conv4")
    assert call("persistence.export", tmp_path / "ours.tar", tmp_path / "net.pth").status == 0
    assert torch.load(tmp_path / "net.pth", weights_only=True).keys() == state.keys()
    refused = call("persistence.export", tmp_path / "ours.tar", tmp_path / "net.pth")
    assert refused.status == 2 and "exists already" in refused.err


def test_a_network_that_a_repository_lacks_is_refused(tmp_path):
    checkpoint(tmp_path / "ours.tar", "Conv4")
    for repository in ("feat", "rfs", "easyfsl"):
        refused = call("persistence.export", tmp_path / "ours.tar", tmp_path / "net.pth", "--to", repository)
        assert refused.status == 2 and f"{repository} has no Conv4" in refused.err


def test_tiered_weights_see_rgb_images_as_their_repository_saw_bgr(tmp_path):
    checkpoint(tmp_path / "ours.tar", "ResNet12")
    call("persistence.export", tmp_path / "ours.tar", tmp_path / "rfs.pth", "--to", "rfs")
    flags = [tmp_path / "rfs.pth", tmp_path / "in.tar", "--from", "rfs", "--dataset", "tieredImageNet"]
    outcome = call("persistence.import_checkpoint", *flags)
    assert outcome.status == 0 and "note: rfs reads tieredImageNet in BGR order" in outcome.out, outcome
    call("persistence.import_checkpoint", tmp_path / "rfs.pth", tmp_path / "as_is.tar", "--from", "rfs")
    theirs, ours = (load_backbone(tmp_path / name, None, None)[0].eval() for name in ("as_is.tar", "in.tar"))
    images = torch.randint(0, 256, (2, 3, 84, 84), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs(normalise(images.flip(1), theirs.normalisation))
        torch.testing.assert_close(ours(normalise(images, ours.normalisation)), expected, rtol=1e-4, atol=1e-5)


def test_a_file_of_another_repository_is_a_checkpoint_at_once(tmp_path):
    state = checkpoint(tmp_path / "ours.tar", "ResNet12")
    call("persistence.export", tmp_path / "ours.tar", tmp_path / "theirs.pth", "--to", "feat")
    found = load_checkpoint(tmp_path / "theirs.pth")
    assert (found.backbone, found.eval_resize, found.class_names) == ("ResNet12", "short:92", [])
    assert found.normalisation.mean[0] == pytest.approx(120.39586422 / 255)
    assert torch.equal(found.backbone_state["layers.0.conv1.weight"], state["layers.0.conv1.weight"])
    call("persistence.export", tmp_path / "ours.tar", tmp_path / "bare.pth", "--to", "easyfsl")
    with pytest.raises(Exception, match=r"fits networks of rfs, metaoptnet, deepemd, libfewshot, easyfsl.*--from NAME"):
        load_checkpoint(tmp_path / "bare.pth")
