"""From the terms of each image to a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from instembed import _arguments as arguments

Reduction = Literal["mean", "sum", "none"]


def weighted_loss(terms: Tensor, weights: Sequence[float], reduction: Reduction) -> Tensor:
    """(B, T) terms and T weights to (B,), or its sum or mean: 0 for an empty batch."""
    if terms.is_cuda:  # numbers from the host would wait for it, and could not be captured in a graph
        by_image = terms[:, 0] * weights[0]
        for k in range(1, len(weights)):
            by_image = by_image + terms[:, k] * weights[k]
        return reduced(by_image, reduction)
    # Not a matrix product: autocast would take it in 16 bits.
    return reduced(terms * torch.tensor(weights, dtype=terms.dtype, device=terms.device), reduction)


def reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    """(B,) losses of the images, or the (B, T) terms that make them up: summed over T, or over all."""
    arguments.check_choice("reduction", reduction, ("mean", "sum", "none"))
    if reduction == "none":
        return losses.sum(1) if losses.dim() == 2 else losses
    total = losses.sum()
    return total / max(losses.shape[0], 1) if reduction == "mean" else total
