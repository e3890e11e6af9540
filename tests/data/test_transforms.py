"""Batched augmentation against torchvision and PIL on the same parameters, and what is drawn."""

import dataclasses
import random

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageEnhance
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from data import transforms
from data.benchmarks import DataOptions, load_split
from data.transforms import Augmentation, augment, colour_jitter, draw_crops, resized_crop, training_images
from tests.helpers import make_split

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(n, height, width, seed=0):
    """Random images (n, 3, h, w), from dark to bright ones, with black and white pixels in all of them."""
    pixels = torch.randint(-60, 300, (n, 3, height, width), generator=generator(seed))
    return (pixels * torch.linspace(0.5, 1.2, n).view(-1, 1, 1, 1)).clamp(0, 255).to(torch.uint8)


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def pil_resized_crop(image, box, size):
    top, left, height, width = (int(side) for side in box)
    return F.resized_crop(image, top, left, height, width, [size, size], InterpolationMode.BILINEAR)


def pil_jitter(image, factors):
    for enhance, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
    ):
        image = enhance(image).enhance(float(factor))
    return image


@pytest.mark.parametrize("size", [5, 42, 84])
@pytest.mark.parametrize("height, width", [(1, 1), (20, 33), (84, 84), (150, 60)])
def test_resized_crop_is_pils_for_boxes_of_every_size(height, width, size):
    rng = random.Random(height + size)
    boxes = [(0, 0, height, width), (height - 1, width - 1, 1, 1)]
    for _ in range(14):
        h, w = rng.randint(1, height), rng.randint(1, width)
        boxes.append((rng.randint(0, height - h), rng.randint(0, width - w), h, w))
    images = noise(len(boxes), height, width)
    ours = resized_crop(images, torch.tensor(boxes), size)
    for image, box, crop in zip(images, boxes, ours, strict=True):
        expected = from_pil(pil_resized_crop(to_pil(image), box, size))
        assert (crop - expected).abs().max() <= 1.5, box


def test_a_crop_does_not_depend_on_the_pixels_around_it():
    image = noise(1, 30, 30)
    other = image.clone()
    other[:, :, :10], other[:, :, 20:], other[..., :5], other[..., 15:] = 0, 255, 255, 0
    box = torch.tensor([[10, 5, 10, 10]])
    assert torch.equal(resized_crop(image, box, 42), resized_crop(other, box, 42))


@pytest.mark.parametrize("varied", [[0], [1], [2], [0, 1, 2]], ids=["brightness", "contrast", "colour", "in order"])
def test_colour_jitter_is_pils(varied):
    images = noise(40, 12, 14)
    factors = torch.ones(40, 3)
    factors[:, varied] = 0.6 + 0.8 * torch.rand(40, len(varied), generator=generator())
    factors[:2, varied] = torch.tensor([[0.6], [1.4]])
    factors[2] = torch.tensor([0.6, 1.4, 1.4]) if len(varied) == 3 else 1.0
    expected = torch.stack([from_pil(pil_jitter(to_pil(i), f)) for i, f in zip(images, factors, strict=True)])
    difference = (colour_jitter(images.float(), factors) - expected).abs()
    # PIL cuts off the fraction after each of its steps, and the next one multiplies what is lost.
    assert difference.max() <= (1.5 if len(varied) == 1 else 4) and difference.mean() < 0.5 * len(varied)


def test_normalise_is_torchvisions():
    images = noise(2, 5, 6)
    for image, ours in zip(images, transforms.normalise(images), strict=True):
        expected = F.normalize(F.to_tensor(to_pil(image)), IMAGENET_MEAN, IMAGENET_STD)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def drawn(monkeypatch):
    """What augment draws: a list of (boxes in the original, factors), one a batch."""
    record = []

    def recording_crops(*args):
        record.append([draw_crops(*args)])
        return record[-1][0]

    def recording_jitter(images, factors):
        record[-1].append(factors)
        return colour_jitter(images, factors)

    monkeypatch.setattr(transforms, "draw_crops", recording_crops)
    monkeypatch.setattr(transforms, "colour_jitter", recording_jitter)
    return record


def augmented(*batch):
    """A batch augmented, then normalised, as a network takes it."""
    return transforms.normalise(augment(*batch, slice(None)))


def test_the_whole_augmentation_is_the_published_pipeline(drawn):
    images = noise(40, 50, 36)
    sizes = torch.tensor([[50, 36]]).expand(40, 2)
    ours = augmented(images, sizes, 42, Augmentation(), generator(3))
    boxes, factors = drawn[0]
    assert factors.min() >= 0.6 and factors.max() <= 1.4 and factors.std() > 0.2
    assert torch.corrcoef(factors.T).sub(torch.eye(3)).abs().max() < 0.5  # drawn independently
    tolerance = 5 / 255 / min(IMAGENET_STD)
    n_flipped = 0
    for image, box, factor, out in zip(images, boxes, factors, ours, strict=True):
        expected = pil_jitter(pil_resized_crop(to_pil(image), box, 42), factor)
        expected = F.normalize(F.to_tensor(expected), IMAGENET_MEAN, IMAGENET_STD)
        straight, mirrored = ((out - e).abs().max() <= tolerance for e in (expected, expected.flip(2)))
        assert straight != mirrored
        n_flipped += bool(mirrored)
    assert 10 <= n_flipped <= 30


