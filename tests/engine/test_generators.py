"""Generators: what they depend on, that they are unrelated, and that nothing leaks."""

import ast

import pytest
import torch

from engine.generators import KEYS, make_generator, seeded
from tests.helpers import ROOT

NAMES = ("generator", "seeded", "make_generator")


def test_the_table_of_keys_is_that_of_the_source():
    rooms = ("engine", "models", "data", "methods", "persistence", "reporting", "photos")
    paths = [*ROOT.glob("*.py"), *(path for room in rooms for path in (ROOT / room).rglob("*.py"))]
    calls = [node for path in paths for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    draws = [call for call in calls if getattr(call.func, "attr", getattr(call.func, "id", "")) in NAMES]
    words = [word.value for call in draws for word in call.args if isinstance(word, ast.Constant)]
    assert {word for word in words if isinstance(word, str)} == KEYS.keys()


def draws(generator, n=8):
    return torch.randint(2**31, (n,), generator=generator).tolist()


def test_generators_of_other_seeds_or_keys_are_others():
    keys = [("base head",), ("backbone",), ("novel", "episode", 0), ("val", "episode", 0), ("head", 0), ("align", 0)]
    keys += [("novel", "episode", i) for i in range(1, 200)] + [("head", i) for i in range(1, 200)]
    found = {tuple(draws(make_generator(seed, *key))) for seed in (0, 1, 2, 2**32 + 1) for key in keys}
    assert len(found) == 4 * len(keys)


def test_generators_of_neighbouring_keys_are_unrelated():
    values = torch.stack([torch.rand(200, generator=make_generator(0, "episode", i)) for i in range(100)])
    correlation = torch.corrcoef(values) - torch.eye(100)
    assert correlation.abs().max() < 0.4  # 5.6 standard deviations of 1 / sqrt(200)


def test_the_numbers_of_a_seed_are_the_same_in_every_version():
    """Changing these changes every published number of the project."""
    assert draws(make_generator(0, "episode", 1), 3) == [2031574948, 188553834, 1233636359]


def test_inside_seeded_draws_are_reproducible_and_outside_nothing_changes():
    torch.manual_seed(5)
    expected = [torch.rand(3), torch.rand(3)]
    torch.manual_seed(5)
    found = [torch.rand(3)]
    with seeded(0, "dropout", 1):
        first = torch.rand(4)
    found.append(torch.rand(3))
    assert torch.equal(torch.stack(found), torch.stack(expected))
    with seeded(0, "dropout", 1):
        assert torch.equal(torch.rand(4), first)
    with seeded(0, "dropout", 2):
        assert not torch.equal(torch.rand(4), first)


def test_an_error_inside_seeded_does_not_leak_its_state():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded(0):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), state)
