"""Checkpoints: what is saved comes back, a failing write loses nothing, and no file runs code or ends in a trace."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from data.glyphs import VERSION
from engine.errors import UserError
from engine.files import load_tensors
from engine.normalisation import IMAGENET
from engine.run import Run
from models import build_head
from persistence.checkpoints import (
    FORMAT,
    Checkpoint,
    check_base_classes,
    create_backbone,
    initial_backbone,
    load_backbone,
    load_checkpoint,
    load_state,
    save_checkpoint,
)

IMG_SIZE = 16


def trained_backbone(seed=0):
    """A Conv4 with batch statistics of its own, in channels_last as the scripts keep it."""
    net = create_backbone("Conv4", IMG_SIZE, seed).to(memory_format=torch.channels_last)
    with torch.no_grad():
        net.train()(torch.randn(8, 3, IMG_SIZE, IMG_SIZE, generator=torch.Generator().manual_seed(seed)))
    return net.eval()


def a_checkpoint(net, **changes):
    head = build_head("arcMax", net.feature_dim, 3, 20.0, 0.01, torch.Generator().manual_seed(0))
    fields = {
        "stage": "transferLearning",
        "dataset": "toy",
        "method": "arcMax",
        "backbone": "Conv4",
        "img_size": IMG_SIZE,
        "class_names": ["ant", "bee", "cät"],
        "backbone_state": net.state_dict(),
        "head_state": head.state_dict(),
        "epoch": 7,
        "val_accuracy": 61.25,
        "config": {"seed": 0, "lr": 1e-3, "crop_scale": [0.08, 1.0], "image_root": None, "no_flip": True},
    }
    return Checkpoint(**(fields | changes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint's file, its record and its network. Tests must not write to it."""
    net = trained_backbone()
    checkpoint = a_checkpoint(net)
    path = tmp_path_factory.mktemp("models") / "new" / "folder" / "model.tar"
    save_checkpoint(path, checkpoint)
    return path, checkpoint, net


# Round trip.


def test_what_is_saved_comes_back(saved):
    path, checkpoint, _ = saved
    found = load_checkpoint(path)
    for field in checkpoint.__dataclass_fields__:
        ours, theirs = getattr(checkpoint, field), getattr(found, field)
        if field.endswith("_state"):
            assert list(ours) == list(theirs)
            assert all(torch.equal(ours[name], theirs[name]) and theirs[name].is_contiguous() for name in ours)
        else:
            assert ours == theirs, field
    assert [file.name for file in path.parent.iterdir()] == ["model.tar"]


def test_a_loaded_backbone_gives_the_same_features(saved):
    path, _, net = saved
    loaded, checkpoint = load_backbone(path, "Conv4", IMG_SIZE)
    x = torch.randn(5, 3, IMG_SIZE, IMG_SIZE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded.eval()(x), net(x))
    assert checkpoint.epoch == 7


def test_a_checkpoint_starts_a_backbone_and_without_one_the_seed_does(saved):
    path, _, net = saved
    loaded, checkpoint = initial_backbone("Conv4", IMG_SIZE, "none", path, Run())
    assert checkpoint is not None
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.state_dict().items())
    new, none = initial_backbone("Conv4", IMG_SIZE, "none", None, Run(seed=5))
    assert none is None
    expected = create_backbone("Conv4", IMG_SIZE, 5).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in new.state_dict().items())


def test_a_checkpoint_holds_tensors_and_plain_values_alone(tmp_path):
    config = {
        "cache_dir": Path("some") / "cache",
        "crop_scale": (0.3, 1.0),
        "best": float("nan"),
        "nested": [Path("a")],
    }
    save_checkpoint(tmp_path / "model.tar", a_checkpoint(trained_backbone(), config=config))
    content = torch.load(tmp_path / "model.tar", weights_only=True)
    expected = {"cache_dir": str(Path("some") / "cache"), "crop_scale": [0.3, 1.0], "best": None, "nested": ["a"]}
    assert content["config"] == expected


def test_an_older_checkpoint_has_the_normalisation_that_it_was_trained_with(tmp_path, saved):
    without("normalisation")(tmp_path / "old.tar", saved[0])
    assert load_checkpoint(tmp_path / "old.tar").normalisation == IMAGENET
    assert load_backbone(tmp_path / "old.tar", "Conv4", IMG_SIZE)[0].normalisation == IMAGENET


