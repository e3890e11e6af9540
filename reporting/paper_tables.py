"""The tables of the paper (Afrasiyabi et al., ECCV 2020) as rows of commands, and the paper's numbers beside ours.

A row is one command of a stage and the result file that it writes; each comes after the row that writes its checkpoint.
All rows of the same novel classes, shot and seed share a file of episodes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import Schema, matches_schema, write_text
from engine.records import write_json
from methods.meta_learners import META_LEARNERS
from models import HEADS
from persistence.results import controls_of, interval
from persistence.run_files import RunName, differences
from reporting.report import stage_result
from reporting.result_table import markdown_table, mean_over_seeds

SCRIPTS = {"transfer": "transferLearning", "meta": "metaLearning", "alignment": "associative_alignment"}

Number = tuple[float, float]  # accuracy % and its 95% interval
# The paper's 5-way numbers at 1 and 5 shots, as public leaderboards copy them, by row, backbone and benchmark.
N_WAY, PAPER_SHOTS = 5, (1, 5)
PAPER: dict[tuple[str, str, str], tuple[Number, Number]] = {
    ("arcMax, centroid alignment", "Conv4", "miniImagenet"): ((53.14, 1.06), (71.45, 0.72)),
    ("arcMax, centroid alignment", "Conv4", "CUB"): ((62.71, 0.88), (80.48, 0.81)),
    ("arcMax, centroid alignment", "ResNet18", "miniImagenet"): ((59.88, 0.67), (80.35, 0.73)),
    ("arcMax, centroid alignment", "ResNet18", "tieredImageNet"): ((69.29, 0.56), (85.97, 0.49)),
    ("arcMax, centroid alignment", "ResNet18", "FC100"): ((45.83, 0.48), (59.74, 0.56)),
    ("arcMax, centroid alignment", "ResNet18", "CUB"): ((74.22, 1.09), (88.65, 0.55)),
    ("arcMax, centroid alignment", "WideResNet", "miniImagenet"): ((65.92, 0.60), (82.85, 0.55)),
    ("arcMax, centroid alignment", "WideResNet", "tieredImageNet"): ((74.40, 0.68), (86.61, 0.59)),
    ("arcMax, adversarial alignment", "Conv4", "miniImagenet"): ((52.13, 0.99), (70.78, 0.60)),
    ("arcMax, adversarial alignment", "Conv4", "CUB"): ((63.30, 0.94), (81.35, 0.67)),
    ("arcMax, adversarial alignment", "ResNet18", "miniImagenet"): ((58.84, 0.77), (77.92, 0.82)),
    ("arcMax, adversarial alignment", "ResNet18", "tieredImageNet"): ((66.44, 0.61), (85.12, 0.53)),
    ("arcMax, adversarial alignment", "ResNet18", "FC100"): ((43.44, 0.71), (58.69, 0.56)),
    ("arcMax, adversarial alignment", "ResNet18", "CUB"): ((70.80, 1.12), (88.04, 0.54)),
    ("arcMax, adversarial alignment", "WideResNet", "miniImagenet"): ((64.79, 0.93), (82.02, 0.88)),
    ("arcMax, adversarial alignment", "WideResNet", "tieredImageNet"): ((73.87, 0.76), (84.95, 0.59)),
    # Of the published code, recorded in its checkpoints.
    ("arcMax, fine-tuning", "Conv4", "miniImagenet"): ((51.37, 0.69), (69.13, 0.59)),
}
FEWER_QUERIES = {"CUB": 15}  # some classes have too few images for the default of 50
META_EPOCHS_1_SHOT = 600  # meta-learners are trained for longer at 1 shot (Chen et al., ICLR 2019)
MADE_WITH: Schema = {"n_query": int, "commit": str, "command": str}  # what a row of a table takes beside a result
# Alignments, as results name them, with their flags: two controls, the paper's, and beyond the paper.
ROW_ALIGNMENTS = ("head", "naive", "centroid", "adversarial")
VARIANTS: dict[str, dict[str, Sequence[str]]] = {
    **{name: {"--alignment": [name]} for name in ROW_ALIGNMENTS},
    "head": {"--alignment": ["head"], "--align_blocks": ["0"]},
    "auto": {"--align_preset": ["auto"]},
    **{f"{name}_tuned": {"--alignment": [name], "--align_preset": ["tuned"]} for name in ("naive", "centroid")},
}
ONE_BACKBONE = ("head", "auto", "naive_tuned", "centroid_tuned", "naive", "centroid")  # the order at scale two_cores
# Seconds on two cores of a processor with AVX-512, for Conv4 and 38,400 base images at 84 pixels in bf16: of an epoch,
# validation included; of an episode by the number of blocks that alignment updates, None: all.
EPOCH_SECONDS = {"transfer": 130.0, "meta": 35.0}
EPISODE_SECONDS = {0: 0.15, 1: 2.2, None: 70.0}
HEADER = ["method", "backbone", "novel classes", "task", "ours %", "paper %", "ours - paper", "gain of alignment"]
HEADER += ["epochs", "episodes", "seconds"]


@dataclass(frozen=True)
class Row:
    """A row of a table: the stage and flags that make it, where its result goes, and the checkpoint it tests."""

    name: str
    stage: str
    backbone: str
    novel: str
    n_shot: int
    seed: int
    flags: tuple[str, ...]
    result: Path
    checkpoint: Path

    def __str__(self) -> str:
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.name}, {self.backbone}, {N_WAY}-way {self.n_shot}-shot on {self.novel}{seed}"

    def seconds(self, config: Mapping[str, Any]) -> float:
        """About how long it takes with these flags where EPOCH_SECONDS and EPISODE_SECONDS hold."""
        if self.stage != "alignment":
            return 60.0 + config["n_epoch"] * EPOCH_SECONDS[self.stage]
        blocks = 1 if config["align_preset"] == "auto" else config["align_blocks"]
        each = EPISODE_SECONDS.get(blocks, EPISODE_SECONDS[None])
        return 60.0 + config["testing_epochs"] * config["n_episodes"] * each


@dataclass(frozen=True)
class Plan:
    """What all rows of a run have in common; flags: by stage or alignment, with values that win over the protocol's."""

    dataset: str
    novel_dataset: str
    results_dir: Path
    flags: Mapping[str, Mapping[str, Sequence[str]]]
    seed: int = 0

    def row(
        self, stage: str, method: str, backbone: str, n_shot: int, alignment: str = "", novel: str | None = None
    ) -> Row:
        """One row. novel: benchmark of its novel classes (default: the dataset); on another, stage 1 only tests."""
        novel = novel or self.dataset
        files = RunName(N_WAY, n_shot, self.dataset, novel, method, backbone, self.seed)
        checkpoint = files.best_model(self.results_dir / "models")
        result = files.table(self.results_dir, SCRIPTS[stage], alignment)
        part = {"transfer": ", fine-tuning", "meta": "", "alignment": f", {alignment} alignment"}[stage]
        flags: dict[str, Sequence[str]] = {"--dataset": [self.dataset], "--method": [method], "--backbone": [backbone]}
        flags |= {"--n_shot": [str(n_shot)], "--novel_dataset": [novel]}
        flags |= {"--results_dir": [str(self.results_dir)], "--checkpoint_dir": [str(checkpoint.parent)]}
        flags |= {"--n_query": [str(FEWER_QUERIES[novel])]} if novel in FEWER_QUERIES else {}
        flags |= {"--n_epoch": [str(META_EPOCHS_1_SHOT)]} if stage == "meta" and n_shot == 1 else {}
        flags |= {**self.flags[stage], **self.flags.get(alignment, {}), **VARIANTS.get(alignment, {})}
        if stage == "transfer" and novel != self.dataset:
            flags |= {"--n_epoch": ["0"], "--init_from": [str(checkpoint)]}
        seed = f"_seed{self.seed}" if self.seed else ""
        episodes = self.results_dir / "episodes" / f"{novel}_{N_WAY}way_{n_shot}shot{seed}.json"
        flags |= {"--episodes_file": [str(episodes)], "--resume": [], "--seed": [str(self.seed)]}
        words = tuple(word for flag, values in flags.items() for word in (flag, *values))
        return Row(method + part, stage, backbone, novel, n_shot, self.seed, words, result, checkpoint)


