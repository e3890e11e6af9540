"""The study of docs/when_it_helps.md: a row per result of the head, with auto's beside it, and a figure."""

import json

from tests.helpers import align, call


def test_a_row_has_the_gains_of_the_head_and_what_auto_chose(workspace):
    align(workspace, "--align_blocks", 0)
    (file,) = (workspace / "results" / "tables").glob("*_head.json")
    head = json.loads(file.read_text())
    auto = head | {"align_preset_auto": {"flags": "--alignment none"}, "difference": {"accuracy": 0.0, "ci95": 0.0}}
    file.with_name(file.name.replace("head", "auto")).write_text(json.dumps(auto))

    outcome = call("docs.when_it_helps", workspace / "results", "--figure", workspace / "figure.png")
    assert outcome.status == 0, outcome.err
    header, _, row = (line.strip("| ").split(" | ") for line in outcome.out.splitlines())
    cells = dict(zip(header, row, strict=True))
    related, nearest = (
        json.loads(file.read_text())[part][name]["accuracy"]
        for part, name in (("controls", "related prototype"), ("nearest_mean", "cosine"))
    )
    assert cells["related prototype over nearest mean"].startswith(f"{related - nearest:+.2f} ± ")
    assert cells["head over fine-tuning"].startswith(f"{head['difference']['accuracy']:+.2f} ± ")
    assert (cells["base to novel classes"], cells["shots"], cells["chosen"]) == ("tiny", "2", "fine-tuning")
    assert cells["auto over fine-tuning"] == "+0.00 ± 0.00"
    assert (workspace / "figure.png").stat().st_size > 5000
