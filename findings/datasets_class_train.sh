#!/usr/bin/env bash
# datasets 5.2.0 (PyPI, newest), load_dataset("imagefolder"), with pillow 13.0.0.
# Expected: folder/class/image, as torchvision's ImageFolder reads it, and folder/{train,test}/class/image as two splits
# of different classes.
# Seen: every folder below whose name has the word train, test, val, dev or eval counts as a split, the classes included,
# without a note. Of the folders of CIFAR-100, as the archive of CIFAR-FS has them, the images of the class train remain,
# without labels. A novel class bullet_train of test/ is in the training split as well, with all its images; and a class
# test_tube of train/ is tested on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pillow==13.0.0
cat > "$folder/check.py" <<'PYTHON'
import sys
from collections import Counter
from pathlib import Path

import datasets
from PIL import Image

datasets.disable_progress_bars()


def loaded(name, *classes):
    """The number of images per class in each split, of folders of two images each; of no class, where labels are none."""
    for folder in classes:
        place = Path(sys.argv[1], name, folder)
        place.mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8)).save(place / f"{i}.png")
    read = datasets.load_dataset("imagefolder", data_dir=str(Path(sys.argv[1], name)), cache_dir=f"{sys.argv[1]}/cache")
    splits = {}
    for split, rows in read.items():
        known = "label" in rows.features
        names = rows.features["label"].int2str(rows["label"][:]) if known else [None] * len(rows)
        splits[split] = dict(Counter(names))
    print(*classes, "->", splits)
    return splits


assert loaded("plain", "bus", "lion") == {"train": {"bus": 2, "lion": 2}}
assert loaded("cifar", "bus", "lion", "train") == {"train": {None: 2}}, "all classes are read now"
novel = loaded("novel", "train/bus", "train/lion", "test/rose", "test/bullet_train")
assert novel["train"] == {"bus": 2, "lion": 2, "bullet_train": 2} and novel["test"] == {"rose": 2, "bullet_train": 2}
base = loaded("base", "train/bus", "train/test_tube", "test/rose", "test/wolf")
assert base["train"] == {"bus": 2, "test_tube": 2} and base["test"] == {"rose": 2, "wolf": 2, "test_tube": 2}
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/check.py" "$folder"
