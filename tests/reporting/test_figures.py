"""Pictures: what is in them, and what is said of one that cannot be drawn."""

import shutil

import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from reporting.figure_style import CYCLE, label_text
from reporting.figures import FIGURES
from reporting.result_figures import confusion_figure
from tests.helpers import STAGE_1, STAGE_3, call


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "shots"])
def test_each_picture_has_content_in_the_colours_of_the_palette(aligned, name):
    image = Image.open(aligned / "results" / "figures" / f"{name}.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(maxcolors=2**24)}
    assert min(image.size) > 300 and len(colours) > 100
    if name != "confusion":
        assert sum(tuple(round(255 * c) for c in to_rgb(colour)) in colours for colour in CYCLE) >= 2


def test_what_cannot_be_drawn_is_said_in_a_line_with_what_would_make_it(aligned_copy):
    results = aligned_copy / "results"
    for path in (results / "episodes", results / "figures"):
        shutil.rmtree(path)
    (results / "tables" / f"{STAGE_3}.json").unlink()
    outcome = call("reporting.figures", results)
    assert outcome.status == 0
    skipped = [line for line in outcome.out.splitlines() if line.startswith("skipped")]
    assert [line.split()[1] for line in skipped] == ["shots.png:", "curve.png:", "projection.png:"]
    assert all("associative_alignment.py" in line for line in skipped[1:]) and "--record_curve" in skipped[1]
    drawn = {path.stem for path in (results / "figures").iterdir()}
    assert drawn == {"training", "confusion"}


def test_a_result_is_named_or_the_newest(aligned_copy):
    results = aligned_copy / "results"
    outcome = call("reporting.figures", results, "--result", STAGE_1)
    assert outcome.status == 0 and "skipped projection.png" in outcome.out and "confusion.png" in outcome.out
    path = results / "tables" / f"{STAGE_1}.json"
    assert "skipped projection.png" in call("reporting.figures", results, "--result", path).out
    for name in ("absent", "*"):
        outcome = call("reporting.figures", results, "--result", name)
        assert outcome.status == 2 and f"--result {name}" in outcome.err and outcome.err.count("\n") == 1


def test_class_names_are_labels_whatever_they_hold():
    assert label_text("$x$ and $y") == r"\$x\$ and \$y" and label_text("_a").lstrip() == "_a"
    assert label_text("_a")[0] != "_" and label_text("abcdef", 4) == "abc…"
    n_class = 45
    names = [f"$_{c}^" for c in range(n_class)]
    record = {"method": "arcMax", "accuracy": 50.0, "dataset": "$", "n_way": 2, "n_shot": 1, "n_episodes": 3}
    record["config"] = {}
    figure = confusion_figure(record | {"confusion": {name: {name: 2} for name in names}})
    figure.canvas.draw()
    assert len(figure.axes[0].get_yticklabels()) == 23
