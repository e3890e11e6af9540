"""How stages 1 and 3 grow with base images, ways and shots: on synthetic images and features, each in a new process.

python -m speed.growth                               # minutes
python -m speed.growth --n_base 2000 --ways 5        # seconds

Stage 1 is Conv4 on a cache of 84x84 images in a sparse file, of which the images that are read have been written.
Stage 3 is in feature space: the same episodes of random features against more and more base features. Seconds are the
processor's over the threads, so that other programs do not count.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data.benchmarks import Split
from data.episodes import EpisodeShape, sample_episodes
from data.transforms import Augmentation, training_images
from engine.generators import make_generator
from engine.run import Run, keep_memory
from engine.script import run_script
from methods.alignment import AlignmentSetting
from methods.base_training import train_one_epoch
from methods.feature_alignment import align_features, n_together
from methods.features import Source, feature_source
from methods.novel_finetune import fit_heads
from methods.related_base import related_base_of_heads
from models import Model, build_backbone, build_head, native_img_size
from reporting.report import markdown_table
from speed.bench_memory import in_child, memory_mib

BATCH, SIZE, PER_CLASS, N_QUERY = 64, 84, 600, 50
HEAD = AlignmentSetting(alignment="head")  # the default of feature space


def cpu_seconds(work: Callable[[], object]) -> float:
    """Seconds of the processor over the threads: those of `work` on an idle machine, if all threads are busy."""
    began = time.process_time()
    work()
    return (time.process_time() - began) / torch.get_num_threads()


def synthetic_split(name: str, images: Tensor, n_class: int) -> Split:
    """A split of these images (N, ...), in n_class classes of about equal size."""
    n = len(images)
    labels = torch.arange(n) * n_class // n
    files = [f"class{label:05d}/{i:07d}.jpg" for i, label in enumerate(labels.tolist())]
    classes = [f"class{c:05d}" for c in range(n_class)]
    return Split("synthetic", name, classes, files, labels, images, images, torch.full((n, 2), SIZE), "")


def random_source(name: str, n: int, d: int, n_class: int) -> Source:
    """n random features of size d in n_class classes."""
    features = torch.randn(n, d, generator=make_generator(0, name, n)).relu_()
    return feature_source(features, synthetic_split(name, features, n_class))


def new_model(backbone_name: str, n_class: int) -> Model:
    """What stage 1 trains, of random weights, for images of the backbone's native size."""
    backbone = build_backbone(backbone_name, native_img_size(backbone_name)).to(memory_format=torch.channels_last)
    head = build_head("arcMax", backbone.feature_dim, n_class, 20.0, 0.01, make_generator(0, "head"))
    return Model(backbone, head, 1e-3)


def base_training(folder: str, n: int, n_steps: int) -> dict[str, float]:
    """Seconds of the fastest of n_steps training steps on images spread over a cache of n; memory afterwards."""
    keep_memory()
    torch.set_num_threads(1)  # of this row's own process; with more, the seconds would hold their waiting
    n_read, bytes_each = min(n_steps * BATCH, n - n % BATCH or n), 3 * SIZE**2
    stride, generator = n // n_read, make_generator(0, "images")
    path = Path(folder) / f"{n}.bin"
    with open(path, "wb") as file:
        file.truncate(n * bytes_each)
        for i in range(n_read):
            file.seek(i * stride * bytes_each)
            file.write(torch.randint(256, (bytes_each,), dtype=torch.uint8, generator=generator).numpy().tobytes())
    mapped = torch.from_file(str(path), size=n * bytes_each, dtype=torch.uint8).view(n, 3, SIZE, SIZE)
    base, run = synthetic_split("base", mapped, math.ceil(n / PER_CLASS)), Run(quiet=True)
    images = training_images(base, Augmentation(), run.device)
    model, steps = new_model("Conv4", len(base.class_names)), []
    for i in range(0, n_read, BATCH):
        read = slice(i * stride, min(i + BATCH, n_read) * stride, stride)
        part = replace(images, images=mapped[read], sizes=images.sizes[read], labels=images.labels[read])
        steps.append(cpu_seconds(partial(train_one_epoch, model, part, BATCH, 0, run)))
    return {"step": min(steps)} | memory_mib()


