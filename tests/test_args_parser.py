"""The flags: defaults, presets, ranges, what predict.py must be given, and dataclasses filled from flags."""

import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import pytest

from args_parser import EVERYDAY, STAGES, args_parser, from_flags, stage_parser, stage_runs
from engine.errors import UserError

NEEDED = {"predict": ["--support", "s", "--query", "q", "--checkpoint", "c"]}  # the flags a stage cannot do without

SHARED = {
    **{"dataset": "miniImagenet", "novel_dataset": "miniImagenet", "backbone": "Conv4", "img_size": 84},
    **{"test_n_way": 5, "n_shot": 5, "n_query": None, "n_episodes": 600, "testing_epochs": 1, "val_episodes": 400},
    **{"seed": 0, "precision": "fp32", "resume": False, "overwrite": False, "preset": None},
}
FITTING = {"ft_n_epoch": 200, "ft_lr": 1e-3, "ft_s": 5.0}
TRAINING = {"data_aug": True, "no_flip": False, "crop_scale": [0.08, 1.0], "weights": "none", "lr": 1e-3}
UPDATES = {
    **{"n_B": 10, "related_score": "vote", "align_iters": 150, "aug_size": 50, "align_bn": "train"},
    **{"align_blocks": None, "lr": 1e-3, "align_lr": 1e-3, "related_lr": 1e-3, "support_lr": 1e-3},
    **{"ft_m": 0.001, "align_s": 15.0, "align_m": 0.001, "record_curve": 0},
    **{"critic_hidden": 1024, "critic_steps": 5, "critic_lr": 1e-3},
    **{"critic_constraint": "clip", "critic_clip": 0.01, "critic_gp_weight": 10.0},
}
DEFAULTS = {
    "transfer": {
        **{**SHARED, **FITTING, **TRAINING},
        **{"method": "arcMax", "n_epoch": 600, "batch_size": 64, "s": 20.0, "m": 0.01, "ft_m": 0.01},
    },
    "meta": {
        **{**SHARED, **FITTING, **TRAINING},
        **{"method": "ProtoNet", "n_epoch": 400, "episodes_per_epoch": 100, "train_n_way": 5, "train_n_query": 16},
        **{"temperature": 1.0, "warm_up_epochs": 0},
    },
    "alignment": {
        **{**SHARED, **FITTING, **UPDATES},
        **{"method": "arcMax", "alignment": "centroid", "test_split": "novel", "save_episode": [0]},
    },
    "predict": {
        **{**FITTING, **UPDATES, "ft_s": None},
        **{"method": "arcMax", "alignment": "none", "backbone": None, "img_size": None},
    },
}


def parsed(stage: str, *flags: str) -> Namespace:
    return args_parser(stage, [*NEEDED.get(stage, []), *flags])


def values(args: Namespace, *names: str) -> tuple:
    return tuple(getattr(args, name) for name in names)


def refusal(stage: str, *flags: str) -> str:
    """The line that ends a run with these flags."""
    with pytest.raises(UserError) as error:
        args_parser(stage, flags)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("stage", STAGES)
def test_the_defaults_are_those_that_the_readme_describes(stage):
    found = vars(parsed(stage))
    assert {name: found[name] for name in DEFAULTS[stage]} == DEFAULTS[stage]
    assert found["cache_dir"] == Path("fs_benchmarks/.cache")


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("transfer", {"n_epoch": 10, "n_episodes": 600, "no_flip": True, "crop_scale": [0.5, 1.0]}),
        ("meta", {"n_epoch": 10, "n_episodes": 600, "episodes_per_epoch": 60, "no_flip": True}),
        ("alignment", {"n_episodes": 600, "aug_size": 20, "align_blocks": 0, "alignment": "head", "record_curve": 10}),
    ],
)
def test_the_laptop_preset_swaps_defaults_and_flags_on_either_side_win(stage, expected):
    expected |= {"dataset": "glyphs", "novel_dataset": "glyphs", "img_size": 42, "n_shot": 1, "n_query": 15}
    expected |= {"precision": "auto"}
    found = vars(parsed(stage, "--preset", "laptop"))
    assert {name: found[name] for name in expected} == expected
    assert set(found) == set(vars(parsed(stage)))  # none of the flags of another stage
    args = parsed(stage, "--n_shot", "5", "--preset", "laptop", "--n_episodes", "7")
    assert values(args, "n_shot", "n_episodes", "n_query") == (5, 7, 15)


