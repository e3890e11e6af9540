"""Stage 2: train a backbone on base episodes with ProtoNet, MatchingNet or RelationNet, then test on the novel classes.

python metaLearning.py --dataset miniImagenet --method ProtoNet --n_shot 5      # 5-way episodes of 16 queries per class
python metaLearning.py --method ProtoNet --init_from results/models/5way_5shot_miniImagenet_arcMax_Conv4_bestModel.tar
python metaLearning.py --preset laptop                                          # under a minute on 2 CPU cores
"""

from argparse import Namespace
from functools import partial

from args_parser import from_flags, run_stage, stage_files
from data.benchmarks import DataOptions, enlarged_notes, load_split
from data.episodes import EpisodeShape, check_episodes_fit, fixed_episodes, sample_episodes
from data.transforms import Augmentation, training_images
from engine.distributed import copy_rank_0, rank_0_first
from engine.files import weights_digest
from engine.run import Run
from engine.script import print_notes, run_script
from methods.episodic_training import train_episodic_epoch
from methods.evaluation import EpisodeScores
from methods.meta_learners import META_LEARNERS, build_meta_learner
from methods.split_evaluation import evaluate_on_split
from models import Model, n_parameters
from persistence.checkpoints import detail_notes, initial_backbone, load_state
from persistence.results import save_result, training_record
from persistence.run_files import TEST_FLAGS
from persistence.training import TrainState


def train_on_episodes(args: Namespace, run: Run) -> None:
    """Episodic training and the novel test, of one seed, way and shot."""
    files, ranks = stage_files("meta", args), run.ranks

    # The backbone; images as uint8 arrays, resized by its rule, and episodes as indices into them.
    maps = META_LEARNERS[args.method][0].uses_maps
    backbone, checkpoint = initial_backbone(args.backbone, args.img_size, args.weights, args.init_from, run, maps)
    load = partial(load_split, from_flags(DataOptions, args).for_network(backbone.eval_resize))
    shape = EpisodeShape(args.test_n_way, args.n_shot, args.n_query)
    train_shape = EpisodeShape(args.train_n_way, args.n_shot, args.train_n_query)
    n_train, n_test = args.episodes_per_epoch, args.testing_epochs * args.n_episodes
    files.announce(f"{args.n_epoch} epochs of {n_train} episodes, then {n_test} test episodes", run.quiet)
    with rank_0_first(ranks):
        files.find_state(TEST_FLAGS, ranks)
        base, val, novel = load(args.dataset, "base"), load(args.dataset, "val"), load(args.novel_dataset, "novel")
        tested = [val, novel] if args.n_epoch else [novel]
        check_episodes_fit(tested, shape, args.strict_classes)
        val_episodes = sample_episodes(tested[0], shape, args.val_episodes, args.seed)
        novel_episodes = fixed_episodes(args.episodes_file, novel, shape, n_test, args.seed)
    check_episodes_fit([base] if args.n_epoch else [], train_shape, args.strict_classes)

    # The meta-learner's own module, which a checkpoint of the same method brings as well.
    with run.seeded("meta-learner"):
        learner = build_meta_learner(args.method, backbone, args.temperature).to(run.device)
    if checkpoint and checkpoint.method == args.method:
        load_state(learner, checkpoint.head_state, args.init_from)
    elif not args.n_epoch and n_parameters(learner):
        print(f"note: the module of {args.method} is tested untrained: only a {args.method} checkpoint brings it")
    model = Model(backbone, learner, args.lr)
    augmentation = Augmentation(crop_scale=tuple(args.crop_scale), flip=not args.no_flip) if args.data_aug else None
    images = training_images(base, augmentation, run.device, backbone.normalisation)
    size = "x".join(map(str, backbone.map_shape)) if maps else backbone.feature_dim
    print(f"{args.backbone}: {n_parameters(backbone):,} parameters, {size} features at {args.img_size} px")
    print(f"{args.method}: {n_parameters(learner):,} of its own; {base.summary}; {run.device}, {args.precision}")
    print_notes(enlarged_notes(base) + detail_notes(checkpoint, base))

    # Episodic training; the model of the best validation accuracy is kept.
    training, figures = TrainState(files, model, base, run, bool(args.init_from)), (0.0, 0.0)

    def validate() -> EpisodeScores:
        return evaluate_on_split(learner, backbone, val, val_episodes, run)

    with training.begin(val, args.n_epoch):
        for epoch in training.epochs(args.n_epoch, validate):
            if ranks.first:  # an episode is one batch, which is not shared out
                episodes = sample_episodes(base, train_shape, n_train, args.seed, start=epoch * n_train)
                warm_up, n_left = epoch < args.warm_up_epochs, args.n_epoch - epoch
                figures = train_episodic_epoch(model, images, episodes, epoch, run, warm_up, n_left)
            copy_rank_0([backbone, learner], ranks)
            training.end_epoch(epoch, *figures, validate())

    # Novel test of the best model.
    checkpoint = training.load_best() or checkpoint
    path = files.best if args.n_epoch else args.init_from or args.weights
    scores = evaluate_on_split(learner, backbone, novel, novel_episodes, run, bar="novel")
    trained = training_record(path, checkpoint, weights_digest(backbone))
    save_result(files, novel, novel_episodes, scores, run, trained)


def main() -> None:
    run_stage("meta", train_on_episodes)


if __name__ == "__main__":
    run_script(main, "--train_n_query, --n_query or --img_size")
