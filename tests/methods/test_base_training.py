"""One epoch of stage 1: what is trained on, what is returned, and what it depends on."""

import pytest
import torch
from torch import nn

from data.transforms import Augmentation, TrainingImages, normalise
from engine.errors import UserError
from engine.run import Run
from methods.base_training import train_base_epoch
from models import Model, build_head
from tests.helpers import make_split


class Flat(nn.Module):
    """A linear layer without batch norm, so that a batch is the sum of its images; it keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 5)
        self.inputs = []

    def forward(self, x):
        self.inputs.append((self.training, x.clone()))
        return self.layer(x.flatten(1))


def new_model(lr):
    torch.manual_seed(0)
    return Model(Flat(), build_head("softMax", 5, 4, 0.0, 0.0, torch.Generator().manual_seed(0)), lr)


def epoch_of(lr=0.0, batch_size=16, augmentation=None, epoch=1, n_epochs=1, seed=0):
    """Train a new model on 40 images of 4 classes from this epoch on: figures of the last, model, images."""
    split = make_split((10,) * 4, side=8)
    images = TrainingImages(split.images, split.train_sizes, split.labels, 8, augmentation, torch.device("cpu"))
    model = new_model(lr)
    model.backbone.eval()
    for i in range(n_epochs):
        figures = train_base_epoch(model, images, batch_size, epoch + i, Run(seed=seed))
    return figures, model, images


def batches(**flags):
    return [x for _, x in epoch_of(**flags)[1].backbone.inputs]


def test_an_epoch_is_every_image_once_in_train_mode_and_keeps_the_last_batch():
    _, model, images = epoch_of()
    assert [training for training, _ in model.backbone.inputs] == [True] * 3
    found = batches()
    assert [len(x) for x in found] == [16, 16, 8]
    seen, expected = torch.cat(found), normalise(images.images)
    assert not torch.equal(seen, expected)  # shuffled
    nearest = torch.cdist(seen.flatten(1).double(), expected.flatten(1).double()).min(1)
    assert sorted(nearest.indices.tolist()) == list(range(40)) and nearest.values.max() < 1e-3


@pytest.mark.parametrize("batch_size", [1, 16, 40, 100])
def test_loss_and_accuracy_are_means_over_images_whatever_the_batches(batch_size):
    (loss, accuracy), model, images = epoch_of(batch_size=batch_size)
    with torch.no_grad():
        scores = model.head(model.backbone(normalise(images.images)))
    assert loss == pytest.approx(model.head.loss(scores, images.labels).item(), rel=1e-4)
    assert accuracy == pytest.approx((scores.argmax(1) == images.labels).float().mean().item())


def test_an_epoch_is_a_step_of_the_optimiser_on_each_batch():
    _, model, images = epoch_of(lr=0.05)
    twin = new_model(0.05)
    of_image = {tuple(x.flatten().tolist()): y for x, y in zip(normalise(images.images), images.labels, strict=True)}
    for _, x in model.backbone.inputs:
        y = torch.stack([of_image[tuple(image.flatten().tolist())] for image in x])
        loss = nn.functional.cross_entropy(twin.head(twin.backbone(x)), y)
        twin.optimizer.zero_grad()
        loss.backward()
        twin.optimizer.step()
    torch.testing.assert_close(model.backbone.layer.weight, twin.backbone.layer.weight)
    torch.testing.assert_close(model.head.weight, twin.head.weight)


def test_order_and_augmentation_depend_on_seed_and_epoch_alone():
    first = batches(augmentation=Augmentation())
    assert all(map(torch.equal, first, batches(augmentation=Augmentation(), lr=0.1)))
    for other in ({"epoch": 2}, {"seed": 1}):
        assert not torch.equal(first[0], batches(augmentation=Augmentation(), **other)[0])
        assert not torch.equal(batches()[0], batches(**other)[0])


def test_a_loss_that_is_not_finite_names_epoch_and_batch():
    with pytest.raises(UserError, match="epoch 2, batch 1"):
        epoch_of(lr=float("inf"))
