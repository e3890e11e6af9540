"""Files that are damaged at random: each kind is read, or refused with one line, in 5 seconds and 500 MB.

FUZZ_CASES is how many files are tried in all, 300 unless it is set: FUZZ_CASES=20000 pytest tests/test_fuzz.py
"""

import io
import json
import os
import pickle
import resource
import signal
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.converters.archives import open_tree
from data.converters.converter import read_split_file
from data.converters.safe_pickle import load_pickle_file
from data.converters.tiered_imagenet import convert_tiered_imagenet
from data.episodes import EpisodeShape, read_episodes, sample_episodes, write_episodes
from data.image_cache import open_rgb
from data.listing import list_json
from engine.errors import UserError
from engine.script import escaped
from persistence.checkpoints import load_checkpoint
from persistence.saved_episode import read_episode
from reporting.report import read_results
from tests.helpers import CHECKPOINT, STAGE_3, make_split

SECONDS, MEGABYTES = 5, 500
SPLIT, SHAPE = make_split(), EpisodeShape(3, 2, 3)
ODD = [None, True, -1, 2**70, 1e308, float("nan"), "", "\0\n", [], [[]], {}, {"a": None}]


def image(kind):
    file = io.BytesIO()
    Image.fromarray(np.arange(12 * 9 * 3, dtype=np.uint8).reshape(12, 9, 3)).save(file, kind)
    return file.getvalue()


def archive():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name in ("a/1.png", "b/images.txt"):
            member = tarfile.TarInfo(name)
            member.size = 60
            tar.addfile(member, io.BytesIO(b"x" * 60))
    return file.getvalue()


def read_archive(path):
    with open_tree(path) as tree:
        for name in tree.names:
            tree.read(name)


def npz():
    file = io.BytesIO()
    np.savez(file, images=np.zeros((2, 4, 4, 3), np.uint8))
    return file.getvalue()


def read_npz(path):
    for tag in ("train", "val", "test"):
        (path.parent / f"{tag}_labels.pkl").write_bytes(pickle.dumps({"labels": [0, 1]}))
        (path.parent / f"{tag}_images.npz").write_bytes(path.read_bytes())
    for item in convert_tiered_imagenet(path.parent).items:
        item.read()


def episodes_file(folder):
    write_episodes(folder / "whole.json", SPLIT, sample_episodes(SPLIT, SHAPE, 4, 0))
    return (folder / "whole.json").read_bytes()


def kept(*parts):
    """What a tiny run wrote."""
    return lambda folder, root: root.joinpath("results", *parts).read_bytes()


LISTED = {"label_names": ["a", "b"], "image_names": ["1.png", "2.png"], "image_labels": [0, 1]}
SPLIT_FILE = {"base": ["a"], "val": {"b": [1]}, "novel": []}
PICKLED = {"data": np.zeros((20, 30), np.uint8), "labels": [1, 2.5, "name"], "more": {"a": (None, True)}}
# Of each kind, a whole file, from a folder to write in and that of a tiny run, and what reads one.
KINDS = {
    **{name: (lambda folder, root, name=name: image(name), open_rgb) for name in ("PNG", "JPEG", "GIF", "TIFF")},
    "tar": (lambda folder, root: archive(), read_archive),
    "npz": (lambda folder, root: npz(), read_npz),
    "pkl": (lambda folder, root: pickle.dumps(PICKLED, 2), load_pickle_file),
    "pkl4": (lambda folder, root: pickle.dumps(PICKLED, 4), load_pickle_file),
    "split": (
        lambda folder, root: json.dumps({"base": ["a"], "val": {"b": [1]}, "novel": []}).encode(),
        read_split_file,
    ),
    "list": (lambda folder, root: json.dumps(LISTED).encode(), lambda path: list_json(path, None)),
    "episodes": (lambda folder, root: episodes_file(folder), lambda path: read_episodes(path, SPLIT, SHAPE, 4)),
    "checkpoint": (kept("models", CHECKPOINT), load_checkpoint),
    "saved": (kept("episodes", f"{STAGE_3}.pt"), read_episode),
    "result": (kept("tables", f"{STAGE_3}.json"), lambda path: read_results(path.parent.parent)),
}
CASES = max(1, int(os.environ.get("FUZZ_CASES", 300)) // len(KINDS))


def changed(draw, content):
    """The same json, but for one value."""
    if isinstance(content, dict | list) and content and draw(st.booleans()):
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = draw(st.sampled_from(keys))
        content[key] = changed(draw, content[key])
        return content
    return draw(st.sampled_from(ODD))


@st.composite
def damaged(draw, content):
    """A file of random bytes, or one that is cut, has bits turned or another value, or bytes more or less."""
    kind = draw(st.sampled_from(["random", "cut", "turned", "turned", "moved", "value"]))
    if kind == "random":
        return draw(st.binary(max_size=64))
    if kind == "value" and content[:1] == b"{":
        return json.dumps(changed(draw, json.loads(content))).encode()
    places = st.integers(0, len(content) - 1)
    if kind == "cut":
        return content[: draw(places)]
    if kind == "moved":
        return content[: draw(places)] + draw(st.binary(max_size=8)) + content[draw(places) :]
    turned = bytearray(content)
    for place in draw(st.lists(places | st.integers(0, min(200, len(content) - 1)), min_size=1, max_size=4)):
        turned[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(turned)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_with_one_line(tmp_path, aligned, kind):
    make, read = KINDS[kind]
    whole = make(tmp_path, aligned)
    path = tmp_path / "tables" / f"{kind}.json"
    path.parent.mkdir()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def late(number, frame):
        raise AssertionError(f"{kind} took more than {SECONDS} s")

    @settings(max_examples=CASES)
    @given(damaged(whole))
    def attempt(content):
        path.write_bytes(content)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            read(path)
        except (UserError, OSError) as error:
            assert len(escaped(str(error)).splitlines()) == 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    before = signal.signal(signal.SIGALRM, late)
    try:
        attempt()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEGABYTES * 1024
