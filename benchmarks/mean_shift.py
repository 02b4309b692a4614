"""Mean-shift grouping against scikit-learn, the best peeling in PyTorch, and reading the embeddings once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import instembed
from benchmarks.harness import FLOOR, OURS, Entry, Row, Settings, compare, installed
from benchmarks.machine import Work
from benchmarks.timing import Call
from benchmarks.workloads import WORKLOADS, labels_of, separated_centers, trained_embeddings
from instembed import Grouping
from instembed.grouping.mean_shift import Seeding

BANDWIDTH = 1.5

# name: points, channels, clusters. "points" is the workload of that name.
CLOUDS = {
    "2k": (2_000, 8, 30),
    "20k": (20_000, 8, 30),
    "245k": (245_000, 8, 30),
    "1M": (1_000_000, 8, 30),
    "points": (200_000, 16, 500),
}
SEEDINGS: tuple[Seeding, ...] = ("peel", "all")
IMAGES = ("frame", "frame rough", "city", "city rough")


class Problem(NamedTuple):
    embeddings: Tensor
    options: dict[str, Any]
    ids: Tensor  # the truth; 0 where there is background


@functools.lru_cache(maxsize=2)
def problem(workload: str) -> Problem:
    if workload in CLOUDS:
        n, channels, clusters = CLOUDS[workload]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, clusters + 1, (n,), generator=generator)
        noise = torch.randn(n, channels, generator=generator)
        radius = 0.5 * torch.rand(n, 1, generator=generator)
        points = separated_centers(clusters + 1, channels, generator)[ids]
        return Problem(points + noise / noise.norm(dim=1, keepdim=True) * radius, {}, ids)
    name, _, rough = workload.partition(" ")
    ids = labels_of(name)
    embeddings = trained_embeddings(ids, WORKLOADS[name].channels, rough=bool(rough))
    return Problem(embeddings, {"mask": ids > 0, "min_size": MIN_SIZE if rough else 1}, ids)


# A cluster of border pixels between two instances is smaller than this, and nearly every instance is larger.
MIN_SIZE = 400


def peel_in_pytorch(embeddings: Tensor, mask: Tensor | None = None, min_size: int = 1) -> Tensor:
    """Labels by peeling, one image or one set of points: compacts the foreground, shrinks it as it goes."""
    points = embeddings if embeddings.dim() == 2 else embeddings[0].flatten(1).t()
    every = torch.arange(len(points), device=points.device)
    index = every if mask is None else mask.flatten().nonzero().flatten()
    labels = torch.zeros_like(every)
    left = points[index].contiguous()
    found = 0
    while len(left):
        center = left[0]
        for _ in range(300):
            near = (left - center).square().sum(1) <= BANDWIDTH**2
            moved = left[near].mean(0)
            step = (moved - center).norm()
            center = moved
            if step <= 1e-3 * BANDWIDTH:
                break
        near = (left - center).square().sum(1) <= BANDWIDTH**2
        near[0] |= not near.any()
        if int(near.sum()) >= min_size:
            found += 1
            labels[index[near]] = found
        index, left = index[~near], left[~near]
    return labels


def ours(task: Problem, seeding: Seeding) -> Callable[[], Grouping]:
    return lambda: instembed.mean_shift(task.embeddings, BANDWIDTH, seeding=seeding, **task.options)


def scikit_learn(task: Problem, **options: Any) -> Callable[[], Any]:
    from sklearn.cluster import MeanShift

    points = task.embeddings.cpu().numpy()
    return lambda: MeanShift(bandwidth=BANDWIDTH, cluster_all=False, **options).fit(points).labels_


def run(workload: str, settings: Settings) -> list[Row]:
    task = settings.place(problem(workload))
    n = task.ids.numel()
    # On a GPU, `all` compares what its certificate does not settle with every box of 32 points.
    seedings = SEEDINGS if settings.slow or not settings.gpu or n <= 250_000 else SEEDINGS[:1]
    rough = workload.endswith("rough")
    check(task, seedings, rough)
    # The embeddings are read and labels written; the rest is searching, which has no lower bound.
    work = Work(task.embeddings.nbytes + 8 * n)
    sklearn = workload in CLOUDS and n <= 20_000 and settings.slow and installed("sklearn")
    rows = []
    for seeding in seedings:

        def calls(task: Problem, seeding: Seeding = seeding) -> dict[str, Call]:
            calls: dict[str, Call] = {OURS: ours(task, seeding)}
            if sklearn and seeding == "peel":
                calls["scikit-learn bins"] = scikit_learn(task, bin_seeding=True)
            elif sklearn and n <= 2_000:
                calls["scikit-learn"] = scikit_learn(task)
            if seeding == "peel" and (task.embeddings.dim() == 2 or len(task.embeddings) == 1):
                if n <= 250_000 or settings.slow or (settings.gpu and not rough):
                    calls["PyTorch peel"] = lambda: peel_in_pytorch(task.embeddings, **task.options)
            return {**calls, FLOOR: task.embeddings.sum}

        rows += compare(("mean_shift", workload, seeding), calls, task, settings, work, peaks=(OURS,))
    return rows


def check(task: Problem, seedings: Sequence[Seeding], rough: bool) -> None:
    """Clean instances are found exactly; with rough borders, their number, and 97 % of their pixels."""
    for seeding in seedings:
        found = ours(task, seeding)()
        if rough:
            labels, ids = found.labels[task.ids > 0], task.ids[task.ids > 0]
            _, counts = torch.stack([labels, ids]).unique(dim=1, return_counts=True)
            kept = int(found.num_instances.sum())
            share = counts.sort(descending=True).values[:kept].sum().item() / len(ids)
            assert share > 0.9, f"{seeding}: {share:.3f} of the pixels"
            continue
        images = len(task.ids) if task.ids.dim() > 1 else 1
        for labels, ids in zip(found.labels.view(images, -1), task.ids.view(images, -1), strict=True):
            pairs = torch.stack([labels, ids]).unique(dim=1)
            assert pairs.shape[1] == len(labels.unique()) == len(ids.unique()), (
                f"{seeding}: not the instances"
            )
    if task.embeddings.dim() == 2:
        assert torch.equal(peel_in_pytorch(task.embeddings), ours(task, "peel")().labels)


def profile(workload: str, settings: Settings) -> Call:
    return ours(settings.place(problem(workload)), "peel")


ENTRIES = [Entry("mean_shift", ("mean_shift",), (*IMAGES, *CLOUDS), run, profile, ("lane",))]
