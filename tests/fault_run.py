"""Runs stages under random faults until each is done, and compares what they leave with runs that met none.

python -m tests.fault_run --minutes 30 --seed 0
python -m tests.fault_run --seed 0 --sequence 17      # one of them again

A sequence is one stage in a folder of its own, and up to four faults, each followed by what a user would do: the same
command with --resume or, where the last line says so, with --overwrite. A fault may end a run, or make it say in one
line what is wrong (status 2); in the end all numbers, all caches and the list of files must be those of a run without
faults. A signal, or a second run, comes when the files of the first tell that it has got to a random moment.
Prints a table, and ends with status 1 when anything differed. Linux only.
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.helpers import ALIGN, ROOT, TINY, TRAIN, Processes, folders, make_benchmark, numbers

ALIGN_MORE = [*ALIGN, "--n_episodes", 27, "--record_curve", 1]
META = [*TINY, "--method", "RelationNet", "--n_way", 3, "--train_n_query", 4, "--episodes_per_epoch", 3]
COMMANDS: dict[str, tuple[str, list[object]]] = {
    "base": ("transferLearning", [*TRAIN, "--n_epoch", 8]),
    "meta": ("metaLearning", [*META, "--n_epoch", 8, "--val_episodes", 4, "--n_episodes", 6]),
    "blocks": ("associative_alignment", ALIGN_MORE),
    "last block": ("associative_alignment", [*ALIGN_MORE, "--align_blocks", 1]),
    "features": ("associative_alignment", [*ALIGN, "--n_episodes", 300, "--align_blocks", 0]),
}
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
# What a run has come to when something happens: which of its files tell, and at most how many changes of them.
MOMENTS = {
    "a lock": ("results/*/.*.lock", 1),
    "a line": ("out", 3),
    "a row": ("results/logs/*/metrics.jsonl", 3),
    "a state": ("results/*/*_last.tar", 3),
    "a file half written": ("[cr]*/**/.*.tmp", 8),
    "a cache half built": ("cache/.*px*[0-9a-f]", 6),
}
OUTCOMES = ("finished", "one line", "interrupted", "killed", "too late", "wrong")
WORKER = "SIGKILL worker"
SECONDS_OF_RANKS = 45  # what ranks have to end when their launcher has been killed
LIMIT = 150  # seconds, after which a run is killed, as one that hangs


@dataclass
class Case:
    """One stage in a folder of its own, and how it is run.

    option: what the next run is given. damaged: whether a file of it was, after which it may refuse to go on. moment:
    at which something happened during the last run; empty when the run had ended. wrong: what should not have happened.
    """

    root: Path
    stage: str
    n_ranks: int
    dice: random.Random
    servers: list[Processes]
    option: str = "--resume"
    damaged: bool = False
    moment: str = ""
    wrong: list[str] = field(default_factory=list)

    def run(self, act: Callable[[int], None] | None = None, max_bytes: int = 0) -> int:
        """Run the stage, and at a random moment of it something else; returns its status, negative for a signal."""
        self.moment = self.dice.choice([*MOMENTS]) if act else ""
        if self.moment == "a cache half built":
            shutil.rmtree(self.root / "cache", ignore_errors=True)
        if act and list(self.root.glob("results/tables/*.json")):  # it has finished: from the beginning again
            self.option = "--overwrite"
        script, flags = COMMANDS[self.stage]
        flags = [*flags, *folders(self.root), *self.option.split()]
        if self.n_ranks > 1:
            flags = ["--standalone", "--nproc_per_node", self.n_ranks, ROOT / f"{script}.py", *flags]
            script = "torch.distributed.run"
        (self.root / "out").unlink(missing_ok=True)
        before = self.seen()
        pid = self.servers[0].start(script, flags, self.root / "out", max_bytes)
        hangs = threading.Timer(LIMIT, os.kill, (pid, signal.SIGKILL))
        hangs.start()
        if act and self.came(pid, before):
            act(pid)
        status = self.servers[0].wait()
        if hangs.finished.is_set():
            self.wrong.append(f"{LIMIT} s were not enough")
        hangs.cancel()
        self.option = "--overwrite" if any("--overwrite" in line for line in self.errors()) else "--resume"
        return status

    def seen(self) -> set[tuple[Path, int, int, int]]:
        """The files that tell of the moment, if they hold anything, as they are now."""
        found = set()
        with contextlib.suppress(OSError):  # one that goes as it is looked for
            for path in self.root.glob(MOMENTS[self.moment][0]) if self.moment else ():
                stat = path.stat()
                found |= {(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)} if stat.st_size else set()
        return found

    def came(self, pid: int, before: set[tuple[Path, int, int, int]]) -> bool:
        """Wait for the moment and a little longer; returns whether the process is still at work then."""
        changes = self.dice.randint(1, MOMENTS[self.moment][1])
        while changes and not has_ended(pid):
            now = self.seen()
            changes -= bool(now - before)
            before = now
            time.sleep(0.0005)
        time.sleep(self.dice.uniform(0, 0.002 if "half" in self.moment else 0.04))
        if has_ended(pid):
            self.moment = ""
        return bool(self.moment)

    def said(self, name: str = "out") -> list[str]:
        return (self.root / name).read_text(errors="replace").splitlines()

    def errors(self, name: str = "out") -> list[str]:
        return [line for line in self.said(name) if line.startswith("error: ")]

    def outcome(self, status: int, fault: str, name: str = "out") -> str:
        """What a status means: wrong when the fault does not explain it, or when it says more than a line."""
        said, errors = self.said(name), self.errors(name)
        n_tracebacks = sum("Traceback (most recent" in line for line in said)
        interrupted = any(line.startswith("interrupted") for line in said)
        if self.n_ranks > 1 and status != 0 and name == "out":  # torchrun has a status of its own
            kind = "one line" if errors else "interrupted" if interrupted else "killed"
            good = n_tracebacks <= (fault == WORKER) and len(errors) <= 1  # one of the other, whose exchange fails
        else:
            kind = {0: "finished", 2: "one line", 130: "interrupted"}.get(status, "killed" if status < 0 else "wrong")
            good = n_tracebacks == 0 and len(errors) == (status == 2) and interrupted == (status == 130)
        refused = self.damaged or fault in ("full disk", "no folder")
        if fault in ("at once", "two at once"):  # after a launcher that was killed, or beside another run
            refused |= "another run is at work" in "".join(errors)
        signals = any(fault.startswith(number) for number in SIGNALS)
        if good and {"finished": True, "one line": refused, "interrupted": signals, "killed": signals}.get(kind):
            return kind
        self.wrong.append(f"{fault}: status {status}: " + " / ".join(said[-8:]))
        return "wrong"

    def files(self) -> list[Path]:
        """The files that the stage has written, but for its lock."""
        found = [path for name in ("results", "cache") for path in (self.root / name).rglob("*") if path.is_file()]
        found = [path for path in found if path.suffix != ".lock"]
        keep = COMMANDS[self.stage][0] == "associative_alignment"  # which reads the best model of another run
        return sorted(path for path in found if not (keep and path.name.endswith("_bestModel.tar")))


def has_ended(pid: int) -> bool:
    """Whether a process is no more, or only waits to be asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def signalled(case: Case, fault: str) -> str:
    """A signal to the run, or to a worker of torchrun, at a random moment."""
    workers: list[int] = []

    def act(pid: int) -> None:
        with contextlib.suppress(OSError):  # it ends just now
            workers.extend(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
            os.kill(case.dice.choice(workers or [pid]) if fault == WORKER else pid, SIGNALS[fault.split()[0]])

    outcome = case.outcome(case.run(act), fault)
    moment = case.moment
    if workers and fault == "SIGKILL":  # its workers go on for a while, beside which nobody else can
        case.outcome(case.run(), "at once")
        deadline = time.monotonic() + SECONDS_OF_RANKS
        while not all(map(has_ended, workers)):
            time.sleep(0.1)
            if time.monotonic() > deadline:
                case.wrong.append(f"{fault}: workers have not ended after {SECONDS_OF_RANKS} s")
                break
    elif outcome == "killed" and "half" in moment:  # was it?
        case.moment = moment
        moment = moment if case.seen() else moment.replace("half", "just")
    case.moment = moment
    return outcome if moment else "too late"


def full_disk(case: Case, fault: str) -> str:
    """A limit on the size of files does to a write what a full disk does; what is printed stays below it."""
    return case.outcome(case.run(max_bytes=int(4096 * 2 ** case.dice.uniform(0, 8))), fault)


def no_folder(case: Case, fault: str) -> str:
    """A folder that nothing can be written to, not by root either: there is a file in its place."""
    choices = ["cache", *(f"results/{name}" for name in ("models", "logs", "tables", "episodes"))]
    folder = case.root / case.dice.choice(choices)
    aside, there = case.root / "aside", folder.exists()
    folder.parent.mkdir(exist_ok=True)
    if there:
        folder.rename(aside)
    folder.write_text("")
    status = case.run()
    folder.unlink()
    if there:
        aside.rename(folder)
    return case.outcome(status, fault)


def damaged(case: Case, fault: str) -> str:
    """A file removed or cut short between runs, or all of another day, past or future, as when the clock was set."""
    files = case.files()
    case.damaged |= fault != "clock set"
    moment = time.time() + case.dice.choice([-1, 1]) * 86400
    for path in files if fault == "clock set" else case.dice.sample(files, min(1, len(files))):
        if fault == "clock set":
            os.utime(path, (moment, moment))
        elif fault == "truncated":
            os.truncate(path, case.dice.randrange(max(1, path.stat().st_size)))
        else:
            path.unlink()
    return case.outcome(case.run(), fault)


def two_at_once(case: Case, fault: str) -> str:
    """A second run beside the first: the one that comes later is refused, or finds the other done."""
    ended: list[int] = []
    if len(case.servers) == 1:
        case.servers.append(Processes())

    def act(pid: int) -> None:
        script, flags = COMMANDS[case.stage]
        case.servers[1].start(script, [*flags, *folders(case.root), "--resume"], case.root / "second")
        ended.append(case.servers[1].wait())

    first = case.outcome(case.run(act), fault)
    if not ended:
        return "too late"
    second = case.outcome(ended[0], fault, "second")
    return "wrong" if first == "wrong" else second


def again(case: Case, fault: str) -> str:
    """The run until it is done, and then once more without --resume."""
    case.run()
    case.option = ""
    return case.outcome(case.run(), fault)


FAULTS: dict[str, Callable[[Case, str], str]] = {
    **dict.fromkeys([*SIGNALS, WORKER], signalled),
    **dict.fromkeys(["removed", "truncated", "clock set"], damaged),
    **{"full disk": full_disk, "no folder": no_folder, "two at once": two_at_once, "again": again},
}


def left(case: Case) -> dict[str, Any]:
    """All that a finished run leaves: its numbers, its caches, the columns of its state, the names of its files."""
    found: dict[str, Any] = {}
    with contextlib.suppress(Exception):
        found = numbers(case.root, COMMANDS[case.stage][0])
    for path in sorted(path for name in ("results", "cache") for path in (case.root / name).rglob("*")):
        name = str(path.relative_to(case.root))
        content = path.read_bytes() if name.startswith("cache") and path.is_file() else b""
        found[name] = hashlib.sha256(content).hexdigest()
        if name.startswith("results/logs") and path.suffix == ".tar":
            columns = torch.load(path, weights_only=True).items()
            found |= {f"{name}: {key}": v.numpy().tobytes() for key, v in columns if isinstance(v, torch.Tensor)}
    return found


def finish(case: Case) -> None:
    """What a user does until the run is done."""
    status = case.run()
    if case.outcome(status, "none") == "one line":
        case.option = "--overwrite"
        status = case.run()
    if status:
        case.wrong.append(f"not finished: status {status}: " + " / ".join(case.said()[-8:]))


class FaultRun:
    """All sequences: what is finished without a fault, by stage and number of ranks, and the counts of outcomes."""

    def __init__(self, folder: Path, seed: int, max_ranks: int):
        self.folder, self.seed, self.max_ranks = folder, seed, max_ranks
        self.servers = [Processes()]
        self.finished: dict[tuple[str, int], tuple[Case, dict[str, Any]]] = {}
        self.counts: Counter[tuple[str, str]] = Counter()
        self.moments: Counter[tuple[str, str]] = Counter()
        make_benchmark(folder / "benchmarks" / "tiny")

    def case(self, name: str, stage: str, n_ranks: int, dice: random.Random) -> Case:
        """A new folder for a stage, with the best model that stage 3 reads."""
        root = self.folder / name
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        (root / "benchmarks").symlink_to(self.folder / "benchmarks")
        if COMMANDS[stage][0] == "associative_alignment":
            base, _ = self.reference("base", 1)
            (root / "results" / "models").mkdir(parents=True)
            for model in base.root.rglob("*_bestModel.tar"):
                shutil.copy(model, root / "results" / "models")
        return Case(root, stage, n_ranks, dice, self.servers)

    def reference(self, stage: str, n_ranks: int) -> tuple[Case, dict[str, Any]]:
        """The run of a stage without a fault, and what it left."""
        if (stage, n_ranks) not in self.finished:
            case = self.case(f"finished {stage} {n_ranks}", stage, n_ranks, random.Random(0))
            assert case.run() == 0, case.said()
            self.finished[stage, n_ranks] = case, left(case)
        return self.finished[stage, n_ranks]

    def sequence(self, k: int) -> bool:
        """Run the k-th sequence; returns whether all was as it should be, else it is shown and its folder stays."""
        dice = random.Random(f"{self.seed}/{k}")
        stage, n_ranks = dice.choice([*COMMANDS]), min(self.max_ranks, 2 if dice.random() < 0.3 else 1)
        finished, expected = self.reference(stage, n_ranks)
        case = self.case(f"sequence {k}", stage, n_ranks, dice)
        if dice.random() < 0.5:
            shutil.copytree(finished.root / "cache", case.root / "cache")
        happened = []
        faults = [fault for fault in FAULTS if n_ranks > 1 or fault != WORKER]
        weights = [1 + n_ranks if FAULTS[fault] is signalled else 1 for fault in faults]
        for fault in dice.choices(faults, weights, k=dice.randint(1, 4)):
            outcome = FAULTS[fault](case, fault)
            self.counts[fault, outcome] += 1
            at = f" at {case.moment}" if case.moment else ""
            if case.moment:
                self.moments[case.moment, fault] += 1
            happened.append(f"{fault}{at}: {outcome}")
        finish(case)
        found = left(case)
        differ = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        print(f"{k} {stage}, {n_ranks} rank(s): {'; '.join(happened)}", flush=True)
        if not differ and not case.wrong:
            shutil.rmtree(case.root)
            return True
        print(f"  --seed {self.seed} --sequence {k}: {'; '.join(case.wrong)}; differ: {differ}", flush=True)
        return False


def table(counts: Counter[tuple[str, str]], columns: Sequence[str]) -> str:
    """A row a first key, a column a second one."""
    rows = [["", "times", *columns]]
    for row in dict.fromkeys(row for row, _ in sorted(counts)):
        cells = [counts[row, column] for column in columns]
        rows.append([row, str(sum(cells)), *map(str, cells)])
    return "\n".join(f"{row[0]:<20}" + "".join(f"{cell:>15}" for cell in row[1:]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequence", type=int, help="run this one alone")
    parser.add_argument("--max_ranks", type=int, default=2, help="1: torchrun is left out")
    parser.add_argument("--folder", type=Path, help="where the runs are; by default a temporary one")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults_", dir=args.folder))
    faults, began = FaultRun(folder, args.seed, args.max_ranks), time.monotonic()
    k = args.sequence or 0
    good: list[bool] = []
    while not good or (args.sequence is None and time.monotonic() - began < 60 * args.minutes):
        good.append(faults.sequence(k))
        k += 1
    print(table(faults.counts, OUTCOMES), table(faults.moments, [*SIGNALS, WORKER, "two at once"]), sep="\n\n")
    print(f"{len(good)} sequences, {sum(good)} as without faults, {len(good) - sum(good)} not")
    if all(good):
        shutil.rmtree(folder)
    else:
        print(f"what differed is in {folder}")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
