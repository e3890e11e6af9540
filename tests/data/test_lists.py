"""Images with lists beside them, in the forms of other repositories: what is written equals what their loaders give."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.converters.converter import SPLIT_FILES, SPLITS, TAGS
from data.listing import list_json
from tests.helpers import encoded, images_in, write

RANDOM = np.random.default_rng(0)
OWN = {"base": ["drill", "saw"], "val": ["nut"], "novel": ["screw"]}
MINI = {"base": ["n01532829", "n01558993"], "val": ["n01855672"], "novel": ["n01930112"]}


def zipped(folder: Path, top: str = "") -> Path:
    """A zip of a folder, below a folder `top` in it, as a Mac makes it."""
    path = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            name = Path(top, file.relative_to(folder)).as_posix()
            archive.write(file, name)
            if file.suffix == ".png":
                archive.writestr(f"__MACOSX/{Path(name).parent}/._{file.name}", b"\0\5\26\7")
    return path


# csv files ------------------------------------------------------------------------------------------------------------


def make_csv(root: Path, classes: dict[str, list[str]], form: str) -> dict[str, bytes]:
    """Three csv files and the images that they name, in one of the forms of the field; {split/class/file: content}."""
    expected = {}
    for split, names in classes.items():
        rows = ["class_name,image_name" if form == "easyfsl" else "filename;label" if form == ";" else "filename,label"]
        for name in names:
            for i in range(3):
                file = f"{i}.jpg" if form in ("names", "backslashes") else f"{name}{i:08d}.jpg"
                listed = {"names": f"{name}/{file}", "backslashes": f"{name}\\{file}"}.get(form, file)
                rows += [{"easyfsl": f"{name},{file}", ";": f"{file};{name}"}.get(form, f"{listed},{name}")]
                flat = form in ("flat", "split", "bom", ";")
                place = root / ("elsewhere" if form == "easyfsl" else "images") / ("" if flat else name) / file
                expected[f"{split}/{name}/{file}"] = write(place, encoded()).read_bytes()
        end = "\r\n" if form == "bom" else "\n"
        text = ("\ufeff" if form == "bom" else "") + end.join(rows) + end
        write(root / ("split" if form == "split" else "") / f"{TAGS[split]}.csv", text)
    return expected


FORMS = ["flat", "split", "folders", "names", "backslashes", "bom", ";", "easyfsl"]


@pytest.mark.parametrize("form", FORMS)
def test_csv_lists_of_every_form(prepare, tmp_path, form):
    own = make_csv(tmp_path / "own", OWN, form)
    printed = prepare("folder", "--source", tmp_path / "own", "--name", "tools")
    assert "base 2 classes, 6 images; val 1 classes, 3 images; novel 1 classes, 3 images" in printed
    assert images_in(tmp_path / "out/tools") == own
    mini = make_csv(tmp_path / "mini", MINI, form)
    positions = {split: {name: [1, 2, 3] for name in names} for split, names in MINI.items()}
    options = ("--split_file", write(tmp_path / "split.json", positions))
    prepare("miniImagenet", "--source", tmp_path / "mini", *options)
    assert images_in(tmp_path / "out/miniImagenet") == mini


def test_csv_lists_in_an_archive_and_images_elsewhere(prepare, tmp_path):
    own = make_csv(tmp_path / "own", OWN, "flat")
    prepare("folder", "--source", zipped(tmp_path / "own", "own"), "--name", "zipped")
    assert images_in(tmp_path / "out/zipped") == own
    (tmp_path / "own/images").rename(tmp_path / "pictures")
    line = prepare("folder", "--source", tmp_path / "own", fails=True)
    assert "not in the source: base/drill/drill00000000.jpg" in line
    prepare("folder", "--source", tmp_path / "own", "--image_root", tmp_path / "pictures", "--name", "rooted")
    assert images_in(tmp_path / "out/rooted") == own
    (tmp_path / "own/images").symlink_to(tmp_path / "pictures")
    prepare("folder", "--source", tmp_path / "own", "--name", "linked")
    assert images_in(tmp_path / "out/linked") == own


def test_the_image_that_the_peers_take_is_taken(prepare, tmp_path):
    """images/<filename> before a copy elsewhere, the class's folder before others, another class's folder never."""
    own = make_csv(tmp_path / "own", OWN, "flat")
    write(tmp_path / "own/backup/drill00000000.jpg", encoded())
    (tmp_path / "own/images/saw00000000.jpg").rename(write(tmp_path / "own/images/saw/saw00000000.jpg", b""))
    write(tmp_path / "own/images/backup/saw00000000.jpg", encoded())
    (tmp_path / "own/images/nut00000000.jpg").rename(write(tmp_path / "own/images/screw/nut00000000.jpg", b""))
    line = prepare("folder", "--source", tmp_path / "own", fails=True)
    assert "val class 'nut' has 2 of 3 images" in line and "not in the source: val/nut/nut00000000.jpg" in line
    prepare("folder", "--source", tmp_path / "own", "--allow_incomplete")
    assert images_in(tmp_path / "out/own") == {k: v for k, v in own.items() if k != "val/nut/nut00000000.jpg"}
    (tmp_path / "own/backup/nut00000001.jpg").write_bytes(encoded())
    (tmp_path / "own/images/nut00000001.jpg").rename(write(tmp_path / "own/copy/nut00000001.jpg", b""))
    line = prepare("folder", "--source", tmp_path / "own", fails=True)
    assert "may be backup/nut00000001.jpg or copy/nut00000001.jpg" in line and "--image_root" in line


def test_images_of_one_name_in_two_folders_stay_apart(prepare, tmp_path):
    make_csv(tmp_path / "own", OWN, "flat")
    two = [write(tmp_path / f"own/images/{folder}/1.jpg", encoded()).read_bytes() for folder in ("left", "right")]
    write(tmp_path / "own/val.csv", "filename,label\nleft/1.jpg,nut\nright/1.jpg,nut\n")
    prepare("folder", "--source", tmp_path / "own")
    written = images_in(tmp_path / "out/own")
    assert [written[f"val/nut/{folder}_1.jpg"] for folder in ("left", "right")] == two


def test_csv_lists_that_are_refused(prepare, tmp_path):
    source = tmp_path / "own"
    make_csv(source, OWN, "flat")
    line = prepare("miniImagenet", "--source", source, "--allow_incomplete", fails=True)
    assert "name no class of miniImagenet" in line and "data.prepare folder" in line
    options = ("--source", source)
    split_file = write(tmp_path / "split.json", {"base": ["saw"], "val": ["nut"], "novel": ["screw"]})
    assert "has lists of its own splits" in prepare("folder", *options, "--split_file", split_file, fails=True)
    whole = (source / "val.csv").read_text()
    refused: dict[str | bytes, str] = {
        "filename,label\ndrill00000000.jpg,drill\n": "share 'drill'",
        "filename,label\nnut00000000.jpg,nut\nnut00000000.jpg,nut\n": "lists image 'images/nut00000000.jpg' of class",
        whole.replace("filename,label\n", ""): "first line is 'nut00000000.jpg,nut'",  # which peers drop
        "filename,label\nnut00000000.jpg\n": "no csv file with columns as filename and label",
        "filename,label\nnut\xe4.jpg,nut\n".encode("latin1"): "no csv file with columns as filename and label",
        "filename,label\n,nut\n": "not in the source: val/nut/images",
        "filename,label\n..,nut\n": "'val/nut/..', which is not a plain class/file name",
        "": "first line is 'nothing'",
    }
    for i, (content, reason) in enumerate(refused.items()):
        write(source / "val.csv", content)
        assert reason in prepare("folder", *options, "--name", str(i), fails=True)
    (source / "val.csv").unlink()
    line = prepare("folder", *options, fails=True)
    assert "has train.csv and test.csv, but a benchmark train.csv, val.csv, test.csv" in line
    for place in ("a", "b"):
        make_csv(tmp_path / "two" / place, OWN, "split")
    line = prepare("folder", "--source", tmp_path / "two", fails=True)
    assert "has a/split/train.csv and b/split/train.csv: give the folder of one" in line


# CIFAR-FS and FC100 ---------------------------------------------------------------------------------------------------

SUPERCLASSES = json.loads((SPLIT_FILES / "CIFAR-100.json").read_text())
FINE = sorted(name for names in SUPERCLASSES.values() for name in names)


def published(benchmark: str) -> dict[str, list[str]]:
    lists = json.loads((SPLIT_FILES / f"{benchmark}.json").read_text())
    if "coarse_labels" not in lists:
        return lists
    return {
        split: [name for coarse in lists["coarse_labels"][split] for name in SUPERCLASSES[coarse]] for split in SPLITS
    }


def make_pickles(root: Path, labels: dict[str, list[int]], name: str, size: int = 32) -> dict[str, dict]:
    """The pickles of MetaOptNet, of Python 2's protocol, images in random order."""
    found = {}
    for split, numbers in labels.items():
        order = RANDOM.permutation(np.repeat(numbers, 2)).tolist()
        data = RANDOM.integers(0, 256, (len(order), size, size, 3), dtype=np.uint8)
        found[split] = {"data": data, "labels": order}
        write(root / name.format(TAGS[split]), pickle.dumps(found[split], protocol=2))
    return found