def test_a_new_backbone_depends_on_the_seed_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = create_backbone("Conv4", IMG_SIZE, 0).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    again, other = (create_backbone("Conv4", IMG_SIZE, seed).state_dict() for seed in (0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["layers.0.conv.weight"], other["layers.0.conv.weight"])


# Writing.


def fail_to_replace(monkeypatch, error):
    def replace(*_):
        raise error

    monkeypatch.setattr(os, "replace", replace)


def fail_to_save(monkeypatch, error):
    def save(_, file):
        file.write(b"half of a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", save)


FULL, WRITER = OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter\nfailed")


@pytest.mark.parametrize(
    ("fail", "error"),
    [
        *((fail_to_replace, FULL), (fail_to_save, FULL), (fail_to_save, WRITER)),
        *((fail, KeyboardInterrupt()) for fail in (fail_to_replace, fail_to_save)),
    ],
)
def test_a_failing_write_leaves_the_previous_checkpoint_and_nothing_else(tmp_path, monkeypatch, saved, fail, error):
    path = tmp_path / "model.tar"
    shutil.copy(saved[0], path)
    with monkeypatch.context() as patch:
        fail(patch, error)
        interrupted = isinstance(error, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt if interrupted else UserError) as raised:
            save_checkpoint(path, a_checkpoint(trained_backbone(1)))
    assert interrupted or (f"{path} cannot be written" in str(raised.value) and "\n" not in str(raised.value))
    assert path.read_bytes() == saved[0].read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_size_limit_leaves_the_previous_checkpoint_and_nothing_else(tmp_path, saved):
    """What a full disk or a quota does, by the system itself."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "model.tar"
    shutil.copy(saved[0], path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            save_checkpoint(path, a_checkpoint(trained_backbone(1)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == saved[0].read_bytes()
    assert list(tmp_path.iterdir()) == [path]


# Reading what is no checkpoint of ours.


EMPTY_ZIP = b"PK\x05\x06" + bytes(18)  # at its end a file with this behind it looks like a zip


class Hostile:
    """Its unpickling writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.write_text, (self.marker, "executed"))


def hostile_zip(path: Path, saved: Path, marker: Path, protocol: int = 2) -> None:
    """A file of torch.save whose pickle is hostile."""
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = pickle.dumps(Hostile(marker), protocol) if name.endswith("data.pkl") else source.read(name)
            target.writestr(name, content)


