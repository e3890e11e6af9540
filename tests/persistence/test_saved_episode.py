"""The episode that stage 3 saves for the figures."""

import pytest
import torch

from persistence.saved_episode import read_saved_episodes, thumbnails
from tests.helpers import CURVE, STAGE_3, align, call, folders, metrics, result


def test_saving_an_episode_changes_no_number(aligned_copy, aligned):
    align(aligned_copy, "--save_episode", 2, results="other")
    saved = read_saved_episodes(aligned_copy / "other" / "episodes" / f"{STAGE_3}.pt")[0]
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
        read_saved_episodes(next((aligned_copy / name / "episodes").glob("*.pt")))[0] for name in ("aligned", "none")
    )
    row = metrics(aligned_copy, results="aligned")[0]
    for kind, n_each in (("support", 2), ("query", 3), ("related", row["n_drawn"])):
        n = n_each * (3 - row["n_empty"] if kind == "related" else 3)
        assert aligned[kind]["before"].shape == aligned[kind]["after"].shape == (n, 64)
        assert torch.equal(aligned[kind]["before"], none[kind]["before"])
        torch.testing.assert_close(none[kind]["after"], none[kind]["before"], rtol=1e-4, atol=1e-5)
        assert (aligned[kind]["after"] - aligned[kind]["before"]).abs().max() > 1e-2
    assert len(set(aligned["class_names"])) == 3 and aligned["images"]["support"].shape == (6, 3, 16, 16)
    names = [related["name"] for row in aligned["related_classes"] for related in row]
    assert len(names) == len(set(names)) == 6
    for row in aligned["related_classes"]:
        assert row[0]["score"] >= row[1]["score"]
        assert all(
            len(related["images"]) <= 4 and (related["score"] > 0) == (len(related["images"]) > 0) for related in row
        )


def test_an_episode_without_related_images_is_saved_and_drawn(aligned_copy, monkeypatch):
    monkeypatch.setattr("persistence.saved_episode.draw_related", None)  # nothing is drawn
    for module in ("methods.alignment", "methods.related_base"):
        monkeypatch.setattr(f"{module}.drawn_per_class", lambda samples, aug_size: 0)
    align(aligned_copy, "--overwrite")
    saved = read_saved_episodes(aligned_copy / "results" / "episodes" / f"{STAGE_3}.pt")[0]
    assert saved["related"]["before"].shape == saved["related"]["after"].shape == (0, 64)
    assert call("reporting.figures", aligned_copy / "results").status == 0


def test_a_resumed_run_leaves_a_saved_episode_and_runs_a_missing_one_again(aligned_copy):
    path = aligned_copy / "results" / "episodes" / f"{STAGE_3}.pt"
    (before,) = read_saved_episodes(path)
    align(aligned_copy, "--resume", "--n_episodes", 4)
    (found,) = read_saved_episodes(path)
    assert found["standing"] != before["standing"]  # among four now
    path.unlink()
    align(aligned_copy, "--resume", "--n_episodes", 5)
    (again,) = read_saved_episodes(path)
    for part in ("logits", "query", "support", "related"):
        assert all(torch.equal(again[part][when], before[part][when]) for when in ("before", "after"))


def test_the_worst_and_the_median_episode_are_saved_by_name(aligned_copy):
    align(aligned_copy, "--overwrite", "--save_episode", "worst", "median")
    record = result(aligned_copy, STAGE_3)
    of_parts = (part["accuracy_per_episode"] for part in (record, record["fine_tuning"]))
    gains = [after - before for after, before in zip(*of_parts, strict=True)]
    saved = read_saved_episodes(aligned_copy / "results" / "episodes" / f"{STAGE_3}.pt")
    assert {gains[each["episode"]] for each in saved} == set(sorted(gains)[:2])
    for each in saved:
        assert each["standing"]["gain"] == pytest.approx(gains[each["episode"]], abs=2e-3)
    outcome = call("associative_alignment", *CURVE, *folders(aligned_copy), "--save_episode", "best")
    assert outcome.status == 2 and "'best'" in outcome.err and outcome.err.count("\n") == 1


def test_an_episode_that_is_not_run_cannot_be_saved(aligned_copy):
    outcome = call("associative_alignment", *CURVE, *folders(aligned_copy), "--save_episode", 3)
    assert outcome.status == 2 and "--save_episode 3" in outcome.err and outcome.err.count("\n") == 1


def test_large_images_are_kept_small():
    images = torch.full((2, 3, 224, 224), 77, dtype=torch.uint8)
    assert thumbnails(images).shape == (2, 3, 84, 84) and (thumbnails(images) == 77).all()
    assert torch.equal(thumbnails(images[:, :, :84, :84]), images[:, :, :84, :84])
