"""Stage 2: train a backbone on base episodes with ProtoNet, MatchingNet or RelationNet, then test on the novel classes.

python metaLearning.py --dataset miniImagenet --method ProtoNet --n_shot 5      # 5-way episodes of 16 queries a class
python metaLearning.py --method ProtoNet --init_from results/models/5way_5shot_miniImagenet_arcMax_Conv4_bestModel.tar
python metaLearning.py --preset laptop                                          # about a minute on 2 CPU cores
"""

import time
from functools import partial

import torch

from args_parser import args_parser, data_options
from data.benchmarks import load_split
from data.episodes import check_episodes_fit, sample_episodes
from data.transforms import Augmentation
from engine.distributed import copy_rank_0, join_ranks, rank_0_first
from engine.generators import seeded
from engine.run import n_parameters, on_device, start
from engine.script import run_script
from methods.episodic_training import evaluate_meta_learner, train_one_epoch
from methods.evaluation import embed, mean_and_ci95
from methods.meta_learners import build_meta_learner
from persistence.checkpoints import initial_backbone, load_checkpoint, load_state
from persistence.files import Training, begin, resumable
from persistence.results import log_epoch, save_result
from persistence.training import load_data, open_run


def main() -> None:
    ranks = join_ranks()
    args = args_parser("meta")
    args.quiet |= not ranks.first
    began = time.time()
    device, precision = start(args.device, args.precision, args.no_keep_memory, ranks)

    files = open_run("metaLearning", args, ranks)
    data = load_data(args, partial(load_split, **data_options(args)), ranks)
    base, val, novel = data.base, data.val, data.novel
    train_protocol = (args.train_n_way, args.n_shot, args.train_n_query)
    if args.n_epoch:
        check_episodes_fit(base, *train_protocol)

    # Model: the backbone, and the meta-learner's own module, which a checkpoint of the same method brings as well.
    relation = args.method.startswith("RelationNet")
    backbone, checkpoint = initial_backbone(
        args.init_from, args.backbone, args.img_size, args.seed, device, relation, args.weights
    )
    with seeded(args.seed, "meta-learner"):
        learner = build_meta_learner(args.method, backbone).to(device)
    if checkpoint and checkpoint.method == args.method:
        load_state(learner, checkpoint.head_state, args.init_from)
    elif not args.n_epoch and n_parameters(learner):
        print(f"note: the module of {args.method} is tested untrained: only a {args.method} checkpoint brings it")
    optimizer = torch.optim.Adam([*backbone.parameters(), *learner.parameters()], lr=args.lr)
    augmentation = Augmentation(crop_scale=tuple(args.crop_scale), flip=not args.no_flip) if args.data_aug else None
    train_images = on_device(base.train_images if augmentation else base.images, device)
    print(
        f"{args.backbone}: {n_parameters(backbone):,} parameters; {args.method}: {n_parameters(learner):,} of its own, "
        f"on {'x'.join(map(str, backbone.map_shape)) if relation else backbone.feature_dim} features "
        f"at {args.img_size} px"
    )
    print(
        f"{args.dataset}: {len(base.class_names)} base classes of {len(base.labels)} images; {device}, {args.precision}"
    )

    # Episodic training; the model of the best validation accuracy is kept.
    training = Training(backbone, learner, optimizer, precision)
    if args.n_epoch:
        began -= begin(files.state, data.made_from, files.last)
    if files.state:
        training.restore(files.state, args.n_epoch, files.metrics.path if ranks.first else None, files.last)
    with resumable(files.last):
        for epoch in range(training.n_done, args.n_epoch):
            epoch_began = time.time()
            if ranks.first:  # an episode is one batch, which is not shared out
                loss, train_accuracy = train_one_epoch(
                    backbone,
                    learner,
                    optimizer,
                    train_images,
                    base.train_sizes,
                    sample_episodes(
                        base, *train_protocol, args.episodes_per_epoch, args.seed, start=epoch * args.episodes_per_epoch
                    ),
                    args.img_size,
                    augmentation,
                    epoch,
                    args.seed,
                    device,
                    precision,
                    args.quiet,
                )
            copy_rank_0([backbone, learner], ranks)
            z_val = embed(backbone, val.images, device, precision, maps=relation, ranks=ranks)
            val_scores = evaluate_meta_learner(learner, z_val, data.val_episodes, ranks=ranks)
            val_accuracy, _ = mean_and_ci95(val_scores.accuracy)
            training.n_done = epoch + 1
            if ranks.first:
                training.keep_best(files.best, "metaLearning", val_accuracy, epoch, base.class_names, vars(args))
                log_epoch(files.metrics, epoch, loss, train_accuracy, val_scores, training.best, epoch_began)
                training.save(files.last, vars(args), data.made_from, began)

    # Novel test of the best model.
    with rank_0_first(ranks):
        if args.n_epoch:
            checkpoint = load_checkpoint(files.best)
            load_state(backbone, checkpoint.backbone_state, files.best)
            load_state(learner, checkpoint.head_state, files.best)
    bars = ("", "") if args.quiet else ("embed novel", "novel episodes")
    z_novel = embed(backbone, novel.images, device, precision, bar=bars[0], maps=relation, ranks=ranks)
    scores = evaluate_meta_learner(learner, z_novel, data.novel_episodes, bar=bars[1], ranks=ranks)
    if ranks.first:
        save_result(files.table, "metaLearning", vars(args), novel, data.novel_episodes, scores, began, device)
    print(f"checkpoint {files.best if args.n_epoch else args.init_from}, result {files.table}")


if __name__ == "__main__":
    run_script(main)
