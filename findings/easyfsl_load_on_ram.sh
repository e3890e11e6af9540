#!/usr/bin/env bash
# easyfsl 1.5.0 (PyPI, newest), with torch 2.14.1, torchvision 0.29.1 and pillow 13.0.0 on x86-64.
# Expected: MiniImageNet(load_on_ram=True) gives the images that it gives without, sooner, at the price of memory, as
# its docstring says.
# Seen: in memory an image is enlarged to 168 pixels, made a tensor and reduced to 96; read as it is asked for, it is
# resized to 96 at once. The network sees other images: of a detailed one of 84 pixels by 5 grey levels in the mean and up
# to 28, and a tenth less contrast. A checkpoint says nothing of the flag, so that train, val and test with different
# flags, or a published file of unknown flag, are not comparable.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 pillow==13.0.0 easyfsl==1.5.0
cat > "$folder/check.py" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
import torch
from easyfsl.datasets import MiniImageNet
from PIL import Image

root = Path(sys.argv[1])
(root / "a_class").mkdir()
rough = np.random.default_rng(0).integers(0, 256, (42, 42, 3), dtype=np.uint8)
Image.fromarray(rough).resize((84, 84), Image.BICUBIC).save(root / "a_class" / "0.png")
specs = root / "specs.csv"
specs.write_text("class_name,image_name\na_class,0.png\n")
std = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)  # back from its normalisation to grey levels
on_the_fly, in_memory = (MiniImageNet(root, specs_file=specs, load_on_ram=flag)[0][0] * std for flag in (False, True))
difference = (on_the_fly - in_memory).abs()
contrast = (in_memory.std() / on_the_fly.std()).item()
print(f"grey levels apart: {difference.mean():.1f} in the mean, {difference.max():.0f} at most; contrast {contrast:.2f}")
assert on_the_fly.shape == in_memory.shape == (3, 84, 84)
assert difference.mean() > 3 and contrast < 0.95, "the flag changes the images otherwise now"
PYTHON
"$folder/venv/bin/python" "$folder/check.py" "$folder"
