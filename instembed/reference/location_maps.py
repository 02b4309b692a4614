"""The occlusion-robust read-out of location maps in plain Python and PyTorch: its definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from instembed.reference.associative_embedding import nearest_pixel


def read_location_maps(
    maps: Tensor, keypoints: Tensor, valid: Tensor, *, limbs: Sequence[Sequence[int]], root: Sequence[int]
) -> Tensor:
    """(B, P, K, 3): what :func:`instembed.read_location_maps` gives; differentiable in the maps."""
    height, width = maps.shape[2:]
    images = []
    for b in range(len(maps)):
        people = []
        for n in range(keypoints.shape[1]):
            pixels = {}  # of the joints that can be read at
            for k, (x, y) in enumerate(nearest_pixel(keypoints[b, n].cpu().double()).tolist()):
                if valid[b, n, k] > 0 and 0 <= x < width and 0 <= y < height:
                    pixels[k] = (int(x), int(y))
            people.append(_person(maps[b], pixels, keypoints.shape[2], limbs, root))
        images.append(torch.stack(people) if people else maps.new_zeros(0, keypoints.shape[2], 3))
    if not images:
        return maps.new_zeros(*keypoints.shape[:3], 3) + maps.sum()
    return torch.stack(images)


def _person(
    maps: Tensor,
    pixels: dict[int, tuple[int, int]],
    joints: int,
    limbs: Sequence[Sequence[int]],
    root: Sequence[int],
) -> Tensor:
    """(K, 3) of a person with joints at pixels."""
    read_at: list[tuple[int, int] | None] = [None] * joints
    for k in root:
        if k in pixels:
            read_at = [pixels[k]] * joints
            break
    for limb in limbs:
        for k in limb:
            if k in pixels:
                for joint in limb:
                    read_at[joint] = pixels[k]
                break
    rows = []
    for joint, at in enumerate(read_at):
        rows.append(maps.new_zeros(3) if at is None else maps[3 * joint : 3 * joint + 3, at[1], at[0]])
    return torch.stack(rows)
