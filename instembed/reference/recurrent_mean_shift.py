"""Mean shift on the sphere by its matrix, or by attention: what the kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from instembed._sphere import moved_by_a_constant, unit_vectors
from instembed.reference._images import split_images

TILE = 64  # points that the kernels leave out together


def recurrent_mean_shift(
    embeddings: Tensor,
    bandwidth: float,
    *,
    iterations: int = 5,
    step: float = 1.0,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    tolerance: float = 0.0,
    return_all: bool = False,
    backprop_iterations: int | None = None,
    attention: bool = False,
) -> Tensor:
    """The definition of :func:`instembed.recurrent_mean_shift`; differentiable any number of times.

    ``tolerance`` sets all kernel values below tolerance / 64 to zero. ``attention`` replaces the N x N matrix
    by ``scaled_dot_product_attention``, which does not store it and knows no tolerance: for devices without
    a kernel.
    """
    start = unit_vectors(embeddings)
    flags = torch.ones_like(start[:, :1]) if mask is None else mask.unsqueeze(1)
    constant = 0 if backprop_iterations is None else max(iterations - backprop_iterations, 0)
    iterates = [start]
    for iteration in range(iterations):
        before = iterates[-1].detach() if iteration < constant else iterates[-1]
        images = [
            _shift(points, taken[:, 0] != 0, bandwidth, step, tolerance, attention)
            for points, taken in zip(split_images(before, offsets), split_images(flags, offsets), strict=True)
        ]
        after = _join(images, before)
        iterates.append(moved_by_a_constant(start, after) if iteration < constant else after)
    return torch.stack(iterates) if return_all else iterates[-1]


def _shift(
    points: Tensor, taken: Tensor, bandwidth: float, step: float, tolerance: float, attention: bool
) -> Tensor:
    """One iteration for an image's points (N, D); those that are no unit vectors stay where they are."""
    square = points.detach().square().sum(1)
    taken = taken & (square > 0.5) & (square < 2)  # not so for zero and NaN
    x = points[taken]
    if attention:
        query = x[None, None]
        y = functional.scaled_dot_product_attention(query, query, query, scale=bandwidth**-2)[0, 0]
    else:
        kernel = torch.exp((x @ x.T - 1) / bandwidth**2)
        kernel = torch.where(kernel < tolerance / TILE, 0.0, kernel)
        y = kernel @ x / kernel.sum(1, keepdim=True)
    shifted = points.clone()
    shifted[taken] = unit_vectors(step * y + (1 - step) * x)
    return shifted


def _join(images: list[Tensor], like: Tensor) -> Tensor:
    if not images:
        return like
    if like.dim() == 2:
        return torch.cat(images)
    return torch.stack([image.T.reshape(like.shape[1:]) for image in images])
