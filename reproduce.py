"""Run, or resume, every row of one of the paper's tables, and write it with the paper's numbers beside ours.

python reproduce.py --table main --dataset miniImagenet          # the published protocol, 66 rows: long
python reproduce.py --table main --scale laptop                  # the built-in benchmark: 15 minutes on 2 cores
python reproduce.py --table main --scale laptop --seeds 0 1 2    # three trainings of every row, and their means
python reproduce.py --table main --scale two_cores               # miniImagenet from one backbone: 8 hours on 2 cores
python reproduce.py --table crossdomain --dataset miniImagenet --novel_dataset CUB --dry_run     # only the commands

Rows that are in the results folder already are not run again, so that the same command goes on after any stop.
Flags that are not explained here are handed to every stage that knows them: --device cuda --precision bf16.
"""

import itertools
import os
import shlex
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from args_parser import COUNT, COUNT_OR_0, STAGES, args_parser, backbone_name, stage_parser
from engine.errors import OneLineParser, UserError
from engine.precision import choose_precision
from engine.records import REPOSITORY
from engine.run import select_device
from engine.script import run_command, run_script, script_command, shown
from persistence.results import interval
from reporting.paper_tables import SCRIPTS, TABLES, Plan, Row, compare, finished, one_backbone_rows, write_table

Words = dict[str, list[str]]  # flags, each with its values
# laptop: its preset with fewer epochs and episodes, so that all rows of the main table take a quarter of an hour.
# two_cores: one backbone of three hours, for images that are stored at 84 pixels; fewer episodes of what is slow.
SHORT: Words = {"--precision": ["auto"], "--n_query": ["15"]}
SCALES: dict[str, dict[str, Words]] = {
    "full": {stage: {} for stage in SCRIPTS},
    "laptop": {
        "transfer": {"--preset": ["laptop"], "--n_epoch": ["8"]},
        "meta": {"--preset": ["laptop"], "--n_epoch": ["5"]},
        "alignment": {"--preset": ["laptop"], "--align_blocks": ["1"], "--n_episodes": ["30"]},
    },
    "two_cores": {
        "transfer": SHORT | {"--n_epoch": ["80"], "--eval_resize": ["none"]},
        "meta": SHORT | {"--n_epoch": ["10"]},
        "alignment": SHORT,
        **dict.fromkeys(("naive_tuned", "centroid_tuned"), {"--n_episodes": ["200"]}),
        **dict.fromkeys(("naive", "centroid"), {"--n_episodes": ["50"]}),
    },
}
# Flags that the rows set themselves.
TAKEN = {"--method", "--alignment", "--n_shot", "--test_n_way", "--preset", "--align_preset"}
TAKEN |= {"--init_from", "--episodes_file", "--resume", "--overwrite", "--checkpoint_dir"}


