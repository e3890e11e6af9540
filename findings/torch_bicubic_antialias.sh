#!/usr/bin/env bash
# torch 2.14.1 and torchvision 0.29.1 (PyPI) against pillow 13.0.0 and opencv-python-headless 5.0.0.93, on x86-64.
# Expected: antialias=True filters what would alias when an image is made smaller, and changes nothing when it is
# enlarged, as images of 84 pixels are for most networks; so it is for bilinear.
# Seen: for bicubic the flag picks another cubic. Without it enlarging is OpenCV's (a = -0.75), with it Pillow's
# (a = -0.5): an image that is enlarged from 84 to 92 pixels differs by up to 6 grey levels of uint8, by more in floats,
# where what overshoots is not cut off. Who takes antialias=False as harmless, since all images are enlarged, or leaves
# torchvision for the tensors of another library, feeds a network otherwise than it was trained.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 pillow==13.0.0 opencv-python-headless==5.0.0.93
cat > "$folder/check.py" <<'PYTHON'
import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

rough = np.random.default_rng(0).integers(0, 256, (21, 21, 3), dtype=np.uint8)
small = np.asarray(Image.fromarray(rough).resize((84, 84), Image.BICUBIC))
tensor = torch.from_numpy(small.copy()).permute(2, 0, 1)
for mode, pillow, opencv in (
    (InterpolationMode.BILINEAR, Image.BILINEAR, cv2.INTER_LINEAR),
    (InterpolationMode.BICUBIC, Image.BICUBIC, cv2.INTER_CUBIC),
):
    enlarged = {
        f"antialias={flag}": resize(tensor, [92, 92], mode, antialias=flag).permute(1, 2, 0).numpy()
        for flag in (False, True)
    }
    enlarged["Pillow"] = np.asarray(Image.fromarray(small).resize((92, 92), pillow))
    enlarged["OpenCV"] = cv2.resize(small, (92, 92), interpolation=opencv)
    without, with_flag, by_pillow, by_opencv = (each.astype(int) for each in enlarged.values())
    differ = [int(abs(a - b).max()) for a, b in ((without, with_flag), (with_flag, by_pillow), (without, by_opencv))]
    print(mode.value, "False/True", differ[0], "True/Pillow", differ[1], "False/OpenCV", differ[2])
    assert max(differ[1:]) <= 1, "torchvision follows other libraries now"
    assert (differ[0] > 4) == (mode is InterpolationMode.BICUBIC), "the flag changes enlarging otherwise now"
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
