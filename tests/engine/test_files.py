"""Files are written whole or not at all, and read without running anything of them."""

import pickle

import pytest
import torch
from torch import nn

from engine.errors import UserError
from engine.files import atomic_file, load_tensors, save_atomically, weights_digest


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "models" / "model.tar"
    with pytest.raises(UserError, match="cannot be written.*another folder") as error:
        save_atomically(path, torch.zeros(3))
    assert str(path) in str(error.value)


def test_what_is_saved_comes_back_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "new" / "state.tar"
    for content in ({"weight": torch.zeros(2)}, {"weight": torch.arange(3.0), "epoch": 4, "best": [0.5, None]}):
        save_atomically(path, content)
        found = load_tensors(path, "cpu")
        assert found.keys() == content.keys() and torch.equal(found.pop("weight"), content.pop("weight"))
        assert found == content
    assert [file.name for file in path.parent.iterdir()] == ["state.tar"]


def test_an_error_inside_leaves_the_file_that_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    for error, raised in ((ZeroDivisionError(), ZeroDivisionError), (OSError("disk is\nfull"), UserError)):
        with pytest.raises(raised), atomic_file(path) as temporary:
            temporary.write_text("half")
            raise error
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"weight": 1})])
def test_what_is_no_file_of_ours_is_not_unpickled(tmp_path, content):
    (tmp_path / "state.tar").write_bytes(content)
    with pytest.raises(ValueError, match="no file of torch.save"):
        load_tensors(tmp_path / "state.tar", "cpu")


def test_a_digest_follows_from_names_weights_statistics_and_facts():
    def digest(change=lambda layer: None, *facts, name="norm"):
        layer = nn.BatchNorm1d(3)
        change(layer)
        return weights_digest(nn.ModuleDict({name: layer}), *facts)

    def another_weight(layer):
        layer.weight.data[1] += 1e-6

    def another_statistic(layer):
        layer.running_mean[2] = 1.0

    same = digest()
    assert digest() == same and len(same) == 16
    others = [
        digest(another_weight),
        digest(another_statistic),
        digest(name="other"),
        digest(lambda layer: None, "map"),
    ]
    assert len({same, *others}) == 5
