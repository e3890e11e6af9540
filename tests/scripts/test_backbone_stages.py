"""Every backbone through the stages, by its name on the command line, at sizes that are not its own."""

import json
import sys
import urllib.error

import pytest
import torch
import torchvision

from args_parser import args_parser
from engine.normalisation import IMAGENET
from persistence.checkpoints import load_backbone, load_checkpoint
from tests.helpers import call, folders, make_benchmark

SMALL = ["--dataset", "small", "--test_n_way", 2, "--n_shot", 1, "--n_query", 2, "--n_episodes", 1, "--quiet"]
TRAIN = [*SMALL, "--n_epoch", 1, "--val_episodes", 1, "--ft_n_epoch", 5]
META = [*SMALL, "--n_epoch", 1, "--val_episodes", 1, "--n_way", 2, "--train_n_query", 1, "--episodes_per_epoch", 1]
ALIGN = [*SMALL, "--align_iters", 1, "--aug_size", 2, "--n_B", 1, "--ft_n_epoch", 5]
MOBILENET = "torchvision:mobilenet_v3_small"


@pytest.fixture
def small(tmp_path):
    """A folder with a benchmark of 2 classes a split, 3 images each."""
    make_benchmark(tmp_path / "benchmarks" / "small", n_class=(2, 2, 2), n_images=3)
    return tmp_path


def tables(root):
    """The result files of a run, by the name of their script."""
    return {p.name.split("_1shot")[0].rsplit("_", 1)[0]: json.loads(p.read_text()) for p in root.rglob("tables/*.json")}


def model(root, method, backbone):
    return root / "results" / "models" / f"2way_1shot_small_{method}_{backbone.replace(':', '-')}_bestModel.tar"


@pytest.mark.parametrize(
    ("backbone", "side", "d", "meta_learner"),
    [
        ("Conv4", 20, 64, "RelationNet"),
        ("ResNet12", 24, 640, "RelationNet_softmax"),
        ("ResNet18", 32, 512, "MatchingNet"),
        ("WideResNet", 16, 640, "ProtoNet"),
        (MOBILENET, 32, 1024, "ProtoNet"),
        ("timm:test_resnet", 32, 96, "MatchingNet"),
        ("timm:test_vit", 32, 64, "ProtoNet"),
    ],
)
def test_every_backbone_runs_in_the_stages_at_another_size(small, backbone, side, d, meta_learner):
    flags = [*folders(small), "--backbone", backbone, "--img_size", side]
    meta = [*META, "--method", meta_learner, "--init_from", model(small, "arcMax", backbone)]
    for script, stage in (("transferLearning", TRAIN), ("metaLearning", meta), ("associative_alignment", ALIGN)):
        outcome = call(script, *stage, *flags)
        assert outcome.status == 0, outcome.err
        record = tables(small)[script]
        assert (record["backbone"], record["img_size"]) == (backbone, side)
    checkpoint = load_checkpoint(model(small, "arcMax", backbone))
    assert checkpoint.backbone == backbone and checkpoint.head_state["weight"].shape == (2, d)


def test_torchvision_starts_from_a_weights_file_and_its_dropout_follows_the_seed(small):
    torch.manual_seed(0)
    published = torchvision.models.mobilenet_v3_small(weights=None)
    torch.save(published.state_dict(), small / "weights.pth")
    states = []
    for run in ("a", "b"):
        torch.manual_seed(len(states))  # what the process drew before changes nothing
        flags = [*folders(small, run), "--backbone", MOBILENET, "--img_size", 32]
        outcome = call("transferLearning", *TRAIN, *flags, "--weights", small / "weights.pth", "--lr", 1e-6)
        assert outcome.status == 0, outcome.err
        path = next((small / run / "models").glob("*_bestModel.tar"))
        assert ":" not in path.name
        states.append(load_checkpoint(path).backbone_state)
    for (key, value), again in zip(states[0].items(), states[1].values(), strict=True):
        assert torch.equal(value, again), key
    first = published.features[0][0].weight
    torch.testing.assert_close(states[0]["layers.0.0.0.weight"], first.detach(), rtol=0, atol=1e-5)


