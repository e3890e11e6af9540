"""The table of results: which columns it has, what is best, means over seeds, and that LaTeX and csv hold the same."""

import csv
import json
import shutil
import subprocess

import pytest

from reporting.report import read_results
from reporting.result_figures import shots_figure
from reporting.result_table import MEAN, best_rows, columns_of, csv_rows, latex_rows, markdown_rows, result_rows
from tests.helpers import call


def number(values, ci95=1.0):
    return {"accuracy": sum(values) / len(values), "ci95": ci95, "accuracy_per_episode": values}


def a_result(values=(50.0, 60.0), stage="transferLearning", **changes):
    return {
        **{"stage": stage, "dataset": "toy", "dataset_fingerprint": "f", "method": "arcMax", "backbone": "Conv4"},
        **{"img_size": 84, "n_way": 5, "n_shot": 1, "n_query": 15, "n_episodes": len(values), "n_class": 20},
        **{"n_images": 400, "seconds": 3.0, "seed": 0, "config": {}, "commit": "abc", "checkpoint_digest": "d0"},
        **{"checkpoint_epoch": 4, "epochs_trained": 10},
        **number([*values]),
        **changes,
    }


def aligned(values, before, **changes):
    gain = [b - a for a, b in zip(before, values, strict=True)]
    more = {"alignment": "head", "fine_tuning": number([*before]), "difference": number(gain, 0.5)}
    return a_result(values, "associative_alignment", **more, **changes)


def table(*records):
    return result_rows(list(records))


def methods(rows):
    return [row.cells["method"] for row in rows]


def test_columns_appear_where_rows_differ():
    same = table(a_result(), a_result((70.0, 80.0), "metaLearning", method="ProtoNet"))
    assert not {"seed", "epoch", "checkpoint", "classes", "images", "episodes"} & set(columns_of(same))
    other = a_result((70.0, 80.0), "metaLearning", method="ProtoNet", checkpoint_epoch=-1, checkpoint_digest="d1")
    rows = table(a_result(), other)
    assert {"epoch", "checkpoint"} < set(columns_of(rows)) and "seed" not in columns_of(rows)
    assert [row.cells["epoch"] for row in rows] == ["5 of 10", "before training"]
    text = markdown_rows(table(a_result(), other | {"n_class": 19, "n_images": 380, "seed": 3}))
    assert "| seed | epoch | checkpoint | classes | images | seconds |" in text
    assert "| 3 | before training | d1 | 19 | 380 |" in text


def test_results_of_earlier_versions_have_a_row():
    older = {key: value for key, value in a_result().items() if not key.startswith(("checkpoint", "epochs", "n_im"))}
    (row,) = table(older)
    assert row.cells["epoch"] == row.cells["checkpoint"] == row.cells["images"] == ""


def test_the_best_is_better_than_each_row_of_the_same_training_and_episodes_by_the_paired_interval():
    before, after = (50.0, 60.0, 40.0), (54.0, 64.5, 44.5)
    rows = table(aligned(after, before))
    assert methods(rows) == ["arcMax, fine-tuning", "arcMax, head alignment"] and best_rows(rows) == {1}
    assert "| **54.33 ± 1.00** |" in markdown_rows(rows)
    assert not best_rows(table(aligned((54.0, 40.0, 64.0), before)))  # the interval of its gain holds zero
    elsewhere = a_result((90.0, 91.0, 92.0), "metaLearning", method="ProtoNet", checkpoint_digest="d1")
    assert best_rows(table(aligned(after, before), elsewhere)) == {1}  # of another training: not compared
    assert not best_rows(table(elsewhere))


def test_fine_tuning_stands_once_for_stage_1_and_stage_3_on_the_same_checkpoint_and_episodes():
    stage_3 = aligned((54.0, 64.0), (50.0, 59.0))
    assert methods(table(a_result(), stage_3)) == ["arcMax, fine-tuning", "arcMax, head alignment"]
    for changes in ({"checkpoint_digest": "d1"}, {"n_episodes": 3}, {"dataset_fingerprint": "g"}):
        assert methods(table(a_result(**changes), stage_3)).count("arcMax, fine-tuning") == 2


def of_seeds(*accuracies, **changes):
    return [
        a_result((a - 5, a + 5), seed=seed, checkpoint_digest=f"d{seed}", **changes)
        for seed, a in enumerate(accuracies)
    ]


