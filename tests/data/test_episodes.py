"""Episodes: what is drawn, that episode i depends on (seed, i) alone, and the file that fixes them."""

import dataclasses
import json
import re

import pytest
import torch

from data.episodes import (
    Episodes,
    EpisodeShape,
    Task,
    check_episodes_fit,
    class_major_labels,
    fixed_episodes,
    read_episodes,
    sample_episodes,
    write_episodes,
)
from engine.errors import UserError
from tests.helpers import ROOT, make_split

UNEQUAL = make_split(counts=(9, 7, 12, 7, 30, 8), side=1)


@pytest.mark.parametrize("n_way, n_shot, n_query", [(2, 1, 1), (5, 5, 2), (6, 1, 6), (3, 2, 4)])
def test_an_episode_has_distinct_classes_and_no_image_twice(n_way, n_shot, n_query):
    episodes = sample_episodes(UNEQUAL, EpisodeShape(n_way, n_shot, n_query), 200, seed=1)
    assert episodes.index.shape == (200, n_way, n_shot + n_query) and len(episodes) == 200
    for index, classes in zip(episodes.index, episodes.classes, strict=True):
        assert len(classes.unique()) == n_way
        assert len(index.unique()) == index.numel()
        assert torch.equal(UNEQUAL.labels[index], classes.unsqueeze(1).expand_as(index))


def test_support_and_query_are_the_two_parts_of_an_episode():
    episodes = sample_episodes(UNEQUAL, EpisodeShape(4, 2, 5), 50, seed=0)
    assert episodes.support.shape == (50, 4, 2) and episodes.query.shape == (50, 4, 5)
    assert torch.equal(torch.cat([episodes.support, episodes.query], 2), episodes.index)
    for support, query in zip(episodes.support, episodes.query, strict=True):
        assert not set(support.flatten().tolist()) & set(query.flatten().tolist())
    part = episodes.slice(10, 13)
    assert torch.equal(part.support, episodes.support[10:13]) and torch.equal(part.classes, episodes.classes[10:13])


def chi_squared(counts):
    """Of counts whose expectation is equal."""
    expected = counts.sum() / len(counts)
    return ((counts - expected) ** 2 / expected).sum().item()


def test_every_class_and_every_image_of_a_class_is_equally_likely_in_every_place():
    split = make_split(counts=(10,) * 8, side=1)
    episodes = sample_episodes(split, EpisodeShape(3, 1, 2), 4000, seed=0)
    for way in range(3):  # 7 degrees of freedom: 24.3 is exceeded once in 1000
        assert chi_squared(torch.bincount(episodes.classes[:, way], minlength=8).double()) < 24.3
    for place in range(3):  # 79 degrees of freedom
        assert chi_squared(torch.bincount(episodes.index[:, :, place].flatten(), minlength=80).double()) < 124.8


def test_an_episode_depends_on_seed_and_number_alone():
    whole = sample_episodes(UNEQUAL, EpisodeShape(5, 1, 3), 20, seed=7)
    prefix = sample_episodes(UNEQUAL, EpisodeShape(5, 1, 3), 8, seed=7)
    rest = sample_episodes(UNEQUAL, EpisodeShape(5, 1, 3), 12, seed=7, start=8)
    assert torch.equal(torch.cat([prefix.index, rest.index]), whole.index)
    assert torch.equal(torch.cat([prefix.classes, rest.classes]), whole.classes)
    assert len(whole.index.flatten(1).unique(dim=0)) == 20


def test_other_seeds_and_other_splits_have_other_episodes():
    first = sample_episodes(UNEQUAL, EpisodeShape(5, 1, 3), 4, seed=0).index
    assert not torch.equal(first, sample_episodes(UNEQUAL, EpisodeShape(5, 1, 3), 4, seed=1).index)
    val = dataclasses.replace(UNEQUAL, split="val")
    assert not torch.equal(first, sample_episodes(val, EpisodeShape(5, 1, 3), 4, seed=0).index)


