"""The loss of deep metric learning in plain PyTorch: the definition that the kernels are tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from instembed.reference.sample_pixels import sample_pixels

NEAREST = 1e-6  # squared distance: pixels of two instances that are nearer count as so far apart
LARGEST = 1e15  # coordinates beyond count as this, so that the square of any fits a float32


def pairwise_similarity_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    samples: int = 16,
    background: int | None = 0,
    ignore_index: int | None = None,
    offsets: Tensor | None = None,
    generator: torch.Generator | None = None,
    max_instances: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of :func:`instembed.pairwise_similarity_loss`; differentiable any number of times."""
    indices, _ = sample_pixels(
        labels,
        samples,
        background=background,
        ignore_index=ignore_index,
        offsets=offsets,
        generator=generator,
        max_instances=max_instances,
    )
    losses = pairwise_similarity(embeddings, indices)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / max(len(losses), 1)


def pairwise_similarity(embeddings: Tensor, indices: Tensor) -> Tensor:
    """(B,) losses of pixels that are chosen already: indices (B, C, K), -1 for none."""
    if embeddings.dtype in (torch.float16, torch.bfloat16):
        embeddings = embeddings.float()
    losses = []
    for b, chosen in enumerate(indices):
        points = embeddings if embeddings.dim() == 2 else embeddings[b].flatten(1).t()
        valid = chosen >= 0
        instances = torch.arange(len(chosen), device=chosen.device)[:, None].expand(chosen.shape)[valid]
        shares = (1 / valid.sum(1, keepdim=True).to(points.dtype)).expand(chosen.shape)[valid]
        losses.append(_image_loss(points[chosen[valid]], instances, shares))
    return torch.stack(losses) if losses else embeddings.flatten()[:0]


def _image_loss(points: Tensor, instances: Tensor, shares: Tensor) -> Tensor:
    """Points (M, D) with their instances, and 1 over the number of points of the instance."""
    points = torch.where(points.isfinite(), points.clamp(-LARGEST, LARGEST), math.nan)
    first, second = torch.triu_indices(len(points), len(points), 1, device=points.device)
    weights = shares[first] * shares[second]
    d = (points[first] - points[second]).square().sum(1)
    same = d + (-d).exp().log1p() - math.log(2)  # -log sigma
    different = _minus_log_tanh(d.clamp(min=NEAREST) / 2)  # -log(1 - sigma)
    terms = torch.where(instances[first] == instances[second], same, different)
    total = weights.sum()
    return (weights * terms).sum() / torch.where(total > 0, total, 1)


def _minus_log_tanh(x: Tensor) -> Tensor:
    """Of x > 0. log1p keeps what is left of it at large x, where tanh is 1."""
    return torch.where(x < 1, -x.clamp(max=1).tanh().log(), 2 * (-2 * x.clamp(min=1)).exp().atanh())
