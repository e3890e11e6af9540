"""Steps that are replayed from a graph: on a CPU from one that runs the step again on the memory that it was given."""

import copy
import dataclasses

import pytest
import torch

from data.episodes import EpisodeShape, sample_episodes
from data.transforms import TrainingImages
from engine import graphs
from engine.graphs import WARM_UP, GraphedStep, graphed
from engine.run import Run
from methods import alignment, base_training
from methods.adversarial_alignment import CriticSetting
from methods.alignment import AlignmentSetting, align_episode
from methods.base_training import train_base_epoch
from methods.features import image_source, trainable_blocks
from methods.novel_finetune import HeadFit
from methods.related_base import RelatedSetting
from models import Model, build_backbone, build_head
from tests.helpers import DEVICE, make_split


class Recorder:
    """Stands in for CUDA: what it records is not run, then runs on the same inputs into the same outputs."""

    def __init__(self, outputs):
        self.outputs, self.recorded, self.replayed = outputs, 0, 0

    def __call__(self, step, inputs):
        self.recorded += 1

        def replay():
            self.replayed += 1
            for held, found in zip(self.outputs, step(*inputs), strict=True):
                held.copy_(found)

        return replay, self.outputs


def test_a_step_is_recorded_once_and_its_outputs_outlast_the_next_one():
    recorder = Recorder((torch.zeros(2),))
    step = GraphedStep(lambda x: (2 * x,), recorder)
    outputs = [step(torch.full((2,), float(i)))[0] for i in range(WARM_UP + 3)]
    assert [output.tolist() for output in outputs] == [[2.0 * i] * 2 for i in range(WARM_UP + 3)]
    assert (recorder.recorded, recorder.replayed) == (1, 3)
    assert step(torch.ones(5))[0].tolist() == [2.0] * 5 and recorder.replayed == 3  # of another shape


def epochs(device, run, net):
    """Two epochs of stage 1 on 46 images, of batches of 8 and one of 6: figures and weights."""
    split = make_split((23, 23), side=16)
    images = TrainingImages(split.images, split.train_sizes, split.labels, 16, None, device)
    head = build_head("arcMax", net.feature_dim, 2, 20.0, 0.01, torch.Generator().manual_seed(0))
    net = copy.deepcopy(net).to(device, memory_format=torch.channels_last)
    model = Model(net, head.to(device), 1e-3)
    figures = [train_base_epoch(model, images, 8, epoch, run) for epoch in range(2)]
    return figures, [p.detach().cpu() for p in (*model.net.parameters(), *model.head.parameters())]


def test_base_training_by_replayed_steps_gives_the_same_numbers_to_the_bit(monkeypatch):
    recorders = []

    def with_recorder(step, optimizers):
        recorders.append(Recorder((torch.zeros(()), torch.zeros((), dtype=torch.long))))
        assert len(optimizers) == 1
        return GraphedStep(step, recorders[-1])

    monkeypatch.setattr(base_training, "graphed", with_recorder)
    cpu, net = torch.device("cpu"), build_backbone("Conv4", 16)
    figures, weights = epochs(cpu, Run(graphs=True), net)
    plain_figures, plain_weights = epochs(cpu, Run(), net)
    assert [(r.recorded, r.replayed) for r in recorders] == [(1, 5 - WARM_UP)] * 2
    assert figures == plain_figures and all(map(torch.equal, weights, plain_weights))


@pytest.mark.device
@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs are CUDA's")
def test_base_training_by_graphs_gives_the_numbers_of_the_steps_one_by_one():
    net = build_backbone("Conv4", 16)
    (figures, weights), (plain_figures, plain_weights) = (
        epochs(DEVICE, Run(device=DEVICE, graphs=on), net) for on in (True, False)
    )
    torch.testing.assert_close(torch.tensor(figures), torch.tensor(plain_figures), rtol=1e-4, atol=1e-5)
    for weight, plain in zip(weights, plain_weights, strict=True):
        torch.testing.assert_close(weight, plain, rtol=1e-4, atol=1e-5)


# Of the last no graph is made: its penalty draws on the CPU.
ALIGNMENTS = {
    "naive": AlignmentSetting("naive"),
    "centroid": AlignmentSetting(),
    "weight clipping": AlignmentSetting("adversarial", critic=CriticSetting(16)),
    "gradient penalty": AlignmentSetting("adversarial", critic=CriticSetting(16, critic_constraint="gp")),
}


def aligned_episodes(device, setting, graphs):
    """Two episodes of 3-way 2-shot, one after another, in six iterations: losses and scores."""
    torch.manual_seed(0)
    few = {"fit": HeadFit(ft_n_epoch=20), "related": RelatedSetting(n_B=2, aug_size=4), "align_iters": WARM_UP + 3}
    setting, run, net = dataclasses.replace(setting, **few), Run(device, graphs=graphs), build_backbone("Conv4", 16)
    blocks = trainable_blocks(net.to(device, memory_format=torch.channels_last), None)
    splits = make_split((10,) * 4), make_split((10,) * 6, seed=1, split="base")
    sources = [image_source(net, blocks, split, run) for split in splits]
    episodes = sample_episodes(splits[0], EpisodeShape(3, 2, 3), 2, 0)
    return [align_episode(blocks, episodes.task(i), *sources, setting, run, i) for i in range(2)]


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_alignment_by_replayed_iterations_gives_the_same_numbers_to_the_bit(monkeypatch, kind):
    recorders = []

    def with_recorder(step, optimizers):
        recorders.append(Recorder(tuple(torch.zeros(4))))
        assert len(optimizers) == 3
        return GraphedStep(step, recorders[-1])

    monkeypatch.setattr(alignment, "graphed", with_recorder)
    cpu = torch.device("cpu")
    found, expected = (aligned_episodes(cpu, ALIGNMENTS[kind], graphs) for graphs in (True, False))
    assert [(r.recorded, r.replayed) for r in recorders] == [(1, 3)] * (0 if kind == "gradient penalty" else 2)
    for actual, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(actual.losses), torch.tensor(plain.losses), rtol=0, atol=0, equal_nan=True
        )
        assert torch.equal(actual.aligned, plain.aligned) and not torch.equal(actual.aligned, actual.finetuned)


@pytest.mark.device
@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs are CUDA's")
@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_alignment_by_graphs_gives_the_numbers_of_the_iterations_one_by_one(kind):
    found, expected = (aligned_episodes(DEVICE, ALIGNMENTS[kind], graphs) for graphs in (True, False))
    for actual, plain in zip(found, expected, strict=True):
        losses = (torch.tensor(episode.losses) for episode in (actual, plain))
        torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-3, equal_nan=True)
        torch.testing.assert_close(actual.aligned, plain.aligned, rtol=1e-2, atol=1e-2)


def test_adam_of_a_graphed_step_may_be_recorded():
    adam = torch.optim.Adam([torch.zeros(2, requires_grad=True)], fused=True)
    step = graphed(lambda: (), [adam])
    assert [group["capturable"] for group in adam.param_groups] == [True] and step.record is graphs.record_graph
