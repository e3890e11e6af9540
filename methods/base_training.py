"""Stage 1: batch training of a backbone and a head on the base classes; one epoch of it."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Generator, Tensor, nn

from data.transforms import TrainingImages
from engine.distributed import gather_objects
from engine.graphs import Step, graphed
from engine.precision import Losses
from engine.run import Run, move
from methods.features import check_blocks
from models import Model
from models.backbone import Backbone, PartlyFrozen
from models.heads import Head


@dataclass(frozen=True)
class TrainingFeatures:
    """Training data of the head on a frozen backbone: features (N, d) and labels (N,)."""

    features: Tensor
    labels: Tensor

    def batch(self, index: Tensor, generator: Generator, part: slice = slice(None)) -> Tensor:
        """The features at `index` (b,), of which `part` gives the rows: (b, d)."""
        return self.features[move(index[part], self.features.device)]


def last_blocks(backbone: Backbone, n_blocks: int | None) -> nn.Module:
    """The last n_blocks blocks of a backbone (None: all), or nn.Identity when 0; freezes the rest.

    Raises UserError when the backbone has fewer.
    """
    check_blocks(backbone, n_blocks, "--train_blocks")
    if n_blocks == 0:
        backbone.requires_grad_(False)
        return nn.Identity()
    return backbone if n_blocks in (None, len(backbone.blocks())) else PartlyFrozen(backbone, n_blocks)


def train_base_epoch(
    model: Model, images: TrainingImages | TrainingFeatures, batch_size: int, epoch: int, run: Run, n_left: int = 1
) -> tuple[float, float]:
    """One shuffled pass over the base images, the last batch kept; returns the mean loss and accuracy in 0..1.

    Order and augmentation depend on (seed, epoch) alone, dropout on the rank as well. Each rank takes its share of
    every batch, and the gradients are averaged. The bar is of the n_left epochs of the run that are left, this one
    included. Raises UserError when the loss is no longer finite.
    """
    head, ranks = cast(Head, model.head), run.ranks
    model.net.train()
    generator = run.generator("base training", epoch)
    order = torch.randperm(len(images.labels), generator=generator)

    def train_step(x: Tensor, y: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
        with run.precision.autocast():
            z = model.net(x)
        scores = model.classifier(z)
        # The last batch may leave a rank without images: it takes part in the average with a gradient of zero.
        loss = head.loss(scores, y) if len(y) else scores.sum()
        run.precision.backward_and_step(loss * share, model.optimizer)
        return loss.detach(), (scores.argmax(1) == y).sum()

    one_step: Step = graphed(train_step, [model.optimizer]) if run.graphs else train_step
    losses, sizes = Losses(f"epoch {epoch + 1}, batch"), []
    batches = order.split(batch_size)
    bar = run.bar(batches, f"epoch {epoch + 1} and on", "batch", leave=False, total=len(batches) * n_left)
    for step, index in enumerate(bar):
        mine = ranks.share(range(len(index)))
        part = slice(mine.start, mine.stop)
        x = images.batch(index, generator, part)
        y = move(images.labels[index[part]], run.device)
        share = [len(y) * ranks.n / len(index)] if ranks.n > 1 else []
        with run.seeded("dropout", epoch, step, *([ranks.rank] if ranks.rank else [])):
            loss, right_here = one_step(x, y, *share)
        sizes.append(len(y))
        if losses.add(loss, right_here):
            bar.set_postfix_str(f"loss {losses.rows[-1][0]:.3f}", refresh=False)
    loss_sum = right = 0.0
    for (mean, n_right), size in zip(losses.read(), sizes, strict=True):
        loss_sum, right = loss_sum + mean * size, right + n_right
    loss_sum, right = (sum(figures) for figures in zip(*gather_objects((loss_sum, right), ranks), strict=True))
    return loss_sum / len(order), right / len(order)
