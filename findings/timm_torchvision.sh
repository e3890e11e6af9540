#!/usr/bin/env bash
# timm 1.0.31 against torchvision 0.29.1 (PyPI, with torch 2.14.1): the same weights and the same folder of images.
# Expected: a file of weights that timm takes from torchvision is given the same images by both libraries' own transforms
# for evaluation; a folder class/image gets the same labels.
# Seen: of 37 such files timm resizes, crops or interpolates 25 otherwise. It gives ResNet-50 of 2022 (tv2_in1k) the 176
# pixels that it was trained at, where torchvision gives the 224 of the published accuracy: resolve_model_data_config
# knows those as use_test_size=True, as for 307 of timm's 1826 weights. Features of the two differ, silently.
# timm numbers the folders 0, 1, 2, 10 in this order, and a before B; torchvision 0, 1, 10, 2, and B before a. Weights
# trained by one and tested by the other name the wrong classes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cat > "$folder/check.py" <<'PYTHON'
import sys
from pathlib import Path

import timm
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config
from torchvision import models
from torchvision.datasets import ImageFolder


def of_timm(config, **options):
    """The side that a timm model's own transform resizes to, that of its crop, and how it interpolates."""
    resize, crop = create_transform(**resolve_data_config(pretrained_cfg=config.to_dict(), **options)).transforms[:2]
    return resize.size, crop.size[0], resize.interpolation.value


weights = {w.url: w for name in models.list_models(module=models) for w in models.get_model_weights(name)}
names = timm.list_pretrained()
configs = {name: timm.get_pretrained_cfg(name) for name in names}
shared, other, sizes = 0, [], 0
for name, config in configs.items():
    sizes += config.test_input_size not in (None, config.input_size)
    if config.url in weights:
        theirs = weights[config.url].transforms()
        wanted = theirs.resize_size[0], theirs.crop_size[0], theirs.interpolation.value
        shared += 1
        if of_timm(config) != wanted:
            other.append(name)
            print(f"{name}: timm {of_timm(config)}, torchvision {wanted}")
print(f"{len(other)} of {shared} are given other images; {sizes} of {len(names)} are tested at another size")
assert (len(other), shared) == (25, 37) and (sizes, len(names)) == (307, 1826)
config = configs["resnet50.tv2_in1k"]
assert of_timm(config)[:2] == (201, 176) and of_timm(config, use_test_size=True)[:2] == (232, 224)

for name in ("0", "1", "2", "10", "a", "B"):
    (Path(sys.argv[1]) / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(Path(sys.argv[1], name, "image.png"))
by_timm, by_torchvision = (list(of) for of in (create_dataset("", sys.argv[1]).reader.class_to_idx, ImageFolder(sys.argv[1]).classes))
print("timm", *by_timm, "torchvision", *by_torchvision)
assert by_timm == ["0", "1", "2", "10", "a", "B"] and by_torchvision == ["0", "1", "10", "2", "B", "a"]
PYTHON
"$folder/venv/bin/python" "$folder/check.py" "$folder/images"
