#!/usr/bin/env bash
# pytorch-metric-learning 2.9.0 (PyPI, newest) with torch 2.13.0 and with 2.14.1, on x86-64.
# Expected: ArcFaceLoss whose weights begin as the support features (weight imprinting, Qi et al., 2018) goes on from
# there, as from any other beginning, and alike with either torch.
# Seen: with one shot the angle to the own class is 0, where the slope of acos is infinite; the loss clamps the cosine
# to [-1, 1] before it. Until torch 2.13 the gradient of clamp at its bounds is 1, so that one step of SGD leaves no
# usable weights in most tasks, without an error. From 2.14 on it is 0 (pull request 191142 of pytorch/pytorch): all stays
# finite, and such examples teach nothing. A parameter that begins on its bound, as a share clamped to [0, 1] does at 0,
# is trained by 2.13, and never by 2.14.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PYTHON'
import torch
from pytorch_metric_learning.losses import ArcFaceLoss
from torch.nn.functional import normalize

torch.manual_seed(0)
older, n_task, n_lost, d = torch.__version__ < "2.14", 100, 0, 640
for _ in range(n_task):
    support, y = torch.randn(5, d).relu(), torch.arange(5)  # 5-way 1-shot
    loss = ArcFaceLoss(5, d, margin=28.6, scale=16)
    with torch.no_grad():
        loss.W.copy_(normalize(support).T)
    optimizer = torch.optim.SGD(loss.parameters(), 1e-3)
    loss(support, y).backward()
    optimizer.step()
    n_lost += not bool(loss.W.isfinite().all())
share = torch.zeros(1, requires_grad=True)  # of two features that are mixed
(1 - share.clamp(0, 1)).backward()
print(f"torch {torch.__version__.split('+')[0]}: one step leaves weights that are not finite in {n_lost} of {n_task} tasks; ", end="")
print(f"the gradient of a share that begins at 0 is {share.grad.item():+.0f}")
assert n_lost > n_task / 2 if older else n_lost == 0, "imprinted weights fare otherwise now"
assert (share.grad.item() != 0) == older, "clamp has another gradient at its bounds now"
PYTHON
for version in 2.13.0 2.14.1; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q torch==$version pytorch-metric-learning==2.9.0
  "$folder/$version/bin/python" "$folder/check.py"
done
