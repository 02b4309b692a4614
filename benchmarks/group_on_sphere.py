"""Components of converged points, against scipy on the graph and against blocks of the matrix in PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

import instembed
from benchmarks.harness import OURS, Entry, Row, Settings, compare, each, installed
from benchmarks.machine import Work
from benchmarks.timing import Call

CHANNELS, CLUSTERS, BANDWIDTH = 16, 30, 0.2
THRESHOLD = math.cos(BANDWIDTH)
BLOCK = 1024  # rows of the matrix that "blocks" holds


class Workload(NamedTuple):
    points: int
    iterations: int  # of mean shift before
    room: int  # for so many components on a GPU


WORKLOADS = {
    "converged": Workload(16_384, 5, 1024),
    "raw": Workload(16_384, 0, 16_384),  # nothing is near anything
    "512x512": Workload(512 * 512, 5, 4096),
}
LARGE = ("512x512",)  # whose graph fits nobody's memory


@functools.lru_cache(maxsize=1)
def points_of(workload: str) -> Tensor:
    """(N, D) unit vectors in no order."""
    count, iterations, _ = WORKLOADS[workload]
    generator = torch.Generator().manual_seed(0)
    centers = normalize(torch.randn(CLUSTERS, CHANNELS, generator=generator), dim=1)
    which = torch.randint(0, CLUSTERS, (count,), generator=generator)
    points = centers[which] + 0.08 * torch.randn(count, CHANNELS, generator=generator)
    return instembed.recurrent_mean_shift(points, BANDWIDTH, iterations=iterations)


def ours(points: Tensor, room: int | None) -> Tensor:
    return instembed.group_on_sphere(points, threshold=THRESHOLD, max_instances=room).labels


def scipy_on_matrix(points: Tensor) -> np.ndarray:
    """The graph some rows at a time, where the points are; on a GPU, the copy of the graph is part of it."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    ends, counts = [], []
    for rows in points.split(BLOCK):
        connected = rows @ points.T >= THRESHOLD
        counts.append(connected.sum(1).cpu())
        ends.append(connected.nonzero()[:, 1].int().cpu())
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)])
    indices = torch.cat(ends).numpy()
    graph = csr_matrix((np.ones(len(indices), np.int8), indices, starts.numpy()), shape=(len(points),) * 2)
    return connected_components(graph, directed=False)[1]


def lowest_neighbours(points: Tensor) -> Tensor:
    """In PyTorch: every point takes the lowest number among its neighbours until nothing changes."""
    lowest = torch.arange(len(points), device=points.device)
    while True:
        parts = [
            torch.where(rows @ points.T >= THRESHOLD, lowest, len(points)).amin(1)
            for rows in points.split(BLOCK)
        ]
        candidates = torch.cat(parts)
        if torch.equal(candidates, lowest):
            return lowest
        lowest = candidates[candidates]


def run(workload: str, settings: Settings) -> list[Row]:
    points = settings.place(points_of(workload))
    mine = functools.partial(ours, room=settings.room(WORKLOADS[workload].room))
    contestants: dict[str, Callable[[Tensor], Any]] = {OURS: mine}
    if workload not in LARGE and settings.slow:
        if installed("scipy"):
            contestants["scipy on the matrix"] = scipy_on_matrix
        contestants["lowest neighbours"] = lowest_neighbours
    expected = mine(points).cpu()
    for name, group in contestants.items():
        labels = torch.as_tensor(group(points)).cpu().long()
        assert same_partition(labels, expected), name
    row = ("group_on_sphere", workload, "forward")
    # Each pair once: half of the product of all points with all points.
    work = Work(points.nbytes + 8 * len(points), len(points) * points.numel())
    return compare(row, each(functools.partial, contestants), (points,), settings, work)


def same_partition(a: Tensor, b: Tensor) -> bool:
    pairs = torch.stack([a, b], 1).unique(dim=0)
    return len(pairs) == len(a.unique()) == len(b.unique())


def profile(workload: str, settings: Settings) -> Call:
    room = settings.room(WORKLOADS[workload].room)
    return functools.partial(ours, settings.place(points_of(workload)), room)


ENTRIES = [Entry("group_on_sphere", ("group_on_sphere",), tuple(WORKLOADS), run, profile)]
