"""One shape for the kernels: (B, D, N) and (B, N), whatever the user's layout, by views where possible."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from instembed import _ops


def flat_embeddings(embeddings: Tensor) -> Tensor:
    """(B, D, *spatial) -> (B, D, N); points (N, D) -> (1, D, N).

    Contiguous and channels-last tensors are not copied; others are where a view cannot do.
    """
    embeddings = embeddings.detach()
    if embeddings.dim() == 2:
        return embeddings.t().unsqueeze(0)
    return embeddings.flatten(2)


def flat_pixels(values: Tensor, embeddings: Tensor) -> Tensor:
    """(B, *spatial) -> (B, N); (N,) beside points -> (1, N)."""
    values = values.detach()
    return values.unsqueeze(0) if embeddings.dim() == 2 else values.flatten(1)


def at_pixels(values: Tensor, pixels: Tensor) -> Tensor:
    """(B, *, N) values at (B, S) pixels -> (B, *, S); for a pixel of -1 what is at pixel 0, or zero."""
    images, seeds = pixels.shape
    index = pixels.clamp(min=0).view(images, *[1] * (values.dim() - 2), seeds)
    index = index.expand(*values.shape[:-1], seeds)
    if values.shape[-1] == 0:
        return values.sum(-1, keepdim=True).expand(index.shape)
    return values.gather(-1, index)


def is_channels_last(embeddings: Tensor) -> bool:
    if embeddings.dim() == 4:
        return embeddings.is_contiguous(memory_format=torch.channels_last)
    return embeddings.dim() == 5 and embeddings.is_contiguous(memory_format=torch.channels_last_3d)


def memory_format(dims: int, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if dims == 4 else torch.channels_last_3d


def empty_gradient(embeddings: Tensor) -> Tensor:
    """An uninitialised gradient in the memory format of the embeddings where it is one of the usual two."""
    form = memory_format(embeddings.dim(), is_channels_last(embeddings))
    return torch.empty_like(embeddings, memory_format=form)


def number_of_images(embeddings: Tensor, offsets: Tensor | None) -> int:
    if embeddings.dim() != 2:
        return embeddings.shape[0]
    return 1 if offsets is None else offsets.shape[0] - 1


def cuda_capacity(embeddings: Tensor, offsets: Tensor | None, max_instances: int | None) -> int:
    """Instances an image for which an op on a GPU has room."""
    if max_instances is not None:
        return max_instances
    pixels = embeddings.numel() // embeddings.shape[1]
    images = max(number_of_images(embeddings, offsets), 1)
    return _ops.default_capacity(pixels // images * (1 if offsets is None else 16))


def fake_capacity(embeddings: Tensor, offsets: Tensor | None, max_instances: int | None) -> Any:
    """In a fake: what the op's own device would make of it."""
    if embeddings.device.type == "cuda":
        return cuda_capacity(embeddings, offsets, max_instances)
    return _ops.capacity(max_instances)


def accumulation_dtype(embeddings: Tensor) -> torch.dtype:
    return torch.float64 if embeddings.dtype == torch.float64 else torch.float32
