"""Runs stages under random faults until each is done, and compares what they leave with runs that met none.

python -m tests.fault_run --minutes 30 --seed 0
python -m tests.fault_run --seed 0 --sequence 17      # one of them again

A sequence is one stage in a folder of its own, and up to four faults, each followed by what a user would do: the same
command with --resume or, where the last line says so, with --overwrite. A fault may end a run, or make it say in one
line what is wrong (status 2); in the end all numbers, all caches and the list of files must be those of a run without
faults. Prints a table, and ends with status 1 when anything differed. POSIX only.
"""

import argparse
import contextlib
import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import torch

from tests.helpers import ALIGN, ROOT, TINY, TRAIN, Processes, folders, make_benchmark, numbers

ALIGN_MORE = [*ALIGN, "--n_episodes", 17, "--record_curve", 1]
META = [*TINY, "--method", "RelationNet", "--n_way", 3, "--train_n_query", 4, "--episodes_per_epoch", 3]
COMMANDS: dict[str, tuple[str, list[object]]] = {
    "base": ("transferLearning", [*TRAIN, "--n_epoch", 8]),
    "meta": ("metaLearning", [*META, "--n_epoch", 8, "--val_episodes", 4, "--n_episodes", 6]),
    "blocks": ("associative_alignment", ALIGN_MORE),
    "last block": ("associative_alignment", [*ALIGN_MORE, "--align_blocks", 1]),
    "features": ("associative_alignment", [*ALIGN, "--n_episodes", 300, "--align_blocks", 0, "--align_adapter", 3]),
}
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
OUTCOMES = ("finished", "one line", "interrupted", "killed", "wrong")
SECONDS_OF_RANKS = 60  # what ranks have to end when their launcher has been killed
LIMIT = 200  # seconds, after which a run is killed, as one that hangs


@dataclass
class Case:
    """One stage in a folder of its own, and how it is run.

    seconds: what it takes without a fault. option: what the next run is given. damaged: whether a file of it was, after
    which it may refuse to go on. wrong: what should not have happened.
    """

    root: Path
    stage: str
    n_ranks: int
    dice: random.Random
    servers: list[Processes]
    seconds: float = 0.0
    option: str = "--resume"
    damaged: bool = False
    wrong: list[str] = field(default_factory=list)

    def run(self, during: Callable[[int], None] = lambda pid: None, max_bytes: int = 0) -> int:
        """Run the stage, and something that happens meanwhile; returns its status, negative for a signal."""
        script, flags = COMMANDS[self.stage]
        flags = [*flags, *folders(self.root), *self.option.split()]
        if self.n_ranks == 1:
            pid = self.servers[0].start(script, flags, self.root / "out", max_bytes)
            wait = self.servers[0].wait
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", self.n_ranks]
            limits = (max_bytes or resource.RLIM_INFINITY,) * 2
            with open(self.root / "out", "w") as file:
                process = Popen(
                    [str(part) for part in (*command, f"{script}.py", *flags)],
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=file,
                    stderr=file,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
                )
            pid, wait = process.pid, process.wait
        hangs = threading.Timer(LIMIT, os.kill, (pid, signal.SIGKILL))
        hangs.start()
        during(pid)
        status = wait()
        hangs.cancel()
        self.option = "--overwrite" if any("--overwrite" in line for line in self.errors()) else "--resume"
        return status

    def said(self, name: str = "out") -> list[str]:
        return (self.root / name).read_text(errors="replace").splitlines()

    def errors(self, name: str = "out") -> list[str]:
        return [line for line in self.said(name) if line.startswith("error: ")]

    def outcome(self, status: int, fault: str, name: str = "out") -> str:
        """What a status means: wrong when the fault does not explain it, or when it says more than a line."""
        said, errors = self.said(name), self.errors(name)
        n_tracebacks = sum(line.startswith("Traceback") for line in said)
        interrupted = any(line.startswith("interrupted") for line in said)
        if self.n_ranks > 1 and status != 0 and name == "out":  # torchrun has statuses and a traceback of its own
            kind = "one line" if errors else "interrupted" if interrupted else "killed"
            good = n_tracebacks <= 1 and len(errors) <= 1
        else:
            kind = {0: "finished", 2: "one line", 130: "interrupted"}.get(status, "killed" if status < 0 else "wrong")
            good = n_tracebacks == 0 and len(errors) == (status == 2) and interrupted == (status == 130)
        refused = self.damaged or fault in ("full disk", "no folder")
        if self.n_ranks > 1 or fault == "two at once":  # whose launcher was killed just now, or one of the two
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

    def wait_for_moment(self) -> None:
        """A random moment of a run; half of the times the next one, after that, at which a file is being written."""
        time.sleep(self.dice.uniform(0.1, 0.8 * self.seconds))
        deadline, written = time.monotonic() + self.seconds * self.dice.randrange(2), False
        while time.monotonic() < deadline and not written:
            with contextlib.suppress(FileNotFoundError):  # a file that goes as it is looked for
                written = any(path.suffix == ".tmp" for path in self.files())


