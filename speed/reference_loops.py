"""The published code, step by step and plainly: Algorithm 1 to read, and the other side of the benchmarks.

Every image is decoded from its file and transformed with PIL each time it is needed; float32, contiguous NCHW; one
episode after another; gradients of the whole backbone where only the head is updated; the checkpoint read from disk
for every episode. Random draws come from outside, so that both sides make the same ones.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from data.episodes import class_major_labels
from data.transforms import Augmentation, draw_crops
from engine.normalisation import IMAGENET
from models.backbone import Backbone

Batch = tuple[Tensor, Tensor]
Draw = tuple[list[int], list[float], bool]  # the crop's box; brightness, contrast, colour; whether to flip
TO_INPUT = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET)])


# Images.


def evaluation_input(path: Path, img_size: int) -> Tensor:
    """Decode, resize, centre crop, normalise: (3, s, s)."""
    with Image.open(path) as image:
        resized = tv.resize(image.convert("RGB"), [int(1.15 * img_size)] * 2)
    return TO_INPUT(tv.center_crop(resized, [img_size, img_size]))


def evaluation_inputs(paths: Iterable[Path], img_size: int, device: torch.device) -> Tensor:
    """(n, 3, s, s) on the device, one image after another."""
    return torch.stack([evaluation_input(path, img_size) for path in paths]).to(device)


def training_input(path: Path, draw: Draw, img_size: int) -> Tensor:
    """Decode, crop and resize, jitter, flip, normalise: (3, s, s)."""
    (top, left, height, width), factors, flip = draw
    with Image.open(path) as opened:
        image = tv.resized_crop(opened.convert("RGB"), top, left, height, width, [img_size, img_size])
    brightness, contrast, colour = factors
    image = ImageEnhance.Brightness(image).enhance(brightness)
    image = ImageEnhance.Contrast(image).enhance(contrast)
    image = ImageEnhance.Color(image).enhance(colour)
    return TO_INPUT(tv.horizontal_flip(image) if flip else image)


def draw_augmentation(sizes: Tensor, augmentation: Augmentation, generator: Generator) -> list[Draw]:
    """The draws of data.transforms.augment for images of `sizes` (b, 2), in its order."""
    boxes = draw_crops(sizes, augmentation.crop_scale, augmentation.crop_ratio, generator)
    factors = 1.0 + augmentation.jitter * (2.0 * torch.rand(len(sizes), 3, generator=generator) - 1.0)
    flips = (torch.rand(len(sizes), generator=generator) < 0.5) & augmentation.flip
    return list(zip(boxes.long().tolist(), factors.tolist(), flips.tolist(), strict=True))


class TrainingFiles(Dataset[tuple[Tensor, int]]):
    """Image files with their labels and draws, decoded and augmented one by one when asked for."""

    def __init__(self, paths: list[Path], labels: list[int], draws: list[Draw], img_size: int):
        self.items = list(zip(paths, labels, draws, strict=True))
        self.img_size = img_size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path, label, draw = self.items[i]
        return training_input(path, draw, self.img_size), label


# Backbone and head.


def conv4(like: Backbone) -> nn.Sequential:
    """Conv4 as plain layers, with a copy of the weights and statistics of one of ours."""
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)
    layers = [copy.deepcopy(module) for module in like.modules() if isinstance(module, kinds)]
    return nn.Sequential(*layers).to(memory_format=torch.contiguous_format)


class ArcMax(nn.Module):
    """The published arcMax head: forward gives cos(theta), loss applies margin and scale."""

    def __init__(self, weight: Tensor, s: float, m: float):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.s, self.m = s, m

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(F.normalize(z), F.normalize(self.weight))

    def loss(self, cosine: Tensor, y: Tensor) -> Tensor:
        sine = torch.sqrt(1.0 - cosine.pow(2))
        phi = cosine * math.cos(self.m) - sine * math.sin(self.m)
        phi = torch.where(cosine > 0, phi, cosine)
        one_hot = torch.zeros_like(cosine).scatter_(1, y.view(-1, 1), 1)
        return F.cross_entropy(self.s * (one_hot * phi + (1.0 - one_hot) * cosine), y)


def step(loss: Tensor, optimizer: Optimizer) -> float:
    """One optimiser step on a loss; its value."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


# Stage 1.


