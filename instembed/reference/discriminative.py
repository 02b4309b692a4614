"""The discriminative loss in plain PyTorch: the definition that the kernels are tested against."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def discriminative_terms(
    embeddings: Tensor,
    labels: Tensor,
    *,
    offsets: Tensor | None = None,
    delta_var: float = 0.5,
    delta_dist: float = 1.5,
    norm: int = 2,
    background: int | None = 0,
    ignore_index: int | None = None,
    variance: str = "instance",
) -> Tensor:
    """(B, 4): variance, distance, regularization and background push of each image."""
    if embeddings.dtype in (torch.float16, torch.bfloat16):
        embeddings = embeddings.float()
    rows = []
    for points, ids in _images(embeddings, labels, offsets):
        rows.append(
            _image_terms(points, ids, delta_var, delta_dist, norm, background, ignore_index, variance)
        )
    return torch.stack(rows) if rows else embeddings.sum() * embeddings.new_zeros(0, 4)


def discriminative_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.001,
    background_push: float = 0.0,
    reduction: str = "mean",
    **options: object,
) -> Tensor:
    """The loss of :func:`instembed.discriminative_loss`; differentiable any number of times."""
    terms = discriminative_terms(embeddings, labels, **options)  # type: ignore[arg-type]
    losses = alpha * terms[:, 0] + beta * terms[:, 1] + gamma * terms[:, 2]
    if background_push > 0:
        losses = losses + background_push * terms[:, 3]
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / max(len(losses), 1)


def _images(embeddings: Tensor, labels: Tensor, offsets: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """(N, D) points and (N,) ids of each image."""
    if embeddings.dim() > 2:
        return [(e.flatten(1).t(), ids.flatten()) for e, ids in zip(embeddings, labels, strict=True)]
    bounds = [0, len(embeddings)] if offsets is None else offsets.tolist()
    return [(embeddings[a:b], labels[a:b]) for a, b in itertools.pairwise(bounds)]


def _distance(difference: Tensor, norm: int) -> Tensor:
    """Norm over the last dimension, with subgradient 0 at 0."""
    if norm == 1:
        return difference.abs().sum(-1)
    square = difference.square().sum(-1)
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _image_terms(
    points: Tensor,
    ids: Tensor,
    delta_var: float,
    delta_dist: float,
    norm: int,
    background: int | None,
    ignore_index: int | None,
    variance: str,
) -> Tensor:
    zero = points.sum() * 0 if points.numel() == 0 else points.flatten()[:0].sum()
    is_ignored = torch.zeros_like(ids, dtype=torch.bool) if ignore_index is None else ids == ignore_index
    is_background = torch.zeros_like(is_ignored) if background is None else (ids == background) & ~is_ignored
    instances = [ids == c for c in torch.unique(ids[~is_ignored & ~is_background])]
    count = len(instances)
    if count == 0:
        return torch.stack([zero] * 4)

    means = torch.stack([points[member].mean(0) for member in instances])  # (C, D)
    squares = [
        (_distance(mean - points[member], norm) - delta_var).clamp(min=0).square()
        for mean, member in zip(means, instances, strict=True)
    ]
    if variance == "instance":
        variance_term = torch.stack([s.mean() for s in squares]).mean()
    else:
        variance_term = torch.cat(squares).mean()

    distance_term = zero
    if count > 1:
        gaps = _distance(means[:, None] - means[None], norm)  # (C, C)
        hinges = (2 * delta_dist - gaps).clamp(min=0).square()
        distance_term = hinges[~torch.eye(count, dtype=torch.bool, device=gaps.device)].sum() / (
            count * (count - 1)
        )

    push_term = zero
    if is_background.any():
        gaps = _distance(points[is_background][:, None] - means[None], norm)  # (N_background, C)
        push_term = (delta_dist - gaps).clamp(min=0).square().mean(0).mean()

    return torch.stack([variance_term, distance_term, _distance(means, norm).mean(), push_term])