def test_several_seeds_are_one_row_with_students_t_and_each_accuracy():
    rows = table(*of_seeds(50.0, 52.0, 54.0), *of_seeds(60.0, 61.0, n_shot=5))
    assert [row.cells["seed"] for row in rows] == ["mean of 3", "mean of 2"]
    assert rows[0].numbers[MEAN] == {"accuracy": pytest.approx(52.0), "ci95": pytest.approx(4.3027 * 2 / 3**0.5)}
    assert "| 52.00 ± 4.97 |" in markdown_rows(rows) and "| 50.00, 52.00, 54.00 |" in markdown_rows(rows)
    assert len(table(*of_seeds(50.0, 52.0), *of_seeds(70.0, 72.0, epochs_trained=3))) == 2  # of unlike training
    assert [row.cells["seed"] for row in table(*of_seeds(50.0))] == ["0"]
    gained = [
        aligned((a + 4, a + 6), (a, a + 1), seed=seed, checkpoint_digest=f"d{seed}")
        for seed, a in enumerate((50.0, 60.0, 70.0))
    ]
    rows = table(*gained)
    assert len(rows) == 2 and best_rows(rows) == {1}  # though seeds differ by more than the gain, of each it is 4.5
    assert "+4.50 ± 0.00" in markdown_rows(rows)


def test_latex_holds_the_rows_and_the_caption_that_a_paper_needs(tmp_path):
    records = [
        *of_seeds(50.0, 52.0, 54.0, dataset="a_b & 5%"),
        *of_seeds(60.0, 61.0, 62.0, n_shot=5, dataset="a_b & 5%"),
    ]
    text = latex_rows(table(*records))
    assert r"\caption{Accuracy on a\_b \& 5\%, Conv4, 84 px: 2 episodes with 15 queries per class." in text
    assert "Commit abc." in text and "Student's t" in text and "95\\% interval" in text
    assert text.count(r"$\pm$") >= 3 and "±" not in text
    head, *body = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(body) == 2 and {line.count(" & ") for line in (head, *body)} == {head.count(" & ")}
    assert "5-way 1-shot" in body[0] and "toy" not in body[0]
    if shutil.which("pdflatex"):
        page = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n%s\n\\end{document}\n"
        (tmp_path / "t.tex").write_text(page % text, encoding="utf-8")
        command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "t.tex"]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0


def test_accuracy_is_drawn_against_shots_with_both_intervals():
    records = [a_result(n_shot=n, ci95_classes=n + 1.0, accuracy=50.0 + n) for n in (5, 1, 20)]
    axes = shots_figure(table(*records, a_result((70.0, 80.0), method="cosMax"))).axes[0]
    (line,) = [line for line in axes.lines if line.get_label().startswith("arcMax, fine-tuning, toy")]
    assert line.get_xydata().tolist() == [[1, 51], [5, 55], [20, 70]]
    ends = sorted(y for bar in axes.collections[1].get_segments() for _, y in bar)
    assert ends == [49, 49, 49, 53, 61, 91]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "5", "20"]
    assert shots_figure(table(*records[:1])) is None


def test_csv_holds_numbers():
    rows = list(csv.DictReader(csv_rows(table(aligned((54.0, 64.0), (50.0, 59.0)))).splitlines()))
    assert [row["accuracy"] for row in rows] == ["54.500", "59.000"]
    assert [row["paired gain"] for row in rows] == ["", "4.500"] and rows[1]["paired gain ci95"] == "0.500"
    assert rows[0]["checkpoint"] == "d0" and rows[0]["epoch"] == "5 of 10"


def test_the_format_is_chosen_and_goes_with_the_table_alone(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.json").write_text(json.dumps(a_result()))
    assert call("reporting.report", tmp_path).out.startswith("| dataset |")
    assert call("reporting.report", tmp_path, "--format", "latex").out.startswith("\\begin{table}")
    assert call("reporting.report", tmp_path, "--format", "csv").out.startswith("dataset,backbone,task,method,")
    assert len(read_results(tmp_path)) == 1
    for flags in (["--format", "html"], ["--format", "csv", "--compare", "a", "b"]):
        outcome = call("reporting.report", tmp_path, *flags)
        assert outcome.status == 2 and "--format" in outcome.err and outcome.err.count("\n") == 1
    (tmp_path / "tables" / "a.json").write_text(json.dumps(a_result(checkpoint_epoch="x")))
    outcome = call("reporting.report", tmp_path)
    assert outcome.status == 2 and "'checkpoint_epoch' is of another type" in outcome.err
