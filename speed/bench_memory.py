"""Peak memory of decoding and caching many images, and of training on a split far larger than that.

python -m speed.bench_memory                                # 60,000 images cached, 400,000 images read
python -m speed.bench_memory --n_cached 2000 --n_read 4000  # seconds

Each measurement runs in a process of its own on synthetic 84x84 JPEG files. Of a mapped file the kernel keeps pages in
memory while there is room, and drops them when there is not: they are reported apart from the memory that a process
really holds.
"""

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.benchmarks import DataOptions, Split, load_split
from data.transforms import Augmentation, training_images

N_CLASS, DISTINCT = 50, 500


def write_jpegs(root: Path, n_images: int) -> None:
    """`root/base/<class>/<i>.jpg`: n_images 84x84 JPEG files in N_CLASS classes, DISTINCT of them different."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (DISTINCT, 12, 12, 3), dtype=np.uint8)
    pool = [Image.fromarray(pixels).resize((84, 84), Image.Resampling.BICUBIC) for pixels in coarse]
    for c in range(N_CLASS):
        folder = root / "base" / f"class{c:03d}"
        folder.mkdir(parents=True)
        for i in range(n_images // N_CLASS):
            pool[(c + i) % DISTINCT].save(folder / f"{i:06d}.jpg", quality=90)


def memory_mib() -> dict[str, float]:
    """Resident memory of this process in MiB: its own pages, mapped file pages, their sum, and the peak of that."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile", "VmRSS", "VmHWM")}


def load_base(root: str, cache_dir: str) -> Split:
    """The base split, to be augmented."""
    options = DataOptions(Path(root).parent, 84, Path(cache_dir), crop_scale=Augmentation().crop_scale)
    return load_split(options, Path(root).name, "base")


def cache(root: str, cache_dir: str) -> dict[str, float]:
    """Decode and cache the split; memory afterwards."""
    load_base(root, cache_dir)
    return memory_mib()


def read(root: str, cache_dir: str) -> dict[str, float]:
    """Draw 200 shuffled and augmented training batches from the cached split; memory afterwards."""
    split = load_base(root, cache_dir)
    generator = torch.Generator().manual_seed(0)
    images = training_images(split, Augmentation(), torch.device("cpu"))
    for _ in range(200):
        images.batch(torch.randint(len(split.labels), (64,), generator=generator), generator)
    return memory_mib()


def in_child(function: Callable[..., dict[str, float]], *arguments: str | int) -> dict[str, float]:
    """Run a measurement in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def row(memory: dict[str, float]) -> str:
    """One measurement in words."""
    return (
        f"peak {memory['VmHWM']:,.0f} MiB resident; at the end {memory['RssAnon']:,.0f} MiB its own, "
        f"{memory['RssFile']:,.0f} MiB mapped files"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m speed.bench_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--n_cached", type=int, default=60_000, help="images decoded and cached")
    parser.add_argument("--n_read", type=int, default=400_000, help="images of the split that is read")
    args = parser.parse_args()
    print(f"after the imports alone: {row(in_child(memory_mib))}")
    for n, then_read in ((args.n_cached, False), (args.n_read, True)):
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            root, cache_dir = f"{folder}/synthetic", f"{folder}/cache"
            write_jpegs(Path(root), n)
            print(f"decode and cache {n:,} images of 84x84: {row(in_child(cache, root, cache_dir))}")
            if then_read:
                size = sum(f.stat().st_size for f in Path(cache_dir).rglob("*.bin")) / 2**30
                memory = in_child(read, root, cache_dir)
                print(f"200 training batches of 64 from {n:,} images, {size:.1f} GiB: {row(memory)}")


if __name__ == "__main__":
    main()
