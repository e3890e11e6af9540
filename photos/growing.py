"""A kept classifier grows: examples of its classes or of new ones beside the features of those that it has.

The photos that it was made of are not read again; where it was aligned, the base set's kept features serve again.
"""

import csv
from dataclasses import replace
from pathlib import Path

import torch

from data.benchmarks import Split
from engine.errors import UserError
from engine.run import Run
from methods.features import embed, feature_source, trainable_blocks
from photos.classifier import Fitted
from photos.classifier_file import setting_of
from photos.confidence import same_images
from photos.fitting import Examples, FitFlags, fit_source, folder_examples
from photos.images import decode_views, list_queries
from photos.table import UNSURE


def read_corrections(path: Path) -> dict[str, str]:
    """Labels by file, of what the page of predictions gives, or of a table of predictions whose labels were changed.

    Raises UserError when it is neither, or changes nothing.
    """
    found = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                name, label = row.pop("file"), row.pop("label").strip()
                row.pop("mark", None)
                before = max(row, key=lambda c: float(row[c])) if row else None
                if label not in (before, UNSURE, ""):
                    found[name] = label
    except (OSError, ValueError, KeyError, AttributeError, TypeError, csv.Error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--correct {path} is no table of file and label ({reason}): take the page's") from error
    if not found:
        raise UserError(f"--correct {path} changes no label: choose others on the page, or in the table")
    return found


def corrected_examples(path: Path, query: Path) -> Examples:
    """The images below a query folder whose labels were corrected. Raises UserError when one is not there."""
    corrections, paths = read_corrections(path), dict(zip(*reversed(list_queries(query)), strict=True))
    if absent := [name for name in corrections if name not in paths]:
        raise UserError(f"--correct {path} names {absent[0]!r}, which is not below --query {query}")
    class_names = sorted(set(corrections.values()))
    labels = [class_names.index(label) for label in corrections.values()]
    return Examples(class_names, [paths[name] for name in corrections], list(corrections), labels)


def grow_folders(
    fitted: Fitted, add: Path | None, correct: Path | None, query: Path | None, flags: FitFlags, run: Run
) -> Fitted:
    """A classifier with the examples of a folder of classes, and with corrected labels of query images."""
    if add:
        fitted = grow(fitted, folder_examples(add, least=1), flags, run)
    if correct and query:
        fitted = grow(fitted, corrected_examples(correct, query), flags, run)
    return fitted


def grow(fitted: Fitted, examples: Examples, flags: FitFlags, run: Run) -> Fitted:
    """A classifier fitted again to the features of its examples and to more, in place of the same images.

    flags.base: where the base set is, if not where it was. Raises UserError when blocks were aligned.
    """
    old, facts = fitted.classifier, fitted.facts
    if old.aligned is not old.backbone or "setting" not in facts:
        blocks = "its blocks were aligned, which takes the photos of all examples, and it holds only their features"
        why = blocks if "setting" in facts else "an earlier version made it, which did not keep its setting"
        raise UserError(f"the classifier cannot grow: {why}: fit a new one by --support to the old and new photos")
    facts = {name: value for name, value in facts.items() if name != "images_sha256"}
    folder = facts.get("base_folder")
    base = flags.base or (Path(str(folder)) if folder else None)
    flags = replace(flags, base=base, setting=setting_of(facts["setting"]))
    view = fitted.view.of_folder(examples.images, flags.num_workers)
    z = embed(old.backbone, decode_views(examples.images, view, flags.num_workers)[0], run).cpu()
    kept = (~same_images(old.z_support, z).any(1)).nonzero().squeeze(1).tolist()
    class_names = list(dict.fromkeys([*old.class_names, *examples.class_names]))
    if "labels" in facts:
        facts["labels"] = [*facts["labels"], *class_names[len(old.class_names) :]]
    y = torch.tensor([class_names.index(examples.class_names[label]) for label in examples.labels])
    y = torch.cat([old.y_support[kept], y])
    if missing := set(range(len(class_names))) - set(y.tolist()):
        raise UserError(f"class {class_names[min(missing)]!r} would be left without an example: add some of it")
    names = [*(old.examples[i] for i in kept), *examples.names]
    nothing = torch.empty(0, dtype=torch.uint8)
    user = Split("", "user", class_names, names, y, nothing, None, nothing, "", view.rule)
    novel = feature_source(torch.cat([old.z_support[kept], z]).to(run.device), user)
    files = [Path(image) for image in examples.images if isinstance(image, str | Path)]
    return fit_source(novel, old.backbone, trainable_blocks(old.backbone, 0), files, facts, flags, run)
