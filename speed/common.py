"""Shared by the benchmarks: the data, both sides' timing and memory, the machine's peak, the comparison, the table.

The two sides are timed in child processes of one run, alternating: keep_memory() changes a whole process once it is
called, the reference must run without it and ours with it, and a process has one peak of memory. A child imports and
prepares first; only the work itself is timed. On a GPU both sides run in this process, ours with the settings of
repeat_exactly, and each has run as a whole once before, to warm up. At tiny scale both sides of a Bench run in this
process, untimed, for the comparison alone.
"""

import argparse
import functools
import gc
import multiprocessing
import os
import pickle
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data.benchmarks import DataOptions, Split, load_split
from data.glyphs import render_glyphs
from data.transforms import Augmentation, normalise
from engine.errors import UserError
from engine.precision import Precision
from engine.records import provenance, write_json
from engine.run import Run, keep_memory, repeat_exactly, select_device
from models.backbone import Backbone
from persistence.checkpoints import create_backbone
from reporting.result_table import markdown_table

T = TypeVar("T")
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How the benchmarks run; `folder` holds the rendered benchmark and the cache of decoded images."""

    scale: str
    precision: str
    workers: int
    folder: Path
    device: str = "cpu"
    cuda_graphs: bool = False

    @property
    def tiny(self) -> bool:
        return self.scale == "tiny"

    @property
    def img_size(self) -> int:
        return 32 if self.tiny else 84

    @property
    def run(self) -> Run:
        """Of our path; the reference is in float32, as published."""
        precision = Precision(self.precision, self.device)
        return Run(torch.device(self.device), precision, graphs=self.cuda_graphs and self.device == "cuda")

    @property
    def rounding(self) -> str:
        """The precision whose tolerances hold: in fp32 a GPU's convolutions are of TF32, unless PyTorch is told."""
        return "bf16" if self.device == "cuda" else self.precision


@dataclass(frozen=True)
class Measured:
    """Seconds of one whole work, measured or scaled up from a stated part of it, and the answer it gave."""

    seconds: float
    answer: dict[str, Tensor]
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """Works of one stage beside a plain loop of the published steps.

    targets: of each work, by the precisions in which it is timed, the least ratio to the reference on a CPU.
    reference and ours give a Measured for each work; flops the floating-point operations of each, of our path.
    tolerances: for each answer the largest relative error |ours - reference| / |reference|, by precision.
    """

    targets: dict[str, dict[str, float]]
    reference: Callable[[Setting], dict[str, Measured]]
    ours: Callable[[Setting], dict[str, Measured]]
    flops: Callable[[Setting], dict[str, float]]
    tolerances: dict[str, dict[str, float]]

    @property
    def first_work(self) -> str:
        """What the bench is called."""
        return next(iter(self.targets))

    def settings(self, setting: Setting) -> list[Setting]:
        """A setting in each of the precisions."""
        precisions = dict.fromkeys(name for of_work in self.targets.values() for name in of_work)
        return [replace(setting, precision=name) for name in precisions]


# What gives the rows of a stage: (setting, repeats) -> rows.
Rows = Callable[[Setting, int], list[Row]]


def dataset(setting: Setting) -> Path:
    """The folder <split>/<class>/<image> of glyphs as JPEG files, rendered when missing.

    At full scale it has the size of mini-ImageNet: 64, 16 and 20 classes of 600 images.
    """
    root = setting.folder / f"glyphs-{setting.scale}"
    if not root.exists():
        if setting.tiny:
            render_glyphs(root, n_images=10, n_class=(8, 5, 5))
        else:
            render_glyphs(root, n_images=600)
    return root


@functools.lru_cache
def load(setting: Setting, split: str) -> tuple[Split, list[Path]]:
    """A split as the scripts load it, decoded once, and the files of its images, which the reference decodes."""
    root = dataset(setting)
    crop, cache = Augmentation().crop_scale, setting.folder / "cache"
    options = DataOptions(root.parent, setting.img_size, cache, num_workers=setting.workers, crop_scale=crop)
    loaded = load_split(options, root.name, split)
    return loaded, [root / split / name for name in loaded.image_names]


