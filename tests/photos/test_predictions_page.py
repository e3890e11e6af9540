"""The page of predictions, from made-up ones."""

import re

import pytest
import torch
from PIL import Image

from engine.errors import UserError
from photos.predictions_page import write_predictions
from photos.table import Predictions

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def support(tmp_path):
    """A support folder of two classes, and three queries, as paths."""
    for name, grey in (("support/heron/a", 40), ("support/tern/b", 90), ("q0", 120), ("q1", 160), ("q2", 200)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (120, 90), (grey,) * 3).save(tmp_path / f"{name}.png")
    return tmp_path / "support"


def predictions_of(support, related):
    finetuned = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    return Predictions(
        files=["q0.png", EVIL, "q2.png"],
        paths=[support.parent / f"q{i}.png" for i in range(3)],
        class_names=["heron", "tern"],
        probabilities=torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]]) if related else finetuned,
        finetuned=finetuned,
        nearest=[0, 1, 1],
        unlike=[False] * 3,
        truth=[None, 0, None],
        related=related,
        n_support=[1, 1],
    )


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