def main_rows(plan: Plan, backbone: str, n_shot: int) -> list[Row]:
    """The heads without alignment, the meta-learners, and arcMax with both alignments and their controls."""
    return [
        *(plan.row("transfer", head, backbone, n_shot) for head in HEADS),
        *(plan.row("meta", learner, backbone, n_shot) for learner in META_LEARNERS),
        *(plan.row("alignment", "arcMax", backbone, n_shot, alignment) for alignment in ROW_ALIGNMENTS),
    ]


def crossdomain_rows(plan: Plan, backbone: str, n_shot: int) -> list[Row]:
    """Stage 1 on its own benchmark, then that model on the novel classes of another: as it is, and aligned."""
    task, novel = ("arcMax", backbone, n_shot), plan.novel_dataset
    return [
        plan.row("transfer", *task),
        plan.row("transfer", *task, novel=novel),
        *(plan.row("alignment", *task, alignment, novel) for alignment in ROW_ALIGNMENTS),
    ]


def one_backbone_rows(plan: Plan, backbone: str, n_shot: int) -> list[Row]:
    """All from one backbone of stage 1, trained at 5 shots: its test, ProtoNet, and alignment in feature space, of the
    last block, and of all."""
    trained, task = plan.row("transfer", "arcMax", backbone, PAPER_SHOTS[-1]), ("arcMax", backbone, n_shot)
    test, start = plan.row("transfer", *task), ("--init_from", str(trained.checkpoint))
    rows = [replace(test, flags=(*test.flags, "--n_epoch", "0"))] if test != trained else []
    rows += [plan.row("alignment", *task, variant) for variant in ONE_BACKBONE]
    rows = [replace(row, checkpoint=trained.checkpoint) for row in rows]
    rows.append(plan.row("meta", "ProtoNet", backbone, n_shot))
    return [trained, *(replace(row, flags=(*row.flags, *start)) for row in rows)]


