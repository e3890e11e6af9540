"""What stage 3 keeps as it goes: a row per episode, the state every few of them, and the saved episodes."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.episodes import Episodes
from engine.distributed import gather_objects
from engine.errors import UserError
from engine.files import save_atomically
from engine.run import Run
from methods.alignment import AlignedEpisode, AlignmentSetting, episode_record
from methods.evaluation import EpisodeScores
from methods.related_base import empty_notes
from persistence.run_files import COLUMNS, RunFiles
from persistence.saved_episode import read_saved_episodes


class AlignedEpisodes:
    """The episodes done, a row each: the columns of `tensors`. class_names: of the split that `episodes` index.

    The notes wait in `notes` until the ranks exchange them. drawings: the saved episodes, by their number.
    """

    def __init__(
        self, files: RunFiles, run: Run, episodes: Episodes, class_names: list[str], setting: AlignmentSetting
    ):
        self.files = files
        self.run = run
        self.episodes = episodes
        self.class_names = class_names
        self.setting = setting
        self.digests = [hashlib.sha256(index.numpy().tobytes()).hexdigest()[:16] for index in episodes.index]
        self.rows: list[dict[str, Tensor]] = []
        if run.ranks.first and not files.state:
            files.episode.unlink(missing_ok=True)  # so that none of an older run is ever taken for one of this
        saved = read_saved_episodes(files.episode) if files.state and files.episode.is_file() else []
        self.drawings = {drawing["episode"]: drawing for drawing in saved}
        self.notes: list[str] = []
        if files.state:
            self.restore()
        name = f"{setting.alignment} alignment"
        self.bar = run.bar(None, name, "episode", total=len(episodes), initial=len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, i: int, episode: AlignedEpisode) -> None:
        """Append the record of episode i, and a note of novel classes without related samples."""
        self.rows.append(episode_record(episode))
        names = [self.class_names[c] for c in self.episodes.classes[i].tolist()]
        notes = empty_notes(episode.related, names) if self.setting.alignment != "none" else []
        self.notes += [f"note: episode {i}: {note}" for note in notes]
        means = (100 * self.scores(name).accuracy.mean() for name in ("finetuned", "aligned"))
        self.bar.set_postfix_str("fine-tuning {:.2f}, alignment {:.2f}".format(*means), refresh=False)
        self.bar.update()

    def scores(self, name: str) -> EpisodeScores:
        """The scores of all episodes done, `finetuned` or `aligned`."""
        return EpisodeScores(torch.stack([row[name] for row in self.rows]))

    def exchange(self, first: int) -> None:
        """Gather the ranks' rows from the first-th on, in order, and their notes."""
        of_ranks = gather_objects((self.rows[first:], self.notes), self.run.ranks)
        self.rows[first:] = [row for rows, _ in of_ranks for row in rows]
        self.notes = []
        self.bar.update(len(self.rows) - self.bar.n)
        for note in (note for _, notes in of_ranks for note in notes):
            tqdm.write(note)
        if self.run.ranks.first:
            for i in range(first, len(self.rows)):
                self.files.metrics.write(i, self.metrics_row(i))

    def metrics_row(self, i: int) -> dict[str, Any]:
        """Metrics of episode i: accuracy (%), losses of the last iteration, numbers of related base images."""
        row = self.rows[i]
        before, after = (EpisodeScores(row[name].unsqueeze(0)).accuracy.item() for name in ("finetuned", "aligned"))
        losses = zip(("align_loss", "related_loss", "support_loss"), row["losses"].tolist(), strict=True)
        counts = {name: int(row[name]) for name in ("n_related", "n_empty", "n_drawn")}
        return {"episode": i, "fine_tuning": 100 * before, "alignment": 100 * after, **dict(losses), **counts}

    def tensors(self) -> dict[str, Tensor]:
        """finetuned and aligned (E, n_way, n_way): queries by true and predicted class; curve (E, k): accuracy at
        iterations; losses (E, 3) of the last one; n_related, n_empty and n_drawn (E,)."""
        return {name: torch.stack([row[name] for row in self.rows]) for name in self.rows[0]}

    def save(self) -> None:
        """Write the state if any episode is done and this is the first rank."""
        if self.rows and self.run.ranks.first:
            self.files.save_state(episodes=self.digests[: len(self.rows)], **self.tensors())

    def gains(self) -> Tensor:
        """What alignment adds to fine-tuning in each episode done, (E,), in points."""
        before, after = (self.scores(name).accuracy for name in ("finetuned", "aligned"))
        return 100 * (after - before)

    def to_draw(self, wanted: Sequence[int | str]) -> list[int]:
        """The wanted episodes that are not saved yet, by number, or `median` or `worst` by gain; of the first rank."""
        order = self.gains().argsort(stable=True).tolist()
        named: dict[int | str, int] = {"worst": order[0], "median": order[(len(order) - 1) // 2]}
        numbers = {named.get(i, i) for i in wanted}
        return sorted(int(i) for i in numbers if i not in self.drawings) if self.run.ranks.first else []

    def save_drawings(self) -> None:
        """Write the saved episodes, each with how it stands among all episodes."""
        if self.drawings and self.run.ranks.first:
            gains = self.gains()
            for i, saved in self.drawings.items():
                if i >= len(gains):  # of a longer run than this one
                    continue
                better_than = (gains < gains[i]).double().mean().item()
                standing = {"gain": gains[i].item(), "mean": gains.mean().item(), "better_than": better_than}
                self.drawings[i] = saved | {"standing": standing, "title": self.title}
            head, *more = (self.drawings[i] for i in sorted(self.drawings))
            save_atomically(self.files.episode, {**head, "more": more})

    @property
    def title(self) -> str:
        """The run in words: `arcMax, head alignment, Conv4; glyphs, 5-way 1-shot`."""
        name = self.files.name
        task = f"{name.novel_dataset}, {self.episodes.n_way}-way {self.episodes.n_shot}-shot"
        return f"{name.method}, {self.setting.alignment} alignment, {name.backbone}; {task}"

    def restore(self) -> None:
        """Resume after the episodes of the state, at most as many as asked for. Raises UserError if it does not fit."""
        with self.files.taking_over() as state:
            every = self.setting.record_curve if self.setting.alignment != "none" else 0
            if state["curve"].shape[1:] != (1 + (self.setting.align_iters // every if every else 0),):
                raise ValueError("its curve is of other iterations")
            columns = [state[name][: len(self.episodes)] for name in COLUMNS]
            self.rows = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)]
            metrics = [self.metrics_row(i) for i in range(len(self.rows))]
            same = state["episodes"][: len(self.rows)] == self.digests[: len(self.rows)]
        if not same:
            raise UserError(
                f"{self.files.last} cannot be resumed: the episodes have changed since: start again with --overwrite"
            )
        print(f"resumed after {len(self.rows)} episodes: {self.files.last}")
        if self.run.ranks.first:
            self.files.metrics.keep(metrics)
