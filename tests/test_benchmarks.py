"""The benchmarks on a GPU, as far as a machine without one can tell: where data lies, and how it is timed."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import (
    ENTRIES,
    __main__,
    associative_embedding,
    cosine_margin,
    deep_metric,
    gather_at,
    group_keypoints,
    group_on_sphere,
    harness,
    instance_pool,
    machine,
    mean_shift,
    recurrent_mean_shift,
    seeds,
    timing,
    workloads,
)
from benchmarks.harness import OURS, Entry, Row, Settings, compare
from benchmarks.machine import Ceilings, Work
from instembed import _arguments
from tests.second_device import DEVICE, Elsewhere, second_device

CPU = torch.device("cpu")
CUDA_ENTRIES = [entry for entry in ENTRIES if entry.cuda]

# ---------------------------------------------------------------------------------------------------------
# Where data lies


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workloads of the same kinds, in which every entry ends in a second; on one thread, which is enough."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, w in workloads.WORKLOADS.items():
        size = (
            (300,)
            if name == "points"
            else tuple(n // (8 if name in ("frame", "city") else 16) for n in w.size)
        )
        smaller = replace(w, batch=min(w.batch, 2), size=size, instances=min(w.instances, 6))
        monkeypatch.setitem(workloads.WORKLOADS, name, smaller)
    for module in (cosine_margin, recurrent_mean_shift, group_on_sphere):
        monkeypatch.setattr(module, "BLOCK", 128)
        for name, w in module.WORKLOADS.items():
            monkeypatch.setitem(module.WORKLOADS, name, w._replace(points=300))
        build = module.batch_of if module is cosine_margin else module.points_of
        monkeypatch.setattr(module, build.__name__, build.__wrapped__)
    for name in mean_shift.CLOUDS:
        monkeypatch.setitem(mean_shift.CLOUDS, name, (300, 4, 5))
    monkeypatch.setattr(mean_shift, "problem", mean_shift.problem.__wrapped__)
    monkeypatch.setattr(mean_shift, "MIN_SIZE", 50)
    for module in (associative_embedding, gather_at):
        monkeypatch.setattr(module, "IMAGES", 2)
        monkeypatch.setattr(module, "SIZE", 24)
    monkeypatch.setattr(associative_embedding, "PEOPLE", 4)
    monkeypatch.setattr(gather_at, "SHAPES", {"joints": (3, 20), "dense": (2, 100), "limbs": (45, 3)})
    crowd = group_keypoints.crowd
    monkeypatch.setattr(group_keypoints, "crowd", lambda images: crowd(1, people=3, size=32))
    monkeypatch.setattr(instance_pool, "CHANNELS", 5)
    monkeypatch.setattr(deep_metric, "CHANNELS", 8)
    scene = seeds.scene
    monkeypatch.setattr(seeds, "scene", lambda kind, size, channels, count: scene(kind, (48, 64), 6, 8))
    monkeypatch.setattr(seeds, "SEEDS", {"iou": 16, "select": 10, "grow": 10})
    monkeypatch.setattr(seeds, "CHUNKS", (1024,))
    yield
    torch.set_num_threads(threads)


def call_each(
    make: Callable[..., dict[str, timing.Call]], data: object, device: torch.device, *_: float
) -> dict[str, float]:
    """In place of measure: everything is where it was asked for, and so is what comes out."""
    assert device == DEVICE
    timing.mapped(data, _is_elsewhere)
    calls = make(data)
    for call in calls.values():
        result = call()
        timing.mapped(tuple(result) if isinstance(result, tuple) else result, _is_elsewhere)
    return dict.fromkeys(calls, 1.0)


class CpuGenerator(torch.Generator):
    """Of any device: "meta" has none."""

    def __new__(cls, device: object = None) -> CpuGenerator:
        return super().__new__(cls)


def _is_elsewhere(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, Elsewhere)
    return tensor


@pytest.mark.parametrize("entry", CUDA_ENTRIES, ids=lambda entry: entry.name)
def test_entries_keep_to_their_device(entry: Entry, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Generator", CpuGenerator)
    monkeypatch.setattr(_arguments, "check_generator", lambda generator, device: None)
    monkeypatch.setattr(harness, "measure", call_each)
    monkeypatch.setattr(harness, "peak_extra_mib", lambda call, device: None)
    settings = Settings(device=DEVICE, compile=False, ceilings=Ceilings(1.0, 1.0))
    with second_device():
        # The first and the last differ most.
        for workload in {entry.workloads[0], entry.workloads[-1], *entry.gpu_workloads}:
            rows = entry.run(workload, settings)
            assert any(row.contestant == OURS for row in rows)
            assert all(row.share is not None and row.share > 0 for row in rows)
            entry.profile(workload, settings)()


def test_second_device_sees_what_is_not_there() -> None:
    with second_device():
        there, here = torch.zeros(3).to(DEVICE), torch.zeros(3)
        assert isinstance(there + 1, Elsewhere) and (there + 1).tolist() == [1, 1, 1]
        assert torch.tensor([2.0], device=DEVICE).item() == 2
        with pytest.raises(AssertionError, match="a tensor of the CPU"):
            there + here
        with pytest.raises(TypeError, match="NumPy"):
            there.numpy()


# ---------------------------------------------------------------------------------------------------------
# How it is timed


class Gpu:
    """Events on a clock that only calls advance, and what happened in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, l2: int) -> None:
        self.now, self.log = 0.0, []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now
                gpu.log.append("event")

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: gpu.log.append("wait"))
        properties = SimpleNamespace(L2_cache_size=l2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        clocks = timing._device_clocks
        monkeypatch.setattr(timing, "_device_clocks", lambda make, data, _: clocks(make, data, CPU))
        zero = Tensor.zero_

        def flush(tensor: Tensor) -> Tensor:
            assert tensor.nbytes == 2 * l2
            gpu.log.append("flush")
            return zero(tensor)

        monkeypatch.setattr(Tensor, "zero_", flush)

    def call(self, name: str, seconds: float, data: Tensor | None = None) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds
            self.log.append(name if data is None else (name, data.data_ptr()))

        return call


def test_events_enclose_a_call_with_a_cold_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, l2=64)
    make = {"a": gpu.call("a", 0.01), "b": gpu.call("b", 0.03)}
    times = timing.measure(lambda _: make, torch.zeros(100), torch.device("cuda"), rounds=3, seconds=0.035)
    assert times == {"a": pytest.approx(10), "b": pytest.approx(30)}
    timed = [k for k, what in enumerate(gpu.log) if what == "event"][::2]
    for start in timed:
        assert gpu.log[start - 1] == "flush" and gpu.log[start + 2] == "event"
    turns = [
        what for what in "".join(str(x) for x in gpu.log if x in ("a", "b", "wait")).split("wait") if what
    ]
    assert turns[-4:] == ["aaa", "b", "aaa", "b"]  # 0.035 s each, in turn


