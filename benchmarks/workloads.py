"""The named workloads of every table: ellipses as instances, seeded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workload:
    batch: int
    channels: int
    size: tuple[int, ...]
    instances: int
    who: str


WORKLOADS = {
    "lane": Workload(8, 4, (256, 512), 5, "LaneNet"),
    "cells": Workload(8, 16, (256, 256), 100, "microscopy"),
    "city": Workload(2, 8, (512, 1024), 30, "driving"),
    "frame": Workload(1, 8, (1024, 2048), 50, "one Cityscapes frame, real time"),
    "volume": Workload(1, 16, (64, 128, 128), 200, "EM, 3-D"),
    "points": Workload(1, 16, (200_000,), 500, "LiDAR, particle tracks"),
    "train": Workload(8, 16, (512, 1024), 30, "training on a large GPU"),
    "noise": Workload(2, 8, (512, 1024), 1000, "random ids, the worst case"),
}


def labels_of(name: str, seed: int = 0) -> Tensor:
    """(B, *size) int64 ids 1..instances, 0 between them; (N,) and every point labelled for "points"."""
    workload = WORKLOADS[name]
    generator = torch.Generator().manual_seed(seed)
    if name == "points":
        return torch.randint(1, workload.instances + 1, workload.size, generator=generator)
    if name == "noise":
        return torch.randint(1, workload.instances + 1, (workload.batch, *workload.size), generator=generator)
    images = [ellipses(workload.size, workload.instances, generator) for _ in range(workload.batch)]
    return torch.stack(images)


def instances_of(labels: Tensor) -> int:
    """The most that an image has, 0 being the background."""
    images = labels if labels.dim() > 1 else labels[None]
    return max(int((ids.unique() != 0).sum()) for ids in images)


def ellipses(size: tuple[int, ...], instances: int, generator: torch.Generator) -> Tensor:
    """Overlapping ellipses or ellipsoids that cover about half of the image; the later one is in front."""
    labels = torch.zeros(size, dtype=torch.int64)
    mean_radius = 0.5 * (math.prod(size) / instances) ** (1 / len(size))
    for k in range(instances):
        center = torch.rand(len(size), generator=generator) * torch.tensor(size)
        radii = (mean_radius * (0.5 + torch.rand(len(size), generator=generator))).tolist()
        angle = math.pi * torch.rand((), generator=generator).item()
        # Only the box around the ellipse is looked at: a frame has 2 million pixels and 50 ellipses.
        reach = math.hypot(*radii)
        box = tuple(
            slice(max(0, int(c - reach)), min(n, int(c + reach) + 2))
            for c, n in zip(center.tolist(), size, strict=True)
        )
        axes = [torch.arange(s.start, s.stop) - c for s, c in zip(box, center.tolist(), strict=True)]
        grid = list(torch.meshgrid(*axes, indexing="ij"))
        y, x = grid[-2:]
        grid[-2:] = [y * math.cos(angle) - x * math.sin(angle), y * math.sin(angle) + x * math.cos(angle)]
        inside = sum((g / r) ** 2 for g, r in zip(grid, radii, strict=True)) <= 1
        labels[box][inside] = k + 1
    return labels


def random_embeddings(name: str, seed: int = 1) -> Tensor:
    """What an untrained network gives: (B, D, *size) standard normal, (N, D) for "points"."""
    workload = WORKLOADS[name]
    generator = torch.Generator().manual_seed(seed)
    shape = (
        (*workload.size, workload.channels)
        if name == "points"
        else (workload.batch, workload.channels, *workload.size)
    )
    return torch.randn(shape, generator=generator)


def trained_embeddings(labels: Tensor, channels: int, *, rough: bool = False, seed: int = 1) -> Tensor:
    """What a network trained with delta_var 0.5 and delta_dist 1.5 gives: (B, D, *size), or (N, D).

    Every pixel lies within 0.5 of its instance's centre, centres are at least 3 apart, the background has a
    centre too. `rough` makes pixels within one pixel of a border a random mixture of the two neighbours'.
    """
    generator = torch.Generator().manual_seed(seed)
    images = []
    for ids in labels if labels.dim() > 1 else labels[None]:
        centers = separated_centers(int(ids.max()) + 1, channels, generator)
        noise = torch.randn(*ids.shape, channels, generator=generator)
        radius = 0.5 * torch.rand(*ids.shape, 1, generator=generator)
        image = centers[ids] + noise / noise.norm(dim=-1, keepdim=True) * radius
        if rough:
            image = _mix_borders(image, ids, centers, generator)
        images.append(image.movedim(-1, 0))
    stacked = torch.stack(images).contiguous()
    return stacked if labels.dim() > 1 else stacked[0].t().contiguous()


def separated_centers(count: int, channels: int, generator: torch.Generator, gap: float = 3.0) -> Tensor:
    """(count, channels) random points, no two closer than `gap`."""
    spread = gap
    while True:
        centers = spread * torch.randn(count, channels, generator=generator)
        if count < 2 or torch.pdist(centers).min() >= gap:
            return centers
        spread *= 1.1


def _mix_borders(image: Tensor, ids: Tensor, centers: Tensor, generator: torch.Generator) -> Tensor:
    image = image.clone()
    for axis in range(ids.dim()):
        before, after = ids.narrow(axis, 0, ids.shape[axis] - 1), ids.narrow(axis, 1, ids.shape[axis] - 1)
        at = (before != after).nonzero()
        a, b = centers[before[tuple(at.t())]], centers[after[tuple(at.t())]]
        for step in (0, 1):
            where = at.clone()
            where[:, axis] += step
            share = torch.rand(len(at), 1, generator=generator)
            image[tuple(where.t())] = share * a + (1 - share) * b
    return image
