"""A table of wrong inputs to every command: each ends with status 2, one line with cause and remedy, and no change."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from persistence.checkpoints import load_checkpoint, save_checkpoint
from tests.helpers import ALIGN, CHECKPOINT, TRAIN, call, folders

STAGE_1, STAGE_2, STAGE_3 = "transferLearning", "metaLearning", "associative_alignment"
PREPARE, REPORT, FIGURES = "data.prepare", "reporting.report", "reporting.figures"
META = [*TRAIN[:-2], "--train_n_query", 2, "--n_way", 3, "--episodes_per_epoch", 1]
META = [flag for i, flag in enumerate(META) if "--batch_size" not in (flag, META[i - 1])]


def images(root, split="novel"):
    return sorted((root / "benchmarks" / "tiny" / split).rglob("*.png"))


def image_of(content):
    """Replace one novel image by these bytes."""
    return lambda root: images(root)[0].write_bytes(content)


def nan_image(root):
    path = images(root, "base")[0]
    path.unlink()
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(path.with_suffix(".tiff"))


def truncated_jpeg(root):
    path = images(root)[0]
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()
    path.with_suffix(".jpg").write_bytes(path.with_suffix(".jpg").read_bytes()[:400])


def png_bomb(side=100_000):
    """The header of a PNG that claims side x side pixels, and next to nothing of them."""

    def chunk(kind, content):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def keep_classes(split, n):
    """Leave n classes of a split."""

    def spoil(root):
        for folder in sorted((root / "benchmarks" / "tiny" / split).iterdir())[n:]:
            folder.rename(root / folder.name)

    return spoil


def keep_images(split, n):
    """Leave n images of one class of a split."""

    def spoil(root):
        folder = sorted((root / "benchmarks" / "tiny" / split).iterdir())[0]
        for image in sorted(folder.iterdir())[n:]:
            image.unlink()

    return spoil


def without_split(split):
    return lambda root: (root / "benchmarks" / "tiny" / split).rename(root / "elsewhere")


def files_instead_of_classes(root):
    without_split("novel")(root)
    (root / "benchmarks" / "tiny" / "novel").mkdir()
    Image.new("RGB", (20, 20)).save(root / "benchmarks" / "tiny" / "novel" / "image.png")


def json_split(**changes):
    """The novel split as a json list, with these entries instead of the right ones."""

    def spoil(root):
        listed = images(root)
        names = sorted({path.parent.name for path in listed})
        without_split("novel")(root)
        record = {
            "label_names": names,
            "image_names": [str(root / "elsewhere" / path.parent.name / path.name) for path in listed],
            "image_labels": [names.index(path.parent.name) for path in listed],
        }
        record |= {key: change(record[key]) for key, change in changes.items()}
        record = {key: value for key, value in record.items() if value is not None}
        (root / "benchmarks" / "tiny" / "novel.json").write_text(json.dumps(record))

    return spoil


def json_text(text):
    def spoil(root):
        without_split("novel")(root)
        (root / "benchmarks" / "tiny" / "novel.json").write_text(text)

    return spoil


def checkpoint_with(**changes):
    """The checkpoint, with changed fields."""

    def spoil(root):
        path = root / "results" / "models" / CHECKPOINT
        fields = {name: getattr(load_checkpoint(path), name) for name in load_checkpoint(path).__dataclass_fields__}
        save_checkpoint(path, type(load_checkpoint(path))(**{**fields, **changes}))

    return spoil


def write(path, text):
    """Write a file below the workspace."""

    def spoil(root):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)

    return spoil


def in_result(root, **changes):
    """Change these entries of the result."""
    (file,) = (root / "results" / "tables").glob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def nothing(root):
    pass


OVER = "--overwrite"  # so that not the earlier run is what is complained about
FLAGS = {  # what argparse is given: (script, flags, parts of the line)
    "no shots": (STAGE_1, ["--n_shot", 0], ["--n_shot", "at least 1"]),
    "batch norm of a CPU": (STAGE_1, ["--sync_bn", "--device", "cpu"], ["--sync_bn", "for GPUs"]),
    "empty batch": (STAGE_1, ["--batch_size", 0], ["--batch_size", "at least 1"]),
    "rate missing": (STAGE_1, ["--lr"], ["--lr", "expected one argument"]),
    "crop beyond the image": (STAGE_1, ["--crop_scale", 0.5, 2], ["--crop_scale", "at most 1"]),
    "a meta-learner in stage 1": (STAGE_1, ["--method", "ProtoNet"], ["--method", "arcMax"]),
    "unknown precision": (STAGE_1, ["--precision", "fp8"], ["--precision", "bf16"]),
    "unknown preset": (STAGE_1, ["--preset", "desktop"], ["--preset", "laptop"]),
    "unknown device": (STAGE_1, ["--device", "tpu"], ["--device", "cuda"]),
    "a head in stage 2": (STAGE_2, ["--method", "cosMax"], ["--method", "MatchingNet"]),
    "margin in stage 2": (STAGE_2, ["--ft_m", 0.1], ["--ft_m"]),
    "unknown alignment": (STAGE_3, ["--alignment", "magic"], ["--alignment", "centroid"]),
    "test on base": (STAGE_3, ["--test_split", "base"], ["--test_split", "novel"]),
    "epochs in stage 3": (STAGE_3, ["--n_epoch", 3], ["--n_epoch"]),
    "no benchmark to prepare": (PREPARE, [], ["NAME"]),
    "unknown benchmark to prepare": (PREPARE, ["ImageNet"], ["ImageNet", "miniImagenet"]),
    "no source": (PREPARE, ["CUB"], ["--source"]),
    "fractions that do not add up": (PREPARE, ["folder", "--source", ".", "--split", "0.5,0.5,0.5"], ["--split"]),
    "no pixels": (PREPARE, ["folder", "--source", ".", "--img_size", 0], ["--img_size"]),
    "a flag of another report": (REPORT, ["--dataset", "glyphs"], ["--dataset", "--help"]),
    "a flag of another figure": (FIGURES, ["--dpi", 5], ["--dpi", "--help"]),
}
FILES = {  # what lies on the disk: (script, what is done to the workspace, flags, parts of the line); {} is the folder
    "no val split": (STAGE_1, without_split("val"), [], ["no val split of 'tiny'", "data.prepare"]),
    "a dataset elsewhere": (STAGE_1, nothing, ["--dataset", "../x"], ["'../x'", "one folder"]),
    "a novel dataset elsewhere": (STAGE_3, nothing, ["--novel_dataset", "a/../.."], ["'a/../..'", "one folder"]),
    "a backbone elsewhere": (
        *(STAGE_1, nothing, ["--backbone", "torchvision:../../x", "--checkpoint_dir", "{}/new/models"]),
        ["unknown backbone 'torchvision:../../x'"],
    ),
    "a prepared name elsewhere": (
        *(PREPARE, nothing, ["folder", "--source", "{}/benchmarks/tiny/base", "--name", "../x"]),
        ["'../x'", "one folder"],
    ),
    "no benchmarks": (STAGE_3, nothing, ["--benchmarks_dir", "{}/none"], ["no base split", "none/tiny", "glyphs"]),
    "one base class": (STAGE_1, keep_classes("base", 1), [OVER], ["base split", "1 class", "at least 2"]),
    "one novel class": (STAGE_1, keep_classes("novel", 1), [], ["novel split", "1 classes", "3 ways"]),
    "too few val classes": (STAGE_1, keep_classes("val", 2), [], ["val split", "2 classes", "3 ways"]),
    "too few val images": (
        *(STAGE_1, keep_images("val", 3), ["--strict_classes"]),
        ["class06", "3 images", "= 5 are needed", "--n_query"],
    ),
    "too few images for the shots": (STAGE_3, nothing, ["--n_query", 7, OVER], ["8 images", "= 9 are needed"]),
    "glyphs in a file": (
        *(STAGE_1, write("file", ""), ["--dataset", "glyphs", "--benchmarks_dir", "{}/file"]),
        ["/file", "check this path"],
    ),
    "no class folders": (STAGE_1, files_instead_of_classes, [], ["no class folders", "<class>/<image>"]),
    "NaN image": (STAGE_1, nan_image, [], ["class00", "NaN", "repair it"]),
    "truncated JPEG": (STAGE_1, truncated_jpeg, [], ["class12", "cannot be decoded", "repair it"]),
    "text as an image": (STAGE_1, image_of(b"hello"), [], ["class12", "cannot be decoded"]),
    "empty image": (STAGE_1, image_of(b""), [], ["class12", "cannot be decoded"]),
    "decompression bomb": (STAGE_1, image_of(png_bomb()), [], ["class12", "limit", "repair it"]),
    "a bomb within the limit": (STAGE_1, image_of(png_bomb(9_000)), [], ["class12", "cannot be decoded"]),
    "json that is none": (STAGE_1, json_text("{"), [], ["novel.json", "label_names"]),
    "json list": (STAGE_1, json_text("[]"), [], ["novel.json", "label_names"]),
    "json without labels": (STAGE_1, json_split(image_labels=lambda _: None), [], ["image_labels"]),
    "json with a label too few": (STAGE_1, json_split(image_labels=lambda x: x[1:]), [], ["48 image_names", "47"]),
    "json with a negative label": (STAGE_1, json_split(image_labels=lambda x: [-1, *x[1:]]), [], ["from 0"]),
    "json with a word as label": (STAGE_1, json_split(image_labels=lambda x: ["a", *x[1:]]), [], ["whole numbers"]),
    "json with labels without names": (STAGE_1, json_split(label_names=lambda x: x[:3]), [], ["3 label_names"]),
    "json with a class twice": (STAGE_1, json_split(label_names=lambda x: [x[1], *x[1:]]), [], ["class13", "twice"]),
    "json with an image twice": (STAGE_1, json_split(image_names=lambda x: [x[1], *x[1:]]), [], ["001.png", "twice"]),
    "json with missing files": (
        *(STAGE_1, json_split(image_names=lambda x: [y + "x" for y in x])),
        *([], ["48 images that are missing", "--image_root"]),
    ),
    "json without images": (STAGE_1, json_split(image_names=lambda _: [], image_labels=lambda _: []), [], ["0 image"]),
    "another image root": (STAGE_1, json_split(), ["--image_root", "{}/cache"], ["--image_root", "cache"]),
    "episodes of another way": (
        *(STAGE_1, write("episodes.json", '{"n_way": 5, "n_shot": 1, "n_query": 2, "images": [], "episodes": []}')),
        *(["--episodes_file", "{}/episodes.json", OVER], ["5-way 1-shot", "matching flags"]),
    ),
    "damaged episodes": (
        *(STAGE_3, write("episodes.json", "{"), ["--episodes_file", "{}/episodes.json", OVER]),
        ["episodes.json", "delete it"],
    ),
    "episodes in a file": (
        *(STAGE_3, write("file", ""), ["--episodes_file", "{}/file/episodes.json", OVER]),
        ["file/episodes.json"],
    ),
    "results in a file": (STAGE_1, write("file", ""), ["--results_dir", "{}/file"], ["file/tables", "another folder"]),
    "models in a file": (STAGE_1, write("file", ""), ["--checkpoint_dir", "{}/file"], ["file", "another folder"]),
    "cache in a file": (STAGE_1, write("file", ""), ["--cache_dir", "{}/file/cache"], ["file/cache", "--cache_dir"]),
    "start from a folder": (STAGE_1, nothing, ["--init_from", "{}", OVER], ["no regular file", "--init_from"]),
    "start from a state": (
        *(STAGE_3, nothing, ["--init_from", f"{{}}/results/models/{CHECKPOINT.replace('_bestModel', '_last')}"]),
        ["not a checkpoint", "transferLearning.py"],
    ),
    "start from another backbone": (
        *(STAGE_1, nothing, [OVER, "--init_from", f"{{}}/results/models/{CHECKPOINT}", "--backbone", "ResNet12"]),
        ["backbone Conv4, not ResNet12", "--backbone Conv4"],
    ),
    "weights that do not fit": (
        *(STAGE_3, checkpoint_with(backbone_state={"layers.0.conv.weight": torch.zeros(2)}), []),
        [CHECKPOINT, "do not fit"],
    ),
    "checkpoint of another way": (STAGE_3, nothing, ["--test_n_way", 4], ["4way_2shot", "--test_n_way"]),
    "checkpoint of another head": (STAGE_3, nothing, ["--method", "cosMax"], ["cosMax", "--method"]),
    "checkpoint of other classes": (STAGE_3, checkpoint_with(class_names=["a"]), [], ["trained on 1 base classes"]),
    "novel benchmark missing": (STAGE_3, nothing, ["--novel_dataset", "CUB"], ["'CUB'", "data.prepare CUB"]),
    "diverging alignment": (STAGE_3, nothing, ["--lr", 1e30, "--align_iters", 9], ["episode 0, iteration", "--lr"]),
    "diverging stage 2": (STAGE_2, nothing, ["--lr", 1e30, "--n_epoch", 3], ["epoch", "episode", "--resume"]),
    "another run's result": (
        STAGE_3,
        write(f"results/tables/{STAGE_3}_{CHECKPOINT[:-14]}_centroid.json", "{"),
        [],
        [OVER],
    ),
    "source missing": (PREPARE, nothing, ["CUB", "--source", "{}/none"], ["--source", "none", "does not exist"]),
    "source of no classes": (PREPARE, nothing, ["folder", "--source", "{}/results/tables"], ["no class folders"]),
    "source that is no CUB": (PREPARE, nothing, ["CUB", "--source", "{}/cache"], ["images.txt", "CUB_200_2011"]),
    "source that is no miniImagenet": (
        PREPARE,
        nothing,
        ["miniImagenet", "--source", "{}/cache"],
        ["none of the forms"],
    ),
    "source that is no tieredImageNet": (PREPARE, nothing, ["tieredImageNet", "--source", "{}"], ["train_labels.pkl"]),
    "source that is no archive": (
        *(PREPARE, write("cifar.tar.gz", "x"), ["FC100", "--source", "{}/cifar.tar.gz"]),
        ["cifar.tar.gz", "get it again"],
    ),
    "damaged split file": (
        *(PREPARE, write("split.json", "{"), ["folder", "--source", "{}/benchmarks", "--split_file", "{}/split.json"]),
        ["split.json", "not a JSON"],
    ),
    "a class in two splits": (
        *(PREPARE, write("split.json", '{"base": ["a"], "val": ["a"], "novel": ["b"]}')),
        *(["folder", "--source", "{}/benchmarks", "--split_file", "{}/split.json"], ["'", "a twice"]),
    ),
    "a listed class without folder": (
        *(PREPARE, write("split.json", '{"base": ["a"], "val": ["c"], "novel": ["b"]}')),
        *(["folder", "--source", "{}/benchmarks/tiny/base", "--split_file", "{}/split.json"], ["no images", "'a'"]),
    ),
    "out in a file": (
        *(PREPARE, write("file", ""), ["folder", "--source", "{}/benchmarks/tiny/base"]),
        ["file"],
    ),
    "damaged result": (REPORT, write("results/tables/new.json", "{"), ["{}/results"], ["new.json", "delete it"]),
    "half a result": (REPORT, write("results/tables/new.json", '{"stage": "x"}'), ["{}/results"], ["lacks 'accuracy'"]),
    "a nested result": (REPORT, write("results/tables/new.json", "[" * 10**5), ["{}/results"], ["nested too deeply"]),
    "nested metrics": (FIGURES, write("results/logs/x/metrics.jsonl", "[" * 10**5), ["{}/results"], ["too deeply"]),
    "a newline in a path": (REPORT, nothing, ["{}/a\nb"], ["/a\\nb/tables"]),
    "a result of words": (
        REPORT,
        lambda root: in_result(root, accuracy="high"),
        ["{}/results"],
        ["its 'accuracy' is of another type"],
    ),
    "no results to draw": (FIGURES, nothing, ["{}/none"], ["none/tables", "run a stage"]),
    "damaged metrics": (FIGURES, write("results/logs/x/metrics.jsonl", "{"), ["{}/results"], ["metrics.jsonl"]),
    "figures in a file": (FIGURES, write("results/figures", ""), ["{}/results"], ["figures/training.png", "folder"]),
}


def check(script, root, flags, expected):
    stage = {STAGE_1: TRAIN, STAGE_2: META, STAGE_3: ALIGN}.get(script)
    standard = [*stage, *folders(root)] if stage else []
    flags = [str(flag).replace("{}", str(root)) for flag in flags]
    if script == PREPARE and len(flags) > 1:
        flags += ["--out", root / ("file" if (root / "file").exists() else "prepared") / "out"]
    kept = [path for path in root.rglob("*") if path.is_file() and "cache" not in path.parts and path.suffix != ".lock"]
    before = {path: path.read_bytes() for path in kept}
    outcome = call(script, *standard, *flags)
    assert outcome.status == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for part in expected:
        assert part in outcome.err, (part, outcome.err)
    for path, content in before.items():
        assert path.read_bytes() == content, path
    assert not list(root.rglob("*.tmp"))


@pytest.mark.parametrize("case", FLAGS)
def test_a_wrong_flag_is_one_clear_line(tmp_path, case):
    script, flags, expected = FLAGS[case]
    check(script, tmp_path, flags, expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_is_one_clear_line_and_nothing_is_overwritten(workspace, case):
    script, spoil, flags, expected = FILES[case]
    spoil(workspace)
    check(script, workspace, flags, expected)
