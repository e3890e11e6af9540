"""Two results of the same episodes, paired; results of other episodes are refused."""

import json

import pytest
import torch

from methods.intervals import mean_record
from reporting.page import results_table
from reporting.report import read_results
from reporting.result_figures import run_name
from tests.helpers import call


def write(path, accuracies, **changes):
    record = {
        "stage": "associative_alignment",
        "dataset": "toy",
        "dataset_fingerprint": "f",
        "method": "arcMax",
        "backbone": "Conv4",
        "img_size": 84,
        "n_way": 5,
        "n_shot": 1,
        "n_query": 15,
        "n_episodes": len(accuracies),
        "seconds": 1.0,
        "accuracy": sum(accuracies) / len(accuracies),
        "ci95": 1.0,
        "accuracy_per_episode": accuracies,
        "seed": 0,
        "config": {"episodes_file": None},
    }
    path.write_text(json.dumps(record | changes))
    return path


def test_the_difference_of_two_results_is_paired(tmp_path):
    """Episodes differ by 60 points, the two results always by 1 or 3: the interval is that of 1 and 3."""
    before = write(tmp_path / "fp32.json", [20.0, 80.0, 20.0, 80.0])
    after = write(tmp_path / "bf16.json", [21.0, 83.0, 21.0, 83.0])
    outcome = call("reporting.report", "--compare", before, after)
    assert outcome.status == 0, outcome.err
    header, _, first, second = outcome.out.splitlines()
    assert header.startswith("| method, 4 episodes |") and first == "| 1. arcMax | 50.00 ± 55.12 (?) |  |"
    assert second == f"| 2. arcMax ({after}) | 52.00 ± 56.96 (?) | +2.00 ± 1.84 (?) |"
    assert "| -2.00 ± 1.84 (?) |" in call("reporting.report", "--compare", after, before).out
    again = write(tmp_path / "again.json", [20.0, 80.0, 20.0, 80.0])
    assert (
        f"| 2. arcMax ({again}) | 50.00 ± 55.12 (?) | +0.00 ± 0.00 (?) |"
        in call("reporting.report", "--compare", before, again).out
    )


def test_a_shorter_result_is_paired_with_the_beginning_of_a_longer_one(tmp_path):
    long = write(tmp_path / "long.json", [20.0, 80.0, 0.0, 0.0])
    lines = call("reporting.report", "--compare", long, write(tmp_path / "short.json", [21.0, 83.0])).out.splitlines()
    assert "2 episodes" in lines[0] and "| 50.00 ±" in lines[2] and "+2.00 ± 12.71 (?)" in lines[3]


def many_episodes():
    """60 episodes of 2 of 8 classes, and two results on them: the second gains 4 points with classes 0 to 3."""
    classes = torch.rand(60, 8, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :2]
    before = [float(i % 7) + 50 for i in range(60)]
    gains = 2.0 * (classes < 4).sum(1)
    return classes, before, [b + g for b, g in zip(before, gains.tolist(), strict=True)], gains / 100


def test_a_paired_difference_has_an_interval_over_classes_where_results_name_them(tmp_path):
    classes, before, after, gains = many_episodes()
    named = {"classes_per_episode": classes.tolist(), "ci95_classes": 3.0}
    files = [write(tmp_path / f"{name}.json", a, **named) for name, a in (("a", before), ("b", after))]
    outcome = call("reporting.report", "--compare", *files)
    mean, ci95, ci95_classes = mean_record(gains, classes).values()
    assert ci95_classes > 1.5 * ci95
    shown = f"| {mean:+.2f} ± {ci95:.2f} ({ci95_classes:.2f}) |"
    assert shown in outcome.out.splitlines()[3] and "60 episodes" in outcome.out
    older = write(tmp_path / "older.json", before)
    assert f"| {mean:+.2f} ± {ci95:.2f} (?) |" in call("reporting.report", "--compare", older, files[1]).out


