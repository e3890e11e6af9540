"""Whether memory stays flat over a long run: 3,000 alignment episodes, and stage 1 on 100,000 images, both tiny.

python -m speed.soak                                                  # about 10 minutes on one core
python -m speed.soak --n_episodes 100 --n_images 5000 --n_epoch 4     # seconds

Prints the memory of the process over time and, of its second half, the slope: what a leak would be seen by.
"""

import argparse
from collections.abc import Iterator

import torch

from data.benchmarks import Split
from data.episodes import EpisodeShape, class_major_labels, sample_episodes
from data.transforms import Augmentation, training_images
from engine.run import Run, keep_memory
from methods.adversarial_alignment import CriticSetting
from methods.alignment import AlignmentSetting, align_episode
from methods.base_training import train_one_epoch
from methods.evaluation import evaluate_heads
from methods.features import embed, image_source, trainable_blocks
from methods.novel_finetune import HeadFit
from methods.related_base import RelatedSetting
from models import Model, build_head
from persistence.checkpoints import create_backbone
from speed.bench_memory import memory_mib

SIDE = 16  # pixels
ALIGNMENTS = ("centroid", "adversarial")  # in turn


def random_split(name: str, n_class: int, n_each: int, seed: int) -> Split:
    """A split of random uint8 images, n_each of each class."""
    n = n_class * n_each
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    classes, labels = [f"class{c}" for c in range(n_class)], class_major_labels(n_class, n_each)
    files, sizes = [f"class{i // n_each}/{i % n_each}.png" for i in range(n)], torch.full((n, 2), SIDE)
    return Split("random", name, classes, files, labels, images, images, sizes, f"random{seed}")


def soak_alignment(n_episodes: int) -> Iterator[float]:
    """Run alignment episodes; yields the memory after each."""
    keep_memory()
    run, base, novel = Run(), random_split("base", 20, 20, 0), random_split("novel", 8, 10, 1)
    backbone = create_backbone("Conv4", SIDE, seed=0).to(memory_format=torch.channels_last)
    blocks = trainable_blocks(backbone, None)
    fit, related, critic = HeadFit(ft_n_epoch=20), RelatedSetting(n_B=3, aug_size=5), CriticSetting(critic_hidden=32)
    base_source, novel_source = (image_source(backbone, blocks, split, run) for split in (base, novel))
    for i in range(n_episodes):
        alignment = ALIGNMENTS[i % len(ALIGNMENTS)]
        setting = AlignmentSetting(alignment, fit, related, critic, align_iters=3)
        task = sample_episodes(novel, EpisodeShape(5, 1, 4), 1, seed=0, start=i).task(0)
        align_episode(blocks, task, novel_source, base_source, setting, run, i)
        yield memory_mib()["VmRSS"]


def soak_base_training(n_images: int, n_epoch: int) -> Iterator[float]:
    """Train on n_images with validation after each epoch; yields the memory after each."""
    keep_memory()
    run, base, val = Run(), random_split("base", 50, n_images // 50, 0), random_split("val", 8, 20, 1)
    backbone = create_backbone("Conv4", SIDE, seed=0).to(memory_format=torch.channels_last)
    head = build_head("arcMax", backbone.feature_dim, 50, 20.0, 0.01, torch.Generator().manual_seed(0))
    model, images = Model(backbone, head, lr=1e-3), training_images(base, Augmentation(), run.device)
    episodes = sample_episodes(val, EpisodeShape(5, 1, 5), 20, seed=0)
    for epoch in range(n_epoch):
        train_one_epoch(model, images, 256, epoch, run)
        evaluate_heads(embed(backbone, val.images, run), episodes, HeadFit(ft_n_epoch=20), run)
        yield memory_mib()["VmRSS"]


def report(name: str, unit: str, memory: list[float]) -> None:
    """Print ten points of the memory over time, and the slope of its second half."""
    points = sorted({round(k * (len(memory) - 1) / 10) for k in range(11)})
    print(f"{name}: " + ", ".join(f"{memory[i]:.0f} MiB after {i + 1}" for i in points))
    half = torch.tensor(memory[len(memory) // 2 :], dtype=torch.double)
    time = torch.arange(len(half), dtype=torch.double)
    slope = ((time - time.mean()) * (half - half.mean())).sum() / (time - time.mean()).square().sum().clamp_min(1)
    print(f"  second half: {half.min():.1f} to {half.max():.1f} MiB, slope {1024 * slope.item():+.2f} KiB per {unit}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m speed.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--n_episodes", type=int, default=3_000, help="alignment episodes")
    parser.add_argument("--n_images", type=int, default=100_000, help="images of stage 1")
    parser.add_argument("--n_epoch", type=int, default=10, help="epochs of stage 1")
    args = parser.parse_args()
    report(f"{args.n_episodes:,} alignment episodes", "episode", list(soak_alignment(args.n_episodes)))
    report(f"stage 1 on {args.n_images:,} images", "epoch", list(soak_base_training(args.n_images, args.n_epoch)))


if __name__ == "__main__":
    main()
