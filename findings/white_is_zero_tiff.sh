#!/usr/bin/env bash
# Pillow 13.0.0 and opencv-python-headless 5.0.0 (PyPI), of a grey TIFF whose zero is white (PhotometricInterpretation 0,
# as film scanners and gel imagers write it), on x86-64.
# Expected: one rule per library, either the values of the file or those of the picture that it shows.
# Seen: Pillow gives the picture at 8 bits and its negative at 16, without a note: a folder of both holds positives and
# negatives. OpenCV gives of the same file of 16 bits the picture by IMREAD_COLOR and IMREAD_GRAYSCALE, and its negative
# by IMREAD_UNCHANGED and IMREAD_ANYDEPTH; of one of 8 bits the picture by all four.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==13.0.0 numpy==2.3.5 tifffile==2026.3.3 opencv-python-headless==5.0.0.93
cat > "$folder/check.py" <<'PYTHON'
import sys

import cv2
import numpy as np
import tifffile
from PIL import Image

shown = np.arange(0, 256, 17, dtype=np.uint8).reshape(4, 4)  # the picture, from black to white
for dtype, negative in ((np.uint8, False), (np.uint16, True)):
    white = np.iinfo(dtype).max
    file = f"{sys.argv[1]}/{white}.tif"
    tifffile.imwrite(file, white - shown.astype(dtype) * (white // 255), photometric="miniswhite")
    read = {"Pillow": np.asarray(Image.open(file))}
    for flag in ("IMREAD_COLOR", "IMREAD_GRAYSCALE", "IMREAD_UNCHANGED", "IMREAD_ANYDEPTH"):
        read[flag] = cv2.imread(file, getattr(cv2, flag)).reshape(4, 4, -1)[..., 0]
    for name, values in read.items():
        top = int(values.max())
        as_shown, turned = (np.array_equal(values // (top // 255), each) for each in (shown, 255 - shown))
        print(f"{white} is black: {name} gives the {'picture' if as_shown else 'negative'}")
        expected = negative and name in ("Pillow", "IMREAD_UNCHANGED", "IMREAD_ANYDEPTH")
        assert (as_shown, turned) == (not expected, expected), f"{name} reads it otherwise now"
PYTHON
"$folder/venv/bin/python" "$folder/check.py" "$folder"
