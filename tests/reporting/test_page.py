"""The page of results: its structure always, and in a real browser where there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from persistence.saved_episode import read_saved_episodes
from reporting.figures import FIGURES
from reporting.page import MAX_BYTES, measure, report_page
from reporting.page_episodes import MAX_QUERIES, Query, episode_section
from tests.helpers import STAGE_3, align, call, result

EVIL = "<script>alert(1)</script>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """The elements of a page, (tag, attributes) each, and the text outside of style and script."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.inside = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("style", "script"):
            self.text += data

    def all(self, tag, look=""):
        found = [attrs for name, attrs in self.elements if name == tag]
        return [attrs for attrs in found if not look or look in (attrs.get("class") or "").split()]


def words(page):
    return " ".join(page.text.split())


@pytest.fixture(scope="module")
def page(aligned):
    """The page of finished stages 1 and 3."""
    outcome = call("reporting.page", aligned / "results")
    assert outcome.status == 0, outcome.err
    assert outcome.out.endswith("results/report.html\n")
    return (aligned / "results" / "report.html").read_text()


def test_the_page_has_every_part_and_fetches_nothing(page):
    found = Page(page)
    assert len(page) < 3e6
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == ["Results", "Figures", "Episodes"]
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp", page)
    assert all(attrs.get("src", "data:").startswith("data:") for _, attrs in found.elements)
    assert all(attrs["href"].startswith(("#", "data:")) for attrs in found.all("a") + found.all("link"))
    images = found.all("img")
    assert len(images) > 20 and all(attrs["alt"] for attrs in images)
    drawn = [attrs["alt"] for attrs in images if attrs["src"].startswith("data:image/svg")]
    expected = [about for name, (about, _) in FIGURES.items() if name != "shots"]  # there is one shot alone
    assert drawn == expected  # what reporting.figures writes
    names = [attrs["id"] for _, attrs in found.elements if "id" in attrs]
    assert len(names) == len(set(names))
    assert "prefers-color-scheme: dark" in page and any(a.get("name") == "viewport" for a in found.all("meta"))


def test_the_table_holds_what_the_results_hold(page, aligned):
    record = result(aligned, STAGE_3)
    for part in (record, record["fine_tuning"]):
        assert f"{part['accuracy']:.2f} ± {part['ci95']:.2f}" in words(Page(page))
    assert f"{record['difference']['accuracy']:+.2f} ± " in words(Page(page))
    assert len(Page(page).all("span", "scale")) == 8 + 1  # eight accuracies and a gain


def test_an_episode_shows_its_queries_those_that_alignment_changed_first(page, aligned):
    found = Page(page)
    saved = read_saved_episodes(aligned / "results" / "episodes" / f"{STAGE_3}.pt")[0]
    labels = saved["query"]["labels"]
    was, now = (saved["logits"][when].argmax(1) for when in ("before", "after"))
    kinds = [attrs["data-kind"] for attrs in found.all("details", "query")]
    assert len(kinds) == len(labels)
    n_changed = int((was != now).sum())
    assert all(kind in ("put right", "put wrong", "changed") for kind in kinds[:n_changed])
    assert all(kind in ("right", "wrong") for kind in kinds[n_changed:])
    assert kinds.count("right") + kinds.count("put right") == int((now == labels).sum())
    assert len(found.all("b", "right")) == int((now == labels).sum())  # not by colour alone
    record = result(aligned, STAGE_3)
    assert 100 * (now == labels).double().mean().item() == pytest.approx(record["accuracy_per_episode"][0], abs=1e-3)
    n_related = sum(len(related["images"]) for row in saved["related_classes"] for related in row)
    near = [attrs["data-near"].split() for attrs in found.all("span", "near")]
    assert all(len(row) == 3 and all(0 <= int(n) < n_related for n in row) for row in near)
    for row in saved["related_classes"]:
        for related in row:
            assert related["name"] in found.text and f"score {related['score']:.2f}" in words(found)


def test_several_episodes_are_kept_in_one_file_and_all_are_shown(aligned_copy):
    align(aligned_copy, "--overwrite", "--save_episode", 2, 0)
    path = aligned_copy / "results" / "episodes" / f"{STAGE_3}.pt"
    assert [record["episode"] for record in read_saved_episodes(path)] == [0, 2]
    found = Page(report_page(aligned_copy / "results"))
    assert [attrs.get("open") for attrs in found.all("details", "episode")] == [None, None]
    assert "Episode 0:" in found.text and "Episode 2:" in found.text
    align(aligned_copy, "--resume", "--n_episodes", 5, "--save_episode", 4)
    assert [record["episode"] for record in read_saved_episodes(path)] == [0, 2, 4]
    align(aligned_copy, "--overwrite", "--save_episode", 1)
    assert [record["episode"] for record in read_saved_episodes(path)] == [1]


