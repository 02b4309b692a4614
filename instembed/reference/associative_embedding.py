"""The associative embedding loss in plain PyTorch: the definition that the kernels are tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def associative_embedding_terms(
    tags: Tensor,
    keypoints: Tensor | None,
    visible: Tensor,
    *,
    kind: str = "exp",
    sigma: float = math.sqrt(0.5),
    margin: float = 1.0,
) -> Tensor:
    """(B, 2): pull and push of each image."""
    if tags.dtype in (torch.float16, torch.bfloat16):
        tags = tags.float()
    rows = []
    for b in range(len(tags)):
        people = _people(tags[b], None if keypoints is None else keypoints[b], visible[b] > 0)
        rows.append(_image_terms(tags[b], people, kind, sigma, margin))
    return torch.stack(rows) if rows else tags.sum() * tags.new_zeros(0, 2)


def associative_embedding_loss(
    tags: Tensor,
    keypoints: Tensor | None,
    visible: Tensor,
    *,
    pull_weight: float = 1.0,
    push_weight: float = 1.0,
    reduction: str = "mean",
    **options: object,
) -> Tensor:
    """The loss of :func:`instembed.associative_embedding_loss`; differentiable any number of times."""
    terms = associative_embedding_terms(tags, keypoints, visible, **options)  # type: ignore[arg-type]
    losses = pull_weight * terms[:, 0] + push_weight * terms[:, 1]
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / max(len(losses), 1)


def nearest_pixel(coordinates: Tensor) -> Tensor:
    """The pixel that a coordinate lies in; ties go up. Not floor(x + 0.5), which is rounded itself."""
    below = coordinates.floor()
    return below + (coordinates - below >= 0.5)


def _people(tags: Tensor, keypoints: Tensor | None, visible: Tensor) -> list[Tensor]:
    """(joints that count, L) tags of each person that has one."""
    people = []
    for n, flags in enumerate(visible.tolist()):
        joints = []
        for k, flag in enumerate(flags):
            if not flag:
                continue
            if keypoints is None:
                joints.append(tags[n, k])
                continue
            x, y = nearest_pixel(keypoints[n, k].cpu().double()).tolist()
            height, width = tags.shape[-2:]
            if 0 <= x < width and 0 <= y < height:  # never so for NaN
                joints.append(tags.unflatten(0, (len(flags), -1))[k, :, int(y), int(x)])
        if joints:
            people.append(torch.stack(joints))
    return people


def _image_terms(tags: Tensor, people: list[Tensor], kind: str, sigma: float, margin: float) -> Tensor:
    zero = tags.flatten()[:0].sum()
    count = len(people)
    if count == 0:
        return torch.stack([zero, zero])
    means = torch.stack([person.mean(0) for person in people])  # (N, L)
    pulls = [(person - mean).square().sum(1).mean() for person, mean in zip(people, means, strict=True)]
    push = zero
    if count > 1:
        square = (means[:, None] - means[None]).square().sum(-1)  # (N, N)
        if kind == "exp":
            pushes = torch.exp(-square / (2 * sigma**2))
        else:
            same = square == 0  # where the distance has subgradient 0
            distance = torch.where(same, 0.0, torch.where(same, 1.0, square).sqrt())
            pushes = (margin - distance).clamp(min=0)
        others = ~torch.eye(count, dtype=torch.bool, device=square.device)
        push = 0.5 * pushes[others].sum() / (count * (count - 1))
    return torch.stack([torch.stack(pulls).mean(), push])