def test_warm_up_waits_for_a_steady_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, l2=64)
    left = [2.0, 0.5, 0.3, 0.2]  # a call that compiles, and others that allocate

    def call() -> None:
        gpu.now += left.pop(0) if left else 0.1

    times = timing.measure(lambda _: {"a": call}, torch.zeros(100), torch.device("cuda"), 2, 0.5)
    assert times["a"] == pytest.approx(100) and not left


def test_what_takes_seconds_is_called_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, l2=64)
    make = {"slow": gpu.call("slow", 2.0)}
    assert timing.measure(lambda _: make, torch.zeros(4), torch.device("cuda"), 5, 0.2)["slow"] == 2000
    assert gpu.log.count("slow") == 3


def test_data_that_fits_the_l2_rotates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [timing.rotating_sets(torch.zeros(n), 1000) for n in (1, 125, 250, 251)] == [4, 3, 2, 1]
    assert timing.rotating_sets({"x": (torch.zeros(100), 3, torch.zeros(100))}, 1000) == 2
    gpu = Gpu(monkeypatch, l2=1000)
    data = mean_shift.Problem(torch.rand(5, 6).t(), {"mask": torch.ones(5)}, torch.zeros(5))
    seen = []

    def make(task: mean_shift.Problem) -> dict[str, timing.Call]:
        assert torch.equal(task.embeddings, data.embeddings)
        assert task.embeddings.stride() == data.embeddings.stride()
        seen.append(task)
        return {"a": gpu.call("a", 0.01, task.embeddings)}

    timing.measure(make, data, torch.device("cuda"), rounds=1, seconds=0.08)
    assert len(seen) == 4 and seen[0] is data
    assert len({task.options["mask"].data_ptr() for task in seen}) == 4
    used = [place for _, place in (x for x in gpu.log if isinstance(x, tuple))]
    assert used == [used[k % 4] for k in range(len(used))] and len(set(used)) == 4


