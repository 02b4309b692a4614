"""Label statistics, masks and run lengths against PyTorch and pycocotools. The floor reads labels once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import instembed
from benchmarks.harness import FLOOR, OURS, Entry, Row, Settings, compare
from benchmarks.machine import Work
from benchmarks.timing import Call
from benchmarks.workloads import instances_of, labels_of
from instembed import reference

Statistics = Callable[[Tensor], tuple[Tensor, ...]]
Images = list[dict[str, Any]]


def loop(labels: Tensor) -> tuple[Tensor, ...]:
    """The usual implementation: a mask an instance."""
    return tuple(reference.label_statistics(labels))


def scatter(labels: Tensor, known: int | None = None) -> tuple[Tensor, ...]:
    """One scatter for each figure, over all images at once, for ids from 0, the background.

    `known` ids, 0..known, spare it a `unique`, which is a sort; that is more than instembed may assume.
    """
    span = int(labels.max()) + 1 if known is None else known + 1
    images = torch.arange(len(labels), device=labels.device).view(-1, *[1] * (labels.dim() - 1))
    keys = labels + images * span  # the ids of different images are kept apart
    if known is None:
        keys, slot, areas = torch.unique(keys, return_inverse=True, return_counts=True)
        slot = slot.flatten()
    else:
        slot = keys.flatten()
        areas = torch.bincount(slot, minlength=len(labels) * span)
        keys = torch.arange(len(areas), device=labels.device)
    low, high, sums = [], [], []
    for axis in range(labels.dim() - 1, 0, -1):
        shape = [1] * labels.dim()
        shape[axis] = labels.shape[axis]
        steps = torch.arange(labels.shape[axis], device=labels.device)
        place = steps.view(shape).expand(labels.shape).flatten()
        zeros = torch.zeros_like(areas)
        low.append(zeros.scatter_reduce(0, slot, place, "amin", include_self=False))
        high.append(zeros.scatter_reduce(0, slot, place, "amax", include_self=False) + 1)
        sums.append(zeros.index_add(0, slot, place))
    centroids = torch.stack(sums, 1).double() / areas[:, None]
    columns = [keys % span, torch.stack(low + high, 1).float(), areas, centroids.float()]
    kept = (keys % span > 0) & (areas > 0)
    image = keys[kept] // span
    row = torch.arange(len(image), device=labels.device) - torch.searchsorted(image, image)
    number = torch.bincount(image, minlength=len(labels))
    tables = []
    for column in columns:
        table = column.new_zeros(len(labels), int(number.max()), *column.shape[1:])
        table[image, row] = column[kept]
        tables.append(table)
    return *tables, number


def check_statistics(calls: dict[str, Statistics], labels: Tensor) -> None:
    """All contestants agree to the bit."""
    results = {name: call(labels) for name, call in calls.items()}
    for name, result in results.items():
        for ours, theirs in zip(results[OURS], result, strict=True):
            assert torch.equal(ours, theirs), name


def run_statistics(workload: str, settings: Settings) -> list[Row]:
    labels = labels_of(workload)
    ours = statistics_with_room(labels, settings)
    labels = settings.place(labels)
    known = int(labels.max())
    functions: dict[str, Statistics] = {
        OURS: ours,
        "eager scatter": scatter,
        "eager scatter, ids known": lambda labels: scatter(labels, known),
    }
    if settings.slow:
        functions["loop over instances"] = loop
    check_statistics(functions, labels)

    def calls(labels: Tensor) -> dict[str, Call]:
        return {**{name: partial(f, labels) for name, f in functions.items()}, FLOOR: labels.max}

    row = ("label_statistics", workload, "forward")
    return compare(row, calls, labels, settings, Work(labels.nbytes))


def statistics_with_room(labels: Tensor, settings: Settings) -> Statistics:
    return partial(instembed.label_statistics, max_instances=settings.room(instances_of(labels)))


def torch_masks(labels: Tensor) -> list[Tensor]:
    """Masks by comparison, for ids that are known."""
    return [image == image.unique()[1:, None, None] for image in labels]


def coco_run_lengths(labels: Tensor) -> list[list[dict[str, Any]]]:
    """pycocotools over masks, which it wants column by column."""
    from pycocotools import mask

    lists = []
    for masks in torch_masks(labels):
        stack = masks.to(torch.uint8).mT.contiguous().permute(2, 1, 0).numpy()  # (H, W, K)
        lists.append(mask.encode(stack))
    return lists


def check_detections(labels: Tensor) -> None:
    ours = instembed.detections(labels, rle=True)
    theirs = zip(torch_masks(labels), coco_run_lengths(labels), strict=True)
    for found, (masks, run_lengths) in zip(ours, theirs, strict=True):
        assert torch.equal(found["masks"], masks)
        assert found["rle"] == run_lengths


def run_detections(workload: str, settings: Settings) -> list[Row]:
    labels = labels_of(workload)
    check_detections(labels)

    def masks(labels: Tensor) -> dict[str, Call]:
        return {
            OURS: lambda: instembed.detections(labels),
            "masks by comparison": lambda: torch_masks(labels),
        }

    def run_lengths(labels: Tensor) -> dict[str, Call]:
        return {
            OURS: lambda: instembed.detections(labels, masks=False, rle=True),
            "pycocotools": lambda: coco_run_lengths(labels),
            FLOOR: labels.max,
        }

    return [
        *compare(("detections", workload, "masks"), masks, labels, settings),
        *compare(("detections", workload, "run lengths"), run_lengths, labels, settings, Work(labels.nbytes)),
    ]


def profile_statistics(workload: str, settings: Settings) -> Call:
    labels = labels_of(workload)
    return partial(statistics_with_room(labels, settings), settings.place(labels))


def profile_detections(workload: str, _: Settings) -> Call:
    labels = labels_of(workload)
    return lambda: instembed.detections(labels, masks=False, rle=True)


ENTRIES = [
    Entry(
        "label_statistics",
        ("label_statistics",),
        ("lane", "cells", "city", "frame", "volume", "noise"),
        run_statistics,
        profile_statistics,
    ),
    Entry(
        "detections",
        ("detections",),
        ("lane", "cells", "city", "frame"),
        run_detections,
        profile_detections,
        cuda=False,
    ),
]
