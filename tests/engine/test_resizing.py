"""Resize rules: sizes, refusals, and the same pixels as the transforms that peers compose."""

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from data.image_cache import eval_view
from engine.errors import UserError
from engine.resizing import RULE, check_rule, resized_size
from tests.helpers import call, folders, make_benchmark, result

BICUBIC = transforms.InterpolationMode.BICUBIC


def picture(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("rule", "resize"),
    [
        ("published", transforms.Resize((96, 96))),
        ("both:96", transforms.Resize((96, 96))),
        ("none", transforms.Resize((84, 84))),
        ("short:92", transforms.Resize(92)),
        ("short:92:bicubic", transforms.Resize(92, BICUBIC)),
    ],
)
@pytest.mark.parametrize("size", [(84, 84), (120, 90), (90, 121), (300, 200)])
def test_a_rule_is_the_transforms_that_peers_compose(rule, resize, size):
    expected = transforms.Compose([resize, transforms.CenterCrop(84)])(picture(*size))
    assert np.array_equal(eval_view(picture(*size), 84, rule), np.asarray(expected).transpose(2, 0, 1))


def test_the_sizes_that_images_are_resized_to():
    assert resized_size("published", (50, 60), 84) == (96, 96)
    assert resized_size("short:92", (500, 250), 84) == (184, 92)
    assert resized_size("both:80", (500, 250), 80) == (80, 80)
    assert resized_size("short:92", (1, 65_000), 84) == (92, 64 * 92)
    assert not RULE.fullmatch("short") and not RULE.fullmatch("both:0") and not RULE.fullmatch("short:92:cubic")


def test_a_rule_that_leaves_too_little_names_the_size_to_give():
    check_rule("short:84", 84)
    with pytest.raises(UserError, match=r"short:80 leaves 80 pixels, but 84 are taken: give --img_size 80"):
        check_rule("short:80", 84)


def test_stages_obey_the_flag_and_hand_the_rule_on(tmp_path):
    make_benchmark(tmp_path / "benchmarks" / "tiny", side=16)
    tiny = ["--dataset", "tiny", "--img_size", 16, "--test_n_way", 3, "--n_shot", 2, "--n_query", 3, "--quiet"]
    tiny += ["--n_episodes", 2, "--ft_n_epoch", 5, *folders(tmp_path)]
    first = call("transferLearning", *tiny, "--n_epoch", 1, "--val_episodes", 2, "--eval_resize", "none")
    assert first.status == 0 and "are enlarged" not in first.out, first
    third = call("associative_alignment", *tiny, "--align_iters", 1, "--aug_size", 2, "--align_blocks", 0)
    assert third.status == 0, third.err
    name = "3way_2shot_tiny_arcMax_Conv4"
    assert result(tmp_path, f"associative_alignment_{name}_head")["eval_resize"] == "none"
    start = ["--init_from", tmp_path / "results" / "models" / f"{name}_bestModel.tar", "--overwrite"]
    enlarged = call("transferLearning", *tiny, "--n_epoch", 0, *start, "--eval_resize", "published")
    assert "note: base images of tiny (16x16 pixels) are enlarged to 18x18 by the rule 'published'" in enlarged.out
    refused = call("transferLearning", *tiny, "--eval_resize", "half")
    assert refused.status == 2 and "'half' is no resize rule: expected published, none" in refused.err
