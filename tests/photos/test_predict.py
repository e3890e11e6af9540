"""predict.py end to end on tiny folders: files, numbers, FewShotClassifier, and every user error."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import predict
from data.listing import list_folder
from engine.errors import UserError
from persistence.checkpoints import Checkpoint, create_backbone, save_checkpoint
from photos import fitting, labelling
from photos.classifier_file import load_classifier
from photos.confidence import Confidence
from photos.images import list_support
from photos.table import confidence_lines, confidence_record
from predict import FewShotClassifier
from tests.helpers import call, make_benchmark

N_SUPPORT = {"class12": 1, "class13": 3, "class14": 2}
FAST = {"ft_n_epoch": 20, "align_iters": 2, "aug_size": 4, "n_B": 2}
SUPPORT, QUERY, TABLE = "my_classes", "my_images", "predictions.csv"
WRITTEN = {TABLE, "predictions.json", "predictions.html"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny benchmark, a checkpoint of its base classes, and folders of support and query. Not to be written to."""
    root = tmp_path_factory.mktemp("predict")
    make_benchmark(root / "tiny", n_class=(6, 6, 3))
    for name, k in N_SUPPORT.items():
        images = sorted((root / "tiny" / "novel" / name).iterdir())
        for folder, part in ((SUPPORT, images[:k]), (QUERY, images[-2:])):
            (root / folder / name).mkdir(parents=True)
            for image in part:
                shutil.copy(image, root / folder / name)
    save(root / "model.tar", list_folder(root / "tiny" / "base")[0])
    return root


@pytest.fixture
def root(made, tmp_path):
    """A copy of `made` that a test may spoil."""
    return shutil.copytree(made, tmp_path / "copy")


def save(path, class_names):
    """A checkpoint of a new Conv4 for 16 pixels: its random filters tell the tiny classes' colours apart."""
    state = create_backbone("Conv4", 16, seed=0).state_dict()
    save_checkpoint(
        path,
        Checkpoint("transferLearning", "tiny", "arcMax", "Conv4", 16, class_names, state, {}, 0, 0.0, {}),
    )


def flags(root, **more):
    """The flags of a run in `root`, by name."""
    given = {"support": root / SUPPORT, "query": root / QUERY, "checkpoint": root / "model.tar"}
    return given | {"cache_dir": root / "cache"} | FAST | more


def aligned(root):
    """The flags of alignment in feature space."""
    return {"base": root / "tiny", "alignment": "head"}


def script(root, *extra, out="out", **more):
    """Run predict.py with those flags."""
    given = flags(root, quiet=True, out=root / out, **more)
    argv = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items() if value is not None]
    return call("predict", *argv, *extra)