@pytest.mark.parametrize(
    ("method", "temperature", "warm_up_epochs"),
    [("ProtoNet", 64, 0), ("MatchingNet", 10, 0), ("RelationNet", 1, 2), ("RelationNet_softmax", 1, 2)],
)
def test_the_laptop_preset_has_a_setting_for_each_learner(method, temperature, warm_up_epochs):
    laptop, names = ("--preset", "laptop", "--method", method), ("temperature", "warm_up_epochs")
    assert values(parsed("meta", *laptop), *names) == (temperature, 0)  # nothing to keep in a new backbone
    assert values(parsed("meta", *laptop, "--init_from", "c"), *names) == (temperature, warm_up_epochs)
    assert values(parsed("meta", *laptop, "--init_from", "c", "--warm_up_epochs", "1"), *names) == (temperature, 1)
    assert values(parsed("meta", "--method", method, "--init_from", "c"), *names) == (1, 0)


PUBLISHED_CODE = {"n_shot": 1, "testing_epochs": 10, "seed": 10}
PUBLISHED_CODE_META = PUBLISHED_CODE | {"data_aug": False, "episodes_per_epoch": 150, "n_epoch": 600}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [("transfer", PUBLISHED_CODE), ("meta", PUBLISHED_CODE_META), ("alignment", PUBLISHED_CODE)],
)
def test_the_published_code_preset_changes_what_differs_and_nothing_else(stage, expected):
    defaults, found = vars(parsed(stage)), vars(parsed(stage, "--preset", "published_code"))
    changed = {name: value for name, value in found.items() if value != defaults[name]}
    assert changed == expected | {"preset": "published_code"} and set(found) == set(defaults)
    args = parsed(stage, "--n_shot", "5", "--preset", "published_code", "--seed", "3")
    assert values(args, "n_shot", "seed", "testing_epochs") == (5, 3, 10)


@pytest.mark.parametrize("stage", ["transfer", "meta", "alignment"])
def test_several_seeds_ways_and_shots_are_runs_of_the_first_ones_backbone(stage):
    flags = ["--seed", "0", "3", "0", "--n_shot", "5", "1", "--test_n_way", "5", "20", "--dataset", "glyphs"]
    runs = list(stage_runs(stage, flags))
    assert [values(run, "seed", "test_n_way", "n_shot") for run in runs] == [
        (seed, n_way, n_shot) for seed in (0, 3) for n_way in (5, 20) for n_shot in (5, 1)
    ]
    method = runs[0].method
    for seed, part in (("", runs[:4]), ("_seed3", runs[4:])):
        best = Path(f"results/models/5way_5shot_glyphs_{method}_Conv4{seed}_bestModel.tar")
        assert [run.init_from for run in part] == [None, best, best, best]
        if stage != "alignment":
            assert [run.n_epoch for run in part] == [part[0].n_epoch, 0, 0, 0] and part[0].n_epoch > 0
    named = [run.init_from for run in stage_runs(stage, [*flags, "--init_from", "c"])]
    assert named[0] == Path("c") and (named[1] == Path("c")) == (stage == "alignment")
    assert vars(args_parser(stage, ["--n_shot", "1", "5"])) == vars(args_parser(stage, ["--n_shot", "1"]))


