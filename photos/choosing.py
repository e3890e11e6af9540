"""Whether to align: `--alignment auto` counts what fine-tuning and alignment answer right on tasks like the user's.

It aligns where clearly more is right aligned: a difference that chance makes in one task of 20 does not count. The
tasks are the examples, each left out in turn, where every class has two or more; else episodes of the base set's val
classes; else episodes of base classes that the backbone was not trained on, beside the others as base set.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.episodes import EpisodeShape, Task, sample_episodes
from engine.errors import UserError
from engine.run import Run
from methods.alignment import AlignmentSetting
from methods.features import Source
from photos.base import without_classes
from photos.confidence import first_copies, folds, left_out_logits

N_EPISODES, MAX_QUERY = 100, 15  # of one example per class


class Evidence(NamedTuple):
    """Tasks of images of a source, the base set that they are aligned with, and what they are in words."""

    source: Source
    tasks: list[Task]
    base: Source
    words: str

    @property
    def truth(self) -> Tensor:
        """The labels of the queries of all tasks: those of the support images of the same class."""
        y, found = self.source.split.labels, []
        for task in self.tasks:
            of_class = y[task.query].unsqueeze(1) == y[task.support]
            found.append(task.y_support[of_class.int().argmax(1)])
        return torch.cat(found)


def own_examples(novel: Source, base: Source) -> Evidence:
    """The examples, left out in turn. Raises UserError when a class has only one."""
    y = novel.split.labels
    tasks = folds(y, first_copies(novel.features.cpu(), y)) if torch.bincount(y).min() > 1 else []
    if not tasks:
        raise UserError("a class has one example")
    return Evidence(novel, tasks, base, "examples, left out in turn")


def episodes_of(source: Source, base: Source, n_way: int, words: str, run: Run) -> Evidence:
    """Episodes of one example per class, of n_way classes or all that there are. Raises UserError without images."""
    sizes = [len(own) for own in source.split.members]
    shape = EpisodeShape(min(n_way, len(sizes)), 1, max(1, min([MAX_QUERY + 1, *sizes]) - 1))
    episodes = sample_episodes(source.split, shape, N_EPISODES, run.seed)
    tasks = [episodes.task(i) for i in range(len(episodes))]
    return Evidence(source, tasks, base, f"images of {len(sizes)} {words}")


def new_classes(base: Source, trained_on: Sequence[str], n_way: int, run: Run) -> Evidence:
    """Episodes of every second base class that is not among those trained on, beside a base set of the other classes.

    Raises UserError when it is not known which those are, or there are too few.
    """
    split, names = base.split, base.split.class_names
    drawn = [c for c, name in enumerate(names) if trained_on and name not in trained_on][::2]
    if len(drawn) < max(2, n_way):
        raise UserError("too few base classes are known to be new to the backbone")
    others = [c for c in range(len(names)) if c not in drawn]
    source, rest = (replace(base, split=without_classes(split, left_out)) for left_out in (others, drawn))
    return episodes_of(source, rest, n_way, "base classes new to the backbone", run)


def clearly_more(after: Tensor, before: Tensor) -> bool:
    """Whether more of the answers (n,) are right in `after` than in `before`, by McNemar's test at 95 %."""
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return gained - lost > 1.96 * math.sqrt(gained + lost)


def choose_alignment(
    novel: Source,
    base: Source,
    load_val: Callable[[], Source],
    trained_on: Sequence[str],
    setting: AlignmentSetting,
    kept: Path,
    run: Run,
) -> tuple[AlignmentSetting, str]:
    """The setting with `head` alignment where clearly more is right than by fine-tuning, else with none; and why.

    load_val: the val classes of the base set; raises UserError when there are none. trained_on: the names of the
    backbone's classes, if they are known. What is measured is kept in a folder, so that a stopped run goes on.
    """
    n_way, aligned = len(novel.split.class_names), replace(setting, alignment="head")
    kinds: list[Callable[[], Evidence]] = [
        lambda: own_examples(novel, base),
        lambda: episodes_of(load_val(), base, n_way, "val classes", run),
        lambda: new_classes(base, trained_on, n_way, run),
    ]
    for kind in kinds:
        with contextlib.suppress(UserError):
            found = kind()
            both = left_out_logits(found.tasks, found.source, found.base, aligned, run, kept)
            before, after = (logits.argmax(1) == found.truth for logits in both)
            aligns = clearly_more(after, before)
            chosen = "alignment" if aligns else "fine-tuning"
            why = f"{int(after.sum())} right aligned, {int(before.sum())} fine-tuned, of {len(after)} {found.words}"
            return (aligned if aligns else replace(setting, alignment="none")), f"auto chose {chosen}: {why}"
    why = "a class has one example, and no val classes or classes known to be new to the backbone can be tried"
    return replace(setting, alignment="none"), f"auto chose fine-tuning: {why}"
