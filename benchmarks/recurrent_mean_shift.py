"""One iteration of recurrent mean shift against attention, blocks of the matrix, and the whole matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import instembed
from benchmarks.harness import OURS, Entry, Row, Settings, compare, each
from benchmarks.machine import Work
from benchmarks.timing import Call

CHANNELS, CLUSTERS, NOISE = 16, 30, 0.08
BLOCK = 256  # rows of the matrix that "blocks" holds


class Workload(NamedTuple):
    points: int
    clustered: bool
    bandwidth: float


WORKLOADS = {
    "clusters 0.1": Workload(16_384, True, 0.1),
    "clusters 0.2": Workload(16_384, True, 0.2),
    "noise 0.1": Workload(16_384, False, 0.1),
    "noise 0.5": Workload(16_384, False, 0.5),  # every kernel value counts
    "512x512": Workload(512 * 512, True, 0.1),
}
LARGE = ("512x512",)  # of which nobody else's backward pass ends within minutes

Shift = Callable[[Tensor], Tensor]


@functools.lru_cache(maxsize=1)
def points_of(workload: str) -> Tensor:
    """(N, D) unit vectors in no order."""
    count, clustered, _ = WORKLOADS[workload]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, CHANNELS, generator=generator)
    if not clustered:
        return normalize(noise, dim=1)
    centers = normalize(torch.randn(CLUSTERS, CHANNELS, generator=generator), dim=1)
    return normalize(
        centers[torch.randint(0, CLUSTERS, (count,), generator=generator)] + NOISE * noise, dim=1
    )


def attention(bandwidth: float) -> Shift:
    def shift(points: Tensor) -> Tensor:
        query = normalize(points, dim=1)[None, None]
        y = scaled_dot_product_attention(query, query, query, scale=bandwidth**-2)
        return normalize(y[0, 0], dim=1)

    return shift


def matrix(bandwidth: float) -> Shift:
    def shift(points: Tensor) -> Tensor:
        unit = normalize(points, dim=1)
        return normalize(_rows(unit, unit, bandwidth), dim=1)

    return shift


def blocks(bandwidth: float) -> Shift:
    """Some rows of the matrix at a time, computed again in the backward pass."""

    def shift(points: Tensor) -> Tensor:
        unit = normalize(points, dim=1)
        rows = [checkpoint(_rows, block, unit, bandwidth, use_reentrant=False) for block in unit.split(BLOCK)]
        return normalize(torch.cat(rows), dim=1)

    return shift


def _rows(some: Tensor, points: Tensor, bandwidth: float) -> Tensor:
    kernel = ((some @ points.T - 1) / bandwidth**2).exp()
    return kernel @ points / kernel.sum(1, keepdim=True)


def ours(bandwidth: float, iterations: int = 1) -> Shift:
    return lambda points: instembed.recurrent_mean_shift(points, bandwidth, iterations=iterations)


def forward_only(shift: Shift, points: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return shift(points)

    return call


def backward_only(shift: Shift, points: Tensor) -> Callable[[], Tensor]:
    leaf = points.clone().requires_grad_()
    shifted = shift(leaf)
    weights = torch.randn(shifted.shape, generator=torch.Generator().manual_seed(1)).to(points.device)
    return lambda: torch.autograd.grad(shifted, leaf, weights, retain_graph=True)[0]


def run(workload: str, settings: Settings) -> list[Row]:
    bandwidth, points = WORKLOADS[workload].bandwidth, settings.place(points_of(workload))
    pairs = len(points) ** 2
    # The products of all pairs, as for whoever skips none; points and gradients read, and the result written.
    forward = Work(2 * points.nbytes, pairs * (4 * CHANNELS + 2))
    backward = Work(3 * points.nbytes, pairs * (10 * CHANNELS + 8))
    if workload in LARGE:
        calls = each(forward_only, {OURS: ours(bandwidth, iterations=5)})
        row = ("recurrent_mean_shift", workload, "5 x forward")
        work = Work(5 * forward.bytes, 5 * forward.flops)
        return compare(row, calls, (points,), settings, work)
    shifts = {OURS: ours(bandwidth), "attention": attention(bandwidth), "blocks": blocks(bandwidth)}
    if settings.slow:
        shifts["matrix"] = matrix(bandwidth)
    check(shifts, points)
    rows = []
    for what, make, work in (("forward", forward_only, forward), ("backward", backward_only, backward)):
        row = ("recurrent_mean_shift", workload, what)
        rows += compare(row, each(make, shifts), (points,), settings, work)
    return rows


def check(shifts: dict[str, Shift], points: Tensor) -> None:
    """All contestants compute the same points and gradient, on the first 4096."""
    some = points[:4096]
    expected: tuple[Tensor, Tensor] | None = None
    for name, shift in shifts.items():
        found = forward_only(shift, some)(), backward_only(shift, some)()
        expected = expected or found
        for what, value, other in zip(("points", "gradient"), found, expected, strict=True):
            scale = other.abs().max().item()
            torch.testing.assert_close(value, other, rtol=0, atol=5e-5 * scale, msg=f"{name}: {what}")


def profile(workload: str, settings: Settings) -> Call:
    return forward_only(ours(WORKLOADS[workload].bandwidth), settings.place(points_of(workload)))


ENTRIES = [Entry("recurrent_mean_shift", ("recurrent_mean_shift",), tuple(WORKLOADS), run, profile)]
