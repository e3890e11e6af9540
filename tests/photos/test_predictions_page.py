"""The page of predictions, from made-up ones."""

import re

import pytest
import torch
from PIL import Image

from engine.errors import UserError
from models import build_head
from photos.classifier import Answers, Classifier, Fitted
from photos.predictions_page import write_predictions
from photos.table import Predictions

EVIL = "<script>alert(1)"


@pytest.fixture
def support(tmp_path):
    """A support folder of two classes, and three queries, as paths."""
    for name, grey in (("support/heron/a", 40), ("support/tern/b", 90), ("q0", 120), ("q1", 160), ("q2", 200)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (120, 90), (grey,) * 3).save(tmp_path / f"{name}.png")
    return tmp_path / "support"


def predictions_of(support, related):
    finetuned = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    probabilities = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]]) if related else finetuned
    identity, head = torch.nn.Identity(), build_head("softMax", 4, 2, 1.0, 0.0)
    y_support, z_support = torch.tensor([0, 1]), torch.eye(2, 4)
    classifier = Classifier(
        identity, identity, head, head, ["heron", "tern"], z_support, y_support, ["a", "b"], None, -1.0
    )
    answers = Answers(probabilities, finetuned, torch.ones(3), torch.tensor([0, 1, 1]))
    paths = [support.parent / f"q{i}.png" for i in range(3)]
    return Predictions(Fitted(classifier, {}, related), ["q0.png", f"heron/{EVIL}", "q2.png"], paths, answers)


@pytest.mark.parametrize("related", [{}, {"heron": ["stork"], "tern": [EVIL]}])
def test_the_page_shows_every_query_and_the_support_that_it_is_near_to(support, tmp_path, related):
    write_predictions(tmp_path / "out" / "predictions.html", predictions_of(support, related), support)
    text = (tmp_path / "out" / "predictions.html").read_text()
    assert text.count('<details class="query') == 3 and text.count("<img") == 2 + 3
    assert text.count("<script") == 1 and EVIL not in text
    first = re.findall(r'<details class="query[^>]*data-kind="([^"]*)"', text)[0]
    assert first == ("put wrong" if related else "right")
    assert ("before alignment" in text) == bool(related) == ("stork" in text)
    assert sorted(re.findall('data-near="([^"]*)"', text)) == ["0", "1", "1"] and "<b>nearest" in text
    write_predictions(tmp_path / "kept.html", predictions_of(support, related), None)
    text = (tmp_path / "kept.html").read_text()
    assert text.count('<details class="query') == text.count("<img") == 3 and "data-near=" not in text
    assert "3 images, labelled from 2 examples" in text and "<b>nearest" not in text
    (tmp_path / "q1.png").unlink()
    with pytest.raises(UserError, match="q1.png"):
        write_predictions(tmp_path / "out" / "other.html", predictions_of(support, related), support)