def parse(argv: Sequence[str]) -> tuple[Namespace, Words]:
    """The flags explained here, and the others, which are of the stages."""
    parser = OneLineParser(
        prog="reproduce.py", description=__doc__, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--table", choices=list(TABLES), required=True, help="the table to reproduce")
    add("--dataset", help="benchmark (default: miniImagenet; glyphs at --scale laptop)")
    add("--novel_dataset", help="benchmark of the novel classes of --table crossdomain (default: CUB)")
    scale = "full: the published protocol (default); laptop: 42 pixels and few epochs and episodes; "
    scale += "two_cores: Conv4 at 84 pixels, all from one backbone, in hours that are said first"
    add("--scale", choices=list(SCALES), default="full", help=scale)
    backbones = "default: Conv4; at full scale Conv4 ResNet18 WideResNet for --table main, ResNet18 for crossdomain"
    add("--backbones", "--backbone", type=backbone_name, nargs="+", help=backbones)
    add("--shots", type=COUNT, nargs="+", help="default: 1 5; 5 for --table crossdomain")
    seeds = "seeds of every row (default: 0); of several the table has the mean, too, with Student's t between them"
    add("--seeds", "--seed", type=COUNT_OR_0, nargs="+", default=[0], help=seeds)
    add("--results_dir", type=Path, help="where all is written (default: results; results/laptop or results/two_cores)")
    add("--nproc_per_node", type=COUNT, help="start each stage with torchrun on so many processes")
    add("--dry_run", action="store_true", help="print the commands, and do nothing")
    args, others = parser.parse_known_args([text for text in argv if text != "--"])

    laptop, crossdomain = args.scale == "laptop", args.table == "crossdomain"
    args.dataset = args.dataset or ("glyphs" if laptop else "miniImagenet")
    if args.novel_dataset and not crossdomain:
        parser.error("argument --novel_dataset: only --table crossdomain has one")
    args.novel_dataset = args.novel_dataset or ("CUB" if crossdomain else args.dataset)
    if args.novel_dataset == args.dataset and crossdomain:
        parser.error(f"argument --novel_dataset: {args.dataset} is --dataset itself: give another benchmark")
    if crossdomain and args.scale == "two_cores":
        parser.error("argument --scale: two_cores has the main table alone")
    published = ["ResNet18"] if crossdomain else ["Conv4", "ResNet18", "WideResNet"]
    args.backbones = args.backbones or (published if args.scale == "full" else ["Conv4"])
    args.shots = args.shots or ([5] if crossdomain else [1, 5])
    args.results_dir = args.results_dir or Path("results" if args.scale == "full" else f"results/{args.scale}")
    return args, passed_on(parser, others)


def passed_on(parser: OneLineParser, others: Sequence[str]) -> Words:
    """The flags of the stages on a command line, each with its values."""
    passed: Words = {}
    for text in others:
        if text.startswith("--"):
            flag, *values = text.split("=", 1)
            passed[flag] = values
        elif passed:
            passed[flag].append(text)
        else:
            parser.error(f"unrecognized argument: {text}")
    known = set().union(*map(flags_of, SCRIPTS))
    for flag in passed:
        if flag in TAKEN:
            parser.error(f"argument {flag}: the rows set it; --table, --shots, --scale and --results_dir are yours")
        if flag not in known:
            parser.error(f"unrecognized argument: {flag} is no flag here or of any stage")
    return passed


def flags_of(stage: str) -> set[str]:
    """The names of all flags of a stage."""
    return set(stage_parser(stage)._option_string_actions)


def stop(status: int, row: Row, command: str) -> NoReturn:
    """End the run after a row that failed, or that was interrupted (130)."""
    if status in (130, -2):
        raise KeyboardInterrupt
    ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    line = f"{row} {ended}: what is done is kept, and the same reproduce.py command goes on there; it was: {command}"
    if status == 2:
        raise UserError(line)
    print(f"error: {line}", file=sys.stderr)
    sys.exit(1)


def main() -> None:
    args, passed = parse(sys.argv[1:])
    os.chdir(REPOSITORY)  # where the commands run, so that folders mean the same here
    novel = args.novel_dataset
    flags: dict[str, Words] = {}
    for part, scale in SCALES[args.scale].items():
        known = flags_of(part if part in SCRIPTS else "alignment")
        flags[part] = scale | {flag: values for flag, values in passed.items() if flag in known}
    plans = [Plan(args.dataset, novel, args.results_dir, flags, seed) for seed in dict.fromkeys(args.seeds)]
    table = one_backbone_rows if args.scale == "two_cores" else TABLES[args.table]
    tasks = itertools.product(args.backbones, args.shots, plans)
    rows = [*dict.fromkeys(row for backbone, n_shot, plan in tasks for row in table(plan, backbone, n_shot))]
    configs = [vars(args_parser(row.stage, row.flags)) for row in rows]  # a value out of range ends here
    commands = [script_command(STAGES[row.stage][0], row.flags, args.nproc_per_node) for row in rows]
    if args.dry_run:
        print("\n".join(map(shown, commands)))
        return

    benchmarks = "_to_".join(dict.fromkeys([args.dataset, novel]))
    summary = args.results_dir / "tables" / f"reproduce_{args.table}_{benchmarks}"
    about = {"table": args.table, "dataset": args.dataset, "novel_dataset": novel, "scale": args.scale}
    about["command"] = shlex.join(["python", "reproduce.py", *sys.argv[1:]])
    for each in configs:  # a result records what `auto` becomes on this machine, and what --n_query has become
        if each["n_query"] is None:
            del each["n_query"]
        each["precision"] = choose_precision(each["precision"], select_device(each["device"]).type)
    todo = [(row, config) for row, config in zip(rows, configs, strict=True) if not finished(row, config)]
    hours = sum(row.seconds(config) for row, config in todo) / 3600
    ahead = f", about {hours:.1f} hours on two cores of a recent processor" if args.scale == "two_cores" else ""
    print(f"{len(todo)} of {len(rows)} rows to run{ahead}", flush=True)
    text = ""
    try:
        for i, (row, config, command) in enumerate(zip(rows, configs, commands, strict=True), 1):
            done = finished(row, config)
            doing = f"done, {interval(done)} in {row.result}" if done else shown(command)
            print(f"[{i}/{len(rows)}] {row}: {doing}", flush=True)
            if not done and (status := run_command(command)):
                stop(status, row, shown(command))
            results = [finished(row, config) for row, config in zip(rows, configs, strict=True)]
            text = write_table(summary, about, compare(args.dataset, rows, results))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: the same command goes on from here") from None
    print(f"\n{text}\ntable {summary}.md and .json")


if __name__ == "__main__":
    run_script(main)
