"""Base training of Conv4, end to end from JPEG files: images decoded once and augmented in batches, against a loader
of worker processes that decodes and augments every image with PIL.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.transforms import Augmentation, TrainingImages, training_images
from engine.generators import make_generator
from methods.base_training import train_base_epoch
from models import Model, build_head
from models.backbone import Backbone
from models.heads import Head
from speed import reference_loops as plain
from speed.common import Bench, Measured, Setting, clones, count_flops, difference, load, new_conv4, spread, timed

WORK = "base training, 64 images a step"
AUGMENTATION = Augmentation()
S, M, LR = 20.0, 0.01, 1e-3
N_STEPS = {"tiny": 2, "full": 20}
N_CHECKED = 2  # steps on the very same inputs, whose weights are compared


@dataclass(frozen=True)
class Work:
    """A part of the base split, and the model to start from."""

    images: TrainingImages
    paths: list[Path]
    batch_size: int
    backbone: Backbone
    head: Head


def part_of(images: TrainingImages, index: Tensor) -> TrainingImages:
    """The images at an index (n,)."""
    return replace(images, images=images.images[index], sizes=images.sizes[index], labels=images.labels[index])


def work(setting: Setting) -> Work:
    """Evenly spread images, so that every class takes part."""
    base, paths = load(setting, "base")
    batch_size = 16 if setting.tiny else 64
    index = spread(len(paths), N_STEPS[setting.scale] * batch_size)
    backbone = new_conv4(setting, base)
    head = build_head("arcMax", backbone.feature_dim, len(base.class_names), S, M, make_generator(0, "head"))
    head = head.to(setting.run.device)
    images = part_of(training_images(base, AUGMENTATION, setting.run.device), index)
    return Work(images, [paths[i] for i in index], batch_size, backbone, head)


def reference(setting: Setting) -> dict[str, Measured]:
    """A loader over files and a plain step, with the random draws of train_base_epoch."""
    t = work(setting)
    generator = make_generator(0, "base training", 0)
    order = torch.randperm(len(t.images.labels), generator=generator)
    draws: list[plain.Draw] = []
    for index in order.split(t.batch_size):
        draws += plain.draw_augmentation(t.images.sizes[index], AUGMENTATION, generator)
    files = plain.TrainingFiles([t.paths[i] for i in order], t.images.labels[order].tolist(), draws, setting.img_size)
    workers = 0 if setting.tiny else setting.workers
    loader = DataLoader(files, t.batch_size, num_workers=workers)
    backbone, head, optimizer = model(t)
    seconds, loss = timed(lambda: plain.train(backbone, head, optimizer, loader))

    inputs = torch.stack([files[i][0] for i in range(t.batch_size)])
    backbone, head, optimizer = model(t)
    before = clones(backbone)
    checked = first_steps(t)
    generator = make_generator(0, "base training", 1)
    batches = []
    for index in torch.randperm(len(checked.labels), generator=generator).split(t.batch_size):
        # Our inputs: PIL rounds to whole grey levels, and two steps of Adam would magnify that.
        batches.append((checked.batch(index, generator).contiguous(), checked.labels[index]))
    checked_loss = plain.train(backbone, head, optimizer, batches)
    return {WORK: Measured(seconds, answer(loss, inputs, checked_loss, difference(backbone, before)))}


def answer(loss: float, inputs: Tensor, checked_loss: float, update: Tensor) -> dict[str, Tensor]:
    """inputs: the first batch; checked_loss, update: of the N_CHECKED first steps."""
    checked = {"loss on the same inputs": torch.tensor(checked_loss), "update on the same inputs": update}
    return {"loss": torch.tensor(loss), "inputs": inputs} | checked


def first_steps(t: Work) -> TrainingImages:
    """The images of the N_CHECKED first steps."""
    return part_of(t.images, spread(len(t.images.labels), N_CHECKED * t.batch_size))


def model(t: Work) -> tuple[torch.nn.Sequential, plain.ArcMax, torch.optim.Adam]:
    """The reference's copy of the model, and its optimiser."""
    backbone, head = plain.conv4(t.backbone), plain.ArcMax(t.head.weight, S, M)
    return backbone, head, torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=LR)


def our_epoch(setting: Setting, t: Work, images: TrainingImages, epoch: int) -> float:
    """train_base_epoch as transferLearning.py calls it; the model is trained in place."""
    loss, _ = train_base_epoch(Model(t.backbone, t.head, LR), images, t.batch_size, epoch, setting.run)
    return loss


def ours(setting: Setting) -> dict[str, Measured]:
    """train_base_epoch on the decoded images; also its steps alone, on inputs that are ready."""
    t = work(setting)
    state, head_state = clones(t.backbone), clones(t.head)

    def restart() -> None:
        t.backbone.load_state_dict(state)
        t.head.load_state_dict(head_state)

    checked_loss = our_epoch(setting, t, first_steps(t), epoch=1)
    update = difference(t.backbone, state)
    restart()
    seconds, loss = timed(lambda: our_epoch(setting, t, t.images, epoch=0))

    restart()
    generator = make_generator(0, "base training", 0)
    order = torch.randperm(len(t.images.labels), generator=generator)[: t.batch_size]
    x = t.images.batch(order, generator)
    y = t.images.labels[order].to(setting.run.device)
    alone, _ = timed(lambda: steps_alone(setting, t, x, y))
    rate = len(t.images.labels) / seconds
    note = f"{rate:.0f} images/s, {100 * alone / seconds:.0f}% of the steps alone"
    return {WORK: Measured(seconds, answer(loss, x.contiguous(), checked_loss, update), note)}


def steps_alone(setting: Setting, t: Work, x: Tensor, y: Tensor) -> None:
    """As many steps as an epoch has, all on one batch."""
    precision, optimizer = setting.run.precision, Model(t.backbone, t.head, LR).optimizer
    t.backbone.train()
    for _ in range(N_STEPS[setting.scale]):
        with precision.autocast():
            z = t.backbone(x)
        precision.backward_and_step(t.head.loss(t.head(z), y), optimizer)


def flops(setting: Setting) -> dict[str, float]:
    """Operations of one step, times the steps."""
    t = work(setting)
    counted = count_flops(lambda: our_epoch(setting, t, first_steps(t), epoch=0))
    return {WORK: counted * N_STEPS[setting.scale] / N_CHECKED}


TARGETS = {WORK: {"fp32": 2.5, "bf16": 4.5}}
TOLERANCES = {
    "loss": {"fp32": 0.01, "bf16": 0.02},
    "inputs": {"fp32": 0.04, "bf16": 0.04},
    "loss on the same inputs": {"fp32": 5e-4, "bf16": 0.01},
    # The first step of Adam has the size of the rate whatever the gradient, also where that is near rounding; and
    # rounding decides a near tie of a pooling or ReLU now and then, which moves a gradient by 1e-3. The reference
    # itself, in channels-last memory, is 0.08 from what it gives in float64.
    "update on the same inputs": {"fp32": 0.15, "bf16": 0.5},
}
BENCH = Bench(TARGETS, reference, ours, flops, TOLERANCES)
