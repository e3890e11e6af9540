"""What --align_preset auto chose by: a table beside the checkpoint, under a hash of all that it follows from."""

import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data.benchmarks import Split
from data.episodes import EpisodeShape, sample_episodes
from engine.distributed import gather_objects
from engine.errors import UserError
from engine.files import read_json, weights_digest
from engine.records import provenance, write_json
from engine.run import Run
from methods.alignment import AlignmentSetting
from methods.features import FeatureCache, Source, blocks_to_update
from methods.setting_choice import FINE_TUNING, N_EPISODES, Row, candidates, choose_setting, flags_text, winner
from models.backbone import Backbone


def choose_and_keep(
    checkpoint: Path,
    backbone: Backbone,
    val: Split,
    base: Source,
    cache: FeatureCache,
    shape: EpisodeShape,
    setting: AlignmentSetting,
) -> tuple[AlignmentSetting, dict[str, Any]]:
    """The setting chosen on val episodes of this shape, and its record: its flags, and the table they were chosen by.

    The table is kept beside the checkpoint and read when it is there. Fine-tuning, and a line, when val is too small.
    """
    run, settings = cache.run, candidates(setting)
    try:
        episodes = sample_episodes(val, shape, N_EPISODES, run.seed)
    except UserError as error:
        print(f"note: --align_preset auto cannot choose on val, so it is fine-tuning: {error}")
        flags = flags_text(FINE_TUNING)
        return settings[flags], {"flags": flags, "table": None}
    path = kept_path(checkpoint, backbone, val, base, shape, setting, run)
    rows = read_rows(path, list(settings))
    if not all(gather_objects(rows is not None, run.ranks)) or rows is None:
        source = cache.source(backbone, blocks_to_update(backbone, 0), val)
        rows, _ = choose_setting(source, base, episodes, settings, run)
        if run.ranks.first:
            write_json(path, {"n_episodes": N_EPISODES, "chosen": winner(rows), "rows": [asdict(row) for row in rows]})
    flags = winner(rows)
    task = f"{shape.n_way}-way {shape.n_shot}-shot, {N_EPISODES} val episodes"
    print(f"--align_preset auto, {task}: accuracy, and gain over fine-tuning")
    for row in rows:
        print(f"  {row.flags:<80} {row.accuracy:6.2f} %  {row.gain:+.2f} ± {row.gain_ci95:.2f}")
    print(f"chosen: {command(flags, setting, run)}\ntable {path}")
    return settings[flags], {"flags": flags, "table": path}


def command(flags: str, setting: AlignmentSetting, run: Run) -> str:
    """The command of this process with the flags of the chosen setting in place of --align_preset auto."""
    given = str(provenance({}, run)["command"])
    aug_size = "" if "--aug_size" in given else f" --aug_size {setting.related.aug_size}"
    return re.sub("--align_preset[ =]auto", f"--align_blocks 0{aug_size} {flags}", given)


def kept_path(
    checkpoint: Path,
    backbone: Backbone,
    val: Split,
    base: Source,
    shape: EpisodeShape,
    setting: AlignmentSetting,
    run: Run,
) -> Path:
    """Where the table is kept: another weight, image, protocol or candidate, another name."""
    facts = (val.fingerprint, base.split.fingerprint, shape, run.seed, run.precision.name, N_EPISODES)
    settings = {flags: replace(each, record_curve=0) for flags, each in candidates(setting).items()}
    return checkpoint.with_name(f"{checkpoint.stem}_auto_{weights_digest(backbone, *facts, settings)}.json")


def read_rows(path: Path, flags: list[str]) -> list[Row] | None:
    """The rows of a kept table, one for each of these flags in order; None when it is not there or damaged."""
    try:
        rows = [Row(**row) for row in read_json(path)["rows"]]
        numbers = [value for row in rows for value in (row.accuracy, row.gain, row.gain_ci95)]
        return rows if [row.flags for row in rows] == flags and all(map(math.isfinite, numbers)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