def test_sampling_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    sample_episodes(UNEQUAL, EpisodeShape(5, 1, 3), 4, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_too_few_classes_are_counted():
    with pytest.raises(UserError, match="novel split of 'toy' has 6 classes but episodes of 7 ways"):
        sample_episodes(UNEQUAL, EpisodeShape(7, 1, 1), 1, seed=0)


def test_a_class_with_too_few_images_is_named_and_counted(capsys):
    asked = r"class 'class1' with 7 images, class 'class3' with 7 .*n_shot \+ n_query = 8 are needed.*--n_query"
    with pytest.raises(UserError, match=f"has {asked}.*without --strict_classes"):
        check_episodes_fit([UNEQUAL], EpisodeShape(2, 3, 5), strict=True)
    with pytest.raises(UserError, match=f"has 4 classes besides {asked}.* but episodes of 6 ways"):
        sample_episodes(UNEQUAL, EpisodeShape(6, 3, 5), 1, seed=0)
    check_episodes_fit([UNEQUAL], EpisodeShape(6, 3, 4), strict=True)
    assert not capsys.readouterr().out


def test_a_class_with_too_few_images_is_left_out_of_episodes(capsys):
    shape = EpisodeShape(2, 3, 5)
    check_episodes_fit([UNEQUAL], shape, strict=False)
    assert (
        "note: the novel split of 'toy' has class 'class1' with 7 images, class 'class3' with 7 images ("
        in capsys.readouterr().out
    )
    episodes = sample_episodes(UNEQUAL, shape, 200, seed=0)
    assert set(episodes.classes.flatten().tolist()) == {0, 2, 4, 5}
    assert torch.equal(UNEQUAL.labels[episodes.index], episodes.classes.unsqueeze(2).expand(-1, -1, 8))


def test_class_major_labels_match_the_flattened_images():
    episodes = sample_episodes(UNEQUAL, EpisodeShape(3, 2, 1), 1, seed=0)
    labels = class_major_labels(3, 2)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(UNEQUAL.labels[episodes.support[0].flatten()], episodes.classes[0][labels])


def test_a_task_is_one_episode_class_major():
    episodes = sample_episodes(UNEQUAL, EpisodeShape(4, 2, 3), 5, seed=0)
    for i in range(5):
        task = episodes.task(i)
        assert task.n_way == 4 and task.y_support.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert torch.equal(task.support.view(4, 2), episodes.support[i])
        assert torch.equal(task.query.view(4, 3), episodes.query[i])
        assert torch.equal(UNEQUAL.labels[task.support], episodes.classes[i][task.y_support])
    # A task may have any number of support images of a class, in any order.
    assert Task(torch.arange(4), torch.tensor([1, 0, 2, 1]), torch.arange(2)).n_way == 3


# The file that fixes the episodes.


@pytest.fixture
def episodes():
    return sample_episodes(UNEQUAL, EpisodeShape(3, 2, 4), 10, seed=5)


@pytest.fixture
def file(tmp_path, episodes):
    path = tmp_path / "new folder" / "episodes.json"
    write_episodes(path, UNEQUAL, episodes)
    return path


def read(file, split=UNEQUAL, n_way=3, n_shot=2, n_query=4, n_episodes=10):
    return read_episodes(file, split, EpisodeShape(n_way, n_shot, n_query), n_episodes)


def assert_same(a: Episodes, b: Episodes):
    assert torch.equal(a.index, b.index) and torch.equal(a.classes, b.classes) and a.n_shot == b.n_shot


def test_what_is_written_is_read(file, episodes):
    assert_same(read(file), episodes)
    assert_same(read(file, n_episodes=4), episodes.slice(0, 4))
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_file_is_read_into_a_split_listed_in_another_order(file, episodes):
    order = torch.randperm(len(UNEQUAL.labels), generator=torch.Generator().manual_seed(0))
    rename = torch.tensor([3, 1, 5, 0, 2, 4])  # where each class is in the other listing
    shuffled = dataclasses.replace(
        UNEQUAL,
        class_names=[UNEQUAL.class_names[c] for c in rename.argsort().tolist()],
        image_names=[UNEQUAL.image_names[i] for i in order.tolist()],
        labels=rename[UNEQUAL.labels[order]],
    )
    found = read(file, shuffled)

    def names(split, episodes):
        return [split.image_names[i] for i in episodes.index.flatten().tolist()]

    assert names(shuffled, found) == names(UNEQUAL, episodes)
    assert torch.equal(found.classes, rename[episodes.classes])


def test_fixed_episodes_are_written_once_and_read_ever_after(tmp_path):
    file = tmp_path / "episodes.json"
    first = fixed_episodes(file, UNEQUAL, EpisodeShape(3, 2, 4), 10, seed=5)
    content = file.read_bytes()
    assert_same(fixed_episodes(file, UNEQUAL, EpisodeShape(3, 2, 4), 10, seed=6), first)
    assert file.read_bytes() == content
    assert_same(fixed_episodes(None, UNEQUAL, EpisodeShape(3, 2, 4), 10, seed=5), first)


def test_another_code_base_reads_the_file_as_the_documentation_says(file, episodes, monkeypatch):
    """The two pieces of Python in docs/running.md: one reads names and labels, one feeds a DataLoader."""
    text = (ROOT / "docs" / "running.md").read_text()
    reads, samples = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [[line for line in part.splitlines() if line.strip()] for part in (reads, samples.split("\n\n\n")[1])]
    assert [len(part) for part in lines] == [5, 10]
    monkeypatch.chdir(file.parent)
    found = {}
    exec(reads, {"train_and_test": lambda *parts: found.setdefault("episodes", []).append(parts)})
    position = {name: i for i, name in enumerate(UNEQUAL.image_names)}
    for e, parts in enumerate(found["episodes"]):
        for part, index in zip(parts, (episodes.support[e], episodes.query[e]), strict=True):
            expected = [(UNEQUAL.image_names[i], way) for way, row in enumerate(index.tolist()) for i in row]
            assert part == expected
    dataset = torch.utils.data.TensorDataset(torch.arange(len(position)))
    scope = {"dataset": dataset, "names": UNEQUAL.image_names}
    exec(samples, scope)
    batches = torch.stack([index for (index,) in scope["loader"]])
    assert len(found["episodes"]) == len(scope["loader"]) == 10
    assert torch.equal(batches.view(10, 3, 6), episodes.index)


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"n_way": 5}, "holds 3-way 2-shot episodes of 4 queries per class, not 5-way 2-shot episodes of 4"),
        ({"n_shot": 1, "n_query": 5}, "of 4 queries per class, not 3-way 1-shot episodes of 5 queries per class"),
        ({"n_query": 3}, "give matching flags or another file"),
        ({"n_episodes": 11}, "has 10 of 11 episodes"),
        ({"split": make_split(counts=(8,) * 2, side=1)}, "not in 'toy': give its benchmark"),
    ],
)
def test_a_file_for_something_else_is_refused(file, asked, message):
    with pytest.raises(UserError) as error:
        read(file, **asked)
    assert str(file) in str(error.value) and message in str(error.value)


