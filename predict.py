"""Label your own images from a few examples a class.

python predict.py --support my_classes --query my_images --checkpoint results/models/..._bestModel.tar
python predict.py --support my_classes --query my_images --backbone torchvision:resnet18 --weights DEFAULT
python predict.py ... --base fs_benchmarks/miniImagenet       # also align with the base classes of the checkpoint

my_classes holds a subfolder a class, my_images any images, subfolders included. In a notebook, without any output:
from predict import few_shot_predict; predictions = few_shot_predict("my_classes", "my_images", checkpoint="...")
"""

import argparse
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from args_parser import args_parser, from_flags
from data.benchmarks import DataOptions, Split, load_split
from data.user_images import decode_views, folder_truth, list_queries, list_support, other_files
from engine.distributed import ALONE
from engine.errors import RaisingParser, UserError
from engine.records import provenance, write_json
from engine.run import Run, select_device, start_run
from engine.script import run_script
from methods.alignment import AlignmentSetting
from methods.features import FeatureCache, blocks_to_update, feature_source
from methods.prediction import Predictions, alignment_notes, nearest_support, probabilities_of, run_episode, user_split
from models.backbone import Backbone
from persistence.checkpoints import check_base_classes, create_backbone, load_backbone
from persistence.setting_choice import choose_for_support
from reporting.contact_sheet import write_sheet
from reporting.page import write_predictions
from reporting.prediction_files import prediction_record, summary_lines, write_csv


def few_shot_predict(
    support: str | Path,
    query: str | Path,
    checkpoint: str | Path | None = None,
    base: str | Path | None = None,
    alignment: str | None = None,
    **flags: Any,
) -> Predictions:
    """Label the images of `query` from the examples of `support`: see Predictions for what comes back.

    `flags` are those of predict.py, by name and with the same defaults, such as align_blocks=2 or skip_bad=True.
    Nothing is printed, nor written but the caches of a base set. Raises UserError when something given is wrong.
    """
    given = {"support": support, "query": query, "checkpoint": checkpoint, "base": base, "alignment": alignment}
    given |= {"quiet": True} | flags
    argv = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    argv = [flag for flag, value in zip(argv, given.values(), strict=True) if value is not None and value is not False]
    return predict(args_parser("predict", argv, RaisingParser))


def predict(args: argparse.Namespace) -> Predictions:
    """The predictions that the flags ask for."""
    run = start_run(ALONE, args.device, args.precision, args.seed, args.quiet, args.no_keep_memory)
    class_names, support_paths, labels = list_support(args.support)
    query_paths, names = list_queries(args.query)
    k = len(support_paths)
    backbone, img_size, base, facts = backbone_and_base(args)
    blocks = blocks_to_update(backbone.to(run.device, memory_format=torch.channels_last), args.align_blocks)

    paths = support_paths + query_paths
    n_needed = k if args.skip_bad else len(paths)
    images, kept, reasons = decode_views(paths, n_needed, img_size, args.num_workers, args.quiet)
    if len(kept) == k:
        raise UserError(f"no image of {args.query} can be decoded, the first: {reasons[0]}")
    queries = [i - k for i in kept[k:]]
    names = [names[i] for i in queries]

    user = user_split(class_names, [str(paths[i]) for i in kept], torch.tensor(labels), images)
    n_support = torch.bincount(torch.tensor(labels)).tolist()
    setting, lines = alignment_setting(args, backbone, base, n_support, run)
    episode, z = run_episode(backbone, blocks, user, base, args.cache_dir, setting, run)
    probabilities, finetuned = probabilities_of(episode, setting)
    nearest = nearest_support(z, k)

    notes = [f"skipped: {reason}" for reason in reasons] + lines + [*ignored_notes(args, support_paths, query_paths)]
    if base is None:
        why = f"--base {args.base} is not used, for --alignment none" if args.base else "it takes base images, --base"
        notes.append(f"no alignment: {why}")
    related = {}
    if base is not None:
        notes += alignment_notes(episode, setting, class_names, len(base.class_names))
        pairs = zip(class_names, episode.related.classes, strict=True)
        related = {name: [base.class_names[b] for b in classes] for name, classes in pairs}
    return Predictions(
        files=names,
        paths=[query_paths[i] for i in queries],
        class_names=class_names,
        probabilities=probabilities,
        finetuned=finetuned,
        nearest=[support_paths[i] for i in nearest],
        nearest_label=[labels[i] for i in nearest],
        truth=folder_truth(names, class_names),
        related=related,
        n_support=n_support,
        notes=notes,
        facts=facts | {"images_sha256": user.fingerprint},
    )