@pytest.mark.parametrize("benchmark, name", [("CIFAR-FS", "CIFAR_FS_{}.pickle"), ("FC100", "{}.pickle")])
def test_cifar_pickles_of_cifars_numbers(prepare, tmp_path, benchmark, name):
    numbers = {split: [FINE.index(c) for c in names] for split, names in published(benchmark).items()}
    pickles = make_pickles(tmp_path / "pickles", numbers, name)
    assert "has 2 of 600 images" in prepare(benchmark, "--source", tmp_path / "pickles", fails=True)
    for source in (tmp_path / "pickles", zipped(tmp_path / "pickles")):
        out = tmp_path / f"out_{source.name}"
        printed = prepare(benchmark, "--source", source, "--allow_incomplete", "--out", out)
        assert "note" not in printed
        assert len(images_in(out / benchmark)) == 200
        for split, content in pickles.items():
            for i, (label, image) in enumerate(zip(content["labels"], content["data"], strict=True)):
                with Image.open(out / benchmark / split / FINE[label] / f"{i:05d}.png") as written:
                    assert np.array_equal(np.asarray(written), image)


def test_cifar_pickles_of_other_numbers_are_called_by_their_labels(prepare, tmp_path):
    for name, numbers, classes in (
        ("running", [range(64), range(64, 80), range(80, 100)], ["class_63", "class_64", "class_99"]),
        ("restarting", [range(64), range(16), range(20)], ["base_63", "val_00", "novel_19"]),
    ):
        labels = dict(zip(SPLITS, map(list, numbers), strict=True))
        make_pickles(tmp_path / name, labels, "CIFAR_FS_{}.pickle")
        options = ("--source", tmp_path / name, "--allow_incomplete", "--out", tmp_path / f"out_{name}")
        assert "called by their labels" in prepare("CIFAR-FS", *options)
        folders = [tmp_path / f"out_{name}/CIFAR-FS" / split for split in SPLITS]
        assert [len(list(folder.iterdir())) for folder in folders] == [64, 16, 20]
        assert all((folder / c).is_dir() for folder, c in zip(folders, classes, strict=True))


