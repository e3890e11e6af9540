"""Published checkpoints: theirs gives the published numbers, and of a hostile file nothing runs."""

import argparse
import builtins
import io
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from data.converters.converter import SPLIT_FILES
from data.transforms import normalise
from engine.files import load_tensors
from models import build_head
from persistence.checkpoints import load_backbone, load_checkpoint
from tests.helpers import ROOT, call, golden, make_benchmark, run
from tests.published import (  # noqa: F401
    PUBLISHED_MODULE,
    Calls,
    arcMax,
    cosMax,
    published_content,
    published_module,
    saved,
    softMax,
)

REFERENCE = Path(os.environ.get("PUBLISHED_CHECKPOINTS", ROOT.parent / "shared" / "reference"))
PUBLISHED = REFERENCE / "5way_5shot_miniImagenet_arcMax_Conv4_bestModel.tar"
needs_published = pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published checkpoint is not here")


def importing(path, out, *flags):
    return call("persistence.import_checkpoint", path, out, "--img_size", 16, *flags)


@pytest.fixture
def base(tmp_path):
    """The folder of three base classes."""
    return make_benchmark(tmp_path / "small", n_class=(3, 3, 3), n_images=1) / "base"


@pytest.mark.parametrize("new_format", [False, True])
@pytest.mark.parametrize("published_head", [arcMax, cosMax, softMax])
def test_a_published_file_becomes_a_checkpoint_of_ours(tmp_path, base, new_format, published_head):
    content, net, head = published_content(head=published_head)
    content = {"module": "module", **content}  # the word that stood before a class in old files, as another thing
    torch.save(content, tmp_path / "published.tar", _use_new_zipfile_serialization=new_format)
    assert new_format or f"class {published_head.__name__}(".encode() in (tmp_path / "published.tar").read_bytes()
    outcome = importing(tmp_path / "published.tar", tmp_path / "ours.tar", "--base", base)
    assert outcome.status == 0, outcome.err
    checkpoint = load_checkpoint(tmp_path / "ours.tar")
    assert all(torch.equal(checkpoint.backbone_state[name], value) for name, value in net.state_dict().items())
    assert list(checkpoint.head_state) == list(head.state_dict())
    assert all(torch.equal(checkpoint.head_state[name], value) for name, value in head.state_dict().items())
    assert (checkpoint.method, checkpoint.epoch, checkpoint.val_accuracy) == (published_head.__name__, 3, 61.5)
    assert checkpoint.class_names == ["class00", "class01", "class02"]
    assert (checkpoint.config["s"], checkpoint.config["m"]) == (20.0, 0.01)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The published checkpoint of 5-shot miniImagenet, imported by the documented command."""
    out = tmp_path_factory.mktemp("imported") / "published.tar"
    result = run("-m", "persistence.import_checkpoint", PUBLISHED, out)
    assert "Conv4 of authors, arcMax of 64 classes, epoch 335, validation accuracy 70.04 %" in result.stdout
    return out


@needs_published
def test_the_published_checkpoint_gives_the_published_features_and_scores(imported):
    g = golden("published_conv4_5shot")
    net, checkpoint = load_backbone(imported, "Conv4", 84)
    head = build_head("arcMax", net.feature_dim, 64, checkpoint.config["s"], checkpoint.config["m"])
    head.load_state_dict(checkpoint.head_state)
    with torch.no_grad():
        features = net.eval()(normalise(g["x_uint8"]))
        scores = head(features)
    torch.testing.assert_close(features, g["features"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores, g["base_scores"], rtol=1e-4, atol=1e-5)
    assert checkpoint.epoch == g["epoch"] and checkpoint.val_accuracy == pytest.approx(g["max_acc"].item())
    assert (head.s, head.m) == (g["base_clf_s"].item(), g["base_clf_m"].item())


@needs_published
def test_the_published_checkpoint_drives_the_stages(imported, tmp_path):
    root = make_benchmark(tmp_path / "benchmarks" / "mini", n_class=(64, 3, 3), n_images=4)
    names = list(json.loads((SPLIT_FILES / "miniImagenet.json").read_text())["base"])
    for folder, name in zip(sorted((root / "base").iterdir()), names, strict=True):
        folder.rename(folder.with_name(name))
        for image in list((root / "base" / name).iterdir())[2:]:
            image.unlink()
    flags = ["--dataset", "mini", "--init_from", imported, "--test_n_way", 3, "--n_shot", 1, "--n_query", 2]
    flags += ["--benchmarks_dir", tmp_path / "benchmarks", "--cache_dir", tmp_path / "cache", "--n_episodes", 2]
    flags += ["--results_dir", tmp_path / "results", "--checkpoint_dir", tmp_path / "models", "--ft_n_epoch", 5]
    tested = call("transferLearning", *flags, "--n_epoch", 0, "--val_episodes", 1, "--quiet")
    assert tested.status == 0, tested.err
    aligned = call("associative_alignment", *flags, "--align_iters", 1, "--aug_size", 2, "--quiet")
    assert aligned.status == 0, aligned.err
    (root / "base" / names[0]).rename(root / "base" / "another")
    refused = call("associative_alignment", *flags, "--align_iters", 1, "--aug_size", 2, "--quiet")
    assert refused.status == 2 and "64 base classes" in refused.err and refused.err.count("\n") == 1


# Hostile and damaged files.


def legacy(main, marker=None, tail=b""):
    """A file of the old format around a pickle or its bytes."""
    parts = [MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True}]
    head = b"".join(pickle.dumps(part, 2) for part in parts)
    return head + (main if isinstance(main, bytes) else pickle.dumps(main, 2)) + (tail or pickle.dumps([], 2))


def zipped(main, compression=zipfile.ZIP_STORED, members=()):
    """A file of the new format around a pickle or its bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data.pkl", main if isinstance(main, bytes) else pickle.dumps(main, 2))
        for name, content in members:
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def first(content, value):
    content["state"]["nConvBlock.0.convBlock.0.weight"] = value


