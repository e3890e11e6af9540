"""Benchmarks as image folders and as published json lists, and every way in which they can be wrong."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.benchmarks import DataOptions, load_split
from data.listing import list_folder, list_json
from engine.errors import UserError
from tests.helpers import make_benchmark, make_split


def load(root: Path, split="base", dataset="toy", crop_scale=(0.08, 1.0)):
    return load_split(DataOptions(root, 16, root / ".cache", crop_scale=crop_scale), dataset, split)


def touch(*paths: Path):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def write_json(file: Path, label_names, image_names, image_labels) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"label_names": label_names, "image_names": list(map(str, image_names)), "image_labels": image_labels}
    file.write_text(json.dumps(record))
    return file


@pytest.fixture
def images(tmp_path):
    """Twelve images images/<class>/<i>.png of the classes ant, bee and cat."""
    for number, name in enumerate(("ant", "bee", "cat")):
        for i in range(4):
            path = tmp_path / "images" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (60 * number, 10 * i, 200)).save(path)
    return tmp_path / "images"


def listed(images, *names):
    """Paths and labels of these classes."""
    paths = [path for name in names for path in sorted((images / name).iterdir())]
    return paths, [names.index(path.parent.name) for path in paths]


# Image folders.


def test_folders_become_three_splits(tmp_path):
    make_benchmark(tmp_path / "toy", n_class=(3, 2, 2), n_images=4, side=20)
    base, val, novel = (load(tmp_path, split) for split in ("base", "val", "novel"))
    assert base.class_names == ["class00", "class01", "class02"] and novel.class_names == ["class05", "class06"]
    assert base.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and base.labels.dtype == torch.long
    assert base.image_names[4:6] == ["class01/000.png", "class01/001.png"]
    assert base.images.shape == (12, 3, 16, 16) and base.train_images.shape == (12, 3, 20, 20)
    assert val.train_images is None and len(val.images) == 8
    assert load(tmp_path, crop_scale=None).train_images is None
    assert base.train_sizes.tolist() == [[20, 20]] * 12
    assert len({base.fingerprint, val.fingerprint, novel.fingerprint}) == 3
    first = np.array(Image.open(tmp_path / "toy" / "base" / "class01" / "000.png"))
    assert torch.equal(base.train_images[4].permute(1, 2, 0), torch.from_numpy(first))


def test_hidden_files_and_what_is_no_image_are_left_out(tmp_path):
    root = tmp_path / "base"
    touch(root / "b" / "2.JPG", root / "b" / "1.png", root / "a" / "1.webp", root / "a" / "sub.tiff")
    touch(root / "a" / ".2.png", root / "a" / "._1.png", root / "a" / "Thumbs.db", root / "a" / "notes.txt")
    touch(root / ".DS_Store", root / "README.md", root / ".ipynb_checkpoints" / "1.png")
    names, paths, labels = list_folder(root)
    assert names == ["a", "b"]
    assert [path.name for path in paths] == ["1.webp", "sub.tiff", "1.png", "2.JPG"] and labels == [0, 0, 1, 1]


def test_a_split_without_class_folders_says_what_is_expected(tmp_path):
    touch(tmp_path / "toy" / "base" / "1.png")
    with pytest.raises(UserError, match=r"base holds no class folders, .*base/<class>/<image>"):
        load(tmp_path)


@pytest.mark.parametrize("dataset", ["miniImagenet", "mine"])
def test_a_missing_benchmark_names_folder_layout_preparation_and_the_built_in_one(tmp_path, dataset):
    with pytest.raises(UserError) as error:
        load(tmp_path, dataset=dataset)
    message = str(error.value)
    for part in (
        str(tmp_path / dataset),
        f"{tmp_path / dataset / 'base'}/<class>/<image>",
        "base.json",
        "python -m data.prepare",
        "--dataset glyphs",
    ):
        assert part in message, part
    assert "\n" not in message


def test_a_missing_split_is_named(tmp_path):
    make_benchmark(tmp_path / "toy", n_class=(1, 1, 1), n_images=1)
    (tmp_path / "toy" / "val").rename(tmp_path / "toy" / "other")
    with pytest.raises(UserError, match=r"no val split of 'toy' in .*, which holds 3 folders \(base, novel, other\)"):
        load(tmp_path, "val")


def test_the_built_in_benchmark_is_rendered_when_it_is_missing_and_only_then(tmp_path, monkeypatch):
    monkeypatch.setattr("data.glyphs.render_glyphs", lambda root, seed, quiet: make_benchmark(root, (2, 1, 1), 2))
    assert len(load(tmp_path, dataset="glyphs").class_names) == 2
    assert len(load(tmp_path, "novel", dataset="glyphs").class_names) == 1
    with pytest.raises(UserError, match="no base split"):
        load(tmp_path, dataset="toy")


def test_the_members_of_a_split_are_the_indices_of_each_class():
    split = make_split(counts=(3, 1, 2), side=1)
    assert [members.tolist() for members in split.members] == [[0, 1, 2], [3], [4, 5]]
    mixed = dataclasses.replace(split, labels=torch.tensor([2, 0, 2, 0, 0, 2]))
    assert [members.tolist() for members in mixed.members] == [[1, 3, 4], [], [0, 2, 5]]
    assert split.summary == "toy: 3 novel classes of 6 images"


# Published json lists.


def test_a_json_of_relative_names_gives_the_same_split_as_the_folders(tmp_path, images):
    paths, labels = listed(images, "ant", "bee", "cat")
    relative = [Path("..") / path.relative_to(tmp_path) for path in paths]
    write_json(tmp_path / "listed" / "base.json", ["ant", "bee", "cat"], relative, labels)
    (tmp_path / "folders").mkdir()
    (tmp_path / "folders" / "base").symlink_to(images)
    a, b = load(tmp_path, dataset="listed"), load(tmp_path, dataset="folders")
    assert a.class_names == b.class_names and a.image_names == b.image_names and a.fingerprint == b.fingerprint
    assert torch.equal(a.labels, b.labels) and torch.equal(a.images, b.images)


def test_folders_win_over_a_json(tmp_path):
    make_benchmark(tmp_path / "toy", n_class=(2, 1, 1), n_images=2)
    (tmp_path / "toy" / "base.json").write_text("not read")
    assert len(load(tmp_path).class_names) == 2


def test_labels_may_index_the_names_of_all_splits(tmp_path, images):
    paths, labels = listed(images, "ant", "cat")
    file = write_json(tmp_path / "val.json", ["x", "ant", "y", "cat"], paths, [1 + 2 * label for label in labels])
    names, found, ranks = list_json(file, None)
    assert names == ["ant", "cat"] and found == paths and ranks == labels


def test_labels_may_be_numbered_over_all_splits_beside_the_names_of_one(tmp_path, images):
    paths, labels = listed(images, "bee", "cat")
    file = write_json(tmp_path / "novel.json", ["bee", "cat"], paths, [80 + label for label in labels])
    names, _, ranks = list_json(file, None)
    assert names == ["bee", "cat"] and ranks == labels


def test_the_longest_tail_below_image_root_is_taken(tmp_path, images):
    """An image of the same file name, straight in image_root, is another one."""
    paths, labels = listed(images, "ant")
    shutil.copy(images / "bee" / "0.png", images / "0.png")
    file = write_json(tmp_path / "base.json", ["ant"], [f"/far/ant/{path.name}" for path in paths], labels)
    assert list_json(file, images)[1] == paths


def test_image_root_is_used_even_where_the_absolute_names_exist(tmp_path, images):
    paths, labels = listed(images, "ant")
    copies = tmp_path / "copies"
    copies.mkdir()
    (copies / "ant").symlink_to(images / "ant")
    file = write_json(tmp_path / "base.json", ["ant"], paths, labels)
    assert list_json(file, copies)[1] == [copies / "ant" / path.name for path in paths]


def test_an_image_root_that_holds_none_of_the_images_is_named(tmp_path, images):
    paths, labels = listed(images, "ant")
    file = write_json(tmp_path / "base.json", ["ant"], [f"/far/away/{path.name}" for path in paths], labels)
    with pytest.raises(UserError, match=r"lists '/far/away/0\.png', and below --image_root .* is none of this name"):
        list_json(file, tmp_path / "elsewhere")


def test_missing_images_are_counted_and_the_remedy_given(tmp_path, images):
    paths, labels = listed(images, "ant")
    file = write_json(tmp_path / "base.json", ["ant"], [*paths[:2], "/far/2.png", "/far/3.png"], labels)
    with pytest.raises(UserError, match=r"2 images that are missing, such as /far/2\.png.*--image_root"):
        list_json(file, None)


def test_a_class_name_given_twice_is_named(tmp_path, images):
    paths, labels = listed(images, "ant", "bee")
    file = write_json(tmp_path / "base.json", ["ant", "ant"], paths, labels)
    with pytest.raises(UserError, match="names class 'ant' twice"):
        list_json(file, None)


def test_an_image_given_twice_is_named_as_it_could_be_support_and_query(tmp_path, images):
    paths, labels = listed(images, "ant")
    write_json(tmp_path / "toy" / "base.json", ["ant"], [*paths, paths[1]], [*labels, 0])
    with pytest.raises(UserError, match=r"base\.json lists image 'ant/1\.png' twice"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", "is no json object"),
        ("[1, 2]", "is no json object"),
        ('{"label_names": ["a"], "image_names": ["1.png"]}', "'image_labels'"),
        ('{"label_names": ["a"], "image_names": [], "image_labels": []}', "0 image_names, 0 image_labels"),
        ('{"label_names": ["a"], "image_names": ["1.png"], "image_labels": [0, 0]}', "1 image_names, 2"),
        ('{"label_names": ["a"], "image_names": ["1.png", "2.png"], "image_labels": [0, 5]}', "image_labels up to 5"),
        ('{"label_names": ["a"], "image_names": ["1.png"], "image_labels": [-1]}', "not whole numbers from 0"),
        ('{"label_names": ["a"], "image_names": ["1.png"], "image_labels": ["a"]}', "not whole numbers from 0"),
        ('{"label_names": ["a"], "image_names": ["1.png"], "image_labels": [0.0]}', "not whole numbers from 0"),
    ],
)
def test_a_malformed_json_is_one_clear_line(tmp_path, content, expected):
    file = tmp_path / "toy" / "base.json"
    touch(file)
    file.write_text(content)
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert str(file) in str(error.value) and expected in str(error.value)
    assert "\n" not in str(error.value)
