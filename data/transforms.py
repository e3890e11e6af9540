"""The published augmentation of a whole batch in a few tensor operations on the device, as torchvision and PIL do it.

Random resized crop; brightness, contrast and colour jitter, in that order; horizontal flip; normalisation. A resized
crop is a separable linear map: for a batch, two batched matrix products, rows (s, H) @ image (H, W) @ columns (W, s).
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from data.benchmarks import Split
from engine.normalisation import IMAGENET, Normalisation
from engine.run import move, move_if_fits


@dataclass(frozen=True)
class Augmentation:
    """What is drawn: the crop's area range and aspect range, the jitter's half width, whether to flip."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: float = 0.4
    flip: bool = True


def normalise(images: Tensor, by: Normalisation = IMAGENET) -> Tensor:
    """Images (b, 3, h, w) in 0..255 -> float32 with mean 0 and standard deviation 1."""
    mean, std = move(torch.tensor((by.mean, by.std)), images.device).view(2, 3, 1, 1)
    scale, shift = 1.0 / (255.0 * std), mean * 255.0
    return (images.float() - shift) * scale


def draw_crops(sizes: Tensor, scale: tuple[float, float], ratio: tuple[float, float], generator: Generator) -> Tensor:
    """Boxes (b, 4) = (top, left, height, width) in pixels of images of `sizes` (b, 2) = (height, width).

    The rule of torchvision's RandomResizedCrop: up to ten tries at an area and an aspect that fit, then the
    largest centred box whose aspect is within `ratio`.
    """
    n, tries = len(sizes), 10
    height, width = sizes[:, :1].double(), sizes[:, 1:].double()
    uniform = torch.rand(n, tries, 2, generator=generator, dtype=torch.float64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[..., 0])
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    aspect = torch.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * uniform[..., 1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.long().argmax(1, keepdim=True)
    h, w = h.gather(1, first), w.gather(1, first)
    image_ratio = width / height
    fallback_w = torch.where(image_ratio > ratio[1], (height * ratio[1]).round(), width)
    fallback_h = torch.where(image_ratio < ratio[0], (width / ratio[0]).round(), height)
    none_fits = ~fits.any(1, keepdim=True)
    h, w = torch.where(none_fits, fallback_h, h), torch.where(none_fits, fallback_w, w)
    corner = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    top = torch.where(none_fits, ((height - h) / 2).floor(), (corner[:, :1] * (height - h + 1)).floor())
    left = torch.where(none_fits, ((width - w) / 2).floor(), (corner[:, 1:] * (width - w + 1)).floor())
    return torch.cat([top, left, h, w], 1)


def resize_weights(start: Tensor, length: Tensor, n_in: int, n_out: int) -> Tensor:
    """PIL's bilinear (triangle, antialiased) filter from pixels [start, start + length) to n_out: (b, n_out, n_in).

    start and length (b,) need not be whole; rows sum to 1 and are 0 on pixels outside of the box.
    """
    scale = (length / n_out).view(-1, 1, 1)
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    centre = start + (torch.arange(n_out, device=start.device).view(1, -1, 1) + 0.5) * scale
    pixel = torch.arange(n_in, device=start.device).view(1, 1, -1) + 0.5
    weight = (1.0 - (pixel - centre).abs() / scale.clamp_min(1.0)).clamp_min(0.0)
    weight = weight * ((pixel + 0.5 > start) & (pixel - 0.5 < start + length))
    return weight / weight.sum(-1, keepdim=True).clamp_min(1e-8)


def resized_crop(images: Tensor, boxes: Tensor, img_size: int) -> Tensor:
    """Crop and resize each image: (b, 3, H, W) and boxes (b, 4) in its pixels -> float (b, 3, s, s) in 0..255."""
    boxes = move(boxes.float(), images.device)
    rows = resize_weights(boxes[:, 0], boxes[:, 2], images.shape[2], img_size)
    columns = resize_weights(boxes[:, 1], boxes[:, 3], images.shape[3], img_size)
    b, c, height, width = images.shape
    narrow = torch.bmm(images.float().reshape(b, c * height, width), columns.transpose(1, 2))
    return torch.matmul(rows.unsqueeze(1), narrow.view(b, c, height, img_size))


def luma(images: Tensor) -> Tensor:
    """Greyscale of RGB images: (b, 3, h, w) -> (b, 1, h, w)."""
    red, green, blue = images.split(1, dim=1)
    return red * (19595 / 65536) + green * (38470 / 65536) + blue * (7471 / 65536)  # PIL's weights


def colour_jitter(images: Tensor, factors: Tensor) -> Tensor:
    """PIL's ImageEnhance Brightness, Contrast and Color, in that order, by factors f (b, 3), on images in 0..255.

    Each clips f * image + (1 - f) * another one: black, the mean grey level, the greyscale image.
    """
    brightness, contrast, colour = move(factors, images.device).view(-1, 3, 1, 1, 1).unbind(1)
    images = (images * brightness).clamp_(0.0, 255.0)
    mean_grey = luma(images).mean((2, 3), keepdim=True).round()
    images = torch.lerp(mean_grey, images, contrast).clamp_(0.0, 255.0)
    return torch.lerp(luma(images), images, colour).clamp_(0.0, 255.0)


def augment(
    images: Tensor, sizes: Tensor, img_size: int, augmentation: Augmentation, generator: Generator, part: slice
) -> Tensor:
    """Augmented images of a batch, on their device: uint8 (b, 3, H, W) -> (b, 3, s, s) in 0..255.

    sizes (B, 2): original (height, width) of the whole batch, in which crops are drawn; the images are its `part`, and
    get the same draws in any part.
    """
    boxes = draw_crops(sizes, augmentation.crop_scale, augmentation.crop_ratio, generator)[part]
    boxes = boxes * (torch.tensor(images.shape[2:]) / sizes[part].double()).repeat(1, 2)
    factors = 1.0 + augmentation.jitter * (2.0 * torch.rand(len(sizes), 3, generator=generator) - 1.0)
    flips = torch.rand(len(sizes), generator=generator) < 0.5
    out = colour_jitter(resized_crop(images, boxes, img_size), factors[part])
    if augmentation.flip:
        out = torch.where(move(flips[part], out.device).view(-1, 1, 1, 1), out.flip(3), out)
    return out


def network_input(images: Tensor, device: torch.device, by: Normalisation = IMAGENET) -> Tensor:
    """Images (b, 3, s, s) in 0..255 as a network takes them: normalised, float32, channels-last, on `device`."""
    return normalise(move(images, device), by).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class TrainingImages:
    """What a stage trains on: uint8 images (N, 3, H, W), their original sizes (N, 2) and labels (N,).

    Without augmentation the images are (N, 3, img_size, img_size).
    """

    images: Tensor
    sizes: Tensor
    labels: Tensor
    img_size: int
    augmentation: Augmentation | None
    device: torch.device
    normalisation: Normalisation = IMAGENET

    def batch(self, index: Tensor, generator: Generator, part: slice = slice(None)) -> Tensor:
        """The rows `part` of the network input (b, 3, s, s) of the images at `index` (b,), augmented if asked."""
        images = move(self.images[move(index[part], self.images.device)], self.device)
        if self.augmentation:
            images = augment(images, self.sizes[index], self.img_size, self.augmentation, generator, part)
        return network_input(images, self.device, self.normalisation)


def training_images(
    base: Split, augmentation: Augmentation | None, device: torch.device, by: Normalisation = IMAGENET
) -> TrainingImages:
    """The images of a base split to train on, moved to the device if they have room there."""
    images = base.images if augmentation is None or base.train_images is None else base.train_images
    images = move_if_fits(images, device)
    return TrainingImages(images, base.train_sizes, base.labels, base.images.shape[-1], augmentation, device, by)
