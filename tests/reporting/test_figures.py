"""Pictures and the files that they are drawn from: confusion, metrics, saved episodes, TensorBoard."""

import json
import shutil
import sys
import types

import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from data.episodes import Episodes
from methods.confusion import confusion_matrix, confusion_record, count_predictions
from methods.evaluation import score_queries
from persistence.saved_episode import read_episode, thumbnails
from reporting.episode_figures import pca, related_base_figure, two_lines
from reporting.figure_style import CYCLE, label_text
from reporting.result_figures import as_matrix, confusion_figure
from tests.helpers import CHECKPOINT, CURVE, RUN, STAGE_1, STAGE_3, TINY, TRAIN, align, call, folders, metrics, result

PICTURES = ("overview", "training", "curve", "confusion", "projection", "related_base")
TENSORBOARD = "torch.utils.tensorboard"


# Pictures.


@pytest.mark.parametrize("name", PICTURES)
def test_each_picture_has_content_in_the_colours_of_the_palette(aligned, name):
    image = Image.open(aligned / "results" / "figures" / f"{name}.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(maxcolors=2**24)}
    assert min(image.size) > 300 and len(colours) > 100
    if name not in ("confusion", "related_base"):
        assert sum(tuple(round(255 * c) for c in to_rgb(colour)) in colours for colour in CYCLE) >= 2


def test_what_cannot_be_drawn_is_said_in_a_line_with_what_would_make_it(aligned_copy):
    results = aligned_copy / "results"
    for path in (results / "episodes", results / "figures"):
        shutil.rmtree(path)
    (results / "tables" / f"{STAGE_3}.json").unlink()
    outcome = call("reporting.figures", results)
    assert outcome.status == 0
    skipped = [line for line in outcome.out.splitlines() if line.startswith("skipped")]
    assert [line.split()[1] for line in skipped] == ["curve.png:", "projection.png:", "related_base.png:"]
    assert all("associative_alignment.py" in line for line in skipped) and "--record_curve" in skipped[0]
    drawn = {path.stem for path in (results / "figures").iterdir()}
    assert drawn == {"overview", "training", "confusion"}


def test_a_result_is_named_or_the_newest(aligned_copy):
    results = aligned_copy / "results"
    outcome = call("reporting.figures", results, "--result", STAGE_1)
    assert outcome.status == 0 and "skipped projection.png" in outcome.out and "confusion.png" in outcome.out
    outcome = call("reporting.figures", results, "--result", "absent")
    assert outcome.status == 2 and "--result absent" in outcome.err and outcome.err.count("\n") == 1


def test_a_damaged_episode_is_one_clear_line(aligned_copy):
    path = aligned_copy / "results" / "episodes" / f"{STAGE_3}.pt"
    for content in (b"x", path.read_bytes()[:2000]):
        path.write_bytes(content)
        outcome = call("reporting.figures", aligned_copy / "results")
        assert outcome.status == 2 and str(path) in outcome.err and outcome.err.count("\n") == 1
    torch.save({"format": "other"}, path)
    assert "no saved episode" in call("reporting.figures", aligned_copy / "results").err


@pytest.mark.parametrize("installed", [False, True])
def test_tsne_is_drawn_by_scikit_learn_or_refused_in_a_line(aligned_copy, monkeypatch, installed):
    class TSNE:
        def __init__(self, n_components, perplexity, **rest):
            assert n_components == 2 and 1 <= perplexity <= 30 and rest["random_state"] == 0

        def fit_transform(self, z):
            return z[:, :2]

    manifold = types.SimpleNamespace(TSNE=TSNE)
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn") if installed else None)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", manifold if installed else None)
    outcome = call("reporting.figures", aligned_copy / "results", "--projection", "tsne")
    if installed:
        assert outcome.status == 0, outcome.err
    else:
        assert outcome.status == 2 and "pip install scikit-learn" in outcome.err and outcome.err.count("\n") == 1