# By table: all rows of a backbone and a shot, in the order to run them.
TABLES = {"main": main_rows, "crossdomain": crossdomain_rows}


def finished(row: Row, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a row that was run with these flags and is younger than its checkpoint; else None."""
    try:
        record = stage_result(row.result)
    except (OSError, UserError):
        return None
    if not matches_schema(record, MADE_WITH) or differences(dict(config), record["config"]):
        return None
    stale = row.checkpoint.exists() and row.checkpoint.stat().st_mtime > row.result.stat().st_mtime
    return None if stale else record


def paper_number(row: Row, dataset: str) -> dict[str, Any] | None:
    """The published accuracy to compare a row with, its 95% interval and its source; None where none is known."""
    key = row.name, row.backbone, dataset
    if row.novel != dataset or row.n_shot not in PAPER_SHOTS or key not in PAPER:
        return None
    accuracy, ci95 = PAPER[key][PAPER_SHOTS.index(row.n_shot)]
    return {"accuracy": accuracy, "ci95": ci95, "source": "paper" if "alignment" in row.name else "published code"}


def compare(dataset: str, rows: Sequence[Row], results: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """A record of each row: our number, the paper's, their difference, and what ours was made with.

    results: of each row, None where it has not been run yet. Ours and the paper's are of independent episodes; the
    interval of their difference is None for a single episode. A number made without training is of as many epochs as
    the checkpoint it tests.
    """
    epochs: dict[Path, int] = {}
    records = []
    for row, result in zip(rows, results, strict=True):
        paper = paper_number(row, dataset)
        record: dict[str, Any] = {
            "name": row.name,
            "stage": SCRIPTS[row.stage],
            "backbone": row.backbone,
            "novel_dataset": row.novel,
            "n_way": N_WAY,
            "n_shot": row.n_shot,
            "seed": row.seed,
            "paper": paper,
            "ours": None,
        }
        if result:
            epochs.setdefault(row.checkpoint, result["config"].get("n_epoch", 0))
            keys = ["accuracy", "ci95", "n_episodes", "n_query", "img_size", "seconds", "seed", "commit", "command"]
            keys.append("ci95_classes")  # which earlier versions lack
            record["ours"] = {key: result[key] for key in keys if key in result} | {"n_epoch": epochs[row.checkpoint]}
            record |= minus_paper(result, paper)
            record["gain"] = result["difference"] if row.stage == "alignment" else None
            controls = controls_of(result) if row.name.endswith("head alignment") else {}
            record["controls"] = {name: {key: c[key] for key in keys if key in c} for name, c in controls.items()}
            record["result"] = row.result
        records.append(record)
    return records


def minus_paper(ours: dict[str, Any], paper: dict[str, Any] | None) -> dict[str, float | None]:
    """Our accuracy minus the paper's, and the interval of the difference of two independent means; None if unknown."""
    difference = round(ours["accuracy"] - paper["accuracy"], 3) if paper else None
    ci95 = None if paper is None or ours["ci95"] is None else round(math.hypot(ours["ci95"], paper["ci95"]), 3)
    return {"ours_minus_paper": difference, "ours_minus_paper_ci95": ci95}


def mean_records(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean of each row that several seeds have done, with Student's t between them, as records of `compare`."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in (record for record in records if record["ours"]):
        key = tuple(record[name] for name in ("name", "backbone", "novel_dataset", "n_shot"))
        alike.setdefault(key, []).append(record)
    means = []
    for same in (same for same in alike.values() if len(same) > 1):
        first, of_all = same[0], [record["ours"] for record in same]
        ours = {name: value for name, value in first["ours"].items() if name != "ci95_classes"}
        ours |= mean_over_seeds(of_all) | {"seconds": sum(each["seconds"] for each in of_all)}
        mean = first | {"name": f"{first['name']}, mean of {len(same)} seeds", "seed": 0, "controls": {}, "ours": ours}
        mean["gain"] = mean_over_seeds([record["gain"] for record in same]) if first["gain"] else None
        means.append(mean | minus_paper(ours, first["paper"]))
    return means


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The records of `compare` as a Markdown table."""
    rows = []
    for record in records:
        ours, paper, gain = record["ours"], record["paper"], record.get("gain")
        theirs = "not known here" if paper is None else interval(paper)
        if paper and paper["source"] != "paper":
            theirs += f" ({paper['source']})"
        task = [record["backbone"], record["novel_dataset"], f"{record['n_way']}-way {record['n_shot']}-shot"]
        seed = f", seed {record['seed']}" if record["seed"] else ""
        for name, control in record.get("controls", {}).items():
            rows.append([f"arcMax, {name}{seed}", *task, interval(control), *[""] * 4, str(ours["n_episodes"]), ""])
        cells = [record["name"] + seed, *task, interval(ours) if ours else "not run yet", theirs]
        less = {"accuracy": record.get("ours_minus_paper"), "ci95": record.get("ours_minus_paper_ci95")}
        cells += [interval(less, "+") if ours and paper else "", interval(gain, "+") if gain else ""]
        cells += [str(ours["n_epoch"]), str(ours["n_episodes"]), f"{ours['seconds']:.0f}"] if ours else ["", "", ""]
        rows.append(cells)
    return markdown_table(HEADER, rows)


def write_table(stem: Path, about: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """Write STEM.md and STEM.json and return the Markdown. Raises UserError when they cannot be written."""
    done = sum(record["ours"] is not None for record in records)
    means = mean_records(records)
    title = f"{about['table']} table, {about['dataset']}, {about['scale']} scale: {done} of {len(records)} rows"
    text = f"# {title}\n\nmade by `{about['command']}`\n\n{markdown([*records, *means])}\n"
    write_json(stem.with_name(f"{stem.name}.json"), {**about, "rows": list(records), "means": means})
    write_text(stem.with_name(f"{stem.name}.md"), text)
    return text
