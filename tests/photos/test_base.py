"""Any folder as a base set, and what it shares with a user's own images."""

import shutil

import pytest
import torch

from data.benchmarks import DataOptions
from engine.errors import UserError
from photos.base import load_base, shared_classes, without_classes
from tests.helpers import make_benchmark, make_split


@pytest.fixture
def root(tmp_path):
    return make_benchmark(tmp_path / "tiny", n_class=(4, 2, 2)).parent


def options(root):
    return DataOptions(root, 16, root / "cache")


def test_a_benchmark_gives_its_base_split_and_class_folders_are_one(root):
    base, paths = load_base(root / "tiny", options(root))
    folder, same_paths = load_base(root / "tiny" / "base", options(root))
    assert base.class_names == folder.class_names and torch.equal(base.images, folder.images)
    assert paths == same_paths and (base.benchmark, folder.benchmark) == ("tiny", "base")


@pytest.mark.parametrize("what", ["absent", "tiny/base/class00", "file"])
def test_what_is_neither_is_one_line(root, what):
    (root / "file").write_text("x")
    with pytest.raises(UserError, match="neither a benchmark .* nor a folder of classes") as error:
        load_base(root / what, options(root))
    assert "\n" not in str(error.value)


def test_classes_of_the_same_name_or_with_the_same_image_are_found(root):
    base, paths = load_base(root / "tiny", options(root))
    shutil.copy(paths[-1], root / "mine.png")
    mine = [root / "mine.png", root / "tiny" / "novel" / "class06" / "000.png"]
    assert shared_classes(base, paths, ["zebra"], mine[1:]) == {}
    found = shared_classes(base, paths, ["zebra", "Class01"], mine)
    assert found == {1: "is a class of the support", 3: "holds 1 of the support and query images"}


def test_images_of_classes_that_are_left_out_do_not_count():
    split = without_classes(make_split((2, 3, 1)), [1])
    assert split.class_names == ["class0", "class2"] and split.labels.tolist() == [0, 0, 2, 2, 2, 1]
    assert [m.tolist() for m in split.members] == [[0, 1], [5]]
