"""Episodes whose last block is aligned together against each of them alone by autograd."""

import copy
import dataclasses
import math

import pytest
import torch

from data.episodes import EpisodeShape, sample_episodes
from engine.precision import Precision
from engine.run import Run
from methods.alignment import AlignmentSetting, align_episode
from methods.block_alignment import align_blocks, last_conv_block
from methods.features import image_source, trainable_blocks
from methods.novel_finetune import HeadFit
from methods.related_base import RelatedSetting
from models.conv4 import Conv4
from tests.helpers import make_split

N = 6
SETTING = AlignmentSetting(
    "naive", HeadFit(ft_n_epoch=30), RelatedSetting(n_B=2, aug_size=6), align_iters=4, record_curve=2
)


@pytest.fixture
def made():
    """Trainable blocks of a small Conv4, 3-way 2-shot tasks of unequal related sets, and the novel and base source."""
    torch.manual_seed(0)
    net = Conv4(img_size=32, width=8).to(memory_format=torch.channels_last)
    blocks = trainable_blocks(net, 1)
    novel, base = make_split((20,) * N, side=32), make_split((30,) * 8, side=32, seed=1, split="base")
    sources = [image_source(net, blocks, split, Run()) for split in (novel, base)]
    episodes = sample_episodes(novel, EpisodeShape(3, 2, 5), N, 0)
    return blocks, [episodes.task(i) for i in range(N)], *sources


@pytest.fixture(params=[1, 2])
def threads(request):
    """One thread, or two, each of which takes a part of the episodes."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("align_bn", ["train", "eval"])
@pytest.mark.parametrize("alignment", ["naive", "centroid"])
def test_episodes_together_are_those_of_autograd_one_after_another(made, threads, alignment, align_bn):
    blocks, tasks, novel, base = made
    setting = dataclasses.replace(SETTING, alignment=alignment, align_bn=align_bn)
    assert last_conv_block(blocks, setting, Run())
    together = [
        (episode, copy.deepcopy(blocks.updated.state_dict()))
        for episode in align_blocks(blocks, tasks, novel, base, setting, Run(), 0)
    ]
    assert len(together) == N and torch.get_num_threads() == threads
    assert len({episode.n_drawn for episode, _ in together}) > 1
    # Adam makes steps of the rate where a gradient is near rounding, as that of the centroid loss is here.
    tolerance = {"rtol": 1e-5, "atol": 1e-5 if alignment == "naive" else 2e-3}
    for i, (task, (found, state)) in enumerate(zip(tasks, together, strict=True)):
        expected = align_episode(blocks, task, novel, base, setting, Run(), i)
        assert found.n_drawn == expected.n_drawn and torch.equal(found.finetuned, expected.finetuned)
        torch.testing.assert_close(found.aligned, expected.aligned, **tolerance)
        torch.testing.assert_close(found.curve, expected.curve, **tolerance)
        losses, right = (torch.tensor(episode.losses[-1]) for episode in (found, expected))
        torch.testing.assert_close(losses, right, rtol=1e-3, atol=1e-2, equal_nan=True)
        assert losses.isnan().tolist() == [alignment == "naive", False, False]
        if alignment == "naive":
            names = [name for name in state if "num_batches" not in name]
            now = blocks.updated.state_dict()
            torch.testing.assert_close([state[name] for name in names], [now[name] for name in names])
        assert (expected.aligned - expected.finetuned).abs().max() > 10 * tolerance["atol"]


def test_without_related_images_only_the_support_is_learned(made):
    blocks, tasks, novel, _ = made
    (found,) = align_blocks(blocks, tasks[:1], novel, None, SETTING, Run(), 0)
    expected = align_episode(blocks, tasks[0], novel, None, SETTING, Run(), 0)
    torch.testing.assert_close(found.aligned, expected.aligned)
    assert [math.isnan(loss) for loss in found.losses[-1]] == [True, True, False]


def test_an_episode_depends_on_none_beside_it(made):
    blocks, tasks, novel, base = made
    together = list(align_blocks(blocks, tasks, novel, base, SETTING, Run(), 0))
    (alone,) = align_blocks(blocks, tasks[3:4], novel, base, SETTING, Run(), 3)
    torch.testing.assert_close(alone.aligned, together[3].aligned)


def test_whatever_is_not_written_out_takes_autograd(made):
    blocks, tasks, novel, base = made
    fp16, adversarial = Run(precision=Precision("fp16")), dataclasses.replace(SETTING, alignment="adversarial")
    assert last_conv_block(blocks, SETTING, fp16) is None
    assert last_conv_block(blocks, adversarial, Run()) is None
    for net, n_blocks in ((Conv4(32, 8, end="mean"), 1), (Conv4(32, 8, pool_last=False), 1), (Conv4(32, 8), 2)):
        assert last_conv_block(trainable_blocks(net, n_blocks), SETTING, Run()) is None
    (found,) = align_blocks(blocks, tasks[:1], novel, base, adversarial, Run(), 0)
    assert len(found.losses) == SETTING.align_iters  # a row per iteration, as of one episode alone
