"""How things are timed: contestants take turns in one run, medians are kept, and nothing is left out."""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

Call = Callable[[], object]
Data = TypeVar("Data")  # a tensor, or tuples and dicts of them and of anything else


def measure(
    make: Callable[[Data], dict[str, Call]], data: Data, device: torch.device, rounds: int, seconds: float
) -> dict[str, float]:
    """Median milliseconds a call of the contestants that `make` makes of data.

    They take turns of some seconds, so that a busy machine slows all of them. On a GPU, each has several
    copies of data that fits the L2, and a call never finds its own there.
    """
    if device.type == "cuda":
        clocks: dict[str, _HostClock | DeviceClock] = {**_device_clocks(make, data, device)}
    else:
        clocks = {name: _HostClock(call) for name, call in make(data).items()}
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for round_index in range(rounds):
        for name, clock in clocks.items():
            if round_index == 0:
                clock.warm_up()  # compiles, and shows whether a call takes seconds
                first = clock.once()
                slow = first > 1
                times[name].append(first) if slow else None
            elif times[name] and min(times[name]) > 1:
                continue
            if not (times[name] and min(times[name]) > 1):
                times[name].extend(clock.turn(seconds))
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


class _HostClock:
    def __init__(self, call: Call) -> None:
        self.warm_up = call
        self._timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())

    def once(self) -> float:
        return self._timer.timeit(1).median

    def turn(self, seconds: float) -> Sequence[float]:
        return self._timer.blocked_autorange(min_run_time=seconds).times


class DeviceClock:
    """CUDA events around each call, after a write of `flush`, which is larger than the L2.

    While it is written the host queues what follows, so that launches count where the device waits for them.
    """

    def __init__(self, calls: Sequence[Call], flush: Tensor) -> None:
        self._number = len(calls)  # the same on copies of the data, in turn
        self._calls = itertools.cycle(calls)
        self._flush = flush
        self._last = 0.0

    def warm_up(self) -> None:
        """Until two calls in a row take the same time, but for a tenth; at most 20, or one of a second."""
        next(self._calls)()
        before = self.once()
        for k in range(20):
            if before > 1:
                return
            now = self.once()
            if k + 2 >= self._number and abs(now - before) <= 0.1 * before:
                return
            before = now

    def once(self) -> float:
        (self._last,) = self._times(1)
        return self._last

    def turn(self, seconds: float) -> Sequence[float]:
        return self._times(max(1, min(200, int(seconds / max(self._last, 1e-6)))))

    def _times(self, count: int) -> list[float]:
        events = []
        for call in itertools.islice(self._calls, count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def _device_clocks(
    make: Callable[[Data], dict[str, Call]], data: Data, device: torch.device
) -> dict[str, DeviceClock]:
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * l2, dtype=torch.uint8, device=device)
    copies = [data, *(mapped(data, torch.clone) for _ in range(rotating_sets(data, l2) - 1))]
    sets = [make(copy) for copy in copies]
    return {name: DeviceClock([calls[name] for calls in sets], flush) for name in sets[0]}


def rotating_sets(data: object, l2: int) -> int:
    """Copies of data that a contestant gets in turn: 1 of what exceeds the L2, at most 4."""
    size = 0

    def add(tensor: Tensor) -> Tensor:
        nonlocal size
        size += tensor.nbytes
        return tensor

    mapped(data, add)
    return min(4, 1 + l2 // max(size, 1))


def mapped(data: Data, change: Callable[[Tensor], Tensor]) -> Data:
    """Data with its tensors changed."""
    result: Any = data
    if isinstance(data, Tensor):
        result = change(data)
    elif isinstance(data, dict):
        result = {key: mapped(value, change) for key, value in data.items()}
    elif isinstance(data, tuple):
        parts = [mapped(value, change) for value in data]
        result = type(data)(*parts) if hasattr(data, "_fields") else tuple(parts)
    return result


def peak_extra_mib(call: Call, device: torch.device) -> float | None:
    """Peak memory during a call beyond what was held before, of the process, or of torch on a GPU.

    None if the system can't tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    try:
        libc = ctypes.CDLL(None)
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