@pytest.mark.parametrize("stage", ["transfer", "meta", "alignment"])
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--seed 0 x", "argument --seed: invalid whole number value: 'x'"),
        ("--seed", "argument --seed: expected at least one argument"),
        ("--n_shot 1 0", "argument --n_shot: 0 is out of range: expected at least 1"),
        ("--test_n_way 5 1", "argument --test_n_way: 1 is out of range: expected at least 2"),
        ("--episodes_file e --n_shot 1 5", "argument --episodes_file: it holds episodes of one way and shot"),
    ],
)
def test_several_values_are_each_checked(stage, flags, line):
    assert line in refusal(stage, *flags.split())


@pytest.mark.parametrize("stage", ["transfer", "meta", "alignment"])
def test_help_names_the_value_of_the_published_code_where_it_differs(stage):
    help_of = {action.dest: action.help for action in stage_parser(stage)._actions}
    for name, value in (PUBLISHED_CODE_META if stage == "meta" else PUBLISHED_CODE).items():
        assert re.search(rf"published code: {value}\b", help_of[name]), name
    assert "published code draws new ones" in help_of["val_episodes"]


@pytest.mark.parametrize(
    ("stage", "flags", "line"),
    [
        ("alignment", "--no_flip", "--no_flip belongs to transferLearning.py and metaLearning.py"),
        ("meta", "--lr 0.1 --m=0.2", "--m belongs to transferLearning.py"),
        ("predict", "--preset published_code", "--preset belongs to transferLearning.py and metaLearning.py and"),
        ("transfer", "--n_shots 1", "--n_shots: did you mean --n_shot?"),
        ("transfer", "--n_way 3", "--n_way: did you mean --test_n_way?"),
        ("transfer", "dataset", "dataset: did you mean --dataset?"),
        ("transfer", "--zzz 1", "unrecognized arguments: --zzz 1"),
    ],
)
def test_an_unknown_flag_is_answered_with_whose_it_is_or_which_was_meant(stage, flags, line):
    assert refusal(stage, *NEEDED.get(stage, []), *flags.split()).startswith(line)


def test_the_tuned_preset_follows_the_alignment_and_yields_to_flags():
    names = ("align_blocks", "aug_size", "align_bn", "critic_steps")
    tuned = ("--align_preset", "tuned")
    assert values(parsed("alignment", *tuned), *names) == (1, 20, "eval", 5)
    assert values(parsed("alignment", *tuned, "--alignment", "adversarial"), *names) == (1, 20, "train", 1)
    assert values(parsed("alignment", *tuned, "--alignment", "naive"), *names) == (1, 20, "train", 5)
    assert values(parsed("alignment", "--aug_size", "7", *tuned, "--align_bn", "train"), *names) == (1, 7, "train", 5)
    assert parsed("alignment", "--preset", "laptop", *tuned).aug_size == 20
    assert values(parsed("predict", *tuned, "--base", "b"), *names) == (1, 20, "eval", 5)  # centroid, from --base


def test_an_update_has_the_common_rate_unless_it_is_given_or_adversarial():
    rates = ("align_lr", "related_lr", "support_lr")
    assert values(parsed("alignment", "--lr", "0.1", "--related_lr", "0"), *rates) == (0.1, 0, 0.1)
    adversarial = ("--alignment", "adversarial")
    assert values(parsed("alignment", *adversarial, "--lr", "0.1"), *rates) == (1e-5, 0.1, 0.1)
    assert values(parsed("alignment", *adversarial, "--align_lr", "0.2"), *rates) == (0.2, 1e-3, 1e-3)


def test_names_follow_from_each_other():
    assert parsed("meta", "--n_way", "7").train_n_way == parsed("meta", "--train_n_way", "7").train_n_way == 7
    assert parsed("transfer", "--dataset", "a").novel_dataset == "a"
    assert parsed("transfer", "--dataset", "a", "--novel_dataset", "b").novel_dataset == "b"
    assert parsed("transfer", "--backbone", "WideResNet").img_size == 80
    assert parsed("transfer", "--backbone", "WideResNet", "--img_size", "32").img_size == 32


