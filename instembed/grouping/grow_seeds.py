"""Grouping of embeddings into instances that grow from seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from instembed import _arguments as arguments
from instembed import _native, _ops
from instembed._native import core, threads
from instembed._pixels import accumulation_dtype, at_pixels, flat_embeddings, flat_pixels
from instembed._similarity import THRESHOLDS, check_logits, check_thresholds, squared_radii
from instembed.grouping.select_seeds import check_mask, select_seeds


class SeededGrouping(NamedTuple):
    """A :class:`Grouping`, and what the seed of each instance knows. Instances come best first."""

    labels: Tensor
    """(B, *spatial) int64: 0 for background, 1..K for the instances of each image, by descending score."""
    centers: Tensor
    """(B, S, D): the embedding of the seed of each instance, zeros beyond an image's instances."""
    counts: Tensor
    """(B, S) int64: pixels that carry each label."""
    num_instances: Tensor
    """(B,) int64."""
    scores: Tensor
    """(B, S) float32 (float64 for float64 seediness): the seediness of the seed."""
    classes: Tensor
    """(B, S) int64: 1..C, 0 beyond an image's instances."""
    seeds: Tensor
    """(B, S) int64: the seed's pixel over the flattened spatial dimensions, -1 beyond the instances."""


def grow_seeds(
    embeddings: Tensor,
    seediness: Tensor,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    num_seeds: int = 100,
    diversity: float = 0.3,
    min_seediness: float = 0.0,
    min_size: int = 1,
    overlap: float = 0.5,
    mask: Tensor | None = None,
) -> SeededGrouping:
    r"""Groups pixels into instances that grow from seeds (Fathi et al. 2017, arXiv 1703.10277).

    The seediness of a pixel is the largest of its scores over thresholds and classes without background; the
    seeds are :func:`select_seeds` of it. Each seed p has the threshold tau and the class of its largest score
    (of equals the first threshold, then the first class), and its mask is every pixel q with
    ``sigma(p, q) = 2 / (1 + exp(|e_p - e_q|^2)) >= tau``.

    Best score first, a seed is accepted if its mask has at least ``min_size`` pixels and shares at most
    ``overlap`` of the smaller of the two masks with that of each seed accepted before: masks of one instance
    at different thresholds lie in each other, and their IoU may be small. A pixel belongs to the most similar
    of the accepted seeds in whose mask it is, of equals to the better one. Instances that keep fewer than
    ``min_size`` pixels are given up, and their pixels go to the other accepted seeds in the same way.

    Args:
        embeddings: (B, D, *spatial) with 1 to 3 spatial dimensions, contiguous or channels-last (neither is
            copied). float32, float64, float16 or bfloat16.
        seediness: (B, T, C + 1, *spatial) scores of a floating dtype, class 0 background: the logits of a
            :class:`SeedinessHead` after ``softmax(2)``. Without classes C is 1.
        thresholds: T similarities in (0, 1] (paper: 0.25, 0.5, 0.75, 0.9).
        num_seeds: S, the most seeds, and the capacity of the outputs.
        diversity: weight of the distance from earlier seeds (paper: 0.3).
        min_seediness: pixels below are no seeds. 0, the default, is for average precision, which ranks
            instances by score; for a label map take 0.5 or so.
        min_size: an instance has at least so many pixels.
        overlap: the share of the smaller of two masks beyond which the worse seed is a duplicate (ours).
        mask: (B, *spatial), bool or of an integer dtype where 0 is background: other pixels are neither seeds
            nor in masks.

    Returns:
        :class:`SeededGrouping`, which :func:`detections` takes with its scores and classes. No gradients. A
        pixel whose embedding has a NaN or an infinity gets label 0; one with a NaN among its scores is no
        seed. Squared distances are in float64 with the channels added in order; the result depends on the
        input alone, not on threads. Memory beyond the inputs grows with S^2.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
    """
    arguments.check_embeddings("embeddings", embeddings, points=False)
    radii = squared_radii(check_thresholds(thresholds))
    check_logits("seediness", seediness, embeddings, len(radii))
    mask = check_mask(mask, embeddings)
    minimum = arguments.check_integer("min_size", min_size, at_least=1)
    if not 0 <= arguments.check_number("overlap", overlap) <= 1:
        raise ValueError(f"overlap must be from 0 to 1, got {overlap}")
    seeds, scores = select_seeds(
        embeddings,
        seediness[:, :, 1:].amax((1, 2)),
        num_seeds,
        diversity=diversity,
        min_seediness=min_seediness,
        mask=mask,
    )
    at_seeds = at_pixels(seediness.flatten(3), seeds)[:, :, 1:]  # (B, T, C, S)
    best = at_seeds.flatten(1, 2).argmax(1)  # (B, S)
    threshold = best // at_seeds.shape[2]
    return SeededGrouping(
        *torch.ops.instembed.grow_seeds(
            embeddings,
            mask,
            seeds,
            scores,
            best % at_seeds.shape[2] + 1,
            _radius_of(threshold, radii),
            minimum,
            float(overlap),
        )
    )