def numbered(record):
    """A record as files were written until November 2026: numbers of images instead of names."""
    episodes = [[*e["support"].items(), *e["query"].items()] for e in record["episodes"]]
    images = sorted({name for episode in episodes for name, _ in episode})
    of_class = [[[images.index(name) for name, way in e if way == w] for w in range(3)] for e in episodes]
    return {**record, "images": images, "episodes": of_class}


def test_a_file_of_numbered_images_is_still_read(file, episodes):
    file.write_text(json.dumps(numbered(json.loads(file.read_text()))))
    assert_same(read(file), episodes)


def moved(episode, name, part, to):
    """An episode whose image `name` has gone from one of its two parts to the other."""
    parts = {key: dict(episode[key]) for key in ("support", "query")}
    parts[to][name] = parts[part].pop(name)
    return parts


def change_first(change):
    """Damage to the first episode of a record alone: the others show that each is checked."""
    return lambda record, text: {**record, "episodes": [change(record["episodes"][0]), *record["episodes"][1:]]}


DAMAGE = {
    "cut off": lambda record, text: text[: len(text) // 2],
    "empty": lambda record, text: "",
    "another json": lambda record, text: "[]",
    "null": lambda record, text: "null",
    "no episodes": lambda record, text: {**record, "episodes": []},
    "no query": change_first(lambda e: {"support": e["support"]}),
    "labels no numbers": change_first(lambda e: {**e, "query": dict.fromkeys(e["query"], "a")}),
    "a label too large": change_first(lambda e: {**e, "query": {**e["query"], next(iter(e["query"])): 3}}),
    "an image left out": change_first(lambda e: {**e, "query": dict([*e["query"].items()][1:])}),
    "a query in the support": change_first(lambda e: moved(e, next(iter(e["query"])), "query", "support")),
    "an image in both": change_first(
        lambda e: {**e, "query": {next(iter(e["support"])): 0, **dict([*e["query"].items()][1:])}}
    ),
    "two classes of one label": change_first(
        lambda e: {**e, "query": dict(zip(e["query"], [*e["query"].values()][::-1], strict=True))}
    ),
}
NUMBERED_DAMAGE = {
    "a key missing": lambda record, text: {key: value for key, value in record.items() if key != "images"},
    "ragged": lambda record, text: {**record, "episodes": record["episodes"] + [[[0]]]},
    "not numbers": lambda record, text: {**record, "episodes": [[["a"] * 6] * 3] * 10},
    "too large a number": lambda record, text: {**record, "episodes": [[[1e40] * 6] * 3] * 10},
    "images no list": lambda record, text: {**record, "images": 5},
    "images no names": lambda record, text: {**record, "images": [[1]] * len(record["images"])},
    "index out of range": lambda record, text: {**record, "images": record["images"][:-1]},
    "negative index": lambda record, text: {**record, "episodes": [[[-1] * 6] * 3] * 10},
    "another shape": lambda record, text: {**record, "episodes": [[row[:-1] for row in e] for e in record["episodes"]]},
    "support in the query": lambda record, text: {
        **record,
        "episodes": [[[*row[:-1], row[0]] for row in e] for e in record["episodes"]],
    },
    "a class twice": lambda record, text: {**record, "episodes": [[e[0], e[1], e[0]] for e in record["episodes"]]},
    "ways mixed": lambda record, text: {
        **record,
        "episodes": [[[*e[0][:-1], e[1][-1]], [*e[1][:-1], e[0][-1]], e[2]] for e in record["episodes"]],
    },
}


@pytest.mark.parametrize("damage", [*DAMAGE, *NUMBERED_DAMAGE])
def test_a_damaged_file_is_refused_and_left_as_it_is(file, damage):
    text = file.read_text()
    record = json.loads(text)
    content = DAMAGE[damage](record, text) if damage in DAMAGE else NUMBERED_DAMAGE[damage](numbered(record), text)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    damaged = file.read_bytes()
    with pytest.raises(UserError) as error:
        fixed_episodes(file, UNEQUAL, EpisodeShape(3, 2, 4), 10, seed=5)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert file.read_bytes() == damaged


def test_a_file_that_cannot_be_written_is_named(tmp_path, episodes):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "episodes.json", tmp_path):
        with pytest.raises(UserError, match="cannot be written") as error:
            write_episodes(path, UNEQUAL, episodes)
        assert str(path) in str(error.value)
