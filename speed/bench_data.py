"""Data at real scale: JPEG files into the cache and on, beside torchvision's ImageFolder and a DataLoader.

python -m speed.bench_data                                             # 60,000 generated images of 84x84
python -m speed.bench_data --source fs_benchmarks/miniImagenet/base    # those of a folder of classes
python -m speed.bench_data --n_images 500 --n_mapped 1000              # seconds

An epoch is of augmented batches, without the steps of a model, which both sides have alike; embedding is by Conv4. The
reference decodes and augments each image with PIL in its worker processes. Ours has as many threads; its first run
decodes into the cache, its second maps it. A base split of tieredImageNet's size is listed from links to a few files
and mapped from a cache of holes, for its memory: the kernel keeps pages of a mapped file while there is room and drops
them when there is none, so that they are told apart from the memory that the process holds.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from data.benchmarks import DataOptions, Split, load_split
from data.image_cache import VERSIONS, read_cache
from data.listing import image_names, list_folder
from data.transforms import Augmentation, training_images
from engine.run import Run, keep_memory
from engine.script import run_script
from methods.features import embed
from persistence.checkpoints import create_backbone
from speed import reference_loops as plain
from speed.common import Row, Setting, in_child, markdown, row, seconds_of, spread

BATCH, SIDE = 64, 84
AUGMENTATION = Augmentation()
N_IMAGES, N_MAPPED = 6_400, 450_000  # of the table of all stages
N_BATCHES = 200  # read of the mapped images


def write_jpegs(folder: Path, n: int = 500) -> list[Path]:
    """n JPEG files of SIDE x SIDE pixels of smooth noise."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    paths = [folder / f"{i:04d}.jpg" for i in range(n)]
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path, quality=90)
    return paths


def link(root: Path, n: int, names: Sequence[str], paths: Sequence[Path]) -> None:
    """`root/<class>/<i>.jpg`, n links: i to the i-th of the paths, in the i-th of the classes, from the first again."""
    for name in set(names):
        (root / name).mkdir(parents=True)
    for i in range(n):
        path = paths[i % len(paths)]
        os.symlink(path.resolve(), root / names[i % len(names)] / f"{i:06d}{path.suffix}")


def link_base(root: Path, source: Path | None, n: int) -> None:
    """The base split of a benchmark: n images of a folder of classes, as many of each, or of 64 classes of noise."""
    if source is None:
        link(root / "base", n, [f"class{c:03d}" for c in range(64)], write_jpegs(root / "files"))
    else:
        names, paths, labels = list_folder(source)
        some = spread(len(paths), n)
        link(root / "base", len(some), [names[labels[i]] for i in some], [paths[i] for i in some])


