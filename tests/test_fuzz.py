"""Files that are damaged at random: each kind is read, or refused with one line, in 5 seconds and 500 MB.

What is read of a damaged file is what is read of the whole one, where something can tell: the checksums of a zip (all
that torch.save writes, npz), of PNG and of gzip; and where it is made anew. Of the other kinds (JSON, texts, pickles,
images without checksums, safetensors, files of torch before 1.6, mapped arrays) a legal other value cannot be told
from the right one, and what is read has the types and shapes that it should have. So it is, of any kind, for a file
that was written whole with another value.

FUZZ_CASES is how many files are tried in all, 300 unless it is set: FUZZ_CASES=20000 pytest tests/test_fuzz.py
"""

import copy
import functools
import io
import json
import os
import pickle
import resource
import shutil
import signal
import tarfile
import types
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.converters.archives import open_tree
from data.converters.converter import read_split_file
from data.converters.cub import convert_cub
from data.converters.mini_imagenet import convert_mini_imagenet
from data.converters.safe_pickle import load_pickle_file
from data.converters.tiered_imagenet import convert_tiered_imagenet
from data.converters.writing import SETTINGS
from data.decode import open_rgb
from data.episodes import EpisodeShape, read_episodes, sample_episodes, write_episodes
from data.glyphs import VERSION, provide_glyphs
from data.image_cache import ImageFiles, load_images
from data.listing import list_folder, list_json
from engine.errors import UserError
from engine.files import read_record
from engine.lock import hold
from engine.run import Run
from engine.script import escaped
from models.backbone import split_backbone
from models.pretrained import load_weights
from persistence.checkpoints import create_backbone, load_backbone
from persistence.feature_cache import FeatureCache
from persistence.imported import Imported, read_imported
from persistence.run_files import ALIGNMENT_STATE, STATE_FORMAT, TRAINING_STATE
from persistence.saved_episode import read_saved_episodes
from photos.classifier_file import load_classifier
from reporting.paper_tables import finished
from reporting.report import read_results, training_logs
from reporting.result_table import result_rows
from tests.helpers import CHECKPOINT, CURVE, RUN, STAGE_1, STAGE_3, TRAIN, call, folders, make_split
from tests.published import Calls, published_module, saved  # noqa: F401

SECONDS, MEGABYTES = 5, 500
SPLIT, SHAPE = make_split(), EpisodeShape(3, 2, 3)
ODD = [
    None,
    True,
    0,
    -1,
    7,
    0.5,
    10**9,
    2**70,
    10**400,
    1e308,
    float("nan"),
    "",
    "\0\n",
    "\ud800",
    [],
    [[]],
    {},
    {"a": None},
]
ODD_TENSORS = [torch.zeros(0), torch.full((3,), torch.nan), torch.zeros(1).expand(10**12), torch.eye(2).to_sparse()]
ODD_TENSORS += [torch.ones(2, 2, dtype=torch.complex64), torch.zeros(3, device="meta")]


class LateError(BaseException):
    """Reading took too long; no `except Exception` takes it for damage."""


def told(value: Any) -> object:
    """What tells a value that was read from another."""
    if isinstance(value, torch.Tensor | np.ndarray):
        array = np.asarray(value)
        return str(array.dtype), array.shape, array.tobytes()
    if isinstance(value, dict | list | tuple):
        return [told(part) for part in (value.items() if isinstance(value, dict) else value)]
    return told(vars(value)) if is_dataclass(value) else repr(value)


class Kind(NamedTuple):
    """A kind of file: what makes a whole one, of a folder to write in and that of a tiny run; what reads one; whether
    what is read of a damaged one is what is read of the whole one."""

    make: Callable[[Path, Path], bytes]
    read: Callable[[Path], Any]
    sure: bool = False


def image(kind: str) -> Kind:
    file = io.BytesIO()
    Image.fromarray(np.arange(12 * 9 * 3, dtype=np.uint8).reshape(12, 9, 3)).save(file, kind)
    return Kind(constant(file.getvalue()), lambda path: np.asarray(open_rgb(path)), kind == "PNG")


def constant(content: bytes | str) -> Callable[[Path, Path], bytes]:
    return lambda folder, root: content.encode() if isinstance(content, str) else content


def written(write: Callable[[Path], object]) -> Callable[[Path, Path], bytes]:
    """What a function writes to a file."""

    def make(folder: Path, root: Path) -> bytes:
        write(folder / "whole")
        return (folder / "whole").read_bytes()

    return make


