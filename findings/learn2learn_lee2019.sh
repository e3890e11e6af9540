#!/usr/bin/env bash
# learn2learn 0.2.0 (PyPI, newest), with torchvision 0.29.1 and torch 2.14.1 on x86-64, data_augmentation="lee2019".
# Expected: training and test images of mini-ImageNet reach the network on one scale, (x / 255 - mean) / std.
# Seen: the data set gives floats of 0..255. In training ToPILImage takes them for 0..1, multiplies by 255 and casts to
# uint8, which wraps: the network is trained on the NEGATIVE of every image. At test nothing divides by 255: it is tested
# on values up to 951. (A cast of a float beyond 255 to uint8 is undefined: other processors may saturate instead.)
# A checkpoint that was trained that way does not say so. The data set's file is replaced by one made-up image; the
# transforms are those that the library's own function builds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy
"$folder/venv/bin/pip" download -q --no-deps --no-binary :all: -d "$folder" learn2learn==0.2.0
tar xzf "$folder"/learn2learn-0.2.0.tar.gz -C "$folder"
grep -q "permute(0, 3, 1, 2).float()" "$folder/learn2learn-0.2.0/learn2learn/vision/datasets/mini_imagenet.py"
cat > "$folder/check.py" <<'PYTHON'
import runpy
import sys
from types import ModuleType, SimpleNamespace

import torch
from torchvision.transforms import Compose


class Images:
    """In place of the downloaded data set; it keeps the transform that it is given."""

    transform = None

    def __init__(self, **_):
        pass


names = ("NWays", "KShots", "LoadData", "RemapLabels", "ConsecutiveLabels")
library, parts = ModuleType("learn2learn"), ModuleType("learn2learn.data.transforms")
for name in names:
    setattr(parts, name, lambda *_: None)
library.vision = SimpleNamespace(datasets=SimpleNamespace(MiniImagenet=Images))
library.data = SimpleNamespace(MetaDataset=lambda dataset: dataset)
sys.modules |= {"learn2learn": library, "learn2learn.data": ModuleType("data"), "learn2learn.data.transforms": parts}
build = runpy.run_path(sys.argv[1])["mini_imagenet_tasksets"]
(train, _, test), _ = build(data_augmentation="lee2019")

# One image of each grey level of 1..255, as the data set gives it: floats, not scaled.
image = torch.arange(1.0, 256.0).repeat(3, 1, 1)
first, last = train.transform.transforms[0], train.transform.transforms[-2:]
shown = Compose([first, *last])(image)  # without the random crop, jitter and flip in between
mean, std = (torch.tensor(v).view(3, 1, 1) for v in (last[1].mean, last[1].std))
grey = (shown * std + mean) * 255
assert torch.allclose(grey, 256 - image, atol=1e-2), "training images are no longer negatives"
assert test.transform(image).max() > 900, "test images are scaled now"
print("trained on 256 - x; tested on values up to", round(test.transform(image).max().item()))
PYTHON
"$folder/venv/bin/python" "$folder/check.py" "$folder/learn2learn-0.2.0/learn2learn/vision/benchmarks/mini_imagenet_benchmark.py"