def test_pickles_that_are_not_of_the_benchmark(prepare, tmp_path):
    numbers = {split: [FINE.index(c) for c in names] for split, names in published("CIFAR-FS").items()}
    fs = tmp_path / "fs"
    make_pickles(fs, numbers, "CIFAR_FS_{}.pickle")
    options = ("--source", fs, "--allow_incomplete")
    line = prepare("FC100", *options, fails=True)
    assert "has [64, 16, 20] classes of base, val and novel, not [60, 20, 20]: it is CIFAR-FS" in line
    make_pickles(tmp_path / "mini", numbers, "miniImageNet_category_split_{}.pickle", size=84)
    line = prepare("CIFAR-FS", "--source", tmp_path / "mini", fails=True)
    assert "split_train.pickle has images of 84x84 pixels, as miniImagenet has, not CIFAR-100" in line
    (fs / "CIFAR_FS_val.pickle").rename(fs / "CIFAR_FS_train_val.pickle")  # of MetaOptNet, both splits in one
    line = prepare("CIFAR-FS", *options, fails=True)
    assert "for train CIFAR_FS_train.pickle; for val none; for test CIFAR_FS_test.pickle" in line
    write(fs / "CIFAR_FS_val.pickle", pickle.dumps({"images": [], "labels": []}))
    assert "CIFAR_FS_val.pickle is no dictionary of data, labels" in prepare("CIFAR-FS", *options, fails=True)
    (tmp_path / "empty").mkdir()
    line = prepare("CIFAR-FS", "--source", tmp_path / "empty", fails=True)
    assert "0 files 'meta'" in line and "or class folders" in line


@pytest.mark.parametrize("benchmark", ["CIFAR-FS", "FC100"])
def test_bertinettos_folder(prepare, tmp_path, benchmark):
    root, contents = tmp_path / "cifar100", {}
    for tag, split in ((TAGS[split], split) for split in SPLITS):
        names = published("CIFAR-FS")[split]
        write(root / f"splits/bertinetto/{tag}.txt", "".join(f"{name}\n" for name in names))
        for name in names:
            for i in range(2):
                file = f"{name}_s_{i:06d}.png"
                contents[name, file] = write(root / "data" / name / file, encoded("PNG", (32, 32))).read_bytes()
    split_of = {name: split for split, names in published(benchmark).items() for name in names}
    expected = {f"{split_of[name]}/{name}/{file}": content for (name, file), content in contents.items()}
    for source in (root, zipped(root, "cifar100")):
        options = ("--source", source, "--allow_incomplete", "--out", tmp_path / f"out_{source.name}")
        prepare(benchmark, *options)
        assert images_in(tmp_path / f"out_{source.name}" / benchmark) == expected