def signalled(case: Case, fault: str) -> str:
    """A signal to the run, or to a worker of torchrun, at a random moment."""

    def during(pid: int) -> None:
        case.wait_for_moment()
        with contextlib.suppress(OSError):  # it has ended
            if fault.endswith("worker"):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                pid = int(case.dice.choice(children or [str(pid)]))
            os.kill(pid, SIGNALS[fault.split()[0]])

    return case.outcome(case.run(during), fault)


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
    ended = []

    def during(pid: int) -> None:
        case.wait_for_moment()
        script, flags = COMMANDS[case.stage]
        case.servers[1].start(script, [*flags, *folders(case.root), "--resume"], case.root / "second")
        ended.append(case.servers[1].wait())

    first = case.outcome(case.run(during), fault)
    second = case.outcome(ended[0], fault, "second")
    return "wrong" if first == "wrong" else second


def again(case: Case, fault: str) -> str:
    """The run until it is done, and then once more without --resume."""
    case.run()
    case.option = ""
    return case.outcome(case.run(), fault)


FAULTS: dict[str, Callable[[Case, str], str]] = {
    **dict.fromkeys([*SIGNALS, "SIGKILL of a worker"], signalled),
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
    deadline = time.monotonic() + SECONDS_OF_RANKS
    status = case.run()
    while status and time.monotonic() < deadline and "another run is at work" in "".join(case.errors()):
        time.sleep(1)
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
        self.servers = [Processes(), Processes()]
        self.finished: dict[tuple[str, int], tuple[Case, dict[str, Any]]] = {}
        self.counts: Counter[tuple[str, str]] = Counter()
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
            began = time.monotonic()
            assert case.run() == 0, case.said()
            case.seconds = time.monotonic() - began
            self.finished[stage, n_ranks] = case, left(case)
        return self.finished[stage, n_ranks]

    def sequence(self, k: int) -> bool:
        """Run the k-th sequence; returns whether all was as it should be, else it is shown and its folder stays."""
        dice = random.Random(f"{self.seed}/{k}")
        stage, n_ranks = dice.choice([*COMMANDS]), min(self.max_ranks, 2 if dice.random() < 0.15 else 1)
        finished, expected = self.reference(stage, n_ranks)
        case = self.case(f"sequence {k}", stage, n_ranks, dice)
        case.seconds = finished.seconds
        if dice.random() < 0.5:
            shutil.copytree(finished.root / "cache", case.root / "cache")
        happened = []
        faults = [fault for fault in FAULTS if n_ranks > 1 or fault != "SIGKILL of a worker"]
        for fault in dice.choices(faults, k=dice.randint(1, 4)):
            happened.append(f"{fault}: {FAULTS[fault](case, fault)}")
            self.counts[fault, happened[-1].rpartition(": ")[2]] += 1
        finish(case)
        found = left(case)
        differ = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        print(f"{k} {stage}, {n_ranks} rank(s): {'; '.join(happened)}", flush=True)
        if not differ and not case.wrong:
            shutil.rmtree(case.root)
            return True
        print(f"  --seed {self.seed} --sequence {k}: {'; '.join(case.wrong)}; differ: {differ}", flush=True)
        return False

    def table(self) -> str:
        """The counts: a row a fault, a column an outcome."""
        rows = [["fault", "times", *OUTCOMES]]
        for fault in FAULTS:
            counts = [self.counts[fault, outcome] for outcome in OUTCOMES]
            rows.append([fault, str(sum(counts)), *map(str, counts)])
        return "\n".join(f"{row[0]:<20}" + "".join(f"{cell:>13}" for cell in row[1:]) for row in rows)


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
    print(faults.table())
    print(f"{len(good)} sequences, {sum(good)} as without faults, {len(good) - sum(good)} not")
    if all(good):
        shutil.rmtree(folder)
    else:
        print(f"what differed is in {folder}")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
