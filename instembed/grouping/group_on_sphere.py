"""Connected components of converged points on the unit sphere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from instembed import _arguments as arguments
from instembed import _native, _ops
from instembed._native import core, threads
from instembed._pixels import (
    cuda_capacity,
    fake_capacity,
    flat_embeddings,
    flat_pixels,
    number_of_images,
)
from instembed._sphere import unit_vectors
from instembed.grouping.mean_shift import (
    Grouping,
    Leftovers,
    check_capacity_holds,
    new_labels,
    new_tables,
)


def group_on_sphere(
    embeddings: Tensor,
    *,
    threshold: float,
    min_size: int = 1,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    max_instances: int | None = None,
    leftovers: Leftovers = "noise",
) -> Grouping:
    r"""Reads instances off points on the unit sphere: connected components at a cosine threshold.

    Two points are connected if their cosine is at least ``threshold``; an instance is a set of points that
    hang together by such connections, however far its ends are apart. Meant for the points that
    :func:`recurrent_mean_shift` has moved to their modes, of which each becomes one instance. The result is
    that of ``scipy.sparse.csgraph.connected_components`` on the N x N graph, which is never formed: where
    points of a neighbourhood are all connected, they join at once.

    Args:
        embeddings: (B, D, *spatial) with 1 to 3 spatial dimensions, contiguous or channels-last, or points
            (N, D), of less than 2^27 points an image. float32, float64, float16 or bfloat16. They are scaled
            to unit vectors. A vector with all elements within 1e-12 of zero, or with a NaN or an infinity,
            has no direction: it gets label 0.
        threshold: least cosine of connected points, from -1 to 1. Points that have converged with a
            bandwidth lie within a fraction of it: ``cos(bandwidth)`` separates modes well.
        min_size: a component of fewer points is no instance, and its points become leftovers.
        mask: (B, *spatial) or (N,), bool or of an integer dtype: where it is 0 a point takes no part and gets
            label 0.
        offsets: (B + 1,) for points: image b is points ``offsets[b]:offsets[b + 1]``. None is one image.
        max_instances: capacity Kmax of the outputs. None: the largest number found in an image; on a GPU,
            where finding that out would make the host wait, a sixteenth of an image's pixels, 64 to 4096.
        leftovers: what becomes of the points of small components: "noise" labels them 0, "nearest" gives
            them to the instance of the most similar centre (0 if there is none).

    Returns:
        :class:`Grouping`. Instances are numbered by their first point. Centres are float32 (float64 for
        float64 embeddings), unit vectors along the sum of an instance's points without leftovers. Nothing
        has a gradient. Cosines are those of the unit vectors, float32 unless embeddings are float64,
        multiplied in float64. The result depends on the input alone, not on threads.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value, or an image has
            more instances than ``max_instances`` (on a GPU only under :func:`instembed.set_overflow_checks`;
            else such an image has zeros throughout and ``num_instances`` is greater than the capacity).
    """
    arguments.check_embeddings("embeddings", embeddings, points=True)
    threshold = arguments.check_number("threshold", threshold, at_least=-1)
    if threshold > 1:
        raise ValueError(f"threshold must be at most 1, got {threshold}")
    if mask is not None:
        arguments.check_flags("mask", mask)
        arguments.check_pixels("mask", mask, embeddings)
    offsets = arguments.check_offsets(offsets, embeddings)
    arguments.check_choice("leftovers", leftovers, ("noise", "nearest"))
    if max_instances is not None:
        arguments.check_capacity("max_instances", max_instances)
    return Grouping(
        *torch.ops.instembed.group_on_sphere(
            unit_vectors(embeddings.detach()),
            mask,
            offsets,
            threshold,
            arguments.check_integer("min_size", min_size, at_least=1),
            max_instances,
            leftovers,
        )
    )


_ops.define(
    "group_on_sphere(Tensor points, Tensor? mask, Tensor? offsets, float threshold, int min_size, "
    "int? max_instances, str leftovers) "
    "-> (Tensor labels, Tensor centers, Tensor counts, Tensor num_instances)"
)


@_ops.cpu("group_on_sphere")
def _group_cpu(
    points: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    threshold: float,
    min_size: int,
    max_instances: int | None,
    leftovers: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = new_labels(points)
    found = core.group_on_sphere(
        flat_embeddings(points),
        None if mask is None else flat_pixels(mask, points),
        offsets,
        flat_pixels(labels, points),
        threshold=threshold,
        min_size=min_size,
        nearest=leftovers == "nearest",
        threads=threads(),
    )
    check_capacity_holds(max_instances, found.largest)
    capacity = found.largest if max_instances is None else max_instances
    centers, counts, instances, iterations = new_tables(points, number_of_images(points, offsets), capacity)
    found.copy(centers, counts, instances, iterations)
    return labels, centers, counts, instances


@_ops.cuda("group_on_sphere")
def _group_cuda(
    points: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    threshold: float,
    min_size: int,
    max_instances: int | None,
    leftovers: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cuda_core = _native.cuda_core()
    labels = new_labels(points)
    capacity = cuda_capacity(points, offsets, max_instances)
    centers, counts, instances, _ = new_tables(points, number_of_images(points, offsets), capacity)
    flat = flat_embeddings(points)
    bytes_needed = cuda_core.group_on_sphere_cuda_workspace(flat, offsets)
    cuda_core.group_on_sphere_cuda(
        flat,
        None if mask is None else flat_pixels(mask, points),
        offsets,
        flat_pixels(labels, points),
        centers,
        counts,
        instances,
        points.new_empty(bytes_needed, dtype=torch.uint8),
        threshold=threshold,
        min_size=min_size,
        nearest=leftovers == "nearest",
        stream=_native.stream_of(points),
    )
    _native.check_overflow(instances, capacity)
    return labels, centers, counts, instances


@_ops.fake("group_on_sphere")
def _group_fake(
    points: Tensor, mask: Tensor | None, offsets: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    max_instances = options[2]
    capacity = fake_capacity(points, offsets, max_instances)
    centers, counts, instances, _ = new_tables(points, number_of_images(points, offsets), capacity)
    return new_labels(points), centers, counts, instances


_ops.not_differentiable("group_on_sphere")
