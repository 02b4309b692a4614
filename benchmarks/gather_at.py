"""Features at points and location maps against the best PyTorch. The floor zeroes the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import instembed
from benchmarks.harness import FLOOR, OURS, Entry, Row, Settings, measure, peak_extra_mib
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


def limbs(maps: Tensor, keypoints: Tensor, valid: Tensor) -> Tensor:
    """A choice of joint for each joint, one gather for all; for keypoints that are known to be on the map."""
    joints, width = keypoints.shape[2], maps.shape[3]
    order = [
        [k for limb in BODY_15.limbs if j in limb for k in limb] + [*BODY_15.root] for j in range(joints)
    ]
    table = torch.tensor([row + row[-1:] * (5 - len(row)) for row in order])  # (K, 5)
    seen = valid[..., table]
    choice = table.expand(seen.shape).gather(3, seen.byte().argmax(3, keepdim=True))
    x, y = (keypoints + 0.5).floor().long().unbind(-1)
    pixel = (y * width + x).gather(2, choice[..., 0]).transpose(1, 2)[:, :, None]  # (B, K, 1, P)
    found = maps.view(len(maps), joints, 3, -1).gather(3, pixel.expand(-1, -1, 3, -1))
    return found.permute(0, 3, 1, 2) * seen.any(3)[..., None]


def contestants(workload: str, mode: str, settings: Settings) -> dict[str, Gather]:
    if workload == "limbs":
        calls: dict[str, Gather] = {OURS: instembed.read_location_maps, "eager gather": limbs}
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


def forward_and_backward(gather: Gather, task: Task) -> Callable[[], Tensor]:
    leaf = task.maps.clone().requires_grad_()
    with torch.no_grad():
        weights = torch.randn(gather(*task).shape, generator=torch.Generator().manual_seed(1))

    def call() -> Tensor:
        leaf.grad = None
        gather(leaf, task.points, task.valid).backward(weights)
        assert leaf.grad is not None
        return leaf.grad

    return call


def forward_only(gather: Gather, task: Task) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return gather(*task)

    return call


def run(workload: str, settings: Settings) -> list[Row]:
    task, rows = task_of(workload), []
    for mode in ("nearest",) if workload == "limbs" else ("nearest", "bilinear"):
        gathers = contestants(workload, mode, settings)
        check(gathers, task)
        for what, make in (("forward", forward_only), ("forward + backward", forward_and_backward)):
            calls: dict[str, Callable[[], object]] = {n: make(gather, task) for n, gather in gathers.items()}
            if what != "forward":
                calls[FLOOR] = lambda: torch.zeros_like(task.maps)
            times = measure(calls, settings)
            op = "read_location_maps" if workload == "limbs" else f"gather_at {mode}"
            for name, call in calls.items():
                # A new call: one that has run holds a gradient.
                fresh = make(gathers[name], task) if name in gathers else call
                peak = peak_extra_mib(fresh) if what != "forward" else None
                rows.append(Row(op, workload, what, name, times[name], peak))
    return rows


def check(gathers: dict[str, Gather], task: Task) -> None:
    """All contestants give the same values and gradients."""
    expected: tuple[Tensor, Tensor] | None = None
    for name, gather in gathers.items():
        found = forward_only(gather, task)(), forward_and_backward(gather, task)()
        expected = expected or found
        for ours, theirs, what in zip(expected, found, ("values", "gradient"), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4, msg=f"{name}: {what}")


def profile(workload: str) -> Callable[[], object]:
    settings = Settings(slow=False, compile=False)
    return forward_and_backward(contestants(workload, "nearest", settings)[OURS], task_of(workload))


ENTRIES = [Entry("gather_at", ("gather_at", "read_location_maps"), tuple(SHAPES), run, profile)]