def test_class_names_are_labels_whatever_they_hold():
    assert label_text("$x$ and $y") == r"\$x\$ and \$y" and label_text("_a").lstrip() == "_a"
    assert label_text("_a")[0] != "_" and label_text("abcdef", 4) == "abc…"
    assert two_lines("Worm_eating_Warbler", 11) == "Worm eating\nWarbler" and two_lines("u0040", 11) == "u0040"
    assert [len(line) for line in two_lines("x" * 50, 11).split("\n")] == [11, 11]
    n_class = 45
    names = [f"$_{c}^" for c in range(n_class)]
    record = {"method": "arcMax", "accuracy": 50.0, "dataset": "$", "n_way": 2, "n_shot": 1, "n_episodes": 3}
    figure = confusion_figure(record | {"confusion": {name: {name: 2} for name in names}})
    figure.canvas.draw()
    assert len(figure.axes[0].get_yticklabels()) == 23 and "one in 2" in figure.axes[0].get_xlabel()


def test_related_classes_without_images_and_novel_ones_without_related_classes_are_drawn():
    image = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    empty = {"name": "bus", "score": 0.0, "images": image[:0]}
    record = {"class_names": ["a", "b"], "support_images": image, "related_classes": [[empty] * 12, []]}
    figure = related_base_figure(record)
    figure.canvas.draw()
    assert "the first 10 of 12" in figure.axes[0].get_title()
    related_base_figure(record | {"related_classes": [[], []]}).canvas.draw()


# The projection.


def test_pca_keeps_the_distances_of_features_of_two_dimensions_and_ignores_a_shift():
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(40, 2, generator=generator, dtype=torch.double) * torch.tensor([3.0, 1.0])
    axes, _ = torch.linalg.qr(torch.randn(64, 2, generator=generator, dtype=torch.double))
    z = plane @ axes.T
    y, share = pca(z)
    torch.testing.assert_close(torch.cdist(y, y), torch.cdist(plane, plane))
    torch.testing.assert_close(pca(z + 7.0)[0], y)
    assert share[0] > share[1] and sum(share) == pytest.approx(1.0)


