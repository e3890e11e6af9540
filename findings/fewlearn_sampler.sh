#!/usr/bin/env bash
# fewlearn 0.1.2 (PyPI, newest), with torch 2.14.1 on x86-64.
# Expected: an episode's queries are other images than its support, as in every few-shot benchmark.
# Seen: EpisodicSampler, which create_episode_loader and the Evaluator use, draws the images of each class once for the
# support and once more for the queries, so that support images come back as queries whose label is known. With 20 images
# a class, as in Omniglot, a quarter of the queries of a 5-shot task are support images, and with features that know
# nothing ProtoNet labels 40 % of the queries of 5-way tasks right. With 600, as in mini-ImageNet, it is one in 120.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy
"$folder/venv/bin/pip" install -q --no-deps fewlearn==0.1.2
cat > "$folder/check.py" <<'PYTHON'
import numpy as np
import torch
from fewlearn.models import PrototypicalNetworks
from fewlearn.utils import create_episode_loader
from torch.utils.data import TensorDataset

np.random.seed(0)
torch.manual_seed(0)
n_class, n_image, n_way, n_shot, n_query = 40, 20, 5, 5, 15
features = torch.randn(n_class * n_image, 512)  # of each image its own, which tell nothing of classes
dataset = TensorDataset(features, torch.arange(n_class).repeat_interleave(n_image))
dataset.labels = dataset.tensors[1].tolist()
network, known, right = PrototypicalNetworks(torch.nn.Identity()).eval(), [], []
for support, y_support, query, y_query, _ in create_episode_loader(dataset, n_way, n_shot, n_query, 300, pin_memory=False):
    known.append((query[:, None] == support).all(-1).any(1).float().mean())
    right.append((network(support, y_support, query).argmax(1) == y_query).float().mean())
known, right = (100 * torch.stack(values).mean().item() for values in (known, right))
print(f"5-way 5-shot, 20 images a class: {known:.1f} % of the queries are support images; accuracy {right:.1f} %, chance 20 %")
assert known > 20, "queries are other images now"
assert right > 30, "support images among the queries no longer help"
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