def test_data_aug_is_a_flag_with_or_without_a_value():
    for value, expected in (([], True), (["yes"], True), (["False"], False), (["0"], False)):
        assert parsed("meta", "--data_aug", *value).data_aug is expected


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--n_shot 0", "argument --n_shot: 0 is out of range: expected at least 1"),
        ("--n_shot 1.5", "argument --n_shot: invalid whole number value: '1.5'"),
        ("--test_n_way 1", "argument --test_n_way: 1 is out of range: expected at least 2"),
        ("--img_size 7", "argument --img_size: 7 is out of range: expected at least 8"),
        ("--seed -1", "argument --seed: -1 is out of range: expected at least 0"),
        ("--lr 0", "argument --lr: 0 is out of range: expected above 0, at most 1e+30"),
        ("--lr nan", "argument --lr: nan is out of range: expected above 0"),
        ("--m inf", "argument --m: inf is out of range: expected at least 0"),
        ("--lr x", "argument --lr: invalid number value: 'x'"),
        ("--crop_scale 0 1", "argument --crop_scale: 0 is out of range: expected above 0, at most 1"),
        ("--crop_scale 0.9 0.2", "argument --crop_scale: 0.9 0.2 is not in order"),
        ("--data_aug maybe", "argument --data_aug: 'maybe' is neither True nor False"),
        ("--backbone conv4", "unknown backbone 'conv4': choose Conv4, "),
        ("--backbone torchvision:", "unknown backbone 'torchvision:'"),
        ("--method ProtoNet", "argument --method: invalid choice: 'ProtoNet'"),
        ("--resume --overwrite", "argument --overwrite: not allowed with argument --resume"),
        ("--n_sho 1", "--n_sho: did you mean --n_shot?"),
        ("--weights DEFAULT", "argument --weights: of --backbone torchvision:NAME or timm:NAME alone"),
        ("--weights w --backbone torchvision:resnet18 --init_from c", "--init_from brings its own weights"),
        ("--n_epoch 0", "--n_epoch 0 take a trained backbone: give --init_from or --weights"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(flags, line):
    refused = refusal("transfer", *flags.split())
    assert line in refused and refused.endswith("(python transferLearning.py --help explains the flags)")


WRONG_VALUES = {
    "transfer": "n_query=0 n_episodes=0 val_episodes=0 n_epoch=-1 lr=inf ft_lr=0 m=-0.1 s=0 num_workers=-1",
    "meta": "episodes_per_epoch=0",
    "alignment": "n_B=0 aug_size=0 align_iters=-1 critic_clip=0 record_curve=-1 related_score=mean critic_constraint=x",
}


@pytest.mark.parametrize(
    ("stage", "text"), [(stage, text) for stage, row in WRONG_VALUES.items() for text in row.split()]
)
def test_a_value_that_a_flag_may_not_have_is_refused(stage, text):
    name, value = text.split("=")
    refused = refusal(stage, f"--{text}")
    assert refused.startswith((f"argument --{name}: {value} is out of range", f"argument --{name}: invalid choice"))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--query q --checkpoint c", "name the examples with --support FOLDER, or a kept classifier"),
        ("--support s --checkpoint c", "name the images to label with --query, or a file"),
        ("--support s --query q", "no trained backbone: give --checkpoint FILE"),
        ("--support s --query q", "python -m persistence.import_checkpoint FILE OUT"),
        (
            "--support s --query q --weights DEFAULT",
            "argument --weights: of --backbone torchvision:NAME or timm:NAME alone",
        ),
        ("--support s --query q --weights w --checkpoint c", "--checkpoint brings its own weights"),
        ("--support s --query q --checkpoint c --alignment naive", "naive takes related images from a base set"),
    ],
)
def test_predict_says_what_is_missing(flags, line):
    assert line in refusal("predict", *flags.split())


