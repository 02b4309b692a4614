"""The unit sphere that recurrent pixel embedding lives on."""

from __future__ import annotations

import torch
from torch import Tensor

SHORTEST = 1e-12  # torch.nn.functional.normalize's eps
ALL = 2**62  # more pixels than there are


def unit_vectors(vectors: Tensor) -> Tensor:
    """(B, D, *spatial) or (N, D) scaled to length 1 over D, differentiable; float16 and bfloat16 in float32.

    A vector whose elements are all within 1e-12 of zero becomes zero and gets a gradient of zero. One with a
    NaN or an infinity becomes NaN. Neither small nor large elements under- or overflow.
    """
    if vectors.dtype in (torch.float16, torch.bfloat16):
        vectors = vectors.float()
    largest = vectors.detach().abs().amax(1, keepdim=True)
    none = largest <= SHORTEST  # not so for NaN
    scaled = vectors / torch.where(none, 1.0, largest)
    length = torch.linalg.vector_norm(torch.where(none, 1.0, scaled), dim=1, keepdim=True)
    return torch.where(none, 0.0, scaled / length)


def moved_by_a_constant(start: Tensor, points: Tensor) -> Tensor:
    """The values of points, with the gradient of start + constant put back on the sphere."""
    moved = unit_vectors(points.detach() + (start - start.detach()))
    return points.detach() + (moved - moved.detach())


def sampling(samples: float | tuple[float, int] | None) -> tuple[float, int] | None:
    """What share of an image's pixels to draw, and how many at most; None for all of them."""
    if samples is None:
        return None
    if isinstance(samples, tuple):
        return samples
    return (1.0, samples) if isinstance(samples, int) else (samples, ALL)
