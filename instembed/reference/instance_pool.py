"""Instance pooling by its definition, one instance at a time."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from instembed.readout.instance_pool import InstanceFeaturesWithIds


def instance_pool(
    features: Tensor,
    labels: Tensor,
    *,
    reduce: str = "mean",
    max_instances: int | None = None,
    background: int | None = 0,
    ignore_index: int | None = None,
    offsets: Tensor | None = None,
) -> InstanceFeaturesWithIds:
    """The definition of :func:`instembed.instance_pool`, with ids; differentiable any number of times."""
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    images = list(_images(features, labels.to(torch.int64), offsets))
    found = [[i for i in ids.unique().tolist() if i not in (background, ignore_index)] for _, ids in images]
    largest = max((len(instances) for instances in found), default=0)
    if max_instances is not None and largest > max_instances:
        raise ValueError(f"max_instances={max_instances} is too small: an image has {largest} instances")
    capacity = largest if max_instances is None else max_instances

    nothing = features.flatten()[:0].sum()  # a zero that is attached to the graph
    pooled = nothing + features.new_zeros(len(images), capacity, features.shape[1])
    ids = torch.zeros(len(images), capacity, dtype=torch.int64, device=labels.device)
    counts = torch.zeros_like(ids)
    for b, ((points, image), instances) in enumerate(zip(images, found, strict=True)):
        for row, instance in enumerate(instances):
            members = points[image == instance]
            pooled = pooled.index_put(
                (counts.new_tensor(b), counts.new_tensor(row)), _reduced(members, reduce)
            )
            ids[b, row] = instance
            counts[b, row] = len(members)
    return InstanceFeaturesWithIds(pooled, counts > 0, ids, counts)


def _reduced(members: Tensor, reduce: str) -> Tensor:
    """(N, C) -> (C,)."""
    if reduce == "mean":
        return members.mean(0)
    if reduce == "sum":
        return members.sum(0)
    # The first of equal maxima takes the gradient; a NaN is larger than anything.
    largest = members.detach().amax(0)
    is_largest = torch.where(largest.isnan(), members.isnan(), members == largest)
    places = torch.arange(len(members), device=members.device)[:, None].expand_as(members)
    first = torch.where(is_largest, places, len(members)).amin(0)
    return members.gather(0, first[None])[0]


def _images(features: Tensor, labels: Tensor, offsets: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """(N, C) points and (N,) ids of each image."""
    if features.dim() > 2:
        return [(f.flatten(1).t(), ids.flatten()) for f, ids in zip(features, labels, strict=True)]
    bounds = [0, len(features)] if offsets is None else offsets.tolist()
    return [(features[a:b], labels[a:b]) for a, b in itertools.pairwise(bounds)]