def test_flips_are_half_of_a_batch_and_none_with_flip_off():
    images = noise(256, 8, 8)
    sizes = torch.full((256, 2), 8)
    whole = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), jitter=0.0)
    straight = transforms.normalise(images)

    def n_mirrored(flip):
        setting = Augmentation(whole.crop_scale, whole.crop_ratio, whole.jitter, flip)
        out = augmented(images, sizes, 8, setting, generator())
        same = (out - straight).abs().amax((1, 2, 3)) < 1e-3
        mirrored = (out - straight.flip(3)).abs().amax((1, 2, 3)) < 1e-3
        assert (same ^ mirrored).all()
        return int(mirrored.sum())

    assert n_mirrored(flip=False) == 0
    assert 96 < n_mirrored(flip=True) < 160


def torchvision_crops(height, width, scale, ratio, n, seed=0):
    image = torch.empty(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return torch.tensor([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)]).double()


def largest_gap(a, b):
    """The two-sample Kolmogorov-Smirnov statistic of a and b."""
    points = torch.cat([a, b]).sort().values
    below_a, below_b = (torch.searchsorted(x.sort().values, points, right=True) / len(x) for x in (a, b))
    return (below_a - below_b).abs().max().item()


@pytest.mark.parametrize("height, width, scale", [(60, 100, (0.08, 1.0)), (84, 84, (0.08, 1.0)), (90, 40, (0.5, 1.0))])
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    n, ratio = 3000, (3 / 4, 4 / 3)
    ours = draw_crops(torch.tensor([[height, width]]).expand(n, 2), scale, ratio, generator())
    theirs = torchvision_crops(height, width, scale, ratio, n)
    for name, measure in {
        "area": lambda boxes: boxes[:, 2] * boxes[:, 3],
        "aspect": lambda boxes: boxes[:, 3] / boxes[:, 2],
        "top": lambda boxes: boxes[:, 0],
        "left": lambda boxes: boxes[:, 1],
        "share of the room": lambda boxes: boxes[:, 0] / (height - boxes[:, 2] + 1),
    }.items():
        assert largest_gap(measure(ours), measure(theirs)) < 1.95 * (2 / n) ** 0.5, name  # p = 0.001


def test_crops_are_whole_pixels_inside_the_image():
    sizes = torch.randint(1, 300, (2000, 2), generator=generator())
    sizes[:4] = torch.tensor([[1, 1], [1, 300], [300, 1], [2, 3]])
    for scale in [(0.08, 1.0), (1e-4, 1e-3), (1.0, 1.0)]:
        top, left, height, width = draw_crops(sizes, scale, (3 / 4, 4 / 3), generator(1)).unbind(1)
        for values in (top, left, height, width):
            assert torch.equal(values, values.round())
        assert (height >= 1).all() and (width >= 1).all() and (top >= 0).all() and (left >= 0).all()
        assert (top + height <= sizes[:, 0]).all() and (left + width <= sizes[:, 1]).all()


@pytest.mark.parametrize("height, width", [(10, 1000), (1000, 10), (7, 100), (101, 8)])
def test_an_image_too_long_for_any_try_gets_torchvisions_central_crop(height, width):
    scale, ratio = (0.9, 1.0), (3 / 4, 4 / 3)
    ours = draw_crops(torch.tensor([[height, width]] * 3), scale, ratio, generator())
    assert torch.equal(ours, torchvision_crops(height, width, scale, ratio, 3))


def test_an_image_of_allowed_aspect_too_large_for_any_try_is_taken_whole():
    ours = draw_crops(torch.tensor([[30, 40]]), (2.0, 3.0), (3 / 4, 4 / 3), generator())
    assert ours.tolist() == [[0, 0, 30, 40]]


def test_crops_of_stretched_images_are_drawn_and_cut_in_the_original(drawn):
    height, width, side = 90, 180, 48
    ramp = torch.stack(
        [
            torch.linspace(0, 255, width).expand(height, width),
            torch.linspace(0, 255, height).unsqueeze(1).expand(height, width),
            torch.full((height, width), 128.0),
        ]
    ).to(torch.uint8)
    stored = from_pil(to_pil(ramp).resize((side, side), Image.Resampling.BILINEAR)).to(torch.uint8)
    setting = Augmentation(jitter=0.0, flip=False)
    sizes = torch.tensor([[height, width]]).expand(30, 2)
    ours = augmented(stored.expand(30, -1, -1, -1), sizes, 24, setting, generator())
    boxes = drawn[0][0]
    assert torch.equal(boxes, draw_crops(sizes, setting.crop_scale, setting.crop_ratio, generator()))
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_STD, IMAGENET_MEAN))
    for box, out in zip(boxes, ours, strict=True):
        expected = from_pil(pil_resized_crop(to_pil(ramp), box, 24))
        assert (255 * (out * std + mean) - expected).abs().max() < 6


