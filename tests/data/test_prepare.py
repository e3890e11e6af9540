"""Each converter, on a small source in the exact format that people have, and the ways a source can be wrong."""

import csv
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.converters import CONVERTERS
from data.converters.converter import SPLIT_FILES, SPLITS, TAGS, Conversion, Converter, ImageItem
from data.converters.safe_pickle import load_pickle
from engine.errors import UserError
from tests.helpers import encoded, images_in, write

RANDOM = np.random.default_rng(0)


# The sources ----------------------------------------------------------------------------------------------------------


def pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def add_to_tar(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2's cPickle did at protocol 2: str as byte strings, and numpy 1's module names."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_byte_string(self, text):
        data = text.encode("latin1") if isinstance(text, str) else text
        short = len(data) < 256
        self.write(b"U" + bytes([len(data)]) if short else b"T" + struct.pack("<i", len(data)))
        self.write(data)
        self.memoize(text)

    dispatch |= {str: save_byte_string, bytes: save_byte_string}


def python2_pickle(content: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


def mini_split() -> dict[str, dict[str, list[int]]]:
    """A small split in the form of the real one: two base classes, one val, one novel."""
    return {
        "base": {"n01532829": [2, 3, 5], "n01558993": [1, 4, 6]},
        "val": {"n01855672": [1, 2, 3]},
        "novel": {"n01930112": [4, 5, 6]},
    }


def wnids(split: dict[str, dict[str, list[int]]]) -> list[str]:
    return [wnid for classes in split.values() for wnid in classes]


def make_ilsvrc(root: Path) -> dict[str, bytes]:
    """Class folders n01532829/n01532829_<number>.JPEG, whose numbers sort otherwise than their names do."""
    files = {f"{wnid}/{wnid}_{n}.JPEG": encoded() for wnid in wnids(mini_split()) for n in (2, 10, 33, 100, 222, 1000)}
    for name, content in files.items():
        write(root / name, content)
    return files


def make_ilsvrc_tar(path: Path, files: dict[str, bytes]) -> Path:
    """ILSVRC2012_img_train.tar: one tar a class."""
    with tarfile.open(path, "w") as outer:
        for wnid in wnids(mini_split()):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for name in sorted(files):
                    if name.startswith(wnid):
                        add_to_tar(inner, Path(name).name, files[name])
            add_to_tar(outer, f"{wnid}.tar", content.getvalue())
    return path


def make_csv(root: Path) -> dict[str, bytes]:
    """Ravi & Larochelle's csv files beside images/, {split/class/file: content}."""
    files = {}
    for split, tag in TAGS.items():
        rows = [
            (f"{wnid}{i:08d}.jpg", wnid)
            for wnid, wanted in mini_split()[split].items()
            for i in range(1, len(wanted) + 1)
        ]
        with write(root / f"{tag}.csv", b"").open("w", newline="") as file:
            csv.writer(file).writerows([("filename", "label"), *rows])
        for name, wnid in rows:
            files[f"{split}/{wnid}/{name}"] = encoded()
            write(root / "images" / name, files[f"{split}/{wnid}/{name}"])
    return files


def make_mini_cache(root: Path) -> dict[str, np.ndarray]:
    """mini-imagenet-cache-{train,val,test}.pkl of Python 2: image_data and class_dict."""
    arrays = {}
    for split, tag in TAGS.items():
        classes = list(mini_split()[split])
        arrays[split] = pixels(3 * len(classes), 84, 84, 3)
        rows = {wnid: list(range(3 * i, 3 * i + 3)) for i, wnid in enumerate(classes)}
        content = {"image_data": arrays[split], "class_dict": rows}
        write(root / f"mini-imagenet-cache-{tag}.pkl", python2_pickle(content))
    return arrays


def make_mini_category_split(root: Path, named: bool = True) -> dict[str, np.ndarray]:
    """miniImageNet_category_split_*.pickle: data, labels, catname2label; two more hold other base images."""
    arrays = {}
    tags = ("train_phase_train", "val", "test")
    for split, tag in zip(SPLITS, tags, strict=True):
        classes = list(mini_split()[split])
        arrays[split] = pixels(3 * len(classes), 84, 84, 3)
        labels = [label for label in range(len(classes)) for _ in range(3)]
        content: dict[str, object] = {"data": arrays[split], "labels": labels}
        if named:
            content["catname2label"] = {wnid: label for label, wnid in enumerate(classes)}
        write(root / f"miniImageNet_category_split_{tag}.pickle", pickle.dumps(content, 4))
    for tag in ("train_phase_val", "train_phase_test"):
        write(root / f"miniImageNet_category_split_{tag}.pickle", pickle.dumps({"data": pixels(1, 84, 84, 3)}))
    return arrays


def make_tiered(root: Path, as_npz: bool) -> dict[str, np.ndarray]:
    """{train,val,test}_images_png.pkl or _images.npz, with {..}_labels.pkl; RGB arrays by split."""
    arrays = {}
    for tag in TAGS.values():
        arrays[tag] = pixels(6, 84, 84, 3)
        labels = {
            "label_specific": np.array([0, 0, 1, 1, 2, 2]),
            "label_general": np.array([0, 0, 0, 0, 1, 1]),
            "label_specific_str": ["Yorkshire terrier", "tabby, tabby cat", "abacus"],
            "label_general_str": ["animal", "thing"],
        }
        write(root / f"{tag}_labels.pkl", python2_pickle(labels))
        if as_npz:
            np.savez(root / f"{tag}_images.npz", images=arrays[tag][..., ::-1])
        else:
            pngs = []
            for array in arrays[tag]:
                content = io.BytesIO()
                Image.fromarray(array).save(content, "PNG")
                pngs.append(np.frombuffer(content.getvalue(), np.uint8)[:, None])  # as OpenCV's imencode returns it
            write(root / f"{tag}_images_png.pkl", python2_pickle(pngs))
    return arrays


def make_cub(root: Path) -> dict[str, bytes]:
    """CUB_200_2011 with its text files; 8 classes of two images, {class/file: content}."""
    birds = ["Black_footed_Albatross", "Laysan_Albatross", "Sooty_Albatross", "Groove_billed_Ani", "Crested_Auklet"]
    birds += ["Least_Auklet", "Parakeet_Auklet", "Rhinoceros_Auklet"]
    classes = [f"{i:03d}.{bird}" for i, bird in enumerate(birds, 1)]
    names = [f"{name}/{name[4:]}_{i:04d}_{i + 795000}.jpg" for name in classes for i in (1, 2)]
    files = {name: encoded(size=(20, 16)) for name in names}
    for name, content in files.items():
        write(root / "images" / name, content)
    write(root / "classes.txt", "".join(f"{i} {name}\n" for i, name in enumerate(classes, 1)))
    write(root / "images.txt", "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    labels = "".join(f"{i} {(i + 1) // 2}\n" for i in range(1, len(names) + 1))
    write(root / "image_class_labels.txt", labels)
    write(root / "train_test_split.txt", "".join(f"{i} {i % 2}\n" for i in range(1, len(names) + 1)))
    write(root / "bounding_boxes.txt", "".join(f"{i} 4.0 2.0 10.0 8.0\n" for i in range(1, len(names) + 1)))
    return files


def make_tgz(path: Path, folder: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    return path


SUPERCLASSES = json.loads((SPLIT_FILES / "CIFAR-100.json").read_text())
FINE = sorted(name for names in SUPERCLASSES.values() for name in names)
COARSE = {name: coarse for coarse, names in SUPERCLASSES.items() for name in names}


def make_cifar(folder: Path) -> dict[str, np.ndarray]:
    """cifar-100-python: train, test and meta, pickled by Python 2; 4 and 2 images of each of the 100 classes."""
    coarse_names = sorted(SUPERCLASSES)
    arrays = {}
    for part, n in (("train", 4), ("test", 2)):
        fine = RANDOM.permutation(np.arange(100).repeat(n)).tolist()
        arrays[part] = pixels(100 * n, 3072)
        content = {
            "filenames": [f"{FINE[label]}_s_{i:06d}.png" for i, label in enumerate(fine)],
            "batch_label": f"{part}ing batch 1 of 1",
            "fine_labels": fine,
            "coarse_labels": [coarse_names.index(COARSE[FINE[label]]) for label in fine],
            "data": arrays[part],
        }
        write(folder / part, python2_pickle(content))
    write(folder / "meta", python2_pickle({"fine_label_names": FINE, "coarse_label_names": coarse_names}))
    return arrays


def make_folder(root: Path) -> Path:
    """Ten classes of two images, with files that are not images beside them."""
    for i in range(10):
        for j in range(2):
            write(root / f"class{i}" / f"{j}.jpg", encoded())
    write(root / "class0" / "notes.txt", "not an image")
    write(root / "class0" / ".DS_Store", b"\0")
    return root


# Helpers --------------------------------------------------------------------------------------------------------------


def read_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def split_file(tmp_path) -> Path:
    return write(tmp_path / "split.json", mini_split())


# Pickles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5, "Python 2"])
def test_pickled_arrays_and_containers_of_every_protocol(protocol):
    content = {
        "large": pixels(50, 8, 8, 3),
        "small": np.arange(5, dtype=">i4"),
        "columns": np.asfortranarray(pixels(40, 30)),
        "scalar": np.float32(2.5),
        "nested": [("a", 1), {"b": None}, 2.0, True],
        "pngs": [pixels(2000, 1) for _ in range(3)],
    }
    data = python2_pickle(content) if protocol == "Python 2" else pickle.dumps(content, protocol)
    read = load_pickle(io.BytesIO(data), "test")
    assert np.array_equal(read["large"], content["large"]) and np.array_equal(read["columns"], content["columns"])
    assert read["small"].tolist() == [0, 1, 2, 3, 4]
    assert read["scalar"] == 2.5 and read["nested"] == content["nested"]
    assert all(np.array_equal(a, b) for a, b in zip(read["pngs"], content["pngs"], strict=True))


REFUSED = ["os\ngetcwd", "builtins\ngetattr", "numpy\nload", "numpy.core.multiarray\nfromstring", "made.up\nfunction"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_pickle_that_names_anything_else_is_refused(name):
    with pytest.raises(UserError, match=f"asks for {name.replace(chr(10), '.')}; only numpy arrays and containers"):
        load_pickle(io.BytesIO(b"c" + name.encode() + b"\n."), "test")


def test_arrays_of_objects_are_refused():
    with pytest.raises(UserError, match="only numbers are read"):
        load_pickle(io.BytesIO(pickle.dumps(np.array([{}, None]))), "test")


# miniImagenet ---------------------------------------------------------------------------------------------------------


def expected_of_ilsvrc(files: dict[str, bytes]) -> dict[str, bytes]:
    expected = {}
    for split, classes in mini_split().items():
        for wnid, positions in classes.items():
            for position in positions:
                name = f"{wnid}_{[2, 10, 33, 100, 222, 1000][position - 1]}.JPEG"
                expected[f"{split}/{wnid}/{name}"] = files[f"{wnid}/{name}"]
    return expected


def test_mini_from_ilsvrc_folder_tar_and_class_tars(prepare, tmp_path, split_file):
    files = make_ilsvrc(tmp_path / "ILSVRC/Data/CLS-LOC/train")
    tar = make_ilsvrc_tar(tmp_path / "ILSVRC2012_img_train.tar", files)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tar) as outer:
        outer.extractall(tmp_path / "tars", filter="data")
    for i, source in enumerate((tmp_path, tar, tmp_path / "tars")):
        out = tmp_path / str(i)
        printed = prepare("miniImagenet", "--source", source, "--split_file", split_file, "--out", out)
        assert images_in(out / "miniImagenet") == expected_of_ilsvrc(files)
        assert "base 2 classes, 6 images; val 1 classes, 3 images; novel 1 classes, 3 images" in printed


def test_mini_from_ilsvrc_names_what_is_missing(prepare, tmp_path, split_file):
    make_ilsvrc(tmp_path / "train")
    (tmp_path / "train/n01532829/n01532829_1000.JPEG").unlink()
    prepare("miniImagenet", "--source", tmp_path / "train", "--split_file", split_file)  # position 6 is not asked for
    (tmp_path / "train/n01930112/n01930112_1000.JPEG").unlink()
    options = ("--source", tmp_path / "train", "--split_file", split_file, "--out", tmp_path / "again")
    line = prepare("miniImagenet", *options, fails=True)
    assert "train/n01930112' has 5 images, but the split takes its image 6" in line
    for file in (tmp_path / "train/n01930112").iterdir():
        file.unlink()
    line = prepare("miniImagenet", *options, fails=True)
    assert "miniImagenet is not complete: novel has 0 of 1 classes (missing n01930112)" in line
    assert not (tmp_path / "again/miniImagenet").exists()  # nobody trains on an unfinished benchmark
    prepare("miniImagenet", *options, "--allow_incomplete")
    assert len(images_in(tmp_path / "again/miniImagenet")) == 9


def test_mini_refuses_what_it_does_not_know(prepare, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "none of the forms of miniImagenet" in prepare("miniImagenet", "--source", tmp_path / "empty", fails=True)
    assert "does not exist" in prepare("miniImagenet", "--source", tmp_path / "nowhere", fails=True)
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        add_to_tar(tar, "a.txt", b"a")
    assert "not ILSVRC's train tar" in prepare("miniImagenet", "--source", tmp_path / "other.tar", fails=True)
    write(tmp_path / "noise.tar", pixels(3000).tobytes())
    assert "no tar or zip archive" in prepare("miniImagenet", "--source", tmp_path / "noise.tar", fails=True)


def test_mini_from_csv_with_a_class_short_of_images(prepare, tmp_path, split_file):
    make_csv(tmp_path / "mini")
    (tmp_path / "mini/images/n0185567200000002.jpg").unlink()
    options = ("--source", tmp_path / "mini", "--split_file", split_file)
    line = prepare("miniImagenet", *options, fails=True)
    assert "val class 'n01855672' has 2 of 3 images" in line
    assert "not in the source: val/n01855672/n0185567200000002.jpg" in line
    write(tmp_path / "mini/val.csv", "name,class\n")
    assert "val.csv' is no csv file with columns as filename and label" in prepare("miniImagenet", *options, fails=True)


@pytest.mark.parametrize("make", [make_mini_cache, make_mini_category_split])
def test_mini_from_pickles(prepare, tmp_path, split_file, make):
    arrays = make(tmp_path / "mini")
    prepare("miniImagenet", "--source", tmp_path / "mini", "--split_file", split_file)
    assert len(images_in(tmp_path / "out/miniImagenet")) == 12
    for split in SPLITS:
        for i, wnid in enumerate(mini_split()[split]):
            for row in range(3 * i, 3 * i + 3):
                written = read_pixels(tmp_path / f"out/miniImagenet/{split}/{wnid}/{row:05d}.png")
                assert np.array_equal(written, arrays[split][row])


def test_mini_from_pickles_without_names(prepare, tmp_path, split_file):
    make_mini_category_split(tmp_path / "mini", named=False)
    options = ("--source", tmp_path / "mini", "--split_file", split_file)
    assert "base class 'base_000' has 3 of 600 images" in prepare("miniImagenet", *options, fails=True)
    prepare("miniImagenet", *options, "--allow_incomplete")
    assert sorted(path.name for path in (tmp_path / "out/miniImagenet/base").iterdir()) == ["base_000", "base_001"]


def test_mini_from_wrong_pickles(prepare, tmp_path):
    make_mini_cache(tmp_path / "mini")
    options = ("--source", tmp_path / "mini")
    broken = tmp_path / "mini/mini-imagenet-cache-val.pkl"
    write(broken, pickle.dumps({"images": pixels(3, 84, 84, 3), "class_dict": {}}))
    line = prepare("miniImagenet", *options, fails=True)
    assert "cache-val.pkl' has the keys class_dict, images: expected image_data and class_dict" in line
    write(broken, pickle.dumps({"image_data": pixels(3, 84, 84), "class_dict": {}}))
    assert "not an array (n, height, width, 3)" in prepare("miniImagenet", *options, fails=True)
    write(broken, pickle.dumps({"image_data": pixels(3, 84, 84, 3), "class_dict": {"n01855672": [0, 3]}}))
    assert "the rows of a class are not whole numbers from 0 (the largest is 3, of 3)" in prepare(
        "miniImagenet", *options, fails=True
    )
    write(broken, b"cos\ngetcwd\n.")
    assert "only numpy arrays and containers" in prepare("miniImagenet", *options, fails=True)
    broken.unlink()
    assert "for val none" in prepare("miniImagenet", *options, fails=True)


def test_mini_from_published_json(prepare, tmp_path, split_file):
    files = make_csv(tmp_path / "mini")
    for split in SPLITS:
        names = [name for name in files if name.startswith(split)]
        classes = list(mini_split()[split])
        content = {
            "label_names": classes,
            "image_names": [f"/home/someone/images/{Path(name).name}" for name in names],
            "image_labels": [classes.index(name.split("/")[1]) for name in names],
        }
        write(tmp_path / f"lists/{split}.json", content)
    options = ("--source", tmp_path / "lists", "--split_file", split_file)
    assert "--image_root" in prepare("miniImagenet", *options, fails=True)
    prepare("miniImagenet", *options, "--image_root", tmp_path / "mini/images")
    assert images_in(tmp_path / "out/miniImagenet") == files


# tieredImageNet -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_npz", [False, True])
def test_tiered(prepare, tmp_path, as_npz):
    arrays = make_tiered(tmp_path / "tiered", as_npz)
    options = ("--source", tmp_path / "tiered")
    line = prepare("tieredImageNet", *options, fails=True)
    assert "base has 3 of 351 classes, val has 3 of 97 classes" in line and "there are 18 of 779165 images" in line
    prepare("tieredImageNet", *options, "--allow_incomplete")
    out = tmp_path / "out/tieredImageNet"
    classes = ["Yorkshire_terrier", "tabby_tabby_cat", "abacus"]
    for split, tag in TAGS.items():
        for i in range(6):
            written = read_pixels(out / f"{split}/{split}_{i // 2:03d}_{classes[i // 2]}/{i:06d}.png")
            assert np.array_equal(written, arrays[tag][i])
    assert len(images_in(out)) == 18


def test_tiered_refusals(prepare, tmp_path):
    source = tmp_path / "tiered"
    make_tiered(source, as_npz=True)
    options = ("--source", source, "--allow_incomplete")
    labels = (source / "val_labels.pkl").read_bytes()
    write(source / "val_labels.pkl", python2_pickle({"classes": [0]}))
    line = prepare("tieredImageNet", *options, fails=True)
    assert "val_labels.pkl' has the keys classes: expected label_specific" in line
    write(source / "val_labels.pkl", python2_pickle({"label_specific": np.zeros(5, int)}))
    assert "has 6 images, and 5 have labels" in prepare("tieredImageNet", *options, fails=True)
    write(source / "val_labels.pkl", labels)
    whole = (source / "val_images.npz").read_bytes()
    write(source / "val_images.npz", whole[: len(whole) // 2])
    assert "is no whole npz file with an array 'images'" in prepare("tieredImageNet", *options, fails=True)
    np.savez(source / "val_images.npz", pictures=np.zeros(3))
    assert "is no whole npz file with an array 'images'" in prepare("tieredImageNet", *options, fails=True)
    (source / "val_images.npz").unlink()
    assert "neither val_images_png.pkl nor val_images.npz" in prepare("tieredImageNet", *options, fails=True)


# CUB ------------------------------------------------------------------------------------------------------------------


def test_cub_from_folder_and_archive(prepare, tmp_path):
    files = make_cub(tmp_path / "CUB_200_2011")
    archive = make_tgz(tmp_path / "CUB_200_2011.tgz", tmp_path / "CUB_200_2011")
    split_of = ["base", "val", "base", "novel", "base", "val", "base", "novel"]
    expected = {f"{split_of[int(name[:3]) - 1]}/{name}": content for name, content in files.items()}
    for i, source in enumerate((tmp_path / "CUB_200_2011", archive)):
        out = tmp_path / str(i)
        line = prepare("CUB", "--source", source, "--out", out, fails=True)
        assert "base has 4 of 100 classes, val has 2 of 50 classes, novel has 2 of 50 classes" in line
        assert "there are 16 of 11788 images" in line
        prepare("CUB", "--source", source, "--out", out, "--allow_incomplete")
        assert images_in(out / "CUB") == expected


def test_cub_cropped_to_bounding_boxes(prepare, tmp_path):
    files = make_cub(tmp_path / "CUB_200_2011")
    prepare("CUB", "--source", tmp_path / "CUB_200_2011", "--crop_bbox", "--allow_incomplete")
    name = "001.Black_footed_Albatross/Black_footed_Albatross_0001_795001"
    with Image.open(io.BytesIO(files[f"{name}.jpg"])) as image:
        expected = np.asarray(image)[2:10, 4:14]
    assert np.array_equal(read_pixels(tmp_path / f"out/CUB/base/{name}.png"), expected)
    line = prepare("CUB", "--source", tmp_path / "CUB_200_2011", "--allow_incomplete", fails=True)
    assert "out/CUB' has another crop_bbox" in line


def test_cub_broken_sources(prepare, tmp_path):
    source = tmp_path / "CUB_200_2011"
    make_cub(source)
    archive = make_tgz(tmp_path / "CUB_200_2011.tgz", source)
    write(tmp_path / "half.tgz", archive.read_bytes()[: archive.stat().st_size // 2])
    line = prepare("CUB", "--source", tmp_path / "half.tgz", fails=True)
    assert "half.tgz' is truncated, or no tar or zip archive" in line
    (source / "images/002.Laysan_Albatross/Laysan_Albatross_0001_795001.jpg").unlink()
    partial = make_tgz(tmp_path / "partial.tgz", source)
    for lacking in (source, partial):
        line = prepare("CUB", "--source", lacking, "--out", tmp_path / f"out_{lacking.stem}", fails=True)
        assert "val class '002.Laysan_Albatross' has 1 of 2 images" in line
    write(source / "bounding_boxes.txt", "1 0.0 0.0 5.0 5.0\n")
    options = ("--source", source, "--crop_bbox", "--out", tmp_path / "cropped")
    assert "no 'x y width height' for image 2" in prepare("CUB", *options, fails=True)
    (source / "images.txt").unlink()
    assert "0 files images.txt, not one" in prepare("CUB", "--source", source, fails=True)


def test_an_archive_cannot_write_outside(prepare, tmp_path):
    with tarfile.open(tmp_path / "evil.tgz", "w:gz") as tar:
        add_to_tar(tar, "CUB/images.txt", b"1 ../evil.jpg\n")
        add_to_tar(tar, "CUB/images/../evil.jpg", encoded())
    line = prepare("CUB", "--source", tmp_path / "evil.tgz", "--allow_incomplete", fails=True)
    assert "'base/../evil.jpg', which is not a plain class/file name" in line
    assert not list(tmp_path.rglob("evil.jpg"))


# FC100 and CIFAR-FS ---------------------------------------------------------------------------------------------------


def test_cifar_splits(prepare, tmp_path):
    arrays = make_cifar(tmp_path / "cifar-100-python")
    archive = make_tgz(tmp_path / "cifar-100-python.tar.gz", tmp_path / "cifar-100-python")
    lists = json.loads((SPLIT_FILES / "CIFAR-FS.json").read_text())
    coarse = json.loads((SPLIT_FILES / "FC100.json").read_text())["coarse_labels"]
    with (tmp_path / "cifar-100-python/test").open("rb") as file:
        test_labels = load_pickle(file, "test")["fine_labels"]
    for name, n_classes in (("CIFAR-FS", [64, 16, 20]), ("FC100", [60, 20, 20])):
        assert f"{name} is not complete" in prepare(name, "--source", archive, fails=True)
        prepare(name, "--source", tmp_path / "cifar-100-python", "--allow_incomplete")
        images = images_in(tmp_path / "out" / name)
        assert len(images) == 600
        found = {split: {path.split("/")[1] for path in images if path.startswith(split)} for split in SPLITS}
        assert [len(found[split]) for split in SPLITS] == n_classes
        for split in SPLITS:
            wanted = lists[split] if name == "CIFAR-FS" else coarse[split]
            assert {c if name == "CIFAR-FS" else COARSE[c] for c in found[split]} == set(wanted)
        label = FINE[test_labels[7]]
        split = next(split for split in SPLITS if label in found[split])
        written = read_pixels(tmp_path / "out" / name / split / label / "test_00007.png")
        assert np.array_equal(written, arrays["test"][7].reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar_broken_sources(prepare, tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    make_cifar(folder)
    archive = make_tgz(tmp_path / "cifar.tar.gz", folder)
    write(tmp_path / "half.tar.gz", archive.read_bytes()[: archive.stat().st_size // 2])
    assert "is truncated" in prepare("FC100", "--source", tmp_path / "half.tar.gz", fails=True)
    meta = (folder / "meta").read_bytes()
    write(folder / "meta", b"cos\ngetcwd\n.")
    assert "only numpy arrays and containers" in prepare("FC100", "--source", folder, fails=True)
    write(folder / "meta", python2_pickle({"label_names": ["airplane"]}))  # CIFAR-10's
    assert "meta is no dictionary of fine_label_names, coarse_label_names" in prepare(
        "FC100", "--source", folder, fails=True
    )
    write(folder / "meta", meta)
    content = {"data": pixels(3, 3072), "fine_labels": [0, 1, 100], "coarse_labels": [0, 1, 2]}
    write(folder / "test", python2_pickle(content))
    assert "labels of test are not whole numbers from 0 (the largest is 100, of 100)" in prepare(
        "FC100", "--source", folder, fails=True
    )
    write(folder / "test", python2_pickle(content | {"fine_labels": [0, 1]}))
    assert "of test do not belong together" in prepare("FC100", "--source", folder, fails=True)
    (folder / "test").unlink()
    assert "has 0 files 'test', not one" in prepare("FC100", "--source", folder, fails=True)

    def fail(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)
    assert "no download (no network): give cifar-100-python.tar.gz" in prepare("FC100", fails=True)


# folder ---------------------------------------------------------------------------------------------------------------


def test_folder_split_at_random(prepare, tmp_path):
    source = make_folder(tmp_path / "photos")
    printed = prepare("folder", "--source", source)
    assert "note: left out of photos: 1 .txt" in printed
    assert "base 6 classes, 12 images; val 2 classes, 4 images; novel 2 classes, 4 images" in printed
    first = images_in(tmp_path / "out/photos")
    assert {name.split("/", 1)[1]: content for name, content in first.items()} == {
        path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*.jpg")
    }
    prepare("folder", "--source", source, "--name", "same")
    prepare("folder", "--source", source, "--name", "other", "--seed", "1", "--split", "0.5,0.2,0.3")
    assert images_in(tmp_path / "out/same") == first
    assert set(images_in(tmp_path / "out/other")) != set(first)
    assert len(list((tmp_path / "out/other/novel").iterdir())) == 3
    line = prepare("folder", "--source", source, "--seed", "1", fails=True)
    assert "has another seed" in line


def test_a_folder_of_other_classes_is_not_dealt_anew(prepare, tmp_path):
    source, out = make_folder(tmp_path / "photos"), tmp_path / "out/photos"
    prepare("folder", "--source", source)
    whole = images_in(out)
    write(source / "class10" / "0.jpg", encoded())
    assert "has another classes: delete it" in prepare("folder", "--source", source, fails=True)
    assert images_in(out) == whole
    shutil.rmtree(source / "class10")
    prepare("folder", "--source", source)
    assert images_in(out) == whole


def test_folder_split_by_lists(prepare, tmp_path):
    source = make_folder(tmp_path / "photos")
    lists = {"base": ["class3", "class1"], "val": ["class5"], "novel": ["class0"]}
    split_file = write(tmp_path / "lists.json", lists)
    prepare("folder", "--source", source, "--split_file", split_file)
    found = {name.rsplit("/", 1)[0] for name in images_in(tmp_path / "out/photos")}
    assert found == {"base/class1", "base/class3", "val/class5", "novel/class0"}
    options = ("--source", source, "--split_file", split_file)
    write(split_file, lists | {"val": ["heron"]})
    assert "no images of the classes 'heron'" in prepare("folder", *options, fails=True)
    write(split_file, lists | {"val": ["class1"]})
    assert "lists class1 twice" in prepare("folder", *options, fails=True)
    write(split_file, {"train": []})
    assert "not a JSON of base, val and novel classes" in prepare("folder", *options, fails=True)


def test_folder_with_unreadable_images(prepare, tmp_path):
    source = make_folder(tmp_path / "photos")
    whole = (source / "class2/0.jpg").read_bytes()
    write(source / "class2/truncated.jpg", whole[:-60])
    write(source / "class3/page.jpg", "<html>not found</html>")
    line = prepare("folder", "--source", source, fails=True)
    assert (
        "2 images cannot be read" in line
        and "class2/truncated.jpg" in line
        and "class3/page.jpg (it is none of JPEG, PNG" in line
    )
    assert not (tmp_path / "out/photos").exists()
    printed = prepare("folder", "--source", source, "--skip_bad")
    assert "truncated.jpg" in printed
    assert len(images_in(tmp_path / "out/photos")) == 20
    for file in (source / "class2").iterdir():
        write(file, "<html>")
    line = prepare("folder", "--source", source, "--skip_bad", "--name", "lost", fails=True)
    assert "of 6 classes" in line or "of 2 classes" in line  # a class without images is no class


def test_folder_refusals(prepare, tmp_path):
    source = make_folder(tmp_path / "photos")
    line = prepare("folder", "--source", source / "class1" / "0.jpg", fails=True)
    assert "is not a folder" in line
    (source / "empty").mkdir()
    assert "empty holds no images" in prepare("folder", "--source", source, fails=True)
    write(tmp_path / "two/a/1.jpg", encoded())
    write(tmp_path / "two/b/1.jpg", encoded())
    line = prepare("folder", "--source", tmp_path / "two", fails=True)
    assert "2 classes are too few for a benchmark: label images of them with 'python predict.py --support" in line
    for split in ("0.6,0.6,0.2", "nan,nan,nan", "inf,inf,inf", "0.6,0.4,nan"):
        assert "three fractions of sum 1" in prepare("folder", "--source", source, "--split", split, fails=True)


# Any of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["", "[1]", "[" * 100_000])
def test_damaged_settings_of_a_prepared_folder_are_one_line(prepare, tmp_path, settings):
    source = make_folder(tmp_path / "photos")
    prepare("folder", "--source", source)
    write(tmp_path / "out/photos/prepared.json", settings)
    assert "prepared.json' is damaged: delete" in prepare("folder", "--source", source, fails=True)


@pytest.mark.parametrize("labels", [[0.5], [float("nan")], ["a"], [[1], [2, 3]], None, [-1]])
def test_labels_of_odd_types_are_one_line(prepare, tmp_path, labels):
    make_tiered(tmp_path / "tiered", as_npz=True)
    write(tmp_path / "tiered/val_labels.pkl", pickle.dumps({"label_specific": labels}))
    line = prepare("tieredImageNet", "--source", tmp_path / "tiered", fails=True)
    assert "val_labels.pkl': its labels are not whole numbers" in line
    make_cifar(tmp_path / "cifar-100-python")
    broken = {"data": pixels(1, 3072), "fine_labels": labels, "coarse_labels": [0]}
    write(tmp_path / "cifar-100-python/test", pickle.dumps(broken))
    line = prepare("CIFAR-FS", "--source", tmp_path / "cifar-100-python", fails=True)
    assert "labels of test are not whole numbers" in line


def test_resume_after_losing_half_of_the_images(prepare, tmp_path):
    source = make_folder(tmp_path / "photos")
    prepare("folder", "--source", source)
    out = tmp_path / "out/photos"
    whole = images_in(out)
    for name in list(whole)[::2]:
        (out / name).unlink()
    kept = {name: (out / name).stat().st_mtime_ns for name in list(whole)[1::2]}
    prepare("folder", "--source", source)
    assert images_in(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept


def test_an_interrupted_run_continues(prepare, tmp_path, monkeypatch):
    source = make_folder(tmp_path / "photos")
    replace, left = os.replace, 8

    def replace_some(*paths):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_some)
    assert "No space left on device" in prepare("folder", "--source", source, fails=True)
    assert not (tmp_path / "out/photos").exists()
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/.photos.partial").rglob("*.jpg")}
    assert len(written) > 0
    monkeypatch.setattr(os, "replace", replace)
    prepare("folder", "--source", source)
    out = tmp_path / "out/photos"
    assert len(images_in(out)) == 20
    assert not (tmp_path / "out/.photos.partial").exists()
    assert set(written.values()) <= {path.stat().st_mtime_ns for path in out.rglob("*.jpg")}


def test_a_folder_of_someone_else_is_left_alone(prepare, tmp_path):
    source = make_folder(tmp_path / "photos")
    mine = write(tmp_path / "out/photos/base/mine/a.jpg", encoded())
    line = prepare("folder", "--source", source, fails=True)
    assert "out/photos' exists and was not made by this command" in line
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [mine]


def test_a_converter_is_one_entry_with_flags_of_its_own(prepare, tmp_path, monkeypatch):
    def convert_toys(source, colour):
        items = [ImageItem(split, "toy", f"{colour}.png", source.read_bytes) for split in SPLITS]
        return Conversion(items, 3, dict.fromkeys(SPLITS, 1), settings={"colour": colour})

    def download(folder):
        return write(folder / "toy.png", encoded("PNG"))

    flags = {"source": {"type": Path}, "colour": {"default": "red"}}
    monkeypatch.setitem(CONVERTERS, "toys", Converter(convert_toys, "made here", flags, download))
    prepare("toys")
    content = (tmp_path / "out/.downloads/toy.png").read_bytes()
    assert images_in(tmp_path / "out/toys") == {f"{split}/toy/red.png": content for split in SPLITS}
    given = write(tmp_path / "given.png", encoded("PNG"))
    options = ("--source", given, "--colour", "blue")
    assert "out/toys' has another colour" in prepare("toys", *options, fails=True)
    prepare("toys", *options, "--out", tmp_path / "other")
    assert images_in(tmp_path / "other/toys")["val/toy/blue.png"] == given.read_bytes()
    assert "does not exist" in prepare("toys", "--source", tmp_path / "nowhere", fails=True)


def test_glyphs(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "data.glyphs.render_glyphs", lambda out, seed, quiet: (out / f"base/{seed}").mkdir(parents=True)
    )
    assert "base 1 classes, 0 images" in prepare("glyphs", "--seed", "7")
    assert (tmp_path / "out/glyphs/base/7").is_dir()
    assert "is there already" in prepare("glyphs")
