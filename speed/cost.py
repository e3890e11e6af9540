"""What the tables of the paper cost: multiplications of each stage, time on this machine and on one GPU.

python -m speed.cost                     # a minute: a few training steps of each backbone are timed
python -m speed.cost --precision bf16

A run of each stage, 5-way 5-shot, as published but that images are embedded once where the backbone stands still. Time
here: at the measured rate of a training step. The last line: all of the paper's of these backbones, 1 and 5 shots,
stage 1 and stage 3 of all blocks by both alignments.
"""

import argparse
from typing import cast

import torch

from data.episodes import EpisodeShape, sample_episodes
from engine.precision import Precision
from engine.run import Run, keep_memory
from engine.script import run_script
from methods.alignment import AlignmentSetting
from methods.feature_alignment import align_features
from models import BACKBONES, build_backbone, native_img_size
from models.heads import Head
from reporting.paper_tables import FEWER_QUERIES, PAPER
from reporting.report import markdown_table
from speed.common import count_flops
from speed.growth import HEAD, cpu_seconds, new_model, random_source

IMAGES = {  # of the base, val and novel classes
    "miniImagenet": (38_400, 9_600, 12_000),
    "tieredImageNet": (448_695, 124_261, 206_209),
    "CUB": (5_885, 2_950, 2_953),
    "FC100": (36_000, 12_000, 12_000),
    "CIFAR-FS": (38_400, 9_600, 12_000),
}
N_WAY, N_SHOT, N_QUERY, N_EPISODES = 5, 5, 50, 600
EPOCHS, META_EPOCHS, META_EPISODES, META_QUERY = 600, 400, 100, 16
STAGES = ["stage 1", "stage 2, ProtoNet", "stage 3, all blocks", "stage 3, feature space"]
N_COUNTED = 640  # base images of the counted episode in feature space; more add the scores of the head alone
N_CLASS, STEP_FLOPS = 64, 3e11  # of the step that is timed


def per_image(backbone_name: str) -> tuple[float, float, int]:
    """Operations on an image, forward alone and with backward, and its features; on the meta device, so uncomputed."""
    size = native_img_size(backbone_name)
    with torch.device("meta"):
        backbone, x = build_backbone(backbone_name, size), torch.empty(2, 3, size, size)
    forward = count_flops(lambda: backbone(x))
    return forward / 2, count_flops(lambda: backbone(x).sum().backward()) / 2, backbone.feature_dim


def feature_episode(n_base: int, d: int) -> float:
    """Operations of an episode in feature space against n_base features of size d."""
    base, novel = random_source("base", N_COUNTED, d, 20), random_source("novel", 400, d, N_WAY)
    task = sample_episodes(novel.split, EpisodeShape(N_WAY, N_SHOT, N_QUERY), 1, 0).task(0)
    counted = count_flops(lambda: align_features([task], novel, base, HEAD, Run(quiet=True), 0))
    return counted + 2.0 * (n_base - N_COUNTED) * d * N_WAY


def operations(forward: float, training: float, d: int, dataset: str) -> list[float]:
    """Of one run of each of STAGES on a dataset; every split is embedded once where its backbone stands still."""
    base, val, novel = IMAGES[dataset]
    n_query, algorithm = FEWER_QUERIES.get(dataset, N_QUERY), AlignmentSetting()
    related, support = N_WAY * algorithm.related.aug_size, N_WAY * N_SHOT
    # Update (1) is of related and support images, (2) needs no gradient, (3) is of the support.
    iteration = (related + 2 * support) * training + related * forward
    episode = algorithm.align_iters * iteration + N_WAY * n_query * forward
    meta, embedded = META_EPISODES * N_WAY * (N_SHOT + META_QUERY), (base + novel) * forward
    return [
        EPOCHS * (base * training + val * forward) + novel * forward,
        META_EPOCHS * (meta * training + val * forward) + novel * forward,
        N_EPISODES * episode + embedded,
        N_EPISODES * feature_episode(base, d) + embedded,
    ]


def measured_rate(backbone_name: str, training: float, precision: Precision) -> tuple[int, float]:
    """A batch of at most 64 images and about STEP_FLOPS, and operations a second of a training step of it."""
    n, size = max(2, min(64, round(STEP_FLOPS / training))), native_img_size(backbone_name)
    model = new_model(backbone_name, N_CLASS)
    x = torch.randn(n, 3, size, size).contiguous(memory_format=torch.channels_last)
    y = torch.arange(n) % N_CLASS

    def step() -> None:
        with precision.autocast():
            z = model.net(x)
        precision.backward_and_step(cast(Head, model.head).loss(model.head(z), y), model.optimizer)

    step()
    return n, n * training / min(cpu_seconds(step) for _ in range(2))


def digits(value: float) -> str:
    """A number with as many digits as its size asks for."""
    return f"{value:,.{0 if value >= 10 else 1 if value >= 1 else 4}f}"


def duration(seconds: float) -> str:
    """Seconds in hours, or in minutes below one."""
    return f"{digits(seconds / 3600)} h" if seconds >= 3600 else f"{digits(seconds / 60)} min"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m speed.cost", description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=sorted({key[1] for key in PAPER}))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the steps that are timed")
    parser.add_argument("--gpu_tflops", type=float, default=312.0, help="peak of the GPU: an A100's in bf16")
    parser.add_argument("--gpu_share", type=float, default=0.3, help="share of it that is assumed to be reached")
    args = parser.parse_args()
    keep_memory()
    gpu = args.gpu_tflops * 1e12 * args.gpu_share
    rates, rows, total = [], [], [0.0] * 3
    for name in args.backbones:
        forward, training, d = per_image(name)
        n, rate = measured_rate(name, training, Precision(args.precision))
        counts = [f"{forward / 2e9:.2f}", f"{training / 2e9:.2f}", str(n), f"{rate / 1e9:.0f}"]
        rates.append([name, str(native_img_size(name)), *counts])
        for dataset, images in IMAGES.items():
            known = any(key[1:] == (name, dataset) for key in PAPER)
            cells = [name, dataset if known else f"{dataset}, not in the paper", " / ".join(f"{n:,}" for n in images)]
            flops = operations(forward, training, d, dataset)
            rows.append(cells + [f"{digits(f / 2e15)}; {duration(f / rate)}; {duration(f / gpu)}" for f in flops])
            paper = known * 2 * (flops[0] + 2 * flops[2])
            total = [t + paper / unit for t, unit in zip(total, (2e15, rate, gpu), strict=True)]
    head = ["backbone", "pixels", "10^9 multiplications forward", "and backward", "batch", "GFLOP/s"]
    print(f"{args.precision}, {torch.get_num_threads()} threads\n\n{markdown_table(head, rates)}")
    print(f"\n10^15 multiplications; time here; on a GPU at {args.gpu_share:.0%} of {args.gpu_tflops:g} TFLOP/s\n")
    print(markdown_table(["backbone", "dataset", "images: base / val / novel", *STAGES], rows))
    print(f"\nThe paper's, at most: {digits(total[0])}; {duration(total[1])}; {duration(total[2])}")


if __name__ == "__main__":
    run_script(main)