@pytest.mark.parametrize("height, width", [(4000, 10), (10, 4000)])
def test_a_crop_thinner_than_a_stored_pixel_still_has_the_pixels_it_lies_in(height, width):
    stored = torch.full((64, 3, 48, 48), 200, dtype=torch.uint8)
    out = augmented(stored, torch.tensor([[height, width]] * 64), 24, Augmentation(jitter=0.0), generator())
    torch.testing.assert_close(out, transforms.normalise(stored[..., :24, :24]), rtol=0, atol=1e-3)


def photograph(height, width, seed):
    """Fine detail at all scales, as of a photograph: a spectrum of 1 / frequency, and a few sharp edges."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    spectrum = np.fft.fft2(rng.normal(size=(3, height, width))) / np.maximum(np.hypot(fy, fx), 1 / width)
    image = np.fft.ifft2(spectrum).real
    image = 128 + 45 * (image - image.mean()) / image.std()
    for _ in range(6):
        top, left = rng.integers(0, height - 30), rng.integers(0, width - 30)
        image[:, top : top + rng.integers(10, 120), left : left + rng.integers(10, 120)] += rng.integers(-60, 60)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def detail(image):
    """The RMS of the Laplacian."""
    inner = image[..., 1:-1, 1:-1]
    around = image[..., :-2, 1:-1] + image[..., 2:, 1:-1] + image[..., 1:-1, :-2] + image[..., 1:-1, 2:]
    return (around - 4 * inner).square().mean().sqrt()


@pytest.mark.parametrize("sizes", [[(500, 375), (375, 500), (400, 300)], [(500, 375)] * 3], ids=["unequal", "equal"])
@pytest.mark.parametrize("crop_scale", [(0.08, 1.0), (0.3, 1.0)])
def test_crops_of_stored_photographs_are_torchvisions_of_the_photographs(tmp_path, sizes, crop_scale):
    folder = tmp_path / "photos" / "base" / "class"
    folder.mkdir(parents=True)
    photos = [photograph(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    for i, photo in enumerate(photos):
        photo.save(folder / f"{i}.png")
    split = load_split(DataOptions(tmp_path, 84, tmp_path / "cache", crop_scale=crop_scale), "photos", "base")
    training = training_images(split, Augmentation(crop_scale, jitter=0.0, flip=False), torch.device("cpu"))
    index = torch.arange(90) % 3
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_STD, IMAGENET_MEAN))
    ours = 255 * (training.batch(index, generator()) * std + mean)
    boxes = draw_crops(split.train_sizes[index], crop_scale, (3 / 4, 4 / 3), generator())
    theirs = torch.stack([from_pil(pil_resized_crop(photos[i], box, 84)) for i, box in zip(index, boxes, strict=True)])
    assert (ours - theirs).abs().mean() < 1
    assert 0.95 < detail(ours) / detail(theirs) < 1.1


def test_augmentation_depends_on_the_generator_alone():
    images, sizes = noise(8, 20, 24), torch.tensor([[20, 24]] * 8)
    state = torch.get_rng_state()
    first, again, other = (augmented(images, sizes, 16, Augmentation(), generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.dtype == torch.float32 and first.shape == (8, 3, 16, 16)


@pytest.mark.parametrize("augmentation", [None, Augmentation()])
def test_a_batch_of_training_images_is_the_images_at_its_index_in_any_parts(augmentation):
    split = dataclasses.replace(make_split(counts=(3, 4), side=12), train_images=noise(7, 20, 16))
    images = training_images(split, augmentation, torch.device("cpu"))
    index = torch.tensor([5, 0, 0, 6, 2])
    whole = images.batch(index, generator())
    if augmentation is None:
        expected = transforms.normalise(split.images[index])
    else:
        sizes = split.train_sizes[index]
        expected = augmented(split.train_images[index], sizes, 12, augmentation, generator())
    assert torch.equal(whole, expected) and whole.is_contiguous(memory_format=torch.channels_last)
    parts = [images.batch(index, generator(), part) for part in (slice(0, 2), slice(2, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert torch.equal(images.labels, split.labels)


def test_a_split_without_training_images_is_trained_on_those_of_its_evaluation():
    split = make_split(counts=(3, 4), side=12)
    images = training_images(split, Augmentation(), torch.device("cpu"))
    assert images.images is split.images and images.img_size == 12