def test_pca_is_centred_uncorrelated_and_of_largest_variance():
    z = torch.randn(50, 10, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    y, share = pca(z)
    covariance = torch.cov(y.T)
    assert y.mean(0).abs().max() < 1e-9 and covariance[0, 1].abs() < 1e-9
    top = torch.linalg.eigvalsh(torch.cov(z.T)).flip(0)
    torch.testing.assert_close(covariance.diagonal(), top[:2])
    assert share == pytest.approx((top[:2] / top.sum()).tolist())


@pytest.mark.parametrize("shape", [(6, 1), (2, 5), (1, 5)])
def test_pca_of_few_dimensions_or_points_and_of_equal_points_is_finite(shape):
    for z in (torch.randn(shape), torch.ones(shape)):
        y, _ = pca(z)
        assert y.shape == (shape[0], 2) and torch.isfinite(y).all()


# Confusion.


def test_predictions_are_counted_by_true_and_predicted_class():
    scores = torch.tensor([[3.0, 1, 0], [0, 3, 1], [0, 2, 1], [0, 2, 1], [0, 0, 1], [5, 1, 0]])
    counts = count_predictions(scores, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert score_queries(scores, 3).tolist() == [0.5, 1.0, 0.5]
    assert torch.equal(count_predictions(scores.expand(4, 2, 6, 3), 3), counts.expand(4, 2, 3, 3))


def test_counts_are_summed_by_class_over_episodes():
    counts = torch.tensor([[[3, 1], [2, 2]], [[4, 0], [1, 3]]])
    classes = torch.tensor([[2, 0], [0, 3]])
    total = confusion_matrix(counts, classes, 4)
    assert total.tolist() == [[6, 0, 2, 0], [0, 0, 0, 0], [1, 0, 3, 0], [1, 0, 0, 3]]
    record = confusion_record(counts, Episodes(torch.zeros(2, 2, 5), classes, 1), ["ant", "bee", "cat", "dog"])
    assert record == {"ant": {"ant": 6, "cat": 2}, "cat": {"ant": 1, "cat": 3}, "dog": {"ant": 1, "dog": 3}}
    names, matrix = as_matrix(record)
    assert names == ["ant", "cat", "dog"] and torch.equal(matrix, total[[0, 2, 3]][:, [0, 2, 3]])


def check_confusion(record, n_queries):
    _, counts = as_matrix(record["confusion"])
    assert counts.sum() == n_queries
    assert 100 * counts.diagonal().sum().item() / n_queries == pytest.approx(record["accuracy"], abs=0.01)
    for name, row in record["confusion"].items():
        share = 100 * row.get(name, 0) / sum(row.values())
        assert share == pytest.approx(record["accuracy_per_class"][name], abs=0.01)


def test_the_confusion_of_every_stage_matches_its_accuracies(aligned, tmp_path):
    check_confusion(result(aligned, STAGE_1), 6 * 3 * 3)
    record = result(aligned, STAGE_3)
    check_confusion(record, 3 * 3 * 3)
    check_confusion(record["fine_tuning"], 3 * 3 * 3)
    trained = aligned / "results" / "models" / CHECKPOINT
    meta = [*TINY, "--method", "ProtoNet", "--n_epoch", 0, "--n_episodes", 6, "--init_from", trained]
    outcome = call("metaLearning", *meta, *folders(aligned), "--results_dir", tmp_path)
    assert outcome.status == 0, outcome.err
    check_confusion(json.loads(next((tmp_path / "tables").iterdir()).read_text()), 6 * 3 * 3)


# Metrics.


def test_stage_3_writes_a_line_an_episode(aligned):
    rows, record = metrics(aligned), result(aligned, STAGE_3)
    assert [row["episode"] for row in rows] == [0, 1, 2]
    assert [row["alignment"] for row in rows] == pytest.approx(record["accuracy_per_episode"], abs=0.01)
    assert [row["fine_tuning"] for row in rows] == pytest.approx(
        record["fine_tuning"]["accuracy_per_episode"], abs=0.01
    )
    for row in rows:
        assert row["align_loss"] >= 0 and row["related_loss"] > 0 and row["support_loss"] > 0
        assert 0 < row["n_drawn"] <= 4 and row["n_related"] >= row["n_drawn"] and 0 <= row["n_empty"] < 3


@pytest.mark.parametrize("left", ["nothing", "half a line", "a row too many"])
def test_a_resumed_run_mends_the_metrics(aligned_copy, aligned, left):
    """They follow from the state, whatever the killed run has left of them."""
    align(aligned_copy, "--n_episodes", 2, results="short")
    path = aligned_copy / "short" / "logs" / STAGE_3 / "metrics.jsonl"
    text = path.read_text()
    path.write_text({"nothing": "", "half a line": text[: len(text) // 3], "a row too many": text + text}[left])
    align(aligned_copy, "--resume", results="short")
    assert metrics(aligned_copy, results="short") == metrics(aligned)


# TensorBoard.


class Writer:
    """What a SummaryWriter was given."""

    made: list["Writer"] = []

    def __init__(self, log_dir, purge_step):
        self.log_dir, self.purge_step, self.scalars = log_dir, purge_step, {}
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value

    def flush(self):
        pass


@pytest.fixture
def writers(monkeypatch):
    """The SummaryWriters made, by a TensorBoard that is installed for the test."""
    monkeypatch.setattr(Writer, "made", [])
    monkeypatch.setitem(sys.modules, TENSORBOARD, types.SimpleNamespace(SummaryWriter=Writer))
    return Writer.made


def scalars(rows, step):
    return {(key, row[step]): value for row in rows for key, value in row.items()}


def test_tensorboard_gets_the_numbers_of_the_metrics(aligned_copy, writers):
    stale = aligned_copy / "results" / "logs" / STAGE_3 / "events.out.tfevents.1.x"
    stale.write_text("of an earlier run")
    align(aligned_copy, "--tensorboard")
    (writer,) = writers
    assert writer.log_dir == str(stale.parent) and writer.purge_step == 0 and not stale.exists()
    assert writer.scalars == scalars(metrics(aligned_copy), "episode")
    outcome = call("transferLearning", *TRAIN, *folders(aligned_copy), "--tensorboard")
    assert outcome.status == 0, outcome.err
    assert writers[1].scalars == scalars(metrics(aligned_copy, f"{RUN}_bestModel"), "epoch")


def test_tensorboard_goes_on_where_a_resumed_run_does(aligned_copy, writers):
    align(aligned_copy, "--n_episodes", 2, "--tensorboard", results="short")
    align(aligned_copy, "--resume", "--tensorboard", results="short")
    assert [writer.purge_step for writer in writers] == [0, 2]
    assert {step for _, step in writers[1].scalars} == {2}


@pytest.mark.parametrize("script", ["transferLearning", "metaLearning", "associative_alignment"])
def test_tensorboard_that_is_not_installed_is_one_clear_line(tmp_path, monkeypatch, script):
    monkeypatch.setitem(sys.modules, TENSORBOARD, None)
    outcome = call(script, "--dataset", "tiny", *folders(tmp_path), "--tensorboard")
    assert outcome.status == 2 and "pip install tensorboard" in outcome.err and outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# Saved episodes.


def test_saving_an_episode_changes_no_number(aligned_copy, aligned):
    align(aligned_copy, "--save_episode", 2, results="other")
    saved = read_episode(aligned_copy / "other" / "episodes" / f"{STAGE_3}.pt")
    assert saved["episode"] == 2
    keys = ("accuracy_per_episode", "confusion", "curve", "fine_tuning")
    first, other = result(aligned, STAGE_3), result(aligned_copy, STAGE_3, "other")
    assert {key: first[key] for key in keys} == {key: other[key] for key in keys}
    assert metrics(aligned) == metrics(aligned_copy, results="other")


@pytest.mark.parametrize("flags", [[], ["--align_blocks", 1]])
def test_a_saved_episode_holds_features_before_and_after_and_related_classes(aligned_copy, flags):
    align(aligned_copy, *flags, results="aligned")
    align(aligned_copy, *flags, "--alignment", "none", results="none")
    aligned, none = (
        read_episode(next((aligned_copy / name / "episodes").glob("*.pt"))) for name in ("aligned", "none")
    )
    row = metrics(aligned_copy, results="aligned")[0]
    for kind, n_each in (("support", 2), ("query", 3), ("related", row["n_drawn"])):
        n = n_each * (3 - row["n_empty"] if kind == "related" else 3)
        assert aligned[kind]["before"].shape == aligned[kind]["after"].shape == (n, 64)
        assert torch.equal(aligned[kind]["before"], none[kind]["before"])
        torch.testing.assert_close(none[kind]["after"], none[kind]["before"], rtol=1e-4, atol=1e-5)
        assert (aligned[kind]["after"] - aligned[kind]["before"]).abs().max() > 1e-2
    assert len(set(aligned["class_names"])) == 3 and aligned["support_images"].shape == (3, 3, 16, 16)
    names = [related["name"] for row in aligned["related_classes"] for related in row]
    assert len(names) == len(set(names)) == 6
    for row in aligned["related_classes"]:
        assert row[0]["score"] >= row[1]["score"]
        assert all(
            len(related["images"]) <= 2 and (related["score"] > 0) == (len(related["images"]) > 0) for related in row
        )


def test_an_episode_without_related_images_is_saved_and_drawn(aligned_copy, monkeypatch):
    monkeypatch.setattr("persistence.saved_episode.draw_related", None)  # nothing is drawn
    monkeypatch.setattr("methods.alignment.drawn_per_class", lambda samples, aug_size: 0)
    align(aligned_copy, "--overwrite")
    saved = read_episode(aligned_copy / "results" / "episodes" / f"{STAGE_3}.pt")
    assert saved["related"]["before"].shape == saved["related"]["after"].shape == (0, 64)
    assert call("reporting.figures", aligned_copy / "results").status == 0


def test_a_resumed_run_leaves_a_saved_episode_and_says_when_one_is_missing(aligned_copy):
    path = aligned_copy / "results" / "episodes" / f"{STAGE_3}.pt"
    before = path.stat().st_mtime_ns
    assert "was not saved" not in align(aligned_copy, "--resume", "--n_episodes", 4).out
    assert path.stat().st_mtime_ns == before
    path.unlink()
    outcome = align(aligned_copy, "--resume", "--n_episodes", 5)
    assert "episode 0 is done and was not saved" in outcome.out and not path.exists()


def test_an_episode_that_is_not_run_cannot_be_saved(aligned_copy):
    outcome = call("associative_alignment", *CURVE, *folders(aligned_copy), "--save_episode", 3)
    assert outcome.status == 2 and "--save_episode 3" in outcome.err and outcome.err.count("\n") == 1


def test_large_images_are_kept_small():
    images = torch.full((2, 3, 224, 224), 77, dtype=torch.uint8)
    assert thumbnails(images).shape == (2, 3, 84, 84) and (thumbnails(images) == 77).all()
    assert torch.equal(thumbnails(images[:, :, :84, :84]), images[:, :, :84, :84])
