"""What entries are made of, and what becomes of them: rows, tables, JSON."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import Ceilings, Work
from benchmarks.timing import Call, Data, mapped, measure, peak_extra_mib

Make = Callable[[tuple[Any, ...]], dict[str, Call]]

CPU = torch.device("cpu")
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
    work: Work | None = None
    limit_ms: float | None = None  # what the measured ceilings allow for the work
    share: float | None = None  # of the limit in what was measured: 1 is the hardware's speed


@dataclass(frozen=True)
class Entry:
    """What `python -m benchmarks` lists and runs."""

    name: str
    ops: tuple[str, ...]  # public functions that it times
    workloads: tuple[str, ...]
    run: Callable[[str, Settings], list[Row]]
    profile: Callable[[str, Settings], Call]  # our call, for --profile
    gpu_workloads: tuple[str, ...] = ()  # of the CPU only when asked for by name
    cuda: bool = True  # has a CUDA kernel


@dataclass(frozen=True)
class Settings:
    rounds: int = 5
    seconds: float = 0.2  # a contestant and round
    slow: bool = True  # with contestants that take seconds a call
    compile: bool = True
    device: torch.device = CPU
    ceilings: Ceilings | None = None

    @property
    def gpu(self) -> bool:
        return self.device.type != "cpu"

    def place(self, data: Data) -> Data:
        """Workloads are made on the CPU, to have the same bits everywhere."""
        return mapped(data, lambda tensor: tensor.to(self.device))

    def room(self, instances: int) -> int | None:
        """max_instances: on a GPU, where ops cannot ask, callers say how many an image has."""
        return instances if self.gpu else None


def compare(
    row: tuple[str, str, str],
    make: Callable[[Data], dict[str, Call]],
    data: Data,
    settings: Settings,
    work: Work | None = None,
    peaks: Collection[str] | None = None,
) -> list[Row]:
    """Rows (op, workload, what) of the contestants that `make` makes of data; with peaks of all, or of some.

    Peaks are those of new calls: one that has run holds a gradient.
    """
    times = measure(make, data, settings.device, settings.rounds, settings.seconds)
    limit = settings.ceilings.limit_ms(work) if settings.ceilings and work else None
    rows = []
    for name, call in make(data).items():
        peak = peak_extra_mib(call, settings.device) if peaks is None or name in peaks else None
        share = limit / times[name] if limit is not None else None
        rows.append(Row(*row, name, times[name], peak, work, limit, share))
    return rows


def each(make: Callable[..., Call], functions: Mapping[str, Callable[..., object]]) -> Make:
    """For `compare`: make(function, *data) of each function."""
    return lambda data: {name: make(function, *data) for name, function in functions.items()}


def installed(library: str) -> bool:
    """Whether the contestants of a library can take part; says so if not."""
    found = importlib.util.find_spec(library) is not None
    if not found:
        print(f"\n{library} is not installed: its contestants are left out")
    return found


def table(rows: Sequence[Row]) -> str:
    """Milliseconds, how many times faster we are, and how far everyone is from the hardware's speed."""
    lines = [
        f"{'op':26} {'workload':12} {'what':19} {'contestant':24} {'ms':>10} {'ours is':>9} {'peak MiB':>9} "
        f"{'limit ms':>9} {'reached':>7}"
    ]
    ours = {(r.op, r.workload, r.what): r.ms for r in rows if r.contestant == OURS}
    for row in rows:
        mine = ours.get((row.op, row.workload, row.what))
        ratio = "" if mine is None or row.contestant == OURS else f"{row.ms / mine:8.2f}x"
        peak = "" if row.peak_mib is None else f"{row.peak_mib:.1f}"
        limit = "" if row.limit_ms is None else f"{row.limit_ms:.4f}"
        share = "" if row.share is None else f"{row.share:.1%}"
        lines.append(
            f"{row.op:26} {row.workload:12} {row.what:19} {row.contestant:24} {row.ms:10.3f} {ratio:>9} "
            f"{peak:>9} {limit:>9} {share:>7}".rstrip()
        )
    return "\n".join(lines)


def write_json(path: Path, rows: Sequence[Row], machine: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
