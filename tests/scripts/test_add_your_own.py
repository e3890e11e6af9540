"""docs/add_your_own.md: its code goes into a copy of the repository, and its commands run there.

And the places that the pages name are there.
"""

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import types

import pytest
import torch

from data.episodes import class_major_labels
from methods.alignment import Updates
from methods.novel_finetune import fit_heads
from tests.helpers import ROOT, make_benchmark

PAGE = (ROOT / "docs" / "add_your_own.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# The page's commands on a few tiny images.
SMALL = "--img_size 16 --test_n_way 2 --n_query 3 --n_episodes 2 --quiet"
TRAIN_SMALL = f"{SMALL} --n_epoch 1 --val_episodes 2"
STAGE_SMALL = {
    "data.prepare": "--allow_incomplete",
    "transferLearning": f"{TRAIN_SMALL} --batch_size 64 --ft_n_epoch 10",
    "metaLearning": f"{TRAIN_SMALL} --episodes_per_epoch 2 --train_n_way 2 --train_n_query 3",
    "associative_alignment": f"{SMALL} --ft_n_epoch 10 --align_iters 2 --aug_size 3 --n_B 2",
}
# Runs each command line of its arguments as `python` would, in one process.
DRIVER = """
import runpy, shlex, sys
for line in sys.argv[1:]:
    script, *flags = shlex.split(line)
    sys.argv = [script, *flags]
    try:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
"""


def blocks(kind):
    """(path, code) of each block of a kind; the path is in its first line."""
    return [tuple(text.removeprefix("# ").split("\n", 1)) for language, text in BLOCKS if language == kind]


def apply_diff(text, diff):
    """Replace the old lines of each hunk, which must be there exactly once, by the new ones."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        assert {line[0] for line in lines} <= set(" +-")
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert text.count(old) == 1, f"the page is out of date: {old}"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository with all code of the page in it."""
    root = tmp_path_factory.mktemp("copy")
    for path in [
        *ROOT.glob("*.py"),
        *(
            p
            for room in ("engine", "models", "data", "methods", "persistence", "reporting", "photos")
            for p in (ROOT / room).rglob("*.py")
        ),
    ]:
        (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.relative_to(ROOT))
    shutil.copytree(ROOT / "fs_benchmarks" / "splits", root / "fs_benchmarks" / "splits")
    shutil.copy(ROOT / "pyproject.toml", root)
    for path, code in blocks("python"):
        assert not (root / path).exists(), "new code is in new files"
        (root / path).write_text(code)
    for path, diff in blocks("diff"):
        (root / path).write_text(apply_diff((root / path).read_text(), diff))
    return root


def load(path):
    """The module of a file, with no trace of it in sys.modules."""
    module = types.ModuleType(path.stem)
    exec(path.read_text(), module.__dict__)
    return module


def test_the_code_of_the_page_is_in_style(copy):
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        outcome = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=copy, capture_output=True, text=True
        )
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def stanford_dogs(folder):
    """A small images.tar: Images/<breed>/<file>, four images of each of the 120 breeds."""
    make_benchmark(folder / "images", n_class=(120, 0, 0), n_images=4)
    with tarfile.open(folder / "images.tar", "w") as tar:
        for file in (folder / "images").rglob("*.png"):
            tar.add(file, f"Images/{file.parent.name}/{file.stem}.jpg")