def test_a_hostile_pickle_would_execute_elsewhere(tmp_path):
    """The two tests below would pass on a harmless file."""
    pickle.loads(pickle.dumps(Hostile(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("tail", [b"", EMPTY_ZIP], ids=["alone", "a zip behind it"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_is_refused_in_one_line_and_not_executed(tmp_path, recwarn, protocol, tail):
    path, marker = tmp_path / "model.tar", tmp_path / "marker"
    path.write_bytes(pickle.dumps({"format": FORMAT, "state": Hostile(marker)}, protocol) + tail)
    with pytest.raises(UserError, match="not a checkpoint of this project.*no file of torch.save"):
        load_checkpoint(path)
    assert not marker.exists() and not recwarn.list


def test_a_hostile_pickle_inside_a_file_of_torch_save_is_refused_and_not_executed(tmp_path, saved, recwarn):
    path, marker = tmp_path / "model.tar", tmp_path / "marker"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        hostile_zip(path, saved[0], marker, protocol)
        with pytest.raises(UserError, match="not a checkpoint of this project"):
            load_checkpoint(path)
        with pytest.raises(UserError, match="not a checkpoint of this project"):
            load_backbone(path, "Conv4", IMG_SIZE)
    assert not marker.exists() and not recwarn.list


def test_what_a_hostile_file_asks_for_is_named_without_advice_to_run_it(tmp_path, saved):
    path, marker = tmp_path / "model.tar", tmp_path / "marker"
    hostile_zip(path, saved[0], marker)
    with pytest.raises(ValueError, match=r"it asks for [\w.]+; only tensors and plain values are read") as error:
        load_tensors(path)
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("tail", [b"", EMPTY_ZIP], ids=["alone", "a zip behind it"])
def test_a_file_of_the_old_format_is_refused(tmp_path, tail):
    old = tmp_path / "old.pth"
    torch.save({"weight": torch.arange(3.0)}, old, _use_new_zipfile_serialization=False)
    old.write_bytes(old.read_bytes() + tail)
    with pytest.raises(ValueError, match="it is no file of torch.save"):
        load_tensors(old)


def torch_saved(content):
    return lambda path, saved: torch.save(content, path)


def without(key):
    def write(path, saved):
        content = torch.load(saved, weights_only=True)
        del content[key]
        torch.save(content, path)

    return write


def beginning(share):
    return lambda path, saved: path.write_bytes(saved.read_bytes()[: int(share * saved.stat().st_size)])


NO_CHECKPOINTS = {
    "empty": lambda path, saved: path.write_bytes(b""),
    "text": lambda path, saved: path.write_text("<html>404 not found</html>"),
    "beginning": beginning(0.01),
    "half": beginning(0.5),
    "all but the end": beginning(0.999),
    "a folder's tar": lambda path, saved: shutil.move(shutil.make_archive(str(path), "tar", saved.parent), path),
    "a zip": lambda path, saved: zipfile.ZipFile(path, "w").close(),
    "the old format": lambda path, saved: torch.save({"format": FORMAT}, path, _use_new_zipfile_serialization=False),
    "a tensor": torch_saved(torch.zeros(2)),
    "a list": torch_saved([1, 2]),
    "another format": torch_saved({"format": "associative-alignment/0"}),
    "only a format": torch_saved({"format": FORMAT}),
    "a key missing": without("img_size"),
    "no format": without("format"),
    "a key too many": torch_saved({"format": FORMAT, "surprise": 1}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_named_with_a_remedy(tmp_path, saved, kind):
    path = tmp_path / "model.tar"
    NO_CHECKPOINTS[kind](path, saved[0])
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert str(path) in message and "not a checkpoint of this project" in message and "transferLearning.py" in message
    assert "\n" not in message


def test_weights_of_an_unknown_network_are_described(tmp_path):
    torch.save({"layer1.0.conv1.weight": torch.zeros(2), "epochs.weight": torch.zeros(2)}, tmp_path / "model.tar")
    with pytest.raises(UserError, match=r"holds 2 tensors \(layer1.0.conv1.weight, .*no network that can be imported"):
        load_checkpoint(tmp_path / "model.tar")


def test_a_missing_checkpoint_is_named_with_a_remedy(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint .*model\.tar: train one with.*--init_from"):
        load_backbone(tmp_path / "model.tar", "Conv4", IMG_SIZE)


def test_a_checkpoint_of_another_backbone_or_image_size_is_refused(saved):
    path = saved[0]
    with pytest.raises(UserError, match="has backbone Conv4, not ResNet18: give --backbone Conv4") as error:
        load_backbone(path, "ResNet18", IMG_SIZE)
    assert str(path) in str(error.value)
    with pytest.raises(UserError, match="has img_size 16, not 84: give --img_size 16") as error:
        load_backbone(path, "Conv4", 84)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {("x" if name == "layers.3.bn.bias" else name): value for name, value in state.items()},
        lambda state: {name: value[:1] if value.ndim else value for name, value in state.items()},
        lambda state: {},
        lambda state: ["no", "state"],
    ],
    ids=["renamed", "another shape", "empty", "no dictionary"],
)
def test_weights_that_do_not_fit_are_one_clear_line(saved, change):
    path, _, net = saved
    with pytest.raises(UserError, match="do not fit Conv4") as error:
        load_state(create_backbone("Conv4", IMG_SIZE, 0), change(net.state_dict()), path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


def test_an_image_too_small_for_the_backbone_is_a_user_error():
    with pytest.raises(UserError, match="at least 16 pixels, not 12"):
        create_backbone("Conv4", 12, 0)


def test_a_checkpoint_of_another_rendering_of_glyphs_is_refused(tmp_path):
    net, path, names = trained_backbone(), tmp_path / "model.tar", ["ant", "bee", "cät"]
    save_checkpoint(path, a_checkpoint(net, dataset="glyphs", glyphs_version=VERSION))
    check_base_classes(path, load_checkpoint(path), "glyphs", names)
    content = load_tensors(path)
    del content["glyphs_version"]  # a file of the first rendering does not say
    torch.save(content, path)
    with pytest.raises(UserError, match="was trained on version 1 of 'glyphs', which is now 2: train it again"):
        check_base_classes(path, load_checkpoint(path), "glyphs", names)


def test_a_checkpoint_of_other_base_classes_is_refused(tmp_path):
    checkpoint = a_checkpoint(trained_backbone())
    check_base_classes(tmp_path, checkpoint, "toy", ["bee", "cät", "ant"])  # in any order
    with pytest.raises(UserError, match="3 base classes of 'toy' that are not the 2 of 'other'"):
        check_base_classes(tmp_path, checkpoint, "other", ["ant", "bee"])