def test_weights_that_cannot_be_downloaded_are_one_clear_line(small, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    flags = [*folders(small), "--img_size", 32, "--backbone", MOBILENET, "--weights", "DEFAULT"]
    outcome = call("transferLearning", *TRAIN, *flags)
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
    for part in ("mobilenet_v3_small", "no route to host", "--weights PATH"):
        assert part in outcome.err


def test_normalisation_travels_with_the_checkpoint_into_the_blocks_and_the_cache(small):
    flags = [*folders(small), "--backbone", "timm:test_vit", "--img_size", 32]
    assert call("transferLearning", *TRAIN, *flags).status == 0
    path = model(small, "arcMax", "timm:test_vit")
    content = torch.load(path, weights_only=True)
    assert content["normalisation"] == [[0.5] * 3, [0.5] * 3]
    for blocks, n_caches in ((2, 4), (0, 4)):  # features and activations of base and novel
        outcome = call("associative_alignment", *ALIGN, *flags, "--align_blocks", blocks, "--overwrite")
        assert outcome.status == 0, outcome.err
        assert len([p for p in small.rglob("cache/*") if p.suffix in (".pt", ".npy")]) == n_caches
    # A file of before, which has none, is of ImageNet's: other features, so other caches.
    torch.save({key: value for key, value in content.items() if key != "normalisation"}, path)
    assert load_backbone(path, None, None)[0].normalisation == IMAGENET
    assert call("associative_alignment", *ALIGN, *flags, "--align_blocks", 2, "--overwrite").status == 0
    assert len([p for p in small.rglob("cache/*") if p.suffix in (".pt", ".npy")]) == 8
    for damaged in ("rgb", [[0.5] * 3], [[0.5] * 3, [0.5, 0.5, 0.0]], [[0.5] * 3, [0.5] * 4], 3):
        torch.save(content | {"normalisation": damaged}, path)
        outcome = call("associative_alignment", *ALIGN, *flags, "--overwrite")
        assert outcome.status == 2 and outcome.err.count("\n") == 1 and "normalisation" in outcome.err, outcome.err


def test_a_frozen_backbone_keeps_its_weights_and_its_head_learns(small):
    flags = [*folders(small), "--backbone", "Conv4", "--img_size", 16]
    assert call("transferLearning", *TRAIN, *flags).status == 0
    first = load_checkpoint(model(small, "arcMax", "Conv4"))
    kept = small / "first.tar"
    model(small, "arcMax", "Conv4").rename(kept)
    frozen = [*TRAIN, *flags, "--train_blocks", 0, "--overwrite", "--n_epoch", 4]
    assert call("transferLearning", *frozen, "--init_from", kept).status == 0
    after = load_checkpoint(model(small, "arcMax", "Conv4"))
    assert after.epoch == 3 and all(torch.equal(v, after.backbone_state[k]) for k, v in first.backbone_state.items())
    rows = next(small.rglob("metrics.jsonl")).read_text().splitlines()[1:]  # the first is of before the training
    losses = [json.loads(row)["loss"] for row in rows]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True) and losses[3] < losses[0]
    outcome = call("transferLearning", *frozen)
    assert outcome.status == 2 and "--train_blocks and --n_epoch 0 take a trained backbone" in outcome.err