def laughs():
    """Ten levels of ten references each: small in the file, 10 billion items to whoever walks through it."""
    level = ["ha"]
    for _ in range(10):
        level = [level] * 10
    return level


def tensor_pickle(offset, shape, stride, n=4, compression=zipfile.ZIP_STORED):
    """A file of a state of one tensor, its numbers written by hand, in a storage of n numbers."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", n) if isinstance(value, Storage) else None

    file = io.BytesIO()
    tensor = Calls(torch._utils._rebuild_tensor_v2, Storage(), offset, shape, stride, False, OrderedDict())
    Pickler(file, 2).dump({"state": {"nConvBlock.0.convBlock.0.weight": tensor}})
    return zipped(file.getvalue(), compression, members=[("data/0", bytes(4 * n))])


def replaced(member, content):
    """A published file with another content of one member."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved())) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            target.writestr(name, content if name.endswith(member) else source.read(name))
    return file.getvalue()


LONG_MEMO = b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b"."
LONG_BYTES = b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc."
SETS_CODE = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__Ns\x86b."
HEAD = b"\x80\x02c" + PUBLISHED_MODULE.encode() + b"\narcMax\n"
# Each makes the bytes of a file; the marker is what code in it would write.
HOSTILE = {
    "os.system, old format": lambda marker: legacy({"state": Calls(os.system, f"touch {marker}")}),
    "os.system, new format": lambda marker: zipped({"state": Calls(os.system, f"touch {marker}")}),
    "os.system instead of the magic number": lambda marker: pickle.dumps(Calls(os.system, f"touch {marker}")),
    "os.system beside good weights": lambda marker: saved(
        lambda content: content.update(epoch=Calls(os.system, f"touch {marker}"), base_clf=None)
    ),
    "builtins.eval": lambda marker: legacy({"state": Calls(eval, f"open({str(marker)!r}, 'w')")}),
    "builtins.exec": lambda marker: zipped({"state": Calls(builtins.exec, f"open({str(marker)!r}, 'w')")}),
    "subprocess.Popen": lambda marker: zipped({"state": Calls(subprocess.Popen, ["touch", str(marker)])}),
    "Path.write_text": lambda marker: legacy({"state": Calls(Path.write_text, marker, "executed")}),
    "the list of storages": lambda marker: legacy({"state": {}}, tail=pickle.dumps(Calls(Path.touch, marker))),
    "a head that runs": lambda marker: saved(lambda c: c.update(base_clf=Calls(Path.touch, marker))),
    "a module found by a dotted name": lambda marker: legacy(b"\x80\x04\x8c\x02os\x8c\x0bpath.exists\x93."),
    "state of a function": lambda marker: zipped(SETS_CODE),
    "a head whose state is a list": lambda marker: zipped(HEAD + b")\x81]b."),
    "a head that is called": lambda marker: zipped(HEAD + b"N\x85R."),
    "a head that is filled": lambda marker: zipped(HEAD + b")\x81NNs."),
    "a class instead of a head": lambda marker: saved(lambda c: c.update(base_clf=arcMax)),
    "parameters without names": lambda marker: saved(lambda c: c["base_clf"]._parameters.update({1: torch.zeros(2)})),
    "an extension code": lambda marker: zipped(b"\x80\x02\x82\x01."),
    "a reduce bomb": lambda marker: zipped({"state": Calls(bytearray, 10**13)}),
    "a reduce bomb of lists": lambda marker: zipped({"state": laughs()}),
    "a numpy array of objects": lambda marker: saved(lambda c: c.update(max_acc=np.array([Calls(Path.touch, marker)]))),
    "a memo of 4 billion places": lambda marker: zipped(LONG_MEMO),
    "a byte string of a terabyte": lambda marker: legacy(LONG_BYTES),
    "a zip bomb as a weight": lambda marker: tensor_pickle(0, (2**24,), (1,), 2**24, zipfile.ZIP_DEFLATED),
    "a zip bomb": lambda marker: zipped({"state": {}}, zipfile.ZIP_DEFLATED, [("data/0", bytes(2**26))]),
    "a zip without a pickle": lambda marker: replaced("data.pkl", b""),
    "a truncated zip": lambda marker: saved()[:-100],
    "half a zip": lambda marker: saved()[: len(saved()) // 2],
    "half an old file": lambda marker: saved(new_format=False)[: len(saved()) // 2],
    "an old file without its end": lambda marker: saved(new_format=False)[:-1],
    "another byte order": lambda marker: replaced("byteorder", b"big"),
    "an empty file": lambda marker: b"",
    "text": lambda marker: b"<html>404 Not Found</html>",
    "an old file and a zip behind it": lambda marker: (
        legacy({"state": Calls(os.system, f"touch {marker}")}) + zipped({})
    ),
    "a pickle and a zip behind it": lambda marker: pickle.dumps(Calls(os.system, f"touch {marker}"), 2) + zipped({}),
    "no dictionary": lambda marker: zipped([1, 2]),
    "no state": lambda marker: saved(lambda content: content.pop("state")),
    "no weights": lambda marker: saved(lambda content: content["state"].clear()),
    "foreign weights": lambda marker: saved(lambda content: content["state"].update(trunk=torch.zeros(2))),
    "a number as a weight": lambda marker: saved(lambda content: first(content, 1.5)),
    "uint8 weights": lambda marker: saved(lambda content: first(content, torch.zeros(64, 3, 3, 3).byte())),
    "NaN weights": lambda marker: saved(lambda content: first(content, torch.full((64, 3, 3, 3), torch.nan))),
    "weights of another shape": lambda marker: saved(lambda content: first(content, torch.zeros(8, 3, 3, 3))),
    "storage shorter than its tensor": lambda marker: replaced("data/0", bytes(8)),
    "a tensor beyond its storage": lambda marker: tensor_pickle(2, (4,), (1,)),
    "a tensor before its storage": lambda marker: tensor_pickle(-1, (4,), (1,)),
    "a tensor of a terabyte by stride 0": lambda marker: tensor_pickle(0, (10**12,), (0,)),
    "a tensor of text": lambda marker: tensor_pickle("0", ("4",), (1,)),
    "no head": lambda marker: saved(lambda content: content.pop("base_clf")),
    "a head of another class": lambda marker: saved(lambda content: content.update(base_clf=nn.Linear(64, 3))),
    "a head of another width": lambda marker: saved(lambda c: c.update(base_clf=arcMax(weight=torch.zeros(3, 1600)))),
    "a head of other classes": lambda marker: saved(lambda c: c.update(base_clf=arcMax(weight=torch.zeros(4, 64)))),
}


def test_the_hostile_files_run_elsewhere(tmp_path):
    """The test below would pass on harmless files."""
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps({"state": Calls(os.system, f"touch '{marker}'")}, 2))
    assert marker.exists()


@pytest.mark.parametrize("kind", HOSTILE)
def test_of_a_hostile_file_nothing_runs_and_one_line_says_what_it_is(tmp_path, base, kind):
    path, marker = tmp_path / "published.tar", tmp_path / "marker"
    path.write_bytes(HOSTILE[kind](marker))
    outcome = importing(path, tmp_path / "ours.tar", "--base", base)
    assert outcome.status == 2, kind
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1 and len(outcome.err) < 600, outcome.err
    assert str(tmp_path) in outcome.err or "base classes" in outcome.err
    assert not marker.exists() and not (tmp_path / "ours.tar").exists()


@pytest.mark.parametrize("new_format", [False, True])
def test_what_a_file_holds_beside_weights_is_kept_inert_or_named(tmp_path, base, new_format):
    path, marker = tmp_path / "published.tar", tmp_path / "marker"
    flags = argparse.Namespace(lr=0.1, folder=Path("x"))
    for i, thing in enumerate((flags, np.float64(0.5), Calls(shutil.rmtree, str(base)), nn.Linear(2, 2))):
        path.write_bytes(saved(lambda content, thing=thing: content.update(epoch=thing), new_format))
        outcome = importing(path, tmp_path / f"ours{i}.tar", "--base", base)
        assert outcome.status == 0, outcome.err
        assert load_checkpoint(tmp_path / f"ours{i}.tar").epoch == -1
    path.write_bytes(saved(lambda content: content.update(epoch=Calls(os.system, f"touch {marker}")), new_format))
    outcome = importing(path, tmp_path / "ours.tar", "--base", base)
    assert outcome.status == 2 and f"asks for {os.name}.system;" in outcome.err and outcome.err.count("\n") == 1
    assert not marker.exists() and base.is_dir()


def test_what_is_not_a_weight_is_inert(tmp_path, base):
    path = tmp_path / "published.tar"
    path.write_bytes(saved(lambda content: content.update(epoch="three", max_acc=10**400, extra=laughs())))
    outcome = importing(path, tmp_path / "ours.tar", "--base", base)
    assert outcome.status == 0, outcome.err
    checkpoint = load_checkpoint(tmp_path / "ours.tar")
    assert checkpoint.epoch == -1 and math.isnan(checkpoint.val_accuracy)


def test_the_stand_ins_are_for_published_files_alone(tmp_path, base):
    path = tmp_path / "published.tar"
    path.write_bytes(saved())
    assert importing(path, tmp_path / "ours.tar", "--base", base).status == 0
    with pytest.raises(ValueError, match=r"asks for \w+\.\w+;|asks for numpy"):
        load_tensors(path)


def test_a_file_is_not_overwritten_and_a_missing_one_is_named(tmp_path, base):
    (tmp_path / "published.tar").write_bytes(saved())
    (tmp_path / "ours.tar").write_text("precious")
    outcome = importing(tmp_path / "published.tar", tmp_path / "ours.tar", "--base", base)
    assert outcome.status == 2 and "exists already" in outcome.err
    assert (tmp_path / "ours.tar").read_text() == "precious"
    outcome = importing(tmp_path / "absent.tar", tmp_path / "new.tar")
    assert outcome.status == 2 and "absent.tar" in outcome.err
    outcome = importing(tmp_path / "published.tar", tmp_path / "new.tar")
    assert outcome.status == 2 and "3 base classes" in outcome.err and "--base" in outcome.err
