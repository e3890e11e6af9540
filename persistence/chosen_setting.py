"""What --align_preset auto chose by: a table beside the checkpoint, under a hash of all that it follows from."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from data.benchmarks import Split
from data.episodes import EpisodeShape, sample_episodes
from engine.distributed import gather_objects
from engine.errors import UserError
from engine.files import matches_schema, read_json, weights_digest
from engine.records import provenance, write_json
from engine.run import Run
from methods.alignment import AlignmentSetting
from methods.feature_alignment import ALIGN_VERSION
from methods.features import EMBED_VERSION, Source, trainable_blocks
from methods.novel_finetune import FIT_VERSION
from methods.setting_choice import (
    FINE_TUNING,
    N_EPISODES,
    SettingGain,
    candidates,
    compare_settings,
    flags_text,
    winner,
)
from models.backbone import Backbone
from persistence.feature_cache import FeatureCache

N_QUERY = 15  # queries a class of the val episodes that a setting is chosen on where there is no protocol


class Choice(NamedTuple):
    """What was chosen, what a result records of it, its flags and the table they were chosen by, and what to say."""

    setting: AlignmentSetting
    record: dict[str, Any]
    lines: list[str]


def choose_and_keep(
    stem: Path,
    backbone: Backbone,
    val: Split,
    base: Source,
    cache: FeatureCache,
    shape: EpisodeShape,
    setting: AlignmentSetting,
) -> Choice:
    """The setting chosen on val episodes of this shape; fine-tuning when val is too small for them.

    stem: a path, such as that of the checkpoint, beside which the table is kept, and read when it is there.
    """
    run, settings = cache.run, candidates(setting)
    try:
        episodes = sample_episodes(val, shape, N_EPISODES, run.seed)
    except UserError as error:
        return no_choice(setting, error)
    # Another weight, image, base class, protocol, candidate or version of the code, another name.
    splits = (val.fingerprint, base.split.fingerprint, tuple(base.split.class_names))
    facts = (*splits, shape, run.seed, run.precision.name, N_EPISODES, EMBED_VERSION, FIT_VERSION, ALIGN_VERSION)
    asked = {flags: replace(each, record_curve=0) for flags, each in settings.items()}
    path = stem.with_name(f"{stem.stem}_auto_{weights_digest(backbone, *facts, asked)}.json")
    rows = read_rows(path, list(settings))
    if not all(gather_objects(rows is not None, run.ranks)) or rows is None:
        source = cache.source(backbone, trainable_blocks(backbone, 0), val)
        rows = compare_settings(source, base, episodes, settings, run)
        if run.ranks.first:
            write_json(path, {"n_episodes": N_EPISODES, "chosen": winner(rows), "rows": [asdict(row) for row in rows]})
    flags = winner(rows)
    task = f"{shape.n_way}-way {shape.n_shot}-shot, {N_EPISODES} val episodes"
    lines = [f"--align_preset auto, {task}: accuracy, and gain over fine-tuning"]
    lines += [f"  {row.flags:<80} {row.accuracy:6.2f} %  {row.gain:+.2f} ± {row.gain_ci95:.2f}" for row in rows]
    lines += [f"chosen: {command(flags, setting, run)}", f"table {path}"]
    return Choice(settings[flags], {"flags": flags, "table": path}, lines)


def choose_for_support(
    load_val: Callable[[], Split],
    backbone: Backbone,
    base: Source,
    cache: FeatureCache,
    n_support: Sequence[int],
    setting: AlignmentSetting,
) -> Choice:
    """The setting chosen for images of no benchmark, of which n_support are labelled in each class.

    It is chosen on val episodes of as many classes, and of the mean number of support images; the table is kept in the
    cache's folder. Fine-tuning when there are no val classes, or too few.
    """
    try:
        val = load_val()
    except UserError as error:
        return no_choice(setting, error)
    shape = EpisodeShape(len(n_support), round(sum(n_support) / len(n_support)), N_QUERY)
    return choose_and_keep(cache.folder / "predict", backbone, val, base, cache, shape, setting)


def no_choice(setting: AlignmentSetting, error: UserError) -> Choice:
    """Fine-tuning, because of an error that a choice has met."""
    flags = flags_text(FINE_TUNING)
    line = f"note: --align_preset auto cannot choose on val, so it is fine-tuning: {error}"
    return Choice(candidates(setting)[flags], {"flags": flags, "table": None}, [line])


def command(flags: str, setting: AlignmentSetting, run: Run) -> str:
    """The command of this process with these flags in place of --align_preset auto; in a notebook, the flags alone."""
    given = str(provenance({}, run)["command"])
    aug_size = "" if "--aug_size" in given else f" --aug_size {setting.related.aug_size}"
    chosen = f"--align_blocks 0{aug_size} {flags}"
    by_flags, n = re.subn("--align_preset[ =]auto", chosen, given)
    return by_flags if n else chosen


def read_rows(path: Path, flags: list[str]) -> list[SettingGain] | None:
    """The rows of a kept table, one for each of these flags in order; None when it is not there or damaged."""
    try:
        record = read_json(path)
        rows = (
            [SettingGain(**row) for row in record["rows"]]
            if matches_schema(record, {"rows": [get_type_hints(SettingGain)]})
            else []
        )
    except (OSError, ValueError, TypeError):
        return None
    return rows if [row.flags for row in rows] == flags else None
