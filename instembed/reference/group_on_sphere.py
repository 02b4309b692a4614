"""Connected components on the sphere by the whole matrix: what the kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from instembed._sphere import unit_vectors
from instembed.reference._images import split_images


def group_on_sphere(
    embeddings: Tensor,
    *,
    threshold: float,
    min_size: int = 1,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    leftovers: str = "noise",
) -> tuple[Tensor, list[Tensor]]:
    """The labels of :func:`instembed.group_on_sphere`, and the (K, D) centres of each image."""
    points = unit_vectors(embeddings.detach())
    flags = torch.ones_like(points[:, :1]) if mask is None else mask.unsqueeze(1)
    labels, centers = [], []
    for image, taken in zip(split_images(points, offsets), split_images(flags, offsets), strict=True):
        of_image, of_instances = _group(
            image.double(), taken[:, 0] != 0, threshold, min_size, leftovers == "nearest"
        )
        labels.append(of_image)
        centers.append(of_instances)
    shape = embeddings.shape[:1] if embeddings.dim() == 2 else embeddings.shape[:1] + embeddings.shape[2:]
    return torch.cat([points.new_zeros(0, dtype=torch.int64), *labels]).view(shape), centers


def _group(
    points: Tensor, taken: Tensor, threshold: float, min_size: int, nearest: bool
) -> tuple[Tensor, Tensor]:
    square = points.square().sum(1)
    taken = (taken & (square > 0.5) & (square < 2)).nonzero()[:, 0]  # not so for zero and NaN
    x = points[taken]
    connected = x @ x.T >= threshold
    connected.fill_diagonal_(True)
    lowest = torch.arange(len(x), device=x.device)
    while len(x):  # each point takes the lowest number among its neighbours, until nothing changes
        candidates = torch.where(connected, lowest, len(x)).amin(1)
        if torch.equal(candidates, lowest):
            break
        lowest = candidates[candidates]
    roots, inverse, sizes = lowest.unique(return_inverse=True, return_counts=True)
    kept = sizes >= min_size
    numbers = torch.where(kept, kept.cumsum(0), 0)
    found = numbers[inverse] if len(roots) else lowest
    count = int(kept.sum())
    sums = points.new_zeros(count + 1, points.shape[1]).index_add_(0, found, x)[1:]
    centers = unit_vectors(sums)
    if nearest and count:
        found = torch.where(found == 0, 1 + (x @ centers.T).argmax(1), found)
    labels = points.new_zeros(len(points), dtype=torch.int64)
    labels[taken] = found
    return labels, centers
