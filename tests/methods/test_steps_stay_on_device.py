"""No step waits for a GPU, or makes a tensor elsewhere: each is run on `meta`, which has shapes but no numbers.

With AA_DEVICE=cuda on a GPU itself, where PyTorch raises an error for what waits.
"""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.episodes import EpisodeShape, class_major_labels, sample_episodes
from data.transforms import Augmentation, TrainingImages
from engine.precision import Losses, Precision
from engine.run import Run
from methods import base_training, episodic_training
from methods.adversarial_alignment import AdversarialAlignment, CriticSetting
from methods.alignment import ALIGNMENTS, AlignmentSetting, Batch, Updates, related_batches
from methods.feature_alignment import HeadUpdates, padded_related_batches
from methods.features import embed, feature_source, image_source, trainable_blocks, updated_features
from methods.meta_learners import META_LEARNERS, build_meta_learner
from methods.novel_finetune import HeadFit, fit_heads
from methods.related_base import RelatedBase, RelatedSetting
from models import HEADS, Model, build_backbone, build_head
from tests.helpers import DEVICE, ONE_OF_EACH, make_split

pytestmark = pytest.mark.device
AWAY, CPU = torch.device("meta") if DEVICE.type == "cpu" else DEVICE, torch.device("cpu")
RUN = Run(device=AWAY)
WEIGHT = torch.full((2, 6), 1 / 6, device=AWAY)
CRITICS = [("adversarial", CriticSetting(8, 2, critic_constraint=constraint)) for constraint in ("clip", "gp")]
KINDS = [("naive", CriticSetting()), ("centroid", CriticSetting()), *CRITICS]
KIND_NAMES = ["naive", "centroid", "clip", "gp"]


class OneDevice(TorchDispatchMode):
    """Fails where an operation mixes devices, and where a tensor moves to the device but as images, labels, draws."""

    def __enter__(self):
        if AWAY.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        if AWAY.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        to = kwargs.get("device")
        if function is torch.ops.aten._to_copy.default and to and to.type == AWAY.type and tensors:
            if tensors[0].device == CPU:
                assert kwargs.get("non_blocking"), "a blocking copy"
                assert tensors[0].dtype == torch.uint8 or tensors[0].numel() < 1000, "numbers made on the CPU"
        else:
            devices = {tensor.device for tensor in tensors}
            assert len(devices) < 2, f"{function} of tensors on {devices}"
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def no_step_waits(monkeypatch):
    """Losses, all on the device, are read as zeros. Adam is not fused, and autocast not there, which `meta` lacks."""

    def read(losses):
        assert all(value.device.type == AWAY.type for row in losses.unread for value in row)
        losses.rows = [(0.0,) * len(row) for row in losses.unread]
        return losses.rows

    adam = torch.optim.Adam
    monkeypatch.setattr(Losses, "read", read)
    monkeypatch.setattr(torch, "autocast", lambda device_type, enabled: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, fused=False, **options: adam(parameters, **options))


def network(name="Conv4", relation=False):
    with AWAY:
        return build_backbone(name, 16, relation).to(memory_format=torch.channels_last)


def images(device=CPU, augmentation=None):
    """The images of a toy split that lie on `device`, for steps on AWAY."""
    split = make_split()
    return TrainingImages(split.images.to(device), split.train_sizes, split.labels, 16, augmentation, AWAY)


def test_what_the_fake_device_is_for():
    move_if_fits = torch.zeros(3, device=AWAY)
    with OneDevice():
        with pytest.raises(RuntimeError):
            move_if_fits.sum().item()
        with pytest.raises((NotImplementedError, RuntimeError)):
            move_if_fits.cpu()
        with pytest.raises(AssertionError, match="of tensors on"):
            move_if_fits[torch.arange(2)]
        with pytest.raises(AssertionError, match="blocking"):
            torch.zeros(3).to(AWAY)
        with pytest.raises(AssertionError, match="made on the CPU"):
            torch.zeros(1000).to(AWAY, non_blocking=True)


@pytest.mark.parametrize("where", [CPU, AWAY], ids=str)
@pytest.mark.parametrize("augmentation", [None, Augmentation()], ids=["as they are", "augmented"])
def test_a_batch(where, augmentation):
    given = images(where, augmentation)
    with OneDevice():
        x = given.batch(torch.arange(7), torch.Generator(), slice(1, 5))
    assert x.device.type == AWAY.type and x.shape == (4, 3, 16, 16)