def train(backbone: nn.Module, head: ArcMax, optimizer: Optimizer, batches: Iterable[Batch]) -> float:
    """One optimiser step per batch; the mean loss over the samples."""
    backbone.train()
    loss_sum, n = 0.0, 0
    for x, y in batches:
        x, y = x.to(head.weight.device), y.to(head.weight.device)
        loss_sum += step(head.loss(head(backbone(x).flatten(1)), y), optimizer) * len(y)
        n += len(y)
    return loss_sum / n


def fit_head(head: ArcMax, z: Tensor, y: Tensor, n_steps: int, lr: float) -> torch.optim.Adam:
    """Full-batch Adam steps on frozen features; the optimiser, which alignment goes on with."""
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    for _ in range(n_steps):
        step(head.loss(head(z), y), optimizer)
    return optimizer


def share_right(scores: Tensor, n_way: int) -> Tensor:
    """The share of right predictions per class: class-major scores (n, n_way) -> (n_way,)."""
    y = class_major_labels(n_way, len(scores) // n_way, scores.device)
    return (scores.argmax(1) == y).float().view(n_way, -1).mean(1)


def validate_episode(
    backbone: nn.Module, head: ArcMax, paths: list[list[Path]], n_shot: int, img_size: int, n_steps: int, lr: float
) -> Tensor:
    """Decode and embed all images of an episode, fit its head, score its queries: the share right per class."""
    backbone.eval()
    n_way, device = len(paths), head.weight.device
    with torch.no_grad():
        z = backbone(evaluation_inputs([path for row in paths for path in row], img_size, device)).flatten(1)
    z = z.unflatten(0, (n_way, -1))
    fit_head(head, z[:, :n_shot].flatten(0, 1), class_major_labels(n_way, n_shot, device), n_steps, lr)
    with torch.no_grad():
        return share_right(head(z[:, n_shot:].flatten(0, 1)), n_way)


# Stage 3.


def related_base_score(head: ArcMax, z_base: list[Tensor], n_way: int) -> Tensor:
    """Share of the cached features of each base class that the head predicts as each novel class, counted in lists."""
    score = torch.zeros(len(z_base), n_way)
    with torch.no_grad():
        for b, z in enumerate(z_base):
            predicted = head(z).argmax(1).tolist()
            for w in range(n_way):
                score[b, w] = len([p for p in predicted if p == w]) / len(predicted)
    return score


def choose_classes(score: Tensor, n_B: int) -> list[list[int]]:
    """Each novel class in order takes its n_B best base classes that are not yet taken."""
    taken: list[int] = []
    chosen = []
    for w in range(score.shape[1]):
        order = score[:, w].sort(descending=True, stable=True).indices.tolist()
        best = [b for b in order if b not in taken][:n_B]
        taken += best
        chosen.append(best)
    return chosen


def keep_predicted(
    backbone: nn.Module, head: ArcMax, paths: list[Path], w: int, img_size: int, batch_size: int = 64
) -> list[bool]:
    """Load the images of a chosen class and embed them again, to keep those that are predicted as novel class w."""
    backbone.eval()
    kept: list[bool] = []
    with torch.no_grad():
        for start in range(0, len(paths), batch_size):
            x = evaluation_inputs(paths[start : start + batch_size], img_size, head.weight.device)
            kept += (head(backbone(x).flatten(1)).argmax(1) == w).tolist()
    return kept


def centroid_loss(z_support: Tensor, z_related: Tensor, y_related: Tensor, n_way: int) -> Tensor:
    """Cross-entropy over minus squared distances to the mean support features."""
    centroids = z_support.view(n_way, -1, z_support.shape[1]).mean(1)
    distance = torch.stack([(z_related - centroid).pow(2).sum(1) for centroid in centroids], 1)
    return F.cross_entropy(-distance, y_related)


def align_iteration(
    backbone: nn.Module, head: ArcMax, optimizers: Sequence[Optimizer], support: Batch, related: Batch, n_way: int
) -> list[float]:
    """The updates of Algorithm 1, an optimiser each; their losses. (2) goes backward through the backbone too."""
    (x_support, y_support), (x_related, y_related) = support, related
    backbone.train()
    z_related, z_support = backbone(x_related).flatten(1), backbone(x_support).flatten(1)
    losses = [step(centroid_loss(z_support, z_related, y_related, n_way), optimizers[0])]
    backbone.eval()
    losses.append(step(head.loss(head(backbone(x_related).flatten(1)), y_related), optimizers[1]))
    backbone.train()
    losses.append(step(head.loss(head(backbone(x_support).flatten(1)), y_support), optimizers[2]))
    return losses