def spread(n: int, k: int) -> Tensor:
    """k of the indices 0 ... n - 1, evenly spread; all of them when there are not as many."""
    return torch.arange(n) if k >= n else torch.arange(k) * n // k


def new_conv4(setting: Setting, base: Split) -> Backbone:
    """A Conv4 of random weights whose batch norm has the statistics of 64 base images, the same on both sides.

    In channels-last memory, as in the scripts; reference_loops.conv4 gives the reference a contiguous copy.
    """
    backbone = create_backbone("Conv4", setting.img_size, seed=0)
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        backbone.train()(normalise(base.images[spread(len(base.labels), 64)]))
    for norm in norms:
        norm.momentum = 0.1
    return backbone.to(setting.run.device, memory_format=torch.channels_last)


def difference(module: nn.Module, before: dict[str, Tensor]) -> Tensor:
    """Change of the weight matrices since a state dict of clones: one vector.

    Vectors stay out: a convolution's bias before batch norm has no gradient but rounding, which Adam makes a step of.
    """
    after = module.state_dict()
    changed = [(after[name] - value).flatten() for name, value in before.items() if value.ndim > 1]
    return torch.cat(changed) if changed else torch.zeros(1)


def clones(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a state dict, contiguous."""
    state = module.state_dict()
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def seconds_of(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of `work` and its result; where a GPU is in use, between two events on it."""
    if torch.cuda.is_initialized():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        result = work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, result
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def timed(work: Callable[[], T], at_least: float = 0.0) -> tuple[float, T]:
    """Seconds of `work` and its result; repeated for `at_least` seconds, of which the median is given."""
    seconds: list[float] = []
    started = time.perf_counter()
    while True:
        once, result = seconds_of(work)
        seconds.append(once)
        if time.perf_counter() - started >= at_least:
            # The first of several finds caches cold.
            return statistics.median(seconds[1:] or seconds), result


def count_flops(work: Callable[[], Any]) -> float:
    """Floating-point operations of the convolutions and matrix products of `work`, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def peak_flops(run: Run) -> float:
    """Operations a second of the faster of a large matrix product and a convolution of Conv4, the best of ten."""
    side = 8192 if run.device.type == "cuda" else 2048
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[run.precision.name]
    a = torch.randn(side, side).to(run.device, dtype)
    x = torch.randn(64, 64, 42, 42).to(run.device, dtype, memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3).to(run.device, dtype, memory_format=torch.channels_last)
    rates = []
    for work in (lambda: a @ a, lambda: torch.conv2d(x, w, padding=1)):
        rates += [count_flops(work) / timed(work)[0] for _ in range(10)]
    return max(rates)


def peak_memory() -> int:
    """Peak resident bytes of this process, of its own address space alone where Linux tells; or of tensors on a GPU."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak


def compare(bench: Bench, rounding: str, reference: dict[str, Measured], ours: dict[str, Measured]) -> dict[str, float]:
    """The relative errors of our answers, by `work: answer`, within the tolerances of a rounding (see Setting).

    Raises AssertionError when one is not.
    """
    assert reference.keys() == ours.keys() == bench.targets.keys(), (reference.keys(), ours.keys())
    errors = {}
    for work, expected in reference.items():
        assert expected.answer and expected.answer.keys() == ours[work].answer.keys(), work
        for name, right in expected.answer.items():
            right, found = right.cpu(), ours[work].answer[name].cpu()
            assert found.shape == right.shape, f"{work}: {name} is {tuple(found.shape)}, not {tuple(right.shape)}"
            error = ((found - right).double().norm() / right.double().norm().clamp_min(1e-12)).item()
            bound = bench.tolerances[name][rounding]
            assert error <= bound, f"{work}: {name} is off by {error:.2g} of the reference's, more than {bound:g}"
            errors[f"{work}: {name}"] = error
    return errors


def check(bench: Bench, setting: Setting) -> dict[str, float]:
    """Run both sides once in this process and compare their answers; see compare."""
    return compare(bench, setting.rounding, bench.reference(setting), bench.ours(setting))


def measure_side(bench: Bench, setting: Setting, side: str) -> tuple[dict[str, Measured], int]:
    """One side in this process: its Measured and its peak of memory in bytes."""
    if setting.device == "cuda":
        torch.use_deterministic_algorithms(side == "ours", warn_only=True)
    elif side != "reference":
        keep_memory()
    if side == "limit":
        peak = peak_flops(setting.run)
        note, counted = f"{peak / 1e9:.0f} GFLOP/s", bench.flops(setting)
        return {work: Measured(flops / peak, {}, note) for work, flops in counted.items()}, 0
    work = bench.ours if side == "ours" else bench.reference
    if setting.device == "cuda":
        work(setting)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return work(setting), peak_memory()


def pickled(function: Callable[..., Any], *arguments: Any) -> bytes:
    """The result of a function as bytes, for a pipe would pass tensors on by files that end with their process."""
    multiprocessing.set_start_method(None, force=True)  # a loader's workers start as in a script
    return pickle.dumps(function(*arguments))


def in_child(function: Callable[..., T], *arguments: Any) -> T:
    """The result of a module's function, called in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return cast(T, pickle.loads(pool.submit(pickled, function, *arguments).result()))


def profile(bench: Bench, setting: Setting) -> str:
    """Where our side's time goes: its costliest operations, by the time in themselves, preparation included."""
    keep_memory()
    with torch.profiler.profile() as profiler:
        bench.ours(setting)
    return profiler.key_averages().table(
        sort_by=f"self_{setting.device}_time_total", row_limit=15, max_name_column_width=45
    )


def row(work: str, reference: float, ours: float, target: float | None = None, **more: Any) -> Row:
    """A row of the table: seconds of both sides, and the least ratio that is aimed at.

    more: of `ratio_to_limit`, `peak_memory` (bytes of both sides) and `note` what there is; the JSON keeps all of it.
    """
    ratio = reference / ours
    return {"work": work, "reference_seconds": reference, "ours_seconds": ours, "ratio": ratio, "target": target} | more


def measure(bench: Bench, setting: Setting, repeats: int) -> list[Row]:
    """A row for each precision and work: median seconds of both sides, the ratios, peaks of memory, errors."""
    for split in ("base", "val", "novel"):  # rendered and decoded before any side is timed
        load(setting, split)
    one = measure_side if setting.device == "cuda" else functools.partial(in_child, measure_side)
    settings = bench.settings(setting)
    theirs: list[tuple[dict[str, Measured], int]] = []
    ours: dict[str, list[tuple[dict[str, Measured], int]]] = {s.precision: [] for s in settings}
    errors: dict[str, dict[str, float]] = {}
    for i in range(repeats):
        print(f"{bench.first_work}: {i + 1} of {repeats}", file=sys.stderr, flush=True)
        theirs.append(one(bench, setting, "reference"))
        for s in settings:
            ours[s.precision].append(one(bench, s, "ours"))
            errors[s.precision] = compare(bench, s.rounding, theirs[-1][0], ours[s.precision][-1][0])
    rows = []
    for s in settings:
        limit, sides = one(bench, s, "limit")[0], (theirs, ours[s.precision])
        for work, targets in bench.targets.items():
            if s.precision in targets:
                seconds = [statistics.median(measured[work].seconds for measured, _ in side) for side in sides]
                more = {
                    "ratio_to_limit": seconds[1] / limit[work].seconds,
                    "limit": limit[work].note,
                    "peak_memory": [statistics.median(peak for _, peak in side) for side in sides],
                    "errors": {name: e for name, e in errors[s.precision].items() if name.startswith(f"{work}: ")},
                    "note": sides[1][-1][0][work].note,
                }
                target = targets[s.precision] if setting.device == "cpu" else None
                rows.append(row(f"{work}, {s.precision}", seconds[0], seconds[1], target, **more))
    return rows


def markdown(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    header = ["work", "reference s", "ours s", "ratio", "target", "ours / limit", "peak memory MiB", "note"]
    table = []
    for r in rows:
        target = f"{r['target']:.3g}x, {'met' if r['ratio'] >= r['target'] else 'missed'}" if r["target"] else ""
        limit = f"{r['ratio_to_limit']:.1f}" if "ratio_to_limit" in r else ""
        memory = " -> ".join(f"{peak / 2**20:.0f}" for peak in r.get("peak_memory", []))
        seconds = [f"{r[side]:.3g}" for side in ("reference_seconds", "ours_seconds")]
        table.append([r["work"], *seconds, f"{r['ratio']:.3g}x", target, limit, memory, r.get("note", "")])
    return markdown_table(header, table)


def parser(names: list[str], description: str) -> argparse.ArgumentParser:
    """The flags of the benchmarks."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(prog="python -m speed", description=description, formatter_class=formatter)
    p.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help="stages to run")
    p.add_argument("--repeats", type=int, default=5, help="runs of each side; medians are reported")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of both sides")
    p.add_argument("--cuda_graphs", action="store_true", help="on a GPU: our steps as graphs, where the scripts can")
    p.add_argument("--scale", choices=["full", "tiny"], default="full", help="tiny only compares the answers")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="of the loaders of both sides")
    folder = Path("./fs_benchmarks/.cache/speed")
    p.add_argument("--folder", type=Path, default=folder, help="of the rendered glyphs and the decoded images")
    p.add_argument("--output", type=Path, default=Path("./results/tables/speed.json"), help="the JSON of the table")
    p.add_argument("--profile", action="store_true", help="only print where our side's time goes")
    return p


def processor(device: str) -> str:
    """The name of what computes, the vector instructions that PyTorch uses and its threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    fields = info.read_text().partition("model name\t: ")[2] if info.is_file() else platform.processor()
    name = fields.partition("\n")[0]
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def run(benches: dict[str, Bench], others: Mapping[str, Rows], description: str) -> None:
    """The command line of the benchmarks: compare and, at full scale, time them; print and write the table.

    others: stages on a CPU that have no answers to compare.
    """
    args = parser([*others, *benches], description).parse_args()
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: give at least 1")
    device = select_device(args.device).type
    setting = Setting(args.scale, "fp32", args.workers, args.folder.resolve(), device, args.cuda_graphs)
    if device == "cuda":
        repeat_exactly()
    chosen = {name: bench for name, bench in benches.items() if name in args.only}
    for bench in chosen.values() if args.profile or setting.tiny else []:
        for s in bench.settings(setting):
            if args.profile:
                said = f"ours\n{profile(bench, s)}"
            else:
                said = f"the same answers as the reference; largest relative error {max(check(bench, s).values()):.1g}"
            print(f"{bench.first_work}, {s.precision}: {said}")
    if not (args.profile or setting.tiny):
        stages = {name: rows for name, rows in others.items() if name in args.only and device == "cpu"}
        stages |= {name: functools.partial(measure, bench) for name, bench in chosen.items()}
        print_table(stages, setting, args)


def print_table(stages: dict[str, Rows], setting: Setting, args: argparse.Namespace) -> None:
    """Measure the stages; print and write their table. Exits with 1 when an answer was wrong."""
    rows: list[Row] = []
    wrong = []
    about = f"{processor(setting.device)}, torch {torch.__version__}, median of {args.repeats}"
    for stage in stages.values():  # an hour of measurements is not lost to the last one
        try:
            rows += stage(setting, args.repeats)
        except AssertionError as error:
            wrong.append(str(error))
        write_json(args.output, {"processor": about, "rows": rows} | provenance(vars(args), setting.run))
    print(f"{markdown(rows)}\n\n{about}; {args.output}")
    if wrong:
        sys.exit("\n".join(f"wrong answer: {line}" for line in wrong))
