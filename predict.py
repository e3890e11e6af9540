"""Label your own images from a few examples per class.

python predict.py --support my_classes --query my_images --checkpoint results/models/..._bestModel.tar
python predict.py --support my_classes --query my_images --backbone torchvision:resnet18 --weights DEFAULT
python predict.py ... --base fs_benchmarks/miniImagenet       # align with related images, where that helps
python predict.py --support my_classes --checkpoint ... --save my.classifier
python predict.py --classifier my.classifier --query my_images
python predict.py --classifier my.classifier --add more_classes --save larger.classifier
python predict.py --classifier my.classifier --correct corrections.csv --query my_images --save corrected.classifier
python predict.py --classifier my.classifier --export model.onnx     # runs without this repository

my_classes holds a subfolder per class, my_images any images, subfolders included. In Python, without any output:
from predict import FewShotClassifier; classifier = FewShotClassifier("..._bestModel.tar").fit(images, labels)
"""

import time

from args_parser import args_parser, from_flags
from engine.distributed import ALONE
from engine.records import provenance
from engine.run import Run, start_run
from engine.script import print_notes, run_script
from models import BACKBONES, OTHERS
from photos.classifier_file import load_classifier, save_classifier
from photos.estimator import Estimator
from photos.fitting import FitFlags, fit_folder
from photos.growing import grow_folders
from photos.images import list_queries
from photos.labelling import LabelFlags, check_outputs, label_folder, write_outputs
from photos.portable import export_classifier
from photos.table import fitted_lines, review_lines, summary_lines


class FewShotClassifier(Estimator):
    """predict.py in the manner of scikit-learn, whose clone and cross_val_score take it.

    backbone: a checkpoint, or the name of a backbone whose weights= are given; base: a folder of related images.
    `flags` are the others of predict.py, by name and with the same defaults, such as alignment="none". Images are
    paths, images of PIL or uint8 arrays (h, w, 3). Nothing is printed. Raises UserError when something given is wrong.
    After fit: classes_, the labels in order, and confidence_, what is known of the accuracy, or None.
    """

    def read_flags(self) -> tuple[FitFlags, Run]:
        """What the flags ask for, parsed as those of the command line are."""
        name = str(self.backbone)
        is_name = name in BACKBONES or OTHERS.fullmatch(name) is not None
        given = {"support": "images", "query": "images", "base": self.base, **self.flags}
        given["backbone" if is_name else "checkpoint"] = self.backbone
        if self.backbone is None and hasattr(self, "fitted_"):  # it is loaded
            given = {"classifier": "file", "add": "images", "save": "file", **self.flags}
        flags = {flag: value for flag, value in given.items() if value is not None and value is not False}
        command = [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()]
        args = args_parser("predict", command)
        run = start_run(ALONE, args.device, args.precision, args.seed, quiet=True, no_keep_memory=args.no_keep_memory)
        return from_flags(FitFlags, args), run


def main() -> None:
    args, began = args_parser("predict"), time.time()
    flags = from_flags(LabelFlags, args)
    check_outputs(flags)
    run = start_run(ALONE, args.device, args.precision, args.seed, args.quiet, args.no_keep_memory)

    if args.classifier:
        fitted = load_classifier(args.classifier, args.backbone, run.device)
        if args.add or args.correct:
            fitted = grow_folders(fitted, args.add, args.correct, args.query, from_flags(FitFlags, args), run)
    else:
        queries = list_queries(args.query)[0] if args.query else []
        fitted = fit_folder(args.support, queries, from_flags(FitFlags, args), run)

    if args.query:
        predictions = label_folder(fitted, args.query, flags, run)
        about = {"seconds": round(time.time() - began, 2), **provenance(vars(args), run)}
        write_outputs(predictions, flags, about, run)
        print_notes(predictions.notes)
        print(*fitted_lines(fitted), *summary_lines(predictions), sep="\n")
        print(f"predictions {flags.table}")
        print(f"page {flags.out / 'predictions.html'}")
        if args.copy_to:
            print(f"copies {args.copy_to}, in a folder per label")
    else:
        print_notes(fitted.notes)
        print(*fitted_lines(fitted), sep="\n")
    if args.review:
        print(*review_lines(fitted.classifier), sep="\n")

    if args.save:
        save_classifier(args.save, fitted)
        print(f"classifier {args.save}, {args.save.stat().st_size / 1e6:.1f} MB")
    if args.export:
        export_classifier(args.export, fitted)
        print(f"program {args.export}, {args.export.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main, "--aug_size, --align_blocks, --critic_hidden or --img_size")
