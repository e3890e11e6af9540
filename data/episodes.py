"""Episodes as index arithmetic: which images of a split are the support and the query of each class.

An episode is an index tensor (n_way, n_shot + n_query); its first n_shot columns are the support. Episode i of a
list depends on (seed, i) alone, so that a list may be cut into any chunks, or spread over any processes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.benchmarks import Split
from data.listing import some_of
from engine.budget import check_memory
from engine.errors import UserError, one_line
from engine.files import Schema, matches_schema, read_json, write_text
from engine.generators import make_generator

# A file of episodes: of each the images by name, with labels from 0 to n_way - 1; or a list of all names, `images`, and
# of each episode their numbers (n_way, n_shot + n_query), as it was written until November 2026.
SHAPE: Schema = {"n_way": int, "n_shot": int, "n_query": int}
NAMED: Schema = {"episodes": [{"support": dict[str, int], "query": dict[str, int]}]}
NUMBERED: Schema = {"episodes": list, "images": list[str]}


@dataclass(frozen=True)
class EpisodeShape:
    """Classes of an episode, and support and query images of each."""

    n_way: int
    n_shot: int
    n_query: int

    def __str__(self) -> str:
        return f"{self.n_way}-way {self.n_shot}-shot episodes of {self.n_query} queries per class"


@dataclass(frozen=True)
class Task:
    """One episode: indices of its support (k,) and its query (q,) images in a split, and the support's labels (k,).

    y_support holds every class from 0 to n_way - 1, in any number.
    """

    support: Tensor
    y_support: Tensor
    query: Tensor

    @property
    def n_way(self) -> int:
        return int(self.y_support.max()) + 1


@dataclass(frozen=True)
class Episodes:
    """E episodes of one split: `index` (E, n_way, n_shot + n_query) image indices, `classes` (E, n_way)."""

    index: Tensor
    classes: Tensor
    n_shot: int

    def __len__(self) -> int:
        return self.index.shape[0]

    @property
    def n_way(self) -> int:
        return self.index.shape[1]

    @property
    def shape(self) -> EpisodeShape:
        """The shape of each."""
        return EpisodeShape(self.n_way, self.n_shot, self.query.shape[2])

    @property
    def support(self) -> Tensor:
        """(E, n_way, n_shot)."""
        return self.index[:, :, : self.n_shot]

    @property
    def query(self) -> Tensor:
        """(E, n_way, n_query)."""
        return self.index[:, :, self.n_shot :]

    def slice(self, start: int, stop: int) -> "Episodes":
        """Episodes start to stop - 1."""
        return Episodes(self.index[start:stop], self.classes[start:stop], self.n_shot)

    def task(self, i: int) -> Task:
        """Episode i, class-major."""
        return Task(self.support[i].flatten(), class_major_labels(self.n_way, self.n_shot), self.query[i].flatten())


def class_major_labels(n_way: int, n_each: int, device: torch.device | str = "cpu") -> Tensor:
    """Labels of class-major samples, (n_way * n_each,): 0 ... 0, 1 ... 1, ..."""
    return torch.arange(n_way, device=device).repeat_interleave(n_each)


def classes_that_fit(split: Split, shape: EpisodeShape) -> list[int]:
    """The classes of a split with enough images for such episodes. Raises UserError when there are fewer than n_way."""
    fit = [c for c, members in enumerate(split.members) if len(members) >= shape.n_shot + shape.n_query]
    if shape.n_way > len(fit):
        small = small_classes(split, shape)
        raise UserError(
            f"the {split.split} split of {split.benchmark!r} has {len(fit)} classes{' besides ' * bool(small)}{small} "
            f"but episodes of {shape.n_way} ways were asked for: give a smaller way or add classes"
        )
    return fit


def small_classes(split: Split, shape: EpisodeShape) -> str:
    """The classes of a split with too few images for such episodes, in words with the remedy; empty without any."""
    needed = shape.n_shot + shape.n_query
    counts = zip(split.class_names, map(len, split.members), strict=True)
    small = [f"class {name!r} with {count} images" for name, count in counts if count < needed]
    query = "--train_n_query" if split.split == "base" else "--n_query"
    remedy = f"n_shot + n_query = {needed} are needed: lower --n_shot or {query}, or add images"
    return f"{some_of(small)} ({remedy})" if small else ""


def check_episodes_fit(splits: Sequence[Split], shape: EpisodeShape, strict: bool) -> None:
    """Say which classes of the splits are left out of such episodes.

    Raises UserError when fewer than n_way of a split are left, or if strict when any is left out.
    """
    for split in splits:
        if small := small_classes(split, shape):
            line = f"the {split.split} split of {split.benchmark!r} has {small}"
            if strict:
                raise UserError(f"{line}, or leave these classes out of episodes, without --strict_classes")
            classes_that_fit(split, shape)
            print(f"note: {line}; these classes are left out of episodes")


def sample_episodes(split: Split, shape: EpisodeShape, n_episodes: int, seed: int, start: int = 0) -> Episodes:
    """Episodes start ... start + n_episodes - 1: classes, then images of each, drawn without replacement.

    Classes with too few images are left out. Raises UserError when fewer than n_way are left.
    """
    fit = torch.tensor(classes_that_fit(split, shape))
    n_images = shape.n_shot + shape.n_query
    n_bytes = 8 * n_episodes * shape.n_way * (n_images + 1)
    check_memory(f"a list of {n_episodes} episodes", n_bytes, "lower --n_episodes, --testing_epochs or --val_episodes")
    index = torch.empty(n_episodes, shape.n_way, n_images, dtype=torch.long)
    classes = torch.empty(n_episodes, shape.n_way, dtype=torch.long)
    for e in range(n_episodes):
        generator = make_generator(seed, split.split, "episode", start + e)
        classes[e] = fit[torch.randperm(len(fit), generator=generator)[: shape.n_way]]
        for w, c in enumerate(classes[e].tolist()):
            picks = torch.randperm(len(split.members[c]), generator=generator)[:n_images]
            index[e, w] = split.members[c][picks]
    return Episodes(index, classes, shape.n_shot)


def write_episodes(path: Path, split: Split, episodes: Episodes) -> None:
    """Write episodes as JSON: of each the support and the query, as the label of each image by its name (`class/file`).

    docs/running.md reads it in another code base. Raises UserError when the file cannot be written.
    """

    def named(index: Tensor) -> dict[str, int]:
        return {split.image_names[i]: way for way, row in enumerate(index.tolist()) for i in row}

    both = zip(episodes.support, episodes.query, strict=True)
    listed = [{"support": named(support), "query": named(query)} for support, query in both]
    record = {"benchmark": split.benchmark, "split": split.split, **asdict(episodes.shape), "episodes": listed}
    write_text(path, json.dumps(record, separators=(",", ":")))


def by_class(labels: dict[str, int], n_way: int, n_each: int) -> list[list[str]]:
    """The image names of each class from 0 to n_way - 1. Raises ValueError when one has not n_each."""
    names = sorted(labels, key=labels.__getitem__)
    if sorted(labels.values()) != class_major_labels(n_way, n_each).tolist():
        raise ValueError(f"an episode has not {n_each} images of each of {n_way} classes")
    return [names[w * n_each : (w + 1) * n_each] for w in range(n_way)]


def image_table(record: dict[str, Any], shape: EpisodeShape) -> tuple[Tensor, list[str]]:
    """The content of a file of episodes of this shape: numbers (E, n_way, n_shot + n_query) in a list of image names.

    Raises ValueError, TypeError or RuntimeError when it holds something else.
    """
    if matches_schema(record, NUMBERED):
        return torch.tensor(record["episodes"], dtype=torch.long), record["images"]
    if not matches_schema(record, NAMED):
        raise ValueError("its episodes have no support and query of image names and labels")
    number: dict[str, int] = {}
    index = []
    for episode in record["episodes"]:
        support = by_class(episode["support"], shape.n_way, shape.n_shot)
        query = by_class(episode["query"], shape.n_way, shape.n_query)
        rows = [names + more for names, more in zip(support, query, strict=True)]
        index.append([[number.setdefault(name, len(number)) for name in row] for row in rows])
    return torch.tensor(index, dtype=torch.long), list(number)


def read_episodes(path: Path, split: Split, shape: EpisodeShape, n_episodes: int) -> Episodes:
    """The first n_episodes of a file of write_episodes, as indices into `split`.

    Raises UserError when the file is of another shape, is too short, names images that the split lacks, or holds an
    episode with a class or an image twice.
    """
    again = "delete it to have it written again"
    try:
        record = read_json(path)
        if not matches_schema(record, SHAPE):
            raise ValueError(f"it does not hold {', '.join(SHAPE)}")
        found = EpisodeShape(record["n_way"], record["n_shot"], record["n_query"])
        index, names = image_table(record, shape) if found == shape else (torch.empty(0), [])
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # the last two: lists of unequal length, no numbers
        raise UserError(f"episodes file {path} cannot be read ({one_line(error)}): {again}") from error
    if found != shape:
        raise UserError(f"episodes file {path} holds {found}, not {shape}: give matching flags or another file")
    if len(index) < n_episodes:
        raise UserError(
            f"episodes file {path} has {len(index)} of {n_episodes} episodes: lower --n_episodes or {again}"
        )
    position = {name: i for i, name in enumerate(split.image_names)}
    if missing := [name for name in names if name not in position]:
        raise UserError(f"episodes file {path} names {missing[0]!r}, not in {split.benchmark!r}: give its benchmark")
    damaged = UserError(f"episodes file {path} is damaged, or an episode has a class or an image twice: {again}")
    size = (len(index), shape.n_way, shape.n_shot + shape.n_query)
    if index.shape != size or index.min() < 0 or index.max() >= len(names):
        raise damaged
    index = torch.tensor([position[name] for name in names])[index[:n_episodes]]
    labels = split.labels[index]
    distinct = all((values.sort(1).values.diff(dim=1) > 0).all() for values in (index.flatten(1), labels[:, :, 0]))
    if not distinct or (labels != labels[:, :, :1]).any():
        raise damaged
    return Episodes(index, labels[:, :, 0], shape.n_shot)


def fixed_episodes(file: Path | None, split: Split, shape: EpisodeShape, n_episodes: int, seed: int) -> Episodes:
    """The episodes of `file` if it exists; else episodes sampled from `seed`, and written to `file` if one is named."""
    if file is not None and file.exists():
        return read_episodes(file, split, shape, n_episodes)
    episodes = sample_episodes(split, shape, n_episodes, seed)
    if file is not None:
        write_episodes(file, split, episodes)
    return episodes
