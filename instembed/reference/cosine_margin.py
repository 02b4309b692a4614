"""The cosine margin loss over all pairs: the definition that the kernels are tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from instembed._sphere import sampling, unit_vectors
from instembed.reference._images import split_images


def cosine_margin_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.5,
    samples: float | tuple[float, int] | None = None,
    squared: bool = False,
    background: int | None = 0,
    ignore_index: int | None = None,
    offsets: Tensor | None = None,
    normalize: bool = True,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of :func:`instembed.cosine_margin_loss`; differentiable any number of times."""
    if normalize or embeddings.dtype in (torch.float16, torch.bfloat16):
        embeddings = unit_vectors(embeddings) if normalize else embeddings.float()
    choice = sampling(samples)
    keys = torch.zeros(labels.shape, device=labels.device)
    if choice is not None:
        keys.uniform_(generator=generator)
    images = zip(
        split_images(embeddings, offsets),
        split_images(labels.unsqueeze(1), offsets),
        split_images(keys.unsqueeze(1), offsets),
        strict=True,
    )
    losses = []
    for points, ids, key in images:
        taken = torch.ones_like(ids[:, 0], dtype=torch.bool)
        for excluded in (background, ignore_index):
            if excluded is not None:
                taken &= ids[:, 0] != excluded
        chosen = taken.nonzero()[:, 0]
        if choice is not None:
            count = min(math.ceil(choice[0] * len(chosen)), choice[1])
            chosen = chosen[key[chosen, 0].argsort(stable=True)[:count]]
        losses.append(_image_loss(points[chosen], ids[chosen, 0], margin, squared))
    result = torch.stack(losses) if losses else embeddings.sum() * embeddings.new_zeros(0)
    if reduction == "none":
        return result
    return result.sum() if reduction == "sum" else result.sum() / max(len(result), 1)


def _image_loss(points: Tensor, ids: Tensor, margin: float, squared: bool) -> Tensor:
    if len(points) == 0:
        return points.sum()
    same = ids[:, None] == ids
    weights = 1 / same.sum(1).to(points.dtype)
    weights = weights / weights.sum()
    similarity = (1 + points @ points.T) / 2
    hinge = (similarity - margin).relu()  # without a gradient at the margin itself
    pairs = torch.where(same, 1 - similarity, hinge.square() if squared else hinge)
    return weights @ pairs @ weights