def test_the_commands_of_the_page_run_with_all_that_is_new_on_it(copy):
    stanford_dogs(copy)
    (page,) = [text for language, text in BLOCKS if language == "bash"]
    commands = []
    for line in page.splitlines():
        script, *flags = shlex.split(line.removeprefix("python ").removeprefix("-m "))
        script = script.removesuffix(".py")
        commands.append(shlex.join([script, *flags, *STAGE_SMALL[script].split()]))
    outcome = subprocess.run(
        [sys.executable, "-c", DRIVER, *commands, "reproduce --table main --dry_run"],
        cwd=copy,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    assert "base 60 classes, 240 images; val 30 classes, 120 images; novel 30 classes, 120 images" in outcome.stdout
    results = {path.name for path in (copy / "results" / "tables").glob("*.json")}
    assert results == {
        "transferLearning_2way_1shot_Dogs_euclidMax_ConvMixer.json",
        "metaLearning_2way_1shot_Dogs_MetaBaseline_ConvMixer.json",
        "associative_alignment_2way_1shot_Dogs_euclidMax_ConvMixer_nearest.json",
    }
    run = "associative_alignment_2way_1shot_Dogs_euclidMax_ConvMixer_nearest"
    rows = [json.loads(row) for row in (copy / "results" / "logs" / run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["align_loss"] > 0 for row in rows)
    assert {"--method euclidMax", "--method MetaBaseline"} <= set(re.findall(r"--method \w+", outcome.stdout))


def test_many_heads_of_the_page_are_fitted_together_as_each_would_be_alone(copy):
    euclid = load(copy / "models" / "euclid_max.py").euclidMax
    z = torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(5, 6).repeat_interleave(2, 0)
    y = class_major_labels(5, 2)

    def generator(e):
        return torch.Generator().manual_seed(e)

    together = euclid(6, 5, 5.0, 0.0, [generator(e) for e in range(3)])
    before = together.loss(together(z), y.expand(3, -1)).item()
    fit_heads(together, z, y.expand(3, -1), n_steps=200, lr=0.01)
    assert together.loss(together(z), y.expand(3, -1)).item() < 0.7 * before
    for e in range(3):
        alone = euclid(6, 5, 5.0, 0.0, generator(e))
        fit_heads(alone, z[e], y, n_steps=200, lr=0.01)
        assert torch.allclose(alone.weight, together.weight[e], atol=1e-5)


def test_the_meta_learner_of_the_page_scores_the_angle_to_each_prototype(copy):
    learner = load(copy / "methods" / "meta_baseline.py").MetaBaseline(2, (2, 1, 1))
    z_support = torch.tensor([[[2.0, 0.0], [4.0, 0.0]], [[0.0, 1.0], [0.0, 5.0]]])
    scores = learner(z_support, torch.tensor([[3.0, 0.0], [-1.0, 1.0]]))
    assert torch.allclose(scores, 10 * torch.tensor([[1.0, 0.0], [-(0.5**0.5), 0.5**0.5]]))
    assert torch.equal(learner(z_support.expand(3, 2, 2, 2), torch.eye(2).expand(3, 2, 2))[1], 10 * torch.eye(2))
    learner.loss(scores, torch.tensor([0, 0])).backward()
    assert torch.isfinite(learner.scale.grad) and learner.scale.grad != 0


def test_the_loss_of_the_page_is_centroid_alignment_at_one_shot_and_follows_its_gradient(copy):
    loss_of = load(copy / "methods" / "nearest_alignment.py").nearest_alignment_loss
    generator = torch.Generator().manual_seed(0)
    z_support, z_related = torch.randn(5, 8, generator=generator), torch.randn(12, 8, generator=generator)
    y_related = torch.arange(12) % 5
    one_shot = loss_of(z_support, torch.arange(5), z_related, y_related)
    distance = torch.cdist(z_related, z_support).square()
    assert one_shot.item() == pytest.approx(torch.nn.functional.cross_entropy(-distance, y_related).item(), rel=1e-4)

    z_support = torch.randn(15, 8, generator=generator, requires_grad=True)
    z_related.requires_grad_()
    y_support = class_major_labels(5, 3)
    optimizer = torch.optim.SGD([z_support, z_related], lr=0.1)
    losses = []
    for _ in range(20):
        loss = loss_of(z_support, y_support, z_related, y_related)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.isfinite(z.grad).all() for z in (z_support, z_related))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5 * losses[0]


def test_the_line_of_an_optimiser_and_the_figures_are_where_the_page_says():
    assert "self.support_optimizer = " in inspect.getsource(Updates)
    figures = (ROOT / "reporting" / "figures.py").read_text()
    assert "\nFIGURES = {" in figures and "\ndef draw_figures(" in figures


def test_a_page_that_is_out_of_date_is_noticed():
    assert apply_diff("a\nb\n", " a\n-b\n+c\n") == "a\nc\n"
    with pytest.raises(AssertionError, match="out of date"):
        apply_diff("a\nc\n", " a\n-b\n+c\n")
