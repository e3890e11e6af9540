"""What --align_preset auto chose by: a table beside the checkpoint, under a hash of all that it follows from."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from data.benchmarks import Split
from data.episodes import EpisodeShape, sample_episodes
from engine.distributed import gather_objects
from engine.errors import UserError
from engine.files import matches_schema, read_json, weights_digest
from engine.records import write_json
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


class Choice(NamedTuple):
    """What was chosen, its flags and the table that they were chosen by, as a result records them, and what to say."""

    setting: AlignmentSetting
    record: dict[str, Any]
    lines: list[str]


def choose_and_keep(
    stem: Path,
    backbone: Backbone,
    load_val: Callable[[], Split],
    base: Source,
    cache: FeatureCache,
    shape: EpisodeShape,
    setting: AlignmentSetting,
) -> Choice:
    """The setting chosen on val episodes of this shape; fine-tuning when there is no val split, or too small a one.

    stem: a path, such as that of the checkpoint, beside which the table is kept, and read when it is there.
    """
    run, settings = cache.run, candidates(setting)
    try:
        val = load_val()
        episodes = sample_episodes(val, shape, N_EPISODES, run.seed)
    except UserError as error:
        flags = flags_text(FINE_TUNING)
        line = f"note: --align_preset auto cannot choose on val, so it is fine-tuning: {error}"
        return Choice(settings[flags], {"flags": flags, "table": None}, [line])
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
    lines += [f"chosen: --align_blocks 0 --aug_size {setting.related.aug_size} {flags}", f"table {path}"]
    return Choice(settings[flags], {"flags": flags, "table": path}, lines)


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
