"""Stage 1: train a backbone on the base classes with a softMax, cosMax or arcMax head, then test on the novel classes.

python transferLearning.py --dataset miniImagenet --method arcMax --n_shot 5      # the published protocol
python transferLearning.py --preset laptop                                        # about 3 minutes on 2 CPU cores
"""

import time
from functools import partial

import torch

from args_parser import args_parser
from data.benchmarks import load_split
from data.episodes import fixed_episodes, sample_episodes
from data.errors import UserError
from data.generators import make_generator
from data.transforms import Augmentation
from methods.base_training import train_one_epoch
from methods.checkpoints import Checkpoint, best_model_path, create_backbone, load_backbone, save_checkpoint
from methods.engine import append_jsonl, n_parameters, on_device, run_script, start, write_json
from methods.evaluation import embed, evaluate_heads, mean_and_ci95
from methods.results import accuracy_record, percent, run_record
from models import build_head


def main() -> None:
    args = args_parser("transfer")
    began = time.time()
    device, precision = start(args.device, args.precision, args.no_keep_memory)

    # Data: uint8 arrays; episodes are indices into them, the same ones after every epoch.
    load = partial(
        load_split,
        args.benchmarks_dir,
        args.dataset,
        img_size=args.img_size,
        cache_dir=args.cache_dir,
        image_root=args.image_root,
        num_workers=args.num_workers,
        quiet=args.quiet,
    )
    base, val, novel = load(split="base"), load(split="val"), load(split="novel")
    n_base_class = len(base.class_names)
    if args.n_base_class not in (None, n_base_class):
        raise UserError(
            f"--n_base_class {args.n_base_class}, but {args.dataset!r} has {n_base_class} base classes: drop it"
        )
    protocol = (args.test_n_way, args.n_shot, args.n_query)
    val_episodes = sample_episodes(val, *protocol, args.val_episodes, args.seed)
    n_test = args.testing_epochs * args.n_episodes
    novel_episodes = fixed_episodes(args.episodes_file, novel, *protocol, n_test, args.seed)

    # Model.
    if args.init_from:
        backbone = load_backbone(args.init_from, args.backbone, args.img_size)[0]
    else:
        backbone = create_backbone(args.backbone, args.img_size, args.seed)
    backbone = backbone.to(device, memory_format=torch.channels_last)
    head_generator = make_generator(args.seed, "base head")
    head = build_head(args.method, backbone.feature_dim, n_base_class, args.s, args.m, [head_generator]).to(device)
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=args.lr)
    augmentation = Augmentation(crop_scale=tuple(args.crop_scale), flip=not args.no_flip) if args.data_aug else None
    train_images = on_device(base.train_images if augmentation else base.images, device)
    print(
        f"{args.backbone}: {n_parameters(backbone):,} parameters, {backbone.feature_dim} features at {args.img_size} px"
    )
    print(f"{args.dataset}: {n_base_class} base classes of {len(base.labels)} images; {device}, {args.precision}")

    # Base training; the model of the best validation accuracy is kept.
    path = best_model_path(args.checkpoint_dir, args.test_n_way, args.n_shot, args.dataset, args.method, args.backbone)
    metrics = args.results_dir / "logs" / path.stem / "metrics.jsonl"
    score_heads = partial(
        evaluate_heads,
        method=args.method,
        s=args.ft_s,
        m=args.ft_m,
        n_steps=args.ft_n_epoch,
        lr=args.ft_lr,
        seed=args.seed,
    )
    metrics.unlink(missing_ok=True)
    best = -1.0
    for epoch in range(args.n_epoch):
        epoch_began = time.time()
        loss, train_accuracy = train_one_epoch(
            backbone,
            head,
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
        )
        z_val = embed(backbone, val.images, device, precision)
        val_accuracy, val_ci95 = mean_and_ci95(score_heads(z_val, val_episodes).accuracy)
        if val_accuracy > best:
            best = val_accuracy
            save_checkpoint(
                path,
                Checkpoint(
                    stage="transferLearning",
                    dataset=args.dataset,
                    method=args.method,
                    backbone=args.backbone,
                    img_size=args.img_size,
                    class_names=base.class_names,
                    backbone_state=backbone.state_dict(),
                    head_state=head.state_dict(),
                    epoch=epoch,
                    val_accuracy=100 * best,
                    config=vars(args),
                ),
            )
        seconds = time.time() - epoch_began
        print(
            f"epoch {epoch:3d}  loss {loss:.3f}  base accuracy {100 * train_accuracy:.1f}  "
            f"val {percent(val_accuracy, val_ci95)}  best {100 * best:.2f}  {seconds:.1f} s"
        )
        row = {"epoch": epoch, "loss": loss, "base_accuracy": 100 * train_accuracy}
        append_jsonl(
            metrics, row | {"val_accuracy": 100 * val_accuracy, "val_ci95": 100 * val_ci95, "seconds": seconds}
        )

    # Novel test of the best model.
    if args.n_epoch:
        backbone = load_backbone(path, args.backbone, args.img_size)[0]
        backbone = backbone.to(device, memory_format=torch.channels_last)
    z_novel = embed(backbone, novel.images, device, precision, bar="" if args.quiet else "embed novel")
    scores = score_heads(z_novel, novel_episodes, bar="" if args.quiet else "novel episodes")
    record = run_record("transferLearning", vars(args), novel, novel_episodes, time.time() - began, device)
    table = args.results_dir / "tables" / f"transferLearning_{path.stem}.json"
    write_json(table, record | accuracy_record(scores, novel_episodes, novel.class_names))
    print(
        f"{args.method} on {args.dataset}, {args.test_n_way}-way {args.n_shot}-shot, {n_test} novel episodes: "
        f"{percent(*mean_and_ci95(scores.accuracy))} %"
    )
    print(f"checkpoint {path if args.n_epoch else args.init_from}, result {table}")


if __name__ == "__main__":
    run_script(main)