# Meta-Album, Omniglot, easyfsl, CUB -----------------------------------------------------------------------------------


def make_album(root: Path, columns: tuple[str, str] = ("FILE_NAME", "CATEGORY")) -> dict[str, bytes]:
    """Ten categories of two images; {class/file: content}."""
    names = {f"insect{i}.JPG": f"bee {i % 10}" for i in range(20)}
    rows = [f"0,{name},{category},Insects" for name, category in names.items()]
    write(root / "labels.csv", "\r\n".join([f"id,{','.join(columns)},SUPER_CATEGORY", *rows]))
    info = {"dataset_name": "mini_insect", "image_column_name": columns[0], "category_column_name": columns[1]}
    write(root / "info.json", info)
    return {f"{c}/{name}": write(root / "images" / name, encoded()).read_bytes() for name, c in names.items()}


@pytest.mark.parametrize("columns", [("FILE_NAME", "CATEGORY"), ("picture", "species")])
def test_meta_album(prepare, tmp_path, columns):
    files = make_album(tmp_path / "BEE_Mini", columns)
    options = ("--split", "0.5,0.2,0.3", "--seed", "1")
    for source, name in ((tmp_path / "BEE_Mini", "a"), (zipped(tmp_path / "BEE_Mini", "BEE_Mini"), "b")):
        printed = prepare("folder", "--source", source, "--name", name, *options)
        assert "base 5 classes, 10 images; val 2 classes, 4 images; novel 3 classes, 6 images" in printed
        written = images_in(tmp_path / "out" / name)
        assert {path.split("/", 1)[1]: content for path, content in written.items()} == files
    assert images_in(tmp_path / "out/a") == written
    lists = {"base": ["bee 3"], "val": ["bee 5"], "novel": ["bee 0"]}
    prepare("folder", "--source", tmp_path / "BEE_Mini", "--split_file", write(tmp_path / "split.json", lists))
    assert {path.rsplit("/", 1)[0] for path in images_in(tmp_path / "out/BEE_Mini")} == {
        "base/bee 3",
        "val/bee 5",
        "novel/bee 0",
    }
    line = prepare("folder", "--source", tmp_path / "BEE_Mini", *options, fails=True)
    assert "has another lists" in line


def test_meta_album_refusals(prepare, tmp_path):
    make_album(tmp_path / "all/BEE")
    (tmp_path / "all/BEE/images/insect3.JPG").unlink()
    line = prepare("folder", "--source", tmp_path / "all", fails=True)
    assert "class 'bee 3' has 1 of 2 images" in line and "/bee 3/insect3.JPG" in line
    write(tmp_path / "all/BEE/info.json", {"image_column_name": "FILE_NAME"})
    line = prepare("folder", "--source", tmp_path / "all", fails=True)
    assert "BEE/info.json' does not name image_column_name and category_column_name" in line
    make_album(tmp_path / "all/FLY")
    assert "has 2 sets of Meta-Album" in prepare("folder", "--source", tmp_path / "all", fails=True)


def test_omniglot(prepare, tmp_path):
    root, files = tmp_path / "images_background_small1", {}
    for alphabet in ("Greek", "Latin"):
        for n in range(1, 6):
            for drawer in (1, 2):
                image = write(root / alphabet / f"character{n:02d}" / f"{n:04d}_{drawer:02d}.png", encoded("PNG"))
                files[f"{alphabet}_character{n:02d}/{image.name}"] = image.read_bytes()
    for source in (root, zipped(root, root.name)):
        printed = prepare("folder", "--source", source, "--name", source.suffix or "folder")
        assert "base 6 classes, 12 images; val 2 classes, 4 images; novel 2 classes, 4 images" in printed
        written = images_in(tmp_path / "out" / (source.suffix or "folder"))
        assert {path.split("/", 1)[1]: content for path, content in written.items()} == files
    # Whole alphabets, where characters of one alphabet should not be both trained and tested on.
    characters = [f"character{n:02d}" for n in range(1, 6)]
    lists = {"base": [f"Greek_{c}" for c in characters], "val": ["Latin_character01"], "novel": ["Latin_character02"]}
    prepare("folder", "--source", root, "--split_file", write(tmp_path / "split.json", lists))
    assert len(images_in(tmp_path / "out" / root.name)) == 14