def kept(*parts: str) -> Callable[[Path, Path], bytes]:
    """What a tiny run wrote."""
    return lambda folder, root: root.joinpath("results", *parts).read_bytes()


def archive(mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name in ("a/1.png", "b/images.txt"):
            member = tarfile.TarInfo(name)
            member.size = 60
            tar.addfile(member, io.BytesIO(b"x" * 60))
    return file.getvalue()


def read_archive(path: Path) -> dict[str, bytes]:
    with open_tree(path) as tree:
        return {name: tree.read(name) for name in tree.names}


def read_npz(path: Path) -> list[bytes]:
    for tag in ("train", "val", "test"):
        (path.parent / f"{tag}_labels.pkl").write_bytes(pickle.dumps({"labels": [0, 1]}))
        (path.parent / f"{tag}_images.npz").write_bytes(path.read_bytes())
    return [item.read().tobytes() for item in convert_tiered_imagenet(path.parent).items]


def placed(path: Path, *names: str) -> Path:
    """A new folder that holds the file under these names."""
    folder = path.parent / "placed"
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / name)
    return folder


def read_csv(path: Path) -> list[tuple[str, str, str]]:
    split = {"base": {"n01": [1]}, "val": {"n02": [1]}, "novel": {"n03": [1]}}
    items = convert_mini_imagenet(placed(path, "train.csv", "val.csv", "test.csv"), split, None).items
    return [(item.split, item.class_name, item.file_name) for item in items]


def read_cub(path: Path, name: str) -> list[object]:
    folder = placed(path, name)
    for other in ("images.txt", "bounding_boxes.txt"):
        if other != name:
            (folder / other).write_text(
                "1 001.Ant/a.jpg\n" if other == "images.txt" else "1 60 27 325 304.5\n2 0 0 5 5\n"
            )
    return [(item.class_name, item.read.args[-1]) for item in convert_cub(folder, crop_bbox=True).items]


def read_list(path: Path) -> object:
    for name in LISTED["image_names"]:
        (path.parent / name).touch()
    return list_json(path, None)


def read_published(path: Path) -> Imported:
    try:
        return read_imported(path)
    except ValueError as error:
        raise UserError(str(error)) from error


@functools.cache
def backbone() -> torch.nn.Module:
    return create_backbone("Conv4", 16, seed=0)


def read_weights(path: Path, suffix: str) -> object:
    net = copy.deepcopy(backbone())
    try:
        load_weights(net, "Conv4", placed(path, f"weights{suffix}") / f"weights{suffix}")
    except ValueError as error:  # as create_backbone does
        raise UserError(str(error)) from error
    return net.state_dict()


def read_kept_classifier(path: Path) -> object:
    fitted = load_classifier(path, None, torch.device("cpu"))
    classifier, facts = fitted.classifier, fitted.facts
    modules = (classifier.backbone, classifier.aligned, classifier.finetuned, classifier.head)
    numbers = [module.state_dict() for module in modules]
    return numbers, classifier.z_support, classifier.y_support, classifier.examples, classifier.confidence, facts


def cached(suffix: str, ask: Callable[[Path], Any]) -> Kind:
    """A file of a cache, which is the only one that asking for something leaves with this suffix."""

    def only(folder: Path) -> Path:
        (found,) = folder.rglob(f"*{suffix}")
        return found

    def make(folder: Path, root: Path) -> bytes:
        ask(folder / "whole")
        return only(folder / "whole").read_bytes()

    def read(path: Path) -> Any:
        folder = path.parent / "cache"
        ask(folder)
        target = only(folder)
        target.unlink()  # what is mapped stays as it is
        shutil.copy(path, target)
        return ask(folder)

    return Kind(make, read, suffix == ".pt")


def activations(folder: Path) -> Any:
    net = backbone()
    below, cache = split_backbone(net, 2)[0], FeatureCache(folder, Run())
    return cache.kept("activations", below, SPLIT, net.normalisation, torch.float32).sum().item()


def image_arrays(folder: Path) -> Any:
    source = folder.parent / "images" / "class"
    source.mkdir(parents=True, exist_ok=True)
    paths = [source / f"{i}.png" for i in range(3)]
    for i, path in enumerate(path for path in paths if not path.exists()):
        Image.new("RGB", (20 + i, 20), (90 * i, 5, 7)).save(path)
    arrays = load_images(ImageFiles("x", paths, [path.name for path in paths], 0.2), 16, folder, 1, True)
    return [part.numpy().copy() for part in (arrays.eval, arrays.train, arrays.sizes)]


