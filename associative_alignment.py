"""Stage 3: for every novel episode find the related base classes, then align the backbone with them.

python associative_alignment.py --dataset miniImagenet --method arcMax --n_shot 5      # the published protocol
python associative_alignment.py --preset laptop                                        # after stage 1's laptop preset
"""

import time
from functools import partial

import torch
from tqdm import tqdm

from args_parser import args_parser, data_options
from data.benchmarks import load_split
from data.episodes import class_major_labels, fixed_episodes
from engine.distributed import gather_objects, join_ranks, rank_0_first
from engine.errors import UserError
from engine.files import save_atomically
from engine.metrics import open_metrics
from engine.records import write_json
from engine.run import on_device, start
from engine.script import run_script
from methods.alignment import AlignmentSetting, align_episode, blocks_to_update, network_input, stored_input
from methods.evaluation import EpisodeScores, cached_activations, cached_features, mean_and_ci95
from persistence.checkpoints import best_model_path, check_base_classes, load_backbone
from persistence.files import LENGTH_FLAGS, AlignedEpisodes, begin, find_state, resumable, weights_digest
from persistence.results import accuracy_record, curve_record, paired_difference, percent, result_path, run_record
from persistence.saved_episode import Source, first_draw, gather_episode

SAVE_EVERY = 5  # episodes