def test_a_comparison_pairs_every_row_with_those_above_it(tmp_path):
    classes, before, after, gains = many_episodes()
    named = {"classes_per_episode": classes.tolist(), "ci95_classes": 3.0}
    numbers = {"accuracy": 1.0, "ci95": 1.0, "ci95_classes": 3.0}
    tuned = numbers | {"accuracy_per_episode": before}
    shot = tuned | {"accuracy_per_episode": [a - 1 for a in before], "difference": numbers}
    names = ("SimpleShot", "logistic regression", "related prototype")
    more = {"alignment": "head", "fine_tuning": tuned, "difference": numbers, "controls": dict.fromkeys(names, shot)}
    aligned = write(tmp_path / "aligned.json", after, **named | more)
    other = write(tmp_path / "other.json", before[:50], method="ProtoNet", **named)
    again = write(tmp_path / "again.json", after, method="ProtoNet", **named)
    outcome = call("reporting.report", "--compare", aligned, other, again)
    assert outcome.status == 0, outcome.err
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in outcome.out.splitlines()]
    assert header == ["method, 50 episodes", "accuracy % (± over classes)", *(f"minus {i}" for i in range(1, 7))]
    assert [row[0].split(". ")[1] for row in rows] == [
        "arcMax, fine-tuning",
        *(f"arcMax, {name}" for name in names),
        "arcMax, head alignment",
        "ProtoNet",
        f"ProtoNet ({again})",  # of that name, but of other numbers
    ]
    (tmp_path / "elsewhere").mkdir()
    third = write(tmp_path / "elsewhere" / again.name, [a + 1 for a in after], method="ProtoNet", **named)
    listed = call("reporting.report", "--compare", other, again, third).out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in listed] == [
        "| 1. ProtoNet",
        f"| 2. ProtoNet ({again})",
        f"| 3. ProtoNet ({third})",
    ]
    mean, ci95, ci95_classes = mean_record(gains[:50], classes[:50]).values()
    assert rows[4][2] == f"{mean:+.2f} ± {ci95:.2f} ({ci95_classes:.2f})"
    assert rows[1][2:] == ["-1.00 ± 0.00 (0.00)", "", "", "", "", ""] and rows[5][2] == "+0.00 ± 0.00 (0.00)"
    elsewhere = write(tmp_path / "elsewhere.json", before, dataset_fingerprint="g")
    outcome = call("reporting.report", "--compare", aligned, elsewhere)
    assert outcome.status == 2 and "same episodes" in outcome.err and outcome.err.count("\n") == 1


def test_the_table_has_intervals_over_classes_in_brackets(tmp_path):
    (tmp_path / "tables").mkdir()
    known = {"accuracy": 40.0, "ci95": 1.0, "accuracy_per_episode": [40.0], "ci95_classes": 5.25}
    gain = {"accuracy": 10.0, "ci95": 0.5, "ci95_classes": None}
    more = {"alignment": "head", "fine_tuning": known, "difference": gain, "classes_per_episode": [[0, 1]]}
    file = write(tmp_path / "tables" / "new.json", [50.0], ci95_classes=6.5, **more)
    out = call("reporting.report", tmp_path).out
    assert "| 40.00 ± 1.00 (5.25) |" in out and "| 50.00 ± 1.00 (6.50) | +10.00 ± 0.50 (?) |" in out
    page = results_table(read_results(tmp_path))
    assert page.count('<i class="up ci95_classes"') == 2 and "+10.00 ± 0.50 (?)" in page
    wide = gain | {"ci95_classes": 12.0}  # what holds for these classes is not shown to hold for others
    write(file, [50.0], ci95_classes=6.5, **more | {"difference": wide})
    assert '<i class="unsure ci95"' in results_table(read_results(tmp_path))
    write(file, [50.0], ci95_classes=6.5, **more | {"difference": gain | {"ci95_classes": "wide"}})
    outcome = call("reporting.report", tmp_path)
    assert outcome.status == 2 and "'difference' is of another type" in outcome.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset_fingerprint": "g"}, ["dataset_fingerprint", "same episodes"]),
        ({"n_shot": 5}, ["n_shot 1", " 5:"]),
        ({"seed": 7}, ["seed 0", "seed 7", "--episodes_file"]),
        ({"config": {"episodes_file": "e.json"}}, ["seed 0", "e.json"]),
        ({"stage": "x", "alignment": "centroid"}, ["other.json", "lacks"]),
    ],
)
def test_results_of_other_episodes_are_refused(tmp_path, changes, words):
    before = write(tmp_path / "one.json", [20.0, 80.0])
    outcome = call("reporting.report", "--compare", before, write(tmp_path / "other.json", [20.0, 80.0], **changes))
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert all(word in outcome.err for word in words), outcome.err