def test_predict_aligns_when_there_is_a_base_set():
    assert parsed("predict").alignment == "none"
    assert values(parsed("predict", "--base", "b"), "alignment", "align_blocks") == ("auto", 0)
    named = parsed("predict", "--base", "b", "--alignment", "centroid")
    assert values(named, "alignment", "align_blocks") == ("centroid", None)
    assert parsed("predict", "--base", "b", "--alignment", "none").alignment == "none"


@pytest.mark.parametrize("stage", STAGES)
def test_help_explains_every_flag(stage, capsys):
    with pytest.raises(SystemExit) as end:
        args_parser(stage, ["--help_all" if stage == "predict" else "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out.split("\noptions:")[1]  # below the usage, which lists them anyway
    actions = stage_parser(stage)._actions
    assert len(actions) > 40
    for action in actions:
        for name in action.option_strings:
            assert re.search(rf"(^  |, ){name}\b", printed, re.MULTILINE), name
        assert action.help, action.dest


@pytest.mark.parametrize("stage", STAGES)
def test_help_fits_100_columns_and_every_flag_is_in_a_group(stage, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        args_parser(stage, ["--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    options, *groups = printed.split("\noptions:")[1].split("\n\n")
    assert options.split()[:8] == "-h, --help show this help message and exit".split()
    assert re.findall(r"^  --\w+", options, re.MULTILINE) == (["  --help_all"] if stage == "predict" else [])
    assert len(groups) >= 4 and all(re.match(r"[a-z ,:0-9]+:\n  --", group) for group in groups)


def test_the_help_of_predict_shows_what_is_used_every_day_and_folds_the_rest(capsys):
    with pytest.raises(SystemExit):
        args_parser("predict", ["--help"])
    shown = re.findall(r"^  (?:-h, )?--(\w+)", capsys.readouterr().out.split("\noptions:")[1], re.MULTILINE)
    assert sorted(shown) == sorted(["help", "help_all", *EVERYDAY]) and len(shown) == 21


def test_help_names_defaults_of_0_and_leaves_out_those_that_are_not_there():
    help_of = {action.dest: action.help for action in stage_parser("alignment")._actions}
    for name in ("seed", "save_episode", "record_curve", "lr"):
        assert re.search(r" \(default: [\d.\[\]]+\)$", help_of[name]), name
    for name in ("quiet", "image_root", "resume"):
        assert "(default: " not in help_of[name], name


@dataclass(frozen=True)
class Fit:
    method: str
    ft_lr: float


@dataclass(frozen=True)
class Crop:
    crop_scale: tuple[float, float]
    fit: Fit
    n_epoch: int = -1


def test_from_flags_fills_a_dataclass_and_those_in_it():
    args = parsed("transfer", "--crop_scale", "0.5", "0.75", "--ft_lr", "0.25", "--method", "cosMax")
    assert from_flags(Crop, args) == Crop((0.5, 0.75), Fit("cosMax", 0.25), n_epoch=600)
    assert isinstance(from_flags(Crop, args).crop_scale, tuple)
    assert from_flags(Fit, args) == Fit("cosMax", 0.25)


def test_from_flags_names_a_field_that_is_no_flag_even_one_with_a_default():
    with pytest.raises(AttributeError, match="n_epoch"):
        from_flags(Crop, Namespace(crop_scale=[0.1, 0.2], method="softMax", ft_lr=1.0))


@pytest.mark.parametrize("name", ["centroid", "adversarial", "naive"])
def test_flags_of_feature_space_that_contradict_each_other_are_one_line(name):
    refused = refusal("alignment", "--align_blocks", "0", "--alignment", name)
    assert all(word in refused for word in (f"{name} moves blocks", "--align_blocks 1", "head"))
    assert "--align_blocks 0" in refusal("alignment", "--alignment", "head")
    assert "--align_blocks: -1 is out" in refusal("alignment", "--align_blocks", "-1")


def test_in_feature_space_the_head_alone_learns():
    assert args_parser("alignment", ["--align_blocks", "0"]).alignment == "head"
