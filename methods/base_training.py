"""Stage 1: batch training of a backbone and a head on the base classes; one epoch of it."""

from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.transforms import Augmentation, augment, normalise
from engine.distributed import ALONE, Ranks, gather_objects, plain_module
from engine.generators import make_generator, seeded
from engine.precision import Precision, check_finite
from models.heads import Head


def training_input(
    images: Tensor,
    sizes: Tensor,
    index: Tensor,
    img_size: int,
    augmentation: Augmentation | None,
    generator: torch.Generator,
    device: torch.device,
    part: slice = slice(None),
) -> Tensor:
    """The uint8 images (N, 3, H, W) at `index` (b,), augmented if asked: channels-last input (b, 3, s, s).

    sizes (N, 2): their original (height, width). With no augmentation the images must be of img_size. `part` gives
    the rows of the input that are made, without changing them.
    """
    batch = images[index[part].to(images.device)].to(device)
    x = augment(batch, sizes[index], img_size, augmentation, generator, part) if augmentation else normalise(batch)
    return x.contiguous(memory_format=torch.channels_last)


def train_one_epoch(
    backbone: nn.Module,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    sizes: Tensor,
    labels: Tensor,
    img_size: int,
    augmentation: Augmentation | None,
    batch_size: int,
    epoch: int,
    seed: int,
    device: torch.device,
    precision: Precision,
    quiet: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[float, float]:
    """One shuffled pass over the base images, the last batch kept; returns the mean loss and accuracy in 0..1.

    images (N, 3, H, W) uint8, sizes (N, 2) and img_size as in training_input, labels (N,). The order, the
    augmentation and dropout depend on (seed, epoch) alone; dropout on the rank as well. Each rank takes its share of
    every batch; backbone and head must then be of data_parallel, and its average of the ranks' gradients is that of
    the batch. Raises UserError when the loss is no longer finite.
    """
    loss_of = cast(Head, plain_module(head)).loss
    backbone.train()
    generator = make_generator(seed, "base training", epoch)
    order = torch.randperm(len(labels), generator=generator)
    loss_sum, right = 0.0, 0
    bar = tqdm(order.split(batch_size), desc=f"epoch {epoch}", unit="batch", leave=False, disable=quiet)
    for step, index in enumerate(bar):
        mine = ranks.share(range(len(index)))
        part = slice(mine.start, mine.stop)
        x = training_input(images, sizes, index, img_size, augmentation, generator, device, part)
        y = labels[index[part]].to(device)
        with precision.autocast(), seeded(seed, "dropout", epoch, step, *([ranks.rank] if ranks.rank else [])):
            z = backbone(x)
        scores = head(z)
        # The last batch may leave a rank without images: it takes part in the average with a gradient of zero.
        loss = loss_of(scores, y) if len(y) else scores.sum()
        check_finite(loss, f"epoch {epoch}, batch {step}")
        optimizer.zero_grad()
        precision.backward_and_step(loss * (len(y) * ranks.n / len(index)), optimizer)
        loss_sum += loss.item() * len(y)
        right += int((scores.argmax(1) == y).sum())
        bar.set_postfix(loss=f"{loss.item():.3f}")
    loss_sum, right = (sum(figures) for figures in zip(*gather_objects((loss_sum, right), ranks), strict=True))
    return loss_sum / len(order), right / len(order)
