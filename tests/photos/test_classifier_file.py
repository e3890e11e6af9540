"""The file of a kept classifier: what it holds of a head."""

from pathlib import Path

import torch

import models
from models import build_head
from models.heads import cosMax
from photos.classifier_file import head_record, load_head


class Powered(cosMax):
    """A head of a user's own, with one number more than ours have."""

    scalars = ("s", "power")
    power = 1.0


def test_the_scalars_of_a_head_survive_its_file(monkeypatch):
    monkeypatch.setitem(models.HEADS, "Powered", Powered)
    head = build_head("Powered", 4, 3, 5.0, 0.0, torch.Generator())
    head.s, head.power = 7.0, 2.5
    record = head_record(head)
    again = load_head(record, 4, 3, Path("a file"))
    assert (again.s, again.power) == (7.0, 2.5) and torch.equal(again.weight, head.weight)
    del record["power"]  # as in older files
    assert load_head(record, 4, 3, Path("a file")).power == 1.0
