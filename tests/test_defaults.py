"""A default stands once: that of a dataclass is that of the flag of the same name, as the parser completes it."""

import dataclasses
import importlib
from typing import Any

import pytest

from args_parser import args_parser, from_flags
from methods.alignment import AlignmentSetting
from methods.novel_finetune import HeadFit
from methods.related_base import RelatedSetting
from tests.helpers import ROOT

PREDICT = "--support s --query q --checkpoint c --base b --alignment centroid".split()
FLAGS = {
    stage: args_parser(stage, PREDICT if stage == "predict" else [])
    for stage in ("transfer", "meta", "alignment", "predict")
}
# What need not agree, and why.
EXCEPT = {
    ("Run", "device"): "what runs without flags runs on the CPU",
    ("Run", "precision"): "a name becomes a Precision",
    ("Run", "quiet"): "what runs without flags shows no bars",
    **dict.fromkeys(
        [
            ("Checkpoint", "eval_resize"),
            ("Imported", "s"),
            ("Imported", "m"),
            ("Imported", "method"),
        ],
        "facts of a file, which had none",
    ),
    ("Reading", "background"): "benchmarks are read by the published protocol",
    ("HeadFit", "ft_init"): "published; a user's classes are named and numbered by chance",
    ("HeadFit", "ft_s"): "published; a user's scale follows from the number of examples",
    ("RelatedSetting", "related_draws"): "published; a user's classes are of unequal numbers",
    ("Peer", "img_size"): "of a repository's network",
    ("DataOptions", "quiet"): "what runs without flags shows no bars",
    ("DataOptions", "crop_scale"): "a split is not to be augmented, unless that is asked for",
}
# HeadFit is that of alignment; the flags of stage 1 have a margin of their own.
STAGES_OF = {"HeadFit": ["alignment", "predict"], "Augmentation": ["transfer", "meta"]}
ROOMS = ["engine", "models", "data", "methods", "persistence", "reporting", "photos"]


def dataclasses_of_the_house() -> dict[str, type]:
    found = {}
    for path in [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]:
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        classes = {name: cls for name, cls in vars(module).items() if isinstance(cls, type)}
        found |= {name: cls for name, cls in classes.items() if dataclasses.is_dataclass(cls)}
    return found


HOUSE = dataclasses_of_the_house()


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@pytest.mark.parametrize("name", HOUSE)
def test_the_defaults_of_a_dataclass_are_those_of_the_flags(name):
    for field in dataclasses.fields(HOUSE[name]):
        default = default_of(field)
        if default is dataclasses.MISSING or (name, field.name) in EXCEPT:
            continue
        for stage in [stage for stage in STAGES_OF.get(name, FLAGS) if field.name in FLAGS[stage]]:
            given = getattr(FLAGS[stage], field.name)
            assert default == (tuple(given) if isinstance(given, list) else given), f"--{field.name} of {stage}"


@pytest.mark.parametrize("stage", ["alignment", "predict"])
def test_a_default_setting_is_that_of_the_flags_with_all_that_it_holds(stage):
    found = from_flags(AlignmentSetting, FLAGS[stage])
    expected = {"alignment": (5.0, "random", "fewest"), "predict": (None, "prototypes", "each")}[stage]
    assert (found.fit.ft_s, found.fit.ft_init, found.related.related_draws) == expected
    fit, related = HeadFit(ft_s=expected[0], ft_init=expected[1]), RelatedSetting(related_draws=expected[2])
    assert found == AlignmentSetting(fit=fit, related=related)


def test_the_comparison_reaches_the_dataclasses_that_flags_fill():
    assert {"AlignmentSetting", "CriticSetting", "DataOptions", "Folders", "RelatedSetting"} <= set(HOUSE)
    assert {*STAGES_OF, *(name for name, _ in EXCEPT)} <= set(HOUSE)
