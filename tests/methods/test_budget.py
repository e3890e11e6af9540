"""What a stage takes of memory is known before it begins. Estimates against measured peaks: tests/budget_run.py."""

from functools import partial

import pytest
import torch
from torch import nn

import engine.budget
import methods.budget
from data.episodes import EpisodeShape, sample_episodes
from engine.distributed import Ranks
from engine.precision import Precision
from engine.run import Run
from methods.alignment import AlignmentSetting
from methods.base_training import last_blocks
from methods.budget import (
    HOLES,
    Live,
    check_alignment,
    check_base_training,
    episode_scores,
    of_pass,
    of_step,
    outcome,
    without_numbers,
)
from methods.features import FeatureCache, trainable_blocks
from methods.meta_learners import META_LEARNERS, build_meta_learner
from models import Model, build_backbone, build_head
from models.backbone import split_backbone
from tests.helpers import ALIGN, CHECKPOINT, TINY, TRAIN, call, folders, make_split

RUN = Run()


def step_bytes(network, *shape):
    return of_step(network, lambda net, x: net(x), shape, RUN)


@pytest.mark.parametrize(("name", "img_size"), [("Conv4", 32), ("ResNet12", 32), ("ResNet18", 64), ("WideResNet", 16)])
def test_a_step_without_numbers_takes_what_lives_of_a_real_one(name, img_size):
    network = build_backbone(name, img_size)
    with Live() as live:
        x = torch.rand(4, 3, img_size, img_size)
        for _ in range(2):
            total = network(x).sum()
            network.zero_grad()
            total.backward()
    assert step_bytes(network, 4, 3, img_size, img_size) == pytest.approx(HOLES * live.most, rel=0.05)
    assert outcome(network, img_size) == (network.feature_dim,)


def test_what_lives_is_counted_once_and_no_longer_than_it_lives():
    outside = torch.zeros(1000)
    with Live() as live:
        first = torch.zeros(100)  # 400 bytes
        views = [first.view(10, 10), first[:5], outside.add_(1)]
        second = first + 1
        del first, views, second
        third = torch.zeros(50)
    assert (live.most, live.now) == (800, 200) and len(third) == 50


def test_blocks_that_stand_still_keep_nothing_for_the_backward_pass():
    backbone = build_backbone("ResNet12", 32)
    whole = step_bytes(backbone, 64, 3, 32, 32)
    of_last = of_step(split_backbone(backbone, 1)[1], lambda net, x: net(x), (64, 320, 4, 4), RUN)
    assert of_last < step_bytes(last_blocks(backbone, 1), 64, 3, 32, 32) < whole / 2


def test_half_precision_takes_half():
    half = Run(precision=Precision("bf16"))
    network = build_backbone("ResNet12", 32)
    of_half = of_step(network, lambda net, x: net(x), (64, 3, 32, 32), half)
    assert 0.4 < of_half / step_bytes(network, 64, 3, 32, 32) < 0.6


@pytest.mark.parametrize("method", META_LEARNERS)
def test_every_meta_learner_is_estimated(method):
    backbone = build_backbone("Conv4", 32, relation=True)
    learner = build_meta_learner(method, backbone)
    image, shape = backbone.map_shape if learner.uses_maps else (backbone.feature_dim,), EpisodeShape(3, 2, 4)
    assert of_pass(learner, (2, 3, 2, *image), (2, 12, *image)) > 0
    both = nn.ModuleList([backbone, learner])
    assert of_step(both, partial(episode_scores, shape=shape), (18, 3, 32, 32), RUN) > 0


def test_the_network_itself_is_left_as_it_is():
    network = build_backbone("Conv4", 16).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.random.get_rng_state()
    step_bytes(network, 4, 3, 16, 16)
    assert not network.training and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.is_meta for p in without_numbers(network).parameters())
    assert all(p.grad is None for p in network.parameters())


def test_a_network_that_asks_for_numbers_is_not_estimated():
    class Asks(nn.Linear):
        def forward(self, x):
            return super().forward(x) * x.sum().item()

    assert step_bytes(Asks(2, 2), 1, 2) == 0


