"""The rows of the paper's tables: which are done, and the paper's numbers beside ours."""

import json
import os
from dataclasses import replace

import pytest

from reporting.paper_tables import PAPER, SCRIPTS, TABLES, Plan, compare, finished, markdown, paper_number, write_table
from tests.helpers import ROOT, STAGE_1, result


def test_only_what_is_known_for_sure_stands_as_the_papers_number():
    plan = Plan("miniImagenet", "CUB", ROOT, {stage: {} for stage in SCRIPTS})
    known = {}
    for table_rows in TABLES.values():
        for row in [row for b in ("Conv4", "ResNet18") for n_shot in (1, 5) for row in table_rows(plan, b, n_shot)]:
            if number := paper_number(row, "miniImagenet"):
                assert row.novel == "miniImagenet"
                known[row.name, row.backbone, row.n_shot] = tuple(number.values())
    assert known["arcMax, centroid alignment", "Conv4", 1] == (53.14, 1.06, "paper")
    assert known["arcMax, adversarial alignment", "ResNet18", 5] == (77.92, 0.82, "paper")
    assert known["arcMax, fine-tuning", "Conv4", 5] == (69.13, 0.59, "published code")
    assert len(known) == 2 * 4 + 2
    for numbers in PAPER.values():
        assert all(20 < mean < 100 and 0 < ci95 < 2 for mean, ci95 in numbers) and numbers[0] < numbers[1]


def test_the_table_shows_how_far_we_are_from_the_paper():
    plan = Plan("miniImagenet", "miniImagenet", ROOT, {stage: {} for stage in SCRIPTS})
    rows = TABLES["main"](plan, "Conv4", 1)
    done = {"accuracy": 52.0, "ci95": 0.8, "n_episodes": 600, "n_query": 50, "img_size": 84, "seconds": 12.3}
    done |= {"seed": 0, "commit": "abc", "command": "python", "config": {"n_epoch": 600}}
    aligned = done | {"alignment": "centroid", "difference": {"accuracy": 1.5, "ci95": 0.2}, "config": {}}
    results = [None, None, done, *[None] * 6, aligned, None]
    lines = markdown(compare("miniImagenet", rows, results)).splitlines()[2:]
    assert "52.00 ± 0.80 | 51.37 ± 0.69 (published code) | +0.63 ± 1.06 |  | 600 | 600 | 12 |" in lines[2]
    assert "52.00 ± 0.80 | 53.14 ± 1.06 | -1.14 ± 1.33 | +1.50 ± 0.20 | 600 | 600 | 12 |" in lines[9]
    assert "not run yet | 52.13 ± 0.99 |  |" in lines[10] and "not run yet | not known here |" in lines[0]


def test_ours_minus_paper_has_the_interval_of_two_independent_means(row):
    result = dict.fromkeys(("n_episodes", "n_query", "img_size", "seconds", "seed", "commit", "command"), 1)
    result |= {"accuracy": 73.71, "config": {}}
    aligned = replace(row, name="arcMax, centroid alignment", n_shot=1)  # 62.71 ± 0.88 in the paper
    for ci95, expected, shown in ((0.66, 1.1, "+11.00 ± 1.10"), (0.0, 0.88, "+11.00 ± 0.88"), (None, None, "± nan")):
        records = compare("CUB", [aligned, row], [result | {"ci95": ci95}] * 2)
        assert (records[0]["ours_minus_paper"], records[0]["ours_minus_paper_ci95"]) == (11.0, expected)
        assert (records[1]["ours_minus_paper"], records[1]["ours_minus_paper_ci95"]) == (None, None)
        assert shown in markdown(records)


@pytest.fixture
def row(tmp_path):
    """A row whose checkpoint is there, and whose result is not."""
    plan = Plan("CUB", "CUB", tmp_path, {stage: {} for stage in SCRIPTS})
    row = plan.row("transfer", "arcMax", "Conv4", 1)
    for path in (row.checkpoint, row.result):
        path.parent.mkdir(parents=True)
    row.checkpoint.touch()
    return row


def test_a_row_is_finished_by_a_result_of_its_flags_that_is_younger_than_its_checkpoint(row, trained):
    config = {"lr": 0.1, "seed": 0}
    assert finished(row, config) is None
    for damaged in ("", "{", "[]", '{"accuracy": 5}'):
        row.result.write_text(damaged)
        assert finished(row, config) is None
    whole = result(trained, STAGE_1) | {"config": config}
    for missing in ("accuracy", "ci95", "n_query", "command"):
        row.result.write_text(json.dumps({key: value for key, value in whole.items() if key != missing}))
        assert finished(row, config) is None
    row.result.write_text(json.dumps(whole))
    assert finished(row, config) == whole
    assert finished(row, {"lr": 0.2, "seed": 0}) is None
    os.utime(row.checkpoint, (row.result.stat().st_mtime + 1,) * 2)
    assert finished(row, config) is None


def test_small_classes_have_fewer_queries_unless_a_flag_says_how_many(row):
    assert row.flags[row.flags.index("--n_query") + 1] == "15"
    plan = Plan("CUB", "CUB", ROOT, {stage: {"--n_query": ["7"]} for stage in SCRIPTS})
    flags = plan.row("transfer", "arcMax", "Conv4", 1).flags
    assert flags.count("--n_query") == 1 and flags[flags.index("--n_query") + 1] == "7"
    mini = Plan("miniImagenet", "miniImagenet", ROOT, {stage: {} for stage in SCRIPTS})
    assert "--n_query" not in mini.row("transfer", "arcMax", "Conv4", 1).flags


def test_a_table_is_written_as_markdown_and_as_json(row, tmp_path):
    about = {"table": "main", "dataset": "CUB", "scale": "full", "command": "python reproduce.py"}
    text = write_table(tmp_path / "reproduce_main", about, compare("CUB", [row], [None]))
    assert text == (tmp_path / "reproduce_main.md").read_text()
    assert text.startswith("# main table, CUB, full scale: 0 of 1 rows\n") and "`python reproduce.py`" in text
    record = json.loads((tmp_path / "reproduce_main.json").read_text())
    assert record["table"] == "main" and [r["name"] for r in record["rows"]] == ["arcMax, fine-tuning"]
