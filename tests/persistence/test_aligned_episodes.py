"""What stage 3 keeps of its episodes: a row each, a state to go on from, notes, and the result."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F

from data.episodes import EpisodeShape, sample_episodes
from engine.distributed import Ranks
from engine.run import Run
from methods.alignment import AlignedEpisode, AlignmentSetting
from methods.features import feature_source
from methods.related_base import RelatedBase, RelatedSetting
from persistence import aligned_episodes
from persistence.aligned_episodes import AlignedEpisodes
from persistence.checkpoints import Checkpoint
from persistence.results import save_alignment_result, training_record
from persistence.run_files import LENGTH_FLAGS, Folders, RunName, alignment_files
from tests.helpers import make_split

NOVEL = make_split()
SETTING = AlignmentSetting(related=RelatedSetting(aug_size=5), align_iters=4, record_curve=2)


def start(root, n=3, resume=False, run=None):
    """Episodes of 2 ways and 2 queries to be done, their files below `root`; with `resume`, from their state on."""
    folders = Folders(root / "models", root / "results", resume=resume)
    name = RunName(2, 1, "toy", "toy", "arcMax", "Conv4")
    files = alignment_files(name, "centroid", folders, {"lr": 0.1})
    if resume:
        files.find_state(LENGTH_FLAGS)
    files.begin({"weights": "w"})
    episodes = sample_episodes(NOVEL, EpisodeShape(2, 1, 2), n, seed=0)
    return AlignedEpisodes(files, run or Run(), episodes, NOVEL.class_names, SETTING)


def predicted(*classes):
    """Scores of 4 queries, of true classes 0 0 1 1, that are predicted as these."""
    return F.one_hot(torch.tensor(classes), 2).float()


def an_episode(n_related=(4, 6), losses=((9.0, 9.0, 9.0), (1.0, 2.0, 3.0))):
    """Half of the queries right by fine-tuning, three quarters after two iterations and in the end all."""
    related = RelatedBase(torch.zeros(3, 2), [[0], [1]], [torch.arange(n) for n in n_related])
    curve = [predicted(0, 0, 1, 0), predicted(0, 0, 1, 1)]
    return AlignedEpisode(None, predicted(0, 1, 1, 0), predicted(0, 0, 1, 1), related, 4, list(losses), curve)


def rows(done):
    return [json.loads(line) for line in done.files.metrics.path.read_text().splitlines()]


def test_an_episode_is_its_counts_curve_and_last_losses(tmp_path):
    done = start(tmp_path)
    done.add(0, an_episode())
    done.add(1, an_episode(n_related=(0, 6), losses=()))
    columns = done.tensors()
    assert (
        columns["finetuned"].tolist() == [[[1, 1], [1, 1]]] * 2
        and columns["aligned"].tolist() == [[[2, 0], [0, 2]]] * 2
    )
    assert columns["curve"].tolist() == [[0.5, 0.75, 1.0]] * 2
    assert columns["losses"][0].tolist() == [1, 2, 3] and columns["losses"][1].isnan().all()
    assert [columns[name].tolist() for name in ("n_related", "n_empty", "n_drawn")] == [[10, 6], [0, 1], [4, 4]]


def test_the_exchange_writes_the_metrics_and_names_classes_without_related_images_once(tmp_path, capsys):
    done = start(tmp_path)
    done.add(0, an_episode(n_related=(0, 6)))
    done.exchange(0)
    done.add(1, an_episode(losses=((math.nan, 2.0, 3.0),)))
    done.exchange(1)
    name = NOVEL.class_names[done.episodes.classes[0, 0]]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("note: episode 0: ") and repr(name) in said[0]
    expected = {"fine_tuning": 50, "alignment": 100, "related_loss": 2, "support_loss": 3, "n_drawn": 4}
    assert rows(done) == [
        expected | {"episode": 0, "align_loss": 1, "n_related": 6, "n_empty": 1},
        expected | {"episode": 1, "align_loss": None, "n_related": 10, "n_empty": 0},
    ]


def test_episodes_go_on_after_those_of_their_state(tmp_path):
    first = start(tmp_path)
    for i in range(2):
        first.add(i, an_episode(n_related=(i, 6)))
    first.exchange(0)
    first.save()
    first.files.metrics.path.write_text("half a li")
    second = start(tmp_path, resume=True)
    assert len(second) == 2 and second.tensors().keys() == first.tensors().keys()
    assert all(torch.equal(value, first.tensors()[name]) for name, value in second.tensors().items())
    assert [row["n_related"] for row in rows(second)] == [6, 7]
    assert len(start(tmp_path, n=1, resume=True)) == 1  # fewer are asked for now


def test_another_rank_writes_nothing_and_hands_its_rows_and_notes_to_the_first(tmp_path, monkeypatch, capsys):
    first, other = (start(tmp_path, n=2, run=Run(ranks=Ranks(rank, 2))) for rank in (0, 1))
    first.add(0, an_episode())
    other.add(1, an_episode(n_related=(0, 6)))
    handed = [(first.rows[:], first.notes), (other.rows[:], other.notes)]
    monkeypatch.setattr(aligned_episodes, "gather_objects", lambda mine, ranks: handed)
    other.exchange(0)
    other.save()
    assert other.to_draw([0]) == []
    other.drawings[0] = {"episode": 0}
    other.save_drawings()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    capsys.readouterr()
    first.exchange(0)
    first.save()
    for done in (first, other):
        assert done.tensors()["n_related"].tolist() == [10, 6]
    assert [row["episode"] for row in rows(first)] == [0, 1] and "episode 1" in capsys.readouterr().out
    assert first.to_draw([0]) == [0] and first.files.last.is_file()


def test_the_median_and_the_worst_episode_are_by_gain_and_a_saved_one_says_how_it_stands(tmp_path):
    done = start(tmp_path, n=3)
    for i in range(3):
        done.add(i, an_episode())
    wrong, right = torch.tensor([[0, 2], [2, 0]]), torch.tensor([[2, 0], [0, 2]])
    done.rows = [row | {"finetuned": right, "aligned": wrong} if i == 1 else row for i, row in enumerate(done.rows)]
    done.rows[2] |= {"finetuned": wrong, "aligned": right}
    assert done.gains().tolist() == [50, -100, 100]
    assert done.to_draw(["worst"]) == [1] and done.to_draw(["median", "worst", 2]) == [0, 1, 2]
    done.drawings = {0: {"episode": 0}, 7: {"episode": 7}}  # 7 is of a longer run
    assert done.to_draw([0, 1]) == [1]
    done.save_drawings()
    saved = torch.load(done.files.episode, weights_only=True)
    assert saved["standing"] == {"gain": 50.0, "mean": pytest.approx(50 / 3), "better_than": pytest.approx(1 / 3)}
    assert saved["title"] == "arcMax, centroid alignment, Conv4; toy, 2-way 1-shot" and saved["more"] == [
        {"episode": 7}
    ]


def test_the_result_compares_alignment_with_fine_tuning(tmp_path, capsys):
    done = start(tmp_path)
    for i in range(3):
        done.add(i, an_episode(n_related=(0, 6)))
    z = torch.eye(len(NOVEL.class_names))[NOVEL.labels]  # whose nearest means are right as well
    checkpoint = Checkpoint("transferLearning", "toy", "arcMax", "Conv4", 16, ["a"], {}, {}, 7, 50.0, {})
    trained = training_record(tmp_path / "best.tar", checkpoint, "w")
    save_alignment_result(done, *[feature_source(z, NOVEL)] * 2, trained, None)
    record = json.loads(done.files.table.read_text())
    assert (record["accuracy"], record["fine_tuning"]["accuracy"]) == (100, 50)
    assert record["difference"] == {"accuracy": 50, "ci95": 0, "ci95_classes": None}
    for distance in ("Euclidean", "cosine"):
        control = record["nearest_mean"][distance]
        assert control["accuracy_per_episode"] == [100] * 3
        assert control["difference"] == {"accuracy": 0, "ci95": 0, "ci95_classes": None}
    assert list(record["controls"]) == ["SimpleShot", "logistic regression", "related prototype"]
    assert all(control["accuracy"] == 100 for control in record["controls"].values())
    assert [(row["iteration"], row["accuracy"], row["gain"]) for row in record["curve"]] == [
        (0, 50, 0),
        (2, 75, 25),
        (4, 100, 50),
    ]
    assert (record["n_empty_related_sets"], record["n_episodes_below_aug_size"], record["checkpoint_epoch"]) == (
        3,
        3,
        7,
    )
    said = capsys.readouterr().out
    assert "in 3 of 3 episodes a novel class has fewer related images than --aug_size 5" in said and "--n_B" in said
    rows = [line for line in said.splitlines() if line.startswith("  ")]
    assert rows[0] == "  centroid alignment        100.00 ± 0.00 (?)" and rows[1].startswith("  fine-tuning        ")
    assert {re.search("±", row).start() for row in rows[1:]} <= {34, 35} and rows[1].endswith("+50.00 ± 0.00 (?)")
    assert "what other classes would give cannot be told" in said