def test_what_is_cached_is_not_embedded_again(tmp_path, monkeypatch):
    """A warm cache leaves the batch that is embedded out of the estimate, if what enters the blocks is there too."""
    estimates = []
    monkeypatch.setattr(methods.budget, "check_memory", lambda what, n_bytes, *_: estimates.append(n_bytes))
    backbone, cache, splits = build_backbone("Conv4", 16), FeatureCache(tmp_path, RUN), [make_split(split="base")]
    episodes = sample_episodes(splits[0], EpisodeShape(2, 1, 1), 1, 0)
    for align_blocks in (0, 1):
        blocks = trainable_blocks(backbone, align_blocks)
        asked = (blocks, backbone, splits, episodes, [AlignmentSetting(alignment="none")], cache)
        check_alignment(*asked)
        cache.source(backbone, blocks, splits[0])
        check_alignment(*asked)
    cold, warm, cold_blocks, warm_blocks = estimates
    assert warm < cold and warm_blocks <= cold_blocks
    assert cache.holds(backbone, blocks, splits[0])
    assert not cache.holds(backbone, trainable_blocks(backbone, 2), splits[0])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--alignment", "adversarial", "--critic_hidden", 10**9], "--critic_hidden"),
        (["--align_blocks", 0, "--aug_size", 10**9], "--aug_size"),
        (["--align_blocks", 0, "--aug_size", 10**9, "--alignment", "centroid", "--align_adapter", 8], "--aug_size"),
    ],
)
def test_huge_flags_end_at_once_in_one_line(workspace, flags, named):
    outcome = call("associative_alignment", *ALIGN, *folders(workspace), *flags, "--align_iters", 1)
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert outcome.err.startswith("error: alignment takes ") and named in outcome.err


@pytest.mark.parametrize(
    ("script", "flags", "named"),
    [
        ("transferLearning", [*TRAIN, "--batch_size", 10**7, "--overwrite"], "--batch_size"),
        (
            "metaLearning",
            [*TINY, "--method", "RelationNet", "--train_n_way", 3, "--train_n_query", 4],
            "--train_n_query",
        ),
        ("metaLearning", [*TINY, "--method", "MatchingNet", "--n_epoch", 0, "--init_from", CHECKPOINT], "--n_query"),
        ("associative_alignment", [*ALIGN, "--overwrite"], "--aug_size"),
    ],
)
def test_each_stage_ends_in_one_line_where_memory_is_short(workspace, tmp_path, monkeypatch, script, flags, named):
    (tmp_path / "meminfo").write_text("MemAvailable:     30000 kB\n")
    monkeypatch.setattr(engine.budget, "MEMINFO", tmp_path / "meminfo")
    flags = [workspace / "results" / "models" / flag if flag == CHECKPOINT else flag for flag in flags]
    outcome = call(script, *flags, *folders(workspace))
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert "of which 0.0 GB are free" in outcome.err and named in outcome.err


def test_a_copy_without_numbers_copies_none_of_what_is_behind_the_last_blocks():
    backbone = build_backbone("WideResNet", 16)
    last = split_backbone(backbone, 1)[1]
    copied = without_numbers(last).pool_and_flatten.__self__
    assert copied is not backbone and all(value.is_meta for value in copied.state_dict().values())


@pytest.mark.parametrize(("device", "n_images"), [("cuda", 16), ("cpu", 64)])
def test_a_rank_has_its_share_of_a_batch_on_a_gpu_of_its_own_and_all_of_it_in_the_memory_they_share(
    device, n_images, monkeypatch
):
    monkeypatch.setattr(engine.budget, "free_memory", lambda device: 10**12)
    shapes = []
    monkeypatch.setattr(methods.budget, "of_step", lambda module, forward, shape, run: shapes.append(shape) or 0)
    net = build_backbone("Conv4", 16)
    model = Model(net, build_head("arcMax", net.feature_dim, 6, 15.0, 0.1), 1e-3)
    run = Run(device=torch.device(device), ranks=Ranks(1, 4, 1))
    splits = [make_split((20,) * 6)] * 3
    check_base_training(model, net, splits, 64, EpisodeShape(3, 2, 3), run)
    assert shapes == [(n_images, 3, 16, 16)]