def predictions(root, **more):
    """What predict.py would write with those flags."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "write_outputs", lambda predictions, *rest: found.append(predictions))
        outcome = script(root, out="not_written", overwrite=True, **more)
    assert outcome.status == 0, outcome.err
    return found[0]


def table(root, out="out"):
    """Header, files, labels and probabilities of a csv."""
    with open(root / out / TABLE, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return header, [r[0] for r in rows], [r[1] for r in rows], torch.tensor([[float(p) for p in r[2:-1]] for r in rows])


@pytest.mark.parametrize(
    "more",
    [
        {"alignment": "head"},
        {"alignment": "adversarial"},
        {"alignment": "naive"},
        {"alignment": "none"},
        {"align_blocks": 1},
    ]
    + [{"align_blocks": 0, "alignment": "head"}, {"alignment": "centroid"}],
    ids=lambda more: "".join(f"{v}" for v in more.values()) or "default",
)
def test_the_files_hold_the_predictions(root, more):
    base = root / "tiny"
    outcome = script(root, base=base, **more)
    assert outcome.status == 0 and outcome.err == "", outcome.err
    header, files, labels, probabilities = table(root)
    assert header == ["file", "label", *N_SUPPORT, "mark"]
    assert files == [f"{name}/{i:03d}.png" for name in N_SUPPORT for i in (6, 7)]
    assert labels == [header[2 + c] for c in probabilities.argmax(1)]
    torch.testing.assert_close(probabilities.sum(1), torch.ones(6), atol=1e-5, rtol=0)

    again = predictions(root, base=base, **more)
    assert (again.files, again.class_names, again.labels) == (files, list(N_SUPPORT), labels)
    torch.testing.assert_close(again.answers.probabilities, probabilities, atol=1e-6, rtol=0)

    record = json.loads((root / "out" / "predictions.json").read_text())
    alignment = more.get("alignment", "centroid" if "align_blocks" in more else "head")
    assert record["alignment"] == record["config"]["alignment"] == alignment
    assert record["seed"] == 0 and record["config"]["ft_n_epoch"] == 20 and "torch" in record["versions"]
    assert [record["classes"][name]["n_support"] for name in N_SUPPORT] == list(N_SUPPORT.values())
    assert sum(row["n_query"] for row in record["classes"].values()) == record["n_query"] == 6
    assert record["accuracy"] == pytest.approx(100 * again.n_right / 6, abs=0.01)
    assert [len(b) for b in record["related_base_classes"].values()] == ([] if alignment == "none" else [2, 2, 2])
    assert (not torch.equal(again.answers.probabilities, again.answers.finetuned)) == (alignment != "none")
    assert f"({again.n_right} of 6)" in outcome.out and "least sure" in outcome.out


def test_without_a_base_set_nothing_is_aligned_nor_written_but_the_output(root):
    before = set(root.rglob("*"))
    outcome = script(root)
    assert outcome.status == 0 and "no alignment: it takes base images" in outcome.out
    written = {"out", *WRITTEN}
    assert {p.name for p in set(root.rglob("*")) - before} == written


def test_torchvision_weights_serve_instead_of_a_checkpoint(root):
    net = torchvision.models.shufflenet_v2_x0_5(weights=None)
    torch.save(net.state_dict(), root / "weights.pth")
    ours = {"checkpoint": None, "backbone": "torchvision:shufflenet_v2_x0_5", "weights": root / "weights.pth"}
    outcome = script(root, **ours, img_size=32, base=root / "tiny", align_blocks=1)
    assert outcome.status == 0, outcome.err
    record = json.loads((root / "out" / "predictions.json").read_text())
    assert (record["backbone"], record["img_size"], record["alignment"]) == (ours["backbone"], 32, "centroid")


def solid(path, colour, size=(20, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_a_copy_of_a_support_image_gets_its_label_and_is_nearest_to_it(root):
    colours = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230)}
    for i, (name, colour) in enumerate(colours.items()):
        for k in range(i + 1):
            solid(root / "colours" / name / f"{k}.png", tuple(c + 3 * k for c in colour))
        solid(root / "copies" / f"{name}.png", colour)
    found = predictions(root, support=root / "colours", query=root / "copies", ft_n_epoch=400, ft_lr=0.01)
    assert found.files == ["blue.png", "green.png", "red.png"] and found.labels == ["blue", "green", "red"]
    # The first of three blue ones, of two green ones, and the red one.
    assert found.answers.nearest.tolist() == [0, 3, 5]


def test_other_names_of_the_class_folders_permute_the_columns(root):
    shutil.copytree(root / SUPPORT, root / "renamed")
    for old, new in (("class12", "z"), ("class14", "a"), ("class13", "m")):
        (root / "renamed" / old).rename(root / "renamed" / new)
    first = predictions(root, ft_n_epoch=400)
    second = predictions(root, support=root / "renamed", ft_n_epoch=400)
    assert second.class_names == ["a", "m", "z"]
    # The head starts from other random numbers, which 400 steps make nearly forget.
    permuted = second.answers.probabilities[:, [2, 1, 0]]
    torch.testing.assert_close(permuted, first.answers.probabilities, atol=0.08, rtol=0)


def test_the_same_flags_give_the_same_numbers_and_no_query_sees_another(root):
    first = predictions(root, **aligned(root), num_workers=0)
    second = predictions(root, **aligned(root), num_workers=3)
    assert torch.equal(first.answers.probabilities, second.answers.probabilities)
    alone = predictions(root, **aligned(root), query=root / QUERY / "class13" / "007.png")
    assert alone.files == ["007.png"] and alone.n_right is None
    torch.testing.assert_close(alone.answers.probabilities[0], first.answers.probabilities[3], atol=1e-5, rtol=0)
    other = predictions(root, **aligned(root), seed=1)
    assert not torch.equal(first.answers.probabilities, other.answers.probabilities)


def test_probabilities_have_the_scale_in_force(root):
    """Without margins arcMax is cosMax, whose scores hold the scale already: before and after alignment."""
    no_margin = aligned(root) | {"ft_m": 0, "align_m": 0, "ft_s": 7, "align_s": 12}
    arc, cos = (predictions(root, method=method, **no_margin) for method in ("arcMax", "cosMax"))
    torch.testing.assert_close(arc.answers.probabilities, cos.answers.probabilities, atol=0.01, rtol=0)
    torch.testing.assert_close(arc.answers.finetuned, cos.answers.finetuned, atol=1e-3, rtol=0)


def test_other_files_are_ignored_and_said_so(root):
    for name in (".DS_Store", ".hidden.png", "Thumbs.db"):
        (root / QUERY / name).write_bytes(b"x")
        (root / SUPPORT / "class12" / name).write_bytes(b"x")
    (root / QUERY / ".thumbnails").mkdir()
    (root / QUERY / ".thumbnails" / "a.png").write_bytes(b"x")
    plain = predictions(root)
    assert len(plain.files) == 6 and not [note for note in plain.notes if "besides" in note]
    (root / QUERY / "deep" / "er").mkdir(parents=True)
    shutil.copy(root / QUERY / "class12" / "006.png", root / QUERY / "deep" / "er" / "x.PNG")
    (root / QUERY / "notes.txt").write_text("x")
    (root / SUPPORT / "class13" / "phone.HEIC").write_bytes(b"x")
    outcome = script(root)
    assert outcome.status == 0, outcome.err
    assert "6 images were read besides 1 .heic" in outcome.out and "7 images were read besides 1 .txt" in outcome.out
    assert "deep/er/x.PNG" in table(root)[1]
    assert "no accuracy: only 6 of 7" in outcome.out


def test_one_image_in_two_classes_and_a_query_that_is_an_example_are_named(root):
    outcome = script(root)
    assert outcome.status == 0 and "one image in two classes" not in outcome.out and "are examples" not in outcome.out
    shutil.copy(root / SUPPORT / "class13" / "001.png", root / SUPPORT / "class14" / "twice.png")
    shutil.copy(root / SUPPORT / "class12" / "000.png", root / QUERY / "known.png")
    outcome = script(root, overwrite=True, save=root / "kept", query=None)
    assert "one image in two classes" in outcome.out and "class13/001.png is class14/twice.png" in outcome.out
    for more in ({}, {"support": None, "checkpoint": None, "classifier": root / "kept"} | dict.fromkeys(FAST)):
        outcome = script(root, overwrite=True, **more)
        assert (
            "note: images that are examples, and tell nothing of others: 1, known.png is class12/000.png\n"
            in outcome.out
        )


def test_review_lists_wrong_labels_in_the_table_and_of_a_kept_classifier(root):
    for name in ("class12", "class14"):  # five each, all told apart
        for image in sorted((root / "tiny" / "novel" / name).iterdir())[:5]:
            shutil.copy(image, root / SUPPORT / name)
    shutil.rmtree(root / SUPPORT / "class13")
    (root / SUPPORT / "class12" / "003.png").rename(root / SUPPORT / "class14" / "wrong.png")
    outcome = script(root, review=True, save=root / "kept", ft_n_epoch=200)
    assert outcome.status == 0, outcome.err
    line = next(line for line in outcome.out.splitlines() if "class14/wrong.png of class14: class12 " in line)
    with open(root / "out" / TABLE, encoding="utf-8", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    row = rows["class14/wrong.png"]
    assert (row["label"], row["mark"]) == ("class12", "example of class14")
    assert float(row["class12"]) == pytest.approx(float(line.split()[-1]), abs=0.006) and float(row["class12"]) > 0.5
    again = {"support": None, "checkpoint": None, "classifier": root / "kept"} | dict.fromkeys(FAST)
    assert line in script(root, review=True, out="again", **again).out
    outcome = script(
        root, out="plain", query=None, save=root / "other", review=True, alignment="naive", base=root / "tiny"
    )
    assert "nothing to review: leave-one-out tested no example" in outcome.out


def test_skip_bad_leaves_out_queries_and_says_which(root):
    (root / QUERY / "class12" / "bad.jpg").write_bytes(b"not an image")
    outcome = script(root, skip_bad=True)
    assert outcome.status == 0, outcome.err
    assert "skipped" in outcome.out and "bad.jpg" in outcome.out
    assert len(table(root)[1]) == 6
    torch.testing.assert_close(
        table(root)[3], predictions(root, skip_bad=True).answers.probabilities, atol=1e-6, rtol=0
    )


def test_overwrite_replaces(root):
    assert script(root, alignment="none").status == 0
    outcome = script(root, alignment="none", overwrite=True, query=root / "tiny" / "val" / "class06")
    assert outcome.status == 0, outcome.err
    assert "lies in a folder" not in outcome.out and len(table(root)[1]) == 8


def test_names_of_any_kind_survive(root):
    name = 'kümmel, "猫" ' + "long " * 30
    (root / SUPPORT / "class12").rename(root / SUPPORT / name.strip())
    (root / QUERY / "class12").rename(root / QUERY / "line\nbreak")
    assert script(root).status == 0
    header, files, *_ = table(root)
    assert name.strip() in header and "line\nbreak/006.png" in files


def test_a_classifier_reads_images_as_its_examples_were_read(root):
    path = root / QUERY / "class12" / "cut.png"
    Image.new("RGBA", (20, 20), (10, 20, 30, 0)).save(path)
    Image.fromarray(np.full((20, 20), 1000, np.uint16)).save(root / SUPPORT / "class12" / "deep.png")
    black = script(root, out="black", background="#000000", save=root / "my.classifier")
    assert black.status == 0 and "note: 1023 is white in greys of more than 8 bits" in black.out, black.err
    assert (
        script(root, out="white").status == 0 and table(root, "white")[3].tolist() != table(root, "black")[3].tolist()
    )
    kept = {"support": None, "checkpoint": None, "classifier": root / "my.classifier", "cache_dir": None}
    assert script(root, out="kept", **kept, **dict.fromkeys(FAST)).status == 0
    assert table(root, "kept")[3].tolist() == table(root, "black")[3].tolist()


@pytest.mark.parametrize("size", [(1, 200), (300, 2), (1000, 4)])
def test_a_line_of_pixels_is_labelled(root, size):
    Image.new("RGB", size, (180, 180, 180)).save(root / QUERY / "line.png")
    for rule in ("published", "short:20"):
        outcome = script(root, eval_resize=rule, overwrite=True)
        assert outcome.status == 0, outcome.err
        assert "line.png" in table(root)[1] and "line.png" in (root / "out" / "predictions.html").read_text()


@pytest.mark.parametrize("n, given, scale", [(5, None, 10.0), (4, None, 5.0), (5, 7.0, 7.0)])
def test_five_examples_of_every_class_are_fitted_at_a_larger_scale(root, n, given, scale):
    images = [Image.new("RGB", (20, 20), (9 * i, 9 * i, 40 * (i > 5))) for i in range(n + 6)]
    flags = FLAGS | ({"ft_s": given} if given else {})
    classifier = FewShotClassifier(root / "model.tar", **flags).fit(images, [0] * n + [1] * 6)
    assert classifier.fitted_.classifier.finetuned.s == scale


def test_other_names_of_the_classes_change_no_answer(root):
    first = predictions(root)
    for old, new in (("class12", "z"), ("class13", "a"), ("class14", "m")):
        for folder in (SUPPORT, QUERY):
            (root / folder / old).rename(root / folder / new)
    again = predictions(root)
    assert again.class_names == ["a", "m", "z"]
    place = [
        again.files.index(name.replace("class12", "z").replace("class13", "a").replace("class14", "m"))
        for name in first.files
    ]
    renamed = again.answers.probabilities[place][:, [2, 0, 1]]
    torch.testing.assert_close(renamed, first.answers.probabilities, atol=1e-4, rtol=0)


def test_a_classifier_of_an_older_version_keeps_its_confidence(root):
    path = root / "my.classifier"
    assert script(root, query=None, save=path).status == 0
    content = torch.load(path, weights_only=True)
    content["confidence"] = {"n": 5, "n_right": 4, "n_folds": 3, "temperature": 0.5}
    torch.save(content, path)
    classifier = load_classifier(path, None, torch.device("cpu")).classifier
    assert (classifier.confidence.n, classifier.confidence.accuracy, classifier.temperature) == (5, 0.8, 0.5)
    assert "4 of 5 examples, left out in turn" in "".join(confidence_lines(classifier))


def truncate(folder, file):
    def spoil(root):
        path = root / folder / file
        path.write_bytes(path.read_bytes()[:100])

    return spoil


def spoil_checkpoint(root):
    (root / "model.tar").write_bytes(b"not a checkpoint")


def nan_checkpoint(root):
    content = torch.load(root / "model.tar", weights_only=True)
    content["backbone_state"]["layers.2.bn.bias"][3] = torch.nan
    torch.save(content, root / "model.tar")


def nan_weights(root):
    state = torchvision.models.shufflenet_v2_x0_5().state_dict()
    torch.save({name: value / 0 if name == "conv5.1.bias" else value for name, value in state.items()}, root / "w.pth")


def all_queries_bad(root):
    for path in (root / QUERY).rglob("*.png"):
        path.write_bytes(b"x")


def earlier_predictions(root):
    (root / "out").mkdir()
    (root / "out" / TABLE).write_text("kept")


def nothing(root):
    pass


def few_base_classes(root):
    shutil.copytree(root / "tiny" / "base" / "class00", root / "few" / "class00")


def name_a_class_unsure(root):
    (root / SUPPORT / "class12").rename(root / SUPPORT / "unsure")


NO_CHECKPOINT = {"checkpoint": None}
USER_ERRORS = {
    "neither support nor classifier": (nothing, {"support": None}, ["--support", "--classifier"]),
    "neither query nor save": (nothing, {"query": None}, ["--query", "--save"]),
    "save is there": (nothing, {"save": "model.tar"}, ["model.tar is there already", "--overwrite"]),
    "save cannot be written": (nothing, {"save": "/dev/null/x"}, ["/dev/null", "check this path"]),
    "base of too few classes": (few_base_classes, {"base": "few"}, ["fewer than the 3", "larger base set"]),
    "copies among the images": (nothing, {"copy_to": f"{QUERY}/sorted"}, ["--copy_to", "images that are read"]),
    "copies over files": (nothing, {"copy_to": "tiny"}, ["tiny is there already", "nothing is overwritten"]),
    "copies of nothing": (nothing, {"query": None, "save": "x", "copy_to": "y"}, ["--copy_to", "--query"]),
    "a share above 1": (nothing, {"reject": 1.5}, ["--reject", "at most 1"]),
    "a class is named unsure": (name_a_class_unsure, {"reject": 0.5}, ["--reject", "'unsure'"]),
    "an order of none": (nothing, {"sort": "size"}, ["--sort", "invalid choice"]),
    "review of something": (nothing, {"review": "yes"}, ["--review", "explicit argument 'yes'"]),
    "resume and overwrite": (nothing, {"resume": True, "overwrite": True}, ["not allowed with"]),
    "auto without base": (nothing, {"alignment": "auto"}, ["auto", "--base"]),
    "auto of blocks": (nothing, {"alignment": "auto", "align_blocks": 1, "base": "tiny"}, ["auto", "--align_blocks 0"]),
    "auto of another script": (nothing, {"align_preset": "auto", "base": "tiny"}, ["--alignment auto chooses"]),
    "no support folder": (nothing, {"support": "absent"}, ["absent", "one subfolder per class"]),
    "no query": (nothing, {"query": "absent"}, ["absent", "folder of images or one image"]),
    "truncated query": (truncate(QUERY, "class12/006.png"), {}, ["006.png", "cannot be decoded"]),
    "truncated support": (
        truncate(SUPPORT, "class12/000.png"),
        {"skip_bad": True},
        ["000.png", "cannot be decoded"],
    ),
    "all queries bad": (all_queries_bad, {"skip_bad": True}, ["no image can be decoded", "006.png"]),
    "no backbone": (nothing, NO_CHECKPOINT, ["--checkpoint", "make demo", "import_checkpoint", "torchvision:resnet18"]),
    "random backbone": (nothing, NO_CHECKPOINT | {"backbone": "torchvision:resnet18"}, ["no trained backbone"]),
    "weights without a model": (nothing, NO_CHECKPOINT | {"weights": "w.pth"}, ["--backbone torchvision:"]),
    "weights of a checkpoint": (nothing, {"weights": "w.pth"}, ["--checkpoint brings its own"]),
    "missing weights": (
        nothing,
        NO_CHECKPOINT | {"backbone": "torchvision:shufflenet_v2_x0_5", "weights": "w.pth"},
        ["w.pth", "cannot be read"],
    ),
    "no such checkpoint": (nothing, {"checkpoint": "absent.tar"}, ["absent.tar", "make demo"]),
    "damaged checkpoint": (spoil_checkpoint, {}, ["model.tar", "not a checkpoint"]),
    "NaN in a checkpoint": (nan_checkpoint, {}, ["model.tar are not finite", "layers.2.bn.bias", "give another"]),
    "NaN in weights": (
        nan_weights,
        NO_CHECKPOINT | {"backbone": "torchvision:shufflenet_v2_x0_5", "weights": "w.pth"},
        ["w.pth are not finite", "give another"],
    ),
    "a background that is none": (nothing, {"background": "blue"}, ["--background", "'blue'", "#rrggbb"]),
    "other backbone": (nothing, {"backbone": "ResNet12"}, ["backbone Conv4, not ResNet12"]),
    "no such base": (nothing, {"base": "absent"}, ["--base", "absent", "<class>/<image>"]),
    "alignment without base": (nothing, {"alignment": "centroid"}, ["centroid", "--base"]),
    "too many blocks": (nothing, {"base": "tiny", "align_blocks": 5}, ["--align_blocks 5", "4 blocks"]),
    "out cannot be written": (nothing, {"out": "/dev/null/x"}, ["/dev/null/x", "check this path"]),
    "earlier predictions": (earlier_predictions, {}, ["predictions already", "--overwrite"]),
}
PATHS = ("support", "query", "checkpoint", "base", "weights", "out", "save", "copy_to")


@pytest.mark.parametrize("case", USER_ERRORS)
def test_a_user_error_is_one_clear_line_and_overwrites_nothing(root, case):
    spoil, more, expected = USER_ERRORS[case]
    spoil(root)
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    more = {name: root / value if name in PATHS and value else value for name, value in more.items()}
    given = flags(root, quiet=True, **{"out": root / "out", **more})
    argv = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items() if value is not None]
    outcome = call("predict", *argv)
    assert outcome.status == 2 and outcome.out == "", outcome.err
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for part in expected:
        assert part in outcome.err
    after = {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and "cache" not in p.parts}
    assert after == before


# A classifier to keep.


def kept(root, **more):
    """A classifier of `root` in a file."""
    given = {"query": None, "save": root / "my.classifier"} | more
    outcome = script(root, **given)
    assert outcome.status == 0, outcome.err
    return outcome


def labelled(root, *extra, **more):
    """predict.py with the kept classifier."""
    given = {
        "classifier": root / "my.classifier",
        "query": root / QUERY,
        "out": root / "labelled",
        "quiet": True,
    } | more
    argv = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    return call("predict", *argv, *extra)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"alignment": "centroid"},
        {"alignment": "none"},
        {"method": "softMax"},
        {"method": "cosMax"},
    ],
    ids=lambda more: "".join(f"{v}" for v in more.values()) or "head",
)
def test_a_kept_classifier_labels_alike_without_support_and_base(root, more):
    more = aligned(root) | more
    expected = predictions(root, **more)
    outcome = kept(root, **more)
    assert "6 examples of 3 classes" in outcome.out and "my.classifier, " in outcome.out
    for gone in (SUPPORT, "tiny", "cache", "model.tar"):
        if (root / gone).exists():
            (root / gone).rename(root / f"gone_{gone}")
    outcome = labelled(root)
    assert outcome.status == 0 and outcome.err == "", outcome.err
    assert {path.name for path in (root / "labelled").iterdir()} == WRITTEN
    _, files, names, probabilities = table(root, "labelled")
    assert (files, names) == (expected.files, expected.labels)
    torch.testing.assert_close(probabilities, expected.answers.probabilities, atol=2e-6, rtol=0)
    record = json.loads((root / "labelled" / "predictions.json").read_text())
    assert record["confidence"] == confidence_record(expected.fitted.classifier)


def test_leave_one_out_is_in_summary_and_record(root):
    outcome = script(root, **aligned(root))
    record = json.loads((root / "out" / "predictions.json").read_text())["confidence"]
    assert f"{record['n_right']} of 5 examples, left out in turn" in outcome.out
    assert "every class counts alike" in outcome.out and "not tested, with one example: class12\n" in outcome.out
    assert "chance is 33 %, the largest class has 50 % of the examples" in outcome.out
    assert {name: row["n"] for name, row in record["classes"].items()} == {"class13": 3, "class14": 2}
    for name, row in record["classes"].items():
        assert f"{name} {row['n_right']} of {row['n']}" in outcome.out
    assert (record["chance"], record["majority"]) == (33.333, 50.0)
    assert record["low"] < record["accuracy"] <= record["high"] and record["temperature"] > 0
    one_each = [root / SUPPORT / name / f"00{i}.png" for name, n in N_SUPPORT.items() for i in range(1, n)]
    for path in one_each:
        path.unlink()
    outcome = script(root, out="one")
    assert "accuracy not known, probabilities not calibrated: no class has 2 examples" in outcome.out
    assert json.loads((root / "one" / "predictions.json").read_text())["confidence"] is None


@pytest.mark.parametrize("right, is_better", [([3, 2, 1], False), ([8, 7, 7], True)])
def test_an_accuracy_about_chance_says_what_to_do(root, right, is_better):
    fitted = predictions(root).fitted.classifier
    classifier = replace(fitted, confidence=Confidence([8, 8, 8], right, 8, 1.0))
    assert ("not clearly better than chance: give more" in " ".join(confidence_lines(classifier))) != is_better


def test_below_the_least_probability_an_image_is_unsure(root):
    p = predictions(root).answers.probabilities.max(1).values
    least = round(p.sort().values[2:4].mean().item(), 4)
    outcome = script(root, reject=least)
    assert outcome.status == 0 and f"unsure: {(p < least).sum()} images" in outcome.out
    assert [label == "unsure" for label in table(root)[2]] == (p < least).tolist()
    record = json.loads((root / "out" / "predictions.json").read_text())
    assert record["n_unsure"] == (p < least).sum()
    assert sum(row["n_query"] for row in record["classes"].values()) == 6 - record["n_unsure"]


@pytest.mark.parametrize("least, n_unlike", [(-1.0, 0), (1.1, 6)])
def test_an_image_unlike_every_class_is_marked(root, least, n_unlike):
    kept(root)
    change(least_cosine=least)(root)
    outcome = labelled(root)
    record = json.loads((root / "labelled" / "predictions.json").read_text())
    assert record["n_unlike"] == n_unlike and ("images unlike every class: 6, marked" in outcome.out) == (n_unlike == 6)
    text = (root / "labelled" / TABLE).read_text()
    assert text.count(",unlike") == n_unlike


def test_the_least_sure_come_first_when_asked(root):
    assert script(root, sort="sure").status == 0
    p = table(root)[3].max(1).values
    assert p.tolist() == sorted(p.tolist()) and sorted(table(root)[1]) == predictions(root).files


def test_copies_are_sorted_into_a_folder_a_label(root):
    before = {p: p.read_bytes() for p in (root / QUERY).rglob("*") if p.is_file()}
    assert script(root, copy_to=root / "sorted").status == 0
    _, files, names, _ = table(root)
    found = {p.relative_to(root / "sorted").as_posix() for p in (root / "sorted").rglob("*") if p.is_file()}
    assert found == {f"{label}/{file}" for label, file in zip(names, files, strict=True)}
    assert {p: p.read_bytes() for p in (root / QUERY).rglob("*") if p.is_file()} == before


def test_a_stopped_run_goes_on_and_gives_the_same(root, monkeypatch):
    monkeypatch.setattr(labelling, "PART", 2)
    assert script(root, out="whole").status == 0
    classify, made, stop = labelling.classify, [], [True]

    def stopped_in_the_third_part(classifier, views, run):
        if len(made) == 2 and stop:
            raise KeyboardInterrupt
        made.append(len(views))
        return classify(classifier, views, run)

    monkeypatch.setattr(labelling, "classify", stopped_in_the_third_part)
    outcome = script(root)
    assert outcome.status == 130 and "--resume" in outcome.err and not (root / "out" / TABLE).exists()
    outcome = script(root)
    assert outcome.status == 2 and "were stopped: give --resume to go on" in outcome.err

    stop.clear()
    made.clear()
    assert script(root, resume=True).status == 0
    assert made == [2] and (root / "out" / TABLE).read_text() == (root / "whole" / TABLE).read_text()
    assert {p.name for p in (root / "out").iterdir()} == WRITTEN


def test_what_another_classifier_left_is_not_taken(root, monkeypatch):
    assert script(root, out="other", ft_s=7).status == 0
    with monkeypatch.context() as patch:
        patch.setattr(predict, "write_outputs", lambda *_: None)
        assert script(root).status == 0
    assert list((root / "out" / "predictions.parts").iterdir())
    assert script(root, resume=True, ft_s=7).status == 0
    assert table(root)[3].tolist() == table(root, "other")[3].tolist()


def test_resume_replaces_neither_finished_predictions_nor_a_classifier(root):
    path = root / "my.classifier"
    assert script(root, save=path).status == 0
    before = {file: file.read_bytes() for file in (path, *(root / "out").iterdir())}
    outcome = script(root, resume=True)
    assert outcome.status == 2 and "holds predictions already" in outcome.err, outcome.err
    outcome = script(root, resume=True, save=path, out="other")
    assert outcome.status == 2 and f"{path} is there already" in outcome.err, outcome.err
    assert {file: file.read_bytes() for file in before} == before


# Any folder as base.


def test_base_classes_that_the_user_has_are_left_out_with_a_note(root):
    shutil.copytree(root / "tiny" / "base", root / "folder")
    shutil.copytree(root / SUPPORT / "class12", root / "folder" / "class12")
    shutil.copy(root / QUERY / "class13" / "006.png", root / "folder" / "class03" / "x.png")
    found = predictions(root, base=root / "folder")
    assert "base class 'class12' is a class of the support: it is left out" in found.notes
    assert "base class 'class03' holds 1 of the support and query images: it is left out" in found.notes
    assert not {"class12", "class03"} & {b for classes in found.fitted.related.values() for b in classes}
    before = {p: p.stat().st_mtime_ns for p in (root / "cache").rglob("*")}
    predictions(root, base=root / "folder")
    assert {p: p.stat().st_mtime_ns for p in (root / "cache").rglob("*")} == before


def test_large_base_features_are_mapped_in_half_precision(root, monkeypatch):
    whole = predictions(root, **aligned(root))
    monkeypatch.setattr(fitting, "MAPPED", 10)
    mapped = predictions(root, **aligned(root))
    assert list((root / "cache").glob("half*_tiny_base_*.npy"))
    torch.testing.assert_close(mapped.answers.probabilities, whole.answers.probabilities, atol=0.02, rtol=0)


def test_auto_is_the_default_with_a_base_set_and_says_what_it_chose(root, monkeypatch):
    monkeypatch.setattr("photos.choosing.N_EPISODES", 3)
    outcome = script(root, base=root / "tiny", save=root / "kept")
    found = re.search(r"auto chose (.*): (\d+) right aligned, (\d+) fine-tuned, of 63 images of 6 val", outcome.out)
    assert found and outcome.status == 0, outcome.err
    assert found[1] == "fine-tuning" or (found[1] == "alignment" and int(found[2]) > int(found[3]))
    record = json.loads((root / "out" / "predictions.json").read_text())
    assert record["alignment"] == ("head" if found[1] == "alignment" else "none")
    assert record["config"]["alignment"] == record["setting"]["alignment"] == "auto"
    shutil.rmtree(root / "tiny" / "val")  # the classes of the base set are those of the checkpoint
    assert "auto chose fine-tuning: a class has one example" in script(root, base=root / "tiny", out="other").out
    save(root / "model.tar", ["another"])
    assert "of 3 base classes new to the backbone" in script(root, base=root / "tiny", out="new").out
    for name in N_SUPPORT:
        shutil.copy(root / QUERY / name / "007.png", root / SUPPORT / name)
    assert "of 9 examples, left out in turn" in script(root, base=root / "tiny", out="two").out
    grown = {"support": None, "checkpoint": None, "query": None, "classifier": root / "kept", "save": root / "grown"}
    outcome = script(root, add=root / SUPPORT, **grown, **dict.fromkeys(FAST))
    assert "of 9 examples, left out in turn" in outcome.out, outcome.err  # it chooses again


# FewShotClassifier.


def in_memory(root):
    """The support as an array, an image of PIL and paths, and its labels."""
    _, paths, labels = list_support(root / SUPPORT)
    images = [np.asarray(Image.open(paths[0])), Image.open(paths[1]), *map(str, paths[2:])]
    return images, [10 * (label + 1) for label in labels], paths


FLAGS = {"ft_n_epoch": 20}


def test_the_classifier_in_python_is_predict(root):
    images, labels, _ = in_memory(root)
    made = FewShotClassifier(root / "model.tar", **FLAGS).fit(images, labels)
    expected = predictions(root)
    queries = [str(path) for path in expected.paths]
    assert made.classes_.tolist() == [10, 20, 30]
    np.testing.assert_allclose(made.predict_proba(queries), expected.answers.probabilities, atol=1e-6)
    truth = [made.classes_[c] for c in expected.truth]
    assert made.score(queries, truth) == pytest.approx(expected.n_right / 6)
    assert made.confidence_.n == 5
    made.save(root / "kept.classifier")
    again = FewShotClassifier.load(root / "kept.classifier")
    assert again.predict(queries).tolist() == made.predict(queries).tolist() and again.classes_.tolist() == [10, 20, 30]
    np.testing.assert_array_equal(again.predict_proba(queries), made.predict_proba(queries))


def test_a_name_is_a_backbone_and_a_path_with_a_colon_a_checkpoint():
    for path in (r"C:\models\best.tar", "runs/12:30/best.tar", Path("timm:best.tar/best.tar")):
        found = FewShotClassifier(path).read_flags()[0]
        assert (found.checkpoint, found.backbone) == (Path(path), None)
    found = FewShotClassifier("torchvision:resnet18", weights="DEFAULT").read_flags()[0]
    assert (found.checkpoint, found.backbone) == (None, "torchvision:resnet18")


def test_scikit_learn_clones_and_cross_validates(root):
    base = pytest.importorskip("sklearn.base")
    from sklearn.model_selection import cross_val_score

    made = FewShotClassifier(str(root / "model.tar"), **FLAGS)
    other = base.clone(made).set_params(ft_s=7.0)
    assert other.get_params() == {"backbone": str(root / "model.tar"), "base": None, **FLAGS, "ft_s": 7.0}
    assert made.get_params()["ft_n_epoch"] == 20 and base.is_classifier(made)
    folders = sorted((root / "tiny" / "novel").iterdir())
    images = [np.asarray(Image.open(p)) for folder in folders for p in sorted(folder.iterdir())[:4]]
    scores = cross_val_score(made, np.stack(images), np.repeat(["a", "b", "c"], 4), cv=2)
    assert scores.shape == (2,) and scores.mean() > 0.5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda c, x, y: c.fit(x, y[:-1]), "6 images and 5 labels"),
        (lambda c, x, y: c.fit(x[:1], y[:1]), "of 1 class"),
        (lambda c, x, y: c.predict(x), "not fitted"),
        (lambda c, x, y: c.save("x"), "not fitted"),
        (lambda c, x, y: c.fit(x, y).predict([]), "no image can be decoded"),
        (lambda c, x, y: c.fit([3, *x[1:]], y), "a int is no image"),
        (lambda c, x, y: c.fit([np.zeros((4, 4)), *x[1:]], y), "a float64 array"),
        (lambda c, x, y: c.fit(["absent.png", *x[1:]], y), "absent.png cannot be decoded"),
        (lambda c, x, y: c.set_params(nonsense=1).fit(x, y), "^nonsense"),
        (lambda c, x, y: c.set_params(align_iters=-1).fit(x, y), "argument align_iters"),
        (lambda c, x, y: c.set_params(alignment="centroid").fit(x, y), "with base"),
        (lambda c, x, y: c.set_params(backbone=None).fit(x, y), "no trained backbone"),
        (lambda c, x, y: c.set_params(backbone="torchvision:").fit(x, y), "no checkpoint torchvision:"),
        (lambda c, x, y: c.load("absent.classifier"), "no classifier absent.classifier"),
    ],
)
def test_what_is_wrong_in_python_is_one_line(made, call, message):
    images, labels, _ = in_memory(made)
    with pytest.raises(UserError, match=message) as error:
        call(FewShotClassifier(made / "model.tar", **FLAGS), images, labels)
    assert "\n" not in str(error.value)


# Bad inputs of a kept classifier.


def change(**content):
    """Change the content of the kept file."""

    def spoil(root):
        saved = torch.load(root / "my.classifier", weights_only=True)
        for name, value in content.items():
            saved[name] = value(saved[name]) if callable(value) else value
        torch.save(saved, root / "my.classifier")

    return spoil


def not_a_file_of_torch(root):
    (root / "my.classifier").write_bytes(b"nothing")


def half_a_file(root):
    path = root / "my.classifier"
    path.write_bytes(path.read_bytes()[:5000])


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def hostile(root):
    torch.save({"format": "associative-alignment/classifier/1", "facts": Hostile()}, root / "my.classifier")


BAD_CLASSIFIERS = {
    "missing": (lambda root: (root / "my.classifier").unlink(), "no classifier"),
    "no file of torch": (not_a_file_of_torch, "is not a classifier"),
    "half a file": (half_a_file, "is not a classifier"),
    "hostile": (hostile, "is not a classifier"),
    "a checkpoint": (lambda root: shutil.copy(root / "model.tar", root / "my.classifier"), "no format"),
    "no head": (change(head=None), "is not a classifier"),
    "an adapter": (change(adapter={"V": torch.zeros(2, 2)}), "a feature adapter"),
    "own code": (change(facts=lambda f: f | {"backbone": "custom:os:getcwd"}), "code that would be run"),
    "unknown backbone": (change(facts=lambda f: f | {"backbone": "Conv5"}), "unknown backbone"),
    "no normalisation": (change(normalisation=[[0.5], [0.0]]), "are not 3 numbers each"),
    "other weights": (change(head=lambda h: h | {"state": {"weight": torch.zeros(2, 2)}}), "do not fit"),
}


@pytest.mark.parametrize("case", BAD_CLASSIFIERS)
def test_a_bad_classifier_is_one_line(root, case):
    spoil, message = BAD_CLASSIFIERS[case]
    kept(root)
    spoil(root)
    outcome = labelled(root)
    assert outcome.status == 2 and outcome.out == "" and outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("error: ") and message in outcome.err
    assert not list((root / "labelled").iterdir())


@pytest.mark.parametrize(
    "flag", ["--support=s", "--base=b", "--save=x", "--checkpoint=c", "--ft_s=3", "--alignment=none"]
)
def test_a_kept_classifier_goes_without_what_it_was_made_with(root, flag):
    kept(root)
    outcome = labelled(root, flag)
    assert outcome.status == 2 and f"it was made with its own {flag.split('=')[0]}" in outcome.err


def test_a_hostile_class_name_is_no_folder_of_copies(root):
    kept(root)
    change(class_names=["../../a", "b", "c"])(root)
    outcome = labelled(root, copy_to=root / "sorted")
    assert outcome.status == 2 and "is not the name of one folder" in outcome.err and not (root / "sorted").exists()


# A classifier that grows.


@pytest.mark.parametrize("more", [{}, {"base": True}], ids=["fine-tuned", "aligned"])
def test_a_classifier_grows_to_what_all_examples_would_make(root, more):
    more = {name: root / "tiny" for name in more}
    expected = predictions(root, **more)
    for name in ("class13/002.png", "class14/000.png", "class14/001.png"):
        (root / "more" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / SUPPORT / name).rename(root / "more" / name)
    (root / SUPPORT / "class14").rmdir()
    kept(root, **more)
    shutil.rmtree(root / SUPPORT)
    (root / "model.tar").unlink()
    grown = {"cache_dir": root / "cache", "add": root / "more", "save": root / "larger.classifier"}
    outcome = labelled(root, **grown)
    assert outcome.status == 0 and "6 examples of 3 classes" in outcome.out, outcome.err
    header, files, labels, probabilities = table(root, "labelled")
    assert header[2:-1] == list(N_SUPPORT) and files == expected.files
    torch.testing.assert_close(probabilities, expected.answers.probabilities, atol=1e-4, rtol=0)
    kept_again = (root / "labelled" / TABLE).read_text()
    assert labelled(root, overwrite=True, classifier=root / "larger.classifier").status == 0
    assert (root / "labelled" / TABLE).read_text() == kept_again
    outcome = labelled(root, overwrite=True, **grown | {"classifier": root / "larger.classifier", "save": root / "x"})
    assert "6 examples of 3 classes" in outcome.out  # the same examples take the place of themselves


def test_growth_replaces_the_same_images_and_not_others_of_their_names(root):
    kept(root)
    for name, image in (("class12/000.png", "class12/006.png"), ("class13/000.png", "class13/007.png")):
        (root / "more" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / QUERY / image, root / "more" / name)
    shutil.copy(root / SUPPORT / "class14" / "001.png", root / "more" / "class13" / "moved.png")  # to another class
    outcome = labelled(root, add=root / "more", save=root / "larger.classifier")
    assert outcome.status == 0 and "one image in two classes" not in outcome.out, outcome.err
    classifier = load_classifier(root / "larger.classifier", None, torch.device("cpu")).classifier
    assert dict(zip(classifier.class_names, classifier.n_support, strict=True)) == {
        "class12": 2,
        "class13": 5,
        "class14": 1,
    }


def test_examples_of_nested_folders_are_named_by_their_classes(root):
    for name in ("class12", "class13"):
        (root / SUPPORT / name / "2023").mkdir()
        shutil.copy(root / QUERY / name / "007.png", root / SUPPORT / name / "2023" / "1.png")
    kept(root)
    examples = load_classifier(root / "my.classifier", None, torch.device("cpu")).classifier.examples
    assert len(set(examples)) == 8 and {"class12/1.png", "class13/1.png"} < set(examples)


def test_corrections_of_the_page_and_of_the_table_become_examples(root):
    kept(root)
    assert labelled(root).status == 0
    with open(root / "labelled" / TABLE, newline="") as file:
        header, *rows = csv.reader(file)
    rows[0][1] = "class14" if rows[0][1] != "class14" else "class13"
    rows[5][1] = "a new, class"
    changed = {rows[0][0]: rows[0][1], rows[5][0]: rows[5][1]}
    with open(root / "table.csv", "w", encoding="utf-8-sig", newline="") as file:  # as a spreadsheet saves it
        csv.writer(file).writerows([header, *rows])
    with open(root / "page.csv", "w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["file", "label"], *changed.items()])
    found = []
    for form in ("table", "page"):
        outcome = labelled(root, out=root / form, correct=root / f"{form}.csv", save=root / f"{form}.classifier")
        assert outcome.status == 0 and "8 examples of 4 classes" in outcome.out, outcome.err
        found.append((root / form / TABLE).read_text())
        assert f"tell nothing of others: 2, {rows[0][0]}, {rows[5][0]}\n" in outcome.out
    assert found[0] == found[1]
    _, files, labels, _ = table(root, "page")
    assert labels[files.index(rows[5][0])] == "a new, class"
    classifier = FewShotClassifier.load(root / "page.classifier").fitted_.classifier
    assert set(changed) < set(classifier.examples) and len(classifier.examples) == 8


def not_a_table(root):
    (root / "bad.csv").write_text("a,b\n1,2\n")


def nothing_changed(root):
    assert labelled(root, out=root / "before").status == 0
    shutil.copy(root / "before" / TABLE, root / "bad.csv")


def corrects_what_is_not_there(root):
    (root / "bad.csv").write_text("file,label\nabsent.png,class12\n")


def of_an_earlier_version(root):
    content = torch.load(root / "my.classifier", weights_only=True)
    del content["facts"]["setting"]
    torch.save(content, root / "my.classifier")


def of_aligned_blocks(root):
    kept(root, base=root / "tiny", align_blocks=1, overwrite=True)


def grow_by(**more):
    return {"save": "larger"} | more


GROWTH_ERRORS = {
    "no such folder": (nothing, grow_by(add="absent"), ["absent", "one subfolder per class"]),
    "no table": (nothing, grow_by(correct="absent"), ["--correct", "absent", "file and label"]),
    "another table": (not_a_table, grow_by(correct="bad.csv"), ["bad.csv", "file and label"]),
    "nothing changed": (nothing_changed, grow_by(correct="bad.csv"), ["bad.csv", "changes no label"]),
    "absent image": (corrects_what_is_not_there, grow_by(correct="bad.csv"), ["'absent.png'", "not below --query"]),
    "correct without query": (not_a_table, grow_by(correct="bad.csv", query=None), ["--correct", "--query"]),
    "add without classifier": (
        nothing,
        grow_by(add=SUPPORT, classifier=None, support=SUPPORT),
        ["--add", "--classifier"],
    ),
    "save without growth": (nothing, grow_by(), ["--save", "--add"]),
    "an earlier version": (
        of_an_earlier_version,
        grow_by(add=SUPPORT),
        ["cannot grow", "earlier version", "--support"],
    ),
    "aligned blocks": (
        of_aligned_blocks,
        grow_by(add=SUPPORT),
        ["cannot grow", "blocks were aligned", "holds only their features", "by --support to the old and new photos"],
    ),
}


@pytest.mark.parametrize("case", GROWTH_ERRORS)
def test_a_wrong_growth_is_one_clear_line_and_writes_nothing(root, case):
    spoil, more, expected = GROWTH_ERRORS[case]
    kept(root)
    spoil(root)
    paths = (*PATHS, "add", "correct", "classifier")
    given = {"classifier": "my.classifier", "query": QUERY, "out": "labelled", "quiet": True} | more
    given = {name: root / value if name in paths else value for name, value in given.items() if value}
    outcome = call("predict", *(f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()))
    assert outcome.status == 2 and outcome.out == "" and outcome.err.count("\n") == 1, outcome
    assert all(part in outcome.err for part in expected), outcome.err
    assert not (root / "larger").exists() and not (root / "labelled" / TABLE).exists()


def test_a_loaded_classifier_grows_in_python(root):
    images, labels, _ = in_memory(root)
    FewShotClassifier(root / "model.tar", **FLAGS).fit(images, labels).save(root / "a.classifier")
    made = FewShotClassifier.load(root / "a.classifier").partial_fit([np.zeros((20, 20, 3), np.uint8)] * 2, [40, 10])
    assert made.classes_.tolist() == [10, 20, 30, 40] and made.fitted_.classifier.n_support == [2, 3, 2, 1]
    assert made.predict(np.zeros((20, 20, 3), np.uint8)) in (10, 40)
    made.save(root / "b.classifier")
    again = FewShotClassifier.load(root / "b.classifier")
    assert again.classes_.tolist() == [10, 20, 30, 40]
    with pytest.raises(UserError, match="is there already: give overwrite=True"):
        made.save(root / "a.classifier")
    made.save(root / "a.classifier", overwrite=True)
    assert (root / "a.classifier").read_bytes() != b"" and len(again.partial_fit(images[2:], labels[2:]).classes_) == 4


def test_one_image_is_one_answer_and_a_list_as_many(root):
    made = FewShotClassifier(root / "model.tar", **FLAGS).fit(*in_memory(root)[:2])
    path = root / QUERY / "class13" / "006.png"
    image = Image.open(path)
    whole = made.predict([str(path)])
    for one in (str(path), path, image, np.asarray(image)):
        assert made.predict(one) == whole[0] and np.ndim(made.predict(one)) == 0
        assert made.predict_proba(one).shape == (3,)
    for several in ([path, image], np.stack([np.asarray(image)] * 2), np.array([str(path)] * 2)):
        assert made.predict(several).tolist() == [whole[0]] * 2 and made.predict_proba(several).shape == (2, 3)


def test_a_classifier_says_what_it_is_and_its_errors_name_arguments(root):
    made = FewShotClassifier(str(root / "model.tar"), **FLAGS)
    assert repr(made) == f"FewShotClassifier(backbone={str(root / 'model.tar')!r}, ft_n_epoch=20)\n  not fitted"
    made.fit(*in_memory(root)[:2])
    assert "arcMax head on Conv4, no alignment\n  6 examples of 3 classes\n  accuracy" in repr(made)
    for flags in ({"method": "nearest"}, {"alignment": "centroid"}, {"ft_s": -1}):
        with pytest.raises(UserError, match=next(iter(flags))) as caught:
            FewShotClassifier(str(root / "model.tar"), **flags).fit(*in_memory(root)[:2])
        assert "--" not in str(caught.value) and "help" not in str(caught.value)