def read_finished(path: Path) -> object:
    row = types.SimpleNamespace(result=path, checkpoint=path.with_name("absent"))
    return finished(row, {"dataset": "tiny"})


def read_lock(path: Path) -> None:
    hold(path).close()


def read_logs(path: Path) -> object:
    return training_logs(placed(path, f"logs/{RUN}_bestModel/metrics.jsonl"))


def read_tables(path: Path) -> object:
    return result_rows(read_results(placed(path, "tables/result.json")))


def read_settings(path: Path) -> object:
    return provide_glyphs(placed(path, SETTINGS))


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, images=np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3))
    return file.getvalue()


def read_state(path: Path, schema: dict) -> object:
    return read_record(path, STATE_FORMAT, schema, "state", "start anew")


LISTED = {"label_names": ["a", "b"], "image_names": ["1.png", "2.png"], "image_labels": [0, 1]}
SPLIT_FILE = {"base": ["a"], "val": {"b": [1]}, "novel": []}
PICKLED = {"data": np.zeros((20, 30), np.uint8), "labels": [1, 2.5, "name"], "more": {"a": (None, True)}}
CLASSIFIER = "kept.classifier"
KINDS = {
    **{name: image(name) for name in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM")},
    "tar": Kind(constant(archive("w")), read_archive),
    "tar.gz": Kind(constant(archive("w:gz")), read_archive, True),
    "npz": Kind(constant(npz()), read_npz, True),
    "pkl": Kind(constant(pickle.dumps(PICKLED, 2)), load_pickle_file),
    "pkl4": Kind(constant(pickle.dumps(PICKLED, 4)), load_pickle_file),
    "csv": Kind(constant("filename,label\nn01_1.jpg,n01\nn02_2.jpg,n02\n"), read_csv),
    "images.txt": Kind(constant("1 001.Ant/a.jpg\n2 002.Bee/b.jpg\n"), lambda path: read_cub(path, "images.txt")),
    "boxes": Kind(constant("1 60 27 325 304.5\n"), lambda path: read_cub(path, "bounding_boxes.txt")),
    "split": Kind(constant(json.dumps(SPLIT_FILE)), read_split_file),
    "list": Kind(constant(json.dumps(LISTED)), read_list),
    "episodes": Kind(
        written(lambda path: write_episodes(path, SPLIT, sample_episodes(SPLIT, SHAPE, 4, 0))),
        lambda path: read_episodes(path, SPLIT, SHAPE, 4),
    ),
    "checkpoint": Kind(kept("models", CHECKPOINT), lambda path: load_backbone(path, None, None)[1], True),
    "published": Kind(lambda folder, root: saved(), read_published, True),
    "published of old": Kind(lambda folder, root: saved(new_format=False), read_published),
    "weights": Kind(
        written(lambda path: torch.save(backbone().state_dict(), path)), lambda path: read_weights(path, ".pth"), True
    ),
    "safetensors": Kind(
        written(lambda path: safetensors.torch.save_file(backbone().state_dict(), path)),
        lambda path: read_weights(path, ".safetensors"),
    ),
    "state": Kind(kept("models", f"{RUN}_last.tar"), lambda path: read_state(path, TRAINING_STATE), True),
    "alignment state": Kind(kept("logs", f"{STAGE_3}_last.tar"), lambda path: read_state(path, ALIGNMENT_STATE), True),
    "saved episode": Kind(kept("episodes", f"{STAGE_3}.pt"), read_saved_episodes, True),
    "classifier": Kind(kept(CLASSIFIER), read_kept_classifier, True),
    "features": cached(".npy", lambda folder: FeatureCache(folder, Run()).features(backbone(), SPLIT)),
    "activations": cached(".npy", activations),
    "cache": cached("meta.json", image_arrays),
    "sizes": cached("sizes.bin", image_arrays),
    "result": Kind(kept("tables", f"{STAGE_3}.json"), read_tables),
    "finished": Kind(kept("tables", f"{STAGE_1}.json"), read_finished),
    "metrics": Kind(kept("logs", f"{RUN}_bestModel", "metrics.jsonl"), read_logs),
    "glyphs": Kind(constant(json.dumps({"benchmark": "glyphs", "seed": 3, "version": VERSION})), read_settings),
    "lock": Kind(constant("process 1 on elsewhere since 2020-01-01 00:00:00\n"), read_lock),
}


class Command(NamedTuple):
    """A file below the folder of a tiny run, and a command that reads it; {} is that folder."""

    file: str
    script: str
    flags: list[object]


AGAIN = ["--results_dir", "{}/out", "--overwrite"]
LABEL = ["--query", "{}/mine", "--out", "{}/out", "--overwrite", "--quiet"]
COMMANDS = {
    "checkpoint": Command(f"results/models/{CHECKPOINT}", "associative_alignment", [*CURVE, *AGAIN]),
    "checkpoint to label": Command(
        *(f"results/models/{CHECKPOINT}", "predict"),
        ["--support", "{}/mine", "--checkpoint", f"{{}}/results/models/{CHECKPOINT}", "--ft_n_epoch", 5, *LABEL],
    ),
    "classifier": Command(f"results/{CLASSIFIER}", "predict", ["--classifier", f"{{}}/results/{CLASSIFIER}", *LABEL]),
    "image": Command("mine/a/000.png", "predict", ["--classifier", f"{{}}/results/{CLASSIFIER}", *LABEL]),
    "state": Command(f"results/models/{RUN}_last.tar", "transferLearning", [*TRAIN, "--resume"]),
    "alignment state": Command(f"results/logs/{STAGE_3}_last.tar", "associative_alignment", [*CURVE, "--resume"]),
    "episodes": Command(
        "episodes.json", "associative_alignment", [*CURVE, *AGAIN, "--episodes_file", "{}/episodes.json"]
    ),
    "saved episode": Command(f"results/episodes/{STAGE_3}.pt", "reporting.page", ["{}/results"]),
    "drawn episode": Command(f"results/episodes/{STAGE_3}.pt", "reporting.figures", ["{}/results"]),
    "result": Command(f"results/tables/{STAGE_3}.json", "reporting.report", ["{}/results"]),
    "drawn result": Command(f"results/tables/{STAGE_3}.json", "reporting.page", ["{}/results"]),
    "metrics": Command(f"results/logs/{RUN}_bestModel/metrics.jsonl", "reporting.page", ["{}/results"]),
    "split": Command(
        *("split.json", "data.prepare"),
        [*("folder", "--source", "{}/benchmarks/tiny/novel", "--out", "{}/out"), "--split_file", "{}/split.json"],
    ),
    "prepared": Command(
        *(f"prepared/novel/{SETTINGS}", "data.prepare"),
        ["folder", "--source", "{}/benchmarks/tiny/novel", "--out", "{}/prepared", "--split", "0.4,0.3,0.3"],
    ),
}
N_CASES = int(os.environ.get("FUZZ_CASES", 300))
# A case of a command takes as long as three of a reader.
CASES = max(1, 3 * N_CASES // (3 * len(KINDS) + len(COMMANDS)))


def changed(draw, content: Any, odd: list[Any]) -> Any:
    """The same content, but for one value, or an entry more or less."""
    if isinstance(content, dict | list) and content and draw(st.integers(0, 4)):
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = draw(st.sampled_from(keys))
        what = draw(st.sampled_from(["deeper", "deeper", "deeper", "without", "more"]))
        if what == "deeper":
            content[key] = changed(draw, content[key], odd)
        elif what == "without":
            del content[key]
        elif isinstance(content, dict):
            content["more"] = draw(st.sampled_from(odd))
        else:
            content.append(content[key])
        return content
    return draw(st.sampled_from(odd))


def with_another_value(draw, content: bytes) -> bytes | None:
    """The same file, written whole with another value; None where that cannot be done."""
    if content[:1] == b"{":
        first, line, rest = content.partition(b"}\n{" if b"}\n{" in content else b"\0")
        whole = first + b"}" if line == b"}\n{" else first
        text = json.dumps(changed(draw, json.loads(whole), ODD)).encode()
        return text + b"\n{" + rest if line == b"}\n{" else text
    if content[:2] == b"PK" and b"data.pkl" in content:
        try:
            found = torch.load(io.BytesIO(content), weights_only=True)
        except pickle.UnpicklingError:  # of a published file
            return None
        file = io.BytesIO()
        torch.save(changed(draw, found, ODD + ODD_TENSORS), file)
        return file.getvalue()
    if content[:1] == b"\x80" and content[-1:] == b"." and len(content) < 2000:
        return pickle.dumps(changed(draw, copy.deepcopy(PICKLED), ODD), content[1])
    return None


@st.composite
def damaged(draw, content: bytes) -> tuple[bytes, bool]:
    """A file of random bytes, or one that is cut, has bits turned or another value, or bytes more or less; and whether
    it was written whole, with another value."""
    kind = draw(st.sampled_from(["random", "cut", "turned", "turned", "moved", "value", "value"]))
    if kind == "random":
        return draw(st.binary(max_size=64)), False
    if kind == "value" and (other := with_another_value(draw, content)) is not None:
        return other, True
    places = st.integers(0, len(content) - 1)
    if kind == "cut":
        return content[: draw(places)], False
    if kind == "moved":
        return content[: draw(places)] + draw(st.binary(max_size=8)) + content[draw(places) :], False
    turned = bytearray(content)
    for place in draw(st.lists(places | st.integers(0, min(200, len(content) - 1)), min_size=1, max_size=4)):
        turned[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(turned), False


@pytest.fixture
def timed():
    """A function that calls another, which must be back in so many seconds, and take no more memory than MEGABYTES."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def late(number, frame):
        raise LateError

    def ask(function, seconds=SECONDS):
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return function()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    before = signal.signal(signal.SIGALRM, late)
    yield ask
    signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEGABYTES * 1024


@pytest.fixture(scope="session")
def labelled(aligned, tmp_path_factory):
    """A copy of `aligned` with images to label, a kept classifier, and the files of COMMANDS. Not to be written to."""
    root = shutil.copytree(aligned, tmp_path_factory.mktemp("labelled") / "copy")
    for name, source in zip("ab", list_folder(root / "benchmarks" / "tiny" / "novel")[1][::8], strict=False):
        shutil.copytree(source.parent, root / "mine" / name)
    model, classifier = root / "results" / "models" / CHECKPOINT, root / "results" / CLASSIFIER
    outcome = call("predict", "--support", root / "mine", "--checkpoint", model, "--save", classifier, "--quiet")
    assert outcome.status == 0, outcome.err
    classes = {name: [f"class{number}"] for name, number in zip(("base", "val", "novel"), (12, 13, 14), strict=True)}
    (root / "split.json").write_text(json.dumps(classes))
    return root


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_refused_with_one_line(tmp_path, labelled, timed, name):
    kind = KINDS[name]
    path = tmp_path / "tables" / f"{name}.json"
    path.parent.mkdir()
    whole = kind.make(tmp_path, labelled)
    path.write_bytes(whole)
    expected = told(kind.read(path))

    @settings(max_examples=CASES)
    @given(damaged(whole))
    def attempt(case):
        content, is_another = case
        path.write_bytes(content)
        try:
            found = timed(lambda: kind.read(path))
        except (UserError, OSError) as error:
            assert len(escaped(str(error)).splitlines()) == 1
        else:
            assert is_another or not kind.sure or told(found) == expected

    attempt()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_takes_a_damaged_file_or_ends_with_one_line(tmp_path, labelled, timed, name):
    command, root = COMMANDS[name], shutil.copytree(labelled, tmp_path / "copy")
    path = root / command.file
    flags = [str(flag).replace("{}", str(root)) for flag in command.flags]
    where = folders(root) if "--quiet" in command.flags and command.script != "predict" else []

    def ask():
        shutil.rmtree(root / "out", ignore_errors=True)
        return call(command.script, *where, *flags)

    outcome = ask()  # it writes the file where there is none yet
    assert outcome.status == 0, outcome.err

    @settings(max_examples=max(1, CASES // 3))
    @given(damaged(path.read_bytes()))
    def attempt(case):
        content, is_another = case
        assume(not (is_another and "episode" in name and path.suffix == ".pt"))  # these are drawn as they were written
        path.write_bytes(content)
        outcome = timed(ask, 4 * SECONDS)
        said = [line for line in outcome.err.splitlines() if line and not line.startswith("preparing ")]  # its bar
        assert outcome.status in (0, 2) and len(said) == (outcome.status == 2), outcome
        assert all(line.startswith("error: ") for line in said)

    attempt()


@pytest.mark.parametrize("name", ["checkpoint", "state", "saved episode", "classifier", "published", "weights"])
def test_of_a_pickle_with_an_empty_zip_behind_it_nothing_runs(tmp_path, name):
    """Whoever looks for a zip's directory at the end takes it for one; who reads it from the start does not."""
    path, marker = tmp_path / "hostile", tmp_path / "marker"
    for protocol in (0, 2, 4):
        hostile = pickle.dumps(Calls(os.system, f"touch {marker}"), protocol)
        path.write_bytes(hostile + b"PK\5\6" + bytes(18))
        with pytest.raises(UserError, match="no file of torch.save, or only the beginning of one") as error:
            KINDS[name].read(path)
        assert "\n" not in str(error.value) and not marker.exists()
    pickle.loads(hostile)
    assert marker.exists()  # it would have run