def feature_space(n: int, d: int, n_way: int, n_shot: int) -> dict[str, float]:
    """Seconds an episode of related base detection and of all of stage 3, episodes together; memory afterwards."""
    keep_memory()
    base = random_source("base", n, d, max(n // PER_CLASS, 1))
    novel = random_source("novel", n_way * 2 * (n_shot + N_QUERY), d, 2 * n_way)
    together, run = n_together(d, n_way, HEAD), Run(quiet=True)
    episodes = sample_episodes(novel.split, EpisodeShape(n_way, n_shot, N_QUERY), together, 0)
    tasks = [episodes.task(i) for i in range(together)]
    head = HEAD.fit.new_head(d, n_way, [make_generator(0, "head", i) for i in range(together)])
    y_support = torch.stack([task.y_support for task in tasks])
    fit_heads(head, novel.features[torch.stack([t.support for t in tasks])], y_support, HEAD.fit.ft_n_epoch, 1e-3)
    related = cpu_seconds(lambda: related_base_of_heads(head, base, HEAD.related))
    episode = cpu_seconds(lambda: align_features(tasks, novel, base, HEAD, run, 0))
    return {"together": together, "related": related / together, "episode": episode / together} | memory_mib()


def stage_1_table(sizes: list[int], n_steps: int) -> str:
    """A row for each number of base images."""
    rows = []
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            m = in_child(base_training, folder, n, n_steps)
        epoch = m["step"] * math.ceil(n / BATCH)
        cells = [f"{n:,}", f"{math.ceil(n / PER_CLASS):,}", f"{m['step']:.3f}", f"{epoch:,.0f}"]
        rows.append([*cells, f"{600 * epoch / 3600:,.0f}", f"{m['RssAnon']:,.0f}", f"{m['VmHWM']:,.0f}"])
    header = ["base images", "base classes", "s a step of 64", "s an epoch", "h of 600 epochs", "own MiB", "peak MiB"]
    return markdown_table(header, rows)


def stage_3_table(sizes: list[int], d: int, ways: list[int], shots: list[int]) -> str:
    """A row for each number of base images at the first way and last shot, and for each way and shot at the first."""
    tasks = [(n, ways[0], shots[-1]) for n in sizes] + [(sizes[0], way, shot) for way in ways for shot in shots]
    rows = []
    for n, n_way, n_shot in dict.fromkeys(tasks):
        m = in_child(feature_space, n, d, n_way, n_shot)
        cells = [
            f"{n:,}",
            str(n_way),
            str(n_shot),
            f"{m['together']:.0f}",
            f"{m['related']:.4f}",
            f"{m['episode']:.4f}",
        ]
        rows.append([*cells, f"{n * d * 4 / 2**20:,.0f}", f"{m['VmHWM']:,.0f}"])
    header = ["base images", "ways", "shots", "episodes together", "s related base", "s an episode"]
    return markdown_table([*header, "features MiB", "peak MiB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m speed.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--n_base", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="base images")
    parser.add_argument("--ways", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--d", type=int, default=512, help="features of an image in stage 3: ResNet18's")
    parser.add_argument("--n_steps", type=int, default=5, help="training steps of stage 1, the fastest counts")
    args = parser.parse_args()
    print(f"Stage 1, Conv4, fp32\n\n{stage_1_table(args.n_base, args.n_steps)}\n", flush=True)
    print(f"Stage 3 in feature space, d = {args.d}\n\n{stage_3_table(args.n_base, args.d, args.ways, args.shots)}")


if __name__ == "__main__":
    run_script(main)
