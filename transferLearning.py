"""Stage 1: train a backbone on the base classes with a softMax, cosMax or arcMax head, then test on the novel classes.

python transferLearning.py --dataset miniImagenet --method arcMax --n_shot 5      # the published protocol
python transferLearning.py --preset laptop --seed 0 1 2 --n_shot 1 5              # three trainings, two tests of each
python transferLearning.py --preset laptop                                        # under a minute on 2 CPU cores
"""

from argparse import Namespace
from functools import cache, partial

from args_parser import from_flags, run_stage, stage_files
from data.benchmarks import DataOptions, enlarged_notes, load_split
from data.episodes import EpisodeShape, check_episodes_fit, fixed_episodes, sample_episodes
from data.transforms import Augmentation, TrainingImages, training_images
from engine.distributed import copy_rank_0, data_parallel, rank_0_first
from engine.errors import UserError
from engine.files import weights_digest
from engine.run import Run
from engine.script import print_notes, run_script
from methods.base_training import TrainingFeatures, last_blocks, train_base_epoch
from methods.evaluation import EpisodeScores, evaluate_heads
from methods.features import embed
from methods.novel_finetune import HeadFit
from models import Model, build_head, n_parameters, sync_batch_norm
from persistence.checkpoints import detail_notes, initial_backbone
from persistence.feature_cache import FeatureCache
from persistence.results import save_result, training_record
from persistence.run_files import TEST_FLAGS
from persistence.training import TrainState


def train_on_base_classes(args: Namespace, run: Run) -> None:
    """Base training and the novel test, of one seed, way and shot."""
    files, ranks = stage_files("transfer", args), run.ranks
    if args.sync_bn and run.device.type != "cuda":
        raise UserError("--sync_bn is for GPUs: PyTorch has no batch norm over several processes of a CPU")

    # The backbone; images as uint8 arrays, resized by its rule, and episodes as indices into them.
    backbone, checkpoint = initial_backbone(args.backbone, args.img_size, args.weights, args.init_from, run)
    load = partial(load_split, from_flags(DataOptions, args).for_network(backbone.eval_resize))
    shape = EpisodeShape(args.test_n_way, args.n_shot, args.n_query)
    n_test = args.testing_epochs * args.n_episodes
    files.announce(f"{args.n_epoch} epochs, then {n_test} test episodes", run.quiet)
    with rank_0_first(ranks):
        files.find_state(TEST_FLAGS, ranks)
        base, val, novel = load(args.dataset, "base"), load(args.dataset, "val"), load(args.novel_dataset, "novel")
        tested = [val, novel] if args.n_epoch else [novel]
        check_episodes_fit(tested, shape, args.strict_classes)
        val_episodes = sample_episodes(tested[0], shape, args.val_episodes, args.seed)
        novel_episodes = fixed_episodes(args.episodes_file, novel, shape, n_test, args.seed)
    if (n_class := len(base.class_names)) < 2 and args.n_epoch:
        raise UserError(f"the base split of {base.benchmark!r} has 1 class: training needs at least 2, so add classes")

    head = build_head(args.method, backbone.feature_dim, n_class, args.s, args.m, run.generator("base head"))
    if args.sync_bn and ranks.n > 1:
        backbone = sync_batch_norm(backbone)
    model = Model(backbone, head.to(run.device), args.lr)
    augmentation = Augmentation(crop_scale=tuple(args.crop_scale), flip=not args.no_flip) if args.data_aug else None
    images: TrainingImages | TrainingFeatures = training_images(base, augmentation, run.device, backbone.normalisation)
    size = f"{n_parameters(backbone):,} parameters, {backbone.feature_dim} features at {args.img_size} px"
    print(f"{args.backbone}: {size}")
    print(base.summary, f"{run.device}, {args.precision}", sep="; ")
    print_notes(enlarged_notes(base) + detail_notes(checkpoint, base))
    net = last_blocks(backbone, args.train_blocks)

    # Base training; the model of the best validation accuracy is kept. A frozen backbone embeds once.
    fit, training = from_flags(HeadFit, args), TrainState(files, model, base, run, bool(args.init_from))

    def validate() -> EpisodeScores:
        return evaluate_heads(embed(backbone, val.images, run), val_episodes, fit, run)

    with training.begin(val, args.n_epoch):
        model.net, model.classifier = data_parallel(net, ranks), data_parallel(head, ranks)
        if args.train_blocks == 0:
            images = TrainingFeatures(FeatureCache(args.cache_dir, run).features(backbone, base), base.labels)
        validated = cache(validate) if args.train_blocks == 0 else validate
        for epoch in training.epochs(args.n_epoch, validated):
            loss, accuracy = train_base_epoch(model, images, args.batch_size, epoch, run, args.n_epoch - epoch)
            copy_rank_0([backbone], ranks)
            training.end_epoch(epoch, loss, accuracy, validated())

    # Novel test of the best model.
    checkpoint = training.load_best() or checkpoint
    path = files.best if args.n_epoch else args.init_from or args.weights
    features = FeatureCache(args.cache_dir, run).features(backbone, novel)
    scores = evaluate_heads(features, novel_episodes, fit, run, bar="novel episodes")
    trained = training_record(path, checkpoint, weights_digest(backbone))
    save_result(files, novel, novel_episodes, scores, run, trained)


def main() -> None:
    run_stage("transfer", train_on_base_classes)


if __name__ == "__main__":
    run_script(main, "--batch_size, --img_size or --train_blocks")