def test_easyfsl_class_roots(prepare, tmp_path):
    """Its roots are relative to where it is run, and only the files right in them are images of the class."""
    source, expected = tmp_path / "CUB", {}
    for split, names in OWN.items():
        roots = [f"./data/CUB/images/{name}" for name in names]
        write(source / f"{TAGS[split]}.json", {"class_names": [f"the {name}" for name in names], "class_roots": roots})
        for name in names:
            for file in ("1.jpg", "2.JPG"):
                content = write(tmp_path / "birds/images" / name / file, encoded()).read_bytes()
                expected[f"{split}/the {name}/{file}"] = content
            write(tmp_path / "birds/images" / name / "notes.txt", "no image")
            write(tmp_path / "birds/images" / name / "parts" / "3.jpg", encoded())
    line = prepare("folder", "--source", source, fails=True)
    assert "class folder './data/CUB/images/drill' is there 0 times" in line
    prepare("folder", "--source", source, "--image_root", tmp_path / "birds")
    assert images_in(tmp_path / "out/CUB") == expected
    write(source / "val.json", {"class_names": ["a", "b"], "class_roots": ["./nut"]})
    line = prepare("folder", "--source", source, "--image_root", tmp_path / "birds", fails=True)
    assert "other numbers of class_names and class_roots" in line


def test_closer_look_lists_of_windows(tmp_path):
    """Labels numbered over all splits, names of all classes in each list, and paths of another machine."""
    names = [name for split in SPLITS for name in OWN[split]]
    for name in names:
        write(tmp_path / "here/images" / name / "1.jpg", encoded())
    for split in SPLITS:
        images = [f"C:\\Users\\me\\filelists\\images\\{name}\\1.jpg" for name in OWN[split]]
        labels = [names.index(name) for name in OWN[split]]
        write(tmp_path / f"{split}.json", {"label_names": names, "image_names": images, "image_labels": labels})
        class_names, paths, found = list_json(tmp_path / f"{split}.json", tmp_path / "here")
        assert class_names == OWN[split] and found == list(range(len(class_names)))
        assert paths == [tmp_path / "here/images" / name / "1.jpg" for name in OWN[split]]


def test_cub_as_a_zip(prepare, tmp_path):
    root, expected = tmp_path / "CUB_200_2011", {}
    classes = ["001.Albatross", "002.Auklet", "003.Ani", "004.Bunting"]
    for name, split in zip(classes, ("base", "val", "base", "novel"), strict=True):
        expected[f"{split}/{name}/1.jpg"] = write(root / "images" / name / "1.jpg", encoded()).read_bytes()
    write(root / "images.txt", "".join(f"{i} {name}/1.jpg\n" for i, name in enumerate(classes, 1)))
    archive = zipped(root, root.name)
    prepare("CUB", "--source", archive, "--allow_incomplete")
    assert images_in(tmp_path / "out/CUB") == expected
    for damage in (archive.read_bytes()[:-200], b"PK\3\4" + bytes(400)):
        line = prepare("CUB", "--source", write(tmp_path / "half.zip", damage), fails=True)
        assert "half.zip' is truncated, or no tar or zip archive" in line
    content = bytearray(archive.read_bytes())
    content[content.rindex(b"PK\3\4") - 30] ^= 255  # in what the last image holds
    line = prepare(
        "CUB", "--source", write(tmp_path / "wrong.zip", bytes(content)), "--out", tmp_path / "o", fails=True
    )
    assert "wrong.zip' is truncated, or no tar" in line


@pytest.mark.parametrize("npz", [True, False])
def test_tiered_weights_of_peers_want_another_order_of_colours(prepare, tmp_path, npz):
    for tag in TAGS.values():
        write(tmp_path / f"tiered/{tag}_labels.pkl", pickle.dumps({"labels": [0]}, protocol=2))
        if npz:
            np.savez(tmp_path / f"tiered/{tag}_images.npz", images=np.full((1, 4, 4, 3), (9, 5, 1), np.uint8))
        else:
            pngs = [np.frombuffer(encoded("PNG"), np.uint8)]
            write(tmp_path / f"tiered/{tag}_images_png.pkl", pickle.dumps(pngs, protocol=2))
    printed = prepare("tieredImageNet", "--source", tmp_path / "tiered", "--allow_incomplete")
    assert printed.count("FEAT, RFS and MetaOptNet") == npz
    with Image.open(next((tmp_path / "out/tieredImageNet").rglob("*.png"))) as image:
        assert not npz or image.getpixel((0, 0)) == (1, 5, 9)
