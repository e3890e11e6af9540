#!/usr/bin/env bash
# learn2learn 0.2.0 (PyPI, newest), get_tasksets("omniglot"), with torch 2.14.1 on x86-64.
# Expected: training tasks are of the 1100 training characters, test tasks of the 423 test characters; in a task each
# character is turned by an angle of its own (RandomClassRotation), which makes four classes of one.
# Seen: the splits are made and not used. FusedNWaysKShots is given the whole data set instead of the split's, so that
# training, validation and test tasks are all of all 1623 characters, and the network is tested on what it was trained
# on. All images of a task are turned by the angle of its last image: the functions made in the loop share one variable.
# The benchmark code of mini-ImageNet, tieredImageNet, CIFAR-FS and FC100 gives each split's own data set.
# In place of the downloaded images, each is its class's number, and none is turned until the last check.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy scipy requests tqdm gym==0.26.2 cython==3.2.1 setuptools
"$folder/venv/bin/pip" download -q --no-deps --no-build-isolation --no-binary :all: -d "$folder" learn2learn==0.2.0
tar xzf "$folder"/learn2learn-0.2.0.tar.gz -C "$folder"
cd "$folder/learn2learn-0.2.0"
rm learn2learn/data/*.c # of an older Cython, which a newer Python does not compile
"$folder/venv/bin/cythonize" -q -i learn2learn/data/*.pyx > "$folder/log" 2>&1
cat > check.py <<'PYTHON'
import learn2learn as l2l
import torch
from torch.utils.data import Dataset


class Characters(Dataset):
    """In place of Omniglot: 1623 classes of 20 images, each of them 28 x 28 times the number of its class."""

    def __init__(self, root, transform, download):
        pass

    def __len__(self):
        return 1623 * 20

    def __getitem__(self, i):
        return torch.full((1, 28, 28), float(i // 20)), i // 20


l2l.vision.datasets.FullOmniglot = Characters
splits = l2l.vision.benchmarks.get_tasksets("omniglot", test_ways=5, test_samples=2)
train = set(splits.train.dataset.labels)
for name, tasks in splits._asdict().items():
    turn = tasks.task_transforms.pop()
    own = set(tasks.dataset.labels)
    drawn = {int(image[0, 0, 0]) for _ in range(200) for image in tasks.sample()[0]}
    print(f"{name}: {len(own)} characters of its own; 200 tasks drew {len(drawn)}, {len(drawn - own)} of other splits")
    assert len(drawn - own) > 100, "the tasks of a split are of its own characters now"

corner = torch.zeros(1, 28, 28)
corner[:, :9, :9] = 1  # shows by which angle it was turned
for _ in range(50):
    task = turn(tasks.sample_task_description())
    turned = {tuple(data.transforms[-1]((corner, 0))[0].flatten().tolist()) for data in task}
    assert len(turned) == 1, "the characters of a task are turned by angles of their own now"
print("50 tasks of 5 characters, each turned by one angle")
PYTHON
"$folder/venv/bin/python" -W ignore check.py 2> "$folder/log" || { tail -5 "$folder/log"; exit 1; }