def test_a_file_that_is_no_result_is_named(tmp_path):
    before = write(tmp_path / "one.json", [20.0, 80.0])
    (tmp_path / "speed.json").write_text('{"rows": []}')
    for name, word in (("speed.json", "not the result of a stage"), ("absent.json", "no result file")):
        outcome = call("reporting.report", "--compare", before, tmp_path / name)
        assert outcome.status == 2 and name in outcome.err and word in outcome.err


def test_the_table_has_the_controls_of_an_alignment_once_and_takes_older_results(tmp_path):
    (tmp_path / "tables").mkdir()
    fine_tuning = {"accuracy": 40.0, "ci95": 1.0, "accuracy_per_episode": [40.0, 40.0]}
    control = fine_tuning | {"accuracy": 45.0, "difference": {"accuracy": 5.0, "ci95": 0.5}}
    worse = fine_tuning | {"accuracy": 30.0, "difference": {"accuracy": 20.0, "ci95": 0.5}}
    aligned = {"fine_tuning": fine_tuning, "difference": {"accuracy": 10.0, "ci95": None}, "alignment": "centroid"}
    write(tmp_path / "tables" / "older.json", [50.0, 50.0], **aligned)
    for alignment in ("head", "naive"):
        nearest = {"nearest_mean": {"Euclidean": worse, "cosine": control}, "alignment": alignment}
        write(tmp_path / "tables" / f"{alignment}.json", [50.0, 50.0], **aligned | nearest)
    lines = call("reporting.report", tmp_path).out.splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[4:9]] for line in lines]
    names = [
        "fine-tuning",
        "nearest mean, Euclidean",
        "nearest mean, cosine",
        *(f"{a} alignment" for a in ("head", "naive")),
    ]
    assert sorted(row[0] for row in rows) == sorted(f"arcMax, {name}" for name in [*names, "centroid alignment"])
    aligned_rows = {row[0]: row[2:4] for row in rows if "alignment" in row[0]}
    assert aligned_rows["arcMax, head alignment"] == ["+10.00 ± nan", "+5.00 ± 0.50"]
    assert aligned_rows["arcMax, centroid alignment"] == ["+10.00 ± nan", ""]


def test_a_row_says_when_its_episodes_are_not_of_the_datasets_novel_classes(tmp_path):
    (tmp_path / "tables").mkdir()
    kinds = {"a": ({}, "val"), "b": ({"novel_dataset": "birds"}, "novel"), "c": ({"novel_dataset": "birds"}, "val")}
    kinds |= {"d": ({"novel_dataset": "toy"}, "novel"), "e": ({"backbone": "ResNet12"}, "novel")}
    for name, (more, split) in kinds.items():
        config = {"episodes_file": None, "test_split": split}
        write(tmp_path / "tables" / f"{name}.json", [50.0], config=config, **more)
    (tmp_path / "tables" / "f.json").write_text((tmp_path / "tables" / "e.json").read_text().replace("toy", "aaa"))
    rows = [line.split("|") for line in call("reporting.report", tmp_path).out.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["aaa", "toy", "toy", "toy to birds", "toy to birds, val", "toy, val"]
    assert "toy to birds, val" in results_table(read_results(tmp_path))
    names = [run_name(record) for record in read_results(tmp_path)]
    assert names[3:5] == [f"arcMax, {where} 5-way 1-shot" for where in ("toy to birds", "toy to birds, val")]
