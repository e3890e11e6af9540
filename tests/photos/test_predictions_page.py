"""The page of predictions, from made-up ones: what it holds, and what a person does with it in a browser."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
from html import unescape

import pytest
import torch
from PIL import Image

from engine.errors import UserError
from engine.run import Run
from models import build_head
from persistence.checkpoints import create_backbone
from photos import predictions_page
from photos.classifier import Answers, Classifier, Fitted
from photos.confidence import Confidence
from photos.images import list_support
from photos.predictions_page import write_predictions
from photos.table import Predictions

EVIL = "<script>alert(1)"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


@pytest.fixture
def support(tmp_path):
    """A support folder of two classes, and three queries, as paths."""
    for name, grey in (("support/heron/a", 40), ("support/tern/b", 90), ("q0", 120), ("q1", 160), ("q2", 200)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (240, 90), (grey,) * 3).save(tmp_path / f"{name}.png")
    return tmp_path / "support"


def predictions_of(support, related, n=3, confidence=None, background=None, **more):
    """Predictions of n images: the first sure, the second unlike and in a folder of the other class, the third unsure,
    and so on."""
    probabilities = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]]).repeat(n // 3, 1)
    finetuned = probabilities.flip(1) if related else probabilities
    backbone, head = create_backbone("Conv4", 16, seed=0), build_head("softMax", 4, 2, 1.0, 0.0)
    y_support, z_support = torch.tensor([0, 1]), torch.eye(2, 4)
    classifier = Classifier(
        backbone, backbone, head, head, ["heron", "tern"], z_support, y_support, ["heron/a.png", "b"], confidence, 0.5
    )
    cosine = torch.tensor([1.0, 0.0, 1.0]).repeat(n // 3)
    answers = Answers(probabilities, finetuned, cosine, torch.tensor([0, 1, 1]).repeat(n // 3))
    paths = [support.parent / f"q{i % 3}.png" for i in range(n)]
    files = [("q{}.png", f"heron/{EVIL}{{}}", 'q"{}, 2.png')[i % 3].format(i) for i in range(n)]
    notes = [f"skipped: image {EVIL}"]
    facts = {"img_size": 16, "background": background}
    return Predictions(Fitted(classifier, facts, related), files, paths, answers, notes, 0.65, **more)


def written(support, related=None, n=3, with_support=True, **more):
    """The page of such predictions, as text, and the data of its script."""
    path, predictions = support.parent / "predictions.html", predictions_of(support, related or {}, n, **more)
    write_predictions(path, predictions, support if with_support else None, 2, Run())
    text = path.read_text()
    return text, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_the_page_says_what_the_table_says(support):
    text, data = written(support)
    assert [image["file"] for image in data["images"]] == ["q0.png", f"heron/{EVIL}1", 'q"2, 2.png']
    assert [image["label"] for image in data["images"]] == ["heron", "unsure", "tern"]
    assert [image["probabilities"] for image in data["images"]] == [[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]]
    assert [image["marks"] for image in data["images"]] == [
        [],
        ["unsure", "unlike every class", "in a folder heron"],
        [],
    ]
    assert [data["examples"][image["nearest"]] for image in data["images"]] == ["heron/a.png", "b", "b"]
    shown = unescape(text)
    for words in ("3 images, labelled from 2 examples", f"skipped: image {EVIL}", "accuracy not known", "only 1 of 3"):
        assert words in shown
    assert "<script>alert" not in text
    assert "quer" not in re.sub(r"<script>.*?</script>|<style>.*?</style>", "", text, flags=re.S)


def test_the_images_are_whole(support):
    Image.new("RGB", (1, 400)).save(support.parent / "q1.png")
    for image, size in zip(written(support)[1]["images"], [(160, 60), (1, 160)], strict=False):
        kind, content = image["picture"].split(",")
        assert kind == "data:image/webp;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == size


def shown_colours(text):
    """The colour at the corner of each picture that is embedded in a page."""
    pictures = re.findall(r"data:image/webp;base64,([\w+/=]+)", text)
    return [Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB").getpixel((0, 0)) for each in pictures]


def test_images_and_examples_are_shown_on_the_background_that_they_were_labelled_on(support, monkeypatch):
    monkeypatch.setattr(predictions_page, "MAX_EMBEDDED", 2)
    for name in ("support/heron/a", "support/tern/b", "q0", "q1", "q2"):
        Image.new("RGBA", (20, 20), (200, 10, 10, 0)).save(support.parent / f"{name}.png")
    known = Confidence([1, 1], [0, 0], 2, 1.0, [(1, [0.75, 0.25])])
    for background, colour in (("#0000ff", (0, 0, 255)), ("white", (255, 255, 255))):
        text, data = written(support, background=background, review=True, confidence=known)
        colours = shown_colours(text)
        assert len(colours) == 2 + 1 + 2  # examples of the classes, one to review, images
        assert max(abs(a - b) for each in colours for a, b in zip(each, colour, strict=True)) < 4
        assert data["background"] == background  # on which the browser lays the third


def test_the_support_folder_is_listed_once(support, monkeypatch):
    listed = []
    monkeypatch.setattr(predictions_page, "list_support", lambda folder: listed.append(folder) or list_support(folder))
    known = Confidence([1, 1], [0, 0], 2, 1.0, [(1, [0.75, 0.25])])
    assert written(support, review=True, confidence=known)[0].count("<img") == 3 and listed == [support]


@pytest.mark.parametrize("related", [{}, {"heron": ["stork"], "tern": ["gull<"]}])
def test_what_alignment_did_is_shown_where_there_was_one(support, related):
    text, data = written(support, related)
    assert all(("before" in image) == bool(related) for image in data["images"])
    assert ("gull&lt;" in text) == ("related base classes" in text) == bool(related)
    if related:
        assert data["images"][0]["before"] == [0.1, 0.9] and data["images"][0]["probabilities"] == [0.9, 0.1]


def test_without_a_support_folder_no_example_is_shown(support):
    assert written(support)[0].count('<img id="example') == 2
    assert written(support, with_support=False)[0].count("<img") == 0


@pytest.mark.parametrize("with_support", [True, False])
def test_examples_to_review_are_shown_the_most_certain_first(support, with_support):
    assert "to review" not in written(support)[0]
    assert "tested no example" in written(support, review=True)[0]
    wrong = [(1, [0.75, 0.25]), (0, [0.375, 0.625])]
    known = Confidence(tested=[1, 1], right=[0, 0], n_folds=2, temperature=1.0, wrong=wrong)
    text = unescape(written(support, with_support=with_support, review=True, confidence=known)[0])
    section = text[text.rindex("Examples to review") :]
    rows = [row.split("</table>")[0].split("<td>")[1:] for row in section.split("<tr>")[2:4]]
    assert [row[1:] for row in rows] == [["tern", "heron", "0.75"], ["heron", "tern", "0.62"]]
    assert ["b" in rows[0][0], "heron/a.png" in rows[1][0]] == [True, True]
    assert [row[0].count("<img") for row in rows] == [int(with_support)] * 2


def test_beyond_a_number_of_images_the_page_shows_their_files(support, monkeypatch):
    monkeypatch.setattr(predictions_page, "MAX_EMBEDDED", 1)
    pictures = [image["picture"] for image in written(support)[1]["images"]]
    assert pictures[0].startswith("data:")
    assert pictures[1:] == [(support.parent / f"q{i}.png").resolve().as_uri() for i in (1, 2)]


def test_an_image_that_is_gone_is_named(support):
    (support.parent / "q1.png").unlink()
    with pytest.raises(UserError, match="q1.png"):
        written(support)


CLICKS = """
const out = {};
window.Blob = function (parts) { this.text = parts.join(""); };
URL.createObjectURL = (blob) => { out.csv = blob.text; return "#"; };
window.prompt = () => ' new, "class" ';
const photos = () => [...document.querySelectorAll(".photo")];
const choose = (select, value) => { select.value = value; select.dispatchEvent(new Event("change")); };
out.page = [photos().length, document.getElementById("place").textContent];
out.whole = getComputedStyle(photos()[0].querySelector("img")).objectFit;
out.lazy = photos().every((photo) => photo.querySelector("img").loading === "lazy");
out.words = photos().slice(0, 3).map((photo) => [...photo.querySelectorAll("p")].map((p) => p.textContent));
out.nothing = document.getElementById("download").disabled;
photos()[0].querySelector("details").open = true;
document.getElementById("on").click();
out.on = [photos().length, document.getElementById("place").textContent, document.getElementById("on").disabled];
out.laid = photos().map((photo) => photo.querySelector("img").style.background);
choose(photos()[2].querySelector("select"), "heron");
choose(photos()[0].querySelector("select"), "another class ...");
document.getElementById("back").click();
choose(photos()[1].querySelector("select"), "tern");
choose(photos()[0].querySelector("select"), "tern");
choose(photos()[0].querySelector("select"), "heron");
out.before = photos()[0].classList.contains("corrected");
out.leaving = !dispatchEvent(new Event("beforeunload", { cancelable: true }));
document.getElementById("download").click();
out.left = !dispatchEvent(new Event("beforeunload", { cancelable: true }));
choose(document.getElementById("which"), "corrected");
out.corrected = photos().map((photo) => photo.querySelector("select").value);
choose(document.getElementById("which"), "labelled unsure");
out.unsure = photos().length;
choose(document.getElementById("which"), "all images");
photos()[0].querySelector("details").open = true;
setTimeout(() => {
  const details = photos()[0].querySelector("details");
  out.open = [...details.querySelectorAll("tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
  out.nearest = [details.querySelector("p").textContent, details.querySelectorAll("img").length];
  out.wide = document.documentElement.scrollWidth <= document.documentElement.clientWidth;
  document.body.dataset.out = JSON.stringify(out);
}, 50);
"""


def browse(page, folder, width):
    """What CLICKS found in a real browser, and the messages of its console."""
    file = folder / "page.html"
    file.write_text(f"{page}<script>{CLICKS}</script>")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},800", "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom"]
    result = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120)
    console = [line for line in result.stderr.splitlines() if ":CONSOLE" in line]
    found = re.search(r'<body[^>]* data-out="([^"]*)"', result.stdout)
    return json.loads(unescape(found[1])) if found else {}, console


@needs_browser
@pytest.mark.parametrize("width, related", [(500, {"heron": ["stork"]}), (1200, {})])
def test_in_a_browser_labels_are_corrected_and_downloaded(support, tmp_path, width, related, monkeypatch):
    monkeypatch.setattr(predictions_page, "MAX_EMBEDDED", 62)
    known = Confidence([1, 1], [1, 0], 2, 1.0, [(1, [0.75, 0.25])])
    page = written(support, related, n=63, review=True, confidence=known, background="#0a141e")[0]
    found, console = browse(page, tmp_path, width)
    assert found and not console, console
    assert found["page"] == [60, "1 to 60 of 63"] and found["on"] == [3, "61 to 63 of 63", True]
    assert found["whole"] == "contain" and found["lazy"] and found["wide"]
    assert found["laid"] == ["", "", "rgb(10, 20, 30)"]  # the last one is a file
    marks = "tern, 60\u00a0%; unsure; unlike every class; in a folder heron"
    assert found["words"] == [["90\u00a0%", "q0.png"], [marks, f"heron/{EVIL}1"], ["70\u00a0%", 'q"2, 2.png']]
    corrections = [['q"62, 2.png', "heron"], ["q60.png", 'new, "class"'], [f"heron/{EVIL}1", "tern"]]
    assert list(csv.reader(io.StringIO(found["csv"], newline=""))) == [["file", "label"], *corrections]
    assert found["nothing"] and not found["before"]  # a label that is put back is no correction
    assert found["leaving"] and not found["left"]  # corrections are not lost without a question
    assert found["corrected"] == ["tern", 'new, "class"', "heron"] and found["unsure"] == 21
    assert found["nearest"] == ["nearest example: heron/a.png", 1]
    columns = {"class": ["heron", "tern"], "probability": ["90\u00a0%", "10\u00a0%"]}
    columns |= {"before alignment": ["10\u00a0%", "90\u00a0%"]} if related else {}
    assert found["open"] == [list(columns), *map(list, zip(*columns.values(), strict=True))]


@needs_browser
def test_the_browser_test_would_see_an_error(support, tmp_path):
    page = written(support)[0].replace('"use strict";', '"use strict"; console.error("seen");')
    assert any("seen" in line for line in browse(page, tmp_path, 800)[1])
