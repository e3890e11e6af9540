#!/usr/bin/env bash
# scikit-learn 1.9.1 (PyPI, newest) beside 1.7.2, the last that has LogisticRegression(multi_class=...), on x86-64.
# Expected: without `multi_class`, which was deprecated as no longer needed, the few-shot baseline of Tian et al.
# (Rethinking Few-shot, 2020: multi_class="multinomial", unit features, C=1) is what it was, at any number of classes.
# Seen: with three classes it is. With two, scikit-learn fits one weight vector with a sigmoid, no option is left that fits
# a softmax, and the same C regularises twice as strongly: a 2-way task has probabilities that are off by up to 0.1, and the
# old result is that of C=2. A table of ways compares two classifiers, and a port of that code to a newer scikit-learn has
# another 2-way row, without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/fit.py" <<'PYTHON'
import sys
import warnings

import numpy as np
import sklearn
from sklearn.linear_model import LogisticRegression

warnings.simplefilter("ignore", FutureWarning)  # of multi_class
random = np.random.default_rng(0)
known = {"multi_class": "multinomial"} if sklearn.__version__ < "1.8" else {}
probabilities = {}
for n_way in (2, 3):
    y_support, y_query = (np.repeat(np.arange(n_way), n) for n in (5, 200))
    centres = random.normal(size=(n_way, 64))
    sets = [centres[y] + 2.5 * random.normal(size=(len(y), 64)) for y in (y_support, y_query)]
    support, query = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in sets)
    for C in (1.0, 2.0):
        model = LogisticRegression(C=C, tol=1e-8, max_iter=5000, **known).fit(support, y_support)
        probabilities[f"{n_way}-way, C={C:g}"] = model.predict_proba(query)
np.savez(sys.argv[1], **probabilities)
PYTHON
cat > "$folder/compare.py" <<'PYTHON'
import sys

import numpy as np

old, new = map(np.load, sys.argv[1:])


def off(a: str, b: str) -> float:
    """How far the new probabilities of setting b are from the old ones of setting a, at most."""
    return float(np.abs(old[a] - new[b]).max())


for a, b in (("3-way, C=1", "3-way, C=1"), ("2-way, C=1", "2-way, C=1"), ("2-way, C=1", "2-way, C=2")):
    print(f"{a} of 1.7.2, multinomial, beside {b} of 1.9.1: probabilities differ by up to {off(a, b):.4f}")
assert off("3-way, C=1", "3-way, C=1") < 1e-3, "three classes differ now"
assert off("2-way, C=1", "2-way, C=1") > 0.03, "two classes are fitted as they were now"
assert off("2-way, C=1", "2-way, C=2") < 1e-3, "twice the C is no longer what it was"
PYTHON
for version in 1.7.2 1.9.1; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q numpy==2.3.5 scikit-learn==$version
  "$folder/$version/bin/python" "$folder/fit.py" "$folder/$version.npz"
done
"$folder/1.9.1/bin/python" "$folder/compare.py" "$folder/1.7.2.npz" "$folder/1.9.1.npz"