@pytest.mark.parametrize("backbone", ["Conv4", "timm:test_vit"])
def test_the_last_blocks_alone_are_trained_and_resumed(small, backbone):
    flags = [*folders(small), "--backbone", backbone, "--img_size", 32]
    path, kept = model(small, "arcMax", backbone), small / "first.tar"
    assert call("transferLearning", *TRAIN, *flags).status == 0
    path.rename(kept)
    first = load_checkpoint(kept).backbone_state
    n_blocks = len(load_backbone(kept, None, None)[0].blocks())
    train = [*TRAIN, *flags, "--init_from", kept, "--train_blocks"]
    anew = [*train[:-1], "--overwrite", "--train_blocks"]
    state = path.with_name(path.name.replace("_bestModel", "_last"))
    assert call("transferLearning", *anew, 1, "--n_epoch", 2).status == 0
    after = torch.load(state, weights_only=True)
    changed = {name for name, value in after["backbone"].items() if not torch.equal(value, first[name])}
    last = f"layers.{n_blocks - 1}."
    # A batch norm takes a bias of the convolution before it out again.
    assert changed == {name for name in first if name.startswith(last)} - {f"{last}conv.bias"}

    assert call("transferLearning", *anew, 1, "--n_epoch", 1).status == 0
    assert call("transferLearning", *train, 1, "--n_epoch", 2, "--resume").status == 0
    again = torch.load(state, weights_only=True)
    assert all(torch.equal(value, again["backbone"][name]) for name, value in after["backbone"].items())
    assert all(torch.equal(value, again["head"][name]) for name, value in after["head"].items())
    outcome = call("transferLearning", *train, 2, "--n_epoch", 3, "--resume")
    assert outcome.status == 2 and "--train_blocks 2 (was 1)" in outcome.err

    before = path.read_bytes()
    outcome = call("transferLearning", *anew, n_blocks + 1)
    line = f"--train_blocks {n_blocks + 1}, but the backbone has {n_blocks} blocks: give fewer"
    assert outcome.status == 2 and line in outcome.err and outcome.err.count("\n") == 1
    assert call("transferLearning", *anew, 1, "--n_epoch", 0).status == 0  # nothing is trained
    assert path.read_bytes() == before


def test_code_of_ones_own_runs_when_named_and_never_for_a_file(small, monkeypatch):
    (small / "own_net.py").write_text(
        "from pathlib import Path\nfrom torch import nn\nPath(__file__).with_name('ran').touch()\n"
        "def make():\n    return nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(small)
    name = "custom:own_net:make"
    flags = [*folders(small), "--img_size", 16]
    for script, stage in (("transferLearning", TRAIN), ("associative_alignment", ALIGN)):
        outcome = call(script, *stage, *flags, "--backbone", name)
        assert outcome.status == 0, outcome.err
    path = model(small, "arcMax", name)
    (small / "ran").unlink()
    monkeypatch.delitem(sys.modules, "own_net")
    images = small / "benchmarks" / "small" / "novel"
    predict = ["--support", images, "--query", images, "--out", small / "out", "--checkpoint", path, "--quiet"]
    for call_of, words in (
        (("predict", *predict), f"give --backbone {name}"),
        (("associative_alignment", *ALIGN, *flags, "--init_from", path), f"has backbone {name}, not Conv4"),
    ):
        outcome = call(*call_of)
        assert outcome.status == 2 and outcome.err.count("\n") == 1 and words in outcome.err, outcome.err
    assert not (small / "ran").exists() and not (small / "out" / "predictions.csv").exists()
    outcome = call("predict", *predict, "--backbone", name)
    assert outcome.status == 0 and (small / "ran").exists(), outcome.err
    outcome = call("predict", *predict[:6], "--overwrite", "--backbone", name, "--quiet")
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize(
    ("backbone", "native"),
    [
        ("Conv4", 84),
        ("ResNet12", 84),
        ("ResNet18", 224),
        ("WideResNet", 80),
        ("torchvision:resnet50", 224),
        ("timm:test_vit", 160),
    ],
)
def test_the_image_size_is_the_backbones_own_unless_given(backbone, native):
    for stage in ("transfer", "meta", "alignment"):
        assert args_parser(stage, ["--backbone", backbone]).img_size == native
        assert args_parser(stage, ["--backbone", backbone, "--img_size", "48"]).img_size == 48