@pytest.mark.parametrize(("name", "method"), [(name, "arcMax") for name in ONE_OF_EACH] + [("Conv4", h) for h in HEADS])
def test_an_epoch_of_base_training(name, method):
    net = network(name)
    model = Model(net, build_head(method, net.feature_dim, 6, 15.0, 0.1).to(AWAY), 1e-3)
    with OneDevice():
        assert base_training.train_base_epoch(model, images(CPU, Augmentation()), 40, 0, RUN) == (0.0, 0.0)


@pytest.mark.parametrize("method", META_LEARNERS)
def test_an_epoch_of_episodic_training(method):
    net = network(relation="Relation" in method)
    model = Model(net, build_meta_learner(method, net).to(AWAY), 1e-3)
    episodes = sample_episodes(make_split(), EpisodeShape(3, 2, 4), 2, 0)
    with OneDevice():
        figures = episodic_training.train_episodic_epoch(model, images(CPU, Augmentation()), episodes, 0, RUN)
    assert figures == (0.0, 0.0)


@pytest.mark.parametrize(("alignment", "critic"), KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("align_blocks", [None, 1], ids=["all blocks", "last block"])
def test_the_three_updates_of_an_iteration(alignment, critic, align_blocks):
    net, setting = network(), AlignmentSetting(alignment=alignment, critic=critic)
    blocks = trainable_blocks(net, align_blocks)
    source = image_source(net, blocks, make_split(), RUN)
    head = build_head("arcMax", net.feature_dim, 3, 15.0, 0.1).to(AWAY)
    loss = ALIGNMENTS[alignment](net.feature_dim, 3, setting, torch.Generator(), AWAY)
    if isinstance(loss, AdversarialAlignment):
        loss.with_related = torch.arange(6, device=AWAY)  # read once an episode
    fitted = torch.optim.Adam(head.parameters())
    updates = Updates(blocks.updated, head, fitted, loss, setting, Precision())
    few = replace(setting, related=RelatedSetting(aug_size=4), align_iters=2)
    batches = related_batches([torch.arange(8 * w, 8 * w + 8) for w in range(3)], source, few, torch.Generator(), AWAY)
    with OneDevice():
        support = Batch(source.block_inputs(torch.arange(6)), class_major_labels(3, 2, AWAY))
        for related in batches:
            losses = updates.align(support, related), updates.train_head(related), updates.train_on_support(support)
            assert all(loss.device.type == AWAY.type for loss in losses if loss is not None)
        z = updated_features(blocks, source, torch.arange(5), Precision())
        assert z.device.type == AWAY.type


def test_the_updates_in_feature_space():
    d, n_way, generators, setting = 8, 3, [torch.Generator() for _ in range(2)], AlignmentSetting()
    head = build_head("arcMax", d, n_way, 15.0, 0.1, generators).to(AWAY)
    support = Batch(torch.zeros(2, 6, d, device=AWAY), class_major_labels(3, 2, AWAY).expand(2, 6), WEIGHT)
    fitted = fit_heads(head, support.x, support.y, 2, 1e-3, support.weight)
    fitted.state.clear()  # which heads are idle is read once
    updates = HeadUpdates(head, fitted, setting, torch.zeros(2, dtype=torch.bool, device=AWAY))
    found = RelatedBase(torch.zeros(6, 3), [[0], [1], [2]], [torch.arange(5)] * n_way)
    base = feature_source(torch.zeros(20, d, device=AWAY), make_split())
    assert base.norms.device.type == AWAY.type
    few = replace(setting, related=RelatedSetting(aug_size=4), align_iters=2)
    batches = padded_related_batches([found, found], head, base, few, generators, AWAY)
    with OneDevice():
        for related in batches:
            updates.train_head(related)
            updates.train_on_support(support)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", HEADS)
def test_fitting_heads(method, weighted):
    head = HeadFit(method).new_head(8, 3, [torch.Generator() for _ in range(2)]).to(AWAY)
    z, y = torch.zeros(2, 6, 8, device=AWAY), class_major_labels(3, 2, AWAY).expand(2, 6)
    with OneDevice():
        fit_heads(head, z, y, 3, 1e-3, WEIGHT if weighted else None)
    assert head.weight.grad.device.type == AWAY.type


def test_embedding():
    split, net = make_split(), network()
    with OneDevice():
        for maps in (False, True):
            assert embed(net, split.images, RUN, maps=maps).device.type == AWAY.type
