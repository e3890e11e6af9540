"""The paper's numbers beside ours."""

from reporting.paper_tables import PAPER, SCRIPTS, TABLES, Plan, compare, markdown, paper_number
from reporting.paper_tables import table_rows as rows_of
from tests.helpers import ROOT


def test_only_what_is_known_for_sure_stands_as_the_papers_number():
    plan = Plan("miniImagenet", "CUB", ROOT, ROOT, {stage: [] for stage in SCRIPTS})
    known = {}
    for table in TABLES:
        for row in rows_of(table, plan, ["Conv4", "ResNet18"], [1, 5], [5, 10] if table == "ways" else [5]):
            number, source = paper_number(row, "miniImagenet")
            if number:
                assert (row.n_way, row.novel) == (5, "miniImagenet")
                known[row.name, row.backbone, row.n_shot] = (*number, source)
    assert known["arcMax, centroid alignment", "Conv4", 1] == (53.14, 1.06, "paper")
    assert known["arcMax, adversarial alignment", "ResNet18", 5] == (77.92, 0.82, "paper")
    assert known["arcMax, fine-tuning", "Conv4", 5] == (69.13, 0.59, "published code")
    assert len(known) == 2 * 4 + 2
    for numbers in (numbers for by_dataset in PAPER.values() for numbers in by_dataset.values()):
        assert all(20 < mean < 100 and 0 < ci95 < 2 for mean, ci95 in numbers) and numbers[0] < numbers[1]


def test_the_table_shows_how_far_we_are_from_the_paper():
    plan = Plan("miniImagenet", "miniImagenet", ROOT, ROOT, {stage: [] for stage in SCRIPTS})
    rows = rows_of("main", plan, ["Conv4"], [1], [5])
    done = {"accuracy": 52.0, "ci95": 0.8, "n_episodes": 600, "n_query": 50, "img_size": 84, "seconds": 12.3}
    done |= {"seed": 0, "commit": "abc", "command": "python", "config": {"n_epoch": 600}}
    aligned = done | {"alignment": "centroid", "difference": {"accuracy": 1.5, "ci95": 0.2}, "config": {}}
    results = [None, None, done, *[None] * 4, aligned, None]
    lines = markdown(compare("miniImagenet", rows, results)).splitlines()[2:]
    assert "52.00 ± 0.80 | 51.37 ± 0.69 (published code) | +0.63 |  | 600 | 600 | 12 |" in lines[2]
    assert "52.00 ± 0.80 | 53.14 ± 1.06 | -1.14 | +1.50 ± 0.20 | 600 | 600 | 12 |" in lines[7]
    assert "not run yet | 52.13 ± 0.99 |  |" in lines[8] and "not run yet | not known here |" in lines[0]
