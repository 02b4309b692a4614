"""How things are measured: contestants take turns in one run, medians are kept, and nothing is left out."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

import instembed

OURS = "instembed"
FLOOR = "floor"  # the memory traffic that cannot be avoided, as torch does it


@dataclass
class Row:
    """One contestant on one workload."""

    op: str
    workload: str
    what: str  # "forward", "forward + backward", ...
    contestant: str
    ms: float
    peak_mib: float | None = None  # beyond what was there before the call
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """What `python -m benchmarks` lists and runs."""

    name: str
    ops: tuple[str, ...]  # public functions that it times
    workloads: tuple[str, ...]
    run: Callable[[str, Settings], list[Row]]
    profile: Callable[[str], Callable[[], object]]  # workload -> our call, for --profile


@dataclass(frozen=True)
class Settings:
    rounds: int = 5
    seconds: float = 0.2  # a contestant and round
    slow: bool = True  # with contestants that take seconds a call
    compile: bool = True
    options: dict[str, Any] = field(default_factory=dict)


def measure(contestants: dict[str, Callable[[], object]], settings: Settings) -> dict[str, float]:
    """Median milliseconds a call. Contestants take turns, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        for name, call in contestants.items()
    }
    for round_index in range(settings.rounds):
        for name, timer in timers.items():
            if round_index == 0:
                contestants[name]()  # compiles, and shows whether a call takes seconds
                first = timer.timeit(1).median
                slow = first > 1
                times[name].append(first) if slow else None
            elif times[name] and min(times[name]) > 1:
                continue
            if not (times[name] and min(times[name]) > 1):
                times[name].extend(timer.blocked_autorange(min_run_time=settings.seconds).times)
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def peak_extra_mib(call: Callable[[], object]) -> float | None:
    """Peak memory of the process during a call beyond what it held before; None if the system can't tell."""
    try:
        libc = ctypes.CDLL(None)
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        result = call()
        peak = _status("VmHWM")
        del result
        return (peak - before) / 1024
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise OSError(key)


def table(rows: Sequence[Row]) -> str:
    """Milliseconds, and how many times faster we are; floors show how far from the memory's speed we are."""
    lines = [
        f"{'op':24} {'workload':9} {'what':19} {'contestant':22} {'ms':>10} {'ours is':>9} {'peak MiB':>9}"
    ]
    ours = {(r.op, r.workload, r.what): r.ms for r in rows if r.contestant == OURS}
    for row in rows:
        mine = ours.get((row.op, row.workload, row.what))
        ratio = "" if mine is None or row.contestant == OURS else f"{row.ms / mine:8.2f}x"
        peak = "" if row.peak_mib is None else f"{row.peak_mib:9.1f}"
        lines.append(
            f"{row.op:24} {row.workload:9} {row.what:19} {row.contestant:22} {row.ms:10.3f} {ratio:>9} "
            f"{peak:>9} {row.note}".rstrip()
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "instembed": instembed.__version__,
        "commit": commit,
    }


def write_json(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
    )
