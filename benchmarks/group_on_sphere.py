"""Components of converged points, against scipy on the graph and against blocks of the matrix in PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

import instembed
from benchmarks.harness import OURS, Entry, Row, Settings, measure, peak_extra_mib

CHANNELS, CLUSTERS, BANDWIDTH = 16, 30, 0.2
THRESHOLD = math.cos(BANDWIDTH)
BLOCK = 1024  # rows of the matrix that "blocks" holds


class Workload(NamedTuple):
    points: int
    iterations: int  # of mean shift before


WORKLOADS = {
    "converged": Workload(16_384, 5),
    "raw": Workload(16_384, 0),  # nothing is near anything
    "512x512": Workload(512 * 512, 5),
}
LARGE = ("512x512",)  # whose graph fits nobody's memory


@functools.lru_cache(maxsize=1)
def points_of(workload: str) -> Tensor:
    """(N, D) unit vectors in no order."""
    count, iterations = WORKLOADS[workload]
    generator = torch.Generator().manual_seed(0)
    centers = normalize(torch.randn(CLUSTERS, CHANNELS, generator=generator), dim=1)
    which = torch.randint(0, CLUSTERS, (count,), generator=generator)
    points = centers[which] + 0.08 * torch.randn(count, CHANNELS, generator=generator)
    return instembed.recurrent_mean_shift(points, BANDWIDTH, iterations=iterations)


def ours(points: Tensor) -> Tensor:
    return instembed.group_on_sphere(points, threshold=THRESHOLD).labels


def scipy_on_matrix(points: Tensor) -> np.ndarray:
    """The graph row by row, some rows at a time."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    ends, counts = [], []
    for rows in points.split(BLOCK):
        connected = rows @ points.T >= THRESHOLD
        counts.append(connected.sum(1))
        ends.append(connected.nonzero()[:, 1].int())
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)])
    indices = torch.cat(ends).numpy()
    graph = csr_matrix((np.ones(len(indices), np.int8), indices, starts.numpy()), shape=(len(points),) * 2)
    return connected_components(graph, directed=False)[1]


def lowest_neighbours(points: Tensor) -> Tensor:
    """In PyTorch: every point takes the lowest number among its neighbours until nothing changes."""
    lowest = torch.arange(len(points))
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
    points = points_of(workload)
    contestants: dict[str, Callable[[Tensor], object]] = {OURS: ours}
    if workload not in LARGE and settings.slow:
        contestants |= {"scipy on the matrix": scipy_on_matrix, "lowest neighbours": lowest_neighbours}
    expected = ours(points)
    for name, group in contestants.items():
        labels = torch.as_tensor(np.asarray(group(points))).long()
        assert same_partition(labels, expected), name
    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(group, points) for name, group in contestants.items()
    }
    times = measure(calls, settings)
    return [
        Row("group_on_sphere", workload, "forward", name, times[name], peak_extra_mib(call))
        for name, call in calls.items()
    ]


def same_partition(a: Tensor, b: Tensor) -> bool:
    pairs = torch.stack([a, b], 1).unique(dim=0)
    return len(pairs) == len(a.unique()) == len(b.unique())


def profile(workload: str) -> Callable[[], object]:
    return functools.partial(ours, points_of(workload))


ENTRIES = [Entry("group_on_sphere", ("group_on_sphere",), tuple(WORKLOADS), run, profile)]
