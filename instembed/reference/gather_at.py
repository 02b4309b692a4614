"""Features at points in plain PyTorch: the definition that the kernels are tested against."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from instembed.reference.associative_embedding import nearest_pixel


def gather_at(
    features: Tensor, points: Tensor, *, valid: Tensor | None = None, mode: str = "nearest"
) -> Tensor:
    """(B, *P, C): what :func:`instembed.gather_at` gives; differentiable any number of times."""
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    if not points.is_floating_point():
        points = points.to(features.dtype)
    sizes = features.shape[:1:-1]  # of x, y, z
    last = torch.tensor([size - 1 for size in sizes], dtype=points.dtype, device=points.device)
    pixel = nearest_pixel(points)
    inside = ((pixel >= 0) & (pixel <= last)).all(-1)
    if valid is not None:
        inside = inside & (valid > 0)
    if 0 in sizes:
        return features.sum() * features.new_zeros(*points.shape[:-1], features.shape[1])

    points = torch.where(inside[..., None], points, 0)  # what is outside has no gradient
    if mode == "nearest":
        values = _at(features, torch.where(inside[..., None], pixel, 0))
    else:
        place = torch.minimum(points.clamp(min=0), last)
        low = place.detach().floor()
        share = (place - low).to(features.dtype)
        values = features.new_zeros(())
        for corner in itertools.product((0, 1), repeat=len(sizes)):
            high = torch.tensor(corner, dtype=torch.bool, device=points.device)
            weight = torch.where(high, share, 1 - share).prod(-1, keepdim=True)
            values = values + weight * _at(features, torch.minimum(low + high, last))
    return torch.where(inside[..., None], values, 0.0)


def _at(features: Tensor, pixel: Tensor) -> Tensor:
    """(B, *P, C) features at whole coordinates x, y, z inside the map."""
    index = torch.zeros_like(pixel[..., 0], dtype=torch.int64)
    for axis in range(pixel.shape[-1] - 1, -1, -1):
        index = index * features.shape[-1 - axis] + pixel[..., axis].long()
    rows = index.unsqueeze(1).flatten(1)[..., None].expand(-1, -1, features.shape[1])  # (B, N, C)
    values = features.flatten(2).transpose(1, 2).gather(1, rows)
    return values.reshape(*pixel.shape[:-1], features.shape[1])
