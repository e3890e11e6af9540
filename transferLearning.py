"""Stage 1: train a backbone on the base classes with a softMax, cosMax or arcMax head, then test on the novel classes.

python transferLearning.py --dataset miniImagenet --method arcMax --n_shot 5      # the published protocol
python transferLearning.py --preset laptop                                        # about 3 minutes on 2 CPU cores
"""

import time
from functools import partial

import torch

from args_parser import args_parser, data_options
from data.benchmarks import load_split
from data.transforms import Augmentation
from engine.distributed import copy_rank_0, data_parallel, join_ranks, rank_0_first
from engine.errors import UserError
from engine.generators import make_generator
from engine.run import n_parameters, on_device, start
from engine.script import run_script
from methods.base_training import train_one_epoch
from methods.evaluation import embed, evaluate_heads, mean_and_ci95
from models import build_head
from models.global_batch_norm import use_global_batch_norm
from persistence.checkpoints import initial_backbone, load_checkpoint, load_state
from persistence.files import Training, begin, resumable
from persistence.results import log_epoch, save_result
from persistence.training import load_data, open_run


def main() -> None:
    ranks = join_ranks()
    args = args_parser("transfer")
    args.quiet |= not ranks.first
    began = time.time()
    device, precision = start(args.device, args.precision, args.no_keep_memory, ranks)

    files = open_run("transferLearning", args, ranks)
    data = load_data(args, partial(load_split, **data_options(args)), ranks)
    base, val, novel = data.base, data.val, data.novel
    n_base_class = len(base.class_names)
    if args.n_base_class not in (None, n_base_class):
        raise UserError(
            f"--n_base_class {args.n_base_class}, but {args.dataset!r} has {n_base_class} base classes: drop it"
        )
    if args.n_epoch and n_base_class < 2:
        raise UserError(f"the base split of {args.dataset!r} has 1 class: training needs at least 2, so add classes")

    # Model.
    backbone, _ = initial_backbone(
        args.init_from, args.backbone, args.img_size, args.seed, device, weights=args.weights
    )
    head_generator = make_generator(args.seed, "base head")
    head = build_head(args.method, backbone.feature_dim, n_base_class, args.s, args.m, [head_generator]).to(device)
    if args.sync_bn and ranks.n > 1:
        use_global_batch_norm(backbone)
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=args.lr)
    augmentation = Augmentation(crop_scale=tuple(args.crop_scale), flip=not args.no_flip) if args.data_aug else None
    train_images = on_device(base.train_images if augmentation else base.images, device)
    print(
        f"{args.backbone}: {n_parameters(backbone):,} parameters, {backbone.feature_dim} features at {args.img_size} px"
    )
    print(f"{args.dataset}: {n_base_class} base classes of {len(base.labels)} images; {device}, {args.precision}")

    # Base training; the model of the best validation accuracy is kept.
    score_heads = partial(
        evaluate_heads,
        method=args.method,
        s=args.ft_s,
        m=args.ft_m,
        n_steps=args.ft_n_epoch,
        lr=args.ft_lr,
        seed=args.seed,
        ranks=ranks,
    )
    training = Training(backbone, head, optimizer, precision)
    if args.n_epoch:
        began -= begin(files.state, data.made_from, files.last)
    if files.state:
        training.restore(files.state, args.n_epoch, files.metrics.path if ranks.first else None, files.last)
    net, classifier = data_parallel(backbone, ranks), data_parallel(head, ranks)
    with resumable(files.last):
        for epoch in range(training.n_done, args.n_epoch):
            epoch_began = time.time()
            loss, train_accuracy = train_one_epoch(
                net,
                classifier,
                optimizer,
                train_images,
                base.train_sizes,
                base.labels,
                args.img_size,
                augmentation,
                args.batch_size,
                epoch,
                args.seed,
                device,
                precision,
                args.quiet,
                ranks,
            )
            copy_rank_0([backbone], ranks)
            z_val = embed(backbone, val.images, device, precision, ranks=ranks)
            val_scores = score_heads(z_val, data.val_episodes)
            val_accuracy, _ = mean_and_ci95(val_scores.accuracy)
            training.n_done = epoch + 1
            if ranks.first:
                training.keep_best(files.best, "transferLearning", val_accuracy, epoch, base.class_names, vars(args))
                log_epoch(files.metrics, epoch, loss, train_accuracy, val_scores, training.best, epoch_began)
                training.save(files.last, vars(args), data.made_from, began)

    # Novel test of the best model.
    with rank_0_first(ranks):
        if args.n_epoch:
            load_state(backbone, load_checkpoint(files.best).backbone_state, files.best)
    z_novel = embed(backbone, novel.images, device, precision, bar="" if args.quiet else "embed novel", ranks=ranks)
    scores = score_heads(z_novel, data.novel_episodes, bar="" if args.quiet else "novel episodes")
    if ranks.first:
        save_result(files.table, "transferLearning", vars(args), novel, data.novel_episodes, scores, began, device)
    print(f"checkpoint {files.best if args.n_epoch else args.init_from}, result {files.table}")


if __name__ == "__main__":
    run_script(main)
