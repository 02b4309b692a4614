"""Features at points and location maps against the best PyTorch. The floor zeroes the gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import instembed
from benchmarks.harness import FLOOR, OURS, Entry, Make, Row, Settings, compare, each
from benchmarks.machine import Work
from benchmarks.timing import Call
from instembed import reference
from instembed.readout import BODY_15

IMAGES, SIZE, PEOPLE = 8, 128, 30
SHAPES = {"joints": (64, PEOPLE * 17), "dense": (32, 20_000), "limbs": (3 * 15, PEOPLE)}


class Task(NamedTuple):
    maps: Tensor  # (B, C, H, W)
    points: Tensor  # (B, N, 2), or (B, P, 15, 2)
    valid: Tensor


Gather = Callable[[Tensor, Tensor, Tensor], Tensor]


def task_of(workload: str) -> Task:
    """Points anywhere on the maps, one in three not valid."""
    generator = torch.Generator().manual_seed(0)
    channels, count = SHAPES[workload]
    shape = (IMAGES, count, 15) if workload == "limbs" else (IMAGES, count)
    maps = torch.randn(IMAGES, channels, SIZE, SIZE, generator=generator)
    points = (SIZE - 1) * torch.rand(*shape, 2, generator=generator)
    return Task(maps, points, torch.rand(shape, generator=generator) < 0.67)


def nearest(maps: Tensor, points: Tensor, valid: Tensor) -> Tensor:
    """One gather along the pixels, for points that are known to be on the map."""
    x, y = (points + 0.5).floor().long().unbind(-1)
    pixel = (y * maps.shape[3] + x)[:, None].expand(-1, maps.shape[1], -1)
    return maps.flatten(2).gather(2, pixel).transpose(1, 2) * valid[..., None]


def sampled(maps: Tensor, points: Tensor, valid: Tensor) -> Tensor:
    """F.grid_sample."""
    grid = (points * (2 / (SIZE - 1)) - 1)[:, None]
    values = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return values[:, :, 0].transpose(1, 2) * valid[..., None]


def limb_table(device: torch.device) -> Tensor:
    """(K, 5): the joints that each joint may be read at, best first."""
    order = [[k for limb in BODY_15.limbs if j in limb for k in limb] + [*BODY_15.root] for j in range(15)]
    return torch.tensor([row + row[-1:] * (5 - len(row)) for row in order], device=device)


def limbs(maps: Tensor, keypoints: Tensor, valid: Tensor, *, table: Tensor) -> Tensor:
    """A choice of joint for each joint, one gather for all; for keypoints that are known to be on the map."""
    joints, width = keypoints.shape[2], maps.shape[3]
    seen = valid[..., table]
    choice = table.expand(seen.shape).gather(3, seen.byte().argmax(3, keepdim=True))
    x, y = (keypoints + 0.5).floor().long().unbind(-1)
    pixel = (y * width + x).gather(2, choice[..., 0]).transpose(1, 2)[:, :, None]  # (B, K, 1, P)
    found = maps.view(len(maps), joints, 3, -1).gather(3, pixel.expand(-1, -1, 3, -1))
    return found.permute(0, 3, 1, 2) * seen.any(3)[..., None]


def contestants(workload: str, mode: str, settings: Settings) -> dict[str, Gather]:
    if workload == "limbs":
        known = functools.partial(limbs, table=limb_table(settings.device))
        calls: dict[str, Gather] = {OURS: instembed.read_location_maps, "eager gather": known}
        if settings.slow:
            calls["loop over people"] = lambda m, k, v: reference.read_location_maps(
                m, k, v, limbs=BODY_15.limbs, root=BODY_15.root
            )
    elif mode == "nearest":
        calls = {OURS: lambda m, p, v: instembed.gather_at(m, p, valid=v), "eager gather": nearest}
    else:
        calls = {
            OURS: lambda m, p, v: instembed.gather_at(m, p, valid=v, mode="bilinear"),
            "grid_sample": sampled,
        }
    if settings.compile:
        torch._dynamo.reset()
        name, baseline = list(calls.items())[1]
        calls[f"torch.compile {name.split()[-1]}"] = torch.compile(baseline)
    return calls


def forward_and_backward(gather: Gather, maps: Tensor, points: Tensor, valid: Tensor) -> Callable[[], Tensor]:
    leaf = maps.clone().requires_grad_()
    with torch.no_grad():
        shape = gather(maps, points, valid).shape
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(maps.device)

    def call() -> Tensor:
        leaf.grad = None
        gather(leaf, points, valid).backward(weights)
        assert leaf.grad is not None
        return leaf.grad

    return call


def forward_only(gather: Gather, *task: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return gather(*task)

    return call


def run(workload: str, settings: Settings) -> list[Row]:
    task, rows = settings.place(task_of(workload)), []
    values = workload_values(workload, task)
    for mode in ("nearest",) if workload == "limbs" else ("nearest", "bilinear"):
        gathers = contestants(workload, mode, settings)
        check(gathers, task)
        forward, backward = each(forward_only, gathers), each(forward_and_backward, gathers)

        def both(task: Task, backward: Make = backward) -> dict[str, Call]:
            return {**backward(task), FLOOR: lambda: torch.zeros_like(task.maps)}

        # Each value is written, and read where it is on the map; backward, as many and the gradient's zeros.
        read = Work(values * (1 if mode == "nearest" else 4) + values + task.points.nbytes)
        all_of_it = Work(read.bytes + values + task.maps.nbytes)
        op = "read_location_maps" if workload == "limbs" else f"gather_at {mode}"
        rows += compare((op, workload, "forward"), forward, task, settings, read, peaks=())
        rows += compare((op, workload, "forward + backward"), both, task, settings, all_of_it)
    return rows


def workload_values(workload: str, task: Task) -> int:
    """Bytes of what is read at all points together."""
    channels = 3 if workload == "limbs" else SHAPES[workload][0]
    return channels * task.valid.numel() * task.maps.element_size()


def check(gathers: dict[str, Gather], task: Task) -> None:
    """All contestants give the same values and gradients."""
    expected: tuple[Tensor, Tensor] | None = None
    for name, gather in gathers.items():
        found = forward_only(gather, *task)(), forward_and_backward(gather, *task)()
        expected = expected or found
        for ours, theirs, what in zip(expected, found, ("values", "gradient"), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4, msg=f"{name}: {what}")


def profile(workload: str, settings: Settings) -> Call:
    ours = contestants(workload, "nearest", replace(settings, slow=False, compile=False))[OURS]
    return forward_and_backward(ours, *settings.place(task_of(workload)))


ENTRIES = [Entry("gather_at", ("gather_at", "read_location_maps"), tuple(SHAPES), run, profile)]
