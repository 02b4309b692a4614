"""Label statistics by their definition, one instance at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from instembed.readout.label_statistics import LabelStatistics


def label_statistics(
    labels: Tensor,
    *,
    background: int | None = 0,
    ignore_index: int | None = None,
    max_instances: int | None = None,
) -> LabelStatistics:
    """The definition of :func:`instembed.label_statistics`."""
    images = [_instances(image.to(torch.int64), (background, ignore_index)) for image in labels]
    largest = max((len(instances) for instances in images), default=0)
    if max_instances is not None and largest > max_instances:
        raise ValueError(f"max_instances={max_instances} is too small: an image has {largest} instances")
    capacity = largest if max_instances is None else max_instances

    axes = labels.dim() - 1
    ids = labels.new_zeros((len(images), capacity), dtype=torch.int64)
    boxes = labels.new_zeros((len(images), capacity, 2 * axes), dtype=torch.float32)
    areas = torch.zeros_like(ids)
    centroids = labels.new_zeros((len(images), capacity, axes), dtype=torch.float32)
    for b, instances in enumerate(images):
        for k, (number, pixels) in enumerate(instances):
            coordinates = pixels.flip(1)  # x first
            ids[b, k] = number
            boxes[b, k] = torch.cat([coordinates.amin(0), coordinates.amax(0) + 1])
            areas[b, k] = coordinates.shape[0]
            centroids[b, k] = coordinates.sum(0).double() / coordinates.shape[0]
    numbers = [len(instances) for instances in images]
    return LabelStatistics(ids, boxes, areas, centroids, ids.new_tensor(numbers, dtype=torch.int64))


def _instances(image: Tensor, excluded: tuple[int | None, ...]) -> list[tuple[int, Tensor]]:
    """The id of each instance of an image, in ascending order, with its (pixels, axes) indices."""
    return [(i, (image == i).nonzero()) for i in image.unique().tolist() if i not in excluded]
