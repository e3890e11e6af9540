#!/usr/bin/env bash
# Pillow 13.0.0 and 12.0.0 (PyPI), Image.resize with BICUBIC, on x86-64.
# Expected: the same image and size give the same pixels in both versions, by one rule for all sizes: both filter
# the rows first and round to 8 bits, then the columns.
# Seen: 13.0.0 filters the columns first where an image is much taller than wide, 12.0.0 never does. Between the two
# versions such images differ by several grey levels, and so do features of them; square ones are equal. Whoever writes
# the resize into an exported network, or compares with numbers of an older Pillow, meets it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PYTHON'
import sys

import numpy as np
from PIL import Image, __version__


def differs(width, height, side=24):
    """Largest difference of a resize to side x side from rows first and from columns first, in grey levels."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    image = Image.fromarray(pixels)

    def passes(*sizes):
        result = image
        for size in sizes:
            result = result.resize(size, Image.BICUBIC)
        return np.asarray(result).astype(int)

    whole = passes((side, side))
    first = passes((side, height), (side, side)), passes((width, side), (side, side))
    return [int(abs(whole - each).max()) for each in first]


tall, wide, square = differs(9, 70), differs(70, 9), differs(60, 60)
print(__version__, "tall", tall, "wide", wide, "square", square)
columns_first = sys.argv[1] == "columns"
assert (tall[1] == 0 < tall[0]) if columns_first else (tall[0] == 0 < tall[1]), "tall images are resized otherwise now"
assert wide[0] == square[0] == 0, "wide and square images are no longer filtered along their rows first"
PYTHON
for pair in 12.0.0:rows 13.0.0:columns; do
  python3 -m venv "$folder/${pair%%:*}"
  "$folder/${pair%%:*}/bin/pip" install -q "pillow==${pair%%:*}" numpy==2.3.5
  "$folder/${pair%%:*}/bin/python" "$folder/check.py" "${pair##*:}"
done
