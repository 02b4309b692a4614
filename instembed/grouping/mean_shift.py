"""Mean-shift grouping of embeddings into instances."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from instembed import _arguments as arguments
from instembed import _native, _ops
from instembed._native import core, threads
from instembed._pixels import (
    accumulation_dtype,
    cuda_capacity,
    fake_capacity,
    flat_embeddings,
    flat_pixels,
    number_of_images,
)

Seeding = Literal["peel", "all"]
Leftovers = Literal["noise", "nearest"]


class Grouping(NamedTuple):
    """Instances found in a batch of embeddings."""

    labels: Tensor
    """(B, *spatial) or (N,) int64: 0 for background and noise, 1..K for the instances of each image."""
    centers: Tensor
    """(B, Kmax, D) in embedding space: row k - 1 is instance k, zeros beyond an image's instances."""
    counts: Tensor
    """(B, Kmax) int64: pixels that carry each label."""
    num_instances: Tensor
    """(B,) int64."""


def mean_shift(
    embeddings: Tensor,
    bandwidth: float,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    seeding: Seeding = "peel",
    min_size: int = 1,
    max_instances: int | None = None,
    leftovers: Leftovers = "noise",
    max_iter: int = 300,
    tol: float = 1e-3,
) -> Grouping:
    r"""Groups pixels by flat-kernel mean shift in embedding space (Comaniciu and Meer, 2002).

    A mean shift moves a centre to the mean of its members, the points within ``bandwidth`` of it, until it
    moves by at most ``tol * bandwidth``. Where it then lies is a mode.

    ``seeding="peel"`` is the grouping of De Brabandere, Neven and Van Gool (2017, arXiv 1708.02551) with a
    fixed instead of a random choice: start at the unassigned point of the lowest index, shift over
    unassigned points, let the mode claim every unassigned point within ``bandwidth``, and repeat until none
    is left. Instances are numbered in the order in which they are found.

    ``seeding="all"`` is ``sklearn.cluster.MeanShift(bandwidth, cluster_all=False)``: every point is a
    start; of modes within ``bandwidth`` of each other the one with more members stays; a point belongs to
    its nearest mode if that is within ``bandwidth``. Label k + 1 is scikit-learn's label k.

    Args:
        embeddings: (B, D, *spatial) with 1 to 3 spatial dimensions, contiguous or channels-last (neither is
            copied), or points (N, D). float32, float64, float16 or bfloat16. Points with a NaN or an
            infinity are members of nothing and get label 0.
        bandwidth: radius in units of the embedding. For embeddings trained with the discriminative loss
            take its ``delta_dist`` (paper: 1.5).
        mask: (B, *spatial) or (N,), bool foreground or an integer map of classes: 0 is background, and
            pixels of different classes never share an instance. Classes are grouped one after the other in
            ascending order. None: everything is foreground.
        offsets: (B + 1,) for points: image b is points ``offsets[b]:offsets[b + 1]``. None is one image.
        seeding: "peel" (paper) or "all" (scikit-learn).
        min_size: a cluster of fewer points is no instance, and its points become leftovers. The default
            keeps all, with ``seeding="all"`` even a mode to which no point belongs, as scikit-learn does.
        max_instances: capacity Kmax of the outputs. None: the largest number found in an image; on a GPU,
            where finding that out would make the host wait, a sixteenth of an image's pixels, 64 to 4096.
        leftovers: what becomes of foreground points that belong to no instance: "noise" labels them 0,
            "nearest" gives them to the nearest centre of their class at any distance (0 if their class has
            none).
        max_iter: shifts of one centre at most; "all" counts as scikit-learn does, which is one more (300
            there).
        tol: a centre has converged when it moves by at most this many bandwidths (scikit-learn: 1e-3).

    Returns:
        :class:`Grouping`. Labels and counts are int64; centres are float32 (float64 for float64
        embeddings). Nothing has a gradient. The result depends on the input alone: not on threads, not on a
        random seed. Distances and means are in float64, whatever the input type.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value, or an image has
            more instances than ``max_instances`` (on a GPU only under :func:`instembed.set_overflow_checks`;
            else such an image has zeros throughout and ``num_instances`` is greater than the capacity).
    """
    return Grouping(
        *_checked_groups(
            embeddings,
            bandwidth,
            mask=mask,
            offsets=offsets,
            seeding=seeding,
            min_size=min_size,
            max_instances=max_instances,
            leftovers=leftovers,
            max_iter=max_iter,
            tol=tol,
        )[:4]
    )