def main() -> None:
    ranks = join_ranks()
    args = args_parser("alignment")
    args.quiet |= not ranks.first
    began = time.time()
    device, precision = start(args.device, args.precision, args.no_keep_memory, ranks)

    own = best_model_path(args.checkpoint_dir, args.test_n_way, args.n_shot, args.dataset, args.method, args.backbone)
    path = args.init_from or own
    name = args.alignment + ("_tuned" if args.align_preset == "tuned" else "")
    table = result_path(args.results_dir, "associative_alignment", own, args.dataset, args.novel_dataset, name)
    last = args.results_dir / "logs" / f"{table.stem}_last.tar"
    metrics = open_metrics(args.results_dir / "logs" / table.stem, args.tensorboard)
    episode_file = args.results_dir / "episodes" / f"{table.stem}.pt"
    n_test = args.testing_epochs * args.n_episodes
    if args.save_episode >= n_test:
        raise UserError(f"--save_episode {args.save_episode}, but the {n_test} episodes are numbered from 0: give less")
    protocol = (args.test_n_way, args.n_shot, args.n_query)
    with rank_0_first(ranks):
        state = find_state(last, None, table, vars(args), LENGTH_FLAGS, args.resume, args.overwrite)
        load = partial(load_split, **data_options(args))
        base, novel = load(dataset=args.dataset, split="base"), load(dataset=args.novel_dataset, split=args.test_split)
        episodes = fixed_episodes(args.episodes_file, novel, *protocol, n_test, args.seed)
    backbone, checkpoint = load_backbone(path, args.backbone, args.img_size)
    check_base_classes(path, checkpoint, args.dataset, base.class_names)
    backbone = backbone.to(device, memory_format=torch.channels_last)

    # Features of the checkpoint's backbone, once for all episodes; and what enters the blocks to be updated.
    cached = {"cache_dir": args.cache_dir, "device": device, "precision": precision, "quiet": args.quiet}
    z_base, z_novel = (cached_features(backbone, split, **cached, ranks=ranks) for split in (base, novel))
    base_members = [torch.nonzero(base.labels == b).squeeze(1) for b in range(len(base.class_names))]
    below, updated = blocks_to_update(backbone, args.align_blocks)
    if below is None:
        base_input, novel_input = (
            partial(network_input, on_device(split.images, device), device=device) for split in (base, novel)
        )
    else:
        with rank_0_first(ranks):
            base_input, novel_input = (
                partial(stored_input, on_device(cached_activations(below, split, **cached), device), device=device)
                for split in (base, novel)
            )
    novel_source, base_source = Source(novel, z_novel, novel_input), Source(base, z_base, base_input)
    setting = AlignmentSetting(**{name: getattr(args, name) for name in AlignmentSetting.__dataclass_fields__})
    per_class = len(base.class_names) // args.test_n_way
    if args.n_B > per_class:
        print(
            f"note: {args.test_n_way} ways x n_B {args.n_B} exceed the {len(base.class_names)} base classes: "
            f"{per_class} related base classes a novel class"
        )

    y_support = class_major_labels(args.test_n_way, args.n_shot)
    initial_state = {name: value.clone() for name, value in updated.state_dict().items()}
    done = AlignedEpisodes(precision)
    made_from = {
        "weights": weights_digest(backbone),
        "base images": base.fingerprint,
        "novel images": novel.fingerprint,
    }
    began -= begin(state, made_from, last)
    if state:
        done.restore(state, n_test, last)
        if ranks.first:
            metrics.keep([done.metrics_row(i) for i in range(len(done.rows))])
        if args.save_episode < len(done.rows) and not episode_file.is_file():
            print(f"note: episode {args.save_episode} is done and was not saved: only --overwrite runs it again")
    save = partial(done.save, last, vars(args), made_from, began) if ranks.first else None
    bar = tqdm(
        total=n_test, initial=len(done.rows), desc=f"{args.alignment} alignment", unit="episode", disable=args.quiet
    )
    with resumable(last, save), bar:
        while (first := len(done.rows)) < n_test:
            notes, to_hand_over = [], []
            # Each rank aligns consecutive episodes; those of the first rank come next, and may be saved at any time.
            for i in ranks.share(range(first, min(first + ranks.n * SAVE_EVERY, n_test))):
                episode = align_episode(
                    updated,
                    initial_state,
                    setting,
                    episodes.support[i].flatten(),
                    y_support,
                    episodes.query[i].flatten(),
                    z_novel,
                    novel_input,
                    z_base,
                    base.labels,
                    base_members,
                    base_input,
                    args.seed,
                    i,
                    device,
                    precision,
                )
                done.add(episode)
                if i == args.save_episode:
                    drawn, sources = first_draw(episode, args.seed, i), (novel_source, base_source)
                    drawing = gather_episode(episodes, i, episode, drawn, *sources, updated, precision)
                    if ranks.first:
                        save_atomically(episode_file, drawing)
                    else:
                        to_hand_over.append(drawing)
                empty = [w for w, samples in enumerate(episode.related.samples) if not len(samples)]
                for w in empty if args.alignment != "none" else []:
                    name = novel.class_names[episodes.classes[i, w]]
                    notes.append(
                        f"note: episode {i}: no base image is predicted as {name!r}; it is aligned with nothing"
                    )
                bar.set_postfix_str("fine-tuning {:.2f}, alignment {:.2f}".format(*done.means()))
                bar.update()
            parts = zip(*gather_objects((done.rows[first:], notes, to_hand_over), ranks), strict=True)
            done.rows[first:], notes, handed_over = (sum(part, []) for part in parts)
            bar.update(len(done.rows) - bar.n)
            for note in notes:
                tqdm.write(note)
            if ranks.first:
                for i in range(first, len(done.rows)):
                    metrics.write(i, done.metrics_row(i))
                for drawing in handed_over:
                    save_atomically(episode_file, drawing)
                save()
        if save:
            save()
    if not ranks.first:
        return

    columns = done.tensors()
    n_small = int((columns["n_drawn"] < args.aug_size).sum())
    if n_small and args.alignment != "none":
        print(
            f"note: in {n_small} of {n_test} episodes the smallest related set held fewer than "
            f"--aug_size {args.aug_size} images; so many were drawn of each class"
        )
    before, after = EpisodeScores(columns["finetuned"]), EpisodeScores(columns["aligned"])
    difference, difference_ci95 = paired_difference(before.accuracy, after.accuracy)
    record = run_record("associative_alignment", vars(args), novel, episodes, time.time() - began, device)
    record |= accuracy_record(after, episodes, novel.class_names)
    record |= {
        "alignment": args.alignment,
        "checkpoint": path,
        "checkpoint_epoch": checkpoint.epoch,
        "fine_tuning": accuracy_record(before, episodes, novel.class_names),
        "difference": {"accuracy": 100 * difference, "ci95": 100 * difference_ci95},
        "curve": curve_record(columns["curve"], args.record_curve),
        "n_empty_related_sets": int(columns["n_empty"].sum()),
        "n_episodes_below_aug_size": n_small,
    }
    write_json(table, record)
    print(
        f"{args.method} on {novel.benchmark}, {args.test_n_way}-way {args.n_shot}-shot, {n_test} {novel.split} episodes"
    )
    print(f"  fine-tuning         {percent(*mean_and_ci95(before.accuracy))} %")
    print(f"  {args.alignment} alignment  {percent(*mean_and_ci95(after.accuracy))} %")
    print(f"  paired difference   {percent(difference, difference_ci95)} points")
    print(f"result {table}")


if __name__ == "__main__":
    run_script(main)
