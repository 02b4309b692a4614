"""Boxes, areas and centroids of the instances of label maps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from instembed import _arguments as arguments
from instembed import _native, _ops
from instembed._native import core, threads


class LabelStatistics(NamedTuple):
    """What :func:`label_statistics` found. Rows beyond an image's instances are zero."""

    ids: Tensor
    """(B, Kmax) int64, ascending in each image."""
    boxes: Tensor
    """(B, Kmax, 2 S) float32 for S spatial dimensions: (x1, y1, x2, y2), with x2 and y2 exclusive."""
    areas: Tensor
    """(B, Kmax) int64: pixels."""
    centroids: Tensor
    """(B, Kmax, S) float32: (x, y), pixel centres at whole numbers."""
    num_instances: Tensor
    """(B,) int64."""


def label_statistics(
    labels: Tensor,
    *,
    background: int | None = 0,
    ignore_index: int | None = None,
    max_instances: int | None = None,
) -> LabelStatistics:
    """Boxes, areas and centroids of all instances of each image, in one pass over the labels.

    Args:
        labels: (B, *spatial) with 1 to 3 spatial dimensions, instance ids of any integer dtype and any value,
            with any strides (nothing is copied). Ids are per image. An instance need not be connected.
        background: the id that is no instance; None makes 0 an instance like any other.
        ignore_index: another id that is no instance, for example 255.
        max_instances: capacity Kmax of the outputs. None: the largest number found in an image; on a GPU,
            where nothing waits to find out, a 16th of an image's pixels, but 64 to 4096.

    Returns:
        :class:`LabelStatistics` ``(ids, boxes, areas, centroids, num_instances)``, rows in ascending order of
        id: row k - 1 is instance k where the labels are 1..K, as those of a ``Grouping`` without
        empty instances. uint64 ids are given, and ordered, as the int64 of the same bits.

        Boxes are float32 in torchvision's convention, (x1, y1, x2, y2) in pixels with x2 and y2 one past the
        last pixel: the box of a single pixel has width, height and area 1. Centroids are the mean of the
        pixels' coordinates (x, y), so that the centroid of a single pixel is its (x1, y1); in a box's
        continuous coordinates it lies half a pixel further on each axis. In 3-D (B, depth, height, width) a
        box is (x1, y1, z1, x2, y2, z2) and a centroid (x, y, z); in 1-D they are (x1, x2) and (x,). Sums are
        taken in 64-bit integers: a centroid is exact but for rounding to float32, and a box is exact for
        images of up to 2^24 pixels a side.

        Nothing has a gradient. The result does not depend on the number of threads.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value, or an image has more
            instances than ``max_instances`` (on a GPU only under :func:`instembed.set_overflow_checks`;
            else such an image has zeros throughout and ``num_instances`` is greater than the capacity).
    """
    arguments.check_integer_tensor("labels", labels)
    if not 2 <= labels.dim() <= 4:
        raise ValueError(
            "labels must be (B, *spatial) with 1 to 3 spatial dimensions, "
            f"got shape {tuple(labels.shape)}; a single image is labels[None]"
        )
    if max_instances is not None:
        arguments.check_capacity("max_instances", max_instances)
    return LabelStatistics(
        *torch.ops.instembed.label_statistics(
            labels,
            arguments.check_label_id("background", background),
            arguments.check_label_id("ignore_index", ignore_index),
            max_instances,
        )
    )


# The op. Without max_instances the capacity of its outputs depends on the data.

_ops.define(
    "label_statistics(Tensor labels, int? background, int? ignore_index, int? max_instances) "
    "-> (Tensor ids, Tensor boxes, Tensor areas, Tensor centroids, Tensor num_instances)"
)


def _new_outputs(labels: Tensor, capacity: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    images, axes = labels.shape[0], labels.dim() - 1
    ids = labels.new_empty((images, capacity), dtype=torch.int64)
    boxes = labels.new_empty((images, capacity, 2 * axes), dtype=torch.float32)
    centroids = labels.new_empty((images, capacity, axes), dtype=torch.float32)
    return ids, boxes, torch.empty_like(ids), centroids, ids.new_empty(images)


@_ops.cpu("label_statistics")
def _label_statistics_cpu(
    labels: Tensor, background: int | None, ignore_index: int | None, max_instances: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = core.label_statistics(labels, background=background, ignore_index=ignore_index, threads=threads())
    if max_instances is not None and found.largest > max_instances:
        raise ValueError(
            f"max_instances={max_instances} is too small: an image has {found.largest} instances"
        )
    outputs = _new_outputs(labels, found.largest if max_instances is None else max_instances)
    found.copy(*outputs)
    return outputs


def _cuda_capacity(labels: Tensor, max_instances: int | None) -> int:
    if max_instances is not None:
        return max_instances
    return _ops.default_capacity(labels.numel() // max(labels.shape[0], 1))


@_ops.cuda("label_statistics")
def _label_statistics_cuda(
    labels: Tensor, background: int | None, ignore_index: int | None, max_instances: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cuda_core = _native.cuda_core()
    capacity = _cuda_capacity(labels, max_instances)
    outputs = _new_outputs(labels, capacity)
    workspace = labels.new_empty(
        cuda_core.label_statistics_cuda_workspace(labels, capacity), dtype=torch.uint8
    )
    cuda_core.label_statistics_cuda(
        labels,
        *outputs,
        workspace,
        background=background,
        ignore_index=ignore_index,
        stream=_native.stream_of(labels),
    )
    _native.check_overflow(outputs[-1], capacity)
    return outputs


@_ops.fake("label_statistics")
def _label_statistics_fake(
    labels: Tensor, background: int | None, ignore_index: int | None, max_instances: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    on_gpu = labels.device.type == "cuda"
    return _new_outputs(
        labels, _cuda_capacity(labels, max_instances) if on_gpu else _ops.capacity(max_instances)
    )