def _checked_groups(
    embeddings: Tensor,
    bandwidth: float,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    seeding: str = "peel",
    min_size: int = 1,
    max_instances: int | None = None,
    leftovers: str = "noise",
    max_iter: int = 300,
    tol: float = 1e-3,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments.check_embeddings("embeddings", embeddings, points=True)
    if mask is not None:
        arguments.check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            arguments.check_integer_tensor("mask", mask)
        arguments.check_pixels("mask", mask, embeddings)
    offsets = arguments.check_offsets(offsets, embeddings)
    arguments.check_choice("seeding", seeding, ("peel", "all"))
    arguments.check_choice("leftovers", leftovers, ("noise", "nearest"))
    if max_instances is not None:
        arguments.check_capacity("max_instances", max_instances)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.instembed.mean_shift(
        embeddings,
        mask,
        offsets,
        arguments.check_number("bandwidth", bandwidth, above=0),
        seeding,
        arguments.check_integer("min_size", min_size, at_least=1),
        max_instances,
        leftovers,
        arguments.check_capacity("max_iter", max_iter),
        arguments.check_number("tol", tol, at_least=0),
    )
    return outputs


# The op. Its fifth output is the (B,) iterations of the longest trajectory. Without max_instances the
# capacity of centers and counts depends on the data.

_ops.define(
    "mean_shift(Tensor embeddings, Tensor? mask, Tensor? offsets, float bandwidth, str seeding, "
    "int min_size, int? max_instances, str leftovers, int max_iter, float tol) "
    "-> (Tensor labels, Tensor centers, Tensor counts, Tensor num_instances, Tensor num_iterations)"
)


def new_labels(embeddings: Tensor) -> Tensor:
    points = embeddings.dim() == 2
    shape = embeddings.shape[:1] if points else embeddings.shape[:1] + embeddings.shape[2:]
    return embeddings.new_empty(shape, dtype=torch.int64)


def new_tables(embeddings: Tensor, images: Any, capacity: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    centers = embeddings.new_empty(
        (images, capacity, embeddings.shape[1]), dtype=accumulation_dtype(embeddings)
    )
    counts = embeddings.new_empty((images, capacity), dtype=torch.int64)
    return centers, counts, counts.new_empty(images), counts.new_empty(images)


def check_capacity_holds(max_instances: int | None, largest: int) -> None:
    if max_instances is not None and largest > max_instances:
        raise ValueError(
            f"max_instances={max_instances} is too small: an image has {largest} instances. "
            "Raise it, or raise min_size to drop small clusters"
        )


@_ops.cpu("mean_shift")
def _mean_shift_cpu(
    embeddings: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    bandwidth: float,
    seeding: str,
    min_size: int,
    max_instances: int | None,
    leftovers: str,
    max_iter: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    labels = new_labels(embeddings)
    found = core.mean_shift(
        flat_embeddings(embeddings),
        None if mask is None else flat_pixels(mask, embeddings),
        offsets,
        flat_pixels(labels, embeddings),
        bandwidth=bandwidth,
        all_points=seeding == "all",
        nearest=leftovers == "nearest",
        min_size=min_size,
        max_iter=max_iter,
        tol=tol,
        threads=threads(),
    )
    check_capacity_holds(max_instances, found.largest)
    capacity = found.largest if max_instances is None else max_instances
    tables = new_tables(embeddings, number_of_images(embeddings, offsets), capacity)
    found.copy(*tables)
    return labels, *tables


@_ops.cuda("mean_shift")
def _mean_shift_cuda(
    embeddings: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    bandwidth: float,
    seeding: str,
    min_size: int,
    max_instances: int | None,
    leftovers: str,
    max_iter: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cuda_core = _native.cuda_core()
    labels = new_labels(embeddings)
    capacity = cuda_capacity(embeddings, offsets, max_instances)
    tables = new_tables(embeddings, number_of_images(embeddings, offsets), capacity)
    flat = flat_embeddings(embeddings)
    flat_mask = None if mask is None else flat_pixels(mask, embeddings)
    bytes_needed = cuda_core.mean_shift_cuda_workspace(
        flat, flat_mask, offsets, capacity, all_points=seeding == "all"
    )
    cuda_core.mean_shift_cuda(
        flat,
        flat_mask,
        offsets,
        flat_pixels(labels, embeddings),
        *tables,
        embeddings.new_empty(bytes_needed, dtype=torch.uint8),
        bandwidth=bandwidth,
        all_points=seeding == "all",
        nearest=leftovers == "nearest",
        min_size=min_size,
        max_iter=max_iter,
        tol=tol,
        stream=_native.stream_of(embeddings),
    )
    _native.check_overflow(tables[2], capacity)
    return labels, *tables


@_ops.fake("mean_shift")
def _mean_shift_fake(
    embeddings: Tensor, mask: Tensor | None, offsets: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    max_instances = options[3]
    capacity = fake_capacity(embeddings, offsets, max_instances)
    return new_labels(embeddings), *new_tables(embeddings, number_of_images(embeddings, offsets), capacity)


_ops.not_differentiable("mean_shift")