def alignment_setting(
    args: argparse.Namespace, backbone: Backbone, base: Split | None, n_support: list[int], run: Run
) -> tuple[AlignmentSetting, list[str]]:
    """The numbers of alignment, which --align_preset auto chooses on the val classes of --base, and what to say."""
    setting = from_flags(AlignmentSetting, args)
    if args.align_preset != "auto" or base is None:
        return setting, []
    cache, img_size = FeatureCache(args.cache_dir, run), base.images.shape[-1]
    z_base = feature_source(cache.features(backbone, base), base)
    load_val = partial(load_split, base_options(args, img_size), base.benchmark, "val")
    choice = choose_for_support(load_val, backbone, z_base, cache, n_support, setting)
    return choice.setting, choice.lines


def base_options(args: argparse.Namespace, img_size: int) -> DataOptions:
    """How the splits of --base are found and decoded."""
    folder = Path(os.path.abspath(args.base)).parent
    return DataOptions(
        folder, img_size, args.cache_dir, args.image_root, args.num_workers, args.quiet, None, args.rebuild_cache
    )


def ignored_notes(args: argparse.Namespace, support_paths: list[Path], query_paths: list[Path]) -> Iterator[str]:
    """What was left out of the user's folders, a line each."""
    for folder, used in ((args.support, support_paths), (args.query, query_paths)):
        ignored = other_files(folder, used) if folder.is_dir() else ""
        if ignored:
            yield f"of {folder}, {len(used)} images were read{ignored}"


def backbone_and_base(args: argparse.Namespace) -> tuple[Backbone, int, Split | None, dict[str, Any]]:
    """The backbone and its image size, the base set if alignment needs one, and what a record says of them."""
    if args.checkpoint and not args.checkpoint.is_file():
        raise UserError(
            f"no checkpoint {args.checkpoint}: give the path of a *_bestModel.tar; 'make demo' or transferLearning.py "
            "writes one to results/models"
        )
    if args.checkpoint:
        backbone, checkpoint = load_backbone(args.checkpoint, args.backbone, args.img_size)
        name, img_size = checkpoint.backbone, checkpoint.img_size
        facts = {"checkpoint_stage": checkpoint.stage, "checkpoint_dataset": checkpoint.dataset}
    else:
        checkpoint, facts = None, {}
        name, img_size = args.backbone, args.img_size
        backbone = create_backbone(name, img_size, args.seed, weights=args.weights)
    facts |= {"backbone": name, "img_size": img_size}
    if args.alignment == "none":
        return backbone, img_size, None, facts
    root = Path(os.path.abspath(args.base))
    if root.name != "glyphs" and not any((root / part).exists() for part in ("base", "base.json")):
        raise UserError(
            f"--base {args.base} has no base split: expected {root}/base/<class>/<image> or {root}/base.json"
        )
    base = load_split(base_options(args, img_size), root.name, "base")
    if checkpoint:
        check_base_classes(args.checkpoint, checkpoint, str(args.base), base.class_names)
    return backbone, img_size, base, facts | {"base": root.name, "base_fingerprint": base.fingerprint}


def prepare_out(out: Path, overwrite: bool) -> None:
    """Make the output folder. Raises UserError, before any work, when it cannot be written or holds predictions."""
    if (out / "predictions.csv").exists() and not overwrite:
        raise UserError(f"{out} holds predictions already: give --overwrite to replace them, or another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f".writable.{os.getpid()}").touch()
        (out / f".writable.{os.getpid()}").unlink()
    except OSError as error:
        raise UserError(f"output folder {out} cannot be written ({error.strerror}): give another --out") from error


def main() -> None:
    args = args_parser("predict")
    began = time.time()
    prepare_out(args.out, args.overwrite)
    predictions = predict(args)

    n_sheet = min(args.max_sheet, len(predictions.files))
    table, sheet = args.out / "predictions.csv", args.out / "contact_sheet.png"
    write_sheet(sheet, predictions, n_sheet)
    record = {"stage": "predict", "alignment": args.alignment, **prediction_record(predictions)}
    run = Run(select_device(args.device), seed=args.seed)
    record |= {"seconds": round(time.time() - began, 2), **provenance(vars(args), run)}
    write_json(args.out / "predictions.json", record)
    write_csv(table, predictions)
    write_predictions(args.out / "predictions.html", predictions, args.support)

    for note in predictions.notes:
        print(f"note: {note}")
    alignment = f"{args.alignment} alignment with {args.base}" if predictions.related else "no alignment"
    print(f"{args.method} head on {predictions.facts['backbone']}, {alignment}")
    print("\n".join(summary_lines(predictions)))
    print(f"predictions {table}")
    first = f", the first {n_sheet} images (--max_sheet)" if n_sheet < len(predictions.files) else ""
    print(f"contact sheet {sheet}{first}")
    print(f"page {args.out / 'predictions.html'}")


if __name__ == "__main__":
    run_script(main)