def test_rows_show_the_share_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "measure", lambda *_: {OURS: 4.0, "other": 8.0})
    limits = Ceilings(copy_gb_s=2, product_gflop_s=10)
    assert limits.limit_ms(Work(bytes=2e6)) == 1 and limits.limit_ms(Work(bytes=2e6, flops=2e7)) == 2
    rows = compare(
        ("op", "lane", "forward"),
        lambda _: {OURS: lambda: None, "other": lambda: None},
        torch.zeros(1),
        Settings(ceilings=limits),
        Work(bytes=4e6),
        peaks=("other",),
    )
    assert [(row.limit_ms, row.share) for row in rows] == [(2, 0.5), (2, 0.25)]
    assert rows[0].peak_mib is None
    assert "50.0%" in harness.table(rows) and "2.00x" in harness.table(rows)


def test_tf32_is_left_as_it_was() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(KeyError), machine.tf32(allowed=not before):
        assert torch.backends.cuda.matmul.allow_tf32 is not before
        raise KeyError
    assert torch.backends.cuda.matmul.allow_tf32 is before


# ---------------------------------------------------------------------------------------------------------
# What is run


def options(device: str, *, entry: tuple[str, ...] = (), workload: list[str] | None = None) -> Namespace:
    return Namespace(device=torch.device(device), entry=entry, workload=workload)


def test_entries_and_workloads_of_a_device() -> None:
    on_cpu = {(entry.name, workload) for entry, workload in __main__.chosen(options("cpu"))}
    on_gpu = {(entry.name, workload) for entry, workload in __main__.chosen(options("cuda"))}
    assert on_gpu - on_cpu == {("discriminative", "train"), ("mean_shift", "lane")}
    assert {name for name, _ in on_cpu - on_gpu} == {"detections"}
    train = __main__.chosen(options("cpu", entry=("discriminative",), workload=["train"]))
    assert [workload for _, workload in train] == ["train"]
    with pytest.raises(SystemExit, match="detections on cuda"):
        __main__.chosen(options("cuda", entry=("detections",)))


def test_an_entry_that_fails_leaves_the_others_their_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled = {}

    def run(workload: str, settings: Settings) -> list[Row]:
        assert workload != "bad"
        compiled[workload] = settings.compile
        return [Row("op", workload, "forward", OURS, 1.0)]

    entries = [Entry(name, (), (name,), run, lambda *_: print) for name in ("bad", "good", "other")]
    path = tmp_path / "new" / "rows.json"
    monkeypatch.setattr(__main__, "ENTRIES", entries)
    monkeypatch.setattr(__main__, "ceilings", lambda *_: Ceilings(1.0, 2.0))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--json", str(path), "--compile-only", "good"])
    with pytest.raises(SystemExit, match="bad"):
        __main__.main()
    written = json.loads(path.read_text())
    assert [row["workload"] for row in written["rows"]] == ["good", "other"]
    assert written["machine"]["copy_gb_s"] == 1 and written["machine"]["commit"]
    assert compiled == {"good": True, "other": False}
