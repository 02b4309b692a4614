"""Seeds and the instances that grow from them by their definitions, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from instembed.grouping.grow_seeds import SeededGrouping
from instembed.grouping.select_seeds import Seeds
from instembed.reference.mean_shift import squared_distances
from instembed.reference.seediness import squared_radius


def select_seeds(
    embeddings: Tensor,
    seediness: Tensor,
    num_seeds: int,
    *,
    diversity: float = 0.3,
    min_seediness: float = 0.0,
    mask: Tensor | None = None,
) -> Seeds:
    """The definition of :func:`instembed.select_seeds`: one seed at a time, all pixels each time."""
    indices = torch.full((len(embeddings), num_seeds), -1, dtype=torch.int64, device=embeddings.device)
    scores = torch.zeros(indices.shape, dtype=torch.float64, device=embeddings.device)
    for b in range(len(embeddings)):
        points = embeddings[b].detach().to(torch.float64).flatten(1).t()
        values = seediness[b].detach().to(torch.float64).flatten()
        eligible = points.isfinite().all(1) & values.isfinite() & (values > 0) & (values >= min_seediness)
        if mask is not None:
            eligible &= mask[b].flatten() != 0
        objective = values
        nearest = torch.full_like(values, torch.inf)
        for k in range(num_seeds):
            if not eligible.any():
                break
            seed = int(torch.where(eligible, objective, -torch.inf).argmax())
            if not eligible[seed]:  # the objective is -inf wherever a seed may be
                seed = int(torch.nonzero(eligible)[0])
            indices[b, k], scores[b, k] = seed, values[seed]
            nearest = torch.minimum(nearest, squared_distances(points, points[seed][None])[:, 0])
            eligible &= nearest > 0  # the pixel itself, and all with the same embedding
            objective = values.log() + (diversity * nearest.log() if diversity > 0 else 0)
    return Seeds(indices, scores.to(torch.promote_types(seediness.dtype, torch.float32)))


def grow_seeds(
    embeddings: Tensor,
    seediness: Tensor,
    *,
    thresholds: Sequence[float] = (0.25, 0.5, 0.75, 0.9),
    num_seeds: int = 100,
    diversity: float = 0.3,
    min_seediness: float = 0.0,
    min_size: int = 1,
    overlap: float = 0.5,
    mask: Tensor | None = None,
) -> SeededGrouping:
    """The definition of :func:`instembed.grow_seeds`, for tests and devices without a kernel."""
    seeds, scores = select_seeds(
        embeddings,
        seediness[:, :, 1:].amax((1, 2)),
        num_seeds,
        diversity=diversity,
        min_seediness=min_seediness,
        mask=mask,
    )
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    spatial = embeddings.shape[2:]
    table = embeddings.new_zeros((*seeds.shape, embeddings.shape[1]), dtype=dtype).detach()
    result = SeededGrouping(
        labels=seeds.new_zeros((len(seeds), *spatial)),
        centers=table,
        counts=torch.zeros_like(seeds),
        num_instances=torch.zeros_like(seeds[:, :0].sum(1)),
        scores=torch.zeros_like(scores),
        classes=torch.zeros_like(seeds),
        seeds=torch.full_like(seeds, -1),
    )
    for b in range(len(embeddings)):
        points = embeddings[b].detach().to(torch.float64).flatten(1).t()
        inside = torch.ones_like(points[:, 0], dtype=torch.bool) if mask is None else mask[b].flatten() != 0
        order = torch.sort(scores[b], descending=True, stable=True).indices
        places = [k for k in order.tolist() if seeds[b, k] >= 0]
        distances, masks, classes = [], [], []
        for k in places:
            at_seed = seediness[b, :, 1:].flatten(2)[:, :, int(seeds[b, k])]  # (T, C)
            best = int(at_seed.flatten().argmax())
            classes.append(best % at_seed.shape[1] + 1)
            squared = squared_distances(points, points[seeds[b, k]][None])[:, 0]
            distances.append(squared)
            masks.append((squared <= squared_radius(thresholds[best // at_seed.shape[1]])) & inside)
        accepted = _accepted(masks, min_size, overlap)
        owner = _owners(distances, masks, accepted, points)
        while any(int((owner == k).sum()) < min_size for k in accepted):
            accepted = [k for k in accepted if int((owner == k).sum()) >= min_size]
            owner = _owners(distances, masks, accepted, points)
        for row, k in enumerate(accepted):
            result.labels[b].view(-1)[owner == k] = row + 1
            result.centers[b, row] = points[seeds[b, places[k]]].to(dtype)
            result.counts[b, row] = (owner == k).sum()
            result.scores[b, row] = scores[b, places[k]]
            result.classes[b, row] = classes[k]
            result.seeds[b, row] = seeds[b, places[k]]
        result.num_instances[b] = len(accepted)
    return result


def _accepted(masks: list[Tensor], min_size: int, overlap: float) -> list[int]:
    """Masks come best first; one that shares too much of the smaller of two is a duplicate."""
    accepted: list[int] = []
    for k, mask in enumerate(masks):
        size = int(mask.sum())
        shared = [int((mask & masks[j]).sum()) > overlap * min(size, int(masks[j].sum())) for j in accepted]
        if size >= min_size and not any(shared):
            accepted.append(k)
    return accepted


def _owners(distances: list[Tensor], masks: list[Tensor], accepted: list[int], points: Tensor) -> Tensor:
    """The nearest of the accepted seeds whose mask a pixel is in, the first of equals; -1: none."""
    if not accepted:
        return torch.full_like(points[:, 0], -1, dtype=torch.int64)
    each = torch.stack([torch.where(masks[k], distances[k], torch.inf) for k in accepted])
    owner = torch.tensor(accepted, device=points.device)[each.argmin(0)]
    covered = torch.stack([masks[k] for k in accepted]).any(0)
    return torch.where(covered, owner, -1)