def _radius_of(threshold: Tensor, radii: Sequence[float]) -> Tensor:
    """``radii[threshold]`` in float64, without a copy from the host, for which a GPU would make it wait."""
    radius = torch.zeros_like(threshold, dtype=torch.float64)
    for k, value in enumerate(radii):
        radius.masked_fill_(threshold == k, value)
    return radius


# The op: the seeds are chosen already, with their scores, classes and squared radii (B, S).

_ops.define(
    "grow_seeds(Tensor embeddings, Tensor? mask, Tensor seeds, Tensor scores, Tensor classes, Tensor radii, "
    "SymInt min_size, float overlap) -> (Tensor labels, Tensor centers, Tensor counts, Tensor num_instances, "
    "Tensor scores, Tensor classes, Tensor seeds)"
)


def _new_outputs(
    embeddings: Tensor, seeds: Tensor, scores: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    images, capacity = seeds.shape
    labels = embeddings.new_empty((images, *embeddings.shape[2:]), dtype=torch.int64)
    centers = embeddings.new_empty(
        (images, capacity, embeddings.shape[1]), dtype=accumulation_dtype(embeddings)
    )
    counts = seeds.new_empty((images, capacity))
    tables = torch.empty_like(scores), torch.empty_like(classes), torch.empty_like(seeds)
    return labels, centers, counts, counts.new_empty(images), *tables


@_ops.cpu("grow_seeds")
def _grow_cpu(
    embeddings: Tensor,
    mask: Tensor | None,
    seeds: Tensor,
    scores: Tensor,
    classes: Tensor,
    radii: Tensor,
    min_size: int,
    overlap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    labels, _, counts, num_instances, *_ = _new_outputs(embeddings, seeds, scores, classes)
    order = torch.empty_like(counts)
    core.grow_seeds(
        flat_embeddings(embeddings),
        None if mask is None else flat_pixels(mask, embeddings),
        seeds.contiguous(),
        scores.to(torch.float64).contiguous(),
        radii.contiguous(),
        flat_pixels(labels, embeddings),
        order,
        counts,
        num_instances,
        min_size=min_size,
        overlap=overlap,
        threads=threads(),
    )
    tables = _tables_of(order, embeddings, seeds, scores, classes)
    return labels, tables[0], counts, num_instances, *tables[1:]


@_ops.cuda("grow_seeds")
def _grow_cuda(
    embeddings: Tensor,
    mask: Tensor | None,
    seeds: Tensor,
    scores: Tensor,
    classes: Tensor,
    radii: Tensor,
    min_size: int,
    overlap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    cuda_core = _native.cuda_core()
    labels, _, counts, num_instances, *_ = _new_outputs(embeddings, seeds, scores, classes)
    order = torch.empty_like(counts)
    flat, pixels = flat_embeddings(embeddings), seeds.contiguous()
    cuda_core.grow_seeds_cuda(
        flat,
        None if mask is None else flat_pixels(mask, embeddings),
        pixels,
        scores.to(torch.float64).contiguous(),
        radii.contiguous(),
        flat_pixels(labels, embeddings),
        order,
        counts,
        num_instances,
        embeddings.new_empty(cuda_core.grow_seeds_cuda_workspace(flat, pixels), dtype=torch.uint8),
        min_size=min_size,
        overlap=overlap,
        stream=_native.stream_of(embeddings),
    )
    tables = _tables_of(order, embeddings, seeds, scores, classes)
    return labels, tables[0], counts, num_instances, *tables[1:]


def _tables_of(
    order: Tensor, embeddings: Tensor, seeds: Tensor, scores: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centres, scores, classes and seeds of the instances, whose places among the seeds are in ``order``."""
    found, rows = order >= 0, order.clamp(min=0)
    chosen = torch.where(found, seeds.gather(1, rows), -1)
    centers = at_pixels(embeddings.flatten(2), chosen).mT.to(accumulation_dtype(embeddings))
    return (
        torch.where(found[..., None], centers, 0).contiguous(),
        torch.where(found, scores.gather(1, rows), 0),
        torch.where(found, classes.gather(1, rows), 0),
        chosen,
    )


@_ops.fake("grow_seeds")
def _grow_fake(
    embeddings: Tensor, mask: Tensor | None, seeds: Tensor, scores: Tensor, classes: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _new_outputs(embeddings, seeds, scores, classes)


_ops.not_differentiable("grow_seeds")
