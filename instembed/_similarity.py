"""The similarity of deep metric learning, sigma = 2 / (1 + exp(d^2)), and thresholds of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from instembed import _arguments as arguments

THRESHOLDS = (0.25, 0.5, 0.75, 0.9)  # Fathi et al. 2017


def check_thresholds(thresholds: object) -> list[float]:
    values = arguments.check_sequence("thresholds", thresholds)
    if not values:
        raise ValueError("thresholds must have at least one similarity, got none")
    for value in values:
        if not 0 < arguments.check_number("thresholds", value) <= 1:
            raise ValueError(f"thresholds must be greater than 0 and at most 1, got {value}")
    return [float(value) for value in values]


def squared_radii(thresholds: Sequence[float]) -> list[float]:
    """The squared distances at which the similarity is each threshold."""
    return [math.log(2 - threshold) - math.log(threshold) for threshold in thresholds]


def check_logits(name: str, value: object, embeddings: Tensor, thresholds: int) -> Tensor:
    """(B, T, C + 1, *spatial), a score for each threshold and class at each pixel of embeddings."""
    tensor = arguments.check_floating_tensor(name, value)
    images, spatial = embeddings.shape[0], embeddings.shape[2:]
    fits = (
        tensor.dim() == embeddings.dim() + 1
        and tensor.shape[:2] == (images, thresholds)
        and tensor.shape[2] >= 2
        and tensor.shape[3:] == spatial
    )
    if not fits:
        raise ValueError(
            f"{name} must be (B, T, C + 1, *spatial) with B = {images} images, T = {thresholds} thresholds, "
            f"C >= 1 classes and spatial dimensions {tuple(spatial)}, got shape {tuple(tensor.shape)}"
        )
    arguments.check_same_device(name, tensor, "embeddings", embeddings)
    return tensor
