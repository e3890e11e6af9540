"""Benchmarks as people's folders have them: splits of other names, all classes in one folder, a class in several, files
that are no images; what is no benchmark is told what it is."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from torchvision.datasets import ImageFolder

from data.benchmarks import DataOptions, list_split, load_split
from data.converters.converter import SPLIT_FILES, SPLITS, TAGS
from data.decode import open_rgb
from data.listing import image_names, list_folder, list_json
from engine.errors import UserError
from tests.helpers import encoded, images_in, write

MINI = json.loads((SPLIT_FILES / "miniImagenet.json").read_text())
# Two classes of each split, and of each the first four positions in ILSVRC.
FEW = {split: {wnid: MINI[split][wnid][:4] for wnid in sorted(MINI[split])[:2]} for split in SPLITS}
CLASSES = [(split, wnid, wanted) for split in SPLITS for wnid, wanted in FEW[split].items()]


@pytest.fixture
def split_file(tmp_path) -> Path:
    return write(tmp_path / "split.json", FEW)


def stage(root: Path, dataset: str, split: str):
    return list_split(DataOptions(root, 16, root / ".cache"), dataset, split)


# miniImagenet ---------------------------------------------------------------------------------------------------------


def ravi(wnid: str, position: int) -> str:
    return f"{wnid}{position:08d}.jpg"


PLACES = {  # where an image lies: of a split, a class and a number within the class
    "100 class folders": lambda split, wnid, i: wnid,
    "train, val, test": lambda split, wnid, i: f"{TAGS[split]}/{wnid}",
    "base, val, novel": lambda split, wnid, i: f"{split}/{wnid}",
    "classes dealt otherwise": lambda split, wnid, i: f"{TAGS[SPLITS[SPLITS.index(split) - 1]]}/{wnid}",
    "each class in two": lambda split, wnid, i: f"{'train' if i < 3 else 'val'}/{wnid}",
    "deeper": lambda split, wnid, i: f"mini/images/{wnid}/images",
}


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    return {f"{split}/{wnid}/{ravi(wnid, p)}": encoded() for split, wnid, wanted in CLASSES for p in wanted}


def lay_out(root: Path, place, contents: dict[str, bytes], name=lambda file, i: file) -> None:
    for split, wnid, wanted in CLASSES:
        for i, position in enumerate(wanted):
            file = ravi(wnid, position)
            write(root / place(split, wnid, i) / name(file, i), contents[f"{split}/{wnid}/{file}"])


@pytest.mark.parametrize("form", PLACES)
def test_every_layout_of_the_class_folders_gives_the_same_benchmark(prepare, tmp_path, split_file, contents, form):
    lay_out(tmp_path / "mini", PLACES[form], contents)
    prepare("miniImagenet", "--source", tmp_path / "mini", "--split_file", split_file)
    assert images_in(tmp_path / "out/miniImagenet") == contents


@pytest.mark.parametrize("form", sorted(set(PLACES) - {"base, val, novel"}))
def test_a_stage_deals_the_classes_of_mini_imagenet_itself(tmp_path, contents, form, capsys):
    lay_out(tmp_path / "miniImagenet", PLACES[form], contents)
    for split in SPLITS:
        names, paths, labels = stage(tmp_path, "miniImagenet", split)
        assert names == sorted(FEW[split]) and labels == [0] * 4 + [1] * 4
        found = {f"{split}/{name}": p.read_bytes() for name, p in zip(image_names((names, paths, labels)), paths)}  # noqa: B905
        assert found == {name: content for name, content in contents.items() if name.startswith(split)}
    assert "note: 2 of the 64 base classes of miniImagenet are in" in capsys.readouterr().out
    split = load_split(DataOptions(tmp_path, 84, tmp_path / ".cache"), "miniImagenet", "novel")
    assert split.class_names == sorted(FEW["novel"]) and len(split.images) == 8


def test_the_whole_of_ilsvrc_is_told_by_its_counts(prepare, tmp_path, split_file):
    """Positions are taken in it, by numbers; its val images in class folders, and annotations, are no part of it."""
    expected = {}
    for split, wnid, wanted in CLASSES:
        numbers = [3 * n + 1 for n in range(max(wanted) + 2)]
        for position, number in enumerate(numbers, 1):
            content = encoded()
            write(tmp_path / f"ILSVRC/Data/CLS-LOC/train/{wnid}/{wnid}_{number}.JPEG", content)
            if position in wanted:
                expected[f"{split}/{wnid}/{wnid}_{number}.JPEG"] = content
        write(tmp_path / f"ILSVRC/Data/CLS-LOC/val/{wnid}/ILSVRC2012_val_00000001.JPEG", encoded())
        write(tmp_path / f"ILSVRC/Annotations/CLS-LOC/train/{wnid}/{wnid}_1.xml", "<xml>")
    write(tmp_path / "ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_1.JPEG", encoded())  # a class of no split
    printed = prepare("miniImagenet", "--source", tmp_path, "--split_file", split_file)
    assert images_in(tmp_path / "out/miniImagenet") == expected
    assert "note: left out of the class folders: 6 .xml" in printed


def test_ravis_numbers_are_positions_among_more_images(prepare, tmp_path, split_file, contents):
    lay_out(tmp_path / "mini", PLACES["100 class folders"], contents)
    for _, wnid, wanted in CLASSES:
        write(tmp_path / "mini" / wnid / ravi(wnid, max(wanted) + 5), encoded())
    prepare("miniImagenet", "--source", tmp_path / "mini", "--split_file", split_file)
    assert images_in(tmp_path / "out/miniImagenet") == contents


def test_renumbered_images_of_one_name_in_two_folders_are_two(prepare, tmp_path, split_file, contents):
    lay_out(tmp_path / "mini", PLACES["each class in two"], contents, lambda file, i: f"{i % 3}.jpg")
    prepare("miniImagenet", "--source", tmp_path / "mini", "--split_file", split_file)
    assert sorted(images_in(tmp_path / "out/miniImagenet").values()) == sorted(contents.values())
    _, wnid, _ = CLASSES[0]
    write(tmp_path / "mini/train" / wnid / "9.jpg", encoded())
    line = prepare("miniImagenet", "--source", tmp_path / "mini", "--split_file", split_file, fails=True)
    assert "has 0 images, but the split takes its image" in line and "miniImagenet has 4 of the class" in line


def test_too_few_images_of_a_class_are_counted(prepare, tmp_path, split_file, contents):
    lay_out(tmp_path / "mini", PLACES["train, val, test"], contents)
    split, wnid, wanted = CLASSES[0]
    (tmp_path / "mini/train" / wnid / ravi(wnid, wanted[1])).unlink()
    line = prepare("miniImagenet", "--source", tmp_path / "mini", "--split_file", split_file, fails=True)
    assert f"base class '{wnid}' has 3 of 4 images" in line


# Splits of other names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("train", "valid", "test"), ("Train", "validation", "novel")]
)
def test_own_folders_of_other_names_are_the_splits(prepare, tmp_path, names):
    for tag, n in zip(names, (4, 2, 3), strict=True):
        for c in range(n):
            for i in range(3):
                write(tmp_path / "birds" / tag / f"{tag}_{c}" / f"{i}.jpg", encoded())
    printed = prepare("folder", "--source", tmp_path / "birds")
    assert "base 4 classes, 12 images; val 2 classes, 6 images; novel 3 classes, 9 images" in printed
    for split, tag, n in zip(SPLITS, names, (4, 2, 3), strict=True):
        class_names = [f"{tag}_{c}" for c in range(n)]
        assert sorted(path.name for path in (tmp_path / "out/birds" / split).iterdir()) == class_names
        assert stage(tmp_path, "birds", split)[0] == class_names


def test_folders_that_share_classes_are_no_splits(prepare, tmp_path):
    """As for classification: train and val hold images of the same classes."""
    for tag in ("train", "val"):
        for c in range(6):
            write(tmp_path / f"birds/{tag}/bird{c}/0.jpg", encoded())
        for c in range(2):
            write(tmp_path / f"pets/{tag}/pet{c}/0.jpg", encoded())
    printed = prepare("folder", "--source", tmp_path / "birds")
    assert "note: train and val share classes: the images of a class are joined" in printed
    assert "base 4 classes, 8 images; val 1 classes, 2 images; novel 1 classes, 2 images" in printed
    with pytest.raises(
        UserError, match=r"train and val share the class 'bird0'.*data\.prepare folder --name birds_split"
    ):
        stage(tmp_path, "birds", "base")
    with pytest.raises(UserError, match=r"2 classes are too few.*predict\.py --support .*pets/train --query FOLDER"):
        stage(tmp_path, "pets", "base")
    assert "2 classes are too few for a benchmark" in prepare("folder", "--source", tmp_path / "pets", fails=True)
    shutil.rmtree(tmp_path / "birds/val")
    write(tmp_path / "birds/test/owl/0.jpg", encoded())
    line = prepare("folder", "--source", tmp_path / "birds", "--name", "two", fails=True)
    assert "has folders train and test of classes: make the third" in line


def test_class_folders_for_a_stage_are_named_with_the_remedy(tmp_path):
    for name in ("ant", "bee"):
        write(tmp_path / "two" / name / "1.jpg", encoded())
        write(tmp_path / "three" / name / "1.jpg", encoded())
    write(tmp_path / "three/train/1.jpg", encoded())  # a class of that name, no split
    with pytest.raises(UserError, match=r"holds 2 folders \(ant, bee\).*'python predict\.py --support .*two --query"):
        stage(tmp_path, "two", "base")
    with pytest.raises(UserError, match=r"holds 3 folders .*data\.prepare folder --name three_split --source"):
        stage(tmp_path, "three", "base")


# Folders between class and image, and what is no image ----------------------------------------------------------------


def test_nested_folders_are_read_as_torchvisions_image_folder(tmp_path):
    for name in ("b/2.jpg", "b/1/3.png", "b/1/deep/2.jpg", "b/10/1.jpg", "a/x/1.jpeg", "a-1/1.jpg"):
        write(tmp_path / "base" / name, encoded("PNG" if name.endswith("png") else "JPEG"))
    write(tmp_path / "elsewhere/4.jpg", encoded())
    (tmp_path / "base/b/link").symlink_to(tmp_path / "elsewhere")
    theirs = ImageFolder(tmp_path / "base")
    names, paths, labels = list_folder(tmp_path / "base")
    assert names == theirs.classes
    assert [(str(path), label) for path, label in zip(paths, labels, strict=True)] == theirs.samples
    assert len(paths) == 7 and image_names((names, paths, labels))[0] == "a/1.jpeg"
    (tmp_path / "base/b/1/loop").symlink_to(tmp_path / "base/b")
    assert list_folder(tmp_path / "base")[1] == paths


def test_images_of_one_name_in_a_class_are_told_apart_by_their_folders(prepare, tmp_path):
    for c in range(5):
        for sub in ("left", "right"):
            write(tmp_path / f"eyes/class{c}/{sub}/0.jpg", encoded())
    assert image_names(list_folder(tmp_path / "eyes"))[:2] == ["class0/left/0.jpg", "class0/right/0.jpg"]
    prepare("folder", "--source", tmp_path / "eyes")
    found = {name.split("/", 1)[1]: content for name, content in images_in(tmp_path / "out/eyes").items()}
    assert found == {
        f"class{c}/{sub}_0.jpg": (tmp_path / f"eyes/class{c}/{sub}/0.jpg").read_bytes()
        for c in range(5)
        for sub in ("left", "right")
    }
    write(tmp_path / "toy/base/ant/1.jpg", encoded())
    (tmp_path / "toy/novel").symlink_to(tmp_path / "eyes")
    (tmp_path / "toy/val").mkdir()
    split = load_split(DataOptions(tmp_path, 16, tmp_path / ".cache"), "toy", "novel")
    assert split.image_names[0] == "class0/left/0.jpg"


def test_what_is_left_out_is_said_with_number_and_kind(prepare, tmp_path, capsys):
    for c in range(4):
        write(tmp_path / f"photos/class{c}/0.jfif", encoded())
        write(tmp_path / f"photos/class{c}/1.heic", b"ftypheic")
    write(tmp_path / "photos/class0/notes.txt", "")
    write(tmp_path / "photos/README", "")
    write(tmp_path / "photos/.hidden", "")
    printed = prepare("folder", "--source", tmp_path / "photos")
    heic = "4 .heic (convert them: magick mogrify -format jpg FILES"
    assert f"note: left out of photos: {heic}" in printed and "1 without suffix, 1 .txt" in printed
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/novel").symlink_to(tmp_path / "photos")
    assert len(load_split(DataOptions(tmp_path, 16, tmp_path / ".cache"), "toy", "novel").labels) == 4
    assert f"note: left out of novel: {heic}" in capsys.readouterr().out
    (tmp_path / "photos/class0/0.jfif").unlink()
    with pytest.raises(UserError, match=r"class0 holds no images .* but 1 \.heic \(convert them.*, 1 \.txt: remove it"):
        list_folder(tmp_path / "photos")


@pytest.mark.skipif("avif" not in features.get_supported(), reason="this Pillow reads no AVIF")
def test_avif_and_jfif_are_read(prepare, tmp_path):
    plain = np.full((24, 24, 3), (200, 40, 90), np.uint8)
    for c in range(4):
        (tmp_path / f"photos/class{c}").mkdir(parents=True)
        Image.fromarray(plain).save(tmp_path / f"photos/class{c}/0.avif")
        Image.fromarray(plain).save(tmp_path / f"photos/class{c}/1.jfif", "JPEG")
    prepare("folder", "--source", tmp_path / "photos")
    images = sorted((tmp_path / "out/photos").glob("*/*/*.*"))
    assert len(images) == 8
    for path in images:
        assert np.abs(np.asarray(open_rgb(path), int) - plain).max() < 6


# json lists -----------------------------------------------------------------------------------------------------------


def authors_list(file: Path, names: list[str], labels: list[int]) -> Path:
    record = {
        "label_names": ["n1", "n2"],
        "image_names": [f"/home/arman/mini/{n}" for n in names],
        "image_labels": labels,
    }
    return write(file, record)


def test_images_of_an_authors_list_lie_anywhere_below_image_root(tmp_path):
    names = ["images/n1/a.jpg", "images/n1/b.jpg", "images/n2/c.jpg"]
    places = ["x/part1/a.jpg", "x/b.jpg", "x/y/z/c.jpg"]
    paths = [write(tmp_path / place, encoded()) for place in places]
    file = authors_list(tmp_path / "base.json", names, [0, 0, 1])
    assert list_json(file, tmp_path / "x") == (["n1", "n2"], paths, [0, 0, 1])
    again = write(tmp_path / "x/other/b.jpg", encoded())
    with pytest.raises(UserError, match=r"'.*/n1/b\.jpg', and below .*x is 2 of this name \(.*x/b\.jpg, .*r/b\.jpg"):
        list_json(file, tmp_path / "x")
    again.rename(write(tmp_path / "x/n1/b.jpg", ""))  # in the class folder that the list names
    paths[1] = tmp_path / "x/n1/b.jpg"
    assert list_json(file, tmp_path / "x")[1] == paths
    paths[2].unlink()
    with pytest.raises(UserError, match=r"lists '.*/c\.jpg', and below --image_root .*x is none of this name"):
        list_json(file, tmp_path / "x")


# What is no miniImagenet ----------------------------------------------------------------------------------------------


def make_pickles(root: Path, n_classes: tuple[int, int, int], side: int, names: list[str] | None = None) -> Path:
    first = 0
    for tag, n in zip(("train", "val", "test"), n_classes, strict=True):
        content = {"data": np.zeros((2 * n, side, side, 3), np.uint8), "labels": [c for c in range(n) for _ in (0, 1)]}
        if names:
            content["catname2label"] = {name: c for c, name in enumerate(names[first : first + n])}
        first += n
        write(root / f"some_{tag}.pickle", pickle.dumps(content, 2))
    return root


@pytest.mark.parametrize("n_classes, name", [((64, 16, 20), "CIFAR-FS"), ((60, 20, 20), "FC100")])
def test_pickles_of_32_pixels_are_told_what_they_are(prepare, tmp_path, n_classes, name):
    source = make_pickles(tmp_path / "pickles", n_classes, 32)
    line = prepare("miniImagenet", "--source", source, "--allow_incomplete", fails=True)
    assert f"classes of 32x32 pixels: these are {name}, not miniImagenet" in line
    assert not (tmp_path / "out").exists()


def test_foreign_class_names_are_no_mini_imagenet(prepare, tmp_path):
    names = json.loads((SPLIT_FILES / "CIFAR-FS.json").read_text())
    fine = [name for split in SPLITS for name in names[split]]
    source = make_pickles(tmp_path / "pickles", (64, 16, 20), 84, fine)
    line = prepare("miniImagenet", "--source", source, "--allow_incomplete", fails=True)
    assert f"has the class '{fine[0]}', none of miniImagenet's 100" in line and "these are classes of CIFAR-FS" in line
    for name in fine:
        write(tmp_path / "cifar100/data" / name / "0.png", encoded("PNG"))
    line = prepare("miniImagenet", "--source", tmp_path / "cifar100", "--allow_incomplete", fails=True)
    assert "holds 1 folders (data), none of the forms" in line and "these are classes of CIFAR-FS" in line
    assert not list((tmp_path / "out").rglob("*.png"))


def test_nothing_empty_is_written(prepare, tmp_path):
    for split in SPLITS:
        (tmp_path / "mini" / sorted(MINI[split])[0]).mkdir(parents=True)
    line = prepare("miniImagenet", "--source", tmp_path / "mini", "--allow_incomplete", fails=True)
    assert "the source holds no image of miniImagenet" in line and "nothing is written" in line
    assert not (tmp_path / "out/miniImagenet").exists()
