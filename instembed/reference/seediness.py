"""Seediness in plain PyTorch: the definition that the kernels are tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from instembed.reference.mean_shift import squared_distances


def squared_radius(threshold: float) -> float:
    """The squared distance at which the similarity 2 / (1 + exp(d^2)) is the threshold."""
    return math.log(2 - threshold) - math.log(threshold)


def seed_mask_iou(
    embeddings: Tensor,
    labels: Tensor,
    seeds: Tensor,
    thresholds: Sequence[float] = (0.25, 0.5, 0.75, 0.9),
    *,
    background: int | None = 0,
    ignore_index: int | None = None,
) -> Tensor:
    """(B, S, T), in float64: the definition of :func:`instembed.seed_mask_iou`."""
    iou = torch.zeros(*seeds.shape, len(thresholds), dtype=torch.float64, device=embeddings.device)
    for b, image in enumerate(embeddings.detach().to(torch.float64).flatten(2)):
        ids = labels[b].flatten().to(torch.int64)
        counted = torch.ones_like(ids, dtype=torch.bool) if ignore_index is None else ids != ignore_index
        for s, seed in enumerate(seeds[b].tolist()):
            if seed < 0 or not counted[seed] or ids[seed] == background:
                continue
            distances = squared_distances(image.t(), image[:, seed][None])[:, 0]
            instance = ids == ids[seed]
            for k, threshold in enumerate(thresholds):
                mask = (distances <= squared_radius(threshold)) & counted
                iou[b, s, k] = (mask & instance).sum().double() / (mask | instance).sum()
    return iou


def seediness_loss(
    logits: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    *,
    seeds: Tensor,
    classes: Tensor | None = None,
    thresholds: Sequence[float] = (0.25, 0.5, 0.75, 0.9),
    iou: float = 0.5,
    background: int | None = 0,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of :func:`instembed.seediness_loss`, for given seeds; differentiable any number of times."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    found = seed_mask_iou(
        embeddings, labels, seeds, thresholds, background=background, ignore_index=ignore_index
    )
    losses = []
    for b, image in enumerate(logits.flatten(3)):
        terms = []
        for s, seed in enumerate(seeds[b].tolist()):
            if seed < 0 or (ignore_index is not None and int(labels[b].flatten()[seed]) == ignore_index):
                continue
            label = 1 if classes is None else int(classes[b].flatten()[seed])
            for k in range(len(thresholds)):
                target = label if found[b, s, k] >= iou else 0
                terms.append(-F.log_softmax(image[k, :, seed], dim=0)[target])
        losses.append(torch.stack(terms).mean() if terms else image.flatten()[:0].sum())
    stacked = torch.stack(losses) if losses else logits.flatten()[:0]
    if reduction == "none":
        return stacked
    return stacked.sum() / (max(len(stacked), 1) if reduction == "mean" else 1)