def loader(source: Path, train: bool, workers: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """The reference's batches of a folder of classes: shuffled and augmented, or in order as a network evaluates."""
    if train:
        jitter = v2.ColorJitter(*[AUGMENTATION.jitter] * 3)
        crop = v2.RandomResizedCrop(SIDE, AUGMENTATION.crop_scale, AUGMENTATION.crop_ratio)
        views = [crop, jitter, v2.RandomHorizontalFlip()]
    else:
        views = [v2.Resize([int(1.15 * SIDE)] * 2), v2.CenterCrop(SIDE)]
    return DataLoader(ImageFolder(source, v2.Compose([*views, plain.TO_INPUT])), BATCH, train, num_workers=workers)


def reference(root: Path, workers: int) -> list[float]:
    """Seconds of an epoch and of embedding, from a folder of files."""
    backbone = plain.conv4(create_backbone("Conv4", SIDE, seed=0)).eval()

    @torch.no_grad()
    def embed_all() -> None:
        for x, _ in loader(root / "base", False, workers):
            backbone(x)

    epoch_seconds, _ = seconds_of(lambda: sum(1 for _ in loader(root / "base", True, workers)))
    embed_seconds, _ = seconds_of(embed_all)
    return [epoch_seconds, embed_seconds]


def load_base(root: Path, workers: int) -> Split:
    """The base split of a benchmark, to be augmented, decoded where it is not cached."""
    options = DataOptions(root.parent, SIDE, root / "cache", num_workers=workers, crop_scale=AUGMENTATION.crop_scale)
    return load_split(options, root.name, "base")


def draw_batches(split: Split, n: int | None = None) -> None:
    """The first n, or all, shuffled and augmented batches of a split."""
    generator = torch.Generator().manual_seed(0)
    images = training_images(split, AUGMENTATION, torch.device("cpu"))
    for index in torch.randperm(len(split.labels), generator=generator).split(BATCH)[:n]:
        images.batch(index, generator)


def ours(root: Path, workers: int) -> list[float]:
    """Seconds of decoding; then, the cache mapped each time, of an epoch and of embedding."""
    keep_memory()
    backbone = create_backbone("Conv4", SIDE, seed=0).to(memory_format=torch.channels_last)
    decode_seconds, _ = seconds_of(lambda: load_base(root, workers))
    epoch_seconds, _ = seconds_of(lambda: draw_batches(load_base(root, workers)))
    embed_seconds, _ = seconds_of(lambda: embed(backbone, load_base(root, workers).images, Run()))
    return [decode_seconds, epoch_seconds, embed_seconds]


def memory_mib() -> tuple[float, float]:
    """Resident memory of this process in MiB: its own pages, and those of mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return own, mapped


def mapped(root: Path, n: int) -> tuple[float, str]:
    """Seconds of N_BATCHES training batches from a cache of n images, all holes, and the memory that they took."""
    before, _ = memory_mib()
    link(root / "base", n, [f"class{c:03d}" for c in range(351)], write_jpegs(root / "files"))
    listing, cache = list_folder(root / "base"), root / "cache"
    cache.mkdir()
    np.full((n, 2), SIDE, dtype=np.int64).tofile(cache / "sizes.bin")
    for name in ("eval.bin", "train.bin"):
        with open(cache / name, "wb") as file:
            file.truncate(n * 3 * SIDE**2)
    (cache / "meta.json").write_text(json.dumps({"versions": VERSIONS, "fingerprint": ""}))
    arrays = read_cache(cache, (n, 3, SIDE, SIDE), SIDE**2)
    assert arrays, "the cache is not one that is read"
    names, labels = image_names(listing), torch.tensor(listing[2])
    split = Split("mapped", "base", listing[0], names, labels, arrays.eval, arrays.train, arrays.sizes, "")
    seconds, _ = seconds_of(lambda: draw_batches(split, N_BATCHES))
    own, of_files = memory_mib()
    size = 2 * n * 3 * SIDE**2 / 2**30
    return seconds, f"of {size:.1f} GiB; {own - before:.0f} MiB of its own, {of_files:.0f} MiB of pages of files"


def measured(root: Path, workers: int, repeats: int) -> tuple[list[float], list[float]]:
    """Medians of both sides' seconds, which take turns, each time in a process of its own."""
    sides: tuple[list[list[float]], list[list[float]]] = ([], [])
    for _ in range(repeats):
        shutil.rmtree(root / "cache", ignore_errors=True)
        for side, function in zip(sides, (reference, ours), strict=True):
            side.append(in_child(function, root, workers))
    theirs, mine = ([statistics.median(column) for column in zip(*side, strict=True)] for side in sides)
    return theirs, mine


def rows_of(source: Path | None, n: int, n_mapped: int, workers: int, repeats: int) -> list[Row]:
    """The rows for n images of a folder of classes, or generated, and for n_mapped of holes."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "some"
        link_base(root, source, n)
        (epoch, embedding), (decode_seconds, our_epoch, our_embedding) = measured(root, workers, repeats)
        seconds, note = in_child(mapped, Path(folder) / "mapped", n_mapped)
    decoding = f"{decode_seconds:.3g} s of it decode"
    return [
        row(f"first run: decode, an epoch of {n:,} images", epoch, decode_seconds + our_epoch, 1.0, note=decoding),
        row(f"second run: an epoch of {n:,} images", epoch, our_epoch, 3.0),
        row(f"first run: decode and embed {n:,} images", embedding, decode_seconds + our_embedding, 1.0, note=decoding),
        row(f"second run: embed {n:,} images", embedding, our_embedding),
        row(f"{N_BATCHES} batches of {n_mapped:,} images", epoch * N_BATCHES * BATCH / n, seconds, note=note),
    ]


def rows(setting: Setting, repeats: int) -> list[Row]:
    """The rows for generated images."""
    return rows_of(None, N_IMAGES, N_MAPPED, setting.workers, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m speed.bench_data", description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="folder of classes; without it, the images are generated")
    parser.add_argument("--n_images", type=int, default=60_000, help="how many of them")
    parser.add_argument("--n_mapped", type=int, default=N_MAPPED, help="images of the split that is only mapped")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the loaders of both sides")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side; medians are reported")
    args = parser.parse_args()
    print(markdown(rows_of(args.source, args.n_images, args.n_mapped, args.workers, args.repeats)))


if __name__ == "__main__":
    run_script(main)