def test_names_are_escaped(aligned_copy):
    results = aligned_copy / "results"
    path = results / "episodes" / f"{STAGE_3}.pt"
    saved = torch.load(path, weights_only=True)
    saved["class_names"][0] = saved["related_classes"][0][0]["name"] = EVIL
    torch.save(saved, path)
    for file in (results / "tables").glob("*.json"):
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {"dataset": EVIL, "method": EVIL, "backbone": EVIL}))
    (log,) = (results / "logs").glob("*_bestModel")
    log.rename(log.with_name("<script>x" + log.name))
    text = report_page(results)
    assert len(Page(text).all("script")) == 1 and "alert(1)" in Page(text).text and "<script>alert" not in text


def test_a_large_episode_is_cut_and_episodes_beyond_the_size_are_left_out(aligned_copy, monkeypatch):
    noise = torch.randint(0, 256, (3, 84, 84), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    saved = read_saved_episodes(aligned_copy / "results" / "episodes" / f"{STAGE_3}.pt")[0]
    many = [Query("noise", noise, 0, [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0])] * 250
    section = episode_section(saved, many, True)
    assert f"the first {MAX_QUERIES} of 250" in section and len(section) < MAX_BYTES
    monkeypatch.setattr("reporting.page.MAX_BYTES", 20_000)
    text = report_page(aligned_copy / "results")
    assert "1 more would make this file too large" in text and not Page(text).all("details")


@pytest.mark.parametrize(
    "truth, was, now, kind",
    [
        *((0, 0, 0, "right"), (0, 1, 0, "put right"), (0, 0, 1, "put wrong"), (0, 1, 1, "wrong")),
        (0, 1, 2, "changed"),
    ],
)
def test_what_alignment_did_to_a_query(truth, was, now, kind):
    one_hot = torch.eye(3).tolist()
    assert Query("", torch.zeros(3, 1, 1), truth, one_hot[was], one_hot[now], []).kind == kind


def test_an_interval_is_drawn_on_a_scale_that_holds_it():
    drawn = measure({"accuracy": 1.0, "ci95": 1.5}, "+1.00 ± 1.50", -1.0, 3.0)
    assert Page(drawn).all("i") == [{"class": "unsure ci95", "style": "left:12.50%;width:75.00%"}]
    both = measure({"accuracy": 1.0, "ci95": 0.5, "ci95_classes": 1.5}, "+1.00 ± 0.50 (1.50)", -1.0, 3.0)
    assert Page(both).all("i") == [  # what other classes may undo is not shown as sure
        {"class": "unsure ci95", "style": "left:37.50%;width:25.00%"},
        {"class": "unsure ci95_classes", "style": "left:12.50%;width:75.00%"},
    ]
    (point,) = Page(measure({"accuracy": 60.0, "ci95": None}, "60.00", 60.0, 60.0)).all("i")  # one episode, one result
    assert point == {"class": "up ci95", "style": "left:0.00%;width:0.00%"}


@pytest.mark.parametrize(
    "file, content, expected",
    [
        ("tables/x.json", "{", ["x.json", "damaged"]),
        ("logs/x/metrics.jsonl", "{", ["metrics.jsonl", "damaged"]),
        ("episodes/x.pt", "x", ["x.pt", "delete it"]),
        (None, "", ["tables", "run a stage"]),
    ],
)
def test_a_damaged_file_or_an_empty_folder_is_one_clear_line(aligned_copy, file, content, expected):
    results = aligned_copy / ("results" if file else "empty")
    if file:
        (results / file).parent.mkdir(exist_ok=True)
        (results / file).write_text(content)
    outcome = call("reporting.page", results)
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert all(word in outcome.err for word in expected), outcome.err


CLICKS = """
const out = {};
const query = document.querySelector(".query"), near = query.querySelector(".near");
query.querySelector("summary").focus();
out.focused = [near.querySelectorAll("img").length, near.checkVisibility()];
out.closed = query.querySelector("table").checkVisibility();
query.querySelector("summary").click();
out.open = query.open && query.querySelector("table").checkVisibility();
out.wide = document.documentElement.scrollWidth <= document.documentElement.clientWidth;
document.body.dataset.out = JSON.stringify(out);
"""


def browse(page, folder, width):
    """What CLICKS found in a real browser, and the messages of its console."""
    file = folder / "page.html"
    file.write_text(f"{page}<script>{CLICKS}</script>")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},800", "--enable-logging=stderr", "--dump-dom", file.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in result.stderr.splitlines() if ":CONSOLE" in line]
    (body,) = Page(result.stdout).all("body") or [{}]
    return json.loads(body.get("data-out", "{}")), console


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
@pytest.mark.parametrize("width", [500, 1200])
def test_in_a_browser_queries_open_without_an_error(page, tmp_path, width):
    found, console = browse(page, tmp_path, width)
    assert found and not console, console
    assert found["focused"] == [3, True] and not found["closed"] and found["open"]
    assert found["wide"]  # nothing scrolls sideways


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_the_browser_test_would_see_an_error(page, tmp_path):
    _, console = browse(page.replace('"use strict";', '"use strict"; console.error("seen");'), tmp_path, 800)
    assert any("seen" in line for line in console)
