"""Stage 3: for every novel episode find the related base classes, then align the backbone with them.

python associative_alignment.py --dataset miniImagenet --method arcMax --n_shot 5      # the published protocol
python associative_alignment.py --preset laptop --n_shot 1 5 20                        # the first names the checkpoint
python associative_alignment.py --preset laptop --align_preset auto                    # chosen on val, after stage 1's
"""

from argparse import Namespace
from functools import partial

import torch

from args_parser import from_flags, run_stage
from data.benchmarks import DataOptions, enlarged_notes, list_split, load_split
from data.episodes import EpisodeShape, check_episodes_fit, fixed_episodes
from engine.distributed import rank_0_first
from engine.errors import UserError
from engine.files import weights_digest
from engine.run import Run
from engine.script import print_notes, run_script
from methods.alignment import AlignmentSetting
from methods.feature_alignment import align_episodes, episodes_per_chunk
from methods.features import trainable_blocks
from methods.related_base import exceeding_notes
from persistence.aligned_episodes import AlignedEpisodes
from persistence.checkpoints import check_base_classes, detail_notes, load_backbone
from persistence.chosen_setting import choose_setting
from persistence.feature_cache import FeatureCache
from persistence.results import save_alignment_result, training_record
from persistence.run_files import LENGTH_FLAGS, Folders, RunName, alignment_files
from persistence.saved_episode import gather_episode

SAVE_EVERY = 8  # episodes


def align_novel_episodes(args: Namespace, run: Run) -> None:
    """Alignment of every novel episode, of one seed, way and shot."""
    ranks, is_auto = run.ranks, args.align_preset == "auto"
    variant = {"paper": args.alignment, "tuned": f"{args.alignment}_tuned", "auto": "auto"}[args.align_preset]
    files = alignment_files(from_flags(RunName, args), variant, from_flags(Folders, args), vars(args))
    n_test = args.testing_epochs * args.n_episodes
    files.announce(f"{args.align_iters} iterations on each of {n_test} {args.test_split} episodes", run.quiet)
    if (most := max([i for i in args.save_episode if isinstance(i, int)], default=0)) >= n_test:
        raise UserError(f"--save_episode {most}, but the {n_test} episodes are numbered from 0: give less")

    # The backbone of stage 1 or 2; images as uint8 arrays, made as it takes them, and episodes as indices into them.
    path, shape = args.init_from or files.trained(), EpisodeShape(args.test_n_way, args.n_shot, args.n_query)
    with rank_0_first(ranks):
        files.find_state(LENGTH_FLAGS, ranks)
        list_split(from_flags(DataOptions, args), args.dataset, "base")  # if they are missing, that is said first
        backbone, checkpoint = load_backbone(path, args.backbone, args.img_size)
        load = partial(load_split, from_flags(DataOptions, args).for_network(backbone.eval_resize))
        base, novel = load(args.dataset, "base"), load(args.novel_dataset, args.test_split)
        splits = [base, novel, *([load(args.novel_dataset, "val")] if is_auto else [])]
        check_episodes_fit(splits[1:], shape, args.strict_classes)
        episodes = fixed_episodes(args.episodes_file, novel, shape, n_test, args.seed)

    # The blocks that alignment updates, and both splits as those take them.
    check_base_classes(path, checkpoint, args.dataset, base.class_names)
    backbone = backbone.to(run.device).to(memory_format=torch.channels_last)
    cache, setting, chosen = FeatureCache(args.cache_dir, run), from_flags(AlignmentSetting, args), None
    align_blocks = args.align_blocks
    names = ("base images", "novel images", "val images")
    images = {name: split.fingerprint for name, split in zip(names, splits, strict=False)}
    if is_auto:
        base_source = cache.source(backbone, trainable_blocks(backbone, 0), base)
        choice = choose_setting(backbone, splits[2], base_source, cache, shape, setting, align_blocks is None)
        setting, align_blocks, chosen, lines = choice
        print("\n".join(lines))
    blocks = trainable_blocks(backbone, align_blocks)
    base_source, novel_source = (cache.source(backbone, blocks, split) for split in (base, novel))
    notes = [*enlarged_notes(novel), *detail_notes(checkpoint, novel)]
    print_notes(notes + exceeding_notes(args.test_n_way, setting.related.n_B, len(base.class_names)))

    # Every episode: fit a head, find the related base classes, align. A rank takes consecutive ones.
    files.begin({"weights": weights_digest(backbone)} | images)
    done = AlignedEpisodes(files, run, episodes, novel.class_names, setting)
    step = SAVE_EVERY
    if blocks.in_feature_space:
        step = episodes_per_chunk(backbone.feature_dim, shape.n_way, setting, run.device)
    with files.resumable(), done.bar:
        while (first := len(done)) < n_test:
            mine = ranks.share(range(first, min(first + ranks.n * step, n_test)))
            for i, episode in align_episodes(blocks, episodes, novel_source, base_source, setting, run, mine):
                done.add(i, episode)
            done.exchange(first)
            done.save()
        done.save()
        for i in done.to_draw(args.save_episode):  # again, now that it is known how each stands among all
            ((_, episode),) = align_episodes(blocks, episodes, novel_source, base_source, setting, run, range(i, i + 1))
            done.drawings[i] = gather_episode(episodes, i, episode, novel_source, base_source, blocks, setting, run)
        done.save_drawings()
    if ranks.first:
        trained = training_record(path, checkpoint, files.made_from["weights"])
        save_alignment_result(done, novel_source, base_source, trained, chosen)


def main() -> None:
    run_stage("alignment", align_novel_episodes)


if __name__ == "__main__":
    run_script(main, "--aug_size, --align_blocks, --critic_hidden or --img_size")
