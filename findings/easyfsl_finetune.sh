#!/usr/bin/env bash
# easyfsl 1.5.0 (PyPI, newest), with torch 2.14.1 and torchvision 0.29.1 on x86-64.
# Expected: Finetune, an inductive method, fits a head to the support of an episode, so that the prediction of a query
# depends on the support and on itself; `temperature`, by its docstring, makes predictions softer where it is higher.
# Seen: each call goes on training what the call before left. Asked for all queries at once or one after another, it
# gives other labels, and the more images one has labelled, the other the next label. The default 200 steps at a rate
# of 1e-4 hardly move the prototypes: asked once, it is the nearest mean by cosine under the name of fine-tuning. The
# temperature multiplies the logits: predictions get sharper. BD-CSPN, which replaces the prototypes, carries over to
# the next call as well. Who takes it for the baseline of a table compares with no fine-tuning, or with one of as many
# steps as there were batches.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 easyfsl==1.5.0
cat > "$folder/check.py" <<'PYTHON'
import torch
from easyfsl.methods import BDCSPN, Finetune, SimpleShot

torch.manual_seed(0)
centres = torch.randn(5, 64)
y_support, y_query = (torch.arange(5).repeat_interleave(n) for n in (5, 15))
support, query = ((centres[y] + 3 * torch.randn(len(y), 64)).relu() for y in (y_support, y_query))


def scores(method, parts, **numbers):
    """The scores of the queries, asked for in parts, by a new classifier of the support."""
    classifier = method(**numbers)
    classifier.process_support_set(support, y_support)
    return torch.cat([classifier(part).detach() for part in parts])


together, one_by_one = [query], query.split(1)
assert torch.equal(scores(Finetune, together), scores(Finetune, together)), "it draws at random now"
for method in (Finetune, SimpleShot):
    labels = [scores(method, parts).argmax(1) for parts in (together, one_by_one)]
    changed = int((labels[0] != labels[1]).sum())
    print(f"{method.__name__}: {changed} of {len(query)} labels change when the queries are asked for one by one")
    assert (changed > 5) == (method is Finetune), "calls depend on each other otherwise now"
same = scores(Finetune, together).argmax(1) == scores(SimpleShot, together).argmax(1)
print(f"Finetune, asked once, labels {int(same.sum())} of {len(query)} as SimpleShot does")
assert same.sum() >= len(query) - 2, "it fine-tunes now"
sure = [scores(Finetune, together, use_softmax=True, temperature=t).max(1).values.mean().item() for t in (1.0, 10.0)]
print(f"mean confidence at temperature 1: {sure[0]:.2f}, at 10: {sure[1]:.2f}")
assert sure[1] > 1.5 * sure[0], "a higher temperature is softer now"
classifier = BDCSPN()
classifier.process_support_set(support, y_support)
moved = (classifier(query) - classifier(query)).abs().max().item()
print(f"BDCSPN, the same queries twice: scores differ by {moved:.2f}")
assert moved > 0.01, "BDCSPN keeps its prototypes now"
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
