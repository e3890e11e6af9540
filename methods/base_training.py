"""Stage 1: batch training of a backbone and a head on the base classes; one epoch of it."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.errors import UserError
from data.generators import make_generator
from data.transforms import Augmentation, augment, normalise
from methods.engine import Precision
from models.heads import Head


def train_one_epoch(
    backbone: nn.Module,
    head: Head,
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
) -> tuple[float, float]:
    """One shuffled pass over the base images, the last batch kept; returns the mean loss and accuracy in 0..1.

    images (N, 3, H, W) uint8, sizes (N, 2), labels (N,). With no augmentation the images must be of img_size. The
    order and the augmentation depend on (seed, epoch) alone. Raises UserError when the loss is no longer finite.
    """
    backbone.train()
    generator = make_generator(seed, "base training", epoch)
    order = torch.randperm(len(labels), generator=generator)
    loss_sum, right = 0.0, 0
    bar = tqdm(order.split(batch_size), desc=f"epoch {epoch}", unit="batch", leave=False, disable=quiet)
    for step, index in enumerate(bar):
        batch = images[index.to(images.device)].to(device)
        if augmentation:
            x = augment(batch, sizes[index], img_size, augmentation, generator)
        else:
            x = normalise(batch)
        y = labels[index].to(device)
        with precision.autocast():
            z = backbone(x.contiguous(memory_format=torch.channels_last))
        scores = head(z)
        loss = head.loss(scores, y)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss became {loss.item()} at epoch {epoch}, batch {step}: lower --lr, or use --precision fp32"
            )
        optimizer.zero_grad()
        precision.backward_and_step(loss, optimizer)
        loss_sum += loss.item() * len(y)
        right += int((scores.argmax(1) == y).sum())
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return loss_sum / len(order), right / len(order)
